"""What the demo does, step by step: each function takes the model and the bank and returns plain figures."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from emovec.bank import Bank
from emovec.cli.read import read_text
from emovec.guard import Guard, GuardEvent, Stop, Threshold
from emovec.hook import attach
from emovec.models import encode
from emovec.monitor import Reading
from emovec.ops import Row, Table, apply_

PROMPTS = (
    "My daughter took her first steps today and ran straight into my arms!",
    "The doctor called. The tumour has spread, and there is nothing more they can do.",
    "They promoted him instead of me again, and he stole my idea to get it.",
    "I can hear someone moving downstairs, and I live alone.",
    "The lake is flat and silent this morning. I have nothing to do until Monday.",
    "Please convert 250 grams of flour to cups.",
)
STORY = (
    "The lake was flat and silent, and I had nothing to do until Monday. Then the phone rang. There had been an accident on the "
    "bridge, and nobody could tell me whether my son was on the bus. I could not breathe. Someone on the line kept lying to me, and I "
    "shouted at him. At last my boy walked in, soaked and laughing, and I held him and cried."
)
WRITE = "Write two sentences about my first day at the new job."
BIASES: tuple[dict[str, Any], ...] = ({}, {"calm": 0.05}, {"ecstatic": 0.05}, {"angry": 0.05}, {"desperate": 0.05})
FEELS = "Maya put down the phone. How does Maya feel? Maya feels"
FEELINGS = ("calm", "happy", "excited", "proud", "sad", "angry", "afraid", "desperate")
PAIR = ("frightened", "terrified")
TARGETS = (0.0, 1.5)
GUARDED = "desperate"
GUARD_BIAS = {"desperate": 0.07, "on": "generated"}
GUARD_PROMPT = "I have until tonight to fix the build and nothing works. What should I do?"
FALSE_ALARMS = 0.05


@dataclass(frozen=True)
class Loaded:
    """The model, its tokenizer and its bank."""

    model: Any
    tokenizer: Any
    bank: Bank

    def encode(self, text: str | Sequence[str], chat: bool | None = None) -> dict[str, torch.Tensor]:
        return encode(self.tokenizer, text, chat=chat, device=self.model.device)


def read(on: Loaded) -> list[Reading]:
    """Step 1: readings of the prompts' own words, and last of a short story."""
    return [read_text(on.model, on.tokenizer, on.bank, words) for words in (*PROMPTS, STORY)]


@dataclass(frozen=True)
class Steered:
    """Step 2. texts: what each bias made of one prompt; odds: bias -> word -> odds among the words after / before."""

    labels: tuple[str, ...]
    texts: tuple[str, ...]
    odds: dict[str, dict[str, float]]


def label(bias: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value:+.2f}" for name, value in bias.items()) or "no bias"


@torch.inference_mode()
def steer(on: Loaded, tokens: int = 40) -> Steered:
    """One batch in which each sequence has a bias of its own."""
    biases = list(BIASES)
    with attach(on.model, on.bank, steer=biases, read=False):
        inputs = on.encode([WRITE] * len(biases))
        width = inputs["input_ids"].shape[1]
        written = on.model.generate(**inputs, max_new_tokens=tokens, do_sample=False, pad_token_id=on.tokenizer.pad_token_id)
        logits = on.model(**on.encode([FEELS] * len(biases), chat=False)).logits[:, -1].float()
    texts = [on.tokenizer.decode(row[width:], skip_special_tokens=True).strip() for row in written]
    words = [on.tokenizer.encode(f" {word}", add_special_tokens=False)[0] for word in FEELINGS]
    chances = logits[:, words].double().softmax(-1)
    ratio = chances / (1 - chances) / (chances[0] / (1 - chances[0]))
    odds = {label(bias): dict(zip(FEELINGS, row, strict=True)) for bias, row in zip(biases[1:], ratio[1:].tolist(), strict=True)}
    return Steered(tuple(map(label, biases)), tuple(texts), odds)


@dataclass(frozen=True)
class Clamped:
    """Step 3. For each concept its mean score before and after, the target, and by how much a token is off at most.

    off: with both rules in one steering value. in_turn: with one after the other, which undoes the first.
    """

    names: tuple[str, ...]
    before: tuple[float, ...]
    after: tuple[float, ...]
    targets: tuple[float, ...]
    off: tuple[float, ...]
    in_turn: tuple[float, ...]
    cosine: float
    tokens: int


