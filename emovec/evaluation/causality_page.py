"""What the report shows of causality."""

from __future__ import annotations

from typing import Any

from emovec.evaluation.figures import DOWN, MUTED, UP, Figure, curves
from emovec.evaluation.words import chance, plain, said
from emovec.report.markup import Html
from emovec.report.prose import samples, text
from emovec.report.tables import table

_SHOWN = 4  # concepts whose texts are shown


def parts(result: dict[str, Any]) -> list[Html | Figure]:
    """Naming, writing, cost and usable strengths."""
    layers, count = ", ".join(map(str, result["layers"])), result["random"]
    found: list[Html | Figure] = [
        text(
            f"Directions are added at layers {layers}, the bank's. Beside each figure stands what {count} random directions of the same "
            f"length at the "
            "same layers do, and what the other concepts' directions do. No model judges anything.",
            title="Does adding a direction do what its name says?",
        )
    ]
    naming = result["naming"]
    found += [text(naming["skipped"])] if "skipped" in naming else _naming(naming, count)
    found += _writing(result)
    found += [Figure("cost", "What a dose costs", lambda figure: _cost(figure, result), (8.6, 3.0), note=_COST_NOTE), _usable(result)]
    return found


_COST_NOTE = (
    "How much the loss on neutral text rises, in nats per token: medians over directions, middle 95 %. The line is the limit of use."
)


def _naming(naming: dict[str, Any], count: int) -> list[Html | Figure]:
    doses = naming["doses"]
    rows = []
    for word, part in naming["words"].items():
        moved = [plain(value) for value, dose in zip(part["curve"], doses, strict=True) if dose]
        largest = max(map(abs, part["random"]))
        rows.append([word, *moved, said(part["slope"]), plain(largest), chance(part["p"]), part["place"]])
    mean, passed = naming["mean_slope"], naming["passed"]
    nulls = mean["null"]
    summary = (
        f"{passed['hits']} of {passed['n']} words rise beyond every random direction with an interval above zero. Mean slope {said(mean)} "
        f"per dose of {doses[-1] / 2:g}; "
        f"p {chance(nulls['other directions']['p'])} against the other concepts' directions, {chance(nulls['random']['p'])} against "
        f"random ones."
    )
    heads = [f"{dose:+g}" for dose in doses if dose]
    return [
        table(
            ["word", *heads, "slope (95 %)", "largest random slope", "p", "place of its own direction"],
            rows,
            title="Naming the feeling",
            note='How far the log-odds of the word among all words of the table move after "How does Anna feel? Anna feels" and the like, '
            f"in {naming['texts']} texts. "
            f"p against the size of {count} random slopes; its smallest value is {1 / (count + 1):.2g}.",
        ),
        text(summary),
    ]


def _writing(result: dict[str, Any]) -> list[Html | Figure]:
    writing = result["writing"]
    rows = []
    for which, by_dose in writing["read"].items():
        layer = f"layer {writing['readers'][which]}" + (" (hardly more than the words)" if which == "layer 0" else " (not steered)")
        for step, part in by_dose.items():
            own, nulls = part["own"], part["own"]["null"]
            dose = writing["doses"][[*by_dose].index(step)]
            rows.append(
                [
                    layer,
                    f"{dose:+g}",
                    said(own),
                    chance(nulls["other directions"]["p"]),
                    chance(nulls["random"]["p"]),
                    said(part["first"]),
                    plain(part["first"]["chance"]),
                ]
            )
    note = (
        f"{len(writing['prompts'])} prompts, up to {writing['new_tokens']} tokens, written under each direction and read back without "
        f"steering. How much higher a concept "
        "reads in its own texts than in the unsteered ones, in z-units; and how often its own texts are where it reads highest."
    )
    found: list[Html | Figure] = []
    if rows:
        heads = ["read at", "dose", "own concept (95 %)", "p, other directions", "p, random", "highest in its own (95 %)", "chance"]
        found.append(table(heads, rows, title="Feeling in what the model writes", note=note))
    else:
        found.append(text("What was written is not read back: the bank's recipe is not known.", title="Feeling in what the model writes"))
    lists = []
    for step, part in writing["words"].items():
        dose = writing["doses"][[*writing["words"]].index(step)]
        lists.append(
            [f"{dose:+g}", *(said(part[name]) if name in part else "" for name in ("own", "other families", "random", "unsteered"))]
        )
    heads = ["dose", "own direction (95 %)", "other families' directions", "random directions", "unsteered"]
    found.append(table(heads, lists, note="Share of texts that hold a word of the concept's family."))
    last = [*writing["words"]][-1]
    shown = [("unsteered", writing["texts"][""][0])]
    shown += [(f"{name} {writing['doses'][-1]:+g}", writing["texts"][name][last][0]) for name in result["words"][:_SHOWN]]
    found.append(samples(shown, prompt=writing["prompts"][0]))
    return found


def _cost(figure: Any, result: dict[str, Any]) -> None:
    cost = result["cost"]
    axes = figure.subplots()
    order = sorted(range(len(cost["doses"])), key=lambda index: cost["doses"][index])
    x = [cost["doses"][index] for index in order]
    middle = next(index for index, dose in enumerate(x) if dose > 0)
    x = [*x[:middle], 0.0, *x[middle:]]
    lines, bands = {}, {}
    for name, key in (("concepts", "concepts"), ("random directions", "random")):

        def along(field: str, key: str = key) -> list[float]:
            values = [float(cost[key][index][field]) for index in order]
            return [*values[:middle], 0.0, *values[middle:]]

        lines[name], bands[name] = along("median"), (along("low"), along("high"))
    curves(axes, x, lines, bands=bands, colours={"concepts": UP, "random directions": DOWN})
    axes.axhline(cost["limit"], color=MUTED, linewidth=1)
    axes.set_xlabel("strength")
    axes.set_ylabel("nats per token")
    axes.legend(ncols=2, loc="upper center")


def _usable(result: dict[str, Any]) -> Html:
    cost, intervals = result["cost"], result["usable_interval"]
    width = {name: high - low for name, (low, high) in result["usable"].items()}
    order = sorted(width, key=lambda name: width[name])
    shown = order if len(order) <= 20 else [*order[:10], *order[-10:]]
    low, high = result["tested"]

    def end(name: str, side: int) -> str:
        value, (least, most) = result["usable"][name][side], intervals[name][side]
        at_least = " or beyond" if value in (low, high) else ""
        return f"{value:+.3f} ({least:+.3f} to {most:+.3f}){at_least}".replace("-", "\u2212")

    random = sorted(high - low for low, high in result["usable_random"].values())
    note = (
        f"Strengths at which the loss on neutral text ({cost['texts']} texts, {cost['tokens']} tokens) rises by less than "
        f"{cost['limit']:.3f} nats per token, which makes "
        f"perplexity half as much again; straight between the doses tried ({low:+g} to {high:+g}). Narrowest and widest; all are in "
        f"report.json. "
        f"Random directions: {random[0]:.3f} to {random[-1]:.3f} wide, median {random[len(random) // 2]:.3f}; concepts: median "
        f"{sorted(width.values())[len(width) // 2]:.3f}."
    )
    return table(
        ["concept", "lowest (95 %)", "highest (95 %)"],
        [[name, end(name, 0), end(name, 1)] for name in shown],
        title="Usable strengths",
        note=note,
    )
