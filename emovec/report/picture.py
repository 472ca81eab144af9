"""A still picture of a reading: tokens from left to right, concepts from top to bottom, as SVG."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

import torch

from emovec.monitor import Reading
from emovec.report import colour
from emovec.report.heatmap import scale_limit
from emovec.report.markup import Html, short, tag
from emovec.report.page import put

_WIDTH = 1000
_MARGIN = 28
_CELL = 19  # the least width of a token
_ROW = 24
_LETTERS = 11  # of a token's label
_TILT = 50  # of a token's label, in degrees
_FONT = "-apple-system,'Segoe UI',Roboto,'Helvetica Neue','Noto Sans','Liberation Sans',Arial,sans-serif"


def heatmap_svg(
    reading: Reading,
    concepts: Sequence[str],
    path: str | os.PathLike[str],
    *,
    title: str | None = None,
    limit: float | None = None,
    theme: str = "auto",
) -> Path:
    """Draw ``reading`` as a matrix of tokens and concepts and write it to ``path``, all or nothing.

    Long texts go over several lines; what is in the picture can be chosen by slicing the reading.

    Args:
        reading: with one token or more.
        concepts: the rows, from top to bottom.
        path: of the SVG file.
        title: a heading.
        limit: the score at which the colour is full; default as in :func:`emovec.report.heatmap.heatmap`.
        theme: "light", "dark", or "auto": whichever the viewer's system has.

    Returns:
        ``path``.

    Raises:
        UnknownConcept: a concept that the reading does not have.
        ValueError: an empty reading, no concepts, or an unknown theme.
    """
    if not len(reading) or not concepts:
        raise ValueError(f"a picture needs tokens and concepts, got {len(reading)} tokens and {len(concepts)} concepts")
    if theme not in ("auto", *colour.THEMES):
        raise ValueError(f"theme must be auto, {' or '.join(colour.THEMES)}, got {theme!r}")
    scores = torch.stack([reading.of(name) for name in concepts]).float().cpu()
    limit = scale_limit(scores, reading) if limit is None else limit
    left = _MARGIN + 12 + 7.2 * max(map(len, concepts))
    lines = math.ceil(len(reading) * _CELL / (_WIDTH - _MARGIN - left))
    columns = math.ceil(len(reading) / lines)
    cell = min(34.0, (_WIDTH - _MARGIN - left) / columns)
    top = _MARGIN + (34 if title else 0)
    label = 16 + 6.3 * math.sin(math.radians(_TILT)) * max(len(_label(piece)) for piece in reading.pieces)
    height = label + _ROW * len(concepts) + 34
    parts = [tag("text", title, x=_MARGIN, y=_MARGIN + 16, class_="title")] if title else []
    for line in range(lines):
        rows = range(line * columns, min((line + 1) * columns, len(reading)))
        parts.append(
            tag(
                "g",
                *_line(reading, concepts, scores, rows, cell, limit, label),
                transform=f"translate({left:.1f} {top + line * height:.1f})",
            )
        )
    total = top + lines * height + 34
    parts.append(_legend(limit, reading.unit, left, total - 34))
    picture = tag(
        "svg",
        tag("title", title or "Scores of emotion concepts, token by token"),
        tag("style", Html(_style(theme))),
        tag("rect", class_="card", width=_WIDTH, height=f"{total:.0f}", rx=14),
        *parts,
        xmlns="http://www.w3.org/2000/svg",
        viewBox=f"0 0 {_WIDTH} {total:.0f}",
        width=_WIDTH,
        height=f"{total:.0f}",
        role="img",
        font_family=_FONT,
    )
    return put(path, picture + "\n")


def _line(
    reading: Reading, concepts: Sequence[str], scores: torch.Tensor, rows: range, cell: float, limit: float, label: float
) -> list[Html]:
    """One line of tokens: their labels, a row of cells for each concept, and what kind of tokens they are."""
    found = []
    for column, row in enumerate(rows):
        x, y = cell * (column + 0.5), label - 6
        text = tag("text", _label(reading.pieces[row]), class_="token", transform=f"translate({x + 3:.1f} {y:.1f}) rotate(-{_TILT})")
        found.append(text)
    for index, name in enumerate(concepts):
        y = label + _ROW * index
        found.append(tag("text", name, x=-10, y=f"{y + _ROW / 2:.1f}", dy="0.34em", class_="name"))
        for column, row in enumerate(rows):
            sink = reading.positions[row] == 0 and len(reading) > 1
            shade = "sink" if sink else colour.name(colour.step(float(scores[index, row]), limit))
            corner = {"x": f"{cell * column + 0.75:.2f}", "y": f"{y + 0.75:.2f}"}
            found.append(tag("rect", **corner, width=f"{cell - 1.5:.2f}", height=_ROW - 1.5, rx=2.5, class_=shade))
    below = label + _ROW * len(concepts) + 7
    for kind, group in groupby(rows, key=lambda row: reading.kind[row]):
        members = [row - rows.start for row in group]
        start, end = cell * members[0] + 1, cell * (members[-1] + 1) - 1
        found.append(tag("path", d=f"M{start:.1f} {below:.1f}H{end:.1f}", class_=f"kind {kind if kind in ('prompt', 'generated') else ''}"))
        if end - start > 6.5 * len(kind):
            found.append(tag("text", kind, x=f"{start:.1f}", y=f"{below + 15:.1f}", class_="small"))
    return found


def _label(piece: str) -> str:
    text = piece.strip().replace("\n", "\u21b5") or ("\u21b5" if "\n" in piece else "\u25e6")
    return text if len(text) <= _LETTERS else text[: _LETTERS - 1] + "\u2026"


def _legend(limit: float, unit: str, left: float, y: float) -> Html:
    width = 13
    steps = range(-colour.STEPS, colour.STEPS + 1)
    strip = [
        tag("rect", x=24 + width * i, y=0, width=width, height=11, class_=f"strip {colour.name(step)}") for i, step in enumerate(steps)
    ]
    end = 24 + width * len(steps)
    ends = [
        tag("text", short(-limit), x=0, y=9.5, class_="small"),
        tag("text", short(limit), x=end + 6, y=9.5, class_="small"),
        tag("text", unit, x=end + 38, y=9.5, class_="small"),
    ]
    return tag("g", *strip, *ends, transform=f"translate({left:.1f} {y:.1f})")


def _style(theme: str) -> str:
    """Plain colours rather than variables: not every program that shows SVG knows those."""
    fixed = (
        "text{font-size:13px}.title{font-size:19px;font-weight:600}.small{font-size:12px}.token{font-size:12.5px}"
        ".name{text-anchor:end}.kind{fill:none;stroke-width:1.5}.sink{stroke-dasharray:2 2}"
    )
    if theme == "auto":
        return fixed + _colours("light") + f"@media (prefers-color-scheme:dark){{{_colours('dark')}}}"
    return fixed + _colours(theme)


def _colours(theme: str) -> str:
    base = colour.THEMES[theme]
    steps = "".join(f".{colour.name(index)}{{fill:{value}}}" for index, value in colour.scale(theme).items())
    return (
        f"{steps}.z{{fill:{base['zero']}}}.sink{{fill:none;stroke:{base['line']}}}text{{fill:{base['ink']}}}.small{{fill:{base['muted']}}}"
        f".card{{fill:{base['card']};stroke:{base['line']}}}.kind{{stroke:{base['muted']}}}.generated{{stroke:{base['ink']};stroke-width:2.5}}"
    )
