"""Writing new stories: every concept on every topic, checked, without near duplicates, into a file that a later run goes on with."""

from __future__ import annotations

import hashlib
import json
import os
import queue
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from emovec.bank_layer import shown
from emovec.extraction import corpus
from emovec.extraction.corpus import CorpusError
from emovec.extraction.orders import Concept, Order, Task, contrast_prompt, story_prompt
from emovec.extraction.progress import Progress
from emovec.extraction.words import named
from emovec.extraction.writers import Writer

SHINGLE = 5  # words
NEAR = 0.5  # share of a text's shingles that other texts have, from which on it is a near duplicate
COPY = 0.9  # the same of a contrast and its own story


@dataclass
class Report:
    """What came of it.

    Attributes:
        wanted: stories.
        there: of them in the file before.
        written: by this run.
        given_up: what could not be written, and the reason of each attempt.
        rejected: reason -> texts turned down, of those written in the end as well.
        requests, retries: of the writer; retries are for failures of the endpoint.
        seconds: that it took.
    """

    wanted: int
    there: int = 0
    written: int = 0
    given_up: list[tuple[Task, list[str]]] = field(default_factory=list)
    rejected: Counter[str] = field(default_factory=Counter)
    requests: int = 0
    retries: int = 0
    seconds: float = 0.0


def write_stories(writer: Writer, order: Order, out: str | os.PathLike[str], *, progress: bool = True) -> Report:
    """Write what ``out`` still lacks of ``order``, a line at a time as stories come in.

    A text is turned down, and asked for again, if it names its concept or a synonym, is too short or too long, was cut off, or is a
    near duplicate. A file that a killed run has left is gone on with; its last line is mended if it is half a line.

    Returns:
        What came of it. Stories that were given up are in it; the same call tries them again.

    Raises:
        CorpusError: ``out`` holds something else, or stories by another writer.
        EndpointError: the endpoint refuses or is gone; what was written stays.
    """
    started = time.monotonic()
    path = Path(out)
    shelf = _Shelf()
    there = _taken_up(path, writer.name, shelf, contrast=order.contrast)
    tasks = list(order.tasks())
    missing = [task for task in tasks if task.key not in there]
    report = Report(len(tasks), len(tasks) - len(missing))
    with Progress(len(tasks), "writing", unit="stories", visible=progress) as bar, path.open("ab") as file:
        bar.resume(report.there)

        def save(item: dict[str, Any]) -> None:
            file.write(json.dumps(item, ensure_ascii=False).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())

        for task, done, reasons in _in_threads(writer, order, missing, shelf, save):
            report.rejected.update(reason.split(":")[0] for reason in reasons)
            if done:
                report.written += 1
            else:
                report.given_up.append((task, reasons))
            bar.advance(1)
    report.requests, report.retries, report.seconds = writer.requests, writer.retries, time.monotonic() - started
    return report


# --- one story ------------------------------------------------------------------------------------------------------------


class _Shelf:
    """The shingles of all texts so far, to tell near duplicates by. Shared by the threads."""

    def __init__(self) -> None:
        self._seen: set[int] = set()
        self._lock = threading.Lock()

    def put(self, text: str, *, always: bool = False) -> bool:
        """Take ``text`` in, unless it is a near duplicate."""
        new = shingles(text)
        with self._lock:
            if not always and new and len(new & self._seen) >= NEAR * len(new):
                return False
            self._seen |= new
            return True


def shingles(text: str) -> set[int]:
    """Hashes of all runs of five words, whatever their case and punctuation."""
    words = re.findall(r"\w+", text.lower())
    runs = (" ".join(words[start : start + SHINGLE]) for start in range(max(1, len(words) - SHINGLE + 1)))
    return {int.from_bytes(hashlib.blake2b(run.encode(), digest_size=8).digest(), "little") for run in runs}


def tidied(text: str) -> str:
    """A model's answer without its thoughts, a title, or quotation marks around the whole."""
    text = re.sub(r"<think>.*?</think>", "", text, flags=re.DOTALL).strip()
    text = re.sub(r"\A(#+ .*|\*\*[^*\n]+\*\*)\n+", "", text).strip()
    if len(text) > 1 and text[0] == text[-1] == '"' and '"' not in text[1:-1]:
        text = text[1:-1].strip()
    return text


def problem(text: str, whole: bool, concept: Concept, words: tuple[int, int]) -> str | None:
    """Why a text cannot be used, or None: the kind, a colon, and the figures or words."""
    count = len(text.split())
    if not count:
        return "empty"
    if not whole:
        return f"cut off: after {count} words"
    if not words[0] <= count <= words[1]:
        return f"{'too short' if count < words[0] else 'too long'}: {count} words, not {words[0]} to {words[1]}"
    leaked = named(text, concept.name, concept.synonyms)
    return f"names the concept: {', '.join(leaked)}" if leaked else None


