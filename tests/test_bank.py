"""The bank: what goes in comes out, what is wrong is refused by name, and a bank knows its model."""

from __future__ import annotations

import copy
import json
import math
import os
import pickle
import struct
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from banks import NAMES, make_bank, make_layer, run_examples
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch import Tensor

from emovec import ops
from emovec.bank import KINDS, Bank, BankError, BankLayer, Baseline, UnknownConcept, UnknownLayer, fingerprint, load_bank, template_hash

torch.set_num_threads(1)

# --- layers -------------------------------------------------------------------------------------------------------


@given(st.integers(1, 9), st.integers(1, 40), st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_from_directions_keeps_direction_and_norm(concepts: int, width: int, seed: int) -> None:
    rows = torch.randn(concepts, width, generator=torch.Generator().manual_seed(seed)) * 100
    layer = BankLayer.from_directions(rows, index=7)
    assert layer.names == tuple(f"concept_{k}" for k in range(concepts))
    assert layer.raw_norm is not None
    assert torch.allclose(layer.directions.norm(dim=1), torch.ones(concepts))
    assert torch.allclose(layer.directions * layer.raw_norm[:, None], rows, rtol=1e-5, atol=1e-5)
    assert not layer.calibrated
    with pytest.raises(BankError, match="layer 7 is not calibrated"):
        layer.baseline()


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (torch.zeros(2, 8), "row of 'a' is zero"),
        (torch.tensor([[1.0, 2.0], [math.nan, 0.0]]), "row of 'b' is not finite"),
        (torch.tensor([[1.0, 2.0], [math.inf, 0.0]]), "row of 'b' is not finite"),
        (torch.ones(8), r"must be \[K, d\], got \(8,\)"),
        (torch.ones(3, 8), r"2-D \[2, 8\], got \[3, 8\]"),
    ],
)
def test_from_directions_refuses(rows: Tensor, message: str) -> None:
    with pytest.raises(BankError, match=message):
        BankLayer.from_directions(rows, ["a", "b"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"index": -1}, "layer index must be"),
        ({"index": True}, "layer index must be"),
        ({"names": (*NAMES[:-1], "calm")}, "duplicate concept 'calm'"),
        ({"names": NAMES[1:]}, r"layers\.3\.directions must be 2-D \[6, 32\], got \[7, 32\]"),
        ({"names": (*NAMES[:-1], " calm")}, "without spaces around it, got ' calm'"),
        ({"names": (*NAMES[:-1], 7)}, "a concept's name must be text"),
        ({"directions": torch.randn(7, 32)}, r"layers\.3\.directions: the row of 'afraid' is not unit"),
        ({"directions": torch.eye(7, 32).double()}, "must be a float32 tensor on the CPU, got torch.float64"),
        ({"directions": torch.eye(7, 32, device="meta")}, "got torch.float32 on meta"),
        ({"readers": torch.zeros(7, 32)}, r"layers\.3\.readers: the row of 'afraid' is zero"),
        ({"readers": torch.ones(7, 31)}, r"layers\.3\.readers must be 2-D \[7, 32\]"),
        ({"raw_norm": torch.zeros(7)}, r"layers\.3\.raw_norm is not positive"),
        ({"grand_mean": torch.full((32,), math.inf)}, r"layers\.3\.grand_mean is not finite"),
        ({"baselines": {"middle": Baseline(torch.zeros(7), torch.ones(7), 1)}}, "unknown kind of position 'middle'"),
        ({"baselines": {"prompt": Baseline(torch.zeros(6), torch.ones(6), 1)}}, r"layers\.3\.baseline\.prompt must be \[7\], got \(6,\)"),
        ({"residual_norm": math.nan}, "residual_norm must be a positive number, got nan"),
        ({"residual_norm": 0.0}, "residual_norm must be a positive number, got 0.0"),
    ],
)
def test_a_layer_refuses(change: dict[str, Any], message: str) -> None:
    with pytest.raises(BankError, match=message):
        replace(make_layer(3), **change)


@pytest.mark.parametrize(
    ("mean", "std", "count", "message"),
    [
        ([0.0, 0.0], [1.0, 0.0], 5, "std is not positive"),
        ([0.0, math.nan], [1.0, 1.0], 5, "not finite"),
        ([0.0, math.inf], [1.0, 1.0], 5, "not finite"),
        ([0.0], [1.0, 1.0], 5, "mean is"),
        ([0.0, 0.0], [1.0, 1.0], 0, "count must be a positive integer, got 0"),
        ([0.0, 0.0], [1.0, 1.0], True, "count must be a positive integer, got True"),
    ],
)
def test_a_baseline_refuses(mean: list[float], std: list[float], count: int, message: str) -> None:
    with pytest.raises(BankError, match=message):
        Baseline(torch.tensor(mean), torch.tensor(std), count)


