"""The op on a CPU beside torch's best form of the same work: `python bench/cpu.py`, one thread, everything in turns.

Torch's read is a product with a transposed bank, padded to 176 columns and contiguous, in the activations' dtype; its read and
add are that, a norm, and an in-place add of the rows' vectors. Ours is forced to each form that this processor runs.
Writes bench/results/cpu.json, and prints a table.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import provenance
import torch

from emovec import _host
from emovec.ops import Operands, Row, Table, apply_

CONCEPTS, PADDED, ROWS = 171, 176, 16
WIDTHS = (576, 4096)
TOKENS = (1, 8, 64, 512)
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
ROUNDS, SECONDS = 11, 0.01


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    cases = [case(name, width, tokens) for name in DTYPES for width in WIDTHS for tokens in TOKENS]
    provenance.write("cpu", {"concepts": CONCEPTS, "threads": 1, "rounds": ROUNDS, "unit": "microseconds, median", "cases": cases})


def case(name: str, width: int, tokens: int) -> dict[str, Any]:
    """Medians of every variant on one shape; each variant's result is checked before it is timed."""
    dtype = DTYPES[name]
    directions = torch.nn.functional.normalize(torch.randn(CONCEPTS, width), dim=1)
    operands = Operands.build(directions, directions, dtype=dtype, device="cpu")
    table = Table.build([Row(delta=0.01 * torch.randn(width)) for _ in range(ROWS)], operands)
    x = torch.randn(tokens, width)
    x[:, 7] *= 100  # an outlier dimension, as real streams have
    x = x.to(dtype)
    row = torch.randint(0, ROWS, (tokens,), dtype=torch.int32)
    scores, sqnorm = torch.empty(tokens, CONCEPTS), torch.empty(tokens)
    bank = torch.nn.functional.pad(directions, (0, 0, 0, PADDED - CONCEPTS)).to(dtype).T.contiguous()
    delta, index = table.delta.to(dtype), row.long()

    def torch_add() -> None:
        torch.mm(x, bank)
        torch.linalg.vector_norm(x, dim=1, dtype=torch.float32)
        x.add_(delta.index_select(0, index))

    expected = x.double() @ directions.to(dtype).double().T
    variants: dict[str, dict[str, Callable[[], object]]] = {"read": {}, "read + norm + add": {}}
    for form, number in _host.kernels().items():
        if not form.startswith("cpu_") or form == "cpu_scalar" or not _host.runs(form):
            continue
        scores.fill_(float("nan"))
        apply_(x, operands, scores=scores, form=number)
        error = float((scores.double() - expected).norm() / expected.norm())
        if not error < 1e-4:
            raise RuntimeError(f"{form} is wrong by {error:.1e} on {tokens} x {width} in {name}")
        variants["read"][form] = lambda number=number: apply_(x, operands, scores=scores, form=number)
        variants["read + norm + add"][form] = lambda number=number: apply_(
            x, operands, table, row, scores=scores, sqnorm=sqnorm, form=number
        )
    variants["read"]["torch"] = lambda: torch.mm(x, bank)
    variants["read + norm + add"]["torch"] = torch_add
    found: dict[str, Any] = {"dtype": name, "tokens": tokens, "width": width, "Mflop": 2e-6 * tokens * width * PADDED}
    for work, choices in variants.items():
        times = in_turns(choices)
        found[work] = {choice: round(1e6 * statistics.median(seconds), 2) for choice, seconds in times.items()}
        best = found[work][_host.fastest()]
        line = "  ".join(f"{choice.removeprefix('cpu_')} {value:,.0f}" for choice, value in found[work].items())
        print(
            f"{name} {tokens:>4} x {width:<5} {work:<18} {line}  us; torch / {_host.fastest()}: {found[work]['torch'] / best:.2f}",
            flush=True,
        )
    return found


def in_turns(choices: dict[str, Callable[[], object]]) -> dict[str, list[float]]:
    """Seconds a call of each, ROUNDS times, one after the other so that what else the machine does falls on all."""
    repeats = {}
    for name, work in choices.items():
        work()
        start = time.perf_counter()
        work()
        repeats[name] = max(1, int(SECONDS / (time.perf_counter() - start)))
    times: dict[str, list[float]] = {name: [] for name in choices}
    for _ in range(ROUNDS):
        for name, work in choices.items():
            start = time.perf_counter()
            for _ in range(repeats[name]):
                work()
            times[name].append((time.perf_counter() - start) / repeats[name])
    return times


if __name__ == "__main__":
    main()
