"""Reading and steering a model while it runs: ``attach`` for transformers' models, ``Hook`` for any module.

``docs/hooks.md`` describes both.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from emovec.allotment import Allotment, Steer, parsed
from emovec.bank import Bank, BankLayer
from emovec.bank_layer import KINDS, shown
from emovec.models import decoder_layers, residual_width, unwrapped
from emovec.monitor import Reading
from emovec.ops import Row, Table, check_precision
from emovec.recording import Recording
from emovec.steer import Steering
from emovec.tap import RowBuffers, Tap, apply_to, check_width, retype, stream_of
from emovec.tracking import Span, Tracker


class Watch(Protocol):
    """A guard at work on one probe; ``emovec.guard.Guard.bind`` makes it."""

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers whose scores it needs."""

    @property
    def steers(self) -> tuple[Steering, ...]:
        """What it may lay over a sequence's steering."""

    @property
    def overlaid(self) -> Mapping[int, int]:
        """Sequence -> which of ``steers`` it has now."""

    @property
    def events(self) -> Sequence[Any]:
        """What it did in the latest batch."""

    def see(self, span: Span, scores: Mapping[int, Tensor]) -> None:
        """After a forward pass, with its scores [batch * width, K] at the layers."""

    def decide(self) -> Mapping[int, int | None]:
        """As :meth:`emovec.tracking.Listener.decide`."""


class Guarding(Protocol):
    """What ``attach`` takes as a guard."""

    def bind(self, bank: Bank, tokenizer: Any) -> Watch: ...


def attach(
    model: nn.Module,
    bank: Bank,
    steer: Steer | Sequence[Steer] = None,
    layers: Sequence[int] | None = None,
    *,
    read: bool = True,
    precision: str = "fast",
    steer_layers: Sequence[int] | None = None,
    guard: Guarding | None = None,
    tokenizer: Any = None,
    profiles: Mapping[str, Mapping[str, Any]] | None = None,
    force: bool = False,
) -> Probe:
    """Hook a model's decoder blocks, so that every forward pass from now on is read, steered and guarded.

    Args:
        model: a decoder of transformers, also compiled, or wrapped as PEFT does it.
        bank: made for this model.
        steer: a steering value, or the name of a profile, for all sequences; or a list with one (or None) for each.
        layers: the layers to read at; default: all of the bank's.
        read: whether to keep scores. Without, memory does not grow, and the probe has no readings.
        precision: "high" to read with readers that are not rounded to the activations' dtype, which costs more (``docs/op.md``).
        steer_layers: the layers to steer at; default: the bank's.
        guard: an ``emovec.Guard``.
        tokenizer: gives readings their text; a guard that refuses with a text needs it.
        profiles: name -> steering value, from ``emovec.steer.load_profiles``.
        force: attach a bank that was made for another model all the same.

    Returns:
        A probe. Used in ``with``, or removed by ``probe.remove()``, after which the model is as it was.

    Raises:
        BankError: the bank was made for another model.
        SteeringError: naming the entry, or what the layer lacks.
        ValueError: layers that the bank or the model lacks, or nothing to do.
        In every case the model has not been touched.
    """
    if not isinstance(bank, Bank):
        raise TypeError(f"bank must be a Bank, got {shown(bank)}; for one layer use emovec.Hook")
    check_precision(precision)
    if guard is not None and not hasattr(guard, "bind"):
        raise TypeError(f"guard must be a Guard, got {shown(guard)}; wrap thresholds in emovec.Guard(...)")
    blocks = _blocks(model, bank, tokenizer, force)
    values = parsed(steer, bank.names, profiles)
    if steer_layers is None:  # where the ranges were found
        for text in sorted(
            {text for value in ([values] if isinstance(values, Steering) else values) for text in value.beyond(bank.usable)}
        ):
            warnings.warn(text, stacklevel=2)
    watch = None if guard is None else guard.bind(bank, tokenizer)
    allotment = Allotment(values, () if watch is None else watch.steers)
    kept = _known(bank.layers if layers is None else layers, bank, "layers") if read else ()
    steered = _known(bank.steer_layers if steer_layers is None else steer_layers, bank, "steer_layers") if allotment else ()
    if not kept and not steered and watch is None:
        raise ValueError("nothing to do: read=False, no steering and no guard")
    reading = {*kept, *(() if watch is None else watch.layers)}
    rows = {index: allotment.rows(bank[index]) if index in steered else [] for index in sorted({*reading, *steered})}
    for index in rows:
        if index >= len(blocks):
            raise ValueError(f"layer {index} does not exist in a model of {len(blocks)} decoder blocks")
    return Probe(model, bank, allotment, rows, reading, Recording(bank, kept, tokenizer), watch, precision)


