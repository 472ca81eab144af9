"""The part of a hook that runs at every forward pass, also inside a compiled graph: one call of the op on a block's output."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

from emovec.bank_layer import BankLayer
from emovec.ops import Operands, Row, Table, apply_
from emovec.tracking import Tracker


def stream_of(output: object, module: nn.Module) -> Tensor:
    """The residual stream in a module's output: the tensor itself, or the first one of a tuple or of a ``ModelOutput``."""
    if isinstance(output, Tensor):
        hidden: object = output
    elif isinstance(output, tuple | list):
        hidden = output[0] if output else None
    elif isinstance(output, Mapping):
        hidden = next((value for value in output.values() if isinstance(value, Tensor)), None)
    elif is_dataclass(output):
        values = (getattr(output, field.name) for field in fields(output))
        hidden = next((value for value in values if isinstance(value, Tensor)), None)
    else:
        hidden = None
    if not isinstance(hidden, Tensor) or not hidden.is_floating_point() or hidden.dim() < 2:
        what = f"a {hidden.dim()}-D {hidden.dtype} tensor" if isinstance(hidden, Tensor) else "no tensor"
        raise TypeError(
            f"the output of {type(module).__name__} is a {type(output).__name__} with {what} first; expected activations [..., d]"
        )
    return hidden


def check_width(hidden: Tensor, layer: BankLayer, module: nn.Module) -> None:
    if hidden.shape[-1] != layer.width:
        raise ValueError(
            f"{type(module).__name__} puts out {hidden.shape[-1]} wide activations, layer {layer.index} of the bank is {layer.width} wide"
        )


def apply_to(hidden: Tensor, operands: Operands, table: Table | None, row: Tensor | None, scores: Tensor | None) -> None:
    """The op on ``hidden`` [..., d], in place whatever its strides.

    The op has no derivative, so it is given an alias that autograd does not follow. Gradients pass through an addition
    unchanged, which is exact, and through rules unchanged too, as if they had not been there.
    """
    alias = hidden.detach()
    flat = alias.contiguous()  # itself, if it is contiguous
    tokens = flat.view(-1, flat.shape[-1])
    apply_(tokens, operands, table, row, scores=scores)
    if table is not None and not hidden.is_contiguous():
        alias.copy_(flat)


class RowBuffer:
    """The tokens' rows in the steering table on one device, shared by all layers there; persistent, so that graphs can replay."""

    def __init__(self, device: torch.device) -> None:
        self.row = persistent(torch.empty(0, dtype=torch.int32, device=device))
        self._written: object = None
        self._rows: tuple[tuple[int, int], ...] = ()
        self._per_sequence = torch.empty(0, 2, dtype=torch.int32, device=device)

    def write(self, batch: int, width: int, prompt: int, rows: Sequence[tuple[int, int]], real: Tensor | None) -> None:
        """Give each of the ``rows`` (of prompt tokens, of generated tokens) to its sequence; padding gets -1."""
        if self._rows != tuple(rows):
            self._rows, self._per_sequence = tuple(rows), torch.tensor(rows, dtype=torch.int32).to(self.row.device)
        key = (batch, width, prompt, self._rows)
        if real is None and key == self._written:
            return
        self.row = grown(self.row, batch * width)
        columns = torch.arange(width, device=self.row.device)
        row = torch.where(columns < prompt, self._per_sequence[:, :1], self._per_sequence[:, 1:])
        if real is not None:
            row = row.masked_fill(~real.to(row.device), -1)
        self.row[: batch * width] = row.reshape(-1)
        self._written = None if real is not None else key


class RowBuffers:
    """A row buffer on every device where a hooked block puts out, all with the same rows."""

    def __init__(self) -> None:
        self._buffers: dict[torch.device, RowBuffer] = {}
        self._latest: tuple[Any, ...] | None = None

    def write(self, *rows: Any) -> None:
        """As :meth:`RowBuffer.write`, on every device."""
        self._latest = rows
        for buffer in self._buffers.values():
            buffer.write(*rows)

    def on(self, device: torch.device) -> RowBuffer:
        """The buffer there; with the latest rows, should the device turn up in the middle of a forward pass."""
        if device not in self._buffers:
            self._buffers[device] = RowBuffer(device)
            if self._latest is not None:
                self._buffers[device].write(*self._latest)
        return self._buffers[device]


