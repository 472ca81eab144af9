"""Intervals cover, nulls keep their promise, alarms fire when and only when they should."""

from __future__ import annotations

import pytest
import torch

from emovec.comparison import Alarm, AlarmError, Comparison, Shift
from emovec.comparison.shifts import Design, axes, shifts, sign_flips


def noise(trial: int, prompts: int = 40, concepts: int = 30) -> torch.Tensor:
    """Skew-free correlated noise, of other sizes in other columns."""
    generator = torch.Generator().manual_seed(trial)
    shared = torch.randn(prompts, 1, generator=generator, dtype=torch.float64)
    own = torch.randn(prompts, concepts, generator=generator, dtype=torch.float64)
    return (shared + own) * torch.logspace(-1, 1, concepts, dtype=torch.float64)


def design(prompts: int = 40, challenging: int = 0, resamples: int = 400, seed: int = 0) -> Design:
    return Design(torch.arange(prompts) < challenging, resamples, 0.95, seed)


def test_sign_flips_raise_false_findings_as_seldom_as_they_say() -> None:
    trials = 400
    false = sum(bool((sign_flips(noise(trial), 200, seed=trial) <= 0.05).any()) for trial in range(trials))
    assert 0.02 < false / trials < 0.085  # 0.05, three standard errors to each side


def test_sign_flips_find_a_shift_whatever_its_scale() -> None:
    differences = noise(0)
    for column in (0, 29):
        moved = differences.clone()
        moved[:, column] += 1.5 * differences[:, column].std()
        p = sign_flips(moved, 999, seed=1)
        assert float(p[column]) == 0.001
        assert int((p <= 0.05).sum()) == 1


def test_without_any_difference_nothing_is_found() -> None:
    assert sign_flips(torch.zeros(9, 3, dtype=torch.float64), 100, seed=0).tolist() == [1.0] * 3


def test_intervals_cover_the_truth() -> None:
    covered = [
        shift.low <= 0 <= shift.high
        for trial in range(60)
        for shift in shifts([str(c) for c in range(30)], noise(trial), design()).values()
    ]
    assert 0.90 < sum(covered) / len(covered) < 0.98


def test_intervals_are_of_prompts_and_paired() -> None:
    steady = torch.full((40, 1), 0.7, dtype=torch.float64)
    shift = shifts(["calm"], steady, design())["calm"]
    assert (shift.mean, shift.low, shift.high) == pytest.approx((0.7, 0.7, 0.7))
    wide, narrow = (shifts(["calm"], noise(3, prompts=count)[:, :1], design(count))["calm"] for count in (20, 320))
    assert (wide.high - wide.low) / (narrow.high - narrow.low) == pytest.approx(4, rel=0.4)


def test_groups_are_drawn_apart() -> None:
    differences = torch.cat([torch.full((10, 1), 5.0), torch.full((30, 1), 1.0)]).double()
    shift = shifts(["calm"], differences, design(challenging=10))["calm"]
    assert (shift.low, shift.high) == pytest.approx((2.0, 2.0))  # the share of challenging prompts is no accident
    assert shift.difference is not None
    assert (shift.difference.low, shift.difference.high) == pytest.approx((4.0, 4.0))


def test_random_directions_are_counted() -> None:
    shift = shifts(["calm"], torch.full((9, 1), -2.0).double(), design(9), random=torch.tensor([-3.0, 2.0, 1.9, 0.0]))["calm"]
    assert shift.random == pytest.approx(3 / 5)


def test_slopes_need_ratings_that_differ() -> None:
    with pytest.raises(ValueError, match="do not tell"):
        axes(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([2.0, 4.0, 6.0]))


# --- alarms -------------------------------------------------------------------------------------------------------------


NAMES, FAMILIES = ("calm", "at ease", "afraid"), ("Fear and Overwhelm",)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("afraid>0.5", Alarm("afraid", True, 0.5)),
        (" at ease < -1e-1 ", Alarm("at ease", False, -0.1)),
        ("Fear and Overwhelm>0", Alarm("Fear and Overwhelm", True, 0.0)),
        ("valence<-0.05", Alarm("valence", False, -0.05)),
    ],
)
def test_alarms_are_read(text: str, expected: Alarm) -> None:
    assert Alarm.parse(text, NAMES, FAMILIES) == expected
    assert Alarm.parse(str(expected), NAMES, FAMILIES) == expected


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("afriad>0.5", "afraid"),
        ("Fear>1", "Fear and Overwhelm"),
        ("valance>1", "valence"),
        ("afraid", "NAME>NUMBER"),
        ("afraid>", "NAME>NUMBER"),
        ("afraid>=0.5", "NAME>NUMBER"),
        ("afraid>nan", "NAME>NUMBER"),
        ("afraid>inf", "NAME>NUMBER"),
        (">0.5", "NAME>NUMBER"),
        ("afraid>0.5>0.7", "no concept"),
        ("x" * 5000 + ">1", "no concept"),
    ],
)
def test_alarms_that_cannot_be_read(text: str, said: str) -> None:
    with pytest.raises(AlarmError, match=said) as caught:
        Alarm.parse(text, NAMES, FAMILIES)
    assert len(str(caught.value)) < 500


def test_the_whole_interval_must_be_beyond() -> None:
    shift = Shift("afraid", 0.6, 0.4, 0.8, 0.01)
    fires = {text: Alarm.parse(text, NAMES).fires(shift) for text in ("afraid>0.3", "afraid>0.5", "afraid<0.9", "afraid<0.7", "afraid<0.5")}
    assert fires == {"afraid>0.3": True, "afraid>0.5": False, "afraid<0.9": True, "afraid<0.7": False, "afraid<0.5": False}


def test_an_alarm_on_an_axis_that_is_not_known_is_an_error() -> None:
    found = Comparison(["x"], {}, torch.zeros(9, 1), torch.ones(9, 1), [str(row) for row in range(9)], [False] * 9)
    with pytest.raises(ValueError, match="too few of the concepts are rated"):
        found.fired(["valence>0"])
