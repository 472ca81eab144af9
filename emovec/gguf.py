"""llama.cpp's control vectors: GGUF files of one direction per layer, to be added to the residual stream.

In such a file the tensor ``direction.N`` is added to the output of decoder block N, counted from 0 as everywhere in
emovec. Block 0 has no place in the format. llama.cpp adds only, at every token; it knows no rules, conditions or scopes.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from emovec.bank import Bank
from emovec.bank_file import replacing
from emovec.bank_layer import BankError, BankLayer, shown
from emovec.extras import require
from emovec.steer import Steering, SteeringError

ARCHITECTURE = "controlvector"


class ControlVectorError(ValueError):
    """A control vector is not one that llama.cpp would take."""


def write_control_vector(path: str | os.PathLike[str], vectors: Mapping[int, Tensor], *, model_hint: str = "") -> None:
    """Write ``vectors``, decoder block -> [d] in activation units, as a control vector to be used at scale 1.

    Args:
        path: the file, written all or nothing.
        vectors: for any blocks from 1 on, all of the same length.
        model_hint: what kind of model it is for, such as "llama"; llama.cpp ignores it, other tools show it.

    Raises:
        ControlVectorError: naming the layer.
    """
    gguf = require("gguf", extra="gguf")
    arrays = {index: vector.detach().to("cpu", torch.float32).contiguous() for index, vector in sorted(vectors.items())}
    _check(arrays)
    with replacing(Path(path)) as temporary:
        writer = gguf.GGUFWriter(temporary, ARCHITECTURE)
        writer.add_string(f"{ARCHITECTURE}.model_hint", model_hint)
        writer.add_uint32(f"{ARCHITECTURE}.layer_count", len(arrays))
        for index, array in arrays.items():
            writer.add_tensor(f"direction.{index}", array.numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def read_control_vector(path: str | os.PathLike[str]) -> dict[int, Tensor]:
    """The vectors of a control vector file: decoder block -> [d] fp32.

    Raises:
        ControlVectorError: naming the file and the tensor.
    """
    return _read(path)[0]


def export_control_vector(
    bank: Bank, steer: Mapping[str, Any] | Steering, path: str | os.PathLike[str], layers: Iterable[int] | None = None
) -> None:
    """Write a control vector with which llama.cpp, at scale 1, does what ``emovec.attach(model, bank, steer=steer)`` does.

    Args:
        bank: the directions and the unit of strength.
        steer: a steering value of plain strengths, such as ``{"calm": 0.05}``.
        path: the file, written all or nothing.
        layers: the layers to steer at; default: the bank's.

    Raises:
        SteeringError: the value asks for more than adding at every token, or for nothing.
        ControlVectorError: layer 0 is among the layers.
    """
    steering = Steering.parse(steer, bank.names)
    for entry in steering.entries:
        if entry.is_rule or entry.when is not None or entry.on != "all":
            entry_text = f"steering entry {shown(entry.concept)}"
            raise SteeringError(f"{entry_text}: a control vector only adds, at every token; it cannot express {shown(entry.to_value())}")
    vectors = {}
    for index in bank.steer_layers if layers is None else layers:
        row = steering.row(bank[index], "generated")
        if row is None or row.delta is None:
            raise SteeringError("the steering value does nothing, and a control vector cannot be zero")
        vectors[index] = row.delta
    write_control_vector(path, vectors, model_hint=str(bank.meta.get("fingerprint", {}).get("model_type") or ""))


def import_control_vector(path: str | os.PathLike[str], name: str | None = None) -> Bank:
    """A bank of one concept from a control vector of any origin. Layers whose vector is zero are left out.

    The bank is uncalibrated: the directions are unit, ``raw_norm`` keeps the vectors' lengths, scores are projections, and
    there is no unit of strength. Put the concept into a calibrated bank of the same model with ``Bank.merge`` or ``Bank.add``.

    Args:
        path: the file.
        name: the concept; default: the file's name without its ending.

    Raises:
        ControlVectorError: naming the file and the tensor.
    """
    vectors, hint = _read(path)
    name = Path(path).stem if name is None else name
    try:
        layers = [BankLayer.from_directions(vector[None], [name], index) for index, vector in vectors.items() if bool(vector.any())]
        return Bank(layers, steer_layers=[layer.index for layer in layers], meta={"model_hint": hint, "source": Path(path).name})
    except BankError as error:
        raise ControlVectorError(f"{path}: {error}") from None


def _read(path: str | os.PathLike[str]) -> tuple[dict[int, Tensor], str]:
    gguf = require("gguf", extra="gguf")
    try:
        reader = gguf.GGUFReader(path)
        strings = {key: _string(reader, key) for key in ("general.architecture", f"{ARCHITECTURE}.model_hint", "glp.mode")}
    except (ValueError, LookupError, OverflowError) as error:  # what its reader raises on truncated and foreign files
        raise ControlVectorError(f"{path}: not a readable GGUF file: {error}") from error
    if strings["general.architecture"] != ARCHITECTURE:
        raise ControlVectorError(f"{path}: architecture is {shown(strings['general.architecture'])}, not {ARCHITECTURE!r}")
    if strings["glp.mode"] not in ("", "add"):
        raise ControlVectorError(f"{path}: made to be used as {shown(strings['glp.mode'])}, not to be added")
    vectors = {}
    for tensor in reader.tensors:
        word, _, number = tensor.name.partition(".")
        if word != "direction" or not (number.isascii() and number.isdecimal() and len(number) < 7):
            raise ControlVectorError(f"{path}: tensor {shown(tensor.name)} is not direction.N with a number N")
        if tensor.tensor_type != gguf.GGMLQuantizationType.F32:
            raise ControlVectorError(f"{path}: {tensor.name} must be F32, got {tensor.tensor_type.name}")
        if int(number) in vectors:
            raise ControlVectorError(f"{path}: two directions for layer {int(number)}")
        vectors[int(number)] = torch.from_numpy(tensor.data.astype("=f4"))
    vectors = dict(sorted(vectors.items()))
    try:
        _check(vectors)
    except ControlVectorError as error:
        raise ControlVectorError(f"{path}: {error}") from None
    return vectors, strings[f"{ARCHITECTURE}.model_hint"]


def _string(reader: Any, key: str) -> str:
    field = reader.get_field(key)
    return "" if field is None else str(field.contents())


def _check(vectors: Mapping[int, Tensor]) -> None:
    if not vectors:
        raise ControlVectorError("a control vector has at least one direction")
    first, width = next((index, vector.shape[-1:]) for index, vector in vectors.items())
    for index, vector in vectors.items():
        if index < 1:
            raise ControlVectorError(f"direction.{index}: llama.cpp steers at decoder blocks from 1 on; block 0 cannot be expressed")
        if vector.dim() != 1 or vector.numel() == 0:
            raise ControlVectorError(f"direction.{index} must be 1-D, got {list(vector.shape)}")
        if vector.shape != width:
            raise ControlVectorError(f"direction.{index} has length {len(vector)}, direction.{first} has {width[0]}")
        if not bool(vector.isfinite().all()):
            raise ControlVectorError(f"direction.{index} is not finite")
