"""From the differences of single prompts to shifts with intervals, and what chance alone would do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

CHUNK = 500  # permutations at a time


@dataclass(frozen=True)
class Estimate:
    """A mean over prompts and the ends of its interval."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Shift:
    """How far one concept (or family, or axis) is higher in B than in A.

    Attributes:
        name: the concept.
        mean, low, high: over all prompts, with the ends of the interval.
        p: of sign flips of whole prompts against the largest of all concepts: how often chance alone would move any of them
            as consistently. Small for nearly everything in a model that was trained on anything.
        random: the share of random directions that moved at least as far; None where they were not read.
        neutral, challenging: over these prompts alone; None without challenging prompts.
        difference: challenging less neutral.
    """

    name: str
    mean: float
    low: float
    high: float
    p: float
    random: float | None = None
    neutral: Estimate | None = None
    challenging: Estimate | None = None
    difference: Estimate | None = None

    def __str__(self) -> str:
        return f"{self.name} {self.mean:+.3f} ({self.low:+.3f} to {self.high:+.3f})"


@dataclass(frozen=True)
class Design:
    """How intervals and nulls are made.

    Args:
        challenging: [n] bool, which prompts are.
        resamples: of the bootstrap, and sign flips.
        confidence: of the intervals.
        seed: of both.
    """

    challenging: Tensor
    resamples: int
    confidence: float
    seed: int

    def groups(self) -> list[Tensor]:
        """The rows of the neutral and of the challenging prompts; without challenging ones, the first alone."""
        both = (~self.challenging).nonzero().squeeze(-1), self.challenging.nonzero().squeeze(-1)
        return [rows for rows in both if len(rows)]


def shifts(names: Sequence[str], differences: Tensor, design: Design, random: Tensor | None = None) -> dict[str, Shift]:
    """The shift of each column.

    Args:
        names: C of them.
        differences: [n, C] fp64, B less A on the same prompt.
        design: of the intervals and nulls.
        random: [R], the shifts of random directions.
    """
    groups = [differences[rows] for rows in design.groups()]
    boots = _bootstrap(groups, design)
    share = [len(group) / len(differences) for group in groups]
    whole = sum((part * boot for part, boot in zip(share, boots, strict=True)), torch.zeros_like(boots[0]))
    columns = [_estimates(differences.mean(0), whole, design.confidence)]
    if len(groups) == 2:
        means = [group.mean(0) for group in groups]
        pairs = [*zip(means, boots, strict=True), (means[1] - means[0], boots[1] - boots[0])]
        columns += [_estimates(mean, boot, design.confidence) for mean, boot in pairs]
    chance = sign_flips(differences, design.resamples, design.seed).tolist()
    found = {}
    for index, name in enumerate(names):
        mine = columns[0][index]
        beside = None
        if random is not None:
            beside = (1 + int((random.abs() >= abs(mine.mean)).sum())) / (1 + len(random))
        parts = dict(zip(("neutral", "challenging", "difference"), (column[index] for column in columns[1:]), strict=False))
        found[name] = Shift(name, mine.mean, mine.low, mine.high, chance[index], beside, **parts)
    return found


def sign_flips(differences: Tensor, permutations: int, seed: int) -> Tensor:
    """[C]: p values of a permutation of signs, one sign for all columns of a row, against the largest column.

    Under the null that A and B could change places on every prompt, the signs of a row are a coin's. The statistic is
    ``|sum(d)| / sqrt(sum(d^2))``, which ranks as Student's t does. Comparing each column with the largest of all in each
    permutation keeps the chance of any false finding, whatever the columns' correlation (Westfall and Young 1993).
    """
    generator = torch.Generator().manual_seed(seed)
    size = differences.square().sum(0).sqrt()
    unit = torch.where(size > 0, differences / size.clamp_min(1e-300), 0.0)
    observed = unit.sum(0).abs()
    above = torch.zeros_like(observed)
    for start in range(0, permutations, CHUNK):
        count = min(CHUNK, permutations - start)
        signs = torch.randint(0, 2, (count, len(differences)), generator=generator).double() * 2 - 1
        largest = (signs @ unit).abs().amax(1)
        above += (largest[:, None] >= observed - 1e-9).sum(0)
    return (1 + above) / (1 + permutations)


def axes(valence: Tensor, arousal: Tensor) -> Tensor:
    """[2, K]: what a row of K values is multiplied by to give its least-squares slopes on valence and on arousal, fitted together.

    Raises:
        ValueError: ratings that do not tell the two apart.
    """
    ratings = torch.stack([torch.ones_like(valence), valence, arousal], 1).double()
    if len(ratings) < 3 or int(torch.linalg.matrix_rank(ratings)) < 3:
        raise ValueError("the ratings of these concepts do not tell valence from arousal")
    slopes: Tensor = torch.linalg.pinv(ratings)[1:]
    return slopes


def _bootstrap(groups: Sequence[Tensor], design: Design) -> list[Tensor]:
    """For each group [resamples, C]: means of prompts drawn from it with replacement."""
    generator = torch.Generator().manual_seed(design.seed)
    found = []
    for group in groups:
        drawn = torch.randint(0, len(group), (design.resamples, len(group)), generator=generator)
        counts = torch.zeros(design.resamples, len(group), dtype=torch.float64)
        counts.scatter_add_(1, drawn, torch.ones_like(counts))
        found.append(counts @ group / len(group))
    return found


def _estimates(means: Tensor, boots: Tensor, confidence: float) -> list[Estimate]:
    tail = (1 - confidence) / 2
    low, high = (torch.quantile(boots, end, dim=0).tolist() for end in (tail, 1 - tail))
    return [Estimate(*values) for values in zip(means.tolist(), low, high, strict=True)]
