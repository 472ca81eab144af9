"""Scores of all generated tokens, counted by concept and bucket in the engine core, for a histogram at ``/metrics``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from emovec.bank import Bank
from emovec.bank_layer import shown, unknown
from emovec.engines.vllm.guard import check_unit
from emovec.threshold import Threshold

BOUNDS = (-4.0, -3.0, -2.0, -1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 8.0)
"""The upper ends of the buckets, in score units; the last bucket has none."""
_CELL = 0.5  # all bounds are multiples of it: a score's cell is computed, which is eight times as fast as looking up its bucket
_LOW, _HIGH = round(BOUNDS[0] / _CELL), round(BOUNDS[-1] / _CELL) + 1
_CELLS = _HIGH - _LOW + 1
_STARTS = [0, *(round(bound / _CELL) - _LOW + 1 for bound in BOUNDS)]  # the first cell of each bucket


def parse(value: Any, bank: Bank) -> tuple[str, ...]:
    """The concepts and families that ``"metrics"`` names: "all" (concepts), or a list.

    Raises:
        ValueError: naming the entry, with the nearest known names.
    """
    if value == "all":
        names = list(bank.names)
    elif isinstance(value, list | tuple) and value:
        names = list(value)
    else:
        raise ValueError(f'metrics must be "all" or a list of concepts and families, got {shown(value)}')
    for place, name in enumerate(names):
        if not isinstance(name, str) or (name not in bank.names and name not in bank.families):
            raise unknown(name, [*bank.names, *bank.families])
        if name in names[:place]:
            raise ValueError(f"metrics: {shown(name)} is given twice")
        check_unit(_weights(name, bank), bank, f"metrics: {shown(name)}")
    return tuple(names)


class Tally:
    """Counts since they were last taken.

    Args:
        names: the concepts, and families as the mean of their members, that are counted.
        bank: has them.
    """

    def __init__(self, names: Sequence[str], bank: Bank) -> None:
        weights = np.stack([_weights(name, bank).float().numpy() for name in names], 1)
        self._weights = None if tuple(names) == bank.names else weights
        self._first = (np.arange(len(names)) * _CELLS - _LOW).astype(np.float32)
        self._counts = np.zeros((len(names), _CELLS), np.int64)
        self._any = False

    def add(self, scores: Sequence[Any]) -> None:
        """Count the tokens of [T, K] each."""
        values = np.concatenate(scores)
        if self._weights is not None:
            values = values @ self._weights
        cells = np.fmax(np.fmin(np.ceil(values / _CELL), _HIGH), _LOW) + self._first
        self._counts += np.bincount(cells.astype(np.int64).ravel(), minlength=self._counts.size).reshape(self._counts.shape)
        self._any = True

    def take(self) -> bytes:
        """The counts [names, buckets] uint32, which start again; empty if there are none."""
        if not self._any:
            return b""
        packed = np.add.reduceat(self._counts, _STARTS, axis=1).astype("<u4").tobytes()
        self._counts[:] = 0
        self._any = False
        return packed


def unpacked(counts: bytes) -> Any:
    """[names, buckets]."""
    return np.frombuffer(counts, "<u4").reshape(-1, len(BOUNDS) + 1)


def _weights(name: str, bank: Bank) -> Any:
    return Threshold(name, 0.0).weights(bank.names, bank.families)
