"""What a model is known by: a few facts of its configuration and a sample of its weights.

A bank stores this for the model it was made from, so that it can refuse another one.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

_TENSORS = 32  # weights sampled, out of a few hundred
_VALUES = 32  # values of each: a fine-tune that changed 5 % of them shows in 4 of 5 tensors
_TOLERATED = 0.125  # share of sampled tensors that may differ: fp16 copies lose the last bits of tiny values, in about 2 % of them
_PLAIN = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_WRAPPERS = re.compile(r"^(module\.|base_model\.model\.)+|_orig_mod\.|base_layer\.")


def fingerprint(model: torch.nn.Module, like: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The fingerprint of ``model``, in milliseconds and without regard to dtype and device.

    Keys: ``model_type``, ``d``, ``layers`` (None where the model has no configuration that says so) and ``weights``, a
    hash for each of up to 32 weight matrices by name. A hash is of 32 values rounded to bf16, so the fp32, bf16 and fp16
    copies of a model agree. Weights that cannot be read (quantised, offloaded, sharded) are left out.

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
        names = sorted(matrices, key=lambda name: hashlib.sha256(name.encode()).digest())[:_TENSORS]
    else:
        names = [name for name in like.get("weights", {}) if name in parameters]
    hashes = {name: digest for name in names if (digest := _sample_hash(parameters[name])) is not None}
    return {
        "model_type": getattr(config, "model_type", None),
        "d": getattr(config, "hidden_size", None),
        "layers": getattr(config, "num_hidden_layers", None),
        "weights": dict(sorted(hashes.items())),
    }


def _sample_hash(weight: Tensor) -> str | None:
    plain = type(weight) in (torch.nn.Parameter, Tensor) and weight.dtype in _PLAIN
    if not plain or weight.device.type == "meta" or weight.numel() == 0:
        return None
    # evenly over the whole tensor, so that one constant row (an untrained token's) does not decide
    where = torch.arange(_VALUES, device=weight.device) * weight.numel() // _VALUES
    values = weight.detach().reshape(-1)[where].to("cpu", torch.bfloat16) + 0  # + 0: one zero, not two
    return hashlib.sha256(values.view(torch.int16).numpy().tobytes()).hexdigest()[:12]


def differences(expected: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    """What tells ``found`` from ``expected``, in words; empty when nothing does."""
    words = {"model_type": "model type", "d": "residual width d", "layers": "number of layers"}
    different = [
        f"{word}: the bank's is {expected[key]}, the model's is {found[key]}"
        for key, word in words.items()
        if expected.get(key) is not None and found.get(key) is not None and expected[key] != found[key]
    ]
    ours, theirs = expected.get("weights", {}), found.get("weights", {})
    common = ours.keys() & theirs.keys()
    changed = sorted(name for name in common if ours[name] != theirs[name])
    if len(changed) > _TOLERATED * len(common):
        different.append(f"weights: {len(changed)} of {len(common)} sampled differ, {changed[0]} for one")
    return different


def template_hash(tokenizer: Any) -> str | None:
    """The hash of a tokenizer's chat template; None if it has none."""
    template = getattr(tokenizer, "chat_template", None)
    if template is None:
        return None
    text = template if isinstance(template, str) else json.dumps(template, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]
