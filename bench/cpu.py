"""The op on a CPU beside the core's peak, torch's best form of the same work, and the hooks of other packages: `make bench`.

One call is spread over two threads first, by the wall's clock; then everything runs in turns in one process, on one thread, by the
thread's own processor time. What is timed:

- read: 171 scores a token. torch: the fastest of a product with the bank transposed, padded to 176 columns and contiguous,
  `linear` with the bank as it is, `addmm` with a bias, and for one token `mv`. In bf16 also "high": readers that are not rounded, by the
  form that runs by itself.
- read + norm + add: one of 16 vectors for each token. torch: its fastest read, a fused norm, a gather and an in-place add.
- add: one vector for all tokens. torch: an in-place add. Hooks, ours and others', sit on a module that passes its input on.

Peaks are those of bench/peak.cpp: the instruction that a form multiplies with, in registers alone. A read's share of it counts
2 N d 176 operations. Writes bench/results/cpu.json; prints a table.
"""

from __future__ import annotations

import ctypes
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, TypeVar

import peers
import provenance
import torch
from kernel_tables import torch_form

from emovec import _host
from emovec.ops import Operands, Row, Table, apply_
from emovec.plan import Work

CONCEPTS, PADDED, ROWS = 171, 176, 16
WIDTHS = (576, 4096)
TOKENS = (1, 2, 4, 8, 64, 512)
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
WORKS = ("read", "read + norm + add", "add")
ROUNDS, SECONDS = 21, 0.01
FORM = _host.fastest()
OPERATIONS = {"vdpbf16ps": 64, "fma512": 32, "fma256": 16}  # of one instruction
PEAK_ROUNDS = 4000

Call = Callable[[], object]
K = TypeVar("K")


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    peak, load = peaks(), round(os.getloadavg()[0], 2)
    two = [found for width in WIDTHS for tokens in (512, 2048) for found in two_threads(width, tokens)]
    cases: list[dict[str, Any]] = []
    for name, width, tokens in product(DTYPES, WIDTHS, TOKENS):
        print(f"{name} {tokens} x {width}", file=sys.stderr)
        cases += case(name, width, tokens, peak)
    results = {
        "concepts": CONCEPTS,
        "form": FORM,
        "rounds": ROUNDS,
        "peers": peers.versions(),
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY", "default"),
        "load_before": load,
        "empty_call_us": empty_call(),
        "cases": cases,
        "two_threads": two,
    }
    provenance.write("cpu", results)
    print(table(results))


class Shape:
    """One shape's operands, and the calls to be timed on them; scores are checked before."""

    def __init__(self, dtype: torch.dtype, width: int, tokens: int) -> None:
        directions = torch.nn.functional.normalize(torch.randn(CONCEPTS, width), dim=1)
        self.operands = Operands.build(directions, directions, dtype=dtype, device="cpu")
        self.high = Operands.build(directions, directions, dtype=dtype, device="cpu", precision="high")
        self.table = Table.build([Row(delta=0.01 * torch.randn(width)) for _ in range(ROWS)], self.operands)
        self.one = Table.build([Row(delta=0.01 * torch.randn(width))], self.operands)
        x = torch.randn(tokens, width)
        x[:, 7] *= 100  # an outlier dimension, as real streams have
        self.x = x.to(dtype)
        self.row = torch.randint(0, ROWS, (tokens,), dtype=torch.int32)
        self.scores, self.sqnorm = torch.empty(tokens, CONCEPTS), torch.empty(tokens)
        self.bank = directions.to(dtype)
        self.expected, self.exact = (self.x.double() @ bank.double().T for bank in (self.bank, directions))

    def ours(self, form: str) -> dict[str, Call]:
        """Every work by one form of ours.

        Raises:
            RuntimeError: its scores are wrong.
        """
        number = _host.kernels()[form]
        return {
            "read": self.read(form, self.operands, self.expected),
            "read + norm + add": lambda: apply_(
                self.x, self.operands, self.table, self.row, scores=self.scores, sqnorm=self.sqnorm, form=number
            ),
            "add": lambda: apply_(self.x, self.operands, self.one, form=number),
        }

    def read(self, form: str, operands: Operands, expected: torch.Tensor) -> Call:
        number = _host.kernels()[form]
        self.scores.fill_(float("nan"))
        apply_(self.x, operands, scores=self.scores, form=number)
        error = float((self.scores.double() - expected).norm() / expected.norm())
        if not error < 1e-4:
            raise RuntimeError(f"{form} is wrong by {error:.1e} on {list(self.x.shape)} in {self.x.dtype}")
        return lambda: apply_(self.x, operands, scores=self.scores, form=number)

    def torch_reads(self) -> dict[str, Call]:
        x, bank = self.x, self.bank
        padded, bias = torch.nn.functional.pad(bank, (0, 0, 0, PADDED - CONCEPTS)).T.contiguous(), torch.zeros(CONCEPTS, dtype=x.dtype)
        reads: dict[str, Call] = {
            "torch mm": lambda: torch.mm(x, padded),
            "torch linear": lambda: torch.nn.functional.linear(x, bank),
            "torch addmm": lambda: torch.addmm(bias, x, bank.T),
        }
        if len(x) == 1:
            reads["torch mv"] = lambda: torch.mv(bank, x[0])
        return reads

    def torch_add(self, read: Call) -> Call:
        x, delta, index = self.x, self.table.delta.to(self.x.dtype), self.row.long()

        def add() -> None:
            read()
            torch.linalg.vector_norm(x, dim=1, dtype=torch.float32)
            x.add_(delta.index_select(0, index))

        return add

    def adders(self) -> dict[str, Call]:
        """torch's in-place add and the hooks, checked."""
        vector = self.one.delta[0].to(self.x.dtype)
        calls: dict[str, Call] = {}
        for name, add in peers.adders(vector).items():
            torch.testing.assert_close(add(self.x[None].clone())[0], self.x + vector)
            calls[name] = lambda add=add: add(self.x[None])  # type: ignore[misc]
        return {"torch": lambda: self.x.add_(vector), **calls}


