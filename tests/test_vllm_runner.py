"""The vLLM plugin in a runner, on a model that puts out two tensors as vLLM's do; no vLLM is needed."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from banks import NAMES

from emovec import reference
from emovec.engines.vllm import op, selfcheck
from emovec.engines.vllm.cache import block_key
from emovec.engines.vllm.requests import ADMITTED
from emovec.engines.vllm.runner import OUTPUT, SEEN, STEERED, WATCHED, Runner
from emovec.models import decoder_layers
from emovec.ops import Table
from emovec.steer import Steering

# --- the runner, on a model of ours -------------------------------------------------------------------------------


class Block(torch.nn.Module):
    """Puts out the stream as vLLM's do: what the block adds, and what was there before."""

    def __init__(self, width):
        super().__init__()
        self.linear = torch.nn.Linear(width, width)

    def forward(self, hidden, residual):
        residual = hidden if residual is None else hidden + residual
        return torch.tanh(self.linear(residual)), residual


class Model(torch.nn.Module):
    def __init__(self, width=32, layers=6):
        super().__init__()
        torch.manual_seed(3)
        self.config = SimpleNamespace(num_hidden_layers=layers, hidden_size=width)
        self.layers = torch.nn.ModuleList(Block(width) for _ in range(layers))

    def forward(self, hidden):
        residual = None
        for layer in self.layers:
            hidden, residual = layer(hidden, residual)
        return hidden + residual

    def by_hand(self, stream, change):
        """The same with one tensor for the stream; ``change(layer, stream)`` after each block."""
        for index, layer in enumerate(self.layers):
            stream = change(index, stream + torch.tanh(layer.linear(stream)))
        return stream


class FakeRunner:
    """As much of a V1 runner as ours sees; requests are laid end to end, with padding behind them."""

    def __init__(self, model, width=64, requests=8):
        self.device, self.model_config = torch.device("cpu"), SimpleNamespace(dtype=torch.float32, enforce_eager=True)
        self.max_num_tokens, self.max_num_reqs, self.model = width, requests, model
        self.query_start_loc = SimpleNamespace(np=np.zeros(requests + 1, dtype=np.int32))
        computed, prompts = np.zeros(requests, dtype=np.int32), np.zeros(requests, dtype=np.int32)
        self.input_batch = SimpleNamespace(req_id_to_index={}, num_computed_tokens_cpu=computed, num_prompt_tokens=prompts)

    def get_model(self):
        return self.model

    def execute_model(self, scheduled):
        pass

    def _prepare_inputs(self, scheduled, counts):
        self.query_start_loc.np[1 : len(counts) + 1] = np.cumsum(counts)

    def sample_tokens(self, grammar):
        return SimpleNamespace()

    def _dummy_run(self, tokens, force_attention):
        hidden = self.model(torch.linspace(-1, 1, tokens * 32).view(tokens, 32))
        return hidden, hidden


def serving(settings):
    runner = FakeRunner(Model())
    ours = Runner(runner, settings)
    ours.install()
    yield runner, ours, runner.model
    op.TAPS.clear()
    op._owner = None


@pytest.fixture
def served(settings):
    yield from serving(settings)


@pytest.fixture
def seeing(settings):
    yield from serving(replace(settings, live=True))


def new(name, admitted):
    return SimpleNamespace(req_id=name, sampling_params=SimpleNamespace(extra_args={ADMITTED: admitted} if admitted else None))


def step(runner, batch, arrivals=(), gone=()):
    """One step of requests name -> (computed, scheduled, prompt)."""
    runner.execute_model(SimpleNamespace(finished_req_ids=set(gone), scheduled_new_reqs=list(arrivals)))
    runner.input_batch.req_id_to_index = {name: index for index, name in enumerate(batch)}
    for index, (computed, _, prompt) in enumerate(batch.values()):
        runner.input_batch.num_computed_tokens_cpu[index] = computed
        runner.input_batch.num_prompt_tokens[index] = prompt
    runner._prepare_inputs(None, np.array([count for _, count, _ in batch.values()], dtype=np.int32))


