"""Does adding a direction do what its name says, and what does it cost?

Naming: how far the odds of the concept's own word move, against random directions of the same length and against the other
concepts' directions. Writing: text of the model's own under each direction is read back without steering, at a layer where nothing
was added, and searched for the words of the concept's family; the text is all that carries the feeling there. Cost: the loss on
neutral text, by dose, which bounds the strengths that leave the model able to write.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from emovec.evaluation.activations import means
from emovec.evaluation.causality_page import parts
from emovec.evaluation.labelled import remade
from emovec.evaluation.material import Material
from emovec.evaluation.reading import ranks_of, read
from emovec.evaluation.steered import Steered, Value, with_random
from emovec.evaluation.wordfamily import named
from emovec.extraction import corpus
from emovec.extraction.blocks import Blocks
from emovec.extraction.tokens import UNUSED, Tokens
from emovec.models import encode
from emovec.stats import against, mean_estimate, permutation_p, quantiles, share_estimate, slopes

__all__ = ["parts", "result", "usable"]

WORDS = ("happy", "inspired", "loving", "proud", "calm", "desperate", "angry", "guilty", "sad", "afraid", "nervous", "surprised")
SUBJECTS = ("Anna", "Tom", "the nurse", "my neighbour")
FRAMES = (
    "How does {x} feel? {X} feels",
    "Here is {x}, back from work. How does {x} feel this evening? {X} feels",
    "Q: How does {x} feel today?\nA: {X} feels",
)
CHAT = ("How does {x} feel?", "{X} feels")
PROMPTS = (
    "Write two sentences about a morning in a small town.",
    "Tell me about your day.",
    "Describe what somebody sees from a train window.",
    "Write the first lines of a letter to a friend.",
    "What is it like to wait for an answer?",
    "Continue: The door opened, and",
)
DOSE = 0.25  # the unit of dose, in strength summed over the steered layers
NAMING = (-2, -1, 0, 1, 2)
WRITING = (1, 2)
COST = (-4, -2, -1, 1, 2, 4)
LIMIT = 0.405  # nats per token: perplexity half as much again
RANDOM = 20
NEW_TOKENS = 32
TEXTS, LENGTH, SKIP = 6, 20, 4  # neutral texts, their tokens, and how many of these are not counted


def result(material: Material) -> dict[str, Any]:
    """Naming, writing, cost, and the usable strengths."""
    bank, quick = material.bank, material.options.quick
    count = 8 if quick else RANDOM
    steering = with_random(bank, count, material.generator("causality.random"))
    steered = Steered(material.model, material.tokenizer, steering, force=material.force, advance=material.advance)
    unit = DOSE / len(bank.steer_layers)
    chosen = [name for name in WORDS if name in bank.names]
    chosen += [name for name in bank.names if name not in chosen][: len(WORDS) - len(chosen)]
    random = [f"random {number}" for number in range(count)]
    found: dict[str, Any] = {"layers": list(bank.steer_layers), "unit": unit, "random": count, "words": chosen}
    found["naming"] = _naming(material, steered, chosen, random, unit)
    found["writing"] = _writing(material, steered, chosen, random[:12], unit)
    found |= _cost(material, steered, chosen if quick else list(bank.names), random, unit)
    return found


def _under(name: str, dose: float) -> Value:
    return {name: dose} if dose else {}


# --- naming ---------------------------------------------------------------------------------------------------------------


def frames(tokenizer: Any) -> list[list[str]]:
    """Texts to go on from, for each frame one for each subject; the last frame is a chat, if the model knows any."""
    frames = list(FRAMES)
    if tokenizer.chat_template is not None:
        question = [{"role": "user", "content": CHAT[0]}]
        frames.append(tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True) + CHAT[1])
    return [[frame.replace("{x}", x).replace("{X}", x[0].upper() + x[1:]) for x in SUBJECTS] for frame in frames]


def _naming(material: Material, steered: Steered, words: Sequence[str], random: Sequence[str], unit: float) -> dict[str, Any]:
    tokens = {word: ids[0] for word in words if len(ids := material.tokenizer(f" {word}", add_special_tokens=False)["input_ids"]) == 1}
    if len(tokens) < 3:
        return {"skipped": f"{len(tokens)} of the words {', '.join(words)} are single tokens of this model; three are needed"}
    named_words, texts = list(tokens), frames(material.tokenizer)
    everyone, dosed = [*named_words, *random], [step for step in NAMING if step]
    values = [{}, *(_under(name, step * unit) for name in everyone for step in dosed)]
    flat = [text for frame in texts for text in frame]
    asked = steered.next_tokens(flat, values, list(tokens.values()))
    moved = asked[1:].reshape(len(everyone), len(dosed), *asked.shape[1:])
    log_p = torch.stack([moved[:, dosed.index(step)] if step else asked[0].expand_as(moved[:, 0]) for step in NAMING], 1)
    odds = log_odds_among(log_p).reshape(-1, len(NAMING), len(texts), len(SUBJECTS), len(tokens))  # [V, S, F, X, W]
    strengths = torch.tensor([step * unit for step in NAMING], dtype=torch.float64)
    slope = slopes(strengths, odds.movedim(1, -1)) * unit  # [V, F, X, W], per unit of dose
    matrix, null = slope[: len(named_words)].mean((1, 2)), slope[len(named_words) :].mean((1, 2))
    per_word: dict[str, Any] = {}
    for row, word in enumerate(named_words):
        own, generator = slope[row, :, :, row], material.generator(f"causality.naming.{word}")
        rows, columns = (
            torch.arange(size).reshape(shape).expand_as(own).flatten() for size, shape in ((len(own), (-1, 1)), (own.shape[1], (1, -1)))
        )
        estimate = mean_estimate(own.flatten(), (rows, columns), material.options.samples, generator)
        curve = odds[row, :, :, :, row].mean((1, 2))
        per_word[word] = {
            "slope": estimate,
            "p": permutation_p(estimate["value"], null[:, row].abs()),
            "random": [round(value, 4) for value in null[:, row].tolist()],
            "place": int((matrix[:, row] >= matrix[row, row]).sum()),
            "curve": (curve - curve[NAMING.index(0)]).tolist(),
        }
    generator = material.generator("causality.naming")
    shuffled = torch.stack(
        [matrix[torch.randperm(len(matrix), generator=generator)].diagonal().mean() for _ in range(material.options.permutations)]
    )
    mean = mean_estimate(matrix.diagonal(), (torch.arange(len(matrix)),), material.options.samples, generator)
    beyond = [part["slope"]["low"] > 0 and part["p"] <= 1 / (1 + len(random)) + 1e-9 for part in per_word.values()]
    return {
        "doses": [step * unit for step in NAMING],
        "texts": len(flat),
        "words": per_word,
        "passed": share_estimate(torch.tensor(beyond)) | {"hits": sum(beyond)},
        "mean_slope": mean
        | {
            "null": {
                "other directions": against(mean["value"], shuffled),
                "random": against(mean["value"], _random_means(null, generator, material)),
            }
        },
        "matrix": {word: dict(zip(named_words, line, strict=True)) for word, line in zip(named_words, matrix.tolist(), strict=True)},
    }


def _random_means(null: Tensor, generator: torch.Generator, material: Material) -> Tensor:
    """Mean |slope| over the words [n], each word moved by a random direction drawn for it."""
    drawn = torch.randint(len(null), (material.options.permutations, null.shape[1]), generator=generator)
    return null.abs().gather(0, drawn).mean(1)


def log_odds_among(log_p: Tensor) -> Tensor:
    """Log-odds of each of the W words of ``log_p`` [..., W] against the others: which is named, whether or not one is."""
    words = log_p.shape[-1]
    others = log_p.unsqueeze(-2).expand(*log_p.shape[:-1], words, words).masked_fill(torch.eye(words, dtype=torch.bool), -torch.inf)
    return log_p - others.logsumexp(-1)


# --- writing --------------------------------------------------------------------------------------------------------------


def _writing(material: Material, steered: Steered, words: Sequence[str], random: Sequence[str], unit: float) -> dict[str, Any]:
    """Text under each direction, read back unsteered."""
    values = [_under(name, step * unit) for name in [*words, *random] for step in WRITING]
    written = steered.written(PROMPTS, [{}, *values], NEW_TOKENS)
    texts = [[material.tokenizer.decode(ids, skip_special_tokens=True) for ids in row] for row in written]
    base, rest = texts[0], [texts[1 + start : 1 + start + len(WRITING)] for start in range(0, len(values), len(WRITING))]
    scores, layers = _read_back(material, written, words)
    told: dict[str, Any] = {
        "doses": [step * unit for step in WRITING],
        "prompts": list(PROMPTS),
        "readers": layers,
        "new_tokens": NEW_TOKENS,
    }
    told["read"] = {which: _read_result(material, value, len(words), which) for which, value in scores.items()}
    told["words"] = _word_lists(material, rest, base, words)
    told["texts"] = {"": base} | {
        name: dict(zip(map(str, WRITING), part, strict=True)) for name, part in zip([*words, *random], rest, strict=True)
    }
    return told


def _read_back(material: Material, written: list[list[list[int]]], words: Sequence[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Scores [D, S, P, W] of the answers at a layer that was not steered and at layer 0, less the unsteered answer's; and the layers.

    Each answer is read after its prompt, by a model that nothing is added to; only its own tokens count.
    """
    asked = [encode(material.tokenizer, prompt)["input_ids"][0].tolist() for prompt in PROMPTS]
    answers = [(prompt, ids) for row in written for prompt, ids in zip(asked, row, strict=True)]
    rows = [row for row, (_, ids) in enumerate(answers) if ids]
    texts = [Tokens(prompt + ids, [UNUSED] * len(prompt) + [0] * len(ids)) for prompt, ids in answers if ids]
    free = [layer for layer in material.layers if layer not in material.bank.steer_layers]
    above = min(free, key=lambda layer: (abs(layer - material.bank.read_layer), -layer))
    wanted = sorted({0, above})
    found = means(Blocks(material.model, wanted), texts)[:, 0]
    scores = {}
    for layer in wanted:
        if material.recipe is None or not set(words) <= set(material.corpus.names):
            continue
        bank = remade(material.everything(), material.corpus.names, (layer,), material.recipe, material.moments)
        whole = torch.full((len(answers), len(bank.names)), torch.nan, dtype=torch.float64)
        whole[rows] = read(bank, {layer: found[:, wanted.index(layer)]}, "generated")
        chosen = whole[:, [bank.resolve(word) for word in words]].reshape(len(written), -1, len(words))
        difference = (chosen[1:] - chosen[0]).nan_to_num(0.0)  # where nothing was written nothing is shown
        scores["layer 0" if layer == 0 else "held-out layer"] = difference.reshape(-1, len(WRITING), *difference.shape[1:])
    return scores, {"held-out layer": above, "layer 0": 0}