def clamp(on: Loaded) -> Clamped:
    """Set two correlated concepts to different scores at every token, and read the stream again after the rules."""
    layer = on.bank.read_layer
    rules = {name: {"set": target} for name, target in zip(PAIR, TARGETS, strict=True)}

    def scores(*steers: dict[str, Any]) -> torch.Tensor:
        """[tokens, 2]. Hooks run in the order they were attached, so the reader, attached last, sees what the others did."""
        probes = [attach(on.model, on.bank, steer=value, steer_layers=[layer], read=False) for value in steers]
        try:
            reading = read_text(on.model, on.tokenizer, on.bank, PROMPTS[3], layer=layer)
        finally:
            for probe in probes:
                probe.remove()
        return torch.stack([reading.of(name).float() for name in PAIR], 1)

    target = torch.tensor(TARGETS)
    before, after, in_turn = scores(), scores(rules), scores(*({name: rule} for name, rule in rules.items()))
    directions = [on.bank[layer].direction(name) for name in PAIR]
    return Clamped(
        PAIR,
        tuple(before.mean(0).tolist()),
        tuple(after.mean(0).tolist()),
        TARGETS,
        tuple((after - target).abs().amax(0).tolist()),
        tuple((in_turn - target).abs().amax(0).tolist()),
        float(directions[0] @ directions[1]),
        len(before),
    )


@dataclass(frozen=True)
class Guarded:
    """Step 4. The threshold that ordinary prompts gave, the event, the reading up to there, and what it wrote without the guard."""

    threshold: Threshold
    event: GuardEvent | None
    reading: Reading
    text: str
    unguarded: str
    ordinary: int


def guard(on: Loaded, ordinary: int = 40, tokens: int = 60) -> Guarded:
    """Calibrate a threshold on ordinary conversations, then let it watch a generation that is pushed toward despair."""
    from emovec.extraction.corpus import shipped

    layers = on.bank.read_layers
    lines = shipped("ordinary.jsonl").read_text(encoding="utf-8").splitlines()[:ordinary]
    with attach(on.model, on.bank, layers=layers, tokenizer=on.tokenizer) as probe:
        inputs = on.encode([json.loads(line)["content"] for line in lines])
        write(on, inputs, 24)
        readings = list(probe)
    threshold = Threshold.calibrated(GUARDED, readings, FALSE_ALARMS, Stop())
    inputs = on.encode(GUARD_PROMPT)
    with attach(on.model, on.bank, steer=GUARD_BIAS, layers=layers, guard=Guard(threshold), tokenizer=on.tokenizer) as probe:
        text = write(on, inputs, tokens)[0]
        reading, events = probe[0], probe.events
    with attach(on.model, on.bank, steer=GUARD_BIAS, read=False):
        unguarded = write(on, inputs, tokens)[0]
    return Guarded(threshold, events[0] if events else None, reading, text, unguarded, len(lines))


def write(on: Loaded, inputs: dict[str, torch.Tensor], tokens: int) -> list[str]:
    """The likeliest continuation of each sequence."""
    out = on.model.generate(**inputs, max_new_tokens=tokens, do_sample=False, pad_token_id=on.tokenizer.pad_token_id)
    return [on.tokenizer.decode(row[inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip() for row in out]


@dataclass(frozen=True)
class Timed:
    """Step 5. Medians in seconds: a forward pass, and the op that reads all concepts and adds at one layer, on the same tokens."""

    tokens: int
    forward: float
    op: float

    @property
    def share(self) -> float:
        return self.op / self.forward


@torch.inference_mode()
def time_it(on: Loaded, tokens: int, rounds: int = 9) -> Timed:
    """The op beside the forward pass, in turns, so that what else the machine does falls on both."""
    ids = torch.randint(100, 40_000, (1, tokens), device=on.model.device)
    layer = on.bank[on.bank.read_layer]
    x = torch.randn(tokens, layer.width, dtype=on.model.dtype, device=on.model.device)
    operands = layer.operands(x.device, x.dtype)
    table = Table.build([Row(delta=0.01 * layer.directions[0])], operands)
    scores = torch.empty(tokens, len(layer.names), device=x.device)
    spans: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds):
        for span, work in zip(
            spans, (lambda: on.model(ids, logits_to_keep=1), lambda: apply_(x, operands, table, scores=scores)), strict=True
        ):
            span.append(_seconds(work, x.device))
    forward, op = (statistics.median(span[1:]) for span in spans)
    return Timed(tokens, forward, op)


def _seconds(work: Any, device: torch.device) -> float:
    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    wait()
    start = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - start
