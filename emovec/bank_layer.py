"""One layer of a bank: its directions and what is needed to read and steer with them."""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from emovec.ops import MAX_CONCEPTS, Operands

KINDS = ("prompt", "turn_start", "generated")
"""Kinds of position that have a baseline of their own: inside a prompt, at the start of the assistant's turn, generated."""

_FALLBACK = ("prompt", "generated", "turn_start")
_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = 80
_UNIT_TOLERANCE = 1e-4  # a hundred times what rounding a unit row to fp32 costs


class BankError(ValueError):
    """A bank, or a file that should hold one, is not what it must be."""


class UnknownConcept(ValueError):  # noqa: N818
    """A name that is not in the bank; the message lists the nearest names that are."""


def unknown(name: object, names: Sequence[str]) -> UnknownConcept:
    """The error for a ``name`` that is not among ``names``."""
    return UnknownConcept(f"unknown concept {shown(name)}; nearest known: {', '.join(nearest(name, names))}")


def nearest(name: object, names: Iterable[str], count: int = 3) -> list[str]:
    """The ``count`` of ``names`` most like ``name``, best first, whatever the case."""
    by_lower = {known.lower(): known for known in names}
    return [by_lower[match] for match in difflib.get_close_matches(str(name)[:64].lower(), by_lower, count, cutoff=0.0)]


def shown(value: object) -> str:
    """``repr(value)``, cut to a length and depth that fit an error message."""
    try:
        text = _REPR.repr(value)
    except ValueError:  # an integer of thousands of digits
        return f"a huge {type(value).__name__}"
    return text if len(text) <= 100 else f"{text[:97]}..."


@dataclass(frozen=True, eq=False)
class Baseline:
    """How ordinary text projects: ``mean`` and ``std`` [K] fp32 over ``count`` tokens at one kind of position.

    A concept whose mean and std are both NaN has no baseline.
    """

    mean: Tensor
    std: Tensor
    count: int

    def __post_init__(self) -> None:
        for name in ("mean", "std"):
            _check_tensor(name, getattr(self, name), dims=1, finite=False)
        if self.mean.shape != self.std.shape:
            raise BankError(f"mean is {tuple(self.mean.shape)} but std is {tuple(self.std.shape)}")
        missing = self.mean.isnan() & self.std.isnan()
        if not bool((self.mean.isfinite() & self.std.isfinite() | missing).all()):
            raise BankError("mean or std is not finite")
        if not bool(((self.std > 0) | missing).all()):
            raise BankError("std is not positive for every concept")
        if not _is_int(self.count) or self.count < 1:
            raise BankError(f"count must be a positive integer, got {shown(self.count)}")

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Baseline):
            return NotImplemented
        return self.count == other.count and same(self.mean, other.mean) and same(self.std, other.std)

    def subset(self, rows: Sequence[int]) -> Baseline:
        return Baseline(self.mean[list(rows)], self.std[list(rows)], self.count)


