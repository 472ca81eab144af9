"""``emovec extract``: make a bank for a model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from emovec.cli.common import DeviceOption, DtypeOption, busy, dtype_of, err, integers, out


def extract(
    model: Annotated[str, typer.Argument(help="The model: a packaged name, a directory or a hub name.")],
    target: Annotated[Path, typer.Option("--out", "-o", help="The bank to write (.safetensors).")],
    stories: Annotated[
        list[Path] | None,
        typer.Option(help="Labelled stories, JSON Lines of `emotion` and `text`; several files go together. Default: emovec's own."),
    ] = None,
    neutral: Annotated[Path | None, typer.Option(help="Neutral dialogues, JSON Lines of `turns`. Default: emovec's own.")] = None,
    ordinary: Annotated[Path | None, typer.Option(help="Ordinary prompts, JSON Lines of `content`. Default: emovec's own.")] = None,
    layers: Annotated[str | None, typer.Option(help="Decoder blocks, counted from 0, such as 9,12,15-17. Default: all.")] = None,
    read_layer: Annotated[int | None, typer.Option(help="The layer to read at. Default: two thirds up the layers.")] = None,
    steer_layers: Annotated[str | None, typer.Option(help="The layers to steer at. Default: the layer to read at.")] = None,
    skip: Annotated[int, typer.Option(help="Tokens left out at the start of each story.", min=0)] = 50,
    skip_share: Annotated[float, typer.Option(help="But no more than this share of a story, so that short texts are used too.")] = 1.0,
    format: Annotated[str, typer.Option(help="`raw`, or `chat`: each story as a user's message.")] = "raw",
    denoise: Annotated[str, typer.Option(help="Neutral components to project out: of `tokens`, of `dialogues`, or `none`.")] = "tokens",
    variance: Annotated[float, typer.Option(help="Share of the neutral variance that these reach.")] = 0.5,
    readers: Annotated[str, typer.Option(help="`whitened`, or `none`: read with the directions.")] = "whitened",
    shrinkage: Annotated[float, typer.Option(help="Of the covariance that whitens.")] = 0.5,
    batch_tokens: Annotated[int | None, typer.Option(help="Tokens in a batch. Default: 2048 on a CPU, 16384 on a GPU.")] = None,
    evidence: Annotated[Path | None, typer.Option(help="A JSON file to record in the bank, such as what chose its layers.")] = None,
    resume: Annotated[Path | None, typer.Option(help="Keep the state here, and go on from it after a kill.")] = None,
    device: DeviceOption = None,
    device_map: Annotated[str | None, typer.Option(help="Spread a big model, such as `auto`.")] = None,
    dtype: DtypeOption = None,
) -> None:
    """Make a bank of directions from labelled stories, in one pass for all layers.

    Under `torchrun --nproc-per-node 4 -m emovec extract ...` each process does its share.
    """
    from emovec.extraction import Extraction, Recipe, ranks
    from emovec.models import load_model

    if target.suffix != ".safetensors":
        raise typer.BadParameter(f"a bank is a .safetensors file, got {target}", param_hint="--out")
    if not target.parent.is_dir():
        raise typer.BadParameter(f"there is no directory {target.parent}", param_hint="--out")
    recipe = Recipe(
        skip=skip,
        skip_share=skip_share,
        format=format,
        denoise=None if denoise == "none" else denoise,
        variance=variance,
        readers=None if readers == "none" else readers,
        shrinkage=shrinkage,
    )
    ranks.join()
    with busy(f"loading {model}"):
        network, tokenizer = load_model(model, dtype=dtype_of(dtype), device=device or ranks.device(), device_map=device_map)
    job = Extraction(
        network,
        tokenizer,
        stories or None,
        neutral,
        ordinary,
        recipe=recipe,
        layers=integers(layers, "--layers"),
        read_layer=read_layer,
        steer_layers=integers(steer_layers, "--steer-layers"),
        batch_tokens=batch_tokens,
        out=target,
        resume=resume,
        model_name=model,
        meta={} if evidence is None else {"evidence": json.loads(evidence.read_text(encoding="utf-8"))},
    )
    plan = job.plan
    if ranks.rank() == 0:
        err.print(
            f"{plan.stories:,} stories of {len(plan.names)} concepts, {plan.tokens:,} tokens, {len(plan.layers)} layers, "
            f"{plan.bytes / 1e6:,.0f} MB of sums"
            + (f"; {plan.short:,} stories are not longer than the skip and are left out" if plan.short else ""),
            soft_wrap=True,
        )
    bank = job.run()
    if ranks.rank() == 0:
        assert job.summary is not None
        out.print(f"{target}: {bank!r}", soft_wrap=True)
        out.print(f"{job.summary.tokens:,} tokens in {job.summary.seconds:,.0f} s, {job.summary.tokens_per_second:,.0f} tokens/s")