def _read_result(material: Material, scores: Tensor, count: int, which: str) -> dict[str, Any]:
    """At each dose: how much higher a concept reads in its own texts, against other concepts' texts and random directions' texts."""
    found = {}
    for step in range(len(WRITING)):
        here = scores[:, step].mean(1)  # [D, W], over the prompts
        own, random = here[:count], here[count:]
        generator = material.generator(f"causality.read.{which}.{step}")
        estimate = mean_estimate(own.diagonal(), (torch.arange(count),), material.options.samples, generator)
        shuffled = torch.stack(
            [own[torch.randperm(count, generator=generator)].diagonal().mean() for _ in range(material.options.permutations)]
        )
        drawn = torch.randint(len(random), (material.options.permutations, count), generator=generator)
        nulls = {"other directions": shuffled, "random": random.gather(0, drawn).mean(1)}
        first = ranks_of(own.T.contiguous(), torch.arange(count)) == 1
        found[str(WRITING[step])] = {
            "own": estimate | {"null": {name: against(estimate["value"], null) for name, null in nulls.items()}},
            "first": share_estimate(first) | {"chance": 1 / count},
            "by_word": [round(value, 4) for value in own.diagonal().tolist()],
        }
    return found


def _word_lists(material: Material, texts: list[list[list[str]]], base: list[str], words: Sequence[str]) -> dict[str, Any]:
    """The share of texts with a word of the concept's family, under its own direction, other families' and random ones."""
    family = {name: members for members in material.bank.families.values() for name in members}
    lists = {word: family.get(word, (word,)) for word in words}

    def holds(word: str, text: str) -> bool:
        return any(named(member, text) for member in lists[word])

    found = {}
    for step, dose in enumerate(WRITING):
        own = [holds(word, text) for row, word in enumerate(words) for text in texts[row][step]]
        other = [
            holds(word, text)
            for row, word in enumerate(words)
            for column, steered_to in enumerate(words)
            if column != row and steered_to not in lists[word]
            for text in texts[column][step]
        ]
        random = [holds(word, text) for word in words for part in texts[len(words) :] for text in part[step]]
        shares = {
            name: share_estimate(torch.tensor(hits)) for name, hits in (("own", own), ("other families", other), ("random", random)) if hits
        }
        found[str(dose)] = shares | {"unsteered": share_estimate(torch.tensor([holds(word, text) for word in words for text in base]))}
    return found


