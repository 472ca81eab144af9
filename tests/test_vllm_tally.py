"""Scores that are counted for a histogram."""

from __future__ import annotations

import numpy as np
import pytest
from banks import NAMES, make_bank

from emovec.engines.vllm.tally import BOUNDS, Tally, parse, unpacked


def test_every_score_is_in_its_bucket(bank):
    values = np.random.default_rng(1).normal(size=(50, 7), scale=4).astype(np.float32)
    values[:4, 3] = [BOUNDS[0], BOUNDS[5], BOUNDS[-1], 100]
    tally = Tally(parse("all", bank), bank)
    assert tally.take() == b""
    tally.add([values[:20], values[20:21]])
    tally.add([values[21:]])
    counts = unpacked(tally.take())
    assert counts.shape == (7, len(BOUNDS) + 1)
    for column, row in zip(values.T, counts.cumsum(1), strict=True):
        assert row.tolist() == [int((column <= bound).sum()) for bound in (*BOUNDS, np.inf)]
    assert tally.take() == b"", "they are counted once"


def test_concepts_and_families_in_the_order_they_are_named(bank):
    tally = Tally(parse(["Peace", "angry"], bank), bank)
    values = np.zeros((1, 7), np.float32)
    values[0, [NAMES.index("calm"), NAMES.index("at ease"), NAMES.index("angry")]] = 3.2, 1.2, -1.2
    tally.add([values])
    peace, angry = unpacked(tally.take())
    assert (peace.sum(), angry.sum()) == (1, 1)
    assert peace[BOUNDS.index(2.5)] == 1, "a family is the mean of its members, as to a guard"
    assert angry[BOUNDS.index(-1.0)] == 1


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("calm", 'must be "all" or a list'),
        ([], 'must be "all" or a list'),
        (True, 'must be "all" or a list'),
        (["clam"], "nearest known: calm"),
        (["Pease"], "nearest known: Peace"),
        ([3], "unknown concept"),
        (["calm", "Peace", "calm"], "'calm' is given twice"),
    ],
    ids=str,
)
def test_what_cannot_be_counted_is_refused(bank, value, said):
    with pytest.raises(ValueError, match=said):
        parse(value, bank)


def test_scores_without_a_unit_have_no_bucket():
    with pytest.raises(ValueError, match="no baseline"):
        parse("all", make_bank(kinds=()))
