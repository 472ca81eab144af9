"""The Triton kernel against the oracle: on a GPU where there is one, else in Triton's interpreter.

The interpreter is chosen when Triton is first imported (``TRITON_INTERPRET=1``), so it gets a process of its own, which
runs this same file. It is never asked for bf16: its ``tl.dot`` has no bf16 and returns garbage.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import CLOSER, DTYPES, MODES, Case, correlated, gpu_readers, make, same_bits

from emovec import _host, ops

triton = pytest.importorskip("triton")

import emovec.triton as backend  # noqa: E402
from emovec.triton import apply as launcher  # noqa: E402

INTERPRETED = launcher.INTERPRETED
DEVICE = "cpu" if INTERPRETED else "cuda"
NATIVE = "cuda_portable" in _host.kernels()
RUN_DTYPES = (torch.float32, torch.float16) if INTERPRETED else DTYPES

on_a_device = pytest.mark.skipif(
    not INTERPRETED and not torch.cuda.is_available(), reason="no GPU here; test_in_the_interpreter runs it in another process"
)
on_a_gpu = pytest.mark.skipif(INTERPRETED or not torch.cuda.is_available(), reason="needs a GPU")
in_another_process = pytest.mark.skipif(
    INTERPRETED or torch.cuda.is_available(), reason="this process runs the same tests, in the interpreter or on a GPU"
)

if INTERPRETED:
    from triton.runtime import interpreter

    patch_tensor = interpreter._patch_lang_tensor

    def patch_index(tensor: type, scope: object) -> None:
        """Triton 3.6 takes a loop's bound out of an array of one element by ``int``, which numpy 2.4 refuses."""
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patch_index

    cast = interpreter.InterpreterBuilder.cast_impl

    def cast_to_nearest(self: object, src: object, dst_type: object) -> object:
        """Triton 3.6 interprets fp32 to bf16 as a truncation; compiled it rounds to the nearest (test_triton_compiled.py)."""
        if (src.dtype.scalar, dst_type.scalar) != (triton.language.float32, triton.language.bfloat16):
            return cast(self, src, dst_type)
        rounded = torch.from_numpy(src.data.copy()).to(torch.bfloat16).view(torch.int16).numpy().view("uint16")
        return interpreter.TensorHandle(rounded, dst_type.scalar)

    interpreter.InterpreterBuilder.cast_impl = cast_to_nearest


# --- another process ------------------------------------------------------------------------------------------------


def run_in_the_interpreter(marked: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", marked, __file__]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=Path(__file__).parent.parent)
    passed = re.search(r"(\d+) passed", done.stdout)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert passed is not None
    assert int(passed[1]) > 10


@in_another_process
def test_in_the_interpreter() -> None:
    run_in_the_interpreter("not slow")


@in_another_process
@pytest.mark.slow
def test_in_the_interpreter_at_length() -> None:
    run_in_the_interpreter("slow")


# --- against the oracle ---------------------------------------------------------------------------------------------


FORMS = {"whole": launcher.WHOLE, "sliced": launcher.SLICED}
both_forms = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)


def run(case: Case, form: int = 0) -> None:
    operands = case.operands
    if INTERPRETED:  # the CPU's readers are packed in panels
        operands = dataclasses.replace(operands, readers=gpu_readers(case))
    backend.apply_(case.x, operands, case.table, case.row, residual=case.residual, scores=case.scores, sqnorm=case.sqnorm, form=form)


# Ragged N, more than a tile; d at and off the block and the slice, not a multiple of 8; K at and off the padding and the 192 of a pass.
# A GPU compiles each mode for each (d, K), which takes longer than the tests.
SHAPES = [(1, 64, 1), (35, 264, 171)]
MORE_SHAPES = [(131, 520, 176), (70, 1032, 177), (33, 100, 200), (257, 513, 171)]
MORE_MODES = ["read", "gated", "strided", "steer_only"]
SIZES = [(1, 4096, 171), (64, 4096, 171), (1000, 4096, 171), (513, 8192, 171)]


def shape_name(shape: tuple[int, int, int]) -> str:
    return "x".join(map(str, shape))


