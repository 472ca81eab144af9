"""Do directions carry over to topics, and to a register, they were not made from? `python bench/heldout.py`

For every layer: made from all topics of the stories but two and all premises of the messages but one, and tested on those, five
times, so that every text is tested once. A text is given to the concept that reads highest on its mean activation, scores centred
within its topic. Activations are computed once; of each text its means at all layers are kept. Beside each figure stands what
chance, shuffled labels and layer 0 (hardly more than the words) give. Then the same with one register alone, tested on the other,
which nothing was made from; and with layers read together, as a bank's readout does: the mean of their scores, each in units of its
deviation on ordinary prompts. Last the same as a monitor reads, which has no topics to centre in: about the mean of ordinary prompts.

Writes bench/results/heldout.json and the tables of docs/extraction.md; with `--tables` the tables alone, from the results there are.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pages
import provenance
import torch
from torch import Tensor

from emovec.evaluation.activations import means
from emovec.evaluation.labelled import Moments, Texts, derived, within_topics
from emovec.extraction import corpus
from emovec.extraction.blocks import Blocks
from emovec.extraction.recipe import Derived, Recipe
from emovec.extraction.sums import NeutralMoments
from emovec.extraction.tokens import PROMPT, batches, dialogue_tokens, prompt_tokens, story_tokens
from emovec.models import load_model, residual_width

PAGE = pages.DOCS / "extraction.md"
MODEL = "smollm2-135m-instruct"
RECIPE = Recipe(skip_share=0.33)  # that of the shipped bank
SHOWN = (0, 3, 6, 9, 12, 15, 18, 21, 24, 27, 29)  # layers in the page's table; all are in the results
PERCENT = ("top1", "top5", "family")
SETS = ((15,), (18,), (21,), (15, 18, 21), (12, 15, 18, 21, 24), (9, 12, 15, 18, 21, 24, 27))  # of layers that are read together
MADE_OF = (("stories", "messages"), ("stories",), ("messages",))


@dataclass(frozen=True)
class Study:
    """All there is to train and test on. The messages once as they stand, and once as users' turns in the chat template, to test on."""

    stories: Texts
    messages: Texts
    turns: Texts
    moments: Mapping[str, Moments]
    """Of the tokens of neutral dialogues and of ordinary prompts' words."""


# --- activations ----------------------------------------------------------------------------------------------------------


def study(device: str | None) -> Study:
    """Run the model over all texts once."""
    model, tokenizer = load_model(MODEL, device=device)
    blocks = Blocks(model)
    stories, messages, turns = (
        texts(blocks, tokenizer, file, chat=chat)
        for file, chat in (("stories.jsonl", False), ("messages.jsonl", False), ("messages.jsonl", True))
    )
    return Study(stories, messages, turns, moments(blocks, tokenizer, residual_width(model), stories))


def moments(blocks: Blocks, tokenizer: Any, width: int, near: Texts) -> dict[str, Moments]:
    about = {layer: near.means[:, layer].double().mean(0).to(blocks.device) for layer in blocks.layers}
    dialogues = (dialogue_tokens(tokenizer, said) for said in corpus.dialogues(corpus.shipped("neutral.jsonl"))())
    prompts = (prompt_tokens(tokenizer, said).only(PROMPT) for said in corpus.prompts(corpus.shipped("ordinary.jsonl"))())
    found = {}
    for name, stream in (("neutral_tokens", dialogues), ("prompt", prompts)):
        sums = NeutralMoments(width, blocks.layers, about, dialogues=False)
        blocks.over(batches(stream, 2048), sums)
        parts = ([part(layer).cpu() for layer in blocks.layers] for part in (sums.mean, sums.covariance))
        found[name] = Moments(*map(torch.stack, parts), int(sums.at("count")), blocks.layers)
    return found


def texts(blocks: Blocks, tokenizer: Any, file: str, *, chat: bool) -> Texts:
    found = list(corpus.stories(corpus.shipped(file))())
    names, topics = corpus.emotions(), sorted({story.topic for story in found})
    tokens = [story_tokens(tokenizer, story.text, skip=RECIPE.skip, share=RECIPE.skip_share, chat=chat) for story in found]
    labels = torch.tensor([names.index(story.emotion) for story in found])
    return Texts(means(blocks, tokens)[:, 0], labels, torch.tensor([topics.index(story.topic) for story in found]))