def test_the_baseline_of_a_kind_without_one_is_the_prompts() -> None:
    layer = make_layer(kinds=("prompt", "generated"))
    assert layer.baseline("turn_start") == layer.baselines["prompt"]
    assert make_layer(kinds=("generated", "turn_start")).baseline("prompt").count == 1000
    assert layer.baseline("generated") != layer.baseline("prompt")
    with pytest.raises(ValueError, match="unknown kind of position 'answer'; known: prompt, turn_start, generated"):
        layer.baseline("answer")


@pytest.mark.parametrize("readers", [False, True])
def test_operands_score_in_baseline_units_and_are_kept(readers: bool) -> None:
    layer = make_layer(readers=readers)
    x = torch.randn(5, 32)
    for kind in ("prompt", "generated"):
        operands = layer.operands(x.device, x.dtype, kind)
        scores = torch.empty(5, len(NAMES))
        ops.apply_(x, operands, scores=scores)
        baseline = layer.baselines[kind]
        assert torch.allclose(
            scores, (x @ (layer.directions if layer.readers is None else layer.readers).T - baseline.mean) / baseline.std, atol=1e-4
        )
        assert layer.operands("cpu", torch.float32, kind) is operands
    assert layer.operands("cpu", torch.bfloat16) is not layer.operands("cpu", torch.float32)
    assert layer.operands("cpu", torch.float32) is layer.operands("cpu", torch.float32, "prompt")


def test_uncalibrated_scores_are_projections() -> None:
    layer, x, scores = BankLayer.from_directions(torch.randn(3, 16)), torch.randn(4, 16), torch.empty(4, 3)
    ops.apply_(x, layer, scores=scores)
    assert torch.allclose(scores, x @ layer.directions.T, atol=1e-5)


# --- the bank as a mapping ----------------------------------------------------------------------------------------


def test_mapping_and_unknown_names() -> None:
    bank = make_bank((4, 1, 2))
    assert list(bank) == [1, 2, 4] == list(bank.layers)
    assert 3 not in bank
    assert bank.get(3) is None
    with pytest.raises(UnknownLayer, match="no layer 3; it has 1, 2, 4"):
        bank[3]
    assert issubclass(UnknownLayer, KeyError)
    assert [bank.resolve(name) for name in NAMES] == list(range(len(NAMES)))
    with pytest.raises(UnknownConcept, match="unknown concept 'Clam'; nearest known: calm, "):
        bank.resolve("Clam")
    with pytest.raises(UnknownConcept, match="nearest known"):
        bank[1].direction("x" * 100_000)
    assert torch.equal(bank[1].direction("calm"), bank[1].directions[NAMES.index("calm")])
    assert repr(bank) == "Bank(7 concepts of made-up, d=32, layers 1, 2, 4; read at 4, steer at 2)"


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Bank([]), "at least one layer"),
        (lambda: Bank([make_layer(1), make_layer(1)]), "two layers have the same index"),
        (lambda: Bank([make_layer(1), make_layer(2, names=NAMES[::-1])]), "layers 1 and 2 do not hold the same concepts"),
        (lambda: Bank([make_layer(1), make_layer(2, width=16)]), "layer 1 is 32 wide, layer 2 is 16"),
        (lambda: Bank([make_layer(1)], read_layer=2), "no layer 2"),
        (lambda: Bank([make_layer(1)], steer_layers=[1, 5]), "no layer 5"),
        (lambda: Bank([make_layer(1)], families={"Joy": ["hapy"]}), "family 'Joy': unknown concept 'hapy'"),
        (lambda: Bank([make_layer(1)], meta={"x": object()}), "meta must be JSON"),
        (lambda: Bank([make_layer(1)], meta={"x": math.nan}), "meta must be JSON"),
        (lambda: Bank([make_layer(1)], meta={"fingerprint": [1]}), "fingerprint"),
        (lambda: Bank([make_layer(1)], meta={"fingerprint": {"weights": {"w": "8:00"}}}), "fingerprint"),
    ],
)
def test_a_bank_refuses(build: Callable[[], Bank], message: str) -> None:
    with pytest.raises(BankError, match=message):
        build()


def test_banks_copy_and_compare() -> None:
    bank = make_bank(readers=True)
    assert copy.deepcopy(bank) == bank == pickle.loads(pickle.dumps(bank))
    assert make_bank(seed=1) != make_bank()
    assert make_bank(kinds=("prompt",)) != make_bank()


# --- files --------------------------------------------------------------------------------------------------------


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
    with pytest.raises(BankError, match="no-such-model: no such file, and no bank of that name is shipped"):
        load_bank("no-such-model")
    with pytest.raises(BankError, match="no such file"):
        load_bank(tmp_path)


