"""What the report shows of the geometry."""

from __future__ import annotations

from typing import Any

from emovec.evaluation.figures import DOWN, INK, MUTED, SHADES, UP, Figure, curves, picture
from emovec.evaluation.words import chance, said
from emovec.report.markup import Html
from emovec.report.prose import text
from emovec.report.tables import matrix, table

_SHOWN = 32  # words in the map


def parts(result: dict[str, Any]) -> list[Html | Figure]:
    """Components, the map, clusters, and the likeness of layers."""
    layer = str(result["read_layer"])
    found: list[Html | Figure] = [
        text(
            f"The directions themselves, at layer {layer} the bank's own; components are of directions as long as they were made, cosines "
            f"and clusters of unit ones. Ratings are of words, not of what the model does with them. "
            "r is that of a component with the ratings; for each norm, p asks how often shuffled ratings reach the largest r of the "
            "components, "
            "and the last column how often the same component is ahead when concepts are drawn anew.",
            title="How the directions lie",
        )
    ]
    if layer in result["components"]:
        found += [
            _components(result, layer),
            Figure("components", "Where the concepts lie", lambda figure: _map(figure, result, layer), (8.6, 5.6)),
        ]
        found.append(Figure("norms", "Valence and arousal by layer", lambda figure: _norms(figure, result), (8.6, 2.9), note=_NORMS_NOTE))
    else:
        found.append(text("Too few of the bank's concepts are rated to compare components with ratings."))
    if result["clusters"]:
        found.append(_clusters(result, layer))
    if result["order"] and result["families"]:
        found.append(
            Figure("cosines", "Cosines of all directions", lambda figure: _cosines(figure, result), (8.6, 7.2), note=_COSINES_NOTE)
        )
    found += _likeness(result, layer)
    return found


_NORMS_NOTE = "The largest |r| of the first four components with each norm. Layer 0 sees hardly more than the words."
_COSINES_NOTE = "By family, and within one from the most to the least typical. Blue below zero, orange above; full colour at 0.6."


def _components(result: dict[str, Any], layer: str) -> Html:
    components = result["components"][layer]
    rows = []
    for norm, part in components["norms"].items():
        for index, estimate in enumerate(part["r"]):
            ahead = index == part["carried_by"]
            rows.append(
                [
                    norm,
                    f"PC{index + 1} ({components['variance'][index]:.0%} of variance)",
                    said(estimate),
                    chance(part["null"]["p"]) if ahead else "",
                    f"{part['carried_share']:.0%}" if ahead else "",
                ]
            )
    return table(
        ["norm", "component", "r (95 %)", "p of the largest", "stays the largest"], rows, note=f"{components['n']} rated concepts."
    )


