"""Launches the Triton kernels: argument checks as in csrc/ops.cpp, tile sizes, and its place in torch's dispatcher."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cache
from math import gcd

import torch
from torch import Tensor

import triton
from emovec.ops import DTYPES, LANES, MAX_CONCEPTS, MAX_RULES, Layer, Table

from .kernel import apply_kernel
from .sliced import finish_kernel

INTERPRETED = triton.knobs.runtime.interpret  # TRITON_INTERPRET=1: the kernel runs on CPU tensors, for tests
WHOLE, SLICED = 1, 2  # the forms; 0 takes the one that suits the call
SLICE = 256  # columns of a slice
OFFSETS = 2**31  # the kernel's offsets inside a tile, the bank and a row of the table are 32 bits wide


# --- tile sizes ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tile:
    """What one program does at a time: ``tokens`` rows of x and ``columns`` of d, in a pipeline of ``stages``."""

    tokens: int
    columns: int
    warps: int
    stages: int


# By the start of an architecture's name, then bytes of an element of x. As many tokens as fit the registers, because every
# tile reads the whole bank; tests/test_triton.py compiles each and holds it to no spills.
TILES = {
    "sm_8": {2: Tile(128, 32, 8, 4), 4: Tile(128, 16, 8, 4)},
    "sm_9": {2: Tile(128, 64, 8, 4), 4: Tile(64, 32, 8, 3)},
    "sm_10": {2: Tile(64, 64, 8, 4), 4: Tile(64, 32, 8, 3)},
    "gfx9": {2: Tile(128, 64, 8, 2), 4: Tile(128, 32, 8, 2)},
    "gfx1": {2: Tile(64, 32, 8, 2), 4: Tile(32, 32, 8, 2)},
    "interpreter": {2: Tile(32, 64, 1, 1), 4: Tile(32, 64, 1, 1)},
}
# Where readers come in two parts: a stage holds twice as many of them.
HIGH_TILES = {
    "sm_8": Tile(128, 16, 8, 4),
    "sm_9": Tile(128, 64, 8, 3),
    "sm_10": Tile(64, 64, 8, 3),
    "gfx9": Tile(128, 32, 8, 2),
    "gfx1": Tile(64, 32, 8, 2),
    "interpreter": Tile(32, 64, 1, 1),
}
# Of a slice: as few tokens as a product takes, and a pipeline that holds a whole slice of the readers where there is room for it.
SLICED_TILES = {
    "sm_8": Tile(16, 64, 4, 4),
    "gfx9": Tile(16, 64, 4, 2),
    "gfx1": Tile(16, 32, 8, 2),
    "interpreter": Tile(16, 64, 1, 1),
}


def family_of(architecture: str, known: Iterable[str]) -> str:
    """The one of ``known`` that ``architecture`` ("sm_86", "gfx942", "interpreter") begins with; sm_80's for others."""
    return next((name for name in known if architecture.startswith(name)), "sm_8")


