"""Which row of the steering table the tokens of each sequence use."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from emovec.bank_layer import BankLayer, nearest, shown
from emovec.ops import Row
from emovec.steer import Steering, SteeringError

Steer = Mapping[str, Any] | Steering | str | None
"""What may be asked for one sequence: a steering value, the name of a profile, or nothing."""


def parsed(
    steer: Steer | Sequence[Steer], names: Sequence[str], profiles: Mapping[str, Mapping[str, Any]] | None = None
) -> Steering | list[Steering]:
    """One value for all sequences, or a list with one for each, checked against the known ``names``.

    Raises:
        SteeringError: naming the entry, or the profile that is not known.
    """
    if isinstance(steer, Sequence) and not isinstance(steer, str):
        if not steer:
            raise SteeringError("steer is an empty list; give a value for each sequence, or None")
        return [_parsed(value, names, profiles) for value in steer]
    return _parsed(steer, names, profiles)


def _parsed(steer: Steer, names: Sequence[str], profiles: Mapping[str, Mapping[str, Any]] | None) -> Steering:
    if isinstance(steer, str):
        if not profiles:
            raise SteeringError(f"steer={shown(steer)} names a profile, but no profiles were given (see emovec.steer.load_profiles)")
        if steer not in profiles:
            raise SteeringError(f"unknown profile {shown(steer)}; nearest known: {', '.join(nearest(steer, profiles))}")
        steer = profiles[steer]
    if steer is not None and not isinstance(steer, Mapping | Steering):
        raise SteeringError(f"steer must be an object of concepts, a Steering or a profile's name, got {shown(steer)}")
    return Steering.parse(steer, names)


def combined(base: Steering, over: Steering) -> Steering:
    """Both values in one; where both have an entry for a concept, that of ``over``.

    Raises:
        SteeringError: they have different conditions, or more rules than fit.
    """
    entries = (*base.entries, *over.entries)
    names = [entry.concept for entry in entries] + [entry.when.concept for entry in entries if entry.when is not None]
    return Steering.parse({**base.to_dict(), **over.to_dict()}, names)


class Allotment:
    """The rows of every steering value that may come up, the same at every layer, and who has which.

    Args:
        steer: one value for all sequences, or a list with one for each.
        overlays: values that a guard may lay over any of them later on.
    """

    def __init__(self, steer: Steering | Sequence[Steering], overlays: Sequence[Steering] = ()) -> None:
        self._shared = isinstance(steer, Steering)
        given = [steer] if isinstance(steer, Steering) else list(steer)
        variants: dict[Steering, int] = {}  # in order, without repeats
        self._variant = [
            [variants.setdefault(value, len(variants)) for value in (base, *(combined(base, over) for over in overlays))] for base in given
        ]
        self.variants = tuple(variants)
        slots = [(value, kind) for value in variants for kind in ("prompt", "generated") if _acts(value, kind)]
        self._slots = {slot: index for index, slot in enumerate(slots)}

    def __bool__(self) -> bool:
        """Whether any token may ever be steered."""
        return bool(self._slots)

    def rows(self, layer: BankLayer) -> list[Row]:
        """The rows of the table of one layer.

        Raises:
            SteeringError: the layer cannot do what a value asks.
        """
        return [value.row(layer, kind) or Row() for value, kind in self._slots]

    def check(self, prompts: int) -> None:
        """Refuse a number of prompts that the list of values does not fit."""
        if not self._shared and len(self._variant) != prompts:
            raise ValueError(f"steer is a list of {len(self._variant)}, one for each sequence, but the batch has {prompts}")

    def pairs(self, batch: int, prompts: int, overlaid: Mapping[int, int]) -> list[tuple[int, int]]:
        """For each of ``batch`` sequences its rows (of prompt tokens, of generated tokens), -1 for none.

        Args:
            batch: ``prompts`` times the copies or beams that are made of each.
            prompts: how many there were.
            overlaid: sequence -> which of the overlays it has.
        """
        copies = batch // prompts
        base = [self._variant[0 if self._shared else sequence // copies] for sequence in range(batch)]
        values = [self.variants[known[1 + overlaid[i] if i in overlaid else 0]] for i, known in enumerate(base)]
        return [(self._slots.get((value, "prompt"), -1), self._slots.get((value, "generated"), -1)) for value in values]


def _acts(value: Steering, kind: str) -> bool:
    return any(entry.on in ("all", kind) and (entry.is_rule or entry.add != 0) for entry in value.entries)
