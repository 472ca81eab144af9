"""The engine core's side: keys of cache blocks, and scores on their way to the front end."""

from __future__ import annotations

from typing import Any

from vllm.logger import init_logger
from vllm.v1.core import kv_cache_utils

from emovec.engines.vllm.cache import block_key
from emovec.engines.vllm.requests import ADMITTED, asks
from emovec.engines.vllm.runner import OUTPUT

logger = init_logger("vllm.emovec")
_extra_keys = kv_cache_utils._gen_prompt_embeds_extra_hash_keys


def _with_ours(request: Any, start: int, end: int) -> list[Any]:
    return [*_extra_keys(request, start, end), *block_key(request, end)]


def install(scheduler: Any) -> None:
    """Take part in what a scheduler does. All that hashes blocks asks this one function for their extra keys."""
    kv_cache_utils._gen_prompt_embeds_extra_hash_keys = _with_ours
    add, update = scheduler.add_request, scheduler.update_from_output
    waiting: dict[str, list[Any]] = {}  # chunks of requests that have put out nothing since, such as a part of a prompt

    def update_from_output(scheduled: Any, result: Any) -> Any:
        for request, chunk in getattr(result, OUTPUT, {}).items():
            if request in scheduler.requests:
                waiting.setdefault(request, []).append(chunk.packed())
        outputs = update(scheduled, result)
        if waiting:
            for batch in outputs.values():
                for output in batch.outputs:
                    chunks = waiting.pop(output.request_id, None)
                    if chunks is not None:
                        # the one field of an output that carries what a plug-in likes
                        output.kv_transfer_params = {**(output.kv_transfer_params or {}), ADMITTED: chunks}
            for gone in waiting.keys() - scheduler.requests.keys():
                del waiting[gone]
        return outputs

    def add_request(request: Any) -> None:
        params = request.sampling_params
        if params is not None and asks(params.extra_args):
            logger.error("request %s was not admitted by emovec's front end: it is neither steered nor read", request.request_id)
        add(request)

    scheduler.add_request = add_request
    scheduler.update_from_output = update_from_output
