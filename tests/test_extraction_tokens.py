"""Which tokens of a text are used, and how texts become batches."""

from __future__ import annotations

import plain_extraction as plain
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from emovec.extraction.corpus import CorpusError
from emovec.extraction.tokens import (
    GENERATED,
    PROMPT,
    TURN_START,
    UNUSED,
    Tokens,
    batches,
    dialogue_tokens,
    prompt_tokens,
    story_tokens,
)

TURNS = [{"role": "system", "content": "w1"}, {"role": "user", "content": " w2 w3 "}, {"role": "assistant", "content": "w3 w2"}]


def words(text: Tokens, kind: int) -> list[str]:
    return [[*plain.MARKS, *plain.WORDS][token] for token, found in zip(text.ids, text.kinds, strict=True) if found == kind]


@pytest.mark.parametrize("chat", [True, False])
def test_dialogues(chat: bool) -> None:
    text = dialogue_tokens(plain.tokenizer(chat=chat), TURNS)
    assert words(text, PROMPT) == ["w1", "w2", "w3"]
    assert words(text, GENERATED) == ["w3", "w2"]
    assert text.kinds[0] == UNUSED


@pytest.mark.parametrize("chat", [True, False])
def test_prompts(chat: bool) -> None:
    text = prompt_tokens(plain.tokenizer(chat=chat), TURNS[1:2])
    assert words(text, PROMPT) == ["w2", "w3"]
    assert words(text, TURN_START) == ["<|assistant|>" if chat else "assistant:"]
    assert text.kinds[-1] == TURN_START


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_story_is_used_from_the_token_after_the_skip(side: str) -> None:
    story = " ".join(plain.WORDS[:60])
    assert words(story_tokens(plain.tokenizer(side=side), story, skip=50, chat=False), PROMPT) == plain.WORDS[50:60]
    assert words(story_tokens(plain.tokenizer(side=side, bos=True), story, skip=50, chat=False), PROMPT) == plain.WORDS[49:60]
    assert words(story_tokens(plain.tokenizer(side=side), story, skip=50, chat=True), PROMPT) == plain.WORDS[50:60]
    assert words(story_tokens(plain.tokenizer(), story, skip=60, chat=False), PROMPT) == []


@pytest.mark.parametrize("chat", [True, False])
def test_no_more_than_a_share_is_skipped(chat: bool) -> None:
    for length, first in ((60, 20), (59, 19), (200, 50), (2, 0)):
        story = (plain.WORDS * 2)[:length]
        assert words(story_tokens(plain.tokenizer(), " ".join(story), skip=50, share=1 / 3, chat=chat), PROMPT) == story[first:]


def test_the_same_words_twice_belong_to_their_own_turns() -> None:
    turns = [{"role": role, "content": "w5"} for role in ("user", "assistant", "user")]
    assert [kind for kind in dialogue_tokens(plain.tokenizer(), turns).kinds if kind != UNUSED] == [PROMPT, GENERATED, PROMPT]


def test_a_template_that_changes_the_words() -> None:
    tokenizer = plain.tokenizer()
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] | upper }}{% endfor %}"
    with pytest.raises(CorpusError, match="the chat template does not repeat the words of the user's turn 'w2 w3'"):
        dialogue_tokens(tokenizer, TURNS[1:])


def test_a_slow_tokenizer() -> None:
    class Slow:
        is_fast = False

    with pytest.raises(TypeError, match="needs a fast tokenizer; Slow is not"):
        dialogue_tokens(Slow(), TURNS)


@given(lengths=st.lists(st.integers(1, 30), min_size=1, max_size=40), limit=st.integers(1, 100))
def test_batches_hold_every_text_once(lengths: list[int], limit: int) -> None:
    texts = [Tokens(list(range(2, length + 2)), [PROMPT] * length, label) for label, length in enumerate(lengths)]
    seen: dict[int, list[int]] = {}
    for batch in batches(texts, limit):
        assert batch.ids.numel() <= limit or len(batch.ids) == 1
        assert batch.tokens == int(batch.mask.sum())
        assert torch.equal(batch.mask.bool(), batch.kinds != UNUSED)
        assert bool((batch.mask.diff(dim=1) <= 0).all()), "padding is on the right"
        for row, label in enumerate(batch.labels.tolist()):
            seen[label] = batch.ids[row][batch.mask[row].bool()].tolist()
    assert seen == {text.label: text.ids for text in texts}


def test_copies_of_a_batch_are_kept_by_device() -> None:
    batch = next(batches([Tokens([1, 2], [0, 0])], 10))
    assert batch.to(torch.device("cpu")) is batch
    assert batch.to(torch.device("meta")) is batch.to(torch.device("meta"))
