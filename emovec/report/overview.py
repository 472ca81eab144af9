"""All there is to see in one reading."""

from __future__ import annotations

from collections.abc import Sequence

from emovec.monitor import Reading
from emovec.report.charts import bars, lines
from emovec.report.heatmap import heatmap
from emovec.report.markup import Html
from emovec.report.ranking import strongest


def sections(reading: Reading, concepts: Sequence[str] | None = None) -> list[Html]:
    """The sections of a page about ``reading``: its text, the strongest concepts, their course, the families.

    Args:
        reading: with one token or more.
        concepts: those to show first; default: the strongest.
    """
    chosen = list(concepts) if concepts else strongest(reading)
    kinds = list(dict.fromkeys(reading.kind))
    found = [
        heatmap(reading, chosen, title="Token by token", note="Pick a concept; point at a token for its strongest ones."),
        lines(reading, chosen[:6], title="Over the text"),
        bars({kind: reading.top(10, kind=kind) for kind in kinds}, title="Strongest concepts", unit=f"mean {reading.unit}"),
    ]
    if reading.members():
        unit = f"mean {reading.unit}, over a family's members"
        found.append(bars({kind: reading.families(kind=kind) for kind in kinds}, title="Families", unit=unit))
    return found


def lede(reading: Reading) -> str:
    """What was read, in a sentence."""
    counts = " and ".join(f"{reading.kind.count(kind):,} {kind}" for kind in dict.fromkeys(reading.kind))
    return f"{counts} tokens, read against {len(reading.names):,} concepts at {reading.where}."
