"""The one opaque op that a decoder layer calls, inside compiled graphs too, and the buffers it works on.

Graphs know a layer by its number only: the buffers are looked up when the op runs, as attention looks up its cache. So a
compiled graph holds nothing of ours that a later start could find changed.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from emovec.ops import Operands, Table, apply_

_LIBRARY = torch.library.Library("emovec_vllm", "DEF")  # type: ignore[no-untyped-call]
_LIBRARY.define("apply_(Tensor(a!) hidden, Tensor? residual, int layer) -> ()")  # type: ignore[no-untyped-call]


@dataclass
class Step:
    """What the coming forward pass is to do; one for all layers.

    row: [max tokens] int32 into the steering tables, -1 for a token to leave alone.
    """

    row: Tensor
    steers: bool = False
    reads: bool = False


@dataclass(frozen=True)
class Tap:
    """The persistent buffers of one layer. scores: [max tokens, K] or None where it is not read."""

    operands: Operands
    table: Table | None
    scores: Tensor | None
    step: Step

    def __call__(self, hidden: Tensor, residual: Tensor | None) -> None:
        tokens = len(hidden)
        table = self.table if self.step.steers else None
        scores = self.scores[:tokens] if self.step.reads and self.scores is not None else None
        if table is not None or scores is not None:
            row = None if table is None else self.step.row[:tokens]
            apply_(hidden, self.operands, table, row, residual, scores)


TAPS: dict[int, Tap] = {}
_owner: weakref.ref[Any] | None = None


def claim(owner: object, taps: Mapping[int, Tap]) -> None:
    """Let graphs find the buffers of ``owner``'s model.

    Raises:
        RuntimeError: those of another model are still in use in this process, and graphs could not tell the two apart.
    """
    global _owner
    if _owner is not None and _owner() is not None:
        raise RuntimeError("another engine with emovec runs in this process; a process can have one (VLLM_ENABLE_V1_MULTIPROCESSING=1)")
    _owner = weakref.ref(owner, lambda _: TAPS.clear())
    TAPS.clear()
    TAPS.update(taps)


def _apply(hidden: Tensor, residual: Tensor | None, layer: int) -> None:
    TAPS[layer](hidden, residual)


_LIBRARY.impl("apply_", _apply, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]


@torch.library.register_fake("emovec_vllm::apply_")  # type: ignore[untyped-decorator]
def _(hidden: Tensor, residual: Tensor | None, layer: int) -> None:
    return None


def hook(layer: int) -> Callable[[nn.Module, Any, Any], None]:
    """The forward hook of decoder layer ``layer``, which puts out the stream, or (hidden, residual) whose sum it is."""

    def call(module: nn.Module, args: Any, output: Any) -> None:
        hidden, residual = (output, None) if isinstance(output, Tensor) else (output[0], output[1] if len(output) > 1 else None)
        torch.ops.emovec_vllm.apply_(hidden, residual, layer)

    return call
