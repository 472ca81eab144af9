"""How one score comes from several layers: the mean of their z-scores, in units of what that mean is on ordinary text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from emovec.bank_layer import KINDS, BankError, Baseline, baseline_of, join_baselines, shown


@dataclass(frozen=True, eq=False)
class Readout:
    """The layers that a bank is read at together.

    Layers say the same of a concept with different noise, so the mean of their z-scores tells concepts apart better than any
    one of them. A score is that mean, less its mean on ordinary text and over its deviation there: a z-score again.

    Attributes:
        layers: two or more decoder blocks, ascending.
        baselines: kind of position -> the mean z-score of ordinary text there, a Baseline of [K]. A concept whose baseline is
            NaN is read as the mean z-score itself.
    """

    layers: tuple[int, ...]
    baselines: Mapping[str, Baseline]

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", tuple(self.layers))
        object.__setattr__(self, "baselines", dict(self.baselines))
        if len(self.layers) < 2 or list(self.layers) != sorted(set(self.layers)):
            raise BankError(f"a readout is of two or more layers, each once and in order, got {shown(list(self.layers))}")
        if not self.baselines:
            raise BankError("a readout needs a baseline: the mean of z-scores has no unit of its own")
        for kind in self.baselines:
            if kind not in KINDS:
                raise BankError(f"readout: unknown kind of position {shown(kind)}; known: {', '.join(KINDS)}")
        if len({baseline.mean.shape for baseline in self.baselines.values()}) > 1:
            raise BankError("readout: baselines of different numbers of concepts")

    @property
    def concepts(self) -> int:
        """K."""
        return len(next(iter(self.baselines.values())).mean)

    def baseline(self, kind: str = "prompt") -> tuple[Tensor, Tensor]:
        """The mean and deviation [K] of the mean z-score at one kind of position; 0 and 1 for a concept without a baseline."""
        found = baseline_of(self.baselines, kind)
        assert found is not None
        return found.mean.nan_to_num(0.0), found.std.nan_to_num(1.0)

    def combine(self, scores: Mapping[int, Tensor], kind: str = "prompt") -> Tensor:
        """The score [..., K] from the layers' z-scores [..., K], all of one kind of position, in fp32 or wider."""
        first = scores[self.layers[0]]
        dtype = torch.promote_types(first.dtype, torch.float32)
        mean, std = (part.to(first.device, dtype) for part in self.baseline(kind))
        return (torch.stack([scores[layer].to(first.device, dtype) for layer in self.layers]).mean(0) - mean) / std

    def subset(self, rows: Sequence[int]) -> Readout:
        """The same with some of the concepts."""
        return replace(self, baselines={kind: baseline.subset(rows) for kind, baseline in self.baselines.items()})

    def join(self, other: Readout | None, concepts: int) -> Readout:
        """With ``concepts`` more concepts after its own, whose baselines are those of ``other`` if it is read at the same layers."""
        theirs = other.baselines if other is not None and other.layers == self.layers else {}
        return replace(self, baselines=join_baselines((self.baselines, theirs), (self.concepts, concepts)))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Readout):
            return NotImplemented
        return self.layers == other.layers and self.baselines == other.baselines
