"""`emovec serve` as clients see it."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from vllm_engine import CLOSE, NAME, TEXTS, Oracle, profiles

pytest.importorskip("vllm")
requests = pytest.importorskip("requests")


pytestmark = pytest.mark.engine

START = 300  # seconds
KEY = {"Authorization": "Bearer of-the-tests"}
LIVE = "/v1/emotions/live"
PAGE = (Path(__file__).parents[1] / "docs" / "serving.md").read_text()


@pytest.fixture(scope="module")
def oracle():
    return Oracle()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("server")
    named = profiles(folder / "profiles.toml", {"steady": {"calm": 0.05, "on": '"generated"'}})
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--enforce-eager"]
    limits = ["--max-model-len", "512", "--max-num-seqs", "8", "--max-num-batched-tokens", "64", "--block-size", "32"]
    shown = ["--metrics", "all", "--live", "--api-key", "of-the-tests"]
    command = [sys.executable, "-m", "emovec", "serve", NAME, "--profiles", named, *shown, *options, *limits]
    url = f"http://127.0.0.1:{port}"
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        try:
            for _ in range(START):
                time.sleep(1)
                assert process.poll() is None, (folder / "log").read_text()[-3000:]
                try:
                    if requests.get(f"{url}/health", timeout=5).ok:
                        break
                except requests.ConnectionError:
                    continue
            else:
                raise AssertionError((folder / "log").read_text()[-3000:])
            yield url
            with requests.get(url + LIVE, headers=KEY, stream=True, timeout=30):
                os.killpg(process.pid, signal.SIGTERM)
                process.wait(60)  # a listener does not keep a server from stopping
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def post(server, path="/v1/completions", **body):
    defaults = {"model": NAME, "max_tokens": 12, "temperature": 0}
    return requests.post(server + path, json={**defaults, **body}, headers=KEY, timeout=120)


def text_of(answer):
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]["text"]


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
    """In a process of its own, as it says."""
    (example,) = re.findall(r"^```python\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
    script = tmp_path / "example.py"
    lines = [
        *example.replace("LLM(local_path", "LLM(max_model_len=256, model=local_path").splitlines(),
        "print('TOP', output.outputs[0].reading.top(1))",
    ]
    script.write_text("if __name__ == '__main__':\n" + "\n".join(f"    {line}" for line in lines))
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=400, check=False)
    assert "TOP [('" in done.stdout, done.stdout[-2000:] + done.stderr[-2000:]
