"""The CUDA kernels on a GPU: every form, mode, dtype and shape against the oracle, and their contracts."""

from __future__ import annotations

import math

import pytest
import torch
from cases import CLOSER, DTYPES, MODES, Case, make, same_bits

from emovec import _host, ops

FORMS = {name: number for name, number in _host.kernels().items() if name.startswith("cuda_")}
pytestmark = [
    pytest.mark.skipif(not FORMS, reason="this build has no CUDA kernels (no nvcc when it was built)"),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

# Ragged N in every tile size (16, 32, 64 and 128 tokens on 132 multiprocessors); d below, at and off a stage;
# K off and at the padding and the pass.
SHAPES = [
    (1, 64, 1),
    (5, 512, 171),
    (8, 520, 16),
    (17, 1000, 171),
    (47, 576, 177),
    (48, 512, 176),
    (131, 136, 193),
    (300, 1536, 171),
    (3, 16384, 171),
    (2500, 256, 171),
    (9000, 136, 171),
]


def forms(case: Case) -> list[str]:
    """The forms that can run this call; the automatic choice too."""
    runs = ["auto", "cuda_portable"]
    (tokens, width), concepts = case.x.shape, case.operands.directions.shape[0]
    if width * case.x.element_size() > 1024:
        runs.append("cuda_sliced")
    if case.operands.readers.dim() == 3:  # high precision
        return runs
    slices = any(width % (16 * blocks) == 0 and width // blocks >= 128 for blocks in (4, 8, 16))
    narrow = case.x.dtype != torch.float32 and concepts <= 256
    if "cuda_decode_sm90" in FORMS and torch.cuda.get_device_capability()[0] in (9, 10) and slices and narrow and tokens <= 2500:
        runs += ["cuda_decode_sm90", "cuda_decode_sm90_pdl"]
    if "cuda_stream_sm90" in FORMS and torch.cuda.get_device_capability() == (9, 0) and streams(case):
        runs.append("cuda_stream_sm90")
    return runs


def streams(case: Case) -> bool:
    """Whether the stream kernel can run the call: a 16-bit dtype, at most 176 concepts, a stage of columns, rows at multiples of 16
    bytes."""
    at = [t for t in (case.x, case.residual) if t is not None]
    aligned = all(t.data_ptr() % 16 == 0 and (len(t) == 1 or t.stride(0) % 8 == 0) for t in at)
    return case.x.dtype != torch.float32 and case.operands.directions.shape[0] <= 176 and case.x.shape[1] >= 64 and aligned


def number(form: str) -> int:
    return FORMS.get(form, 0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
@pytest.mark.parametrize("mode", MODES)
def test_agrees_with_the_reference(dtype: torch.dtype, shape: tuple[int, int, int], mode: str) -> None:
    first = make(*shape, dtype, seed=11, device="cuda", **MODES[mode])
    for form in forms(first):
        case = make(*shape, dtype, seed=11, device="cuda", **MODES[mode])
        case.run(number(form))
        case.check()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [1, 2, 7, 8, 9, 16, 31, 32, 33, 63, 64])
@pytest.mark.parametrize("width", [2048, 4096, 5376, 8192])
def test_decode_shapes(dtype: torch.dtype, tokens: int, width: int) -> None:
    for form in forms(make(tokens, width, 171, dtype, seed=tokens, device="cuda")):
        case = make(tokens, width, 171, dtype, seed=tokens, residual=tokens % 2 == 0, device="cuda")
        case.run(number(form))
        case.check()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [5, 50, 3000])
def test_a_thousand_concepts_and_sixteen_rules(dtype: torch.dtype, tokens: int) -> None:
    case = make(tokens, 256, 1024, dtype, seed=1, rules=16, device="cuda")
    case.run()
    case.check()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 4096, 171), (300, 1000, 177), (9000, 520, 171)], ids=lambda s: "x".join(map(str, s)))
def test_high_scores_are_those_of_readers_that_were_not_rounded(dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    for form in forms(make(*shape, dtype, seed=5, precision="high", device="cuda")):
        fast, high = (make(*shape, dtype, seed=5, steer=False, precision=precision, device="cuda") for precision in ops.PRECISIONS)
        for case in (fast, high):
            case.run(number(form))
        if dtype == torch.float32:
            assert same_bits(high.scores, fast.scores)
        else:
            assert CLOSER * high.lost() < fast.lost()


@pytest.mark.parametrize("form", [form for form in FORMS if form not in ("cuda_portable", "cuda_sliced")])
def test_other_forms_refuse_high_readers(form: str) -> None:
    case = make(64, 4096, 171, torch.bfloat16, seed=5, precision="high", device="cuda")
    with pytest.raises(RuntimeError, match=f'form {FORMS[form]} takes readers that are rounded.*precision="high"; forms 16 and 22'):
        case.run(FORMS[form])
    torch.cuda.synchronize()
    assert same_bits(case.x, case.before)
    assert case.scores.isnan().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 4096, 171), (64, 4096, 1), (300, 1000, 177), (9000, 520, 171)], ids=lambda s: "x".join(map(str, s)))