# --- figures --------------------------------------------------------------------------------------------------------------


def made_from(train: Texts, layer: int, data: Study, recipe: Recipe = RECIPE) -> Derived:
    """Directions and readers of one layer, by the recipe that makes banks."""
    return derived(train, layer, len(corpus.emotions()), recipe, data.moments)


def centred_scores(onto: Tensor, test: Texts, layer: int) -> Tensor:
    """[N, K], less their mean within each topic."""
    scores = test.at(layer) @ onto.T
    for topic in test.topics.unique():
        here = test.topics == topic
        scores[here] -= scores[here].mean(0)
    return scores


def rates(scores: Tensor, test: Texts) -> Tensor:
    """Top-1, top-5 and family accuracy [3] of scores [N, K]."""
    order = scores.argsort(1, descending=True)
    hits = order == test.labels[:, None]
    families = family_of_each()
    found = (hits[:, 0], hits[:, :5].any(1), families[order[:, 0]] == families[test.labels])
    return torch.stack([hit.double().mean() for hit in found])


def family_of_each() -> Tensor:
    """[K], the index of each concept's family."""
    families = list(corpus.families().values())
    return torch.tensor([next(index for index, members in enumerate(families) if name in members) for name in corpus.emotions()])


def folds(data: Study) -> list[tuple[Tensor, Tensor]]:
    """Which stories and which messages are held out: two topics and one premise at a time."""
    return [(data.stories.among([2 * fold, 2 * fold + 1]), data.messages.among([fold])) for fold in range(5)]


def both(made: Derived, test: Texts, layer: int) -> dict[str, Tensor]:
    """Top-1, top-5 and family accuracy [3] of directions and of readers, centred within topics."""
    assert made.readers is not None
    return {which: rates(centred_scores(getattr(made, which), test, layer), test) for which in ("directions", "readers")}


def summary(found: Sequence[Tensor]) -> dict[str, Any]:
    """Mean over the folds, and their lowest and highest top-1."""
    stacked = torch.stack(list(found))
    result: dict[str, Any] = {key: round(value, 4) for key, value in zip(PERCENT, stacked.mean(0).tolist(), strict=True)}
    return result | {"top1_range": [round(float(stacked[:, 0].min()), 4), round(float(stacked[:, 0].max()), 4)]}


def heldout(
    data: Study,
    layer: int,
    made_of: Sequence[str] = ("stories", "messages"),
    recipe: Recipe = RECIPE,
    *,
    shuffled: bool = False,
) -> dict[str, dict[str, Any]]:
    """Accuracy on held-out stories and messages (as users' turns), of directions and of readers, by fold and then summed up."""
    found: dict[str, dict[str, list[Tensor]]] = {}
    for fold, (stories, messages) in enumerate(folds(data)):
        parts = {"stories": data.stories.where(~stories), "messages": data.messages.where(~messages)}
        if shuffled:
            parts = {name: within_topics(part, seed=fold) for name, part in parts.items()}
        train = parts[made_of[0]]
        for name in made_of[1:]:
            train = train + parts[name]
        made = made_from(train, layer, data, recipe)
        for name, test in (("stories", data.stories.where(stories)), ("messages", data.turns.where(messages))):
            for which, value in both(made, test, layer).items():
                found.setdefault(name, {}).setdefault(which, []).append(value)
    return {name: {which: summary(values) for which, values in kinds.items()} for name, kinds in found.items()}


def together(data: Study, layers: Sequence[int], recipe: Recipe = RECIPE, *, centred: bool = True) -> dict[str, dict[str, Any]]:
    """Accuracy on held-out texts of the readers of ``layers`` together; by what they are made from and what they are tested on.

    Centred within the tested topics, or, as a monitor has to, about the mean of ordinary prompts.
    """
    found: dict[str, dict[str, list[Tensor]]] = {}
    for stories, messages in folds(data):
        parts = {"stories": data.stories.where(~stories), "messages": data.messages.where(~messages)}
        tests = {"stories": data.stories.where(stories), "messages": data.turns.where(messages)}
        for names in MADE_OF:
            train = parts[names[0]] if len(names) == 1 else parts["stories"] + parts["messages"]
            scores = {name: torch.zeros(len(test.labels), len(corpus.emotions()), dtype=torch.float64) for name, test in tests.items()}
            for layer in layers:
                readers = made_from(train, layer, data, recipe).readers
                assert readers is not None
                ordinary = data.moments["prompt"].baseline(layer, readers)
                for name, test in tests.items():
                    read = centred_scores(readers, test, layer) if centred else test.at(layer) @ readers.T - ordinary.mean
                    scores[name] += read / ordinary.std
            for name, test in tests.items():
                found.setdefault(" and ".join(names), {}).setdefault(name, []).append(rates(scores[name], test))
    return {made: {name: summary(values) for name, values in tested.items()} for made, tested in found.items()}


