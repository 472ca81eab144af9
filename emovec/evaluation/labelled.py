"""Labelled texts by their mean activations, and banks re-made from part of them by a recipe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product

import torch
from torch import Tensor

from emovec.bank import Bank, BankLayer, Baseline, Readout
from emovec.bank_layer import KINDS
from emovec.extraction.recipe import Derived, Recipe, derive
from emovec.stats import shuffled_within


@dataclass(frozen=True)
class Texts:
    """Stories or messages by their activations.

    Attributes:
        means: [N, L, d] in fp32, the mean over each text's used tokens.
        labels: [N], its concept.
        topics: [N], its topic's index.
        layers: the layers that L stands for; empty: 0 to L - 1.
    """

    means: Tensor
    labels: Tensor
    topics: Tensor
    layers: tuple[int, ...] = ()

    def at(self, layer: int) -> Tensor:
        """The means [N, d] of one layer in fp64."""
        return self.means[:, self.layers.index(layer) if self.layers else layer].double()

    def by_layer(self, layers: Sequence[int]) -> dict[int, Tensor]:
        return {layer: self.at(layer) for layer in layers}

    def only(self, layers: Sequence[int]) -> Texts:
        """The same texts at some of the layers."""
        columns = [self.layers.index(layer) if self.layers else layer for layer in layers]
        return replace(self, means=self.means[:, columns], layers=tuple(layers))

    def where(self, chosen: Tensor) -> Texts:
        return replace(self, means=self.means[chosen], labels=self.labels[chosen], topics=self.topics[chosen])

    def among(self, topics: Sequence[int]) -> Tensor:
        return torch.isin(self.topics, torch.tensor(topics))

    def __add__(self, other: Texts) -> Texts:
        means, labels, topics = (torch.cat([getattr(self, name), getattr(other, name)]) for name in ("means", "labels", "topics"))
        return replace(self, means=means, labels=labels, topics=topics)


def within_topics(train: Texts, seed: int) -> Texts:
    """The same texts, labels shuffled within each topic."""
    order = shuffled_within(train.topics, torch.Generator().manual_seed(seed))
    return replace(train, labels=train.labels[order])


@dataclass(frozen=True)
class Moments:
    """What the tokens at one kind of position are like, in fp64.

    Attributes:
        mean: [L, d].
        covariance: [L, d, d], within each layer.
        count: tokens.
        layers: the layers that L stands for.
        across: two layers, ascending -> [d, d], their covariance; for layers that are read together.
    """

    mean: Tensor
    covariance: Tensor
    count: int
    layers: tuple[int, ...]
    across: Mapping[tuple[int, int], Tensor] = field(default_factory=dict)

    def of(self, layer: int) -> tuple[Tensor, Tensor]:
        row = self.layers.index(layer)
        return self.mean[row], self.covariance[row]

    def baseline(self, layer: int, readers: Tensor) -> Baseline:
        """How these tokens project on ``readers`` [K, d]: what calibrating on them would give."""
        mean, covariance = self.of(layer)
        rows = readers.double()
        std = ((rows @ covariance) * rows).sum(1).clamp_min(0).sqrt()
        return Baseline((rows @ mean).float(), std.float(), self.count)

    def together(self, readers: Mapping[int, Tensor]) -> Baseline:
        """How the mean over layers of these tokens' z-scores is spread, of readers layer -> [K, d]."""
        scaled = {}
        for layer, rows in readers.items():
            scaled[layer] = rows.double() / self.baseline(layer, rows).std.double()[:, None]
        variance = torch.zeros(len(next(iter(scaled.values()))), dtype=torch.float64)
        for one, other in product(scaled, repeat=2):
            between = self.of(one)[1] if one == other else self.across[min(one, other), max(one, other)]
            first, second = sorted((one, other))
            variance += ((scaled[first] @ between) * scaled[second]).sum(1)
        std = (variance / len(scaled) ** 2).clamp_min(0).sqrt().float()
        return Baseline(torch.zeros_like(std), std, self.count)


def recipe_of(bank: Bank) -> Recipe | None:
    """The recipe that a bank was made by; None if it does not say."""
    return Recipe.recorded(bank.meta)


def derived(train: Texts, layer: int, concepts: int, recipe: Recipe, moments: Mapping[str, Moments]) -> Derived:
    """Directions and readers of one layer, by the recipe that makes banks; the moments are those that :func:`remade` takes."""
    rows = train.at(layer)
    member = torch.nn.functional.one_hot(train.labels, concepts).double()
    neutral = moments[f"neutral_{recipe.denoise}"].of(layer)[1] if recipe.denoise else None
    ordinary = moments["prompt"].of(layer)[0] if recipe.levels else None
    return derive(recipe, member.T @ rows, member.sum(0), rows.T @ rows, neutral, ordinary)


def remade(
    train: Texts, names: Sequence[str], layers: Sequence[int], recipe: Recipe, moments: Mapping[str, Moments], *, readers: bool = True
) -> Bank:
    """A bank made from ``train`` alone by ``recipe`` and calibrated as banks are; read at ``layers``, together if there are several.

    Args:
        train: texts labelled by index into ``names``, with one of each concept at least.
        names: the concepts.
        layers: the layers to make, ascending.
        recipe: what to do.
        moments: of the kinds of position, and of ``neutral_tokens`` and ``neutral_dialogues``.
        readers: False: read with the directions.
    """
    made = []
    for layer in layers:
        found = derived(train, layer, len(names), recipe, moments)
        own = found.readers.float() if readers and found.readers is not None else None
        directions = found.directions.float()
        baselines = {kind: moments[kind].baseline(layer, directions if own is None else own) for kind in KINDS if kind in moments}
        made.append(BankLayer(layer, tuple(names), directions, readers=own, grand_mean=found.grand_mean.float(), baselines=baselines))
    together = None
    if len(made) > 1:
        onto = {layer.index: layer.directions if layer.readers is None else layer.readers for layer in made}
        together = Readout(tuple(onto), {kind: moments[kind].together(onto) for kind in KINDS if kind in moments})
    return Bank(made, read_layer=layers[len(layers) // 2], readout=together)
