"""New concepts in a bank that there is: against the recipe written out plainly; what they are contrasted with; what is refused."""

from __future__ import annotations

import functools
import json
import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import plain_extraction as plain
import pytest
import tiny
import torch
from typer.testing import CliRunner

from emovec.bank import Bank, BankError, load_bank
from emovec.cli import app
from emovec.cli import extract as command
from emovec.extraction import ConceptExtraction, CorpusError, Recipe, add_concepts, corpus, extract
from emovec.extraction.blocks import Blocks

CORPUS = plain.Corpus((5, 6, 4), seed=1)
MODEL = tiny.fresh().double()
LAYERS = (0, 2)
SKIP = 5


@functools.cache
def bank(**options: Any) -> Bank:
    options = {"layers": LAYERS, "read_layer": 2, "skip": SKIP, "shrinkage": 0.3, "progress": False, **options}
    return extract(MODEL, plain.tokenizer(), *CORPUS.sources, **options)


def new(count: int = 9, seed: int = 3, *, contrast: bool = True, topics: str = "n", name: str = "sarcastic") -> list[dict[str, Any]]:
    """Stories whose words differ from their contrasts' in that three quarters of them come from the first three."""
    draw = np.random.default_rng(seed)
    found = []
    for number in range(count):
        words = draw.choice(plain.WORDS[3:], 24).tolist()
        marked = [str(draw.choice(plain.WORDS[:3])) if place % 4 else word for place, word in enumerate(words)]
        found.append({"concept": name, "topic": f"{topics}{number}", "text": " ".join(marked), "contrast": " ".join(words)})
    return found if contrast else [{key: value for key, value in story.items() if key != "contrast"} for story in found]


def job(concepts: Any, made: Bank | None = None, **options: Any) -> ConceptExtraction:
    options = {"stories": CORPUS.stories, "neutral": CORPUS.neutral, "ordinary": CORPUS.ordinary, "progress": False, **options}
    return ConceptExtraction(MODEL, plain.tokenizer(), made or bank(), concepts, **options)


def mean_of(text: str, layer: int) -> np.ndarray:
    found: np.ndarray = plain.outputs(MODEL, plain.ids(text))[layer, SKIP:].mean(0)
    return found


