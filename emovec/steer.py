"""The steering language: what a request may ask for, and the row of the steering table that does it.

``docs/steering.md`` describes the language. Nothing here touches a model.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch

from emovec.bank_layer import BankLayer, Baseline, UnknownConcept, nearest, shown, unknown
from emovec.ops import MAX_RULES, Gate, Row, Rule

SCOPES = ("all", "prompt", "generated")
KEYS = ("add", "set", "at_most", "at_least", "ablate", "when", "on")
MAX_STRENGTH = 2.0  # twice the stream itself; at 0.5 a model has already lost its task
MAX_SCORE = 50.0  # standard deviations; ordinary text stays within 10
MAX_JSON = 64 << 10  # bytes; an entry for each of 171 concepts with every key takes 20 thousand

_INF = float("inf")
_NUMBER = re.compile(r"[+-]?(?:\d+(?:\.\d*)?|\.\d+)(?:e[+-]?\d+)?", re.ASCII | re.IGNORECASE)


class SteeringError(ValueError):
    """A steering value is not valid, or a layer cannot do what it asks; the message names the entry."""


class _UnknownEntryError(SteeringError, UnknownConcept):
    """So that those who catch either get it."""


@dataclass(frozen=True)
class Condition:
    """Open for the tokens at which ``concept`` scores above ``threshold`` (score units)."""

    concept: str
    threshold: float

    def __str__(self) -> str:
        return f"{self.concept} > {self.threshold!r}"


@dataclass(frozen=True)
class Entry:
    """What is done about one concept.

    add: strength, in units of the layer's residual norm. at_least, at_most: bounds on the score, equal for ``set``.
    ablate: the projection becomes zero. when: only where the condition holds. on: "all", "prompt" or "generated".
    """

    concept: str
    add: float = 0.0
    at_least: float = -_INF
    at_most: float = _INF
    ablate: bool = False
    when: Condition | None = None
    on: str = "all"

    @property
    def bounded(self) -> bool:
        """Whether the entry has bounds in score units."""
        return self.at_least > -_INF or self.at_most < _INF

    @property
    def is_rule(self) -> bool:
        """Whether the entry takes one of the 16 rules."""
        return self.ablate or self.bounded

    def to_value(self) -> float | str | dict[str, Any]:
        """The entry as one writes it, in the shortest form."""
        value: dict[str, Any] = {}
        if self.ablate:
            value["ablate"] = True
        elif self.at_least == self.at_most and self.add == 0:
            value["set"] = self.at_least
        else:
            value |= {key: bound for key in ("at_least", "at_most") if math.isfinite(bound := getattr(self, key))}
        if self.add != 0 or not value:
            value["add"] = self.add
        if self.when is not None:
            value["when"] = str(self.when)
        if self.on != "all":
            value["on"] = self.on
        short: dict[tuple[str, ...], float | str] = {("add",): self.add, ("ablate",): "ablate"}
        return short.get(tuple(value), value)


@dataclass(frozen=True)
class Steering:
    """A validated steering value: immutable, hashable, equal to another that means the same; false if it does nothing.

    >>> Steering.parse({"calm": 0.05, "angry": {"at_most": 1.5}}, names=["angry", "calm"]).to_dict()
    {'angry': {'at_most': 1.5}, 'calm': 0.05}
    """

    entries: tuple[Entry, ...] = ()

    @classmethod
    def parse(cls, value: Mapping[str, Any] | Steering | None, names: Sequence[str]) -> Steering:
        """Check all of ``value`` against the language and the known ``names``.

        Raises:
            SteeringError: naming the entry; for an unknown concept it is also an UnknownConcept.
        """
        steering = cls(_parse({} if value is None else value.to_dict() if isinstance(value, Steering) else value))
        known = set(names)
        for entry in steering.entries:
            for concept in (entry.concept, *(() if entry.when is None else (entry.when.concept,))):
                if concept not in known:
                    raise _UnknownEntryError(f"steering entry {shown(entry.concept)}: {unknown(concept, names)}")
        return steering

    @classmethod
    def from_json(cls, text: str | bytes, names: Sequence[str]) -> Steering:
        """Parse JSON from someone who is not trusted: size, depth and duplicate keys are checked too."""
        if len(text) > MAX_JSON:
            raise SteeringError(f"steering of {len(text)} bytes is longer than {MAX_JSON}")
        try:
            value = json.loads(text, object_pairs_hook=unique_keys)
        except SteeringError:
            raise
        except (ValueError, RecursionError) as error:
            raise SteeringError(f"steering is not JSON: {error}") from None
        return cls.parse(value, names)

    def to_dict(self) -> dict[str, Any]:
        """The value that parses to this, ready for JSON."""
        return {entry.concept: entry.to_value() for entry in self.entries}

    def to_json(self) -> str:
        return json.dumps(self.to_dict())

    def beyond(self, usable: Mapping[str, Sequence[float]]) -> list[str]:
        """What to warn of: strengths outside the range ``usable`` (concept -> lowest, highest) in which the model could still write."""
        found = []
        for entry in self.entries:
            low, high = usable.get(entry.concept, (-_INF, _INF))
            if not low <= entry.add <= high:
                found.append(
                    f"{entry.concept}: strength {entry.add:g} is outside of {low:g} to {high:g}, in which this model could still write"
                )
        return found

    def __bool__(self) -> bool:
        return any(entry.is_rule or entry.add != 0 for entry in self.entries)

    def row(self, layer: BankLayer, kind: str, *, scored: str = "prompt") -> Row | None:
        """What the op does to tokens of one kind at one layer; None if that is nothing.

        Args:
            layer: gives strengths and scores their units, and has every concept that is named.
            kind: "prompt" or "generated"; bounds and gates are in units of this kind's baseline.
            scored: the kind of position whose baseline the op scores with (the ``kind`` of ``layer.operands``).

        Raises:
            SteeringError: the layer has no residual norm to add in units of, or no baseline for a bound or a gate.
        """
        if kind not in ("prompt", "generated"):
            raise ValueError(f"kind must be 'prompt' or 'generated', got {shown(kind)}")
        entries = [entry for entry in self.entries if entry.on in ("all", kind)]
        always = _row([entry for entry in entries if entry.when is None], layer, kind)
        gated = [entry for entry in entries if entry.when is not None and (entry.is_rule or entry.add != 0)]
        if not gated:
            return always
        everything = _row([entry for entry in entries if entry.when is None or entry in gated], layer, kind)
        assert everything is not None
        assert gated[0].when is not None
        return Row(everything.delta, everything.rules, _gate(gated[0].when, gated[0], layer, kind, scored), always)


def load_profiles(path: str | os.PathLike[str], names: Sequence[str] | None = None) -> dict[str, dict[str, Any]]:
    """Read named steering values from a TOML file: each table is a profile.

    Args:
        path: the file.
        names: the known concepts; without them everything but the names of concepts is checked.

    Raises:
        SteeringError: naming the file, the profile and the entry.
    """
    import tomllib

    with open(path, "rb") as file:
        try:
            profiles = tomllib.load(file)
        except (ValueError, RecursionError) as error:
            raise SteeringError(f"{path}: not TOML: {error}") from None
    for profile, value in profiles.items():
        try:
            entries = _parse(value)
            if names is not None:
                Steering.parse(Steering(entries), names)
        except SteeringError as error:
            raise type(error)(f"{path}: profile {shown(profile)}: {error}") from None
    return profiles


# --- parsing ------------------------------------------------------------------------------------------------------


def _parse(value: object) -> tuple[Entry, ...]:
    """The entries of a steering value, by name, with everything checked but whether the names are known."""
    if not isinstance(value, Mapping):
        raise SteeringError(f"steering must be an object of concepts, got {shown(value)}")
    scope = _scope(value.get("on", "all"), "steering")
    entries = [_entry(concept, entry, scope) for concept, entry in value.items() if concept != "on"]
    rules = [entry.concept for entry in entries if entry.is_rule]
    if len(rules) > MAX_RULES:
        raise SteeringError(f"{len(rules)} rules, more than {MAX_RULES}: {shown(rules[MAX_RULES])} is one too many")
    gates: dict[Condition, str] = {}
    for entry in entries:
        if entry.when is not None:
            gates.setdefault(entry.when, entry.concept)
    if len(gates) > 1:
        (a, of_a), (b, of_b) = list(gates.items())[:2]
        raise SteeringError(f"one condition per request, but {shown(of_a)} has {shown(str(a))} and {shown(of_b)} has {shown(str(b))}")
    return tuple(sorted(entries, key=lambda entry: entry.concept))


def _entry(concept: object, value: object, scope: str) -> Entry:
    where = f"steering entry {shown(concept)}"
    if not isinstance(concept, str):
        raise SteeringError(f"{where}: a concept is named by text")
    if isinstance(value, str) and value == "ablate":
        return Entry(concept, ablate=True, on=scope)
    if isinstance(value, Real) and not isinstance(value, bool):
        return Entry(concept, add=_number(value, MAX_STRENGTH, where, "strength"), on=scope)
    if not isinstance(value, Mapping):
        raise SteeringError(f'{where}: expected a number, "ablate" or an object, got {shown(value)}')
    for key in value:
        if key not in KEYS:
            raise SteeringError(f"{where}: unknown key {shown(key)}; nearest known: {', '.join(nearest(key, KEYS))}")
    if not value.keys() - {"when", "on"}:
        raise SteeringError(f"{where}: nothing to do; give one of {', '.join(KEYS[:5])}")
    ablate = value.get("ablate", False)
    if "ablate" in value and ablate is not True:
        raise SteeringError(f"{where}: ablate must be true, got {shown(ablate)}")
    for key in ("ablate", "set"):
        others = [other for other in KEYS[:5] if other in value and other != key]
        if key in value and others:
            raise SteeringError(f"{where}: {key} contradicts {', '.join(others)}")
    low, high = ("set", "set") if "set" in value else ("at_least", "at_most")
    entry = Entry(
        concept,
        add=_number(value["add"], MAX_STRENGTH, where, "add") if "add" in value else 0.0,
        at_least=_number(value[low], MAX_SCORE, where, low) if low in value else -_INF,
        at_most=_number(value[high], MAX_SCORE, where, high) if high in value else _INF,
        ablate=ablate,
        when=_condition(value["when"], where) if "when" in value else None,
        on=_scope(value.get("on", scope), where),
    )
    if entry.at_least > entry.at_most:
        raise SteeringError(f"{where}: at_least {entry.at_least} is above at_most {entry.at_most}")
    return entry


def _number(value: object, limit: float, where: str, what: str) -> float:
    if not isinstance(value, Real) or isinstance(value, bool):
        raise SteeringError(f"{where}: {what} must be a number, got {shown(value)}")
    try:
        number = float(value)
    except OverflowError:
        number = _INF
    if not abs(number) <= limit:  # so that NaN fails too
        raise SteeringError(f"{where}: {what} must be from {-limit:g} to {limit:g}, got {shown(value)}")
    return number


def _condition(value: object, where: str) -> Condition:
    concept, _, number = value.rpartition(">") if isinstance(value, str) else ("", "", "")
    if not concept.strip() or not _NUMBER.fullmatch(number.strip()):
        raise SteeringError(f"{where}: when must read \"<concept> > <number>\" (only '>' is supported), got {shown(value)}")
    return Condition(concept.strip(), _number(float(number), MAX_SCORE, where, "the number in when"))


def _scope(value: object, where: str) -> str:
    if not isinstance(value, str) or value not in SCOPES:
        raise SteeringError(f"{where}: on must be one of {', '.join(SCOPES)}, got {shown(value)}")
    return value


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        keys = [key for key, _ in pairs]
        raise SteeringError(f"duplicate key {next(shown(key) for key in keys if keys.count(key) > 1)}")
    return value


# --- rows ---------------------------------------------------------------------------------------------------------


def _row(entries: Iterable[Entry], layer: BankLayer, kind: str) -> Row | None:
    delta = torch.zeros(layer.width, dtype=torch.float64)
    rules = []
    for entry in entries:
        concept = layer.resolve(entry.concept)
        if entry.add != 0:
            if layer.residual_norm is None:
                raise _cannot(entry, layer, "has no residual norm, the unit of strength")
            delta += entry.add * layer.residual_norm * layer.directions[concept].double()
        if entry.ablate:
            rules.append(Rule(concept, 0.0, 0.0))
        elif entry.bounded:
            mean, std = _baseline(concept, entry, layer, kind)
            rules.append(Rule(concept, mean + entry.at_least * std, mean + entry.at_most * std))
    adds = bool(delta.any())
    return Row(delta if adds else None, tuple(rules)) if adds or rules else None


def _gate(condition: Condition, entry: Entry, layer: BankLayer, kind: str, scored: str) -> Gate:
    concept = layer.resolve(condition.concept)
    mean, std = _baseline(concept, entry, layer, kind)
    op_mean, op_std = _baseline(concept, entry, layer, scored)
    threshold = condition.threshold if kind == scored else (mean + condition.threshold * std - op_mean) / op_std
    return Gate(concept, threshold)


def _baseline(concept: int, entry: Entry, layer: BankLayer, kind: str) -> tuple[float, float]:
    baseline: Baseline | None = layer.baseline(kind) if layer.baselines else None
    if baseline is None or bool(baseline.mean[concept].isnan()):
        raise _cannot(entry, layer, f"has no baseline for {layer.names[concept]!r}, which bounds and conditions are in units of")
    return float(baseline.mean[concept]), float(baseline.std[concept])


def _cannot(entry: Entry, layer: BankLayer, why: str) -> SteeringError:
    return SteeringError(f"steering entry {shown(entry.concept)}: layer {layer.index} {why}")
