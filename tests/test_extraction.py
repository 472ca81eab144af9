"""The streaming extraction against the recipe written out plainly; what it reports; what does not matter to it."""

from __future__ import annotations

import json
import warnings
from typing import Any

import plain_extraction as plain
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_extraction import Corpus

from emovec.bank import Bank, BankError, load_bank
from emovec.extraction import CorpusError, Extraction, Recipe, extract
from emovec.extraction.sums import StoryMoments

MODEL = tiny.fresh().double()  # in fp64 the order of sums is all that is left to differ
LAYERS = [0, 1, 2]


def bank_of(corpus: Corpus, tokenizer: Any = None, model: Any = MODEL, **options: Any) -> Bank:
    options = {"layers": LAYERS, "progress": False, "skip": 8, **options}
    return extract(model, tokenizer or plain.tokenizer(), *corpus.sources, **options)


def close(found: Bank, expected: Bank, tolerance: float = 1e-6) -> None:
    """Both banks, but for rounding; errors are relative to a tensor's largest value."""
    assert found.names == expected.names
    assert found.layers == expected.layers
    for layer in found:
        a, b = found[layer], expected[layer]
        assert a.residual_norm == pytest.approx(b.residual_norm, rel=tolerance)
        pairs = [(getattr(a, name), getattr(b, name)) for name in ("directions", "readers", "raw_norm", "grand_mean")]
        pairs += [(getattr(a.baselines[kind], name), getattr(b.baselines[kind], name)) for kind in a.baselines for name in ("mean", "std")]
        for ours, theirs in pairs:
            assert float((ours - theirs).abs().max()) <= tolerance * float(theirs.abs().max())


def check(found: Bank, expected: list[dict[str, Any]], tolerance: float = 2e-6) -> None:
    """``found`` is what is expected, but for rounding to fp32; projections are sums of large terms, so their error goes by their spread."""
    for layer, facts in enumerate(expected):
        here = found[layer]
        assert list(here.names) == facts["names"]
        assert found.meta["recipe"]["neutral_components"].get(str(layer)) == facts["components"]
        assert here.residual_norm == pytest.approx(facts["residual_norm"], rel=tolerance)
        pairs = [(getattr(here, name), facts[name], abs(facts[name]).max()) for name in ("directions", "readers", "raw_norm", "grand_mean")]
        for kind, (mean, std, count) in facts["baseline"].items():
            assert here.baselines[kind].count == count
            size = (abs(mean) + std).max()
            pairs += [(here.baselines[kind].mean, mean, size), (here.baselines[kind].std, std, size)]
        for ours, theirs, size in pairs:
            assert float((ours.double() - torch.as_tensor(theirs)).abs().max()) <= tolerance * size


@settings(max_examples=20, deadline=None)
@given(
    counts=st.lists(st.integers(1, 5), min_size=2, max_size=5).filter(lambda counts: max(counts) > 1),
    seed=st.integers(0, 10**6),
    side=st.sampled_from(["left", "right"]),
    chat=st.booleans(),
    bos=st.booleans(),
    format=st.sampled_from(["raw", "chat"]),
    denoise=st.sampled_from(["tokens", "dialogues", None]),
    skip=st.integers(0, 10),
    skip_share=st.sampled_from([0.2, 1.0]),
    variance=st.sampled_from([0.2, 0.5, 0.8]),
    level=st.booleans(),
    batch_tokens=st.sampled_from([1, 60, 150, 4096]),
)
def test_streaming_equals_the_plain_recipe(
    counts: list[int], seed: int, side: str, chat: bool, bos: bool, batch_tokens: int, **options: Any
) -> None:
    corpus = Corpus(tuple(counts), seed)
    options["shrinkage"] = 0.3
    found = bank_of(corpus, plain.tokenizer(side=side, chat=chat, bos=bos), batch_tokens=batch_tokens, **options)
    check(found, plain.bank(MODEL, corpus, chat=chat, bos=bos, **options))


