"""A proof at start that the op runs in the graphs that will serve, at every hooked layer; without it the engine does not start."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from emovec.engines.vllm import op
from emovec.engines.vllm.runner import Runner
from emovec.ops import Row

_TOKENS = 8
_UNWRITTEN = -12345.0  # no score is that


def check(ours: Runner, runner: Any) -> None:
    """Run dummy passes: every read layer must write its scores, and a shift at every steered layer must reach the output.

    Raises:
        RuntimeError: naming the layer.
    """
    tokens = min(_TOKENS, runner.max_num_tokens)
    step, before = ours.step, (ours.step.steers, ours.step.reads)
    try:
        step.steers = step.reads = True
        step.row.fill_(-1)
        ours.scores.fill_(_UNWRITTEN)
        plain = _pass(runner, tokens)
        for place, index in enumerate(ours.config.layers):
            if bool((ours.scores[place, :tokens] == _UNWRITTEN).any()):
                raise _failed(f"layer {index} was not read")
        if not bool(plain.isfinite().all()):
            raise _failed("the model's output on a dummy input is not finite, so steering could not be proved")
        for index in ours.config.steer_layers:
            tap = op.TAPS[index]
            assert tap.table is not None
            # as long as the stream itself, or longer: no rounding hides it
            shift = torch.ones(ours.config.bank.width) * max(1.0, float(plain.float().abs().max()))
            tap.table.set_row(0, Row(delta=shift), tap.operands)
            step.row[:tokens].fill_(0)
            steered = _pass(runner, tokens)
            tap.table.set_row(0, Row(), tap.operands)
            step.row.fill_(-1)
            if torch.equal(plain, steered):
                raise _failed(f"steering at layer {index} had no effect")
        if not torch.equal(plain, _pass(runner, tokens)):
            raise _failed("a pass without rows is not what it was before others were steered")
    finally:
        step.row.fill_(-1)
        step.steers, step.reads = before


def _pass(runner: Any, tokens: int) -> Tensor:
    with torch.inference_mode():
        hidden, _ = runner._dummy_run(tokens, force_attention=True)
    return hidden[:tokens].clone()  # type: ignore[no-any-return]


def _failed(why: str) -> RuntimeError:
    return RuntimeError(f"emovec's check at start failed: {why}; this engine cannot serve with emovec's configuration")
