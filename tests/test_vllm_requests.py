"""What the vLLM plugin accepts: its configuration, the fields of requests, and the keys of the cache blocks that they touch."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from banks import NAMES, make_bank

from emovec.engines.vllm import config
from emovec.engines.vllm.cache import block_key
from emovec.engines.vllm.requests import ADMITTED, Admission, RequestError
from emovec.steer import Steering, SteeringError

# --- configuration ------------------------------------------------------------------------------------------------


def engine(**given):
    """What the plugin looks at of a VllmConfig."""
    parallel = SimpleNamespace(
        pipeline_parallel_size=1,
        prefill_context_parallel_size=1,
        decode_context_parallel_size=1,
        use_sequence_parallel_moe=False,
        use_ubatching=False,
        _api_process_count=given.pop("servers", 1),
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
    config.check(engine(additional_config={"emovec": {"bank": saved}}, servers=2), config.SUPPORTED[0])
    assert (loaded.metrics, loaded.live, loaded.sees) == ((), False, False)
    loaded = config.load(engine(additional_config={"emovec": {"bank": saved, "metrics": ["Fear", "calm"]}}))
    assert (loaded.metrics, loaded.live, loaded.sees) == (("Fear", "calm"), False, True)


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
        ({"live": "yes"}, "live must be true or false"),
        ({"metrics": "everything"}, 'must be "all" or a list'),
        ({"metrics": ["calm", "clam"]}, "nearest known: calm"),
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


@pytest.mark.parametrize("asked", [{"live": True}, {"metrics": "all"}], ids=str)
def test_scores_of_all_tokens_are_seen_by_one_server_alone(saved, monkeypatch, asked):
    monkeypatch.delenv("PROMETHEUS_MULTIPROC_DIR", raising=False)
    ours = {"emovec": {"bank": saved, **asked}}
    config.check(engine(additional_config=ours), config.SUPPORTED[0])
    with pytest.raises(config.ConfigError, match="--api-server-count 1"):
        config.check(engine(additional_config=ours, servers=2), config.SUPPORTED[0])
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", "/tmp")
    if "metrics" in asked:
        with pytest.raises(config.ConfigError, match="PROMETHEUS_MULTIPROC_DIR"):
            config.check(engine(additional_config=ours), config.SUPPORTED[0])


def test_an_audit_that_cannot_be_written_is_found_at_start(saved, tmp_path):
    config.check(engine(additional_config={"emovec": {"bank": saved, "audit": str(tmp_path / "events.jsonl")}}), config.SUPPORTED[0])
    for path, said in ((tmp_path, "directory"), (tmp_path / "none" / "events.jsonl", "No such file")):
        with pytest.raises(config.ConfigError, match=f"audit .* cannot be written: .*{said}"):
            config.check(engine(additional_config={"emovec": {"bank": saved, "audit": str(path)}}), config.SUPPORTED[0])


@pytest.mark.parametrize(
    ("setting", "value", "said"),
    [
        ("pipeline_parallel_size", 2, "pipeline parallelism"),
        ("prefill_context_parallel_size", 2, "context parallelism"),
        ("decode_context_parallel_size", 2, "context parallelism"),
        ("use_sequence_parallel_moe", True, "sequence parallelism"),
        ("use_ubatching", True, "dual batch overlap"),
    ],
)
def test_ways_to_share_a_model_that_are_refused(saved, setting, value, said):
    made = engine(additional_config={"emovec": {"bank": saved}})
    setattr(made.parallel_config, setting, value)
    with pytest.raises(config.ConfigError, match=said):
        config.check(made, config.SUPPORTED[0])


def test_the_key_of_compiled_graphs_has_the_layers_of_the_bank(saved, bank):
    made = engine(additional_config={"emovec": {"bank": saved}, "other": 1})
    config.check(made, config.SUPPORTED[0])
    where = {"layers": list(bank.read_layers), "steer_layers": list(bank.steer_layers)}
    assert made.additional_config == {"emovec": {"bank": saved, **where}, "other": 1}
    make_bank((1, 3, 5)).save(saved)
    again = engine(additional_config={"emovec": {"bank": saved}, "other": 1})
    config.check(again, config.SUPPORTED[0])
    assert again.additional_config != made.additional_config


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


@pytest.mark.parametrize(
    ("name", "meant"), [("emotion_score", "emotion_scores"), ("emotion_bais", "emotion_bias"), ("emotion_biass.calm", "emotion_bias")]
)
def test_a_field_that_is_misspelt_is_refused(admission, name, meant):
    with pytest.raises(RequestError, match=f"unknown field '{name}'; nearest known: {meant}"):
        admission.admit({name: 1})


def test_a_profile_where_there_are_none(settings):
    with pytest.raises(SteeringError, match="no profiles to name, got 'steady'"):
        Admission(replace(settings, profiles={}), torch.float32).admit({"emotion_bias": "steady"})


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
