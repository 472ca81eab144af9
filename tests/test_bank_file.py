"""A bank's file: what is saved is loaded, bit for bit, and whatever else comes is refused by name."""

from __future__ import annotations

import copy
import json
import math
import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from banks import NAMES, make_bank, make_layer
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch import Tensor

from emovec.bank import KINDS, Bank, BankError, BankLayer, load_bank

torch.set_num_threads(1)


@given(
    layers=st.lists(st.integers(0, 90), min_size=1, max_size=3, unique=True),
    kinds=st.sets(st.sampled_from(KINDS)),
    readers=st.booleans(),
    width=st.integers(1, 24),
    names=st.lists(st.text(min_size=1, max_size=9).map(str.strip).filter(bool), min_size=1, max_size=5, unique=True),
    meta=st.dictionaries(st.text(), st.recursive(st.none() | st.booleans() | st.integers() | st.text(), st.lists, max_leaves=5)),
)
@settings(max_examples=40, deadline=None)
def test_round_trip(
    tmp_path_factory: pytest.TempPathFactory, layers: list[int], kinds: set[str], readers: bool, width: int, names: list[str], meta: Any
) -> None:
    bank = Bank(
        [make_layer(index, width, names, kinds=sorted(kinds), readers=readers) for index in layers], meta=meta, families={"all": names}
    )
    folder = tmp_path_factory.mktemp("bank")
    bank.save(folder / "a.safetensors")
    again = load_bank(folder / "a.safetensors")
    assert again == bank
    again.save(folder / "b.safetensors")
    assert (folder / "a.safetensors").read_bytes() == (folder / "b.safetensors").read_bytes()


def test_a_bare_layer_round_trips(tmp_path: Path) -> None:
    bank = Bank([BankLayer.from_directions(torch.randn(3, 8))])
    bank.save(tmp_path / "bare")
    assert load_bank(str(tmp_path / "bare")) == bank


def test_saving_is_all_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.safetensors"
    make_bank().save(path)
    before = path.read_bytes()

    def fail(*_: object) -> None:
        raise OSError("disk is full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk is full"):
        make_bank(seed=1).save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_loaded_bank_does_not_follow_its_file(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    make_bank().save(path)
    bank = load_bank(path)
    with open(path, "rb+") as file:
        size = file.seek(0, 2)
        file.seek(size // 2)
        file.write(b"\xff" * (size // 2))
    assert bank == make_bank()


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Tensor], dict[str, Any], bytes]:
    path = tmp_path_factory.mktemp("good") / "x.safetensors"
    make_bank((1, 2), readers=True).save(path)
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, json.loads(file.metadata()["emovec"]), path.read_bytes()  # noqa: SIM118


Tensors = dict[str, Tensor]
Header = dict[str, Any]


def put(key: str, value: Any) -> Callable[[Tensors, Header], None]:
    """A change to the header: ``a.b`` is ``header["a"]["b"]``; None removes it."""

    def change(tensors: Tensors, header: Header) -> None:
        *path, last = key.split(".")
        for part in path:
            header = header[part]
        if value is None:
            del header[last]
        else:
            header[last] = value

    return change


def edit(name: str, change: Callable[[Tensor], Tensor | None]) -> Callable[[Tensors, Header], None]:
    """A change to a tensor; None removes it."""

    def apply(tensors: Tensors, header: Header) -> None:
        result = change(tensors.pop(name, torch.zeros(1)).clone())
        if result is not None:
            tensors[name] = result

    return apply


def fill(row: int, value: float) -> Callable[[Tensor], Tensor]:
    def change(tensor: Tensor) -> Tensor:
        tensor[row] = value
        return tensor

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (put("format", 2), "bank format 2 is not known; this emovec reads format 1"),
        (put("format", None), "bank format None"),
        (put("names", None), "'names' is missing or not a list"),
        (put("meta", [1]), "'meta' is missing or not a dict"),
        (put("read_layer", "1"), "'read_layer' is missing or not a int"),
        (put("read_layer", 3), "no layer 3"),
        (put("steer_layers", [[1]]), r"no layer \[1\]"),
        (put("families", {"Joy": ["hapy"]}), "family 'Joy': unknown concept 'hapy'"),
        (put("families", {"Joy": 3}), "int"),
        (put("names", ["calm"] * 7), "duplicate concept 'calm'"),
        (put("names", [1, 2, 3, 4, 5, 6, 7]), "a concept's name must be text"),
        (put("names", list(NAMES[1:])), r"layers\.1\.\S+ must be \[6"),
        (put("layers", {}), "at least one layer"),
        (put("layers.01", {}), "'01' is not a layer"),
        (put("layers.-1", {}), "'-1' is not a layer"),
        (put("layers." + "9" * 5000, {}), "is not a layer"),
        (put("layers.1", {}), "header of layer 1"),
        (put("layers.1.baseline_count", {"middle": 3}), "baseline_count of layer 1"),
        (put("layers.1.baseline_count.prompt", 0), r"layers\.1\.baseline\.prompt: count must be"),
        (put("layers.1.baseline_count.prompt", 1.5), r"layers\.1\.baseline\.prompt: count must be"),
        (put("layers.1.residual_norm", -1.0), r"layers\.1: residual_norm"),
        (put("layers.1.residual_norm", "12"), r"layers\.1: residual_norm"),
        (put("layers.1.residual_norm", math.inf), "the header is not JSON: Infinity"),
        (edit("layers.1.directions", lambda tensor: None), r"layers\.1\.directions is missing"),
        (edit("layers.2.directions", lambda tensor: None), r"layers\.2\.directions is missing"),
        (edit("layers.2.baseline.prompt.std", lambda tensor: None), r"layers\.2\.baseline\.prompt\.std is missing"),
        (edit("layers.9.directions", lambda tensor: tensor), r"unknown tensor 'layers\.9\.directions'"),
        (edit("layers.1.directions", Tensor.half), r"layers\.1\.directions must be F32, got F16"),
        (
            edit("layers.2.directions", lambda tensor: tensor[:, :-1].contiguous()),
            r"layers\.2\.directions must be \[7, 32\], got \[7, 31\]",
        ),
        (edit("layers.2.grand_mean", lambda tensor: tensor[None]), r"layers\.2\.grand_mean must be \[32\], got \[1, 32\]"),
        (edit("layers.1.directions", fill(3, math.nan)), r"layers\.1\.directions is not finite"),
        (edit("layers.1.directions", fill(3, 0.0)), r"layers\.1\.directions: the row of 'calm' is zero"),
        (edit("layers.1.directions", fill(3, 1.0)), r"layers\.1\.directions: the row of 'calm' is not unit \(norm 5\.65685\)"),
        (edit("layers.1.readers", fill(3, math.inf)), r"layers\.1\.readers is not finite"),
        (edit("layers.1.readers", fill(3, 0.0)), r"layers\.1\.readers: the row of 'calm' is zero"),
        (edit("layers.1.baseline.generated.std", fill(3, 0.0)), r"layers\.1\.baseline\.generated: std is not positive"),
        (edit("layers.1.random_null.mean", fill(3, math.nan)), r"layers\.1\.random_null: mean or std is not finite"),
    ],
)
def test_hostile_content(
    tmp_path: Path, good: tuple[Tensors, Header, bytes], change: Callable[[Tensors, Header], None], message: str
) -> None:
    tensors, header = dict(good[0]), copy.deepcopy(good[1])
    change(tensors, header)
    path = tmp_path / "x.safetensors"
    safetensors.torch.save_file(tensors, path, {"emovec": json.dumps(header)})
    with pytest.raises(BankError, match=rf"x\.safetensors: .*{message}"):
        load_bank(path)


