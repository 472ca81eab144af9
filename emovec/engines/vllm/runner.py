"""The model runner's side: which rows a step's tokens have, and which scores are taken from it.

Everything follows from the batch's own metadata at every step: a request's tokens by where they start, their kind by their
position against the length of the prompt. So chunks of a prompt, preemption and a changed order of requests need nothing more.
``install`` finds that metadata in vLLM's V1 and V2 runners.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from emovec.bank import Bank
from emovec.engines.vllm import op
from emovec.engines.vllm.config import Config
from emovec.engines.vllm.guard import weights
from emovec.engines.vllm.requests import ADMITTED
from emovec.engines.vllm.rows import ROWS_OF_ONE, Rows
from emovec.engines.vllm.scores import Chunk, Scorer, Wanted
from emovec.engines.vllm.seams import after
from emovec.models import decoder_layers
from emovec.ops import Table
from emovec.tap import persistent

OUTPUT, WATCHED, SEEN = "emovec_scores", "emovec_watched", "emovec_seen"
"""The attributes of a ModelRunnerOutput that hold the step's chunks by request: scores that were asked for, values that a guard watches,
and what the server itself looks at, of all generated tokens and each of them once."""
STEERED = "emovec_steered"
"""The attribute of a ModelRunnerOutput with the number of the step's tokens that had a row, by request, each token once."""
OVERLAYS = "emovec_overlays"
"""The attribute of a SchedulerOutput that says what a guard lays over requests: name -> (from which position on, value)."""


@dataclass
class _Request:
    """steer: the value in JSON, or None. overlay: (from which position on, the value there). wanted: the scores, or None.

    watched: [K, thresholds], from scores to the values that a guard watches, or None. seen: what the server looks at, or None.
    computed: how many of its tokens have been; after a preemption some are computed again.
    """

    steer: str | None
    wanted: Wanted | None
    watched: Tensor | None = None
    seen: Wanted | None = None
    overlay: tuple[int, str] | None = None
    computed: int = 0

    @classmethod
    def of(cls, admitted: Mapping[str, Any], bank: Bank, seen: Wanted | None = None) -> _Request:
        scores = admitted.get("scores")
        watched = weights(admitted["guard"], bank) if "guard" in admitted else None
        return cls(admitted.get("steer"), None if scores is None else Wanted.of(scores), watched, seen)

    def values(self, position: int, count: int) -> list[tuple[int, int, str | None]]:
        """(from, to, value) of the tokens at ``position`` to ``position + count``."""
        end = position + count
        if self.overlay is None:
            return [(position, end, self.steer)]
        at = min(max(self.overlay[0], position), end)
        return [(position, at, self.steer), (at, end, self.overlay[1])]

    def span(self, position: int, count: int, prompt: int) -> tuple[int, int]:
        """Of which of the tokens at ``position`` to ``position + count`` scores are taken, as offsets."""
        if self.watched is not None:
            return 0, count
        spans = [one.span(position, count, prompt) for one in (self.wanted, self.seen) if one is not None]
        spans = [(begin, end) for begin, end in spans if begin < end]
        return (min(begin for begin, _ in spans), max(end for _, end in spans)) if spans else (0, 0)

    def new(self, begin: int, end: int) -> int:
        """How many tokens from position ``begin`` to ``end`` have not been computed before."""
        return max(0, end - max(begin, self.computed))


@dataclass(frozen=True)
class _Pick:
    """Tokens of one request whose scores are taken: ``count`` from position ``start`` on; those before ``prompt`` are of the prompt.

    Those before ``new`` have been computed before.
    """

    name: str
    request: _Request
    start: int
    count: int
    prompt: int
    new: int


