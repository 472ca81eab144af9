"""The op on a GPU against what torch can do, and against the card itself: `python bench/gpu.py time`.

``small`` runs every kernel once on small calls and compares with the reference; compute-sanitizer is run over it.
``profile`` runs every kernel of ours once or twice on calls of full size; ncu is run over it.
``time`` measures two ceilings (a copy, a matrix product), then prefill and decode calls, each as replays of a CUDA graph of
many calls over rotated buffers (or with a warm bank, or between the norms of a model), variants interleaved, medians. A floor is
bytes over the measured copy rate, or operations over the measured product rate, whichever is longer. Before a variant is timed
its result is compared with fp64.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import provenance
import torch
from torch import Tensor

from emovec import ops
from emovec.plan import Work

CONCEPTS = 171
ROWS = 16
RULES = 3
DTYPE = torch.bfloat16
# (name, tokens, width, calls a graph, sets of buffers). Prefill calls are larger than the L2 cache by themselves.
PREFILL = [(f"prefill {width}", 16384, width, 6, 2) for width in (4096, 8192)]
DECODE = [(f"decode {tokens}", tokens, 4096, 240, 80) for tokens in (1, 2, 4, 8, 16, 32, 64)]
# The same buffers again and again, so that the bank is in the L2 cache; and calls between two RMSNorms, as in a model, where "none"
# is the norms alone.
HOT = [(f"hot {tokens}", tokens, 4096, 240, 1) for tokens in (1, 64)]
CHAIN = [(f"chain {tokens}", tokens, 4096, 80, 80) for tokens in (1, 64)]
# Where one kernel takes over from another.
MIDDLE = [(f"middle {tokens}", tokens, 4096, 24, 12) for tokens in (128, 256, 512, 1024, 2048, 4096)]


@dataclass
class Buffers:
    """One set: the activations and operands of one call, and the same for torch (readers in torch's best layout)."""

    x: Tensor
    operands: ops.Operands
    table: ops.Table
    row: Tensor
    scores: Tensor
    sqnorm: Tensor
    delta: Tensor  # [R, d] in the activations' dtype
    rule: dict[str, Tensor]


def make_buffers(tokens: int, width: int, steering: str) -> Buffers:
    g = torch.Generator("cuda").manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, device="cuda")

    x = normal(tokens, width).to(DTYPE)
    x[:, torch.randint(width, (2,), generator=g, device="cuda")] *= 100  # massive activations, as real models have
    directions = torch.nn.functional.normalize(normal(CONCEPTS, width) + 0.7 * normal(1, width), dim=-1)
    operands = ops.Operands.build(directions, directions, normal(CONCEPTS).cpu(), 0.5 + normal(CONCEPTS).abs().cpu(), dtype=DTYPE)
    chosen = torch.randperm(CONCEPTS, generator=g, device="cuda")[:RULES].tolist()
    bounds = [(0.0, 0.0), (-1.0, math.inf), (-math.inf, 1.0)]
    rules = tuple(ops.Rule(k, *b) for k, b in zip(chosen, bounds, strict=True)) if steering == "rules" else ()
    # Small doses: they add up over thousands of calls in place.
    made = [ops.Row(1e-3 * normal(width), rules) for _ in range(ROWS)]
    table = ops.Table.build(made, operands)
    row = torch.randint(ROWS, (tokens,), generator=g, device="cuda", dtype=torch.int32)
    scores = torch.full((tokens, 176), math.nan, device="cuda")[:, :CONCEPTS]
    sqnorm = torch.full((tokens,), math.nan, device="cuda")
    rule = {}
    if rules:
        picked = torch.tensor(chosen, device="cuda")
        rule = {
            "concept": picked,
            "lo": table.rule_bounds[0, 0],
            "hi": table.rule_bounds[0, 1],
            "shift": table.rule_bounds[:, 2],
            "solve": table.rule_solve[0].T.contiguous(),
            "directions": operands.directions[picked],
        }
    return Buffers(x, operands, table, row, scores, sqnorm, table.delta.to(DTYPE), rule)


