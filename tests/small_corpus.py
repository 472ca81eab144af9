"""A corpus of made-up words in place of the one that comes with emovec, a tokenizer that knows them, and a bank made from them."""

from __future__ import annotations

import functools
import json
import random
from pathlib import Path
from typing import Any

import plain_extraction as plain
import pytest
import tiny
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from emovec.bank import Bank
from emovec.extraction import corpus, extract

FAMILIES = {"Fear": ["afraid", "panicked"], "Peace": ["calm", "serene"], "Joy": ["happy", "cheerful"]}
NAMES = [name for members in FAMILIES.values() for name in members]
MARKS = plain.MARKS[2:]
WORDS = [f"w{number}" for number in range(tiny.VOCAB - len(plain.MARKS) - len(NAMES))]
OWN = 6  # words that a concept has to itself


def tokenizer(*, side: str = "left", chat: bool = True) -> PreTrainedTokenizerFast:
    """One token a word; concepts are words too."""
    known = {word: index for index, word in enumerate([*plain.MARKS, *NAMES, *WORDS])}
    made = Tokenizer(models.WordLevel(known, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="<|end|>", pad_token="<pad>", unk_token="<unk>", padding_side=side
    )
    fast.chat_template = plain.CHAT if chat else None
    return fast


def text(draw: random.Random, name: str | None, length: int) -> str:
    """Words of which a third are the concept's own."""
    row = NAMES.index(name) if name else len(NAMES)
    own, shared = WORDS[row * OWN : (row + 1) * OWN], WORDS[(len(NAMES) + 1) * OWN :]
    return " ".join(draw.choice(own if draw.random() < 0.34 else shared) for _ in range(length))


def write(directory: Path) -> None:
    """All files of the shipped corpus, small."""
    draw = random.Random(0)
    directory.mkdir(exist_ok=True)

    def put(name: str, items: list[dict[str, Any]]) -> None:
        (directory / name).write_text("".join(json.dumps(item) + "\n" for item in items), encoding="utf-8")

    def told(topics: list[str], length: int) -> list[dict[str, Any]]:
        return [{"emotion": name, "topic": topic, "text": text(draw, name, length)} for topic in topics for name in NAMES]

    def turns(user: str | None, assistant: str | None) -> list[dict[str, str]]:
        return [{"role": "user", "content": text(draw, user, 9)}, {"role": "assistant", "content": text(draw, assistant, 26)}]

    put("stories.jsonl", told(["t1", "t2", "t3", "t4"], 30))
    put("messages.jsonl", told(["m1", "m2"], 18))
    put("neutral.jsonl", [{"turns": turns(None, None)} for _ in range(8)])
    put("ordinary.jsonl", [{"content": text(draw, None, 10)} for _ in range(12)])
    put("scenarios.jsonl", [{"id": f"{name}-{n}", "target": name, "content": text(draw, name, 12)} for name in NAMES for n in range(2)])
    dose = {"values": [1, 2, 3, 4, 5, 6, 7], "rises": ["afraid"], "falls": ["calm"]}
    put("dosage.jsonl", [{"id": f"d{n}", "template": text(draw, None, 4) + " w{x} " + text(draw, None, 4), **dose} for n in range(2)])
    pairs = [(one, other) for one in NAMES for other in NAMES[:2] if one != other]
    put(
        "speakers.jsonl",
        [{"id": f"s{n}", "user_emotion": u, "assistant_emotion": a, "turns": turns(u, a)} for n, (u, a) in enumerate(pairs)],
    )
    rows = [f"{name},{8 - n % 7},{2 + n % 5},5" for n, name in enumerate(NAMES)]
    (directory / "ratings.csv").write_text("\n".join(["word,valence,arousal,dominance", *rows]) + "\n")
    (directory / "emotions.txt").write_text("\n".join(NAMES) + "\n")
    (directory / "families.json").write_text(json.dumps(FAMILIES))


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The small corpus in place of emovec's own."""
    write(tmp_path / "corpus")
    monkeypatch.setattr(corpus, "SHIPPED", tmp_path / "corpus")
    return tmp_path


def bank(**options: Any) -> Bank:
    """The bank that the tiny model and the corpus in place make; call it where :func:`small` is used."""
    return _bank(str(corpus.SHIPPED), tuple(options.items()))


@functools.cache
def _bank(directory: str, options: tuple[tuple[str, Any], ...]) -> Bank:
    files = [Path(directory) / name for name in ("stories.jsonl", "messages.jsonl")]
    settings = {
        "layers": [1, 2],
        "read_layer": 2,
        "steer_layers": [1, 2],
        "skip": 4,
        "skip_share": 0.33,
        "progress": False,
        **dict(options),
    }
    return extract(tiny.model(), tokenizer(), files, names=NAMES, **settings)
