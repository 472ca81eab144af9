"""How the directions lie to one another: components, clusters, and whether layers agree.

At the bank's layers these are its own directions. At other layers they are made by its recipe from all labelled texts; what they
look like there does not need held-out texts, but the words alone (layer 0) give some of it, and are shown beside it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from emovec.bank import BankLayer
from emovec.evaluation.geometry_page import parts
from emovec.evaluation.labelled import derived
from emovec.evaluation.material import Material
from emovec.stats import adjusted_rand, against, correlation, distinct, kmeans, quantiles

__all__ = ["parts", "result"]

COMPONENTS = 4
NORMS = ("valence", "arousal")
_LEAST = 10  # rated words
_DIGITS = 4


def result(material: Material) -> dict[str, Any]:
    """Components against norms, clusters against families, and the likeness of layers."""
    names, by_layer, lengths, own = _directions(material)
    layer = material.bank.read_layer
    cosines = {index: rows @ rows.T for index, rows in by_layer.items()}
    rated = [row for row, name in enumerate(names) if name in material.corpus.ratings]
    norms = torch.tensor([material.corpus.ratings[names[row]] for row in rated], dtype=torch.float64)
    found: dict[str, Any] = {
        "names": names,
        "read_layer": layer,
        "own": own,
        "components": {},
        "clusters": {},
        "likeness": _likeness(material, cosines, layer),
        "cosines": _rounded(cosines[layer]),
        "order": _order(material, names, cosines[layer]),
        "families": material.families,
        "family": material.family_of(tuple(names)).tolist(),
    }
    for index, rows in by_layer.items():
        if len(rated) >= _LEAST:
            found["components"][str(index)] = _components(
                material, rows * lengths[index], torch.tensor(rated), norms, f"layer {index}", full=index == layer
            )
        if material.families and index in {0, layer}:
            found["clusters"][str(index)] = _clusters(material, names, rows, f"layer {index}")
    return found


def _directions(material: Material) -> tuple[list[str], dict[int, Tensor], dict[int, Tensor], list[int]]:
    """Concepts, layer -> unit directions [K, d] in fp64 and the lengths [K, 1] they had, and the layers where these are the bank's own."""
    bank, recipe = material.bank, material.recipe
    if recipe is None:
        layers = bank.values()
        directions = {layer.index: layer.directions.double() for layer in layers}
        lengths = {layer.index: _lengths(layer, list(range(len(bank.names)))) for layer in layers}
        return list(bank.names), directions, lengths, list(bank.layers)
    names = material.corpus.names
    rows = [bank.resolve(name) for name in names]
    texts = material.everything()
    found, lengths = {}, {}
    for layer in material.layers:
        if layer in bank.layers:
            found[layer], lengths[layer] = bank[layer].directions[rows].double(), _lengths(bank[layer], rows)
        else:
            made = derived(texts, layer, len(names), replace(recipe, readers=None), material.moments)
            found[layer], lengths[layer] = made.directions, made.raw_norm[:, None]
    return list(names), found, lengths, [layer for layer in found if layer in bank.layers]


def _lengths(layer: BankLayer, rows: list[int]) -> Tensor:
    return torch.ones(len(rows), 1, dtype=torch.float64) if layer.raw_norm is None else layer.raw_norm[rows, None].double()


