"""Calibrating a bank: baselines of the model it is used with, and for every concept the bound that ordinary conversations rarely cross.

A guard's bound means nothing without the false alarms it gives. Here it is found on half of the ordinary conversations, the alarms
are counted on the other half, and both go into the bank.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from emovec.bank import Bank, BankError, fingerprint, template_hash
from emovec.bank_layer import shown
from emovec.monitor import Reading
from emovec.threshold import Action, Stop, Threshold, counts, runs_of

PER = ("conversation", "1000 tokens")


@dataclass(frozen=True)
class Alarms:
    """What counts as an alarm, and how many false ones are wanted at most.

    Attributes:
        rate: false alarms per unit.
        per: the unit, "conversation" (the probability that one has an alarm) or "1000 tokens" (the mean number of alarms).
        halflife: of the smoothing, in tokens, as in :class:`emovec.guard.Threshold`.
        hold: so many tokens in a row must be above.
        on: "all", "prompt" or "generated": only these tokens count.
    """

    rate: float = 0.05
    per: str = "conversation"
    halflife: float = 8
    hold: int = 3
    on: str = "all"

    def __post_init__(self) -> None:
        if self.per not in PER:
            raise ValueError(f"per must be one of {', '.join(map(repr, PER))}, got {shown(self.per)}")
        whole = isinstance(self.rate, int | float) and not isinstance(self.rate, bool) and math.isfinite(self.rate)
        if not whole or not 0 < self.rate < (1 if self.per == "conversation" else 1000):
            raise ValueError(f"rate must be above 0 and below {1 if self.per == 'conversation' else 1000}, got {shown(self.rate)}")
        self.threshold("", 0.0)  # checks the others

    @classmethod
    def of(cls, bank: Bank) -> Alarms:
        """Those that the bank's bounds were found with."""
        return cls(**{field.name: bank.meta["guard"][field.name] for field in fields(cls)})

    def threshold(self, of: str, above: float, action: Action | None = None) -> Threshold:
        """The threshold of one concept that counts so."""
        return Threshold(of or "any", above, Stop() if action is None else action, halflife=self.halflife, hold=self.hold, on=self.on)


def conversations(
    model: nn.Module, tokenizer: Any, bank: Bank, prompts: Sequence[str], new_tokens: int = 48, batch: int = 10, *, force: bool = False
) -> Iterator[Reading]:
    """Readings of ordinary conversations: each prompt as a user's message, and what the model answers.

    Args:
        model: a decoder of transformers that the bank belongs to.
        tokenizer: its tokenizer.
        bank: what to read with.
        prompts: the users' messages.
        new_tokens: the most tokens of an answer; the likeliest each time.
        batch: conversations at a time.
        force: use the bank although it was made for another model.
    """
    from emovec.hook import attach
    from emovec.models import encode

    device = next(model.parameters()).device
    with attach(model, bank, layers=bank.read_layers, tokenizer=tokenizer, force=force) as probe:
        for start in range(0, len(prompts), batch):
            inputs = encode(tokenizer, list(prompts[start : start + batch]), device=device)
            model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False, pad_token_id=tokenizer.pad_token_id)  # type: ignore[operator]
            yield from probe


def bounds(readings: Sequence[Reading], alarms: Alarms) -> Tensor:
    """For every concept the lowest bound [K] with no more false alarms than wanted, by these ordinary conversations.

    Per conversation it is as :func:`emovec.guard.calibrate_threshold` finds it; per 1000 tokens it is the lowest above which no bound has
    more alarms among these tokens.

    Raises:
        ValueError: raw projections, or too little text for the rate.
    """
    runs = [_runs(reading, alarms) for reading in readings]
    if alarms.per == "conversation":
        peaks = torch.stack([run.amax(0) if len(run) else torch.full((run.shape[1],), -math.inf) for run in runs]).sort(0).values
        wanted = math.ceil((1 - alarms.rate) * (len(peaks) + 1) - 1e-9)
        if wanted > len(peaks):
            needed = math.ceil(1 / alarms.rate - 1 - 1e-9)
            raise ValueError(f"a false-alarm rate of {alarms.rate:g} needs at least {needed} ordinary conversations, got {len(peaks)}")
        found = peaks[wanted - 1]
    else:
        tokens = sum(_counted(reading, alarms) for reading in readings)
        allowed = int(alarms.rate * tokens / 1000)
        if allowed < 1:
            needed = math.ceil(1000 / alarms.rate)
            raise ValueError(f"{alarms.rate:g} false alarms per 1000 tokens need at least {needed} tokens, got {tokens}")
        found = torch.tensor([_lowest([run[:, k] for run in runs], allowed) for k in range(runs[0].shape[1])], dtype=torch.float64)
    if not bool(found.isfinite().all()):
        raise ValueError(f"of {len(readings)} conversations too many have fewer than {alarms.hold} tokens that count, so they tell nothing")
    return found


def _lowest(runs: Sequence[Tensor], allowed: int) -> float:
    """The lowest bound such that it and none above it is crossed upward more than ``allowed`` times by the series ``runs`` [T_i]."""
    up, levels = [], []
    for run in runs:
        before = torch.cat([torch.full((1,), -math.inf, dtype=run.dtype), run[:-1]])
        rising = run > before
        # a bound c is crossed at a token where before <= c < now
        levels += [before[rising], run[rising]]
        up += [torch.ones(int(rising.sum())), -torch.ones(int(rising.sum()))]
    if not levels:
        return -math.inf
    level, change = torch.cat(levels), torch.cat(up)
    order = level.argsort(stable=True)
    level, count = level[order], change[order].cumsum(0)
    over = (count > allowed).nonzero()
    # from the last level on at which there are too many, the next one is the first with few enough
    return float(level[int(over[-1]) + 1] if len(over) else level[level.isfinite()][0])


