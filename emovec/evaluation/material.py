"""What sections are computed from."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from emovec.bank import Bank
from emovec.evaluation.labelled import Moments, Texts
from emovec.evaluation.texts import Corpus
from emovec.extraction.recipe import Recipe


@dataclass(frozen=True)
class Options:
    """How much is drawn.

    Attributes:
        seed: of everything random.
        samples: bootstrap samples behind each interval.
        permutations: permutations behind each p.
        quick: fewer texts, doses and re-makings; for a look, not for a claim.
    """

    seed: int = 0
    samples: int = 1000
    permutations: int = 1000
    quick: bool = False


@dataclass(frozen=True)
class Material:
    """A bank, the texts, and the model's activations on them.

    Attributes:
        bank: the bank on trial.
        recipe: how it was made; None if it does not say.
        corpus: the texts.
        layers: the layers of ``means`` and ``moments``.
        means: set -> [N, P, L, d].
        moments: of ordinary and neutral tokens, by kind.
        options: how much is drawn.
        own_corpus: whether the bank was made from these very texts; None: it does not say.
        model, tokenizer: for sections that run it.
        force: steer although the bank was made for another model.
        advance: told of the tokens that a section runs.
    """

    bank: Bank
    recipe: Recipe | None
    corpus: Corpus
    layers: tuple[int, ...]
    means: Mapping[str, Tensor]
    moments: Mapping[str, Moments]
    options: Options
    own_corpus: bool | None = None
    model: Any = None
    tokenizer: Any = None
    force: bool = False
    advance: Callable[[int], None] = lambda _: None

    def generator(self, name: str) -> torch.Generator:
        """A generator of its own for each purpose, so that sections do not depend on which others run."""
        seed = hashlib.sha256(f"{self.options.seed} {name}".encode()).digest()[:7]
        return torch.Generator().manual_seed(int.from_bytes(seed, "big"))

    @property
    def registers(self) -> list[str]:
        return list(self.corpus.labels)

    def labelled(self, name: str) -> Texts:
        """A register's texts; ``turns``: the messages as users' turns."""
        labels = self.corpus.labels["messages" if name == "turns" else name]
        return Texts(self.means[name][:, 0], labels.concept, labels.topic, self.layers)

    def everything(self) -> Texts:
        """The texts of all registers; topics are numbered on from one register to the next."""
        parts, topics = [], 0
        for register in self.registers:
            part = self.labelled(register)
            parts.append(replace(part, topics=part.topics + topics))
            topics += int(part.topics.max()) + 1
        whole = parts[0]
        for part in parts[1:]:
            whole = whole + part
        return whole

    def pool(self, name: str, pool: str) -> dict[int, Tensor]:
        """layer -> [N, d] of one pool of a set."""
        column = self.corpus.sets[name].pools.index(pool)
        return {layer: self.means[name][:, column, row] for row, layer in enumerate(self.layers)}

    def family_of(self, names: tuple[str, ...]) -> Tensor:
        """[K], the index of each concept's family in ``families``; -1: it has none."""
        found = {name: index for index, members in enumerate(self.bank.families.values()) for name in members}
        return torch.tensor([found.get(name, -1) for name in names])

    @cached_property
    def families(self) -> list[str]:
        return list(self.bank.families)