@pytest.mark.parametrize("batch_tokens", [1, 100, 10**6])
def test_the_size_of_batches_does_not_matter(batch_tokens: int) -> None:
    corpus = Corpus((5, 6, 4, 7), seed=3)
    close(bank_of(corpus, batch_tokens=batch_tokens), bank_of(corpus, batch_tokens=300))


def test_in_fp32_too() -> None:
    corpus = Corpus((5, 6, 4, 7), seed=3)
    close(bank_of(corpus, model=tiny.model()), bank_of(corpus), tolerance=1e-3)


@pytest.mark.parametrize("family", ["gpt2", "bloom", "gemma2", "qwen3"])
def test_other_families(family: str) -> None:
    model = tiny.fresh(family).double()
    corpus = Corpus((3, 3), seed=5)
    check(bank_of(corpus, model=model), plain.bank(model, corpus, skip=8), tolerance=1e-5)


def test_readers_move_as_far_as_their_directions() -> None:
    found = bank_of(Corpus((4, 5, 6)))
    for layer in found.values():
        assert layer.readers is not None
        assert (layer.readers.double() * layer.directions.double()).sum(1).tolist() == pytest.approx([1.0] * 3, abs=1e-5)
    assert bank_of(Corpus((4, 5, 6)), readers=None)[1].readers is None


def test_random_null_is_of_random_directions_on_the_prompts() -> None:
    layer = bank_of(Corpus())[2]
    assert layer.random_null is not None
    assert layer.random_null.mean.shape == (128,)
    assert layer.random_null.count == layer.baselines["prompt"].count
    assert layer.random_null != bank_of(Corpus())[1].random_null


def test_the_same_inputs_give_the_same_bank_bit_for_bit() -> None:
    assert bank_of(Corpus()) == bank_of(Corpus())


def test_files_objects_and_several_files_are_the_same(tmp_path: Any) -> None:
    corpus = Corpus((4, 4))
    for name, items in zip(("stories", "neutral", "ordinary"), corpus.sources, strict=True):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(json.dumps(item) for item in items) + "\n\n")
    (tmp_path / "first.jsonl").write_text("".join(json.dumps(item) + "\n" for item in corpus.stories[:3]))
    (tmp_path / "rest.jsonl").write_text("".join(json.dumps(item) + "\n" for item in corpus.stories[3:]))
    options: dict[str, Any] = {"layers": LAYERS, "progress": False, "skip": 8}
    rest = (tmp_path / "neutral.jsonl", str(tmp_path / "ordinary.jsonl"))
    one = extract(MODEL, plain.tokenizer(), tmp_path / "stories.jsonl", *rest, **options)
    two = extract(MODEL, plain.tokenizer(), [tmp_path / "first.jsonl", str(tmp_path / "rest.jsonl")], *rest, **options)
    assert one == two == bank_of(corpus)


def test_names_give_the_order() -> None:
    corpus = Corpus((4, 4, 4))
    names = ["emotion 2", "emotion 0", "emotion 1"]
    close(bank_of(corpus, names=names), bank_of(corpus).subset(names))


# --- what it says about itself ------------------------------------------------------------------------------------------


def test_the_bank_fits_its_model_and_says_how_it_was_made(tmp_path: Any) -> None:
    tokenizer = plain.tokenizer()
    made = bank_of(Corpus(), tokenizer, out=tmp_path / "bank.safetensors", read_layer=1, steer_layers=[0, 1], meta={"evidence": {"why": 1}})
    found = load_bank(tmp_path / "bank.safetensors")
    assert found == made
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found.check(MODEL, tokenizer)
    assert (found.read_layer, found.steer_layers) == (1, (0, 1))
    assert found.meta["evidence"] == {"why": 1}
    assert found.meta["corpus"]["stories_per_concept"] == [2, 4]
    assert found.meta["recipe"]["skip"] == 8
    assert found.meta["recipe"]["denoise"] == "tokens"


