"""The steering language: everything valid round-trips, everything else is refused by name, and rows do what the words say."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from banks import NAMES, make_layer, run_examples
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from emovec import ops
from emovec.bank import BankLayer, Baseline, UnknownConcept
from emovec.steer import KEYS, MAX_JSON, Entry, Steering, SteeringError, load_profiles

torch.set_num_threads(1)

# --- what is accepted ---------------------------------------------------------------------------------------------

strengths = st.floats(-2, 2) | st.integers(-2, 2)
scores = st.floats(-50, 50) | st.integers(-50, 50)
scopes = st.sampled_from(["all", "prompt", "generated"])


@st.composite
def steering_values(draw: st.DrawFn) -> dict[str, Any]:
    """Any valid value over NAMES."""
    condition = f"{draw(st.sampled_from(NAMES))} > {draw(scores)}"
    bounds = st.lists(scores, min_size=2, max_size=2).map(sorted).map(lambda pair: {"at_least": pair[0], "at_most": pair[1]})
    bound = st.one_of(bounds, scores.map(lambda z: {"at_least": z}), scores.map(lambda z: {"at_most": z}))
    action = st.one_of(
        strengths.map(lambda a: {"add": a}),
        scores.map(lambda z: {"set": z}),
        st.just({"ablate": True}),
        bound,
        st.builds(lambda a, b: a | b, strengths.map(lambda a: {"add": a}), bound),
    )
    extra = st.fixed_dictionaries({}, optional={"on": scopes, "when": st.just(condition)})
    entry = st.one_of(strengths, st.just("ablate"), st.builds(lambda a, b: a | b, action, extra))
    value: dict[str, Any] = draw(st.dictionaries(st.sampled_from(NAMES), entry))
    if draw(st.booleans()):
        value["on"] = draw(scopes)
    return value


@given(steering_values())
@settings(deadline=None)
def test_round_trip(value: dict[str, Any]) -> None:
    steering = Steering.parse(value, NAMES)
    assert Steering.parse(steering.to_dict(), NAMES) == steering == Steering.parse(steering, NAMES)
    assert Steering.from_json(json.dumps(value), NAMES) == steering == Steering.from_json(steering.to_json().encode(), NAMES)
    assert hash(steering) == hash(Steering.parse(dict(reversed(value.items())), NAMES))


@pytest.mark.parametrize(
    ("value", "canonical"),
    [
        ({"calm": 0.05, "angry": -0.02}, {"angry": -0.02, "calm": 0.05}),
        ({"calm": {"add": 1}}, {"calm": 1.0}),
        ({"calm": {"ablate": True}}, {"calm": "ablate"}),
        ({"calm": {"at_least": 1, "at_most": 1}}, {"calm": {"set": 1.0}}),
        ({"calm": {"at_least": 1, "at_most": 1, "add": 0.5}}, {"calm": {"at_least": 1.0, "at_most": 1.0, "add": 0.5}}),
        ({"on": "prompt", "calm": 1, "angry": {"ablate": True, "on": "all"}}, {"angry": "ablate", "calm": {"add": 1.0, "on": "prompt"}}),
        (
            {"hostile": "ablate", "calm": {"add": 0.08, "when": "  grief-stricken>-2e-1 "}},
            {"calm": {"add": 0.08, "when": "grief-stricken > -0.2"}, "hostile": "ablate"},
        ),
        ({"calm": {"add": 0.1, "when": "at ease > .5"}}, {"calm": {"add": 0.1, "when": "at ease > 0.5"}}),
        ({"calm": np.float64(0.5), "angry": Fraction(1, 2)}, {"angry": 0.5, "calm": 0.5}),
        ({}, {}),
        (None, {}),
    ],
)
def test_canonical_form(value: Any, canonical: dict[str, Any]) -> None:
    steering = Steering.parse(value, NAMES)
    assert list(steering.to_dict().items()) == list(canonical.items())
    assert bool(steering) == bool(canonical)


def test_what_does_nothing_is_false() -> None:
    assert not Steering.parse({"calm": 0.0}, NAMES)
    assert Steering.parse({"calm": 0.0}, NAMES).row(make_layer(), "prompt") is None


# --- what is refused ----------------------------------------------------------------------------------------------

HUGE = 10**5000


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([("calm", 1)], "must be an object of concepts"),
        ("calm", "must be an object of concepts, got 'calm'"),
        ({"clam": 0.1}, "entry 'clam': unknown concept 'clam'; nearest known: calm, "),
        ({"Calm": 0.1}, "unknown concept 'Calm'; nearest known: calm, "),
        ({7: 0.1}, "entry 7: a concept is named by text"),
        ({"calm": True}, """entry 'calm': expected a number, "ablate" or an object, got True"""),
        ({"calm": None}, "entry 'calm': expected a number"),
        ({"calm": "remove"}, "entry 'calm': expected a number"),
        ({"calm": [0.1]}, "entry 'calm': expected a number"),
        ({"calm": torch.ones(1)}, "entry 'calm': expected a number"),
        ({"calm": math.nan}, "entry 'calm': strength must be from -2 to 2, got nan"),
        ({"calm": math.inf}, "entry 'calm': strength must be from -2 to 2, got inf"),
        ({"calm": 2.01}, "entry 'calm': strength must be from -2 to 2, got 2.01"),
        ({"calm": HUGE}, "entry 'calm': strength must be from -2 to 2, got a huge int"),
        ({"calm": {"add": "0.1"}}, "entry 'calm': add must be a number, got '0.1'"),
        ({"calm": {"add": False}}, "entry 'calm': add must be a number, got False"),
        ({"calm": {"add": -HUGE}}, "entry 'calm': add must be from -2 to 2"),
        ({"calm": {"set": 51}}, "entry 'calm': set must be from -50 to 50, got 51"),
        ({"calm": {"at_most": math.inf}}, "entry 'calm': at_most must be from -50 to 50, got inf"),
        ({"calm": {"at_least": None}}, "entry 'calm': at_least must be a number, got None"),
        ({"calm": {"at_least": 2, "at_most": 1}}, "entry 'calm': at_least 2.0 is above at_most 1.0"),
        ({"calm": {"set": 1, "at_most": 2}}, "entry 'calm': set contradicts at_most"),
        ({"calm": {"set": 1, "add": 1}}, "entry 'calm': set contradicts add"),
        ({"calm": {"ablate": True, "add": 1}}, "entry 'calm': ablate contradicts add"),
        ({"calm": {"ablate": True, "set": 0}}, "entry 'calm': ablate contradicts set"),
        ({"calm": {"ablate": False}}, "entry 'calm': ablate must be true, got False"),
        ({"calm": {"ablate": 1}}, "entry 'calm': ablate must be true, got 1"),
        ({"calm": {}}, "entry 'calm': nothing to do; give one of add, set, at_most, at_least, ablate"),
        ({"calm": {"when": "angry > 1", "on": "prompt"}}, "entry 'calm': nothing to do"),
        ({"calm": {"atmost": 1}}, "entry 'calm': unknown key 'atmost'; nearest known: at_most, "),
        ({"calm": {"add": 1, 3: 1}}, "entry 'calm': unknown key 3; nearest known"),
        ({"calm": {"add": 1, "on": "answer"}}, "entry 'calm': on must be one of all, prompt, generated, got 'answer'"),
        ({"calm": {"add": 1, "on": ["all"]}}, "entry 'calm': on must be one of"),
        ({"calm": 1, "on": 1}, "steering: on must be one of"),
        ({"calm": {"add": 1, "when": 3}}, """entry 'calm': when must read "<concept> > <number>\""""),
        ({"calm": {"add": 1, "when": "angry >= 2"}}, "only '>' is supported), got 'angry >= 2'"),
        ({"calm": {"add": 1, "when": "angry < 2"}}, "only '>' is supported"),
        ({"calm": {"add": 1, "when": "angry > nan"}}, "only '>' is supported"),
        ({"calm": {"add": 1, "when": "> 2"}}, "only '>' is supported"),
        ({"calm": {"add": 1, "when": "angry > "}}, "only '>' is supported"),
        ({"calm": {"add": 1, "when": "angry > 1e999"}}, "the number in when must be from -50 to 50, got inf"),
        ({"calm": {"add": 1, "when": "angry > 1 and afraid > 2"}}, "unknown concept 'angry > 1 and afraid'"),
        ({"calm": {"add": 1, "when": "angr > 2"}}, "entry 'calm': unknown concept 'angr'; nearest known: angry, "),
        (
            {"calm": {"add": 1, "when": "angry > 2"}, "afraid": {"add": 1, "when": "angry > 3"}},
            "one condition per request, but 'calm' has 'angry > 2.0' and 'afraid' has 'angry > 3.0'",
        ),
    ],
)
def test_refused(value: Any, message: str) -> None:
    with pytest.raises(SteeringError, match=re.escape(message)):
        Steering.parse(value, NAMES)


