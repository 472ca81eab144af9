"""The CUDA machine code in the library, for every architecture: what it is made of, and no register spilled. Needs no GPU."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from functools import cache
from pathlib import Path

import pytest

import emovec
from emovec import _host

LIBRARY = Path(emovec.__file__).parent / "libemovec.so"
ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
SOLVER_STACK = 64  # bytes: the array of ev_solve_rules, which is indexed at run time. A spill would come on top.


def tool(name: str) -> str | None:
    """From the PATH, or as Triton brings it along."""
    triton = importlib.util.find_spec("triton")
    bundled = Path(triton.origin).parent / "backends/nvidia/bin" / name if triton and triton.origin else None
    return shutil.which(name) or (str(bundled) if bundled and bundled.exists() else None)


pytestmark = [
    pytest.mark.skipif("cuda_portable" not in _host.kernels(), reason="this build has no CUDA kernels (no nvcc when it was built)"),
    pytest.mark.skipif(tool("cuobjdump") is None, reason="no cuobjdump"),
]


@cache
def dump(*arguments: str) -> str:
    return subprocess.run([str(tool("cuobjdump")), *arguments, str(LIBRARY)], check=True, capture_output=True, text=True).stdout


@cache
def usage(architecture: str) -> dict[str, dict[str, int]]:
    """Registers, stack and so on of every kernel, by mangled name."""
    found: dict[str, dict[str, int]] = {}
    arch = name = ""
    for line in dump("--dump-resource-usage").splitlines():
        if match := re.search(r"arch = (sm_\w+)", line):
            arch = match[1]
        elif match := re.match(r"\s*Function (\S+):", line):
            name = match[1]
        elif "REG:" in line and arch == architecture:
            found[name] = {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", line)}
    return found


@pytest.mark.parametrize("architecture", ["sm_90", "sm_100"])
def test_the_decode_kernel(architecture: str) -> None:
    """No stack at all; 768 threads fit; bulk copies, tensor cores and cluster barriers are there."""
    kernels = {name: used for name, used in usage(architecture).items() if "decode" in name}
    assert len(kernels) == 2, sorted(kernels)
    for name, used in kernels.items():
        assert used["STACK"] == used["LOCAL"] == 0, (name, used)
        assert used["REG"] <= 80, (name, used)
    code = {part.split(maxsplit=1)[0]: part for part in dump("--dump-sass", "--gpu-architecture", architecture).split("Function : ")[1:]}
    for name in kernels:
        product = r"HMMA\.16816\.F32 " if "half" in name else r"HMMA\.16816\.F32\.BF16"
        for instruction in ("UBLKCP", "UCGABAR_ARV", r"LDSM\.16\.M88\.4", product):
            assert re.search(instruction, code[name]), (name, instruction)


def test_the_stream_kernel() -> None:
    """128 registers at the start, no spill; warpgroup products of the whole tile, boxes by the copy engine, registers handed over."""
    kernels = {name: used for name, used in usage("sm_90a").items() if "stream" in name}
    assert len(kernels) == 2, sorted(kernels)
    code = {part.split(maxsplit=1)[0]: part for part in dump("--dump-sass", "--gpu-architecture", "sm_90a").split("Function : ")[1:]}
    for name, used in kernels.items():
        assert used["STACK"] <= SOLVER_STACK, (name, used)
        assert used["LOCAL"] == 0, (name, used)
        assert used["REG"] == 128, (name, used)
        products = re.findall(r"HGMMA\.\S+", code[name])
        assert set(products) == {"HGMMA.64x176x16.F32" if "half" in name else "HGMMA.64x176x16.F32.BF16"}, (name, products)
        assert len(products) == 12, (name, products)  # a stage's columns: of x, and of x and residual
        for instruction in (r"UTMALDG\.2D", r"USETMAXREG\.TRY_ALLOC\.CTAPOOL", r"USETMAXREG\.DEALLOC\.CTAPOOL"):
            assert re.search(instruction, code[name]), (name, instruction)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_no_register_is_spilled(architecture: str) -> None:
    kernels = {name: used for name, used in usage(architecture).items() if "portable" in name}
    assert len(kernels) == 17, sorted(kernels)  # 8 tiles, 6 of them on slices too, and what follows slices in 3 dtypes
    for name, used in kernels.items():
        assert used["STACK"] <= SOLVER_STACK, (name, used)
        assert used["LOCAL"] == 0, (name, used)
        assert used["REG"] <= 255, (name, used)


def test_newer_gpus_have_something_to_compile() -> None:
    assert re.search(r"arch = sm_90\b", dump("--list-ptx") + dump("--dump-ptx")[:2000]) or "sm_90.ptx" in dump("--list-ptx")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_expected_instructions_are_there(architecture: str) -> None:
    """Tensor cores of every dtype, matrix loads, asynchronous copies."""
    code = dump("--dump-sass", "--gpu-architecture", architecture)
    for instruction in (
        r"HMMA\.16816\.F32\.BF16",
        r"HMMA\.16816\.F32 ",
        r"HMMA\.1688\.F32\.TF32",
        r"LDSM\.16\.M88\.4",
        r"LDGSTS\.E.*\.128",
    ):
        assert re.search(instruction, code), instruction
