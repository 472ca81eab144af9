"""Blocks of the prefix cache that steering has touched have a key of their own, so that nobody else reads them.

A block's hash covers those before it. So it is enough to mark the first block that holds a steered token: from the prompt's
first block on where the prompt is steered, from the first block with a generated token on where only those are.
"""

from __future__ import annotations

from typing import Any

from emovec.engines.vllm.requests import ADMITTED


def block_key(request: Any, end: int) -> list[tuple[str, str]]:
    """The extra hash keys of the block of ``request`` that ends before position ``end``."""
    params = request.sampling_params
    admitted = None if params is None or not params.extra_args else params.extra_args.get(ADMITTED)
    if admitted is None or "steer" not in admitted:
        return []
    key = admitted["key"] if end > request.num_prompt_tokens else admitted["prompt_key"]
    return [] if key is None else [(ADMITTED, key)]
