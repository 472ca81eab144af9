"""``emovec evaluate``: put a bank on trial and write a report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from emovec.cli.common import DeviceOption, DtypeOption, ForceOption, err, integers, load, out


def evaluate(
    model: Annotated[str, typer.Argument(help="The model: a packaged name, a directory or a hub name.")],
    bank: Annotated[str, typer.Argument(help="A shipped bank or a file.")],
    target: Annotated[Path, typer.Option("--out", "-o", help="A directory for report.html, report.json, figures and the state.")],
    sections: Annotated[str | None, typer.Option(help="Only these, such as `classification,scenarios`. Default: all.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Half of the topics and fewer draws: for a look, not for a claim.")] = False,
    layers: Annotated[str | None, typer.Option(help="Layers to sweep, such as 6,12-14. Default: eleven, spread evenly.")] = None,
    stories: Annotated[list[Path] | None, typer.Option(help="Labelled texts, a file for each register. Default: emovec's own.")] = None,
    others: Annotated[Path | None, typer.Option(help="Labelled texts by other writers, JSON Lines of `emotion` and `text`.")] = None,
    norms: Annotated[Path | None, typer.Option(help="A table with columns word, valence, arousal. Default: emovec's ratings.")] = None,
    seed: Annotated[int, typer.Option(help="Of everything drawn at random.")] = 0,
    batch_tokens: Annotated[int | None, typer.Option(help="Tokens in a batch. Default: 2048 on a CPU, 16384 on a GPU.")] = None,
    force: ForceOption = False,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
) -> None:
    """Put a bank on trial: what it may be used for, and what it may not, with a null and an interval for each claim.

    A killed run goes on where it was when the same command is given again.
    """
    from emovec.evaluation import Options
    from emovec.evaluation import evaluate as put_on_trial
    from emovec.evaluation.sections import chosen

    names = None if sections is None else [name.strip() for name in sections.split(",")]
    chosen(names)  # an unknown section is an error before the model has been loaded
    swept = integers(layers, "--layers")
    network, tokenizer, loaded = load(model, bank, device=device, dtype=dtype)
    draws = {"samples": 200, "permutations": 200} if quick else {}
    report = put_on_trial(
        network,
        tokenizer,
        loaded,
        target,
        sections=names,
        layers=swept,
        stories=stories or None,
        others=others,
        norms=norms,
        options=Options(seed=seed, quick=quick, **draws),
        batch_tokens=batch_tokens,
        force=force,
    )
    err.print(f"{report.directory / 'report.json'}", soft_wrap=True)
    out.print(f"{report.directory / 'report.html'}", soft_wrap=True)
