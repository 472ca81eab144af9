"""`emovec serve` as clients see it."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from vllm_engine import CLOSE, NAME, TEXTS, Oracle
from vllm_server import KEY, LIVE, Listening, counted, gained, post, serving, text_of

from emovec.engines.vllm.tally import BOUNDS

pytest.importorskip("vllm")
requests = pytest.importorskip("requests")


pytestmark = pytest.mark.engine

PAGE = (Path(__file__).parents[1] / "docs" / "serving.md").read_text()


@pytest.fixture(scope="module")
def oracle():
    return Oracle()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with serving(tmp_path_factory.mktemp("server")) as url:
        yield url


def written(oracle, ids, value):
    return oracle.tokenizer.decode(oracle.run(ids, value, 12)[0], skip_special_tokens=True)


def test_the_three_forms_of_a_request_do_the_same(server, oracle):
    ids = oracle.ids(TEXTS[0])
    value = {"desperate": 0.1}
    whole = text_of(post(server, prompt=ids, emotion_bias=value))
    assert whole == written(oracle, ids, value)
    assert whole == text_of(post(server, prompt=ids, vllm_xargs={"emotion_bias": json.dumps(value)}))
    assert whole == text_of(post(server, prompt=ids, vllm_xargs={"emotion_bias.desperate": 0.1}))
    assert whole != text_of(post(server, prompt=ids))
    assert text_of(post(server, prompt=ids, emotion_bias="steady")) == written(oracle, ids, {"calm": 0.05, "on": "generated"})


def test_chat_with_scores(server, oracle):
    value = {"calm": 0.05}
    wanted = {"concepts": ["calm", "desperate"]}
    messages = [{"role": "user", "content": TEXTS[0]}]
    answer = post(server, "/v1/chat/completions", messages=messages, emotion_bias=value, emotion_scores=wanted)
    choice = answer.json()["choices"][0]
    ids = oracle.ids(TEXTS[0])
    tokens, _, reading = oracle.run(ids, value, 12)
    assert choice["message"]["content"].strip() == oracle.tokenizer.decode(tokens, skip_special_tokens=True).strip()
    found = choice["emotion_scores"]
    assert [token["position"] for token in found] == list(range(len(ids), len(ids) + len(tokens) - 1))
    for name in wanted["concepts"]:
        mine = torch.tensor([token["scores"][name] for token in found])
        torch.testing.assert_close(mine, reading.of(name)[len(ids) :], **CLOSE)
    assert "emotion_scores" not in post(server, "/v1/chat/completions", messages=messages).json()["choices"][0]


@pytest.mark.parametrize("chat", [False, True], ids=["completions", "chat"])
def test_a_stream_with_scores(server, oracle, chat):
    ids = oracle.ids(TEXTS[1])
    body = {"messages": [{"role": "user", "content": TEXTS[1]}]} if chat else {"prompt": ids}
    path = "/v1/chat/completions" if chat else "/v1/completions"
    body |= {"emotion_bias": {"calm": 0.05}, "emotion_scores": {"top": 3, "on": "all"}, "stream": True}
    events = [line.decode() for line in post(server, path, **body).iter_lines() if line]
    assert events[-1] == "data: [DONE]"
    choices = [choice for event in events[:-1] for choice in json.loads(event.removeprefix("data: "))["choices"]]
    with_scores = [choice["emotion_scores"] for choice in choices if "emotion_scores" in choice]
    assert len(with_scores) > 3, "they come as they are made, not all at the end"
    found = [token for part in with_scores for token in part]
    tokens, _, reading = oracle.run(ids, {"calm": 0.05}, 12)
    assert [token["position"] for token in found] == list(range(len(ids) + len(tokens) - 1))
    assert all(len(token["scores"]) == 3 for token in found)
    for token in found[1:]:
        for name, score in token["scores"].items():
            assert abs(score - float(reading.of(name)[token["position"]])) < 0.05
    text = "".join((choice["delta"].get("content") or "") if chat else choice["text"] for choice in choices)
    assert text.strip() == oracle.tokenizer.decode(tokens, skip_special_tokens=True).strip()


def test_several_prompts_and_several_choices(server, oracle):
    both = [oracle.ids(text) for text in TEXTS[:2]]
    wanted = {"concepts": ["calm"]}
    answer = post(server, prompt=both, n=2, temperature=1.0, seed=3, emotion_scores=wanted, emotion_bias={"calm": 0.05}).json()
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    starts = [choice["emotion_scores"][0]["position"] for choice in answer["choices"]]
    assert starts == [len(both[0])] * 2 + [len(both[1])] * 2


def test_a_client_that_leaves_changes_nothing_for_the_next(server, oracle):
    ids = oracle.ids(TEXTS[0])
    before = text_of(post(server, prompt=ids))
    for _ in range(3):
        body = {"model": NAME, "prompt": ids, "max_tokens": 300, "ignore_eos": True, "stream": True}
        body |= {"emotion_bias": {"desperate": 0.2}, "emotion_scores": True}
        with requests.post(f"{server}/v1/completions", json=body, headers=KEY, stream=True, timeout=120) as answer:
            for _ in zip(range(3), answer.iter_lines(), strict=False):
                pass
    assert text_of(post(server, prompt=ids)) == before
    assert text_of(post(server, prompt=ids, emotion_bias={"calm": 0.05})) == written(oracle, ids, {"calm": 0.05})


def test_the_commands_of_the_page(server):
    commands = [block for block in re.findall(r"^```sh\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE) if block.startswith("curl -s ")]
    assert commands
    for command in commands:
        command = command.replace("curl", f"curl -H 'Authorization: {KEY['Authorization']}'").replace("localhost:8000", server)
        answer = json.loads(subprocess.check_output(["bash", "-c", command]))
        (choice,) = answer["choices"]
        assert choice["text"]
        assert {name for token in choice["emotion_scores"] for name in token["scores"]} == {"calm", "desperate"}
    bodies = [
        json.loads(line) for block in re.findall(r"^```json\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE) for line in block.splitlines()
    ]
    assert bodies
    for body in bodies:
        assert text_of(post(server, prompt="My code fails again. I feel", **body))


def test_metrics(server):
    guard = [{"of": {"calm": 1, "angry": -1}, "above": -40, "hold": 1, "on": "generated"}]
    before = counted(server)
    assert post(server, prompt=[1, 2, 3], emotion_bias={"calm": 0.05}, emotion_scores=True, max_tokens=4, ignore_eos=True).ok
    assert post(server, prompt=[1, 2, 3], emotion_bias={"clam": 0.05}).status_code == 400
    assert post(server, prompt=[1, 2, 3], emotion_guard=guard, ignore_eos=True).ok
    assert {name: value for name, value in gained(server, before).items() if not name.startswith("emovec_score_")} == {
        "emovec_steered_requests_total": 1,
        "emovec_refused_requests_total": 1,
        "emovec_scored_tokens_total": 3,
        "emovec_steered_tokens_total": 6,  # three of the prompt, and three of four that were written: the last is not run
        'emovec_guard_events_total{do="stop",of="weighted sum"}': 1,
    }


def test_the_scores_of_all_generated_tokens_are_counted(server):
    """Those of a request that asks for none as well: the same tokens count the same. (What is returned is rounded.)"""
    body = {"prompt": [1, 2, 3], "max_tokens": 20, "ignore_eos": True}
    before = counted(server)
    assert post(server, **body).ok
    unasked = gained(server, before)
    before = counted(server)
    tokens = post(server, **body, emotion_scores={"on": "all"}).json()["choices"][0]["emotion_scores"]
    assert {name: value for name, value in gained(server, before).items() if name.startswith("emovec_score_")} == unasked
    found = [token["scores"] for token in tokens if token["kind"] == "generated"]
    assert len(found) == 19
    for concept in found[0]:
        for end in (*BOUNDS, math.inf):
            label = "+Inf" if end == math.inf else str(end)
            counts = unasked.get(f'emovec_score_bucket{{concept="{concept}",le="{label}"}}', 0)
            at_least, at_most = (sum(scores[concept] <= end + rounding for scores in found) for rounding in (-1e-4, 1e-4))
            assert at_least <= counts <= at_most
    assert unasked['emovec_score_bucket{concept="calm",le="+Inf"}'] == 19


def test_the_dashboard_asks_for_what_there_is(server):
    """Each of its metrics is exposed, with the labels and the buckets that it names."""
    assert post(server, prompt=[1, 2, 3], emotion_guard=[{"of": "calm", "above": -40, "hold": 1}]).ok
    exposed = {}
    for sample in counted(server):
        name, _, labels = sample.partition("{")
        exposed.setdefault(name, set()).update(re.findall(r'(\w+)="([^"]*)"', labels))
    dashboard = json.loads(subprocess.check_output([sys.executable, "-m", "emovec", "serve", "--grafana"]))
    variables = {variable["name"]: variable for variable in dashboard["templating"]["list"]}
    targets = [target for panel in dashboard["panels"] for target in panel["targets"]]
    assert len(targets) > 10
    of_prometheus = {"job", "instance"}
    used = set()
    for target in targets:
        expression = target["expr"]
        metrics = set(re.findall(r"emovec_\w+", expression))
        assert metrics
        assert metrics <= exposed.keys()
        used |= metrics
        assert set(re.findall(r"\$(\w+)", expression)) <= {*variables, "__rate_interval", "__range"}
        for metric, matchers in re.findall(r"(emovec_\w+)\{([^}]*)\}", expression):
            known = {label for label, _ in exposed[metric]} | of_prometheus
            for label, value in re.findall(r'(\w+)=~?"([^"]*)"', matchers):
                assert label in known
                assert value.startswith("$") or (label, value) in exposed[metric]
        known = set.union(*({label for label, _ in exposed[metric]} for metric in metrics))
        for labels in re.findall(r"by \(([^)]*)\)", expression):
            assert set(labels.split(", ")) <= known
        assert set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"])) <= known
        assert expression.count("(") == expression.count(")")
    assert used == {name for name in exposed if not name.endswith("_created")}, "and what is exposed is shown"
    for variable in variables.values():
        for metric, label in re.findall(r"label_values\((emovec_\w+)(?:\{[^}]*\})?, (\w+)\)", variable.get("definition", "")):
            assert label in {label for label, _ in exposed[metric]} | of_prometheus


# --- the live view ------------------------------------------------------------------------------------------------


def test_the_live_view_shows_all_requests_and_no_text(server, oracle):
    ids = oracle.ids(TEXTS[0])
    (of_the_page,) = re.findall(r"^curl -N 'localhost:8000/v1/emotions/live(\S+)'$", PAGE, re.MULTILINE)
    with Listening(server, of_the_page) as live, Listening(server) as strongest:
        plain = post(server, prompt=ids, ignore_eos=True).json()
        asked = post(server, prompt=ids, ignore_eos=True, emotion_bias={"calm": 0.05}, emotion_scores=True).json()
        stopped = post(server, prompt=ids, emotion_guard=[{"of": "calm", "above": -40, "hold": 1, "on": "generated"}]).json()
        events, tops = live.take(24), strongest.take(24)
    of_plain, of_asked, of_stopped = (
        [(kind, event) for kind, event in events if event["request"].startswith(answer["id"])] for answer in (plain, asked, stopped)
    )
    assert [event["position"] for _, event in of_plain] == list(range(len(ids), len(ids) + 11))
    assert {kind for kind, _ in of_plain} == {"scores"}
    scores = oracle.run(ids, None, 12)[2]
    for _, event in of_plain:
        assert (event["kind"], event["choice"], list(event["scores"])) == ("generated", 0, ["calm", "desperate"])
        for name, value in event["scores"].items():
            assert abs(value - float(scores.of(name)[event["position"]])) < 0.05
    returned = asked["choices"][0]["emotion_scores"]
    assert [(event["position"], event["scores"]["calm"]) for _, event in of_asked] == [
        (token["position"], token["scores"]["calm"]) for token in returned
    ]
    assert [(kind, event["position"]) for kind, event in of_stopped] == [("scores", len(ids)), ("guard", len(ids))]
    assert of_stopped[1][1]["do"] == "stop"
    highest = {event["position"]: event["scores"] for _, event in tops if event["request"].startswith(asked["id"])}
    for token in returned:
        best = sorted(token["scores"].items(), key=lambda item: -item[1])[:5]
        assert list(highest[token["position"]].items()) == best
    keys = {key for _, event in [*events, *tops] for key in event}
    assert keys == {"request", "choice", "position", "kind", "scores", "of", "value", "above", "do"}


def test_the_choices_of_one_request_are_told_apart(server):
    with Listening(server, "?top=1") as live:
        assert post(server, prompt=[1, 2, 3], n=2, temperature=1.0, max_tokens=4, ignore_eos=True).ok
        found = sorted((event["choice"], event["position"]) for _, event in live.take(6))
    assert found == [(choice, position) for choice in (0, 1) for position in (3, 4, 5)]


def test_the_live_view_is_behind_the_key(server):
    for headers in ({}, {"Authorization": "Bearer other"}):
        answer = requests.get(server + LIVE, headers=headers, timeout=10)
        assert answer.status_code == 401
        assert "concepts" not in answer.text
    assert requests.post(server + LIVE, headers=KEY, timeout=10).status_code == 405
    page = requests.get(f"{server}/emotions", timeout=10)
    assert page.ok
    assert page.headers["content-type"].startswith("text/html")
    assert "desperate, " not in page.text


@pytest.mark.parametrize(("query", "said"), [("?top=none", "top must be"), ("?concepts=clam", "calm"), ("?concept=calm", "concepts")])
def test_what_the_live_view_cannot_show_is_answered_with_400(server, query, said):
    answer = requests.get(server + LIVE + query, headers=KEY, timeout=10)
    assert answer.status_code == 400
    assert said in answer.json()["error"]["message"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_guard_refuses(server, stream):
    guard = [{"of": "calm", "above": -40, "hold": 1, "do": {"refuse": "No."}}]
    answer = post(server, prompt="My code fails again. I feel", emotion_guard=guard, stream=stream)
    if stream:
        events = [line.decode().removeprefix("data: ") for line in answer.iter_lines() if line]
        choices = [choice for event in events[:-1] for choice in json.loads(event)["choices"]]
    else:
        choices = answer.json()["choices"]
    assert "".join(choice["text"] for choice in choices) == "No."
    assert (choices[-1]["finish_reason"], choices[-1]["stop_reason"]) == ("stop", "emotion_guard: calm")
    (event,) = (event for choice in choices for event in choice.get("emotion_events", ()))
    assert (event["position"], event["kind"], event["of"], event["do"]) == (1, "prompt", "calm", "refuse")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("ours", "said"),
    [
        ({"emotion_bias": {"clam": 0.1}}, "calm"),
        ({"emotion_bias": {"calm": 1e308}}, "from -2 to 2"),
        ({"emotion_bias": [1]}, "must be an object"),
        ({"emotion_bias": {"calm": True}}, "expected a number"),
        ({"emotion_bias": "stedy"}, "steady"),
        ({"emotion_scores": {"top": -1}}, "positive integer"),
        ({"emotion_score": True}, "nearest known: emotion_scores"),
        ({"vllm_xargs": {"emotion_bias": '{"clam": 0.1}'}}, "calm"),
        ({"vllm_xargs": {"emotion_bias.clam": 0.1}}, "calm"),
        ({"vllm_xargs": {"emovec": "x"}}, "engine's own"),
    ],
    ids=str,
)
def test_what_is_wrong_is_answered_with_400(server, ours, said, stream):
    answer = post(server, prompt=[1, 2, 3], stream=stream, **ours)
    assert answer.status_code == 400
    assert said in answer.json()["error"]["message"]


HOSTILE = {
    "deep": b'{"model": "m", "emotion_bias": ' + b'{"a":' * 50_000 + b"1" + b"}" * 50_000 + b"}",
    "nan": b'{"model": "%s", "prompt": "a", "emotion_bias": {"calm": NaN}}' % NAME.encode(),
    "infinite": b'{"model": "%s", "prompt": "a", "emotion_bias": {"calm": 1e999}}' % NAME.encode(),
    "many": json.dumps({"model": NAME, "prompt": "a", "emotion_bias": {f"k{i}": 1 for i in range(10_000)}}).encode(),
    "long": json.dumps({"model": NAME, "prompt": "a", "emotion_bias": {"x" * 1_000_000: 0.1}}).encode(),
    "huge number": b'{"model": "%s", "prompt": "a", "emotion_bias": {"calm": %s}}' % (NAME.encode(), b"9" * 5000),
    "text": b"emotion_bias",
    "not UTF-8": b'{"emotion_bias": "\xff\xfe"}',
    "list": b"[1]",
    "empty": b"",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_bodies_are_refused_and_the_server_stays_up(server, name):
    answer = requests.post(f"{server}/v1/completions", data=HOSTILE[name], headers={"Content-Type": "application/json", **KEY}, timeout=60)
    assert 400 <= answer.status_code < 500, answer.text[:300]
    assert len(answer.text) < 5000
    assert requests.get(f"{server}/health", timeout=10).ok


def test_the_example_in_python(tmp_path):
    """In a process of its own, as it says; not compiled, which takes a minute and a half more."""
    (example,) = re.findall(r"^```python\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
    script = tmp_path / "example.py"
    lines = [
        *example.replace("LLM(local_path", "LLM(enforce_eager=True, max_model_len=256, model=local_path").splitlines(),
        "print('TOP', output.outputs[0].reading.top(1))",
    ]
    script.write_text("if __name__ == '__main__':\n" + "\n".join(f"    {line}" for line in lines))
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=400, check=False)
    assert "TOP [('" in done.stdout, done.stdout[-2000:] + done.stderr[-2000:]
