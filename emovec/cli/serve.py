"""``emovec serve``: vLLM's server with the plugin's flags."""

from __future__ import annotations

import json
import os
import shlex
import sys
from importlib import metadata, resources
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer

from emovec import extras
from emovec.bank import load_bank
from emovec.cli.common import BankOption, err, integers
from emovec.engines.vllm import tally
from emovec.engines.vllm.guard import parse
from emovec.models import local_path
from emovec.steer import load_profiles

MIDDLEWARE = "emovec.engines.vllm.middleware.Middleware"
_OURS = ("--additional-config", "--middleware")


def _grafana(asked: bool) -> None:
    if asked:
        typer.echo(resources.files("emovec").joinpath("data/serving/grafana.json").read_text(encoding="utf-8"), nl=False)
        raise typer.Exit


def serve(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="A packaged model, or what vLLM loads: a directory or a hub name.")],
    bank: BankOption = None,
    layers: Annotated[str | None, typer.Option(help="Where to read, such as 12,15-18. Default: the bank's.")] = None,
    steer_layers: Annotated[str | None, typer.Option(help="Where to steer. Default: the bank's.")] = None,
    profiles: Annotated[Path | None, typer.Option(help="A TOML file of named steering values.")] = None,
    guard: Annotated[Path | None, typer.Option(help="A JSON file: a list of thresholds for every request.")] = None,
    audit: Annotated[Path | None, typer.Option(help="A file to which a line of JSON is added for each event of a guard.")] = None,
    metrics: Annotated[str | None, typer.Option(help="Concepts and families to count scores of at /metrics, or all.")] = None,
    live: Annotated[bool, typer.Option("--live", help="Show the scores of all requests as they are made, at /emotions.")] = False,
    grafana: Annotated[bool, typer.Option("--grafana", callback=_grafana, is_eager=True, help="Print a dashboard and leave.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Use the bank although it was made for another kind of model.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the command and leave.")] = False,
) -> None:
    """Serve a model with vLLM, every request read and steered by itself. Further options go to `vllm serve`."""
    for option in context.args:
        if option.split("=")[0] in _OURS:
            raise typer.BadParameter(f"{option.split('=')[0]} is set by emovec serve; use `vllm serve` to set it yourself")
    if find_spec("vllm") is None:
        extras.require("vllm", extra="vllm")
    loaded = load_bank(bank or model)
    config: dict[str, Any] = {"bank": bank or model}
    for key, given in (("layers", integers(layers, "--layers")), ("steer_layers", integers(steer_layers, "--steer-layers"))):
        if given is not None:
            for index in given:
                loaded[index]
            config[key] = given
    if profiles is not None:
        load_profiles(profiles, loaded.names)
        config["profiles"] = str(profiles.resolve())
    if guard is not None:
        try:
            config["guard"] = json.loads(guard.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{guard} is not JSON: {error}") from None
        parse(config["guard"], loaded)
    if audit is not None:
        config["audit"] = str(audit.resolve())
    if metrics is not None:
        config["metrics"] = metrics if metrics == "all" else [name.strip() for name in metrics.split(",")]
        tally.parse(config["metrics"], loaded)
    if live:
        config["live"] = True
    if force:
        config["force"] = True
    source = local_path(model)
    named = [] if source == model or "--served-model-name" in context.args else ["--served-model-name", model]
    flags = ["--additional-config", json.dumps({"emovec": config}), "--middleware", MIDDLEWARE]
    command = [sys.executable, "-m", *_server(source), *named, *flags, *context.args]
    setting: dict[str, str] = {}
    if os.environ.get("VLLM_PLUGINS") is not None and "emovec" not in os.environ["VLLM_PLUGINS"].split(","):
        setting["VLLM_PLUGINS"] = f"{os.environ['VLLM_PLUGINS']},emovec"
    err.print(" ".join([*(f"{name}={value}" for name, value in setting.items()), shlex.join(command)]), markup=False, soft_wrap=True)
    if live:
        err.print("The live view is at /emotions of the server.", markup=False)
    if dry_run:
        return
    os.execve(sys.executable, command, {**os.environ, **setting})


def _server(model: str) -> list[str]:
    """vLLM's command; its builds for CPUs go by another name, which that command does not know and stops at."""
    try:
        metadata.version("vllm")
    except metadata.PackageNotFoundError:
        return ["vllm.entrypoints.openai.api_server", "--model", model]
    return ["vllm.entrypoints.cli.main", "serve", model]
