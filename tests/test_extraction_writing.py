"""Stories written by a model: an endpoint that works, fails, dawdles and babbles; checks, balance, near duplicates, resumption."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from endpoint import Reply, serving

from emovec.extraction import CorpusError, corpus
from emovec.extraction.orders import Concept, Order, concepts_of, contrast_prompt, story_prompt, topics_of
from emovec.extraction.writers import Answer, Endpoint, EndpointError
from emovec.extraction.writing import shingles, tidied, write_stories

CONCEPTS = [Concept("calm", synonyms=("serene",)), Concept("sarcastic", instruction="She says the opposite of what she means.")]
TOPICS = {"t1": "a bus stop", "t2": "a broken lamp", "t3": "a birthday"}


def words(seed: object, count: int = 20) -> str:
    """A story that shares no run of words with another's."""
    draw = random.Random(repr(seed))
    return " ".join("".join(draw.choices("bdfgklmnprst", k=6)) for _ in range(count))


def order(**options: Any) -> Order:
    return Order(**{"concepts": CONCEPTS, "topics": TOPICS, "words": (10, 40), **options})


def told(number: int, request: dict[str, Any]) -> Reply:
    return Reply(words(number))


class Told:
    """A writer in this process; ``answer`` is called with the number of the request and the prompt."""

    def __init__(self, answer: Callable[[int, str], str] = lambda number, prompt: words(number), threads: int = 1) -> None:
        self.name, self.threads, self.requests, self.retries = "told", threads, 0, 0
        self.answer, self.prompts, self.seeds, self.stopped = answer, [], [], False
        self.lock = threading.Lock()

    def __call__(self, prompt: str, seed: int | None) -> Answer:
        with self.lock:
            number, self.requests = self.requests, self.requests + 1
            self.prompts.append(prompt)
            self.seeds.append(seed)
        return Answer(self.answer(number, prompt))

    def stop(self) -> None:
        self.stopped = True


def endpoint(url: str, **options: Any) -> Endpoint:
    return Endpoint(url, "made-up", **{"wait": 0.001, **options})


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# --- what is written ------------------------------------------------------------------------------------------------------


def test_every_concept_gets_every_topic(tmp_path: Path) -> None:
    with serving(told) as server:
        report = write_stories(
            endpoint(server.url, key="secret", extra={"top_p": 0.9, "max_tokens": None}), order(per_topic=2), tmp_path / "a"
        )
    found = lines(tmp_path / "a")
    assert (report.wanted, report.written, report.given_up, report.requests) == (12, 12, [], 12)
    assert Counter((item["emotion"], item["topic"], item["number"]) for item in found) == Counter(
        (concept.name, topic, number) for concept in CONCEPTS for topic in TOPICS for number in range(2)
    )
    for number in range(2):  # the person does not tell concepts apart
        people = {(item["topic"], item["person"]) for item in found if item["number"] == number}
        assert len(people) == len(TOPICS)
    assert {item["person"] for item in found} == {"first", "third"}
    assert {item["writer"] for item in found} == {"made-up"}
    assert set(server.paths) == {"/v1/chat/completions"}
    assert all(headers["Authorization"] == "Bearer secret" for headers in server.headers)
    assert all(set(request) == {"model", "temperature", "messages", "top_p"} for request in server.requests)
    assert len(list(corpus.stories(tmp_path / "a")())) == 12, "what is written can be extracted from"


def test_the_prompts_say_what_is_wanted() -> None:
    task = next(task for task in order().tasks() if task.concept.name == "calm")
    said = story_prompt(task, order(), ["too short: 3 words, not 10 to 40"])
    for part in ("10 to 40 words", "a bus stop", "feels calm", "calm, serene", "first person", "too short: 3 words"):
        assert part in said
    mocking = next(task for task in order().tasks() if task.concept.name == "sarcastic")
    assert "She says the opposite of what she means." in story_prompt(mocking, order())
    assert "THE SCENE" in contrast_prompt(mocking, order(), "THE SCENE")
    plain = Concept("sarcastic", plain="Everyone means what they say.")
    assert "Everyone means what they say." in contrast_prompt(next(order(concepts=[plain]).tasks()), order(concepts=[plain]), "x")


