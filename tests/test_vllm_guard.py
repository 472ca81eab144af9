"""A guard in vLLM: stops, refuses and calms where the same guard in transformers does."""

from __future__ import annotations

import json

import pytest
import torch
from vllm_engine import ESSAY, TEXTS, generate, params

from emovec.guard import Guard, Refuse, Steer, Stop, Threshold
from emovec.hook import attach

pytest.importorskip("vllm")

pytestmark = pytest.mark.engine

REFUSAL = " I would rather not."
CALM = {"calm": 0.25}  # so strong that these few tokens show it
PLAIN = {"halflife": 0, "on": "generated"}


def crossing(oracle, ids):
    """(concept, bound, generated token) of a bound that the unsteered run crosses first at that token, and again at the next."""
    scores = oracle.run(ids, None, 12)[2].scores[len(ids) :]
    for token in range(3, len(scores) - 3):
        before, here = scores[:token].amax(0), scores[token : token + 2].amin(0)
        best = int((here - before).argmax())
        if here[best] - before[best] > 0.4:
            return oracle.bank.names[best], float(here[best] + before[best]) / 2, token
    raise AssertionError("no concept rises in the middle of this answer")


def guarded(oracle, ids, *thresholds):
    """What transformers writes under a guard, and the guard's events."""
    prompt = torch.tensor([ids])
    with attach(oracle.model, oracle.bank, guard=Guard(*thresholds), tokenizer=oracle.tokenizer) as probe:
        out = oracle.model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=12, do_sample=False)
    return out[0, len(ids) :].tolist(), probe.events


def ask(engine, ids, guard, **options):
    return generate(engine, [ids], [params(extra_args={"emotion_guard": guard}, **options)])[0]


def test_a_request_is_stopped_before_the_next_token(engine, oracle, audit):
    ids = oracle.ids(TEXTS[0])
    concept, above, token = crossing(oracle, ids)
    output = ask(engine, ids, [{"of": concept, "above": above, "hold": 1, **PLAIN}])
    whole = oracle.run(ids, None, 12)[0]
    expected, (event,) = guarded(oracle, ids, Threshold(concept, above, Stop(), hold=1, **PLAIN))
    assert list(output.token_ids) == whole[: token + 1] == expected[: token + 1]
    assert (output.finish_reason, output.stop_reason) == ("stop", f"emotion_guard: {concept}")
    (mine,) = output.events
    assert (mine["position"], mine["kind"], mine["of"], mine["do"]) == (event.position, "generated", concept, "stop")
    assert abs(mine["value"] - event.value) < 0.05
    written = json.loads(audit.read_text().splitlines()[-1])
    assert {key: value for key, value in written.items() if key != "request"} == mine


def test_a_request_is_refused_in_words(engine, oracle):
    ids = oracle.ids(TEXTS[0])
    concept, above, token = crossing(oracle, ids)
    guard = [{"of": concept, "above": above, "hold": 1, "do": {"refuse": REFUSAL}, **PLAIN}]
    output, other = generate(engine, [ids, ids], [params(extra_args={"emotion_guard": guard}), params()])
    expected, _ = guarded(oracle, ids, Threshold(concept, above, Refuse(REFUSAL), hold=1, **PLAIN))
    refusal = oracle.tokenizer(REFUSAL, add_special_tokens=False)["input_ids"]
    assert list(output.token_ids) == oracle.run(ids, None, 12)[0][: token + 1] + refusal + [oracle.tokenizer.eos_token_id]
    until = token + 1 + len(refusal)
    assert list(output.token_ids)[:until] == expected[:until]
    assert output.text.endswith(REFUSAL)
    oracle.check(ids, None, other)


def test_a_request_is_calmed_from_the_next_but_one_token_on(engine, oracle):
    """One token later than in transformers; there the threshold is held one token longer, which comes to the same."""
    ids = oracle.ids(TEXTS[0])
    concept, above, token = crossing(oracle, ids)
    output = ask(engine, ids, [{"of": concept, "above": above, "hold": 1, "do": {"steer": CALM}, **PLAIN}])
    expected, events = guarded(oracle, ids, Threshold(concept, above, Steer(CALM), hold=2, **PLAIN))
    assert events[0].position == len(ids) + token + 1
    assert output.events[0]["position"] == len(ids) + token
    assert list(output.token_ids) == expected
    assert list(output.token_ids) != oracle.run(ids, None, 12)[0]


def test_a_prompt_is_refused_before_the_first_token(engine, oracle):
    ids = oracle.ids(ESSAY, chat=False)[:150]  # in three chunks
    reading = oracle.run(ids, None, 2)[2]
    concept, value = reading[1:100].top(1, reduce="max")[0]
    output = ask(engine, ids, [{"of": concept, "above": value - 0.3, "halflife": 0, "hold": 1, "on": "prompt", "do": {"refuse": REFUSAL}}])
    assert output.text == REFUSAL
    assert output.events[0]["kind"] == "prompt"
    stopped = ask(engine, ids, [{"of": concept, "above": value - 0.3, "halflife": 0, "hold": 1, "on": "prompt"}])
    assert list(stopped.token_ids) == []
    assert stopped.finish_reason == "stop"


def test_a_guard_that_does_not_fire_changes_nothing(engine, oracle):
    ids = oracle.ids(TEXTS[1])
    guard = [{"of": {"desperate": 1, "calm": -0.5}, "above": 30}, {"of": "Fear and Overwhelm", "above": 30}]
    value = {"calm": 0.05}
    (output,) = generate(engine, [ids], [params(extra_args={"emotion_guard": guard, "emotion_bias": value, "emotion_scores": True})])
    oracle.check(ids, value, output)
    assert output.events == ()


def test_a_refusal_goes_without_logprobs(engine):
    with pytest.raises(ValueError, match="logprobs"):
        ask(engine, [1, 2, 3], [{"of": "calm", "above": 1, "do": {"refuse": "no"}}], logprobs=1)
