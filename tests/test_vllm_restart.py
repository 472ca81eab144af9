"""Engines that are started one after the other in one process, and share a compile cache with those of another process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from vllm_engine import Oracle
from vllm_small import configured, other_bank, prompts, renamed, saved

pytest.importorskip("vllm")

pytestmark = pytest.mark.engine

VALUES = [None, {"calm": 0.4}, {"desperate": 0.5}]


def starts(folder, *plan):
    """What a process of its own makes of a plan; all share a compile cache."""
    (folder / "plan.json").write_text(json.dumps(plan))
    script = Path(__file__).with_name("vllm_starts.py")
    env = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, script, folder / "plan.json", folder / "results.pt"]
    env |= {**os.environ, **env, "VLLM_CACHE_ROOT": str(folder / "cache")}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return torch.load(folder / "results.pt", weights_only=True)


def checked(oracle, values, outputs):
    for ids, value, output in zip(prompts(len(values)), values, outputs, strict=True):
        reading = output["reading"] and SimpleNamespace(**output["reading"])
        oracle.check(ids, value, SimpleNamespace(token_ids=output["token_ids"], reading=reading))
        assert reading is None or reading.names == oracle.bank.names


def test_off_on_and_with_another_bank_over_one_compile_cache(tmp_path):
    oracle, options = saved(tmp_path)
    mine, changing = tmp_path / "bank.safetensors", tmp_path / "changing.safetensors"
    other = Oracle(oracle.model, other_bank(oracle.bank))
    other.bank.save(tmp_path / "other.safetensors")

    def start(options, values, bank=None, scores=True):
        ask = [(ids, value, scores or None) for ids, value in zip(prompts(3), values, strict=True)]
        return {"options": options, "ask": ask, **({} if bank is None else {"bank": str(bank), "to": str(changing)})}

    off = start({**options, "additional_config": {}}, VALUES, scores=False)
    on = start({**options, **configured(changing)}, VALUES, mine)
    swapped = start(on["options"], renamed(VALUES), tmp_path / "other.safetensors")  # another bank under the same name
    first, second, third = starts(tmp_path, on, off, swapped)
    checked(oracle, VALUES, first["outputs"])
    checked(oracle, [None] * 3, second["outputs"])  # without the plugin's configuration nobody looks at a bias
    checked(other, renamed(VALUES), third["outputs"])
    assert [len(result["cache"]) for result in (first, second, third)] == [1, 2, 3], "each has a key of its own"

    guard = [{"of": "calm", "above": -40, "hold": 1, "on": "generated"}]  # fires at once
    watched = start({**options, **configured(changing, guard=guard), "enforce_eager": True}, VALUES)
    again, stopped, last = starts(tmp_path, on, watched, off)
    checked(oracle, VALUES, again["outputs"])
    for ids, value, output in zip(prompts(3), VALUES, stopped["outputs"], strict=True):
        assert output["token_ids"] == oracle.run(ids, value, 12)[0][:1]
        assert output["stop_reason"] == "emotion_guard: calm"
    checked(oracle, [None] * 3, last["outputs"])
    assert last["cache"].keys() == third["cache"].keys()
    ((key, compiled),) = first["cache"].items()
    assert compiled, "there is something in the cache"
    assert last["cache"][key] == compiled, "what comes again is not compiled again"
