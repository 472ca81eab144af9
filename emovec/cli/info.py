"""``emovec info``: what this installation can do, and which kernel runs which shape."""

from __future__ import annotations

import importlib.util
import platform
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.table import Table

from emovec.bank import shipped_banks
from emovec.cli.common import JsonOption, out, print_json
from emovec.ops import LANES

SHAPES = ((1, 576), (8, 576), (512, 576), (1, 4096), (8, 4096), (64, 4096), (512, 4096), (4096, 4096))
CONCEPTS = 171
EXTRAS = {"hf": "transformers", "cli": "typer", "report": "pandas", "gguf": "gguf", "triton": "triton"}
FEATURES = ("avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl", "avx512_bf16", "amx_bf16")


def info(
    plan: Annotated[tuple[int, int] | None, typer.Option(help="Only how N tokens of width d are done.", metavar="N D")] = None,
    concepts: Annotated[int, typer.Option(help="K, for the plan.", min=1, max=1024)] = CONCEPTS,
    json: JsonOption = False,
) -> None:
    """Backends, processor features, shipped banks, and the plan for each shape."""
    if plan is not None and min(plan) < 1:
        raise typer.BadParameter(f"N and d must be at least 1, got {plan[0]} {plan[1]}", param_hint="--plan")
    plans = [plan_of(n, d, concepts) for n, d in ([plan] if plan else SHAPES)]
    facts = {} if plan else {"emovec": metadata.version("emovec"), **_installation()}
    if json:
        print_json({**facts, "plans": plans})
        return
    for key, value in facts.items():
        if isinstance(value, dict):
            value = ", ".join(f"{name} {said}" for name, said in value.items())
        out.print(f"[bold]{key}[/]: {value}", soft_wrap=True)
    threads = torch.get_num_threads()
    table = Table(title=f"CPU, bf16, {concepts} concepts, {threads} threads", box=None, pad_edge=False, title_justify="left")
    for column in ("tokens", "width", "kernel", "spread over threads", "tile", "MB from memory", "Mflop"):
        table.add_column(column, justify="left" if column in ("kernel", "spread over threads") else "right")
    for row in plans:
        cells = (row["tokens"], row["width"], row["kernel"], row["split"], row["tile"])
        table.add_row(*map(str, cells), f"{row['bytes'] / 1e6:.2f}", f"{row['operations'] / 1e6:,.0f}")
    out.print(table)


def plan_of(tokens: int, width: int, concepts: int) -> dict[str, Any]:
    """How a CPU call that reads and adds is done, and what it must move and compute, in bf16."""
    from emovec import _host

    split, tile = _host.plan(tokens, width, concepts, torch.get_num_threads())
    padded = -(-concepts // LANES) * LANES
    moved = 2 * padded * width + 2 * 2 * tokens * width + 4 * tokens * concepts  # readers; x read and written; scores
    return {
        "tokens": tokens,
        "width": width,
        "kernel": _host.fastest(),
        "split": split,
        "tile": tile,
        "bytes": moved,
        "operations": 2 * tokens * width * padded,
    }


def _installation() -> dict[str, Any]:
    from emovec import _host

    kernels = {
        name: "runs" if _host.runs(name) else "built" if name.startswith("cuda") else "not on this processor" for name in _host.kernels()
    }
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "processor": _processor(),
        "kernels": kernels,
        "default on a CPU": _host.fastest(),
        "gpu": _gpu(kernels),
        "extras": {extra: "installed" if importlib.util.find_spec(module) else "missing" for extra, module in EXTRAS.items()},
        "banks": ", ".join(shipped_banks()) or "none",
    }


def _processor() -> str:
    """The model's name and what of it the kernels use, where the system tells."""
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/cpuinfo").read_text().splitlines() if ":" in line)
    except (OSError, ValueError):
        return platform.processor() or platform.machine()
    facts = {key.strip(): value.strip() for key, value in lines.items()}
    flags = facts.get("flags", "").split()
    return (
        f"{facts.get('model name', platform.machine())} ({', '.join(flag for flag in FEATURES if flag in flags) or 'no vector extensions'})"
    )


def _gpu(kernels: dict[str, str]) -> str:
    if not torch.cuda.is_available():
        return "none that this torch can use"
    names = ", ".join(torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count()))
    native = any(name.startswith("cuda") for name in kernels)
    return f"{names}; " + ("CUDA kernels" if native else "Triton" if importlib.util.find_spec("triton") else "the reference in plain torch")
