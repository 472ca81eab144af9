"""Intervals cover what they should, nulls are calibrated, and ties do not look like hits."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from emovec import stats
from emovec.evaluation.reading import all_ranks, ranks_of


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_wilson_is_what_the_formula_gives() -> None:
    assert stats.wilson(0, 10) == pytest.approx((0.0, 0.2775), abs=1e-3)
    assert stats.wilson(5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-3)
    assert stats.wilson(10, 10) == pytest.approx((0.7225, 1.0), abs=1e-3)
    with pytest.raises(ValueError, match="got 0"):
        stats.wilson(0, 0)


def test_p_is_never_zero_and_counts_the_observed() -> None:
    null = torch.zeros(99)
    assert stats.permutation_p(1.0, null) == 0.01
    assert stats.permutation_p(0.0, null) == 1.0
    assert stats.permutation_p(-1.0, null) == 1.0


def test_p_is_uniform_where_there_is_nothing() -> None:
    draws = torch.randn(2000, 100, generator=seeded())
    p = torch.tensor([stats.permutation_p(float(row[0]), row[1:]) for row in draws])
    assert float((p <= 0.05).double().mean()) == pytest.approx(0.05, abs=0.015)
    assert float(p.mean()) == pytest.approx(0.5, abs=0.02)


def test_intervals_cover_the_truth_as_often_as_they_say() -> None:
    """Groups of items that rise and fall together: an interval that took items for independent would cover far too rarely."""
    covered = naive = 0
    groups = torch.arange(20).repeat_interleave(5)
    for trial in range(300):
        values = torch.randn(20, generator=seeded(trial))[groups] + 0.1 * torch.randn(100, generator=seeded(trial + 1000))
        grouped = stats.mean_estimate(values, (groups,), 300, seeded(trial))
        single = stats.mean_estimate(values, (torch.arange(100),), 300, seeded(trial))
        covered += grouped["low"] <= 0 <= grouped["high"]
        naive += single["low"] <= 0 <= single["high"]
    assert covered / 300 > 0.88
    assert naive / 300 < 0.75


def test_an_interval_without_misses_is_not_a_point() -> None:
    found = stats.hit_estimate(torch.ones(36), (torch.arange(36),), 100, seeded())
    assert found["value"] == found["high"] == 1.0
    assert found["low"] == pytest.approx(stats.wilson(36, 36)[0])
    assert found["hits"] == 36


def test_the_same_seed_gives_the_same_interval() -> None:
    values, groups = torch.randn(30, generator=seeded(3)), (torch.arange(30) // 3, torch.arange(30) % 3)
    assert stats.mean_estimate(values, groups, 50, seeded(1)) == stats.mean_estimate(values, groups, 50, seeded(1))
    assert stats.mean_estimate(values, groups, 50, seeded(1)) != stats.mean_estimate(values, groups, 50, seeded(2))


@given(st.lists(st.floats(-9, 9), min_size=2, max_size=8), st.integers(0, 7))
def test_ranks_count_ties_against_the_truth(scores: list[float], truth: int) -> None:
    truth %= len(scores)
    row = torch.tensor([scores], dtype=torch.float64)
    expected = sum(score >= scores[truth] for score in scores)
    assert int(ranks_of(row, torch.tensor([truth]))) == expected
    assert int(all_ranks(row)[0, truth]) == expected


def test_scores_that_are_all_alike_are_no_hits() -> None:
    assert all_ranks(torch.zeros(3, 5, dtype=torch.float64)).tolist() == [[5] * 5] * 3


def test_adjusted_rand() -> None:
    a = torch.tensor([0, 0, 1, 1, 2, 2])
    assert stats.adjusted_rand(a, torch.tensor([5, 5, 3, 3, 9, 9])) == 1.0
    assert stats.adjusted_rand(torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 0, 1])) == pytest.approx(-0.5)
    values = [
        stats.adjusted_rand(torch.randint(3, (60,), generator=seeded(s)), torch.randint(4, (60,), generator=seeded(s + 99)))
        for s in range(50)
    ]
    assert abs(sum(values) / 50) < 0.02


def test_kmeans_finds_clusters_that_are_there() -> None:
    truth = torch.arange(4).repeat_interleave(10)
    rows = 5 * torch.randn(4, 6, generator=seeded(1))[truth] + 0.2 * torch.randn(40, 6, generator=seeded(2))
    labels = stats.kmeans(rows, 4, seeded())
    assert stats.adjusted_rand(labels, truth) == 1.0
    assert torch.equal(labels, stats.kmeans(rows, 4, seeded()))


def test_correlations() -> None:
    x = torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert float(stats.correlation(x, 2 * x + 1)) == pytest.approx(1.0)
    assert math.isnan(float(stats.correlation(x, torch.ones(4))))
    assert float(stats.spearman(x, x.exp())) == pytest.approx(1.0)
    assert stats.ranks(torch.tensor([3.0, 1.0, 3.0])).tolist() == [1.5, 0.0, 1.5]
    assert stats.slopes(x, torch.stack([2 * x, -x])).tolist() == pytest.approx([2.0, -1.0])


@settings(deadline=None)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=20))
def test_shuffles_stay_within_their_group(groups: list[int]) -> None:
    labels = torch.tensor(groups)
    order = stats.shuffled_within(labels, seeded())
    assert torch.equal(labels[order], labels)
    assert sorted(order.tolist()) == list(range(len(groups)))