def copy_of(buffers: Buffers) -> Buffers:
    """The same values in other memory."""

    def clone(value: Any) -> Any:
        if isinstance(value, Tensor):
            return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device).copy_(value)
        if isinstance(value, dict):
            return {name: clone(part) for name, part in value.items()}
        return type(value)(*(clone(getattr(value, field.name)) for field in fields(value)))

    return clone(buffers)


# --- what is compared ---------------------------------------------------------------------------------------------------


def ours(form: int) -> Callable[[Buffers, str], None]:
    def run(b: Buffers, work: str) -> None:
        steers = work != "read"
        ops.apply_(b.x, b.operands, b.table if steers else None, b.row if steers else None, None, b.scores, b.sqnorm, form=form)

    return run


def triton(form: int) -> Callable[[Buffers, str], None]:
    def run(b: Buffers, work: str) -> None:
        from emovec.triton import apply_

        steers = work != "read"
        apply_(b.x, b.operands, b.table if steers else None, b.row if steers else None, None, b.scores, b.sqnorm, form=form)

    return run


def torch_form(b: Buffers, work: str) -> None:
    """The fewest and cheapest kernels we know in eager torch: padded readers, fp32 products, one rank-3 update for rules.

    All rows have the same rules here, which torch profits from and the op does not.
    """
    o = b.operands
    p = torch.mm(b.x, o.readers.T, out_dtype=torch.float32)[:, :CONCEPTS]
    torch.sub(p, o.mean, out=b.scores)
    b.scores.mul_(o.inv_std)
    torch.linalg.vector_norm(b.x, dim=-1, dtype=torch.float32, out=b.sqnorm)
    b.sqnorm.square_()
    if work == "read":
        return
    row = b.row
    b.x.add_(b.delta[row])
    if work == "rules":
        steered = p.index_select(1, b.rule["concept"]) + b.rule["shift"][row]
        wanted = steered.clamp(b.rule["lo"], b.rule["hi"]) - steered
        b.x.addmm_((wanted @ b.rule["solve"]).to(DTYPE), b.rule["directions"])


def error(b: Buffers, before: Tensor, work: str) -> float:
    """The larger of the relative errors of scores and of the change of x, of the first tokens, against fp64."""
    n = min(len(before), 64)
    o = b.operands
    x = before[:n].double()
    p = x @ o.readers[:CONCEPTS].double().T
    score = (p - o.mean.double()) * o.inv_std.double()
    worst = float((b.scores[:n] - score).norm() / score.norm())
    worst = max(worst, float((b.sqnorm[:n] - x.square().sum(-1)).norm() / x.square().sum(-1).norm()))
    if work != "read":
        x = x + b.table.delta.double()[b.row[:n]]
        if work == "rules":
            steered = p[:, b.rule["concept"]] + b.rule["shift"].double()[b.row[:n]]
            wanted = steered.clamp(b.rule["lo"].double(), b.rule["hi"].double()) - steered
            x = x + wanted @ b.rule["solve"].double() @ b.rule["directions"].double()
    worst = max(worst, float((b.x[:n].double() - x).norm() / x.norm()))
    return worst if math.isfinite(worst) else math.inf


def in_chain(run: Callable[[Buffers, str], None]) -> Callable[[Buffers, str], None]:
    """A call between two norms of the stream."""

    def chain(b: Buffers, work: str) -> None:
        torch.nn.functional.rms_norm(b.x, b.x.shape[1:])
        run(b, work)
        torch.nn.functional.rms_norm(b.x, b.x.shape[1:])

    return chain


# --- timing --------------------------------------------------------------------------------------------------------------


def graph_of(calls: Callable[[], None]) -> torch.cuda.CUDAGraph:
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        calls()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        calls()
    graph.replay()
    torch.cuda.synchronize()
    return graph


def replay_times(graphs: dict[str, tuple[torch.cuda.CUDAGraph, int]], rounds: int) -> dict[str, list[float]]:
    """Microseconds a call, ``rounds`` of each, interleaved."""
    times: dict[str, list[float]] = {name: [] for name in graphs}
    for _ in range(rounds):
        for name, (graph, calls) in graphs.items():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            times[name].append(begin.elapsed_time(end) * 1000 / calls)
    return times


