"""The whole evaluation on a tiny model: what it writes, that a killed run goes on, and that nothing stale is used."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import small_corpus
import tiny
from small_corpus import small  # noqa: F401 - a fixture
from test_report import Page
from typer.testing import CliRunner

from emovec import extras
from emovec.bank import Bank, BankError
from emovec.cli import app as application
from emovec.cli import common
from emovec.evaluation import Options, evaluate, run, texts, verdict
from emovec.evaluation.activations import Activations
from emovec.evaluation.sections import SECTIONS, Section
from emovec.extraction import CorpusError

FEW = Options(samples=20, permutations=20)
LIGHT = ["scenarios", "speakers", "dosage"]

pytestmark = pytest.mark.usefixtures("small")


@pytest.fixture(autouse=True)
def calm() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def trial(out: Path, bank: Bank | None = None, **options: Any) -> dict[str, Any]:
    """The content of report.json."""
    options = {"options": FEW, "progress": False, **options}
    evaluate(tiny.model(), small_corpus.tokenizer(), bank or small_corpus.bank(), out, **options)
    found: dict[str, Any] = json.loads((out / "report.json").read_text(encoding="utf-8"))
    return found


def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is computed from now on: sections by name, and each set of texts that is run."""
    done: list[str] = []
    for part in SECTIONS:

        def result(material: Any, part: Section = part, original: Any = part.result) -> Any:
            done.append(part.name)
            return original(material)

        monkeypatch.setattr(part.module, "result", result)
    original = Activations.means

    def means(self: Activations, part: Any, progress: Any) -> Any:
        before = set(self.directory.iterdir())
        found = original(self, part, progress)
        done.extend(f"texts {part.name}" for _ in set(self.directory.iterdir()) - before)
        return found

    monkeypatch.setattr(Activations, "means", means)
    return done


def test_everything_that_is_written(tmp_path: Path) -> None:
    found = trial(tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"report.html", "report.json", "figures", "state"}
    assert list(found["sections"]) == [part.name for part in SECTIONS]
    assert found["texts"]["sets"]["stories"] == 24
    assert found["layers"] == [0, 1, 2, 3]
    shown = Page((tmp_path / "out" / "report.html").read_text(encoding="utf-8")).shown
    for claim in found["verdict"]:
        assert claim["use"] in shown
    for title in ("Texts it was not made from", "Usable strengths", "Which tokens directions speak for", "Leaks"):
        assert title in shown
    assert set(found["sections"]["causality"]["usable"]) == set(small_corpus.NAMES)
    assert all(low <= 0 <= high for low, high in found["sections"]["causality"]["usable"].values())
    assert found["sections"]["classification"]["own_corpus"] is True
    assert not [path for path in (tmp_path / "out").rglob("*") if path.name.endswith(".tmp")]


def test_the_same_run_twice_computes_nothing_and_says_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = trial(tmp_path / "out", sections=LIGHT)
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    done = counted(monkeypatch)
    assert trial(tmp_path / "out", sections=LIGHT) == first
    assert done == []
    assert {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("killed_in", ["texts", "speakers"])
def test_a_killed_run_goes_on_and_gives_the_same_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed_in: str) -> None:
    whole = trial(tmp_path / "whole", sections=LIGHT)
    with monkeypatch.context() as patched:
        if killed_in == "texts":
            original = Activations.means

            def means(self: Activations, part: Any, progress: Any) -> Any:
                if part.name == "scenarios":
                    raise KeyboardInterrupt
                return original(self, part, progress)

            patched.setattr(Activations, "means", means)
        else:
            module = next(part.module for part in SECTIONS if part.name == killed_in)

            def killed(material: Any) -> Any:
                raise KeyboardInterrupt

            patched.setattr(module, "result", killed)
        with pytest.raises(KeyboardInterrupt):
            trial(tmp_path / "out", sections=LIGHT)
    assert not (tmp_path / "out" / "report.json").exists()
    done = counted(monkeypatch)
    assert trial(tmp_path / "out", sections=LIGHT) == whole
    assert ("texts stories" in done) is False
    assert ("scenarios" in done) is (killed_in == "texts")
    assert "speakers" in done


