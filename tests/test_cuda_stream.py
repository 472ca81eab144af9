"""The stream kernel on a GPU, alone: small and large shapes, what it refuses, repeats, batches, graphs. test_cuda.py has the rest."""

from __future__ import annotations

import math

import pytest
import torch
from cases import Case, make, same_bits

from emovec import _host

FORMS = [number for name, number in _host.kernels().items() if name.startswith("cuda_stream_sm90")]
pytestmark = [
    pytest.mark.skipif(not FORMS, reason="this build has no CUDA kernels (no nvcc when it was built)"),
    pytest.mark.skipif(not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="no CUDA device of sm_90"),
]
forms = pytest.mark.parametrize("form", FORMS)  # 1, 2, 4 and 8 blocks that share a tile
DTYPES = (torch.bfloat16, torch.float16)
MODES = {
    "read": {"steer": False},
    "add": {"rules": 0, "gates": False},
    "rules": {"gates": False},
    "gated": {},
    "residual": {"residual": True},
    "strided": {"strided": True, "residual": True, "own_readers": True},
    "steer_only": {"outputs": False},
    "add_only": {"rules": 0, "gates": False, "outputs": False},
    "bf16_scores": {"scores_dtype": torch.bfloat16},
}


@forms
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_agrees_with_the_reference(form: int, dtype: torch.dtype, mode: str) -> None:
    """Tiles that are full, ragged, alone and many; columns on and off a stage; fewer stages than the ring, and many rounds of it."""
    for shape in [(128, 64, 16), (1, 128, 171), (131, 136, 1), (256, 512, 176), (300, 1000, 171), (1111, 4096, 171), (17001, 192, 171)]:
        case = make(*shape, dtype, seed=11, device="cuda", **MODES[mode])
        case.run(form)
        case.check()


@forms
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_projection_is_of_its_own_columns(form: int, dtype: torch.dtype) -> None:
    """Small whole numbers, whose sums are exact: where a value comes from shows."""
    g = torch.Generator().manual_seed(1)
    for tokens, width in [(128, 64), (200, 448)]:
        case = make(tokens, width, 176, dtype, seed=2, steer=False, device="cuda")
        case.x.copy_(torch.randint(-4, 5, (tokens, width), generator=g))
        case.operands.readers.copy_(torch.randint(-4, 5, (176, width), generator=g))
        case.operands.mean.zero_()
        case.operands.inv_std.fill_(1)
        case.run(form)
        assert torch.equal(case.scores, (case.x.double() @ case.operands.readers.double().T).float())
        assert torch.equal(case.sqnorm, case.x.double().square().sum(-1).float())


@forms
def test_refuses_what_it_cannot_run(form: int) -> None:
    good = make(150, 512, 20, torch.bfloat16, seed=6, device="cuda")
    refused = [make(150, 512, k, torch.bfloat16, seed=6, device="cuda") for k in (177, 256)]
    refused.append(make(150, 512, 20, torch.float32, seed=6, device="cuda"))
    for offset, gap in [(1, 0), (0, 3)]:
        storage = torch.empty(150 * (512 + gap) + offset, dtype=torch.bfloat16, device="cuda")
        x = storage[offset:].view(150, 512 + gap)[:, :512].copy_(good.x)
        refused.append(Case(x, good.operands, good.table, good.row, None, good.scores, good.sqnorm))
    for case in refused:
        with pytest.raises(RuntimeError, match=f"form {form}"):
            case.run(form)
        torch.cuda.synchronize()
        assert same_bits(case.x, case.before)
        assert case.scores.isnan().all()


@forms
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_token_does_not_depend_on_the_batch(form: int, dtype: torch.dtype) -> None:
    whole, part = (make(1500, 1024, 171, dtype, seed=3, device="cuda") for _ in range(2))
    whole.run(form)
    for begin, end in [(0, 1), (1, 8), (8, 17), (17, 200), (200, 1500)]:
        scores, sqnorm = part.scores[begin:end], part.sqnorm[begin:end]
        Case(part.x[begin:end], part.operands, part.table, part.row[begin:end], None, scores, sqnorm).run(form)
    assert same_bits(part.x, whole.x)
    assert same_bits(part.scores, whole.scores)
    assert same_bits(part.sqnorm, whole.sqnorm)


@forms
def test_runs_repeat_bit_for_bit(form: int) -> None:
    original = make(3000, 2048, 171, torch.bfloat16, seed=4, residual=True, device="cuda")
    first = None
    for _ in range(20):
        case = Case(original.x.clone(), original.operands, original.table, original.row, original.residual)
        case.scores = torch.full((3000, 171), math.nan, device="cuda")
        case.sqnorm = torch.full((3000,), math.nan, device="cuda")
        case.run(form)
        first = first or case
        assert same_bits(case.x, first.x)
        assert same_bits(case.scores, first.scores)
        assert same_bits(case.sqnorm, first.sqnorm)


@forms
def test_graph_replays(form: int) -> None:
    case = make(700, 1024, 171, torch.bfloat16, seed=10, device="cuda")
    case.run(form)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        case.run(form)
    g = torch.Generator().manual_seed(1)
    for _ in range(3):
        case.x.copy_(torch.randn(700, 1024, generator=g).to(torch.bfloat16))
        case.before = case.x.clone()
        case.row.copy_(torch.randint(-1, 4, (700,), generator=g, dtype=torch.int32))
        case.scores.fill_(math.nan)
        case.sqnorm.fill_(math.nan)
        graph.replay()
        torch.cuda.synchronize()
        case.check()