def expected(layer: int, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    """A direction, its reader and its length from differences [n, d], by the bank's recipe, in numpy."""
    both = [plain.marked(item["turns"], True, False, False) for item in CORPUS.neutral]
    neutral = np.concatenate([plain.outputs(MODEL, ids)[layer][[role is not None for role in roles]] for ids, roles in both])
    values, vectors = np.linalg.eigh(np.cov(neutral.T))
    kept = vectors[:, ::-1][:, int(np.argmax(np.cumsum(values[::-1]) / values.sum() >= 0.5)) + 1 :]
    direction = kept @ kept.T @ rows.mean(0)
    inside, means = [], []
    for name in dict.fromkeys(story["emotion"] for story in CORPUS.stories):
        of = np.stack([mean_of(story["text"], layer) for story in CORPUS.stories if story["emotion"] == name])
        means.append(of.mean(0))
        inside.append(of - of.mean(0))
    stacked = np.concatenate(inside)
    asked = [plain.marked([{"role": "user", "content": item["content"]}], True, False, True) for item in CORPUS.ordinary]
    said = np.concatenate([plain.outputs(MODEL, ids)[layer][[role is not None for role in roles]] for ids, roles in asked])
    common = (np.stack(means).mean(0) - said.mean(0))[:, None]
    covariance = stacked.T @ stacked / (len(stacked) - len(inside))
    norm = float(np.linalg.norm(direction))
    inverse = np.linalg.inv(0.7 * covariance + 0.3 * np.diag(np.diag(covariance)))
    inverse -= inverse @ common @ common.T @ inverse / (common.T @ inverse @ common)
    reader = inverse @ rows.mean(0)
    return direction / norm, reader / (reader @ direction / norm), norm


def check(found: Bank, differences: dict[int, np.ndarray]) -> None:
    row = found.resolve("sarcastic")
    for layer, rows in differences.items():
        here = found[layer]
        direction, reader, norm = expected(layer, rows)
        assert here.readers is not None
        assert here.raw_norm is not None
        np.testing.assert_allclose(here.directions[row].numpy(), direction, atol=2e-6)
        np.testing.assert_allclose(here.readers[row].numpy(), reader, atol=2e-5 * abs(reader).max())
        assert float(here.raw_norm[row]) == pytest.approx(norm, rel=1e-5)
        words = np.concatenate([plain.outputs(MODEL, ids)[layer][[role is not None for role in roles]] for ids, roles in prompts()])
        read = words @ reader
        assert float(here.baselines["prompt"].mean[row]) == pytest.approx(read.mean(), abs=1e-5 * abs(read).max())
        assert float(here.baselines["prompt"].std[row]) == pytest.approx(read.std(ddof=1), rel=1e-4)


def prompts() -> list[tuple[list[int], list[str | None]]]:
    return [plain.marked([{"role": "user", "content": item["content"]}], True, False, True) for item in CORPUS.ordinary]


def test_a_contrast_of_its_own() -> None:
    stories = new()
    made = job(stories).run()
    check(made, {k: np.stack([mean_of(s["text"], k) - mean_of(s["contrast"], k) for s in stories]) for k in LAYERS})


def test_the_same_topics_of_the_corpus() -> None:
    stories = new(3, topics="t", contrast=False)
    work = job(stories)
    assert work.plan.contrasts == {"same topic": 3}
    differences = {}
    for layer in LAYERS:
        of = {s["topic"]: [mean_of(o["text"], layer) for o in CORPUS.stories if o["topic"] == s["topic"]] for s in stories}
        differences[layer] = np.stack([mean_of(s["text"], layer) - np.mean(of[s["topic"]], axis=0) for s in stories])
    check(work.run(), differences)


def test_the_mean_of_the_corpus() -> None:
    stories = new(contrast=False)
    old = bank()
    work = job(stories, old)
    assert work.plan.contrasts == {"mean": 9}
    means = {layer: old[layer].grand_mean for layer in LAYERS}
    check(work.run(), {k: np.stack([mean_of(s["text"], k) - means[k].double().numpy() for s in stories]) for k in LAYERS})
    assert "of the writer as well as of the concept" in work.evidence["sarcastic"].warnings[0]
    assert work.evidence["sarcastic"].words is None


def test_what_was_in_the_bank_stays_as_it_was() -> None:
    old = bank()
    made = job([*new(), *new(8, seed=5, name="formal")], old, family="Style").run()
    assert made.names == (*old.names, "sarcastic", "formal")
    assert made.families["Style"] == ("sarcastic", "formal")
    assert made.subset(old.names)[2] == old[2]
    assert (made.read_layer, made.steer_layers) == (old.read_layer, old.steer_layers)
    assert not made[2].uncalibrated
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made.check(MODEL, plain.tokenizer())


def test_each_of_several_concepts_is_as_if_it_came_alone() -> None:
    both, alone = job([*new(), *new(8, seed=5, name="formal")]).run(), job(new()).run()
    torch.testing.assert_close(both[2].direction("sarcastic"), alone[2].direction("sarcastic"), rtol=0, atol=1e-6)


def test_without_whitening_the_corpus_is_not_needed() -> None:
    work = job(new(), stories=[{"emotion": "other", "text": "w1"}], whitened=False)
    assert work.plan.corpus_tokens == 0
    made = work.run()
    row = made.resolve("sarcastic")
    assert made[2].readers is not None
    assert torch.equal(made[2].readers[row], made[2].directions[row])


def test_the_corpus_is_passed_over_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, tokens = Blocks.run, []

    def counted(self: Blocks, batch: Any) -> None:
        tokens.append(batch.tokens)
        run(self, batch)

    bank()
    monkeypatch.setattr(Blocks, "run", counted)
    work = job(new(), resume=tmp_path / "sums")
    first = work.run()
    assert sum(tokens) == work.plan.tokens
    tokens.clear()
    second = job(new(), resume=tmp_path / "sums").run()
    assert sum(tokens) == work.plan.tokens - work.plan.corpus_tokens
    assert second == first


def test_the_evidence_goes_into_the_bank(tmp_path: Path) -> None:
    work = job(new())
    made = work.run()
    found = work.evidence["sarcastic"]
    assert (found.stories, found.topics, found.contrasts) == (9, 9, {"own text": 9})
    assert found.accuracy > 0.8
    assert found.p < 0.05
    assert found.interval[0] < found.accuracy <= found.interval[1] <= 1
    made.save(tmp_path / "new.safetensors")
    said = load_bank(tmp_path / "new.safetensors").meta["custom"][0]["concepts"]["sarcastic"]
    assert said["accuracy"] == found.accuracy
    again = job(new(name="formal", seed=8), made).run()
    assert [list(entry["concepts"]) for entry in again.meta["custom"]] == [["sarcastic"], ["formal"]]


def test_noise_is_warned_about() -> None:
    """Stories and contrasts that are drawn alike."""
    draw = np.random.default_rng(0)

    def words() -> str:
        return " ".join(draw.choice(plain.WORDS, 24))

    stories = [{"concept": "nothing", "topic": f"n{number}", "text": words(), "contrast": words()} for number in range(9)]
    with pytest.warns(UserWarning, match=r"nothing: held-out accuracy .* is not clearly above the 0.5 of chance"):
        add_concepts(MODEL, plain.tokenizer(), bank(), stories, *CORPUS.sources, progress=False)


# --- what is refused, before it computes anything -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stories", "options", "message"),
    [
        ([], {}, "no stories of new concepts"),
        ([{"concept": "a"}], {}, "item 1: no 'text'"),
        ([{"text": "w1"}], {}, "item 1: no 'emotion'"),
        ([{**new()[0], "contrast": 3}], {}, "item 1: 'contrast' must be text, got 3"),
        (new(name="emotion 1"), {}, "item 1: the bank has 'emotion 1' already"),
        (new(1), {}, "'sarcastic' has 1 stories, of which those longer than the 5 tokens skipped are on 1 topics"),
        ([{**story, "contrast": "w1 w2"} for story in new()], {}, "'sarcastic' has 9 stories, .* are on 0 topics"),
        ([*new(), {**new()[0], "text": "w1 " * 129}], {}, "item 10 has 129 tokens, more than the 128 that the model takes"),
        (new(), {"stories": plain.Corpus((5, 6, 4), seed=2).stories}, "the stories given are not those that the bank was made from"),
    ],
)
def test_bad_stories(stories: Any, options: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = bank()

    def forward(*args: object) -> None:
        raise AssertionError("a forward pass before everything was checked")

    monkeypatch.setattr(Blocks, "run", forward)
    with pytest.raises(CorpusError, match=message):
        job(stories, made, **options)


def test_the_stories_that_come_with_emovec_may_not_be_the_banks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, items in (("stories", CORPUS.stories[:8]), ("messages", CORPUS.stories[8:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    monkeypatch.setattr(
        "emovec.extraction.corpus.shipped", lambda name: tmp_path / name if (tmp_path / name).exists() else corpus.SHIPPED / name
    )
    assert job(new(), stories=None).plan.corpus_tokens > 0, "both files together are what the bank was made from"
    (tmp_path / "messages.jsonl").write_text(json.dumps(CORPUS.stories[8]) + "\n")
    with pytest.raises(CorpusError, match="the stories that come with emovec are not those that the bank was made from"):
        job(new(), stories=None)


def test_another_model_is_refused() -> None:
    with pytest.raises(BankError, match="the bank was made for"):
        ConceptExtraction(tiny.model("mistral"), plain.tokenizer(), bank(), new(), *CORPUS.sources)


def test_a_bank_without_a_mean_needs_contrasts() -> None:
    bare = tiny.bank_for(MODEL)
    options: dict[str, Any] = {"whitened": False, "stories": None}
    with pytest.raises(CorpusError, match="item 1: no 'contrast', and the bank has no mean to compare the story with"):
        job([{**story, "text": story["text"] * 5} for story in new(contrast=False)], bare, **options)


def test_the_recipe_of_a_bank_that_says_more_than_we_know() -> None:
    from emovec.extraction.concepts import recipe_of

    made = Bank(bank().values(), meta=bank().meta)
    assert recipe_of(made) == Recipe(skip=SKIP, shrinkage=0.3)
    made.meta["recipe"]["spice"] = 3
    assert recipe_of(made) == Recipe(skip=SKIP, shrinkage=0.3)


# --- the command ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    names = ("stories", "neutral", "ordinary")
    for name, items in zip((*names, "new"), (*CORPUS.sources, new()), strict=True):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    monkeypatch.setattr("emovec.models.load_model", lambda name, **_: (MODEL, plain.tokenizer()))
    bank(out=tmp_path / "bank.safetensors")
    return tmp_path


def run(files: Path, *more: str, code: int = 0) -> str:
    given = [part for name in ("stories", "neutral", "ordinary") for part in (f"--{name}", str(files / f"{name}.jsonl"))]
    into = ["--into", str(files / "bank.safetensors"), "--out", str(files / "new.safetensors")]
    done = CliRunner().invoke(app.app, ["extract", "tiny", *given, *into, *more], env={"COLUMNS": "300"})
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == code, done.output
    return done.output


def test_the_command_adds_and_says_what_speaks_for_it(files: Path) -> None:
    said = run(files, "--concepts", str(files / "new.jsonl"))
    made = load_bank(files / "new.safetensors")
    assert made == job(new()).run()
    found = made.meta["custom"][0]["concepts"]["sarcastic"]
    assert "9 stories of 1 new concepts, 9 with a contrast of their own" in said
    assert f"held-out topics: {found['accuracy']:.2f} read higher than their contrast" in said
    assert f"nearest: {found['nearest'][0][0]} {found['nearest'][0][1]:+.2f}" in said


def test_without_concepts_the_command_prints_its_plan_and_makes_a_bank(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("emovec.extraction.Extraction.estimate", lambda self: 125.0)
    given = [part for name in ("stories", "neutral", "ordinary") for part in (f"--{name}", str(files / f"{name}.jsonl"))]
    out = files / "made.safetensors"
    options = ["--skip", str(SKIP), "--shrinkage", "0.3", "--layers", "0,2", "--read-layers", "2"]
    said = CliRunner().invoke(app.app, ["extract", "tiny", *given, *options, "--out", str(out)], env={"COLUMNS": "300"}).output
    assert re.search(r"15 stories of 3 concepts, [\d,]+ tokens, 2 layers, 1 MB of weights, 0 MB of sums, about 2 min", said), said
    assert list(load_bank(out).values()) == list(bank().values())


def test_the_command_refuses_what_the_bank_says(files: Path) -> None:
    concepts = ("--concepts", str(files / "new.jsonl"))
    assert "--skip" in run(files, *concepts, "--skip", "3", code=2)
    assert "--layers" in run(files, *concepts, "--layers", "1", code=2)
    assert "--into" in run(files, code=2)
    assert not (files / "new.safetensors").exists()
    assert command._minutes(99) == "99 s"
