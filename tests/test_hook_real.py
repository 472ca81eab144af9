"""The packaged model with its bank: what is read and what steering and the guard do there."""

from __future__ import annotations

import pytest
import torch
from banks import run_examples
from streams import Streams

from emovec import models
from emovec.bank import load_bank
from emovec.guard import Guard, Refuse, Threshold
from emovec.hook import attach

pytestmark = pytest.mark.slow

PROMPTS = ["My deadline is in ten minutes, every test fails and I will lose my job.", "Write one line on rain."]
OPTIONS = {"max_new_tokens": 12, "do_sample": False}


@pytest.fixture(scope="module")
def smollm():
    model, tokenizer = models.load_model("smollm2-135m-instruct", dtype=torch.float32, device="cpu")
    return model, tokenizer, load_bank("smollm2-135m-instruct")


def test_scores_equal_an_independent_computation(smollm):
    model, tokenizer, bank = smollm
    inputs = models.encode(tokenizer, PROMPTS[0])
    with Streams(model) as streams:
        expected = model.generate(**inputs, **OPTIONS)
    with attach(model, bank, tokenizer=tokenizer) as probe:
        out = model.generate(**inputs, **OPTIONS)
    assert torch.equal(out, expected)
    assert PROMPTS[0] in probe[0].text
    for layer in bank.layers:
        found, known = probe[0].at(layer).double(), streams.scores(bank, layer, probe[0].kind)[0]
        torch.testing.assert_close(found[1:], known[1:], rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_batch_equals_single_runs(smollm, side):
    model, tokenizer, bank = smollm
    steer = [{"calm": 0.1}, {"desperate": {"at_least": 2.0}}]
    with torch.inference_mode():
        with attach(model, bank, steer=steer) as probe:
            model(**models.encode(tokenizer, PROMPTS, padding_side=side))
        for sequence, (prompt, value) in enumerate(zip(PROMPTS, steer, strict=True)):
            with attach(model, bank, steer=value) as alone:
                model(**models.encode(tokenizer, prompt))
            assert torch.equal(probe[sequence].tokens, alone[0].tokens)
            torch.testing.assert_close(probe[sequence].scores[1:], alone[0].scores[1:], rtol=1e-3, atol=5e-3)


@pytest.mark.parametrize("concept", ["calm", "desperate", "happy"])
def test_steering_at_one_layer_is_read_at_those_above(smollm, concept):
    model, tokenizer, bank = smollm
    inputs = models.encode(tokenizer, PROMPTS)
    with torch.inference_mode():
        with attach(model, bank) as plain:
            model(**inputs)
        with attach(model, bank, steer={concept: 0.2}, steer_layers=[bank.layers[0]]) as probe:
            model(**inputs)
    k = bank.resolve(concept)
    for one, other in zip(probe, plain, strict=True):
        shift = (one.scores - other.scores)[1:].mean(0)
        assert int(shift.argmax()) == k, "of all concepts, it is the one that was added that rises most"


def test_the_guard_refuses_in_words(smollm):
    model, tokenizer, bank = smollm
    inputs = models.encode(tokenizer, PROMPTS)
    with attach(model, bank) as plain:
        model.generate(**inputs, **OPTIONS)
    peaks = [float(reading.smooth(8).of("stressed")[1:].max()) for reading in plain]
    high = max(range(2), key=peaks.__getitem__)
    guard = Guard(Threshold("stressed", sum(peaks) / 2, Refuse("I would rather not."), hold=1))
    with attach(model, bank, guard=guard, tokenizer=tokenizer) as probe:
        out = model.generate(**inputs, **OPTIONS)
    assert {event.sequence for event in probe.events} == {high}
    texts = tokenizer.batch_decode(out, skip_special_tokens=True)
    assert texts[high].endswith("I would rather not.")
    assert "I would rather not." not in texts[1 - high]


@pytest.mark.parametrize("page", ["hooks.md", "../README.md"])
def test_examples_of_the_page(page):
    run_examples(page)
