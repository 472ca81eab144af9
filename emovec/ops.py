"""The op as PyTorch sees it: its schema's fakes, the operands of one layer, the steering table, and ``apply_``.

Nothing here knows what a bank, a model or a request is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad

from emovec import reference

MAX_CONCEPTS = 1024
MAX_RULES = 16
LANES = 16  # readers are padded to a multiple of this many concepts: one zmm register, one mma tile
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PRECISIONS = ("fast", "high")  # of readers: rounded to the activations' dtype, or not
MAX_CONDITION = 1e5  # of G_S: fp32 keeps two digits of a rule there, and such directions cannot be told apart anyway

_LIBRARY = Path(__file__).parent / "libemovec.so"
try:
    torch.ops.load_library(str(_LIBRARY))  # type: ignore[no-untyped-call]
except OSError as error:
    raise ImportError(
        f"emovec's native library is missing or does not load: {_LIBRARY}; build it with `pip install .` ({error})"
    ) from error


# --- what the kernels are given -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Operands:
    """One layer's readers and directions, laid out for one device and one activation dtype.

    readers: packed by :func:`pack`; directions: [K, d] in the activations' dtype; mean, inv_std: [K] fp32.
    """

    readers: Tensor
    directions: Tensor
    mean: Tensor
    inv_std: Tensor

    @classmethod
    def build(
        cls,
        readers: Tensor,
        directions: Tensor,
        mean: Tensor | None = None,
        std: Tensor | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        precision: str = "fast",
    ) -> Operands:
        """Lay out readers and directions [K, d] for ``device`` and ``dtype`` (default: those of ``readers``).

        Without ``mean`` and ``std`` [K] a score is the raw projection. Readers and directions are rounded to ``dtype``,
        as a matrix product with activations of that dtype would round them; with ``precision="high"`` readers are not,
        which costs more (see ``docs/op.md``), while steering still adds rounded directions.
        """
        device = readers.device if device is None else torch.device(device)
        dtype = readers.dtype if dtype is None else dtype
        require(dtype in DTYPES, f"activations must be float32, bfloat16 or float16, got {dtype}")
        check_precision(precision)
        require(readers.dim() == 2, f"readers must be [K, d], got {tuple(readers.shape)}")
        require(readers.shape == directions.shape, f"readers are {tuple(readers.shape)} but directions are {tuple(directions.shape)}")
        concepts = readers.shape[0]
        require(1 <= concepts <= MAX_CONCEPTS, f"a layer holds 1 to {MAX_CONCEPTS} concepts, got {concepts}")
        mean = torch.zeros(concepts) if mean is None else mean
        std = torch.ones(concepts) if std is None else std
        require(
            mean.shape == (concepts,) and std.shape == (concepts,),
            f"mean and std must be [{concepts}], got {tuple(mean.shape)} and {tuple(std.shape)}",
        )
        require(bool((std > 0).all()), "std must be positive for every concept")
        return cls(
            readers=pack(readers.to(device, dtype)) if precision == "fast" else pack_high(readers.to(device, torch.float32), dtype),
            directions=directions.to(device, dtype).contiguous(),
            mean=mean.to(device, torch.float32).contiguous(),
            inv_std=std.to(device, torch.float64).reciprocal().float(),
        )

    def readers_unpacked(self) -> Tensor:
        """The readers [K, d] as the kernels see them, in fp32."""
        return unpack(self.readers, *self.directions.shape).float()

    def operands(self, device: torch.device, dtype: torch.dtype) -> Operands:
        # On the path of every call, so no message is made unless it is needed.
        if self.directions.device != device:
            raise ValueError(f"operands are on {self.directions.device}, x is on {device}")
        if self.directions.dtype != dtype:
            raise ValueError(f"operands are for {self.directions.dtype}, x is {dtype}")
        return self


class Layer(Protocol):
    """Anything that can lay itself out for a device and dtype: a bank's layer, or :class:`Operands` themselves."""

    def operands(self, device: torch.device, dtype: torch.dtype) -> Operands: ...