def tile_for(architecture: str, itemsize: int, high: bool = False, sliced: bool = False) -> Tile:
    """The tile for ``architecture`` and an element of ``itemsize`` bytes.

    high: readers come in two parts, as they never do beside fp32.
    """
    if sliced:
        tile = SLICED_TILES[family_of(architecture, SLICED_TILES)]
        return replace(tile, columns=tile.columns * 2 // itemsize // (2 if high else 1))
    family = family_of(architecture, TILES)
    return HIGH_TILES[family] if high else TILES[family][itemsize]


def form_for(tokens: int, width: int, tile: Tile, multiprocessors: int) -> int:
    """SLICED where there are slices, and too few of the whole form's tiles for the GPU.

    A slice's tile is smaller, so a token costs as many times the readers' traffic as the whole form's tile is larger; idle multiprocessors
    are worth that.
    """
    tiles = -(-tokens // tile.tokens)
    return SLICED if width > SLICE and tiles * (tile.tokens // 16) <= multiprocessors else WHOLE


@cache
def constants(
    architecture: str, dtype: torch.dtype, width: int, concepts: int, rules: int, unit: int, high: bool = False, sliced: bool = False
) -> dict[str, int | str]:
    """What the kernel is compiled with: its constants by name, and Triton's ``num_warps`` and ``num_stages``."""
    tile = tile_for(architecture, dtype.itemsize, high, sliced)
    first = min(128, max(16, 1 << concepts.bit_length() - 1))
    return {
        **_common(width, concepts, rules, unit),
        # NVIDIA multiplies fp32 on tensor cores as TF32 only; three such products have fp32's precision.
        "PRECISION": "tf32x3" if dtype == torch.float32 and architecture.startswith("sm_") else "ieee",
        "ASYNC": architecture.startswith(("sm_9", "sm_10")) and not sliced,
        "HIGH": high,
        "SLICE": SLICE if sliced else 0,
        "BM": tile.tokens,
        "BD": tile.columns,
        "K0": first,
        "K1": min(64, max(16, triton.next_power_of_2(concepts - first))),
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }


@cache
def finish_constants(width: int, concepts: int, rules: int, unit: int) -> dict[str, int]:
    """The same of the kernel that completes a sliced call."""
    return {
        **_common(width, concepts, rules, unit),
        "SLICES": -(-width // SLICE),
        "BD": min(1024, triton.next_power_of_2(width)),
        "BK": min(256, triton.next_power_of_2(concepts)),
        "num_warps": 4,
    }


def _common(width: int, concepts: int, rules: int, unit: int) -> dict[str, int]:
    return {
        "WIDTH": width,
        "CONCEPTS": concepts,
        "RULES": rules,
        "SLOTS": triton.next_power_of_2(max(rules, 1)),
        "UNIT": unit,
    }


@cache
def architecture_of(device: torch.device) -> str:
    """The name of a GPU's architecture, as ``tile_for`` takes it."""
    if device.type == "cpu":
        return "interpreter"
    if torch.version.hip:
        return str(torch.cuda.get_device_properties(device).gcnArchName).split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


@cache
def multiprocessors_of(device: torch.device) -> int:
    return 1 if device.type == "cpu" else int(torch.cuda.get_device_properties(device).multi_processor_count)


# --- the op -------------------------------------------------------------------------------------------------------


def apply_(
    x: Tensor,
    layer: Layer,
    table: Table | None = None,
    row: Tensor | None = None,
    residual: Tensor | None = None,
    scores: Tensor | None = None,
    sqnorm: Tensor | None = None,
    *,
    form: int = 0,
) -> None:
    """As :func:`emovec.ops.apply_`, always by Triton. form: 1 is one kernel, 2 the two kernels for few tokens, 0 what suits the call."""
    o = layer.operands(x.device, x.dtype)
    steering = {} if table is None else vars(table)
    launch(x, o.readers, o.directions, o.mean, o.inv_std, residual, row, scores=scores, sqnorm=sqnorm, form=form, **steering)


def launch(
    x: Tensor,
    readers: Tensor,
    directions: Tensor,
    mean: Tensor,
    inv_std: Tensor,
    residual: Tensor | None = None,
    row: Tensor | None = None,
    delta: Tensor | None = None,
    gate: Tensor | None = None,
    gate_threshold: Tensor | None = None,
    rule_concept: Tensor | None = None,
    rule_bounds: Tensor | None = None,
    rule_solve: Tensor | None = None,
    scores: Tensor | None = None,
    sqnorm: Tensor | None = None,
    form: int = 0,
) -> None:
    """``torch.ops.emovec.apply_`` with readers packed for a GPU (``[KP, d]``, or ``[2, KP, d]``). Does not synchronise.

    Allocates nothing but, for few tokens, a workspace of ``ceil(d / 256) * N * (K + 1)`` floats, by torch. The first call of
    each combination of d, K, M, dtype and given arguments compiles; make it before a graph is captured.

    Raises:
        ValueError, naming the argument and its value; nothing has been changed then.
    """
    _require(form in (0, WHOLE, SLICED), f"Triton has no form {form}; it has {WHOLE}, {SLICED}, and 0 for one of them")
    _require(x.is_cuda or (INTERPRETED and x.device.type == "cpu"), f"x must be on a GPU, got {x.device}")
    _require(x.dtype in DTYPES, f"x must be float32, bfloat16 or float16, got {x.dtype}")
    _require(x.dim() == 2, f"x must be [N, d], got {list(x.shape)}")
    _require(directions.dim() == 2, f"directions must be [K, d], got {list(directions.shape)}")
    tokens, width = x.shape
    concepts = directions.shape[0]
    _require(1 <= concepts <= MAX_CONCEPTS, f"a layer holds 1 to {MAX_CONCEPTS} concepts, got {concepts}")
    _check(x, "directions", directions, x.dtype, concepts, width)
    high = readers.dim() == 3 and x.dtype != torch.float32
    _check(x, "readers", readers, x.dtype, *([2] if high else []), concepts + -concepts % LANES, width)
    _check(x, "mean", mean, torch.float32, concepts)
    _check(x, "inv_std", inv_std, torch.float32, concepts)
    _require(concepts * width < OFFSETS, f"d = {width} is too wide for {concepts} concepts")
    architecture = architecture_of(x.device)
    small = high and x.dtype == torch.float16 and architecture == "gfx90a"
    _require(not small, 'precision="high" in float16 needs numbers that the matrix units of gfx90a take as zero; use bfloat16')
    tile = tile_for(architecture, x.itemsize, high)  # also bounds what the smaller tiles of slices reach
    x_stride = _pitch("x", x, tile)
    _require(x_stride >= width, f"the rows of x overlap, their stride is {x_stride} for d = {width}")
    residual_stride = scores_stride = 0
    if residual is not None:
        _check(x, "residual", residual, x.dtype, tokens, width, contiguous=False)
        residual_stride = _pitch("residual", residual, tile)
    if scores is not None:
        _require(scores.dtype in (torch.float32, torch.bfloat16), f"scores must be float32 or bfloat16, got {scores.dtype}")
        _check(x, "scores", scores, scores.dtype, tokens, concepts, contiguous=False)
        scores_stride = _pitch("scores", scores, tile)
    if sqnorm is not None:
        _check(x, "sqnorm", sqnorm, torch.float32, tokens)
    if row is not None:
        _require(delta is not None, "`row` was given without a table")
        _check(x, "row", row, torch.int32, tokens)
    rows = rules = 0
    if delta is not None:
        rows, rules = _check_table(x, delta, gate, gate_threshold, rule_concept, rule_bounds, rule_solve)
        _require(row is not None or rows > 0 or tokens == 0, "without `row` every token uses row 0, but the table has no rows")
    if tokens == 0 or (delta is None and scores is None and sqnorm is None):
        return

    unit = gcd(x_stride, residual_stride, 16)
    form = form or form_for(tokens, width, tile, multiprocessors_of(x.device))
    outputs = scores is not None or sqnorm is not None
    steers_first = form == WHOLE or not outputs  # or else the first of two kernels does not look at the table
    compiled = constants(architecture, x.dtype, width, concepts, rules if steers_first else 0, unit, high, form == SLICED)
    grid: tuple[int, ...] = (-(-tokens // int(compiled["BM"])),)
    steering = (row, delta, gate, gate_threshold, rule_concept, rule_bounds, rule_solve)
    strides = (x_stride // unit, residual_stride // unit)
    on_device = nullcontext() if x.device.type == "cpu" else torch.cuda.device(x.device)
    with on_device:
        if form == WHOLE:
            apply_kernel[grid](
                x, residual, readers, directions, mean, inv_std, *steering, scores, sqnorm,
                tokens, rows, *strides, scores_stride, **compiled,
            )  # fmt: skip
            return
        finishing = finish_constants(width, concepts, rules, unit)
        slices = finishing["SLICES"]
        parts = x.new_empty(slices, tokens, concepts, dtype=torch.float32)
        squares = None if sqnorm is None else x.new_empty(slices, tokens, dtype=torch.float32)
        apply_kernel[(*grid, slices)](
            x, residual, readers, directions, None, None, *(steering if steers_first else (None,) * 7), parts, squares,
            tokens, rows, *strides, concepts, **compiled,
        )  # fmt: skip
        finish_kernel[(tokens, 1 if delta is None else -(-width // finishing["BD"]))](
            x, directions, mean, inv_std, *steering, scores, sqnorm, parts, squares, tokens, rows, strides[0], scores_stride, **finishing
        )


# --- checks -------------------------------------------------------------------------------------------------------


def _check_table(
    x: Tensor,
    delta: Tensor,
    gate: Tensor | None,
    gate_threshold: Tensor | None,
    rule_concept: Tensor | None,
    rule_bounds: Tensor | None,
    rule_solve: Tensor | None,
) -> tuple[int, int]:
    """R and M of a table that fits together. Indices are not read: the kernel takes one out of range as -1."""
    if gate is None or gate_threshold is None or rule_concept is None or rule_bounds is None or rule_solve is None:
        raise ValueError("emovec: the table's six tensors come together; some are missing")
    shapes = f"{list(delta.shape)} and {list(rule_concept.shape)}"
    _require(delta.dim() == 2 and rule_concept.dim() == 2, f"delta must be [R, d] and rule_concept [R, M], got {shapes}")
    rows, rules = rule_concept.shape
    _require(rules <= MAX_RULES, f"at most {MAX_RULES} rules a row, got {rules}")
    _check(x, "delta", delta, torch.float32, rows, x.shape[1])
    _check(x, "gate", gate, torch.int32, rows, 2)
    _check(x, "gate_threshold", gate_threshold, torch.float32, rows)
    _check(x, "rule_concept", rule_concept, torch.int32, rows, rules)
    _check(x, "rule_bounds", rule_bounds, torch.float32, rows, 3, rules)
    _check(x, "rule_solve", rule_solve, torch.float32, rows, rules, rules)
    return rows, rules


def _check(x: Tensor, name: str, tensor: Tensor, dtype: torch.dtype, *shape: int, contiguous: bool = True) -> None:
    if tensor.device != x.device:
        raise ValueError(f"emovec: {name} is on {tensor.device}, x is on {x.device}")
    if tensor.dtype != dtype:
        raise ValueError(f"emovec: {name} must be {dtype}, got {tensor.dtype}")
    if tensor.shape != shape:
        raise ValueError(f"emovec: {name} must be {list(shape)}, got {list(tensor.shape)}")
    if contiguous and not tensor.is_contiguous():
        raise ValueError(f"emovec: {name} must be contiguous, its strides are {tensor.stride()}")


def _pitch(name: str, tensor: Tensor, tile: Tile) -> int:
    """Elements from one row of ``tensor`` to the next."""
    tokens, width = tensor.shape
    if width > 1 and tensor.stride(1) != 1:
        raise ValueError(f"emovec: the last dimension of {name} must be contiguous, its stride is {tensor.stride(1)}")
    pitch = tensor.stride(0) if tokens > 1 else width
    if tile.tokens * pitch >= OFFSETS:
        raise ValueError(f"emovec: the rows of {name} are {pitch} elements apart, more than {OFFSETS // tile.tokens}")
    return pitch


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(f"emovec: {message}")


# --- torch's dispatcher ---------------------------------------------------------------------------------------------

_library: torch.library.Library | None = None  # kept: its end would take the kernel away


def register() -> bool:
    """Make this the kernel of ``emovec.apply_`` on GPUs, and say whether it is.

    It is not where the native library has a kernel for them, which stays. Called by itself at the first such call.
    """
    global _library
    if _library is None and not torch._C._dispatch_has_kernel_for_dispatch_key("emovec::apply_", "CUDA"):
        _library = torch.library.Library("emovec", "IMPL")  # type: ignore[no-untyped-call]
        _library.impl("apply_", launch, "CUDA")  # type: ignore[no-untyped-call]
    return _library is not None
