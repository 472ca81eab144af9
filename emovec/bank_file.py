"""A bank's file: one safetensors file, its header as JSON under one metadata key. ``docs/bank.md`` describes it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from emovec.bank_layer import KINDS, BankError, BankLayer, Baseline, check_names, shown
from emovec.readout import Readout

FORMAT = 1
KEY = "emovec"
MAX_HEADER = 8 << 20  # bytes of JSON; a bank of 1,024 concepts with its evidence needs a tenth
_OPTIONAL = ("readers", "raw_norm", "grand_mean")


def write(path: str | os.PathLike[str], layers: Sequence[BankLayer], header: Mapping[str, Any], readout: Readout | None = None) -> None:
    """Write ``layers``, ``header`` and ``readout`` to ``path``, all or nothing. The same bank gives the same bytes."""
    tensors: dict[str, Tensor] = {}
    described: dict[str, Any] = {}
    for layer in layers:
        prefix = f"layers.{layer.index}"
        tensors[f"{prefix}.directions"] = layer.directions
        tensors.update({f"{prefix}.{name}": value for name in _OPTIONAL if (value := getattr(layer, name)) is not None})
        for kind, baseline in layer.baselines.items():
            tensors[f"{prefix}.baseline.{kind}.mean"], tensors[f"{prefix}.baseline.{kind}.std"] = baseline.mean, baseline.std
        null = layer.random_null
        if null is not None:
            tensors[f"{prefix}.random_null.mean"], tensors[f"{prefix}.random_null.std"] = null.mean, null.std
        described[str(layer.index)] = {
            "residual_norm": layer.residual_norm,
            "baseline_count": {kind: layer.baselines[kind].count for kind in KINDS if kind in layer.baselines},
            "random_null_count": None if null is None else null.count,
        }
    content = {"format": FORMAT, "names": list(layers[0].names), "layers": described, **header}
    if readout is not None:
        content["readout"] = {
            "layers": list(readout.layers),
            "baseline_count": {kind: one.count for kind, one in readout.baselines.items()},
        }
        for kind, one in readout.baselines.items():
            tensors[f"readout.baseline.{kind}.mean"], tensors[f"readout.baseline.{kind}.std"] = one.mean, one.std
    text = json.dumps(content, sort_keys=True, allow_nan=False)
    if len(text) > MAX_HEADER:
        raise BankError(f"the bank's header would have {len(text)} bytes, more than {MAX_HEADER}")
    with replacing(Path(path)) as temporary:
        temporary.write_bytes(safetensors.torch.save({name: value.contiguous() for name, value in tensors.items()}, {KEY: text}))


def as_json(meta: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of ``meta`` as it comes back from a file."""
    try:
        copy: dict[str, Any] = json.loads(json.dumps(meta, allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise BankError(f"a bank's meta must be JSON: {error}") from None
    return copy


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file to write in place of ``path``: it takes its name at the end, so that a reader sees the old file or the whole new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read(path: Path) -> tuple[list[BankLayer], dict[str, Any], Readout | None]:
    """The layers, the header and the readout of the bank at ``path``, with everything checked."""
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            header = _header((file.metadata() or {}).get(KEY))
            shapes = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - the file is not a dict
            _check_tensors(header, {name: (part.get_dtype(), list(part.get_shape())) for name, part in shapes.items()})
            # cloned: what safetensors returns may be a view of the file, which another process can change
            tensors = {name: file.get_tensor(name).clone() for name in shapes}
        return _layers(header, tensors), header, _readout(header, tensors)
    except BankError as error:
        raise BankError(f"{path}: {error}") from None
    except (OSError, safetensors.SafetensorError) as error:
        raise BankError(f"{path}: not a readable safetensors file: {error}") from error


def _header(text: str | None) -> dict[str, Any]:
    if text is None:
        raise BankError(f"not a bank: it has no {KEY!r} metadata")
    if len(text) > MAX_HEADER:
        raise BankError(f"the header has more than {MAX_HEADER} bytes")
    try:
        header = json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise BankError(f"the header is not JSON: {error}") from None
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        found = header.get("format") if isinstance(header, dict) else None
        raise BankError(f"bank format {shown(found)} is not known; this emovec reads format {FORMAT}")
    for key, kind in (("names", list), ("layers", dict), ("read_layer", int), ("steer_layers", list), ("families", dict), ("meta", dict)):
        if key not in header or not isinstance(header[key], kind):
            raise BankError(f"header key {key!r} is missing or not a {kind.__name__}")
    readout = header.get("readout")
    if readout is not None:
        listed = isinstance(readout, dict) and set(readout) == {"layers", "baseline_count"} and isinstance(readout["layers"], list)
        if not listed or not isinstance(readout["baseline_count"], dict) or not set(readout["baseline_count"]) <= set(KINDS):
            raise BankError("header key 'readout' is not an object of layers and baseline_count")
    check_names(header["names"])
    for name, layer in header["layers"].items():
        if not (name.isascii() and name.isdigit() and len(name) < 7 and str(int(name)) == name):
            raise BankError(f"{shown(name)} is not a layer")
        if not isinstance(layer, dict) or set(layer) != {"residual_norm", "baseline_count", "random_null_count"}:
            raise BankError(f"header of layer {name} is not an object of residual_norm, baseline_count and random_null_count")
        if not isinstance(layer["baseline_count"], dict) or not set(layer["baseline_count"]) <= set(KINDS):
            raise BankError(f"baseline_count of layer {name} is not an object with keys among {', '.join(KINDS)}")
    if not header["layers"]:
        raise BankError("a bank has at least one layer")
    return header


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number")


def _check_tensors(header: dict[str, Any], found: dict[str, tuple[str, list[int]]]) -> None:
    """Compare names, dtypes and shapes with what the header promises, before any data is read."""
    concepts = len(header["names"])
    first = f"layers.{next(iter(header['layers']))}.directions"
    if first not in found or len(found[first][1]) != 2:
        raise BankError(f"{first} is missing or not [K, d]")
    width = found[first][1][1]
    required: dict[str, list[int] | None] = {}
    optional: dict[str, list[int] | None] = {}
    for index, layer in header["layers"].items():
        prefix = f"layers.{index}"
        required[f"{prefix}.directions"] = [concepts, width]
        for kind in layer["baseline_count"]:
            required[f"{prefix}.baseline.{kind}.mean"] = required[f"{prefix}.baseline.{kind}.std"] = [concepts]
        if layer["random_null_count"] is not None:
            required[f"{prefix}.random_null.mean"] = required[f"{prefix}.random_null.std"] = None
        optional |= {f"{prefix}.readers": [concepts, width], f"{prefix}.raw_norm": [concepts], f"{prefix}.grand_mean": [width]}
    for kind in (header.get("readout") or {}).get("baseline_count", ()):
        required[f"readout.baseline.{kind}.mean"] = required[f"readout.baseline.{kind}.std"] = [concepts]
    for name in required:
        if name not in found:
            raise BankError(f"{name} is missing")
    expected = required | optional
    for name, (dtype, shape) in found.items():
        if name not in expected:
            raise BankError(f"unknown tensor {shown(name)}")
        if dtype != "F32":
            raise BankError(f"{name} must be F32, got {dtype}")
        if expected[name] is not None and shape != expected[name]:
            raise BankError(f"{name} must be {expected[name]}, got {shape}")


def _layers(header: dict[str, Any], tensors: dict[str, Tensor]) -> list[BankLayer]:
    layers = []
    for index, described in header["layers"].items():
        prefix = f"layers.{index}"

        null = described["random_null_count"]
        layers.append(
            BankLayer(
                index=int(index),
                names=tuple(header["names"]),
                directions=tensors[f"{prefix}.directions"],
                **{name: tensors.get(f"{prefix}.{name}") for name in _OPTIONAL},
                baselines={
                    kind: _baseline(tensors, f"{prefix}.baseline.{kind}", count) for kind, count in described["baseline_count"].items()
                },
                residual_norm=described["residual_norm"],
                random_null=None if null is None else _baseline(tensors, f"{prefix}.random_null", null),
            )
        )
    return layers


def _readout(header: dict[str, Any], tensors: dict[str, Tensor]) -> Readout | None:
    described = header.get("readout")
    if described is None:
        return None
    counts = described["baseline_count"].items()
    return Readout(tuple(described["layers"]), {kind: _baseline(tensors, f"readout.baseline.{kind}", count) for kind, count in counts})


def _baseline(tensors: dict[str, Tensor], name: str, count: Any) -> Baseline:
    try:
        return Baseline(tensors[f"{name}.mean"], tensors[f"{name}.std"], count)
    except BankError as error:
        raise BankError(f"{name}: {error}") from None
