"""Would other stories have given the same directions?

Directions are made anew from stories drawn with replacement, and from halves that share no story and no topic. The first flatters,
since it shares stories with what it is compared with; the second does not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from emovec.evaluation.classification import Trial
from emovec.evaluation.figures import DOWN, MUTED, UP, Figure, curves
from emovec.evaluation.labelled import Texts, derived
from emovec.evaluation.material import Material
from emovec.evaluation.reading import ranks_of, read_layers
from emovec.evaluation.words import plain, said
from emovec.extraction.recipe import Recipe, leading, project_out, unit
from emovec.report.markup import Html
from emovec.report.prose import text
from emovec.report.tables import table
from emovec.stats import distinct, mean_estimate, quantiles

SPLITS = 20
DENOISE = (None, "tokens", "dialogues")


def result(material: Material) -> dict[str, Any]:
    """Self-cosines by bootstrap and by halves, by number of texts, and by choice of neutral components."""
    if material.recipe is None:
        return {"skipped": "the bank does not say by what recipe it was made"}
    makers = _Maker(material, material.recipe)
    boot = makers.bootstrap()
    halves = makers.halves(None)
    names = material.corpus.names
    return {
        "layer": makers.layer,
        "names": list(names),
        "texts": len(makers.texts.labels),
        "bootstrap": {"draws": len(boot), "by_concept": _by_concept(boot, names), **_summary(boot)},
        "halves": halves,
        "by_number": [makers.halves(count) for count in makers.counts()],
        "neutral": makers.neutral(),
    }


class _Maker:
    """Directions of the reading layer from any weighting of the texts."""

    def __init__(self, material: Material, recipe: Recipe) -> None:
        self.material, self.recipe = material, recipe
        self.layer = material.bank.read_layer
        self.texts: Texts = material.everything()
        self.concepts = len(material.corpus.names)
        self.rows = self.texts.at(self.layer)
        self.removed = self._removed(recipe)
        self.full = self.directions(torch.ones(len(self.rows), dtype=torch.float64))

    def _removed(self, recipe: Recipe) -> Tensor:
        if recipe.denoise is None:
            return self.rows[:0]
        return leading(self.material.moments[f"neutral_{recipe.denoise}"].of(self.layer)[1], recipe.variance)

    def directions(self, weights: Tensor) -> Tensor:
        """Unit directions [K, d] from the texts, each counted ``weights`` [N] times."""
        member = torch.nn.functional.one_hot(self.texts.labels, self.concepts).double() * weights[:, None]
        means = member.T @ self.rows / member.sum(0)[:, None]
        return unit(project_out(means - means.mean(0), self.removed))[0]

    def bootstrap(self) -> Tensor:
        """Cosines [B, K] with the full directions when each concept's texts are drawn anew."""
        generator = self.material.generator("stability.bootstrap")
        order = self.texts.labels.argsort(stable=True)
        count = torch.bincount(self.texts.labels, minlength=self.concepts)
        start = count.cumsum(0) - count
        found = []
        for _ in range(min(self.material.options.samples, 200)):
            place = start[self.texts.labels] + (torch.rand(len(self.rows), generator=generator) * count[self.texts.labels]).long()
            weights = torch.zeros(len(self.rows), dtype=torch.float64).index_add_(
                0, order[place], torch.ones(len(place), dtype=torch.float64)
            )
            found.append((self.directions(weights) * self.full).sum(1))
        return torch.stack(found)

    def counts(self) -> list[int]:
        """Topics per half to try: 1, 2, 3, 5, ... up to half of them."""
        most = len(distinct(self.texts.topics)) // 2
        return [count for count in (1, 2, 3, 5, 7, 10, 15, 20, 30, 50) if count <= most]

    def halves(self, topics: int | None) -> dict[str, Any]:
        """Cosines of each concept's directions from two sets of topics that share none; ``topics`` each, or half of all."""
        known = distinct(self.texts.topics)
        size = len(known) // 2 if topics is None else topics
        generator = self.material.generator(f"stability.halves.{topics}")
        own, others, first = [], [], []
        for _ in range(SPLITS):
            drawn = known[torch.randperm(len(known), generator=generator)]
            sides = [torch.isin(self.texts.topics, part).double() for part in (drawn[:size], drawn[size : 2 * size])]
            if any(bool((torch.bincount(self.texts.labels, side, self.concepts) == 0).any()) for side in sides):
                continue
            one, other = map(self.directions, sides)
            cosines = one @ other.T
            own.append(cosines.diagonal())
            others.append(cosines[~torch.eye(self.concepts, dtype=torch.bool)].quantile(0.975))
            first.append((ranks_of(cosines, torch.arange(self.concepts)) == 1).double())
        if not own:
            return {"topics": size, "skipped": "some concept has no text in a half"}
        stacked = torch.stack(own)
        groups = (torch.arange(self.concepts),)
        estimate = mean_estimate(stacked.mean(0), groups, self.material.options.samples, generator)
        again = mean_estimate(torch.stack(first).mean(0), groups, self.material.options.samples, generator)
        return {
            "topics": size,
            "splits": len(own),
            "cosine": estimate,
            "found_again": again,
            "chance": 1 / self.concepts,
            "others_high": float(torch.stack(others).mean()),
            "by_concept": [round(value, 4) for value in stacked.mean(0).tolist()],
        }

    def neutral(self) -> list[dict[str, Any]]:
        """What other neutral components do to the directions, and to what they read on held-out topics."""
        trial = Trial(self.material, self.recipe)
        plain = derived(self.texts, self.layer, self.concepts, replace(self.recipe, denoise=None, readers=None), {}).directions
        found = []
        for denoise in DENOISE:
            recipe = replace(self.recipe, denoise=denoise)
            made = derived(self.texts, self.layer, self.concepts, replace(recipe, readers=None), self.material.moments)
            told: dict[str, Any] = {"denoise": denoise, "components": made.components, "chosen": denoise == self.recipe.denoise}
            told["cosine_with_plain"] = _summary((made.directions * plain).sum(1)[None])
            for name in trial.tested:
                case = trial.cases(name)[0]
                read = {"readers": trial.test(case, read_layers(self.material.bank), recipe=recipe)}
                read["directions"] = trial.test(case, read_layers(self.material.bank), recipe=recipe, readers=False)
                texts = trial.texts[name]
                for which, (ranks, rows) in read.items():
                    hits, groups = trial.hits(case, (ranks, rows))["top1"], (texts.labels[rows], texts.topics[rows])
                    generator = self.material.generator(f"stability.neutral.{denoise}.{name}.{which}")
                    told[f"{name}: {which}"] = mean_estimate(hits, groups, self.material.options.samples, generator)
            found.append(told)
        return found


