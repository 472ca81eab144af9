"""The texts of an evaluation as tokens, each marked with the pools that its activations are averaged in."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from emovec.bank_layer import shown
from emovec.extraction import corpus
from emovec.extraction.corpus import CorpusError, Story
from emovec.extraction.recipe import Recipe
from emovec.extraction.tokens import GENERATED, PROMPT, TURN_START, UNUSED, Tokens, dialogue_tokens, prompt_tokens, story_tokens

FOLDS = 5


@dataclass(frozen=True)
class TextSet:
    """Texts that are run together. The kind of a token is the index of its pool, or ``UNUSED``."""

    name: str
    texts: tuple[Tokens, ...]
    pools: tuple[str, ...] = ("words",)

    @property
    def tokens(self) -> int:
        return sum(len(text.ids) for text in self.texts)

    @property
    def digest(self) -> str:
        return corpus.digest([self.name, self.pools, *([text.ids, text.kinds] for text in self.texts)])


@dataclass(frozen=True)
class Labels:
    """What is known of each labelled text.

    Attributes:
        concept: [N], an index into the names.
        topic: [N], its topic's index within its register.
        fold: [N], the fold that its topic is held out in.
    """

    concept: Tensor
    topic: Tensor
    fold: Tensor


@dataclass(frozen=True)
class Corpus:
    """All that an evaluation reads: what the texts say, and the sets of tokens to run.

    Attributes:
        names: the concepts of the bank that have labelled texts on several topics; labels are indices into these.
        stories: register -> its stories, those of ``names`` only.
        labels: register -> their labels.
        left_out: why concepts of the bank are not in ``names``, for the report.
        scenarios, dosage, speakers: the items of the evaluation sets, as far as their concepts are in the bank.
        others: labelled texts by other writers, if there are any.
        ratings: concept -> (valence, arousal).
        sets: the texts to run.
    """

    names: tuple[str, ...]
    stories: Mapping[str, Sequence[Story]]
    labels: Mapping[str, Labels]
    left_out: tuple[str, ...]
    scenarios: Sequence[Mapping[str, Any]]
    dosage: Sequence[Mapping[str, Any]]
    speakers: Sequence[Mapping[str, Any]]
    others: Sequence[Story]
    ratings: Mapping[str, tuple[float, float]]
    sets: Mapping[str, TextSet] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """A hash of all that the results can depend on."""
        said = [[story.emotion, story.topic, story.text] for stories in self.stories.values() for story in stories]
        items = [list(map(dict, part)) for part in (self.scenarios, self.dosage, self.speakers)]
        return corpus.digest([self.names, said, items, self.ratings, *(part.digest for part in self.sets.values())])


def load(
    tokenizer: Any,
    concepts: Sequence[str],
    recipe: Recipe | None,
    *,
    stories: Sequence[str | os.PathLike[str]] | None = None,
    others: str | os.PathLike[str] | None = None,
    norms: str | os.PathLike[str] | None = None,
    quick: bool = False,
) -> Corpus:
    """Read everything and turn it into tokens, so that what is wrong with it is known before anything is computed.

    Args:
        tokenizer: the model's.
        concepts: those of the bank.
        recipe: how labelled texts are cut; None: as by default.
        stories: files of labelled texts, a register each; default: those that come with emovec, its messages tested as users' turns.
        others: a file of labelled texts by other writers.
        norms: a table of ``word,valence,arousal``; default: the ratings that come with emovec.
        quick: use half of the topics.

    Raises:
        CorpusError: naming the file and what is wrong.
    """
    recipe = recipe or Recipe(skip_share=0.33)
    files = {"stories": corpus.shipped("stories.jsonl"), "messages": corpus.shipped("messages.jsonl")}
    if stories is not None:
        files = {Path(path).stem: Path(path) for path in stories}
        if len(files) < len(stories):
            raise CorpusError(f"two files of labelled texts have the same name in {', '.join(map(str, stories))}")
    found = {name: list(corpus.stories(path)()) for name, path in files.items()}
    if quick:
        found = {name: _half(part) for name, part in found.items()}
    names, left_out = _usable(concepts, found)
    kept = {name: [story for story in part if story.emotion in set(names)] for name, part in found.items()}

    def cut(text: str, *, chat: bool) -> Tokens:
        return story_tokens(tokenizer, text, skip=recipe.skip, share=recipe.skip_share, chat=chat)

    sets = [TextSet(name, tuple(cut(story.text, chat=recipe.format == "chat") for story in part)) for name, part in kept.items()]
    if stories is None:
        sets.append(TextSet("turns", tuple(cut(story.text, chat=recipe.format != "chat") for story in kept["messages"])))
    written = list(corpus.stories(others)()) if others is not None else []
    if unknown := sorted({story.emotion for story in written} - set(concepts)):
        raise CorpusError(f"{others}: the bank has no concept {', '.join(map(shown, unknown[:5]))}")
    if written:
        sets.append(TextSet("others", tuple(cut(story.text, chat=recipe.format == "chat") for story in written)))
    scenarios = _items("scenarios.jsonl", lambda item: item["target"] in concepts)
    dosage = _items("dosage.jsonl", lambda item: set(item["rises"] + item["falls"]) <= set(concepts))
    speakers = _items("speakers.jsonl", lambda item: {item["user_emotion"], item["assistant_emotion"]} <= set(concepts))
    asked = [item["content"] for item in scenarios]
    doses = [item["template"].format(x=value) for item in dosage for value in item["values"]]
    prompts = [turns[0]["content"] for turns in corpus.prompts(corpus.shipped("ordinary.jsonl"))()]
    dialogues = list(corpus.dialogues(corpus.shipped("neutral.jsonl"))())
    for name, contents in (("scenarios", asked), ("dosage", doses), ("ordinary", prompts)):
        sets.append(TextSet(name, tuple(_prompt(tokenizer, content) for content in contents), ("words", "turn start")))
    sets.append(TextSet("neutral", tuple(_dialogue(tokenizer, turns) for turns in dialogues), ("others", "assistant")))
    sets.append(TextSet("speakers", tuple(_speakers(tokenizer, item["turns"]) for item in speakers), SPEAKER_POOLS))
    return Corpus(
        names=names,
        stories=kept,
        labels={name: _labels(part, names) for name, part in kept.items()},
        left_out=left_out,
        scenarios=scenarios,
        dosage=dosage,
        speakers=speakers,
        others=written,
        ratings=ratings(norms),
        sets={part.name: part for part in sets if part.texts},
    )


# --- labelled texts -------------------------------------------------------------------------------------------------------


def _half(stories: Sequence[Story]) -> list[Story]:
    topics = sorted({story.topic for story in stories})
    kept = set(topics[: max(2, len(topics) // 2)])
    return [story for story in stories if story.topic in kept]


def _usable(concepts: Sequence[str], registers: Mapping[str, Sequence[Story]]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The concepts with texts on two topics or more of every register, and what is the matter with the others."""
    topics = {name: {concept: set[str]() for concept in concepts} for name in registers}
    for name, stories in registers.items():
        for story in stories:
            if story.emotion in topics[name]:
                topics[name][story.emotion].add(story.topic)
    poor = {concept: [name for name in registers if len(topics[name][concept]) < 2] for concept in concepts}
    names = tuple(concept for concept in concepts if not poor[concept])
    left_out = tuple(f"{concept}: fewer than two topics in {', '.join(where)}" for concept, where in poor.items() if where)
    if len(names) < 2:
        raise CorpusError(
            f"labelled texts on two topics or more are there for {len(names)} of the bank's {len(concepts)} concepts; two are needed"
        )
    return names, left_out


