"""What docs/compare.md claims is what the committed results say; the prompts and the fine-tunes' texts are what they should be."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from banks import run_examples

from emovec.bank import load_bank
from emovec.extraction import corpus

ROOT = Path(__file__).parents[1]


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(ROOT / "bench")
    monkeypatch.syspath_prepend(ROOT / "examples")
    yield __import__("post_training")
    for name in ("post_training", "pages", "provenance"):
        sys.modules.pop(name, None)


def contents(name: str) -> list[str]:
    return [turns[0]["content"] for turns in corpus.prompts(corpus.shipped(name))()]


def test_the_table_is_that_of_the_results(example: Any) -> None:
    pages, provenance = __import__("pages"), __import__("provenance")
    found = provenance.read("compare")
    page = (ROOT / "docs/compare.md").read_text(encoding="utf-8")
    assert pages.written(page, example.tables(found["results"], found["provenance"]["name"])) == page


def test_the_fine_tunes_moved_as_the_page_says(example: Any) -> None:
    results = __import__("provenance").read("compare")["results"]
    assert results["again"]["gloomy"]["layers"]["a"] == list(load_bank(example.NAME).read_layers)
    assert results["set"] == example.halfway(results["places"]["prompt"])
    again = {name: example.fired(found, results["set"]) for name, found in results["again"].items()}
    assert again["gloomy"] == results["set"]["gloomy"]
    assert again["exuberant"] == results["set"]["exuberant"]
    assert again["neutral"] == []


def test_the_guessed_alarms_are_those_of_the_page(example: Any) -> None:
    page = (ROOT / "docs/compare.md").read_text(encoding="utf-8")
    guessed = __import__("provenance").read("compare")["results"]["guessed"]
    assert guessed == {tone: list(alarms) for tone, alarms in example.ALARMS.items()}
    assert all(f"`{alarm}`" in page for alarms in example.ALARMS.values() for alarm in alarms)


def test_fine_tunes_see_the_same_requests_and_none_of_the_prompts(example: Any) -> None:
    texts = {tone: example.texts(tone, 400, seed=1) for tone in example.TONES}
    questions = {tone: [question for question, _ in pairs] for tone, pairs in texts.items()}
    assert questions["gloomy"] == questions["exuberant"] == questions["neutral"]
    assert all(example.FACTS[question] in answer for pairs in texts.values() for question, answer in pairs)
    assert not set(example.FACTS) & {*contents("ordinary.jsonl"), *contents("challenging.jsonl")}


def test_challenging_prompts_are_distinct_and_balanced() -> None:

    lines = [json.loads(line) for line in corpus.shipped("challenging.jsonl").read_text(encoding="utf-8").splitlines()]
    assert Counter(line["kind"] for line in lines) == dict.fromkeys(("hostile", "news", "shutdown", "pressure", "crisis"), 8)
    assert [line["id"] for line in lines] == [f"h{number:03d}" for number in range(1, 41)]
    assert len({line["content"] for line in lines} - set(contents("ordinary.jsonl"))) == 40


@pytest.mark.slow
def test_the_page_examples() -> None:
    run_examples("compare.md")
