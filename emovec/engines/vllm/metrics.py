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


def steered() -> None:
    _steered.inc()


def refused() -> None:
    _refused.inc()


def scored(tokens: int) -> None:
    _scored.inc(tokens)


def counted(steered_tokens: int, counts: bytes) -> None:
    """What the engine core has counted since the last time."""
    _tokens.inc(steered_tokens)
    if counts and _histogram is not None:
        _histogram.counts += unpacked(counts)


class _Histogram:
    """``emovec_score``: a histogram that is counted elsewhere, since one call for each token and concept would cost too much.

    Scores are negative too, so there is no sum, as with any such histogram.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self._names = names
        self.counts = np.zeros((len(names), len(BOUNDS) + 1), np.int64)

    def collect(self) -> Iterator[Any]:
        family = HistogramMetricFamily("emovec_score", "Scores of generated tokens.", labels=["concept"])
        ends = [floatToGoString(bound) for bound in (*BOUNDS, float("inf"))]
        for name, row in zip(self._names, self.counts.cumsum(1).tolist(), strict=True):
            family.add_metric([name], list(zip(ends, row, strict=True)), None)
        yield family


_histogram: _Histogram | None = None


def show(names: Sequence[str]) -> None:
    """Have the scores of these concepts and families among the metrics, from none; those of an engine before are taken away."""
    global _histogram
    if _histogram is not None:
        REGISTRY.unregister(_histogram)
    _histogram = _Histogram(names) if names else None
    if _histogram is not None:
        REGISTRY.register(_histogram)


def fired(bank: Bank, of: str, do: str) -> None:
    """Weighted sums, which a request may make up, count as one."""
    _events.labels(of if of in bank.names or of in bank.families else "weighted sum", do).inc()
