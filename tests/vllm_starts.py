"""Starts one engine after the other in this process, as a plan says: ``python vllm_starts.py PLAN RESULTS``.

A plan is JSON: a list of starts, each with the engine's ``options``, a ``bank`` to copy ``to`` a path before, and the requests to
``ask``: (prompt's ids, emotion_bias, emotion_scores). Results are saved with torch, a start's outputs and the compile cache after it.
"""

from __future__ import annotations

import gc
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from vllm_engine import generate, params, started

from emovec.engines.vllm import front, op


def run(options: dict[str, Any], ask: list[Any], bank: str | None = None, to: str | None = None) -> dict[str, Any]:
    if bank is not None and to is not None:
        shutil.copyfile(bank, to)
    with started(**options) as engine:
        outputs = generate(engine, [ids for ids, _, _ in ask], [params(value, scores) for _, value, scores in ask])
    return {"outputs": [shown(output) for output in outputs], "cache": cache()}


def shown(output: Any) -> dict[str, Any]:
    reading = getattr(output, "reading", None)
    read = reading and {"names": reading.names, "positions": list(reading.positions), "scores": reading.scores}
    return {"token_ids": list(output.token_ids), "stop_reason": output.stop_reason, "reading": read}


def cache() -> dict[str, dict[str, int]]:
    """What has been compiled: by key, each file with the time of its making."""
    keys = Path(os.environ["VLLM_CACHE_ROOT"], "torch_compile_cache", "torch_aot_compile").iterdir()
    return {key.name: {str(file): file.stat().st_mtime_ns for file in (key / "inductor_cache").rglob("*.so")} for key in keys}


if __name__ == "__main__":
    results = []
    for start in json.loads(Path(sys.argv[1]).read_text()):
        results.append(run(**start))
        gc.collect()
        assert front._made is None, "a front end waits for an engine"
        assert front._last is None or front._last() is None, "a front end is left over"
        assert not op.TAPS, "buffers are left over"
    torch.save(results, sys.argv[2])
