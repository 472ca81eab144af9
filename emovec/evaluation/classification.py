"""Do directions made by the bank's recipe name the emotion of texts that they were not made from?

The bank's own directions were made from all of these texts, so nothing here is read with them. For each test the recipe makes a
bank from the other texts alone, which then reads the test's texts as banks are read. So this is evidence about the recipe.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from emovec.bank import Bank
from emovec.evaluation.classification_page import parts
from emovec.evaluation.labelled import Texts, remade, within_topics
from emovec.evaluation.material import Material
from emovec.evaluation.reading import all_ranks, projections, read, read_layers
from emovec.extraction.recipe import Recipe
from emovec.stats import against, distinct, hit_estimate, mean_estimate, shuffled_within

__all__ = ["Case", "Trial", "parts", "result"]

TOP = 5
AS_READ = "as the bank is read"
_SHUFFLES = 5


@dataclass(frozen=True)
class Case:
    """What is tested: texts of ``tested`` by directions made from ``made_from``, with ``held_out`` left out of them."""

    tested: str
    made_from: tuple[str, ...]
    held_out: str

    def __str__(self) -> str:
        return f"{self.tested} by {' and '.join(self.made_from)}, {self.held_out} held out"


def result(material: Material) -> dict[str, Any]:
    """All tests, the sweep over layers and the confusions of families."""
    if material.recipe is None:
        return {"skipped": "the bank does not say by what recipe it was made, so that it cannot be made again from part of the texts"}
    trial = Trial(material, material.recipe)
    layers = read_layers(material.bank)
    tests, beyond, sweep, relabelled, confusion = [], [], [], [], {}
    denoise = None if material.recipe.denoise else "tokens"
    other_recipe = replace(material.recipe, denoise=denoise)
    for name in trial.tested:
        for case in trial.cases(name):
            found = trial.test(case, layers)
            tests.append(trial.described(case, AS_READ, found))
            if case.held_out in ("topics", "register"):
                words = trial.test(case, (0,))
                tests.append(trial.described(case, "layer 0", words))
                beyond.append(trial.beyond(case, found, words))
                sweep += [trial.swept(case, layer) for layer in material.layers]
            if case.held_out == "topics":
                confusion[name] = trial.confusion(case, found)
                for variant, options in {
                    "directions": {"readers": False},
                    "centring: raw": {"centring": "raw"},
                    "centring: topic": {"centring": "topic"},
                    f"directions, {f'denoised by {denoise}' if denoise else 'without denoising'}": {
                        "readers": False,
                        "recipe": other_recipe,
                    },
                }.items():
                    tests.append(trial.described(case, variant, trial.test(case, layers, **options)))  # type: ignore[arg-type]
                relabelled.append(trial.relabelled(case, layers))
    return {
        "names": list(material.corpus.names),
        "own_corpus": material.own_corpus,
        "made_again": made_again(material, material.recipe),
        "read_layers": list(layers),
        "recipe": material.recipe.to_dict(),
        "tests": tests,
        "beyond_words": beyond,
        "relabelled": relabelled,
        "sweep": sweep,
        "families": material.families,
        "confusion": confusion,
        "chance": trial.chance(),
    }


def made_again(material: Material, recipe: Recipe) -> float | None:
    """The lowest cosine of a concept's reader with the one that the recipe makes from all texts; None: they are not the bank's texts.

    Near 1 if the recipe that is tried is the one that the bank was made by, which its header alone does not prove.
    """
    if not material.own_corpus or material.options.quick:
        return None
    names = material.corpus.names
    again = remade(material.everything(), names, read_layers(material.bank), recipe, material.moments)
    rows, lowest = [material.bank.resolve(name) for name in names], 1.0
    for layer in again.values():
        own = material.bank[layer.index]
        pairs = [(part.directions if part.readers is None else part.readers).double() for part in (own, layer)]
        lowest = min(lowest, float(torch.nn.functional.cosine_similarity(pairs[0][rows], pairs[1]).min()))
    return lowest


class Trial:
    """The texts of a material, split again and again. What is found of a case are ranks [N, K] of all concepts and the texts' rows [N]."""

    def __init__(self, material: Material, recipe: Recipe) -> None:
        self.material, self.recipe = material, recipe
        self.names = material.corpus.names
        self.family = material.family_of(self.names)
        as_turns = "turns" in material.means
        self.tested = [name for name in material.registers if not (as_turns and name == "messages")] + ["turns"] * as_turns
        self.texts = {name: material.labelled(name) for name in {*material.registers, *self.tested}}

    # --- splits ---------------------------------------------------------------------------------------------------------

    def cases(self, name: str) -> list[Case]:
        """Topics, single topics, single texts and whole registers held out."""
        everything = tuple(self.material.registers)
        others = [other for other in everything if other != self._register(name)]
        held = [Case(name, everything, what) for what in ("topics", "one topic", "texts")]
        return held + [Case(name, (other,), "register") for other in others]

    def splits(self, case: Case) -> list[tuple[dict[str, Tensor], Tensor]]:
        """Which texts of each register to make directions from, and which of the tested set to read with them, as masks.

        topics: by folds, left out of all registers at once. one topic: each by itself. texts: by folds drawn for each concept, so
        that other concepts' texts on their topics stay. register: all other registers make, this one is read.
        """
        labels, register = self.material.corpus.labels, self._register(case.tested)
        everything = {name: torch.ones(len(labels[name].concept), dtype=torch.bool) for name in case.made_from}
        own = labels[register]
        if case.held_out == "register":
            return [(everything, torch.ones(len(own.concept), dtype=torch.bool))]
        if case.held_out == "topics":
            folds = distinct(own.fold)
            return [({name: labels[name].fold != fold for name in case.made_from}, own.fold == fold) for fold in folds]
        groups = own.topic if case.held_out == "one topic" else self._drawn(own.concept, register)
        return [({**everything, register: groups != group}, groups == group) for group in distinct(groups)]

    def _drawn(self, concept: Tensor, register: str) -> Tensor:
        """A fold [N] for each text, by chance, with as many of each concept in each as can be."""
        generator = self.material.generator(f"classification.texts.{register}")
        place = torch.zeros(len(concept), dtype=torch.long)
        for row in distinct(concept):
            here = (concept == row).nonzero()[:, 0]
            place[here] = torch.randperm(len(here), generator=generator)
        return place % min(5, int(torch.bincount(concept).min()))

    def _register(self, name: str) -> str:
        return "messages" if name == "turns" else name

    # --- tests ----------------------------------------------------------------------------------------------------------

    def test(
        self,
        case: Case,
        layers: Sequence[int],
        *,
        recipe: Recipe | None = None,
        readers: bool = True,
        centring: str = "ordinary",
        change: Callable[[Texts], Texts] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Make directions for each split and read with them.

        Args:
            case: what is tested.
            layers: where to read.
            recipe: another than the bank's.
            readers: False: read with the directions.
            centring: as :func:`scored` has it.
            change: done to each register's training texts.
        """
        ranks, rows = [], []
        here = {name: self.texts[name].only(layers) for name in {*case.made_from, case.tested}}
        for train, test in self.splits(case):
            texts = [here[name].where(chosen) for name, chosen in train.items()]
            made_of, *more = texts if change is None else map(change, texts)
            for part in more:
                made_of = made_of + part
            bank = remade(made_of, self.names, layers, recipe or self.recipe, self.material.moments, readers=readers)
            ranks.append(all_ranks(scored(bank, here[case.tested].where(test), centring)))
            rows.append(test.nonzero()[:, 0])
        return torch.cat(ranks), torch.cat(rows)

    def described(self, case: Case, variant: str, found: tuple[Tensor, Tensor]) -> dict[str, Any]:
        """Accuracies with intervals, what shuffled labels give, and each text's own rank."""
        ranks, rows = found
        null = self._shuffled(case, variant, found)
        told: dict[str, Any] = self._facts(case) | {"variant": variant, "n": len(rows)}
        for measure, estimate in self._estimates(case, variant, self.hits(case, found), rows).items():
            told[measure] = estimate | {"null": against(estimate["value"], null[measure])}
        own = ranks.gather(1, self.texts[case.tested].labels[rows][:, None])[:, 0]
        return told | {"texts": rows.tolist(), "ranks": own.tolist()}

    def beyond(self, case: Case, found: tuple[Tensor, Tensor], words: tuple[Tensor, Tensor]) -> dict[str, Any]:
        """How much more the bank's layers give than layer 0, text by text."""
        deep, shallow = self.hits(case, found), self.hits(case, words)
        differences = {measure: deep[measure] - shallow[measure] for measure in deep}
        estimates = self._estimates(case, "beyond", differences, found[1], mean_estimate)
        return self._facts(case) | {
            measure: {"layer_0": float(shallow[measure].mean()), "difference": estimate} for measure, estimate in estimates.items()
        }

    def swept(self, case: Case, layer: int) -> dict[str, Any]:
        """One layer by itself."""
        found = self.test(case, (layer,))
        return self._facts(case) | {"layer": layer} | self._estimates(case, f"layer {layer}", self.hits(case, found), found[1])

    def relabelled(self, case: Case, layers: Sequence[int]) -> dict[str, Any]:
        """The case read by banks made from shuffled labels: what the whole procedure gives where there is nothing to find."""
        drawn = []
        for number in range(_SHUFFLES):
            seed = self.material.options.seed + number
            found = self.test(case, layers, change=lambda train, seed=seed: within_topics(train, seed))  # type: ignore[misc]
            drawn.append({measure: float(hits.mean()) for measure, hits in self.hits(case, found).items()})
        return self._facts(case) | {"drawn": drawn}

    def hits(self, case: Case, found: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        """Whether the right concept is first, among the first five, and whether the first is of the right family: [N] each."""
        ranks, rows = found
        return self._hits(ranks, ranks.argmin(1), self.texts[case.tested].labels[rows])

    def _hits(self, ranks: Tensor, first: Tensor, labels: Tensor) -> dict[str, Tensor]:
        own, right = ranks.gather(1, labels[:, None])[:, 0], self.family[labels]
        hits = {"top1": own == 1, "top5": own <= TOP, "family": (self.family[first] == right) & (right >= 0)}
        return {measure: hit.double() for measure, hit in hits.items()}

    def _shuffled(self, case: Case, variant: str, found: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        """Accuracies [n] with the tested texts' labels shuffled within their topics."""
        ranks, rows = found
        texts, first = self.texts[case.tested], ranks.argmin(1)
        generator = self.material.generator(f"classification.null.{case}.{variant}")
        drawn = []
        for _ in range(self.material.options.permutations):
            shuffled = texts.labels[rows][shuffled_within(texts.topics[rows], generator)]
            drawn.append(torch.stack(list(self._hits(ranks, first, shuffled).values())).mean(1))
        return dict(zip(("top1", "top5", "family"), torch.stack(drawn).T, strict=True))

    def _estimates(self, case: Case, purpose: str, values: dict[str, Tensor], rows: Tensor, estimate: Any = hit_estimate) -> dict[str, Any]:
        """Means with intervals; texts of one concept, and of one topic, are drawn together."""
        texts, samples = self.texts[case.tested], self.material.options.samples
        groups = (texts.labels[rows], texts.topics[rows])
        generators = {measure: self.material.generator(f"classification.{case}.{purpose}.{measure}") for measure in values}
        return {measure: estimate(value, groups, samples, generators[measure]) for measure, value in values.items()}

    def _facts(self, case: Case) -> dict[str, Any]:
        return {"made_from": " and ".join(case.made_from), "tested_on": case.tested, "held_out": case.held_out}

    def confusion(self, case: Case, found: tuple[Tensor, Tensor]) -> list[list[int]]:
        """Texts by their family and the family of the concept that reads highest."""
        ranks, rows = found
        right, first = self.family[self.texts[case.tested].labels[rows]], self.family[ranks.argmin(1)]
        size = len(self.material.families)
        return [[int(((right == own) & (first == other)).sum()) for other in range(size)] for own in range(size)]

    def chance(self) -> dict[str, float]:
        count = len(self.names)
        shares = torch.bincount(self.family[self.family >= 0]).double() / count
        return {"top1": 1 / count, "top5": min(1.0, TOP / count), "family": float(shares.square().sum())}


def scored(bank: Bank, test: Texts, centring: str) -> Tensor:
    """Scores [N, K] of texts: ``raw`` projections, z-scores against ``ordinary`` text, or those less their ``topic``'s mean."""
    means = test.by_layer(bank.layers)
    if centring == "raw":
        return projections(bank, means)
    scores = read(bank, means, "prompt")
    if centring == "topic":
        for topic in distinct(test.topics):
            here = test.topics == topic
            scores[here] -= scores[here].mean(0)
    return scores
