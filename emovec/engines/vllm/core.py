"""The engine core's side: keys of cache blocks, the guard, and scores on their way to the front end."""

from __future__ import annotations

from typing import Any

from vllm.logger import init_logger
from vllm.v1.core import kv_cache_utils
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, FinishReason
from vllm.v1.request import RequestStatus

from emovec.engines.vllm import config, guard
from emovec.engines.vllm.cache import OVERLAY, block_key
from emovec.engines.vllm.requests import ADMITTED, asks
from emovec.engines.vllm.runner import OUTPUT, OVERLAYS, SEEN, STEERED, WATCHED
from emovec.engines.vllm.tally import Tally

logger = init_logger("vllm.emovec")
_extra_keys = kv_cache_utils._gen_prompt_embeds_extra_hash_keys


def _with_ours(request: Any, start: int, end: int) -> list[Any]:
    return [*_extra_keys(request, start, end), *block_key(request, end)]


def install(scheduler: Any) -> None:
    """Take part in what a scheduler does. All that hashes blocks asks this one function for their extra keys."""
    kv_cache_utils._gen_prompt_embeds_extra_hash_keys = _with_ours
    loaded = config.load(scheduler.vllm_config)
    assert loaded is not None
    ours = _Core(scheduler, loaded)
    scheduler.add_request, scheduler.schedule, scheduler.update_from_output = ours.add_request, ours.schedule, ours.update_from_output


class _Core:
    def __init__(self, scheduler: Any, settings: config.Config) -> None:
        self._scheduler, self._audit = scheduler, guard.audit(settings.audit)
        self._live, self._tally = settings.live, Tally(settings.metrics, settings.bank) if settings.metrics else None
        self._steered = 0
        self._add, self._schedule, self._update = scheduler.add_request, scheduler.schedule, scheduler.update_from_output
        self._waiting: dict[str, dict[str, list[Any]]] = {}  # of requests that have put out nothing since, such as a part of a prompt
        self._watches: dict[str, guard.Watch] = {}
        self._overlays: dict[str, tuple[int, str]] = {}

    def add_request(self, request: Any) -> None:
        params = request.sampling_params
        if params is not None and asks(params.extra_args):
            logger.error("request %s was not admitted by emovec's front end: it is neither steered nor read", request.request_id)
        self._add(request)

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        scheduled = self._schedule(*args, **kwargs)
        if self._overlays:
            setattr(scheduled, OVERLAYS, self._overlays)
            self._overlays = {}
        return scheduled

    def update_from_output(self, scheduled: Any, result: Any) -> Any:
        requests = self._scheduler.requests
        for name, chunk in getattr(result, OUTPUT, {}).items():
            if name in requests:
                self._for(name)["scores"].append(chunk.packed())
        self._see({name: chunk for name, chunk in getattr(result, SEEN, {}).items() if name in requests})
        self._steered += sum(tokens for name, tokens in getattr(result, STEERED, {}).items() if name in requests)
        watched = {name: requests[name] for name in getattr(result, WATCHED, {}) if name in requests}
        outputs = self._update(scheduled, result)
        for name, request in watched.items():
            self._look(request, getattr(result, WATCHED)[name], outputs)
        self._count(outputs)
        if self._waiting or self._watches:
            for batch in outputs.values():
                for output in batch.outputs:
                    news = self._waiting.pop(output.request_id, None)
                    if news is not None:
                        # the one field of an output that carries what a plugin likes
                        output.kv_transfer_params = {**(output.kv_transfer_params or {}), ADMITTED: news}
            for kept in (self._waiting, self._watches):
                for gone in kept.keys() - requests.keys():
                    del kept[gone]
        return outputs

    def _for(self, name: str) -> dict[str, list[Any]]:
        return self._waiting.setdefault(name, {"scores": [], "events": [], "live": [], "counts": []})

    def _see(self, chunks: dict[str, Any]) -> None:
        """Generated tokens of any request."""
        if self._tally is not None and chunks:
            self._tally.add([chunk.values for chunk in chunks.values()])
        if self._live:
            for name, chunk in chunks.items():
                self._for(name)["live"].append(chunk.packed())

    def _count(self, outputs: Any) -> None:
        """Let the first output there is take the counts along, whosever they are."""
        first = next((output for batch in outputs.values() for output in batch.outputs), None)
        counts = self._tally.take() if first is not None and self._tally is not None else b""
        if first is not None and (counts or self._steered):
            self._for(first.request_id)["counts"] = [self._steered, counts]
            self._steered = 0

    def _look(self, request: Any, chunk: Any, outputs: Any) -> None:
        """Let a request's thresholds see what they watch, and do what they say. The strongest counts: stop, else refuse, else steer."""
        name, given = request.request_id, request.sampling_params.extra_args[ADMITTED]["guard"]
        if name not in self._watches:
            self._watches[name] = guard.Watch(given, request.num_prompt_tokens)
        events = self._watches[name].see(chunk)
        for event in events:
            try:
                self._audit(name, event)
            except OSError as error:  # a full disk is no reason to stop serving
                logger.error("emovec: %s of request %s is not in the audit: %s", event.shown(), name, error)
            self._for(name)["events"].append(event.shown())
        strongest = min(events, key=lambda event: ("stop", "refuse", "steer").index(event.do), default=None)
        if strongest is None:
            return
        action = given[strongest.index]
        if strongest.do != "steer":
            self._end(request, action.get("tokens", []), f"emotion_guard: {strongest.of}", outputs)
        elif getattr(request, OVERLAY, None) is None:
            # from the next token that is written: the blocks before it have their keys
            setattr(request, OVERLAY, (request.num_tokens, action["key"]))
            self._overlays[name] = (request.num_tokens, action["steer"])

    def _end(self, request: Any, tokens: list[int], reason: str, outputs: Any) -> None:
        """End a request with ``tokens`` in the place of the one that was chosen in this step."""
        name = request.request_id
        if name in self._scheduler.requests:
            self._scheduler.finish_requests(name, RequestStatus.FINISHED_STOPPED)
        batch = outputs.setdefault(request.client_index, EngineCoreOutputs(outputs=[]))
        output = next((one for one in batch.outputs if one.request_id == name), None)
        if output is None:
            output = EngineCoreOutput(request_id=name, new_token_ids=[])
            batch.outputs.append(output)
        output.new_token_ids, output.new_logprobs = list(tokens), None
        output.finish_reason, output.stop_reason = FinishReason.STOP, reason
