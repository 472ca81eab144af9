"""Steering on a tiny model in which what a direction does is known: its own word's unembedding points along it, or nobody's does."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import small_corpus
import tiny
import torch
from small_corpus import small  # noqa: F401 - a fixture

from emovec.bank import Bank, BankLayer
from emovec.evaluation import causality, lens, texts, verdict
from emovec.evaluation.activations import means
from emovec.evaluation.labelled import Moments, recipe_of
from emovec.evaluation.material import Material, Options
from emovec.evaluation.steered import Steered, with_random
from emovec.extraction.blocks import Blocks

pytestmark = pytest.mark.usefixtures("small")

LAYERS = (0, 1, 2, 3)


def material(*, speaks: bool, advance: Any = None) -> Material:
    """A model whose words follow the bank's directions, or one whose words do not."""
    model, bank = _model(speaks), small_corpus.bank()
    bank = Bank(bank.values(), 2, (1, 2), bank.families, {key: value for key, value in bank.meta.items() if key != "fingerprint"})
    loaded = texts.load(small_corpus.tokenizer(), bank.names, None)
    blocks = Blocks(model, LAYERS)
    found = {name: means(blocks, part.texts, len(part.pools)) for name, part in loaded.sets.items()}
    rows = found["ordinary"][:, 0].double()
    spread = torch.stack([torch.cov(rows[:, layer].T) + torch.eye(tiny.WIDTH) for layer in range(len(LAYERS))])
    kinds = ("prompt", "turn_start", "generated", "neutral_tokens", "neutral_dialogues")
    moments = dict.fromkeys(kinds, Moments(rows.mean(0), spread, 99, LAYERS))
    return Material(
        bank,
        recipe_of(bank),
        loaded,
        LAYERS,
        found,
        moments,
        Options(samples=50, permutations=200),
        True,
        model,
        small_corpus.tokenizer(),
        False,
        advance or (lambda _: None),
    )


@functools.cache
def _model(speaks: bool) -> Any:
    model = tiny.fresh()
    bank, tokenizer = small_corpus.bank(), small_corpus.tokenizer()
    with torch.no_grad():
        for row, name in enumerate(bank.names):
            along = bank[1].directions[row] + bank[2].directions[row]
            model.lm_head.weight[tokenizer.convert_tokens_to_ids(name)] = 3 * along / along.norm() if speaks else torch.zeros_like(along)
    return model


def outcome(found: dict[str, Any], use: str) -> str:
    return next(claim["verdict"] for claim in verdict.verdicts({"causality": found}) if claim["use"] == use)


def test_directions_that_speak_are_shown_to_and_others_are_not() -> None:
    spoken, silent = (causality.result(material(speaks=speaks)) for speaks in (True, False))
    naming = spoken["naming"]
    assert naming["passed"]["hits"] >= 5
    assert all(part["place"] == 1 for part in naming["words"].values())
    assert max(null["p"] for null in naming["mean_slope"]["null"].values()) < 0.02
    assert outcome(spoken, "Steering which feeling is named") in ("yes", "with care")
    own, other = (spoken["writing"]["words"]["2"][name]["value"] for name in ("own", "random"))
    assert own > other
    assert silent["naming"]["passed"]["hits"] <= 1
    assert outcome(silent, "Steering which feeling is named") == "not shown"
    assert outcome(silent, "Steering the feeling of what is written") == "not shown"


def test_costs_are_losses_computed_by_hand() -> None:
    whole = material(speaks=True)
    steered = Steered(whole.model, whole.tokenizer, with_random(whole.bank, 2, torch.Generator().manual_seed(0)))
    ids = causality.neutral_texts(whole.tokenizer)
    found = steered.losses(ids, [{}, {"calm": 0.3}], causality.SKIP)
    logits = added(whole, "calm", 0.3, ids).log_softmax(-1)
    expected = -logits[:, causality.SKIP - 1 : -1].gather(2, ids[:, causality.SKIP :, None])[..., 0].mean(1)
    torch.testing.assert_close(found[1], expected.double(), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found[0], found[1], rtol=1e-3)