def agrees(shape: tuple[int, int, int], dtype: torch.dtype, mode: str, form: int) -> None:
    case = make(*shape, dtype, seed=len(mode), device=DEVICE, **MODES[mode])
    run(case, form)
    case.check()


@on_a_device
@pytest.mark.parametrize("dtype", RUN_DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=shape_name)
@pytest.mark.parametrize("mode", MODES)
@both_forms
def test_agrees_with_the_reference(shape: tuple[int, int, int], dtype: torch.dtype, mode: str, form: int) -> None:
    agrees(shape, dtype, mode, form)


@on_a_device
@pytest.mark.slow
@pytest.mark.parametrize("dtype", RUN_DTYPES, ids=str)
@pytest.mark.parametrize("shape", MORE_SHAPES, ids=shape_name)
@pytest.mark.parametrize("mode", MORE_MODES)
@both_forms
def test_agrees_with_the_reference_at_length(shape: tuple[int, int, int], dtype: torch.dtype, mode: str, form: int) -> None:
    agrees(shape, dtype, mode, form)


@on_a_gpu
@pytest.mark.parametrize("dtype", RUN_DTYPES, ids=str)
@pytest.mark.parametrize("shape", SIZES, ids=shape_name)
@pytest.mark.parametrize("mode", MODES)
@both_forms
def test_agrees_with_the_reference_at_size(shape: tuple[int, int, int], dtype: torch.dtype, mode: str, form: int) -> None:
    agrees(shape, dtype, mode, form)


@on_a_device
@pytest.mark.slow
@pytest.mark.parametrize("dtype", RUN_DTYPES, ids=str)
@both_forms
def test_a_thousand_concepts_and_sixteen_rules(dtype: torch.dtype, form: int) -> None:
    case = make(20, 128, 1024, dtype, seed=1, rules=16, device=DEVICE)
    run(case, form)
    case.check()


@on_a_device
@pytest.mark.parametrize("dtype", RUN_DTYPES, ids=str)
@both_forms
def test_a_token_does_not_depend_on_the_batch(dtype: torch.dtype, form: int) -> None:
    """Neither on how many others there are, nor on its place in a tile, nor on whether they wait for projections."""
    whole = make(70, 264, 171, dtype, seed=3, device=DEVICE)
    run(whole, form)
    for begin, end in [(0, 1), (1, 9), (9, 70)]:
        part = make(70, 264, 171, dtype, seed=3, device=DEVICE)
        part = Case(part.x[begin:end], part.operands, part.table, part.row[begin:end], None, part.scores[begin:end], part.sqnorm[begin:end])
        run(part, form)
        assert same_bits(part.x, whole.x[begin:end])
        assert same_bits(part.scores, whole.scores[begin:end])
        assert same_bits(part.sqnorm, whole.sqnorm[begin:end])


@on_a_device
@pytest.mark.parametrize("dtype", RUN_DTYPES[1:], ids=str)
@pytest.mark.parametrize("residual", [False, True])
@both_forms
def test_high_scores_are_those_of_readers_that_were_not_rounded(dtype: torch.dtype, residual: bool, form: int) -> None:
    options = {"seed": 5, "steer": False, "residual": residual, "device": DEVICE}
    fast, high = (make(20, 520, 177, dtype, precision=precision, **options) for precision in ops.PRECISIONS)
    run(fast, form)
    run(high, form)
    assert CLOSER * high.lost() < fast.lost()


@on_a_device
@pytest.mark.parametrize("dtype", RUN_DTYPES, ids=str)
@both_forms
def test_bf16_scores_are_fp32_scores_rounded_once(dtype: torch.dtype, form: int) -> None:
    full, short = (make(20, 136, 177, dtype, seed=6, scores_dtype=kept, device=DEVICE) for kept in (torch.float32, torch.bfloat16))
    run(full, form)
    run(short, form)
    assert same_bits(short.scores, full.scores.to(torch.bfloat16))
    assert same_bits(short.x, full.x)


