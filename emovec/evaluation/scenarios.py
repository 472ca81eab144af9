"""Does the bank read feelings that a user's message implies and never names?

The bank's own directions, on texts that they were not made from. Read at the token before the answer, in z-units of ordinary
prompts at that place: a readout that is not centred so is shown beside it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from emovec.evaluation.figures import Figure, whiskers
from emovec.evaluation.material import Material
from emovec.evaluation.reading import all_ranks, projections, read
from emovec.evaluation.words import chance, said
from emovec.report.markup import Html
from emovec.report.prose import text
from emovec.report.tables import table
from emovec.stats import against, distinct, hit_estimate

READOUTS = {
    "turn start": ("turn start", "turn_start", True),
    "user's words": ("words", "prompt", True),
    "turn start, not centred": ("turn start", "turn_start", False),
}
TOPS = (1, 3, 5, 10)
SHOWN = ("turn start", "user's words")


def result(material: Material) -> dict[str, Any]:
    """Hits for each readout, among all concepts, among the targets and among families."""
    items = material.corpus.scenarios
    if not items:
        return {"skipped": "no scenario's target is among the bank's concepts"}
    bank = material.bank
    truth = torch.tensor([bank.resolve(item["target"]) for item in items])
    targets = distinct(truth)
    readouts = {}
    for name, (pool, kind, centred) in READOUTS.items():
        means = {layer: value for layer, value in material.pool("scenarios", pool).items() if layer in bank.layers}
        scores = read(bank, means, kind) if centred else projections(bank, means)
        readouts[name] = _readout(material, scores, truth, targets, name)
    return {
        "targets": [bank.names[row] for row in targets.tolist()],
        "items": [{"id": item["id"], "target": item["target"]} for item in items],
        "concepts": len(bank.names),
        "families": material.families,
        "readouts": readouts,
    }


def _readout(material: Material, scores: Tensor, truth: Tensor, targets: Tensor, name: str) -> dict[str, Any]:
    family = material.family_of(material.bank.names)
    members = torch.stack([(family == index).double() for index in range(len(material.families))]) if material.families else None
    problems = {"concepts": (all_ranks(scores), truth), "targets": (all_ranks(scores[:, targets]), torch.searchsorted(targets, truth))}
    if members is not None and bool((family[truth] >= 0).all()):
        problems["families"] = (all_ranks(scores @ members.T / members.sum(1)), family[truth])
    found: dict[str, Any] = {}
    for problem, (ranks, right) in problems.items():
        own = ranks.gather(1, right[:, None])[:, 0]
        tops = [top for top in TOPS if top < ranks.shape[1] // 2]
        found[problem] = {
            "of": ranks.shape[1],
            "ranks": own.tolist(),
            "top": {str(top): _hits(material, ranks, right, top, f"{name}.{problem}") for top in tops},
        }
        if problem == "concepts":
            guesses = [material.bank.names[row] for row in ranks.argmin(1).tolist()]
            found[problem]["first"] = guesses
    found["by_target"] = _by_target(material, truth, targets, {problem: part["ranks"] for problem, part in found.items()})
    return found


def _hits(material: Material, ranks: Tensor, right: Tensor, top: int, purpose: str) -> dict[str, Any]:
    """The share of scenarios whose target is among the first ``top``; those of one target are drawn together, targets shuffled for p."""
    own = ranks.gather(1, right[:, None])[:, 0]
    estimate = hit_estimate(own <= top, (right,), material.options.samples, material.generator(f"scenarios.{purpose}.{top}"))
    generator = material.generator(f"scenarios.null.{purpose}.{top}")
    null = torch.empty(material.options.permutations, dtype=torch.float64)
    for draw in range(len(null)):
        shuffled = right[torch.randperm(len(right), generator=generator)]
        null[draw] = (ranks.gather(1, shuffled[:, None]) <= top).double().mean()
    return estimate | {"chance": top / ranks.shape[1], "null": against(estimate["value"], null)}


def _by_target(material: Material, truth: Tensor, targets: Tensor, ranks: dict[str, list[int]]) -> dict[str, Any]:
    rows = {}
    for target in targets.tolist():
        here = (truth == target).nonzero()[:, 0].tolist()
        rows[material.bank.names[target]] = {"n": len(here), **{problem: [own[index] for index in here] for problem, own in ranks.items()}}
    return rows


def parts(result: dict[str, Any]) -> list[Html | Figure]:
    """Tables of hits, and each target's ranks."""
    rows, best = [], result["readouts"]["turn start"]
    for name, found in result["readouts"].items():
        for problem in ("concepts", "targets", "families"):
            if problem not in found:
                continue
            for top, part in found[problem]["top"].items():
                if int(top) in (1, 5) or (problem != "concepts" and int(top) == 3):
                    rows.append(
                        [
                            name,
                            f"{found[problem]['of']} {problem}",
                            f"top {top}",
                            f"{part['hits']} of {part['n']}",
                            said(part),
                            f"{part['chance']:.3f}",
                            f"{part['null']['high']:.2f}",
                            chance(part["null"]["p"]),
                        ]
                    )
    problems = [problem for problem in ("concepts", "targets", "families") if problem in best]
    columns = [f"{name}: among {best[problem]['of']} {problem}" for name in SHOWN for problem in problems]
    each = [
        [target, *(", ".join(map(str, result["readouts"][name]["by_target"][target][problem])) for name in SHOWN for problem in problems)]
        for target in best["by_target"]
    ]
    return [
        text(
            "Messages that imply one of the targets' feelings without naming it. The bank's own directions read them; none was made from "
            "these "
            "messages, though the writer is the one of the corpus. An interval is the wider of Wilson's and of a bootstrap over targets; "
            "the null shuffles the targets among the messages.",
            title="Feelings that are only implied",
        ),
        table(["read at", "among", "hit", "hits", "share (95 %)", "chance", "null, 97.5 %", "p"], rows),
        table(["target", *columns], each, title="Target by target", note="Ranks of the target in each message; 1 is the highest."),
        Figure("scenarios", "Targets found", lambda figure: _draw(figure, result), (8.6, 3.2)),
    ]


def _draw(figure: Any, result: dict[str, Any]) -> None:
    rows, marks = {}, {}
    for name, found in result["readouts"].items():
        problems = {"concepts, top 5": found["concepts"]["top"].get("5"), "targets, top 1": found["targets"]["top"].get("1")}
        problems["families, top 1"] = found["families"]["top"].get("1") if "families" in found else None
        kept = [part for part in problems.values() if part is not None]
        rows[name], marks[name] = kept, [part["null"]["high"] for part in kept]
    whiskers(figure, rows, marks=marks, unit="share of messages", series=["concepts, top 5", "targets, top 1", "families, top 1"])