def test_unknown_concepts_are_both_errors() -> None:
    with pytest.raises(UnknownConcept):
        Steering.parse({"clam": 0.1}, NAMES)


def test_16_rules_and_not_one_more() -> None:
    names = [f"c{k:02}" for k in range(40)]
    value: dict[str, Any] = dict.fromkeys(names[:16], "ablate") | dict.fromkeys(names[20:], 0.1)
    Steering.parse(value, names)
    with pytest.raises(SteeringError, match="17 rules, more than 16: 'c16'"):
        Steering.parse(value | {"c16": {"at_most": 1}}, names)


def test_a_steering_built_by_hand_is_checked_like_any_other() -> None:
    with pytest.raises(SteeringError, match="'calm': strength must be"):
        Steering.parse(Steering((Entry("calm", add=math.nan),)), NAMES)
    with pytest.raises(SteeringError, match="'calm': unknown concept"):
        Steering.parse(Steering.parse({"calm": 1}, NAMES), ["angry"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON"),
        ('{"calm": NaN}', "'calm': strength must be"),
        ('{"calm": 1e999}', "'calm': strength must be"),
        ('{"calm": ' + "9" * 5000 + "}", "not JSON"),
        ('{"calm": 1, "calm": 2}', "duplicate key 'calm'"),
        ('{"calm": {"add": 1, "add": 2}}', "duplicate key 'add'"),
        ("[" * 50_000, "not JSON"),
        ('{"calm": ' + "[" * 900 + "]" * 900 + "}", "'calm': expected a number"),
        ('{"calm": {"add": ' + '{"a": ' * 900 + "1" + "}" * 900 + "}}", "'calm': add must be a number"),
        (" " * (MAX_JSON + 1), f"longer than {MAX_JSON}"),
        ('{"calm": {"add": 1, "when": "' + "a" * 60_000 + '>"}}', "when must read"),
        ('{"calm": {"add": 1, "when": "angry > ' + "1" * 60_000 + 'x"}}', "when must read"),
        ('{"calm": {"add": 1, "when": "angry' + " " * 60_000 + '"}}', "when must read"),
        ('{"' + "a" * 60_000 + '": 1}', "unknown concept 'aaa"),
        (b"\xff\xfe{}", "not JSON"),
    ],
)
def test_untrusted_json(text: str | bytes, message: str) -> None:
    with pytest.raises(SteeringError, match=re.escape(message)) as error:
        Steering.from_json(text, NAMES)
    assert len(str(error.value)) < 500


