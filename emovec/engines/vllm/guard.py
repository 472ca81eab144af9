"""Thresholds on the scores of requests: what a request or the server may say, and how they run along a request.

The values that are watched come with a step's output, so nothing waits for them. What they lead to is done with that output (stop,
refuse) or with the next step that is made (steer).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from emovec.bank import Bank
from emovec.bank_layer import nearest, shown
from emovec.engines.vllm.scores import Chunk
from emovec.steer import Steering, SteeringError
from emovec.threshold import Course, Steer, Stop, Threshold, counts

MAX_THRESHOLDS = 16
_KEYS = ("of", "above", "do", "halflife", "hold", "on")
_ACTIONS = ("stop", "refuse", "steer")


@dataclass(frozen=True)
class Watched:
    """A threshold and what is done when it fires: "stop"; "refuse" and write ``tokens``; or "steer" by ``value`` (of the language)."""

    threshold: Threshold
    do: str
    text: str = ""
    value: Any = None


def parse(value: Any, bank: Bank) -> tuple[Watched, ...]:
    """The thresholds of a request or a server.

    Raises:
        ValueError: naming the threshold, the key and the nearest known names.
    """
    if not isinstance(value, Sequence) or isinstance(value, str) or not 1 <= len(value) <= MAX_THRESHOLDS:
        raise SteeringError(f"a guard is a list of 1 to {MAX_THRESHOLDS} thresholds, got {shown(value)}")
    return tuple(_threshold(one, bank) for one in value)


def _threshold(given: Any, bank: Bank) -> Watched:
    if not isinstance(given, Mapping):
        raise SteeringError(f"a threshold is an object, got {shown(given)}")
    where = f"threshold on {shown(given.get('of'))}"
    for key in given:
        if key not in _KEYS:
            raise SteeringError(f"{where}: unknown key {shown(key)}; nearest known: {', '.join(nearest(key, _KEYS))}")
    detail: Any = None
    do: Any = given.get("do", "stop")
    if isinstance(do, Mapping) and len(do) == 1:
        do, detail = next(iter(do.items()))
    if do not in _ACTIONS or (detail is None) != (do == "stop") or (do == "refuse" and not (isinstance(detail, str) and detail)):
        raise SteeringError(f'{where}: do must be "stop", {{"refuse": text}} or {{"steer": value}}, got {shown(given.get("do"))}')
    try:
        options = {key: given[key] for key in ("halflife", "hold", "on") if key in given}
        threshold = Threshold(given.get("of", ""), given.get("above", float("nan")), Stop() if do != "steer" else Steer(detail), **options)
        weights = threshold.weights(bank.names, bank.families)
        if do == "steer":
            Steering.parse(detail, bank.names)
    except (ValueError, TypeError) as error:
        raise SteeringError(f"{where}: {error}") from None
    check_unit(weights, bank, where)
    return Watched(threshold, do, detail if do == "refuse" else "", detail if do == "steer" else None)


def check_unit(weights: Tensor, bank: Bank, where: str) -> None:
    """Refuse ``weights`` [K] of concepts that have no baseline.

    Raises:
        SteeringError: naming them.
    """
    lacking = {name for layer in bank.read_layers for name in bank[layer].uncalibrated}
    named = [bank.names[k] for k in weights.nonzero().flatten().tolist() if bank.names[k] in lacking]
    if named:
        raise SteeringError(f"{where}: the bank has no baseline for {', '.join(map(shown, named[:3]))}, so its scores have no unit")


def packed(watched: Watched, **made: Any) -> dict[str, Any]:
    """As the engine gets it, with what was ``made`` of its action."""
    one = watched.threshold
    return {"of": one.of, "above": one.above, "halflife": one.halflife, "hold": one.hold, "on": one.on, "do": watched.do, **made}


def unpacked(given: Mapping[str, Any]) -> Threshold:
    return Threshold(given["of"], given["above"], halflife=given["halflife"], hold=given["hold"], on=given["on"])


def weights(given: Sequence[Mapping[str, Any]], bank: Bank) -> Tensor:
    """[K, thresholds] fp32: from a token's scores to the values that are watched."""
    return torch.stack([unpacked(one).weights(bank.names, bank.families) for one in given], 1).float()


@dataclass(frozen=True)
class Event:
    """What fired, where, and what is done about it."""

    index: int
    position: int
    kind: str
    of: str
    value: float
    above: float
    do: str

    def shown(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if key != "index"}


class Watch:
    """The thresholds of one request along its tokens."""

    def __init__(self, given: Sequence[Mapping[str, Any]], prompt: int) -> None:
        self.given, self._prompt = given, prompt
        self._thresholds = [unpacked(one) for one in given]
        self._courses = [Course(one) for one in self._thresholds]
        self._seen = 0

    def see(self, chunk: Chunk) -> list[Event]:
        """What fires at these tokens, until something ends the request. What is computed again after a preemption has been seen."""
        events = []
        for position, values in enumerate(chunk.values.tolist(), chunk.start):
            if position < self._seen:
                continue
            self._seen = position + 1
            kind = "prompt" if position < self._prompt else "generated"
            for index, (one, course) in enumerate(zip(self._thresholds, self._courses, strict=True)):
                if counts(one, kind, position) and course.fires(smoothed := course.smooth(values[index])):
                    events.append(Event(index, position, kind, one.label, smoothed, one.above, self.given[index]["do"]))
            if any(event.do != "steer" for event in events):
                break
        return events


def audit(path: str | None) -> Callable[[str, Event], None]:
    """Appends a line of JSON for each event to a file; nothing without one."""

    def write(request: str, event: Event) -> None:
        if path is not None:
            with open(path, "a", encoding="utf-8") as file:
                file.write(json.dumps({"request": request, **event.shown()}) + "\n")

    return write
