"""The live view: the scores of all requests' generated tokens as they are made, as server-sent events, and a page that shows them.

The stream is below ``/v1``, which vLLM guards with its ``--api-key``; the page holds nothing but the means to show it. All of
this runs in the event loop of the API server. A listener has a queue of a fixed length, and what it sees is picked and
written only when it takes it, so one that is slow costs others nothing.
"""

from __future__ import annotations

import asyncio
import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import resources
from typing import Any
from urllib.parse import parse_qsl

import numpy as np

from emovec.bank import Bank
from emovec.bank_layer import nearest, shown
from emovec.engines.vllm.asgi import Receive, Send, answer, refuse
from emovec.engines.vllm.scores import Chunk

STREAM, PAGE = "/v1/emotions/live", "/emotions"
TOP = 5
QUEUE = 1024  # events that a listener may be behind
BATCH = 64  # events at once, then others have their turn
LISTENERS = 32
TICK = 1.0  # seconds, after which to look whether the server stops
HEARTBEAT = 15.0  # seconds of silence
STALLED = 30.0  # seconds in which a listener takes nothing, and is let go
_KEYS = ("top", "concepts")
_HEADERS = ((b"cache-control", b"no-store"), (b"x-content-type-options", b"nosniff"))
_POLICY = b"default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; base-uri 'none'"


@dataclass(frozen=True)
class Choice:
    """What one listener wants to see of a token. rows: concepts in the bank. top: only the highest so many; None for all of ``rows``."""

    rows: Any
    top: int | None

    @classmethod
    def parse(cls, query: str, bank: Bank) -> Choice:
        """From a query such as ``top=3&concepts=calm,desperate``.

        Raises:
            ValueError: naming the parameter and what is wrong, with the nearest known names.
        """
        given = dict(pairs := parse_qsl(query, keep_blank_values=True, max_num_fields=8))
        for key in given:
            if key not in _KEYS:
                raise ValueError(f"unknown parameter {shown(key)}; nearest known: {', '.join(nearest(key, _KEYS))}")
        if len(given) < len(pairs):
            raise ValueError("a parameter is given twice")
        top = given.get("top")
        if top is not None and not (top.isascii() and top.isdecimal() and len(top) < 9 and int(top) > 0):
            raise ValueError(f"top must be a positive integer, got {shown(top)}")
        if "concepts" not in given:
            return cls(np.arange(len(bank.names)), TOP if top is None else int(top))
        rows = [bank.resolve(name.strip()) for name in given["concepts"].split(",")]
        if len(set(rows)) < len(rows):
            raise ValueError(f"a concept is given twice in {shown(given['concepts'])}")
        return cls(np.array(rows), None if top is None else int(top))

    def of(self, values: Any, names: Sequence[str]) -> dict[str, float]:
        """Scores by name of a token [K]."""
        rows = self.rows if self.top is None else self.rows[np.argsort(-values[self.rows], kind="stable")[: self.top]]
        return {names[row]: round(float(values[row]), 4) for row in rows}


class Listener:
    """The events that one client has not taken yet; the oldest give way."""

    def __init__(self, choice: Choice, names: Sequence[str]) -> None:
        self._choice, self._names = choice, names
        self._events: deque[tuple[str, dict[str, Any], Any]] = deque()
        self._lost = 0
        self._news = asyncio.Event()

    def put(self, kind: str, event: dict[str, Any], values: Any = None) -> None:
        if len(self._events) == QUEUE:
            self._events.popleft()
            self._lost += 1
        self._events.append((kind, event, values))
        self._news.set()

    def take(self) -> bytes:
        """The next events, written out, after how many were lost before them; empty if there are none."""
        written = []
        if self._lost:
            written.append(_event("lost", {"lost": self._lost}))
            self._lost = 0
        for _ in range(min(BATCH, len(self._events))):
            kind, event, values = self._events.popleft()
            written.append(_event(kind, event if values is None else {**event, "scores": self._choice.of(values, self._names)}))
        if not self._events:
            self._news.clear()
        return "".join(written).encode()

    async def wait(self, seconds: float) -> None:
        """Until there is something, or for so long."""
        with suppress(TimeoutError):
            await asyncio.wait_for(self._news.wait(), seconds)


