"""What speaks for a direction made from few stories: held-out topics, a null, halves of the stories, surface words, neighbours."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from emovec.extraction.recipe import project_out, unit
from emovec.stats import wilson

EXACT = 12  # topics up to which all sign flips are counted
FLIPS = 4999  # drawn where there are more
HALVES = 200
ENOUGH_TOPICS, STABLE, NEAR = 8, 0.5, 0.7

Read = Callable[[Tensor], Tensor]
"""From rows [n, d] to what reads them [n, d]: whitened, or the rows themselves. Linear and symmetric but for each row's positive scale."""


@dataclass(frozen=True)
class Evidence:
    """What is known of one concept's direction, at the layer that is read.

    Attributes:
        concept: its name.
        layer: where.
        stories: stories used.
        topics: topics they are on; a story without one is a topic of its own.
        contrasts: what the stories were contrasted with -> stories: ``own text``, ``same topic`` of the bank's corpus, its ``mean``.
        accuracy: share of held-out stories that read higher than their contrast, by a reader from the other topics.
        interval: its 95 % Wilson interval, on the number of topics, since stories on one topic are not independent.
        p: share of sign flips of whole topics (story for contrast) that do as well.
        flips: how many were counted.
        margin: by how much held-out stories read higher than their contrast, on average, in standard deviations of ordinary tokens.
        words: the accuracy of directions of layer 0's output, which sees hardly more than the words; None without contrasts.
        halves: mean cosine of the directions that two halves of the topics give.
        nearest: concepts of the bank and their cosines with it, the largest first, whatever the sign.
        warnings: what is thin, in words.
    """

    concept: str
    layer: int
    stories: int
    topics: int
    contrasts: Mapping[str, int]
    accuracy: float
    interval: tuple[float, float]
    p: float
    flips: int
    margin: float
    words: float | None
    halves: float
    nearest: Sequence[tuple[str, float]]
    warnings: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def numbered(topics: Tensor) -> tuple[Tensor, int]:
    """Topics [n] numbered from 0, and how many there are."""
    found: tuple[Tensor, Tensor] = torch.unique(topics, return_inverse=True)
    return found[1], len(found[0])


def accuracies(rows: Tensor, read: Read, topics: Tensor, signs: Tensor) -> Tensor:
    """The share of rows that the sum of the rows on other topics reads as positive [P], for each of P ways to turn them round.

    Args:
        rows: [n, d], each story less its contrast.
        read: what reads them.
        topics: [n].
        signs: [P, n], 1 or -1.
    """
    agree = rows @ read(rows).T
    others = agree * (topics[:, None] != topics[None, :])
    return ((signs @ others) * signs > 0).double().mean(1)


def flips(topics: Tensor, seed: int = 0) -> Tensor:
    """Signs [P, n] that turn whole topics round, the identity first: all ways if there are few topics, else some drawn.

    To turn all round changes nothing, so the first topic stays as it is.
    """
    index, count = numbered(topics)
    if count <= EXACT:
        patterns = torch.arange(2 ** (count - 1))[:, None] >> torch.arange(count - 1) & 1
    else:
        drawn = torch.randint(2, (FLIPS, count - 1), generator=torch.Generator().manual_seed(seed))
        patterns = torch.cat([torch.zeros_like(drawn[:1]), drawn])
    whole = torch.cat([torch.zeros_like(patterns[:, :1]), patterns], 1)
    return (1 - 2 * whole).double()[:, index]


def margin(rows: Tensor, read: Read, removed: Tensor, topics: Tensor) -> float:
    """The mean of what rows [n, d] are read as by readers from the other topics' rows.

    Those are scaled as a bank's are, so that a step along the direction, the rows' mean without ``removed`` [c, d], reads as long as it is.
    """
    found = rows.new_empty(len(rows))
    index, count = numbered(topics)
    for topic in range(count):
        here = index == topic
        difference = rows[~here].mean(0, keepdim=True)
        reader, direction = read(difference), unit(project_out(difference, removed))[0]
        found[here] = (rows[here] @ reader.T)[:, 0] / (reader * direction).sum()
    return float(found.mean())


