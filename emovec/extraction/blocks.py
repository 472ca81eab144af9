"""One forward pass without the head, its decoder blocks' outputs shown one after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from emovec.bank_layer import BankError
from emovec.extraction.progress import Progress
from emovec.extraction.tokens import Batch
from emovec.models import decoder_path, unwrapped

See = Callable[[int, Tensor], None]
"""Is given a layer's index and its output [B, T, d]."""


class _Sums(Protocol):
    def take(self, batch: Batch) -> None: ...

    def see(self, layer: int, hidden: Tensor) -> None: ...


class Blocks:
    """The decoder of a model: runs batches, and shows the outputs of ``layers`` (all by default)."""

    def __init__(self, model: nn.Module, layers: Sequence[int] | None = None) -> None:
        owners, blocks = decoder_path(unwrapped(model))
        self._decoder = owners[-1]
        self._blocks = blocks
        self.layers = tuple(range(len(blocks))) if layers is None else tuple(sorted(set(layers)))
        for layer in self.layers:
            if not 0 <= layer < len(blocks):
                raise BankError(f"layer {layer} does not exist in a model of {len(blocks)} layers, 0 to {len(blocks) - 1}")
        if not self.layers:
            raise BankError("no layers to extract from")
        if model.training:
            raise ValueError("the model is in training mode, where dropout changes what it computes; call model.eval() first")
        # a weight that is offloaded has no device, and the hooks that fetch it move its inputs too
        self.device = next((value.device for value in model.parameters() if value.device.type != "meta"), torch.device("cpu"))
        self.max_tokens: int | None = getattr(getattr(self._decoder, "config", None), "max_position_embeddings", None)

    @torch.inference_mode()
    def run(self, batch: Batch) -> None:
        """One forward pass. The head is not computed, and nothing is cached."""
        here = batch.to(self.device)
        self._decoder(input_ids=here.ids, attention_mask=here.mask, use_cache=False)

    def over(self, stream: Iterable[Batch], sums: _Sums, progress: Progress | None = None) -> None:
        """Run every batch of ``stream`` and show it to ``sums``."""
        with self.shown_to(sums.see):
            for batch in stream:
                sums.take(batch)
                self.run(batch)
                if progress is not None:
                    progress.advance(batch.tokens)

    @contextmanager
    def shown_to(self, see: See) -> Iterator[None]:
        """Inside, ``see`` gets the output of each of ``layers`` in every pass."""
        handles = []
        try:
            for layer in self.layers:
                handles.append(self._blocks[layer].register_forward_hook(_hook(layer, see)))
            yield
        finally:
            for handle in handles:
                handle.remove()


def _hook(layer: int, see: See) -> Callable[..., None]:
    def hook(module: nn.Module, args: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        if not isinstance(hidden, Tensor) or hidden.dim() != 3:
            raise TypeError(
                f"the output of layer {layer}, a {type(module).__name__}, is not a tensor [B, T, d] but {type(hidden).__name__}"
            )
        see(layer, hidden)

    return hook
