"""How ordinary text looks to a bank: what its readers read there, and how long the stream is."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import chain, combinations
from typing import Any

import torch
from torch import Tensor, nn

from emovec.bank_layer import KINDS, BankError, BankLayer, Baseline
from emovec.extraction import ranks
from emovec.extraction.blocks import Blocks
from emovec.extraction.corpus import Source, Turns, dialogues, prompts
from emovec.extraction.progress import Progress
from emovec.extraction.sums import Sums, widened
from emovec.extraction.tokens import GENERATED, PROMPT, UNUSED, Batch, Tokens, batches, dialogue_tokens, prompt_tokens
from emovec.readout import Readout

RANDOM_DIRECTIONS = 128


def calibrate(
    model: nn.Module,
    tokenizer: Any,
    layers: Sequence[BankLayer],
    ordinary: Source,
    neutral: Source,
    *,
    together: Sequence[int] = (),
    batch_tokens: int = 4096,
    progress: Progress | None = None,
) -> tuple[list[BankLayer], Readout | None]:
    """The layers with baselines, residual norm and random null of this model, and the readout of those that are read together.

    Baselines are projections on the layer's readers: ``prompt`` over the words of ordinary prompts, ``turn_start`` over
    their last token before the answer, ``generated`` over the assistant's words in neutral dialogues. ``residual_norm`` is
    the median norm over the words of all of these (never a text's first token, which is the template's). ``random_null``
    are the projections of the ``prompt`` tokens on 128 random unit directions.

    Args:
        model: a decoder of transformers.
        tokenizer: its tokenizer; without a chat template, dialogues are written out plainly.
        layers: layers of a bank; what calibration they have is replaced.
        ordinary: prompts, objects with ``content``.
        neutral: dialogues, objects with ``turns``.
        together: two or more of the layers, whose mean z-score gets a baseline too; or none.
        batch_tokens: tokens in a batch, padding included.
        progress: told of the tokens done.

    Raises:
        CorpusError: naming the line that is wrong.
        BankError: a layer that does not exist, activations that are not finite, or too little text.
    """
    blocks = Blocks(model, [layer.index for layer in layers])
    sums = _ProjectionSums(layers, tuple(together))
    texts = texts_of(tokenizer, prompts(ordinary)(), dialogues(neutral)())
    blocks.over(ranks.share(batches(texts, batch_tokens)), sums, progress)
    sums.over_ranks()
    calibrated = [sums.calibrated(layer) for layer in layers]
    return calibrated, sums.readout(calibrated) if together else None


def texts_of(tokenizer: Any, ordinary: Iterable[Turns], neutral: Iterable[Turns]) -> Iterable[Tokens]:
    """The texts of a calibration: of prompts their words and last token, of dialogues the assistant's words."""
    said = (dialogue_tokens(tokenizer, turns).only(GENERATED) for turns in neutral)
    return chain((prompt_tokens(tokenizer, turns) for turns in ordinary), said)