@dataclass(frozen=True, eq=False)
class BankLayer:
    """The directions of K concepts in the residual stream after one decoder block. All tensors are fp32 on the CPU.

    Attributes:
        index: the decoder block whose output this is, counted from 0.
        names: K distinct concepts.
        directions: [K, d], unit rows; steering adds these.
        readers: [K, d]; reading projects on these. None: the directions.
        raw_norm: [K], the norms the directions had before they were made unit, in activation units.
        grand_mean: [d], the mean that the directions are differences from.
        baselines: kind of position (see ``KINDS``) -> projections of ordinary text on the readers.
        residual_norm: the typical (median) norm of the stream, in activation units: the unit of steering strength.
        random_null: projections of ordinary text on R random unit directions, as a Baseline of [R].

    Raises:
        BankError: a tensor has the wrong shape, dtype or device, is not finite, or has a row that is zero or not unit.
    """

    index: int
    names: tuple[str, ...]
    directions: Tensor
    readers: Tensor | None = None
    raw_norm: Tensor | None = None
    grand_mean: Tensor | None = None
    baselines: Mapping[str, Baseline] = field(default_factory=dict)
    residual_norm: float | None = None
    random_null: Baseline | None = None
    _operands: dict[tuple[torch.device, torch.dtype, str, str], Operands] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        if not _is_int(self.index) or self.index < 0:
            raise BankError(f"layer index must be an integer from 0 on, got {shown(self.index)}")
        where = f"layers.{self.index}"
        object.__setattr__(self, "names", check_names(self.names))
        object.__setattr__(self, "baselines", dict(self.baselines))
        concepts = len(self.names)
        _check_tensor(f"{where}.directions", self.directions, dims=2)
        width = self.directions.shape[1]
        for name, value, shape in (
            ("directions", self.directions, (concepts, width)),
            ("readers", self.readers, (concepts, width)),
            ("raw_norm", self.raw_norm, (concepts,)),
            ("grand_mean", self.grand_mean, (width,)),
        ):
            if value is not None:
                _check_tensor(f"{where}.{name}", value, dims=len(shape), shape=shape)
        _check_rows(f"{where}.directions", self.directions, self.names, unit=True)
        if self.readers is not None:
            _check_rows(f"{where}.readers", self.readers, self.names, unit=False)
        if self.raw_norm is not None and not bool((self.raw_norm > 0).all()):
            raise BankError(f"{where}.raw_norm is not positive for every concept")
        for kind, baseline in self.baselines.items():
            if kind not in KINDS:
                raise BankError(f"{where}: unknown kind of position {shown(kind)}; known: {', '.join(KINDS)}")
            if baseline.mean.shape != (concepts,):
                raise BankError(f"{where}.baseline.{kind} must be [{concepts}], got {tuple(baseline.mean.shape)}")
        norm = float(self.residual_norm) if _is_int(self.residual_norm) else self.residual_norm  # type: ignore[arg-type]
        object.__setattr__(self, "residual_norm", norm)
        if norm is not None and not (isinstance(norm, float) and 0 < norm < float("inf")):
            raise BankError(f"{where}: residual_norm must be a positive number, got {shown(norm)}")

    @classmethod
    def from_directions(cls, directions: Tensor, names: Sequence[str] | None = None, index: int = 0) -> BankLayer:
        """An uncalibrated layer from any ``directions`` [K, d]; rows are made unit, their norms become ``raw_norm``.

        >>> BankLayer.from_directions(torch.eye(2, 8) * 3, names=["sarcastic", "terse"]).raw_norm
        tensor([3., 3.])
        """
        if directions.dim() != 2:
            raise BankError(f"directions must be [K, d], got {tuple(directions.shape)}")
        if names is None:
            names = [f"concept_{k}" for k in range(directions.shape[0])]
        rows = directions.detach().to("cpu", torch.float64)
        _check_rows("directions", rows, list(names)[: len(rows)], unit=False)
        norm = rows.norm(dim=1)
        return cls(index, tuple(names), (rows / norm[:, None]).float(), raw_norm=norm.float())

    @property
    def width(self) -> int:
        """d, the width of the residual stream."""
        return self.directions.shape[1]

    @property
    def calibrated(self) -> bool:
        """Whether scores are z-scores and strengths have a unit here."""
        return bool(self.baselines) and self.residual_norm is not None

    @property
    def uncalibrated(self) -> tuple[str, ...]:
        """The concepts without a baseline: their scores are raw projections."""
        if not self.baselines:
            return self.names
        missing = torch.stack([baseline.mean.isnan() for baseline in self.baselines.values()]).any(0).tolist()
        return tuple(name for name, lacks in zip(self.names, missing, strict=True) if lacks)

    def resolve(self, name: str) -> int:
        """The row of concept ``name``."""
        try:
            return self.names.index(name)
        except ValueError:
            raise unknown(name, self.names) from None

    def direction(self, name: str) -> Tensor:
        """The unit direction [d] of concept ``name``."""
        return self.directions[self.resolve(name)]

    def baseline(self, kind: str = "prompt") -> Baseline:
        """The baseline of one kind of position; if there is none, that of the first of prompt, generated, turn_start there is."""
        found = baseline_of(self.baselines, kind)
        if found is None:
            raise BankError(f"layer {self.index} is not calibrated: it has no baseline to express scores in")
        return found

    def operands(self, device: torch.device | str, dtype: torch.dtype, kind: str = "prompt", precision: str = "fast") -> Operands:
        """The layer laid out for the op, kept for the next call. Concepts without a baseline score raw projections.

        precision: "high" for readers that are not rounded to ``dtype``, as in :meth:`emovec.ops.Operands.build`.
        """
        key = (torch.device(device), dtype, kind, precision)
        found = self._operands.get(key)
        if found is None:
            baseline = self.baseline(kind) if self.baselines else None
            readers = self.directions if self.readers is None else self.readers
            mean = None if baseline is None else baseline.mean.nan_to_num(0.0)
            std = None if baseline is None else baseline.std.nan_to_num(1.0)
            found = Operands.build(readers, self.directions, mean, std, device=key[0], dtype=dtype, precision=precision)
            self._operands[key] = found
        return found

    def subset(self, names: Sequence[str]) -> BankLayer:
        """The layer with these concepts only, in this order."""
        rows = [self.resolve(name) for name in names]
        return replace(
            self,
            names=tuple(names),
            directions=self.directions[rows],
            readers=None if self.readers is None else self.readers[rows],
            raw_norm=None if self.raw_norm is None else self.raw_norm[rows],
            baselines={kind: baseline.subset(rows) for kind, baseline in self.baselines.items()},
        )

    def join(self, other: BankLayer) -> BankLayer:
        """This layer with the concepts of ``other`` after its own. What belongs to the layer is taken from self if it has it."""
        concepts = (len(self.names), len(other.names))
        if self.readers is None and other.readers is None:
            readers = None
        else:
            readers = torch.cat([layer.directions if layer.readers is None else layer.readers for layer in (self, other)])
        return BankLayer(
            index=self.index,
            names=self.names + other.names,
            directions=torch.cat([self.directions, other.directions]),
            readers=readers,
            raw_norm=None if self.raw_norm is None or other.raw_norm is None else torch.cat([self.raw_norm, other.raw_norm]),
            grand_mean=other.grand_mean if self.grand_mean is None else self.grand_mean,
            baselines=join_baselines((self.baselines, other.baselines), concepts),
            residual_norm=other.residual_norm if self.residual_norm is None else self.residual_norm,
            random_null=other.random_null if self.random_null is None else self.random_null,
        )

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, BankLayer):
            return NotImplemented
        tensors = ("directions", "readers", "raw_norm", "grand_mean")
        others = ("index", "names", "baselines", "residual_norm", "random_null")
        return all(same(getattr(self, name), getattr(other, name)) for name in tensors) and all(
            getattr(self, name) == getattr(other, name) for name in others
        )

    def __repr__(self) -> str:
        state = "calibrated" if self.calibrated else "uncalibrated"
        return f"BankLayer({self.index}: {len(self.names)} concepts, d={self.width}, {state})"


