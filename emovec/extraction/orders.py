"""What stories are wanted: of which concepts, on which topics, and how a writer is asked for them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from emovec.bank_layer import check_names, shown
from emovec.extraction import corpus
from emovec.extraction.corpus import CorpusError

_PERSONS = ("first", "third")


@dataclass(frozen=True)
class Concept:
    """What to write about.

    Attributes:
        name: the concept.
        instruction: a sentence that says what the scene must show; default: that the main character feels or is so.
        plain: a sentence that says what the contrast must be like instead.
        synonyms: more words that must not occur, nor their families.
    """

    name: str
    instruction: str = ""
    plain: str = ""
    synonyms: tuple[str, ...] = ()


@dataclass(frozen=True)
class Order:
    """What is wanted.

    Attributes:
        concepts: what to write about.
        topics: identifier -> premise. Each concept is written on each.
        per_topic: stories of each concept on each topic.
        words: the fewest and the most of a story.
        contrast: whether each story gets a ``contrast``, the same scene without the concept.
        attempts: of a story, before it is given up.
        seed: of the sampling; None: a new one each time.
    """

    concepts: Sequence[Concept]
    topics: Mapping[str, str]
    per_topic: int = 1
    words: tuple[int, int] = (90, 150)
    contrast: bool = False
    attempts: int = 5
    seed: int | None = None

    def __post_init__(self) -> None:
        check_names(concept.name for concept in self.concepts)
        low, high = self.words
        if not 1 <= low <= high:
            raise ValueError(f"a story's words must be a range such as 90 to 150, got {low} to {high}")
        for name in ("per_topic", "attempts"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.topics:
            raise ValueError("no topics to write about")

    def tasks(self) -> Iterator[Task]:
        """Topic by topic, so that what is there when a run is cut short is as balanced as can be."""
        for number in range(self.per_topic):
            for index, topic in enumerate(self.topics):
                for concept in self.concepts:
                    # the person goes by topic, so that it cancels in the contrast between concepts as the topic does
                    yield Task(concept, topic, number, _PERSONS[(index + number) % 2])


@dataclass(frozen=True)
class Task:
    """One story to write."""

    concept: Concept
    topic: str
    number: int
    person: str

    @property
    def key(self) -> tuple[str, str, int]:
        return self.concept.name, self.topic, self.number


def concepts_of(source: str) -> list[Concept]:
    """Concepts from names with commas between, or from a file: JSON Lines of ``concept`` and, if wanted, ``instruction``,
    ``plain`` and ``synonyms``, or plain text with a name a line. ``emotions`` are emovec's 171.

    Raises:
        CorpusError: a line that is not so, named.
    """
    path = Path(source)
    if source == "emotions":
        return [Concept(name) for name in corpus.emotions()]
    if path.suffix == ".jsonl":
        return list(corpus.objects(path, _concept)())
    names = path.read_text(encoding="utf-8").splitlines() if path.is_file() else source.split(",")
    return [Concept(name.strip()) for name in names if name.strip()]


def topics_of(source: str | os.PathLike[str] | None = None) -> dict[str, str]:
    """Topics from a file: a JSON object of identifiers and premises, or plain text with a premise a line. Default: the ten of
    emovec's own stories."""
    path = corpus.shipped("topics.json") if source is None else Path(source)
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".json":
        return {line.strip(): line.strip() for line in text.splitlines() if line.strip()}
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CorpusError(f"{path}: not JSON: {error}") from None
    if not isinstance(found, dict) or not all(isinstance(value, str) and value.strip() for value in found.values()):
        raise CorpusError(f"{path}: topics are an object of identifiers and premises, got {shown(found)}")
    return {key: value for key, value in found.items() if source is not None or key.startswith("t")}


def _concept(item: Mapping[str, Any], where: str) -> Concept:
    for key, kind in {"instruction": str, "plain": str, "synonyms": list}.items():
        if not isinstance(item.get(key, kind()), kind):
            raise CorpusError(f"{key!r} must be {'text' if kind is str else 'a list of words'}, got {shown(item[key])}")
    name = corpus.text_of(item, "concept")
    return Concept(name.strip(), item.get("instruction", ""), item.get("plain", ""), tuple(map(str, item.get("synonyms", ()))))


# --- the prompts ----------------------------------------------------------------------------------------------------------


def story_prompt(task: Task, order: Order, reasons: Sequence[str] = ()) -> str:
    """What a writer is asked for; ``reasons`` are why earlier attempts were turned down."""
    concept, (low, high) = task.concept, order.words
    feels = "feels" if concept.name in corpus.emotions() else "is"
    lines = [
        f"Write a scene of {low} to {high} words, told in the {task.person} person. What it is about: {order.topics[task.topic]}.",
        concept.instruction or f"The main character {feels} {concept.name}. Let it show in what they do, say, notice and think.",
        f"The scene must not contain any form of these words: {', '.join((concept.name, *concept.synonyms))}.",
        "Answer with the scene alone: no title, no comment.",
    ]
    return "\n".join([*lines, *_about(reasons)])


def contrast_prompt(task: Task, order: Order, text: str, reasons: Sequence[str] = ()) -> str:
    """What is asked for after a story: the same without what makes the concept."""
    concept, (low, high) = task.concept, order.words
    plain = concept.plain or f"Nothing in it is {concept.name} any more; it is matter-of-fact."
    lines = [
        "Here is a scene:",
        text,
        "Write it again with the same people, place and events, in the same person and about as long, "
        f"{low} to {high} words, but with one difference. {plain}",
        f"It must not contain any form of these words: {', '.join((concept.name, *concept.synonyms))}.",
        "Answer with the scene alone: no title, no comment.",
    ]
    return "\n\n".join([*lines, *_about(reasons)])


def _about(reasons: Sequence[str]) -> list[str]:
    return [f"An earlier attempt was turned down ({reasons[-1]})."] if reasons else []
