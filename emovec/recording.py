"""What a probe has read: the scores of every forward pass, put together sequence by sequence when asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from emovec.bank import Bank, BankLayer
from emovec.monitor import Reading
from emovec.tracking import Span


@dataclass(frozen=True)
class Rescale:
    """``score * gain + offset``, both [K] fp32: from the baseline of prompts, which the op scores with, to that of generated tokens."""

    gain: Tensor
    offset: Tensor

    @classmethod
    def of(cls, layer: BankLayer) -> Rescale | None:
        """None where the two baselines are one. A concept without the baseline of its kind keeps its score."""
        if not layer.baselines:
            return None
        prompt, generated = layer.baseline("prompt"), layer.baseline("generated")
        if prompt == generated:
            return None
        mean, std = prompt.mean.double().nan_to_num(0.0), prompt.std.double().nan_to_num(1.0)
        known = ~generated.mean.isnan()
        gain = torch.where(known, std / generated.std.double(), 1.0)
        offset = torch.where(known, (mean - generated.mean.double()) / generated.std.double(), 0.0)
        return cls(gain.float(), offset.float())

    def __call__(self, scores: Tensor) -> Tensor:
        return torch.addcmul(self.offset.to(scores.device), scores, self.gain.to(scores.device))


@dataclass(frozen=True)
class _Pass:
    """One forward pass: its span, and its scores [batch, width, K] at each layer."""

    span: Span
    scores: Mapping[int, Tensor]

    def first(self, width: int) -> _Pass:
        """The pass as if it had ended after ``width`` columns."""
        span, cut = self.span, slice(None, width)
        ids, real = (None if tensor is None else tensor[:, cut] for tensor in (span.ids, span.real))
        kept = replace(span, width=width, prompt=min(span.prompt, width), ids=ids, real=real)
        return _Pass(kept, {layer: scores[:, cut] for layer, scores in self.scores.items()})


class Recording:
    """The scores of the latest batch of sequences.

    Args:
        bank: names the scores.
        layers: the layers to keep.
        tokenizer: for the readings' text.
    """

    def __init__(self, bank: Bank, layers: tuple[int, ...], tokenizer: Any = None) -> None:
        self.layers = layers
        self._bank, self._tokenizer = bank, tokenizer
        self._rescale = {layer: Rescale.of(bank[layer]) for layer in layers}
        self._passes: list[_Pass] = []

    def add(self, span: Span, scores: Mapping[int, Tensor]) -> None:
        """Keep a forward pass whose ``scores`` [batch * width, K] are in buffers that the next one overwrites."""
        if span.fresh:
            self._passes = []
        # what is run again (no cache), or was cropped from the cache, takes the place of what was there
        self._passes = [
            known if known.span.start + known.span.width <= span.start else known.first(span.start - known.span.start)
            for known in self._passes
            if known.span.start < span.start
        ]
        ids, real = (None if tensor is None else tensor.clone() for tensor in (span.ids, span.real))
        kept: dict[int, Tensor] = {}
        shape = (span.batch, span.width, len(self._bank.names))
        for device in {scores[layer].device for layer in self.layers}:
            layers = [layer for layer in self.layers if scores[layer].device == device]
            copies = torch.stack([scores[layer].narrow(0, 0, span.tokens) for layer in layers])  # one kernel for all layers
            kept |= zip(layers, (copy.view(shape) for copy in copies.unbind()), strict=True)
        self._passes.append(_Pass(replace(span, ids=ids, real=real), kept))

    def __len__(self) -> int:
        return self._passes[-1].span.batch if self._passes else 0

    def reading(self, sequence: int) -> Reading:
        """The reading of one sequence, without its padding."""
        spans = [kept.span for kept in self._passes]
        scores = {layer: self._gather(layer, sequence) for layer in self.layers}
        real = [torch.ones(span.width, dtype=torch.bool) if span.real is None else span.real[sequence].cpu() for span in spans]
        kinds = [kind for span in spans for kind in ["prompt"] * span.prompt + ["generated"] * (span.width - span.prompt)]
        chosen = torch.cat(real).nonzero().squeeze(-1)
        ids = None
        if all(span.ids is not None for span in spans):
            ids = torch.cat([span.ids[sequence] for span in spans if span.ids is not None])
            ids = ids[chosen.to(ids.device)]
        start = spans[0].start
        read_layer = self._bank.read_layer if self._bank.read_layer in self.layers else None
        scores = {layer: values[chosen.to(values.device)] for layer, values in scores.items()}
        kinds = [kinds[column] for column in chosen.tolist()]
        return Reading(
            scores,
            self._bank.names,
            kinds,
            ids,
            read_layer,
            self._tokenizer,
            self._bank.families,
            together=self._together(scores, kinds),
            calibrated=all(bool(self._bank[layer].baselines) for layer in self.layers),
            positions=range(start, start + len(chosen)),
        )

    def _together(self, scores: Mapping[int, Tensor], kinds: Sequence[str]) -> tuple[tuple[int, ...], Tensor] | None:
        """The scores from the layers that the bank reads together, if all of them were read."""
        readout = self._bank.readout
        if readout is None or not set(readout.layers) <= set(self.layers):
            return None
        prompt, generated = (readout.combine(scores, kind) for kind in ("prompt", "generated"))
        is_prompt = torch.tensor([kind == "prompt" for kind in kinds], device=prompt.device)
        return readout.layers, torch.where(is_prompt[:, None], prompt, generated)

    def _gather(self, layer: int, sequence: int) -> Tensor:
        """[columns, K]: the scores of one sequence, each in units of its own kind's baseline."""
        rescale = self._rescale[layer]
        parts = []
        for kept in self._passes:
            scores = kept.scores[layer][sequence]
            if rescale is not None and kept.span.prompt < kept.span.width:
                scores = torch.cat([scores[: kept.span.prompt], rescale(scores[kept.span.prompt :])])
            parts.append(scores)
        return torch.cat(parts)
