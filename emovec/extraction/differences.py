"""How stories differ from their contrasts: the running sums of new concepts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from emovec.extraction.corpus import Story
from emovec.extraction.sums import Sums, story_means
from emovec.extraction.tokens import Batch


class Differences(Sums):
    """Per layer and concept the mean difference of stories and contrasts, and each story's at two layers.

    Memory grows with the number of new stories by those rows alone.
    """

    def __init__(self, stories: Sequence[Story], names: Sequence[str], width: int, layers: Sequence[int], kept: Sequence[int]) -> None:
        self.layers = tuple(layers)
        super().__init__({f"sum.{layer}": (len(names), width) for layer in layers})
        index = torch.tensor([names.index(story.emotion) for story in stories])
        member = torch.nn.functional.one_hot(index, len(names)).double()
        self._weights = (member / member.sum(0)).T
        self.rows = {layer: torch.zeros(len(stories), width, dtype=torch.float64) for layer in kept}
        self._centres = {layer: torch.zeros(width, dtype=torch.float64) for layer in layers}
        self._stories = len(stories)
        self._batch: Batch | None = None
        for layer in layers:  # now, since what is made in inference mode cannot be changed outside it
            self.at(f"sum.{layer}", "cpu")

    def take(self, batch: Batch) -> None:
        self._batch = batch

    def see(self, layer: int, hidden: Tensor) -> None:
        assert self._batch is not None
        means, labels = story_means(hidden, self._batch.to(hidden.device)).cpu(), self._batch.labels
        contrast = labels < 0
        rows, signed = torch.where(contrast, ~labels, labels), torch.where(contrast[:, None], -means, means)
        self.at(f"sum.{layer}", "cpu").addmm_(self._weights[:, rows], signed)
        self._centres[layer] += means[~contrast].sum(0) / self._stories
        if layer in self.rows:
            self.rows[layer].index_add_(0, rows, signed)

    def less(self, references: Mapping[int, Tensor]) -> None:
        """Take away what stories without a contrast are compared with: layer -> [n, d]."""
        for layer, rows in references.items():
            self.at(f"sum.{layer}", "cpu").sub_(self._weights @ rows)
            if layer in self.rows:
                self.rows[layer] -= rows

    def centre(self, layer: int) -> Tensor:
        """The mean of the stories [d]."""
        return self._centres[layer]
