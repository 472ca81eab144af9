"""The Triton kernels compiled, without a GPU, for the architectures it has tiles for: what it spills, shares and computes with."""

from __future__ import annotations

import math
import re
import subprocess
from pathlib import Path

import pytest
import torch
from cases import DTYPES

triton = pytest.importorskip("triton")


from emovec.triton import apply as launcher  # noqa: E402
from emovec.triton.kernel import apply_kernel  # noqa: E402
from emovec.triton.sliced import finish_kernel  # noqa: E402

# Architecture, warp, bytes of shared memory a block may have, and the instruction that must do the work.
TARGETS = {
    "sm_80": (32, 163 << 10, "mma.sync"),
    "sm_90": (32, 227 << 10, "wgmma.mma_async"),
    "sm_100": (32, 227 << 10, "tcgen05.mma"),
    "gfx942": (64, 64 << 10, "v_mfma"),
    "gfx1100": (32, 64 << 10, ""),
}
NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
STEERING = {"row_ptr": "i32", "delta_ptr": "fp32", "gate_ptr": "i32", "threshold_ptr": "fp32"}
RULES = {"concept_ptr": "i32", "bounds_ptr": "fp32", "solve_ptr": "fp32"}
OUTPUTS = {"scores_ptr": "fp32", "sqnorm_ptr": "fp32"}


def pointers_of(dtype: torch.dtype, mode: str, scores: str = "fp32") -> dict[str, str]:
    """The types of the tensors that a call of ``mode`` gives, by argument."""
    name = NAMES[dtype]
    given = {"x_ptr": name, "readers_ptr": name, "directions_ptr": name, "mean_ptr": "fp32", "inv_std_ptr": "fp32"}
    given |= {"scores_ptr": scores, "sqnorm_ptr": "fp32"}
    return given | (STEERING | RULES if mode != "read" else {})


def compiled_for(architecture: str, kernel: object, pointers: dict[str, str], chosen: dict[str, object]) -> object:
    """A kernel as the launcher would have it compiled for aligned, contiguous tensors."""
    signature, constants, attributes = {}, {}, {}
    for index, argument in enumerate(kernel.arg_names):
        if argument in pointers:
            signature[argument] = "*" + pointers[argument]
            attributes[(index,)] = [["tt.divisibility", 16]]
        elif argument in chosen or argument.endswith("_ptr"):
            signature[argument] = "constexpr"
            constants[argument] = chosen.get(argument)
        else:
            signature[argument] = "i32"
    kind, number = ("cuda", int(architecture[3:])) if architecture.startswith("sm_") else ("hip", architecture)
    return triton.compile(
        triton.compiler.ASTSource(kernel, signature, constants, attributes),
        target=triton.backends.compiler.GPUTarget(kind, number, TARGETS[architecture][0]),
        options={option: chosen[option] for option in ("num_warps", "num_stages") if option in chosen},
    )


def compiled(architecture: str, dtype: torch.dtype, mode: str, width: int = 4096, concepts: int = 171, high: bool = False) -> object:
    """The kernel of the whole form; scores with high readers are in bf16."""
    chosen = launcher.constants(architecture, dtype, width, concepts, 16 if mode == "rules" else 0, math.gcd(width, 16), high)
    return compiled_for(architecture, apply_kernel, pointers_of(dtype, mode, "bf16" if high else "fp32"), chosen)


def sliced(architecture: str, dtype: torch.dtype, mode: str, high: bool, width: int = 4096, concepts: int = 171) -> tuple[object, object]:
    """The two kernels of the sliced form. Where there are no outputs ("rules_only"), the first looks at the table."""
    rules, unit = 16 if mode.startswith("rules") else 0, math.gcd(width, 16)
    outputs = mode != "rules_only"
    given = pointers_of(dtype, mode)
    left_out = {"mean_ptr", "inv_std_ptr"} | (set(STEERING | RULES) if outputs else {"sqnorm_ptr"})
    first = {argument: kind for argument, kind in given.items() if argument not in left_out}
    second = {argument: kind for argument, kind in given.items() if outputs or argument not in OUTPUTS} | {"parts_ptr": "fp32"}
    if outputs:
        second["squares_ptr"] = "fp32"
    chosen = launcher.constants(architecture, dtype, width, concepts, 0 if outputs else rules, unit, high, sliced=True)
    return (
        compiled_for(architecture, apply_kernel, first, chosen),
        compiled_for(architecture, finish_kernel, second, launcher.finish_constants(width, concepts, rules, unit)),
    )


