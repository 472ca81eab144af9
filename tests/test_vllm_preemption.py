"""Requests that the cache is too small for: they are thrown out, computed anew, and come to the same."""

from __future__ import annotations

import pytest
from vllm_engine import ESSAY, SIXTEEN, generate, params, preemptions

pytest.importorskip("vllm")


pytestmark = pytest.mark.engine

TOKENS = 32


def test_preempted_requests_come_to_what_they_would_have_come_to(engine, oracle):
    before = preemptions(engine)
    text = oracle.ids(ESSAY, chat=False)
    ids = [text[start : start + 140] for start in range(8)]
    values = [SIXTEEN[i] for i in (0, 3, 6, 8, 10, 12, 13, 15)]
    outputs = generate(engine, ids, [params(value, {"on": "all"}, max_tokens=TOKENS) for value in values])
    assert preemptions(engine) > before, "the cache was large enough: this shows nothing"
    same = [oracle.check(*case, on="all", tokens=TOKENS) for case in zip(ids, values, outputs, strict=True)]
    assert sum(same) > 0.75 * 8 * TOKENS


def test_more_values_at_a_time_than_run_at_once(engine, oracle):
    """Rows of the table go from one value to the next as requests come and go."""
    ids = oracle.ids(ESSAY, chat=False)[:24]
    values = [{"calm": 0.002 * number} for number in range(1, 60)]
    outputs = generate(engine, [ids] * len(values), [params(value, max_tokens=4) for value in values])
    for number in (0, 20, 40, 58):
        oracle.check(ids, values[number], outputs[number], tokens=4)
    assert engine.collective_rpc("emovec_counts")[0]["values"] <= 64
