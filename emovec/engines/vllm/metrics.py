"""Counters beside vLLM's own, at its ``/metrics``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from prometheus_client import REGISTRY, Counter
from prometheus_client.core import HistogramMetricFamily
from prometheus_client.utils import floatToGoString

from emovec.bank import Bank
from emovec.engines.vllm.tally import BOUNDS, unpacked

_steered = Counter("emovec_steered_requests", "Requests with a steering value.")
_refused = Counter("emovec_refused_requests", "Requests whose emotion fields were wrong.")
_scored = Counter("emovec_scored_tokens", "Tokens whose scores were returned.")
_tokens = Counter("emovec_steered_tokens", "Tokens that were computed under a steering value.")
_events = Counter("emovec_guard_events", "Thresholds that fired.", ["of", "do"])
_counts: dict[tuple[str, ...], Any] = {}
"""[names, buckets] by the names that an engine shows. As with the counters above, all engines of a process count together."""


def steered() -> None:
    _steered.inc()


def refused() -> None:
    _refused.inc()


def scored(tokens: int) -> None:
    _scored.inc(tokens)


def show(names: Sequence[str]) -> None:
    """Have the scores of an engine's concepts and families among the metrics, from none."""
    if names:
        _counts.setdefault(tuple(names), np.zeros((len(names), len(BOUNDS) + 1), np.int64))


def counted(names: Sequence[str], steered_tokens: int, counts: bytes) -> None:
    """What the core of an engine that shows ``names`` has counted since the last time."""
    _tokens.inc(steered_tokens)
    if counts:
        _counts[tuple(names)] += unpacked(counts)


def fired(bank: Bank, of: str, do: str) -> None:
    """Weighted sums, which a request may make up, count as one."""
    _events.labels(of if of in bank.names or of in bank.families else "weighted sum", do).inc()


class _Scores:
    """``emovec_score``: a histogram that is counted elsewhere, since one call for each token and concept would cost too much.

    Scores are negative too, so there is no sum, as with any such histogram.
    """

    def collect(self) -> Iterator[Any]:
        rows: dict[str, Any] = {}
        for names, counts in list(_counts.items()):
            for name, row in zip(names, counts.cumsum(1), strict=True):
                rows[name] = rows.get(name, 0) + row
        if not rows:
            return
        family = HistogramMetricFamily("emovec_score", "Scores of generated tokens.", labels=["concept"])
        ends = [floatToGoString(bound) for bound in (*BOUNDS, float("inf"))]
        for name, row in rows.items():
            family.add_metric([name], list(zip(ends, row.tolist(), strict=True)), None)
        yield family


REGISTRY.register(_Scores())
