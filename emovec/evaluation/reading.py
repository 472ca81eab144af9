"""How a bank reads a text of which the mean activation is known: the one place where evaluation does so.

A projection is linear, so the reading of a mean is the mean of the tokens' readings.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from emovec.bank import Bank


def read_layers(bank: Bank) -> tuple[int, ...]:
    """The layers whose activations :func:`read` needs."""
    return bank.read_layers


def read(bank: Bank, means: Mapping[int, Tensor], kind: str) -> Tensor:
    """Scores [N, K] in z-units of the baseline of ``kind``, as a monitor would read them.

    Args:
        bank: calibrated.
        means: layer -> [N, d], mean activations.
        kind: kind of position that the means are of.
    """
    return bank.score(means, kind)


def projections(bank: Bank, means: Mapping[int, Tensor]) -> Tensor:
    """Raw projections [N, K] on the readers, without a baseline: what not to compare between concepts."""
    layer = bank[bank.read_layer]
    readers = layer.directions if layer.readers is None else layer.readers
    return means[layer.index].double() @ readers.double().T


def ranks_of(scores: Tensor, truth: Tensor) -> Tensor:
    """The rank [N] from 1 of concept ``truth`` [N] among ``scores`` [N, K]. A tie counts against it: scores all alike tell nothing."""
    return (scores >= scores.gather(1, truth[:, None])).sum(1)


def all_ranks(scores: Tensor) -> Tensor:
    """The ranks [N, K] of all concepts, as :func:`ranks_of` gives them."""
    ordered = scores.contiguous().sort(1).values.contiguous()
    below = torch.searchsorted(ordered, scores.contiguous(), right=False)
    return scores.shape[1] - below