class _ProjectionSums(Sums):
    """Per layer and kind of position the sums of projections and of their squares; and every used token's norm. Of each two
    layers that are read together also the sums of their projections' products."""

    def __init__(self, layers: Sequence[BankLayer], together: tuple[int, ...]) -> None:
        missing = set(together) - {layer.index for layer in layers}
        if missing:
            raise BankError(f"layers {sorted(missing)} are to be read together with others, but are not among those calibrated")
        generator = torch.Generator().manual_seed(0)
        self._onto: dict[int, Tensor] = {}
        shapes: dict[str, tuple[int, ...]] = {"count": (len(KINDS),)}
        for layer in layers:
            random = torch.randn(RANDOM_DIRECTIONS, layer.width, generator=generator)
            readers = layer.directions if layer.readers is None else layer.readers
            self._onto[layer.index] = torch.cat([readers, random / random.norm(dim=1, keepdim=True)])
            columns = len(self._onto[layer.index])
            shapes |= {f"sum.{layer.index}": (len(KINDS), columns), f"square.{layer.index}": (len(KINDS), columns)}
        concepts = len(layers[0].names)
        self._together = tuple(sorted(together))
        shapes |= {f"product.{one}.{other}": (len(KINDS), concepts) for one, other in combinations(self._together, 2)}
        super().__init__(shapes)
        self._seen: dict[int, Tensor] = {}  # of the batch: the projections at layers that are read together
        self._concepts = concepts
        self._norms: dict[int, list[Tensor]] = {layer.index: [] for layer in layers}
        self._batch: Batch | None = None

    def take(self, batch: Batch) -> None:
        self._batch = batch
        used = batch.kinds[batch.kinds != UNUSED]
        self.at("count", "cpu").add_(torch.bincount(used, minlength=len(KINDS)))

    def see(self, layer: int, hidden: Tensor) -> None:
        assert self._batch is not None
        device = hidden.device
        kinds = self._batch.to(device).kinds
        used = kinds != UNUSED
        rows, kinds = widened(hidden[used]), kinds[used]
        self._onto[layer] = self._onto[layer].to(rows)
        projections = (rows @ self._onto[layer].T).double()
        which = (kinds == torch.arange(len(KINDS), device=device)[:, None]).double()
        self.at(f"sum.{layer}", device).addmm_(which, projections)
        self.at(f"square.{layer}", device).addmm_(which, projections**2)
        if layer in self._together:
            self._seen[layer] = projections[:, : self._concepts]
            for one in self._together[: self._together.index(layer)]:
                self.at(f"product.{one}.{layer}", device).addmm_(which, self._seen[one].to(device) * self._seen[layer])
        self._norms[layer].append(rows.norm(dim=1)[(kinds == PROMPT) | (kinds == GENERATED)].float().cpu())

    def over_ranks(self) -> None:
        super().over_ranks()
        for layer, norms in self._norms.items():
            self._norms[layer] = ranks.gather(torch.cat(norms) if norms else torch.empty(0))

    def calibrated(self, layer: BankLayer) -> BankLayer:
        count = self.at("count")
        sums, squares = self.at(f"sum.{layer.index}").cpu(), self.at(f"square.{layer.index}").cpu()
        for kind, tokens in zip(KINDS, count.tolist(), strict=True):
            if tokens < 2:
                raise BankError(
                    f"{int(tokens)} tokens of kind {kind!r} in the ordinary prompts and neutral dialogues; a baseline needs two at least"
                )
        if not bool(squares.isfinite().all()):
            raise BankError(f"layer {layer.index}: activations are not finite; try bfloat16 or float32")
        mean = sums / count[:, None]
        std = ((squares - mean * sums) / (count[:, None] - 1)).clamp_min(0).sqrt()
        concepts = len(layer.names)
        return replace(
            layer,
            baselines={
                kind: Baseline(mean[row, :concepts].float(), std[row, :concepts].float(), int(count[row])) for row, kind in enumerate(KINDS)
            },
            residual_norm=float(torch.cat(self._norms[layer.index]).median()),
            random_null=Baseline(mean[PROMPT, concepts:].float(), std[PROMPT, concepts:].float(), int(count[PROMPT])),
        )

    def readout(self, layers: Sequence[BankLayer]) -> Readout:
        """The baseline of the mean z-score: its mean is zero, its deviation follows from the layers' correlations."""
        found = {layer.index: layer for layer in layers if layer.index in self._together}
        count = self.at("count")
        baselines = {}
        for row, kind in enumerate(KINDS):
            variance = torch.zeros(self._concepts, dtype=torch.float64)
            for one in self._together:
                for other in self._together:
                    variance += self._correlation(row, found[min(one, other)], found[max(one, other)], kind)
            std = (variance / len(found) ** 2).clamp_min(0).sqrt().float()
            baselines[kind] = Baseline(torch.zeros_like(std), std, int(count[row]))
        return Readout(self._together, baselines)

    def _correlation(self, row: int, one: BankLayer, other: BankLayer, kind: str) -> Tensor:
        """[K]: of two layers' projections on ordinary text of one kind."""
        if one is other:
            return torch.ones(self._concepts, dtype=torch.float64)
        count = self.at("count")[row]
        sums = [self.at(f"sum.{layer.index}").cpu()[row, : self._concepts] for layer in (one, other)]
        covariance = (self.at(f"product.{one.index}.{other.index}").cpu()[row] - sums[0] * sums[1] / count) / (count - 1)
        return covariance / (one.baselines[kind].std.double() * other.baselines[kind].std.double())
