"""What an attached model reads, token by token, against plain hooks and fp64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import tiny
import torch
from streams import CALM, GREEDY, MIXED, Streams, assert_close

from emovec.bank import Bank, BankLayer
from emovec.hook import attach

torch.set_num_threads(1)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_scores_equal_an_independent_computation(family):
    model, bank = tiny.model(family), tiny.bank(family)
    prompt = tiny.tokens(2, 5)
    with Streams(model) as streams:
        expected = model.generate(prompt, attention_mask=torch.ones_like(prompt), **GREEDY)
    with attach(model, bank) as probe:
        out = model.generate(prompt, attention_mask=torch.ones_like(prompt), **GREEDY)
    assert torch.equal(out, expected), "reading changes nothing"
    kinds = ["prompt"] * 5 + ["generated"] * 5
    assert len(probe) == 2
    for sequence, reading in enumerate(probe):
        assert reading.kind == tuple(kinds)
        assert reading.layers == bank.layers
        assert reading.layer == bank.read_layer
        assert torch.equal(reading.tokens, out[sequence, :-1]), "the last token chosen is not run through the model"
        assert reading.calibrated
        for layer in bank.layers:
            assert_close(reading.at(layer), streams.scores(bank, layer, kinds)[sequence])


def test_layer_is_the_output_of_its_block():
    """Not ``hidden_states[layer]``, which is one off, nor the last entry, which is after the final norm."""
    model, bank = tiny.fresh(), tiny.bank()  # fresh, because transformers leaves hooks of its own for output_hidden_states
    ids = tiny.tokens(1, 6)
    with attach(model, bank) as probe, torch.no_grad():
        states = model(ids, output_hidden_states=True).hidden_states
    baseline = bank[2].baseline("prompt")

    def scores(stream):
        return (stream[0].double() @ bank[2].directions.double().T - baseline.mean) / baseline.std

    assert_close(probe[0].at(2), scores(states[3]))
    assert (probe[0].at(2) - scores(states[2])).abs().max() > 0.5
    last = bank[3].baseline("prompt")
    after_norm = (states[4][0].double() @ bank[3].directions.double().T - last.mean) / last.std
    assert (probe[0].at(3) - after_norm).abs().max() > 0.5


def test_a_row_of_minus_one_leaves_the_model_as_it_was_bit_for_bit():
    model, bank = tiny.fresh().bfloat16(), tiny.bank()
    ids = tiny.tokens(3, 7)
    with torch.no_grad():
        plain = model(ids).logits
        with attach(model, bank, steer=[None, CALM, {}]):
            steered = model(ids).logits
    assert torch.equal(steered[[0, 2]].view(torch.int16), plain[[0, 2]].view(torch.int16))
    assert not torch.equal(steered[1], plain[1])


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom", "qwen3_moe"])
def test_padding_changes_nothing(family, side):
    model, bank = tiny.model(family), tiny.bank(family)
    prompts = [tiny.tokens(1, length, seed=length)[0] for length in (3, 7, 5, 1)]
    batch = tiny.padded(prompts, side)
    if family == "gpt2":  # learnt positions: the caller's to give, outside generate
        batch["position_ids"] = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        with attach(model, bank, steer=MIXED) as probe:
            model(**batch)
        for sequence, (prompt, steer) in enumerate(zip(prompts, MIXED, strict=True)):
            with attach(model, bank, steer=steer) as alone:
                model(prompt[None])
            assert torch.equal(probe[sequence].tokens, prompt)
            assert probe[sequence].positions == range(len(prompt))
            for layer in bank.layers:
                assert_close(probe[sequence].at(layer), alone[0].at(layer))


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "bloom"])
def test_per_sequence_steering_in_a_batch_equals_single_runs(family):
    model, bank = tiny.model(family), tiny.bank(family)
    prompts = [tiny.tokens(1, length, seed=length)[0] for length in (3, 7, 5, 2)]
    with attach(model, bank, steer=MIXED) as probe:
        out = model.generate(**tiny.padded(prompts, "left"), **GREEDY)
    for sequence, (prompt, steer) in enumerate(zip(prompts, MIXED, strict=True)):
        with attach(model, bank, steer=steer) as alone:
            expected = model.generate(prompt[None], attention_mask=torch.ones(1, len(prompt), dtype=torch.long), **GREEDY)
        assert torch.equal(out[sequence, -6:], expected[0, -6:])
        assert probe[sequence].kind == alone[0].kind
        for layer in bank.layers:
            assert_close(probe[sequence].at(layer), alone[0].at(layer))


@pytest.mark.parametrize("steer", MIXED[:1] + MIXED[2:], ids=["add", "rules", "generated"])
def test_no_cache_equals_cache(steer):
    model, bank = tiny.model(), tiny.bank()
    batch = tiny.padded([tiny.tokens(1, 4)[0], tiny.tokens(1, 6)[0]], "left")
    with attach(model, bank, steer=steer) as cached:
        out = model.generate(**batch, **GREEDY)
    with attach(model, bank, steer=steer) as recomputed:
        again = model.generate(**batch, **GREEDY, use_cache=False)
    assert torch.equal(out, again)
    for one, other in zip(cached, recomputed, strict=True):
        assert one.kind == other.kind
        assert torch.equal(one.tokens, other.tokens)
        assert_close(one.scores, other.scores)


def test_forward_passes_that_go_on_from_a_cache():
    model, bank = tiny.model(), tiny.bank()
    ids = tiny.tokens(2, 8)
    with attach(model, bank) as probe, torch.no_grad():
        model(ids)
        whole = [reading.scores for reading in probe]
        cache = model(ids[:, :3]).past_key_values
        cache = model(ids[:, 3:6], past_key_values=cache).past_key_values
        cache = model(ids[:, 6:7], past_key_values=cache).past_key_values
        reading = probe[1]
        assert reading.kind == ("prompt",) * 6 + ("generated",), "one token after others is taken for a generated one"
        assert_close(reading.scores[:6], whole[1][:6])
        cache.crop(5)
        model(ids[:, 5:], past_key_values=cache)
        assert len(probe[1]) == 8, "what was cropped from the cache is replaced"
        assert_close(probe[1].scores, whole[1])
        model(ids[:1, :2])
        assert len(probe) == 1, "a new batch begins"
        assert len(probe[0]) == 2


def test_sequences_that_end_early_are_read_to_their_end():
    model, bank = tiny.fresh(), tiny.bank()
    prompts = tiny.tokens(4, 5)
    out = model.generate(prompts, max_new_tokens=12, do_sample=False)
    model.generation_config.eos_token_id = int(out[0, 7])
    with attach(model, bank) as probe:
        out = model.generate(prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=12, do_sample=False)
    assert out.shape[1] == 17, "another sequence goes on"
    for row, reading in zip(out, probe, strict=True):
        ended = (row[5:] == model.generation_config.eos_token_id).nonzero()
        kept = 16 if len(ended) == 0 else 5 + int(ended[0])
        assert torch.equal(reading.tokens, row[:kept])
    assert len(probe[0]) < 16


def test_sampling_and_copies_of_prompts():
    model, bank = tiny.model(), tiny.bank()
    prompts = tiny.tokens(2, 4)
    torch.manual_seed(0)
    with attach(model, bank, steer=[None, CALM]) as probe:
        out = model.generate(prompts, max_new_tokens=5, do_sample=True, num_return_sequences=3)
    assert len(probe) == 6
    for row, reading in zip(out, probe, strict=True):
        assert torch.equal(reading.tokens, row[:-1])
    for sequence, steer in ((0, None), (5, CALM)):
        with attach(model, bank, steer=steer) as alone, torch.no_grad():
            model(out[sequence : sequence + 1, :-1])
        assert_close(probe[sequence].scores[:4], alone[0].scores[:4])


def test_embeddings_instead_of_ids():
    model, bank = tiny.model(), tiny.bank()
    ids = tiny.tokens(2, 4)
    with attach(model, bank, steer=CALM) as probe:
        model.generate(ids, attention_mask=torch.ones_like(ids), **GREEDY)
        expected = [reading.scores for reading in probe]
        model.generate(inputs_embeds=model.get_input_embeddings()(ids), attention_mask=torch.ones_like(ids), **GREEDY)
    assert probe[0].tokens is None
    for reading, scores in zip(probe, expected, strict=True):
        assert_close(reading.scores, scores)


def test_layers_to_read_are_chosen():
    model, bank = tiny.model(), tiny.bank()
    ids = tiny.tokens(1, 4)
    with attach(model, bank) as all_layers, torch.no_grad():
        model(ids)
    with attach(model, bank, layers=[3, 1]) as probe, torch.no_grad():
        model(ids)
    assert probe[0].layers == (1, 3)
    assert probe[0].layer == 3
    assert torch.equal(probe[0].at(1), all_layers[0].at(1))
    with pytest.raises(ValueError, match="layer 2 was not read"):
        probe[0].at(2)


def test_readers_of_their_own():
    model, known = tiny.model(), tiny.bank()
    g = torch.Generator().manual_seed(9)
    layers = [replace(layer, readers=torch.randn(layer.directions.shape, generator=g)) for layer in known.values()]
    bank = Bank(layers, known.read_layer, known.steer_layers, known.families, known.meta)
    ids = tiny.tokens(2, 5)
    with Streams(model) as streams, torch.no_grad():
        model(ids)
    with attach(model, bank) as probe, torch.no_grad():
        model(ids)
    assert_close(probe[1].at(2), streams.scores(bank, 2, ["prompt"] * 5)[1])
    steer = {"angry": {"set": 2.0}, "calm": 0.2}
    with attach(model, bank, steer=steer, steer_layers=[2]), Streams(model) as streams, torch.no_grad():
        model(ids)
    assert_close(streams.scores(bank, 2, ["prompt"] * 5)[..., bank.resolve("angry")], torch.full((2, 5), 2.0))


def test_uncalibrated_scores_are_raw_projections():
    model = tiny.model()
    layer = BankLayer.from_directions(tiny.bank()[1].directions, tiny.CONCEPTS, 1)
    with pytest.warns(UserWarning, match="no fingerprint"), attach(model, Bank([layer])) as probe, torch.no_grad():
        model(tiny.tokens(1, 4))
    with Streams(model) as streams, torch.no_grad():
        model(tiny.tokens(1, 4))
    assert not probe[0].calibrated
    assert_close(probe[0].scores, streams.seen[1][0][0].double() @ layer.directions.double().T)