# --- cost -----------------------------------------------------------------------------------------------------------------


def neutral_texts(tokenizer: Any) -> Tensor:
    """[T, S] token ids: the beginnings of answers in neutral dialogues, of different kinds."""
    answers = [turns[-1]["content"] for turns in corpus.dialogues(corpus.shipped("neutral.jsonl"))()]
    found = [ids[:LENGTH] for answer in answers if len(ids := tokenizer(answer)["input_ids"]) >= LENGTH]
    return torch.tensor(found[:: max(1, len(found) // TEXTS)][:TEXTS])


def _cost(material: Material, steered: Steered, names: Sequence[str], random: Sequence[str], unit: float) -> dict[str, Any]:
    texts = neutral_texts(material.tokenizer)
    everyone = [*names, *random]
    values = [_under(name, step * unit) for name in everyone for step in COST]
    base = steered.losses(texts, [{}], SKIP)[0]
    cost = (steered.losses(texts, values, SKIP) - base).reshape(len(everyone), len(COST), -1)  # [names, doses, texts]
    doses = [step * unit for step in COST]
    generator = material.generator("causality.cost")
    draws = torch.randint(len(base), (min(200, material.options.samples), len(base)), generator=generator)
    ranges = {name: _range(doses, cost[row], draws) for row, name in enumerate(everyone)}
    spread = cost.mean(2)
    return {
        "cost": {
            "doses": doses,
            "texts": len(base),
            "tokens": (LENGTH - SKIP) * len(base),
            "unsteered": float(base.mean()),
            "limit": LIMIT,
            "by_name": {name: [round(value, 4) for value in spread[row].tolist()] for row, name in enumerate(everyone)},
            "concepts": [_spread(spread[: len(names), column]) for column in range(len(doses))],
            "random": [_spread(spread[len(names) :, column]) for column in range(len(doses))],
        },
        "usable": {name: ranges[name]["range"] for name in names},
        "usable_interval": {name: ranges[name]["interval"] for name in names},
        "usable_random": {name: ranges[name]["range"] for name in random},
        "tested": [min(doses), max(doses)],
    }


def _spread(values: Tensor) -> dict[str, float]:
    low, high = quantiles(values)
    return {"median": float(values.median()), "low": low, "high": high}


def _range(doses: Sequence[float], cost: Tensor, draws: Tensor) -> dict[str, Any]:
    """The usable strengths of one direction from its cost [doses, texts], and 95 % intervals of both ends over the texts."""
    ends = torch.tensor([usable(doses, cost[:, draw].mean(1).tolist()) for draw in draws])
    return {"range": usable(doses, cost.mean(1).tolist()), "interval": [list(quantiles(ends[:, side])) for side in (0, 1)]}


def usable(doses: Sequence[float], cost: Sequence[float], limit: float = LIMIT) -> list[float]:
    """The strengths [lowest, highest] around zero at which the cost, taken as straight between doses, first reaches ``limit``.

    Where it does not, the largest dose that was tried.
    """
    ends = []
    for sign in (-1, 1):
        points = [(0.0, 0.0), *sorted(((abs(dose), value) for dose, value in zip(doses, cost, strict=True) if dose * sign > 0))]
        end = points[-1][0]
        for (near, below), (far, above) in pairwise(points):
            if above > limit:
                end = near + (far - near) * (limit - below) / (above - below)
                break
        ends.append(round(sign * end, 5))
    return ends