@on_a_device
def test_a_gpu_that_takes_small_numbers_as_zero_is_no_silent_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher, "architecture_of", lambda device: "gfx90a")
    with pytest.raises(ValueError, match="matrix units of gfx90a take as zero; use bfloat16"):
        run(make(6, 64, 9, torch.float16, seed=10, precision="high", device=DEVICE))


@on_a_gpu
@pytest.mark.parametrize("dtype", RUN_DTYPES, ids=str)
@both_forms
def test_runs_repeat_bit_for_bit(dtype: torch.dtype, form: int) -> None:
    first, *others = (make(3000, 2048, 171, dtype, seed=4, residual=True, device=DEVICE) for _ in range(4))
    run(first, form)
    for other in others:
        run(other, form)
        assert same_bits(first.x, other.x)
        assert same_bits(first.scores, other.scores)
        assert same_bits(first.sqnorm, other.sqnorm)


@on_a_device
@both_forms
def test_gate_opens_on_the_score_and_falls_back(form: int) -> None:
    directions = torch.eye(3, 16, device=DEVICE)
    operands = ops.Operands.build(directions, directions, torch.tensor([1.0, 0, 0]), torch.tensor([2.0, 1, 1]))
    row = ops.Row(torch.full((16,), 10.0), gate=ops.Gate(0, 1.5), otherwise=ops.Row(torch.full((16,), -10.0)))
    x = torch.zeros(4, 16, device=DEVICE)
    x[:, 0] = torch.tensor([4.0, 4.5, math.nan, -100.0])  # scores 1.5 (not above), 1.75, NaN, -50.5
    case = Case(x, operands, ops.Table.build([row], operands))
    run(case, form)
    assert (x - case.before)[:, 1].tolist() == [-10.0, 10.0, -10.0, -10.0]


@on_a_device
@both_forms
def test_row_none_means_row_zero(form: int) -> None:
    a, b = (make(20, 64, 8, torch.float32, seed=5, device=DEVICE) for _ in range(2))
    a.row, b.row = None, torch.zeros_like(b.row)
    run(a, form)
    run(b, form)
    assert same_bits(a.x, b.x)
    a.check()


@on_a_device
@both_forms
def test_nothing_to_do_is_fine(form: int) -> None:
    run(make(0, 64, 8, torch.float16, seed=6, device=DEVICE), form)
    case = make(4, 64, 8, torch.float16, seed=6, steer=False, outputs=False, device=DEVICE)
    run(case, form)
    assert same_bits(case.x, case.before)


@on_a_device
@both_forms
def test_nan_stays_in_its_token(form: int) -> None:
    case, clean = (make(30, 64, 40, torch.float32, seed=7, device=DEVICE) for _ in range(2))
    case.x[11, 5] = math.nan
    run(case, form)
    run(clean, form)
    others = torch.arange(30, device=DEVICE) != 11
    assert case.scores[11].isnan().all()
    assert same_bits(case.x[others], clean.x[others])
    assert same_bits(case.scores[others], clean.scores[others])


@on_a_device
@both_forms
def test_an_index_out_of_range_counts_as_none(form: int) -> None:
    """A GPU's indices cannot be checked without waiting for it, so the kernel must not follow a wrong one."""
    case = make(6, 64, 9, torch.float32, seed=8, gates=False, device=DEVICE)
    case.table.gate[1] = torch.tensor([0, 1000])
    case.table.gate_threshold[1] = math.inf
    case.table.rule_concept[2, 0] = 1000
    case.row.copy_(torch.tensor([0, 1000, -5, 1, 2, 3]))
    run(case, form)
    changed = (case.x != case.before).any(1).tolist()
    assert changed == [True, False, False, False, True, True]
    assert case.x.isfinite().all()


