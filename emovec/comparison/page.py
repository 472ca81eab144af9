"""A comparison as a figure and as a page."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from emovec.comparison.alarm import Alarm
from emovec.comparison.result import Comparison
from emovec.comparison.shifts import Estimate, Shift
from emovec.report import colour
from emovec.report.charts import bars
from emovec.report.markup import Html, section, short, tag
from emovec.report.page import put, write
from emovec.report.prose import text
from emovec.report.tables import figures, table

_WIDTH, _ROW, _HEAD, _FOOT = 760, 24, 46, 44
_LEFT, _RIGHT = 150, 724
_LETTERS = 20  # of a name
_FONT = "-apple-system,'Segoe UI',Roboto,'Helvetica Neue','Noto Sans','Liberation Sans',Arial,sans-serif"
_PLACES = {
    "turn_start": "at the last token before the answer",
    "prompt": "over the words of the prompt",
    "answer": "over the tokens of the answer",
}


def write_page(found: Comparison, path: str | os.PathLike[str], names: tuple[str, str], alarms: Sequence[Alarm] = ()) -> Path:
    """Write a page about a comparison, all or nothing.

    Args:
        found: the comparison.
        path: of the page.
        names: what A and B are called.
        alarms: those that were set.
    """
    a, b = names
    tiles = [(_signed(shift.mean), shift.name, _between(shift)) for shift in (*found.axes.values(), *found.up(1), *found.down(1))]
    sections = [
        figures(tiles),
        section("Largest shifts", tag("div", tag("div", drawing(found, embedded=True), class_="scroll"), class_="card"), note=_note(found)),
    ]
    if alarms:
        moved = [(alarm, found.shift(alarm.name)) for alarm in alarms]
        lines = [[str(alarm), _ends(shift), "fires" if alarm.fires(shift) else "silent"] for alarm, shift in moved]
        rule = "An alarm fires when the whole interval lies beyond its threshold."
        sections.append(table(["alarm", "shift", ""], lines, title="Alarms", note=rule))
    if found.families:
        unit = f"{found.facts.get('unit', 'score')}, mean over a family's members"
        ranked = sorted(found.families.values(), key=lambda shift: -shift.mean)
        sections.append(bars({shift.name: shift.mean for shift in ranked}, title="Families", unit=unit))
    if any(found.challenging):
        named = {shift.name: shift for shift in (*found.up(8), *found.down(8)[::-1], *found.families.values(), *found.axes.values())}
        lines = [[name, *(_ends(part) for part in (shift.neutral, shift.challenging, shift.difference))] for name, shift in named.items()]
        columns = ["", "neutral", "challenging", "challenging \u2212 neutral"]
        sections.append(
            table(columns, lines, title="Under strain", note="Shift over neutral and over challenging prompts, with intervals.")
        )
    rows = [[shift.name, shift.mean, shift.low, shift.high, f"{shift.p:.4f}", _share(shift)] for shift in found.order]
    columns = ["concept", "shift", "low", "high", "p", "random directions as far"]
    sections.append(table(columns, rows, title="Every concept"))
    sections.append(text(*_explanations(found), title="How to read this"))
    where = _PLACES.get(str(found.facts.get("on")), "on the same prompts")
    lede = f"How much stronger each concept is in {b} than in {a}, {where}: {len(found.prompts)} prompts."
    return write(path, "Post-training shift", sections, lede=lede)


def write_figure(found: Comparison, path: str | os.PathLike[str]) -> Path:
    """Write the figure of the largest shifts as SVG, all or nothing."""
    return put(path, drawing(found, embedded=False) + "\n")


def drawing(found: Comparison, count: int = 10, *, embedded: bool) -> Html:
    """Bars of the concepts that rose and that fell most, with their intervals.

    Args:
        found: the comparison.
        count: on each side.
        embedded: in a page, whose theme it takes on; else it stands alone.
    """
    shifts = [*found.up(count), *found.down(count)[::-1]]
    ends = [value for shift in shifts for value in (shift.low, shift.high)] or [0.0]
    low, high = min(0.0, *ends), max(0.0, *ends)
    room = 0.04 * ((high - low) or 1.0)
    low, high = low - room, high + room

    def at(value: float) -> float:
        return _LEFT + (value - low) / (high - low) * (_RIGHT - _LEFT)

    parts = [tag("text", f"{found.confidence:.0%} intervals over {len(found.prompts)} prompts", x=_LEFT, y=22, class_="small")]
    bottom = _HEAD + _ROW * len(shifts)
    for value in _ticks(low, high):
        x = f"{at(value):.1f}"
        parts.append(tag("line", x1=x, x2=x, y1=_HEAD - 6, y2=bottom + 4, class_="zero" if value == 0 else "rule"))
        parts.append(tag("text", short(value), x=x, y=bottom + 20, class_="small middle"))
    for row, shift in enumerate(shifts):
        parts += _bar(shift, _HEAD + _ROW * row + _ROW / 2, at)
    parts.append(tag("text", str(found.facts.get("unit", "score")), x=_LEFT, y=bottom + 38, class_="small"))
    if not shifts:
        parts.append(tag("text", "no concept moved", x=_LEFT, y=_HEAD, class_="small"))
    height = bottom + _FOOT
    ground = tag("rect", class_="paper", width=_WIDTH, height=height, rx=14)
    return tag(
        "svg",
        tag("title", "The concepts that rose and that fell most"),
        tag("style", Html(_style(embedded))),
        "" if embedded else ground,
        *parts,
        xmlns="http://www.w3.org/2000/svg",
        viewBox=f"0 0 {_WIDTH} {height}",
        width="100%" if embedded else _WIDTH,
        height=None if embedded else height,
        role="img",
        font_family=None if embedded else _FONT,
        class_="shifts",
        style="min-width:540px" if embedded else None,
    )


def _bar(shift: Shift, y: float, at: Callable[[float], float]) -> list[Html]:
    name = shift.name if len(shift.name) <= _LETTERS else f"{shift.name[: _LETTERS - 1]}\u2026"
    left, right = sorted((at(0.0), at(shift.mean)))
    low, high, thick = f"{at(shift.low):.1f}", f"{at(shift.high):.1f}", _ROW - 9
    return [
        tag("text", name, x=_LEFT - 12, y=f"{y:.1f}", dy="0.34em", class_="name"),
        tag(
            "rect",
            tag("title", str(shift)),
            x=f"{left:.1f}",
            y=f"{y - thick / 2:.1f}",
            width=f"{right - left:.1f}",
            height=thick,
            rx=2,
            class_="rose" if shift.mean > 0 else "fell",
        ),
        tag("path", d=f"M{low} {y:.1f}H{high}M{low} {y - 4:.1f}v8M{high} {y - 4:.1f}v8", class_="whisker"),
    ]


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers from low to high, zero among them."""
    step = colour.round_up((high - low) / 6)
    return [step * index for index in range(int(low / step) - 1, int(high / step) + 2) if low <= step * index <= high]