def _runs(reading: Reading, alarms: Alarms) -> Tensor:
    return runs_of(alarms.threshold("", 0.0), reading, torch.eye(len(reading.names), dtype=torch.float64))


def _counted(reading: Reading, alarms: Alarms) -> int:
    threshold = alarms.threshold("", 0.0)
    return sum(counts(threshold, kind, position) for kind, position in zip(reading.kind, reading.positions, strict=True))


def alarms_in(readings: Sequence[Reading], above: Tensor, alarms: Alarms) -> dict[str, Any]:
    """How often bounds ``above`` [K] are crossed in conversations: ``units`` (conversations, or thousands of tokens) and ``alarms`` [K]."""
    total = torch.zeros(len(above), dtype=torch.float64)
    for reading in readings:
        runs = _runs(reading, alarms) > above
        before = torch.cat([torch.zeros(1, len(above), dtype=torch.bool), runs[:-1]])
        fired = (runs & ~before).sum(0)
        total += fired.clamp_max(1) if alarms.per == "conversation" else fired
    units = len(readings) if alarms.per == "conversation" else sum(_counted(reading, alarms) for reading in readings) / 1000
    return {"units": units, "alarms": [int(value) for value in total.tolist()]}


def with_guard(bank: Bank, readings: Sequence[Reading], alarms: Alarms) -> Bank:
    """The bank with a bound for every concept, found on every other of the ``readings``, and with the false alarms of the others.

    Raises:
        BankError: readings of other concepts or layers than the bank's.
        ValueError: as :func:`bounds`.
    """
    for reading in readings:
        if reading.names != bank.names or reading.read_layers != bank.read_layers:
            raise BankError(f"the readings are of {reading.where}, the bank is read at {', '.join(map(str, bank.read_layers))}")
    above = bounds(readings[::2], alarms)
    measured = alarms_in(readings[1::2], above, alarms)
    guard = {**asdict(alarms), "above": dict(zip(bank.names, (round(value, 4) for value in above.tolist()), strict=True))}
    guard["measured"] = {"units": measured["units"], "alarms": dict(zip(bank.names, measured["alarms"], strict=True))}
    return _with_meta(bank, {"guard": guard})


def threshold_of(bank: Bank, concept: str, action: Action | None = None) -> Threshold:
    """The threshold that the bank was calibrated with for one concept.

    Raises:
        BankError: the bank has none.
        UnknownConcept: listing the nearest names.
    """
    bank.resolve(concept)
    guard = bank.meta.get("guard")
    if not isinstance(guard, dict) or concept not in guard.get("above", {}):
        raise BankError(f"the bank has no calibrated bound for {shown(concept)}; `emovec calibrate` makes them")
    return replace(Alarms.of(bank).threshold(concept, guard["above"][concept], action), calibrated_at=bank.read_layers)


def recalibrated(
    model: nn.Module,
    tokenizer: Any,
    bank: Bank,
    ordinary: Sequence[dict[str, str]],
    neutral: Sequence[dict[str, Any]],
    *,
    model_name: str | None = None,
    batch_tokens: int = 2048,
) -> Bank:
    """The bank with the baselines of ``model``, and as a bank of this model: its directions stay those of the model it was made from.

    For a quantised or fine-tuned copy of that model. Bounds of a guard that the bank had are dropped, since their unit has changed.

    Raises:
        BankError: a model of another width, or without one of the bank's layers.
    """
    from emovec.extraction.calibrate import calibrate

    found = fingerprint(model)
    if found["d"] not in (None, bank.width):
        raise BankError(f"the bank is {bank.width} wide, the model {found['d']}")
    together = () if bank.readout is None else bank.readout.layers
    layers, readout = calibrate(model, tokenizer, list(bank.values()), ordinary, neutral, together=together, batch_tokens=batch_tokens)
    made = Bank(layers, bank.read_layer, bank.steer_layers, bank.families, bank.meta, readout=readout)
    said = {"model": model_name or bank.meta.get("model"), "fingerprint": found, "chat_template": template_hash(tokenizer)}
    before = {key: bank.meta.get(key) for key in ("model", "fingerprint")}
    return _with_meta(made, {**said, "directions_from": bank.meta.get("directions_from", before), "guard": None})


def _with_meta(bank: Bank, more: dict[str, Any]) -> Bank:
    """The bank with these keys of ``meta``; None takes a key away."""
    meta = {key: value for key, value in {**bank.meta, **more}.items() if value is not None}
    return Bank(bank.values(), bank.read_layer, bank.steer_layers, bank.families, meta, readout=bank.readout)


def usable_in(report: Any) -> dict[str, list[float]]:
    """The usable strengths that a report of ``emovec evaluate`` (its JSON) found: concept -> lowest, highest.

    Raises:
        ValueError: a report without them.
    """
    try:
        found = {str(name): [float(low), float(high)] for name, (low, high) in report["sections"]["causality"]["usable"].items()}
    except (KeyError, TypeError, ValueError, AttributeError):
        raise ValueError("the report has no usable strengths; `emovec evaluate --sections causality` finds them") from None
    for name, (low, high) in found.items():
        if not (math.isfinite(low) and math.isfinite(high) and low <= high):
            raise ValueError(f"usable strengths of {shown(name)} must be a lowest and a highest number, got {shown([low, high])}")
    return found


def with_usable(bank: Bank, usable: Mapping[str, Sequence[float]]) -> Bank:
    """The bank with the strengths in which the model could still write, beyond which steering warns.

    Raises:
        UnknownConcept: listing the nearest names.
    """
    for name in usable:
        bank.resolve(name)
    return _with_meta(bank, {"usable": {name: list(ends) for name, ends in usable.items()}})