def test_another_bank_uses_the_texts_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = trial(tmp_path / "out", sections=LIGHT)
    done = counted(monkeypatch)
    other = small_corpus.bank(shrinkage=0.9)
    second = trial(tmp_path / "out", other, sections=LIGHT)
    assert done == LIGHT
    assert second["bank"]["digest"] != first["bank"]["digest"]
    assert second["sections"]["scenarios"] != first["sections"]["scenarios"]
    assert trial(tmp_path / "other", other, sections=LIGHT) == second


def test_a_bank_that_differs_in_one_number_is_another() -> None:
    bank = small_corpus.bank()
    digests = {run.bank_digest(bank)}
    layer = bank[2]
    baseline = layer.baselines["prompt"]
    changes: list[dict[str, Any]] = [
        {"residual_norm": layer.residual_norm * 1.01},  # type: ignore[operator]
        {"readers": layer.directions},
        {"baselines": {**layer.baselines, "prompt": replace(baseline, mean=baseline.mean + 1e-3)}},
    ]
    for change in changes:
        digests.add(run.bank_digest(Bank([bank[1], replace(layer, **change)], 2, (1, 2), bank.families, bank.meta)))
    digests.add(run.bank_digest(Bank(bank.values(), 1, (1, 2), bank.families, bank.meta)))
    assert len(digests) == 5


def test_other_texts_are_run_and_other_options_are_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bank = small_corpus.bank()
    trial(tmp_path / "out", bank, sections=LIGHT)
    path = texts.corpus.shipped("scenarios.jsonl")
    lines = path.read_text().splitlines()
    path.write_text("\n".join(lines[1:]) + "\n")
    done = counted(monkeypatch)
    trial(tmp_path / "out", bank, sections=LIGHT)
    assert done == ["texts scenarios", *LIGHT]
    done.clear()
    trial(tmp_path / "out", bank, sections=LIGHT, options=replace(FEW, seed=1))
    assert done == LIGHT


@pytest.mark.parametrize("content", [b"", b"{", b'{"key": 1}', b'{"key": "x", "result": {}}'])
def test_a_broken_state_is_computed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    first = trial(tmp_path / "out", sections=LIGHT)
    kept = next((tmp_path / "out" / "state").glob("scenarios-*.json"))
    kept.write_bytes(content)
    tensors = next((tmp_path / "out" / "state").glob("means-dosage-*.safetensors"))
    tensors.write_bytes(content)
    done = counted(monkeypatch)
    assert trial(tmp_path / "out", sections=LIGHT) == first
    assert done == ["scenarios"]
    assert tensors.stat().st_size > len(content)


def test_sections_do_not_depend_on_which_others_run(tmp_path: Path) -> None:
    together, alone = trial(tmp_path / "a", sections=LIGHT), trial(tmp_path / "b", sections=["speakers"])
    assert alone["sections"]["speakers"] == together["sections"]["speakers"]
    assert next(claim for claim in alone["verdict"] if claim["use"].startswith("Following"))["verdict"] == "not tested"


# --- what is refused --------------------------------------------------------------------------------------------------------


