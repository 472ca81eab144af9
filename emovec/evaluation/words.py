"""Numbers as the report says them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from emovec.report.markup import number


def said(estimate: Mapping[str, Any]) -> str:
    """An estimate with its interval: ``0.42 (0.31 to 0.54)``."""
    return f"{plain(estimate['value'])} ({plain(estimate['low'])} to {plain(estimate['high'])})"


def plain(value: float | None) -> str:
    return "n/a" if value is None else number(value, sign=False) if value >= 0 else number(value)


def chance(p: float) -> str:
    """A p as it is said: two digits."""
    return f"{p:.2g}"