def test_a_contrast_beside_each_story(tmp_path: Path) -> None:
    writer = Told(lambda number, prompt: words(number) + (" plain" if "Here is a scene" in prompt else ""))
    write_stories(writer, order(contrast=True), tmp_path / "a", progress=False)
    found = lines(tmp_path / "a")
    assert len(found) == 6
    assert all(item["contrast"].endswith("plain") and not item["text"].endswith("plain") for item in found)
    again = [prompt for prompt in writer.prompts if "Here is a scene" in prompt]
    assert all(item["text"] in prompt for item, prompt in zip(found, again, strict=True))
    pairs = list(corpus.pairs(tmp_path / "a")())
    assert [pair.contrast for pair in pairs] == [item["contrast"] for item in found]


def test_a_contrast_that_only_repeats_its_story(tmp_path: Path) -> None:
    report = write_stories(Told(lambda number, prompt: words(0)), order(contrast=True, attempts=2), tmp_path / "a", progress=False)
    assert report.written == 0
    assert report.rejected == {"contrast is a copy": 12}


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ("Calmness came over " + words(0), "names the concept: Calmness"),
        ("It was serenely " + words(0), "names the concept: serenely"),
        ("too short", "too short: 2 words, not 10 to 40"),
        (words(0, 41), "too long: 41 words, not 10 to 40"),
        ("", "empty"),
        ("<think>" + words(1, 20) + "</think>", "empty"),
    ],
)
def test_what_is_turned_down_is_asked_for_again(tmp_path: Path, bad: str, reason: str) -> None:
    writer = Told(lambda number, prompt: bad if number < 2 else words(number))
    report = write_stories(writer, order(concepts=CONCEPTS[:1], topics={"t1": "a"}), tmp_path / "a", progress=False)
    assert report.written == 1
    assert report.rejected == {reason.split(":")[0]: 2}
    assert f"An earlier attempt was turned down ({reason})." in writer.prompts[1]
    assert writer.prompts[0] == writer.prompts[1].rsplit("\n", 1)[0]


def test_an_answer_that_was_cut_off(tmp_path: Path) -> None:
    with serving(lambda number, request: Reply(words(number), finish="length" if number == 0 else "stop")) as server:
        report = write_stories(endpoint(server.url), order(concepts=CONCEPTS[:1], topics={"t1": "a"}), tmp_path / "a", progress=False)
    assert report.rejected == {"cut off": 1}


def test_what_cannot_be_written_is_given_up_and_tried_again_the_next_time(tmp_path: Path) -> None:
    stubborn = Told(lambda number, prompt: "calm" if "feels calm" in prompt and "broken lamp" in prompt else words(number))
    report = write_stories(stubborn, order(attempts=3), tmp_path / "a", progress=False)
    assert report.written == 5
    assert [(task.concept.name, task.topic, len(reasons)) for task, reasons in report.given_up] == [("calm", "t2", 3)]
    report = write_stories(Told(lambda number, prompt: words(("again", number))), order(), tmp_path / "a", progress=False)
    assert (report.there, report.written, report.requests) == (5, 1, 1)


def test_near_duplicates(tmp_path: Path) -> None:
    first = words(0, 30).split()
    near = " ".join([*first[:24], *words(1, 6).split()])
    far = " ".join([*first[:10], *words(2, 20).split()])
    answers = [" ".join(first), near, " ".join(first).upper() + "!", far]
    report = write_stories(
        Told(lambda number, prompt: answers[number]),
        order(concepts=CONCEPTS[:1], topics={"t1": "a", "t2": "b"}),
        tmp_path / "a",
        progress=False,
    )
    assert [item["text"] for item in lines(tmp_path / "a")] == [answers[0], far]
    assert report.rejected == {"near duplicate": 2}
    assert len(shingles("a b c d e f")) == 2
    assert len(shingles("a b")) == 1


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        ('"She sat down."', "She sat down."),
        ('"Go," he said. "Now."', '"Go," he said. "Now."'),
        ("# The Lamp\n\nIt broke.", "It broke."),
        ("**The Lamp**\n\nIt broke.\n", "It broke."),
        ("**It** broke.", "**It** broke."),
        ("<think>Hm.\nWell.</think>\nIt broke.", "It broke."),
    ],
)
def test_answers_are_tidied(answer: str, text: str) -> None:
    assert tidied(answer) == text


