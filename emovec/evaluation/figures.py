"""Figures: drawn once, kept as SVG and PNG, and set into the page in the colours of its theme."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

from emovec import extras
from emovec.bank_file import replacing
from emovec.report import colour
from emovec.report.markup import Html, escape, section, tag

THEME = colour.THEMES["light"]
SHADES = colour.scale("light")
INK, MUTED, LINE, UP, DOWN, CARD = (THEME[name] for name in ("ink", "muted", "line", "up", "down", "card"))
_VARIABLES = {THEME[name]: name for name in THEME} | {shade: colour.name(step) for step, shade in SHADES.items() if step}
_FONT = 9.5
_NULL = "null, 97.5 %"


@dataclass(frozen=True)
class Figure:
    """A figure: its file's name, its heading, how it is drawn on a figure of matplotlib, its size in inches, a remark."""

    name: str
    title: str
    draw: Callable[[Any], None]
    size: tuple[float, float] = (8.6, 3.6)
    note: str | None = None


def write(figure: Figure, directory: Path) -> Html:
    """Draw ``figure``, write it to ``directory`` as SVG and PNG, and return it as a section of a page."""
    matplotlib = extras.require("matplotlib", extra="report")
    shapes, agg = extras.require("matplotlib.figure", extra="report"), extras.require("matplotlib.backends.backend_agg", extra="report")
    settings = {
        "svg.fonttype": "none",
        "svg.hashsalt": figure.name,
        "font.family": "sans-serif",
        "font.size": _FONT,
        "text.color": INK,
        "axes.edgecolor": LINE,
        "axes.labelcolor": MUTED,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "xtick.color": MUTED,
        "ytick.color": MUTED,
        "xtick.labelcolor": INK,
        "ytick.labelcolor": INK,
        "axes.facecolor": "none",
        "figure.facecolor": CARD,
        "legend.frameon": False,
    }
    drawn = {}
    with matplotlib.rc_context(settings):
        canvas = shapes.Figure(figsize=figure.size, layout="constrained")
        agg.FigureCanvasAgg(canvas)
        figure.draw(canvas)
        for form in ("svg", "png"):
            buffer = BytesIO()
            canvas.savefig(buffer, format=form, dpi=160, metadata={"Date": None} if form == "svg" else {"Software": None})
            drawn[form] = buffer.getvalue()
    for form, content in drawn.items():
        with replacing(directory / f"{figure.name}.{form}") as temporary:
            temporary.write_bytes(content)
    return section(
        figure.title, tag("div", inline(drawn["svg"].decode(), figure.name, figure.title), class_="card"), note=figure.note, kind="drawn"
    )


def inline(svg: str, name: str, label: str) -> Html:
    """The SVG as part of a page: no ids that others have, no style of its own for the whole page, colours of the page's theme."""
    body = svg[svg.index("<svg") :]
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    body = re.sub(r"<style[^>]*>.*?</style>", "", body, flags=re.DOTALL)
    body = re.sub(r"<!--.*?-->", "", body, flags=re.DOTALL)
    body = re.sub(r'\bid="', f'id="{name}-', body)
    body = re.sub(r'(href="|url\()#', rf"\1#{name}-", body)
    body = re.sub(r"font: [^;\"]*?(\d+\.?\d*)px[^;\"]*", r"font-size: \1px", body)
    body = re.sub(r"#[0-9a-f]{6}\b", lambda match: f"var(--{_VARIABLES[match[0]]})" if match[0] in _VARIABLES else match[0], body)
    head = f'<svg role="img" aria-label="{escape(label)}" style="width:100%;height:auto;display:block;stroke-linejoin:round" '
    return Html(re.sub(r'^<svg (?:height|width)="[^"]*"', "<svg", body, count=1).replace("<svg ", head, 1).rstrip())


# --- what figures are made of -----------------------------------------------------------------------------------------------


def whiskers(
    figure: Any,
    rows: Mapping[str, Sequence[Mapping[str, Any]]],
    *,
    marks: Mapping[str, Sequence[float | None]],
    unit: str,
    series: Sequence[str],
) -> None:
    """For each row an estimate with its interval for each of ``series``, and grey marks for what a null gives."""
    axes = figure.subplots()
    colours = (UP, DOWN, INK)
    for line, (name, estimates) in enumerate(rows.items()):
        for index, estimate in enumerate(estimates):
            y = line + 0.26 * (index - (len(estimates) - 1) / 2)
            axes.plot([estimate["low"], estimate["high"]], [y, y], color=colours[index], linewidth=1.6, solid_capstyle="butt")
            axes.plot([estimate["value"]], [y], "o", color=colours[index], markersize=4.5, label=series[index] if line == 0 else None)
            null = marks[name][index] if name in marks else None
            if null is not None:
                axes.plot([null], [y], "|", color=MUTED, markersize=9, markeredgewidth=1.6, label=_NULL if line == index == 0 else None)
    axes.set_yticks(range(len(rows)), list(rows))
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlabel(unit)
    axes.grid(axis="x", color=LINE, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(length=0)
    handles, labels = axes.get_legend_handles_labels()
    order = sorted(range(len(labels)), key=lambda index: labels[index] == _NULL)
    axes.legend([handles[i] for i in order], [labels[i] for i in order], loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=4)


def curves(
    axes: Any,
    x: Sequence[float],
    lines: Mapping[str, Sequence[float]],
    *,
    bands: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    colours: Mapping[str, str] | None = None,
) -> None:
    """Lines over ``x``, some with a band around them."""
    given = colours or dict(zip(lines, (UP, DOWN, INK, MUTED), strict=False))
    for name, values in lines.items():
        axes.plot(x, values, color=given[name], linewidth=1.6, marker="o", markersize=3.2, label=name)
        if name in bands:
            axes.fill_between(x, *bands[name], color=given[name], alpha=0.16, linewidth=0)
    axes.grid(axis="y", color=LINE, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(length=0)


def picture(axes: Any, values: Sequence[Sequence[float]], *, limit: float) -> Any:
    """A matrix as an image, blue below zero and orange above; returns it for a colour bar."""
    colours = extras.require("matplotlib.colors", extra="report")
    shades = [SHADES[step] if step else "#f4f4f4" for step in range(-colour.STEPS, colour.STEPS + 1)]
    return axes.imshow(values, cmap=colours.ListedColormap(shades), vmin=-limit, vmax=limit, interpolation="nearest", aspect="equal")