class Runner:
    """What emovec does in one model runner.

    Args:
        runner: vLLM's, with its model loaded and not yet compiled.
        config: the configuration.
    """

    def __init__(self, runner: Any, config: Config) -> None:
        self._runner, self.config = runner, config
        device, dtype = runner.device, runner.model_config.dtype
        blocks = decoder_layers(runner.get_model())
        with torch.inference_mode(False):  # what is kept must be usable outside it
            row = persistent(torch.full((runner.max_num_tokens,), -1, dtype=torch.int32, device=device))
            self.scores = persistent(torch.zeros(len(config.layers), runner.max_num_tokens, len(config.bank.names), device=device))
            operands = {index: config.bank[index].operands(device, dtype) for index in config.hooked}
            room = 2 * ROWS_OF_ONE * runner.max_num_reqs  # a request has one value, and one more once a guard has steered it
            tables = {index: Table.empty(room, config.bank.width, device=device) for index in config.steer_layers}
        for tensors in (*map(vars, operands.values()), *map(vars, tables.values())):
            for tensor in tensors.values():
                persistent(tensor)
        pinned = device.type == "cuda"
        self._row = torch.full(row.shape, -1, dtype=torch.int32, pin_memory=pinned)  # the host's copy
        self._pick = torch.zeros(row.shape, dtype=torch.int64, pin_memory=pinned)
        self._picked = torch.zeros(row.shape, dtype=torch.int64, device=device)
        self._copied = torch.cuda.Event() if pinned else None  # type: ignore[no-untyped-call]
        self._written = 0  # tokens that may have a row on the device
        # a graph that was captured does what it was captured with: then every pass reads and looks at its rows
        self._always = device.type == "cuda" and not runner.model_config.enforce_eager
        self.step = op.Step(row, steers=self._always, reads=self._always)
        self.rows = Rows(config.bank, {index: (operands[index], tables[index]) for index in config.steer_layers})
        self._scorer = Scorer(config.bank, config.layers)
        self._requests: dict[str, _Request] = {}
        self._seen = Wanted("generated") if config.sees else None
        self._picks: list[_Pick] = []
        self._steered: dict[str, int] = {}
        self._count = 0
        scores = dict(zip(config.layers, self.scores, strict=True))
        op.claim(runner, {index: op.Tap(operands[index], tables.get(index), scores.get(index), self.step) for index in config.hooked})
        for index in config.hooked:
            blocks[index].register_forward_hook(op.hook(index))

    def install(self) -> None:
        """Take part in the runner's steps."""
        runner = self._runner
        after(runner, "execute_model", lambda _, scheduled, *args, **kwargs: self.follow(scheduled), first=True)
        after(runner, "sample_tokens", lambda result, *args: self.deliver(result))
        if hasattr(runner, "model_state"):
            after(runner.model_state, "prepare_inputs", lambda _, *given: self._prepare_v2(*given))
        else:
            after(runner, "_prepare_inputs", lambda _, scheduled, counts: self._prepare_v1(counts))

    def _prepare_v1(self, counts: Any) -> None:
        batch = self._runner.input_batch
        starts = self._runner.query_start_loc.np
        self.prepare(batch.req_id_to_index, starts, counts, batch.num_computed_tokens_cpu, batch.num_prompt_tokens)

    def _prepare_v2(self, batch: Any, states: Any) -> None:
        places = {name: place for place, name in enumerate(batch.req_ids)} if self._requests else {}
        prompts = states.prompt_len.np[batch.idx_mapping_np]
        self.prepare(places, batch.query_start_loc_np, batch.num_scheduled_tokens, batch.num_computed_tokens_np, prompts)

    def counts(self) -> dict[str, int]:
        """How many requests of ours are known, and steering values in the table. Values stay until their rows are needed."""
        return {"requests": len(self._requests), "values": len(self.rows)}

    # --- one step -----------------------------------------------------------------------------------------------------

    def follow(self, scheduled: Any) -> None:
        """Requests that came and went."""
        for request in scheduled.finished_req_ids:
            self._requests.pop(request, None)
        for new in scheduled.scheduled_new_reqs:
            admitted = ((new.sampling_params and new.sampling_params.extra_args) or {}).get(ADMITTED)
            ours = admitted is not None or self._seen is not None
            if ours and new.req_id not in self._requests:  # V2 brings what it has preempted as new
                self._requests[new.req_id] = _Request.of(admitted or {}, self.config.bank, self._seen)
        for name, overlay in getattr(scheduled, OVERLAYS, {}).items():
            if name in self._requests:
                self._requests[name].overlay = overlay

    def prepare(self, places: Mapping[str, int], starts: Any, counts: Any, computed: Any, prompts: Any) -> None:
        """Rows and scores of the coming pass.

        Without a request of ours in this step and the one before nothing is written and nothing copied.

        Args:
            places: request -> its place in the batch.
            starts: [requests], where each request's tokens start in the pass.
            counts: [requests], how many they are.
            computed: [requests], how many tokens of each have been computed before, which is the position of its first.
            prompts: [requests], the lengths of their prompts.
        """
        self._count += 1
        self._picks, self._steered = [], {}
        if self._copied is not None:
            self._copied.synchronize()  # the host's copies are still being read until then
        written = self._written
        self._row[:written] = -1
        self._written = 0
        picked: list[int] = []  # tokens of the pass
        for name, request in self._requests.items():
            place = places.get(name)
            if place is None:
                continue  # preempted, or not scheduled in this step
            first, count, position, prompt = (int(column[place]) for column in (starts, counts, computed, prompts))
            steered = 0
            for begin, end, value in request.values(position, count):
                if value is not None and begin < end:
                    of_prompt, of_generated = self.rows.of(value, self._count)
                    split = min(max(prompt, begin), end)
                    self._row[first + begin - position : first + split - position] = of_prompt
                    self._row[first + split - position : first + end - position] = of_generated
                    self._written = max(self._written, first + end - position)
                    steered += (of_prompt >= 0) * request.new(begin, split) + (of_generated >= 0) * request.new(split, end)
            if steered:
                self._steered[name] = steered
            begin, end = request.span(position, count, prompt)
            if begin < end:
                self._picks.append(_Pick(name, request, position + begin, end - begin, prompt, request.computed))
                picked.extend(range(first + begin, first + end))
            request.computed = max(request.computed, position + count)
        copied = max(written, self._written)
        if copied:
            self.step.row[:copied].copy_(self._row[:copied], non_blocking=True)
        if picked:
            self._pick[: len(picked)] = torch.tensor(picked)
            self._picked[: len(picked)].copy_(self._pick[: len(picked)], non_blocking=True)
        if self._copied is not None and (copied or picked):
            self._copied.record()
        self.step.steers = self._always or self._written > 0
        self.step.reads = self._always or bool(self._picks)

    def deliver(self, result: Any) -> None:
        """Put the scores of the pass, and how many tokens were steered, into its output, without waiting for the device."""
        picks, self._picks = self._picks, []
        steered, self._steered = self._steered, {}
        if not picks and not steered:
            return
        taken, event = self._taken(sum(pick.count for pick in picks)) if picks else (None, None)

        def attach(output: Any) -> None:
            setattr(output, STEERED, steered)
            if event is not None:
                event.synchronize()
            if taken is not None:
                self._attach(output, picks, taken)

        if hasattr(result, "get_output"):
            after(result, "get_output", attach)
        else:
            attach(result)

    def _taken(self, count: int) -> tuple[Tensor, Any]:
        """The op's scores of the picked tokens on the host, and the event after which they are there, or None."""
        taken = self.scores.index_select(1, self._picked[:count])
        if not taken.is_cuda:
            return taken, None
        copy = torch.empty(taken.shape, pin_memory=True)
        copy.copy_(taken, non_blocking=True)
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        return copy, event

    def _attach(self, output: Any, picks: list[_Pick], raw: Tensor) -> None:
        of_prompt = [position < pick.prompt for pick in picks for position in range(pick.start, pick.start + pick.count)]
        scores = self._scorer(raw, torch.tensor(of_prompt))
        chunks: dict[str, Chunk] = {}
        watched: dict[str, Chunk] = {}
        seen: dict[str, Chunk] = {}
        first = 0
        for pick in picks:
            request, wanted, own = pick.request, pick.request.wanted, scores[first : first + pick.count]
            first += pick.count
            if request.watched is not None:
                watched[pick.name] = Chunk(pick.start, (own @ request.watched).numpy())
            if request.seen is not None:
                begin, end = request.seen.span(pick.start, pick.count, pick.prompt)
                begin = max(begin, pick.new - pick.start)
                if begin < end:
                    seen[pick.name] = Chunk(pick.start + begin, own[begin:end].numpy())
            if wanted is not None:
                begin, end = wanted.span(pick.start, pick.count, pick.prompt)
                if begin < end:
                    columns = own[begin:end] if wanted.concepts is None else own[begin:end, list(wanted.concepts)]
                    chunks[pick.name] = Chunk(pick.start + begin, columns.numpy())
        setattr(output, OUTPUT, chunks)
        setattr(output, WATCHED, watched)
        setattr(output, SEEN, seen)
