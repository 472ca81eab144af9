"""The text of a reading, token by token, coloured by a concept that the reader of the page can choose."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from itertools import groupby

import torch
from torch import Tensor

from emovec.monitor import Reading
from emovec.report import colour
from emovec.report.markup import Html, data, escape, join, section, short, tag
from emovec.report.ranking import strongest

_MISSING = -32768  # int16 for a score that is not finite
_LEVELS = 32000


def heatmap(
    reading: Reading,
    concepts: Sequence[str] | None = None,
    *,
    title: str | None = None,
    note: str | None = None,
    limit: float | None = None,
) -> Html:
    """A section with the text of ``reading``; hovering over a token shows its strongest concepts.

    Args:
        reading: what is shown, at its layer to read at.
        concepts: those offered as buttons, the first of them shown first; default: the strongest. All others are in a list.
        title: the section's heading.
        note: a remark under it.
        limit: the score at which the colour is full; default: a round number that nearly all scores shown stay below.

    Raises:
        UnknownConcept: a concept that the reading does not have.
        ValueError: an empty reading, or a limit that is not positive.
    """
    if not len(reading):
        raise ValueError("the reading has no tokens to show")
    chosen = list(concepts) if concepts else strongest(reading)
    shown = torch.stack([reading.of(name) for name in chosen]).float().cpu()
    limit = scale_limit(shown, reading) if limit is None else limit
    if not limit > 0:
        raise ValueError(f"limit must be positive, got {limit}")
    body = tag(
        "div",
        tag("div", _picker(reading, chosen), legend(limit, reading.unit), class_="picker"),
        tag("div", *_runs(reading, shown[0].tolist(), limit), class_="text", tabindex="0", role="group", aria_label="tokens"),
        data(_payload(reading, limit)),
        class_="card heat",
    )
    return section(title, body, note=note)


def scale_limit(scores: Tensor, reading: Reading) -> float:
    """A limit for the colours of ``scores`` [..., T]; the first token of a sequence has no say in it. A z-score's is 3 or more."""
    first = int(len(reading) > 1 and reading.positions[0] == 0)
    return colour.limit_of(scores[..., first:].flatten().tolist(), least=3.0 if reading.calibrated else 0.0, share=0.98)


def legend(limit: float, unit: str, low: str | None = None, high: str | None = None) -> Html:
    """The scale with its ends and its unit."""
    cells = (tag("i", class_=colour.name(index)) for index in range(-colour.STEPS, colour.STEPS + 1))
    strip = tag("span", *cells, class_="scale", aria_hidden="true")
    return tag("div", tag("b", low or short(-limit)), strip, tag("b", high or short(limit)), tag("span", unit), class_="legend")


def _picker(reading: Reading, chosen: Sequence[str]) -> Html:
    """A button for each chosen concept, and a list of all by family."""
    buttons = [tag("button", name, type="button", data_name=name, aria_pressed=str(name == chosen[0]).lower()) for name in chosen]
    families = reading.members()
    placed = {name for members in families.values() for name in members}
    others = tuple(name for name in reading.names if name not in placed)
    groups = families | ({"Others" if families else "All": others} if others else {})
    options = [
        tag("optgroup", *(tag("option", name, value=name, selected=name == chosen[0]) for name in members), label=family)
        for family, members in groups.items()
    ]
    choice = tag("label", f"any of {len(reading.names)}", tag("select", *options))
    return join(tag("div", *buttons, class_="chips"), choice)


def _runs(reading: Reading, values: Sequence[float], limit: float) -> list[Html]:
    """The tokens in blocks of one kind each."""
    pieces, special = reading.pieces, special_tokens(reading)
    blocks = []
    for kind, rows in groupby(range(len(reading)), key=lambda row: reading.kind[row]):
        spans = []
        for row in rows:
            classes = [colour.name(colour.step(values[row], limit))]
            classes += ["mark"] if special[row] else []
            classes += ["sink"] if reading.positions[row] == 0 else []
            spans.append(tag("span", token_text(pieces[row]), class_=" ".join(classes), data_i=row))
        blocks.append(tag("div", tag("span", kind, class_="kind"), tag("p", *spans), class_="run", data_kind=kind))
    return blocks


def token_text(piece: str) -> Html:
    """A token as it is shown: line breaks get a sign, and so does what has no text of its own."""
    if piece == "":
        return tag("u", "\u25e6")
    lines = piece.split("\n")
    return join(lines[0], *(join(tag("u", "\u21b5"), tag("br"), escape(line)) for line in lines[1:]))


def special_tokens(reading: Reading) -> list[bool]:
    """Which tokens are the tokenizer's own marks, such as the start of a turn."""
    known = getattr(reading.tokenizer, "added_tokens_decoder", {})
    marks = {index for index, token in known.items() if token.special}
    return [False] * len(reading) if reading.tokens is None else [token in marks for token in reading.tokens.tolist()]


def _payload(reading: Reading, limit: float) -> dict[str, object]:
    """What the page's script needs: all scores as int16, in units that keep the largest, and what they are called."""
    scores = reading.scores.float().cpu()
    finite = torch.where(scores.isfinite(), scores, 0.0)
    quantum = max(float(finite.abs().max()) / _LEVELS, limit * 1e-4)
    levels = torch.where(scores.isfinite(), (finite / quantum).round(), float(_MISSING)).to(torch.int16)
    return {
        "names": reading.names,
        "pieces": reading.pieces,
        "first": reading.positions[0],
        "every": reading.positions.step,
        "limit": limit,
        "quantum": quantum,
        "scores": base64.b64encode(levels.contiguous().numpy().astype("<i2").tobytes()).decode(),
    }