def added(whole: Material, name: str, strength: float, ids: torch.Tensor) -> torch.Tensor:
    """Logits with the direction added to the outputs of the bank's steering layers, by hooks of its own."""
    handles = []
    for index in whole.bank.steer_layers:
        layer = whole.bank[index]
        change = strength * (layer.residual_norm or 0.0) * layer.direction(name)

        def hook(module: Any, args: Any, output: Any, change: torch.Tensor = change) -> Any:
            return (output[0] + change, *output[1:]) if isinstance(output, tuple) else output + change

        handles.append(whole.model.model.layers[index].register_forward_hook(hook))
    try:
        with torch.no_grad():
            logits: torch.Tensor = whole.model(input_ids=ids).logits
    finally:
        for handle in handles:
            handle.remove()
    return logits


def test_a_sequence_does_not_depend_on_its_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = material(speaks=True)
    steered = Steered(whole.model, whole.tokenizer, with_random(whole.bank, 2, torch.Generator().manual_seed(0)))
    values: Sequence[dict[str, Any]] = [{}, {"calm": 0.2}, {"random 1": 0.2}, {"afraid": -0.1}]
    prompts, tokens = ["w1 w2 w3", "w4 w5 w6 w7 w8"], [20, 21]
    together = steered.next_tokens(prompts, values, tokens), steered.written(prompts, values, 6)
    monkeypatch.setattr("emovec.evaluation.steered.SEQUENCES", 2)
    torch.testing.assert_close(steered.next_tokens(prompts, values, tokens), together[0], rtol=1e-4, atol=1e-4)
    assert steered.written(prompts, values, 6) == together[1]


def test_nothing_is_left_on_the_model_and_tokens_are_told() -> None:
    told: list[int] = []
    whole = material(speaks=True, advance=told.append)
    causality.result(whole)
    assert sum(told) > 1000
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in whole.model.modules())


def test_what_is_read_back_leaves_out_the_prompt_and_the_sink(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def recorded(blocks: Blocks, given: Any) -> torch.Tensor:
        seen.extend(given)
        return means(blocks, given)

    monkeypatch.setattr(causality, "means", recorded)
    whole = material(speaks=True)
    found = causality.result(whole)["writing"]
    assert len(seen) == sum(
        len(texts) for texts in [found["texts"][""], *(part[dose] for name, part in found["texts"].items() if name for dose in part)]
    )
    for text in seen:
        start = text.kinds.index(0)
        assert start > 1
        assert whole.tokenizer.convert_ids_to_tokens(text.ids[start - 1]) == "<|assistant|>"
        assert set(text.kinds[start:]) == {0}


def test_usable_ranges_hold_random_directions_too() -> None:
    found = causality.result(material(speaks=True))
    assert set(found["usable"]) == set(small_corpus.NAMES)
    assert len(found["usable_random"]) == found["random"]
    low, high = found["tested"]
    for ends in (*found["usable"].values(), *found["usable_random"].values()):
        assert low <= ends[0] <= 0 <= ends[1] <= high


def test_a_model_without_the_words_is_not_asked_to_name_them() -> None:
    whole = material(speaks=True)
    names = ["two words here", "more than one", "of no token"]
    renamed = Bank([replace(layer.subset(small_corpus.NAMES[:3]), names=tuple(names)) for layer in whole.bank.values()], 2, (1, 2))
    found = causality.result(replace(whole, bank=renamed, recipe=None))
    assert "0 of the words" in found["naming"]["skipped"]
    assert found["writing"]["read"] == {}
    assert outcome(found, "Steering which feeling is named") == "not tested"


def test_the_lens_finds_the_words_that_directions_speak_for() -> None:
    spoken, silent = (lens.result(material(speaks=speaks)) for speaks in (True, False))
    assert spoken["top"]["1"]["value"] == 1.0
    assert spoken["top"]["1"]["null"]["p"] < 0.02
    assert all(name in part["top"][:2] for name, part in spoken["concepts"].items())
    assert silent["top"]["1"]["null"]["p"] > 0.02


def test_the_lens_is_what_the_models_head_gives() -> None:
    model, bank = _model(True), small_corpus.bank()
    rows = bank[2].directions
    found = lens.spoken(model, rows)
    assert found is not None
    with torch.no_grad():
        torch.testing.assert_close(found, model.lm_head(model.model.norm(8 * rows)), rtol=1e-3, atol=1e-3)
    assert lens.spoken(tiny.model("mamba"), BankLayer.from_directions(torch.randn(2, tiny.WIDTH)).directions) is not None
