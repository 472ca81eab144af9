"""Intervals, nulls and agreement. Everything random takes a generator, and every p is ``(1 + hits) / (1 + n)``, never zero."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

LEVEL = 0.95
_Z = 1.959963984540054


def distinct(values: Tensor) -> Tensor:
    """The values there are in ``values`` [N], in ascending order."""
    found: Tensor = torch.unique(values)
    return found


def numbered(values: Tensor) -> Tensor:
    """For each of ``values`` [N] its place among the distinct ones."""
    return torch.searchsorted(distinct(values), values)


def wilson(hits: int, count: int) -> tuple[float, float]:
    """The 95 % Wilson interval of a share of ``hits`` among ``count`` independent trials."""
    if count < 1:
        raise ValueError(f"a share needs trials, got {count}")
    share, square = hits / count, _Z * _Z / count
    middle = (share + square / 2) / (1 + square)
    half = _Z * math.sqrt(share * (1 - share) / count + square / (4 * count)) / (1 + square)
    return max(0.0, middle - half), min(1.0, middle + half)


def permutation_p(observed: float, null: Tensor) -> float:
    """How likely a value of ``null`` [n] is at least ``observed``, which counts as one of them."""
    return (1 + int((null >= observed - 1e-12).sum())) / (1 + len(null))


def against(observed: float, null: Tensor) -> dict[str, Any]:
    """What a null distribution [n] says: its mean, its 97.5 % quantile, its size and p."""
    high = float(null.double().quantile(0.975))
    return {"mean": float(null.double().mean()), "high": high, "n": len(null), "p": permutation_p(observed, null)}


def quantiles(drawn: Tensor) -> tuple[float, float]:
    """The middle 95 % of ``drawn`` [B]; values that are not finite do not count."""
    drawn = drawn.double()
    kept = drawn[drawn.isfinite()]
    if not len(kept):
        return math.nan, math.nan
    low, high = kept.quantile(torch.tensor([(1 - LEVEL) / 2, (1 + LEVEL) / 2], dtype=torch.float64)).tolist()
    return low, high


def multiplicities(groups: Tensor, samples: int, generator: torch.Generator) -> Tensor:
    """How often each item is drawn [B, N] when the groups of ``groups`` [N] are drawn anew as wholes."""
    index = numbered(groups)
    count = int(index.max()) + 1
    drawn = torch.randint(count, (samples, count), generator=generator)
    ones = torch.ones(samples, count, dtype=torch.float64)
    return torch.zeros_like(ones).scatter_add_(1, drawn, ones)[:, index]


def mean_estimate(values: Tensor, groups: Sequence[Tensor], samples: int, generator: torch.Generator) -> dict[str, Any]:
    """The mean of ``values`` [N] with its bootstrap interval.

    Items that share a group succeed and fail together, so groups are drawn anew as wholes: each of ``groups`` ([N] each, such
    as the concept and the topic of each text) independently, an item counting by the product.
    """
    values = values.double()
    weights = torch.ones(samples, len(values), dtype=torch.float64)
    for group in groups:
        weights *= multiplicities(group, samples, generator)
    low, high = quantiles((weights @ values) / weights.sum(1))
    return {"value": float(values.mean()), "low": low, "high": high, "n": len(values)}


def hit_estimate(hits: Tensor, groups: Sequence[Tensor], samples: int, generator: torch.Generator) -> dict[str, Any]:
    """The share of ``hits`` [N]; its interval holds both the bootstrap's over ``groups`` and Wilson's, as few or no misses say little."""
    estimate, count = mean_estimate(hits, groups, samples, generator), int(hits.sum())
    low, high = wilson(count, len(hits))
    return estimate | {"hits": count, "low": min(low, estimate["low"]), "high": max(high, estimate["high"])}


def share_estimate(hits: Tensor) -> dict[str, Any]:
    """The share of ``hits`` [N] with its Wilson interval."""
    count = int(hits.sum())
    low, high = wilson(count, len(hits))
    return {"value": count / len(hits), "low": low, "high": high, "n": len(hits)}


def correlation(a: Tensor, b: Tensor) -> Tensor:
    """Pearson's r along the last dimension; NaN where one of the two does not vary."""
    a, b = a.double(), b.double()
    a, b = a - a.mean(-1, keepdim=True), b - b.mean(-1, keepdim=True)
    found: Tensor = (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))
    return found


def ranks(values: Tensor) -> Tensor:
    """Ranks along the last dimension, from 0; ties share their mean rank."""
    below = (values[..., None, :] < values[..., :, None]).sum(-1)
    same = (values[..., None, :] == values[..., :, None]).sum(-1)
    return below.double() + (same.double() - 1) / 2


def spearman(a: Tensor, b: Tensor) -> Tensor:
    """Rank correlation along the last dimension."""
    return correlation(ranks(a), ranks(b))


def slopes(x: Tensor, values: Tensor) -> Tensor:
    """Slopes of the least-squares lines through ``values`` [..., S] over ``x`` [S]."""
    x = x.double() - x.double().mean()
    found: Tensor = values.double() @ x / x.square().sum()
    return found


def adjusted_rand(a: Tensor, b: Tensor) -> float:
    """The adjusted Rand index of two partitions, given as labels [N]: 1 the same, 0 what chance gives."""
    a, b = numbered(a), numbered(b)
    table = torch.zeros(int(a.max()) + 1, int(b.max()) + 1, dtype=torch.float64)
    table.index_put_((a, b), torch.ones(len(a), dtype=torch.float64), accumulate=True)

    def pairs(counts: Tensor) -> float:
        return float((counts * (counts - 1) / 2).sum())

    both, rows, columns, total = pairs(table), pairs(table.sum(1)), pairs(table.sum(0)), pairs(torch.tensor([float(len(a))]))
    expected, largest = rows * columns / total, (rows + columns) / 2
    return 1.0 if largest == expected else (both - expected) / (largest - expected)


def kmeans(rows: Tensor, clusters: int, generator: torch.Generator, *, restarts: int = 20, rounds: int = 50) -> Tensor:
    """Labels [N] of the best of several k-means runs on ``rows`` [N, d], each begun with points far from one another."""
    best, labels = math.inf, torch.zeros(len(rows), dtype=torch.long)
    for _ in range(restarts):
        centres = rows[torch.randint(len(rows), (1,), generator=generator)]
        while len(centres) < clusters:
            distance = torch.cdist(rows, centres).min(1).values.square()
            centres = torch.cat([centres, rows[torch.multinomial(distance + 1e-12, 1, generator=generator)]])
        for _ in range(rounds):
            nearest = torch.cdist(rows, centres).argmin(1)
            moved = torch.stack([rows[nearest == c].mean(0) if bool((nearest == c).any()) else centres[c] for c in range(clusters)])
            if torch.equal(moved, centres):
                break
            centres = moved
        distance, nearest = torch.cdist(rows, centres).min(1)
        if float(distance.square().sum()) < best:
            best, labels = float(distance.square().sum()), nearest
    return labels


def shuffled_within(groups: Tensor, generator: torch.Generator) -> Tensor:
    """A random permutation [N] that moves items only within their group of ``groups`` [N]."""
    found = torch.arange(len(groups))
    for group in distinct(groups):
        here = (groups == group).nonzero()[:, 0]
        found[here] = here[torch.randperm(len(here), generator=generator)]
    return found
