"""A small random model whose heads two ranks can share, saved for vLLM with a bank, and steering values for it."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import tiny
from vllm_engine import Oracle

from emovec.bank import Bank

SIXTEEN: list[Any] = [
    {"calm": 0.3},
    {"calm": 0.5},
    {"calm": -0.3},
    {"desperate": 0.4},
    {"happy": 0.3, "angry": -0.2},
    {"afraid": "ablate"},
    {"desperate": {"at_most": 0.0}, "calm": {"at_least": 1.0}},
    {"angry": {"set": 0.0}, "happy": {"set": 1.0}},
    {"calm": 0.4, "on": "generated"},
    {"calm": 0.4, "on": "prompt"},
    {"afraid": {"add": 0.4, "when": "desperate > 0"}},
    {"afraid": {"add": 0.4, "when": "desperate > 0"}, "calm": 0.2},
    {"happy": {"set": 2.0, "on": "generated"}, "calm": {"add": 0.2, "on": "prompt"}},
    {"desperate": {"at_most": 0.0, "on": "prompt"}, "angry": {"at_most": 0.0}, "happy": {"add": 0.3}},
    {"angry": {"add": -0.3, "at_least": -1.0}},
    None,
]
OPTIONS: dict[str, Any] = {"skip_tokenizer_init": True, "max_model_len": 128, "max_num_batched_tokens": 32}


def saved(folder: Path) -> tuple[Oracle, dict[str, Any]]:
    """The model in transformers with its bank, and what vLLM is started with; both are written to ``folder``."""
    model = tiny.fresh("llama", head_dim=32)  # the smallest heads that vLLM has on a CPU
    model.save_pretrained(folder / "model")
    bank = tiny.bank_for(model)
    bank.save(folder / "bank.safetensors")
    return Oracle(model, bank), {**OPTIONS, "model": str(folder / "model"), **configured(folder / "bank.safetensors")}


def configured(bank: Path, **more: Any) -> dict[str, Any]:
    return {"additional_config": {"emovec": {"bank": str(bank), **more}}}


def other_bank(bank: Bank) -> Bank:
    """With other names for the same directions, and at other layers by default."""
    layers = [replace(bank[index], names=tuple(f"x{name}" for name in bank.names)) for index in bank]
    return Bank(layers, read_layer=3, steer_layers=(2, 3), meta=bank.meta)


def renamed(value: Any) -> Any:
    """A value in the words of the other bank."""
    return json.loads(re.sub(rf"\b({'|'.join(tiny.CONCEPTS)})\b", r"x\1", json.dumps(value)))


def prompts(count: int, length: int = 20) -> list[list[int]]:
    return tiny.tokens(count, length).tolist()