def check_names(names: Iterable[object]) -> tuple[str, ...]:
    """``names`` as a tuple, if they can name a layer's concepts."""
    checked = []
    for name in names:
        if not isinstance(name, str) or not name or name != name.strip() or len(name) > 200:
            raise BankError(f"a concept's name must be text of 1 to 200 characters without spaces around it, got {shown(name)}")
        checked.append(name)
    if not 1 <= len(checked) <= MAX_CONCEPTS:
        raise BankError(f"a layer holds 1 to {MAX_CONCEPTS} concepts, got {len(checked)}")
    if len(set(checked)) != len(checked):
        raise BankError(f"duplicate concept {next(shown(name) for name in checked if checked.count(name) > 1)}")
    return tuple(checked)


def same(a: Tensor | None, b: Tensor | None) -> bool:
    """Whether two fp32 tensors are equal bit for bit, NaN included."""
    if a is None or b is None:
        return a is b
    return torch.equal(a.view(torch.int32), b.view(torch.int32))


def baseline_of(baselines: Mapping[str, Baseline], kind: str) -> Baseline | None:
    """The one for ``kind``; if there is none, that of the first of prompt, generated, turn_start there is."""
    if kind not in KINDS:
        raise ValueError(f"unknown kind of position {shown(kind)}; known: {', '.join(KINDS)}")
    return next((baselines[candidate] for candidate in (kind, *_FALLBACK) if candidate in baselines), None)


def join_baselines(parts: Sequence[Mapping[str, Baseline]], concepts: Sequence[int]) -> dict[str, Baseline]:
    """The baselines of one part's concepts after another's, each by kind; NaN where a part, of so many concepts, has none."""
    joined = {}
    for kind in [kind for kind in KINDS if any(kind in part for part in parts)]:
        found = [baseline_of(part, kind) for part in parts]
        count = min(baseline.count for baseline in found if baseline is not None)
        empty = [Baseline(torch.full((k,), torch.nan), torch.full((k,), torch.nan), 1) for k in concepts]
        rows = [missing if baseline is None else baseline for baseline, missing in zip(found, empty, strict=True)]
        joined[kind] = Baseline(torch.cat([row.mean for row in rows]), torch.cat([row.std for row in rows]), count)
    return joined


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_tensor(name: str, value: object, *, dims: int, shape: tuple[int, ...] | None = None, finite: bool = True) -> None:
    if not isinstance(value, Tensor) or value.dtype != torch.float32 or value.device.type != "cpu":
        kind = f"{value.dtype} on {value.device}" if isinstance(value, Tensor) else type(value).__name__
        raise BankError(f"{name} must be a float32 tensor on the CPU, got {kind}")
    if value.dim() != dims or value.numel() == 0 or (shape is not None and tuple(value.shape) != shape):
        expected = "/".join("KdR"[:dims]) if shape is None else list(shape)
        raise BankError(f"{name} must be {dims}-D {expected}, got {list(value.shape)}")
    if finite and not bool(value.isfinite().all()):
        raise BankError(f"{name} is not finite")


def _check_rows(name: str, rows: Tensor, names: Sequence[str], *, unit: bool) -> None:
    norm = rows.double().norm(dim=1)
    bad = ~norm.isfinite() | (norm == 0) | (((norm - 1).abs() > _UNIT_TOLERANCE) if unit else torch.zeros_like(norm, dtype=torch.bool))
    if bool(bad.any()):
        k = int(bad.nonzero()[0])
        concept = shown(names[k]) if k < len(names) else str(k)
        problem = "is not finite" if not norm[k].isfinite() else "is zero" if norm[k] == 0 else f"is not unit (norm {float(norm[k]):.6g})"
        raise BankError(f"{name}: the row of {concept} {problem}")
