"""A progress bar with an estimate of the time left: by rich if it is installed, else plain lines now and then."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any

_EVERY = 10.0  # seconds between plain lines


class Progress:
    """Counts tokens, or another unit, done of ``total``; shows nothing unless ``visible``.

    >>> with Progress(100, visible=False) as progress:
    ...     progress.advance(40)
    >>> progress.done
    40
    """

    def __init__(self, total: int, label: str = "extracting", *, unit: str = "tokens", visible: bool = True) -> None:
        self.total = total
        self.done = 0
        self._label = label
        self._unit = unit
        self._visible = visible
        self._bar: Any = None
        self._task: Any = None
        self._started = self._last = time.monotonic()
        self._skipped = 0

    def __enter__(self) -> Progress:
        self._started = self._last = time.monotonic()
        if self._visible:
            self._bar = _rich_bar()
        if self._bar is not None:
            self._bar.start()
            self._task = self._bar.add_task(self._label, total=self.total, speed="")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()

    def resume(self, tokens: int) -> None:
        """Count tokens that an earlier run has done."""
        self._skipped += tokens
        self._show(tokens)

    def advance(self, tokens: int) -> None:
        self._show(tokens)

    @property
    def speed(self) -> float:
        """Tokens per second since the start."""
        return (self.done - self._skipped) / max(time.monotonic() - self._started, 1e-9)

    def _rate(self) -> str:
        return f"{self.speed:,.0f} {self._unit}/s" if self.speed >= 10 else f"{self.speed:.2g} {self._unit}/s"

    def _show(self, tokens: int) -> None:
        self.done += tokens
        if self._bar is not None:
            self._bar.update(self._task, completed=self.done, speed=self._rate())
        elif self._visible and time.monotonic() - self._last > _EVERY:
            self._last = time.monotonic()
            left = (self.total - self.done) / max(self.speed, 1e-9)
            print(
                f"{self._label}: {self.done:,} of {self.total:,} {self._unit}, {self._rate()}, {left / 60:.0f} min left",
                file=sys.stderr,
                flush=True,
            )


def _rich_bar() -> Any:
    try:
        from rich import progress
        from rich.console import Console
    except ModuleNotFoundError:
        return None
    console = Console(stderr=True)
    if not console.is_terminal:
        return None
    return progress.Progress(
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.TaskProgressColumn(),
        progress.TextColumn("{task.fields[speed]}"),
        progress.TimeElapsedColumn(),
        progress.TextColumn("left"),
        progress.TimeRemainingColumn(elapsed_when_finished=True),
        console=console,
    )
