"""Scores on their way from the worker's buffers to a reading: calibrated, cut into chunks, put together again.

A chunk holds the scores of consecutive tokens of one request from one forward pass. What is computed again after a preemption
comes again, so chunks are put together by position.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from emovec.bank import Bank
from emovec.monitor import Reading
from emovec.recording import Rescale

SCOPES = ("generated", "prompt", "all")


@dataclass(frozen=True)
class Wanted:
    """What a request wants to know. on: of which tokens. concepts: by row in the bank; None for all of them."""

    on: str = "generated"
    concepts: tuple[int, ...] | None = None

    @classmethod
    def of(cls, admitted: Mapping[str, Any]) -> Wanted:
        """From what an admitted request says of scores."""
        return cls(admitted["on"], None if admitted["concepts"] is None else tuple(admitted["concepts"]))

    def span(self, start: int, count: int, prompt: int) -> tuple[int, int]:
        """Which of the tokens at positions ``start`` to ``start + count`` are wanted, as offsets, where ``prompt`` are prompt."""
        split = min(max(prompt - start, 0), count)
        return (0 if self.on != "generated" else split, count if self.on != "prompt" else split)


@dataclass(frozen=True)
class Chunk:
    """Scores [T, C] fp32 of the tokens from position ``start`` on."""

    start: int
    values: Any

    def packed(self) -> list[Any]:
        return [self.start, *self.values.shape, self.values.astype("<f4").tobytes()]

    @classmethod
    def unpacked(cls, packed: Sequence[Any]) -> Chunk:
        start, tokens, concepts, data = packed
        return cls(start, np.frombuffer(data, "<f4").reshape(tokens, concepts))


class Scorer:
    """From what the op wrote to the scores of a reading: each token in units of its own kind, layers that are read together as one.

    Args:
        bank: the bank.
        layers: those that are read, in the order of the op's scores.
    """

    def __init__(self, bank: Bank, layers: Sequence[int]) -> None:
        self._layers = tuple(layers)
        self._rescale = {layer: Rescale.of(bank[layer]) for layer in layers}
        self._readout = bank.readout if bank.readout is not None and set(bank.readout.layers) <= set(layers) else None
        self._layer = bank.read_layer if bank.read_layer in layers else self._layers[-1]
        self.together = (self._layer,) if self._readout is None else self._readout.layers

    def __call__(self, raw: Tensor, prompt: Tensor) -> Tensor:
        """[T, K] from the op's scores [layers, T, K], where ``prompt`` [T] tells which tokens are of a prompt."""
        if not prompt.any():
            return self._of(raw, "generated")
        if prompt.all():
            return self._of(raw, "prompt")
        return torch.where(prompt[:, None], self._of(raw, "prompt"), self._of(raw, "generated"))

    def _of(self, raw: Tensor, kind: str) -> Tensor:
        scores = dict(zip(self._layers, raw, strict=True))
        if kind == "generated":
            scores = {layer: values if (scale := self._rescale[layer]) is None else scale(values) for layer, values in scores.items()}
        return scores[self._layer] if self._readout is None else self._readout.combine(scores, kind)


class Collector:
    """The scores of one sequence, in the front end.

    Args:
        bank: names them.
        layers: the layer or layers that each of them comes from.
        wanted: what was asked for.
        prompt: how many tokens the prompt has.
        ids: the prompt's token ids, or None if it came as embeddings.
        tokenizer: for the text of readings.
    """

    def __init__(
        self, bank: Bank, layers: Sequence[int], wanted: Wanted, prompt: int, ids: Sequence[int] | None, tokenizer: Any = None
    ) -> None:
        self.bank, self._layers, self._prompt, self._ids, self._tokenizer = bank, tuple(layers), prompt, ids, tokenizer
        concepts = range(len(bank.names)) if wanted.concepts is None else wanted.concepts
        self.names = tuple(bank.names[row] for row in concepts)
        self._rows: dict[int, Any] = {}
        self.events: list[dict[str, Any]] = []  # what a guard did
        self.shown = True  # whether there is to be a reading

    def add(self, chunks: Iterable[Sequence[Any]]) -> int:
        """Take chunks in; how many tokens are new."""
        before = len(self._rows)
        for chunk in map(Chunk.unpacked, chunks):
            self._rows.update(zip(range(chunk.start, chunk.start + len(chunk.values)), chunk.values, strict=True))
        return len(self._rows) - before

    def reading(self, generated: Sequence[int]) -> Reading:
        """The scores so far, where ``generated`` are the ids of the tokens that were written."""
        positions = sorted(position for position in self._rows if position < self._prompt + len(generated))
        first = positions[0] if positions else self._prompt
        if positions != list(range(first, first + len(positions))):
            raise RuntimeError(f"scores are missing between positions {first} and {positions[-1]}")
        rows = [self._rows[position] for position in positions]
        values = torch.from_numpy(np.stack(rows)) if rows else torch.empty(0, len(self.names))
        tokens = None
        if self._ids is not None:
            tokens = torch.tensor([*self._ids, *generated])[first : first + len(positions)]
        one = len(self._layers) == 1
        return Reading(
            {self._layers[0]: values} if one else {},
            self.names,
            [self.kind(position) for position in positions],
            tokens,
            self._layers[0] if one else self.bank.read_layer,
            self._tokenizer,
            self.bank.families,
            together=None if one else (self._layers, values),
            calibrated=all(bool(self.bank[layer].baselines) for layer in self._layers),
            positions=range(first, first + len(positions)),
        )

    def after(self, position: int) -> list[tuple[int, str, Mapping[str, float]]]:
        """(position, kind, scores by name) of the tokens from ``position`` on."""
        found = sorted(known for known in self._rows if known >= position)
        return [(known, self.kind(known), dict(zip(self.names, self._rows[known].tolist(), strict=True))) for known in found]

    def kind(self, position: int) -> str:
        return "prompt" if position < self._prompt else "generated"
