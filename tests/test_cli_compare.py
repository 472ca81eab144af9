"""``emovec compare``: what it prints, writes and exits with."""

from __future__ import annotations

import copy
import json
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path
from typing import Any

import plain_extraction as plain
import pytest
import tiny
import torch
from typer.testing import CliRunner

from emovec import Bank, models
from emovec.cli import app as application
from emovec.comparison import Comparison
from emovec.comparison.page import drawing
from emovec.models import decoder_layers


def run(*arguments: str, code: int = 0) -> Any:
    """Run a command in this process; exceptions that the real command would explain are raised."""
    result = CliRunner().invoke(application.app, ["compare", *arguments], env={"COLUMNS": "200"})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result


@pytest.fixture
def pair(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """Arguments that compare the tiny model with one that is moved along `afraid`; `same` in place of `moved` compares it with itself."""
    moved = copy.deepcopy(tiny.model())
    step = 4.0 * tiny.bank()[2].direction("afraid")
    decoder_layers(moved)[2].register_forward_hook(lambda module, args, output: output + step)
    known = {"before": tiny.model(), "same": tiny.model(), "moved": moved}
    monkeypatch.setattr(models, "load_model", lambda name, **_: (known[name], plain.tokenizer()))
    tiny.bank().save(tmp_path / "tiny.safetensors")
    for name, first in (("prompts", 3), ("challenging", 40)):
        lines = [json.dumps({"content": " ".join(plain.WORDS[row : row + 5])}) for row in range(first, first + 9)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    files = ("--bank", str(tmp_path / "tiny.safetensors"), "--prompts", str(tmp_path / "prompts.jsonl"))
    return ["before", "moved", *files, "--challenging", str(tmp_path / "challenging.jsonl")]


def test_it_shows_what_moved_most(pair: list[str]) -> None:
    said = run(*pair).output
    rows = [line.split() for line in said.splitlines()]
    concepts = [row[0] for row in rows if row and row[0] in tiny.CONCEPTS]
    assert concepts[0] == "afraid"
    assert len(concepts) == len(tiny.CONCEPTS)
    for words in ("Low", "High", "valence", "random directions", "9 neutral and 9 challenging"):
        assert words in said


def test_alarms_end_with_3(pair: list[str]) -> None:
    quiet = run(*pair, "--alarm", "afraid<0", "--alarm", "valence>5")
    assert quiet.stderr.count("silent") == 2
    loud = run(*pair, "--alarm", "afraid>0.5", "--alarm", "High > 0.5", "--alarm", "afraid<0", code=3)
    assert loud.stderr.count("alarm:") == 2
    facts = json.loads(run(*pair, "--alarm", "afraid>0.5", "--alarm", "afraid<0", "--json", code=3).stdout)
    assert facts["alarms"] == [{"alarm": "afraid>0.5", "fires": True}, {"alarm": "afraid<0", "fires": False}]
    assert facts["concepts"]["afraid"]["low"] > 0.5
    assert next(iter(facts["concepts"])) == "afraid"


def test_a_model_against_itself_sets_off_nothing(pair: list[str]) -> None:
    pair[1] = "same"
    everything = [f"--alarm={name}{sign}0" for name in (*tiny.CONCEPTS, "High", "valence", "arousal") for sign in "<>"]
    said = run(*pair, *everything)
    assert "no concept moved" in said.stdout
    assert said.stderr.count("silent") == len(everything)


def test_an_empty_file_leaves_the_challenging_prompts_out(pair: list[str], tmp_path: Path) -> None:
    (tmp_path / "challenging.jsonl").write_text("")
    facts = json.loads(run(*pair, "--json").stdout)
    assert facts["prompts"] == {"neutral": 9, "challenging": 0}
    assert "challenging" not in facts["concepts"]["afraid"]
    assert "Under strain" not in run(*pair, "--out", str(tmp_path)).stdout + (tmp_path / "index.html").read_text()


def test_it_writes_a_page_a_figure_and_the_numbers(pair: list[str], tmp_path: Path) -> None:
    target = tmp_path / "new" / "report"
    run(*pair, "--out", str(target), "--alarm", "afraid>0.5", "--on", "answer", "--answers", "same", "--max-new-tokens", "3", code=3)
    assert sorted(path.name for path in target.iterdir()) == ["comparison.json", "index.html", "shifts.svg"]
    facts = json.loads((target / "comparison.json").read_text())
    assert (facts["a"], facts["b"], facts["on"], facts["answers"]) == ("before", "moved", "answer", "same")
    page = (target / "index.html").read_text()
    for words in ("Post-training shift", "afraid&gt;0.5", "fires", "Under strain", "High", "<svg"):
        assert words in page
    figure = ElementTree.fromstring((target / "shifts.svg").read_text())
    bars = [element for element in figure.iter() if element.get("class") in ("rose", "fell")]
    assert len(bars) == len(tiny.CONCEPTS)
    widest = max(bars, key=lambda bar: float(bar.get("width") or 0))
    assert (widest[0].text or "").startswith("afraid +")


def test_names_are_text_wherever_they_are_shown(pair: list[str], tmp_path: Path) -> None:
    odd = ("[/red]", "<b>&", "a>b", "calm", "[bold]x")
    bank = tiny.bank()
    layers = [replace(layer, names=odd) for layer in bank.values()]
    Bank(layers, bank.read_layer, families={"[/x] <i>": odd[:2]}, meta=bank.meta).save(tmp_path / "odd.safetensors")
    said = run(*pair, "--bank", str(tmp_path / "odd.safetensors"), "--out", str(tmp_path / "odd"), "--alarm", "<b>&>-99", code=3)
    assert all(name in said.stdout for name in (*odd, "[/x] <i>"))
    page = (tmp_path / "odd" / "index.html").read_text()
    assert "<b>&" not in page
    assert "&lt;b&gt;&amp;" in page
    ElementTree.fromstring((tmp_path / "odd" / "shifts.svg").read_text())


@pytest.mark.parametrize(
    ("alarm", "said"),
    [("afriad>0.5", "afraid"), ("afraid", "NAME>NUMBER"), ("afraid>high", "NAME>NUMBER"), ("Hihg<1", "High")],
)
def test_wrong_alarms_are_explained_before_a_model_is_loaded(
    pair: list[str], monkeypatch: pytest.MonkeyPatch, alarm: str, said: str
) -> None:
    monkeypatch.setattr(models, "load_model", lambda *_, **__: pytest.fail("a model was loaded"))
    assert said in run(*pair, "--alarm", alarm, code=2).stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--on", "middle"), "prompt, turn_start, answer"),
        (("--answers", "ours"), "own, same"),
        (("--answers", "same"), "--on answer"),
        (("--dtype", "int4"), "int4"),
        (("--batch-size", "0"), "batch-size"),
    ],
)
def test_wrong_usage_is_explained_before_a_model_is_loaded(
    pair: list[str], monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], said: str
) -> None:
    monkeypatch.setattr(models, "load_model", lambda *_, **__: pytest.fail("a model was loaded"))
    assert said in run(*pair, *arguments, code=2).stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--bank", "no-such-bank"), "no-such-bank"),
        (("--bank-b", "no-such-bank"), "no-such-bank"),
        (("--prompts", "nowhere.jsonl"), "nowhere.jsonl"),
    ],
)
def test_mistakes_write_nothing(
    pair: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], said: str
) -> None:
    monkeypatch.setattr(models, "load_model", lambda *_, **__: pytest.fail("a model was loaded"))
    with pytest.raises(ValueError, match=said):
        run(*pair, "--out", str(tmp_path / "out"), *arguments)
    assert not list(tmp_path.glob("out/*"))


def test_a_figure_without_any_shift() -> None:
    zero = torch.zeros(9, 2)
    found = Comparison(["calm", "afraid"], {}, zero, zero, [str(row) for row in range(9)], [False] * 9)
    picture = ElementTree.fromstring(drawing(found, embedded=False))
    assert "no concept moved" in [element.text for element in picture.iter()]
