"""A decode step captured into a CUDA graph while attached: nothing on its way waits for the GPU or copies from the host."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode

from emovec.hook import attach

ROOT = Path(__file__).parent.parent
STEER = [{"calm": 0.3}, {"afraid": {"at_most": -0.5}}]


class StaysOnTheDevice(TorchDispatchMode):
    """Refuses what a capture would: values brought to the host, and copies of host memory."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func not in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default), func
        kwargs = kwargs or {}
        device = kwargs.get("device") or (args[0].device if func is torch.ops.aten.copy_.default else None)
        if func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default) and device is not None:
            source = args[1] if func is torch.ops.aten.copy_.default else args[0]
            assert source.device == torch.device(device), f"{func} from {source.device} to {device}"
        return func(*args, **kwargs)


def step(model, cache, ids):
    with torch.no_grad():
        return model(input_ids=ids, past_key_values=cache, use_cache=True).logits


@pytest.mark.filterwarnings("ignore:the model.s weights cannot be read")
def test_a_step_stays_on_the_device(monkeypatch):
    """On the meta device every value brought to the host is an error by itself."""
    model = tiny.fresh().to("meta")
    cache = transformers.StaticCache(config=model.config, max_cache_len=16)
    ids = torch.zeros(2, 1, dtype=torch.long, device="meta")
    monkeypatch.setattr("emovec.tracking._is_captured", lambda length: isinstance(length, torch.Tensor))
    with attach(model, tiny.bank(), steer=[{"calm": 0.3}, None], force=True) as probe:
        step(model, cache, ids.expand(2, 5))
        step(model, cache, ids)
        with StaysOnTheDevice():
            step(model, cache, ids)
        assert probe[0].kind == ("prompt",) * 5 + ("generated",) * 2


def test_a_captured_step_goes_on_from_the_one_before(monkeypatch):
    model, bank, ids = tiny.model(), tiny.bank(), tiny.tokens(2, 7)

    def decoded():
        cache = transformers.StaticCache(config=model.config, max_cache_len=16)
        with attach(model, bank, steer=STEER) as probe:
            logits = [step(model, cache, part) for part in (ids[:, :5], ids[:, 5:6], ids[:, 6:])]
        return logits, [reading.scores for reading in probe], [reading.kind for reading in probe]

    expected = decoded()
    monkeypatch.setattr("emovec.tracking._is_captured", lambda length: isinstance(length, torch.Tensor))
    torch.testing.assert_close(decoded()[:2], expected[:2], rtol=0, atol=0)
    assert decoded()[2] == expected[2]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_replays_read_and_steer():
    model, bank, ids = tiny.fresh().to("cuda", torch.bfloat16), tiny.bank(), tiny.tokens(2, 9).cuda()
    cache = transformers.StaticCache(config=model.config, max_cache_len=16)
    with attach(model, bank, steer=STEER) as probe:
        expected = [step(model, cache, part).clone() for part in ids.split(1, dim=1)]
        scores = [reading.scores for reading in probe]
        cache.reset()
        for column in range(3):
            step(model, cache, ids[:, column : column + 1])
        token, graph = ids[:, 3:4].clone(), torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = step(model, cache, token)
        for column in range(3, 9):
            token.copy_(ids[:, column : column + 1])
            graph.replay()
            torch.testing.assert_close(logits, expected[column], rtol=0.02, atol=0.02)
            for reading, known in zip(probe, scores, strict=True):
                torch.testing.assert_close(reading.scores[3], known[column], rtol=0.02, atol=0.02)


@pytest.mark.slow
def test_the_end_to_end_bench_runs(tmp_path):
    shape = "--hidden 64 --intermediate 96 --layers 3 --heads 4 --kv-heads 2 --vocab 128 --batches 1,3 --prompt 5 --steps 4 --rounds 2"
    command = [sys.executable, str(ROOT / "bench/end_to_end.py"), "--device", "cpu", *shape.split(), "--out", str(tmp_path / "x.json")]
    subprocess.run(command, check=True, capture_output=True)
    results = json.loads((tmp_path / "x.json").read_text())["results"]
    assert results["failed"] == []
    assert [case["batch"] for case in results["cases"]] == [1] * 4 + [3] * 4
    assert all(case["ratio"] > 0 for case in results["cases"])
