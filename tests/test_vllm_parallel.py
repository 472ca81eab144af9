"""vLLM with the model cut into three (the packaged one has three key heads, so two do not divide it): the same as in one piece."""

from __future__ import annotations

import pytest
from vllm_engine import SIXTEEN, TEXTS, Oracle, generate, params, started

pytest.importorskip("vllm")

pytestmark = pytest.mark.engine


def test_three_ranks_do_what_one_does(monkeypatch):
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1|0")
    oracle = Oracle()
    ids = [oracle.ids(TEXTS[number % len(TEXTS)]) for number in range(16)]
    with started(enforce_eager=True, tensor_parallel_size=3) as engine:
        outputs = generate(engine, ids, [params(value, {"on": "all"}) for value in SIXTEEN])
        counts = engine.collective_rpc("emovec_counts")
    same = [oracle.check(*case, on="all") for case in zip(ids, SIXTEEN, outputs, strict=True)]
    assert sum(same) > 0.9 * 12 * 16
    assert counts == [counts[0]] * 3
