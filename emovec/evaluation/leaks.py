"""What could give the emotion away besides the feeling: the word itself, the length of the text, the format it is read in."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from emovec.evaluation.labelled import derived
from emovec.evaluation.material import Material
from emovec.evaluation.reading import ranks_of
from emovec.evaluation.wordfamily import named
from emovec.evaluation.words import chance, plain, said
from emovec.report.markup import Html
from emovec.report.prose import text
from emovec.report.tables import table
from emovec.stats import against, distinct, hit_estimate, mean_estimate, share_estimate, shuffled_within

_SHOWN = 20
_OTHERS = 5  # other concepts whose words are looked for in each text


def result(material: Material) -> dict[str, Any]:
    """Named emotions, lengths, and directions by format, for each register."""
    return {
        "names": list(material.corpus.names),
        "words": {register: _words(material, register) for register in material.registers},
        "length": {register: _length(material, register) for register in material.registers},
        "format": _format(material),
    }


def _words(material: Material, register: str) -> dict[str, Any]:
    """Texts that hold their emotion's word family, and how often texts hold that of another emotion, which is no leak."""
    stories, labels = material.corpus.stories[register], material.corpus.labels[register].concept
    names = material.corpus.names
    found = [named(story.emotion, story.text) for story in stories]
    generator = material.generator(f"leaks.words.{register}")
    drawn = torch.randint(1, len(names), (len(stories), min(_OTHERS, len(names) - 1)), generator=generator)
    others = torch.tensor(
        [
            [bool(named(names[(label + shift) % len(names)], story.text)) for shift in shifts]
            for story, label, shifts in zip(stories, labels.tolist(), drawn.tolist(), strict=True)
        ]
    )
    return {
        "share": share_estimate(torch.tensor([bool(words) for words in found])),
        "other_emotions": float(others.double().mean()),
        "texts": [
            {"text": number, "emotion": story.emotion, "topic": story.topic, "words": words}
            for number, (story, words) in enumerate(zip(stories, found, strict=True))
            if words
        ],
    }


def _length(material: Material, register: str) -> dict[str, Any]:
    """How much of the texts' length the emotion explains, and how often length alone names it; labels are shuffled within topics for p."""
    labels = material.corpus.labels[register]
    length = torch.tensor([len(part.ids) for part in material.corpus.sets[register].texts], dtype=torch.float64)
    generator = material.generator(f"leaks.length.{register}")
    observed = _explained(length, labels.concept)
    null = torch.tensor(
        [_explained(length, labels.concept[shuffled_within(labels.topic, generator)]) for _ in range(material.options.permutations)]
    )
    hits = torch.zeros(len(length))
    for fold in distinct(labels.fold):
        held = labels.fold == fold
        scores = -(length[held, None] - _mean_by(length[~held], labels.concept[~held], len(material.corpus.names))[None]).abs()
        hits[held] = (ranks_of(scores, labels.concept[held]) <= 5).float()
    top5 = hit_estimate(hits, (labels.concept, labels.topic), material.options.samples, generator)
    means = _mean_by(length, labels.concept, len(material.corpus.names))
    return {
        "tokens": {"mean": float(length.mean()), "shortest": int(length.min()), "longest": int(length.max())},
        "explained": {"value": observed, "null": against(observed, null), "n": len(length)},
        "top5_by_length": top5 | {"chance": min(1.0, 5 / len(means))},
        "mean_by_concept": [round(value, 1) for value in means.tolist()],
    }


def _mean_by(values: Tensor, labels: Tensor, count: int) -> Tensor:
    """The mean [K] of ``values`` [N] by label."""
    sums = torch.zeros(count, dtype=torch.float64).index_add_(0, labels, values)
    return sums / torch.bincount(labels, minlength=count)


def _explained(values: Tensor, labels: Tensor) -> float:
    """The share of variance that lies between the labels."""
    means = _mean_by(values, labels, int(labels.max()) + 1)
    total = (values - values.mean()).square().sum()
    return float((means[labels] - values.mean()).square().sum() / total) if float(total) else 0.0


def _format(material: Material) -> dict[str, Any]:
    """Directions of the same messages as raw text and as users' turns: how alike a concept's two are, and different concepts'."""
    if "turns" not in material.means or material.recipe is None:
        return {"skipped": "this needs a register read in both formats, and the bank's recipe"}
    layer, count = material.bank.read_layer, len(material.corpus.names)
    recipe = replace(material.recipe, readers=None)
    raw, chat = (derived(material.labelled(name), layer, count, recipe, material.moments).directions for name in ("messages", "turns"))
    cosines = raw @ chat.T
    groups = (torch.arange(count),)
    own = cosines.diagonal()
    generator = material.generator("leaks.format")
    first = (ranks_of(cosines, torch.arange(count)) == 1).double()
    return {
        "layer": layer,
        "cosine": mean_estimate(own, groups, material.options.samples, generator),
        "lowest": float(own.min()),
        "other_concepts_high": float(cosines[~torch.eye(count, dtype=torch.bool)].quantile(0.975)),
        "found_again": mean_estimate(first, groups, material.options.samples, generator),
        "by_concept": [round(value, 4) for value in own.tolist()],
    }


def parts(result: dict[str, Any]) -> list[Html]:
    """Each leak with its measure."""
    rows = [
        [register, part["share"]["n"], said(part["share"]), f"{part['other_emotions']:.3f}"] for register, part in result["words"].items()
    ]
    found = [
        text(
            "What could give an emotion away without its being felt. A text leaks if it holds the emotion's word or one of its family; "
            "the check errs on the "
            "side of finding too much, and how often it finds another emotion's words is shown beside it.",
            title="Leaks",
        ),
        table(["register", "texts", "name their emotion (95 %)", "name another, by chance"], rows, note="Share of texts."),
    ]
    leaks = [
        [register, *(leak[key] for key in ("emotion", "topic")), ", ".join(leak["words"])]
        for register, part in result["words"].items()
        for leak in part["texts"]
    ]
    if leaks:
        note = None if len(leaks) <= _SHOWN else f"The first {_SHOWN} of {len(leaks)}; all are in report.json."
        found.append(table(["register", "emotion", "topic", "words"], leaks[:_SHOWN], title="Texts that name their emotion", note=note))
    lengths = []
    for register, part in result["length"].items():
        explained = part["explained"]
        lengths.append(
            [
                register,
                f"{part['tokens']['mean']:.0f} ({part['tokens']['shortest']} to {part['tokens']['longest']})",
                f"{explained['value']:.3f}",
                f"{explained['null']['high']:.3f}",
                chance(explained["null"]["p"]),
                said(part["top5_by_length"]),
                f"{part['top5_by_length']['chance']:.3f}",
            ]
        )
    found.append(
        table(
            ["register", "tokens", "variance explained", "null, 97.5 %", "p", "top-5 by length alone (95 %)", "chance"],
            lengths,
            title="Length",
            note="Does the emotion explain how long a text is, and does length alone name it on held-out topics? Null: labels shuffled "
            "within topics.",
        )
    )
    part = result["format"]
    if "skipped" in part:
        return [*found, text(part["skipped"], title="Format")]
    line = [said(part["cosine"]), plain(part["lowest"]), said(part["found_again"]), plain(part["other_concepts_high"])]
    return [
        *found,
        table(
            ["cosine of a concept's two (95 %)", "lowest", "found again (95 %)", "other concepts, 97.5 %"],
            [line],
            title="Format",
            note=f"Directions of layer {part['layer']} from the same messages, as raw text and as users' turns in the chat template.",
        ),
    ]
