"""What the vLLM plugin does with a request, without vLLM: rows, thresholds, scores and the runner, on a model that puts out two tensors."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from banks import NAMES, make_bank

from emovec.engines.vllm import guard
from emovec.engines.vllm.requests import Admission
from emovec.engines.vllm.rows import ROWS_OF_ONE, Rows
from emovec.engines.vllm.scores import Chunk, Collector, Scorer, Wanted
from emovec.ops import Table
from emovec.steer import Steering, SteeringError

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


@pytest.mark.parametrize(
    ("value", "said"),
    [({"clam": 0.1}, "nearest known: calm"), ({"calm": 100}, "from -2 to 2"), (3, "got 3")],
    ids=str,
)
def test_what_a_threshold_of_the_server_lays_on_requests_is_checked_before_they_come(bank, value, said):
    with pytest.raises(SteeringError, match=f"threshold on 'afraid': .*{said}"):
        guard.parse([{"of": "afraid", "above": 1, "do": {"steer": value}}], bank)


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


def test_layers_that_are_read_together_come_as_one(bank):
    raw = torch.randn(2, 6, len(NAMES))
    scorer, prompt = Scorer(bank, (2, 4)), torch.arange(6) < 4
    scores = scorer(raw, prompt)
    assert torch.equal(scores, torch.cat([scorer(raw[:, :4], prompt[:4]), scorer(raw[:, 4:], prompt[4:])]))
    assert torch.equal(scores[:4], raw[1, :4]), "the prompt's baseline is the one that the op scores with"
    prompt, generated = bank[4].baseline("prompt"), bank[4].baseline("generated")
    projection = raw[1, 4:] * prompt.std + prompt.mean
    torch.testing.assert_close(scores[4:], (projection - generated.mean) / generated.std)
