"""What a model is known by: a few facts of its configuration and a sample of its weights.

A bank stores this for the model it was made from, so that it can refuse another one.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

_TENSORS = 32  # weights sampled, out of a few hundred
_VALUES = 32  # values of each
_TOLERATED = 0.01  # share of values that may differ by more than rounding: none do, where fp16 neither overflowed nor was trained in
_PLAIN = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_WRAPPERS = re.compile(r"^(module\.|base_model\.model\.)+|_orig_mod\.|base_layer\.")
_WORDS = {"model_type": "model type", "d": "residual width d", "layers": "number of layers"}


def fingerprint(model: torch.nn.Module, like: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The fingerprint of ``model``, in milliseconds and whatever its dtype and device.

    Keys: ``model_type``, ``d``, ``layers`` (None where the model has no configuration that says so) and ``weights``: for up
    to 32 matrices by name, ``"<number of elements>:<32 of them in fp32, as hex>"``. Weights that cannot be read (quantised,
    offloaded, sharded) are left out.

    Args:
        model: any module; a ``config`` in the manner of transformers is used if there is one.
        like: a fingerprint to compare with; the weights sampled are those named there.
    """
    config: Any = getattr(model, "config", None)
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()
    parameters = {_WRAPPERS.sub("", name): value for name, value in model.named_parameters()}
    names: Iterable[str]
    if like is None:
        matrices = [name for name, value in parameters.items() if value.dim() >= 2]
        # the first is the embedding, which quantised copies tend to keep; the rest by hash, so that every kind of matrix is met
        names = matrices[:1] + sorted(matrices[1:], key=lambda name: hashlib.sha256(name.encode()).digest())[: _TENSORS - 1]
    else:
        names = [name for name in like.get("weights", {}) if name in parameters]
    samples = {name: sample for name in names if (sample := _sample(parameters[name])) is not None}
    return {
        "model_type": getattr(config, "model_type", None),
        "d": getattr(config, "hidden_size", None),
        "layers": getattr(config, "num_hidden_layers", None),
        "weights": dict(sorted(samples.items())),
    }


def _sample(weight: Tensor) -> str | None:
    plain = type(weight) in (torch.nn.Parameter, Tensor) and weight.dtype in _PLAIN
    if not plain or weight.device.type == "meta" or weight.numel() == 0:
        return None
    where = torch.arange(_VALUES, device=weight.device) * weight.numel() // _VALUES
    values = weight.detach().reshape(-1)[where].to("cpu", torch.float32)
    return f"{weight.numel()}:{values.numpy().astype('<f4').tobytes().hex()}"


def is_fingerprint(value: object) -> bool:
    """Whether ``value`` has the form of a fingerprint; what comes from a file may not."""
    if not isinstance(value, dict) or not isinstance(value.get("weights", {}), dict):
        return False
    return all(
        isinstance(text, str) and re.fullmatch(r"\d{1,18}:([0-9a-f]{8}){32}", text, re.ASCII) for text in value.get("weights", {}).values()
    )


def differences(expected: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    """What tells ``found`` from ``expected``, in words; empty when nothing does."""
    different = [
        f"{word}: the bank's is {expected[key]}, the model's is {found[key]}"
        for key, word in _WORDS.items()
        if expected.get(key) is not None and found.get(key) is not None and expected[key] != found[key]
    ]
    pairs = [
        (ours[1], theirs[1])
        for name, text in expected.get("weights", {}).items()
        if name in found.get("weights", {}) and (ours := text.split(":"))[0] == (theirs := found["weights"][name].split(":"))[0]
    ]
    if pairs:
        a, b = (np.frombuffer(bytes.fromhex("".join(side)), "<f4").astype(np.float64) for side in zip(*pairs, strict=True))
        # copies in other dtypes agree to half a step of bf16, a quarter more for fp16 and its smallest step
        _, exponent = np.frexp(np.maximum(abs(a), abs(b)))
        changed = ~(abs(a - b) <= 1.25 * np.ldexp(1.0, exponent - 9) + 2.0**-24)
        if changed.mean() > _TOLERATED:
            size = float(np.linalg.norm(a - b)) / max(float(np.linalg.norm(a)), 1e-30)
            guess = "a fine-tune or a quantised copy" if size < 0.3 else "another model"
            different.append(f"weights: {changed.sum()} of {len(changed)} sampled values differ, by {size:.2g} of their size ({guess})")
    return different


def template_hash(tokenizer: Any) -> str | None:
    """The hash of a tokenizer's chat template; None if it has none."""
    template = getattr(tokenizer, "chat_template", None)
    if template is None:
        return None
    text = template if isinstance(template, str) else json.dumps(template, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]