@on_a_device
def test_refuses_what_does_not_fit() -> None:
    def refuses(match: str, **changes: object) -> None:
        case = make(6, 64, 9, torch.float16, seed=10, device=DEVICE)
        for name, value in changes.items():
            setattr(case, name, value.to(DEVICE) if isinstance(value, torch.Tensor) else value)
        before = case.x.clone()
        with pytest.raises(ValueError, match=match):
            run(case)
        assert torch.equal(case.x, before)

    half = torch.float16
    refuses("float32", x=torch.zeros(6, 64))
    refuses(r"\[2, 3, 64\]", x=torch.zeros(2, 3, 64, dtype=half))
    refuses(r"directions must be \[9, 72\], got \[9, 64\]", x=torch.zeros(6, 72, dtype=half))
    refuses("contiguous, its stride is 6", x=torch.zeros(64, 6, dtype=half, device=DEVICE).T)
    refuses("overlap, their stride is 0", x=torch.zeros(1, 64, dtype=half, device=DEVICE).expand(6, 64))
    refuses(r"residual must be \[6, 64\], got \[5, 64\]", residual=torch.zeros(5, 64, dtype=half))
    refuses(r"scores must be float32 or bfloat16, got torch.float64", scores=torch.zeros(6, 9, dtype=torch.float64))
    refuses(r"scores must be \[6, 9\], got \[6, 10\]", scores=torch.zeros(6, 10))
    refuses(r"sqnorm must be \[6\], got \[7\]", sqnorm=torch.zeros(7))
    refuses("row must be torch.int32, got torch.int64", row=torch.zeros(6, dtype=torch.int64))
    refuses("without a table", table=None)
    refuses("has no rows", table=ops.Table.empty(0, 64, device=DEVICE), row=None)
    case = make(6, 64, 9, torch.float16, seed=10, device=DEVICE)
    with pytest.raises(ValueError, match="Triton has no form 3; it has 1, 2"):
        run(case, form=3)
    assert torch.equal(case.x, case.before)


@pytest.mark.parametrize(("architecture", "multiprocessors", "most"), [("sm_90", 132, 2048), ("sm_80", 108, 1664), ("gfx942", 304, 4864)])
def test_few_tokens_are_cut_into_slices(architecture: str, multiprocessors: int, most: int) -> None:
    tile = launcher.tile_for(architecture, 2)
    assert [launcher.form_for(tokens, 4096, tile, multiprocessors) for tokens in (1, most, most + 1, 16384)] == [2, 2, 1, 1]
    assert launcher.form_for(1, launcher.SLICE, tile, multiprocessors) == launcher.WHOLE


# --- the dispatcher -------------------------------------------------------------------------------------------------


def test_takes_the_ops_arguments() -> None:
    schema = torch.ops.emovec.apply_.default._schema
    parameters = inspect.signature(backend.launch).parameters
    assert list(parameters) == [argument.name for argument in schema.arguments]


@pytest.mark.skipif(INTERPRETED, reason="the interpreter's operands are not a GPU's")
def test_registers_where_the_library_has_no_kernel() -> None:
    assert backend.register() is not NATIVE
    assert backend.register() is not NATIVE
    assert torch._C._dispatch_has_kernel_for_dispatch_key("emovec::apply_", "CUDA")


@on_a_gpu
@pytest.mark.skipif(NATIVE, reason="this build has CUDA kernels, which come first")
def test_is_what_a_gpu_without_a_kernel_runs() -> None:
    case, direct = (make(30, 64, 40, torch.bfloat16, seed=7, device=DEVICE) for _ in range(2))
    case.run()
    run(direct)
    assert same_bits(case.x, direct.x)
    assert same_bits(case.scores, direct.scores)


@on_a_gpu
@both_forms
def test_replays_in_a_cuda_graph(form: int) -> None:
    case = make(40, 512, 171, torch.bfloat16, seed=9, device=DEVICE)
    run(case, form)
    expected = case.x.clone(), case.scores.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run(case, form)
    case.x.copy_(case.before)
    case.scores.fill_(math.nan)
    graph.replay()
    assert same_bits(case.x, expected[0])
    assert same_bits(case.scores, expected[1])


def test_importing_emovec_does_not_import_it() -> None:
    check = "import sys, emovec, emovec.ops; sys.exit('emovec.triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check]).returncode == 0


def test_cpu_tensors_are_refused() -> None:
    if INTERPRETED:
        pytest.skip("the interpreter runs on CPU tensors")
    directions = correlated(5, 32, torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match="x must be on a GPU, got cpu"):
        backend.apply_(torch.zeros(4, 32), ops.Operands.build(directions, directions))
