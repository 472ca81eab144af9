"""From texts to batches of tokens, each token marked with what it is to be used for."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from emovec.bank_layer import KINDS, shown
from emovec.extraction.corpus import CorpusError, Turns

UNUSED = -1
PROMPT, TURN_START, GENERATED = range(len(KINDS))
WINDOW = 512  # texts sorted by length at a time; a longer window saves no more padding

PLAIN_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
"""How a dialogue is written for a model without a chat template."""


@dataclass(frozen=True)
class Tokens:
    """One text: its token ids, the kind of each (``UNUSED`` or an index into ``KINDS``), and a label (an emotion's index)."""

    ids: list[int]
    kinds: list[int]
    label: int = 0

    def only(self, kind: int) -> Tokens:
        """The same text, of which tokens of one kind are used."""
        return replace(self, kinds=[own if own == kind else UNUSED for own in self.kinds])


@dataclass(frozen=True)
class Batch:
    """B texts padded on the right to T tokens, on the CPU.

    Padding is always on the right, whatever the tokenizer's side: real tokens then keep their positions, and causal
    attention never sees the padding.
    """

    ids: Tensor
    mask: Tensor
    kinds: Tensor
    labels: Tensor
    _copies: dict[torch.device, Batch] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, texts: list[Tokens]) -> Batch:
        length = max(len(text.ids) for text in texts)

        def padded(rows: Iterable[list[int]], fill: int) -> Tensor:
            return torch.tensor([row + [fill] * (length - len(row)) for row in rows])

        return cls(
            ids=padded((text.ids for text in texts), 0),
            mask=padded(([1] * len(text.ids) for text in texts), 0),
            kinds=padded((text.kinds for text in texts), UNUSED),
            labels=torch.tensor([text.label for text in texts]),
        )

    @cached_property
    def tokens(self) -> int:
        """Real tokens."""
        return int(self.mask.sum())

    def to(self, device: torch.device) -> Batch:
        """The batch on ``device``; copied once, however many layers are there."""
        if device == self.ids.device:
            return self
        if device not in self._copies:
            ids, mask, kinds, labels = (part.to(device, non_blocking=True) for part in (self.ids, self.mask, self.kinds, self.labels))
            self._copies[device] = Batch(ids, mask, kinds, labels)
        return self._copies[device]


def batches(texts: Iterable[Tokens], batch_tokens: int) -> Iterator[Batch]:
    """Batches of at most ``batch_tokens`` tokens, padding included, of texts of like length; the longest of a window come first."""
    stream = iter(texts)
    while window := list(islice(stream, WINDOW)):
        window.sort(key=lambda text: len(text.ids), reverse=True)
        while window:
            size = max(1, batch_tokens // len(window[0].ids))
            yield Batch.of(window[:size])
            window = window[size:]


def story_tokens(tokenizer: Any, text: str, *, skip: int, share: float = 1.0, chat: bool = False, label: int = 0) -> Tokens:
    """A story's tokens; all but the first ``skip`` of them, though at most a ``share``, are used.

    Raw: the skip counts the tokens as the model gets them, a beginning-of-sequence token included. Chat: the story is a
    user's message, and the skip counts from its own first token; the template's tokens are not used.
    """
    if chat:
        ids, inside = _rendered(tokenizer, [{"role": "user", "content": text}], generation_prompt=False)
        positions = [position for position, role in enumerate(inside) if role is not None]
    else:
        ids = tokenizer(text)["input_ids"]
        positions = list(range(len(ids)))
    kinds = [UNUSED] * len(ids)
    for position in positions[min(skip, int(share * len(positions))) :]:
        kinds[position] = PROMPT
    return Tokens(ids, kinds, label)


def dialogue_tokens(tokenizer: Any, turns: Turns) -> Tokens:
    """A dialogue's tokens: what the assistant says is ``generated``, what others say is ``prompt``; the template's are unused."""
    ids, inside = _rendered(tokenizer, turns, generation_prompt=False)
    kind = {None: UNUSED, "assistant": GENERATED}
    return Tokens(ids, [kind.get(role, PROMPT) for role in inside])


def prompt_tokens(tokenizer: Any, turns: Turns) -> Tokens:
    """A prompt's tokens, up to where the assistant would answer; the last one is ``turn_start``."""
    ids, inside = _rendered(tokenizer, turns, generation_prompt=True)
    kinds = [UNUSED if role is None else PROMPT for role in inside]
    kinds[-1] = TURN_START
    return Tokens(ids, kinds)


def _rendered(tokenizer: Any, turns: Turns, *, generation_prompt: bool) -> tuple[list[int], list[str | None]]:
    """Token ids of a dialogue in the tokenizer's chat template, and for each token the role whose words it is part of."""
    if not getattr(tokenizer, "is_fast", False):
        raise TypeError(f"telling a dialogue's words from its template needs a fast tokenizer; {type(tokenizer).__name__} is not")
    plain = tokenizer.chat_template is None
    options = {"chat_template": PLAIN_TEMPLATE} if plain else {}
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=generation_prompt, **options)
    encoded = tokenizer(text, add_special_tokens=plain, return_offsets_mapping=True)
    inside: list[str | None] = [None] * len(encoded["input_ids"])
    token = cursor = 0
    offsets = encoded["offset_mapping"]
    for turn in turns:
        words = turn["content"].strip()
        start = text.find(words, cursor)
        if start < 0:
            raise CorpusError(f"the chat template does not repeat the words of the {turn['role']}'s turn {shown(words)}")
        cursor = start + len(words)
        while token < len(offsets) and offsets[token][1] <= start:
            token += 1
        while token < len(offsets) and offsets[token][0] < cursor:
            inside[token] = turn["role"]
            token += 1
    return encoded["input_ids"], inside
