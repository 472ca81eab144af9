"""What docs/custom.md and docs/stories.md claim is what the committed results say, and their examples run."""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
from banks import run_examples

from emovec.extraction import corpus
from emovec.extraction.words import named

ROOT = Path(__file__).parents[1]


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(ROOT / "bench")
    yield __import__
    for name in ("custom", "extract_scale", "heldout", "pages", "provenance"):
        sys.modules.pop(name, None)


def test_the_tables_of_a_new_concept(bench: Any) -> None:
    custom = bench("custom")
    found = custom.provenance.read("custom")
    page = custom.PAGE.read_text(encoding="utf-8")
    assert custom.pages.written(page, custom.tables(found["results"], found["provenance"]["name"])) == page


def test_what_the_page_says_of_the_new_concept(bench: Any) -> None:
    results = bench("provenance").read("custom")["results"]
    evidence, read = results["evidence"], results["read"]
    both, plain, mean = "sarcastic", "plain contrasts only", "against the corpus's mean"
    assert (evidence[both]["stories"], evidence[both]["topics"], evidence[both]["contrasts"]) == (20, 10, {"own text": 20})
    assert evidence[both]["p"] < 0.05
    # plain contrasts alone make a reader of praise, and one warning says so
    assert read[plain]["contrast"]["right"] == read[plain]["contrast"]["of"] == results["messages"] == 12
    assert evidence[plain]["accuracy"] == 1.0
    assert [said.split(" do as well")[0] for said in evidence[plain]["warnings"]] == ["the words alone (layer 0)"]
    assert read[plain]["sincere"]["p"] > 0.05
    assert read[plain]["scores"]["text"] - read[plain]["scores"]["sincere"] < 0.1
    assert "delighted" in dict(results["emotions"]["contrast"]["best"])
    # sincere ones help, and do not settle it
    assert read[both]["sincere"]["right"] > read[plain]["sincere"]["right"]
    assert read[both]["scores"]["text"] - read[both]["scores"]["sincere"] < 0.5
    assert evidence[both]["words"] >= evidence[both]["accuracy"]
    # without contrasts
    assert evidence[mean]["contrasts"] == {"mean": 10}
    assert evidence[mean]["accuracy"] == 1.0
    assert read[mean]["scores"]["sincere"] > read[mean]["scores"]["text"]


def test_the_table_of_the_scale(bench: Any) -> None:
    scale = bench("extract_scale")
    found = scale.provenance.read("extract_scale")
    page = scale.PAGE.read_text(encoding="utf-8")
    assert scale.pages.written(page, {"scale": scale.table(found["results"], found["provenance"]["name"])}) == page
    few, many = (next(row for row in found["results"]["rows"] if row["stories"] == size) for size in (2_000, 20_000))
    assert many["peak_mib"] - few["peak_mib"] < 0.05 * few["peak_mib"], "memory does not grow with the stories"


def test_the_example_stories_are_pairs_that_do_not_name_their_concept() -> None:
    for name, topics, each in (("sarcastic", 10, 2), ("sarcastic_messages", 12, 1)):
        pairs = list(corpus.pairs(ROOT / f"examples/{name}.jsonl")())
        assert len({pair.topic for pair in pairs}) == topics
        assert len({(pair.topic, pair.contrast) for pair in pairs}) == len(pairs) == topics * each
        for pair in pairs:
            assert pair.contrast is not None
            assert named(pair.text + pair.contrast, pair.emotion) == []
            assert 0.75 < len(pair.text.split()) / len(pair.contrast.split()) < 1.3


def test_the_examples_of_the_stories_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run_examples("stories.md")
    assert [json.loads(line)["text"][:9] for line in Path("stories.jsonl").read_text().splitlines()] == ["3 parrots"]


@pytest.mark.slow
def test_the_examples_of_the_page_of_new_concepts() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of two stories
        run_examples("custom.md")