def test_bf16_scores_are_fp32_scores_rounded_once(dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    for form in forms(make(*shape, dtype, seed=6, device="cuda"))[1:]:  # by itself a call may take another tile, of the same bits
        full, short = (make(*shape, dtype, seed=6, scores_dtype=kept, device="cuda") for kept in (torch.float32, torch.bfloat16))
        for case in (full, short):
            case.run(number(form))
        assert same_bits(short.scores, full.scores.to(torch.bfloat16))
        assert same_bits(short.x, full.x)
        assert same_bits(short.sqnorm, full.sqnorm)


def misaligned(case: Case, offset: int, gap: int) -> Case:
    """The same call on a view that starts ``offset`` elements into its storage and has ``gap`` between rows."""

    def move(tensor: torch.Tensor) -> torch.Tensor:
        storage = torch.randn(tensor.shape[0] * (tensor.shape[1] + gap) + offset, device=tensor.device).to(tensor.dtype)
        view = storage[offset:].view(tensor.shape[0], -1)[:, : tensor.shape[1]]
        return view.copy_(tensor)

    residual = None if case.residual is None else move(case.residual)
    return Case(move(case.x), case.operands, case.table, case.row, residual, case.scores, case.sqnorm)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("offset", "gap"), [(1, 0), (0, 3), (5, 7), (8, 4)])
@pytest.mark.parametrize("mode", ["residual", "rules", "add", "add_only"])
def test_misaligned_rows(dtype: torch.dtype, offset: int, gap: int, mode: str) -> None:
    for tokens, width in [(9, 1024), (150, 520)]:
        case = misaligned(make(tokens, width, 171, dtype, seed=2, device="cuda", **MODES[mode]), offset, gap)
        case.run()
        case.check()


def test_misaligned_operands() -> None:
    case = make(20, 512, 171, torch.bfloat16, seed=3, device="cuda")
    o, table = case.operands, case.table

    def shift(tensor: torch.Tensor) -> torch.Tensor:
        return torch.cat([tensor.new_zeros(1), tensor.flatten()])[1:].view(tensor.shape)

    case.operands = ops.Operands(shift(o.readers), shift(o.directions), shift(o.mean), shift(o.inv_std))
    case.table = ops.Table(*(shift(t) for t in table.tensors()))
    case.run()
    case.check()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", ["cuda_portable", "cuda_sliced"])
def test_a_token_does_not_depend_on_the_batch(form: str, dtype: torch.dtype) -> None:
    """Within a form, whatever the tile: 9000 tokens take other tiles than 1, 8 or 2600."""
    whole = make(9000, 520, 171, dtype, seed=3, device="cuda")
    whole.run(FORMS[form])
    part = make(9000, 520, 171, dtype, seed=3, device="cuda")
    for begin, end in [(0, 1), (1, 8), (8, 17), (17, 65), (65, 157), (157, 2757), (2757, 9000)]:
        scores, sqnorm = part.scores[begin:end], part.sqnorm[begin:end]
        Case(part.x[begin:end], part.operands, part.table, part.row[begin:end], None, scores, sqnorm).run(FORMS[form])
    assert same_bits(part.x, whole.x)
    assert same_bits(part.scores, whole.scores)
    assert same_bits(part.sqnorm, whole.sqnorm)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_decoded_token_does_not_depend_on_the_batch(dtype: torch.dtype) -> None:
    whole = make(64, 4096, 171, dtype, seed=3, device="cuda")
    if "cuda_decode_sm90" not in forms(whole):
        pytest.skip("no decode kernel for this GPU")
    whole.run(FORMS["cuda_decode_sm90"])
    part = make(64, 4096, 171, dtype, seed=3, device="cuda")
    for begin, end in [(0, 1), (1, 8), (8, 17), (17, 33), (33, 64)]:
        scores, sqnorm = part.scores[begin:end], part.sqnorm[begin:end]
        Case(part.x[begin:end], part.operands, part.table, part.row[begin:end], None, scores, sqnorm).run(FORMS["cuda_decode_sm90"])
    assert same_bits(part.x, whole.x)
    assert same_bits(part.scores, whole.scores)
    assert same_bits(part.sqnorm, whole.sqnorm)


