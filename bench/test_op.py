"""One call of the op at a time under pytest-benchmark, to compare two builds of it on a CPU:

    pytest bench/test_op.py --benchmark-autosave        # one build
    pytest bench/test_op.py --benchmark-compare         # the other

`make bench` measures more: peaks, torch, other packages, all in turns in one process.
"""

from __future__ import annotations

import pytest
import torch
from cpu import DTYPES, FORM, TOKENS, WIDTHS, WORKS, Shape
from pytest_benchmark.fixture import BenchmarkFixture


@pytest.mark.parametrize("work", WORKS)
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_op(benchmark: BenchmarkFixture, dtype: str, width: int, tokens: int, work: str) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    benchmark.group = f"{work}, {dtype}"
    benchmark(Shape(DTYPES[dtype], width, tokens).ours(FORM)[work])  # whose scores are checked first
