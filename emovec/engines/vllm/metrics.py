"""Counters beside vLLM's own, at its ``/metrics``."""

from __future__ import annotations

from prometheus_client import Counter

from emovec.bank import Bank

_steered = Counter("emovec_steered_requests", "Requests with a steering value.")
_refused = Counter("emovec_refused_requests", "Requests whose emotion fields were wrong.")
_scored = Counter("emovec_scored_tokens", "Tokens whose scores were returned.")
_events = Counter("emovec_guard_events", "Thresholds that fired.", ["of", "do"])


def steered() -> None:
    _steered.inc()


def refused() -> None:
    _refused.inc()


def scored(tokens: int) -> None:
    _scored.inc(tokens)


def fired(bank: Bank, of: str, do: str) -> None:
    """Weighted sums, which a request may make up, count as one."""
    _events.labels(of if of in bank.names or of in bank.families else "weighted sum", do).inc()
