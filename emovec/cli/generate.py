"""``emovec generate``: write with a bias, watched by a guard."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from emovec.cli.common import (
    DEFAULT,
    BankOption,
    BiasOption,
    DeviceOption,
    DtypeOption,
    ForceOption,
    JsonOption,
    ModelOption,
    err,
    integers,
    load,
    out,
    print_json,
    steering_of,
    text_of,
)

if TYPE_CHECKING:
    from emovec.bank import Bank
    from emovec.guard import Guard

_GUARD = re.compile(r"\s*(.+?)\s*>\s*(\S+)\s*")


def generate(
    prompt: Annotated[list[str] | None, typer.Argument(help="The prompt; `-` or nothing for standard input.")] = None,
    file: Annotated[Path | None, typer.Option(help="Read the prompt from a file.")] = None,
    bias: BiasOption = None,
    profile: Annotated[str | None, typer.Option(help="A named steering value of a TOML file.", metavar="FILE:NAME")] = None,
    layers: Annotated[str | None, typer.Option(help="Steer at these layers of the bank, such as 12,15. Default: the bank's.")] = None,
    guard: Annotated[
        list[str] | None,
        typer.Option(
            help="Stop when a concept or family scores above this: `desperate>2`; `desperate`: the bank's bound.", metavar="NAME[>SCORE]"
        ),
    ] = None,
    hold: Annotated[int, typer.Option(help="So many tokens in a row must be above it.", min=1)] = 3,
    halflife: Annotated[float, typer.Option(help="Of the guard's smoothing, in tokens.", min=0)] = 8,
    refuse: Annotated[str | None, typer.Option(help="Instead of stopping, the guard answers with this text.", metavar="TEXT")] = None,
    calm_down: Annotated[
        list[str] | None, typer.Option(help="Instead of stopping, the guard steers like this from there on.", metavar="NAME=VALUE")
    ] = None,
    model: ModelOption = DEFAULT,
    bank: BankOption = None,
    max_new_tokens: Annotated[int, typer.Option(help="The most tokens to write.", min=1)] = 80,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token each time.", min=0)] = 0.0,
    seed: Annotated[int, typer.Option(help="For sampling.")] = 0,
    raw: Annotated[bool, typer.Option("--raw", help="The prompt alone, not as a user's message in the chat template.")] = False,
    scores: Annotated[bool, typer.Option("--scores", help="Show the strongest concepts in what was written.")] = False,
    html: Annotated[Path | None, typer.Option(help="Write a page with a token heatmap.")] = None,
    json: JsonOption = False,
    force: ForceOption = False,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
) -> None:
    """Generate text with a bias: `emovec generate "Describe your day." --bias calm=0.05`.

    Exit code 3 if a guard stopped or refused.
    """
    import torch

    from emovec.hook import attach
    from emovec.models import encode

    words = text_of(prompt or [], file)
    if not words.strip():
        raise typer.BadParameter("the prompt is empty")
    if refuse is not None and calm_down:
        raise typer.BadParameter("a guard refuses or calms down, not both")
    if (refuse is not None or calm_down) and not guard:
        raise typer.BadParameter("--refuse and --calm-down say what a guard does; give --guard as well")
    network, tokenizer, loaded = load(model, bank, device=device, dtype=dtype)
    steering = steering_of(bias, profile, loaded.names)
    action = steering_of(calm_down, None, loaded.names) if calm_down else refuse
    watch = guard_of(guard or (), action, hold, halflife, loaded)
    inputs = encode(tokenizer, words, chat=False if raw else None, device=network.device)
    torch.manual_seed(seed)
    sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    probe = attach(
        network, loaded, steer=steering, steer_layers=integers(layers, "--layers"), guard=watch, tokenizer=tokenizer, force=force
    )
    with probe:
        tokens = network.generate(**inputs, max_new_tokens=max_new_tokens, pad_token_id=tokenizer.pad_token_id, **sampling)
    written = tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    reading = probe[0]
    ended = any(event.action in ("stop", "refuse") for event in probe.events)
    if html is not None:
        reading.heatmap(html, title="Generated text")
    kind = "generated" if "generated" in reading.kind else "prompt"
    if json:
        top = dict(reading.top(8, kind=kind)) if scores else None
        print_json({"text": written, "bias": steering.to_dict(), "events": [vars(event) for event in probe.events], "top": top})
    else:
        out.print(written.strip(), soft_wrap=True, markup=False)
        for event in probe.events:
            err.print(f"[bold]guard:[/] {event}", soft_wrap=True)
        if scores:
            best = "  ".join(f"{name} {value:+.2f}" for name, value in reading.top(8, kind=kind))
            out.print(f"[bold]strongest in the {kind} text[/], mean {reading.unit}: {best}", soft_wrap=True)
        if html is not None:
            out.print(f"page: {html}")
    if ended:
        raise typer.Exit(3)


def guard_of(conditions: Sequence[str], action: Any, hold: int, halflife: float, bank: Bank) -> Guard | None:
    """The guard that ``--guard`` asks for; ``action``: None to stop, a text to refuse with, or what to steer with."""
    from emovec.calibration import threshold_of
    from emovec.guard import Guard, Refuse, Steer, Stop, Threshold

    if not conditions:
        return None
    done = Stop() if action is None else Refuse(action) if isinstance(action, str) else Steer(action)
    thresholds = []
    for text in conditions:
        if text in bank.names:
            thresholds.append(threshold_of(bank, text, done))
            continue
        found = _GUARD.fullmatch(text)
        try:
            name, above = (found[1], float(found[2])) if found else ("", 0.0)
        except ValueError:
            found = None
        if found is None:
            raise typer.BadParameter(
                f"{text!r} is neither a concept of the bank nor NAME>SCORE, such as 'desperate>2'", param_hint="--guard"
            )
        thresholds.append(Threshold(name, above, done, hold=hold, halflife=halflife))
    return Guard(*thresholds)