def test_seeds_are_other_ones_each_time_and_the_same_in_each_run(tmp_path: Path) -> None:
    writers = [Told(), Told()]
    for number, writer in enumerate(writers):
        write_stories(writer, order(seed=7), tmp_path / f"{number}", progress=False)
    assert writers[0].seeds == writers[1].seeds
    assert len(set(writers[0].seeds)) == 6
    assert (tmp_path / "0").read_bytes() == (tmp_path / "1").read_bytes()
    with serving(told) as server:
        write_stories(endpoint(server.url), order(seed=7), tmp_path / "2", progress=False)
    assert {request["seed"] for request in server.requests} == set(writers[0].seeds)


def test_no_more_requests_at_once_than_wanted(tmp_path: Path) -> None:
    with serving(lambda number, request: Reply(words(number), delay=0.05)) as server:
        write_stories(endpoint(server.url, threads=3), order(per_topic=3), tmp_path / "a", progress=False)
    assert server.most == 3


# --- an endpoint that fails -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "bad",
    [
        Reply(status=429, body=b"{}"),
        Reply(status=429, body=b"{}", headers={"Retry-After": "0.01"}),
        Reply(status=500, body=b"oops"),
        Reply(status=503, body=b""),
        Reply(body=b"not json"),
        Reply(body=b'{"choices": []}'),
        Reply(body=b'{"choices": [{"message": {"content": 3}}]}'),
        Reply(body=b"[" * 100_000),
        Reply("half", cut=True),
        Reply("late", delay=0.6),
    ],
    ids=lambda reply: f"{reply.status} {(reply.body or b'')[:20]!r} {reply.delay} {reply.cut}",
)
def test_what_may_pass_is_tried_again(bad: Reply) -> None:
    with serving(lambda number, request: bad if number < 2 else Reply("well")) as server:
        writer = endpoint(server.url, timeout=0.3)
        assert writer("hello", None) == Answer("well")
    assert (writer.requests, writer.retries) == (3, 2)


@pytest.mark.parametrize("status", [400, 401, 403, 404, 422, 301, 307])
def test_what_will_not_pass_is_an_error_at_once(tmp_path: Path, status: int) -> None:
    body = json.dumps({"error": {"message": "the key secret is not known here"}}).encode()
    with (
        serving(lambda number, request: Reply(status=status, body=body, headers={"Location": "http://127.0.0.1:1/"})) as server,
        pytest.raises(EndpointError, match=rf"/chat/completions: HTTP {status}: the key \*\*\* is not known here"),
    ):
        write_stories(endpoint(server.url, key="secret", threads=1), order(), tmp_path / "a", progress=False)
    assert len(server.requests) == 1
    assert (tmp_path / "a").read_bytes() == b""


def test_an_endpoint_that_stays_away(tmp_path: Path) -> None:
    with pytest.raises(EndpointError, match=r"gave up after 3 tries; the last one: .*refused"):
        endpoint("http://127.0.0.1:9/v1", tries=3)("hello", None)


def test_what_was_written_before_an_endpoint_goes_stays(tmp_path: Path) -> None:
    with serving(lambda number, request: Reply(words(number)) if number < 4 else Reply(status=500, body=b"down")) as server:
        with pytest.raises(EndpointError, match=r"gave up after 2 tries; the last one: HTTP 500: down"):
            write_stories(endpoint(server.url, threads=1, tries=2), order(), tmp_path / "a", progress=False)
        assert len(lines(tmp_path / "a")) == 4
        server.answers = told
        report = write_stories(endpoint(server.url), order(), tmp_path / "a", progress=False)
    assert (report.there, report.written) == (4, 2)


