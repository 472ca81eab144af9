"""Thresholds by themselves: what they accept, what they are on, and how ordinary text calibrates them."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from emovec.bank import UnknownConcept
from emovec.guard import Course, Refuse, Stop, Threshold, calibrate_threshold, peak
from emovec.monitor import Reading

NAMES = ("calm", "afraid", "desperate")
FAMILIES = {"Fear": ("afraid", "desperate")}


def reading(scores, prompt=0, **options):
    scores = torch.as_tensor(scores, dtype=torch.float32)
    kinds = ["prompt"] * prompt + ["generated"] * (len(scores) - prompt)
    return Reading({2: scores}, NAMES, kinds, families=FAMILIES, **options)


def conversations(count, length=12, seed=0, prompt=4):
    g = torch.Generator().manual_seed(seed)
    return [reading(torch.randn(length, 3, generator=g), prompt=prompt) for _ in range(count)]


def fires(threshold, one):
    """Whether it fires anywhere, by the running recursion."""
    course = Course(threshold)
    values = (one.scores.double() @ threshold.weights(one.names, one.members())).tolist()
    counted = [value for p, (kind, value) in enumerate(zip(one.kind, values, strict=True)) if p > 0 and threshold.on in ("all", kind)]
    return any(course.fires(course.smooth(value)) for value in counted)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"of": {}}, "of must be a name, or names with weights"),
        ({"of": {"calm": 0}}, "weights that are not zero"),
        ({"of": {"calm": math.nan}}, "weights that are not zero"),
        ({"of": 3}, "of must be a name"),
        ({"above": math.inf}, "above must be a number from -50 to 50, got inf"),
        ({"above": 51}, "above must be a number from -50 to 50, got 51"),
        ({"above": True}, "above must be a number"),
        ({"action": "stop"}, "action must be Stop"),
        ({"action": Stop}, "action must be Stop"),
        ({"halflife": -1}, "halflife must be 0 or a positive number"),
        ({"hold": 0}, "hold must be at least 1 token, got 0"),
        ({"hold": 1.5}, "hold must be at least 1 token"),
        ({"on": "answer"}, "on must be one of all, prompt, generated"),
    ],
)
def test_bad_thresholds(options, message):
    with pytest.raises(ValueError, match=message):
        Threshold(**{"of": "calm", "above": 1.0, **options})


def test_what_it_is_on():
    assert Threshold("afraid", 1).weights(NAMES, FAMILIES).tolist() == [0, 1, 0]
    assert Threshold("Fear", 1).weights(NAMES, FAMILIES).tolist() == [0, 0.5, 0.5]
    assert Threshold({"Fear": 2, "afraid": 1, "calm": -0.5}, 1).weights(NAMES, FAMILIES).tolist() == [-0.5, 2, 1]
    assert Threshold("afraid", 1).weights(NAMES, {"afraid": ("calm",)}).tolist() == [0, 1, 0], "a concept comes before a family"
    assert Threshold({"Fear": 2, "afraid": 1, "calm": -0.5}, 1).label == "2 Fear + afraid - 0.5 calm"
    assert Threshold("Fear", 1).action == Stop()
    with pytest.raises(UnknownConcept, match="unknown concept 'Fera'; nearest known: Fear"):
        Threshold("Fera", 1).weights(NAMES, FAMILIES)


@given(
    st.lists(st.floats(-20, 20), min_size=1, max_size=20),
    st.sampled_from([0, 1, 8]),
    st.integers(1, 4),
    st.sampled_from(["all", "prompt", "generated"]),
    st.integers(0, 6),
)
@settings(deadline=None)
def test_the_peak_is_where_it_stops_firing(values, halflife, hold, on, prompt):
    one = reading([[0, value, 0] for value in values], prompt=min(prompt, len(values)))
    threshold = Threshold("afraid", 0, halflife=halflife, hold=hold, on=on)
    highest = peak(threshold, one)
    if highest == -math.inf:
        assert not fires(Threshold("afraid", -50, halflife=halflife, hold=hold, on=on), one)
        return
    assert not fires(Threshold("afraid", highest + 1e-6, halflife=halflife, hold=hold, on=on), one)
    assert fires(Threshold("afraid", highest - 1e-6, halflife=halflife, hold=hold, on=on), one)


@pytest.mark.parametrize("rate", [0.01, 0.05, 0.2, 0.5])
def test_the_rate_holds_on_new_conversations(rate):
    """Averaged over calibrations the rate is at most, and close to, what was asked for."""
    threshold = Threshold({"Fear": 1, "calm": -0.5}, 0, halflife=2, hold=2)
    new = torch.tensor([peak(threshold, one) for one in conversations(2000, seed=1)])
    rates = []
    for seed in range(2, 22):
        found = Threshold.calibrated(threshold.of, conversations(199, seed=seed), rate, halflife=2, hold=2)
        assert found.above == calibrate_threshold(threshold, conversations(199, seed=seed), rate)
        rates.append(float((new > found.above).double().mean()))
    average = sum(rates) / len(rates)
    error = 4 * (rate * (1 - rate) / 199 / 20 + rate * (1 - rate) / 2000) ** 0.5
    assert rate - 0.005 - error <= average <= rate + error


def test_calibration_on_the_conversations_themselves():
    ordinary = conversations(199)
    threshold = Threshold.calibrated("afraid", ordinary, 0.05, Refuse("no"), hold=2, halflife=4, on="generated", layer=2)
    assert threshold.action == Refuse("no")
    assert (threshold.hold, threshold.halflife, threshold.on, threshold.layer) == (2, 4, "generated", 2)
    assert sum(fires(threshold, one) for one in ordinary) in (9, 10), "floor(0.05 * 200) - 1, or with rounding at the bound one more"
    peaks = sorted(peak(threshold, one) for one in ordinary)
    assert threshold.above == peaks[189]


@pytest.mark.parametrize(
    ("count", "rate", "message"),
    [
        (98, 0.01, "a false-alarm rate of 0.01 needs at least 99 ordinary conversations, got 98"),
        (0, 0.5, "needs at least 1 ordinary conversations, got 0"),
        (9, 0, "rate must be between 0 and 1, got 0"),
        (9, 1.0, "rate must be between 0 and 1"),
        (9, math.nan, "rate must be between 0 and 1, got nan"),
    ],
)
def test_rates_that_cannot_be_had(count, rate, message):
    with pytest.raises(ValueError, match=message):
        Threshold.calibrated("afraid", conversations(count), rate)


def test_just_enough_conversations():
    ordinary = conversations(99)
    threshold = Threshold.calibrated("afraid", ordinary, 0.01)
    assert threshold.above == max(peak(threshold, one) for one in ordinary)


def test_conversations_that_tell_nothing():
    with pytest.raises(ValueError, match="of 9 conversations too many have fewer than 3 tokens that count"):
        Threshold.calibrated("afraid", conversations(9, length=3, prompt=1), 0.5)
    with pytest.raises(ValueError, match="needs a calibrated bank"):
        Threshold.calibrated("afraid", [reading([[0, 1, 2]] * 5, calibrated=False)] * 9, 0.5)
    with pytest.raises(ValueError, match="layer 3 was not read"):
        Threshold.calibrated("afraid", conversations(9), 0.5, layer=3)
    with pytest.raises(TypeError, match="unexpected keyword argument 'holdoff'"):
        Threshold.calibrated("afraid", conversations(9), 0.5, holdoff=3)