def ceilings() -> dict[str, float]:
    """Bytes a second of a copy (read plus written) and of a sum (read), operations a second of a bf16 product; the fastest of some."""
    source = torch.randn(2**29, device="cuda")
    target = torch.empty_like(source)
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=DTYPE) for _ in range(2))
    c = torch.empty_like(a)
    work = {
        "memcpy": (lambda: target.copy_(source), 2 * source.nbytes),
        "negate": (lambda: torch.neg(source, out=target), 2 * source.nbytes),
        "negate_bf16": (lambda: torch.neg(source.view(DTYPE), out=target.view(DTYPE)), 2 * source.nbytes),
        "sum": (lambda: source.sum(), source.nbytes),
        "product": (lambda: torch.mm(a, b, out=c), 2 * 8192**3),
    }
    times = replay_times({name: (graph_of(call), 1) for name, (call, _) in work.items()}, 15)
    rate = {name: amount / statistics.median(times[name]) * 1e6 for name, (_, amount) in work.items()}
    print({name: f"{value / 1e12:.2f} T/s" for name, value in rate.items()}, flush=True)
    copy = max(rate["memcpy"], rate["negate"], rate["negate_bf16"])
    return {"copy_bytes_per_s": copy, "read_bytes_per_s": rate["sum"], "product_flop_per_s": rate["product"]}


def floor(tokens: int, width: int, work: str, limits: dict[str, float]) -> float:
    """Microseconds below which no version can be: bytes that must move, operations that must be done."""
    call = Work(tokens, width, CONCEPTS, DTYPE, work, rows=ROWS)
    return call.floor(limits["copy_bytes_per_s"], limits["product_flop_per_s"]) * 1e6


def kernels() -> dict[str, int]:
    """The CUDA forms by name."""
    from emovec import _host

    return {name: number for name, number in _host.kernels().items() if name.startswith("cuda_")}


def variants(compiled: bool) -> dict[str, Callable[[Buffers, str], None]]:
    found = {name.removeprefix("cuda_"): ours(number) for name, number in kernels().items()}
    found |= {"auto": ours(0), "triton": triton(0), "triton_whole": triton(1), "torch": torch_form}
    if compiled:
        found["compile"] = torch.compile(torch_form, dynamic=False)
    return found


def measure(
    name: str, tokens: int, width: int, calls: int, sets: int, work: str, limits: dict[str, float], rounds: int, compiled: bool
) -> Any:
    first = make_buffers(tokens, width, work)
    buffers = [first] + [copy_of(first) for _ in range(sets - 1)]
    before = first.x.clone()
    graphs, failed, errors = {}, {}, {}
    runs = variants(compiled)
    if name.startswith("chain"):
        graphs["none"] = (graph_of(lambda: [in_chain(lambda *_: None)(buffers[i % sets], work) for i in range(calls)]), calls)
        runs = {variant: in_chain(run) for variant, run in runs.items()}
    for variant, run in runs.items():
        try:
            first.x.copy_(before)
            first.scores.fill_(math.nan)
            first.sqnorm.fill_(math.nan)
            run(first, work)
            errors[variant] = error(first, before, work)
            if errors[variant] > 2e-2:
                raise RuntimeError(f"wrong by {errors[variant]:.1e}")

            def all_calls(run: Callable[[Buffers, str], None] = run) -> None:
                for i in range(calls):
                    run(buffers[i % sets], work)

            graphs[variant] = (graph_of(all_calls), calls)
        except Exception as problem:
            failed[variant] = f"{type(problem).__name__}: {problem}".splitlines()[0][:200]
    times = replay_times(graphs, rounds)
    quartiles = {v: [min(t), statistics.median(t), max(t)] for v, t in times.items()}
    bound = floor(tokens, width, work, limits)
    shown = "  ".join(f"{v} {q[1]:8.2f}" for v, q in quartiles.items())
    print(f"{name:14s} {work:6s} floor {bound:7.2f}  {shown}  {failed or ''}", flush=True)
    result = {"case": name, "tokens": tokens, "width": width, "work": work, "floor_us": bound, "calls": calls, "sets": sets}
    return result | {"min_median_max_us": quartiles, "error": {v: e for v, e in errors.items() if math.isfinite(e)}, "failed": failed}


