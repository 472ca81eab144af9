"""What a bank is made from: labelled stories, neutral dialogues, ordinary prompts; and the corpus that comes with emovec."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias, cast

from emovec import extras
from emovec.bank_layer import shown

SHIPPED = Path(__file__).parent.parent / "data" / "corpus"

Turns: TypeAlias = list[dict[str, str]]
Source: TypeAlias = str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | Iterable[Mapping[str, Any]]
"""A file of JSON Lines or of Parquet, several of them, or the objects themselves: a list, a data set of ``datasets``, or whatever
else can be iterated over more than once; what cannot, such as a generator, is kept in memory."""

PARQUET = (".parquet", ".pq")
FIELDS = ("emotion", "concept", "text", "topic", "contrast", "turns", "content")
_ROWS = 256  # of a Parquet file at a time

_Parse: TypeAlias = Callable[[Mapping[str, Any], str], Any]
"""From an object and where it stands to what it says."""


class CorpusError(ValueError):
    """A corpus is not what it must be; the message names the file and the line, or the item."""


@dataclass(frozen=True)
class Story:
    """A text in which someone feels ``emotion`` without its being named; ``where`` it stands, for messages.

    ``contrast`` is the text's counterpart without the emotion, if it has one.
    """

    emotion: str
    text: str
    topic: str = ""
    where: str = "a story"
    contrast: str | None = None


def shipped(name: str) -> Path:
    """The path of a file of the corpus that comes with emovec, such as ``stories.jsonl``."""
    path = SHIPPED / name
    if not path.is_file():
        raise CorpusError(f"the corpus has no file {shown(name)}; it has {', '.join(sorted(file.name for file in SHIPPED.iterdir()))}")
    return path


def emotions() -> list[str]:
    """The 171 emotion words, in the paper's order."""
    return shipped("emotions.txt").read_text(encoding="utf-8").split("\n")[:-1]


def families() -> dict[str, list[str]]:
    """The paper's 10 clusters of the emotion words."""
    return cast("dict[str, list[str]]", json.loads(shipped("families.json").read_text(encoding="utf-8")))


def stories(source: Source) -> Callable[[], Iterator[Story]]:
    """A function that reads the stories afresh, one at a time, each time it is called; none is kept.

    Objects need ``emotion`` (or ``concept``) and ``text``; ``topic`` is optional and other fields are ignored.
    """
    return objects(source, story_of)


def pairs(source: Source) -> Callable[[], Iterator[Story]]:
    """Likewise for stories of a new concept, which may have a ``contrast``: the same without what makes the concept."""
    return objects(source, _pair)


def dialogues(source: Source) -> Callable[[], Iterator[Turns]]:
    """Likewise for dialogues: objects with ``turns``, each of a ``role`` and a ``content``."""
    return objects(source, _dialogue)


def prompts(source: Source) -> Callable[[], Iterator[Turns]]:
    """Likewise for prompts: objects with ``content``; each becomes a dialogue of one user turn."""
    return objects(source, lambda item, where: [{"role": "user", "content": text_of(item, "content")}])


def digest(items: Iterable[Any]) -> str:
    """A hash of what the items say, whatever the files' layout."""
    found = hashlib.sha256()
    for item in items:
        found.update(json.dumps(item, sort_keys=True, ensure_ascii=False).encode() + b"\n")
    return found.hexdigest()[:16]


def story_of(item: Mapping[str, Any], where: str) -> Story:
    """The story that an object is."""
    topic = item.get("topic")
    name = "concept" if "concept" in item and "emotion" not in item else "emotion"
    return Story(text_of(item, name).strip(), text_of(item, "text"), "" if topic is None else str(topic), where)


def _pair(item: Mapping[str, Any], where: str) -> Story:
    return replace(story_of(item, where), contrast=None if item.get("contrast") is None else text_of(item, "contrast"))


def _dialogue(item: Mapping[str, Any], where: str) -> Turns:
    turns = item.get("turns")
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, Mapping) for turn in turns):
        raise CorpusError(f"'turns' must be a list of objects with role and content, got {shown(turns)}")
    return [{"role": text_of(turn, "role"), "content": text_of(turn, "content")} for turn in turns]


def text_of(item: Mapping[str, Any], field: str) -> str:
    """The text of a field that has to be there."""
    value = item.get(field)
    if not isinstance(value, str) or not value.strip():
        raise CorpusError(f"{field!r} must be text, got {shown(value)}" if field in item else f"no {field!r}")
    return value


def objects(source: Source, parse: _Parse) -> Callable[[], Iterator[Any]]:
    """A function that reads objects afresh each time, and what ``parse`` makes of each and where it stands."""
    paths = _paths(source)
    if paths is not None:
        return lambda: (each for path in paths for each in _file(path, parse))
    items = cast("Iterable[Mapping[str, Any]]", source)
    if isinstance(items, Iterator):  # it can be read once only, so it has to be kept
        items = list(items)
    return lambda: (parsed(item, parse, f"item {number}") for number, item in enumerate(items, start=1))


def _file(path: Path, parse: _Parse) -> Iterator[Any]:
    return _rows(path, parse) if path.suffix in PARQUET else _lines(path, parse)


def _paths(source: Source) -> list[Path] | None:
    if isinstance(source, str | os.PathLike):
        return [Path(source)]
    if isinstance(source, Sequence) and source and all(isinstance(part, str | os.PathLike) for part in source):
        return [Path(cast("str", part)) for part in source]
    return None


def _lines(path: Path, parse: _Parse) -> Iterator[Any]:
    try:
        file = open(path, "rb")  # noqa: SIM115 - closed below; bytes, so that a line that is not UTF-8 can be named
    except OSError as error:
        raise CorpusError(f"{path}: {error.strerror}") from error
    with file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                where = f"{path}:{number}"
                try:
                    item = json.loads(line.decode("utf-8"))
                except (ValueError, RecursionError) as error:
                    raise CorpusError(f"{where}: not a line of JSON: {error}") from None
                yield parsed(item, parse, where)


def _rows(path: Path, parse: _Parse) -> Iterator[Any]:
    """The rows of a Parquet file, some at a time. Columns that nobody asks for are not read."""
    parquet, arrow = (extras.require(name, extra="parquet") for name in ("pyarrow.parquet", "pyarrow"))
    if not path.is_file():
        raise CorpusError(f"{path}: No such file or directory")
    number = 0
    try:
        with parquet.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20) as file:
            known = [name for name in file.schema_arrow.names if name in FIELDS]
            for batch in file.iter_batches(batch_size=_ROWS, columns=known, use_threads=False):
                for row in batch.to_pylist():
                    number += 1
                    # a column holds a null where a row of JSON Lines would lack the field
                    yield parsed({name: value for name, value in row.items() if value is not None}, parse, f"{path}: row {number}")
    except (arrow.ArrowException, OSError) as error:
        raise CorpusError(f"{path}: not a readable Parquet file: {error}") from None


def parsed(item: object, parse: _Parse, where: str) -> Any:
    """What ``parse`` makes of an object; what is wrong with it is named by where it stands."""
    if not isinstance(item, Mapping):
        raise CorpusError(f"{where}: not an object but {shown(item)}")
    try:
        return parse(item, where)
    except CorpusError as error:
        raise CorpusError(f"{where}: {error}") from None
