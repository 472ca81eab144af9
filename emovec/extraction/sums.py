"""Running sums over texts, in fp64 and where the layers are. Their size does not depend on the number of texts.

Within a batch products are taken in fp32 (fp64 if the model is in it), which rounds less than the model does; between batches
in fp64, since many are added up.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from emovec.extraction import ranks
from emovec.extraction.tokens import UNUSED, Batch


class Sums:
    """fp64 tensors by key, made when first used and on the device where they are used.

    Args:
        shapes: key -> shape, for all keys there can be.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self._shapes = dict(shapes)
        self.tensors: dict[str, Tensor] = {}

    def at(self, key: str, device: torch.device | str | None = None) -> Tensor:
        """The tensor at ``key``, to be changed in place; on ``device`` if one is given."""
        found = self.tensors.get(key)
        if found is None:
            found = torch.zeros(self._shapes[key], dtype=torch.float64, device=device)
        elif device is not None:
            found = found.to(device)
        self.tensors[key] = found
        return found

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = {key: tensors[key].clone() for key in self._shapes if key in tensors}

    def over_ranks(self) -> None:
        """Put the sum over all ranks in place of each rank's own."""
        for key in sorted(self._shapes):
            self.tensors[key] = ranks.add(self.at(key))

    @property
    def bytes(self) -> int:
        return sum(8 * torch.Size(shape).numel() for shape in self._shapes.values())


class StoryMoments(Sums):
    """Per layer the sum of the stories' means by concept, and the scatter of those means about zero.

    A story counts by the mean of its used tokens, however long it is.

    Args:
        concepts: K.
        width: d.
        layers: the layers there will be.
        scatter: whether to keep the scatter [d, d].
    """

    def __init__(self, concepts: int, width: int, layers: tuple[int, ...], *, scatter: bool) -> None:
        shapes: dict[str, tuple[int, ...]] = {"count": (concepts,)}
        shapes |= {f"sum.{layer}": (concepts, width) for layer in layers}
        shapes |= {f"scatter.{layer}": (width, width) for layer in layers if scatter}
        super().__init__(shapes)
        self.scatter = scatter
        self._batch: Batch | None = None

    def take(self, batch: Batch) -> None:
        """Count the stories of the batch whose layers will be shown next."""
        self._batch = batch
        self.at("count", "cpu").index_add_(0, batch.labels, torch.ones(len(batch.labels), dtype=torch.float64))

    def see(self, layer: int, hidden: Tensor) -> None:
        """Add one layer's output [B, T, d] of the batch taken last."""
        assert self._batch is not None
        batch = self._batch.to(hidden.device)
        means = story_means(hidden, batch)
        sums = self.at(f"sum.{layer}", hidden.device)
        # a product rather than index_add_, which adds in no fixed order on a GPU
        chosen = batch.labels == torch.arange(sums.shape[0], device=hidden.device)[:, None]
        sums.addmm_(chosen.double(), means)
        if self.scatter:
            self.at(f"scatter.{layer}", hidden.device).addmm_(means.T, means)


def widened(hidden: Tensor) -> Tensor:
    """``hidden`` in fp32, or in fp64 if it is."""
    return hidden.to(torch.promote_types(hidden.dtype, torch.float32))


def story_means(hidden: Tensor, batch: Batch) -> Tensor:
    """The mean over each text's used tokens of ``hidden`` [B, T, d], as [B, d] in fp64."""
    used, rows = batch.kinds != UNUSED, widened(hidden)
    return (used[:, None].to(rows) @ rows)[:, 0].double() / used.sum(1, keepdim=True)


class Mean(Sums):
    """Per layer the sum [d] of texts' tokens.

    Args:
        width: d.
        layers: the layers there will be.
        about: layer -> [d], near the texts' mean; taken away first, since the stream's huge constant part would drown the rest.
        dialogues: whether a text counts by its mean, rather than each of its tokens.
    """

    def __init__(self, width: int, layers: tuple[int, ...], about: Mapping[int, Tensor], *, dialogues: bool = False) -> None:
        super().__init__({"count": (1,), **{f"sum.{layer}": (width,) for layer in layers}})
        self._about, self._dialogues = about, dialogues
        self._batch: Batch | None = None

    def take(self, batch: Batch) -> None:
        self._batch = batch
        self.at("count", "cpu").add_(len(batch.labels) if self._dialogues else int((batch.kinds != UNUSED).sum()))

    def see(self, layer: int, hidden: Tensor) -> None:
        assert self._batch is not None
        batch = self._batch.to(hidden.device)
        rows = story_means(hidden, batch) if self._dialogues else widened(hidden[batch.kinds != UNUSED])
        self.add(layer, rows - self._about[layer].to(rows))

    def add(self, layer: int, rows: Tensor) -> None:
        """Add tokens or texts [n, d] of one layer."""
        self.at(f"sum.{layer}", rows.device).add_(rows.sum(0, dtype=torch.float64))

    def mean(self, layer: int) -> Tensor:
        """[d]."""
        total = self.at(f"sum.{layer}")
        return self._about[layer].to(total) + total / float(self.at("count"))


class NeutralMoments(Mean):
    """And per layer their scatter [d, d], of neutral text; the arguments are those of :class:`Mean`."""

    def __init__(self, width: int, layers: tuple[int, ...], about: Mapping[int, Tensor], *, dialogues: bool) -> None:
        super().__init__(width, layers, about, dialogues=dialogues)
        self._shapes |= {f"scatter.{layer}": (width, width) for layer in layers}

    def add(self, layer: int, rows: Tensor) -> None:
        super().add(layer, rows)
        self.at(f"scatter.{layer}", rows.device).add_(rows.T @ rows)

    def covariance(self, layer: int) -> Tensor:
        """[d, d]."""
        count, total = float(self.at("count")), self.at(f"sum.{layer}")
        return (self.at(f"scatter.{layer}") - total[:, None] * total / count) / max(count - 1, 1)
