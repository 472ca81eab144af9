"""Scores of requests that are being answered over HTTP, for the middleware of the same process to put into the answer."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

from emovec.engines.vllm.requests import SCORES
from emovec.engines.vllm.scores import Collector

KEY = "emovec_reply"
EVENTS = "emotion_events"
_PROMPT = re.compile(r"-(\d+)$")


@dataclass
class _Choice:
    collector: Collector
    top: int | None
    sent: int = 0
    told: int = 0

    def news(self) -> dict[str, list[dict[str, Any]]]:
        """The tokens' scores and the guard's events since the last call."""
        events, self.told = self.collector.events[self.told :], len(self.collector.events)
        news = {SCORES: self._scores(), EVENTS: events}
        return {key: found for key, found in news.items() if found}

    def _scores(self) -> list[dict[str, Any]]:
        found = []
        for position, kind, scores in self.collector.after(self.sent):
            self.sent = position + 1
            shown = sorted(scores.items(), key=lambda item: -item[1])[: self.top] if self.top else scores.items()
            found.append({"position": position, "kind": kind, "scores": {name: round(value, 4) for name, value in shown}})
        return found


class Reply:
    """One answer that is being made; used in ``with``."""

    def __init__(self, several_prompts: bool) -> None:
        self.id = uuid4().hex
        self._several = several_prompts
        self.choices: dict[int, _Choice] = {}

    def __enter__(self) -> Reply:
        _open[self.id] = self
        return self

    def __exit__(self, *error: object) -> None:
        del _open[self.id]

    def expect(self, request: str, index: int, count: int, collector: Collector, top: int | None) -> None:
        prompt = _PROMPT.search(request) if self._several else None  # completions number their prompts
        self.choices[index + count * (int(prompt.group(1)) if prompt else 0)] = _Choice(collector, top)

    def news(self, choice: int) -> dict[str, list[dict[str, Any]]]:
        return self.choices[choice].news() if choice in self.choices else {}


_open: dict[str, Reply] = {}


def expect(reply: Any, request: str, index: int, count: int, collector: Collector, top: int | None) -> None:
    """A request has come in for an answer that may still be open."""
    if isinstance(reply, str) and reply in _open:
        _open[reply].expect(request, index, count, collector, top)
