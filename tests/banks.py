"""Small calibrated layers and banks to test with."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from emovec.bank import Bank, BankLayer, Baseline

NAMES = ("afraid", "angry", "at ease", "calm", "desperate", "grief-stricken", "hostile")


def make_layer(
    index: int = 0,
    width: int = 32,
    names: Sequence[str] = NAMES,
    *,
    kinds: Sequence[str] = ("prompt", "generated"),
    readers: bool = False,
    correlation: float = 1.0,
    seed: int = 0,
) -> BankLayer:
    """A layer of correlated directions with a made-up calibration."""
    generator = torch.Generator().manual_seed(seed * 1000 + index)
    shared = torch.randn(width, generator=generator)
    directions = torch.randn(len(names), width, generator=generator) + correlation * shared
    return replace(
        BankLayer.from_directions(directions, names, index),
        readers=torch.randn(len(names), width, generator=generator) + directions if readers else None,
        grand_mean=torch.randn(width, generator=generator),
        baselines={
            kind: Baseline(torch.randn(len(names), generator=generator), torch.rand(len(names), generator=generator) + 0.5, 1000)
            for kind in kinds
        },
        residual_norm=12.5,
        random_null=Baseline(torch.randn(9, generator=generator), torch.rand(9, generator=generator) + 0.5, 1000),
    )


def make_bank(layers: Sequence[int] = (1, 2, 4), **options: object) -> Bank:
    return Bank(
        [make_layer(index, **options) for index in layers],  # type: ignore[arg-type]
        read_layer=max(layers),
        steer_layers=sorted(layers)[-2:-1] or layers,
        families={"Fear": ["afraid", "desperate"], "Peace": ["calm", "at ease"]},
        meta={"model": "made-up", "recipe": {"skip": 50}},
    )


def run_examples(page: str) -> None:
    """Run the Python examples of a page of the docs, one after the other."""
    text = (Path(__file__).parents[1] / "docs" / page).read_text()
    examples = re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    assert examples
    namespace: dict[str, object] = {}
    for example in examples:
        exec(example, namespace)
