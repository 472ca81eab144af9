"""Words: paragraphs, and text that a model wrote."""

from __future__ import annotations

from collections.abc import Sequence

from emovec.report.markup import Html, section, tag


def text(*paragraphs: str, title: str | None = None, code: str | None = None) -> Html:
    """Paragraphs, and below them code or output as it stands."""
    block = tag("pre", tag("code", code), class_="card") if code is not None else ""
    return section(title, *(tag("p", paragraph) for paragraph in paragraphs), block, kind="prose")


def samples(items: Sequence[tuple[str, str]], *, prompt: str | None = None, title: str | None = None, note: str | None = None) -> Html:
    """Texts side by side, each under its label, such as what one prompt led to under several biases."""
    asked = tag("blockquote", tag("span", "prompt", class_="kind"), tag("p", prompt)) if prompt is not None else ""
    cards = [tag("div", tag("h3", label), tag("p", written), class_="card sample") for label, written in items]
    return section(title, asked, tag("div", *cards, class_="grid"), note=note)
