"""Numbers in rows and columns, and the few that matter most."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from emovec.report import colour
from emovec.report.heatmap import legend
from emovec.report.markup import Html, number, section, tag

_ROOM = 90  # letters of column headings that fit side by side; more get turned


def table(
    columns: Sequence[str],
    rows: Sequence[Sequence[object]],
    *,
    title: str | None = None,
    note: str | None = None,
) -> Html:
    """A plain table. Numbers are set right and rounded; give strings for another form.

    Raises:
        ValueError: a row that has not one cell for each column.
    """
    lines = []
    for row in rows:
        if len(row) != len(columns):
            raise ValueError(f"{len(columns)} columns, but a row of {len(row)}: {list(row)!r}")
        lines.append(tag("tr", *(_cell(value) for value in row)))
    numeric = [bool(rows) and all(isinstance(row[i], int | float) for row in rows) for i in range(len(columns))]
    head = tag(
        "tr", *(tag("th", name, class_="figure" if right else None, scope="col") for name, right in zip(columns, numeric, strict=True))
    )
    return section(title, _framed(tag("table", tag("thead", head), tag("tbody", *lines))), note=note)


def _cell(value: object) -> Html:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return tag("td", value)
    return tag("td", f"{value:,}" if isinstance(value, int) else number(value, sign=False), class_="figure")


def matrix(
    values: Mapping[str, Mapping[str, float]],
    *,
    title: str | None = None,
    note: str | None = None,
    unit: str = "z-score against ordinary text",
    limit: float | None = None,
) -> Html:
    """A table of coloured cells.

    Args:
        values: row -> column -> value, such as label -> ``reading.families()``; a cell that is missing stays empty.
        title: the section's heading.
        note: a remark under it.
        unit: what the values are measured in.
        limit: the value at which the colour is full.
    """
    cells = {row: {column: (value, number(value)) for column, value in line.items()} for row, line in values.items()}
    limit = colour.limit_of([value for line in values.values() for value in line.values()]) if limit is None else limit
    return section(title, _framed(_coloured(cells, limit), legend(limit, unit)), note=note)


def odds_table(
    ratios: Mapping[str, Mapping[str, float]],
    *,
    title: str | None = None,
    note: str | None = None,
    unit: str = "odds of the next token, against no bias",
) -> Html:
    """How many times more (×) or less (÷) likely words have become, coloured on a log scale.

    Args:
        ratios: row (a bias) -> column (a word) -> odds after / odds before, positive.
        title: the section's heading.
        note: a remark under it.
        unit: what the ratios are of.

    Raises:
        ValueError: a ratio that is not positive.
    """
    cells = {}
    for row, line in ratios.items():
        for column, ratio in line.items():
            if not ratio > 0:
                raise ValueError(f"an odds ratio is positive; {row!r}, {column!r} has {ratio}")
        cells[row] = {column: (math.log2(ratio), times(ratio)) for column, ratio in line.items()}
    limit = float(max(1, math.ceil(colour.limit_of([value for line in cells.values() for value, _ in line.values()]))))
    key = legend(limit, unit, f"\u00f7{2**limit:g}", f"\u00d7{2**limit:g}")
    return section(title, _framed(_coloured(cells, limit), key), note=note)


def times(ratio: float) -> str:
    """``\u00d73.2`` or ``\u00f73.2``."""
    size = max(ratio, 1 / ratio)
    text = f"{size:,.2f}" if size < 10 else f"{size:,.1f}" if size < 100 else f"{size:,.0f}"
    return ("\u00d7" if ratio >= 1 or text == "1.00" else "\u00f7") + text


def _coloured(cells: Mapping[str, Mapping[str, tuple[float, str]]], limit: float) -> Html:
    columns = list(dict.fromkeys(column for line in cells.values() for column in line))
    longest = max((len(word) for column in columns for word in column.split()), default=0)
    turned = " turned" if longest * len(columns) > _ROOM else ""
    head = tag("tr", tag("td"), *(tag("th", tag("span", column), scope="col") for column in columns))
    lines = []
    for row, line in cells.items():
        filled = [
            tag("td", line[column][1], class_=f"cell {colour.name(colour.step(line[column][0], limit))}") if column in line else tag("td")
            for column in columns
        ]
        lines.append(tag("tr", tag("th", row, scope="row"), *filled))
    return tag("table", tag("thead", head), tag("tbody", *lines), class_=f"matrix{turned}")


def _framed(content: Html, below: Html | None = None) -> Html:
    return tag("div", tag("div", content, class_="scroll"), below or "", class_="card")


def figures(items: Sequence[tuple[str, str] | tuple[str, str, str]], *, title: str | None = None, note: str | None = None) -> Html:
    """The numbers that matter, large: (value with its unit, what it is) and if need be (…, how it was measured)."""
    tiles = [
        tag("div", tag("strong", value), tag("span", label), *(tag("small", remark) for remark in remarks), class_="card tile")
        for value, label, *remarks in items
    ]
    return section(title, tag("div", *tiles, class_="tiles"), note=note)


def bounds(
    rows: Sequence[tuple[str, float, float, float, float]],
    *,
    title: str | None = None,
    note: str | None = None,
    unit: str = "z-score against ordinary text",
) -> Html:
    """What rules did: for each (concept, before, after, lowest allowed, highest allowed) the way from before to after.

    The bounds may be infinite.
    """
    finite = [value for row in rows for value in row[1:] if math.isfinite(value)]
    low, high = min([0.0, *finite]), max([0.0, *finite])
    room = 0.08 * ((high - low) or 1.0)
    low, high = low - room, high + room

    def at(value: float) -> float:
        return (min(max(value, low), high) - low) / (high - low)

    lines = []
    for name, before, after, least, most in rows:
        left, right = sorted((at(before), at(after)))
        track = tag(
            "span",
            tag("s", style=f"left:{at(least):.2%};width:{at(most) - at(least):.2%}"),
            tag("em", style=f"left:{at(0):.2%}"),
            tag("i", style=f"left:{left:.2%};width:{right - left:.2%}"),
            tag("b", class_="before", style=f"left:{at(before):.2%}"),
            tag("b", class_="after", style=f"left:{at(after):.2%}"),
            class_="track",
        )
        values = tag("span", number(before), " → ", tag("strong", number(after)), class_="value")
        lines.append(tag("div", tag("span", name, class_="name"), track, values, class_="row"))
    signs = ((tag("b", class_="before"), "before"), (tag("b", class_="after"), "after"), (tag("s"), "allowed"))
    key = tag("p", *(tag("span", *sign) for sign in signs), tag("span", unit), class_="unit key")
    return section(title, tag("div", tag("div", *lines, class_="bars wide"), key, class_="card"), note=note)
