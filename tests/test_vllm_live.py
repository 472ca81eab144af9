"""The live view without a server: what a listener is told, and what becomes of one that is slow, gone or stalled."""

from __future__ import annotations

import asyncio
import json

import numpy as np
import pytest
from banks import NAMES

from emovec.engines.vllm import live
from emovec.engines.vllm.live import Choice, Feed, Page, Stream
from emovec.engines.vllm.scores import Chunk

VALUES = np.arange(7, dtype=np.float32)[None]  # of one token; the last concept is the highest


def chunk(position, values=VALUES):
    return Chunk(position, values).packed()


def events(body):
    """(kind, data) of what was sent."""
    parts = [part.split("\n") for part in body.decode().split("\n\n") if part and not part.startswith(":")]
    return [(kind.removeprefix("event: "), json.loads(data.removeprefix("data: "))) for kind, data in parts]


@pytest.fixture
def feed(bank):
    return Feed(bank)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(live, "TICK", 0.001)


def run(feed, script, query=b"", until=None):
    """What a client is sent while ``script(sent)`` runs; it leaves after that, if the server does not stop before."""

    async def all_of_it():
        sent, left = [], asyncio.Event()

        async def receive():
            await left.wait()
            return {"type": "http.disconnect"}

        async def send(message):
            sent.append(message)

        async def client():
            await script(sent)
            left.set()

        stream = Stream(feed, until or (lambda: False))
        await asyncio.gather(stream({"query_string": query}, receive, send), client())
        return sent

    sent = asyncio.run(all_of_it())
    assert len(feed) == 0, "a listener that is gone is let go"
    return sent, b"".join(message.get("body", b"") for message in sent)


async def listening(feed):
    while not len(feed):
        await asyncio.sleep(0)


def test_tokens_and_events_of_all_requests(feed):
    async def script(sent):
        await listening(feed)
        feed.scored("one", 0, [chunk(5), chunk(6, np.concatenate([VALUES, -VALUES]))])
        feed.fired("two", 1, {"position": 9, "kind": "prompt", "of": "calm", "value": 3.0, "above": 2.0, "do": "stop"})
        while len(sent) < 3:
            await asyncio.sleep(0)

    sent, body = run(feed, script, b"top=2")
    assert dict(sent[0]["headers"])[b"content-type"].startswith(b"text/event-stream")
    first, *rest = events(body)
    assert first == ("bank", {"concepts": list(NAMES), "families": {"Fear": ["afraid", "desperate"], "Peace": ["calm", "at ease"]}})
    token = {"request": "one", "choice": 0, "kind": "generated"}
    assert rest == [
        ("scores", {**token, "position": 5, "scores": {"hostile": 6.0, "grief-stricken": 5.0}}),
        ("scores", {**token, "position": 6, "scores": {"hostile": 6.0, "grief-stricken": 5.0}}),
        ("scores", {**token, "position": 7, "scores": {"afraid": 0.0, "angry": -1.0}}),
        ("guard", {"request": "two", "choice": 1, "position": 9, "kind": "prompt", "of": "calm", "value": 3.0, "above": 2.0, "do": "stop"}),
    ]


@pytest.mark.parametrize(
    ("query", "shown"),
    [
        ("", ["hostile", "grief-stricken", "desperate", "calm", "at ease"]),
        ("top=1", ["hostile"]),
        ("top=99", list(NAMES)[::-1]),
        ("concepts=desperate,+calm", ["desperate", "calm"]),
        ("concepts=calm,at%20ease,afraid&top=2", ["calm", "at ease"]),
    ],
)
def test_what_a_listener_wants_of_a_token(bank, query, shown):
    assert list(Choice.parse(query, bank).of(VALUES[0], NAMES)) == shown


@pytest.mark.parametrize(
    ("query", "said"),
    [
        ("top=0", "top must be a positive integer"),
        ("top=-1", "top must be"),
        ("top=", "top must be"),
        ("top=1e3", "top must be"),
        ("top=" + "9" * 5000, "top must be"),
        ("concepts=clam", "nearest known: calm"),
        ("concepts=", "unknown concept"),
        ("concepts=calm,calm", "given twice"),
        ("top=1&top=2", "given twice"),
        ("topp=1", "nearest known: top"),
        ("&".join(["a=b"] * 99), "fields"),
    ],
    ids=lambda text: text[:20],
)
def test_what_cannot_be_seen_is_answered_with_400(feed, query, said):
    async def script(sent):
        pass

    sent, body = run(feed, script, query.encode())
    assert sent[0]["status"] == 400
    assert said in json.loads(body)["error"]["message"]
    assert len(body) < 500


def test_a_slow_listener_loses_the_oldest_and_is_told_how_many(feed, monkeypatch):
    async def script(sent):
        await listening(feed)
        (listener,) = feed._listeners
        for position in range(live.QUEUE + 10):
            feed.scored("one", 0, [chunk(position)])
            assert len(listener._events) <= live.QUEUE
        while len(sent) < 2 + live.QUEUE // live.BATCH:
            await asyncio.sleep(0)

    _, body = run(feed, script)
    _, lost, *tokens = events(body)
    assert lost == ("lost", {"lost": 10})
    assert [event["position"] for _, event in tokens] == list(range(10, live.QUEUE + 10))


def test_a_silent_stream_shows_that_it_is_alive(feed, monkeypatch):
    monkeypatch.setattr(live, "HEARTBEAT", 0)

    async def script(sent):
        while len(sent) < 4:
            await asyncio.sleep(0)

    assert run(feed, script)[1].count(b": still here\n\n") >= 2


def test_a_server_that_stops_ends_its_streams(feed):
    stops = []

    async def script(sent):
        await listening(feed)
        stops.append(True)
        while sent[-1].get("more_body", True):
            await asyncio.sleep(0)

    sent, _ = run(feed, script, until=lambda: bool(stops))
    assert sent[-1] == {"type": "http.response.body", "body": b"", "more_body": False}


def test_a_listener_that_takes_nothing_is_let_go(feed, monkeypatch):
    monkeypatch.setattr(live, "STALLED", 0.001)

    async def stalled():
        async def never(*_):
            await asyncio.Event().wait()

        async def send(message):
            if message["type"] == "http.response.body":
                await never()

        await Stream(feed, lambda: False)({"query_string": b""}, never, send)

    asyncio.run(asyncio.wait_for(stalled(), 60))
    assert len(feed) == 0


def test_there_are_not_any_number_of_listeners(feed, monkeypatch):
    monkeypatch.setattr(live, "LISTENERS", 1)

    async def script(sent):
        pass

    with feed.listening(Choice(np.arange(7), 1)):

        async def second():
            sent = []

            async def send(message):
                sent.append(message)

            await Stream(feed, lambda: False)({"query_string": b""}, None, send)
            return sent

        assert asyncio.run(second())[0]["status"] == 503


def test_the_page_asks_for_nothing_from_elsewhere():
    sent = []

    async def send(message):
        sent.append(message)

    asyncio.run(Page()({}, None, send))
    text = sent[1]["body"].decode()
    assert "v1/emotions/live" in text
    assert "http://" not in text
    assert "https://" not in text
    assert "innerHTML" not in text, "names of requests are the clients' to choose"
    assert b"default-src 'none'" in dict(sent[0]["headers"])[b"content-security-policy"]
