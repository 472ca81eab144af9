"""``--middleware emovec.engines.vllm.middleware.Middleware``: ``"emotion_bias"`` and its like at the top of a request.

It moves them to where vLLM looks for extra arguments, and puts the scores into the answer, also when that streams. Requests
without them pass through as they are. If the live view is configured, it adds that to what vLLM serves.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from typing import Any

from emovec.engines.vllm import live
from emovec.engines.vllm.asgi import Message, Receive, Send, refuse
from emovec.engines.vllm.replies import KEY, Reply
from emovec.engines.vllm.requests import BIAS, FIELDS, GUARD, OURS, SCORES, asks

_SCORED = ("/v1/chat/completions", "/v1/completions")
_PATHS = (*_SCORED, "/v1/responses", "/v1/messages", "/v1/chat/completions/batch", "/invocations")
_MENTIONED = f'"{OURS}'.encode()
_UNREADABLE = "not a JSON object that can be read"


class Middleware:
    """An ASGI application around vLLM's."""

    def __init__(self, app: Callable[[Any, Receive, Send], Awaitable[None]]) -> None:
        self._app = app
        self._begun = False

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        if not self._begun:  # with the first message, which says that the server starts
            self._begun = True
            live.serve(scope.get("app"))
        if scope["type"] != "http" or scope["method"] != "POST" or not scope["path"].endswith(_PATHS):
            await self._app(scope, receive, send)
            return
        first, body = await _body(receive)
        try:
            request = _object(body) if _MENTIONED in body else {}
        except ValueError as error:
            await refuse(send, f"the request is {error}", BIAS)
            return
        args = _arguments(request)
        if args is None:
            await self._app(scope, _replay(first, body, receive), send)
            return
        if request.get("use_beam_search"):
            await refuse(send, f"{', '.join(FIELDS)} cannot be used with beam search: its beams are prompts of their own", BIAS)
            return
        if args.get(SCORES) and not scope["path"].endswith(_SCORED):
            await refuse(send, f"{SCORES} can be asked for at {' and '.join(_SCORED)} alone", SCORES)
            return
        if not (args.get(SCORES) or args.get(GUARD)):
            await self._app(*_rewritten(scope, request, args, receive), send)
            return
        several = scope["path"].endswith("/v1/completions")
        with Reply(several) as reply:
            answer = _Answer(reply, send)
            await self._app(*_rewritten(scope, request, {**args, KEY: reply.id}, receive), answer)


class _Answer:
    """Passes an answer on with its scores: a stream's events as they come, anything else when it is whole."""

    def __init__(self, reply: Reply, send: Send) -> None:
        self._reply, self._send = reply, send
        self._start: Message = {}
        self._streams = False
        self._held = b""

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            kind = next((value for name, value in message["headers"] if name.lower() == b"content-type"), b"")
            self._streams = kind.startswith(b"text/event-stream")
            self._start = message
            if self._streams:
                await self._send(message)
            return
        if message["type"] != "http.response.body":
            await self._send(message)
            return
        self._held += message.get("body", b"")
        more = message.get("more_body", False)
        if self._streams:
            *events, self._held = self._held.split(b"\n\n")
            out = b"".join(self._event(event) + b"\n\n" for event in events)
            if not more:
                out, self._held = out + self._held, b""
            await self._send({**message, "body": out})
        elif not more:
            body = self._scored(self._held)
            headers = [(name, value) for name, value in self._start["headers"] if name.lower() != b"content-length"]
            await self._send({**self._start, "headers": [*headers, (b"content-length", str(len(body)).encode())]})
            await self._send({**message, "body": body})

    def _event(self, event: bytes) -> bytes:
        data = event.removeprefix(b"data: ")
        return event if data == event else b"data: " + self._scored(data)

    def _scored(self, data: bytes) -> bytes:
        try:
            answer = _object(data)
        except ValueError:  # such as a stream's last event
            return data
        choices = answer.get("choices")
        if not isinstance(choices, list) or not choices:
            return data
        for choice in choices:
            choice.update(self._reply.news(choice.get("index", 0)))
        return json.dumps(answer, ensure_ascii=False).encode()


def _arguments(request: dict[str, Any]) -> dict[str, Any] | None:
    """The extra arguments of a request with ours among them; None if there are none of ours."""
    extra = request.get("vllm_xargs")
    extra = dict(extra) if isinstance(extra, dict) else {}
    extra.pop(KEY, None)
    for name, value in request.items():
        if name.startswith(OURS) and value is not None and value is not False:
            extra[name] = value if isinstance(value, str) else json.dumps(value)
    return extra if asks(extra) else None


def _rewritten(scope: Any, request: dict[str, Any], args: dict[str, Any], receive: Receive) -> tuple[Any, Receive]:
    changed = {name: value for name, value in request.items() if not name.startswith(OURS)} | {"vllm_xargs": args}
    body = json.dumps(changed).encode()
    headers = [(name, value) for name, value in scope["headers"] if name.lower() not in (b"content-length", b"transfer-encoding")]
    scope = {**scope, "headers": [*headers, (b"content-length", str(len(body)).encode())]}
    return scope, _replay({"type": "http.request"}, body, receive)


def _object(body: bytes) -> dict[str, Any]:
    """The JSON object that ``body`` is.

    Raises:
        ValueError: saying what is wrong.
    """
    try:
        found = json.loads(body)
    except ValueError as error:
        raise ValueError(f"{_UNREADABLE}: {error}") from None
    except RecursionError:
        raise ValueError(f"{_UNREADABLE}: it is too deep") from None
    if not isinstance(found, dict):
        raise ValueError(_UNREADABLE)
    return found


async def _body(receive: Receive) -> tuple[Message, bytes]:
    """The first message and the whole body; if the client leaves before that, its leaving is the message."""
    parts: list[bytes] = []
    while True:
        message = await receive()
        if message["type"] != "http.request":
            return message, b"".join(parts)
        parts.append(message.get("body", b""))
        if not message.get("more_body", False):
            return message, b"".join(parts)


def _replay(first: Message, body: bytes, receive: Receive) -> Receive:
    sent = False

    async def replay() -> Message:
        nonlocal sent
        if sent:
            return await receive()
        sent = True
        return {**first, "body": body, "more_body": False} if first["type"] == "http.request" else first

    return replay
