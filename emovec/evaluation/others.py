"""Texts by other writers, read by the bank's own directions: the test that accuracy within one's own corpus cannot stand in for."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from emovec.evaluation.material import Material
from emovec.evaluation.reading import all_ranks, read
from emovec.evaluation.words import chance, said
from emovec.report.markup import Html
from emovec.report.prose import text
from emovec.report.tables import table
from emovec.stats import against, distinct, hit_estimate, numbered

TOPS = (1, 3, 5)


def result(material: Material) -> dict[str, Any]:
    """Hits among the words that occur, among all concepts, and of families; not centred on these texts, and centred on them."""
    written, bank = material.corpus.others, material.bank
    if not written:
        return {"skipped": "No texts by other writers were given (--others), so that what the bank reads in such texts is not shown here."}
    truth = torch.tensor([bank.resolve(story.emotion) for story in written])
    means = {layer: value for layer, value in material.pool("others", "words").items() if layer in bank.layers}
    scores = read(bank, means, "prompt")
    words = distinct(truth)
    own = numbered(truth)
    centred = scores - torch.stack([scores[own == row].mean(0) for row in range(len(words))]).mean(0)
    problems = {
        "words": (scores[:, words], own),
        "words, centred on these texts": (centred[:, words], own),
        "concepts": (scores, truth),
    }
    family = material.family_of(bank.names)
    if bool((family[truth] >= 0).all()):
        members = torch.stack([(family == index).double() for index in range(len(material.families))])
        problems["families"] = (scores @ members.T / members.sum(1), family[truth])
    return {
        "n": len(written),
        "words": [bank.names[row] for row in words.tolist()],
        "problems": {name: _problem(material, value, right, truth, name) for name, (value, right) in problems.items()},
    }


def _problem(material: Material, scores: Tensor, right: Tensor, concept: Tensor, name: str) -> dict[str, Any]:
    ranks = all_ranks(scores)
    own = ranks.gather(1, right[:, None])[:, 0]
    found: dict[str, Any] = {"of": scores.shape[1], "ranks": own.tolist(), "top": {}}
    for top in (top for top in TOPS if top < scores.shape[1]):
        generator = material.generator(f"others.{name}.{top}")
        groups = (concept, torch.arange(len(right)))
        estimate = hit_estimate(own <= top, groups, material.options.samples, generator)
        null = [
            (ranks.gather(1, right[torch.randperm(len(right), generator=generator)][:, None]) <= top).double().mean()
            for _ in range(material.options.permutations)
        ]
        found["top"][str(top)] = estimate | {"chance": top / scores.shape[1], "null": against(estimate["value"], torch.stack(null))}
    return found


def parts(result: dict[str, Any]) -> list[Html]:
    """A table, or that there is nothing to show."""
    if "skipped" in result:
        return [text(result["skipped"], title="Other writers")]
    rows = [
        [f"{part['of']} {name}", f"top {top}", said(hit), f"{hit['chance']:.3f}", f"{hit['null']['high']:.3f}", chance(hit["null"]["p"])]
        for name, part in result["problems"].items()
        for top, hit in part["top"].items()
    ]
    return [
        table(
            ["among", "hit", "share (95 %)", "chance", "null, 97.5 %", "p"],
            rows,
            title="Other writers",
            note=f"{result['n']:,} texts on {len(result['words'])} of the bank's concepts, by writers whose texts the bank was not made "
            f"from, read by its own directions. "
            "Concepts and texts are drawn anew for the intervals. Centring on these texts needs their labels' balance, which a monitor "
            "does not have.",
        )
    ]