@given(
    st.recursive(
        st.none() | st.booleans() | st.floats() | st.text() | st.sampled_from([*NAMES, *KEYS]),
        lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from([*NAMES, *KEYS]) | st.text(), inner),
    )
)
@settings(deadline=None)
def test_whatever_comes_is_parsed_or_refused(value: Any) -> None:
    try:
        steering = Steering.parse(value, NAMES)
    except SteeringError:
        return
    assert Steering.parse(steering.to_dict(), NAMES) == steering


# --- profiles -----------------------------------------------------------------------------------------------------


def test_profiles(tmp_path: Path) -> None:
    path = tmp_path / "profiles.toml"
    path.write_text('[steady-support-agent]\ncalm = 0.05\n"at ease" = { at_least = 0.5 }\non = "generated"\n\n[nothing]\n')
    profiles = load_profiles(path, NAMES)
    assert profiles == {"steady-support-agent": {"calm": 0.05, "at ease": {"at_least": 0.5}, "on": "generated"}, "nothing": {}}
    assert Steering.parse(profiles["steady-support-agent"], NAMES).entries[1].on == "generated"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("calm = ", "not TOML"),
        ("calm = 0.05", "profile 'calm': steering must be an object of concepts, got 0.05"),
        ("[a]\ncalm = nan", "profile 'a': steering entry 'calm': strength"),
        ("[a]\nclam = 0.1", "profile 'a': steering entry 'clam': unknown concept 'clam'; nearest known: calm"),
        ("[a]\ncalm = 1979-05-27", "profile 'a': steering entry 'calm': expected a number"),
    ],
)
def test_bad_profiles(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "profiles.toml"
    path.write_text(text)
    with pytest.raises(SteeringError, match=r"profiles\.toml: " + re.escape(message)):
        load_profiles(path, NAMES)


def test_profiles_without_names_are_still_checked(tmp_path: Path) -> None:
    path = tmp_path / "profiles.toml"
    path.write_text("[a]\nanything = 0.1")
    assert load_profiles(path) == {"a": {"anything": 0.1}}
    path.write_text("[a]\nanything = 10")
    with pytest.raises(SteeringError, match="profile 'a': steering entry 'anything'"):
        load_profiles(path)


# --- rows ---------------------------------------------------------------------------------------------------------


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


def test_the_docs_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run_examples("steering.md")