class Probe:
    """A model's hooks, and what they have read: ``probe[i]`` is the reading of sequence i of the latest batch.

    A batch begins with each call of ``generate``, and with each forward pass that does not go on from the KV cache of the
    one before. Made by :func:`attach`; a context manager.
    """

    def __init__(
        self,
        model: nn.Module,
        bank: Bank,
        allotment: Allotment,
        rows: Mapping[int, Sequence[Row]],
        reading: set[int],
        recording: Recording,
        watch: Watch | None,
        precision: str = "fast",
    ) -> None:
        self.bank = bank
        self.follows = bool(recording.layers) or watch is not None
        self._allotment, self._recording, self._watch = allotment, recording, watch
        self._buffers = RowBuffers()
        self._tracker = Tracker(model, self)
        made = (self._tracker, self._buffers, precision)
        self._taps = {index: Tap(bank[index], rows[index], index in reading, *made) for index in rows}
        self._handles: dict[int, Any] = {}
        self._failed: str | None = None
        try:
            for index, tap in self._taps.items():
                block = self._tracker.blocks[index]
                tap.lay_out(*_place(block))
                self._handles[index] = block.register_forward_hook(tap)
                retype(block)
            self._tracker.install()
        except BaseException:
            self.remove()
            raise

    def remove(self) -> None:
        """Take the hooks off the model. Readings stay. Twice is once."""
        self._tracker.remove()
        while self._handles:
            index, handle = self._handles.popitem()
            handle.remove()
            retype(self._tracker.blocks[index])

    def __enter__(self) -> Probe:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.remove()

    # --- what was read ------------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        """How many sequences the latest batch has; 0 before the first."""
        return len(self._recording)

    def __getitem__(self, sequence: int) -> Reading:
        """The reading of one sequence: prompt and generated tokens, no padding; on the device until asked for.

        Raises:
            RuntimeError: nothing has been read.
            IndexError: no such sequence.
        """
        if not self._recording.layers:
            raise RuntimeError("this probe keeps no scores: it was attached with read=False")
        if not len(self):
            raise RuntimeError("nothing has been read: the model has not been called since the probe was attached")
        if not -len(self) <= sequence < len(self):
            raise IndexError(f"sequence {sequence} of {len(self)}")
        return self._recording.reading(sequence % len(self))

    def __iter__(self) -> Iterator[Reading]:
        return (self[sequence] for sequence in range(len(self)))

    @property
    def events(self) -> tuple[Any, ...]:
        """What the guard did in the latest batch, in order."""
        return () if self._watch is None else tuple(self._watch.events)

    def __repr__(self) -> str:
        steered = ", ".join(str(index) for index, tap in self._taps.items() if tap.rows) or "none"
        read = ", ".join(map(str, self._recording.layers)) or "none"
        state = "attached" if self._handles else "removed"
        return f"Probe({state}; reads layers {read}; steers layers {steered}; {len(self)} sequences)"

    # --- told by the tracker ------------------------------------------------------------------------------------------

    def begin(self, span: Span) -> None:
        """Before a forward pass: whose tokens they are, and room for their scores."""
        if self._allotment:
            self._allotment.check(span.prompts)
            overlaid = {} if self._watch is None or span.fresh else self._watch.overlaid
            pairs = self._allotment.pairs(span.batch, span.prompts, overlaid)
            self._buffers.write(span.batch, span.width, span.prompt, pairs, span.real)
        for tap in self._taps.values():
            tap.reserve(span.tokens)

    def end(self, span: Span) -> None:
        """After it: keep the scores, ask the guard.

        Raises:
            RuntimeError: a hook did not run, or not on all tokens.
        """
        for index, tap in self._taps.items():
            if tap.tokens != span.tokens:
                what = "did not run" if tap.tokens < 0 else f"saw {tap.tokens} tokens of {span.tokens}"
                raise RuntimeError(
                    f"the hook of decoder block {index} {what}: the model was captured (CUDA graph, export, trace) before it was attached, "
                    "or runs its blocks in a way that cannot be hooked; attach first"
                )
        scores = {index: tap.scores for index, tap in self._taps.items() if tap.scores is not None}
        if self._recording.layers:
            self._recording.add(span, scores)
        if self._watch is not None:
            self._watch.see(span, scores)

    def decide(self) -> Mapping[int, int | None]:
        return {} if self._watch is None else self._watch.decide()