def test_a_wait_that_the_server_asks_for_ends_when_another_thread_fails(tmp_path: Path) -> None:
    """One request is told to wait a minute, the other is refused: the error is there at once."""
    waits = Reply(status=429, body=b"", headers={"Retry-After": "50"})
    with (
        serving(lambda number, request: waits if number == 0 else Reply(status=401, body=b"no", delay=0.2)) as server,
        pytest.raises(EndpointError, match="HTTP 401: no"),
    ):
        write_stories(endpoint(server.url, threads=2), order(), tmp_path / "a", progress=False)


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://host/v1", "http://", "file:///etc/passwd"])
def test_what_is_no_endpoint(url: str) -> None:
    with pytest.raises(ValueError, match="an endpoint is a URL such as"):
        Endpoint(url, "made-up")


# --- going on -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("left", [b'{"emotion": "calm", "topic": "t1", "te', b"{", '{"text": "\u00e9'.encode()[:-1]])
def test_half_a_line_at_the_end_is_mended(tmp_path: Path, left: bytes) -> None:
    write_stories(Told(), order(), tmp_path / "a", progress=False)
    whole = (tmp_path / "a").read_bytes()
    kept = b"".join(whole.splitlines(keepends=True)[:4])
    (tmp_path / "a").write_bytes(kept + left)
    report = write_stories(Told(lambda number, prompt: words(("new", number))), order(), tmp_path / "a", progress=False)
    assert (report.there, report.written) == (4, 2)
    assert (tmp_path / "a").read_bytes().startswith(kept)
    assert len(lines(tmp_path / "a")) == 6


def test_a_whole_last_line_without_its_end_is_kept(tmp_path: Path) -> None:
    write_stories(Told(), order(), tmp_path / "a", progress=False)
    whole = (tmp_path / "a").read_bytes()
    (tmp_path / "a").write_bytes(whole[:-1])
    assert write_stories(Told(), order(), tmp_path / "a", progress=False).written == 0
    assert (tmp_path / "a").read_bytes() == whole


def test_a_complete_file_needs_no_request(tmp_path: Path) -> None:
    write_stories(Told(), order(), tmp_path / "a", progress=False)
    writer = Told()
    report = write_stories(writer, order(), tmp_path / "a", progress=False)
    assert (report.there, report.written, writer.requests) == (6, 0, 0)


def test_more_concepts_later(tmp_path: Path) -> None:
    write_stories(Told(), order(concepts=CONCEPTS[:1]), tmp_path / "a", progress=False)
    report = write_stories(Told(lambda number, prompt: words(("more", number))), order(), tmp_path / "a", progress=False)
    assert (report.there, report.written) == (3, 3)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"rubbish\n", "a:1: not a line of JSON; give another file"),
        (b'{"emotion": "calm"}\n', "a:1: no 'text'"),
        (b"[]\n", "a:1: not an object"),
        (b'{"emotion": "calm", "text": "w", "writer": "else"}\n', "a:1: a story by 'else', not by 'told'"),
        (b'{"emotion": "calm", "text": "w", "contrast": "v"}\n', "a:1: a story with a contrast, unlike those asked for"),
    ],
)
def test_a_file_that_holds_something_else_is_left_alone(tmp_path: Path, line: bytes, message: str) -> None:
    (tmp_path / "a").write_bytes(line + b"half")
    with pytest.raises(CorpusError, match=message):
        write_stories(Told(), order(), tmp_path / "a", progress=False)
    assert (tmp_path / "a").read_bytes() == line + b"half"


WORKER = """
import sys
sys.path[:0] = [{tests!r}]
import test_extraction_writing as here
here.write_stories(here.endpoint({url!r}, threads=2), here.order(per_topic=5), {out!r}, progress=False)
"""


