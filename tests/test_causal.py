"""The arithmetic of bench/causal.py, and that docs/steering.md says what its results say."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from emovec.bank import load_bank


@pytest.fixture
def causal(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "bench")
    yield __import__("causal")
    for name in ("causal", "heldout", "provenance"):
        sys.modules.pop(name, None)


def test_log_odds(causal: Any) -> None:
    log_p = torch.tensor([0.5, 0.3, 0.1], dtype=torch.float64).log()  # the rest is on other tokens
    assert causal.log_odds(log_p).tolist() == pytest.approx([0.0, math.log(3 / 7), math.log(1 / 9)])
    assert causal.log_odds_among(log_p).tolist() == pytest.approx([math.log(5 / 4), math.log(3 / 6), math.log(1 / 8)])
    batch = torch.stack([log_p, log_p - 2.0])  # the odds among the words do not depend on how likely the words are together
    assert torch.allclose(causal.log_odds_among(batch)[0], causal.log_odds_among(batch)[1])


def test_slopes_are_those_of_least_squares(causal: Any) -> None:
    x, y = (-0.1, 0.0, 0.05, 0.2), torch.randn(4, 3, 2, dtype=torch.float64)
    line = torch.tensor(x, dtype=torch.float64)
    expected = torch.linalg.lstsq(torch.stack([line, torch.ones(4, dtype=torch.float64)], 1), y.flatten(1)).solution[0]
    assert torch.allclose(causal.slopes(x, y), expected.reshape(3, 2))


def test_the_interval_draws_rows_and_columns(causal: Any) -> None:
    low, high = causal.interval(torch.full((4, 6), 3.0))
    assert low == high == 3.0
    rows = torch.arange(4.0)[:, None].expand(4, 6)
    low, high = causal.interval(rows)  # six equal columns are no evidence that another row would give the same
    assert low <= 0.5
    assert high >= 2.5
    columns = torch.arange(6.0).expand(4, 6)
    low, high = causal.interval(columns)
    assert low <= 1.2
    assert high >= 3.8


def test_spearman(causal: Any) -> None:
    assert causal.spearman(torch.tensor([-3.0, 0.0, 0.1, 9.0])) == pytest.approx(1)
    assert causal.spearman(torch.tensor([9.0, 0.1, 0.0, -3.0])) == pytest.approx(-1)
    assert causal.spearman(torch.tensor([1.0, 3.0, 2.0, 4.0])) == pytest.approx(0.8)


def test_a_word_passes_only_beyond_every_random_slope_and_with_its_interval_above_zero(causal: Any) -> None:
    own = torch.full((4, 6), 2.0)
    assert causal._against(own, torch.tensor([-1.9, 0.3]))["passed"]
    assert not causal._against(own, torch.tensor([-2.1, 0.3]))["passed"]
    own = torch.tensor([[9.0], [-1.0], [9.0], [-1.0]]).expand(4, 6)
    assert not causal._against(own, torch.tensor([0.1, -0.2]))["passed"]


def test_the_results_count_what_a_made_up_model_does(causal: Any) -> None:
    """Each direction but the last raises its own word, the last lowers it; random ones do a tenth of that to the first word."""
    words, strengths = len(causal.WORDS), torch.tensor(causal.STRENGTHS, dtype=torch.float64)
    push = torch.eye(words, dtype=torch.float64)
    push[-1, -1] = -1.0

    def log_p(push: torch.Tensor) -> torch.Tensor:
        logits = 10 * strengths[None, :, None] * push[:, None, :]
        logits = torch.cat([logits, torch.full((*logits.shape[:-1], 1), 5.0, dtype=torch.float64)], -1)  # all other tokens
        frames, subjects = len(causal.FRAMES) + 1, len(causal.SUBJECTS)
        return logits.log_softmax(-1)[..., :-1][:, :, None, None].expand(-1, -1, frames, subjects, -1)

    results = causal.measured(log_p(push), log_p(0.1 * push[:1].expand(3, -1)))
    assert (results["passed"], results["passed_overall"], results["monotonic"]) == (words - 1, words - 1, words - 1)
    assert results["own_direction_first"] == words - 1
    first, last = results["words"][causal.WORDS[0]], results["words"][causal.WORDS[-1]]
    assert first["slope"] == pytest.approx(10)  # the others share the rest alike
    assert first["curve"] == pytest.approx((10 * strengths).tolist())
    assert first["random_largest"] == pytest.approx(1)
    assert (last["passed"], last["rank"], last["spearman"]) == (False, words, pytest.approx(-1))


def test_random_directions_are_unit_alike_at_all_layers_and_in_the_banks_units(causal: Any) -> None:
    bank = load_bank(causal.MODEL)
    null = causal.random_bank(bank)
    assert null.steer_layers == bank.steer_layers
    first = null[null.steer_layers[0]]
    for index in null.steer_layers:
        assert torch.equal(null[index].directions, first.directions)
        assert null[index].residual_norm == bank[index].residual_norm
    assert first.directions.norm(dim=1).tolist() == pytest.approx([1] * causal.RANDOM, abs=1e-5)


def test_the_page_says_what_the_results_say_and_they_are_of_the_shipped_bank(causal: Any) -> None:
    found = causal.provenance.read("causal")
    page = causal.PAGE.read_text(encoding="utf-8")
    assert causal.pages.written(page, {"causal": causal.table(found["results"], found["provenance"]["name"])}) == page
    settings = found["results"]["settings"]
    assert settings["directions"] == causal.directions_digest(load_bank(causal.MODEL)), "run `python bench/causal.py` again"
    assert tuple(settings["strengths"]) == causal.STRENGTHS
    assert found["results"]["passed"] >= 10
