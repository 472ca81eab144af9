"""The op's tests on the CPU code built with AddressSanitizer and UBSan, of which the first finding ends the process."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from variants import build, passed, python

from emovec import _host

OVERRUN = """
import ctypes, torch
from emovec import ops

libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
x = torch.frombuffer((ctypes.c_float * 32).from_address(libc.malloc({floats} * 4)), dtype=torch.float32).view(1, 32)
ops.apply_(x, ops.Operands.build(torch.eye(1, 32), torch.eye(1, 32)), scores=torch.empty(1, 1))
"""

pytestmark = pytest.mark.slow


def runtime() -> str:
    """What a process must load before all else: AddressSanitizer's library, and the C++ library, whose exceptions it watches."""
    found = []
    for library in ("libasan.so", "libstdc++.so"):
        answer = subprocess.run(["c++", f"-print-file-name={library}"], capture_output=True, text=True, check=True).stdout.strip()
        if not Path(answer).is_absolute():
            pytest.skip(f"the compiler comes without {library}")
        found.append(answer)
    return " ".join(found)


def test_no_sanitizer_finds_anything(tmp_path: Path) -> None:
    """AMX is emulated even where the processor has it: no sanitizer sees its tiles, which are then ordinary memory."""
    environment = {"LD_PRELOAD": runtime(), "ASAN_OPTIONS": "detect_leaks=0"}
    settings = ["-DEMOVEC_SANITIZE=address;undefined", "-DCMAKE_CXX_FLAGS=-g1", "-DCMAKE_INTERPROCEDURAL_OPTIMIZATION=OFF"]
    if _host.runs("cpu_avx2"):
        settings.append(f"-DEMOVEC_EMULATE_{'AMX' if _host.runs('cpu_avx512_bf16') else 'AVX512'}=ON")
    build(tmp_path, *settings)
    for floats in (32, 31):  # a finding is one: the same call on a row that is long enough, and on one that is not
        run = python(tmp_path, "-c", OVERRUN.format(floats=floats), **environment)
        assert (run.returncode == 0) == (floats == 32), run.stderr[-3000:]
        assert ("AddressSanitizer" in run.stderr) == (floats < 32)
    # torch's compiler would run the C++ compiler under the sanitizer too
    assert passed(tmp_path, "not compiles and not opcheck", **environment) > 200