def _map(figure: Any, result: dict[str, Any], layer: str) -> None:
    """The component that carries valence across, the one that carries arousal up; the first two where one carries both."""
    components = result["components"][layer]
    places, rated, norms = components["places"], components["rated"], components["norms"]
    shown = [norms[norm]["carried_by"] for norm in ("valence", "arousal")]
    shown = [0, 1] if shown[0] == shown[1] else shown
    axes = figure.subplots()
    sides = []
    for component, norm in zip(shown, ("valence", "arousal"), strict=True):
        r = norms[norm]["r"][component]["value"]
        sides.append([(-1.0 if r < 0 else 1.0) * places[row][component] for row in rated])
    valence = [rating[0] for rating in components["ratings"]]
    low, high = min(valence), max(valence)
    axes.scatter(*sides, c=[_shade((value - low) / ((high - low) or 1)) for value in valence], s=26, edgecolors=MUTED, linewidths=0.5)
    step = max(1, len(rated) // _SHOWN)
    for index in sorted(range(len(rated)), key=lambda index: sides[0][index])[::step]:
        at = (sides[0][index], sides[1][index])
        axes.annotate(result["names"][rated[index]], at, xytext=(4, 2), textcoords="offset points", fontsize=8, color=INK)
    axes.set_xlabel(f"PC{shown[0] + 1}, r with valence {abs(norms['valence']['r'][shown[0]]['value']):.2f}")
    axes.set_ylabel(f"PC{shown[1] + 1}, r with arousal {abs(norms['arousal']['r'][shown[1]]['value']):.2f}")
    axes.tick_params(length=0)
    axes.set_title("colour: rated valence, blue unpleasant, orange pleasant", loc="left", fontsize=9, color=MUTED)


def _shade(share: float) -> str:
    step = round((2 * share - 1) * 8)
    return SHADES[step] if step else "#f4f4f4"


def _norms(figure: Any, result: dict[str, Any]) -> None:
    axes = figure.subplots()
    layers = sorted(map(int, result["components"]))
    lines, bands = {}, {}
    for norm in ("valence", "arousal"):
        best = [result["components"][str(layer)]["norms"][norm] for layer in layers]
        ahead = [part["r"][part["carried_by"]] for part in best]
        lines[norm] = [abs(part["value"]) for part in ahead]
        ends = [sorted((abs(part["low"]), abs(part["high"]))) for part in ahead]
        bands[norm] = ([low for low, _ in ends], [high for _, high in ends])
    lines["null, 97.5 %"] = [result["components"][str(layer)]["norms"]["valence"]["null"]["high"] for layer in layers]
    curves(axes, layers, lines, bands=bands, colours={"valence": UP, "arousal": DOWN, "null, 97.5 %": MUTED})
    axes.set_xlabel("layer")
    axes.set_ylabel("|r|")
    axes.set_ylim(0, 1)
    axes.legend(ncols=3, loc="lower right")


def _clusters(result: dict[str, Any], layer: str) -> Html:
    rows = []
    for index, part in result["clusters"].items():
        value = part["adjusted_rand"]
        which = "0 (hardly more than the words)" if index == "0" else f"{index} (read here)"
        rows.append([which, said(value), f"{value['null']['high']:.3f}", chance(value["null"]["p"]), value["n"]])
    return table(
        ["layer", "adjusted Rand index (95 %)", "null, 97.5 %", "p", "concepts"],
        rows,
        title="Clusters against families",
        note=f"As many k-means clusters as there are families ({len(result['families'])}); 1: the same partition, 0: what chance gives. "
        "The interval draws concepts anew and leaves the clusters as they are.",
    )


def _cosines(figure: Any, result: dict[str, Any]) -> None:
    axes = figure.subplots()
    order, names = result["order"], result["names"]
    values = [[result["cosines"][row][column] for column in order] for row in order]
    image = picture(axes, values, limit=0.6)
    if len(order) <= 40:
        axes.set_yticks(range(len(order)), [names[row] for row in order])
    else:
        places = {
            index: [place for place, row in enumerate(order) if result["family"][row] == index] for index in range(len(result["families"]))
        }
        shown = {index: found for index, found in places.items() if found}
        axes.set_yticks(
            [(found[0] + found[-1]) / 2 for found in shown.values()], [result["families"][index] for index in shown], fontsize=8
        )
        for found in shown.values():
            axes.axhline(found[-1] + 0.5, color=MUTED, linewidth=0.4)
            axes.axvline(found[-1] + 0.5, color=MUTED, linewidth=0.4)
    axes.tick_params(length=0)
    axes.set_xticks([])
    figure.colorbar(image, ax=axes, shrink=0.6, label="cosine")
    for side in ("left", "bottom"):
        axes.spines[side].set_visible(False)


def _likeness(result: dict[str, Any], layer: str) -> list[Html]:
    likeness = result["likeness"]
    values = {
        f"layer {row}": {str(column): value for column, value in zip(likeness["layers"], line, strict=True)}
        for row, line in zip(likeness["layers"], likeness["r"], strict=True)
    }
    rows = [
        [index, said(part), f"{part['null']['high']:.2f}", chance(part["null"]["p"])] for index, part in likeness["against_read"].items()
    ]
    own = ", ".join(map(str, result["own"]))
    return [
        matrix(
            values,
            title="Do layers agree?",
            note=f"Correlation, between layers, of the cosines among all concepts. The bank's own directions at {own}; elsewhere made by "
            f"its recipe.",
            unit="r",
            limit=1.0,
        ),
        table(["layer", f"r with layer {layer} (95 %)", "null, 97.5 %", "p"], rows, note="Null: one layer's concepts shuffled."),
    ]
