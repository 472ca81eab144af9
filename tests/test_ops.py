"""The op on a CPU: every form, mode, dtype and shape against the oracle; its contracts; its errors."""

from __future__ import annotations

import math

import pytest
import torch
from banks import run_examples
from cases import CLOSER, DTYPES, MODES, Case, correlated, make, same_bits
from hypothesis import given, settings
from hypothesis import strategies as st

from emovec import _host, ops, reference

FORMS = {name: number for name, number in _host.kernels().items() if name.startswith("cpu_")}
RUNNABLE = [name for name in FORMS if _host.runs(name)]

# Ragged N, one token, the decode path (<= 8), more than a tile; d below, at and off the block; K at and off the padding.
SHAPES = [(1, 64, 1), (5, 512, 171), (8, 520, 16), (9, 1000, 171), (47, 576, 177), (48, 513, 176), (131, 136, 17), (200, 1536, 171)]


@pytest.mark.parametrize("form", RUNNABLE)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
@pytest.mark.parametrize("mode", MODES)
def test_agrees_with_the_reference(form: str, dtype: torch.dtype, shape: tuple[int, int, int], mode: str) -> None:
    case = make(*shape, dtype, seed=hash((shape, mode)) % 1000, **MODES[mode])
    case.run(FORMS[form])
    case.check()


@pytest.mark.parametrize("form", RUNNABLE)
def test_a_thousand_concepts_and_sixteen_rules(form: str) -> None:
    case = make(50, 256, 1024, torch.bfloat16, seed=1, rules=16)
    case.run(FORMS[form])
    case.check()