def test_families_are_the_papers_as_far_as_they_are_known() -> None:
    corpus = Corpus((3, 3, 3))
    for story in corpus.stories:
        story["emotion"] = {"emotion 0": "calm", "emotion 1": "angry", "emotion 2": "sarcastic"}[story["emotion"]]
    members = [name for family in bank_of(corpus).families.values() for name in family]
    assert sorted(members) == ["angry", "calm"]
    assert bank_of(corpus, families={"Edge": ["sarcastic"]}).families == {"Edge": ("sarcastic",)}
    with pytest.raises(BankError, match=r"family 'Edge': unknown concept 'sarcastc'; nearest known: sarcastic"):
        bank_of(corpus, families={"Edge": ["sarcastc"]})


def test_stories_shorter_than_the_skip_are_counted_and_left_out() -> None:
    corpus = Corpus((3, 4), shortest=20)
    long = bank_of(corpus)
    short = [{"emotion": "emotion 1", "text": " ".join(plain.WORDS[:length])} for length in (8, 1)]
    corpus.stories[2:2] = short
    job = Extraction(MODEL, plain.tokenizer(), *corpus.sources, recipe=Recipe(skip=8), layers=LAYERS, progress=False)
    assert (job.plan.stories, job.plan.short) == (7, 2)
    found = job.run()
    assert job.summary is not None
    assert (job.summary.stories, job.summary.short) == (7, 2)
    assert found.meta["corpus"]["short"] == 2
    close(found, long)


def test_every_token_is_counted_once(capfd: pytest.CaptureFixture[str]) -> None:
    job = Extraction(MODEL, plain.tokenizer(), *Corpus().sources, recipe=Recipe(skip=8), layers=LAYERS, progress=True)
    job.run()
    assert job.summary is not None
    assert job.summary.tokens == job.plan.tokens
    assert job.summary.tokens_per_second > 0
    assert capfd.readouterr().out == ""


def test_progress_says_how_much_is_left(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("emovec.extraction.progress._EVERY", -1.0)
    job = Extraction(MODEL, plain.tokenizer(), *Corpus().sources, recipe=Recipe(skip=8), layers=LAYERS, batch_tokens=60)
    job.run()
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) > 5
    assert f"{job.plan.tokens:,} of {job.plan.tokens:,} tokens" in lines[-1]
    assert "min left" in lines[-1]