class Hook:
    """A forward hook for any module that puts out activations [..., d]: ``module.register_forward_hook(Hook(bank, layer=18))``.

    It knows nothing of the model around the module: not which tokens are prompt and which are padding.

    Args:
        bank: a bank, or one of its layers.
        layer: which of the bank's layers; default: the one to read at.
        steer: a steering value for all tokens, or a list with one for each sequence of outputs [batch, tokens, d].
            ``"on"`` is refused, for want of knowing.
        kind: the kind of position whose baseline scores, bounds and conditions are in units of.
        read: whether to keep the scores of the latest call.
        precision: as :func:`attach` takes it.
        device, dtype: of the activations, to lay out at once rather than at the first call; ``torch.compile(fullgraph=True)`` needs that.

    Raises:
        SteeringError: naming the entry, or what the layer lacks.
    """

    def __init__(
        self,
        bank: Bank | BankLayer,
        layer: int | None = None,
        steer: Steer | Sequence[Steer] = None,
        *,
        kind: str = "prompt",
        read: bool = True,
        precision: str = "fast",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if isinstance(bank, BankLayer):
            if layer not in (None, bank.index):
                raise ValueError(f"layer={layer}, but what was given is layer {bank.index}")
            self.layer = bank
        else:
            self.layer = bank[bank.read_layer if layer is None else layer]
        if kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {shown(kind)}")
        check_precision(precision)
        self.kind, self.read, self.precision = kind, read, precision
        parsed_steer = parsed(steer, self.layer.names)
        values = [parsed_steer] if isinstance(parsed_steer, Steering) else parsed_steer
        for entry in (entry for value in values for entry in value.entries):
            if entry.on != "all":
                raise ValueError(f"steering entry {entry.concept!r}: a Hook cannot tell {entry.on} tokens from others; emovec.attach can")
        rows = [value.row(self.layer, kind, scored=kind) for value in values]
        self._rows = [row for row in rows if row is not None]
        if not self._rows and not read:
            raise ValueError("nothing to do: read=False and no steering")
        slots = iter(range(len(rows)))
        per_sequence = torch.tensor([-1 if row is None else next(slots) for row in rows], dtype=torch.int32)
        self._slots = per_sequence if values is parsed_steer else None
        self._scores: Tensor | None = None
        self._place: tuple[torch.device, torch.dtype] | None = None
        self._lay_out = torch.compiler.disable(self._lay_out_now)  # type: ignore[no-untyped-call]
        if (device is None) != (dtype is None):
            raise ValueError(f"give device and dtype together, got device={device!r}, dtype={dtype!r}")
        if device is not None and dtype is not None:
            self._lay_out(torch.empty(0, device=device).device, dtype)

    @property
    def scores(self) -> Tensor:
        """[..., K] fp32: the scores of the latest call, before steering.

        Raises:
            RuntimeError: the hook has not been called.
        """
        if not self.read:
            raise RuntimeError("this hook keeps no scores: it was made with read=False")
        if self._scores is None:
            raise RuntimeError(
                "the hook has not been called: its module has not run since, or was compiled before it was registered (register first)"
            )
        return self._scores

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        hidden = stream_of(output, module)
        if self._place != (hidden.device, hidden.dtype):
            self._lay_out(hidden.device, hidden.dtype)
        check_width(hidden, self.layer, module)
        tokens = hidden.numel() // hidden.shape[-1]
        scores = torch.empty(tokens, len(self.layer.names), device=hidden.device) if self.read else None
        row = None
        if self._row is not None:
            if hidden.dim() != 3 or hidden.shape[0] != len(self._row):
                raise ValueError(
                    f"steer is a list of {len(self._row)}, which fits outputs [{len(self._row)}, tokens, d]; got {tuple(hidden.shape)}"
                )
            row = self._row.repeat_interleave(hidden.shape[1])
        apply_to(hidden, self._operands, self._table, row, scores)
        if scores is not None:
            self._scores = scores.view(*hidden.shape[:-1], scores.shape[-1])

    def _lay_out_now(self, device: torch.device, dtype: torch.dtype) -> None:
        with torch.inference_mode(False):
            self._operands = self.layer.operands(device, dtype, self.kind, self.precision)
            self._table = Table.build(self._rows, self._operands) if self._rows else None
            self._row = None if self._slots is None else self._slots.to(device)
            self._place = (device, dtype)

    _row: Tensor | None
    _lay_out: Callable[[torch.device, torch.dtype], None]


def _blocks(model: nn.Module, bank: Bank, tokenizer: Any, force: bool) -> nn.ModuleList:
    inner = unwrapped(model)
    blocks = decoder_layers(inner)
    bank.check(inner, tokenizer, force=force)
    width = residual_width(inner)
    if width != bank.width:
        raise ValueError(f"the residual stream of {type(inner).__name__} is {width} wide, the bank is {bank.width} wide")
    return blocks


def _known(layers: Sequence[int], bank: Bank, what: str) -> tuple[int, ...]:
    """``layers`` in order, if the bank has them."""
    if not layers:
        raise ValueError(f"{what} is empty")
    return tuple(sorted({bank[index].index for index in layers}))


def _place(block: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Where a block's output probably is; the tap moves if not."""
    for weight in block.parameters():
        if weight.is_floating_point() and weight.dtype in (torch.float32, torch.bfloat16, torch.float16) and weight.device.type != "meta":
            return weight.device, weight.dtype
    return torch.device("cpu"), torch.float32
