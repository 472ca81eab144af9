"""What hooks cost a whole model: `python bench/end_to_end.py` decodes with random weights in the shape of an 8B Llama.

transformers' model in bf16 with a static cache, one token a step, chosen greedily, is hooked by `emovec.attach` at no layer, at
one and at all. "Reading" scores all concepts at every hooked layer, and "steering" adds a direction there as well. Measured is the
time from one token to the next, in up to three ways:

- `graph`: the step as one CUDA graph, captured by hand while attached. The time is the GPU's own.
- `eager`: the step called from Python, and waited for, as `generate` does.
- `compile`: `torch.compile(mode="reduce-overhead")`, for the first batch size, no layer and all; only with `--compile`.

Hook settings take turns within each round; figures are the minimum, median and maximum over all tokens of all rounds. A setting
is checked before it is timed: a replayed graph must give the scores of the same step in eager mode.

Results are written after each setting, so that what runs out of time or fails does not take the others with it. On a CPU, which
has no graphs, small options try out all but those: `--device cpu --hidden 64 --layers 3 ...`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import provenance
import torch
import transformers
from torch import Tensor

from emovec.bank import Bank, BankLayer, Baseline, fingerprint
from emovec.hook import Probe, attach

DTYPE = torch.bfloat16
STEER = {"concept_3": 0.05}
KINDS = ("prompt", "generated")
BEGIN = time.monotonic()


def log(*what: object) -> None:
    print(f"{time.monotonic() - BEGIN:6.1f} s ", *what, flush=True)


# --- model and bank ------------------------------------------------------------------------------------------------------


def make_model(o: argparse.Namespace) -> transformers.PreTrainedModel:
    config = transformers.LlamaConfig(
        hidden_size=o.hidden,
        intermediate_size=o.intermediate,
        num_hidden_layers=o.layers,
        num_attention_heads=o.heads,
        num_key_value_heads=o.kv_heads,
        vocab_size=o.vocab,
        max_position_embeddings=8192,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
    )
    torch.manual_seed(1)
    with torch.device(o.device):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=DTYPE, attn_implementation="sdpa")
    return model.eval()


def make_bank(model: transformers.PreTrainedModel, concepts: int) -> Bank:
    """Random directions and baselines at every layer."""
    g = torch.Generator().manual_seed(2)
    width, layers = model.config.hidden_size, range(model.config.num_hidden_layers)

    def layer(index: int) -> BankLayer:
        directions = torch.nn.functional.normalize(torch.randn(concepts, width, generator=g), dim=-1)
        baselines = {kind: Baseline(torch.randn(concepts, generator=g), 0.5 + torch.rand(concepts, generator=g), 1000) for kind in KINDS}
        return BankLayer(index, tuple(f"concept_{k}" for k in range(concepts)), directions, baselines=baselines, residual_norm=10.0)

    return Bank([layer(index) for index in layers], steer_layers=list(layers), meta={"fingerprint": fingerprint(model)})


@dataclass(frozen=True)
class Setting:
    """Which layers are hooked, and whether they steer."""

    layers: tuple[int, ...] = ()
    steers: bool = False

    def attached(self, model: torch.nn.Module, bank: Bank) -> Probe | nullcontext[None]:
        if not self.layers:
            return nullcontext()
        return attach(model, bank, STEER if self.steers else None, self.layers, steer_layers=self.layers)


def settings(bank: Bank) -> dict[str, Setting]:
    """The first, which the others are compared with, has no hooks."""
    return {
        "no hooks": Setting(),
        "1 layer, reading and steering": Setting((bank.read_layer,), True),
        "all layers, reading": Setting(bank.layers),
        "all layers, reading and steering": Setting(bank.layers, True),
    }


# --- one decode step --------------------------------------------------------------------------------------------------------


class Decoder:
    """A batch behind its prompt: the next token of each sequence, and the cache, which can be put back to where it was."""

    def __init__(self, model: transformers.PreTrainedModel, batch: int, prompt: int, steps: int) -> None:
        self.model, self.batch = model, batch
        self.call: Callable[..., Any] = model
        self.cache = transformers.StaticCache(config=model.config, max_cache_len=prompt + steps + 8)
        g = torch.Generator().manual_seed(batch)
        self.ids = torch.randint(model.config.vocab_size, (batch, prompt), generator=g).to(model.device)
        self.step(logits_to_keep=1)
        kept = [self.ids, *(t for layer in self.cache.layers for t in vars(layer).values() if isinstance(t, Tensor))]
        self._kept = [(tensor, tensor.clone()) for tensor in kept]

    def restore(self) -> None:
        for tensor, was in self._kept:
            tensor.copy_(was)

    def step(self, **options: Any) -> None:
        """Run the model on ``ids`` [batch, T], and put the tokens it chooses there [batch, 1]."""
        with torch.no_grad():
            self.logits = self.call(input_ids=self.ids, past_key_values=self.cache, use_cache=True, **options).logits[:, -1:]
            chosen = self.logits.argmax(-1)
            self.ids = self.ids.copy_(chosen) if self.ids.shape == chosen.shape else chosen

    def scores(self, probe: Probe, setting: Setting) -> Tensor:
        """[batch, K]: the scores of the latest token at the last hooked layer."""
        return torch.stack([probe[i].at(setting.layers[-1])[-1] for i in range(self.batch)]).double().cpu()


@dataclass
class Stepper:
    """A setting that is ready to be timed: ``run`` makes one step, and ``ready`` is entered around the steps of a round."""

    run: Callable[[], None]
    ready: Callable[[], Any] = nullcontext
    facts: dict[str, Any] = field(default_factory=dict)
    holds: object = None  # what a graph works on


def capture(step: Callable[[], None]) -> Callable[[], None]:
    """``step``, which has run before, as a CUDA graph."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    torch.cuda.synchronize()
    return graph.replay


