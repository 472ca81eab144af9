"""``emovec calibrate``: a bank's baselines for the model it is used with, and bounds for a guard."""

from __future__ import annotations

from itertools import islice
from json import loads
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from emovec.cli.common import DeviceOption, DtypeOption, JsonOption, busy, err, load, out, print_json

if TYPE_CHECKING:
    from emovec.bank import Bank


def calibrate(
    model: Annotated[str, typer.Argument(help="The model: a packaged name, a directory or a hub name.")],
    bank: Annotated[str, typer.Argument(help="A shipped bank or a file, made for this model or for one that this is a copy of.")],
    target: Annotated[Path, typer.Option("--out", "-o", help="The bank to write (.safetensors).")],
    rate: Annotated[float, typer.Option(help="False alarms that a guard may give, on ordinary conversations.")] = 0.05,
    per: Annotated[str, typer.Option(help="`conversation`, or `tokens`: in 1,000 of them.")] = "conversation",
    halflife: Annotated[float, typer.Option(help="Of the guard's smoothing, in tokens.", min=0)] = 8,
    hold: Annotated[int, typer.Option(help="So many tokens in a row must be above a bound.", min=1)] = 3,
    on: Annotated[str, typer.Option(help="The tokens that count: `all`, `prompt` or `generated`.")] = "all",
    ordinary: Annotated[Path | None, typer.Option(help="Ordinary prompts, JSON Lines of `content`. Default: emovec's own.")] = None,
    neutral: Annotated[Path | None, typer.Option(help="Neutral dialogues, JSON Lines of `turns`. Default: emovec's own.")] = None,
    new_tokens: Annotated[int, typer.Option(help="The most tokens of an answer.", min=1)] = 48,
    usable: Annotated[
        Path | None, typer.Option(help="The report.json of `emovec evaluate`: keep the usable strengths that it found in the bank.")
    ] = None,
    guard_only: Annotated[bool, typer.Option("--guard-only", help="Keep the bank's baselines; the model must be its own.")] = False,
    json: JsonOption = False,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
) -> None:
    """Calibrate a bank for a model: its baselines, and for each concept the bound that ordinary conversations rarely cross.

    Bounds are found on every other prompt; on the others the false alarms are counted.
    """
    from emovec.calibration import Alarms, conversations, recalibrated, usable_in, with_guard, with_usable
    from emovec.extraction import corpus

    if target.suffix != ".safetensors":
        raise typer.BadParameter(f"a bank is a .safetensors file, got {target}", param_hint="--out")
    if not target.parent.is_dir():
        raise typer.BadParameter(f"there is no directory {target.parent}", param_hint="--out")
    strengths = None if usable is None else usable_in(loads(usable.read_text(encoding="utf-8")))
    alarms = Alarms(rate, "1000 tokens" if per == "tokens" else per, halflife, hold, on)
    prompts = [turns[0]["content"] for turns in corpus.prompts(ordinary or corpus.shipped("ordinary.jsonl"))()]
    dialogues = list(corpus.dialogues(neutral or corpus.shipped("neutral.jsonl"))())
    network, tokenizer, made = load(model, bank, device=device, dtype=dtype)
    if not guard_only:
        with busy("baselines"):
            texts = [{"content": prompt} for prompt in prompts]
            made = recalibrated(network, tokenizer, made, texts, [{"turns": turns} for turns in dialogues], model_name=model)
    readings = []
    for reading in islice(conversations(network, tokenizer, made, prompts, new_tokens), len(prompts)):
        readings.append(reading)
        if len(readings) % 10 == 0 and err.is_terminal:
            err.print(f"{len(readings)} of {len(prompts)} conversations")
    made = with_guard(made, readings, alarms)
    if strengths is not None:
        made = with_usable(made, strengths)
    made.save(target)
    if json:
        print_json(made.meta["guard"])
        return
    _show(made, target)


def _show(bank: Bank, target: Path) -> None:
    guard: dict[str, Any] = bank.meta["guard"]
    units, counted = guard["measured"]["units"], guard["measured"]["alarms"]
    total = sum(counted.values())
    unit = "conversations" if guard["per"] == "conversation" else "thousands of tokens"
    out.print(f"{target}: bounds for at most {guard['rate']:g} false alarms per {guard['per']}", soft_wrap=True)
    out.print(f"on {units:g} other {unit}: {total / len(counted) / units:.4f} on average over {len(counted)} concepts", soft_wrap=True)
    table = Table("most false alarms", "bound", "alarms", box=None, pad_edge=False)
    for name in sorted(counted, key=lambda name: -counted[name])[:5]:
        table.add_row(name, f"{guard['above'][name]:+.2f}", str(counted[name]))
    out.print(table)
