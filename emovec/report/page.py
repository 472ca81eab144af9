"""A page: one HTML file with everything in it, in a light and a dark theme."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

from emovec.report import colour
from emovec.report.markup import Html, tag

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"


def write(path: str | os.PathLike[str], title: str, sections: Sequence[Html], *, lede: str | None = None) -> Path:
    """Write a page, all or nothing. Arguments as for :func:`document`; returns ``path``."""
    return put(path, document(title, sections, lede=lede))


def put(path: str | os.PathLike[str], text: str) -> Path:
    """Write ``text`` to ``path``, all or nothing; returns ``path``."""
    path = Path(path)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".part")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8", errors="replace", newline="\n") as file:
            file.write(text)
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise
    return path


def document(title: str, sections: Sequence[Html], *, lede: str | None = None) -> str:
    """A page as text.

    Args:
        title: its heading.
        sections: from the functions of this package, in order.
        lede: a sentence or two under the heading.

    Raises:
        TypeError: a section that is not markup; plain text goes through ``prose.text``.
    """
    for part in sections:
        if not isinstance(part, Html):
            raise TypeError(f"a section is made by a function of emovec.report, got {str(part)[:60]!r}; see emovec.report.prose.text")
    headings = [re.search(r"^<section[^>]*><h2>(.*?)</h2>", part) for part in sections]
    anchored = [_anchored(part, index) for index, part in enumerate(sections)]
    links = [tag("a", Html(match[1]), href=f"#s{index}") for index, match in enumerate(headings) if match]
    switch = tag("button", tag("span", aria_hidden="true"), "theme", type="button", id="theme", aria_label="change the theme")
    top = tag(
        "header", switch, tag("h1", title), tag("p", lede, class_="lede") if lede else "", tag("nav", *links) if len(links) > 2 else ""
    )
    foot = tag("footer", "Scores are read before any steering at that layer. Made by emovec.")
    tip = tag("div", id="tip", role="status", hidden=True)
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("title", title),
        tag("style", Html(_style())),
    )
    body = tag("body", tag("main", top, *anchored, foot), tip, tag("script", Html(_asset("page.js"))))
    return f"<!DOCTYPE html>\n{tag('html', head, body, lang='en')}\n"


def _anchored(part: Html, index: int) -> Html:
    return Html(part.replace("<section", f'<section id="s{index}"', 1))


def _style() -> str:
    light, dark = colour.variables("light"), colour.variables("dark")
    steps = [colour.name(index) for index in range(-colour.STEPS, colour.STEPS + 1)]
    return (
        f":root{{color-scheme:light dark;{light}}}"
        f"@media (prefers-color-scheme:dark){{:root{{{dark}}}}}"
        f":root[data-theme=light]{{color-scheme:light;{light}}}:root[data-theme=dark]{{color-scheme:dark;{dark}}}"
        + "".join(f".{step}{{background:var(--{step})}}" for step in steps)
        + _asset("page.css")
    )


def _asset(name: str) -> str:
    return files("emovec.report").joinpath(name).read_text(encoding="utf-8")