def test_after_a_real_kill(tmp_path: Path) -> None:
    """The server kills its client in the middle; the same call goes on, and no story is there twice or lacking."""
    clients: list[subprocess.Popen[bytes]] = []

    def killing(number: int, request: dict[str, Any]) -> Reply:
        if number == 11:
            os.kill(clients[0].pid, signal.SIGKILL)
        return Reply(words(number), delay=0.01)

    with serving(killing) as server:
        code = WORKER.format(tests=str(Path(__file__).parent), url=server.url, out=str(tmp_path / "a"))
        clients.append(subprocess.Popen([sys.executable, "-c", code]))
        assert clients[0].wait() == -signal.SIGKILL
        before = len(lines(tmp_path / "a"))
        assert 10 <= before <= 11, "all that was answered but for what was under way"
        report = write_stories(endpoint(server.url), order(per_topic=5), tmp_path / "a", progress=False)
    assert (report.there, report.written) == (before, 30 - before)
    assert len({(item["emotion"], item["topic"], item["number"]) for item in lines(tmp_path / "a")}) == 30


# --- what is wanted -------------------------------------------------------------------------------------------------------


def test_concepts_from_names_and_files(tmp_path: Path) -> None:
    assert [concept.name for concept in concepts_of("calm, at ease")] == ["calm", "at ease"]
    assert len(concepts_of("emotions")) == 171
    (tmp_path / "names.txt").write_text("calm\n\nat ease\n")
    assert [concept.name for concept in concepts_of(str(tmp_path / "names.txt"))] == ["calm", "at ease"]
    file = tmp_path / "concepts.jsonl"
    file.write_text('{"concept": "calm", "synonyms": ["serene"], "instruction": "So.", "plain": "Not so."}\n{"concept": "formal"}\n')
    assert concepts_of(str(file)) == [Concept("calm", "So.", "Not so.", ("serene",)), Concept("formal")]
    file.write_text('{"concept": "calm", "synonyms": "serene"}\n')
    with pytest.raises(CorpusError, match=r"concepts.jsonl:1: 'synonyms' must be a list of words, got 'serene'"):
        concepts_of(str(file))
    with pytest.raises(CorpusError, match=r"none.jsonl: No such file"):
        concepts_of(str(tmp_path / "none.jsonl"))


def test_topics_from_files(tmp_path: Path) -> None:
    assert list(topics_of()) == [f"t{number:02}" for number in range(1, 11)]
    (tmp_path / "topics.txt").write_text("a bus stop\n\na lamp\n")
    assert topics_of(tmp_path / "topics.txt") == {"a bus stop": "a bus stop", "a lamp": "a lamp"}
    (tmp_path / "topics.json").write_text('{"m1": "a bus stop"}')
    assert topics_of(tmp_path / "topics.json") == {"m1": "a bus stop"}
    for bad in ("[]", "{", '{"a": 3}'):
        (tmp_path / "topics.json").write_text(bad)
        with pytest.raises(CorpusError, match=r"topics.json"):
            topics_of(tmp_path / "topics.json")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"words": (40, 10)}, "a story's words must be a range such as 90 to 150, got 40 to 10"),
        ({"per_topic": 0}, "per_topic must be at least 1, got 0"),
        ({"attempts": 0}, "attempts must be at least 1, got 0"),
        ({"topics": {}}, "no topics"),
        ({"concepts": [Concept("calm"), Concept("calm")]}, "duplicate concept 'calm'"),
        ({"concepts": []}, "1 to 1024 concepts, got 0"),
    ],
)
def test_bad_orders(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        order(**options)


def test_what_is_there_when_cut_short_is_balanced() -> None:
    tasks = [task.key for task in order(per_topic=2).tasks()]
    for end in range(len(CONCEPTS), len(tasks) + 1, len(CONCEPTS)):
        counts = Counter(name for name, _, _ in tasks[:end])
        assert len(set(counts.values())) == 1
    assert re.search("t1.*t2.*t3", " ".join(topic for _, topic, _ in tasks))