def _style(embedded: bool) -> str:
    fixed = (
        ".shifts text{font-size:13px}.shifts .small{font-size:12px}.shifts .name{text-anchor:end}.shifts .middle{text-anchor:middle}"
        ".shifts .whisker{fill:none;stroke-width:1.4}"
    )
    if embedded:
        return fixed + _colours({name: f"var(--{name})" for name in colour.THEMES["light"]})
    return fixed + _colours(colour.THEMES["light"]) + f"@media (prefers-color-scheme:dark){{{_colours(colour.THEMES['dark'])}}}"


def _colours(theme: dict[str, str]) -> str:
    return (
        f".shifts text{{fill:{theme['ink']}}}.shifts .small{{fill:{theme['muted']}}}.shifts .rose{{fill:{theme['up']}}}"
        f".shifts .fell{{fill:{theme['down']}}}.shifts .whisker{{stroke:{theme['ink']}}}.shifts .rule{{stroke:{theme['line']}}}"
        f".shifts .zero{{stroke:{theme['muted']}}}.shifts .paper{{fill:{theme['card']};stroke:{theme['line']}}}"
    )


def _signed(value: float) -> str:
    """To three decimals: a slope on valence is small."""
    return f"{value:+.3f}".replace("-", "\u2212")


def _between(part: Estimate | Shift) -> str:
    return f"{_signed(part.low)} to {_signed(part.high)}"


def _ends(part: Estimate | Shift | None) -> str:
    return "" if part is None else f"{_signed(part.mean)} ({_between(part)})"


def _share(shift: Shift) -> str:
    return "" if shift.random is None else f"{shift.random:.1%}"


def _note(found: Comparison) -> str:
    return (
        f"Shift from A to B, {found.facts.get('unit', 'in units of the scores')}. Bars: means; whiskers: {found.confidence:.0%} intervals."
    )


def _explanations(found: Comparison) -> list[str]:
    said = [
        "A shift is how far the score of a concept is higher in B than in A on the same prompt, averaged over the prompts. Intervals "
        "come from drawing prompts anew (bootstrap); they tell what other prompts of the same kind might show, not what another "
        "training run would.",
        "p compares each concept with the largest of all under random sign flips of whole prompts. Any training moves nearly every "
        "direction consistently, so p is small for most concepts; the last column tells how many random directions moved as far.",
    ]
    if found.axes:
        share = "" if found.explained is None else f" The two explain {found.explained:.0%} of the variance between the concepts' shifts."
        said.append(
            "Valence and arousal are slopes of the concepts' shifts on emovec's ratings of the words, fitted together by least squares: "
            f"z-scores for each point of the scale from 1 to 9.{share}"
        )
    norms = found.facts.get("norms")
    if norms:
        ratios = ", ".join(f"{layer}: {norms['b'][layer] / norm:.3f}" for layer, norm in norms["a"].items() if layer in norms["b"])
        how = "B's stream was read at A's length" if found.facts.get("norms_matched") else "the streams were read as they are"
        said.append(f"Length of B's stream over that of A's, by layer: {ratios}; {how}.")
    said.append("A score says which directions of its text the model's stream lies along. It does not say that a model feels anything.")
    return said
