"""What the report shows of the classification."""

from __future__ import annotations

from typing import Any

from emovec.evaluation.figures import DOWN, INK, LINE, MUTED, UP, Figure, curves
from emovec.evaluation.words import chance, plain, said
from emovec.report.markup import Html
from emovec.report.prose import text
from emovec.report.tables import matrix, table

HELD_OUT = {
    "topics": "other topics (all registers)",
    "one topic": "one topic at a time",
    "texts": "other texts, same topics",
    "register": "the whole register",
}
SAME_BANK = 0.95
"""The lowest cosine of readers at which the recipe has made the bank again."""
MEASURES = ("top1", "top5", "family")


def parts(result: dict[str, Any]) -> list[Html | Figure]:
    """Tables of accuracies, of what is beyond the words, of the layers, and the confusions."""
    if "skipped" in result:
        return [text(result["skipped"], title="Texts it was not made from")]
    names, chances = result["names"], result["chance"]
    known = {True: "The bank was made from all of these texts.", False: "The bank was made from other texts.", None: ""}[
        result["own_corpus"]
    ]
    again = result["made_again"]
    if again is not None:
        known += (
            f" The recipe makes the bank's own readers again (lowest cosine {again:.3f})."
            if again >= SAME_BANK
            else f" The recipe does not make the bank's own readers again (lowest cosine {again:.3f}): what follows is not about this bank."
        )
    layers = ", ".join(map(str, result["read_layers"]))
    main = [part for part in result["tests"] if part["variant"] == "as the bank is read"]
    intro = text(
        f"Evidence about the recipe, not about this bank's own directions. {known} For each row the recipe makes directions anew from "
        f"the other texts, at the bank's reading layer ({layers}), calibrated like the bank; a held-out text is given to the one of "
        f"{len(names)} concepts that reads highest "
        "on its mean activation. One writer wrote stories and messages alike, so this says nothing of other writers.",
        f"Intervals (95 %) are bootstraps over concepts and over topics. The null shuffles the tested texts' labels within their topics. "
        f"Chance: "
        f"{chances['top1']:.3f} for top-1, {chances['top5']:.3f} for top-5, {chances['family']:.2f} for the family of the first.",
        title="Texts it was not made from",
    )
    return [
        intro,
        table(
            ["made from", "tested on", "held out", "n", "top-1 (95 %)", "top-5 (95 %)", "family (95 %)", "null top-1, 97.5 %", "p"],
            [[*_what(part), *_how(part)] for part in main],
        ),
        Figure("layers", "Layer by layer", lambda figure: _layers(figure, result), (8.6, 3.4), note=_LAYERS_NOTE),
        table(
            ["tested on", "made from", "held out", "measure", "layer 0", "more at the reading layer (95 %)"],
            [
                [
                    part["tested_on"],
                    part["made_from"],
                    HELD_OUT[part["held_out"]],
                    measure,
                    plain(part[measure]["layer_0"]),
                    said(part[measure]["difference"]),
                ]
                for part in result["beyond_words"]
                for measure in MEASURES
            ],
            title="More than the words?",
            note="The first decoder block sees hardly more than the words. The same recipe there, and how much more the reading layer "
            "gives, text by text.",
        ),
        table(
            ["read how", "tested on", "top-1 (95 %)", "top-5 (95 %)", "family (95 %)", "p"],
            [
                [_variant(part), part["tested_on"], *(said(part[measure]) for measure in MEASURES), chance(part["top1"]["null"]["p"])]
                for part in result["tests"]
                if part["held_out"] == "topics"
            ],
            title="How it is read",
            note="On other topics. Centred on ordinary text is how a bank reads; centring on the topic needs other texts of that topic, "
            "which a monitor does not have.",
        ),
        _relabelled(result),
        *(_confusion(result, name) for name in result["confusion"]),
    ]


_LAYERS_NOTE = "Top-1 of each layer by itself, with 95 % intervals. Grey: chance. The best of many layers looks a little too good."


def _what(part: dict[str, Any]) -> list[object]:
    return [part["made_from"], part["tested_on"], HELD_OUT[part["held_out"]], part["n"]]


def _how(part: dict[str, Any]) -> list[object]:
    null = part["top1"]["null"]
    return [*(said(part[measure]) for measure in MEASURES), f"{null['high']:.3f}", chance(null["p"])]


def _variant(part: dict[str, Any]) -> str:
    variant: str = part["variant"]
    said = {
        "directions": "directions instead of readers",
        "directions, without denoising": "directions, nothing projected out",
        "centring: raw": "not centred (raw projections)",
        "centring: topic": "centred on its topic",
    }
    return said.get(variant, variant)


def _relabelled(result: dict[str, Any]) -> Html:
    rows = []
    for part in result["relabelled"]:
        for measure in MEASURES:
            drawn = [draw[measure] for draw in part["drawn"]]
            rows.append(
                [part["tested_on"], measure, f"{min(drawn):.3f}", f"{max(drawn):.3f}", f"{result['chance'][measure]:.3f}", len(drawn)]
            )
    return table(
        ["tested on", "measure", "lowest", "highest", "chance", "times"],
        rows,
        title="Made from shuffled labels",
        note="The whole procedure where there is nothing to find: labels shuffled within topics before directions are made.",
    )


def _confusion(result: dict[str, Any], name: str) -> Html:
    families, counts = result["families"], result["confusion"][name]
    shares = {
        f"{family} ({sum(line)})": {other: count / max(sum(line), 1) for other, count in zip(families, line, strict=True)}
        for family, line in zip(families, counts, strict=True)
    }
    return matrix(
        shares,
        title=f"Families mistaken for one another: {name}",
        note="Share of a family's texts (in brackets their number) by the family of the concept that reads highest; other topics held out.",
        unit="share of the row's texts",
        limit=1.0,
    )


def _layers(figure: Any, result: dict[str, Any]) -> None:
    layers = sorted({part["layer"] for part in result["sweep"]})
    tested = list(dict.fromkeys(part["tested_on"] for part in result["sweep"]))
    panels = figure.subplots(1, len(tested), sharey=True, squeeze=False)[0]
    for axes, name in zip(panels, tested, strict=True):
        lines: dict[str, list[float]] = {}
        bands: dict[str, tuple[list[float], list[float]]] = {}
        for part in sorted((part for part in result["sweep"] if part["tested_on"] == name), key=lambda part: int(part["layer"])):
            label = "other topics" if part["held_out"] == "topics" else f"made from {part['made_from']}"
            lines.setdefault(label, []).append(part["top1"]["value"])
            low, high = bands.setdefault(label, ([], []))
            low.append(part["top1"]["low"])
            high.append(part["top1"]["high"])
        curves(axes, layers, lines, bands=bands, colours=dict(zip(lines, (UP, DOWN, INK, MUTED), strict=False)))
        axes.axhline(result["chance"]["top1"], color=MUTED, linewidth=1)
        for layer in result["read_layers"]:
            axes.axvline(layer, color=LINE, linewidth=1, zorder=0)
        axes.set_title(f"tested on {name}", loc="left", fontsize=10, color=INK)
        axes.set_xlabel("layer")
        axes.set_ylim(0, 1)
        axes.legend(loc="upper left", fontsize=9)
    panels[0].set_ylabel("top-1")