def raw(header: bytes, data: bytes = b"", length: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def described(tensors: dict[str, Any], text: str = "{}") -> bytes:
    return json.dumps({"__metadata__": {"emovec": text}, **tensors}).encode()


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"\x00" * 7, id="shorter than a length"),
        pytest.param(raw(b"{}", length=1 << 62), id="huge header"),
        pytest.param(raw(b"{}", length=3), id="header past the end"),
        pytest.param(raw(b"not json"), id="header is not JSON"),
        pytest.param(raw(b"[]"), id="header is a list"),
        pytest.param(pickle.dumps({"directions": [1.0]}), id="pickle"),
        pytest.param(
            raw(described({n: {"dtype": "F32", "shape": [2], "data_offsets": o} for n, o in (("a", [0, 8]), ("b", [4, 12]))}), b"\0" * 12),
            id="overlapping offsets",
        ),
        pytest.param(raw(described({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}})), id="offsets past the end"),
        pytest.param(raw(described({"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}), b"\0" * 8), id="shape against size"),
        pytest.param(
            raw(described({"a": {"dtype": "F32", "shape": [1 << 62, 8], "data_offsets": [0, 8]}}), b"\0" * 8), id="shape overflows"
        ),
        pytest.param(raw(b"{}"), id="no metadata"),
        pytest.param(raw(b'{"__metadata__":{"format":"pt"}}'), id="another library's metadata"),
        pytest.param(raw(described({}, "{")), id="our header is not JSON"),
        pytest.param(raw(described({}, "[" * 100_000)), id="our header is deep"),
        pytest.param(raw(described({}, "9" * 5000)), id="our header is a huge number"),
        pytest.param(raw(described({}, "[]")), id="our header is a list"),
        pytest.param(raw(described({}, " " * (9 << 20))), id="our header is long"),
    ],
)
def test_hostile_bytes(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(BankError, match=r"x\.safetensors: "):
        load_bank(path)


def test_truncated_file(tmp_path: Path, good: tuple[Tensors, Header, bytes]) -> None:
    path, whole = tmp_path / "x.safetensors", good[2]
    for size in [1, 8, 9, 500, len(whole) // 2, len(whole) - 1]:
        path.write_bytes(whole[:size])
        with pytest.raises(BankError, match=r"x\.safetensors: not a readable safetensors file"):
            load_bank(path)


def test_a_bank_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(
        BankError, match="smollm-135m: no such file, and no bank of that name is shipped; nearest shipped: smollm2-135m-instruct"
    ):
        load_bank("smollm-135m")
    with pytest.raises(BankError, match="no such file"):
        load_bank(tmp_path)
