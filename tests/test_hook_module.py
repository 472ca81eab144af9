"""``Hook`` on any module, and the part of every hook that looks at outputs."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import tiny
import torch
from streams import Streams, assert_close
from torch import nn

from emovec.bank import BankLayer, UnknownLayer
from emovec.hook import Hook, attach
from emovec.steer import SteeringError

torch.set_num_threads(1)

CALM = {"calm": 0.3}
WIDTH = tiny.WIDTH


class Puts(nn.Module):
    """Puts out what it is made with."""

    def __init__(self, output):
        super().__init__()
        self.output = output

    def forward(self):
        return self.output


@dataclass
class Output:
    count: int
    hidden: torch.Tensor


def stream():
    return torch.randn(2, 3, WIDTH, generator=torch.Generator().manual_seed(1))


def expected_scores(x, index=2, kind="prompt"):
    layer = tiny.bank()[index]
    baseline = layer.baseline(kind)
    return (x.double() @ layer.directions.double().T - baseline.mean) / baseline.std


def expected_stream(x, index=2, strength=0.3):
    layer = tiny.bank()[index]
    return x + strength * layer.residual_norm * layer.direction("calm")


@pytest.mark.parametrize(
    "wrap",
    [
        lambda x: x,
        lambda x: (x, None),
        lambda x: [x],
        lambda x: {"count": 3, "hidden": x},
        lambda x: Output(3, x),
        lambda x: x.view(6, WIDTH),
        lambda x: x.view(1, 2, 3, WIDTH),
    ],
    ids=["tensor", "tuple", "list", "mapping", "dataclass", "2-D", "4-D"],
)
def test_outputs_of_any_form(wrap):
    x = stream()
    module = Puts(wrap(x))
    hook = Hook(tiny.bank(), steer=CALM)
    module.register_forward_hook(hook)
    before = x.clone()
    assert module() is module.output, "steered in place"
    torch.testing.assert_close(x, expected_stream(before))
    assert hook.scores.shape[-1] == len(tiny.CONCEPTS)
    assert_close(hook.scores.reshape(2, 3, -1), expected_scores(before))


def test_strided_outputs():
    for x in (torch.randn(2, WIDTH, 3).transpose(1, 2), torch.randn(2, 3, 2 * WIDTH)[..., ::2], torch.randn(3, 2, WIDTH).transpose(0, 1)):
        before = x.clone()
        module = Puts(x)
        hook = Hook(tiny.bank(), steer=[None, CALM])
        module.register_forward_hook(hook)
        module()
        assert torch.equal(x[0], before[0])
        torch.testing.assert_close(x[1], expected_stream(before)[1])
        assert_close(hook.scores, expected_scores(before))


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("text", "output of Puts is a str with no tensor first"),
        ((), "is a tuple with no tensor first"),
        ((None, torch.zeros(2, WIDTH)), "is a tuple with no tensor first"),
        (torch.zeros(WIDTH), "a 1-D torch.float32 tensor"),
        (torch.zeros(2, WIDTH, dtype=torch.long), "a 2-D torch.int64 tensor"),
        ({"count": 3}, "is a dict with no tensor first"),
    ],
)
def test_outputs_that_are_no_stream(output, message):
    module = Puts(output)
    module.register_forward_hook(Hook(tiny.bank()))
    with pytest.raises(TypeError, match=message):
        module()


def test_another_width_or_dtype():
    module = Puts(torch.zeros(2, 3, 32))
    module.register_forward_hook(Hook(tiny.bank()))
    with pytest.raises(ValueError, match="Puts puts out 32 wide activations, layer 2 of the bank is 64 wide"):
        module()
    module.output = torch.zeros(2, 3, WIDTH, dtype=torch.float64)
    with pytest.raises(ValueError, match="must be float32, bfloat16 or float16, got"):
        module()
    module.output = torch.zeros(2, 0, WIDTH)
    module()


def test_dtype_may_change_between_calls():
    module = Puts(None)
    hook = Hook(tiny.bank())
    module.register_forward_hook(hook)
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float32):
        module.output = stream().to(dtype)
        module()
        torch.testing.assert_close(hook.scores.double(), expected_scores(module.output), rtol=0.02, atol=0.2)


def test_kind_is_the_baseline():
    module = Puts(stream())
    hook = Hook(tiny.bank(), kind="generated", steer={"angry": {"set": 2.0}, "calm": {"add": 0.1, "when": "happy > -50"}})
    module.register_forward_hook(hook)
    module()
    assert_close(hook.scores, expected_scores(stream(), kind="generated"))
    assert_close(expected_scores(module.output, kind="generated")[..., tiny.CONCEPTS.index("angry")], torch.full((2, 3), 2.0))


def test_on_a_block_it_does_what_attach_does():
    model, bank, ids = tiny.fresh(), tiny.bank(), tiny.tokens(2, 5)
    with attach(model, bank, steer=[CALM, None], steer_layers=[2]) as probe, torch.no_grad():
        expected = model(ids).logits
    hook = Hook(bank, layer=2, steer=[CALM, None])
    handle = model.model.layers[2].register_forward_hook(hook)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, expected)
    for sequence, reading in enumerate(probe):
        assert torch.equal(hook.scores[sequence], reading.at(2))
    handle.remove()
    with Streams(model) as streams, torch.no_grad():
        model(ids)
    assert_close(hook.scores, expected_scores(streams.seen[2][0]))


def test_a_layer_for_a_bank():
    layer = BankLayer.from_directions(torch.eye(3, WIDTH))
    module = Puts(stream())
    hook = Hook(layer, steer={"concept_1": "ablate"})
    module.register_forward_hook(hook)
    before = module.output.clone()
    module()
    assert_close(hook.scores, before[..., :3])
    assert module.output[..., 1].abs().max() < 1e-6
    assert torch.equal(module.output[..., 2:], before[..., 2:])


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"layer": 0}, UnknownLayer, "no layer 0"),
        ({"steer": {"clam": 1}}, SteeringError, "unknown concept 'clam'"),
        ({"steer": {"calm": {"add": 0.1, "on": "generated"}}}, ValueError, "'calm': a Hook cannot tell generated tokens from others"),
        ({"kind": "middle"}, ValueError, "kind must be one of prompt, turn_start, generated, got 'middle'"),
        ({"read": False}, ValueError, "nothing to do"),
        ({"read": False, "steer": [None, {}]}, ValueError, "nothing to do"),
        ({"device": "cpu"}, ValueError, "give device and dtype together"),
        ({"steer": []}, SteeringError, "empty list"),
    ],
)
def test_bad_arguments(options, error, message):
    with pytest.raises(error, match=message):
        Hook(tiny.bank(), **options)


def test_what_has_not_been_read():
    with pytest.raises(ValueError, match="layer=3, but what was given is layer 1"):
        Hook(tiny.bank()[1], layer=3)
    with pytest.raises(RuntimeError, match="has not been called"):
        _ = Hook(tiny.bank()).scores
    with pytest.raises(RuntimeError, match="read=False"):
        _ = Hook(tiny.bank(), steer=CALM, read=False).scores


def test_a_list_that_does_not_fit_the_batch():
    module = Puts(stream())
    module.register_forward_hook(Hook(tiny.bank(), steer=[CALM, None, None]))
    before = module.output.clone()
    for output in (module.output, module.output.view(6, WIDTH)):
        module.output = output
        with pytest.raises(ValueError, match=r"steer is a list of 3, which fits outputs \[3, tokens, d\]; got"):
            module()
    assert torch.equal(module.output, before.view(6, WIDTH))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_precision(dtype):
    """By attach and by a Hook: high scores are those of the bank's own readers."""
    model, bank, ids = tiny.fresh().to(dtype), tiny.bank(), tiny.tokens(2, 5)
    with Streams(model) as streams, torch.no_grad():
        model(ids)
    expected = streams.scores(bank, 2, ["prompt"] * 5)
    lost = {}
    for precision in ("fast", "high"):
        hook = Hook(bank, layer=2, precision=precision)
        handle = model.model.layers[2].register_forward_hook(hook)
        with attach(model, bank, precision=precision) as probe, torch.no_grad():
            model(ids)
        handle.remove()
        attached = torch.stack([reading.at(2) for reading in probe])
        assert torch.equal(attached.view(torch.int32), hook.scores.view(torch.int32))
        lost[precision] = float((attached.double() - expected).norm() / expected.norm())
    assert 100 * lost["high"] < lost["fast"]
    with pytest.raises(ValueError, match="precision must be one of fast, high, got 'exact'"):
        Hook(bank, precision="exact")
