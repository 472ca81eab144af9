"""What the commands share: options, loading, and how they talk."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.markup import escape

from emovec.bank import load_bank
from emovec.models import load_model
from emovec.steer import MAX_JSON, Steering, SteeringError, load_profiles

if TYPE_CHECKING:
    from emovec.bank import Bank

DEFAULT = "smollm2-135m-instruct"

out = Console(highlight=False)
err = Console(stderr=True, highlight=False)

ModelOption = Annotated[str, typer.Option("--model", "-m", help="A packaged model, or what transformers loads: a directory or a hub name.")]
BankOption = Annotated[str | None, typer.Option("--bank", "-b", help="A shipped bank or a file. Default: the shipped bank of that name.")]
ForceOption = Annotated[bool, typer.Option("--force", help="Use the bank although it was made for another model.")]
DeviceOption = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ... Default: the GPU if there is one.")]
DtypeOption = Annotated[str | None, typer.Option(help="fp32, bf16 or fp16. Default: bf16 where the device computes in it, else fp32.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]
BiasOption = Annotated[
    list[str] | None,
    typer.Option(
        "--bias",
        help='Steer: `calm=0.05`, `hostile=ablate`, `angry={"at_most": 1.5}`, or a whole JSON object. May be given several times.',
        metavar="NAME=VALUE",
    ),
]


def fail(message: str, code: int = 1) -> NoReturn:
    """Say what went wrong on stderr and leave."""
    err.print(f"[bold red]error:[/] {escape(message)}", soft_wrap=True)
    raise SystemExit(code)


def busy(what: str) -> AbstractContextManager[Any]:
    """A spinner on a terminal, nothing elsewhere."""
    return err.status(what) if err.is_terminal else nullcontext()


def load(model: str, bank: str | None, *, device: str | None = None, dtype: str | None = None) -> tuple[Any, Any, Bank]:
    """The bank first: if there is none, the user learns it before the model has been loaded."""
    loaded = load_bank(bank or model)
    with busy(f"loading {model}"):
        network, tokenizer = load_model(model, dtype=dtype_of(dtype), device=device)
    return network, tokenizer, loaded


def dtype_of(name: str | None) -> Any:
    """The torch dtype of that name."""
    import torch

    known = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    known |= {str(dtype).removeprefix("torch."): dtype for dtype in known.values()}
    if name is None:
        return None
    if name not in known:
        raise typer.BadParameter(f"{name!r} is not one of {', '.join(known)}", param_hint="--dtype")
    return known[name]


def steering_of(biases: Sequence[str] | None, profile: str | None, names: Sequence[str]) -> Steering:
    """The steering that ``--bias`` and ``--profile FILE:NAME`` ask for, together.

    Raises:
        SteeringError: naming the part that is wrong.
    """
    value: dict[str, Any] = {}
    if profile is not None:
        path, _, name = profile.rpartition(":")
        profiles = load_profiles(path or profile, names)
        if name not in profiles:
            raise SteeringError(f"{path or profile}: no profile {name!r}; it has {', '.join(profiles) or 'none'}; give FILE:NAME")
        value |= profiles[name]
    for text in biases or ():
        value |= _bias(text)
    return Steering.parse(value, names)


def _bias(text: str) -> dict[str, Any]:
    if len(text) > MAX_JSON:
        raise SteeringError(f"a bias of {len(text)} letters is longer than {MAX_JSON}")
    if text.lstrip().startswith("{"):
        try:
            whole: dict[str, Any] = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise SteeringError(f"bias is not JSON: {error}") from None
        return whole
    name, equals, value = text.partition("=")
    if not equals or not name.strip() or not value.strip():
        raise SteeringError(f"bias {text!r} is not NAME=VALUE, such as calm=0.05")
    name, value = name.strip(), value.strip()
    if value == "ablate" or name == "on":
        return {name: value}
    try:
        return {name: json.loads(value)}
    except (ValueError, RecursionError):
        raise SteeringError(f"bias {name!r}: {value!r} is not a number, `ablate` or a JSON object") from None


def integers(text: str | None, option: str) -> list[int] | None:
    """``"9,12,15-17"`` as a list; None stays None."""
    if text is None:
        return None
    found: list[int] = []
    for part in text.split(","):
        low, dash, high = part.strip().partition("-")
        if not low.isdecimal() or (dash and not high.isdecimal()):
            raise typer.BadParameter(f"{part!r} is not a layer or a range of layers, such as 9,12,15-17", param_hint=option)
        found.extend(range(int(low), int(high or low) + 1))
    return found


def print_json(value: Any) -> None:
    sys.stdout.write(json.dumps(value, ensure_ascii=False, indent=2, allow_nan=False) + "\n")


def text_of(words: Sequence[str], file: Path | None) -> str:
    """The text given as arguments, in a file, or on standard input."""
    if words and file is not None:
        raise typer.BadParameter("give a text or --file, not both")
    if file is not None:
        return file.read_text(encoding="utf-8")
    if words and list(words) != ["-"]:
        return " ".join(words)
    if not words and sys.stdin.isatty():
        raise typer.BadParameter("no text: give it as an argument, with --file, or on standard input")
    return sys.stdin.read()