def cases() -> Iterator[tuple[tuple[str, int, int, int, int], str]]:
    for shape in PREFILL:
        for work in ("read", "add", "rules"):
            yield shape, work
    for shape in DECODE:
        for work in ("read", "add", "rules") if shape[1] in (1, 8, 64) else ("add",):
            yield shape, work
    for shape in (*HOT, *CHAIN):
        yield shape, "add"
    for shape in MIDDLE:
        for work in ("read", "add", "rules"):
            yield shape, work


def time_all(out: Path, seconds: float, compiled: bool, only: str) -> None:
    begin = time.monotonic()
    limits = ceilings()
    print(f"copy {limits['copy_bytes_per_s'] / 1e12:.2f} TB/s, bf16 product {limits['product_flop_per_s'] / 1e12:.0f} TFLOP/s", flush=True)
    results: list[Any] = []
    for (name, tokens, width, calls, sets), work in cases():
        if not re.search(only, f"{name} {work}"):
            continue
        if time.monotonic() - begin > seconds:
            print("out of time", flush=True)
            break
        results.append(measure(name, tokens, width, calls, sets, work, limits, 9, compiled))
        torch.cuda.empty_cache()
        out.parent.mkdir(parents=True, exist_ok=True)
        answer = {"provenance": provenance.machine(), "results": {"ceilings": limits, "cases": results}}
        out.write_text(json.dumps(answer, indent=1, allow_nan=False) + "\n", encoding="utf-8")


# --- every kernel once ------------------------------------------------------------------------------------------------------


def profile() -> None:
    """The fastest form on one call of each kind, cold and then warm."""
    for tokens, width in ((16384, 4096), (64, 4096), (1, 4096)):
        for work in ("read", "add", "rules"):
            buffers = make_buffers(tokens, width, work)
            for _ in range(2):
                ours(0)(buffers, work)
            torch.cuda.synchronize()


def small() -> None:
    """Each tile size and mode once, against the reference. Needs tests/ on the path."""
    from cases import make

    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for tokens, width, concepts in [(5, 1024, 171), (40, 520, 177), (2600, 136, 171), (8600, 72, 171)]:
            case = make(tokens, width, concepts, dtype, seed=1, residual=tokens == 40, device="cuda")
            case.run()
            torch.cuda.synchronize()
            case.check()
            print(f"{dtype} {tokens} x {width} on {concepts}: as the reference", flush=True)
    streams = [number for name, number in kernels().items() if "stream" in name] if torch.cuda.get_device_capability() == (9, 0) else []
    for form in streams:
        for dtype, residual, rules in ((torch.bfloat16, True, 3), (torch.float16, False, 3), (torch.bfloat16, False, 0)):
            case = make(150, 4680, 171, dtype, seed=1, residual=residual, rules=rules, gates=rules > 0, device="cuda")
            case.run(form=form)
            case.check()
    for tokens, width, concepts in [(40, 256, 1024), (20, 4096, 171), (3, 16384, 171), (5, 576, 256)]:
        case = make(tokens, width, concepts, torch.bfloat16, seed=1, rules=16, residual=True, device="cuda")
        case.run()
        case.check()
    cpu = make(20, 256, 171, torch.bfloat16, seed=1)
    cpu.run()
    cpu.check()
    print(f"all as the reference, on torch {torch.__version__}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["small", "profile", "time"])
    parser.add_argument("--out", type=Path, default=Path("bench/results/gpu.json"))
    parser.add_argument("--seconds", type=float, default=130, help="begin no further case after this long")
    parser.add_argument("--only", default="", help="the cases whose name and work match this pattern")
    parser.add_argument("--compile", action="store_true", help="torch.compile as well; takes a minute more")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("no CUDA device")
    if options.what == "small":
        small()
    elif options.what == "profile":
        profile()
    else:
        time_all(options.out, options.seconds, options.compile, options.only)


if __name__ == "__main__":
    main()
