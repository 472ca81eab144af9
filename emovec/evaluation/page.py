"""The report's page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from emovec.evaluation import figures, verdict
from emovec.evaluation.figures import Figure
from emovec.evaluation.sections import Section
from emovec.report import page
from emovec.report.markup import Html


def write(directory: Path, content: Mapping[str, Any], sections: Sequence[Section]) -> Path:
    """Write report.html, and the figures as SVG and PNG."""
    shown = [verdict.part(content["verdict"], quick=content["options"]["quick"])]
    for part in sections:
        pieces = part.parts(content["sections"][part.name])
        drawn = [figures.write(piece, directory / "figures") if isinstance(piece, Figure) else piece for piece in pieces]
        shown += [drawn[0], *map(_under, drawn[1:])]
    bank, sets = content["bank"], content["texts"]["sets"]
    name, layers = content["model"]["name"] or "a model", ", ".join(map(str, bank["read_layers"]))
    lede = (
        f"A bank of {len(bank['concepts'])} emotion concepts for {name}, read at layer {layers}, on trial. "
        f"{sum(sets.values()):,} texts; every number is in report.json."
    )
    return page.write(directory / "report.html", "What these directions may be used for", shown, lede=lede)


def _under(piece: Html) -> Html:
    """A piece whose heading is below its section's, and not in the page's list of sections."""
    return Html(piece.replace("<h2>", '<h3 style="margin-bottom:8px">', 1).replace("</h2>", "</h3>", 1))