# --- subset, add, merge -------------------------------------------------------------------------------------------


def test_subset() -> None:
    bank = make_bank(readers=True)
    part = bank.subset(names=["desperate", "calm"], layers=[4, 1])
    assert part.names == ("desperate", "calm")
    assert part.layers == (1, 4)
    assert part.families == {"Fear": ("desperate",), "Peace": ("calm",)}
    assert (part.read_layer, part.steer_layers) == (4, (4,))  # the layer to steer at was 2
    for index in part:
        for name in part.names:
            k = bank.resolve(name)
            assert torch.equal(part[index].direction(name), bank[index].direction(name))
            assert part[index].baseline("generated").std[part.resolve(name)] == bank[index].baseline("generated").std[k]
    with pytest.raises(UnknownConcept, match="'clam'"):
        bank.subset(names=["clam"])
    with pytest.raises(UnknownLayer, match="no layer 3"):
        bank.subset(layers=[3])
    with pytest.raises(BankError, match="duplicate concept 'calm'"):
        bank.subset(names=["calm", "calm"])
    with pytest.raises(BankError, match="at least one layer"):
        bank.subset(layers=[])


def test_add_a_calibrated_concept() -> None:
    bank = make_bank(readers=True)
    directions = {index: torch.randn(32) * 3 for index in bank}
    readers = {index: torch.randn(32) for index in bank}
    baselines = {index: {"prompt": Baseline(torch.tensor([0.5]), torch.tensor([2.0]), 10)} for index in bank}
    more = bank.add("sarcastic", directions, readers=readers, baselines=baselines, family="Edge")
    assert more.names == (*NAMES, "sarcastic")
    assert more.families["Edge"] == ("sarcastic",)
    assert more.subset(NAMES)[1].directions.equal(bank[1].directions)
    for index, layer in more.items():
        assert torch.allclose(layer.direction("sarcastic"), directions[index] / directions[index].norm())
        assert layer.readers is not None
        assert torch.equal(layer.readers[-1], readers[index])
        assert float(layer.baseline("generated").std[-1]) == 2.0  # the only one there is serves every kind
        assert layer.baseline("prompt").count == 10
        assert layer.uncalibrated == ()
        assert layer.residual_norm == 12.5


def test_add_without_a_baseline_warns_and_scores_projections(tmp_path: Path) -> None:
    bank = make_bank()
    direction = torch.randn(32)
    with pytest.warns(UserWarning, match="sarcastic have no baseline"):
        more = bank.add("sarcastic", dict.fromkeys(bank, direction))
    assert all(layer.uncalibrated == ("sarcastic",) for layer in more.values())
    x, scores, before = torch.randn(3, 32), torch.empty(3, 8), torch.empty(3, 7)
    ops.apply_(x, more[1], scores=scores)
    ops.apply_(x, bank[1], scores=before)
    assert torch.allclose(scores[:, -1], x @ direction / direction.norm(), atol=1e-5)
    assert torch.allclose(scores[:, :-1], before, atol=1e-6)
    more.save(tmp_path / "x")
    assert load_bank(tmp_path / "x") == more
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Bank([BankLayer.from_directions(torch.eye(2, 32), index=1)]).add("other", {1: torch.ones(32)})


@pytest.mark.parametrize(
    ("name", "directions", "message"),
    [
        ("new", {1: torch.ones(32)}, r"new: directions are needed at layers \[1, 2, 4\], got \[1\]"),
        ("calm", dict.fromkeys((1, 2, 4), torch.ones(32)), r"share 1 of 7 and 1 concepts \['calm'\]"),
        ("new", dict.fromkeys((1, 2, 4), torch.zeros(32)), "row of 'new' is zero"),
        ("new", dict.fromkeys((1, 2, 4), torch.ones(31)), "the bank is 32 wide, what joins it is 31"),
    ],
)
def test_add_refuses(name: str, directions: dict[int, Tensor], message: str) -> None:
    with pytest.raises(BankError, match=message):
        make_bank().add(name, directions)


def test_merge() -> None:
    bank = make_bank()
    a, b = bank.subset(names=NAMES[:3]), bank.subset(names=NAMES[3:])
    merged = a.merge(b)
    assert dict(merged) == dict(bank)
    assert {family: set(members) for family, members in merged.families.items()} == {f: set(m) for f, m in bank.families.items()}
    assert merged.meta["merged"] == [b.meta]
    low, high = bank.subset(layers=[1]), bank.subset(layers=[2, 4])
    assert dict(low.merge(high)) == dict(bank)
    assert low.merge(high).read_layer == 1
    for other in (bank, bank.subset(names=NAMES[:2], layers=[1]), bank.subset(names=NAMES[::-1]), make_bank((1, 5))):
        with pytest.raises(BankError, match="banks merge when"):
            bank.merge(other)
    with pytest.raises(BankError, match="the bank is 32 wide, what joins it is 16"):
        bank.merge(make_bank((7,), width=16))