def warm_up(decoder: Decoder) -> None:
    """Some steps on a stream of their own, as a capture wants."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            decoder.step()
    torch.cuda.current_stream().wait_stream(stream)


def eager(decoder: Decoder, setting: Setting, bank: Bank) -> Stepper:
    @contextmanager
    def ready() -> Iterator[None]:
        with setting.attached(decoder.model, bank):
            decoder.step()
            decoder.restore()
            yield

    return Stepper(decoder.step, ready)


def graph(decoder: Decoder, setting: Setting, bank: Bank) -> Stepper:
    """Raises RuntimeError if the graph does not do what the step does, or steering does nothing."""
    decoder.restore()
    decoder.step()
    plain = decoder.logits.double()
    with setting.attached(decoder.model, bank) as probe:
        decoder.restore()
        warm_up(decoder)
        decoder.restore()
        decoder.step()
        wanted, scores = decoder.logits.double(), decoder.scores(probe, setting) if setting.layers else None
        decoder.restore()
        replay = capture(decoder.step)
        logits = decoder.logits
    decoder.restore()
    logits.fill_(0)
    replay()
    facts = {
        "largest_logit": float(wanted.abs().max()),
        "logits_moved_by_hooks": float((wanted - plain).abs().max()),
        "logits_off_eager": float((logits.double() - wanted).abs().max()),
    }
    if scores is not None:
        off = (decoder.scores(probe, setting) - scores).abs().max()
        facts |= {"largest_score": float(scores.abs().max()), "scores_off_eager": float(off)}
    for what in ("logit", "score") if scores is not None else ("logit",):
        if not facts[f"{what}s_off_eager"] <= 0.05 * facts[f"largest_{what}"]:
            raise RuntimeError(f"the graph differs from the step: {facts}")
    if setting.steers and facts["logits_moved_by_hooks"] == 0:
        raise RuntimeError(f"steering moves nothing: {facts}")
    return Stepper(replay, facts=facts, holds=(probe, logits))


# --- timing -----------------------------------------------------------------------------------------------------------------


def gpu_times(run: Callable[[], None], steps: int) -> list[float]:
    """Milliseconds from token to token, by the GPU's clock."""
    events = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
    run()  # so that the next is launched before the GPU is free for it
    events[0].record()
    for event in events[1:]:
        run()
        event.record()
    events[-1].synchronize()
    return [before.elapsed_time(after) for before, after in pairwise(events)]


def wall_times(run: Callable[[], None], steps: int) -> list[float]:
    """Milliseconds from token to token, each waited for."""
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    times = []
    wait()
    for _ in range(steps):
        begin = time.perf_counter()
        run()
        wait()
        times.append((time.perf_counter() - begin) * 1000)
    return times


