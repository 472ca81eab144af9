"""What an attached model is steered to, against steering by hand and the reference."""

from __future__ import annotations

import contextlib

import pytest
import tiny
import torch
from streams import CALM, GREEDY, RULES, Streams, assert_close, by_hand, untouched

from emovec.hook import attach
from emovec.steer import Steering

torch.set_num_threads(1)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_steering_equals_adding_by_hand(family):
    model, bank = tiny.model(family), tiny.bank(family)
    ids = tiny.tokens(2, 5)

    def add(index, hidden):
        if index in bank.steer_layers:
            hidden.detach().add_(0.3 * bank[index].residual_norm * bank[index].direction("calm"))

    with torch.no_grad():
        plain = model(ids).logits
        with Streams(model, add):
            expected = model(ids).logits
        with attach(model, bank, steer=CALM):
            found = model(ids).logits
    assert (found - plain).abs().max() > 0.1
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("steer", [RULES, {"angry": {"set": 2.0}}, {"happy": {"at_least": 1}, "calm": -0.1}], ids=["all", "set", "bound"])
def test_rules_and_conditions_equal_the_reference(steer):
    model, bank = tiny.model(), tiny.bank()
    ids = tiny.tokens(2, 5)
    with torch.no_grad():
        with Streams(model, by_hand(bank, Steering.parse(steer, bank.names), "prompt")):
            expected = model(ids).logits
        with attach(model, bank, steer=steer):
            found = model(ids).logits
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("on", ["all", "prompt", "generated"])
def test_scopes(on):
    model, bank = tiny.model(), tiny.bank()
    ids = tiny.tokens(1, 5)
    steering = Steering.parse({"calm": 0.3, "angry": {"set": 2.0}, "on": on}, bank.names)
    kinds = iter(["prompt", *["generated"] * 99])

    def change(index, hidden):
        if index == 0:
            change.kind = next(kinds)
        by_hand(bank, steering, change.kind)(index, hidden)

    with Streams(model, change) as streams:
        expected = model.generate(ids, **GREEDY)
    with attach(model, bank, steer=steering) as probe:
        out = model.generate(ids, **GREEDY)
    assert torch.equal(out, expected)
    assert_close(probe[0].at(2), streams.scores(bank, 2, probe[0].kind)[0])
    with attach(model, bank) as plain:
        model.generate(ids, **GREEDY)
    changed = [not torch.equal(one, other) for one, other in zip(probe[0].at(2), plain[0].at(2), strict=True)]
    assert changed[0] == (on != "generated")


def test_a_bound_holds_in_units_of_the_tokens_own_kind():
    model, bank = tiny.model(), tiny.bank()
    with attach(model, bank, steer={"angry": {"set": 2.0}}, steer_layers=[1]), Streams(model) as streams:
        model.generate(tiny.tokens(1, 5), **GREEDY)
    kinds = ["prompt"] * 5 + ["generated"] * 5
    assert_close(streams.scores(bank, 1, kinds)[0, :, bank.resolve("angry")], torch.full((10,), 2.0))


def test_profiles_and_steer_layers():
    model, bank = tiny.model(), tiny.bank()
    ids = tiny.tokens(2, 4)
    profiles = {"steady": {"calm": 0.3, "on": "prompt"}, "bold": {"afraid": -0.2}}
    with torch.no_grad():
        with attach(model, bank, steer=["bold", "steady"], profiles=profiles, steer_layers=[3]) as probe:
            found = model(ids).logits
        with attach(model, bank, steer=[profiles["bold"], Steering.parse(profiles["steady"], bank.names)], steer_layers=[3]):
            expected = model(ids).logits
        with attach(model, bank) as plain:
            model(ids)
    assert torch.equal(found, expected)
    assert torch.equal(probe[0].at(3), plain[0].at(3)), "scores are of the stream before it is steered at that layer"


def test_beams_can_be_steered_but_not_read():
    model, bank = tiny.model(), tiny.bank()
    ids = tiny.tokens(2, 4)
    beams = {"max_new_tokens": 5, "num_beams": 3, "do_sample": False}
    for steer in ([CALM, None], [None, CALM]):
        with attach(model, bank, steer=steer, read=False) as probe:
            out = model.generate(ids, **beams)
        for sequence, one in enumerate(steer):
            with attach(model, bank, steer=one, read=False) if one else contextlib.nullcontext():
                assert torch.equal(model.generate(ids[sequence : sequence + 1], **beams)[0], out[sequence])
        with pytest.raises(RuntimeError, match="read=False"):
            probe[0]
    with attach(model, bank, steer=CALM), pytest.raises(ValueError, match="num_beams=3 cannot be read"):
        model.generate(ids, **beams)
    assert untouched(model)


def test_blocks_that_turn_out_to_be_elsewhere(monkeypatch):
    """As when weights are offloaded: where the block puts out is known only when it does."""
    model, bank, ids = tiny.model(), tiny.bank(), tiny.tokens(2, 5)
    with attach(model, bank, steer=[CALM, None]) as expected, torch.no_grad():
        logits = model(ids).logits
    monkeypatch.setattr("emovec.hook._place", lambda block: (torch.device("meta"), torch.bfloat16))
    with attach(model, bank, steer=[CALM, None]) as probe, torch.no_grad():
        for _ in range(2):
            assert torch.equal(model(ids).logits, logits)
            assert torch.equal(probe[0].scores, expected[0].scores)
