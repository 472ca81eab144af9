"""The vLLM plugin's middleware, around an application of ours."""

from __future__ import annotations

import asyncio
import json

import numpy as np
import pytest
import torch

from emovec.engines.vllm import config
from emovec.engines.vllm.middleware import Middleware
from emovec.engines.vllm.replies import KEY, expect
from emovec.engines.vllm.requests import Admission
from emovec.engines.vllm.scores import Chunk, Collector, Wanted
from emovec.steer import SteeringError

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


@pytest.mark.parametrize("path", ["/v1/chat/completions/batch", "/invocations", "/v1/messages", "/v1/responses"])
def test_wherever_there_is_an_answer_our_fields_are_moved(path):
    moved = json.loads(ask(b'{"emotion_bias": "steady", "emotion_bais": 3}', path=path)[0]["body"])
    assert moved == {"vllm_xargs": {"emotion_bias": "steady", "emotion_bais": "3"}}, "and the engine says what is unknown"


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
        (b'{"emotion_bias": {"calm": 0.1,}}', "/v1/completions", "line 1 column"),
        (b'{"emotion_scores": true}', "/invocations", "alone"),
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
