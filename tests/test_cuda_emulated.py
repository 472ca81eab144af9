"""The portable CUDA kernel's logic without a GPU, on the emulator."""

from __future__ import annotations

import math
from collections.abc import Callable

import emulated
import pytest
import torch
from cases import CLOSER, DTYPES, Case, make, same_bits

MULTIPROCESSORS = {"small tiles": 132, "large tiles": 1}  # few of them make a call of 100 tokens take the largest tile


@pytest.fixture(scope="module")
def emulate() -> Callable[..., int]:
    return emulated.build()


MODES = {
    "read": {"steer": False},
    "add": {"rules": 0, "gates": False},
    "rules": {"gates": False},
    "gated": {"residual": True},
    "strided": {"strided": True, "own_readers": True},
    "steer_only": {"outputs": False},
    "add_only": {"rules": 0, "gates": False, "outputs": False},
    "high": {"precision": "high", "residual": True},
    "bf16_scores": {"scores_dtype": torch.bfloat16},
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 64, 1), (9, 200, 171), (47, 136, 177)], ids=lambda s: "x".join(map(str, s)))
@pytest.mark.parametrize("mode", MODES)
def test_agrees_with_the_reference(emulate: Callable[..., int], dtype: torch.dtype, shape: tuple[int, int, int], mode: str) -> None:
    for multiprocessors in MULTIPROCESSORS.values():
        case = make(*shape, dtype, seed=1, **MODES[mode])
        emulate(case, multiprocessors)
        case.check()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_slices(emulate: Callable[..., int], dtype: torch.dtype, mode: str) -> None:
    """A ragged last slice; tiles of one token and more; more concepts than a pass takes."""
    for shape, multiprocessors in [((1, 520, 1), 132), ((37, 1064, 171), 132), ((70, 648, 177), 1)]:
        case = make(*shape, dtype, seed=4, **MODES[mode])
        assert emulate(case, multiprocessors, sliced=True) == 0
        case.check()


def test_slices_do_not_depend_on_the_batch(emulate: Callable[..., int]) -> None:
    whole, part = (make(90, 1200, 171, torch.bfloat16, seed=3) for _ in range(2))
    assert emulate(whole, 1, sliced=True) == 0
    for begin, end in [(0, 1), (1, 9), (9, 90)]:
        scores, sqnorm = part.scores[begin:end], part.sqnorm[begin:end]
        emulate(Case(part.x[begin:end], part.operands, part.table, part.row[begin:end], None, scores, sqnorm), 132, sliced=True)
    assert same_bits(part.x, whole.x)
    assert same_bits(part.scores, whole.scores)
    assert same_bits(part.sqnorm, whole.sqnorm)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sliced", [False, True])
def test_high_scores_are_those_of_readers_that_were_not_rounded(emulate: Callable[..., int], dtype: torch.dtype, sliced: bool) -> None:
    fast, high = (make(20, 1064, 20, dtype, seed=5, steer=False, residual=sliced, precision=precision) for precision in ("fast", "high"))
    assert emulate(fast, sliced=sliced) == emulate(high, sliced=sliced) == 0
    if dtype == torch.float32:
        assert same_bits(high.scores, fast.scores)
    else:
        assert CLOSER * high.lost() < fast.lost()


@pytest.mark.parametrize("sliced", [False, True])
def test_a_high_token_does_not_depend_on_the_tile(emulate: Callable[..., int], sliced: bool) -> None:
    whole, part = (make(140, 648, 171, torch.bfloat16, seed=3, precision="high") for _ in range(2))
    emulate(whole, 1, sliced=sliced)
    for begin, end in [(0, 1), (1, 30), (30, 140)]:
        scores, sqnorm = part.scores[begin:end], part.sqnorm[begin:end]
        rows = Case(part.x[begin:end], part.operands, part.table, part.row[begin:end], None, scores, sqnorm, precision="high")
        emulate(rows, 132, sliced=sliced)
    assert same_bits(part.x, whole.x)
    assert same_bits(part.scores, whole.scores)
    assert same_bits(part.sqnorm, whole.sqnorm)


@pytest.mark.parametrize(("multiprocessors", "sliced"), [(132, False), (1, False), (132, True)])
def test_bf16_scores_are_fp32_scores_rounded_once(emulate: Callable[..., int], multiprocessors: int, sliced: bool) -> None:
    for concepts in (1, 177):
        full, short = (make(70, 648, concepts, torch.bfloat16, seed=6, scores_dtype=kept) for kept in (torch.float32, torch.bfloat16))
        for case in (full, short):
            assert emulate(case, multiprocessors, sliced=sliced) == 0
        assert same_bits(short.scores, full.scores.to(torch.bfloat16))
        assert same_bits(short.x, full.x)
        assert same_bits(short.sqnorm, full.sqnorm)


def test_one_slice_is_none(emulate: Callable[..., int]) -> None:
    case = make(4, 512, 9, torch.bfloat16, seed=3)
    assert emulate(case, sliced=True) == emulated.NO_KERNEL
    assert same_bits(case.x, case.before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_token_does_not_depend_on_the_tile(emulate: Callable[..., int], dtype: torch.dtype) -> None:
    whole, part = (make(140, 200, 171, dtype, seed=3) for _ in range(2))
    emulate(whole, 1)
    for begin, end in [(0, 1), (1, 9), (9, 30), (30, 140)]:
        scores, sqnorm = part.scores[begin:end], part.sqnorm[begin:end]
        emulate(Case(part.x[begin:end], part.operands, part.table, part.row[begin:end], None, scores, sqnorm), 132)
    assert same_bits(part.x, whole.x)
    assert same_bits(part.scores, whole.scores)
    assert same_bits(part.sqnorm, whole.sqnorm)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", ["rules", "add", "add_only", "gated"])
def test_misaligned_rows(emulate: Callable[..., int], dtype: torch.dtype, mode: str) -> None:
    case = make(37, 72, 171, dtype, seed=2, **MODES[mode])
    storage = torch.randn(37 * 75 + 1).to(dtype)
    view = storage[1:].view(37, 75)[:, :72].copy_(case.x)
    case = Case(view, case.operands, case.table, case.row, case.residual, case.scores, case.sqnorm)
    emulate(case, 1)
    case.check()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_thousand_concepts_and_little_shared_memory(emulate: Callable[..., int], dtype: torch.dtype) -> None:
    case = make(20, 96, 1024, dtype, seed=1, rules=16)
    emulate(case)
    case.check()
    case = make(140, 96, 171, dtype, seed=1, residual=True)
    emulate(case, 1, 99 * 1024)
    case.check()


def test_indices_out_of_range_leave_the_token_alone(emulate: Callable[..., int]) -> None:
    case = make(20, 64, 9, torch.bfloat16, seed=5)
    case.row[:3] = torch.tensor([99, -7, 2**31 - 1], dtype=torch.int32)
    case.table.gate[:, 1] = 1000
    emulate(case)
    case.row[:3] = -1
    case.table.gate[:, 1] = -1
    case.check()


def test_one_output_alone(emulate: Callable[..., int]) -> None:
    for output in ("scores", "sqnorm"):
        case = make(20, 64, 9, torch.float16, seed=5, steer=False)
        setattr(case, output, None)
        emulate(case)
        case.check()
    empty = make(0, 64, 9, torch.float16, seed=5)
    emulate(empty)
    case = make(20, 64, 9, torch.float16, seed=5)
    case.row = None
    case.scores.fill_(math.nan)
    emulate(case)
    case.check()
