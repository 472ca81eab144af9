"""Does a reading follow a number in the prompt: milligrams, hours, debts?

A single template proves nothing: along seven values that only rise, the reading of a random direction is often in perfect order
too. So each slope stands beside those of random readers, and the sum over all templates decides.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from emovec.evaluation.material import Material
from emovec.evaluation.reading import read, read_layers
from emovec.evaluation.words import chance, said
from emovec.report.markup import Html
from emovec.report.prose import text
from emovec.report.tables import table
from emovec.stats import against, hit_estimate, mean_estimate, permutation_p, slopes, spearman

RANDOM = 1000
KIND = "turn_start"


def result(material: Material) -> dict[str, Any]:
    """Slopes per template and concept against random readers, and all of them together."""
    items, bank = material.corpus.dosage, material.bank
    if not items:
        return {"skipped": "no template's concepts are all among the bank's"}
    means = {layer: value for layer, value in material.pool("dosage", "turn start").items() if layer in bank.layers}
    layer = bank.read_layer
    scores = read(bank, means, KIND)
    generator = material.generator("dosage")
    random = random_readings(material, means, generator)
    templates, start = [], 0
    for item in items:
        rows = slice(start, start + len(item["values"]))
        start = rows.stop
        templates.append(_template(material, item, scores[rows], random[rows], means[layer][rows].double()))
    return {
        "kind": KIND,
        "layer": layer,
        "random": random.shape[1],
        "templates": templates,
        "together": _together(material, templates, scores, random, items, generator),
    }


def random_readings(material: Material, means: Mapping[int, Tensor], generator: torch.Generator) -> Tensor:
    """Scores [N, R] of random readers as long as the bank's, at the layers it reads at and in its units: z against ordinary text."""
    count = RANDOM if not material.options.quick else RANDOM // 5
    random = torch.randn(count, material.bank.width, dtype=torch.float64, generator=generator)
    moments, readers, found = material.moments[KIND], {}, []
    for layer in read_layers(material.bank):
        own = material.bank[layer]
        length = (own.directions if own.readers is None else own.readers).double().norm(dim=1).median()
        readers[layer] = random * length / random.norm(dim=1, keepdim=True)
        baseline = moments.baseline(layer, readers[layer])
        found.append((means[layer].double() @ readers[layer].T - baseline.mean.double()) / baseline.std.double())
    return found[0] if len(found) == 1 else torch.stack(found).mean(0) / moments.together(readers).std.double()


def _template(material: Material, item: Any, scores: Tensor, random: Tensor, hidden: Tensor) -> dict[str, Any]:
    """One template: over the rank of the value, as values are spaced unevenly."""
    step = torch.arange(len(item["values"]), dtype=torch.float64) / (len(item["values"]) - 1)
    null = slopes(step, random.T)
    orders = spearman(step, random.T)
    concepts = []
    for name, sign in [*((name, 1) for name in item["rises"]), *((name, -1) for name in item["falls"])]:
        column = scores[:, material.bank.resolve(name)]
        slope = float(slopes(step, column))
        concepts.append(
            {
                "concept": name,
                "expected": sign,
                "slope": slope,
                "right_sign": slope * sign > 0,
                "rho": float(spearman(step, column)),
                "p": permutation_p(slope * sign, null * sign),
                "scores": column.tolist(),
            }
        )
    return {
        "id": item["id"],
        "values": item["values"],
        "concepts": concepts,
        "random": {
            "slope_std": float(null.std()),
            "slope_high": float(null.abs().quantile(0.95)),
            "perfect_order": float((orders.abs() > 0.999).double().mean()),
            "rho_above_0.8": float((orders.abs() >= 0.8).double().mean()),
        },
        "norm_rho": float(spearman(step, hidden.norm(dim=1))),
    }


