"""``emovec stories``: against a made-up endpoint, against mistakes, and once with a real model."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from endpoint import Reply, serving
from typer.testing import CliRunner

from emovec.cli import app
from emovec.extraction.words import named
from emovec.extraction.writers import EndpointError, Local


def told(number: int, request: dict[str, Any]) -> Reply:
    draw = random.Random(number)
    return Reply(" ".join("".join(draw.choices("bdfgklmnprst", k=6)) for _ in range(20)))


def run(*arguments: str, code: int = 0, **environment: str) -> str:
    done = CliRunner().invoke(app.app, ["stories", *arguments], env={"COLUMNS": "300", **environment})
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == code, done.output
    return done.output


@pytest.fixture
def common(tmp_path: Path) -> list[str]:
    (tmp_path / "topics.txt").write_text("a bus stop\na lamp\n")
    options = ("--topics", str(tmp_path / "topics.txt"), "--words", "10-40", "--out", str(tmp_path / "stories.jsonl"))
    return ["--concepts", "calm,sarcastic", *options]


def test_a_whole_run_and_the_same_again(common: list[str], tmp_path: Path) -> None:
    with serving(told) as server:
        endpoint = ("--endpoint", server.url, "--model", "made-up", "--key-env", "MY_KEY", "--extra", '{"top_k": 5}')
        said = run(*common, *endpoint, MY_KEY="secret")
        again = run(*common, *endpoint)
    assert "2 concepts x 2 topics x 1 = 4 stories, by made-up" in said
    assert "stories.jsonl: 4 of 4 stories; 4 requests" in said
    assert "4 of 4 stories, 4 of them from before; 0 requests" in again
    assert {headers["Authorization"] for headers in server.headers} == {"Bearer secret"}
    assert all((request["model"], request["top_k"], request["temperature"]) == ("made-up", 5, 1.0) for request in server.requests)
    found = [json.loads(line) for line in (tmp_path / "stories.jsonl").read_text().splitlines()]
    assert sorted((item["emotion"], item["topic"]) for item in found) == [
        (name, topic) for name in ("calm", "sarcastic") for topic in ("a bus stop", "a lamp")
    ]


def test_what_is_given_up_is_said_and_ends_with_1(common: list[str]) -> None:
    def answer(number: int, request: dict[str, Any]) -> Reply:
        prompt = request["messages"][0]["content"]
        return Reply("She was calm, calm.") if "feels calm" in prompt and "a lamp" in prompt else told(number, request)

    with serving(answer) as server:
        said = run(*common, "--endpoint", server.url, "--model", "m", "--words", "2-40", "--attempts", "2", "--concurrency", "1", code=1)
    assert "3 of 4 stories" in said
    assert "2 texts turned down: 2 names the concept" in said
    assert "given up: calm on a lamp: names the concept: calm; names the concept: calm" in said
    assert "1 stories were given up, so 1 topics are not balanced; the same command tries again" in said


def test_failures_of_the_endpoint_are_counted(common: list[str]) -> None:
    busy = Reply(status=503, body=b"", headers={"Retry-After": "0"})
    with serving(lambda number, request: busy if number == 0 else told(number, request)) as server:
        said = run(*common, "--endpoint", server.url, "--model", "m")
    assert "1 requests had to be made again" in said


def test_an_error_of_the_endpoint_is_explained(common: list[str]) -> None:
    refusal = Reply(status=401, body=b'{"error": {"message": "who are you?"}}')
    with serving(lambda number, request: refusal) as server, pytest.raises(EndpointError, match=r"HTTP 401: who are you\?"):
        run(*common, "--endpoint", server.url, "--model", "m")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "--local"),
        (("--endpoint", "http://localhost:1/v1"), "--model"),
        (("--endpoint", "http://localhost:1/v1", "--model", "m", "--local", "m"), "--local"),
        (("--endpoint", "http://localhost:1/v1", "--model", "m", "--words", "ninety"), "ninety"),
        (("--endpoint", "http://localhost:1/v1", "--model", "m", "--extra", "[]"), "JSON object"),
        (("--endpoint", "http://localhost:1/v1", "--model", "m", "--out", "stories.txt"), "stories.txt"),
        (("--endpoint", "http://localhost:1/v1", "--model", "m", "--out", "nowhere/stories.jsonl"), "nowhere"),
        (("--endpoint", "http://localhost:1/v1", "--model", "m", "--per-topic", "0"), "per-topic"),
    ],
)
def test_mistakes_are_explained(common: list[str], tmp_path: Path, arguments: tuple[str, ...], said: str) -> None:
    assert said in run(*common, *arguments, code=2)
    assert not (tmp_path / "stories.jsonl").exists()


@pytest.mark.slow
def test_the_packaged_model_writes(tmp_path: Path) -> None:
    """A model of 135M parameters keeps to few instructions, hence the wide bounds; what it writes has passed the checks."""
    (tmp_path / "topics.txt").write_text("a letter found in a coat pocket\n")
    topics = ("--topics", str(tmp_path / "topics.txt"), "--words", "20-200", "--out", str(tmp_path / "stories.jsonl"))
    sampling = ("--max-tokens", "320", "--attempts", "20", "--seed", "1", "--temperature", "0.7")
    said = run("--concepts", "afraid", *topics, *sampling, "--local", "smollm2-135m-instruct")
    assert "1 of 1 stories" in said
    story = json.loads((tmp_path / "stories.jsonl").read_text())
    assert (story["emotion"], story["writer"]) == ("afraid", "smollm2-135m-instruct")
    assert 20 <= len(story["text"].split()) <= 200
    assert named(story["text"], "afraid") == []


@pytest.mark.slow
def test_a_local_model_says_the_same_for_the_same_seed() -> None:
    writer = Local("smollm2-135m-instruct", max_tokens=12)
    answers = [writer("Describe a lamp.", seed) for seed in (1, 1, 2)]
    assert answers[0] == answers[1] != answers[2]
    assert not answers[0].whole
    assert writer.requests == 3
