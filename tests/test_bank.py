"""The bank: what it is made of is checked by name, and banks made from banks hold what they should."""

from __future__ import annotations

import copy
import math
import pickle
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from banks import NAMES, make_bank, make_layer, run_examples
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from emovec import ops
from emovec.bank import Bank, BankError, BankLayer, Baseline, UnknownConcept, UnknownLayer, load_bank

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
    high = layer.operands("cpu", torch.bfloat16, precision="high")
    assert high is layer.operands("cpu", torch.bfloat16, "prompt", "high")
    assert torch.equal(high.readers_unpacked(), layer.directions if layer.readers is None else layer.readers)
    with pytest.raises(ValueError, match="precision must be one of fast, high, got 'exact'"):
        layer.operands("cpu", torch.bfloat16, precision="exact")


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


@pytest.mark.filterwarnings("ignore:concepts")
@pytest.mark.filterwarnings("ignore:.*carries no fingerprint")
def test_the_docs_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gguf")
    monkeypatch.chdir(tmp_path)
    run_examples("bank.md")
