"""HTML that is escaped unless it is known to be HTML."""

from __future__ import annotations

import html
import json
import math
import re
from typing import Any

_JSON = {ord(letter): f"\\u{ord(letter):04x}" for letter in "<>&\u2028\u2029"}
_FORBIDDEN = re.compile("[\\x00-\\x08\\x0b\\x0c\\x0e-\\x1f\\x7f-\\x9f\\ud800-\\udfff\\ufffe\\uffff]")  # in XML


class Html(str):
    """Text that is markup already; any other string is escaped before it reaches a page."""

    __slots__ = ()


def _plain(text: object) -> str:
    return html.escape(_FORBIDDEN.sub("\ufffd", str(text)))


def escape(text: object) -> Html:
    """``text`` as it reads; markup stays markup."""
    return text if isinstance(text, Html) else Html(_plain(text))


def join(*parts: object) -> Html:
    """The parts one after the other, escaped where they are not markup."""
    return Html("".join(map(escape, parts)))


def tag(element: str, *children: object, **attributes: object) -> Html:
    """``<element attributes>children</element>``.

    An attribute ``class_`` is written ``class``, ``data_x`` is written ``data-x``; None and False leave it out, True writes its name only.
    """
    written = "".join(
        f" {key.rstrip('_').replace('_', '-')}" + ("" if value is True else f'="{_plain(value)}"')
        for key, value in attributes.items()
        if value is not None and value is not False
    )
    start = f"<{element}{written}>"
    return Html(start if element in {"br", "input", "meta"} else f"{start}{join(*children)}</{element}>")


def data(value: Any) -> Html:
    """``value`` as JSON in a script element of type application/json; nothing in it can end the element."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    safe = (
        text.replace("<", "\\u003c")
        .replace(">", "\\u003e")
        .replace("&", "\\u0026")
        .replace("\u2028", "\\u2028")
        .replace("\u2029", "\\u2029")
    )
    return tag("script", Html(safe), type="application/json")


def section(title: str | None, *body: object, note: str | None = None, kind: str = "") -> Html:
    """One section of a page: a heading, a remark under it, and what it is about."""
    head = (tag("h2", title) if title else "", tag("p", note, class_="note") if note else "")
    return tag("section", *head, *body, class_=kind or None)


def number(value: float, *, sign: bool = True) -> str:
    """A number to two decimals, or three figures where it is large, with a true minus sign."""
    if not math.isfinite(value):
        return "n/a"
    size = abs(value)
    digits = 2 if size < 10 else 1 if size < 100 else 0
    text = f"{size:,.{digits}f}"
    zero = float(text.replace(",", "")) == 0
    return ("" if zero else "\u2212" if value < 0 else "+" if sign else "") + text


def short(value: float) -> str:
    """A round number as an axis shows it: ``+4``, ``−1.5``."""
    if 0 < abs(value) < 0.1:
        return f"{value:+.2g}".replace("-", "\u2212", 1)
    text = number(value)
    return text.rstrip("0").rstrip(".") if "." in text else text