def case(name: str, width: int, tokens: int, peak: Mapping[str, Call]) -> list[dict[str, Any]]:
    """Each work on one shape, all in the same turns."""
    shape = Shape(DTYPES[name], width, tokens)
    forms = [form for form in _host.kernels() if form.startswith("cpu_") and form != "cpu_scalar" and _host.runs(form)]
    reads = shape.torch_reads()
    quickest = min(in_turns(reads, rounds=5).items(), key=lambda found: statistics.median(found[1]))[0]
    works: dict[str, dict[str, Call]] = {work: {} for work in WORKS}
    for form in forms:
        for work, call in shape.ours(form).items():
            works[work][form] = call
    works["read"] |= reads
    if name == "bf16":
        works["read"]["high"] = shape.read(FORM, shape.high, shape.exact)
    works["read + norm + add"]["torch"] = shape.torch_add(reads[quickest])
    works["add"] |= shape.adders()
    times = in_turns({(work, of): call for work, calls in {"peak": peak, **works}.items() for of, call in calls.items()})
    rates = {i: OPERATIONS[i] * 48 * PEAK_ROUNDS / statistics.median(times["peak", i]) for i in peak}
    medians = {form: statistics.median(times["read", form]) for form in forms}
    operations = Work(tokens, width, PADDED).operations
    shares = {form: operations / medians[form] / rates[i] for form in forms if (i := instruction(form, name)) in rates}
    more = {
        "read": {
            "peak_gflops": {i: round(rate / 1e9, 1) for i, rate in rates.items()},
            "share_of_peak": {form: round(share, 3) for form, share in shares.items()},
        },
        "read + norm + add": {
            "times_read": {form: round(statistics.median(times["read + norm + add", form]) / medians[form], 3) for form in forms},
        },
        "add": {},
    }
    return [
        {
            "dtype": name,
            "tokens": tokens,
            "width": width,
            "work": work,
            "min_median_max_us": summary({of: times[work, of] for of in calls}),
            **more[work],
        }
        for work, calls in works.items()
    ]


def instruction(form: str, dtype: str) -> str:
    """What a form multiplies with."""
    if form == "cpu_avx2":
        return "fma256"
    if dtype == "fp32" or form == "cpu_avx512":
        return "fma512"
    return {"cpu_avx512_bf16": "vdpbf16ps"}.get(form, form)


def peaks() -> dict[str, Call]:
    """By name, PEAK_ROUNDS of each instruction that this processor has."""
    needs = {"vdpbf16ps": "cpu_avx512_bf16", "fma512": "cpu_avx512", "fma256": "cpu_avx2"}
    there = [name for name, form in needs.items() if _host.runs(form)]
    if not there:
        return {}
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder, "peak.so")
        source = Path(__file__).with_name("peak.cpp")
        subprocess.run([os.environ.get("CXX", "c++"), "-O2", "-shared", "-fPIC", str(source), "-o", str(library)], check=True)
        loaded = ctypes.CDLL(str(library))
    rounds = ctypes.c_int64(PEAK_ROUNDS)
    return {name: partial(getattr(loaded, name), rounds) for name in there}


