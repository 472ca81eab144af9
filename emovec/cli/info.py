"""``emovec info``: what this installation can do, and which kernel runs which shape."""

from __future__ import annotations

import importlib.util
import platform
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.table import Table

from emovec.bank import shipped_banks
from emovec.cli.common import JsonOption, dtype_of, out, print_json
from emovec.ops import MAX_CONCEPTS
from emovec.plan import DEVICES, Plan, has_cuda
from emovec.plan import plan as plan_of

SHAPES = ((1, 576), (8, 576), (512, 576), (1, 4096), (8, 4096), (64, 4096), (512, 4096), (4096, 4096))
CONCEPTS = 171
EXTRAS = {"hf": "transformers", "cli": "typer", "report": "pandas", "gguf": "gguf", "triton": "triton"}
FEATURES = ("avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl", "avx512_bf16", "amx_bf16")


def info(
    plan: Annotated[tuple[int, int] | None, typer.Option(help="Only how N tokens of width d are done.", metavar="N D")] = None,
    concepts: Annotated[int, typer.Option(help="K, for the plan.", min=1, max=MAX_CONCEPTS)] = CONCEPTS,
    device: Annotated[
        list[str] | None,
        typer.Option(help=f"cpu, cuda, {', '.join(DEVICES)}, for the plan; may be given several times. Default: all it knows."),
    ] = None,
    mode: Annotated[str, typer.Option(help="read, add or rules, for the plan.")] = "add",
    dtype: Annotated[str, typer.Option(help="fp32, bf16 or fp16, for the plan.")] = "bf16",
    precision: Annotated[str, typer.Option(help="fast or high: readers that are not rounded to the dtype, for the plan.")] = "fast",
    json: JsonOption = False,
) -> None:
    """Backends, processor features, shipped banks, and the plan for each shape."""
    if plan is not None and min(plan) < 1:
        raise typer.BadParameter(f"N and d must be at least 1, got {plan[0]} {plan[1]}", param_hint="--plan")
    here = ["cpu"] + (["cuda"] if has_cuda() and torch.cuda.is_available() else [])
    every = here + (list(DEVICES) if plan and has_cuda() and plan[1] % 8 == 0 else [])
    call: dict[str, Any] = {"concepts": concepts, "dtype": dtype_of(dtype), "mode": mode, "precision": precision}
    try:
        plans = [plan_of(n, d, **call, device=on) for n, d in ([plan] if plan else SHAPES) for on in device or every]
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    facts = {} if plan else {"emovec": metadata.version("emovec"), **_installation()}
    if json:
        print_json({**facts, "plans": [_entry(made) for made in plans]})
        return
    for key, value in facts.items():
        if isinstance(value, dict):
            value = ", ".join(f"{name} {said}" for name, said in value.items())
        out.print(f"[bold]{key}[/]: {value}", soft_wrap=True)
    said = f"{dtype}, {concepts} concepts, {mode}" + ("" if precision == "fast" else f", {precision} precision")
    if plan:
        how = ("kernel", "tile", "blocks", "launches")
        _print(f"{plan[0]} x {plan[1]}, {said}", plans, ("device", *how, "MB at least", "MB moved", "Mflop"))
        if not has_cuda():
            out.print("This build has no CUDA kernels: it plans for CPUs only.")
        return
    for on in dict.fromkeys(made.device for made in plans):
        title = f"CPU, {said}, {torch.get_num_threads()} threads" if on == "cpu" else f"{on}, {said}"
        more = ("spread over threads", "tile") if on == "cpu" else ("tile", "blocks", "launches")
        _print(title, [made for made in plans if made.device == on], ("tokens", "width", "kernel", *more, "MB at least", "Mflop"))


def _entry(plan: Plan) -> dict[str, Any]:
    return vars(plan) | {"dtype": str(plan.dtype).removeprefix("torch."), "bytes": plan.bytes, "operations": plan.operations}


def _print(title: str, plans: Sequence[Plan], columns: Sequence[str]) -> None:
    table = Table(title=title, box=None, pad_edge=False, title_justify="left")
    for column in columns:
        words = column in ("device", "kernel", "spread over threads")
        table.add_column(column, justify="left" if words else "right", no_wrap=column == "kernel")
    for plan in plans:
        cells = {name: str(value) for name, value in vars(plan).items()}
        cells |= {"spread over threads": plan.split}
        cells |= {"MB at least": f"{plan.bytes / 1e6:.2f}", "MB moved": f"{plan.moved / 1e6:.2f}", "Mflop": f"{plan.operations / 1e6:,.0f}"}
        table.add_row(*(cells[column] for column in columns))
    out.print(table)


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
