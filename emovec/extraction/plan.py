"""What there is to do before any of it is done: the texts of an extraction, read once and checked."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

from emovec.bank_layer import check_names, unknown
from emovec.extraction import corpus
from emovec.extraction.calibrate import texts_of
from emovec.extraction.corpus import CorpusError, Source, Story
from emovec.extraction.recipe import Recipe
from emovec.extraction.tokens import PROMPT, UNUSED, Tokens, dialogue_tokens, prompt_tokens, story_tokens


@dataclass(frozen=True)
class Plan:
    """What an extraction will do, known before it starts.

    Attributes:
        names: the concepts.
        stories: stories that are used.
        short: stories left out because they have no token after the skip.
        stories_per_concept: the fewest and the most that a concept has.
        story_tokens: tokens of the stories that are used.
        tokens: tokens of all passes.
        digest: a hash of all stories' tokens and concepts.
        layers: the layers extracted.
        bytes: memory for the sums, on the devices where the layers are; it does not depend on the number of stories.
    """

    names: tuple[str, ...]
    stories: int
    short: int
    stories_per_concept: tuple[int, int]
    story_tokens: int
    tokens: int
    digest: str
    layers: tuple[int, ...] = ()
    bytes: int = 0


class Texts:
    """The stories, dialogues and prompts of an extraction as tokens. Stories are read afresh each time, never kept.

    Args:
        tokenizer: the model's.
        recipe: how stories are written and what is skipped.
        stories: as :func:`emovec.extraction.extract` takes them; None: those that come with emovec.
        neutral: likewise.
        ordinary: likewise.
    """

    def __init__(self, tokenizer: Any, recipe: Recipe, stories: Source | None, neutral: Source | None, ordinary: Source | None) -> None:
        self._tokenizer, self._recipe = tokenizer, recipe
        self._stories = corpus.stories(corpus.shipped("stories.jsonl") if stories is None else stories)
        self.dialogues = list(corpus.dialogues(corpus.shipped("neutral.jsonl") if neutral is None else neutral)())
        self.prompts = list(corpus.prompts(corpus.shipped("ordinary.jsonl") if ordinary is None else ordinary)())

    def stories(self, names: Sequence[str]) -> Iterator[Tokens]:
        """The stories that are used, labelled by the index of their concept."""
        label = {name: index for index, name in enumerate(names)}
        return filter(usable, (self._tokens(story, label[story.emotion]) for story in self._stories()))

    def neutral(self) -> Iterable[Tokens]:
        """The dialogues to denoise by, if the recipe does."""
        return (dialogue_tokens(self._tokenizer, turns) for turns in self.dialogues if self._recipe.denoise)

    def words(self) -> Iterable[Tokens]:
        """The words of the prompts to level readers by, if the recipe does."""
        return (prompt_tokens(self._tokenizer, turns).only(PROMPT) for turns in self.prompts if self._recipe.levels)

    def calibration(self) -> Iterable[Tokens]:
        """The prompts and dialogues to calibrate by."""
        return texts_of(self._tokenizer, self.prompts, self.dialogues)

    def plan(self, names: Sequence[str] | None, max_tokens: int | None) -> Plan:
        """Read everything once, so that what is wrong with it is known before anything is computed or written.

        Raises:
            CorpusError: a bad line, named; a concept without stories that are long enough; a text longer than ``max_tokens``.
        """
        known = None if names is None else check_names(names)
        used: Counter[str] = Counter()
        short: Counter[str] = Counter()
        tokens = 0

        def said() -> Iterator[Any]:
            nonlocal tokens
            for story in self._stories():
                if known is not None and story.emotion not in known:
                    raise CorpusError(f"{story.where}: {unknown(story.emotion, known)}")
                text = self._tokens(story)
                _check_length(text, story.where, max_tokens)
                if usable(text):
                    used[story.emotion] += 1
                    tokens += len(text.ids)
                else:
                    short[story.emotion] += 1
                yield story.emotion, text.ids

        digest = corpus.digest(said())
        found = check_names(dict.fromkeys([*used, *short])) if known is None else known
        for name in found:
            if not used[name]:
                too_short = f"its {short[name]} stories are no longer than the {self._recipe.skip} tokens skipped"
                raise CorpusError(f"empty emotion {name!r}: {too_short if short[name] else 'it has no stories'}")
        if len(found) < 2:
            raise CorpusError(f"a contrast needs two emotions at least, got {list(found)}")
        if self._recipe.readers == "whitened" and max(used.values()) < 2:
            raise CorpusError("whitened readers need two stories of some emotion, to see how they vary; readers=None does without")
        extra = 0
        for number, text in enumerate(self.calibration(), start=1):
            where = f"prompt {number}" if number <= len(self.prompts) else f"dialogue {number - len(self.prompts)}"
            _check_length(text, where, max_tokens)
            extra += len(text.ids)
        extra += sum(len(text.ids) for text in chain(self.neutral(), self.words()))
        each = (min(used.values()), max(used.values()))
        return Plan(found, used.total(), short.total(), each, tokens, tokens + extra, digest)

    def _tokens(self, story: Story, label: int = 0) -> Tokens:
        recipe = self._recipe
        chat = recipe.format == "chat"
        return story_tokens(self._tokenizer, story.text, skip=recipe.skip, share=recipe.skip_share, chat=chat, label=label)


def usable(text: Tokens) -> bool:
    """Whether a story has a token after the skip."""
    return any(kind != UNUSED for kind in text.kinds)


def _check_length(text: Tokens, where: str, limit: int | None) -> None:
    if limit is not None and len(text.ids) > limit:
        raise CorpusError(f"{where} has {len(text.ids)} tokens, more than the {limit} that the model takes")
