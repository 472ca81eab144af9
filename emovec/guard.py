"""A guard: thresholds on the scores of a running generation, and what is done when they are crossed.

``docs/hooks.md`` describes it. A guard is a plain value; :meth:`Guard.bind` makes what watches one probe.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from emovec.bank import Bank
from emovec.bank_layer import shown
from emovec.recording import Rescale
from emovec.steer import Steering
from emovec.threshold import Action, Course, GuardEvent, GuardStop, Refuse, Steer, Stop, Threshold, calibrate_threshold, counts, peak
from emovec.tracking import Span

__all__ = [
    "Action",
    "Course",
    "Guard",
    "GuardEvent",
    "GuardStop",
    "Refuse",
    "Steer",
    "Stop",
    "Threshold",
    "Watching",
    "calibrate_threshold",
    "peak",
]


class Guard:
    """Thresholds to watch together; give it to ``emovec.attach(..., guard=...)``.

    When several fire at one token, all are reported, and the strongest action is taken: stop, else refuse, else steer.
    """

    def __init__(self, *thresholds: Threshold) -> None:
        if not thresholds:
            raise ValueError("a guard has at least one threshold")
        for threshold in thresholds:
            if not isinstance(threshold, Threshold):
                raise TypeError(f"a guard is made of thresholds, got {shown(threshold)}")
        self.thresholds = thresholds

    def bind(self, bank: Bank, tokenizer: Any = None) -> Watching:
        """What watches one probe.

        Raises:
            ValueError: an unknown name or layer, a concept without a baseline, or a text to refuse with and no tokenizer.
        """
        return Watching([_Bound(threshold, bank, tokenizer) for threshold in self.thresholds])

    def __repr__(self) -> str:
        return f"Guard({', '.join(f'{threshold.label} > {threshold.above:g}' for threshold in self.thresholds)})"


class _Bound:
    """A threshold with what a bank and a tokenizer make of it.

    weights: kind -> layer -> [K] fp64 and offsets: kind -> number, from scores against the baseline of prompts (which the op
    gives) to the value that is watched.
    """

    def __init__(self, threshold: Threshold, bank: Bank, tokenizer: Any) -> None:
        self.threshold, self.action = threshold, threshold.action
        self.layers = bank.read_layers if threshold.layer is None else (threshold.layer,)
        if threshold.calibrated_at not in (None, self.layers):
            raise ValueError(
                f"threshold on {shown(threshold.label)}: its bound comes from readings at {_listed(threshold.calibrated_at)}, "
                f"the bank is read at {_listed(self.layers)}; calibrate it on readings of that"
            )
        weights = threshold.weights(bank.names, bank.families)
        for layer in self.layers:
            lacking = [bank.names[k] for k in weights.nonzero().flatten().tolist() if bank.names[k] in bank[layer].uncalibrated]
            if lacking:
                raise ValueError(
                    f"threshold on {shown(threshold.label)}: layer {layer} has no baseline for {', '.join(map(shown, lacking[:3]))}, so "
                    "its scores are raw projections, and a threshold in score units means nothing; use a calibrated bank"
                )
        readout = bank.readout if threshold.layer is None else None
        self.weights: dict[str, dict[int, Tensor]] = {"prompt": {}, "generated": {}}
        self.offsets = {"prompt": 0.0, "generated": 0.0}
        for kind, onto in self.weights.items():
            of_layer = weights
            if readout is not None:  # the mean of the layers' z-scores, less its mean and over its deviation
                mean, std = (part.double() for part in readout.baseline(kind))
                of_layer = weights / std / len(self.layers)
                self.offsets[kind] = -float(weights / std @ mean)
            for layer in self.layers:
                rescale = Rescale.of(bank[layer]) if kind == "generated" else None
                onto[layer] = of_layer if rescale is None else of_layer * rescale.gain.double()
                self.offsets[kind] += 0.0 if rescale is None else float(of_layer @ rescale.offset.double())
        self.tokens = _refusal(self.action, tokenizer) if isinstance(self.action, Refuse) else []
        self.steer = Steering.parse(self.action.value, bank.names) if isinstance(self.action, Steer) else None

    def event(self, sequence: int, position: int, kind: str, value: float) -> GuardEvent:
        action = self.action.name if isinstance(self.action, Stop | Refuse | Steer) else "callback"
        return GuardEvent(sequence, position, kind, self.threshold.label, value, self.threshold.above, self.layers, action)


class Watching:
    """A guard at work on one probe: the state of every threshold in every sequence of the batch."""

    def __init__(self, bound: Sequence[_Bound]) -> None:
        self.layers = tuple(sorted({layer for one in bound for layer in one.layers}))
        self.steers = tuple(one.steer for one in bound if one.steer is not None)
        self.overlaid: dict[int, int] = {}
        self.events: list[GuardEvent] = []
        self._bound = tuple(bound)
        self._weights: dict[tuple[int, str, int, torch.device], Tensor] = {}
        self._courses: list[list[Course]] = []
        self._forced: dict[int, list[int]] = {}  # sequence -> the tokens it is still to write before it ends
        self._seen, self._positions = 0, [0]

    def see(self, span: Span, scores: Mapping[int, Tensor]) -> None:
        """Take in the scores of one forward pass.

        Raises:
            GuardStop: a sequence is to be ended, and this is not ``generate``.
        """
        if span.fresh:
            self.events, self.overlaid, self._forced = [], {}, {}
            self._courses = [[Course(one.threshold) for one in self._bound] for _ in range(span.batch)]
            self._seen, self._positions = span.start, [span.start] * span.batch
        known = max(self._seen - span.start, 0)  # without a cache, columns come again
        self._seen = max(self._seen, span.start + span.width)
        values = self._values(span, scores)
        real = None if span.real is None else span.real.tolist()
        before = len(self.events)
        for column, sequence in itertools.product(range(known, span.width), range(span.batch)):
            if real is None or real[sequence][column]:
                if sequence not in self._forced:
                    self._take(sequence, "prompt" if column < span.prompt else "generated", values[sequence][column])
                self._positions[sequence] += 1
        ended = [event for event in self.events[before:] if event.action in ("stop", "refuse")]
        if ended and not span.generating:
            raise GuardStop(ended[0])

    def decide(self) -> dict[int, int | None]:
        """For the sequences that are refused or stopped, the token each gets now; None ends it."""
        return {sequence: tokens.pop(0) if tokens else None for sequence, tokens in self._forced.items()}

    def _values(self, span: Span, scores: Mapping[int, Tensor]) -> list[list[list[float]]]:
        """[batch][width][thresholds]: what is watched, before smoothing. One copy to the host."""
        values = []
        for index, one in enumerate(self._bound):
            watched = []
            for layer in one.layers:
                stream = scores[layer][: span.tokens].view(span.batch, span.width, -1)
                parts = {"prompt": stream[:, : span.prompt], "generated": stream[:, span.prompt :]}
                offsets = one.offsets if layer == one.layers[0] else dict.fromkeys(parts, 0.0)
                weighted = [part @ self._weight(index, kind, layer, part.device) + offsets[kind] for kind, part in parts.items()]
                watched.append(torch.cat(weighted, 1))
            values.append(sum((part.to(watched[0].device) for part in watched[1:]), watched[0]))
        on_host: list[list[list[float]]] = torch.stack([value.to(values[0].device) for value in values], -1).tolist()
        return on_host

    def _weight(self, index: int, kind: str, layer: int, device: torch.device) -> Tensor:
        key = (index, kind, layer, device)
        if key not in self._weights:
            self._weights[key] = self._bound[index].weights[kind][layer].to(device, torch.float32)
        return self._weights[key]

    def _take(self, sequence: int, kind: str, values: Sequence[float]) -> None:
        """One token of one sequence. Of the actions that exclude one another the strongest is taken, of two steers the later."""
        position = self._positions[sequence]
        fired: list[tuple[_Bound, GuardEvent]] = []
        for one, course, value in zip(self._bound, self._courses[sequence], values, strict=True):
            if counts(one.threshold, kind, position):
                smoothed = course.smooth(value)
                if course.fires(smoothed):
                    fired.append((one, one.event(sequence, position, kind, smoothed)))
        self.events += [event for _, event in fired]
        for one, event in fired:
            action = one.action
            if isinstance(action, Stop):
                self._forced[sequence] = []
            elif isinstance(action, Refuse):
                self._forced.setdefault(sequence, list(one.tokens))
            elif isinstance(action, Steer):
                self.overlaid[sequence] = [other for other in self._bound if other.steer is not None].index(one)
            else:
                action(event)


def _listed(layers: Sequence[int] | None) -> str:
    return ", ".join(map(str, layers or ()))


def _refusal(action: Refuse, tokenizer: Any) -> list[int]:
    """The token ids of a refusal."""
    if not isinstance(action.text, str):
        tokens = list(action.text)
    elif tokenizer is None:
        raise ValueError(f"to refuse with the text {shown(action.text)}, attach needs tokenizer=..., or give its token ids")
    else:
        tokens = list(tokenizer(action.text, add_special_tokens=False)["input_ids"])
    if not tokens or not all(isinstance(token, int) and token >= 0 for token in tokens):
        raise ValueError(f"a refusal is text or token ids, and not empty; got {shown(action.text)}")
    return tokens
