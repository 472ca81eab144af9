"""The stream kernel's logic without a GPU, on the emulator: boxes, barriers, warpgroups' products from swizzled shared memory."""

from __future__ import annotations

import math
from collections.abc import Callable

import emulated
import pytest
import torch
from cases import Case, make, same_bits

DTYPES = (torch.bfloat16, torch.float16)
MODES = {
    "read": {"steer": False},
    "add": {"rules": 0, "gates": False},
    "rules": {"gates": False},
    "gated": {"residual": True},
    "strided": {"strided": True, "own_readers": True, "residual": True},
    "steer_only": {"outputs": False},
    "add_only": {"rules": 0, "gates": False, "outputs": False},
    "bf16_scores": {"scores_dtype": torch.bfloat16},
}


@pytest.fixture(scope="module")
def emulate() -> Callable[..., int]:
    return emulated.build()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("blocks", [2, 4, 8])
def test_blocks_that_share_a_tile(emulate: Callable[..., int], blocks: int, mode: str) -> None:
    """Slices of one stage, of none, of several; a ragged last one."""
    for tokens, width, concepts in [(1, 64, 1), (131, 520, 171), (70, 1160, 176)]:
        case = make(tokens, width, concepts, torch.bfloat16, seed=blocks, **MODES[mode])
        assert emulate(case, stream=blocks) == 0
        case.check()


@pytest.mark.parametrize("blocks", [1, 2, 4, 8])
@pytest.mark.parametrize("mode", ["add", "gated", "rules"])
@pytest.mark.parametrize("eager", [False, True])
def test_a_ring_goes_round(emulate: Callable[..., int], blocks: int, mode: str, eager: bool) -> None:
    """More steps than stages in every block; with all warps as early as can be, and with some as late."""
    case = make(70, 600 * blocks + 64, 16, torch.bfloat16, seed=blocks, **MODES[mode])
    assert emulate(case, stream=blocks, eager=eager) == 0
    case.check()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_agrees_with_the_reference(emulate: Callable[..., int], dtype: torch.dtype, mode: str) -> None:
    """One token and a tile's and more; the ring less than full and twice round; columns off a stage; one concept and all."""
    for tokens, width, concepts in [(1, 64, 1), (131, 136, 176), (70, 648, 171)]:
        case = make(tokens, width, concepts, dtype, seed=1, **MODES[mode])
        assert emulate(case, stream=1) == 0
        case.check()


def test_three_tiles(emulate: Callable[..., int]) -> None:
    for outputs in (True, False):
        case = make(300, 200, 171, torch.float16, seed=9, residual=True, outputs=outputs)
        assert emulate(case, stream=1) == 0
        case.check()


@pytest.mark.parametrize("blocks", [1, 2, 4, 8])
def test_sixteen_rules(emulate: Callable[..., int], blocks: int) -> None:
    for tokens, width in [(140, 128), (20, 2312)]:  # less than a piece of a token at a time, and several pieces
        case = make(tokens, width, 171, torch.bfloat16, seed=3, rules=16)
        assert emulate(case, stream=blocks) == 0
        case.check()


@pytest.mark.parametrize("blocks", [1, 8])
def test_a_token_does_not_depend_on_the_batch(emulate: Callable[..., int], blocks: int) -> None:
    whole, part = (make(150, 576, 171, torch.bfloat16, seed=5) for _ in range(2))
    assert emulate(whole, stream=blocks) == 0
    for begin, end in [(0, 1), (1, 9), (9, 150)]:
        scores, sqnorm = part.scores[begin:end], part.sqnorm[begin:end]
        assert emulate(Case(part.x[begin:end], part.operands, part.table, part.row[begin:end], None, scores, sqnorm), stream=blocks) == 0
    assert same_bits(part.x, whole.x)
    assert same_bits(part.scores, whole.scores)
    assert same_bits(part.sqnorm, whole.sqnorm)


def test_what_it_cannot_run(emulate: Callable[..., int]) -> None:
    """The call is refused and nothing written; `auto` takes the portable kernel for these."""
    refused = [
        make(2, 512, 20, torch.float32, seed=6),
        make(2, 512, 20, torch.bfloat16, seed=6, precision="high"),
        make(2, 56, 20, torch.bfloat16, seed=6),
        make(2, 512, 177, torch.bfloat16, seed=6),
    ]
    good = make(2, 512, 20, torch.bfloat16, seed=6)
    for offset, gap in [(1, 0), (0, 3)]:
        storage = torch.empty(2 * (512 + gap) + offset, dtype=torch.bfloat16)
        x = storage[offset:].view(2, 512 + gap)[:, :512].copy_(good.x)
        refused.append(Case(x, good.operands, good.table, good.row, None, good.scores, good.sqnorm))
    for case in refused:
        assert emulate(case, stream=1) == emulated.NO_KERNEL
        assert same_bits(case.x, case.before)
        assert case.scores.isnan().all()
    assert emulate(good, stream=1, shared=100 * 1024) == emulated.NO_KERNEL


def test_bf16_scores_are_fp32_scores_rounded_once(emulate: Callable[..., int]) -> None:
    full, short = (make(20, 512, 171, torch.bfloat16, seed=6, scores_dtype=kept) for kept in (torch.float32, torch.bfloat16))
    assert emulate(full, stream=2) == emulate(short, stream=2) == 0
    assert same_bits(short.scores, full.scores.to(torch.bfloat16))
    assert same_bits(short.x, full.x)


def test_indices_out_of_range_leave_the_token_alone(emulate: Callable[..., int]) -> None:
    case = make(20, 512, 9, torch.bfloat16, seed=5)
    case.row[:3] = torch.tensor([99, -7, 2**31 - 1], dtype=torch.int32)
    case.table.gate[:, 1] = 1000
    assert emulate(case, stream=1) == 0
    case.row[:3] = -1
    case.table.gate[:, 1] = -1
    case.check()


def test_nan_stays_in_its_token(emulate: Callable[..., int]) -> None:
    clean, case = (make(12, 512, 20, torch.bfloat16, seed=7) for _ in range(2))
    case.x[11, 5] = math.nan
    emulate(clean, stream=1)
    emulate(case, stream=1)
    assert case.scores[11].isnan().all()
    assert same_bits(case.x[:11], clean.x[:11])
    assert same_bits(case.scores[:11], clean.scores[:11])


def test_one_output_alone(emulate: Callable[..., int]) -> None:
    for output in ("scores", "sqnorm"):
        case = make(20, 512, 9, torch.float16, seed=5, steer=False)
        setattr(case, output, None)
        assert emulate(case, stream=1) == 0
        case.check()
    case = make(20, 512, 9, torch.float16, seed=5)
    case.row = None
    assert emulate(case, stream=1) == 0
    case.check()