class Tap:
    """The forward hook of one decoder block. What it works with is laid out beforehand, outside any graph.

    Args:
        layer: the bank's layer.
        rows: the rows of its steering table; none: it only reads.
        reads: whether it fills ``scores``.
        tracker: tells whether a forward pass of the whole model is under way.
        buffers: the tokens' rows.
        precision: of the scores, as :func:`emovec.hook.attach` takes it.
    """

    def __init__(
        self, layer: BankLayer, rows: Sequence[Row], reads: bool, tracker: Tracker, buffers: RowBuffers, precision: str = "fast"
    ) -> None:
        self.layer, self.rows, self.reads, self.precision = layer, tuple(rows), reads, precision
        self.tokens = -1  # of the last call; a compiled graph sets it as well, so it tells that the hook is in the graph
        self._tracker, self._buffers = tracker, buffers
        self._place: tuple[torch.device, torch.dtype] | None = None
        self._move_to = torch.compiler.disable(self._move)  # type: ignore[no-untyped-call]

    def lay_out(self, device: torch.device, dtype: torch.dtype) -> None:
        """Prepare for a block whose output is on ``device`` in ``dtype``."""
        with torch.inference_mode(False):  # what is kept must be usable outside it
            self.operands = self.layer.operands(device, dtype, precision=self.precision)
            self.table = Table.build(self.rows, self.operands) if self.rows else None
            for tensor in (*vars(self.operands).values(), *(self.table.tensors() if self.table is not None else ())):
                persistent(tensor)
            self.scores = persistent(torch.empty(0, len(self.layer.names), device=device)) if self.reads else None
            self.buffer = self._buffers.on(device)
        self._place = (device, dtype)

    def reserve(self, tokens: int) -> None:
        """Make room for the scores of so many tokens, and expect the hook to be called."""
        self.tokens = -1
        if self.scores is not None:
            self.scores = grown(self.scores, tokens)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        hidden = stream_of(output, module)
        if not self._tracker.active:
            if torch._C._current_graph_task_id() != -1:
                return  # recomputed for a backward pass: only what is inside the block counts, and that is not steered
            raise RuntimeError(f"decoder block {self.layer.index} was called by itself; attached models are called as a whole")
        if self._place != (hidden.device, hidden.dtype):
            self._move_to(hidden, module)
        tokens = hidden.numel() // hidden.shape[-1]
        scores = None if self.scores is None else self.scores[:tokens]
        row = None if self.table is None else self.buffer.row[:tokens]
        apply_to(hidden, self.operands, self.table, row, scores)
        self.tokens = tokens

    def _move(self, hidden: Tensor, module: nn.Module) -> None:
        """Lay out for where the block turned out to be: under autocast, offloaded or quantised, its weights do not tell."""
        check_width(hidden, self.layer, module)
        reserved = 0 if self.scores is None else len(self.scores)
        self.lay_out(hidden.device, hidden.dtype)
        self.reserve(reserved)


def persistent(tensor: Tensor) -> Tensor:
    """Tell CUDA graphs that the tensor stays where it is and may be written, as a parameter."""
    if tensor.is_cuda:
        torch._dynamo.mark_static_address(tensor)
    return tensor


def grown(buffer: Tensor, rows: int) -> Tensor:
    """A buffer with room for ``rows``: itself, or one of twice the size, so that graphs seldom see another one."""
    if rows <= len(buffer):
        return buffer
    room = max(64, 1 << (rows - 1).bit_length())
    with torch.inference_mode(False):  # a tensor made in inference mode could not be written outside it
        return persistent(torch.empty(room, *buffer.shape[1:], dtype=buffer.dtype, device=buffer.device))


def retype(block: nn.Module) -> None:
    """Give a block with taps a class of its own, and one without its old class.

    Graphs of ``torch.compile`` are not guarded on hooks, so a graph made before a hook came, or while one was there, would
    be used on. They are guarded on the types of modules.
    """
    base = type(block)
    while "_emovec_base" in vars(base):
        base = vars(base)["_emovec_base"]
    if any(isinstance(hook, Tap) for hook in block._forward_hooks.values()):
        base = type(base.__name__, (base,), {"_emovec_base": base, "__module__": base.__module__, "__qualname__": base.__qualname__})
    block.__class__ = base
    # Dynamo skips the guards below a module whose __dict__ has not changed.
    vars(block)["_emovec"] = None
    del vars(block)["_emovec"]
