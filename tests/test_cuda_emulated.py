"""The portable CUDA kernel's logic without a GPU: compiled as C++ and run on the emulator in tests/emulator, thread by thread."""

from __future__ import annotations

import ctypes
import math
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from cases import DTYPES, Case, make, same_bits

ROOT = Path(__file__).parent.parent
MULTIPROCESSORS = {"small tiles": 132, "large tiles": 1}  # few of them make a call of 100 tokens take the largest tile
SHARED = 227 * 1024


class _Table(ctypes.Structure):
    _names = ("delta", "gate", "gate_threshold", "rule_concept", "rule_bounds", "rule_solve")
    _fields_ = [(name, ctypes.c_void_p) for name in _names] + [("rows", ctypes.c_int64), ("rules", ctypes.c_int64)]


class _Args(ctypes.Structure):
    """``ev_args`` of kernels/api.h."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("n", "d", "k", "k_padded")),
        *((name, ctypes.c_int32) for name in ("dtype", "reader_dtype")),
        ("x", ctypes.c_void_p),
        ("x_stride", ctypes.c_int64),
        ("residual", ctypes.c_void_p),
        ("residual_stride", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("readers", "directions", "mean", "inv_std", "row")),
        ("table", _Table),
        ("scores", ctypes.c_void_p),
        ("scores_stride", ctypes.c_int64),
        ("sqnorm", ctypes.c_void_p),
    ]


def cuda_headers() -> Path | None:
    """The toolkit's headers, which plain C++ can read: nvcc says where they are."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        return None
    dry_run = subprocess.run([nvcc, "--dryrun", "-x", "cu", "/dev/null"], capture_output=True, text=True).stderr
    for word in dry_run.replace('"', " ").split():
        if word.startswith("-I") and (Path(word[2:]) / "cuda_runtime.h").exists():
            return Path(word[2:])
    return None


@pytest.fixture(scope="module")
def emulate(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., None]:
    headers, compiler = cuda_headers(), shutil.which("c++")
    if headers is None or compiler is None:
        pytest.skip("no CUDA headers or no C++ compiler")
    library = tmp_path_factory.mktemp("emulator") / "emulator.so"
    options = ["-std=c++17", "-O1", "-shared", "-fPIC", "-fvisibility=hidden", "-Wno-attributes"]
    includes = ["-I", ROOT / "tests/emulator", "-isystem", headers]
    subprocess.run([compiler, *options, *includes, ROOT / "tests/emulator/emulator.cpp", "-o", library], check=True)
    function = ctypes.CDLL(str(library)).ev_emulated_apply

    def run(case: Case, multiprocessors: int = 132, shared: int = SHARED) -> None:
        o = case.operands
        concepts, width = o.directions.shape
        readers = torch.zeros(concepts + -concepts % 16, width, dtype=case.x.dtype)  # as they are packed for a GPU
        readers[:concepts] = o.readers_unpacked().to(case.x.dtype)
        a = _Args(n=len(case.x), d=width, k=concepts, k_padded=len(readers), x_stride=case.x.stride(0), x=case.x.data_ptr())
        a.dtype = a.reader_dtype = DTYPES.index(case.x.dtype)
        a.readers, a.directions = readers.data_ptr(), o.directions.data_ptr()
        a.mean, a.inv_std = o.mean.data_ptr(), o.inv_std.data_ptr()
        if case.residual is not None:
            a.residual, a.residual_stride = case.residual.data_ptr(), case.residual.stride(0)
        if case.row is not None:
            a.row = case.row.data_ptr()
        if case.table is not None:
            for name, tensor in zip(_Table._names, case.table.tensors(), strict=True):
                setattr(a.table, name, tensor.data_ptr())
            a.table.rows, a.table.rules = case.table.rule_concept.shape
        if case.scores is not None:
            a.scores, a.scores_stride = case.scores.data_ptr(), case.scores.stride(0)
        if case.sqnorm is not None:
            a.sqnorm = case.sqnorm.data_ptr()
        assert function(ctypes.byref(a), multiprocessors, shared) == 0

    return run


MODES = {
    "read": {"steer": False},
    "add": {"rules": 0, "gates": False},
    "rules": {"gates": False},
    "gated": {"residual": True},
    "strided": {"strided": True, "own_readers": True},
    "steer_only": {"outputs": False},
    "add_only": {"rules": 0, "gates": False, "outputs": False},
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 64, 1), (9, 200, 171), (47, 136, 177)], ids=lambda s: "x".join(map(str, s)))
@pytest.mark.parametrize("mode", MODES)
def test_agrees_with_the_reference(emulate: Callable[..., None], dtype: torch.dtype, shape: tuple[int, int, int], mode: str) -> None:
    for multiprocessors in MULTIPROCESSORS.values():
        case = make(*shape, dtype, seed=1, **MODES[mode])
        emulate(case, multiprocessors)
        case.check()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_token_does_not_depend_on_the_tile(emulate: Callable[..., None], dtype: torch.dtype) -> None:
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
def test_misaligned_rows(emulate: Callable[..., None], dtype: torch.dtype, mode: str) -> None:
    case = make(37, 72, 171, dtype, seed=2, **MODES[mode])
    storage = torch.randn(37 * 75 + 1).to(dtype)
    view = storage[1:].view(37, 75)[:, :72].copy_(case.x)
    case = Case(view, case.operands, case.table, case.row, case.residual, case.scores, case.sqnorm)
    emulate(case, 1)
    case.check()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_thousand_concepts_and_little_shared_memory(emulate: Callable[..., None], dtype: torch.dtype) -> None:
    case = make(20, 96, 1024, dtype, seed=1, rules=16)
    emulate(case)
    case.check()
    case = make(140, 96, 171, dtype, seed=1, residual=True)
    emulate(case, 1, 99 * 1024)
    case.check()


def test_indices_out_of_range_leave_the_token_alone(emulate: Callable[..., None]) -> None:
    case = make(20, 64, 9, torch.bfloat16, seed=5)
    case.row[:3] = torch.tensor([99, -7, 2**31 - 1], dtype=torch.int32)
    case.table.gate[:, 1] = 1000
    emulate(case)
    case.row[:3] = -1
    case.table.gate[:, 1] = -1
    case.check()


def test_one_output_alone(emulate: Callable[..., None]) -> None:
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
