"""``emovec extract``: make a bank for a model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from emovec.bank import load_bank
from emovec.cli.common import DeviceOption, DtypeOption, ForceOption, busy, dtype_of, err, integers, out

if TYPE_CHECKING:
    from emovec.extraction import ConceptExtraction, Evidence

_OF_THE_BANK = (
    "layers",
    "read_layers",
    "steer_layers",
    "skip",
    "skip_share",
    "format",
    "denoise",
    "variance",
    "shrinkage",
    "level",
    "evidence",
)


def extract(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="The model: a packaged name, a directory or a hub name.")],
    target: Annotated[Path, typer.Option("--out", "-o", help="The bank to write (.safetensors).")],
    stories: Annotated[
        list[Path] | None,
        typer.Option(help="Labelled stories, JSON Lines of `emotion` and `text`; several files go together. Default: emovec's own."),
    ] = None,
    neutral: Annotated[Path | None, typer.Option(help="Neutral dialogues, JSON Lines of `turns`. Default: emovec's own.")] = None,
    ordinary: Annotated[Path | None, typer.Option(help="Ordinary prompts, JSON Lines of `content`. Default: emovec's own.")] = None,
    layers: Annotated[str | None, typer.Option(help="Decoder blocks, counted from 0, such as 9,12,15-17. Default: all.")] = None,
    read_layers: Annotated[
        str | None, typer.Option(help="The layer to read at, or several to be read together. Default: that two thirds up the layers.")
    ] = None,
    steer_layers: Annotated[str | None, typer.Option(help="The layers to steer at. Default: the layer to read at.")] = None,
    skip: Annotated[int, typer.Option(help="Tokens left out at the start of each story.", min=0)] = 50,
    skip_share: Annotated[float, typer.Option(help="But no more than this share of a story, so that short texts are used too.")] = 1.0,
    format: Annotated[str, typer.Option(help="`raw`, or `chat`: each story as a user's message.")] = "raw",
    denoise: Annotated[str, typer.Option(help="Neutral components to project out: of `tokens`, of `dialogues`, or `none`.")] = "tokens",
    variance: Annotated[float, typer.Option(help="Share of the neutral variance that these reach.")] = 0.5,
    readers: Annotated[str, typer.Option(help="`whitened`, or `none`: read with the directions.")] = "whitened",
    shrinkage: Annotated[float, typer.Option(help="Of the covariance that whitens.")] = 0.5,
    level: Annotated[bool, typer.Option(help="Make readers blind to what all stories have in common as against ordinary prompts.")] = True,
    batch_tokens: Annotated[int | None, typer.Option(help="Tokens in a batch. Default: 2048 on a CPU, 16384 on a GPU.")] = None,
    evidence: Annotated[Path | None, typer.Option(help="A JSON file to record in the bank, such as what chose its layers.")] = None,
    resume: Annotated[Path | None, typer.Option(help="Keep the state here, and go on from it after a kill.")] = None,
    concepts: Annotated[
        Path | None, typer.Option(help="Instead of a bank from scratch: stories of new concepts, `concept`, `text`, `topic`, `contrast`.")
    ] = None,
    into: Annotated[str | None, typer.Option(help="The bank that the new concepts are added to, a shipped one or a file.")] = None,
    family: Annotated[str | None, typer.Option(help="The family that the new concepts are put into.")] = None,
    force: ForceOption = False,
    device: DeviceOption = None,
    device_map: Annotated[str | None, typer.Option(help="Spread a big model, such as `auto`.")] = None,
    dtype: DtypeOption = None,
) -> None:
    """Make a bank of directions from labelled stories, in one pass for all layers; or add new concepts to a bank.

    `emovec extract MODEL --concepts my.jsonl --into BANK --out NEW` makes them by the recipe of BANK, and says what speaks for them.

    Under `torchrun --nproc-per-node 4 -m emovec extract ...` each process does its share.
    """
    from emovec.extraction import ConceptExtraction, Extraction, Recipe, ranks
    from emovec.models import load_model

    if target.suffix != ".safetensors":
        raise typer.BadParameter(f"a bank is a .safetensors file, got {target}", param_hint="--out")
    if not target.parent.is_dir():
        raise typer.BadParameter(f"there is no directory {target.parent}", param_hint="--out")
    if (concepts is None) != (into is None):
        raise typer.BadParameter("new concepts need both --concepts and --into", param_hint="--concepts")
    if concepts is not None and into is not None:
        _refuse_what_the_bank_says(context)
        bank = load_bank(into)
        ranks.join()
        with busy(f"loading {model}"):
            network, tokenizer = load_model(model, dtype=dtype_of(dtype), device=device or ranks.device(), device_map=device_map)
        _add(
            ConceptExtraction(
                network,
                tokenizer,
                bank,
                concepts,
                stories or None,
                neutral,
                ordinary,
                whitened=False if readers == "none" else None,
                family=family,
                batch_tokens=batch_tokens,
                resume=resume,
                force=force,
            ),
            target,
        )
        return
    recipe = Recipe(
        skip=skip,
        skip_share=skip_share,
        format=format,
        denoise=None if denoise == "none" else denoise,
        variance=variance,
        readers=None if readers == "none" else readers,
        shrinkage=shrinkage,
        level=level,
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
        read_layer=integers(read_layers, "--read-layers"),
        steer_layers=integers(steer_layers, "--steer-layers"),
        batch_tokens=batch_tokens,
        out=target,
        resume=resume,
        model_name=model,
        meta={} if evidence is None else {"evidence": json.loads(evidence.read_text(encoding="utf-8"))},
    )
    plan = job.plan
    with busy("trying a batch"):
        seconds = job.estimate()
    if ranks.rank() == 0:
        err.print(
            f"{plan.stories:,} stories of {len(plan.names)} concepts, {plan.tokens:,} tokens, {len(plan.layers)} layers, "
            f"{_megabytes(network)} MB of weights, {plan.bytes / 1e6:,.0f} MB of sums, about {_minutes(seconds)}"
            + (f"; {plan.short:,} stories are not longer than the skip and are left out" if plan.short else ""),
            soft_wrap=True,
        )
    bank = job.run()
    if ranks.rank() == 0:
        assert job.summary is not None
        out.print(f"{target}: {bank!r}", soft_wrap=True)
        out.print(f"{job.summary.tokens:,} tokens in {job.summary.seconds:,.0f} s, {job.summary.tokens_per_second:,.0f} tokens/s")


def _refuse_what_the_bank_says(context: typer.Context) -> None:
    """New concepts are made as the bank was; an option that says otherwise would be ignored."""
    for name in _OF_THE_BANK:
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            option = "--" + name.replace("_", "-")
            raise typer.BadParameter("new concepts are made as the bank was, at its layers; leave this out", param_hint=option)


def _add(job: ConceptExtraction, target: Path) -> None:
    from emovec.extraction import ranks

    plan = job.plan
    if ranks.rank() == 0:
        how = ", ".join(f"{count:,} {_CONTRASTS[kind]}" for kind, count in plan.contrasts.items())
        err.print(
            f"{plan.stories:,} stories of {len(plan.names)} new concepts, {how}; {plan.tokens:,} tokens, "
            f"{plan.corpus_tokens:,} of them of the bank's corpus; {plan.bytes / 1e6:,.0f} MB of sums"
            + (f"; {plan.short:,} stories are not longer than the skip and are left out" if plan.short else ""),
            soft_wrap=True,
        )
    bank = job.run()
    if ranks.rank() == 0:
        bank.save(target)
        for found in job.evidence.values():
            _show(found)
        out.print(f"{target}: {bank!r}", soft_wrap=True)


_CONTRASTS = {
    "own text": "with a contrast of their own",
    "same topic": "against the corpus's stories on their topic",
    "mean": "against the mean of the corpus",
}


def _show(found: Evidence) -> None:
    low, high = found.interval
    words = "" if found.words is None else f"; words alone {found.words:.2f}"
    near = ", ".join(f"{name} {cosine:+.2f}" for name, cosine in found.nearest)
    out.print(
        f"{found.concept}, at layer {found.layer}, from {found.stories:,} stories on {found.topics:,} topics\n"
        f"  held-out topics: {found.accuracy:.2f} read higher than their contrast ({low:.2f} to {high:.2f}), "
        f"p = {found.p:.3g} of {found.flips:,} sign flips{words}\n"
        f"  by {found.margin:.2f} standard deviations of ordinary tokens; "
        f"two halves of the topics agree with a cosine of {found.halves:.2f}\n"
        f"  nearest: {near}",
        soft_wrap=True,
        markup=False,
    )
    for said in found.warnings:
        err.print(f"warning: {found.concept}: {said}", soft_wrap=True, markup=False)


def _megabytes(network: Any) -> str:
    return f"{sum(weight.nbytes for weight in network.parameters()) / 1e6:,.0f}"


def _minutes(seconds: float) -> str:
    return f"{seconds:,.0f} s" if seconds < 100 else f"{seconds / 60:,.0f} min"
