"""What docs/extraction.md and the shipped bank claim is what the committed results say."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from banks import run_examples

from emovec.bank import load_bank
from emovec.extraction import corpus

ROOT = Path(__file__).parents[1]
NAME = "smollm2-135m-instruct"


@pytest.fixture
def heldout(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(ROOT / "bench")
    yield __import__("heldout")
    for name in ("heldout", "others", "pages", "provenance", "bench_extract"):
        sys.modules.pop(name, None)


def test_the_tables_are_those_of_the_results(heldout: Any) -> None:
    found = heldout.provenance.read("heldout")
    page = heldout.PAGE.read_text(encoding="utf-8")
    assert heldout.pages.written(page, heldout.tables(found["results"], found["provenance"]["name"])) == page


def test_other_writers_are_those_of_the_results(heldout: Any) -> None:
    others = __import__("others")
    found = heldout.provenance.read("others")
    page = heldout.PAGE.read_text(encoding="utf-8")
    assert heldout.pages.written(page, others.tables(found["results"], found["provenance"]["name"])) == page
    sets = found["results"]["sets"].values()
    assert all(part["bank"]["low"] > part["words"]["high"] for part in sets)
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    said = re.findall(r"0\.\d\d", text[text.index("- **Other writers**") : text.index("- **Steering**: raising")])
    assert said == [f"{part[which]['r']:.2f}" for which in ("bank", "words") for part in sets]


def test_the_readme_says_what_the_results_say(heldout: Any) -> None:
    results = heldout.provenance.read("heldout")["results"]
    both, read = "stories and messages", results["as_read"]["levelled"]
    centred = next(row["found"] for row in results["together"] if row["layers"] == results["chosen"]["read_together"])
    found = [read[both][test][top] for top in ("top1", "top5") for test in ("stories", "messages")]
    found += [results["as_read"]["levelled, layer 0"][both][test]["top1"] for test in ("stories", "messages")]
    found += [each[one][other]["top1"] for each in (read, centred) for one, other in (("stories", "messages"), ("messages", "stories"))]
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    said = re.findall(r"(\d+) %", text[text.index("- **Reading**: on topics") : text.index("- **Steering**: raising")])
    assert said == [f"{100 * value:.0f}" for value in found]


def test_the_cost_is_that_of_the_results(heldout: Any) -> None:
    bench = __import__("bench_extract")
    found = heldout.provenance.read("extract")
    page = heldout.PAGE.read_text(encoding="utf-8")
    assert heldout.pages.written(page, {"cost": bench.paragraph(found["results"], found["provenance"]["name"])}) == page
    assert found["results"]["ratio"] >= found["results"]["goal"]


def test_a_page_without_a_place_for_a_table(heldout: Any) -> None:
    with pytest.raises(ValueError, match="0 places for the table 'layers'"):
        heldout.pages.written("no markers", {"layers": "| a |"})


def test_the_shipped_bank_is_read_where_the_results_say(heldout: Any) -> None:
    results = heldout.provenance.read("heldout")["results"]
    bank = load_bank(NAME)
    assert list(bank.read_layers) == results["chosen"]["read_together"]
    assert bank.meta["evidence"]["results"]["chosen"] == results["chosen"]
    recipe = {key: value for key, value in bank.meta["recipe"].items() if key != "neutral_components"}
    assert recipe == results["recipe"]
    read = next(row for row in results["together"] if row["layers"] == list(bank.read_layers))["found"]
    for register, other in (("stories", "messages"), ("messages", "stories")):
        assert read["stories and messages"][register]["top1"] > 10 * results["shuffled"][register]["readers"]["top1"]
        assert read[other][register]["top1"] > 1.5 * results["words_alone"][other][register]["top1"]


def test_the_shipped_bank_is_complete_and_small() -> None:
    bank = load_bank(NAME)
    assert list(bank.names) == corpus.emotions()
    assert {family: list(members) for family, members in bank.families.items()} == corpus.families()
    assert bank.meta["model"] == NAME
    assert all(layer.calibrated and not layer.uncalibrated and layer.random_null is not None for layer in bank.values())
    assert all(set(layer.baselines) == {"prompt", "turn_start", "generated"} for layer in bank.values())
    assert (ROOT / f"emovec/data/banks/{NAME}.safetensors").stat().st_size < 6e6


@pytest.mark.slow
def test_the_shipped_bank_is_of_the_packaged_model() -> None:
    from emovec.models import load_model

    bank = load_bank(NAME)
    model, tokenizer = load_model(NAME, dtype=torch.float32)
    bank.check(model, tokenizer)


@pytest.mark.slow
def test_the_page_examples() -> None:
    run_examples("extraction.md")
