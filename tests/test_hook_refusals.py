"""What cannot be attached or followed is refused by name, and hooks come and go without a trace."""

from __future__ import annotations

import pytest
import tiny
import torch
from streams import Streams, assert_close, untouched
from torch import nn

from emovec.bank import Bank, BankError, BankLayer, UnknownLayer
from emovec.hook import attach
from emovec.steer import SteeringError

torch.set_num_threads(1)

CALM = {"calm": 0.3}
RULES = {"afraid": {"at_most": -1.0}, "desperate": "ablate", "calm": {"add": 0.2, "when": "happy > 0"}}
MIXED = [CALM, None, RULES, {"angry": {"set": 2.0}, "on": "generated"}]
GREEDY = {"max_new_tokens": 6, "do_sample": False}


# --- what is refused ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"layers": [1, 0]}, UnknownLayer, "no layer 0; it has 1, 2, 3"),
        ({"layers": []}, ValueError, "layers is empty"),
        ({"steer": CALM, "steer_layers": [7]}, UnknownLayer, "no layer 7"),
        ({"steer": {"clam": 0.1}}, SteeringError, "unknown concept 'clam'; nearest known: calm"),
        ({"steer": [CALM, {"calm": 9}]}, SteeringError, "'calm': strength must be from -2 to 2"),
        ({"steer": []}, SteeringError, "empty list"),
        ({"steer": 0.3}, SteeringError, "steer must be an object"),
        ({"steer": "steady"}, SteeringError, "'steady' names a profile, but no profiles"),
        ({"steer": "stedy", "profiles": {"steady": CALM}}, SteeringError, "unknown profile 'stedy'; nearest known: steady"),
        ({"precision": "exact"}, ValueError, "precision must be one of fast, high, got 'exact'"),
        ({"read": False}, ValueError, "nothing to do"),
        ({"read": False, "steer": {}}, ValueError, "nothing to do"),
    ],
)
def test_bad_arguments_leave_the_model_untouched(options, error, message):
    model = tiny.model()
    with pytest.raises(error, match=message):
        attach(model, tiny.bank(), **options)
    assert untouched(model)


def test_steering_needs_a_calibrated_layer():
    layer = BankLayer.from_directions(torch.eye(5, tiny.WIDTH), tiny.CONCEPTS, 1)
    with pytest.warns(UserWarning, match="no fingerprint"), pytest.raises(SteeringError, match="layer 1 has no residual norm"):
        attach(tiny.model(), Bank([layer]), steer=CALM)
    assert untouched(tiny.model())


def test_a_bank_of_another_model():
    other = tiny.fresh()
    with torch.no_grad():
        for weight in other.parameters():
            weight.add_(torch.randn_like(weight))
    with pytest.raises(BankError, match="the bank was made for tiny; weights"):
        attach(other, tiny.bank())
    assert untouched(other)
    with pytest.warns(UserWarning, match="made for tiny"), attach(other, tiny.bank(), force=True) as probe, torch.no_grad():
        other(tiny.tokens(1, 3))
    assert len(probe[0]) == 3


def test_a_layer_or_width_that_the_model_lacks():
    shallow = tiny.fresh(num_hidden_layers=3)
    with pytest.raises(BankError, match="layer 3 does not exist in a model of 3 layers"):
        attach(shallow, tiny.bank())
    with (
        pytest.warns(UserWarning, match="layer 3"),
        pytest.raises(ValueError, match="layer 3 does not exist in a model of 3 decoder"),
    ):
        attach(shallow, tiny.bank(), force=True)
    with pytest.warns(UserWarning, match="layer 3"), attach(shallow, tiny.bank(), layers=[1], force=True):
        pass
    wide = tiny.fresh(hidden_size=128)
    with pytest.warns(UserWarning, match="residual width"), pytest.raises(ValueError, match="is 128 wide, the bank is 64 wide"):
        attach(wide, tiny.bank(), force=True)
    assert untouched(shallow)
    assert untouched(wide)


def test_models_without_blocks_and_banks_that_are_none():
    with pytest.raises(ValueError, match="Sequential has no configuration"):
        attach(nn.Sequential(nn.Linear(2, 2)), tiny.bank())
    with pytest.raises(TypeError, match="bank must be a Bank, got BankLayer"):
        attach(tiny.model(), tiny.bank()[1])


def test_a_list_of_another_length_than_the_batch():
    model = tiny.model()
    with attach(model, tiny.bank(), steer=[CALM, None]) as probe, torch.no_grad():
        with pytest.raises(ValueError, match="steer is a list of 2, one for each sequence, but the batch has 3"):
            model(tiny.tokens(3, 4))
        with pytest.raises(ValueError, match="the batch has 1"):
            model.generate(tiny.tokens(1, 4), **GREEDY)
        model(tiny.tokens(2, 4))
        assert len(probe) == 2, "and goes on with one that fits"
    assert untouched(model)


def test_asking_too_early_or_for_too_many():
    model = tiny.model()
    with attach(model, tiny.bank()) as probe:
        with pytest.raises(RuntimeError, match="the model has not been called"):
            probe[0]
        assert len(probe) == 0
        with torch.no_grad():
            model(tiny.tokens(2, 3))
        assert torch.equal(probe[-1].scores, probe[1].scores)
        with pytest.raises(IndexError, match="sequence 2 of 2"):
            probe[2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"guidance_scale": 2.0}, "guidance_scale=2.0"),
        ({"prompt_lookup_num_tokens": 2}, "mode 'assisted_generation' cannot be followed"),
        ({"custom_generate": "x/y"}, "custom_generate"),
        ({"cache_implementation": "paged"}, "paged"),
    ],
)
def test_generation_that_cannot_be_followed(options, message):
    model = tiny.model()
    ids = tiny.tokens(1, 4)
    with attach(model, tiny.bank()):
        with pytest.raises(ValueError, match=message):
            model.generate(ids, **GREEDY, **options)
        model.generate(ids, **GREEDY)
    assert untouched(model)