def _labels(stories: Sequence[Story], names: Sequence[str]) -> Labels:
    row = {name: index for index, name in enumerate(names)}
    topics = {topic: index for index, topic in enumerate(sorted({story.topic for story in stories}))}
    topic = torch.tensor([topics[story.topic] for story in stories])
    return Labels(torch.tensor([row[story.emotion] for story in stories]), topic, folds_of(len(topics))[topic])


def folds_of(topics: int) -> Tensor:
    """The fold [topics] of each topic: neighbours go together, up to ``FOLDS`` folds of like size."""
    folds = min(FOLDS, topics)
    return torch.arange(topics) * folds // topics


# --- other texts ----------------------------------------------------------------------------------------------------------

SPEAKER_POOLS = ("user's words", "user's last token", "before the answer", "assistant's words")
_USER, _USER_LAST, _BEFORE, _ASSISTANT = range(len(SPEAKER_POOLS))


def _prompt(tokenizer: Any, content: str) -> Tokens:
    found = prompt_tokens(tokenizer, [{"role": "user", "content": content}])
    return _mapped(found, {PROMPT: 0, TURN_START: 1})


def _dialogue(tokenizer: Any, turns: list[dict[str, str]]) -> Tokens:
    return _mapped(dialogue_tokens(tokenizer, turns), {PROMPT: 0, GENERATED: 1})


def _speakers(tokenizer: Any, turns: list[dict[str, str]]) -> Tokens:
    """The last exchange of a dialogue: the user's words, the last token before the answer, the assistant's words."""
    whole = dialogue_tokens(tokenizer, turns)
    start = len(prompt_tokens(tokenizer, turns[:-1]).ids)
    found = _mapped(whole, {PROMPT: _USER, GENERATED: _ASSISTANT})
    kinds = [kind if kind != _ASSISTANT or position >= start else UNUSED for position, kind in enumerate(found.kinds)]
    kinds[start - 1] = _BEFORE
    last = max(position for position, kind in enumerate(kinds) if kind == _USER)
    kinds[last] = _USER_LAST
    return Tokens(found.ids, kinds)


def _mapped(text: Tokens, pools: Mapping[int, int]) -> Tokens:
    return Tokens(text.ids, [pools.get(kind, UNUSED) for kind in text.kinds])


def _items(name: str, wanted: Any) -> list[dict[str, Any]]:
    import json

    lines = corpus.shipped(name).read_text(encoding="utf-8").splitlines()
    return [item for item in map(json.loads, lines) if wanted(item)]


def ratings(path: str | os.PathLike[str] | None = None) -> dict[str, tuple[float, float]]:
    """Valence and arousal by word, from a table with these columns; whatever else it holds is ignored.

    Raises:
        CorpusError: a column is missing, or a value is not a number; names the line.
    """
    file = corpus.shipped("ratings.csv") if path is None else Path(path)
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise CorpusError(f"{file}: {error}") from None
    rows = csv.DictReader(text.splitlines())
    columns = {name.strip().lower(): name for name in rows.fieldnames or ()}
    if missing := [name for name in ("word", "valence", "arousal") if name not in columns]:
        raise CorpusError(f"{file}: no column {', '.join(map(shown, missing))}; it has {', '.join(map(shown, rows.fieldnames or ()))}")
    found = {}
    for number, row in enumerate(rows, start=2):
        try:
            pair = float(row[columns["valence"]]), float(row[columns["arousal"]])
        except (TypeError, ValueError):
            raise CorpusError(f"{file}:{number}: valence and arousal must be numbers, got {shown(dict(row))}") from None
        found[row[columns["word"]].strip()] = pair
    return found


def chunks(texts: Sequence[Tokens], size: int) -> Iterable[Sequence[Tokens]]:
    return (texts[start : start + size] for start in range(0, len(texts), size))
