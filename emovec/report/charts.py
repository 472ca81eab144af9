"""Bars and lines: how strong the concepts are, and how they change from token to token."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from emovec.monitor import Reading
from emovec.report.heatmap import scale_limit
from emovec.report.markup import Html, data, join, number, section, short, tag
from emovec.report.ranking import strongest

Items = Sequence[tuple[str, float]] | Mapping[str, float]


def bars(
    panels: Items | Mapping[str, Items],
    *,
    title: str | None = None,
    note: str | None = None,
    unit: str = "z-score against ordinary text",
    signed: bool = True,
) -> Html:
    """A section of horizontal bars from zero.

    Args:
        panels: pairs of name and value, as ``reading.top()`` and ``reading.families()`` return them, or several of those by
            their headings; all panels have one scale.
        title: the section's heading.
        note: a remark under it.
        unit: what the values are measured in.
        signed: write a plus before values above zero.
    """
    named = _panels(panels)
    values = [value for items in named.values() for _, value in items if math.isfinite(value)]
    low, high = min(0.0, *values, 0.0), max(0.0, *values, 0.0)
    span = (high - low) or 1.0
    cards = []
    for heading, items in named.items():
        rows = [_bar(name, value, low, span, signed) for name, value in items]
        cards.append(tag("div", tag("h3", heading) if heading else "", tag("div", *rows, class_="bars"), class_="card"))
    body = tag("div", *cards, class_="grid" if len(cards) > 1 else "single")
    return section(title, body, tag("p", unit, class_="unit"), note=note)


def _panels(panels: Items | Mapping[str, Items]) -> dict[str, list[tuple[str, float]]]:
    if not isinstance(panels, Mapping):
        return {"": list(panels)}
    nested = {key: value for key, value in panels.items() if not isinstance(value, int | float)}
    if not nested:
        return {"": [(key, float(value)) for key, value in panels.items() if isinstance(value, int | float)]}
    return {key: list(value.items()) if isinstance(value, Mapping) else list(value) for key, value in nested.items()}


def _bar(name: str, value: float, low: float, span: float, signed: bool) -> Html:
    start, width = (min(value, 0.0) - low) / span, abs(value) / span
    if not math.isfinite(value):
        start, width = abs(low) / span, 0.0
    fill = tag("i", class_="down" if value < 0 else "up", style=f"left:{start:.2%};width:{width:.2%}")
    track = tag("span", fill, tag("em", style=f"left:{abs(low) / span:.2%}"), class_="track")
    return tag("div", tag("span", name, class_="name"), track, tag("span", number(value, sign=signed), class_="value"), class_="row")


def lines(
    reading: Reading,
    concepts: Sequence[str] | None = None,
    *,
    halflife: float = 4,
    thresholds: Mapping[str, float] | None = None,
    events: Mapping[int, str] | None = None,
    title: str | None = None,
    note: str | None = None,
) -> Html:
    """A section of small charts, one for each concept, with one scale: a bar for every token and the smoothed course.

    Args:
        reading: its tokens are the horizontal axis.
        concepts: default: those with thresholds and the strongest.
        halflife: of the smoothed line, in tokens; see :meth:`emovec.monitor.Reading.smooth`.
        thresholds: concept -> a level to draw in its chart.
        events: position of a token -> a word to mark it with, such as where a guard stepped in.
        title: the section's heading.
        note: a remark under it.

    Raises:
        UnknownConcept: a concept that the reading does not have.
        ValueError: a threshold for a concept that has no chart, or an event at a position that the reading does not hold.
    """
    levels = dict(thresholds or {})
    chosen = list(concepts) if concepts else list(dict.fromkeys([*levels, *strongest(reading, 6 - min(6, len(levels)))]))
    smoothed = reading.smooth(halflife)
    raw = torch.stack([reading.of(name) for name in chosen]).float().cpu()
    smooth = torch.stack([smoothed.of(name) for name in chosen]).float().cpu()
    if len(reading) > 1 and reading.positions[0] == 0:
        raw[:, 0] = smooth[:, 0] = math.nan  # an attention sink
    if missing := levels.keys() - set(chosen):
        raise ValueError(f"thresholds for {sorted(missing)}, which have no chart; those drawn are {chosen}")
    high, low = _range(raw, smooth, reading, list(levels.values()))
    frame = _Frame(len(reading), low, high)
    background = join(_axes(frame), _kinds(frame, reading))
    marks = join(*(_event(frame, reading, position, label) for position, label in (events or {}).items()))
    charts = []
    for row, name in enumerate(chosen):
        level = join(_level(frame, levels[name])) if name in levels else ""
        picture = tag(
            "svg",
            background,
            *_token_bars(frame, raw[row].tolist()),
            tag("polyline", class_="course", points=frame.points(smooth[row].tolist())),
            level,
            marks,
            tag("line", class_="cross", y1=frame.top, y2=frame.bottom, x1=-9, x2=-9),
            viewBox=f"0 0 {frame.width} {frame.height}",
            role="img",
            aria_label=f"{name} over the tokens",
        )
        values = ",".join("" if not math.isfinite(value) else f"{value:.2f}" for value in raw[row].tolist())
        heading = tag("h3", name, tag("output", number(float(reading.mean()[reading.names.index(name)])), tag("small", " mean")))
        charts.append(tag("figure", heading, picture, class_="card chart", data_values=values))
    frame_data = {"pieces": reading.pieces, "left": frame.left, "step": frame.step, "width": frame.width}
    caption = f"{reading.unit}; bars: each token; line: exponentially weighted mean, half-life {halflife:g} tokens"
    return section(title, tag("div", *charts, data(frame_data), class_="grid lines"), tag("p", caption, class_="unit"), note=note)


@dataclass(frozen=True)
class _Frame:
    """Where tokens and scores lie in a chart, in its own units."""

    count: int
    low: float
    high: float
    width: int = 340
    height: int = 136
    left: int = 30
    right: int = 332
    top: int = 8
    bottom: int = 116

    @property
    def step(self) -> float:
        return (self.right - self.left) / max(self.count, 1)

    def x(self, token: float) -> float:
        return self.left + self.step * token

    def y(self, value: float) -> float:
        share = (min(max(value, self.low), self.high) - self.low) / (self.high - self.low)
        return self.bottom - share * (self.bottom - self.top)

    def points(self, values: Sequence[float]) -> str:
        return " ".join(f"{self.x(i + 0.5):.1f},{self.y(value):.1f}" for i, value in enumerate(values) if math.isfinite(value))


def _range(raw: torch.Tensor, smooth: torch.Tensor, reading: Reading, levels: Sequence[float]) -> tuple[float, float]:
    """Highest and lowest value drawn: round, with zero in between, and without the rarest bars if those are far out."""
    limit = scale_limit(raw, reading)
    seen = [value for value in raw.flatten().tolist() + smooth.flatten().tolist() if math.isfinite(value)]
    high = min(limit, max([0.0, *seen]))
    low = -min(limit, -min([0.0, *seen]))
    return max([high, limit / 4, *(level * 1.1 for level in levels)]), min([low, -limit / 4, *(level * 1.1 for level in levels)])


def _axes(frame: _Frame) -> Html:
    """Zero, and one round number on each side."""
    found = []
    for side in (frame.low, 0.0, frame.high):
        value = math.copysign(_round_down(abs(side)), side) if side else 0.0
        y = f"{frame.y(value):.1f}"
        found.append(tag("line", class_="zero" if value == 0 else "rule", x1=frame.left, x2=frame.right, y1=y, y2=y))
        found.append(tag("text", short(value), x=frame.left - 5, y=y, dy="0.32em", class_="tick end"))
    return join(*found)


def _round_down(size: float) -> float:
    power = 10.0 ** math.floor(math.log10(size))
    return next(power * factor for factor in (8, 6, 5, 4, 3, 2, 1.5, 1) if power * factor <= size * (1 + 1e-9))


def _kinds(frame: _Frame, reading: Reading) -> Html:
    """The prompt's ground, and what the tokens are called along the axis."""
    found = []
    start = 0
    for end in range(1, len(reading) + 1):
        if end < len(reading) and reading.kind[end] == reading.kind[start]:
            continue
        kind, left, right = reading.kind[start], frame.x(start), frame.x(end)
        if kind == "prompt":
            height = frame.bottom - frame.top
            found.append(tag("rect", class_="ground", x=f"{left:.1f}", y=frame.top, width=f"{right - left:.1f}", height=height))
        if right - left > 7 * len(kind):
            found.append(tag("text", kind, x=f"{left + 2:.1f}", y=frame.height - 6, class_="tick"))
        start = end
    return join(*found)