# --- coming and going ---------------------------------------------------------------------------------------------


def test_nothing_is_left_behind_also_after_exceptions():
    model, bank = tiny.model(), tiny.bank()
    ids = tiny.tokens(1, 4)
    before = {id(module): (type(module), dict(vars(module))) for module in model.modules()}
    plain = model.generate(ids, **GREEDY)
    with pytest.raises(KeyError, match="mine"), attach(model, bank, steer=CALM):
        raise KeyError("mine")

    def fail(module, args):
        raise RuntimeError("broken block")

    with attach(model, bank, steer=CALM) as probe:
        assert not untouched(model)
        handle = model.model.layers[2].register_forward_pre_hook(fail)
        with pytest.raises(RuntimeError, match="broken block"):
            model.generate(ids, **GREEDY)
        with pytest.raises(RuntimeError, match="broken block"):
            model(ids)
        handle.remove()
        model.generate(ids, **GREEDY)
        assert len(probe[0]) == 9
    probe.remove()
    assert untouched(model)
    assert before == {id(module): (type(module), dict(vars(module))) for module in model.modules()}
    assert torch.equal(model.generate(ids, **GREEDY), plain)
    assert len(probe[0]) == 9, "readings stay"


def test_installing_fails_half_way(monkeypatch):
    model, bank = tiny.model(), tiny.bank()
    monkeypatch.setattr("emovec.tracking.Tracker.install", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        attach(model, bank)
    assert untouched(model)


@pytest.mark.parametrize("first_out", [0, 1])
def test_nested_and_repeated(first_out):
    model, bank = tiny.model(), tiny.bank()
    ids = tiny.tokens(1, 4)
    with attach(model, bank, steer={"calm": 0.3, "angry": -0.2}) as both:
        expected = model.generate(ids, **GREEDY)
    for _ in range(2):
        probes = [attach(model, bank, steer=CALM), attach(model, bank, steer={"angry": -0.2})]
        out = model.generate(ids, **GREEDY)
        assert torch.equal(out, expected)
        assert_close(probes[0][0].at(1), both[0].at(1))
        probes[first_out].remove()
        with attach(model, bank, steer=[CALM, {"angry": -0.2}][first_out]):
            assert torch.equal(model.generate(ids, **GREEDY), expected)
        probes[1 - first_out].remove()
        assert untouched(model)


def test_a_block_called_by_itself():
    model, bank = tiny.model(), tiny.bank()
    with attach(model, bank, steer=CALM), pytest.raises(RuntimeError, match="decoder block 1 was called by itself"):
        model.model.layers[1](torch.zeros(1, 2, tiny.WIDTH), position_embeddings=(torch.ones(1, 2, 16), torch.zeros(1, 2, 16)))


def test_a_model_that_skips_a_block_says_so():
    model = tiny.fresh()
    with attach(model, tiny.bank()), torch.no_grad():
        model.model.layers[3].forward = lambda hidden, **_: hidden[:, :1]
        with pytest.raises(RuntimeError, match="decoder block 3 saw 1 tokens of 4"):
            model(tiny.tokens(1, 4))
        model.model.layers[3].forward = lambda hidden, **_: hidden
        model.config.num_hidden_layers = 2
        with pytest.raises(RuntimeError, match="the hook of decoder block 2 did not run"):
            model(tiny.tokens(1, 4))


def test_gradients_flow_through_an_addition():
    model, bank = tiny.fresh(), tiny.bank()
    ids = tiny.tokens(1, 5)

    def gradient():
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        return model.model.layers[0].mlp.up_proj.weight.grad.clone()

    def add(index, hidden):
        if index in bank.steer_layers:
            hidden.data.add_(0.3 * bank[index].residual_norm * bank[index].direction("calm"))

    with Streams(model, add):
        expected = gradient()
    with attach(model, bank, steer=CALM):
        torch.testing.assert_close(gradient(), expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_and_autocast(dtype):
    bank, ids = tiny.bank(), tiny.tokens(2, 5)
    model = tiny.fresh().to(dtype)
    with attach(model, bank, steer=CALM) as probe, torch.no_grad():
        model(ids)
    baseline = bank[1].baseline("prompt")
    with Streams(model) as streams, torch.no_grad():
        model(ids)
    rounded = bank[1].directions.to(dtype).double()
    expected = (streams.seen[1][0][1].double() @ rounded.T - baseline.mean) / baseline.std
    assert_close(probe[1].at(1), expected)
    with attach(tiny.model(), bank) as probe, torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        tiny.model()(ids)
    assert len(probe[1]) == 5


def test_inference_mode_and_plain_modes_mix():
    model, bank = tiny.model(), tiny.bank()
    ids = tiny.tokens(2, 5)
    with torch.inference_mode(), attach(model, bank, steer=[CALM, None]) as probe:
        model(ids)
        first = probe[0].scores.clone()
        with torch.inference_mode(False), torch.no_grad():
            model(ids)
        assert torch.equal(probe[0].scores, first)
        model(tiny.tokens(2, 40))