def halves(rows: Tensor, topics: Tensor, seed: int = 0) -> float:
    """The mean cosine between the directions of two halves of the topics; NaN for fewer than two topics."""
    index, count = numbered(topics)
    generator, products, found = torch.Generator().manual_seed(seed), rows @ rows.T, []
    for _ in range(HALVES if count > 1 else 0):
        first = torch.randperm(count, generator=generator)[: count // 2]
        a = torch.isin(index, first).double()
        b = 1 - a
        found.append(a @ products @ b / ((a @ products @ a) * (b @ products @ b)).clamp_min(1e-300).sqrt())
    return float(torch.stack(found).mean()) if found else float("nan")


def nearest(direction: Tensor, names: Sequence[str], directions: Tensor, count: int = 5) -> list[tuple[str, float]]:
    """The concepts whose unit ``directions`` [K, d] have the largest cosines with a unit direction [d], whatever the sign."""
    cosines = directions.double() @ direction.double()
    rows = cosines.abs().argsort(descending=True)[:count].tolist()
    return [(names[row], round(float(cosines[row]), 4)) for row in rows]


def judged(
    concept: str,
    layer: int,
    rows: Tensor,
    surface: Tensor | None,
    read: Read,
    removed: Tensor,
    topics: Tensor,
    contrasts: Mapping[str, int],
    deviation: float,
    near: Sequence[tuple[str, float]],
) -> Evidence:
    """The evidence for one concept.

    Args:
        concept: its name.
        layer: the layer that is read.
        rows: [n, d] fp64, each story less its contrast there.
        surface: [n, d], the same after block 0; None where not every story has a contrast of its own.
        read: what reads ``rows``.
        removed: [c, d], the neutral components that the direction is made without.
        topics: [n].
        contrasts: what the stories were contrasted with.
        deviation: of ordinary tokens, as the concept's reader reads them.
        near: its neighbours.
    """
    signs = flips(topics)
    null = accuracies(rows, read, topics, signs)
    accuracy, count = float(null[0]), numbered(topics)[1]
    words = None if surface is None else float(accuracies(surface, lambda same: same, topics, signs[:1])[0])
    found = Evidence(
        concept=concept,
        layer=layer,
        stories=len(rows),
        topics=count,
        contrasts=dict(contrasts),
        accuracy=round(accuracy, 4),
        interval=tuple(round(end, 4) for end in wilson(accuracy * count, count)),  # type: ignore[arg-type]
        p=round(float((null >= accuracy - 1e-12).double().mean()), 5),
        flips=len(signs),
        margin=round(margin(rows, read, removed, topics) / deviation, 4),
        words=None if words is None else round(words, 4),
        halves=round(halves(project_out(rows, removed), topics), 4),
        nearest=tuple(near),
    )
    return Evidence(**{**found.__dict__, "warnings": tuple(thin(found))})


def thin(found: Evidence) -> list[str]:
    """What a reader of the figures should not overlook."""
    said = []
    foreign = sum(count for kind, count in found.contrasts.items() if kind != "own text")
    if foreign:
        said.append(
            f"{foreign} of {found.stories} stories have no contrast of their own and were compared with the bank's corpus: unless the "
            "same writer wrote both, the direction and all figures here are of the writer as well as of the concept"
        )
    if found.topics < ENOUGH_TOPICS:
        said.append(f"only {found.topics} topics, of which accuracy can tell little: its interval is {_interval(found)}")
    if found.interval[0] <= 0.5 or found.p > 0.05:
        said.append(
            f"held-out accuracy {found.accuracy:.2f} ({_interval(found)}, p = {found.p:.3g}) is not clearly above the 0.5 of chance"
        )
    if found.words is not None and found.words >= found.accuracy:
        said.append(f"the words alone (layer 0) do as well: {found.words:.2f} against {found.accuracy:.2f}")
    if not found.halves >= STABLE:
        said.append(f"two halves of the topics give directions with a cosine of {found.halves:.2f} only: more stories would change it")
    if found.nearest and abs(found.nearest[0][1]) >= NEAR:
        said.append(f"it has a cosine of {found.nearest[0][1]:+.2f} with {found.nearest[0][0]}, which may be all that it is")
    return said


def _interval(found: Evidence) -> str:
    return f"{found.interval[0]:.2f} to {found.interval[1]:.2f}"
