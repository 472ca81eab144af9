"""What a comparison of two models found."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from emovec.bank_layer import shown, unknown
from emovec.comparison.alarm import AXES, Alarm
from emovec.comparison.shifts import Design, Shift, axes, shifts
from emovec.extraction.corpus import shipped


class Comparison:
    """How far each concept is higher in model B than in model A, on the same prompts.

    Args:
        names: K concepts.
        families: family -> its concepts.
        a, b: [n, K] fp64, the scores of each model, a row for each prompt.
        prompts: n texts.
        challenging: for each whether it is a challenging one.
        random: [R], the shifts of random directions in units of their own spread; None: not read.
        facts: how it was made, as JSON.
        resamples, confidence, seed: of the intervals and nulls.

    Attributes:
        shifts: concept -> its shift.
        families: family -> the shift of its members' mean.
        axes: "valence" and "arousal" -> slopes of the concepts' shifts on our ratings of the words, fitted together by
            least squares: z-scores for each point of the scale from 1 to 9. Empty where too few concepts are rated.
        explained: the share of the variance between the concepts' shifts that the two explain; None likewise.
    """

    def __init__(
        self,
        names: Sequence[str],
        families: Mapping[str, Sequence[str]],
        a: Tensor,
        b: Tensor,
        prompts: Sequence[str],
        challenging: Sequence[bool],
        *,
        random: Tensor | None = None,
        facts: Mapping[str, Any] | None = None,
        resamples: int = 2000,
        confidence: float = 0.95,
        seed: int = 0,
    ) -> None:
        self.names, self.prompts, self.challenging = tuple(names), tuple(prompts), tuple(challenging)
        for who, scores in (("a", a), ("b", b)):
            if tuple(scores.shape) != (len(prompts), len(names)) or not bool(scores.isfinite().all()):
                raise ValueError(f"{who} must be finite and [{len(prompts)}, {len(names)}], got {list(scores.shape)}")
        self.a, self.b, self.random, self.facts = a.double(), b.double(), random, dict(facts or {})
        self.confidence, self.resamples, self.seed = confidence, resamples, seed
        # what is drawn must not depend on the order in which the prompts were given
        order = sorted(range(len(prompts)), key=lambda row: (challenging[row], prompts[row]))
        differences = (self.b - self.a)[order]
        self._design = Design(torch.tensor(challenging)[order], resamples, confidence, seed)
        index = {name: row for row, name in enumerate(names)}
        self.members = {family: tuple(name for name in members if name in index) for family, members in families.items()}
        self.members = {family: members for family, members in self.members.items() if members}
        self.shifts: dict[str, Shift] = shifts(self.names, differences, self._design, random)
        means = [differences[:, [index[name] for name in members]].mean(1) for members in self.members.values()]
        self.families: dict[str, Shift] = shifts(list(self.members), torch.stack(means, 1), self._design) if means else {}
        self.axes: dict[str, Shift] = {}
        self.explained: float | None = None
        rated = [(index[word], *values) for word, values in ratings().items() if word in index]
        rows = torch.tensor([row for row, _, _ in rated], dtype=torch.long)
        valence, arousal = (torch.tensor([values[which] for values in rated], dtype=torch.float64) for which in (1, 2))
        try:
            slopes = axes(valence, arousal)
        except ValueError:
            return
        self.axes = shifts(AXES, differences[:, rows] @ slopes.T, self._design)
        self.explained = _explained(differences[:, rows].mean(0), valence, arousal)

    @cached_property
    def order(self) -> tuple[Shift, ...]:
        """The concepts' shifts, the highest first."""
        return tuple(sorted(self.shifts.values(), key=lambda shift: (-shift.mean, shift.name)))

    def up(self, count: int = 10) -> tuple[Shift, ...]:
        """The ``count`` concepts that rose most."""
        return tuple(shift for shift in self.order[:count] if shift.mean > 0)

    def down(self, count: int = 10) -> tuple[Shift, ...]:
        """The ``count`` concepts that fell most, the lowest first."""
        return tuple(shift for shift in self.order[: -count - 1 : -1] if shift.mean < 0)

    def shift(self, name: str) -> Shift:
        """The shift of a concept, a family, ``valence`` or ``arousal``; the first of these that is called so.

        Raises:
            UnknownConcept: listing the nearest names.
        """
        for known in (self.shifts, self.families, self.axes):
            if name in known:
                return known[name]
        if name in AXES:
            raise ValueError(f"{name} is not known: too few of the concepts are rated")
        raise unknown(name, [*self.names, *self.families, *AXES])

    def fired(self, alarms: Iterable[str | Alarm]) -> list[Alarm]:
        """Those of the ``alarms``, such as ``"afraid>0.5"``, that fire.

        Raises:
            AlarmError: an alarm that cannot be understood.
        """
        parsed = [alarm if isinstance(alarm, Alarm) else Alarm.parse(alarm, self.names, self.families) for alarm in alarms]
        return [alarm for alarm in parsed if alarm.fires(self.shift(alarm.name))]

    def to_dict(self) -> dict[str, Any]:
        """Every number as JSON, but those of single prompts."""
        random = None
        if self.random is not None:
            size = self.random.abs()
            random = {"count": len(size), "median": float(size.median()), "q95": float(size.quantile(0.95)), "largest": float(size.max())}
        counts = {"neutral": self.challenging.count(False), "challenging": self.challenging.count(True)}
        return {
            **self.facts,
            "prompts": counts,
            "confidence": self.confidence,
            "resamples": self.resamples,
            "seed": self.seed,
            "concepts": {shift.name: _plain(shift) for shift in self.order},
            "families": {name: _plain(shift) for name, shift in self.families.items()},
            "axes": {name: _plain(shift) for name, shift in self.axes.items()},
            "explained": self.explained,
            "random": random,
        }

    def __repr__(self) -> str:
        ends = ", ".join(str(shift) for shift in (*self.up(2), *self.down(2)))
        return (
            f"Comparison({len(self.names)} concepts, {len(self.prompts)} prompts, on {shown(self.facts.get('on'))}: {ends or 'no shift'})"
        )


def ratings() -> dict[str, tuple[float, float]]:
    """Word -> its valence and arousal, from 1 to 9, as rated by emovec's authors."""
    with shipped("ratings.csv").open(encoding="utf-8", newline="") as file:
        return {row["word"]: (float(row["valence"]), float(row["arousal"])) for row in csv.DictReader(file)}


def _explained(means: Tensor, valence: Tensor, arousal: Tensor) -> float | None:
    centred = means - means.mean()
    total = float(centred.square().sum())
    design = torch.stack([torch.ones_like(valence), valence, arousal], 1)
    fitted = design @ (torch.linalg.pinv(design) @ means)
    return None if total == 0 else 1 - float((means - fitted).square().sum()) / total


def _plain(shift: Shift) -> dict[str, Any]:
    fields: dict[str, Any] = {key: value for key, value in vars(shift).items() if key != "name" and value is not None}
    for key in ("neutral", "challenging", "difference"):
        if key in fields:
            fields[key] = dict(vars(fields[key]))
    return fields
