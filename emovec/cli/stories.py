"""``emovec stories``: have a model write the stories that a bank is made from."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from emovec.cli.common import DeviceOption, DtypeOption, busy, dtype_of, err, out

if TYPE_CHECKING:
    from emovec.extraction.writers import Writer
    from emovec.extraction.writing import Report


def stories(
    concepts: Annotated[
        str,
        typer.Option(
            help="Names with commas between; or a file of JSON Lines of `concept` (and `instruction`, `plain`, `synonyms`), or with a "
            "name a line; or `emotions`, emovec's 171."
        ),
    ],
    target: Annotated[Path, typer.Option("--out", "-o", help="The file to write (.jsonl). If it is there, it is gone on with.")],
    endpoint: Annotated[str | None, typer.Option(help="An OpenAI-compatible endpoint, such as http://localhost:8000/v1.")] = None,
    model: Annotated[str | None, typer.Option(help="The name of the model there.")] = None,
    local: Annotated[str | None, typer.Option(help="Instead: a packaged model, a directory or a hub name, run here.")] = None,
    topics: Annotated[
        Path | None, typer.Option(help="Premises: a JSON object by identifier, or one a line. Default: the ten of emovec's own stories.")
    ] = None,
    per_topic: Annotated[int, typer.Option(help="Stories of each concept on each topic.", min=1)] = 1,
    contrast: Annotated[bool, typer.Option("--contrast", help="Beside each story, the same scene without the concept.")] = False,
    words: Annotated[str, typer.Option(help="The fewest and the most words of a story.")] = "90-150",
    attempts: Annotated[int, typer.Option(help="Of a story, before it is given up.", min=1)] = 5,
    concurrency: Annotated[int, typer.Option(help="Requests at the same time.", min=1)] = 4,
    key_env: Annotated[str, typer.Option(help="The environment variable with the endpoint's key, if it needs one.")] = "OPENAI_API_KEY",
    timeout: Annotated[float, typer.Option(help="Seconds to wait for an answer.", min=0.1)] = 120.0,
    tries: Annotated[int, typer.Option(help="Of a request that fails, with longer and longer waits.", min=1)] = 6,
    temperature: Annotated[float, typer.Option(help="Of the sampling.", min=0)] = 1.0,
    max_tokens: Annotated[int, typer.Option(help="Of an answer.", min=1)] = 1024,
    extra: Annotated[str | None, typer.Option(help="More fields of each request as a JSON object; null takes a field out.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of the sampling. Default: none.")] = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
) -> None:
    """Write stories: every concept on every topic, none that names its concept, no near duplicates.

    The same command goes on where a killed one stopped.
    """
    from emovec.extraction.orders import Order, concepts_of, topics_of
    from emovec.extraction.writers import Endpoint, Local
    from emovec.extraction.writing import write_stories

    if (endpoint is None) == (local is None):
        raise typer.BadParameter("give --endpoint and --model, or --local", param_hint="--endpoint")
    if endpoint is not None and model is None:
        raise typer.BadParameter("which model is it at the endpoint?", param_hint="--model")
    if target.suffix != ".jsonl":
        raise typer.BadParameter(f"stories are a .jsonl file, got {target}", param_hint="--out")
    if not target.parent.is_dir():
        raise typer.BadParameter(f"there is no directory {target.parent}", param_hint="--out")
    order = Order(
        concepts_of(concepts),
        topics_of(topics),
        per_topic=per_topic,
        words=_range(words),
        contrast=contrast,
        attempts=attempts,
        seed=seed,
    )
    writer: Writer
    if local is not None:
        with busy(f"loading {local}"):
            writer = Local(local, device=device, dtype=dtype_of(dtype), temperature=temperature, max_tokens=max_tokens)
    else:
        assert endpoint is not None
        assert model is not None
        writer = Endpoint(
            endpoint,
            model,
            os.environ.get(key_env),
            threads=concurrency,
            temperature=temperature,
            max_tokens=max_tokens,
            extra=_object(extra),
            timeout=timeout,
            tries=tries,
        )
    what = f"{len(order.concepts):,} concepts x {len(order.topics):,} topics x {per_topic} = {len(list(order.tasks())):,} stories"
    err.print(f"{what}{', each with a contrast' if contrast else ''}, by {writer.name}", soft_wrap=True)
    report = write_stories(writer, order, target)
    _say(report, target)
    if report.given_up:
        raise SystemExit(1)


def _say(report: Report, target: Path) -> None:
    have = report.there + report.written
    before = f", {report.there:,} of them from before" if report.there else ""
    out.print(
        f"{target}: {have:,} of {report.wanted:,} stories{before}; {report.requests:,} requests in {report.seconds:,.0f} s", soft_wrap=True
    )
    if report.retries:
        out.print(f"{report.retries:,} requests had to be made again, because the endpoint failed", soft_wrap=True)
    if report.rejected:
        counts = ", ".join(f"{count:,} {reason}" for reason, count in report.rejected.most_common())
        out.print(f"{report.rejected.total():,} texts turned down: {counts}", soft_wrap=True)
    for task, reasons in report.given_up[:20]:
        err.print(f"given up: {task.concept.name} on {task.topic}: {'; '.join(reasons)}", soft_wrap=True, markup=False)
    if report.given_up:
        lacking = sorted({task.topic for task, _ in report.given_up})
        err.print(
            f"{len(report.given_up):,} stories were given up, so {len(lacking):,} topics are not balanced; the same command tries again",
            soft_wrap=True,
        )


def _range(text: str) -> tuple[int, int]:
    low, _, high = text.partition("-")
    if not low.strip().isdecimal() or not high.strip().isdecimal():
        raise typer.BadParameter(f"{text!r} is not a range such as 90-150", param_hint="--words")
    return int(low), int(high)


def _object(text: str | None) -> dict[str, object] | None:
    if text is None:
        return None
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise typer.BadParameter(f"{text!r} is not a JSON object", param_hint="--extra")
    return found
