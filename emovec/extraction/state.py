"""The state of an extraction under way, in one file that is replaced whole, so that a kill costs a minute and not the run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from emovec.bank_file import replacing
from emovec.bank_layer import shown

_KEY = "emovec.extraction"


class StateError(ValueError):
    """A state file is not one, or belongs to another extraction."""


def write(path: Path, belongs_to: Mapping[str, Any], batches: int, tokens: int, tensors: Mapping[str, Tensor]) -> None:
    """Write the sums after ``batches`` batches of ``tokens`` tokens, all or nothing."""
    text = json.dumps({"belongs_to": belongs_to, "batches": batches, "tokens": tokens}, sort_keys=True)
    content = {key: tensor.cpu().contiguous() for key, tensor in tensors.items()}
    with replacing(path) as temporary:
        temporary.write_bytes(safetensors.torch.save(content, {_KEY: text}))


def read(path: Path, belongs_to: Mapping[str, Any]) -> tuple[int, int, dict[str, Tensor]]:
    """The batches and tokens done, and the sums; (0, 0, {}) if there is no file.

    Raises:
        StateError: the file does not hold a state, or one of an extraction that differs from ``belongs_to``; says in what.
    """
    if not path.exists():
        return 0, 0, {}
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {})[_KEY])
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 - the file is not a dict
        found, batches, tokens = header["belongs_to"], int(header["batches"]), int(header["tokens"])
    except (OSError, safetensors.SafetensorError, KeyError, ValueError, TypeError) as error:
        raise StateError(f"{path}: not the state of an extraction: {error}") from error
    expected = json.loads(json.dumps(belongs_to))
    different = [key for key in sorted(expected.keys() | found.keys()) if expected.get(key) != found.get(key)]
    if different:
        values = "; ".join(f"{key}: the file's is {shown(found.get(key))}, this one's is {shown(expected.get(key))}" for key in different)
        raise StateError(f"{path}: the state of another extraction, which cannot be continued here. {values}. Remove it to start anew")
    return batches, tokens, tensors
