"""The plugin for vLLM: all requests of a batch read and steered separately. ``docs/serving.md`` describes it.

vLLM calls :func:`register` in every process. Without ``"emovec"`` in ``--additional-config`` the engine is left as it is.
"""

from __future__ import annotations

from emovec.engines.vllm.seams import register

__all__ = ["register"]