def across(found: dict[str, dict[str, Any]]) -> float:
    """Mean top-1 on the register that nothing was made from."""
    return float(found["stories"]["messages"]["top1"] + found["messages"]["stories"]["top1"]) / 2


def fewest(sets: Sequence[dict[str, Any]]) -> list[int]:
    """The layers to read together: each costs a pass over the stream, so no more than are worth it."""
    highest = max(across(each["found"]) for each in sets)
    found: list[int] = min((each["layers"] for each in sets if across(each["found"]) > highest - 0.01), key=len)
    return found


def learning(data: Study, layer: int) -> list[dict[str, Any]]:
    """The last two topics as read by what was made from the first two, four, six and all eight others."""
    test = data.stories.where(data.stories.among([8, 9]))
    rows = []
    for count in (2, 4, 6, 8):
        made = made_from(data.stories.where(data.stories.among(list(range(count)))), layer, data)
        rows.append({"topics": count} | {which: summary([value]) for which, value in both(made, test, layer).items()})
    return rows


def variants(data: Study, layer: int) -> dict[str, Any]:
    """Other recipes at one layer."""
    changed = {
        "as shipped": RECIPE,
        "without denoising": replace(RECIPE, denoise=None),
        "shrinkage 0.1": replace(RECIPE, shrinkage=0.1),
        "shrinkage 0.3": replace(RECIPE, shrinkage=0.3),
        "shrinkage 0.7": replace(RECIPE, shrinkage=0.7),
        "shrinkage 0.9": replace(RECIPE, shrinkage=0.9),
        "not levelled": replace(RECIPE, level=False),
    }
    return {name: heldout(data, layer, recipe=recipe) for name, recipe in changed.items()}


def as_read(data: Study, layers: Sequence[int]) -> dict[str, Any]:
    """Layers together, centred as a monitor has to, by levelled readers and by others; and by the words alone."""
    plain = replace(RECIPE, level=False)
    return {
        "levelled": together(data, layers, centred=False),
        "not levelled": together(data, layers, plain, centred=False),
        "levelled, layer 0": together(data, (0,), centred=False),
        "not levelled, layer 0": together(data, (0,), plain, centred=False),
    }


def best(layers: Sequence[dict[str, Any]]) -> int:
    """The layer to read at: readers and directions on both registers count alike."""

    def mean(row: dict[str, Any]) -> float:
        return sum(row["both"][test][which]["top1"] for test in ("stories", "messages") for which in ("directions", "readers")) / 4

    return int(max(layers, key=mean)["layer"])


def measured(data: Study) -> dict[str, Any]:
    layers = []
    for layer in range(data.stories.means.shape[1]):
        layers.append({"layer": layer, "both": heldout(data, layer), "stories_only": heldout(data, layer, ("stories",))})
        found = layers[-1]["both"]["stories"]
        print(f"layer {layer:2}: directions {found['directions']['top1']:.3f}, readers {found['readers']['top1']:.3f}", flush=True)
    chosen = best(layers)
    sets = [{"layers": list(each), "found": together(data, each)} for each in SETS]
    families = torch.bincount(family_of_each()).double() / len(corpus.emotions())
    return {
        "model": MODEL,
        "recipe": RECIPE.to_dict(),
        "texts": {"stories": len(data.stories.labels), "messages": len(data.messages.labels), "folds": len(folds(data))},
        "chance": {"top1": round(1 / 171, 4), "top5": round(5 / 171, 4), "family": round(float((families**2).sum()), 4)},
        "chosen": {
            "layer": chosen,
            "rule": "highest top-1, mean of directions and readers on held-out stories and held-out messages",
            "read_together": fewest(sets),
            "rule_together": "fewest layers within 0.01 of the highest top-1 on the register that nothing was made from, mean of both ways",
        },
        "layers": layers,
        "together": sets,
        "words_alone": together(data, (0,)),
        "as_read": as_read(data, fewest(sets)),
        "shuffled": heldout(data, chosen, shuffled=True),
        "messages_only": heldout(data, chosen, ("messages",)),
        "learning": learning(data, chosen),
        "variants": variants(data, chosen),
    }


