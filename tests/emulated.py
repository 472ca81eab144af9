"""The CUDA kernels' logic without a GPU: compiled as C++ and run on the emulator in tests/emulator, thread by thread."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from cases import DTYPES, Case, gpu_readers

ROOT = Path(__file__).parent.parent
SHARED = 227 * 1024  # bytes a block can have on sm_90
NO_KERNEL = -1
PORTABLE, DECODE, STREAM, SLICED = 16, 17, 18, 22  # `ev_kernel` of kernels/api.h


class _Table(ctypes.Structure):
    _names = ("delta", "gate", "gate_threshold", "rule_concept", "rule_bounds", "rule_solve")
    _fields_ = [(name, ctypes.c_void_p) for name in _names] + [("rows", ctypes.c_int64), ("rules", ctypes.c_int64)]


class _Args(ctypes.Structure):
    """``ev_args`` of kernels/api.h."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("n", "d", "k", "k_padded")),
        *((name, ctypes.c_int32) for name in ("dtype", "reader_dtype", "reader_parts", "scores_dtype")),
        ("x", ctypes.c_void_p),
        ("x_stride", ctypes.c_int64),
        ("residual", ctypes.c_void_p),
        ("residual_stride", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("readers", "directions", "mean", "inv_std", "row")),
        ("table", _Table),
        ("scores", ctypes.c_void_p),
        ("scores_stride", ctypes.c_int64),
        ("sqnorm", ctypes.c_void_p),
        ("workspace", ctypes.c_void_p),
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


@cache
def build() -> Callable[..., int]:
    """``run(case, multiprocessors=132, shared=SHARED, cluster=0, stream=0, sliced=False, eager=False)``: the portable kernel, whole or on
    slices; with ``cluster`` > 0 the decode kernel on a GPU that has clusters of that many blocks; with ``stream`` > 0 the stream kernel
    with so many blocks to a tile. ``eager``: bulk copies land at once and some warps lag, instead of the other way round. Returns 0, or
    NO_KERNEL where the kernel cannot run the call."""
    headers, compiler = cuda_headers(), shutil.which("c++")
    if headers is None or compiler is None:
        pytest.skip("no CUDA headers or no C++ compiler")
    library = Path(tempfile.mkdtemp(prefix="emovec-emulator-")) / "emulator.so"
    options = ["-std=c++17", "-O1", "-shared", "-fPIC", "-fvisibility=hidden", "-Wno-attributes", "-DEV_EMULATE"]
    includes = ["-I", ROOT / "tests/emulator", "-isystem", headers]
    sources = [
        ROOT / "tests/emulator/emulator.cpp",
        *(ROOT / "kernels/cuda" / name for name in ("portable.cu", "decode_sm90.cu", "stream_sm90a.cu")),
    ]
    subprocess.run([compiler, *options, *includes, "-x", "c++", *sources, "-o", library], check=True)
    function = ctypes.CDLL(str(library)).ev_emulated_apply
    shutil.rmtree(library.parent)  # it stays loaded

    def run(
        case: Case,
        multiprocessors: int = 132,
        shared: int = SHARED,
        cluster: int = 0,
        stream: int = 0,
        sliced: bool = False,
        eager: bool = False,
    ) -> int:
        readers, o = gpu_readers(case), case.operands
        concepts, width = o.directions.shape
        a = _Args(n=len(case.x), d=width, k=concepts, k_padded=readers.shape[-2], x_stride=case.x.stride(0), x=case.x.data_ptr())
        a.dtype = a.reader_dtype = DTYPES.index(case.x.dtype)
        a.reader_parts = len(readers) if readers.dim() == 3 else 1
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
            a.scores, a.scores_stride, a.scores_dtype = case.scores.data_ptr(), case.scores.stride(0), DTYPES.index(case.scores.dtype)
        if case.sqnorm is not None:
            a.sqnorm = case.sqnorm.data_ptr()
        kernel = STREAM + stream.bit_length() - 1 if stream else DECODE if cluster else SLICED if sliced else PORTABLE
        result = function(ctypes.byref(a), kernel, multiprocessors, shared, cluster, int(eager))
        assert result in (0, NO_KERNEL)
        return int(result)

    return run
