"""``emovec compare``: how post-training moved a model, with alarms for the CI of a training run."""

from __future__ import annotations

import json as json_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from emovec.bank import load_bank
from emovec.cli.common import DeviceOption, DtypeOption, JsonOption, busy, dtype_of, err, out, print_json

if TYPE_CHECKING:
    from emovec.comparison import Alarm, Comparison, Shift


def compare(
    model_a: Annotated[str, typer.Argument(metavar="MODEL_A", help="The model from before: a packaged name, a directory or a hub name.")],
    model_b: Annotated[str, typer.Argument(metavar="MODEL_B", help="The model from after.")],
    bank: Annotated[str | None, typer.Option("--bank", "-b", help="A's bank, which reads both. Default: the shipped one.")] = None,
    bank_b: Annotated[str | None, typer.Option(help="B's own bank, for models of another shape; each is read in its own units.")] = None,
    prompts: Annotated[Path | None, typer.Option(help="Ordinary prompts, JSON Lines of `content`. Default: emovec's own.")] = None,
    challenging: Annotated[
        Path | None, typer.Option(help="Prompts that put a model under strain, likewise; an empty file for none.")
    ] = None,
    on: Annotated[
        str, typer.Option(help="`prompt` (the user's words), `turn_start` (the last token before the answer) or `answer`.")
    ] = "prompt",
    answers: Annotated[str, typer.Option(help="For `--on answer`: each model's `own`, or the `same`, A's, for both.")] = "own",
    max_new_tokens: Annotated[int, typer.Option(help="Of an answer.", min=1)] = 24,
    alarm: Annotated[
        list[str] | None,
        typer.Option(
            help="Exit with 3 if the whole interval of a shift lies beyond this: `afraid>0.5`, `Hostile Anger>0.3`, `valence<-0.1`. "
            "May be given several times.",
            metavar="NAME>NUMBER",
        ),
    ] = None,
    top: Annotated[int, typer.Option(help="How many concepts to show on each side.", min=1)] = 8,
    directory: Annotated[
        Path | None, typer.Option("--out", "-o", help="Write index.html, shifts.svg and comparison.json to this directory.")
    ] = None,
    json: JsonOption = False,
    as_it_is: Annotated[bool, typer.Option("--raw-norms", help="Read B's stream at its own length, not at A's.")] = False,
    batch_size: Annotated[int, typer.Option(help="Prompts in a forward pass.", min=1)] = 16,
    seed: Annotated[int, typer.Option(help="Of intervals and nulls.")] = 0,
    force: Annotated[bool, typer.Option("--force", help="Use A's bank although it was made for another model than A.")] = False,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
) -> None:
    """Give two models the same prompts: which emotion concepts are stronger in B, and by how much?

    Exit code 3 if an alarm fires.
    """
    from emovec.comparison import ANSWERS, POSITIONS, Alarm, AlarmError
    from emovec.comparison import compare as compared
    from emovec.extraction import corpus
    from emovec.models import load_model

    # what can be wrong without a model is told before one is loaded
    for option, value, known in (("--on", on, POSITIONS), ("--answers", answers, ANSWERS)):
        if value not in known:
            raise typer.BadParameter(f"{value!r} is not one of {', '.join(known)}", param_hint=option)
    if answers != "own" and on != "answer":
        raise typer.BadParameter(f"it says which answers are read; give --on answer, not {on}", param_hint="--answers")
    loaded = load_bank(bank or model_a)
    other = None if bank_b is None else load_bank(bank_b)
    names = [concept for concept in loaded.names if other is None or concept in other.names]
    try:
        alarms = [Alarm.parse(text, names, loaded.families) for text in alarm or ()]
    except AlarmError as error:
        raise typer.BadParameter(str(error), param_hint="--alarm") from None
    asked = [None if path is None else [turns[0] for turns in corpus.prompts(path)()] for path in (prompts, challenging)]
    if directory is not None:
        directory.mkdir(parents=True, exist_ok=True)
    kind = dtype_of(dtype)
    with busy(f"loading {model_a}"):
        network_a, tokenizer_a = load_model(model_a, dtype=kind, device=device)
    with busy(f"loading {model_b}"):
        network_b, tokenizer_b = load_model(model_b, dtype=kind, device=device)
    with busy("comparing"):
        found = compared(
            network_a,
            network_b,
            tokenizer_a,
            tokenizer_b,
            loaded,
            other,
            *asked,
            on=on,
            answers=answers,
            max_new_tokens=max_new_tokens,
            match_norms=not as_it_is,
            batch_size=batch_size,
            seed=seed,
            force=force,
        )
    fired = found.fired(alarms)
    facts = {
        "a": model_a,
        "b": model_b,
        **found.to_dict(),
        "alarms": [{"alarm": str(one), "fires": one in fired} for one in alarms],
    }
    if directory is not None:
        from emovec.comparison.page import write_figure, write_page
        from emovec.report.page import put

        write_page(found, directory / "index.html", (model_a, model_b), alarms)
        write_figure(found, directory / "shifts.svg")
        put(directory / "comparison.json", json_module.dumps(facts, ensure_ascii=False, indent=1, allow_nan=False) + "\n")
    if json:
        print_json(facts)
    else:
        _show(found, top)
        if directory is not None:
            out.print(f"page: {escape(str(directory / 'index.html'))}", soft_wrap=True)
    _tell(found, alarms, fired)
    if fired:
        raise typer.Exit(3)


