"""``emovec read``: which emotion concepts are active while a model reads a text."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from emovec.cli.common import (
    DEFAULT,
    BankOption,
    DeviceOption,
    DtypeOption,
    ForceOption,
    JsonOption,
    ModelOption,
    load,
    out,
    print_json,
    text_of,
)
from emovec.monitor import Reading


def read(
    text: Annotated[list[str] | None, typer.Argument(help="The text; `-` or nothing for standard input.")] = None,
    file: Annotated[Path | None, typer.Option(help="Read the text from a file.")] = None,
    model: ModelOption = DEFAULT,
    bank: BankOption = None,
    layer: Annotated[int | None, typer.Option(help="Read at this layer of the bank. Default: the bank's.")] = None,
    top: Annotated[int, typer.Option(help="How many concepts.", min=1)] = 8,
    raw: Annotated[bool, typer.Option("--raw", help="The text alone, not as a user's message in the chat template.")] = False,
    tokens: Annotated[bool, typer.Option("--tokens", help="Show the strongest concepts of every token.")] = False,
    concept: Annotated[str | None, typer.Option(help="Colour the text by this concept.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write a page with a token heatmap.")] = None,
    json: JsonOption = False,
    force: ForceOption = False,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
) -> None:
    """Read a text with a model and show the strongest emotion concepts in it."""
    words = text_of(text or [], file)
    if not words.strip():
        raise typer.BadParameter("the text is empty")
    network, tokenizer, loaded = load(model, bank, device=device, dtype=dtype)
    if layer is not None:
        loaded[layer]  # an unknown layer or concept is an error before any work is done
    if concept is not None:
        loaded.resolve(concept)
    reading = read_text(network, tokenizer, loaded, words, raw=raw, layer=layer, force=force)
    if html is not None:
        reading.heatmap(html, None if concept is None else [concept], title=_short(words, 60))
    if json:
        print_json(_facts(reading, top, tokens))
        return
    show(reading, top, concept)
    if tokens:
        _show_tokens(reading, min(top, 4))
    if html is not None:
        out.print(f"page: {html}")


def read_text(
    model: Any, tokenizer: Any, bank: Any, words: str, *, raw: bool = False, layer: int | None = None, force: bool = False
) -> Reading:
    """The reading of a text's own tokens, without those of the chat template around them."""
    import torch

    from emovec.hook import attach
    from emovec.models import encode

    inputs = encode(tokenizer, words, chat=False if raw else None, device=model.device)
    layers = None if layer is None else [layer]
    with attach(model, bank, layers=layers, tokenizer=tokenizer, force=force) as probe, torch.inference_mode():
        model(**inputs)
    return inner(probe[0], words)


def inner(reading: Reading, words: str) -> Reading:
    """The part of ``reading`` whose pieces cover ``words``; all of it where they cannot be found."""
    start = reading.text.find(words.strip())
    if start < 0:
        return reading
    first = last = end = 0
    for index, piece in enumerate(reading.pieces):
        first = index + 1 if end + len(piece) <= start else first
        last = index + 1 if end < start + len(words.strip()) else last
        end += len(piece)
    return reading[first:last]


def show(reading: Reading, top: int, concept: str | None = None) -> None:
    """The strongest concepts as bars, the families beside them, and the text coloured by one concept."""
    best = reading.top(top)
    table = Table(box=None, pad_edge=False, show_header=False)
    limit = max(abs(value) for _, value in best) or 1.0
    for name, value in best:
        table.add_row(
            name, f"{value:+.2f}", Text("█" * max(1, round(24 * abs(value) / limit)), style="#e0762f" if value > 0 else "#3f7fbf")
        )
    out.print(f"[bold]strongest of {len(reading.names)} concepts[/], mean {reading.unit}, {reading.where}")
    out.print(table)
    families = sorted(reading.families().items(), key=lambda item: -item[1])
    if families:
        out.print("[bold]families[/]  " + "   ".join(f"{family} {value:+.2f}" for family, value in families[:4]), soft_wrap=True)
    shown = concept or best[0][0]
    out.print(f"[bold]{shown}[/], token by token")
    out.print(coloured(reading, shown), soft_wrap=True)


def coloured(reading: Reading, concept: str) -> Text:
    """The text, each token on a ground that tells the concept's score: orange above ordinary text, blue below."""
    values = reading.of(concept).float().tolist()
    body = sorted(abs(value) for value, position in zip(values, reading.positions, strict=True) if position != 0) or [1.0]
    limit = max(body[int(0.98 * (len(body) - 1))], 1e-6)
    text = Text()
    for piece, value in zip(reading.pieces, values, strict=True):
        share = max(-1.0, min(1.0, value / limit))
        tint = (224, 118, 47) if share > 0 else (63, 127, 191)
        r, g, b = (round(248 + (part - 248) * abs(share)) for part in tint)
        text.append(piece, style=f"#1b1b1b on #{r:02x}{g:02x}{b:02x}")
    return text


def _show_tokens(reading: Reading, top: int) -> None:
    table = Table("token", "kind", "strongest", box=None, pad_edge=False)
    for index, piece in enumerate(reading.pieces):
        strongest = reading[index].top(top)
        table.add_row(repr(piece)[1:-1], reading.kind[index], "  ".join(f"{name} {value:+.1f}" for name, value in strongest))
    out.print(table)


def _facts(reading: Reading, top: int, tokens: bool) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "layers": list(reading.read_layers),
        "unit": reading.unit,
        "tokens": len(reading),
        "top": dict(reading.top(top)),
        "families": reading.families(),
    }
    if tokens:
        facts["per_token"] = [
            {"token": piece, "kind": reading.kind[index], "top": dict(reading[index].top(top))}
            for index, piece in enumerate(reading.pieces)
        ]
    return facts


def _short(text: str, length: int) -> str:
    line = " ".join(text.split())
    return line if len(line) <= length else line[: length - 1].rstrip() + "…"