def test_memory_does_not_grow_with_the_stories(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: dict[int, int] = {}
    for times in (1, 8):
        corpus = Corpus((4, 4))
        corpus.stories *= times
        job = Extraction(MODEL, plain.tokenizer(), *corpus.sources, recipe=Recipe(skip=8), layers=LAYERS, progress=False, batch_tokens=60)
        seen: set[int] = set()
        moments, take = job._moments(), StoryMoments.take

        def taken(self: StoryMoments, batch: Any, seen: set[int] = seen, take: Any = take) -> None:
            seen.add(sum(tensor.nbytes for tensor in self.tensors.values()))
            take(self, batch)

        monkeypatch.setattr(StoryMoments, "take", taken)
        job.run()
        monkeypatch.setattr(StoryMoments, "take", take)
        assert seen == {0, moments.bytes}
        sizes[times] = job.plan.bytes
    assert sizes[1] == sizes[8]


# --- what it refuses, before it computes anything -------------------------------------------------------------------------


@pytest.fixture
def no_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(*args: object) -> None:
        raise AssertionError("a forward pass before everything was checked")

    monkeypatch.setattr("emovec.extraction.blocks.Blocks.run", forward)


@pytest.mark.usefixtures("no_forward")
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"layers": [1, 4]}, BankError, "layer 4 does not exist in a model of 4 layers, 0 to 3"),
        ({"layers": [-1]}, BankError, "layer -1 does not exist"),
        ({"layers": []}, BankError, "no layers"),
        ({"read_layer": 3}, BankError, r"layer 3 is not among those extracted, \[0, 1, 2\]"),
        ({"steer_layers": [0, 3]}, BankError, "layer 3 is not among those extracted"),
        ({"names": ["emotion 0", "emotion 1", "emotion 2", "calm"]}, CorpusError, "empty emotion 'calm': it has no stories"),
        ({"names": ["emotion 0", "emotion 1"]}, CorpusError, "item 1: unknown concept 'emotion 2'; nearest known: emotion 1"),
        ({"names": ["emotion 0", "emotion 0"]}, BankError, "duplicate concept 'emotion 0'"),
        ({"skip": 60}, CorpusError, "empty emotion 'emotion [0-2]': its [2-4] stories are no longer than the 60 tokens skipped"),
        ({"skip": -1}, ValueError, "skip must be a number of tokens, got -1"),
        ({"format": "html"}, ValueError, "format must be one of 'raw', 'chat', got 'html'"),
        ({"denoise": "words"}, ValueError, "denoise must be one of"),
        ({"variance": 0.0}, ValueError, "variance must be above 0"),
        ({"shrinkage": 1.5}, ValueError, "shrinkage must be above 0 and at most 1, got 1.5"),
        ({"level": "ordinary"}, ValueError, "level must be true or false, got 'ordinary'"),
        ({"batch_tokens": 0}, ValueError, "batch_tokens must be at least 1, got 0"),
        ({"out": "/nowhere/bank.safetensors"}, FileNotFoundError, "there is no folder /nowhere"),
        ({"resume": "/nowhere/state"}, FileNotFoundError, "there is no folder /nowhere"),
        ({"meta": {"a": object()}}, BankError, "meta must be JSON"),
        ({"spik": 3}, TypeError, "spik"),
    ],
)
def test_bad_arguments(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        bank_of(Corpus(), **options)


@pytest.mark.usefixtures("no_forward")
def test_texts_longer_than_the_model_takes() -> None:
    corpus = Corpus()
    corpus.stories[4]["text"] = "w1 " * 129
    with pytest.raises(CorpusError, match="item 5 has 129 tokens, more than the 128 that the model takes"):
        bank_of(corpus)
    corpus = Corpus()
    corpus.ordinary[1]["content"] = "w1 " * 128
    with pytest.raises(CorpusError, match="prompt 2 has 132 tokens"):
        bank_of(corpus)
    corpus = Corpus()
    corpus.neutral[1]["turns"][0]["content"] = "w1 " * 128
    with pytest.raises(CorpusError, match=r"dialogue 2 has 1\d\d tokens"):
        bank_of(corpus)


@pytest.mark.usefixtures("no_forward")
def test_too_few_stories() -> None:
    corpus = Corpus((3,))
    with pytest.raises(CorpusError, match="a contrast needs two emotions at least"):
        bank_of(corpus)
    with pytest.raises(CorpusError, match="whitened readers need two stories of some emotion"):
        bank_of(Corpus((1, 1)))


@pytest.mark.usefixtures("no_forward")
def test_a_model_in_training_mode() -> None:
    with pytest.raises(ValueError, match="training mode"):
        bank_of(Corpus(), model=tiny.fresh().train())


def test_one_story_each_will_do_without_whitening() -> None:
    assert bank_of(Corpus((1, 1)), readers=None)[0].readers is None


def test_activations_that_are_not_finite(tmp_path: Any) -> None:
    broken = tiny.fresh()
    with torch.no_grad():
        broken.model.layers[1].mlp.down_proj.weight[0, 0] = torch.inf
    with pytest.raises(BankError, match="layer 1: activations are not finite"):
        bank_of(Corpus(), model=broken, out=tmp_path / "bank.safetensors")
    assert not list(tmp_path.iterdir())
    assert bank_of(Corpus(), model=broken, layers=[0]).layers == (0,)


def test_denoising_everything_away() -> None:
    corpus = Corpus()
    for seed in range(1, 5):
        corpus.neutral += Corpus(seed=seed).neutral
    with pytest.raises(BankError, match="layer 0: nothing is left of a direction after 64 of 64 neutral components are projected out"):
        bank_of(corpus, variance=1.0)
