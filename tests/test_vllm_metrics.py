"""The histogram of scores at `/metrics`; no engine is started."""

from __future__ import annotations

import numpy as np
import pytest
from banks import NAMES

from emovec.engines.vllm.tally import BOUNDS, Tally

prometheus = pytest.importorskip("prometheus_client")

from emovec.engines.vllm import metrics  # noqa: E402

pytestmark = pytest.mark.engine


def shown():
    lines = prometheus.generate_latest().decode().splitlines()
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if line.startswith("emovec_score_"))}


def count(bank, names, score):
    tally = Tally(names, bank)
    tally.add([np.full((2, len(NAMES)), score, np.float32)])
    metrics.counted(names, 0, tally.take())


def test_engines_of_one_process_count_together(bank, monkeypatch):
    monkeypatch.setattr(metrics, "_counts", {})
    assert not shown()
    one, other = ("calm", "desperate"), ("angry", "afraid", "calm")
    metrics.show(one)
    metrics.show(other)
    metrics.show(())
    count(bank, one, 1.0)
    count(bank, other, 2.0)
    count(bank, one, 9.0)
    metrics.show(one)  # another engine like the first: nothing is forgotten
    found = shown()
    assert len(found) == 4 * (len(BOUNDS) + 1)
    ends = ("0.5", "1.0", "2.0", "8.0", "+Inf")
    for concept, counts in {"calm": (0, 2, 4, 4, 6), "desperate": (0, 2, 2, 2, 4), "angry": (0, 0, 2, 2, 2)}.items():
        assert [found[f'emovec_score_bucket{{concept="{concept}",le="{end}"}}'] for end in ends] == list(counts)