@pytest.mark.parametrize("captured", [False, True])
def test_calls_that_start_early_wait_for_what_they_read(captured: bool) -> None:
    """Each adds to what the one before it wrote; torch's kernels come between some of them."""
    both = ("cuda_decode_sm90", "cuda_decode_sm90_pdl")
    cases = {form: make(40, 4096, 171, torch.bfloat16, seed=5, rules=3, device="cuda") for form in both}
    if both[1] not in forms(cases[both[1]]):
        pytest.skip("no decode kernel for this GPU")
    for form, case in cases.items():

        def calls(case: Case = case, form: str = form) -> None:
            for step in range(60):
                case.run(FORMS[form])
                if step % 7 == 0:
                    case.x.mul_(1.25)
                if step % 11 == 0:
                    case.row.copy_(case.row.roll(1))

        start, row = case.x.clone(), case.row.clone()
        calls()
        if captured:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                calls()
            case.x.copy_(start)
            case.row.copy_(row)
            graph.replay()
    one, other = cases.values()
    assert same_bits(one.x, other.x)
    assert same_bits(one.scores, other.scores)
    assert same_bits(one.sqnorm, other.sqnorm)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [3, 40, 2500, 9000])
def test_runs_repeat_bit_for_bit(dtype: torch.dtype, tokens: int) -> None:
    original = make(tokens, 1024, 171, dtype, seed=4, residual=True, device="cuda")
    for form in forms(original):
        first = None
        for _ in range(20):
            case = Case(original.x.clone(), original.operands, original.table, original.row, original.residual)
            case.scores = torch.full((tokens, 171), math.nan, device="cuda")
            case.sqnorm = torch.full((tokens,), math.nan, device="cuda")
            case.run(number(form))
            first = first or case
            assert same_bits(case.x, first.x)
            assert same_bits(case.scores, first.scores)
            assert same_bits(case.sqnorm, first.sqnorm)


def test_nan_stays_in_its_token() -> None:
    for dtype in DTYPES:
        clean = make(30, 512, 171, dtype, seed=7, device="cuda")
        for form in forms(clean):
            clean, case = (make(30, 512, 171, dtype, seed=7, device="cuda") for _ in range(2))
            case.x[11, 5] = math.nan
            case.run(number(form))
            clean.run(number(form))
            others = torch.arange(30, device="cuda") != 11
            assert case.scores[11].isnan().all()
            assert same_bits(case.x[others], clean.x[others])
            assert same_bits(case.scores[others], clean.scores[others])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_rounding_is_to_nearest_even_and_keeps_nan_and_infinity(dtype: torch.dtype) -> None:
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).view(-1, 64).clone().cuda()
    directions = torch.eye(1, 64, device="cuda")
    operands = ops.Operands.build(directions, directions, dtype=dtype)
    for delta in (torch.zeros(64), torch.linspace(-3, 3, 64)):
        x = patterns.clone()
        ops.apply_(x, operands, ops.Table.build([ops.Row(delta)], operands))
        wanted = (patterns.float() + delta.cuda()).to(dtype)
        finite = ~wanted.isnan()
        assert torch.equal(x[finite], wanted[finite])
        assert x[~finite].isnan().all()


def test_indices_out_of_range_leave_the_token_alone() -> None:
    """Checking them on the host would cost a synchronisation."""
    case = make(40, 512, 171, torch.bfloat16, seed=5, device="cuda")
    wrong = torch.tensor([99, -7, 2**31 - 1, -(2**31)], dtype=torch.int32, device="cuda")
    case.row[:4] = wrong
    case.run()
    case.row[:4] = -1
    case.check()
    for form in forms(case):
        case = make(40, 512, 171, torch.bfloat16, seed=5, gates=True, device="cuda")
        case.table.gate[:, 1] = 1000
        case.run(number(form))
        case.table.gate[:, 1] = -1
        case.check()


def test_nothing_to_do_is_fine() -> None:
    make(0, 64, 8, torch.bfloat16, seed=6, device="cuda").run()
    case = make(4, 64, 8, torch.bfloat16, seed=6, steer=False, outputs=False, device="cuda")
    case.run()
    assert same_bits(case.x, case.before)


def test_row_none_means_row_zero() -> None:
    a, b = (make(20, 512, 8, torch.float16, seed=5, device="cuda") for _ in range(2))
    a.row, b.row = None, torch.zeros(20, dtype=torch.int32, device="cuda")
    a.run()
    b.run()
    assert same_bits(a.x, b.x)