def test_what_is_wrong_is_known_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, bank = tmp_path / "out", small_corpus.bank()
    with pytest.raises(ValueError, match="unknown section 'leak'; nearest known: leaks"):
        trial(out, sections=["leak"])
    with pytest.raises(BankError, match="the bank was made for"):
        evaluate(tiny.fresh("llama", hidden_size=32, head_dim=8), small_corpus.tokenizer(), bank, out, progress=False)
    bare = Bank([replace(layer, baselines={}) for layer in bank.values()], 2, (1, 2), meta=bank.meta)
    with pytest.raises(BankError, match="not calibrated"):
        trial(out, bare)
    (tmp_path / "norms.csv").write_text("word,valence\ncalm,3\n")
    with pytest.raises(CorpusError, match=r"norms\.csv: no column 'arousal'"):
        trial(out, norms=tmp_path / "norms.csv")
    (tmp_path / "norms.csv").write_text("word,valence,arousal\ncalm,3,high\n")
    with pytest.raises(CorpusError, match=r"norms\.csv:2: valence and arousal must be numbers"):
        trial(out, norms=tmp_path / "norms.csv")
    (tmp_path / "others.jsonl").write_text('{"emotion": "wistful", "text": "w1 w2"}\n')
    with pytest.raises(CorpusError, match="no concept 'wistful'"):
        trial(out, others=tmp_path / "others.jsonl")
    long = " ".join(["w1"] * 200)
    (tmp_path / "others.jsonl").write_text(json.dumps({"emotion": "calm", "text": long}) + "\n")
    with pytest.raises(CorpusError, match="text 1 of others has 200 tokens, more than the 128"):
        trial(out, others=tmp_path / "others.jsonl")

    def missing(module: str, *, extra: str) -> Any:
        raise ModuleNotFoundError(f"{module} is not installed; it comes with `pip install emovec[{extra}]`")

    monkeypatch.setattr(extras, "require", missing)
    with pytest.raises(ModuleNotFoundError, match=r"matplotlib is not installed; .*emovec\[report\]"):
        trial(out)
    assert not out.exists()


def test_other_norms_and_other_writers(tmp_path: Path) -> None:
    lines = [f"{name.upper() if not n else name},{9 - n},{n}" for n, name in enumerate(small_corpus.NAMES)]
    (tmp_path / "norms.csv").write_text("\n".join(["Word,Valence,Arousal", *lines]) + "\n")
    assert texts.ratings(tmp_path / "norms.csv")["serene"] == (6.0, 3.0)
    theirs = [{"emotion": story.emotion, "text": story.text} for story in texts.corpus.stories(texts.corpus.shipped("messages.jsonl"))()]
    (tmp_path / "others.jsonl").write_text("".join(json.dumps(item) + "\n" for item in theirs))
    found = trial(tmp_path / "out", sections=["others"], others=tmp_path / "others.jsonl")["sections"]["others"]
    assert found["n"] == 12
    assert found["words"] == small_corpus.NAMES
    assert found["problems"]["words"]["of"] == 6


# --- the command ------------------------------------------------------------------------------------------------------------


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "bank.safetensors"
    small_corpus.bank().save(path)
    monkeypatch.setattr(common, "load_model", lambda name, **_: (tiny.model(), small_corpus.tokenizer()))
    arguments = [
        "evaluate",
        "tiny",
        str(path),
        "--out",
        str(tmp_path / "out"),
        "--sections",
        "scenarios, leaks",
        "--quick",
        "--layers",
        "3",
    ]
    result = CliRunner().invoke(application.app, arguments, env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    assert str(tmp_path / "out" / "report.html") in result.output
    found = json.loads((tmp_path / "out" / "report.json").read_text())
    assert list(found["sections"]) == ["scenarios", "leaks"]
    assert found["options"] == {"seed": 0, "samples": 200, "permutations": 200, "quick": True}
    assert found["layers"] == [0, 1, 2, 3]
    assert "A quick run" in (tmp_path / "out" / "report.html").read_text()
    wrong = CliRunner().invoke(application.app, ["evaluate", "tiny", str(path), "--out", str(tmp_path / "never"), "--sections", "scenario"])
    assert isinstance(wrong.exception, ValueError)
    assert "scenarios" in str(wrong.exception)
    assert not (tmp_path / "never").exists()


def test_the_page_of_the_docs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Its examples run, and it tells of every section, option and verdict."""
    source = (Path(__file__).parents[1] / "docs" / "evaluation.md").read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    names = {"model": tiny.model(), "tokenizer": small_corpus.tokenizer(), "bank": small_corpus.bank()}
    for example in re.findall(r"^```python\n(.*?)^```", source, re.DOTALL | re.MULTILINE):
        exec(example, names)
    assert "Telling families" in capsys.readouterr().out
    for word in (*(part.name for part in SECTIONS), "--others", "--stories", "--norms", "--layers", "--quick", "--seed", *verdict.VERDICTS):
        assert word in source, word
