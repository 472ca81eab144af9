"""From sums to directions and readers: plain linear algebra on what the pass over the stories has left."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from functools import partial
from typing import Any

import torch
from torch import Tensor

from emovec.bank_layer import BankError

FORMATS = ("raw", "chat")
DENOISE = ("tokens", "dialogues", None)
READERS = ("whitened", None)
Whiten = Callable[[Tensor, Tensor], Tensor]
"""From rows and directions [K, d] to readers [K, d]."""
_LEFT = 1e-6  # a smaller share of a direction is rounding


@dataclass(frozen=True)
class Recipe:
    """What is done to the stories.

    Attributes:
        skip: tokens of each story left out at its start, before the feeling has shown.
        skip_share: but no more than this share of a story, so that short texts can go along with long ones. 1: stories that are
            no longer than ``skip`` are left out.
        format: "raw", the story's text alone, or "chat", the story as a user's message in the model's chat template.
        denoise: principal components of neutral dialogues are projected out of the directions: of their "tokens", of their
            "dialogues" (each dialogue's mean), or None.
        variance: share of the neutral variance that the components reach.
        readers: "whitened" (differences of means times the inverse covariance of stories of one emotion) or None (the directions).
        shrinkage: of that covariance toward its diagonal, between 0 and 1.
        level: whitened readers are blind to what the stories of all emotions have in common as against ordinary prompts: being moved
            at all, being a story. Otherwise that reads as some emotions more than others, whatever the emotion is.
    """

    skip: int = 50
    skip_share: float = 1.0
    format: str = "raw"
    denoise: str | None = "tokens"
    variance: float = 0.5
    readers: str | None = "whitened"
    shrinkage: float = 0.5
    level: bool = True

    def __post_init__(self) -> None:
        for name, known in (("format", FORMATS), ("denoise", DENOISE), ("readers", READERS)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(map(repr, known))}, got {getattr(self, name)!r}")
        if not isinstance(self.skip, int) or self.skip < 0:
            raise ValueError(f"skip must be a number of tokens, got {self.skip!r}")
        if not isinstance(self.level, bool):
            raise ValueError(f"level must be true or false, got {self.level!r}")
        for name in ("skip_share", "variance", "shrinkage"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name} must be above 0 and at most 1, got {getattr(self, name)!r}")

    @property
    def levels(self) -> bool:
        """Whether there is something to level: directions that are read with are left as they are."""
        return self.level and self.readers == "whitened"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def recorded(cls, meta: Mapping[str, Any]) -> Recipe | None:
        """The recipe in a bank's header, whatever else that says of it; None if there is none."""
        said = meta.get("recipe")
        known = {field.name for field in fields(cls)}
        if not isinstance(said, Mapping) or not known & said.keys():
            return None
        return cls(**{name: value for name, value in said.items() if name in known})


@dataclass(frozen=True)
class Derived:
    """What a layer's sums come to, in fp64.

    Attributes:
        directions: [K, d], unit rows.
        readers: [K, d], or None where readers are the directions.
        raw_norm: [K], the directions' lengths before they were made unit.
        grand_mean: [d], the mean of the concepts' means.
        components: number of neutral components projected out.
    """

    directions: Tensor
    readers: Tensor | None
    raw_norm: Tensor
    grand_mean: Tensor
    components: int


def derive(
    recipe: Recipe,
    sums: Tensor,
    count: Tensor,
    scatter: Tensor | None = None,
    neutral: Tensor | None = None,
    ordinary: Tensor | None = None,
) -> Derived:
    """Directions and readers of one layer.

    Args:
        recipe: what to do.
        sums: [K, d], each concept's sum of story means.
        count: [K], its stories.
        scatter: [d, d], the story means' sum of outer products; needed for whitened readers.
        neutral: [d, d], the covariance of neutral text; needed to denoise.
        ordinary: [d], the mean of ordinary prompts' words; needed to level.

    Raises:
        BankError: sums are not finite, or nothing is left of a direction.
    """
    rows, grand = contrast(sums, count)
    if not bool(rows.isfinite().all()):
        raise BankError("activations are not finite; try bfloat16 or float32")
    removed = rows[:0]
    if recipe.denoise:
        assert neutral is not None
        removed = leading(neutral, recipe.variance)
    left = project_out(rows, removed)
    directions, norm = unit(left)
    if not bool((norm > _LEFT * rows.norm(dim=1)).all()):
        raise BankError(f"nothing is left of a direction after {len(removed)} of {len(grand)} neutral components are projected out")
    readers = None
    if recipe.readers == "whitened":
        assert scatter is not None
        readers = whitening(recipe, within(scatter, sums, count), grand, ordinary)(rows, directions)
    return Derived(directions, readers, norm, grand, len(removed))


def contrast(sums: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """Each concept's mean minus the mean of all concepts' means, and the latter: [K, d] and [d], from sums [K, d] and counts [K]."""
    means = sums / count[:, None].to(sums)
    grand = means.mean(0)
    return means - grand, grand


def within(scatter: Tensor, sums: Tensor, count: Tensor) -> Tensor:
    """The covariance [d, d] of stories about the mean of their concept."""
    count = count.to(sums)
    inside: Tensor = scatter - (sums / count[:, None]).T @ sums
    return inside / (count.sum() - len(count))


def leading(covariance: Tensor, variance: float) -> Tensor:
    """The fewest leading eigenvectors [c, d] of ``covariance`` [d, d] that reach this share of its trace."""
    values, vectors = torch.linalg.eigh(covariance)
    share = values.clamp_min(0).flip(0).cumsum(0) / values.clamp_min(0).sum()
    count = int((share < variance * (1 - 1e-12)).sum()) + 1
    components: Tensor = vectors.flip(1)[:, :count].T
    return components


def project_out(rows: Tensor, components: Tensor) -> Tensor:
    """``rows`` [K, d] without their parts along orthonormal ``components`` [c, d]."""
    return rows - (rows @ components.T) @ components


def unit(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of length one, and the lengths they had."""
    norm = rows.norm(dim=1)
    return rows / norm[:, None], norm


def whitening(recipe: Recipe, covariance: Tensor, grand: Tensor, ordinary: Tensor | None) -> Whiten:
    """How a recipe whitens.

    Args:
        recipe: what to do.
        covariance: [d, d], of stories about the mean of their concept.
        grand: [d], the stories' grand mean.
        ordinary: [d], the mean of ordinary prompts' words; needed to level.
    """
    common = None
    if recipe.levels:
        assert ordinary is not None
        common = grand - ordinary.to(grand)
    return partial(whiten, covariance=covariance, shrinkage=recipe.shrinkage, common=common)


def whiten(rows: Tensor, directions: Tensor, covariance: Tensor, shrinkage: float, common: Tensor | None = None) -> Tensor:
    """Readers ``r_k`` [K, d]: ``rows`` [K, d] times the inverse of the shrunk covariance, scaled so that ``<r_k, v_k> = 1``.

    A step along the direction ``v_k`` then moves what ``r_k`` reads by the step's length, as it does where readers are the
    directions. The covariance [d, d] is shrunk toward its diagonal, since a few dimensions vary a hundred times as much as the
    others: toward a multiple of the identity, those would be taken for the others' noise. The readers are blind to ``common`` [d]:
    they are what they would be if the stories varied along it without bound.
    """
    shrunk = torch.lerp(covariance, covariance.diagonal().diag(), shrinkage)
    found: Tensor = torch.linalg.solve(shrunk, rows.T).T
    if common is not None and bool(common.any()):
        away = torch.linalg.solve(shrunk, common)
        found = found - torch.outer(found @ common, away) / (common @ away)
    along = (found * directions).sum(1, keepdim=True)
    if not bool((along.abs() > _LEFT * found.norm(dim=1, keepdim=True)).all()):
        raise BankError("nothing is left of a reader without what all stories have in common as against ordinary prompts")
    return found / along
