"""The tables of docs/kernels.md, and the figures that the README takes from them, are those of the committed results."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(ROOT / "bench")
    yield __import__("kernel_tables")
    for name in ("kernel_tables", "pages", "provenance"):
        sys.modules.pop(name, None)


def test_the_tables_are_those_of_the_results(bench: Any) -> None:
    page = bench.PAGE.read_text(encoding="utf-8")
    assert bench.pages.written(page, bench.tables()) == page


def test_the_figures_of_the_readme_are_those_of_the_results(bench: Any) -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    cpu = bench.provenance.read("cpu")["results"]
    for case in cpu["cases"]:
        if case["dtype"] == "bf16" and case["width"] == 4096 and case["tokens"] in (1, 64, 512) and case["work"] == "read + norm + add":
            scale, unit, digits = (1e3, "ms", 1) if case["tokens"] == 512 else (1, "\u00b5s", 0)
            ours, torch = case["min_median_max_us"][cpu["form"]][1], bench.best_torch(case)
            cells = " | ".join(f"{value / scale:.{digits}f} {unit}" for value in (ours, torch))
            assert f"| {case['tokens']} x 4096 | {cells} |" in readme
    works = {"read": "read", "add": "read and add", "rules": "rules on every token"}
    for case in bench.plain(bench.provenance.read("gpu")["results"]["cases"]):
        if case["width"] == 4096 and (case["tokens"] == 16384 or (case["tokens"] in (1, 64, 1024) and case["work"] == "add")):
            digits, floor = (0, f"{case['floor_us']:.0f} \u00b5s ") if case["tokens"] == 16384 else (1, "")
            ours, torch = (f"{case['min_median_max_us'][name][1]:.{digits}f} \u00b5s" for name in ("auto", "torch"))
            assert f"| {case['tokens']:,} x 4096 | {works[case['work']]} | {ours} | {torch} | {floor}|" in readme


def test_every_benchmark_of_the_op_runs() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--benchmark-disable", ROOT / "bench/test_op.py"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert "72 passed" in done.stdout, done.stdout + done.stderr
