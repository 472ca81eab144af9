"""Stories as a stream: from Parquet, from data sets, from any iterable; none is kept, however many there are."""

from __future__ import annotations

import json
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import plain_extraction as plain
import pyarrow as arrow
import pyarrow.parquet as parquet
import pytest
import tiny

from emovec.bank import Bank
from emovec.extraction import CorpusError, Extraction, Recipe, corpus, extract, tokens
from emovec.extraction.tokens import WINDOW

CORPUS = plain.Corpus((5, 4, 6))


def bank(stories: Any, **options: Any) -> Bank:
    return extract(tiny.model(), plain.tokenizer(), stories, CORPUS.neutral, CORPUS.ordinary, skip=8, progress=False, **options)


def written(path: Path, rows: list[dict[str, Any]], group: int = 4) -> Path:
    parquet.write_table(arrow.Table.from_pylist(rows), path, row_group_size=group)
    return path


def test_a_parquet_file_gives_the_same_bank(tmp_path: Path) -> None:
    rows = [{**story, "person": "first", "number": number} for number, story in enumerate(CORPUS.stories)]
    assert bank(written(tmp_path / "stories.parquet", rows)) == bank(CORPUS.stories)


def test_parquet_and_json_lines_go_together(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(story) + "\n" for story in CORPUS.stories[:7]))
    assert bank([tmp_path / "a.jsonl", written(tmp_path / "b.pq", CORPUS.stories[7:])]) == bank(CORPUS.stories)


def test_dialogues_in_parquet(tmp_path: Path) -> None:
    path = written(tmp_path / "neutral.parquet", CORPUS.neutral)
    assert list(corpus.dialogues(path)()) == list(corpus.dialogues(CORPUS.neutral)())


def test_a_data_set_of_datasets_gives_the_same_bank() -> None:
    datasets = pytest.importorskip("datasets")
    made = datasets.Dataset.from_list(CORPUS.stories)
    assert bank(made) == bank(CORPUS.stories)
    assert bank(made.to_iterable_dataset()) == bank(CORPUS.stories)


def test_a_generator_can_be_read_once_and_is_kept() -> None:
    assert bank(story for story in CORPUS.stories) == bank(CORPUS.stories)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"emotion": "calm", "text": "w1"}, {"emotion": None, "text": "w1"}], r"stories.parquet: row 2: no 'emotion'"),
        ([{"emotion": "calm", "words": "w1"}], r"stories.parquet: row 1: no 'text'"),
        ([{"emotion": 3, "text": "w1"}], r"stories.parquet: row 1: 'emotion' must be text, got 3"),
    ],
)
def test_a_bad_row_is_named(tmp_path: Path, rows: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(CorpusError, match=message):
        list(corpus.stories(written(tmp_path / "stories.parquet", rows))())


def test_files_that_are_not_parquet(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match=r"none.parquet: No such file"):
        list(corpus.stories(tmp_path / "none.parquet")())
    whole = written(tmp_path / "whole.parquet", CORPUS.stories).read_bytes()
    for content in (b"", b"rubbish", whole[: len(whole) // 2]):
        (tmp_path / "bad.parquet").write_bytes(content)
        with pytest.raises(CorpusError, match=r"bad.parquet: not a readable Parquet file"):
            list(corpus.stories(tmp_path / "bad.parquet")())


def test_without_pyarrow_it_says_what_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = written(tmp_path / "stories.parquet", CORPUS.stories)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(ModuleNotFoundError, match=r"emovec\[parquet\]"):
        list(corpus.stories(path)())


class Item(dict[str, Any]):
    """A story that can be watched."""

    __slots__ = ("__weakref__",)


class Watched:
    """As many stories as wanted, made when they are asked for; knows how many are alive at most."""

    def __init__(self, count: int) -> None:
        self.count, self.alive, self.most = count, 0, 0

    def __iter__(self) -> Iterator[Item]:
        for number in range(self.count):
            item = Item(CORPUS.stories[number % len(CORPUS.stories)])
            self.alive += 1
            self.most = max(self.most, self.alive)
            weakref.finalize(item, self._gone)
            yield item

    def _gone(self) -> None:
        self.alive -= 1


def test_no_story_is_kept() -> None:
    """Neither by the plan nor by the pass."""
    stories = Watched(3 * WINDOW)
    model = tiny.fresh(num_hidden_layers=1)
    job = Extraction(model, plain.tokenizer(), stories, CORPUS.neutral, CORPUS.ordinary, recipe=Recipe(skip=8), progress=False)
    assert job.plan.stories == 3 * WINDOW
    assert 1 <= stories.most <= 2, "the plan keeps none"
    job.run()
    assert 1 <= stories.most <= 2, "nor does the pass"


def test_of_tokens_a_window_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    alive, most = 0, 0

    class Tokens(tokens.Tokens):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            nonlocal alive, most
            alive += 1
            most = max(most, alive)
            weakref.finalize(self, gone)

    def gone() -> None:
        nonlocal alive
        alive -= 1

    monkeypatch.setattr(tokens, "Tokens", Tokens)
    model = tiny.fresh(num_hidden_layers=1)
    job = Extraction(model, plain.tokenizer(), Watched(3 * WINDOW), CORPUS.neutral, CORPUS.ordinary, recipe=Recipe(skip=8), progress=False)
    assert 1 <= most <= 4, "the plan keeps none"
    job.run()
    assert WINDOW <= most <= WINDOW + 4, "the pass keeps what it sorts by length"


def test_the_estimate_is_of_all_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """At a pretended second a pass, of which the second is timed."""
    job = Extraction(tiny.model(), plain.tokenizer(), *CORPUS.sources, recipe=Recipe(skip=8), progress=False, batch_tokens=100)
    passes = []
    monkeypatch.setattr(job.blocks, "run", passes.append)
    monkeypatch.setattr("emovec.extraction.run.time.monotonic", lambda: float(len(passes)))
    assert job.estimate() == pytest.approx(job.plan.tokens / passes[0].tokens)
    assert len(passes) == 2
