"""Tables of the docs that benches write: each stands between ``<!-- table: NAME -->`` and ``<!-- end -->``."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

DOCS = Path(__file__).parents[1] / "docs"


def written(text: str, tables: Mapping[str, str]) -> str:
    """The page's text with each table between its markers.

    Raises:
        ValueError: a table that the page has no place for, or several.
    """
    for name, table in tables.items():
        pattern = rf"(<!-- table: {name} -->\n).*?(\n<!-- end -->)"
        text, count = re.subn(pattern, lambda match, table=table: match[1] + table + match[2], text, flags=re.DOTALL)
        if count != 1:
            raise ValueError(f"the page has {count} places for the table {name!r}")
    return text


def write(page: Path, tables: Mapping[str, str]) -> None:
    """Put the tables into a page."""
    page.write_text(written(page.read_text(encoding="utf-8"), tables), encoding="utf-8")
