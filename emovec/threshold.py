"""Thresholds on scores: what they are on, how they are smoothed, what is done about them, and how ordinary text calibrates them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from emovec.bank_layer import shown, unknown
from emovec.monitor import Reading
from emovec.steer import MAX_SCORE, SCOPES, Steering

Number = TypeVar("Number", float, Tensor)
Of = str | Mapping[str, float]
"""What a threshold is on: a concept, a family (the mean of its members), or a weighted sum of such."""


# --- actions ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class GuardEvent:
    """A threshold that was crossed.

    Attributes:
        sequence: of the batch.
        position: of the token, counted from 0 at the sequence's first token, without padding.
        kind: "prompt" or "generated".
        of: the concept, family or weighted sum.
        value: the smoothed score, which the threshold is compared with.
        threshold: what it is above of.
        layers: where it was read.
        action: "stop", "refuse", "steer" or "callback".
    """

    sequence: int
    position: int
    kind: str
    of: str
    value: float
    threshold: float
    layers: tuple[int, ...]
    action: str

    def __str__(self) -> str:
        where = f"sequence {self.sequence}, {self.kind} token {self.position}"
        read = f"layer{'s' if len(self.layers) > 1 else ''} {', '.join(map(str, self.layers))}"
        return f"{where}: {self.of} {self.value:+.2f} above {self.threshold:+.2f} at {read}: {self.action}"


class GuardStop(RuntimeError):  # noqa: N818
    """A guard stopped or refused in a forward pass outside ``generate``, where there is no loop it could end."""

    def __init__(self, event: GuardEvent) -> None:
        super().__init__(str(event))
        self.event = event


@dataclass(frozen=True)
class Stop:
    """End the sequence: it gets no other tokens than padding."""

    name = "stop"


@dataclass(frozen=True)
class Refuse:
    """Write ``text``, or these token ids, and end the sequence."""

    text: str | tuple[int, ...]
    name = "refuse"


@dataclass(frozen=True)
class Steer:
    """Lay a steering value over the sequence's own from the next token on, until it ends; its entries replace those of the same concept."""

    value: Mapping[str, Any] | Steering
    name = "steer"


Action = Stop | Refuse | Steer | Callable[[GuardEvent], object]


# --- thresholds ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Threshold:
    """Do something when the inner state stays above a bound.

    Args:
        of: a concept, a family (the mean of its members), or a weighted sum: ``{"desperate": 1, "calm": -0.5}``.
        above: the bound, in score units; :meth:`calibrated` finds one.
        action: ``Stop()``, ``Refuse(text)``, ``Steer(value)``, or a function that is given the event; what it raises ends the generation.
        halflife: of the smoothing, in tokens, as in :meth:`Reading.smooth`; 0 for none.
        hold: so many tokens in a row must be above, so that one noisy token does not fire. It fires again only after a token that was not.
        on: "all", "prompt" or "generated": only these tokens count.
        layer: where to read; default: what the bank's scores come from.
        calibrated_at: the layers whose readings gave ``above``; a bank that is read at others is refused.

    Raises:
        ValueError: naming the argument.
    """

    of: Of
    above: float
    action: Action = field(default_factory=Stop)
    halflife: float = 8
    hold: int = 3
    on: str = "all"
    layer: int | None = None
    calibrated_at: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        terms = self.terms
        if not terms or not all(_is_number(weight) and weight != 0 for weight in terms.values()):
            raise ValueError(f"of must be a name, or names with weights that are not zero; got {shown(self.of)}")
        limit = MAX_SCORE * sum(abs(weight) for weight in terms.values())
        if not _is_number(self.above) or abs(self.above) > limit:
            raise ValueError(f"above must be a number from {-limit:g} to {limit:g}, got {shown(self.above)}")
        if not (isinstance(self.action, Stop | Refuse | Steer) or (callable(self.action) and not isinstance(self.action, type))):
            raise ValueError(f"action must be Stop(), Refuse(text), Steer(value) or a function, got {shown(self.action)}")
        if not _is_number(self.halflife) or self.halflife < 0:
            raise ValueError(f"halflife must be 0 or a positive number of tokens, got {shown(self.halflife)}")
        if not isinstance(self.hold, int) or isinstance(self.hold, bool) or self.hold < 1:
            raise ValueError(f"hold must be at least 1 token, got {shown(self.hold)}")
        if self.on not in SCOPES:
            raise ValueError(f"on must be one of {', '.join(SCOPES)}, got {shown(self.on)}")

    @classmethod
    def calibrated(cls, of: Of, readings: Iterable[Reading], rate: float, action: Action | None = None, **options: Any) -> Threshold:
        """A threshold that ordinary conversations cross with at most this probability each.

        Args:
            of: as above.
            readings: of ordinary conversations, one each, like those it will watch.
            rate: of false alarms, for a conversation: 0.01 is one in a hundred.
            action: as above.
            options: ``halflife``, ``hold``, ``on`` and ``layer``, as above.

        Raises:
            ValueError: as :func:`calibrate_threshold`.
        """
        probe, seen = cls(of, 0.0, Stop() if action is None else action, **options), list(readings)
        above = calibrate_threshold(probe, seen, rate)
        return replace(probe, above=above, calibrated_at=seen[0].read_layers if probe.layer is None else (probe.layer,))

    @property
    def terms(self) -> dict[str, float]:
        """Name -> weight."""
        if isinstance(self.of, str):
            return {self.of: 1.0}
        return dict(self.of) if isinstance(self.of, Mapping) else {}

    @property
    def label(self) -> str:
        """What it is on, in words: ``desperate``, or ``desperate - 0.5 calm``."""
        if isinstance(self.of, str):
            return self.of
        signed = [("-" if weight < 0 else "+", "" if abs(weight) == 1 else f"{abs(weight):g} ", name) for name, weight in self.of.items()]
        return " ".join(f"{sign} {factor}{name}" for sign, factor, name in signed).removeprefix("+ ")

    def weights(self, names: Sequence[str], families: Mapping[str, Sequence[str]]) -> Tensor:
        """[K] fp64: the weight of each concept's score.

        Raises:
            UnknownConcept: neither a concept nor a family.
        """
        weights = torch.zeros(len(names), dtype=torch.float64)
        for name, weight in self.terms.items():
            members = [name] if name in names else [member for member in families.get(name, ()) if member in names]
            if not members:
                raise unknown(name, [*names, *families])
            for member in members:
                weights[names.index(member)] += weight / len(members)
        return weights