def _written(writer: Writer, order: Order, task: Task, shelf: _Shelf) -> tuple[dict[str, Any] | None, list[str]]:
    """A story's line, or None if it was given up; and why texts were turned down."""
    reasons: list[str] = []
    for attempt in range(order.attempts):
        text, why = _asked(writer, order, task, story_prompt(task, order, reasons), attempt)
        contrast = ""
        if why is None and order.contrast:
            contrast, why = _asked(writer, order, task, contrast_prompt(task, order, text, reasons), attempt)
            if why is None and len(shingles(contrast) & shingles(text)) >= COPY * len(shingles(text)):
                why = "contrast is a copy"
        if why is None and not shelf.put(text):
            why = "near duplicate"
        if why is None:
            item = {"emotion": task.concept.name, "topic": task.topic, "number": task.number, "person": task.person, "text": text}
            return {**item, **({"contrast": contrast} if contrast else {}), "writer": writer.name}, reasons
        reasons.append(why)
    return None, reasons


def _asked(writer: Writer, order: Order, task: Task, prompt: str, attempt: int) -> tuple[str, str | None]:
    seed = None
    if order.seed is not None:  # another one for each text, and the same in each run
        seed = int(hashlib.sha256(repr((order.seed, task.key, attempt, prompt)).encode()).hexdigest()[:7], 16)
    answer = writer(prompt, seed)
    text = tidied(answer.text)
    return text, problem(text, answer.whole, task.concept, order.words)


# --- all of them ----------------------------------------------------------------------------------------------------------


def _in_threads(
    writer: Writer, order: Order, tasks: Sequence[Task], shelf: _Shelf, save: Callable[[dict[str, Any]], None]
) -> Iterator[tuple[Task, bool, list[str]]]:
    """Of each task as it comes in, whether its story was written and saved. An error in one thread ends all."""
    waiting, lock, saving = iter(tasks), threading.Lock(), threading.Lock()
    outcomes: queue.Queue[Any] = queue.Queue()
    ended = threading.Event()

    def work() -> None:
        while not ended.is_set():
            with lock:
                task = next(waiting, None)
            if task is None:
                return
            try:
                item, reasons = _written(writer, order, task, shelf)
                if item is not None:
                    with saving:  # here, so that a kill costs no more than the requests under way
                        save(item)
                outcomes.put((task, item is not None, reasons))
            except BaseException as error:  # raised again in the thread that waits for it
                outcomes.put(error)
                return

    # daemons, so that an interrupt does not have to wait for requests under way
    for _ in range(min(writer.threads, len(tasks))):
        threading.Thread(target=work, daemon=True).start()
    try:
        for _ in tasks:
            outcome = outcomes.get()
            if isinstance(outcome, BaseException):
                raise outcome
            yield outcome
    finally:
        ended.set()
        writer.stop()


def _taken_up(path: Path, writer: str, shelf: _Shelf, *, contrast: bool) -> set[tuple[str, str, int]]:
    """What of a file there is already; half a line at its end, as a kill leaves it, is taken away.

    Nothing is changed in a file that holds anything else.
    """
    if not path.exists():
        return set()
    found: set[tuple[str, str, int]] = set()
    end, line = 0, b""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                item = json.loads(line.decode("utf-8"))
            except (ValueError, RecursionError):
                if line.endswith(b"\n") and line.strip():
                    raise CorpusError(f"{path}:{number}: not a line of JSON; give another file, or remove the line") from None
                if not line.endswith(b"\n"):
                    break
                end += len(line)
                continue
            story = corpus.parsed(item, corpus.story_of, f"{path}:{number}")
            if item.get("writer", writer) != writer:
                raise CorpusError(
                    f"{path}:{number}: a story by {shown(item['writer'])}, not by {shown(writer)}: what a writer does alike in all "
                    "stories cancels only if it wrote them all; give another file"
                )
            if ("contrast" in item) != contrast:
                raise CorpusError(
                    f"{path}:{number}: a story {'without' if contrast else 'with'} a contrast, unlike those asked for; give another file"
                )
            found.add((story.emotion, story.topic, item.get("number", 0)))
            shelf.put(story.text, always=True)
            end += len(line)
    if end < path.stat().st_size:
        os.truncate(path, end)
    elif line and not line.endswith(b"\n"):  # a whole last line that only lacks its end
        with path.open("ab") as file:
            file.write(b"\n")
    return found