def _token_bars(frame: _Frame, values: Sequence[float]) -> list[Html]:
    width, zero = max(frame.step - min(1.0, frame.step / 4), 0.4), frame.y(0)
    paths: dict[str, list[str]] = {"up": [], "down": []}
    for i, value in enumerate(values):
        if math.isfinite(value):
            paths["up" if value >= 0 else "down"].append(f"M{frame.x(i):.1f} {zero:.1f}V{frame.y(value):.1f}h{width:.1f}V{zero:.1f}z")
    return [tag("path", class_=side, d="".join(parts)) for side, parts in paths.items() if parts]


def _level(frame: _Frame, value: float) -> Html:
    y = frame.y(value)
    line = tag("line", class_="level", x1=frame.left, x2=frame.right, y1=f"{y:.1f}", y2=f"{y:.1f}")
    return join(line, tag("text", f"threshold {number(value)}", x=frame.right, y=f"{y - 4:.1f}", class_="tick end strong"))


def _event(frame: _Frame, reading: Reading, position: int, label: str) -> Html:
    if position not in reading.positions:
        raise ValueError(f"event {label!r} is at position {position}, the reading holds {reading.positions}")
    x = frame.x(reading.positions.index(position) + 0.5)
    side = "end" if x > frame.width / 2 else "start"
    line = tag("line", class_="event", x1=f"{x:.1f}", x2=f"{x:.1f}", y1=frame.top, y2=frame.bottom)
    return join(line, tag("text", label, x=f"{x + (-4 if side == 'end' else 4):.1f}", y=frame.bottom - 5, class_=f"tick strong {side}"))