def test_offsets_beyond_32_bits() -> None:
    """Rows so far apart that byte offsets, and element offsets, do not fit 32 bits."""
    if torch.cuda.get_device_properties(0).total_memory < 16e9:
        pytest.skip("needs 9 GB of GPU memory")
    stride = 2**31 + 8
    storage = torch.empty(2 * stride + 512, dtype=torch.bfloat16, device="cuda")
    case = make(3, 512, 171, torch.bfloat16, seed=8, device="cuda")
    case.x = storage.as_strided((3, 512), (stride, 1)).copy_(case.x)
    case.run()
    case.check()


# --- streams, graphs, compilation -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [4, 700])
def test_runs_on_the_current_stream(tokens: int) -> None:
    """A copy that is late on the same stream is seen; the default stream is not waited for."""
    case = make(tokens, 1024, 171, torch.bfloat16, seed=9, device="cuda")
    x = torch.zeros_like(case.x)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        x.copy_(case.before)
        ops.apply_(x, case.operands, case.table, case.row, None, case.scores, case.sqnorm)
    assert not stream.query(), "apply_ waited for the GPU"
    stream.synchronize()
    case.x = x
    case.check()


@pytest.mark.parametrize("tokens", [1, 8, 40, 300])
def test_graph_replays_with_new_rows_and_doses(tokens: int) -> None:
    first = make(tokens, 1024, 171, torch.bfloat16, seed=10, device="cuda")
    for form in forms(first):
        case = make(tokens, 1024, 171, torch.bfloat16, seed=10, device="cuda")
        case.run(number(form))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            case.run(number(form))
        g = torch.Generator().manual_seed(tokens)
        for _ in range(3):
            case.x.copy_(torch.randn(tokens, 1024, generator=g).to(torch.bfloat16))
            case.before = case.x.clone()
            case.row.copy_(torch.randint(-1, 4, (tokens,), generator=g, dtype=torch.int32))
            case.scores.fill_(math.nan)
            case.sqnorm.fill_(math.nan)
            chosen = torch.randperm(171, generator=g)[:3].tolist()
            case.table.set_row(1, ops.Row(torch.randn(1024, generator=g), tuple(ops.Rule(k, 0.0, 0.5) for k in chosen)), case.operands)
            graph.replay()
            torch.cuda.synchronize()
            case.check()


def test_compiles_without_a_break() -> None:
    case, eager = (make(12, 512, 171, torch.bfloat16, seed=9, device="cuda") for _ in range(2))

    def block(x: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        hidden = x * 2
        o, table = case.operands, case.table
        torch.ops.emovec.apply_(hidden, o.readers, o.directions, o.mean, o.inv_std, None, case.row, *table.tensors(), scores, None)
        return hidden + 1

    expected_scores = eager.scores.clone()
    expected = block(eager.x, expected_scores)
    result = torch.compile(block, fullgraph=True)(case.x, case.scores)
    assert torch.equal(result, expected)
    assert same_bits(case.scores, expected_scores)


# --- errors: nothing has changed --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"x": torch.zeros(6, 64, dtype=torch.bfloat16)}, "cuda.*cpu"),
        ({"residual": torch.zeros(6, 64, dtype=torch.bfloat16)}, "residual is on another device"),
        ({"row": torch.zeros(6, dtype=torch.int32)}, "row is on another device"),
        ({"scores": torch.full((6, 9), math.nan)}, "scores is on another device"),
        ({"x": torch.zeros(6, 64, device="meta")}, "meta|float32"),
    ],
    ids=["x", "residual", "row", "scores", "meta"],
)
def test_refuses_another_device(changes: dict[str, torch.Tensor], match: str) -> None:
    case = make(6, 64, 9, torch.bfloat16, seed=10, device="cuda")
    before = case.x.clone()
    x = case.x
    for name, value in changes.items():
        setattr(case, name, value)
    with pytest.raises((RuntimeError, ValueError), match=match):
        case.run()
    torch.cuda.synchronize()
    assert same_bits(x, before)


def test_refuses_what_does_not_fit() -> None:
    case = make(6, 64, 9, torch.bfloat16, seed=10, device="cuda")
    with pytest.raises(RuntimeError, match="form 77"):
        case.run(77)
    with pytest.raises(RuntimeError, match="form 1 "):
        case.run(1)
    with pytest.raises((RuntimeError, ValueError), match="float32"):
        ops.apply_(case.x.float(), case.operands)
    odd = make(6, 60, 9, torch.bfloat16, seed=10, device="cuda")
    with pytest.raises(RuntimeError, match="multiple of 8, got 60"):
        odd.run()
    torch.cuda.synchronize()
    for refused in (case, odd):
        assert same_bits(refused.x, refused.before)
        assert refused.scores.isnan().all()
