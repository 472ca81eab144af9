"""``emovec demo``: the whole path on a real model, in a minute or two."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from emovec.cli import demo_steps as steps
from emovec.cli.common import DEFAULT, BankOption, DeviceOption, DtypeOption, ModelOption, load, out
from emovec.cli.read import coloured
from emovec.report.tables import times


def demo(
    directory: Annotated[Path, typer.Option("--out", "-o", help="Where the page and the picture go.")] = Path("demo"),
    model: ModelOption = DEFAULT,
    bank: BankOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
) -> None:
    """Read, steer, clamp and guard a real model, time it, and write a page about it."""
    from emovec.cli.demo_page import write_page

    directory.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    network, tokenizer, loaded = load(model, bank, device=device, dtype=dtype)
    on = steps.Loaded(network, tokenizer, loaded)
    kind = str(network.dtype).removeprefix("torch.")
    out.print(f"{model} in {kind} on {network.device}, {loaded!r}, loaded in {time.monotonic() - started:.0f} s", soft_wrap=True)

    _heading(1, "reading: the strongest concepts while the model reads, as z-scores against ordinary text")
    readings = steps.read(on)
    for words, reading in zip(steps.PROMPTS, readings, strict=False):
        best = "  ".join(f"[bold]{name}[/] {value:+.1f}" for name, value in reading.top(4))
        out.print(f"  {words}\n    {best}", soft_wrap=True)
    story = readings[-1]
    for name in ("peaceful", "terrified", "enraged"):
        out.print(f"  [bold]{name}[/], token by token")
        out.print(coloured(story, name))

    _heading(2, "steering: one batch, a bias for each sequence")
    steered = steps.steer(on)
    for label, text in zip(steered.labels, steered.texts, strict=True):
        out.print(f"  [bold]{label:>16}[/]  {' '.join(text.split())}", soft_wrap=True)
    out.print(f"  Which of these words “{steps.FEELS}” goes on with: odds against no bias", soft_wrap=True)
    table = Table("bias", *steps.FEELINGS, box=None, pad_edge=False)
    for label, ratios in steered.odds.items():
        table.add_row(label, *map(times, ratios.values()))
    out.print(table)

    _heading(3, f"clamping: {steps.PAIR[0]} and {steps.PAIR[1]}, two correlated concepts, each set to a score of its own")
    clamped = steps.clamp(on)
    for row in zip(clamped.names, clamped.before, clamped.targets, clamped.after, clamped.off, clamped.in_turn, strict=True):
        concept, before, target, after, off, in_turn = row
        out.print(
            f"  {concept:>12}: mean {before:+.2f} before, {after:+.2f} after, {target:+.2f} asked; a token is off by at most {off:.2f}, "
            f"by {in_turn:.2f} with one rule after the other",
            soft_wrap=True,
        )
    out.print(f"  The cosine of their directions is {clamped.cosine:.2f}.")

    _heading(4, "guarding: a generation pushed toward despair, and a threshold from ordinary conversations")
    guarded = steps.guard(on)
    out.print(
        f"  {guarded.threshold.label} above {guarded.threshold.above:+.2f} for {guarded.threshold.hold} tokens, "
        f"which {steps.FALSE_ALARMS:.0%} of {guarded.ordinary} ordinary conversations reach"
    )
    out.print(f"  without: {' '.join(guarded.unguarded.split())}", soft_wrap=True, markup=False)
    out.print(f"  with:    {' '.join(guarded.text.split())}", soft_wrap=True, markup=False)
    out.print(f"  {guarded.event if guarded.event is not None else 'the guard did not fire'}", soft_wrap=True)

    _heading(5, f"the cost: reading {len(loaded.names)} concepts and adding a bias at one layer, beside the forward pass")
    timed = [steps.time_it(on, 512), steps.time_it(on, 1)]
    for one in timed:
        out.print(f"  {one.tokens:>4} tokens: {one.op * 1e6:,.0f} µs of {one.forward * 1e3:,.1f} ms, {one.share:.2%}")

    _heading(6, "the page")
    page = write_page(directory, model, readings, steered, clamped, guarded, timed)
    out.print(f"  {page.resolve()}", soft_wrap=True)
    out.print(f"  {directory.resolve() / 'picture.svg'}", soft_wrap=True)
    out.print(f"done in {time.monotonic() - started:.0f} s")


def _heading(number: int, text: str) -> None:
    out.print(f"\n[bold]{number}/6 {text}[/]", soft_wrap=True)