def compiles(architecture: str, dtype: torch.dtype, mode: str, tmp_path: Path, high: bool = False) -> None:
    holds(architecture, compiled(architecture, dtype, mode, high=high), TARGETS[architecture][2], tmp_path)


def compiles_sliced(architecture: str, dtype: torch.dtype, mode: str, tmp_path: Path, high: bool = False) -> None:
    """So few tokens are multiplied by the older instruction on every NVIDIA GPU."""
    first, second = sliced(architecture, dtype, mode, high)
    holds(architecture, first, "mma.sync" if architecture.startswith("sm_") else TARGETS[architecture][2], tmp_path)
    holds(architecture, second, "", tmp_path)


def holds(architecture: str, kernel: object, instruction: str, tmp_path: Path) -> None:
    assert kernel.metadata.shared <= TARGETS[architecture][1]
    if architecture.startswith("sm_"):
        assert instruction in kernel.asm["ptx"]
        binary = tmp_path / "kernel.cubin"
        binary.write_bytes(kernel.asm["cubin"])
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        usage = subprocess.run([tool, "-res-usage", binary], capture_output=True, text=True, check=True).stdout
        found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
        assert found is not None, usage
        registers, stack, local = map(int, found.groups())
        assert 8 < registers <= 255
        assert (stack, local) == (0, 0), f"spills {stack} bytes"
    else:
        assembly = kernel.asm["amdgcn"]
        assert instruction in assembly
        assert re.findall(r"\.([sv]gpr_spill_count): +(\d+)", assembly) == [("sgpr_spill_count", "0"), ("vgpr_spill_count", "0")]


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
def test_compiles_without_spills(architecture: str, tmp_path: Path) -> None:
    compiles(architecture, torch.bfloat16, "rules", tmp_path)
    compiles_sliced(architecture, torch.bfloat16, "rules", tmp_path)


def test_compiles_in_high_precision(tmp_path: Path) -> None:
    compiles("sm_90", torch.bfloat16, "rules", tmp_path, high=True)
    rounding = compiled("sm_90", torch.bfloat16, "read", high=True).asm["ptx"]
    assert re.search(r"cvt\.rn\.bf16", rounding), "scores are rounded to the nearest"


@pytest.mark.slow
@pytest.mark.parametrize("architecture", TARGETS)
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("mode", ["read", "add", "rules"])
def test_every_tile_compiles_in_high_precision(architecture: str, dtype: torch.dtype, mode: str, tmp_path: Path) -> None:
    compiles(architecture, dtype, mode, tmp_path, high=True)


@pytest.mark.slow
@pytest.mark.parametrize("high", [False, True], ids=["fast", "high"])
@pytest.mark.parametrize("architecture", TARGETS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", ["read", "add", "rules", "rules_only"])
def test_every_slice_compiles_without_spills(architecture: str, dtype: torch.dtype, mode: str, high: bool, tmp_path: Path) -> None:
    if high and dtype == torch.float32:
        pytest.skip("fp32 readers are never in two parts")
    compiles_sliced(architecture, dtype, mode, tmp_path, high)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", TARGETS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", ["read", "add", "rules"])
def test_every_tile_compiles_without_spills(architecture: str, dtype: torch.dtype, mode: str, tmp_path: Path) -> None:
    compiles(architecture, dtype, mode, tmp_path)


@pytest.mark.parametrize(
    ("architecture", "family"), [("sm_86", "sm_8"), ("sm_90", "sm_9"), ("sm_103", "sm_10"), ("sm_120", "sm_8"), ("gfx90a", "gfx9")]
)
def test_every_architecture_has_a_tile(architecture: str, family: str) -> None:
    for itemsize in (2, 4):
        assert launcher.tile_for(architecture, itemsize) == launcher.TILES[family][itemsize]


@pytest.mark.parametrize("concepts", [1, 15, 16, 17, 64, 100, 128, 129, 171, 192, 193, 1024])
def test_concepts_are_taken_in_powers_of_two(concepts: int) -> None:
    chosen = launcher.constants("sm_90", torch.bfloat16, 4096, concepts, 0, 16)
    first, second = chosen["K0"], chosen["K1"]
    assert {first, second} <= {16, 32, 64, 128}
    passes = -(-concepts // (first + second))
    assert passes == -(-concepts // 192)