def two_threads(width: int, tokens: int) -> list[dict[str, Any]]:
    """bf16 by the fastest form and by torch, on one thread and on two, in turns."""
    shape = Shape(torch.bfloat16, width, tokens)
    ours = shape.ours(FORM)
    calls = {
        "read": (ours["read"], shape.torch_reads()["torch mm"]),
        "read + norm + add": (ours["read + norm + add"], shape.torch_add(shape.torch_reads()["torch mm"])),
    }
    found = []
    for work, (our, theirs) in calls.items():
        times = in_turns(
            {f"{name} {n}": on(n, call) for name, call in ((FORM, our), ("torch", theirs)) for n in (1, 2)}, clock=time.perf_counter
        )
        torch.set_num_threads(1)
        entry = {"dtype": "bf16", "tokens": tokens, "width": width, "work": work, "min_median_max_us": summary(times)}
        found.append(entry | {"speedup": {name: round(ratio(entry, f"{name} 1", f"{name} 2"), 2) for name in (FORM, "torch")}})
    return found


def empty_call() -> list[float]:
    """Microseconds of a call on no tokens: Python, torch's dispatcher and the checks."""
    shape = Shape(torch.bfloat16, 576, 0)
    return summary(in_turns({"empty": lambda: apply_(shape.x, shape.operands, scores=shape.scores)}))["empty"]


def on(threads: int, call: Call) -> Call:
    def run() -> None:
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)
        call()

    return run


def in_turns(calls: Mapping[K, Call], rounds: int = ROUNDS, clock: Callable[[], float] = time.thread_time) -> dict[K, list[float]]:
    """Seconds a call of each, several times, one after the other so that what else the machine does falls on all.

    A turn begins with a call that is not timed: nobody pays for the caches that another left.
    """
    repeats = {}
    for name, call in calls.items():
        call()
        start = clock()
        call()
        repeats[name] = max(1, int(SECONDS / (clock() - start)))
    times: dict[K, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            call()
            start = clock()
            for _ in range(repeats[name]):
                call()
            times[name].append((clock() - start) / repeats[name])
    return times


def summary(times: Mapping[str, list[float]]) -> dict[str, list[float]]:
    return {name: [round(1e6 * of(seconds), 2) for of in (min, statistics.median, max)] for name, seconds in times.items()}


# --- the table --------------------------------------------------------------------------------------------------------


def ratio(entry: Mapping[str, Any], of: str, to: str) -> float:
    """Medians: how often ``to`` fits into ``of``."""
    return float(entry["min_median_max_us"][of][1] / entry["min_median_max_us"][to][1])


HEADER = (
    f"{'':4} {'tokens x d':>11} {'work':<18}{'form':<12}{'min':>9}{'median':>9}{'max':>9}{'of peak':>9}{'x read':>7}"
    f"{'torch':>8} {'form':<8}{'st.-vectors':>12}{'repeng':>8}  faster than emovec"
)


def line(entry: Mapping[str, Any], form: str) -> str:
    """One row: microseconds; then how many times as long torch's best form and each peer take."""
    us = entry["min_median_max_us"]
    share, times_read = (entry.get(key, {}).get(form) for key in ("share_of_peak", "times_read"))
    torchs = torch_form(entry)
    own = "emovec's hook" if "emovec's hook" in us and form == FORM else form  # hooks are compared with hooks
    ratios = {"torch": ratio(entry, torchs, form)} | {name: ratio(entry, name, own) for name in peers.PACKAGES if name in us}
    widths = {"steering-vectors": 12, "repeng": 8}
    cells = "".join(f"{ratios[name]:{width}.2f}" if name in ratios else " " * width for name, width in widths.items())
    winners = ", ".join(f"{name} by {1 / value - 1:.0%}" for name, value in ratios.items() if value < 1)
    return (
        f"{entry['dtype']:4} {entry['tokens']:>4} x {entry['width']:<5}{entry['work']:<18}{form.removeprefix('cpu_'):<12}"
        + "".join(f"{value:>9,.1f}" for value in us[form])
        + (f"{share:>9.0%}" if share is not None else " " * 9)
        + (f"{times_read:>7.2f}" if times_read is not None else " " * 7)
        + f"{ratios['torch']:>8.2f} {torchs.removeprefix('torch').strip():<8}{cells}  {winners}"
    )


def table(results: Mapping[str, Any]) -> str:
    """Every case by the form that runs by itself, reads in fp32 by AVX2 too; then the two threads."""
    lines = [HEADER]
    for entry in results["cases"]:
        lines.append(line(entry, results["form"]))
        if "high" in entry["min_median_max_us"]:
            lines.append(line(entry, "high"))
        if entry["dtype"] == "fp32" and entry["work"] == "read" and results["form"] != "cpu_avx2":
            lines.append(line(entry, "cpu_avx2"))
    lines += ["", "a call on no tokens: {:.1f} {:.1f} {:.1f} us".format(*results["empty_call_us"])]
    lines += ["", f"{'two threads against one':<34}{'emovec':>9}{'torch':>9}"]
    for entry in results["two_threads"]:
        speedup = entry["speedup"]
        lines.append(
            f"{entry['dtype']} {entry['tokens']:>5} x {entry['width']:<4} {entry['work']:<18}"
            f"{speedup[results['form']]:>9.2f}{speedup['torch']:>9.2f}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
