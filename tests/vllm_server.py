"""`emovec serve` in a process of its own, and its clients."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from vllm_engine import EAGER, NAME, profiles

requests = pytest.importorskip("requests")

START = 300  # seconds
KEY = {"Authorization": "Bearer of-the-tests"}
LIVE = "/v1/emotions/live"


@contextmanager
def serving(folder: Path) -> Iterator[str]:
    """A server with all that can be had, at the URL that is given."""
    named = profiles(folder / "profiles.toml", {"steady": {"calm": 0.05, "on": '"generated"'}})
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", *(["--enforce-eager"] if EAGER else [])]
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
            with Listening(url):
                os.killpg(process.pid, signal.SIGTERM)
                process.wait(60)  # a listener does not keep a server from stopping
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def post(server: str, path: str = "/v1/completions", **body: Any) -> Any:
    defaults = {"model": NAME, "max_tokens": 12, "temperature": 0}
    return requests.post(server + path, json={**defaults, **body}, headers=KEY, timeout=120)


def text_of(answer: Any) -> str:
    assert answer.status_code == 200, answer.text
    text: str = answer.json()["choices"][0]["text"]
    return text


def counted(server: str) -> dict[str, float]:
    """Our metrics: the value of each sample by its name and labels."""
    lines = requests.get(f"{server}/metrics", timeout=10).text.splitlines()
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if line.startswith("emovec_"))}


def gained(server: str, before: dict[str, float]) -> dict[str, float]:
    after = counted(server)
    return {name: value - before.get(name, 0) for name, value in after.items() if "_created" not in name and value != before.get(name, 0)}


class Listening:
    """A client of the live view; used in ``with``."""

    def __init__(self, server: str, query: str = "") -> None:
        self._answer = requests.get(server + LIVE + query, headers=KEY, stream=True, timeout=60)
        assert self._answer.headers["content-type"].startswith("text/event-stream")
        self._lines = self._answer.iter_lines()
        ((kind, _),) = self.take(1)
        assert kind == "bank"

    def take(self, count: int) -> list[tuple[str, dict[str, Any]]]:
        """The next events: their kinds, and their data."""
        return [self._next() for _ in range(count)]

    def _next(self) -> tuple[str, dict[str, Any]]:
        while not (line := next(self._lines)).startswith(b"event: "):
            pass
        return line.decode().removeprefix("event: "), json.loads(next(self._lines).decode().removeprefix("data: "))

    def __enter__(self) -> Listening:
        return self

    def __exit__(self, *error: object) -> None:
        self._answer.close()
