"""The parts of the vLLM plugin that need no vLLM: configuration, admission, rows, cache keys, scores, the middleware."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from banks import NAMES, make_bank

from emovec import reference
from emovec.engines.vllm import config, guard, op, selfcheck
from emovec.engines.vllm.cache import block_key
from emovec.engines.vllm.middleware import Middleware
from emovec.engines.vllm.replies import KEY, expect
from emovec.engines.vllm.requests import ADMITTED, Admission, RequestError
from emovec.engines.vllm.rows import ROWS_OF_ONE, Rows
from emovec.engines.vllm.runner import OUTPUT, WATCHED, Runner
from emovec.engines.vllm.scores import Chunk, Collector, Scorer, Wanted
from emovec.models import decoder_layers
from emovec.ops import Table
from emovec.steer import Steering, SteeringError


@pytest.fixture
def bank():
    return make_bank()


@pytest.fixture
def settings(bank):
    return config.Config(bank, (2, 4), (1, 2), {"steady": {"calm": 0.1, "on": "generated"}})


@pytest.fixture
def admission(settings):
    return Admission(settings, torch.float32)


# --- configuration ------------------------------------------------------------------------------------------------


def engine(**given):
    """What the plugin looks at of a VllmConfig."""
    parallel = SimpleNamespace(
        pipeline_parallel_size=1,
        prefill_context_parallel_size=1,
        decode_context_parallel_size=1,
        use_sequence_parallel_moe=False,
        use_ubatching=False,
    )
    text = SimpleNamespace(model_type="made-up", hidden_size=32, num_hidden_layers=6)
    model = SimpleNamespace(runner_type="generate", is_encoder_decoder=False, hf_text_config=text)
    defaults = {"speculative_config": None, "parallel_config": parallel, "model_config": model}
    return SimpleNamespace(**{**defaults, **given})


@pytest.fixture
def saved(bank, tmp_path):
    path = tmp_path / "bank.safetensors"
    bank.save(path)
    return str(path)


def test_an_engine_without_our_configuration_is_none_of_ours():
    assert config.load(engine(additional_config={})) is None
    assert not config.wanted(engine(additional_config={"other": {}}))


def test_the_configuration(saved, bank):
    loaded = config.load(engine(additional_config={"emovec": {"bank": saved, "layers": [4, 2, 4]}}))
    assert (loaded.layers, loaded.steer_layers, loaded.hooked) == ((2, 4), bank.steer_layers, (2, 4))
    config.check(engine(additional_config={"emovec": {"bank": saved}}), config.SUPPORTED[0])


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "bank must be"),
        ({"bank": "no-such"}, "no such file"),
        ({"layer": [2]}, "nearest known: layers"),
        ({"layers": [3]}, "no layer 3"),
        ({"layers": []}, "list of layers"),
        ({"steer_layers": [True]}, "list of layers"),
        ({"force": 1}, "true or false"),
        ({"profiles": 3}, "path of a TOML"),
        (3, "must be an object"),
    ],
    ids=str,
)
def test_a_wrong_configuration_says_what_is_wrong(saved, given, said):
    given = {"bank": saved, **given} if isinstance(given, dict) and given else given
    with pytest.raises((ValueError, KeyError), match=said):
        config.load(engine(additional_config={"emovec": given}))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"speculative_config": object()}, "speculative"),
        ({"model_config": SimpleNamespace(runner_type="pooling", is_encoder_decoder=False)}, "pooling"),
        ({"width": 64}, "residual width"),
        ({"layers": 3}, "layers \\[4\\] do not exist"),
    ],
    ids=str,
)
def test_what_cannot_be_served_rightly_is_refused(saved, given, said):
    made = engine(additional_config={"emovec": {"bank": saved}}, **{key: value for key, value in given.items() if key.endswith(("r", "g"))})
    if "width" in given:
        made.model_config.hf_text_config.hidden_size = given["width"]
    if "layers" in given:
        made.model_config.hf_text_config.num_hidden_layers = given["layers"]
    with pytest.raises(config.ConfigError, match=said):
        config.check(made, config.SUPPORTED[0])


def test_another_version_is_refused_by_name():
    with pytest.raises(config.ConfigError, match=r"supports vLLM 0\.32\.0, this is 0\.99\.0"):
        config.check(engine(), "0.99.0")


# --- admission ----------------------------------------------------------------------------------------------------


def test_the_forms_of_one_value(admission):
    value = {"calm": 0.1, "angry": {"at_most": 1.5}, "hostile": "ablate"}
    flat = {"emotion_bias.calm": 0.1, "emotion_bias.angry": '{"at_most": 1.5}', "emotion_bias.hostile": "ablate"}
    forms = [{"emotion_bias": value}, {"emotion_bias": json.dumps(value)}, flat, {"emotion_bias": Steering.parse(value, NAMES).to_dict()}]
    admitted = [admission.admit(form) for form in forms]
    assert admitted[0]["steer"] == Steering.parse(value, NAMES).to_json()
    assert all(one == admitted[0] for one in admitted)
    assert admission.admit({"emotion_bias": "steady"}) == admission.admit({"emotion_bias": {"calm": 0.1, "on": "generated"}})


@pytest.mark.parametrize("extra", [None, {}, {"other": 1}, {"emotion_bias": {}}, {"emotion_bias": {"calm": 0}}, {"emotion_scores": False}])
def test_a_request_that_asks_for_nothing_is_none_of_ours(admission, extra):
    assert admission.admit(extra) is None


def test_keys_of_blocks_tell_values_configurations_and_scopes_apart(admission, bank):
    def keys(value, of=admission):
        admitted = of.admit({"emotion_bias": value})
        return admitted["prompt_key"], admitted["key"]

    everywhere, other = keys({"calm": 0.1}), keys({"calm": 0.2})
    assert len({*everywhere, *other}) == 2, "one key for prompt and generated tokens alike, another for another strength"
    assert keys({"calm": 0.1, "on": "generated"})[0] is None
    both = keys({"calm": {"add": 0.1, "on": "prompt"}, "angry": {"add": 0.1, "on": "generated"}})
    assert both[0] == keys({"calm": {"add": 0.1, "on": "prompt"}})[0]
    assert both[1] != both[0]
    elsewhere = Admission(config.Config(bank, (2, 4), (2,)), torch.float32)
    assert keys({"calm": 0.1}, elsewhere)[1] != everywhere[1]


def test_rules_that_no_layer_can_hold_are_refused_at_once(bank):
    with pytest.warns(UserWarning, match="no baseline"):
        twins = bank.add("calmer", {index: bank[index].direction("calm") for index in bank})
    admission = Admission(config.Config(twins, (4,), (1,)), torch.float32)
    with pytest.raises(ValueError, match="too alike"):
        admission.admit({"emotion_bias": {"calm": "ablate", "calmer": "ablate"}})


@pytest.mark.parametrize(
    ("scores", "admitted"),
    [
        (True, {"on": "generated", "concepts": None, "top": None}),
        ('{"on": "all", "top": 3}', {"on": "all", "concepts": None, "top": 3}),
        ({"concepts": ["calm", "afraid"]}, {"on": "generated", "concepts": [3, 0], "top": None}),
    ],
    ids=str,
)
def test_what_scores_may_be_asked_for(admission, scores, admitted):
    assert admission.admit({"emotion_scores": scores}) == {"scores": admitted}


@pytest.mark.parametrize(
    "scores", ["yes", {"topp": 3}, {"top": 0}, {"concepts": []}, {"concepts": ["calm", "calm"]}, {"concepts": "calm"}, [1]]
)
def test_scores_that_cannot_be_given_are_refused(admission, scores):
    with pytest.raises(RequestError, match="emotion_scores"):
        admission.admit({"emotion_scores": scores})


# --- the guard ----------------------------------------------------------------------------------------------------


class Words:
    """A tokenizer whose token is the length of a word."""

    eos_token_id = 99

    def __call__(self, text, add_special_tokens):
        assert not add_special_tokens
        return {"input_ids": [len(word) for word in text.split()]}


def test_thresholds_of_the_server_and_of_a_request(settings):
    on_server = guard.parse([{"of": "hostile", "above": 3}], settings.bank)
    admission = Admission(replace(settings, guard=on_server), torch.float32, Words())
    assert [one["do"] for one in admission.admit(None)["guard"]] == ["stop"]
    mine = [
        {"of": {"desperate": 1, "calm": -0.5}, "above": 2, "hold": 1, "on": "generated", "do": {"refuse": "I would rather not"}},
        {"of": "Fear", "above": 2, "do": {"steer": {"calm": 0.1}}},
    ]
    for value in (mine, json.dumps(mine)):
        first, second, third = admission.admit({"emotion_guard": value, "emotion_bias": {"angry": 0.1, "calm": -0.1}})["guard"]
        assert (first["of"], second["tokens"]) == ("hostile", [1, 5, 6, 3, 99])
        assert third["steer"] == Steering.parse({"angry": 0.1, "calm": 0.1}, NAMES).to_json()
        assert third["key"] != admission.admit({"emotion_bias": {"angry": 0.1, "calm": -0.1}})["key"]
    weights = guard.weights([second, third], settings.bank)
    assert weights[:, 0].tolist() == [0, 0, 0, -0.5, 1, 0, 0]
    assert weights[:, 1].tolist() == [0.5, 0, 0, 0, 0.5, 0, 0]


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("stop", "list of 1 to 16"),
        ([], "list of 1 to 16"),
        ([{"of": "calm", "above": 1}] * 17, "list of 1 to 16"),
        ([3], "is an object"),
        ([{"of": "clam", "above": 1}], "nearest known: calm"),
        ([{"of": "calm"}], "above must be"),
        ([{"of": "calm", "above": 1, "holds": 3}], "nearest known: hold"),
        ([{"of": "calm", "above": 1, "do": "refuse"}], "do must be"),
        ([{"of": "calm", "above": 1, "do": {"refuse": ""}}], "do must be"),
        ([{"of": "calm", "above": 1, "do": {"steer": {"clam": 1}}}], "nearest known: calm"),
        ([{"of": "calm", "above": 1, "halflife": "x"}], "halflife must be"),
        ('[{"of": "calm", "above": NaN}]', "above must be"),
    ],
    ids=str,
)
def test_thresholds_that_mean_nothing_are_refused(settings, value, said):
    with pytest.raises(ValueError, match=said):
        Admission(settings, torch.float32, Words()).admit({"emotion_guard": value})


def test_a_threshold_without_a_baseline_is_refused():
    bare = make_bank(kinds=())
    with pytest.raises(SteeringError, match="no baseline"):
        guard.parse([{"of": "calm", "above": 1}], bare)


def test_a_watch_fires_as_a_guard_does(bank):
    """Smoothed, held off, in scope, not at the first token, and not twice at what is computed again."""
    given = [
        {"of": "calm", "above": 1.0, "halflife": 0, "hold": 2, "on": "all", "do": "stop"},
        {"of": "angry", "above": 1.0, "halflife": 0, "hold": 1, "on": "generated", "do": "steer"},
    ]
    watch = guard.Watch(given, prompt=3)
    values = np.array([[9, 9], [2, 9], [0, 0], [2, 2], [2, 0]], np.float32)
    assert watch.see(Chunk(0, values[:3])) == []
    (event,) = watch.see(Chunk(3, values[3:4]))
    assert (event.position, event.kind, event.of, event.value, event.do) == (3, "generated", "angry", 2.0, "steer")
    assert watch.see(Chunk(0, values[:4])) == [], "computed again after a preemption"
    (event,) = watch.see(Chunk(4, values[4:]))
    ended = guard.Watch(given[:1], prompt=1).see(Chunk(1, np.array([[2], [2], [0], [2], [2]], np.float32)))
    assert [event.position for event in ended] == [2], "what is stopped is not watched any more"
    assert event.shown() == {"position": 4, "kind": "generated", "of": "calm", "value": 2.0, "above": 1.0, "do": "stop"}


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


# --- rows ---------------------------------------------------------------------------------------------------------


def table_of(bank, rows):
    layers = {}
    for index in (1, 2):
        operands = bank[index].operands("cpu", torch.float32)
        layers[index] = (operands, Table.empty(rows, bank.width))
    return layers


def test_rows_do_what_the_value_says_and_go_when_others_need_them(bank):
    layers = table_of(bank, 2 * ROWS_OF_ONE)
    rows = Rows(bank, layers)
    gated = Steering.parse({"calm": {"add": 0.1, "when": "angry > 1"}, "afraid": 0.1}, NAMES)
    prompt, generated = rows.of(gated.to_json(), 1)
    for index, (operands, table) in layers.items():
        for kind, row in (("prompt", prompt), ("generated", generated)):
            alone = Table.build([gated.row(bank[index], kind)], operands)
            fallback = int(table.gate[row, 1])
            assert torch.equal(table.delta[[row, fallback]], alone.delta)
            assert table.gate_threshold[row] == alone.gate_threshold[0]
    assert rows.of(gated.to_json(), 2) == (prompt, generated), "the rows are still there"
    assert rows.of('{"calm": {"add": 0.1, "on": "generated"}}', 2)[0] == -1
    for number in range(20):
        rows.of(json.dumps({"calm": 0.01 * (number + 1)}), 3 + number)
    assert len(rows) <= 4
    fits = [json.dumps({"afraid": 0.01 * (number + 1)}) for number in range(5)]
    for value in fits[:4]:
        rows.of(value, 99)
    with pytest.raises(RuntimeError, match="no room"):
        rows.of(fits[4], 99)


# --- the prefix cache ---------------------------------------------------------------------------------------------


def test_the_blocks_that_are_touched_are_marked(admission):
    def request(value):
        admitted = admission.admit({"emotion_bias": value})
        params = SimpleNamespace(extra_args=None if admitted is None else {ADMITTED: admitted})
        return SimpleNamespace(sampling_params=params, num_prompt_tokens=40)

    assert block_key(request({}), 16) == []
    assert block_key(SimpleNamespace(sampling_params=None), 16) == []
    later = request({"calm": 0.1, "on": "generated"})
    assert [bool(block_key(later, end)) for end in (16, 32, 40, 48, 64)] == [False, False, False, True, True]
    whole = request({"calm": 0.1})
    assert block_key(whole, 16) == block_key(whole, 64) != []


# --- scores -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("on", "start", "count", "span"),
    [
        ("generated", 0, 10, (5, 10)),
        ("generated", 5, 1, (0, 1)),
        ("generated", 0, 5, (5, 5)),
        ("prompt", 0, 10, (0, 5)),
        ("prompt", 3, 4, (0, 2)),
        ("prompt", 5, 1, (0, 0)),
        ("all", 3, 4, (0, 4)),
    ],
)
def test_which_tokens_of_a_pass_are_wanted(on, start, count, span):
    assert Wanted(on).span(start, count, prompt=5) == span


def test_scores_are_put_together_by_position(bank):
    values = np.arange(5 * 7, dtype=np.float32).reshape(5, 7)
    collector = Collector(bank, (4,), Wanted("all"), 3, [10, 11, 12])
    collector.add([Chunk(3, values[3:]).packed(), Chunk(0, values[:2]).packed()])
    with pytest.raises(RuntimeError, match="missing"):
        collector.reading([20, 21, 22])
    collector.add([Chunk(1, values[1:4]).packed()])
    reading = collector.reading([20, 21, 22])
    assert torch.equal(reading.scores, torch.from_numpy(values))
    assert reading.kind == ("prompt",) * 3 + ("generated",) * 2
    assert reading.tokens.tolist() == [10, 11, 12, 20, 21]
    assert [position for position, _, _ in collector.after(4)] == [4]
    assert len(collector.reading([20])) == 4, "scores of tokens that a stop string cut off are not shown"
    one = Collector(bank, (2, 4), Wanted("generated", (3,)), 3, None)
    assert len(one.reading([20])) == 0
    one.add([Chunk(3, values[:1, :1]).packed()])
    assert one.reading([20, 21]).names == ("calm",)


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


@pytest.fixture
def served(settings):
    runner = FakeRunner(Model())
    ours = Runner(runner, settings)
    ours.install()
    yield runner, ours, runner.model
    op.TAPS.clear()
    op._owner = None


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


def test_layers_that_are_read_together_come_as_one(bank):
    raw = torch.randn(2, 6, len(NAMES))
    scorer, prompt = Scorer(bank, (2, 4)), torch.arange(6) < 4
    scores = scorer(raw, prompt)
    assert torch.equal(scores, torch.cat([scorer(raw[:, :4], prompt[:4]), scorer(raw[:, 4:], prompt[4:])]))
    assert torch.equal(scores[:4], raw[1, :4]), "the prompt's baseline is the one that the op scores with"
    prompt, generated = bank[4].baseline("prompt"), bank[4].baseline("generated")
    projection = raw[1, 4:] * prompt.std + prompt.mean
    torch.testing.assert_close(scores[4:], (projection - generated.mean) / generated.std)


# --- the middleware -----------------------------------------------------------------------------------------------


def ask(body, answer=None, path="/v1/chat/completions"):
    """What the application behind the middleware was sent, and what came back."""
    seen, sent = {}, []

    async def app(scope, receive, send):
        message = await receive()
        seen["body"], seen["headers"] = message["body"], dict(scope["headers"])
        await (answer or plain)(json.loads(message["body"]), send) if answer else await plain({}, send)

    async def plain(request, send):
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"application/json")]})
        await send({"type": "http.response.body", "body": b"{}"})

    parts = [body[:5], body[5:]]

    async def receive():
        part = parts.pop(0)
        return {"type": "http.request", "body": part, "more_body": bool(parts)}

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": path, "headers": [(b"content-length", str(len(body)).encode())]}
    asyncio.run(Middleware(app)(scope, receive, send))
    return seen, sent


def test_the_middleware_moves_our_fields_to_the_extra_arguments():
    value = {"calm": 0.05, "angry": {"at_most": 1}}
    seen, _ = ask(json.dumps({"model": "m", "emotion_bias": value, "vllm_xargs": {"other": 1}}).encode())
    moved = json.loads(seen["body"])
    assert moved == {"model": "m", "vllm_xargs": {"other": 1, "emotion_bias": json.dumps(value)}}
    assert int(seen["headers"][b"content-length"]) == len(seen["body"])
    assert json.loads(ask(b'{"emotion_bias": "steady"}')[0]["body"]) == {"vllm_xargs": {"emotion_bias": "steady"}}


@pytest.mark.parametrize(
    "body", [b'{"model":  "m"}', b"not json", b"[" * 100_000, b'{"emotion_bias": null}', b"[1, 2]"], ids=lambda body: str(body[:20])
)
def test_other_requests_pass_as_they_are(body):
    seen, sent = ask(body)
    assert seen["body"] == body
    assert sent[0]["status"] == 200


@pytest.mark.parametrize(
    ("body", "path", "said"),
    [
        (b'{"emotion_bias": {"calm": 0.1}, "use_beam_search": true}', "/v1/completions", "beam search"),
        (b'{"emotion_bias": ' + b"[" * 100_000, "/v1/completions", "JSON object"),
        (b'{"emotion_bias": {"calm": ' + b"9" * 5000 + b"}}", "/v1/completions", "JSON object"),
        (b'["emotion_bias"]', "/v1/completions", "JSON object"),
        (b'{"emotion_scores": true}', "/v1/responses", "alone"),
    ],
    ids=lambda part: str(part)[:30],
)
def test_what_could_have_no_effect_is_refused(body, path, said):
    seen, sent = ask(body, path=path)
    assert not seen
    assert sent[0]["status"] == 400
    assert said in json.loads(sent[1]["body"])["error"]["message"]


def scored(bank, request, count=1):
    """As the front end does: a collector for each choice of the reply that the request names."""
    reply = request["vllm_xargs"][KEY]
    collectors = [Collector(bank, (4,), Wanted("generated", (3, 0)), 2, [1, 2]) for _ in range(count)]
    for index, collector in enumerate(collectors):
        expect(reply, "cmpl-1-0", index, count, collector, 1)
    return collectors


def test_scores_are_put_into_a_whole_answer(bank):
    async def answer(request, send):
        collectors = scored(bank, request, 2)
        collectors[1].add([Chunk(2, np.array([[1.0, 2.0], [4.0, 3.0]], np.float32)).packed()])
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"7")]})
        await send({"type": "http.response.body", "body": b'{"choices": [{"index": 0}, ', "more_body": True})
        await send({"type": "http.response.body", "body": b'{"index": 1}]}'})

    _, sent = ask(b'{"emotion_scores": {"top": 1}}', answer)
    body = json.loads(sent[1]["body"])
    assert body["choices"][0] == {"index": 0}
    assert body["choices"][1]["emotion_scores"] == [
        {"position": 2, "kind": "generated", "scores": {"afraid": 2.0}},
        {"position": 3, "kind": "generated", "scores": {"calm": 4.0}},
    ]
    assert dict(sent[0]["headers"])[b"content-length"] == str(len(sent[1]["body"])).encode()


def test_scores_are_put_into_a_stream_as_they_come(bank):
    async def answer(request, send):
        (collector,) = scored(bank, request)
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream; charset=utf-8")]})
        for position in (2, 3):
            event = b'data: {"choices": [{"index": 0, "text": "\\u00e9"}]}\n\n'
            await send({"type": "http.response.body", "body": event[:30], "more_body": True})
            collector.add([Chunk(position, np.full((1, 2), position, np.float32)).packed()])
            await send({"type": "http.response.body", "body": event[30:], "more_body": True})
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n", "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    _, sent = ask(b'{"emotion_scores": true, "stream": true}', answer, "/v1/completions")
    events = b"".join(message["body"] for message in sent[1:]).decode().split("\n\n")
    first, second = (json.loads(event.removeprefix("data: "))["choices"][0] for event in events[:2])
    assert first["text"] == "é"
    assert [token["position"] for token in first["emotion_scores"]] == [2]
    assert [token["position"] for token in second["emotion_scores"]] == [3]
    assert events[2:] == ["data: [DONE]", ""]


def test_a_closed_reply_expects_nothing(bank):
    expect("gone", "cmpl-1-0", 0, 1, Collector(bank, (4,), Wanted(), 2, [1, 2]), None)
    with pytest.raises(SteeringError):
        Admission(config.Config(bank, (4,), (1,)), torch.float32).admit({"emotion_bias": {"clam": 1}})