def _together(
    material: Material, templates: list[dict[str, Any]], scores: Tensor, random: Tensor, items: Any, generator: torch.Generator
) -> dict[str, Any]:
    """Signed slopes over all templates: in units of random readers' spread, against random readers and against other concepts' readers.

    In each draw every concept gets one random reader, or another concept, and keeps it in all templates.
    """
    own, pairs = [], []
    random_slopes, concept_slopes = [], []
    start = 0
    for item, template in zip(items, templates, strict=True):
        rows = slice(start, start + len(item["values"]))
        start = rows.stop
        step = torch.arange(len(item["values"]), dtype=torch.float64) / (len(item["values"]) - 1)
        spread = template["random"]["slope_std"]
        random_slopes.append(slopes(step, random[rows].T) / spread)
        concept_slopes.append(slopes(step, scores[rows].T) / spread)
        for part in template["concepts"]:
            own.append(part["slope"] * part["expected"] / spread)
            pairs.append((len(random_slopes) - 1, part["concept"], part["expected"]))
    used = sorted({name for _, name, _ in pairs})
    which = torch.tensor([template for template, _, _ in pairs])
    concept = torch.tensor([used.index(name) for _, name, _ in pairs])
    sign = torch.tensor([float(sign) for _, _, sign in pairs], dtype=torch.float64)
    nulls = {}
    for name, table_of in (("random", torch.stack(random_slopes)), ("concepts", torch.stack(concept_slopes))):
        drawn = torch.stack(
            [torch.randperm(table_of.shape[1], generator=generator)[: len(used)] for _ in range(material.options.permutations)]
        )
        nulls[name] = (table_of[which[None], drawn[:, concept]] * sign).mean(1)
    values = torch.tensor(own, dtype=torch.float64)
    estimate = mean_estimate(values, (which,), material.options.samples, generator)
    right = hit_estimate(values > 0, (which,), material.options.samples, generator)
    return {
        "pairs": len(pairs),
        "templates": len(templates),
        "concepts": used,
        "slope": estimate | {"null": {name: against(estimate["value"], null) for name, null in nulls.items()}},
        "right_sign": right,
        "alone": sum(part["p"] < 0.05 for template in templates for part in template["concepts"]),
    }


def parts(result: dict[str, Any]) -> list[Html]:
    """Templates one by one, and together."""
    if "skipped" in result:
        return [text(result["skipped"], title="Does a reading follow a number?")]
    together = result["together"]
    rows = [
        [
            template["id"],
            ("rises: " if part["expected"] > 0 else "falls: ") + part["concept"],
            f"{part['slope']:+.2f}".replace("-", "\u2212"),
            f"{template['random']['slope_high']:.2f}",
            "yes" if part["right_sign"] else "no",
            f"{part['rho']:+.2f}".replace("-", "\u2212"),
            f"{template['random']['rho_above_0.8']:.0%}",
            chance(part["p"]),
        ]
        for template in result["templates"]
        for part in template["concepts"]
    ]
    perfect, steep = ([template["random"][key] for template in result["templates"]] for key in ("perfect_order", "rho_above_0.8"))
    none = together["alone"]
    verdict = (
        f"Taken alone, {none} of {together['pairs']} slopes are beyond what random readers reach (p below 0.05, one-sided; "
        f"{0.05 * together['pairs']:.0f} expected by chance). Along the values a random reader has a rank correlation of 0.8 or more, up "
        f"or down, in {min(steep):.0%} to {max(steep):.0%} of cases by template, and is in perfect order in {min(perfect):.0%} to "
        f"{max(perfect):.0%}: an order alone shows little."
    )
    if none <= 0.5 * together["pairs"]:
        verdict += " Most single sweeps prove nothing."
    summary = [
        ["mean slope in the expected direction, in standard deviations of random readers", said(together["slope"])],
        ["p against random readers of the same length", chance(together["slope"]["null"]["random"]["p"])],
        ["p against other concepts' readers", chance(together["slope"]["null"]["concepts"]["p"])],
        ["slopes of the expected sign", said(together["right_sign"])],
    ]
    return [
        text(
            "The same message with a number that rises, read at the turn's start. The slope is from the lowest to the highest value, over "
            "ranks, "
            "in z-units of ordinary prompts.",
            verdict,
            title="Does a reading follow a number?",
        ),
        table(
            ["all templates together", ""],
            summary,
            note=f"{together['pairs']} slopes in {together['templates']} templates; whole templates are drawn anew for the intervals.",
        ),
        table(
            [
                "template",
                "concept",
                "slope",
                "random readers, 95 %",
                "expected sign",
                "rank correlation",
                "random readers with |rho| of 0.8",
                "p",
            ],
            rows,
        ),
    ]
