"""The sections of an evaluation, in the order of the report."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from emovec import bank, bank_layer, readout, stats
from emovec.bank_layer import nearest, shown
from emovec.evaluation import (
    activations,
    causality,
    classification,
    dosage,
    geometry,
    labelled,
    leaks,
    lens,
    material,
    others,
    reading,
    scenarios,
    speakers,
    stability,
    steered,
    texts,
    wordfamily,
)
from emovec.evaluation.figures import Figure
from emovec.evaluation.material import Material
from emovec.extraction import recipe
from emovec.report.markup import Html

Part = Html | Figure
SHARED = (labelled, material, reading, stats, texts, bank, bank_layer, readout, recipe)
"""Modules that every result depends on."""


@dataclass(frozen=True)
class Section:
    """A question and how it is answered.

    Attributes:
        module: has ``result``, from a :class:`Material` to plain JSON, and ``parts``, from that to what the page shows.
        title: the question.
        cost: how long it takes, in tokens of a forward pass that take as long; for the estimate only.
        needs: modules that the result depends on, besides its own and those that all depend on.
    """

    module: ModuleType
    title: str
    cost: int
    needs: tuple[ModuleType, ...] = ()

    @property
    def name(self) -> str:
        return self.module.__name__.rpartition(".")[2]

    @property
    def result(self) -> Callable[[Material], dict[str, Any]]:
        found: Callable[[Material], dict[str, Any]] = self.module.result
        return found

    @property
    def parts(self) -> Callable[[dict[str, Any]], list[Part]]:
        found: Callable[[dict[str, Any]], list[Part]] = self.module.parts
        return found

    @property
    def code(self) -> str:
        """A hash of what computes the result: another version's results are not reused."""
        modules = (self.module, *self.needs, *SHARED)
        return hashlib.sha256(b"".join(Path(str(module.__file__)).read_bytes() for module in modules)).hexdigest()[:16]


SECTIONS = (
    Section(classification, "Does the recipe name the emotion of texts it was not made from?", 90_000),
    Section(scenarios, "Does the bank read feelings that are only implied?", 5_000),
    Section(others, "Does it read other writers?", 2_000),
    Section(speakers, "Whose feeling is read where?", 5_000),
    Section(dosage, "Does a reading follow a number?", 5_000),
    Section(geometry, "How do the directions lie to one another?", 10_000),
    Section(lens, "Which tokens does a direction speak for?", 5_000),
    Section(stability, "Would other stories have given the same directions?", 30_000, (classification,)),
    Section(leaks, "What else could give the emotion away?", 10_000, (wordfamily,)),
    Section(causality, "Does adding a direction do what its name says?", 210_000, (activations, steered, wordfamily)),
)


def chosen(names: Sequence[str] | None) -> list[Section]:
    """The sections of these names, in the order of the report; None: all.

    Raises:
        ValueError: an unknown name; lists the nearest.
    """
    known = {part.name: part for part in SECTIONS}
    for name in names or ():
        if name not in known:
            raise ValueError(f"unknown section {shown(name)}; nearest known: {', '.join(nearest(name, known))}; all: {', '.join(known)}")
    return [part for name, part in known.items() if names is None or name in names]