# --- the page -------------------------------------------------------------------------------------------------------------


def tables(results: dict[str, Any], machine: str) -> dict[str, str]:
    """The tables of docs/extraction.md by name."""
    chosen = results["chosen"]["layer"]

    def three(found: dict[str, Any]) -> str:
        return " / ".join(f"{found[key]:.2f}" for key in PERCENT)

    def row(name: str, found: dict[str, dict[str, Any]]) -> str:
        cells = [three(found[test][which]) for test in ("stories", "messages") for which in ("directions", "readers")]
        return f"| {name} | {' | '.join(cells)} |"

    def table(first: str, rows: Iterable[str]) -> list[str]:
        head = f"| {first} | stories: directions | stories: readers | messages: directions | messages: readers |"
        return [head, "|---|---|---|---|---|", *rows]

    def name(layer: int) -> str:
        return f"**{layer}**" if layer == chosen else "0 (hardly more than the words)" if layer == 0 else str(layer)

    def across_registers(title: str, found: dict[str, dict[str, Any]]) -> str:
        cells = [three(found["stories and messages"][test]) for test in ("stories", "messages")]
        cells += [three(found["stories"]["messages"]), three(found["messages"]["stories"])]
        return f"| {title} | {' | '.join(cells)} |"

    def of_set(layers: list[int], found: dict[str, dict[str, Any]]) -> str:
        title = name(0) if layers == [0] else ", ".join(map(str, layers))
        return across_registers(f"**{title}**" if layers == results["chosen"]["read_together"] else title, found)

    shown = [found for found in results["layers"] if found["layer"] in {*SHOWN, chosen}]
    chance = " / ".join(f"{results['chance'][key]:.3f}" for key in PERCENT)
    others = [row("shuffled labels", results["shuffled"]), f"| chance | {' | '.join([chance] * 4)} |"]
    parts = {
        "layers": table("layer", [*(row(name(found["layer"]), found["both"]) for found in shown), *others]),
        "registers": table(
            "made from",
            [
                row("stories and messages", results["layers"][chosen]["both"]),
                row("stories", results["layers"][chosen]["stories_only"]),
                row("messages", results["messages_only"]),
                row("stories, layer 0", results["layers"][0]["stories_only"]),
            ],
        ),
        "together": [
            "| read at | made from both: stories | messages | from stories: messages | from messages: stories |",
            "|---|---|---|---|---|",
            *(of_set(each["layers"], each["found"]) for each in results["together"]),
            of_set([0], results["words_alone"]),
        ],
        "as read": [
            "| readers | made from both: stories | messages | from stories: messages | from messages: stories |",
            "|---|---|---|---|---|",
            *(across_registers(f"**{title}**" if title == "levelled" else title, found) for title, found in results["as_read"].items()),
        ],
        "variants": table("recipe", [row(name, found) for name, found in results["variants"].items()]),
        "learning": [
            "| topics | directions | readers |",
            "|---|---|---|",
            *(f"| {found['topics']} | {three(found['directions'])} | {three(found['readers'])} |" for found in results["learning"]),
        ],
    }
    source = f"Top-1 / top-5 / family. Measured by `python bench/heldout.py` on {machine}; more in bench/results/heldout.json."
    return {key: "\n".join([*lines, "", source]) for key, lines in parts.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", action="store_true", help="write the page's tables from the results there are")
    parser.add_argument("--device")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if not options.tables:
        provenance.write("heldout", measured(study(options.device)))
    found = provenance.read("heldout")
    new = tables(found["results"], found["provenance"]["name"])
    print("\n\n".join(new.values()))
    pages.write(PAGE, new)


if __name__ == "__main__":
    main()
