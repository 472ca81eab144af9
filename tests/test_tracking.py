"""Every way to call a model and ``generate`` is followed: whose tokens, of which kind, which are padding."""

from __future__ import annotations

import pytest
import tiny
import torch
import transformers
from streams import assert_close, untouched
from test_models import Wrapped
from torch import nn

from emovec.hook import attach
from emovec.models import unwrapped
from emovec.tracking import Tracker

torch.set_num_threads(1)

GREEDY = {"max_new_tokens": 5, "do_sample": False}


class Log:
    """A listener that notes the spans, and has sequences end or get other tokens as told."""

    follows = True

    def __init__(self, decisions=()):
        self.begun, self.ended, self.asked = [], [], 0
        self._decisions = dict(decisions)  # how often asked -> decision

    def begin(self, span):
        self.begun.append(span)

    def end(self, span):
        self.ended.append(span)

    def decide(self):
        self.asked += 1
        return self._decisions.get(self.asked, {})


def follow(call, model=None, decisions=()):
    """The log of ``call(model)``."""
    model = tiny.model() if model is None else model
    log = Log(decisions)
    tracker = Tracker(model, log)
    tracker.install()
    try:
        with torch.no_grad():
            log.result = call(model)
    finally:
        tracker.remove()
    assert not tracker.active
    return log


def columns(log):
    return [(span.start, span.width, span.prompt) for span in log.ended]


BATCH = tiny.padded([tiny.tokens(1, 4)[0], tiny.tokens(1, 6)[0]], "left")


def test_generate():
    log = follow(lambda model: model.generate(**BATCH, **GREEDY))
    assert columns(log) == [(0, 6, 6), (6, 1, 0), (7, 1, 0), (8, 1, 0), (9, 1, 0)]
    assert [span.fresh for span in log.ended] == [True, False, False, False, False]
    assert all(span.generating and span.batch == span.prompts == 2 for span in log.ended)
    assert torch.equal(log.ended[0].real, BATCH["attention_mask"].bool())
    assert torch.equal(torch.cat([span.ids for span in log.ended], 1), log.result[:, :-1])
    assert log.asked == 5


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"use_cache": False}, [(0, 6, 6), (0, 7, 6), (0, 8, 6), (0, 9, 6), (0, 10, 6)]),
        ({"prefill_chunk_size": 4}, [(0, 4, 4), (4, 2, 2), (6, 1, 0), (7, 1, 0), (8, 1, 0), (9, 1, 0)]),
        ({"cache_implementation": "static"}, [(0, 6, 6), (6, 1, 0), (7, 1, 0), (8, 1, 0), (9, 1, 0)]),
        ({"max_new_tokens": 1}, [(0, 6, 6)]),
    ],
    ids=str,
)
def test_columns(options, expected):
    log = follow(lambda model: model.generate(**BATCH, **{**GREEDY, **options}))
    assert columns(log) == expected
    plain = tiny.model().generate(**BATCH, **{**GREEDY, **options})
    assert torch.equal(log.result, plain)


def test_padding_of_a_prompt_in_chunks():
    log = follow(lambda model: model.generate(**BATCH, **GREEDY, prefill_chunk_size=4))
    real = torch.cat([span.real for span in log.ended[:2]], 1)
    assert torch.equal(real, BATCH["attention_mask"].bool())


def test_copies_and_beams():
    log = follow(lambda model: model.generate(**BATCH, max_new_tokens=3, do_sample=True, num_return_sequences=3))
    assert {(span.batch, span.prompts) for span in log.ended} == {(6, 2)}
    Log.follows = False
    try:
        log = follow(lambda model: model.generate(**BATCH, max_new_tokens=3, num_beams=3))
    finally:
        Log.follows = True
    assert {(span.batch, span.prompts) for span in log.ended} == {(6, 2)}
    assert torch.equal(log.result, tiny.model().generate(**BATCH, max_new_tokens=3, num_beams=3))


def test_generate_goes_on_from_a_cache():
    """As in a chat: the second turn runs only what is new."""
    model = tiny.model()
    ids = tiny.tokens(1, 6)
    first = model.generate(ids, **GREEDY, return_dict_in_generate=True)
    longer = torch.cat([first.sequences, tiny.tokens(1, 3, seed=5)], 1)
    log = follow(lambda model: model.generate(longer, past_key_values=first.past_key_values, **GREEDY))
    assert columns(log) == [(10, 4, 4), (14, 1, 0), (15, 1, 0), (16, 1, 0), (17, 1, 0)]
    assert log.ended[0].fresh
    with attach(model, tiny.bank()) as whole:
        expected = model.generate(longer, **GREEDY)
    assert torch.equal(log.result, expected)
    again = model.generate(ids, **GREEDY, return_dict_in_generate=True)
    with attach(model, tiny.bank()) as probe:
        model.generate(longer, past_key_values=again.past_key_values, **GREEDY)
    assert probe[0].positions == range(10, 18)
    assert torch.equal(probe[0].tokens, whole[0].tokens[10:])
    assert_close(probe[0].scores, whole[0].scores[10:])


