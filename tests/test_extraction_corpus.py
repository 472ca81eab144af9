"""Reading stories, dialogues and prompts; what is wrong with one is named by file and line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import plain_extraction as plain
import pytest
import tiny

from emovec.extraction import CorpusError, corpus, extract

GOOD = '{"emotion": "calm", "text": "w1 w2"}\n'


def stories(path: Path, text: str | bytes) -> list[corpus.Story]:
    file = path / "stories.jsonl"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return list(corpus.stories(file)())


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not a line of JSON"),
        (b'{"emotion": "calm", "text": "\xff"}', "not a line of JSON"),
        ("[" * 100_000, "not a line of JSON"),
        ("[]", r"not an object but \[\]"),
        ('{"text": "w1"}', "no 'emotion'"),
        ('{"emotion": "calm"}', "no 'text'"),
        ('{"emotion": "calm", "text": 3}', "'text' must be text, got 3"),
        ('{"emotion": " ", "text": "w1"}', "'emotion' must be text, got ' '"),
    ],
)
def test_a_bad_line_is_named_by_its_number(tmp_path: Path, line: str | bytes, message: str) -> None:
    bad = line if isinstance(line, bytes) else line.encode()
    with pytest.raises(CorpusError, match=rf"stories.jsonl:3: {message}"):
        stories(tmp_path, GOOD.encode() + b"\n" + bad + b"\n")


def test_blank_lines_other_fields_and_spaces(tmp_path: Path) -> None:
    found = stories(tmp_path, GOOD + '\n  \n{"emotion": " at ease ", "text": "w3", "topic": 4, "person": "first"}')
    assert [(story.emotion, story.text, story.topic) for story in found] == [("calm", "w1 w2", ""), ("at ease", "w3", "4")]
    assert found[1].where.endswith("stories.jsonl:4")


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ({}, "'turns' must be a list of objects with role and content, got None"),
        ({"turns": []}, "'turns' must be a list"),
        ({"turns": ["hello"]}, "'turns' must be a list"),
        ({"turns": [{"role": "user"}]}, "no 'content'"),
        ({"turns": [{"role": "user", "content": ""}]}, "'content' must be text, got ''"),
    ],
)
def test_bad_dialogues(item: dict[str, Any], message: str) -> None:
    with pytest.raises(CorpusError, match=f"item 2: {message}"):
        list(corpus.dialogues([{"turns": [{"role": "user", "content": "hi"}]}, item])())


def test_bad_prompts() -> None:
    with pytest.raises(CorpusError, match="item 1: no 'content'"):
        list(corpus.prompts([{"text": "hi"}])())


def test_files_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match=r"none.jsonl: No such file"):
        list(corpus.stories(tmp_path / "none.jsonl")())
    with pytest.raises(CorpusError, match=r"the corpus has no file 'tales.jsonl'; it has .*stories.jsonl"):
        corpus.shipped("tales.jsonl")


def test_nothing_is_written_when_a_line_is_bad(tmp_path: Path) -> None:
    made = plain.Corpus()
    made.stories[3] = {"emotion": "emotion 0"}
    with pytest.raises(CorpusError, match="item 4: no 'text'"):
        extract(tiny.model(), plain.tokenizer(), *made.sources, out=tmp_path / "bank", resume=tmp_path / "state", progress=False)
    assert not list(tmp_path.iterdir())


def test_the_corpus_that_comes_with_emovec() -> None:
    names = corpus.emotions()
    assert len(names) == len(set(names)) == 171
    families = corpus.families()
    assert len(families) == 10
    assert sorted(name for members in families.values() for name in members) == sorted(names)
    found = list(corpus.stories(corpus.shipped("stories.jsonl"))())
    assert list(dict.fromkeys(story.emotion for story in found)) == names
    by_topic: dict[str, list[str]] = {}
    for story in found:
        by_topic.setdefault(story.topic, []).append(story.emotion)
    assert len(by_topic) == 10
    assert all(sorted(emotions) == sorted(names) for emotions in by_topic.values()), "topics cancel only if all are balanced"


def test_a_digest_is_of_what_is_said(tmp_path: Path) -> None:
    one = stories(tmp_path, GOOD)
    two = stories(tmp_path, '\n{"text":"w1 w2","emotion":"calm"}')
    three = stories(tmp_path, GOOD.replace("w2", "w3"))
    digests = [corpus.digest((story.emotion, story.text) for story in found) for found in (one, two, three)]
    assert digests[0] == digests[1] != digests[2]