class Course:
    """The recursion of one threshold along one sequence: smoothing, then the hold-off."""

    def __init__(self, threshold: Threshold) -> None:
        self._decay = 0.5 ** (1 / threshold.halflife) if threshold.halflife > 0 else 0.0
        self._above, self._hold = threshold.above, threshold.hold
        self._total: Any = 0.0
        self._weight = 0.0
        self._run = 0

    def smooth(self, score: Number) -> Number:
        """The smoothed value at the next token; of a tensor element by element."""
        self._total = self._decay * self._total + score
        self._weight = self._decay * self._weight + 1
        smoothed: Number = self._total / self._weight
        return smoothed

    def fires(self, value: float) -> bool:
        """Whether the threshold fires at this smoothed value: it is the ``hold``-th above in a row."""
        self._run = self._run + 1 if value > self._above else 0
        return self._run == self._hold


def calibrate_threshold(threshold: Threshold, readings: Iterable[Reading], rate: float) -> float:
    """The lowest bound that ordinary conversations cross with a probability of at most ``rate`` each.

    Of n conversations' peaks (the highest bound at which a conversation would still have fired), it is the m-th lowest
    with ``m = ceil((1 - rate) * (n + 1))``. A new conversation that is exchangeable with those n has its peak above it
    with probability at most ``1 - m / (n + 1) <= rate``, whatever the distribution (split conformal prediction).

    Args:
        threshold: says what is read and how it is smoothed; its ``above`` is not used.
        readings: of ordinary conversations, calibrated; those with too few tokens to fire count as never firing.
        rate: between 0 and 1.

    Raises:
        ValueError: a rate out of range, raw projections, or too few conversations for the rate.
    """
    if not _is_number(rate) or not 0 < rate < 1:
        raise ValueError(f"rate must be between 0 and 1, got {shown(rate)}")
    peaks = sorted(peak(threshold, reading) for reading in readings)
    wanted = math.ceil((1 - rate) * (len(peaks) + 1) - 1e-9)
    if wanted > len(peaks):
        needed = math.ceil(1 / rate - 1 - 1e-9)
        raise ValueError(f"a false-alarm rate of {rate:g} needs at least {needed} ordinary conversations, got {len(peaks)}")
    if peaks[wanted - 1] == -math.inf:
        raise ValueError(f"of {len(peaks)} conversations too many have fewer than {threshold.hold} tokens that count, so they tell nothing")
    return peaks[wanted - 1]


def peak(threshold: Threshold, reading: Reading) -> float:
    """The highest bound at which ``threshold`` would still fire in this reading, were it not for rounding; -inf if it is too short."""
    return max(runs_of(threshold, reading, threshold.weights(reading.names, reading.members())[:, None])[:, 0].tolist(), default=-math.inf)


def runs_of(threshold: Threshold, reading: Reading, weights: Tensor) -> Tensor:
    """[T', n]: for every ``hold`` tokens in a row the lowest of their smoothed values, for n columns of ``weights`` [K, n]."""
    if not reading.calibrated:
        raise ValueError("the reading holds raw projections; a threshold in score units needs a calibrated bank")
    scores = reading.scores if threshold.layer is None else reading.at(threshold.layer)
    rows = [row for row, kind in enumerate(reading.kind) if counts(threshold, kind, reading.positions[row])]
    course = Course(threshold)
    smoothed = [course.smooth(value) for value in (scores.to("cpu", torch.float64)[rows] @ weights).unbind()]
    if len(smoothed) < threshold.hold:
        return torch.empty(0, weights.shape[1], dtype=torch.float64)
    return torch.stack(smoothed).unfold(0, threshold.hold, 1).amin(-1)


def counts(threshold: Threshold, kind: str, position: int) -> bool:
    """Whether a token counts: it is in scope, and not the first of its sequence, an attention sink whose scores mean nothing."""
    return position > 0 and threshold.on in ("all", kind)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
