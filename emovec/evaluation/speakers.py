"""Whose feeling is read where: the user's and the assistant's, over a dialogue in which they differ.

The bank's own directions on dialogues that they were not made from. The dialogues are written, not the model's own, so the token
before the answer can tell the answer's feeling only as far as the question calls for it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from emovec.evaluation.figures import Figure, whiskers
from emovec.evaluation.material import Material
from emovec.evaluation.reading import all_ranks, read
from emovec.evaluation.words import chance, said
from emovec.report.markup import Html
from emovec.report.prose import text
from emovec.report.tables import table
from emovec.stats import against, correlation, hit_estimate, quantiles

KINDS = {"user's words": "prompt", "user's last token": "prompt", "before the answer": "turn_start", "assistant's words": "generated"}
WHOSE = ("user_emotion", "assistant_emotion")
TOP = 5
_LEAST = 6  # dialogues


def result(material: Material) -> dict[str, Any]:
    """At each position the rank of both emotions, and how the positions' scores go together."""
    items, bank = material.corpus.speakers, material.bank
    if len(items) < _LEAST:
        return {"skipped": f"the emotions of {len(items)} dialogues are among the bank's concepts, too few"}
    scores = {}
    for position, kind in KINDS.items():
        means = {layer: value for layer, value in material.pool("speakers", position).items() if layer in bank.layers}
        scores[position] = read(bank, means, kind)
    truth = {whose: torch.tensor([bank.resolve(item[whose]) for item in items]) for whose in WHOSE}
    positions = {
        position: {whose: _found(material, value, truth[whose], f"{position}.{whose}") for whose in WHOSE}
        for position, value in scores.items()
    }
    for position, value in scores.items():
        positions[position]["ahead"] = _ahead(material, value, truth, position)
    return {
        "items": [{"id": item["id"], **{whose: item[whose] for whose in WHOSE}} for item in items],
        "concepts": len(bank.names),
        "positions": positions,
        "together": {
            f"{one} / {other}": _together(material, scores[one], scores[other], f"{one}.{other}")
            for one, other in (
                ("before the answer", "assistant's words"),
                ("user's last token", "assistant's words"),
                ("user's words", "assistant's words"),
            )
        },
    }


def _found(material: Material, scores: Tensor, truth: Tensor, purpose: str) -> dict[str, Any]:
    ranks = all_ranks(scores)
    own = ranks.gather(1, truth[:, None])[:, 0]
    groups = (torch.arange(len(truth)),)
    estimate = hit_estimate(own <= TOP, groups, material.options.samples, material.generator(f"speakers.{purpose}"))
    generator = material.generator(f"speakers.null.{purpose}")
    null = [
        (ranks.gather(1, truth[torch.randperm(len(truth), generator=generator)][:, None]) <= TOP).double().mean()
        for _ in range(material.options.permutations)
    ]
    return {"top5": estimate | {"null": against(estimate["value"], torch.stack(null))}, "ranks": own.tolist()}


def _ahead(material: Material, scores: Tensor, truth: dict[str, Tensor], position: str) -> dict[str, Any]:
    """In how many dialogues the assistant's emotion reads higher than the user's; speakers are swapped at random for p."""
    centred = scores - scores.mean(0)
    difference = (centred.gather(1, truth["assistant_emotion"][:, None]) - centred.gather(1, truth["user_emotion"][:, None]))[:, 0]
    generator = material.generator(f"speakers.ahead.{position}")
    estimate = hit_estimate(difference > 0, (torch.arange(len(difference)),), material.options.samples, generator)
    null = (torch.rand(material.options.permutations, len(difference), generator=generator) < 0.5).double().mean(1)
    distance = abs(estimate["value"] - 0.5)
    return estimate | {"null": against(distance, (null - 0.5).abs())}


def _together(material: Material, one: Tensor, other: Tensor, purpose: str) -> dict[str, Any]:
    """r over dialogues and concepts, each concept's mean over the dialogues taken away; dialogues are drawn and shuffled as wholes."""
    a, b = one - one.mean(0), other - other.mean(0)
    value = float(correlation(a.flatten(), b.flatten()))
    generator = material.generator(f"speakers.together.{purpose}")
    drawn = [
        correlation(a[index].flatten(), b[index].flatten())
        for index in torch.randint(len(a), (material.options.samples, len(a)), generator=generator)
    ]
    null = [
        correlation(a.flatten(), b[torch.randperm(len(b), generator=generator)].flatten()) for _ in range(material.options.permutations)
    ]
    low, high = quantiles(torch.stack(drawn))
    return {"value": value, "low": low, "high": high, "n": len(a), "null": against(value, torch.stack(null))}


def parts(result: dict[str, Any]) -> list[Html | Figure]:
    """Which emotion is found where, and how positions go together."""
    if "skipped" in result:
        return [text(result["skipped"], title="Whose feeling is read where")]
    rows = []
    for position, found in result["positions"].items():
        for whose in WHOSE:
            part = found[whose]["top5"]
            rows.append(
                [position, whose.replace("_emotion", "'s"), said(part), f"{part['null']['high']:.2f}", chance(part["null"]["p"]), part["n"]]
            )
    ahead = [[position, said(found["ahead"]), chance(found["ahead"]["null"]["p"])] for position, found in result["positions"].items()]
    together = [[pair, said(part), f"{part['null']['high']:.2f}", chance(part["null"]["p"])] for pair, part in result["together"].items()]
    return [
        text(
            "Written dialogues in which user and assistant feel differently, read by the bank's own directions. The token before the "
            "answer has not "
            "seen the answer: the assistant's feeling can be read there only as far as the question calls for it.",
            title="Whose feeling is read where",
        ),
        table(["position", "whose feeling", f"among the first 5 of {result['concepts']} (95 %)", "null, 97.5 %", "p", "n"], rows),
        Figure("speakers", "The speakers' feelings by position", lambda figure: _draw(figure, result), (8.6, 3.0)),
        table(
            ["position", "assistant's reads higher than user's (95 %)", "p (two-sided)"],
            ahead,
            note="Scores less each concept's mean over the dialogues. 0.5: neither.",
        ),
        table(
            ["positions", "r (95 %)", "null, 97.5 %", "p"],
            together,
            note="Over dialogues and concepts, each concept's mean taken away. Null: dialogues shuffled.",
        ),
    ]


def _draw(figure: Any, result: dict[str, Any]) -> None:
    rows = {position: [found[whose]["top5"] for whose in WHOSE] for position, found in result["positions"].items()}
    marks = {position: [part["null"]["high"] for part in parts] for position, parts in rows.items()}
    whiskers(
        figure,
        rows,
        marks=marks,
        unit=f"share of dialogues, among the first 5 of {result['concepts']}",
        series=["user's feeling", "assistant's feeling"],
    )