def _show(found: Comparison, top: int) -> None:
    counts = f"{found.challenging.count(False)} neutral and {found.challenging.count(True)} challenging prompts"
    out.print(f"[bold]shift from A to B[/] on {found.facts['on']}, {found.facts['unit']}, {counts}", soft_wrap=True)
    up, down = found.up(top), found.down(top)[::-1]
    out.print(_table("concept", [*up, *down]) if up or down else "no concept moved")
    if found.families:
        out.print(_table("family", sorted(found.families.values(), key=lambda shift: -shift.mean)))
    if found.axes:
        out.print(_table("for each point from 1 to 9", list(found.axes.values()), digits=3))
    if found.random is not None:
        size = found.random.abs()
        out.print(f"random directions move by {float(size.median()):.2f} in the median and {float(size.max()):.2f} at most, of {len(size)}")
    if found.facts["norms_matched"]:
        norms = found.facts["norms"]
        ratios = ", ".join(f"{layer}: {norms['b'][layer] / norm:.3f}" for layer, norm in norms["a"].items())
        out.print(f"B's stream is read at A's length; before that it was as many times as long, by layer: {ratios}", soft_wrap=True)


def _table(head: str, shifts: list[Shift], digits: int = 2) -> Table:
    split = any(shift.neutral is not None for shift in shifts)
    beside = any(shift.random is not None for shift in shifts)
    columns = ["shift", "interval", "p", *(["random as far"] if beside else []), *(["neutral", "challenging"] if split else [])]
    table = Table(head, box=None, pad_edge=False)
    for column in columns:
        table.add_column(column, justify="right")
    for shift in shifts:
        cells = [f"{shift.mean:+.{digits}f}", f"{shift.low:+.{digits}f} to {shift.high:+.{digits}f}", f"{shift.p:.4f}"]
        cells += [f"{shift.random:.1%}"] if shift.random is not None else []
        cells += [f"{part.mean:+.{digits}f}" for part in (shift.neutral, shift.challenging) if part is not None]
        table.add_row(escape(shift.name), *cells)
    return table


def _tell(found: Comparison, alarms: list[Alarm], fired: list[Alarm]) -> None:
    for alarm in alarms:
        state = "[bold red]alarm[/]" if alarm in fired else "silent"
        err.print(f"{state}: {escape(str(alarm))}, the shift is {escape(str(found.shift(alarm.name)))}", soft_wrap=True)