def test_every_token_has_the_row_of_its_request_and_kind(served, admission):
    runner, ours, _ = served
    steered = admission.admit({"emotion_bias": {"calm": {"add": 0.1, "on": "prompt"}, "angry": {"at_most": 0.5}}})
    later = admission.admit({"emotion_bias": "steady"})
    step(runner, {"a": (0, 5, 8), "b": (0, 4, 4), "c": (2, 4, 4)}, [new("a", steered), new("b", None), new("c", later)])
    prompt, generated = ours.rows.of(steered["steer"], 0)
    none, after = ours.rows.of(later["steer"], 0)
    assert none == -1
    assert len({prompt, generated, after}) == 3
    assert ours.step.row.tolist() == [prompt] * 5 + [-1] * 4 + [-1, -1, after, after] + [-1] * 51
    assert ours.step.steers
    step(runner, {"c": (6, 1, 4), "a": (5, 5, 8)})  # in another order, over the end of the prompt
    assert ours.step.row.tolist() == [after] + [prompt] * 3 + [generated] * 2 + [-1] * 58
    step(runner, {"b": (8, 1, 4)})  # the others are preempted
    assert ours.step.row.eq(-1).all()
    assert not ours.step.steers
    step(runner, {"a": (0, 10, 8)}, gone=["c"])  # resumed: computed anew, generated tokens too
    assert ours.step.row.tolist() == [prompt] * 8 + [generated] * 2 + [-1] * 54
    step(runner, {"b": (9, 1, 4)}, gone=["a"])
    assert ours.counts()["requests"] == 0
    assert ours.step.row.eq(-1).all()


class StateOfV2:
    def prepare_inputs(self, batch, states):
        return {}


def step_v2(runner, batch, arrivals=(), gone=()):
    """The same of a V2 runner: requests keep a slot of their own, and the batch is in any order."""
    runner.execute_model(SimpleNamespace(finished_req_ids=set(gone), scheduled_new_reqs=list(arrivals)))
    slots = {name: 7 - sum(map(ord, name)) % 8 for name in batch}
    lengths = np.zeros(8, dtype=np.int32)
    for name, (_, _, prompt) in batch.items():
        lengths[slots[name]] = prompt
    computed, counts, _ = (np.array(column, dtype=np.int32) for column in zip(*batch.values(), strict=True))
    made = SimpleNamespace(
        req_ids=list(batch),
        idx_mapping_np=np.array(list(slots.values())),
        query_start_loc_np=np.concatenate([[0], np.cumsum(counts)]),
        num_scheduled_tokens=counts,
        num_computed_tokens_np=computed,
    )
    assert runner.model_state.prepare_inputs(made, SimpleNamespace(prompt_len=SimpleNamespace(np=lengths))) == {}


def test_a_v2_runner_gives_the_same_rows(settings, admission):
    runner = FakeRunner(Model())
    runner.model_state = StateOfV2()
    ours = Runner(runner, settings)
    ours.install()
    try:
        steered = admission.admit(
            {"emotion_bias": {"calm": {"add": 0.1, "on": "prompt"}, "angry": {"at_most": 0.5}}, "emotion_scores": True}
        )
        later = admission.admit({"emotion_bias": "steady"})
        step_v2(runner, {"a": (0, 5, 8), "b": (0, 4, 4), "c": (2, 4, 4)}, [new("a", steered), new("b", None), new("c", later)])
        prompt, generated = ours.rows.of(steered["steer"], 0)
        after = ours.rows.of(later["steer"], 0)[1]
        assert ours.step.row.tolist() == [prompt] * 5 + [-1] * 4 + [-1, -1, after, after] + [-1] * 51
        overlay = {"a": (9, later["steer"])}
        runner.execute_model(SimpleNamespace(finished_req_ids=set(), scheduled_new_reqs=[], emovec_overlays=overlay))
        step_v2(runner, {"c": (6, 1, 4), "a": (5, 5, 8)})
        assert ours.step.row.tolist() == [after] + [prompt] * 3 + [generated, after] + [-1] * 58
        step_v2(runner, {"b": (4, 1, 4), "a": (0, 10, 8)}, [new("a", steered)], gone=["c"])  # preempted, and back
        assert ours.step.row.tolist() == [-1] + [prompt] * 8 + [generated, after] + [-1] * 53
        assert getattr(runner.sample_tokens(None), OUTPUT)["a"].start == 8
        step_v2(runner, {"_dummy_req_0": (0, 16, 16)}, gone=["a"])
        assert ours.step.row.eq(-1).all()
    finally:
        op.TAPS.clear()
        op._owner = None