def test_decisions():
    """Sequence 0 is given two tokens and ends; the other is not disturbed."""
    plain = tiny.model().generate(**BATCH, **GREEDY)
    decisions = {2: {0: 70}, 3: {0: 71}, 4: {0: None}, 5: {0: None}}
    log = follow(lambda model: model.generate(**BATCH, **GREEDY), decisions=decisions)
    assert log.result[0, 6:].tolist() == [int(plain[0, 6]), 70, 71, 0, 0]
    assert torch.equal(log.result[1], plain[1])
    real = [span.real[:, 0].tolist() for span in log.ended[1:]]
    assert real == [[True, True], [True, True], [True, True], [False, True]], "what is run for it after its end is padding"
    everyone = {2: {0: None, 1: None}}
    log = follow(lambda model: model.generate(**BATCH, **GREEDY), decisions=everyone)
    assert log.result.shape[1] == 8, "the loop ends when all have"


def test_a_streamer_sees_what_was_decided():
    class Streamer:
        def __init__(self):
            self.tokens = []

        def put(self, value):
            self.tokens += value.flatten().tolist()

        def end(self):
            self.tokens.append("end")

    streamer = Streamer()
    follow(lambda model: model.generate(tiny.tokens(1, 3), **GREEDY, streamer=streamer), decisions={1: {0: 70}, 2: {0: None}})
    assert streamer.tokens[3:] == [70, 0, "end"]


def test_forward_passes():
    def call(model):
        model(**BATCH)
        cache = model(BATCH["input_ids"][:, :3]).past_key_values
        model(BATCH["input_ids"][:, 3:4], past_key_values=cache, attention_mask=torch.ones(2, 4))
        model.model(input_ids=BATCH["input_ids"])
        model.model(BATCH["input_ids"][:1])

    log = follow(call)
    assert columns(log) == [(0, 6, 6), (0, 3, 3), (3, 1, 0), (0, 6, 6), (0, 6, 6)]
    assert [span.fresh for span in log.ended] == [True, True, False, True, True]
    assert not any(span.generating for span in log.ended)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({}, "called without input_ids"),
        ({"input_ids": tiny.tokens(1, 3)[0]}, "called without input_ids"),
        (
            {"input_ids": tiny.tokens(1, 3), "attention_mask": torch.ones(1, 1, 3, 3)},
            "got a tensor of shape",
        ),
        ({"input_ids": tiny.tokens(1, 3), "attention_mask": {"full": None}}, "got a dict"),
        ({"input_ids": tiny.tokens(1, 3), "attention_mask": torch.ones(1, 2)}, "attention_mask has 2 columns, but there are 0 tokens"),
        ({"input_ids": tiny.tokens(1, 3), "past_key_values": object()}, "cannot tell how many tokens a object holds"),
    ],
)
def test_calls_that_cannot_be_followed(inputs, message):
    model = tiny.model()
    log = Log()
    tracker = Tracker(model, log)
    tracker.install()
    with pytest.raises(ValueError, match=message):
        model(**inputs)
    assert log.begun == []
    with torch.no_grad():
        model(tiny.tokens(1, 3))
    assert len(log.ended) == 1, "the next call is followed"
    tracker.remove()
    assert untouched(model)


@pytest.mark.parametrize("wrap", [torch.compile, Wrapped, nn.DataParallel], ids=["compile", "PEFT", "DataParallel"])
def test_wrapped_models(wrap):
    model, bank, ids = tiny.fresh(), tiny.bank(), tiny.tokens(1, 4)
    wrapped = wrap(model) if wrap is not torch.compile else torch.compile(model, backend="eager")
    with attach(model, bank, steer={"calm": 0.3}) as expected, torch.no_grad():
        logits = model(ids).logits
    with attach(wrapped, bank, steer={"calm": 0.3}) as probe, torch.no_grad():
        torch.testing.assert_close(wrapped(ids).logits, logits)
    assert_close(probe[0].scores, expected[0].scores)
    assert untouched(unwrapped(wrapped))


def test_gradient_checkpointing():
    """The blocks run again in the backward pass; those runs are not part of a forward pass of the model."""
    model, bank, ids = tiny.fresh(), tiny.bank(), tiny.tokens(1, 5)

    def gradient():
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        return model.model.layers[0].mlp.up_proj.weight.grad.clone()

    with attach(model, bank, steer={"calm": 0.3}) as probe:
        expected = gradient()
        scores = probe[0].scores
        model.train()
        model.gradient_checkpointing_enable()
        torch.testing.assert_close(gradient(), expected)
        assert_close(probe[0].scores, scores)


def test_a_vision_language_model():
    vision = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": 32,
        "patch_size": 16,
    }
    text = transformers.LlamaConfig(**tiny.BASE)
    config = transformers.LlavaConfig(vision_config=transformers.CLIPVisionConfig(**vision), text_config=text, image_token_id=5)
    model = transformers.LlavaForConditionalGeneration(config).eval()
    ids = tiny.tokens(1, 8)
    ids[0, 1:5] = 5
    log = follow(lambda model: model.generate(ids, pixel_values=torch.randn(1, 3, 32, 32), **GREEDY), model)
    assert columns(log) == [(0, 8, 8), (8, 1, 0), (9, 1, 0), (10, 1, 0), (11, 1, 0)]
    assert untouched(model)
