"""Material of an evaluation in which the truth is known: activations made of planted directions, topics and noise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from emovec.bank import Bank
from emovec.evaluation.labelled import Moments, Texts, remade
from emovec.evaluation.material import Material, Options
from emovec.evaluation.texts import SPEAKER_POOLS, Corpus, Labels, TextSet, folds_of
from emovec.extraction.corpus import Story
from emovec.extraction.recipe import Recipe
from emovec.extraction.tokens import Tokens

NAMES = ("afraid", "alarmed", "panicked", "calm", "serene", "at ease", "happy", "cheerful", "joyful", "sad", "gloomy", "heartbroken")
FAMILIES = {"Fear": NAMES[:3], "Peace": NAMES[3:6], "Joy": NAMES[6:9], "Despair": NAMES[9:]}
LAYERS = (0, 3, 6)
WIDTH = 48
READ = 6
TOPICS = {"stories": 10, "messages": 5}
RECIPE = Recipe(skip=0, skip_share=1.0)
DOSES = [1, 2, 4, 8, 16, 32, 64]


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def directions(layer: int) -> Tensor:
    """[K, d]: concepts of a family are alike."""
    family = draw(len(FAMILIES), WIDTH, seed=100 + layer).repeat_interleave(3, 0)
    rows = 1.0 * family + draw(len(NAMES), WIDTH, seed=200 + layer)
    return rows / rows.norm(dim=1, keepdim=True)


def activations(
    labels: Tensor, strength: float, seed: int, *, words: float = 0.0, topics: Tensor | None = None, noise: float = 0.35
) -> Tensor:
    """[N, L, d]: a constant, the concept's direction times ``strength`` (``words`` at layer 0), the topic and noise."""
    rows = []
    for layer in LAYERS:
        hidden = (
            3 * draw(WIDTH, seed=layer)
            + (strength if layer else words) * directions(layer)[labels]
            + noise * draw(len(labels), WIDTH, seed=seed + layer)
        )
        if topics is not None:
            hidden = hidden + 0.3 * draw(int(topics.max()) + 1, WIDTH, seed=300 + layer + seed)[topics]
        rows.append(hidden)
    return torch.stack(rows, 1)


def moments(seed: int) -> dict[str, Moments]:
    """Of ordinary text without any concept."""
    tokens = torch.stack([3 * draw(WIDTH, seed=layer) + draw(4000, WIDTH, seed=seed + layer) for layer in LAYERS]).double()
    mean = tokens.mean(1)
    covariance = torch.stack([torch.cov(part.T) for part in tokens])
    kinds = ("prompt", "turn_start", "generated", "neutral_tokens", "neutral_dialogues")
    across = (tokens[1] - mean[1]).T @ (tokens[2] - mean[2]) / (tokens.shape[1] - 1)
    return dict.fromkeys(kinds, Moments(mean, covariance, tokens.shape[1], LAYERS, {LAYERS[1:]: across}))


def dummy(name: str, count: int, pools: Sequence[str] = ("words",)) -> TextSet:
    return TextSet(name, tuple(Tokens([1] * (5 + index % 7), [0] * (5 + index % 7)) for index in range(count)), tuple(pools))


def material(
    *,
    strength: float = 3.0,
    words: float = 0.0,
    across: float | None = None,
    recipe: Recipe | None = RECIPE,
    together: bool = False,
    **options: Any,
) -> Material:
    """Planted material.

    Args:
        strength: of the planted directions in all texts; 0: nothing is there to find.
        words: of them at layer 0.
        across: of them in the messages, if it differs.
        recipe: the bank's.
        together: whether the bank reads both of its layers.
        options: fields of Options.
    """
    options = {"samples": 100, "permutations": 120, **options}
    stories, labels, means = {}, {}, {}
    for number, (register, count) in enumerate(TOPICS.items()):
        concept = torch.arange(len(NAMES)).repeat(count)
        topic = torch.arange(count).repeat_interleave(len(NAMES))
        labels[register] = Labels(concept, topic, folds_of(count)[topic])
        stories[register] = [Story(NAMES[k], f"text about {t}", f"t{t}") for k, t in zip(concept.tolist(), topic.tolist(), strict=True)]
        here = strength if register == "stories" or across is None else across
        means[register] = activations(concept, here, 1000 * (number + 1), words=words, topics=topic)[:, None]
    means["turns"] = means["messages"] + 0.05 * draw(*means["messages"].shape, seed=9)
    targets = torch.arange(len(NAMES)).repeat_interleave(3)
    scenarios = [{"id": f"s{row}", "target": NAMES[k]} for row, k in enumerate(targets.tolist())]
    read = activations(targets, strength, 5000)
    means["scenarios"] = torch.stack([read, read], 1)
    dosage = [
        {"id": "dose", "values": DOSES, "rises": ["afraid"], "falls": ["calm"]},
        {"id": "wait", "values": DOSES, "rises": ["sad"], "falls": ["happy"]},
    ]
    doses = torch.linspace(0, 1, len(DOSES))[:, None]
    swept = []
    for number, item in enumerate(dosage):
        base = activations(torch.zeros(len(DOSES), dtype=torch.long), 0.0, 7000 + number)
        for column, layer in enumerate(LAYERS):
            up, down = (directions(layer)[NAMES.index(item[side][0])] for side in ("rises", "falls"))
            base[:, column] += 4 * strength * doses * (up - down)
        swept.append(base)
    means["dosage"] = torch.cat(swept)[:, None].repeat(1, 2, 1, 1)
    user = torch.arange(24) % len(NAMES)
    assistant = (user + 3 + torch.arange(24) // len(NAMES)) % len(NAMES)
    speakers = [
        {"id": f"d{row}", "user_emotion": NAMES[u], "assistant_emotion": NAMES[a]}
        for row, (u, a) in enumerate(zip(user.tolist(), assistant.tolist(), strict=True))
    ]
    sides = [
        activations(user, strength, 8000),
        activations(user, strength, 8100),
        activations(assistant, strength, 8200),
        activations(assistant, strength, 8300),
    ]
    means["speakers"] = torch.stack(sides, 1)
    pools = {"scenarios": ("words", "turn start"), "dosage": ("words", "turn start"), "speakers": SPEAKER_POOLS}
    sets = {name: dummy(name, len(value), pools.get(name, ("words",))) for name, value in means.items()}
    valence = {name: (8.0 if k in range(3, 9) else 2.0) + 0.1 * k for k, name in enumerate(NAMES)}
    ratings = {name: (valence[name], 7.0 if k in (0, 1, 2, 6, 7, 8) else 2.0) for k, name in enumerate(NAMES)}
    corpus = Corpus(NAMES, stories, labels, (), scenarios, dosage, speakers, (), ratings, sets)
    calibration = moments(20)
    made = bank(means, labels, calibration, recipe or RECIPE, together=together)
    return Material(made, recipe, corpus, LAYERS, means, calibration, Options(**options), own_corpus=True)


def bank(
    means: dict[str, Tensor], labels: dict[str, Labels], calibration: dict[str, Moments], recipe: Recipe, *, together: bool = False
) -> Bank:
    """The bank that the recipe makes from all texts, at the layers above 0."""
    parts = [Texts(means[name][:, 0], labels[name].concept, labels[name].topic, LAYERS) for name in labels]
    made = remade(parts[0] + parts[1], NAMES, LAYERS[1:], recipe, calibration)
    layers = [replace(layer, residual_norm=10.0) for layer in made.values()]
    meta = {"model": "planted", "recipe": recipe.to_dict()}
    return Bank(layers, READ, (3,), FAMILIES, meta, readout=made.readout if together else None)