class Bench:
    def __init__(self, o: argparse.Namespace) -> None:
        self.o, self.cases, self.failed = o, list[Any](), list[Any]()
        self.provenance = provenance.machine()
        self.model = make_model(o)
        log(f"model of {sum(p.numel() for p in self.model.parameters()) / 1e9:.2f} G parameters")
        self.bank = make_bank(self.model, o.concepts)
        self.settings = settings(self.bank)
        log("bank")

    def late(self) -> bool:
        return time.monotonic() - BEGIN > self.o.seconds

    def write(self) -> None:
        shape = {name: getattr(self.o, name) for name in ("hidden", "intermediate", "layers", "heads", "kv_heads", "vocab")}
        results = {"model": shape, "dtype": str(DTYPE), "concepts": self.o.concepts, "prompt": self.o.prompt, "cases": self.cases}
        answer = {"provenance": self.provenance, "results": {**results, "failed": self.failed}}
        self.o.out.parent.mkdir(parents=True, exist_ok=True)
        self.o.out.write_text(json.dumps(answer, indent=1, allow_nan=False) + "\n", encoding="utf-8")

    def fail(self, batch: int, way: str, setting: str, problem: str) -> None:
        log(f"batch {batch}, {way}, {setting}: {problem}")
        self.failed.append({"batch": batch, "way": way, "setting": setting, "problem": problem})
        self.write()

    def attempt(self, batch: int, way: str, setting: str, work: Callable[[], Any]) -> Any:
        """What ``work`` gives, or None where it fails or it is too late."""
        if self.late():
            return self.fail(batch, way, setting, "out of time")
        try:
            return work()
        except Exception as problem:
            return self.fail(batch, way, setting, f"{type(problem).__name__}: {problem}"[:400])

    def add(self, batch: int, way: str, times: Mapping[str, list[float]], facts: Mapping[str, dict[str, Any]]) -> None:
        base = statistics.median(times["no hooks"]) if times.get("no hooks") else None
        for name, found in times.items():
            if not found:
                continue
            chosen = self.settings[name]
            median = statistics.median(found)
            case = {"batch": batch, "way": way, "setting": name, "hooked_layers": len(chosen.layers), "steers": chosen.steers}
            measured = {"ms_min_median_max": [min(found), median, max(found)], "tokens": len(found), "ratio": base and median / base}
            self.cases.append(case | measured | facts.get(name, {}))
            ratio = "" if base is None else f"  x {median / base:.4f}"
            log(f"batch {batch:3d}  {way:8s} {name:33s} {min(found):8.3f} {median:8.3f} {max(found):8.3f} ms{ratio}")
        self.write()

    def measure(self, decoder: Decoder, way: str, make: Callable[..., Stepper], clock: Callable[..., list[float]], rounds: int) -> None:
        ready: dict[str, Stepper] = {}
        for name, setting in self.settings.items():
            made = self.attempt(decoder.batch, way, name, lambda setting=setting: make(decoder, setting, self.bank))
            if made is not None:
                ready[name] = made
        times: dict[str, list[float]] = {name: [] for name in ready}

        def one(stepper: Stepper) -> list[float]:
            with stepper.ready():
                decoder.restore()
                return clock(stepper.run, self.o.steps)

        for turn in range(rounds):
            for name in list(ready) if turn % 2 == 0 else list(reversed(ready)):
                if turn > 0 and self.late():
                    break
                found = self.attempt(decoder.batch, way, name, lambda name=name: one(ready[name]))
                if found is None:
                    del ready[name]
                else:
                    times[name] += found
        self.add(decoder.batch, way, times, {name: stepper.facts for name, stepper in ready.items()})

    def measure_compiled(self, decoder: Decoder) -> None:
        """Attaching makes the graph be made anew, so a setting is compiled and timed before the next; the first, again after it."""
        decoder.call = torch.compile(self.model, mode="reduce-overhead", dynamic=False)
        times: dict[str, list[float]] = {}
        everything = list(self.settings)[-1]

        def one(name: str) -> list[float]:
            found = []
            with self.settings[name].attached(self.model, self.bank):
                for _ in range(3):
                    decoder.restore()
                    decoder.step()
                log(f"compiled: {name}")
                for _ in range(self.o.rounds):
                    decoder.restore()
                    found += wall_times(decoder.step, self.o.steps)
            return found

        for name in ("no hooks", everything, "no hooks"):
            times[name] = times.get(name, []) + (self.attempt(decoder.batch, "compile", name, lambda name=name: one(name)) or [])
        decoder.call = self.model
        self.add(decoder.batch, "compile", times, {})

    def run(self) -> None:
        decoders = {}
        for batch in self.o.batches:

            def made(batch: int = batch) -> Decoder:
                return Decoder(self.model, batch, self.o.prompt, self.o.steps)

            decoder = self.attempt(batch, "prefill", "no hooks", made)
            if decoder is None:
                continue
            if self.o.graphs:
                self.measure(decoder, "graph", graph, gpu_times, self.o.rounds)
            decoders[batch] = decoder
        for decoder in decoders.values():  # graphs matter most, so they come first
            self.measure(decoder, "eager", eager, wall_times, max(1, self.o.rounds // 3))
        if self.o.compile and decoders:
            self.measure_compiled(next(iter(decoders.values())))
        self.write()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shape = {"hidden": 4096, "intermediate": 14336, "layers": 32, "heads": 32, "kv-heads": 8, "vocab": 128256, "concepts": 171}
    for name, default in {**shape, "prompt": 256, "steps": 16, "rounds": 8}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--batches", type=lambda text: [int(part) for part in text.split(",")], default=[1, 8, 64])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seconds", type=float, default=75, help="begin nothing further so long after the imports")
    parser.add_argument("--compile", action="store_true", help="torch.compile as well; takes some minutes more")
    parser.add_argument("--out", type=Path, default=provenance.RESULTS / "end_to_end.json")
    o = parser.parse_args()
    if o.device.startswith("cuda") and not torch.cuda.is_available():
        raise SystemExit("no CUDA device")
    o.graphs = o.device.startswith("cuda")
    Bench(o).run()


if __name__ == "__main__":
    main()
