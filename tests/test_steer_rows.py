"""Rows of the op's table do what the words of the steering language say."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from banks import NAMES, make_layer
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from emovec import ops
from emovec.bank import BankLayer, Baseline, UnknownConcept
from emovec.steer import Steering, SteeringError

torch.set_num_threads(1)


def steer(layer: BankLayer, value: dict[str, Any], x: Tensor, kind: str = "prompt") -> Tensor:
    """x [N, d] after the op has done what ``value`` asks."""
    row = Steering.parse(value, layer.names).row(layer, kind)
    if row is None:
        return x
    steered = x.clone()
    ops.apply_(steered, layer, table=ops.Table.build([row], layer.operands("cpu", x.dtype)))
    return steered


def scores_of(layer: BankLayer, x: Tensor, kind: str = "prompt") -> Tensor:
    readers = layer.directions if layer.readers is None else layer.readers
    baseline = layer.baseline(kind)
    return (x @ readers.T - baseline.mean) / baseline.std


def test_add_is_in_units_of_the_residual_norm() -> None:
    layer = make_layer()
    row = Steering.parse({"calm": 0.05, "angry": -0.02}, NAMES).row(layer, "prompt")
    assert row is not None
    assert row.delta is not None
    expected = 12.5 * (0.05 * layer.direction("calm").double() - 0.02 * layer.direction("angry").double())
    assert torch.allclose(row.delta, expected, rtol=1e-12)
    assert row == ops.Row(row.delta)


@given(
    data=st.data(),
    rules=st.lists(st.sampled_from(NAMES), min_size=1, max_size=5, unique=True),
    readers=st.booleans(),
    kind=st.sampled_from(["prompt", "generated"]),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_joint_rules_hold_and_what_held_is_not_moved(data: st.DataObject, rules: list[str], readers: bool, kind: str, seed: int) -> None:
    layer = make_layer(seed=seed, readers=readers)
    x = torch.randn(6, layer.width, generator=torch.Generator().manual_seed(seed))
    z = st.floats(-4, 4)
    forms = st.one_of(
        z.map(lambda value: {"set": value}),
        z.map(lambda value: {"at_most": value}),
        z.map(lambda value: {"at_least": value}),
        z.map(lambda value: {"at_least": value, "at_most": value + 1}),
        st.just("ablate"),
    )
    value = {name: data.draw(forms) for name in rules}
    after = steer(layer, value, x, kind)
    z_before, z_after = scores_of(layer, x, kind), scores_of(layer, after, kind)
    projections = after @ (layer.directions if layer.readers is None else layer.readers).T
    for name, form in value.items():
        k = layer.resolve(name)
        if form == "ablate":
            assert torch.allclose(projections[:, k], torch.zeros(6), atol=2e-3)
            continue
        low, high = form.get("at_least", form.get("set", -math.inf)), form.get("at_most", form.get("set", math.inf))
        assert bool((z_after[:, k] >= low - 5e-3).all())
        assert bool((z_after[:, k] <= high + 5e-3).all())
        held = (z_before[:, k] >= low) & (z_before[:, k] <= high)
        assert torch.allclose(z_after[held, k], z_before[held, k], atol=5e-3)


def test_add_comes_before_bounds() -> None:
    layer, x = make_layer(), torch.randn(50, 32)
    k = NAMES.index("calm")
    added = steer(layer, {"calm": 0.2, "afraid": 0.1}, x)
    after = steer(layer, {"calm": {"add": 0.2, "at_most": 2.0}, "afraid": 0.1}, x)
    over = scores_of(layer, added)[:, k] > 2.0
    assert 0 < int(over.sum()) < 50
    assert torch.allclose(after[~over], added[~over], atol=1e-5)
    assert torch.allclose(scores_of(layer, after)[over, k], torch.full((int(over.sum()),), 2.0), atol=1e-4)


def test_ablating_and_clamping_correlated_concepts_together() -> None:
    layer = make_layer(correlation=3.0)
    assert float(layer.direction("angry") @ layer.direction("hostile")) > 0.8
    after = steer(layer, {"angry": "ablate", "hostile": {"set": 2.0}}, torch.randn(4, 32))
    assert torch.allclose(after @ layer.direction("angry"), torch.zeros(4), atol=1e-4)
    assert torch.allclose(scores_of(layer, after)[:, NAMES.index("hostile")], torch.full((4,), 2.0), atol=1e-4)


@pytest.mark.parametrize("kind", ["prompt", "generated"])
def test_a_gate_splits_the_tokens_in_the_units_of_their_kind(kind: str) -> None:
    layer = make_layer()
    x = torch.randn(200, 32)
    always, gated = (
        {"hostile": "ablate", "angry": 0.01},
        {"calm": {"add": 0.08, "when": "desperate > 0.3"}, "afraid": {"at_most": 0.0, "when": "desperate > 0.3"}},
    )
    open_ = scores_of(layer, x, kind)[:, NAMES.index("desperate")] > 0.3
    assert 20 < int(open_.sum()) < 180
    after = steer(layer, always | gated, x, kind)
    everything = {name: {key: value for key, value in entry.items() if key != "when"} for name, entry in gated.items()}
    assert torch.allclose(after[open_], steer(layer, always | everything, x, kind)[open_], atol=1e-5)
    assert torch.allclose(after[~open_], steer(layer, always, x, kind)[~open_], atol=1e-5)
    alone = steer(layer, gated, x, kind)
    assert torch.equal(alone[~open_], x[~open_])
    assert not torch.isclose(alone[open_], x[open_]).all(dim=1).any()


def test_a_gate_in_the_units_the_op_scores_with() -> None:
    layer, steering = make_layer(), Steering.parse({"calm": {"add": 0.1, "when": "desperate > 1.5"}}, NAMES)
    for kind in ("prompt", "generated"):
        row = steering.row(layer, kind, scored=kind)
        assert row is not None
        assert row.gate == ops.Gate(NAMES.index("desperate"), 1.5)


def test_scopes() -> None:
    layer = make_layer()
    steering = Steering.parse(
        {"on": "generated", "calm": 0.1, "angry": {"add": 0.1, "on": "prompt"}, "afraid": {"set": 0, "on": "all"}}, NAMES
    )
    rows = {kind: steering.row(layer, kind) for kind in ("prompt", "generated")}
    for kind, name in (("prompt", "angry"), ("generated", "calm")):
        row = rows[kind]
        assert row is not None
        assert row.delta is not None
        assert torch.allclose(row.delta, 1.25 * layer.direction(name).double())
        mean = float(layer.baseline(kind).mean[NAMES.index("afraid")])
        assert row.rules == (ops.Rule(NAMES.index("afraid"), mean, mean),)
    assert Steering.parse({"calm": {"add": 0.1, "on": "prompt"}}, NAMES).row(layer, "generated") is None
    assert Steering.parse({}, NAMES).row(layer, "prompt") is None
    with pytest.raises(ValueError, match="'turn_start'"):
        steering.row(layer, "turn_start")


def test_a_gate_of_the_other_phase_is_left_out() -> None:
    steering = Steering.parse({"calm": {"add": 0.1, "when": "angry > 1", "on": "prompt"}, "afraid": 0.1}, NAMES)
    row = steering.row(make_layer(), "generated")
    assert row is not None
    assert row.gate is None
    assert row.otherwise is None


def test_what_an_uncalibrated_layer_can_do() -> None:
    layer = BankLayer.from_directions(torch.randn(7, 32), NAMES, index=9)
    row = Steering.parse({"calm": "ablate"}, NAMES).row(layer, "prompt")
    assert row == ops.Row(rules=(ops.Rule(3, 0.0, 0.0),))
    for value, message in (
        ({"calm": 0.1}, "entry 'calm': layer 9 has no residual norm"),
        ({"calm": {"at_most": 1}}, "entry 'calm': layer 9 has no baseline for 'calm'"),
        ({"calm": {"ablate": True, "when": "angry > 1"}}, "entry 'calm': layer 9 has no baseline for 'angry'"),
    ):
        with pytest.raises(SteeringError, match=message):
            Steering.parse(value, NAMES).row(layer, "prompt")


def test_a_concept_without_a_baseline_in_a_calibrated_layer() -> None:
    layer = make_layer()
    holes = torch.tensor([math.nan] + [1.0] * 6)
    layer = replace(layer, baselines={"prompt": Baseline(holes, holes, 10)})
    assert Steering.parse({"afraid": 0.1, "calm": {"set": 1}}, NAMES).row(layer, "prompt") is not None
    for value in ({"afraid": {"set": 1}}, {"calm": {"add": 1, "when": "afraid > 1"}}):
        with pytest.raises(SteeringError, match="layer 0 has no baseline for 'afraid'"):
            Steering.parse(value, NAMES).row(layer, "prompt")


def test_a_layer_that_lacks_the_concept() -> None:
    with pytest.raises(UnknownConcept, match="'calm'"):
        Steering.parse({"calm": 0.1}, NAMES).row(make_layer(names=["angry"]), "prompt")