# --- the model it belongs to --------------------------------------------------------------------------------------


def llama(seed: int = 0, **config: Any) -> torch.nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 6, "num_attention_heads": 2, "vocab_size": 100}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes | config))  # type: ignore[no-any-return]


def bank_of(model: torch.nn.Module) -> Bank:
    bank = make_bank()
    return Bank(bank.values(), meta={"model": "tiny", "fingerprint": fingerprint(model), "chat_template": "0" * 12})


@pytest.fixture
def quiet() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield


@pytest.mark.usefixtures("quiet")
def test_check_accepts_the_same_weights_in_another_form() -> None:
    bank = bank_of(llama())
    assert json.loads(json.dumps(bank.meta["fingerprint"])) == bank.meta["fingerprint"]
    bank.check(llama())
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        bank.check(llama().to(dtype))
    bank_of(llama().bfloat16()).check(llama().bfloat16().float())
    bank.check(torch.compile(llama(), backend="eager"))  # type: ignore[arg-type]
    bank.check(torch.nn.parallel.DataParallel(llama()))
    resized: Any = llama()
    resized.resize_token_embeddings(108)
    bank.check(resized)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            lambda: llama(seed=1),
            r"made for tiny; weights: \d+ of 1024 sampled values differ, by 1\.\S+ of their size \(another model\); force=True",
        ),
        (lambda: llama(hidden_size=64), "residual width d: the bank's is 32, the model's is 64"),
        (lambda: llama(num_hidden_layers=5), "number of layers: the bank's is 6, the model's is 5"),
        (lambda: llama(num_hidden_layers=4), "layer 4 does not exist in a model of 4 layers"),
    ],
)
def test_check_refuses_another_model_and_says_what_differs(model: Callable[[], torch.nn.Module], message: str) -> None:
    bank, other = bank_of(llama()), model()
    with pytest.raises(BankError, match=message):
        bank.check(other)
    with pytest.warns(UserWarning, match=message.split(";")[0]):
        bank.check(other, force=True)


def test_check_tells_model_types_apart() -> None:
    transformers = pytest.importorskip("transformers")
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=32, n_layer=6, n_head=2, vocab_size=100))
    with pytest.raises(BankError, match="model type: the bank's is llama, the model's is gpt2"):
        bank_of(llama()).check(model)


def test_check_sees_a_fine_tune_of_a_few_values() -> None:
    tuned = llama()
    with torch.no_grad():
        for weight in tuned.parameters():
            weight += 0.01 * weight * (torch.rand_like(weight) < 0.1)
    with pytest.raises(BankError, match=r"weights: .* by 0\.\d+ of their size \(a fine-tune"):
        bank_of(llama()).check(tuned)


def test_weights_that_cannot_be_read_are_skipped_with_a_warning() -> None:
    bank = bank_of(llama())
    with pytest.warns(UserWarning, match="weights cannot be read, so only the model's shape"):
        bank.check(llama().to("meta"))
    with pytest.raises(BankError, match="residual width"):
        bank.check(llama(hidden_size=64).to("meta"))
    quantised = llama()
    for module in quantised.modules():
        if isinstance(module, torch.nn.Linear):
            module.weight = torch.nn.Parameter(torch.zeros(module.weight.shape, dtype=torch.int8), requires_grad=False)
    found = fingerprint(quantised, like=bank.meta["fingerprint"])["weights"]
    assert list(found) == ["model.embed_tokens.weight"]
    bank.check(quantised)
    with pytest.warns(UserWarning, match="the bank carries no fingerprint"):
        make_bank().check(llama())


def test_fingerprint_of_any_module() -> None:
    found = fingerprint(torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.LayerNorm(8)))
    assert (found["model_type"], found["d"], found["layers"]) == (None, None, None)
    assert list(found["weights"]) == ["0.weight"]
    assert fingerprint(torch.nn.ReLU())["weights"] == {}


def test_another_chat_template_is_warned_about() -> None:
    class Tokenizer:
        chat_template: Any = "{{ messages }}"

    bank, model = bank_of(llama()), llama()
    with pytest.warns(UserWarning, match="chat template"):
        bank.check(model, Tokenizer())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Bank(bank.values(), meta=bank.meta | {"chat_template": template_hash(Tokenizer())}).check(model, Tokenizer())
        Tokenizer.chat_template = None
        bank.check(model, Tokenizer())


@pytest.mark.filterwarnings("ignore:concepts")
@pytest.mark.filterwarnings("ignore:.*carries no fingerprint")
def test_the_docs_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gguf")
    monkeypatch.chdir(tmp_path)
    run_examples("bank.md")