def test_the_hooked_model_reads_and_steers_the_sum_of_both_tensors(served, admission, bank):
    runner, _, model = served
    x = torch.randn(12, 32) * 4
    value = Steering.parse({"calm": 0.5, "angry": {"at_most": -0.5}, "afraid": "ablate"}, NAMES)
    seen = {}

    def change(index, stream):
        if index in (2, 4):
            seen[index] = stream.clone()
        if index in (1, 2):
            layer = bank[index]
            operands = layer.operands("cpu", torch.float32)
            table = Table.build([value.row(layer, "prompt"), value.row(layer, "generated")], operands)
            row = torch.tensor([0] * 8 + [1] * 4, dtype=torch.int32)
            args = (operands.readers_unpacked(), operands.directions, operands.mean, operands.inv_std)
            reference.apply_(stream, *args, None, row, *table.tensors())
        return stream

    with torch.inference_mode():
        plain = model(x)
        admitted = admission.admit({"emotion_bias": value.to_dict(), "emotion_scores": {"on": "all"}})
        step(runner, {"a": (0, 12, 8)}, [new("a", admitted)])
        steered = model(x)
        chunk = getattr(runner.sample_tokens(None), OUTPUT)["a"]
        expected = model.by_hand(x.clone(), change)
        step(runner, {"b": (0, 12, 12)}, [new("b", None)], gone=["a"])
        assert torch.equal(model(x), plain)
        assert not hasattr(runner.sample_tokens(None), OUTPUT)
    torch.testing.assert_close(steered, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(steered, plain, atol=1e-2)
    kinds = [("prompt", slice(0, 8)), ("generated", slice(8, 12))]
    scores = torch.cat([bank.score({4: seen[4][rows]}, kind) for kind, rows in kinds]).float()
    assert chunk.start == 0
    torch.testing.assert_close(torch.from_numpy(chunk.values), scores, rtol=1e-4, atol=1e-4)


def test_the_check_at_start(served):
    runner, ours, model = served
    selfcheck.check(ours, runner)
    assert (ours.step.steers, ours.step.reads) == (False, False)
    assert all(not bool(tap.table.delta.any()) for tap in op.TAPS.values() if tap.table is not None)
    decoder_layers(model)[2]._forward_hooks.clear()  # as if the model had been compiled before
    with pytest.raises(RuntimeError, match="layer 2 was not read"):
        selfcheck.check(ours, runner)


def test_a_steered_layer_that_is_not_hooked_is_found_out(served):
    runner, ours, model = served
    decoder_layers(model)[1]._forward_hooks.clear()
    with pytest.raises(RuntimeError, match="steering at layer 1 had no effect"):
        selfcheck.check(ours, runner)


def test_one_engine_in_a_process(served, settings):
    with pytest.raises(RuntimeError, match="another engine"):
        Runner(FakeRunner(Model()), settings)


def test_what_a_guard_lays_over_a_request_has_its_own_rows_and_keys(served, admission):
    runner, ours, _ = served
    base, over = (admission.admit({"emotion_bias": {"calm": strength}}) for strength in (0.1, 0.2))
    step(runner, {"a": (0, 6, 4)}, [new("a", base)])
    runner.execute_model(SimpleNamespace(finished_req_ids=set(), scheduled_new_reqs=[], emovec_overlays={"a": (8, over["steer"])}))
    step(runner, {"a": (6, 4, 4)})
    first, second = ours.rows.of(base["steer"], 0)[1], ours.rows.of(over["steer"], 0)[1]
    assert ours.step.row.tolist() == [first] * 2 + [second] * 2 + [-1] * 60
    step(runner, {"a": (0, 10, 4)})  # computed again after a preemption: each token as it was
    assert ours.step.row.tolist() == [ours.rows.of(base["steer"], 0)[0]] * 4 + [first] * 4 + [second] * 2 + [-1] * 54
    request = SimpleNamespace(sampling_params=SimpleNamespace(extra_args={ADMITTED: base}), num_prompt_tokens=4)
    before = [block_key(request, end) for end in (8, 16)]
    request.emovec_overlay = (8, over["key"])
    assert block_key(request, 8) == before[0]
    assert block_key(request, 16) == [(ADMITTED, f"{over['key']}@8")] != before[1]


def test_what_is_watched_comes_with_the_step(served, admission):
    runner, _, model = served
    thresholds = [{"of": {"calm": 2}, "above": 1}, {"of": "Fear", "above": 1}]
    admitted = admission.admit({"emotion_guard": thresholds, "emotion_scores": {"on": "generated"}})
    step(runner, {"a": (0, 6, 4)}, [new("a", admitted)])
    with torch.inference_mode():
        model(torch.randn(6, 32))
    output = runner.sample_tokens(None)
    watched, scores = getattr(output, WATCHED)["a"], getattr(output, OUTPUT)["a"]
    assert (watched.start, watched.values.shape, scores.start, scores.values.shape) == (0, (6, 2), 4, (2, 7))
    np.testing.assert_allclose(watched.values[4:, 0], 2 * scores.values[:, 3], rtol=1e-5)
    np.testing.assert_allclose(watched.values[4:, 1], scores.values[:, [0, 4]].mean(1), rtol=1e-5)


def taken(runner, model, tokens):
    with torch.inference_mode():
        model(torch.randn(tokens, 32))
    return runner.sample_tokens(None)


def test_the_server_sees_each_generated_token_once_whoever_asks(seeing, admission):
    runner, ours, model = seeing
    wants = admission.admit({"emotion_scores": {"on": "prompt"}})
    step(runner, {"a": (0, 6, 4), "b": (0, 3, 3)}, [new("a", wants), new("b", None)])
    output = taken(runner, model, 9)
    assert {name: (chunk.start, chunk.values.shape) for name, chunk in getattr(output, SEEN).items()} == {"a": (4, (2, 7))}
    assert {name: (chunk.start, chunk.values.shape) for name, chunk in getattr(output, OUTPUT).items()} == {"a": (0, (4, 7))}
    raw = ours.scores[:, 4:6]
    np.testing.assert_array_equal(getattr(output, SEEN)["a"].values, ours._scorer(raw, torch.tensor([False, False])).numpy())
    step(runner, {"b": (3, 1, 3), "a": (0, 7, 4)})  # computed again after a preemption: only the last is new
    seen = getattr(taken(runner, model, 8), SEEN)
    assert {name: (chunk.start, len(chunk.values)) for name, chunk in seen.items()} == {"b": (3, 1), "a": (6, 1)}
    step(runner, {"b": (4, 1, 3)}, gone=["a"])
    assert set(getattr(taken(runner, model, 1), SEEN)) == {"b"}
    step(runner, {}, gone=["b"])
    assert ours.counts()["requests"] == 0


def test_steered_tokens_are_counted_once(served, admission):
    runner, _, model = served
    everywhere, later = (admission.admit({"emotion_bias": value}) for value in ({"calm": 0.1}, "steady"))
    step(runner, {"a": (0, 5, 8), "b": (0, 4, 4), "c": (2, 4, 4)}, [new("a", everywhere), new("b", None), new("c", later)])
    output = taken(runner, model, 13)
    assert getattr(output, STEERED) == {"a": 5, "c": 2}
    assert not hasattr(output, OUTPUT)
    step(runner, {"a": (0, 6, 8), "b": (4, 1, 4)})
    assert getattr(taken(runner, model, 7), STEERED) == {"a": 1}
    step(runner, {"b": (5, 1, 4)})
    assert not hasattr(taken(runner, model, 1), STEERED)