def pack(readers: Tensor) -> Tensor:
    """Lay readers [K, d] out for the kernels of their device; K is padded to a multiple of 16 with zeros.

    CPU: panels of 16 concepts, bf16 as ``[KP/16, d/2, 16, 2]`` (pairs along d, as ``vdpbf16ps`` wants them), fp16 and
    fp32 as fp32 ``[KP/16, d, 16]``. Other devices: ``[KP, d]``.
    """
    concepts, width = readers.shape
    lanes = -concepts % LANES
    if readers.device.type != "cpu":
        return pad(readers, (0, 0, 0, lanes)).contiguous()
    if readers.dtype == torch.bfloat16:
        panels = pad(readers, (0, width % 2, 0, lanes)).reshape(-1, LANES, (width + 1) // 2, 2)
    else:
        panels = pad(readers.float(), (0, 0, 0, lanes)).reshape(-1, LANES, width)
    return panels.transpose(1, 2).contiguous()


def pack_high(readers: Tensor, dtype: torch.dtype) -> Tensor:
    """The same for fp32 readers [K, d] that are not to be rounded to the activations' ``dtype``.

    CPU: fp32. Other devices, for bf16 and fp16: the two parts of :func:`split`, ``[2, KP, d]``.
    """
    if readers.device.type == "cpu" or dtype == torch.float32:
        return pack(readers)
    return torch.stack([pack(part) for part in split(readers, dtype)])


def split(readers: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """fp32 readers rounded to ``dtype``, and what that took from them, rounded to it: fp32 holds their sum."""
    rounded = readers.to(dtype)
    return rounded, (readers - rounded.float()).to(dtype)


def unpack(packed: Tensor, concepts: int, width: int) -> Tensor:
    """The readers [K, d] that :func:`pack` or :func:`pack_high` laid out."""
    if packed.device.type == "cpu":
        packed = packed.transpose(1, 2).flatten(2).flatten(0, 1)
    elif packed.dim() == 3:
        packed = packed.float().sum(0)
    return packed[:concepts, :width]


# --- the steering table -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rule:
    """Keep a concept's projection within ``[lo, hi]`` (projection units; either side may be infinite)."""

    concept: int
    lo: float
    hi: float


@dataclass(frozen=True)
class Gate:
    """Open for the tokens whose score of ``concept`` is above ``threshold`` (score units)."""

    concept: int
    threshold: float


@dataclass(frozen=True)
class Row:
    """What is done to a token: add ``delta`` [d], then hold the rules; ``otherwise`` is done while the gate is closed."""

    delta: Tensor | None = None
    rules: tuple[Rule, ...] = ()
    gate: Gate | None = None
    otherwise: Row | None = None


@dataclass(frozen=True)
class Table:
    """R rows that tokens point at, as the kernels read them. Shapes as in :func:`emovec.reference.apply_`."""

    delta: Tensor
    gate: Tensor
    gate_threshold: Tensor
    rule_concept: Tensor
    rule_bounds: Tensor
    rule_solve: Tensor

    @classmethod
    def empty(cls, rows: int, width: int, *, max_rules: int = MAX_RULES, device: torch.device | str = "cpu") -> Table:
        """A table of ``rows`` rows that change nothing, to be filled by :meth:`set_row`."""
        require(0 <= max_rules <= MAX_RULES, f"a row holds at most {MAX_RULES} rules, got {max_rules}")
        return cls(
            delta=torch.zeros(rows, width, device=device),
            gate=torch.full((rows, 2), -1, dtype=torch.int32, device=device),
            gate_threshold=torch.zeros(rows, device=device),
            rule_concept=torch.full((rows, max_rules), -1, dtype=torch.int32, device=device),
            rule_bounds=torch.zeros(rows, 3, max_rules, device=device),
            rule_solve=torch.zeros(rows, max_rules, max_rules, device=device),
        )

    @classmethod
    def build(cls, rows: Sequence[Row], operands: Operands) -> Table:
        """A table whose row ``i`` is ``rows[i]``; what they do ``otherwise`` follows after them."""
        flat, fallback = list(rows), [-1] * len(rows)
        for index, row in enumerate(rows):
            if row.otherwise is not None:
                require(row.otherwise.gate is None, "a row's `otherwise` may not have a gate of its own")
                fallback[index] = len(flat)
                flat.append(row.otherwise)
        directions = operands.directions
        max_rules = max((len(row.rules) for row in flat), default=0)
        table = cls.empty(len(flat), directions.shape[1], max_rules=max_rules, device=directions.device)
        for index, row in enumerate(flat):
            table.set_row(index, row, operands, fallback[index] if index < len(fallback) else -1)
        return table

    @property
    def rows(self) -> int:
        return self.delta.shape[0]

    def set_row(self, index: int, row: Row, operands: Operands, fallback: int = -1) -> None:
        """Write ``row`` at ``index``, in place; tokens whose gate is closed use the row ``fallback`` (-1: untouched)."""
        concepts, width = operands.directions.shape
        max_rules = self.rule_concept.shape[1]
        require(0 <= index < self.rows, f"row {index} is not in a table of {self.rows} rows")
        require(-1 <= fallback < self.rows, f"fallback row {fallback} is not in a table of {self.rows} rows")
        require(len(row.rules) <= max_rules, f"{len(row.rules)} rules do not fit a table of {max_rules} rules a row")
        for rule in row.rules:
            require(0 <= rule.concept < concepts, f"rule on concept {rule.concept} of {concepts}")
            require(rule.lo <= rule.hi, f"rule on concept {rule.concept}: lower bound {rule.lo} is above upper bound {rule.hi}")
        delta = torch.zeros(width, dtype=torch.float64) if row.delta is None else row.delta.to("cpu", torch.float64)
        require(delta.shape == (width,), f"delta must be [{width}], got {tuple(delta.shape)}")
        require(bool(delta.isfinite().all()), "delta is not finite")
        chosen = [rule.concept for rule in row.rules]
        require(len(set(chosen)) == len(chosen), f"two rules on one concept in {chosen}")
        gate = row.gate
        require(gate is None or 0 <= gate.concept < concepts, f"gate on concept {gate and gate.concept} of {concepts}")

        used = len(chosen)
        concept = torch.full((max_rules,), -1, dtype=torch.int32)
        bounds = torch.zeros(3, max_rules, dtype=torch.float64)
        solve = torch.zeros(max_rules, max_rules, dtype=torch.float64)
        if used:
            readers = operands.readers_unpacked()[chosen].to("cpu", torch.float64)
            gram = readers @ operands.directions[chosen].to("cpu", torch.float64).T
            condition = float(torch.linalg.cond(gram))
            require(
                condition < MAX_CONDITION,
                f"rules on concepts {chosen} cannot hold at once: their directions are too alike (condition {condition:.0g})",
            )
            concept[:used] = torch.tensor(chosen, dtype=torch.int32)
            bounds[0, :used] = torch.tensor([rule.lo for rule in row.rules], dtype=torch.float64)
            bounds[1, :used] = torch.tensor([rule.hi for rule in row.rules], dtype=torch.float64)
            bounds[2, :used] = readers @ delta
            solve[:used, :used] = torch.linalg.inv(gram)

        self.delta[index] = delta.to(self.delta)
        self.gate[index] = torch.tensor([-1 if gate is None else gate.concept, fallback], dtype=torch.int32)
        self.gate_threshold[index] = 0.0 if gate is None else gate.threshold
        self.rule_concept[index] = concept.to(self.rule_concept)
        self.rule_bounds[index] = bounds.to(self.rule_bounds)
        self.rule_solve[index] = solve.to(self.rule_solve)

    def tensors(self) -> tuple[Tensor, ...]:
        """The table's tensors in the order of the op's arguments."""
        return (self.delta, self.gate, self.gate_threshold, self.rule_concept, self.rule_bounds, self.rule_solve)


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
    """Score every token against every concept and steer the tokens that have a row, in one pass and in place.

    Args:
        x: activations ``[N, d]``, bf16, fp16 or fp32; rows may be strided, the last dimension may not. Changed in
            place where ``row >= 0``; other tokens are not written.
        layer: a bank's layer, or :class:`Operands`.
        table: the steering table; None reads only.
        row: ``[N]`` int32 into the table, -1 for a token to leave alone; None means row 0 for every token.
        residual: ``[N, d]`` in x's dtype for engines that keep the stream as a sum; then ``h = x + residual``.
        scores: ``[N, K]`` fp32 or bf16, filled with ``(<h, reader_k> - mean_k) / std_k`` of the stream before steering; in
            bf16 with the fp32 scores, rounded once.
        sqnorm: ``[N]`` fp32, filled with ``<h, h>`` before steering.
        form: force one form of the kernel (see ``emovec info``); 0 takes what :mod:`emovec.plan` says.

    Raises:
        ValueError or RuntimeError, naming the argument and its value; nothing has been changed then.
    """
    operands = layer.operands(x.device, x.dtype)
    steering = (None,) * 6 if table is None else table.tensors()
    _apply(x, operands.readers, operands.directions, operands.mean, operands.inv_std, residual, row, *steering, scores, sqnorm, form)


_apply = torch.ops.emovec.apply_.default  # found once


@torch.library.register_fake("emovec::apply_")  # type: ignore[untyped-decorator]
def _(x: Tensor, *args: object, **kwargs: object) -> None:
    for argument in (*args, *kwargs.values()):
        if isinstance(argument, Tensor) and argument.device != x.device:
            raise RuntimeError(f"emovec: an argument is on {argument.device}, x is on {x.device}")


@torch.library.impl("emovec::apply_", "CompositeExplicitAutograd")
def _fallback(x: Tensor, readers: Tensor, directions: Tensor, mean: Tensor, inv_std: Tensor, *args: Any) -> None:
    """GPUs without a kernel in the library get Triton's, which takes over from the first call on; other devices run the reference."""
    if x.is_cuda and find_spec("triton"):
        triton = import_module("emovec.triton")
        triton.register()
        triton.launch(x, readers, directions, mean, inv_std, *args)
        return
    reference.apply_(x, unpack(readers, *directions.shape), directions, mean, inv_std, *args[:10])


def check_precision(precision: str) -> None:
    require(precision in PRECISIONS, f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")


def require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)