class Feed:
    """What the listeners of a server are told."""

    def __init__(self, bank: Bank) -> None:
        self.bank = bank
        self.served = False  # whether there is a way to listen
        self._listeners: set[Listener] = set()

    def __len__(self) -> int:
        return len(self._listeners)

    @contextmanager
    def listening(self, choice: Choice) -> Iterator[Listener]:
        listener = Listener(choice, self.bank.names)
        self._listeners.add(listener)
        try:
            yield listener
        finally:
            self._listeners.discard(listener)

    def scored(self, request: str, choice: int, chunks: Iterable[Sequence[Any]]) -> None:
        """Generated tokens of sequence ``choice`` of a request."""
        if not self._listeners:
            return
        for chunk in map(Chunk.unpacked, chunks):
            for position, values in enumerate(chunk.values, chunk.start):
                event = {"request": request, "choice": choice, "position": position, "kind": "generated"}
                for listener in self._listeners:
                    listener.put("scores", event, values)

    def fired(self, request: str, choice: int, event: Mapping[str, Any]) -> None:
        """A threshold fired."""
        for listener in self._listeners:
            listener.put("guard", {"request": request, "choice": choice, **event})


class Stream:
    """The endpoint: an ASGI application."""

    def __init__(self, feed: Feed, stopping: Callable[[], bool]) -> None:
        self._feed, self._stopping = feed, stopping

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        try:
            choice = Choice.parse(scope["query_string"].decode("latin-1"), self._feed.bank)
        except ValueError as error:
            await refuse(send, str(error), "query")
            return
        if len(self._feed) >= LISTENERS:
            await refuse(send, f"there are {LISTENERS} listeners already", "live", 503)
            return
        gone = asyncio.ensure_future(_gone(receive))
        try:
            with self._feed.listening(choice) as listener, suppress(TimeoutError):
                await self._pass_on(listener, gone, send)
        finally:
            gone.cancel()

    async def _pass_on(self, listener: Listener, gone: asyncio.Future[None], send: Send) -> None:
        async def write(body: bytes, more: bool = True) -> None:
            await asyncio.wait_for(send({"type": "http.response.body", "body": body, "more_body": more}), STALLED)

        headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"x-accel-buffering", b"no"), *_HEADERS]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        bank, clock = self._feed.bank, asyncio.get_running_loop().time
        await write(_event("bank", {"concepts": bank.names, "families": dict(bank.families)}).encode())
        last = clock()
        while not gone.done() and not self._stopping():
            body = listener.take()
            if not body and clock() - last >= HEARTBEAT:
                body = b": still here\n\n"
            if body:
                await write(body)
                last = clock()
                await asyncio.sleep(0)
            else:
                await listener.wait(TICK)
        if not gone.done():
            await write(b"", more=False)


class Page:
    """The page, an ASGI application. It knows nothing of the server until it listens."""

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        body = resources.files("emovec").joinpath("data/serving/live.html").read_bytes()
        await answer(send, 200, body, (b"content-type", b"text/html; charset=utf-8"), (b"content-security-policy", _POLICY), *_HEADERS)


_feed: Feed | None = None


def announce(feed: Feed | None) -> None:
    """The feed of this process's engine is there, for a server to find."""
    global _feed
    _feed = feed


def serve(app: Any) -> None:
    """Add the live view to vLLM's application, among its own routes: so behind its check of keys. Nothing if it is not configured."""
    if _feed is None or app is None:
        return
    from starlette.routing import Route

    def stopping() -> bool:
        return bool(getattr(getattr(app.state, "server", None), "should_exit", False))

    for path, endpoint in ((STREAM, Stream(_feed, stopping)), (PAGE, Page())):
        route = Route(path, endpoint, include_in_schema=False)
        route.methods = {"GET"}
        app.routes.append(route)
    _feed.served = True


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _event(kind: str, data: Mapping[str, Any]) -> str:
    return f"event: {kind}\ndata: {json.dumps(data, ensure_ascii=False)}\n\n"