@settings(max_examples=60, deadline=None)
@given(
    tokens=st.integers(0, 120),
    width=st.integers(1, 700),
    concepts=st.integers(1, 200),
    dtype=st.sampled_from(DTYPES),
    steer=st.booleans(),
    residual=st.booleans(),
    own=st.booleans(),
    strided=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_any_shape_agrees_with_the_reference(
    tokens: int, width: int, concepts: int, dtype: torch.dtype, steer: bool, residual: bool, own: bool, strided: bool, seed: int
) -> None:
    rules = min(3, width // 8)  # rules need room to be told apart
    case = make(tokens, width, concepts, dtype, seed=seed, steer=steer, residual=residual, own_readers=own, strided=strided, rules=rules)
    case.run()
    case.check()


@pytest.mark.parametrize("form", RUNNABLE)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_token_does_not_depend_on_the_batch_or_the_threads(form: str, dtype: torch.dtype) -> None:
    whole = make(157, 1088, 171, dtype, seed=3)
    whole.run(FORMS[form])
    for begin, end in [(0, 1), (1, 8), (8, 17), (17, 65), (65, 157)]:
        part = make(157, 1088, 171, dtype, seed=3)
        sliced = Case(
            part.x[begin:end], part.operands, part.table, part.row[begin:end], None, part.scores[begin:end], part.sqnorm[begin:end]
        )
        torch.set_num_threads(1 if begin % 2 else 2)
        sliced.run(FORMS[form])
        assert same_bits(sliced.x, whole.x[begin:end])
        assert same_bits(sliced.scores, whole.scores[begin:end])
        assert same_bits(sliced.sqnorm, whole.sqnorm[begin:end])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_runs_repeat_bit_for_bit(dtype: torch.dtype) -> None:
    first, second = (make(300, 2048, 171, dtype, seed=4, residual=True) for _ in range(2))
    first.run()
    second.run()
    assert same_bits(first.x, second.x)
    assert same_bits(first.scores, second.scores)


@settings(max_examples=40, deadline=None)
@given(rules=st.integers(1, 16), dtype=st.sampled_from(DTYPES), seed=st.integers(0, 2**31))
def test_joint_rules_hold_and_change_the_least(rules: int, dtype: torch.dtype, seed: int) -> None:
    """Every rule holds to rounding; what held is not moved; the change lies in the span of the rules' directions."""
    case = make(40, 512, 171, dtype, seed=seed, rules=rules, gates=False)
    case.run()
    table, row = case.table, case.row
    assert table is not None
    assert row is not None
    readers = case.operands.readers_unpacked().double()
    spacing = torch.finfo(dtype).eps * case.x.double().abs()
    for i in range(len(row)):
        if row[i] < 0:
            continue
        j = int(row[i])
        concept = table.rule_concept[j].long()
        lo, hi, shift = table.rule_bounds[j].double()
        steered = readers[concept] @ case.before[i].double() + shift
        after = readers[concept] @ case.x[i].double()
        rounding = readers[concept].abs() @ spacing[i] + 1e-5 * case.before[i].double().norm()
        assert (after >= lo - rounding).all()
        assert (after <= hi + rounding).all()
        assert ((after - steered.clamp(lo, hi)).abs() <= rounding).all()
        change = case.x[i].double() - case.before[i].double() - table.delta[j].double()
        basis = torch.linalg.qr(case.operands.directions[concept].double().T).Q
        outside = change - basis @ (basis.T @ change)
        assert outside.norm() <= spacing[i].norm() + 1e-5 * case.before[i].double().norm()


def test_gate_opens_on_the_score_and_falls_back() -> None:
    directions = torch.eye(3, 8)
    operands = ops.Operands.build(directions, directions, torch.tensor([1.0, 0, 0]), torch.tensor([2.0, 1, 1]))
    row = ops.Row(torch.full((8,), 10.0), gate=ops.Gate(0, 1.5), otherwise=ops.Row(torch.full((8,), -10.0)))
    table = ops.Table.build([row], operands)
    x = torch.zeros(4, 8)
    x[:, 0] = torch.tensor([4.0, 4.1, math.nan, -100.0])  # scores 1.5 (not above), 1.55, NaN, -50.5
    before = x.clone()
    ops.apply_(x, operands, table)
    assert torch.equal(x[:, 1] - before[:, 1], torch.tensor([-10.0, 10.0, -10.0, -10.0]))


def test_row_none_means_row_zero() -> None:
    a, b = make(20, 64, 8, torch.float32, seed=5), make(20, 64, 8, torch.float32, seed=5)
    a.row, b.row = None, torch.zeros(20, dtype=torch.int32)
    a.run()
    b.run()
    assert same_bits(a.x, b.x)


def test_nothing_to_do_is_fine() -> None:
    empty = make(0, 64, 8, torch.bfloat16, seed=6)
    empty.run()
    case = make(4, 64, 8, torch.bfloat16, seed=6, steer=False, outputs=False)
    case.run()
    assert same_bits(case.x, case.before)


def test_nan_stays_in_its_token() -> None:
    case, clean = make(30, 256, 171, torch.float32, seed=7), make(30, 256, 171, torch.float32, seed=7)
    case.x[11, 5] = math.nan
    case.run()
    clean.run()
    others = torch.arange(30) != 11
    assert case.scores[11].isnan().all()
    assert same_bits(case.x[others], clean.x[others])
    assert same_bits(case.scores[others], clean.scores[others])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_rounding_is_to_nearest_even_and_keeps_nan_and_infinity(dtype: torch.dtype) -> None:
    """Adding zero to every bit pattern gives it back; adding a half step rounds as torch does."""
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).view(-1, 64).clone()
    directions = torch.eye(1, 64)
    operands = ops.Operands.build(directions, directions, dtype=dtype)
    for form in RUNNABLE:
        for delta in (torch.zeros(64), torch.linspace(-3, 3, 64)):
            x = patterns.clone()
            ops.apply_(x, operands, ops.Table.build([ops.Row(delta)], operands), form=FORMS[form])
            wanted = (patterns.float() + delta).to(dtype)
            finite = ~wanted.isnan()
            assert torch.equal(x[finite], wanted[finite])
            assert x[~finite].isnan().all()


@pytest.mark.parametrize("form", RUNNABLE)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_high_scores_are_those_of_readers_that_were_not_rounded(form: str, dtype: torch.dtype) -> None:
    for shape in [(9, 1000, 171), (70, 513, 17)]:
        for residual in (False, True):
            fast, high = (
                make(*shape, dtype, seed=5, steer=False, own_readers=True, residual=residual, precision=precision)
                for precision in ops.PRECISIONS
            )
            fast.run(FORMS[form])
            high.run(FORMS[form])
            if dtype == torch.float32:
                assert same_bits(high.scores, fast.scores)
            else:
                assert CLOSER * high.lost() < fast.lost()


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_high_rules_hold_on_readers_that_were_not_rounded(dtype: torch.dtype) -> None:
    """What a rule asks for is found with the exact reader; it is carried out with the rounded direction."""
    directions = torch.nn.functional.normalize(torch.full((1, 64), 1.0) + torch.linspace(-0.9, 0.9, 64), dim=1)
    x = torch.full((1, 64), 64.0).to(dtype)
    bound = float(x.double() @ directions[0].double()) + 1e-3  # which the exact projection is below, the rounded one above
    assert bound < float(x.double() @ directions[0].to(dtype).double())
    for precision in ops.PRECISIONS:
        operands = ops.Operands.build(directions, directions, dtype=dtype, precision=precision)
        steered = x.clone()
        gate = ops.Gate(0, bound)
        ops.apply_(steered, operands, ops.Table.build([ops.Row(torch.ones(64), gate=gate)], operands))
        assert torch.equal(steered, x) == (precision == "high")


@pytest.mark.parametrize("form", RUNNABLE)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bf16_scores_are_fp32_scores_rounded_once(form: str, dtype: torch.dtype) -> None:
    for concepts in (1, 15, 171, 177):
        full, short = (make(21, 520, concepts, dtype, seed=6, scores_dtype=kept) for kept in (torch.float32, torch.bfloat16))
        for case in (full, short):
            case.operands.inv_std[0] = math.nan if concepts == 15 else case.operands.inv_std[0]
            case.run(FORMS[form])
        wanted = full.scores.to(torch.bfloat16)
        known = ~wanted.isnan()
        assert same_bits(short.scores[known], wanted[known])
        assert short.scores[~known].isnan().all()
        assert same_bits(short.x, full.x)
        assert same_bits(short.sqnorm, full.sqnorm)


def test_the_reference_rounds_bf16_scores_once() -> None:
    full, short = (make(21, 520, 171, torch.float32, seed=6, steer=False, scores_dtype=kept) for kept in (torch.float32, torch.bfloat16))
    for case in (full, short):
        o = case.operands
        reference.apply_(case.x, o.readers_unpacked(), o.directions, o.mean, o.inv_std, scores=case.scores)
    assert same_bits(short.scores, full.scores.to(torch.bfloat16))


# --- torch's own machinery ------------------------------------------------------------------------------------------


def call(case: Case) -> tuple[object, ...]:
    o, table = case.operands, (None,) * 6 if case.table is None else case.table.tensors()
    return (case.x, o.readers, o.directions, o.mean, o.inv_std, case.residual, case.row, *table, case.scores, case.sqnorm)


@pytest.mark.parametrize("steer", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(dtype: torch.dtype, steer: bool) -> None:
    case = make(7, 64, 9, dtype, seed=8, steer=steer, residual=steer)
    torch.library.opcheck(torch.ops.emovec.apply_, call(case))


def test_compiles_without_a_break_or_a_copy() -> None:
    case, eager = (make(12, 64, 9, torch.bfloat16, seed=9) for _ in range(2))
    outputs = case.scores.clone(), case.sqnorm

    def block(x: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        hidden = x * 2
        o, table = case.operands, case.table
        torch.ops.emovec.apply_(hidden, o.readers, o.directions, o.mean, o.inv_std, None, case.row, *table.tensors(), scores, outputs[1])
        torch.ops.emovec.apply_(x, o.readers, o.directions, o.mean, o.inv_std, None, case.row, *table.tensors(), None, None)
        return hidden + 1

    from torch._inductor.utils import run_and_get_code

    compiled = torch.compile(block, fullgraph=True)
    result, code = run_and_get_code(compiled, case.x, outputs[0])
    expected_scores = torch.full_like(outputs[0], math.nan)
    with torch.no_grad():
        expected = block(eager.x, expected_scores)
    assert torch.equal(result, expected)
    assert same_bits(case.x, eager.x)
    assert torch.equal(outputs[0], expected_scores)
    source = "\n".join(code)
    assert source.count("torch.ops.emovec.apply_.default(") == 2
    assert "copy_" not in source
    assert "clone" not in source


# --- errors: each names its value, and nothing has changed -------------------------------------------------------------


def refuses(case: Case, match: str, **kwargs: object) -> None:
    before = case.x.clone()
    with pytest.raises((RuntimeError, ValueError), match=match):
        ops.apply_(case.x, case.operands, case.table, case.row, case.residual, case.scores, case.sqnorm, **kwargs)
    assert torch.equal(case.x, before)
    if case.scores is not None and case.scores.dtype == torch.float32:
        assert case.scores.isnan().all()


def test_refuses_what_does_not_fit() -> None:
    def fresh(**changes: object) -> Case:
        case = make(6, 64, 9, torch.bfloat16, seed=10)
        for name, value in changes.items():
            setattr(case, name, value)
        return case

    refuses(fresh(x=torch.zeros(6, 64)), "float32")
    refuses(fresh(x=torch.zeros(6, 72, dtype=torch.bfloat16)), "72")
    refuses(fresh(x=torch.zeros(2, 3, 64, dtype=torch.bfloat16)), r"\[2, 3, 64\]")
    refuses(fresh(x=torch.zeros(64, 6, dtype=torch.bfloat16).T), "contiguous, its stride is 6")
    refuses(fresh(x=torch.zeros(1, 64, dtype=torch.bfloat16).expand(6, 64)), "overlap")
    refuses(fresh(residual=torch.zeros(5, 64, dtype=torch.bfloat16)), r"residual must be \[6, 64\], got \[5, 64\]")
    refuses(fresh(residual=torch.zeros(6, 64)), "residual must be bfloat16, got float32")
    refuses(fresh(scores=torch.zeros(6, 9, dtype=torch.float64)), "scores must be float32 or bfloat16, got float64")
    refuses(fresh(scores=torch.zeros(6, 9, dtype=torch.float16)), "scores must be float32 or bfloat16, got float16")
    refuses(fresh(scores=torch.full((6, 10), math.nan)), r"scores must be \[6, 9\], got \[6, 10\]")
    refuses(fresh(sqnorm=torch.zeros(7)), r"sqnorm must be \[6\], got \[7\]")
    refuses(fresh(row=torch.zeros(6, dtype=torch.int64)), "row must be int32, got int64")
    refuses(fresh(row=torch.tensor([0, 1, -1, 99, 0, 0], dtype=torch.int32)), r"row\[3\] = 99")
    refuses(fresh(row=torch.tensor([0, 1, -2, 0, 0, 0], dtype=torch.int32)), r"row\[2\] = -2")
    refuses(fresh(table=None), "without a table")
    refuses(fresh(), "form 77", form=77)


def test_another_device_is_refused() -> None:
    case = make(6, 64, 9, torch.bfloat16, seed=10)
    with pytest.raises(ValueError, match=r"cpu.*meta"):
        ops.apply_(case.x.to("meta"), case.operands)
    for name in ("residual", "row", "sqnorm"):
        case = make(6, 64, 9, torch.bfloat16, seed=10)
        elsewhere = {"residual": case.x, "row": torch.zeros(6, dtype=torch.int32), "sqnorm": torch.zeros(6)}[name].to("meta")
        setattr(case, name, elsewhere)
        refuses(case, "is on meta, x is on cpu")


def test_table_refuses_what_cannot_hold() -> None:
    directions = correlated(5, 32, torch.Generator().manual_seed(0))
    directions[4] = directions[3]
    operands = ops.Operands.build(directions, directions)

    def build(*rules: ops.Rule, **row: object) -> None:
        ops.Table.build([ops.Row(rules=rules, **row)], operands)

    with pytest.raises(ValueError, match="too alike"):
        build(ops.Rule(3, 0, 0), ops.Rule(4, 1, 1))
    with pytest.raises(ValueError, match=r"two rules on one concept in \[1, 1\]"):
        build(ops.Rule(1, 0, 0), ops.Rule(1, 1, 1))
    with pytest.raises(ValueError, match="lower bound 2 is above upper bound 1"):
        build(ops.Rule(1, 2, 1))
    with pytest.raises(ValueError, match="nan"):
        build(ops.Rule(1, math.nan, 1))
    with pytest.raises(ValueError, match="concept 5 of 5"):
        build(ops.Rule(5, 0, 0))
    with pytest.raises(ValueError, match="not finite"):
        build(delta=torch.full((32,), math.inf))
    with pytest.raises(ValueError, match=r"delta must be \[32\]"):
        build(delta=torch.zeros(31))
    with pytest.raises(ValueError, match="17 rules"):
        ops.Table.empty(1, 32).set_row(0, ops.Row(rules=tuple(ops.Rule(0, 0, 0) for _ in range(17))), operands)


def test_operands_refuse_what_does_not_fit() -> None:
    directions = correlated(5, 32, torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match="float64"):
        ops.Operands.build(directions.double(), directions)
    with pytest.raises(ValueError, match=r"\(5, 32\) but directions are \(4, 32\)"):
        ops.Operands.build(directions, directions[:4])
    with pytest.raises(ValueError, match="1025"):
        ops.Operands.build(torch.ones(1025, 8), torch.ones(1025, 8))
    with pytest.raises(ValueError, match="precision must be one of fast, high, got 'exact'"):
        ops.Operands.build(directions, directions, precision="exact")
    with pytest.raises(ValueError, match="positive"):
        ops.Operands.build(directions, directions, torch.zeros(5), torch.tensor([1.0, 1, 0, 1, 1]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [32, 33])
def test_pack_round_trip(dtype: torch.dtype, width: int) -> None:
    readers = torch.randn(19, width).to(dtype)
    assert torch.equal(ops.unpack(ops.pack(readers), 19, width).to(dtype), readers)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_high_readers_round_trip(dtype: torch.dtype) -> None:
    readers = correlated(19, 4096, torch.Generator().manual_seed(0))
    assert torch.equal(ops.unpack(ops.pack_high(readers, dtype), 19, 4096), readers)
    rounded, rest = ops.split(readers, dtype)
    assert rounded.dtype == rest.dtype == dtype
    whole = rounded.double() + rest.double()
    assert torch.equal(whole.float().double(), whole), "fp32 holds the sum"
    assert (whole - readers.double()).norm() <= 2**-16 * readers.norm()
    assert ops.pack_high(readers.to("meta"), dtype).shape == ((32, 4096) if dtype == torch.float32 else (2, 32, 4096))


def test_the_examples_in_the_documentation_run() -> None:
    run_examples("op.md")