def _components(material: Material, rows: Tensor, rated: Tensor, norms: Tensor, purpose: str, *, full: bool) -> dict[str, Any]:
    """Shares of variance of the leading components and their correlations with the norms; p is of the largest of a norm."""
    centred = rows - rows.mean(0)
    left, sizes, _ = torch.linalg.svd(centred, full_matrices=False)
    count = min(COMPONENTS, len(sizes))
    places = left[:, :count] * sizes[:count]
    r = correlation(places[rated].T[:, None], norms.T[None])  # [components, norms]
    generator = material.generator(f"geometry.components.{purpose}")
    drawn = torch.randint(len(rated), (material.options.samples, len(rated)), generator=generator)
    again = correlation(places[rated][drawn].permute(2, 0, 1)[:, None], norms[drawn].permute(2, 0, 1)[None])  # [components, norms, B]
    null = torch.stack(
        [
            correlation(places[rated].T[:, None], norms[torch.randperm(len(rated), generator=generator)].T[None]).abs().max(0).values
            for _ in range(material.options.permutations)
        ]
    )
    told: dict[str, Any] = {"variance": (sizes**2 / (sizes**2).sum())[:count].tolist(), "n": len(rated), "norms": {}}
    for column, norm in enumerate(NORMS):
        best = int(r[:, column].abs().argmax())
        estimates = []
        for component in range(count):
            low, high = quantiles(again[component, column])
            estimates.append({"value": float(r[component, column]), "low": low, "high": high, "n": len(rated)})
        told["norms"][norm] = {
            "r": estimates,
            "carried_by": best,
            "carried_share": float((again[:, column].abs().argmax(0) == best).double().mean()),
            "null": against(float(r[best, column].abs()), null[:, column]),
        }
    if full:
        told["places"] = _rounded(places)
        told["rated"] = rated.tolist()
        told["ratings"] = norms.tolist()
    return told


def _clusters(material: Material, names: list[str], rows: Tensor, purpose: str) -> dict[str, Any]:
    """As many k-means clusters as there are families, against these; families are shuffled among the concepts for p."""
    family = material.family_of(tuple(names))
    kept = family >= 0
    generator = material.generator(f"geometry.clusters.{purpose}")
    labels = kmeans(rows[kept], len(material.families), generator)
    family = family[kept]
    value = adjusted_rand(labels, family)
    drawn = torch.randint(len(family), (material.options.samples, len(family)), generator=generator)
    kept_once = [distinct(draw) for draw in drawn]  # a concept drawn twice is no pair that agrees
    low, high = quantiles(torch.tensor([adjusted_rand(labels[index], family[index]) for index in kept_once]))
    null = [adjusted_rand(labels, family[torch.randperm(len(family), generator=generator)]) for _ in range(material.options.permutations)]
    return {
        "adjusted_rand": {"value": value, "low": low, "high": high, "n": len(family), "null": against(value, torch.tensor(null))},
        "labels": labels.tolist(),
        "of": [name for name, used in zip(names, kept.tolist(), strict=True) if used],
    }


def _likeness(material: Material, cosines: dict[int, Tensor], layer: int) -> dict[str, Any]:
    """The correlation of the cosines among concepts between layers, and against the reading layer with interval and p."""
    layers = list(cosines)
    size = len(cosines[layer])
    upper = torch.triu(torch.ones(size, size, dtype=torch.bool), 1)
    flat = torch.stack([cosines[index][upper] for index in layers])
    generator = material.generator("geometry.likeness")
    samples = min(material.options.samples, 200)
    draws = [torch.randint(size, (size,), generator=generator) for _ in range(samples)]
    shuffles = [torch.randperm(size, generator=generator) for _ in range(min(material.options.permutations, 200))]
    against_read = {}
    for row, index in enumerate(layers):
        if index == layer:
            continue
        drawn = []
        for draw in draws:
            pairs = upper & (draw[:, None] != draw)  # a concept drawn twice is no pair
            drawn.append(correlation(cosines[layer][draw][:, draw][pairs], cosines[index][draw][:, draw][pairs]))
        null = torch.stack([correlation(cosines[layer][upper], cosines[index][order][:, order][upper]) for order in shuffles])
        low, high = quantiles(torch.stack(drawn))
        value = float(correlation(flat[row], flat[layers.index(layer)]))
        against_read[str(index)] = {"value": value, "low": low, "high": high, "n": size, "null": against(value, null)}
    return {"layers": layers, "r": _rounded(torch.corrcoef(flat)), "against_read": against_read}


def _order(material: Material, names: list[str], cosines: Tensor) -> list[int]:
    """Concepts by family, and within one by their likeness to the family's mean."""
    family = material.family_of(tuple(names))
    found: list[int] = []
    for index in [*range(len(material.families)), -1]:
        here = (family == index).nonzero()[:, 0]
        found += here[cosines[here][:, here].mean(1).argsort(descending=True)].tolist() if len(here) else []
    return found


def _rounded(values: Tensor) -> list[list[float]]:
    return [[round(value, _DIGITS) for value in line] for line in values.tolist()]