def _by_concept(cosines: Tensor, names: Sequence[str]) -> dict[str, Any]:
    """Each concept's mean self-cosine and the middle 95 % of the draws."""
    found = {}
    for column, name in enumerate(names):
        low, high = quantiles(cosines[:, column])
        found[name] = {"value": round(float(cosines[:, column].mean()), 4), "low": round(low, 4), "high": round(high, 4)}
    return found


def _summary(cosines: Tensor) -> dict[str, float]:
    """Over concepts: the median, the lowest and the highest of the means."""
    means = cosines.mean(0)
    return {"median": float(means.median()), "lowest": float(means.min()), "highest": float(means.max())}


def parts(result: dict[str, Any]) -> list[Html | Figure]:
    """How alike, how many texts it takes, and what neutral components do."""
    if "skipped" in result:
        return [text(result["skipped"], title="Would other stories give the same directions?")]
    boot, halves = result["bootstrap"], result["halves"]
    rows = [["drawn with replacement, against all", f"{boot['median']:.3f} (lowest concept {boot['lowest']:.3f})", "", ""]]
    for part in [*result["by_number"], halves]:
        if "skipped" not in part:
            rows.append(
                [f"halves of {part['topics']} topics each", said(part["cosine"]), said(part["found_again"]), plain(part["others_high"])]
            )
    least = sorted(boot["by_concept"].items(), key=lambda item: float(item[1]["value"]))
    ends = [[name, f"{part['value']:.3f}", f"{part['low']:.3f} to {part['high']:.3f}"] for name, part in [*least[:6], *least[-6:]]]
    registers = [key for key in result["neutral"][0] if ": " in key]
    lines = [
        [
            f"{part['denoise'] or 'none'}{' (the bank)' if part['chosen'] else ''}",
            part["components"],
            f"{part['cosine_with_plain']['median']:.2f}",
            *(said(part[key]) for key in registers),
        ]
        for part in result["neutral"]
    ]
    return [
        text(
            f"Directions of layer {result['layer']} made anew from {result['texts']:,} texts. Drawing with replacement shares texts with "
            f"what it is compared with and "
            "flatters; halves share no text and no topic, but each has half of the texts at most. Found again: of all directions of the "
            "other half, "
            "a concept's own is the nearest. The last column is what the directions of other concepts reach.",
            title="Would other stories give the same directions?",
        ),
        table(["made from", "cosine (95 %)", "found again (95 %)", "other concepts, 97.5 %"], rows),
        Figure("stability", "By number of texts", lambda figure: _draw(figure, result), (8.6, 2.8)),
        table(
            ["concept", "self-cosine", "95 % of draws"],
            ends,
            title="Least and most stable",
            note="Drawn with replacement. All are in report.json.",
        ),
        table(
            ["neutral components of", "removed", "cosine with none removed", *(f"top-1, {key}" for key in registers)],
            lines,
            title="Neutral components",
            note="What is projected out of the directions before they are used. Top-1 on held-out topics.",
        ),
    ]


def _draw(figure: Any, result: dict[str, Any]) -> None:
    found = [part for part in result["by_number"] if "skipped" not in part]
    if not found:
        return
    axes = figure.subplots()
    x = [part["topics"] for part in found]
    lines = {name: [part[key]["value"] for part in found] for name, key in (("cosine", "cosine"), ("found again", "found_again"))}
    bands = {
        name: ([part[key]["low"] for part in found], [part[key]["high"] for part in found])
        for name, key in (("cosine", "cosine"), ("found again", "found_again"))
    }
    lines["other concepts, 97.5 %"] = [part["others_high"] for part in found]
    curves(axes, x, lines, bands=bands, colours={"cosine": UP, "found again": DOWN, "other concepts, 97.5 %": MUTED})
    axes.set_xlabel("topics in each half")
    axes.set_ylim(0, 1)
    axes.legend(ncols=3, loc="lower right")
