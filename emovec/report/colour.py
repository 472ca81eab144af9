"""The two themes and the diverging scale: blue below zero, orange above, told apart with any kind of colour vision.

The scale is made in OKLCH, where equal steps look equal, and kept so light (or so dark) that the theme's ink stays legible
on every step.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

STEPS = 8
"""Steps of the scale on each side of zero."""

THEMES = {
    "light": {
        "paper": "#f7f5f0",
        "card": "#ffffff",
        "ink": "#1f1d1a",
        "muted": "#69645b",
        "line": "#e3ded3",
        "ground": "#f4f1ea",
        "zero": "#f4f4f4",
        "up": "#d2620c",
        "down": "#2f74c8",
    },
    "dark": {
        "paper": "#121316",
        "card": "#1a1b1f",
        "ink": "#eeebe4",
        "muted": "#a5a096",
        "line": "#303137",
        "ground": "#27282e",
        "zero": "#242529",
        "up": "#f49a50",
        "down": "#7db0f2",
    },
}
"""Per theme: page, panel, text, secondary text, rules, shaded areas, cells around zero, and the lines and bars above and below zero."""

_SCALE = {  # per theme and side: lightness, chroma and hue (OKLCH) of the first and of the last step
    "light": {1: ((0.965, 0.022, 75), (0.745, 0.165, 52)), -1: ((0.962, 0.018, 250), (0.715, 0.125, 252))},
    "dark": {1: ((0.285, 0.030, 65), (0.535, 0.140, 50)), -1: ((0.285, 0.030, 258), (0.525, 0.145, 256))},
}


def step(value: float, limit: float) -> int:
    """Where ``value`` lies on the scale: -STEPS at ``-limit`` and below, 0 around zero, STEPS at ``limit`` and above."""
    if math.isnan(value):
        return 0
    share = max(-1.0, min(1.0, value / limit))
    return int(math.copysign(math.floor(abs(share) * STEPS + 0.5), share))


def name(index: int) -> str:
    """The class of a step: ``n8`` ... ``z`` ... ``p8``."""
    return f"{'p' if index > 0 else 'n'}{abs(index)}" if index else "z"


def scale(theme: str) -> dict[int, str]:
    """Step -> colour ``#rrggbb``; the step 0 is the panel itself."""
    colours = {0: THEMES[theme]["card"]}
    for sign, (first, last) in _SCALE[theme].items():
        for index in range(1, STEPS + 1):
            share = (index - 1) / (STEPS - 1)
            lightness, chroma, hue = (a + (b - a) * share for a, b in zip(first, last, strict=True))
            colours[sign * index] = _hex(lightness, chroma, hue)
    return colours


def limit_of(values: Iterable[float], least: float = 0.0, share: float = 1.0) -> float:
    """A round limit for the scale that holds this ``share`` of ``values``."""
    sizes = sorted(abs(value) for value in values if math.isfinite(value))
    size = max(sizes[int(share * (len(sizes) - 1))] if sizes else 0.0, least)
    return round_up(size) if size > 0 else 1.0


def round_up(size: float) -> float:
    """The next of 1, 1.5, 2, 3, 4, 5, 6, 8 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(size))
    return next(power * factor for factor in (1, 1.5, 2, 3, 4, 5, 6, 8, 10) if power * factor >= size * (1 - 1e-9))


def variables(theme: str) -> str:
    """The theme as CSS custom properties."""
    steps = {name(index): colour for index, colour in sorted(scale(theme).items())}
    return "".join(f"--{key}:{value};" for key, value in (THEMES[theme] | steps).items())


def contrast(one: str, other: str) -> float:
    """The contrast ratio of WCAG between two colours ``#rrggbb``, from 1 to 21."""
    light, dark = sorted((_luminance(one), _luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def _luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def _hex(lightness: float, chroma: float, hue: float) -> str:
    """OKLCH to sRGB (Ottosson 2020); a colour that no screen shows loses chroma until one does."""
    a, b = chroma * math.cos(math.radians(hue)), chroma * math.sin(math.radians(hue))
    long = (lightness + 0.3963377774 * a + 0.2158037573 * b) ** 3
    medium = (lightness - 0.1055613458 * a - 0.0638541728 * b) ** 3
    short = (lightness - 0.0894841775 * a - 1.2914855480 * b) ** 3
    linear = (
        4.0767416621 * long - 3.3077115913 * medium + 0.2309699292 * short,
        -1.2684380046 * long + 2.6097574011 * medium - 0.3413193965 * short,
        -0.0041960863 * long - 0.7034186147 * medium + 1.7076147010 * short,
    )
    if min(linear) < -1e-4 or max(linear) > 1 + 1e-4:
        return _hex(lightness, chroma * 0.98, hue)
    encoded = (12.92 * part if part <= 0.0031308 else 1.055 * part ** (1 / 2.4) - 0.055 for part in linear)
    return "#" + "".join(f"{round(255 * max(0.0, min(1.0, part))):02x}" for part in encoded)
