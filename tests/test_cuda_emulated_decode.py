"""The decode kernel's logic without a GPU, on the emulator: clusters of blocks, bulk copies, barriers."""

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
    "strided": {"strided": True, "own_readers": True},
    "steer_only": {"outputs": False},
    "add_only": {"rules": 0, "gates": False, "outputs": False},
    "bf16_scores": {"scores_dtype": torch.bfloat16},
}


@pytest.fixture(scope="module")
def emulate() -> Callable[..., int]:
    return emulated.build()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_agrees_with_the_reference(emulate: Callable[..., int], dtype: torch.dtype, mode: str) -> None:
    """One token, a cluster's tokens and one more, on few and on many concepts; slices of whole and of broken chunks."""
    for tokens, width, concepts in [(1, 512, 171), (17, 576, 20), (9, 1280, 16)]:
        case = make(tokens, width, concepts, dtype, seed=1, **MODES[mode])
        assert emulate(case, cluster=4) == 0
        case.check()


def test_every_cluster(emulate: Callable[..., int]) -> None:
    for cluster in (4, 8, 16):
        case = make(5, 2048, 16, torch.bfloat16, seed=2, residual=True)
        assert emulate(case, cluster=cluster) == 0
        case.check()


def test_256_concepts_and_sixteen_rules(emulate: Callable[..., int]) -> None:
    case = make(12, 512, 256, torch.bfloat16, seed=3, rules=16)
    assert emulate(case, cluster=4) == 0
    case.check()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("eager", [False, True])
def test_slices_that_do_not_fit(emulate: Callable[..., int], dtype: torch.dtype, eager: bool) -> None:
    """Little shared memory: the readers go round a ring of two slots."""
    case = make(3, 2048, 16, dtype, seed=4)
    assert emulate(case, cluster=4, shared=30 * 1024, eager=eager) == 0
    case.check()


@pytest.mark.slow
def test_the_widest_model(emulate: Callable[..., int]) -> None:
    case = make(2, 16384, 171, torch.bfloat16, seed=4)
    assert emulate(case, cluster=16) == 0
    case.check()


def test_a_token_does_not_depend_on_the_batch(emulate: Callable[..., int]) -> None:
    whole, part = (make(40, 512, 171, torch.bfloat16, seed=5) for _ in range(2))
    assert emulate(whole, cluster=4) == 0
    for begin, end in [(0, 1), (1, 9), (9, 40)]:
        scores, sqnorm = part.scores[begin:end], part.sqnorm[begin:end]
        assert emulate(Case(part.x[begin:end], part.operands, part.table, part.row[begin:end], None, scores, sqnorm), cluster=4) == 0
    assert same_bits(part.x, whole.x)
    assert same_bits(part.scores, whole.scores)
    assert same_bits(part.sqnorm, whole.sqnorm)


def test_what_it_cannot_run(emulate: Callable[..., int]) -> None:
    """The call is refused and nothing written; `auto` takes the portable kernel for these."""
    refused = [
        make(2, 512, 20, torch.float32, seed=6),
        make(2, 512, 20, torch.bfloat16, seed=6, precision="high"),
        make(2, 256, 20, torch.bfloat16, seed=6),  # slices too narrow
        make(2, 1032, 20, torch.bfloat16, seed=6),  # slices not of whole steps
        make(2, 512, 257, torch.bfloat16, seed=6),
    ]
    odd = make(2, 512, 20, torch.bfloat16, seed=6)
    storage = torch.empty(2 * 515 + 1, dtype=torch.bfloat16)
    refused.append(Case(storage[1:].view(2, 515)[:, :512].copy_(odd.x), odd.operands, odd.table, odd.row, None, odd.scores, odd.sqnorm))
    for case in refused:
        assert emulate(case, cluster=16) == emulated.NO_KERNEL
        assert same_bits(case.x, case.before)
        assert case.scores.isnan().all()


def test_bf16_scores_are_fp32_scores_rounded_once(emulate: Callable[..., int]) -> None:
    full, short = (make(20, 512, 171, torch.bfloat16, seed=6, scores_dtype=kept) for kept in (torch.float32, torch.bfloat16))
    assert emulate(full, cluster=4) == emulate(short, cluster=4) == 0
    assert same_bits(short.scores, full.scores.to(torch.bfloat16))
    assert same_bits(short.x, full.x)


def test_indices_out_of_range_leave_the_token_alone(emulate: Callable[..., int]) -> None:
    case = make(20, 512, 9, torch.bfloat16, seed=5)
    case.row[:3] = torch.tensor([99, -7, 2**31 - 1], dtype=torch.int32)
    case.table.gate[:, 1] = 1000
    assert emulate(case, cluster=4) == 0
    case.row[:3] = -1
    case.table.gate[:, 1] = -1
    case.check()


def test_nan_stays_in_its_token(emulate: Callable[..., int]) -> None:
    clean, case = (make(12, 512, 20, torch.bfloat16, seed=7) for _ in range(2))
    case.x[11, 5] = math.nan
    emulate(clean, cluster=4)
    emulate(case, cluster=4)
    assert case.scores[11].isnan().all()
    assert same_bits(case.x[:11], clean.x[:11])
    assert same_bits(case.scores[:11], clean.scores[:11])


def test_one_output_alone(emulate: Callable[..., int]) -> None:
    for output in ("scores", "sqnorm"):
        case = make(20, 512, 9, torch.float16, seed=5, steer=False)
        setattr(case, output, None)
        assert emulate(case, cluster=4) == 0
        case.check()
    case = make(20, 512, 9, torch.float16, seed=5)
    case.row = None
    assert emulate(case, cluster=4) == 0
    case.check()
