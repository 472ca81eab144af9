"""Blocks of the prefix cache that steering has touched have a key of their own, so that nobody else reads them.

A block's hash covers those before it. So it is enough to mark the first block that holds a steered token: from the prompt's
first block on where the prompt is steered, from the first block with a generated token on where only those are.
"""

from __future__ import annotations

from typing import Any

from emovec.engines.vllm.requests import ADMITTED

OVERLAY = "emovec_overlay"
"""The attribute of a scheduler's request that a guard has steered."""


def block_key(request: Any, end: int) -> list[tuple[str, str]]:
    """The extra hash keys of the block of ``request`` that ends before position ``end``."""
    params = request.sampling_params
    admitted = None if params is None or not params.extra_args else params.extra_args.get(ADMITTED)
    if admitted is None:
        return []
    overlay = getattr(request, OVERLAY, None)  # (from which position on, its key)
    if overlay is not None and end > overlay[0]:
        key = f"{overlay[1]}@{overlay[0]}"
    else:
        key = admitted.get("key") if end > request.num_prompt_tokens else admitted.get("prompt_key")
    return [] if key is None else [(ADMITTED, key)]
