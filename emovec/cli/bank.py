"""``emovec bank``: look at banks, check them against a model, exchange them with llama.cpp."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from emovec.bank import Bank, load_bank
from emovec.cli.common import BiasOption, DeviceOption, JsonOption, busy, err, integers, out, print_json, steering_of

app = typer.Typer(help="Show, check and convert banks of directions.", no_args_is_help=True)

LONGEST = 500  # characters of one entry of a bank's meta that are shown

BankArgument = Annotated[str, typer.Argument(metavar="BANK", help="A shipped bank or a file.")]


@app.command()
def show(
    bank: BankArgument,
    names: Annotated[bool, typer.Option("--names", help="List the concepts, by family.")] = False,
    json: JsonOption = False,
) -> None:
    """What is in a bank: its layers, its calibration, and how it was made."""
    loaded = load_bank(bank)
    if json:
        print_json(_facts(loaded))
        return
    out.print(repr(loaded), soft_wrap=True)
    table = Table("layer", "readers", "norm of the stream", "baseline tokens", "random null std", box=None, pad_edge=False)
    for layer in loaded.values():
        counts = ", ".join(f"{kind} {baseline.count:,}" for kind, baseline in layer.baselines.items())
        null = layer.random_null
        table.add_row(
            str(layer.index),
            "directions" if layer.readers is None else "whitened",
            "unknown" if layer.residual_norm is None else f"{layer.residual_norm:.4g}",
            counts or "none: scores are raw projections",
            "none" if null is None else f"{float(null.std.mean()):.3g}",
        )
    out.print(table)
    if names:
        rest = set(loaded.names).difference(*loaded.families.values())
        for family, members in {**loaded.families, **({"no family": tuple(sorted(rest))} if rest else {})}.items():
            out.print(f"[bold]{escape(family)}[/]: {escape(', '.join(members))}", soft_wrap=True)
    for key, value in loaded.meta.items():
        if key != "fingerprint":
            text = str(value)
            out.print(f"[bold]{escape(key)}[/]: {escape(text) if len(text) <= LONGEST else 'long; --json prints it'}", soft_wrap=True)


def _facts(bank: Bank) -> dict[str, Any]:
    return {
        "concepts": list(bank.names),
        "width": bank.width,
        "layers": {
            str(layer.index): {
                "residual_norm": layer.residual_norm,
                "readers": layer.readers is not None,
                "baseline_tokens": {kind: baseline.count for kind, baseline in layer.baselines.items()},
            }
            for layer in bank.values()
        },
        "read_layer": bank.read_layer,
        "steer_layers": list(bank.steer_layers),
        "families": {family: list(members) for family, members in bank.families.items()},
        "meta": bank.meta,
    }


@app.command()
def check(
    bank: BankArgument,
    model: Annotated[str, typer.Argument(help="The model: a packaged name, a directory or a hub name.")],
    device: DeviceOption = None,
) -> None:
    """Whether a bank belongs to a model: exit code 0 if it does, 1 with what differs if not."""
    import warnings

    from emovec.models import load_model

    loaded = load_bank(bank)
    with busy(f"loading {model}"):
        network, tokenizer = load_model(model, device=device)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loaded.check(network, tokenizer)
    for warning in caught:
        err.print(f"[yellow]warning:[/] {warning.message}", soft_wrap=True)
    out.print(f"{bank} belongs to {model}")


@app.command()
def convert(
    source: Annotated[str, typer.Argument(help="A bank, or a control vector (.gguf).")],
    target: Annotated[Path, typer.Argument(help="A control vector (.gguf), or a bank (.safetensors).")],
    bias: BiasOption = None,
    layers: Annotated[str | None, typer.Option(help="Layers to write, such as 9,12. Default: those the bank steers at.")] = None,
    name: Annotated[str | None, typer.Option(help="What to call an imported direction. Default: the file's stem.")] = None,
) -> None:
    """Between emovec's banks and llama.cpp's control vectors.

    `emovec bank convert smollm2-135m-instruct calm.gguf --bias calm=0.05` writes what that steering adds;
    `emovec bank convert theirs.gguf theirs.safetensors` reads a control vector as a bank of one concept.
    """
    from emovec.gguf import export_control_vector, import_control_vector

    if source.endswith(".gguf") and target.suffix == ".safetensors":
        imported = import_control_vector(source, name=name or Path(source).stem)
        imported.save(target)
        norms = [float(layer.raw_norm.max()) for layer in imported.values() if layer.raw_norm is not None]
        out.print(f"{target}: {imported!r}; length of the vectors up to {max(norms, default=math.nan):.3g}", soft_wrap=True)
        return
    if target.suffix != ".gguf" or source.endswith(".gguf"):
        raise typer.BadParameter(f"from a bank to .gguf, or from .gguf to .safetensors; got {source} and {target}")
    loaded = load_bank(source)
    steering = steering_of(bias, None, loaded.names)
    if not steering:
        raise typer.BadParameter("a control vector adds something: give --bias calm=0.05", param_hint="--bias")
    export_control_vector(loaded, steering, target, layers=integers(layers, "--layers"))
    out.print(f"{target}: {steering.to_json()} at layers {', '.join(map(str, integers(layers, '--layers') or loaded.steer_layers))}")
