"""What speaks for a direction: each figure against what defines it, on planted directions and on noise."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from emovec.extraction.evidence import FLIPS, Evidence, accuracies, flips, halves, judged, margin, nearest, thin

WIDTH = 24
NONE = torch.empty(0, WIDTH, dtype=torch.float64)


def same(rows: Tensor) -> Tensor:
    return rows


def drawn(count: int, strength: float, seed: int = 0) -> Tensor:
    """Differences of noise and, along the first axis, the concept."""
    rows = torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    rows[:, 0] += strength
    return rows


def evidence(rows: Tensor, topics: Tensor | None = None, surface: Tensor | None = None) -> Evidence:
    topics = torch.arange(len(rows)) if topics is None else topics
    return judged("edgy", 3, rows, surface, same, NONE, topics, {"own text": len(rows)}, 2.0, [("calm", 0.1)])


def test_accuracy_is_of_readers_from_the_other_topics() -> None:
    rows, topics = drawn(9, 0.7), torch.tensor([0, 0, 1, 1, 1, 2, 3, 3, 4])
    signs = flips(topics)
    found = accuracies(rows, same, topics, signs)
    for which in (0, 3, 7):
        turned = rows * signs[which][:, None]
        right = [float(turned[i] @ turned[topics != topics[i]].sum(0)) > 0 for i in range(9)]
        assert float(found[which]) == pytest.approx(sum(right) / 9)


def test_what_a_topic_has_alone_does_not_help() -> None:
    """Two stories on each topic that are alike, and like no other: held out as stories they would be read; held out as topics not."""
    rows = torch.eye(6, WIDTH, dtype=torch.float64).repeat_interleave(2, 0)
    assert float(accuracies(rows, same, torch.arange(12), flips(torch.arange(12))[:1])) == 1.0
    pairs = torch.arange(6).repeat_interleave(2)
    assert float(accuracies(rows, same, pairs, flips(pairs)[:1])) == 0.0


def test_flips_turn_whole_topics_the_identity_first() -> None:
    topics = torch.tensor([5, 5, 2, 9])
    found = flips(topics)
    assert found.shape == (4, 4)
    assert len({tuple(row) for row in found.tolist()}) == 4
    assert found[0].tolist() == [1, 1, 1, 1]
    assert bool((found[:, 0] == found[:, 1]).all())
    many = flips(torch.arange(40))
    assert many.shape == (FLIPS + 1, 40)
    assert bool((many[0] == 1).all())
    assert torch.equal(many, flips(torch.arange(40)))


def test_a_planted_concept_is_found_and_noise_is_not() -> None:
    found = evidence(drawn(10, 6.0))
    assert (found.accuracy, found.p, found.flips) == (1.0, round(1 / 512, 5), 512)
    assert found.interval == pytest.approx((0.7225, 1.0), abs=1e-4)
    assert found.halves > 0.5
    assert not found.warnings
    ps = [evidence(drawn(10, 0.0, seed)).p for seed in range(40)]
    assert sum(p <= 0.05 for p in ps) <= 6, "a null that rejects noise more often than it says would be none"
    assert sum(p > 0.3 for p in ps) >= 15


def test_the_interval_counts_topics() -> None:
    rows = drawn(30, 3.0)
    few = evidence(rows, torch.arange(30) % 5)
    assert few.interval[0] == pytest.approx(0.5655, abs=1e-4)
    assert few.interval[0] < evidence(rows).interval[0]
    assert "only 5 topics" in few.warnings[0]


def test_the_margin_is_in_deviations_and_scaled_as_readers_are() -> None:
    rows = torch.zeros(4, WIDTH, dtype=torch.float64)
    rows[:, 0], rows[:, 1] = 6.0, 2.0
    assert margin(rows, same, NONE, torch.arange(4)) == pytest.approx((36 + 4) ** 0.5)
    assert margin(rows, lambda each: 7 * each, NONE, torch.arange(4)) == pytest.approx((36 + 4) ** 0.5), "a reader's length cancels"
    second = torch.eye(2, WIDTH, dtype=torch.float64)[1:]
    assert margin(rows, same, second, torch.arange(4)) == pytest.approx(40 / 6), "the direction alone is without the component"
    assert evidence(rows).margin == pytest.approx(40**0.5 / 2, abs=1e-4)


def test_halves() -> None:
    axis = torch.eye(1, WIDTH, dtype=torch.float64).repeat(6, 1)
    assert halves(axis, torch.arange(6)) == pytest.approx(1.0)
    assert abs(halves(torch.eye(6, WIDTH, dtype=torch.float64), torch.arange(6))) < 1e-9
    assert halves(drawn(64, 1.0), torch.arange(64)) > halves(drawn(8, 1.0), torch.arange(8))


def test_the_nearest_come_first_whatever_their_sign() -> None:
    directions = torch.eye(3, WIDTH)
    direction = torch.zeros(WIDTH)
    direction[:3] = torch.tensor([0.6, -0.8, 0.0])
    assert nearest(direction, ["a", "b", "c"], directions, 2) == [("b", -0.8), ("a", 0.6)]


def test_words_alone() -> None:
    rows = drawn(10, 6.0)
    assert evidence(rows, surface=drawn(10, 6.0, seed=1)).words == 1.0
    assert any("the words alone (layer 0) do as well: 1.00 against 1.00" in said for said in evidence(rows, surface=rows).warnings)
    assert evidence(rows).words is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"contrasts": {"own text": 7, "mean": 3}}, "3 of 10 stories have no contrast of their own"),
        ({"topics": 7}, "only 7 topics, of which accuracy can tell little: its interval is 0.72 to 1.00"),
        (
            {"interval": (0.4, 0.9), "accuracy": 0.7},
            "held-out accuracy 0.70 (0.40 to 0.90, p = 0.002) is not clearly above the 0.5 of chance",
        ),
        ({"p": 0.06}, "p = 0.06) is not clearly above"),
        ({"halves": 0.49}, "a cosine of 0.49 only"),
        ({"halves": float("nan")}, "a cosine of nan only"),
        ({"nearest": (("calm", -0.71),)}, "a cosine of -0.71 with calm"),
    ],
)
def test_what_is_thin_is_said_with_its_figures(changes: dict[str, object], message: str) -> None:
    good = Evidence("edgy", 3, 10, 10, {"own text": 10}, 1.0, (0.72, 1.0), 0.002, 512, 1.0, 0.6, 0.8, (("calm", 0.2),))
    assert thin(good) == []
    said = thin(replace(good, **changes))  # type: ignore[arg-type]
    assert len(said) == 1
    assert message in said[0]
