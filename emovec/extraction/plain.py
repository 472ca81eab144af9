"""What a recipe wants to know of text without labels: how neutral dialogues vary, and the mean of ordinary prompts."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from emovec.extraction import ranks
from emovec.extraction.blocks import Blocks
from emovec.extraction.plan import Texts
from emovec.extraction.progress import Progress
from emovec.extraction.recipe import Recipe
from emovec.extraction.sums import Mean, NeutralMoments
from emovec.extraction.tokens import batches


class Plain:
    """Its sums, none where the recipe does without.

    Args:
        recipe: denoises by the neutral dialogues, levels by the ordinary prompts.
        width: d.
        layers: the layers there will be.
        about: layer -> [d], near the mean of any text.
    """

    def __init__(self, recipe: Recipe, width: int, layers: tuple[int, ...], about: Mapping[int, Tensor]) -> None:
        dialogues = recipe.denoise == "dialogues"
        self._neutral = NeutralMoments(width, layers, about, dialogues=dialogues) if recipe.denoise else None
        self._ordinary = Mean(width, layers, about) if recipe.levels else None

    @property
    def bytes(self) -> int:
        return sum(sums.bytes for sums in (self._neutral, self._ordinary) if sums is not None)

    def over(self, blocks: Blocks, texts: Texts, batch_tokens: int, progress: Progress) -> Plain:
        """The same after the passes over ``texts``; in a group of processes each does its share and gets the whole."""
        for sums, stream in ((self._neutral, texts.neutral()), (self._ordinary, texts.words())):
            if sums is not None:
                blocks.over(ranks.share(batches(stream, batch_tokens)), sums, progress)
                sums.over_ranks()
        return self

    def neutral(self, layer: int) -> Tensor | None:
        """The covariance [d, d] of neutral text."""
        return None if self._neutral is None else self._neutral.covariance(layer)

    def ordinary(self, layer: int) -> Tensor | None:
        """The mean [d] of ordinary prompts' words."""
        return None if self._ordinary is None else self._ordinary.mean(layer)
