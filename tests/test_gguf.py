"""Control vectors: what is written is what llama.cpp's loader wants, and what is read is checked as it checks."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from banks import make_bank

from emovec.bank import Bank
from emovec.gguf import ControlVectorError, export_control_vector, import_control_vector, read_control_vector, write_control_vector
from emovec.steer import SteeringError

gguf = pytest.importorskip("gguf")


def write_foreign(path: Path, tensors: Mapping[str, np.ndarray], architecture: str = "controlvector", **strings: str) -> Path:
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in strings.items():
        writer.add_string(key.replace("_", "."), value)
    for name, value in tensors.items():
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_export_is_the_delta_of_attach_and_the_layout_of_llama_cpp(tmp_path: Path) -> None:
    bank, path = make_bank((1, 2, 4)), tmp_path / "calm.gguf"
    export_control_vector(bank, {"calm": 0.05, "angry": -0.02}, path, layers=[4, 2])
    reader = gguf.GGUFReader(path)
    assert reader.get_field("general.architecture").contents() == "controlvector"
    assert reader.get_field("controlvector.layer_count").contents() == 2
    assert [tensor.name for tensor in reader.tensors] == ["direction.2", "direction.4"]
    for tensor in reader.tensors:
        assert tensor.tensor_type == gguf.GGMLQuantizationType.F32
        assert list(tensor.shape) == [bank.width]
    for index, vector in read_control_vector(path).items():
        layer = bank[index]
        expected = 0.05 * 12.5 * layer.direction("calm").double() - 0.02 * 12.5 * layer.direction("angry").double()
        assert torch.equal(vector, expected.float())


def test_export_steers_at_the_banks_layers_unless_told(tmp_path: Path) -> None:
    bank = make_bank((1, 2, 4))
    export_control_vector(bank, {"calm": 0.05}, tmp_path / "calm.gguf")
    assert tuple(read_control_vector(tmp_path / "calm.gguf")) == bank.steer_layers


@pytest.mark.parametrize("value", ["ablate", {"at_most": 1}, {"add": 0.1, "when": "angry > 2"}, {"add": 0.1, "on": "prompt"}])
def test_export_refuses_what_llama_cpp_cannot_do(tmp_path: Path, value: object) -> None:
    with pytest.raises(SteeringError, match=r"'calm'.*only adds"):
        export_control_vector(make_bank(), {"angry": 0.1, "calm": value}, tmp_path / "x.gguf")
    with pytest.raises(SteeringError, match="does nothing"):
        export_control_vector(make_bank(), {}, tmp_path / "x.gguf")
    assert list(tmp_path.iterdir()) == []


def test_layer_0_cannot_be_expressed(tmp_path: Path) -> None:
    with pytest.raises(ControlVectorError, match=r"direction\.0.*block 0 cannot"):
        export_control_vector(make_bank((0, 3)), {"calm": 0.1}, tmp_path / "x.gguf", layers=[0, 3])
    with pytest.raises(ControlVectorError, match=r"x\.gguf: direction\.0"):
        read_control_vector(write_foreign(tmp_path / "x.gguf", {"direction.0": np.ones(8, np.float32)}))


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    write_control_vector(path, {3: torch.ones(8)})
    before = path.read_bytes()
    for bad in ({3: torch.ones(8), 4: torch.ones(9)}, {3: torch.full((8,), math.nan)}, {3: torch.ones(2, 4)}, {}):
        with pytest.raises(ControlVectorError):
            write_control_vector(path, bad)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_round_trip_of_any_dtype_and_stride(tmp_path: Path) -> None:
    vectors = {7: torch.randn(8, 2)[:, 0], 1: torch.randn(8).bfloat16(), 12: torch.randn(8, dtype=torch.float64)}
    write_control_vector(tmp_path / "x.gguf", vectors, model_hint="llama")
    found = read_control_vector(tmp_path / "x.gguf")
    assert list(found) == [1, 7, 12]
    assert all(torch.equal(found[index], vectors[index].float()) for index in vectors)


def test_import_gives_an_uncalibrated_concept_that_merges_into_a_bank(tmp_path: Path) -> None:
    bank = make_bank((1, 2, 4))
    vectors = {1: np.full(32, 2.0, np.float32), 2: np.arange(32, dtype=np.float32), 3: np.zeros(32, np.float32), 4: np.ones(32, np.float32)}
    path = write_foreign(tmp_path / "pirate.gguf", {f"direction.{n}": v for n, v in vectors.items()}, controlvector_model__hint="llama")
    found = import_control_vector(path)
    assert found.names == ("pirate",)
    assert found.layers == found.steer_layers == (1, 2, 4)
    assert not any(layer.calibrated for layer in found.values())
    for index, layer in found.items():
        assert layer.raw_norm is not None
        assert torch.allclose(layer.directions[0] * layer.raw_norm[0], torch.from_numpy(vectors[index]), rtol=1e-6)
    with pytest.warns(UserWarning, match="pirate"):
        merged = bank.merge(found)
    export_control_vector(merged, {"pirate": 0.1}, tmp_path / "out.gguf", layers=[2])
    direction = torch.from_numpy(vectors[2]) / np.linalg.norm(vectors[2])
    assert torch.allclose(read_control_vector(tmp_path / "out.gguf")[2], 1.25 * direction, rtol=1e-5)
    assert isinstance(merged, Bank)


ONES = np.ones(8, np.float32)


@pytest.mark.parametrize(
    ("tensors", "options", "message"),
    [
        ({"direction.x": ONES}, {}, "'direction.x' is not direction.N"),
        ({"direction.-1": ONES}, {}, "'direction.-1' is not direction.N"),
        ({"direction.1": ONES, "token_embd.weight": ONES}, {}, "'token_embd.weight' is not direction.N"),
        ({"direction.1": ONES, "direction.01": ONES}, {}, "two directions for layer 1"),
        ({"direction.1": ONES, "direction.2": np.ones(9, np.float32)}, {}, "direction.2 has length 9, direction.1 has 8"),
        ({"direction.1": ONES.astype(np.float16)}, {}, "direction.1 must be F32, got F16"),
        ({"direction.1": np.ones((2, 4), np.float32)}, {}, "direction.1 must be 1-D, got [2, 4]"),
        ({"direction.1": ONES * np.inf}, {}, "direction.1 is not finite"),
        ({"direction.1": ONES}, {"architecture": "llama"}, "architecture is 'llama', not 'controlvector'"),
        ({"direction.1": ONES}, {"glp_mode": "project"}, "'project', not to be added"),
        ({}, {}, "at least one direction"),
    ],
)
def test_foreign_files_are_checked(tmp_path: Path, tensors: dict[str, np.ndarray], options: dict[str, str], message: str) -> None:
    path = write_foreign(tmp_path / "x.gguf", tensors, **options)
    for read in (read_control_vector, import_control_vector):
        with pytest.raises(ControlVectorError, match=r"x\.gguf: .*" + re.escape(message)):
            read(path)


def test_a_truncated_file_is_an_error_wherever_it_ends(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    write_control_vector(path, {1: torch.randn(8), 2: torch.randn(8)}, model_hint="llama")
    whole = path.read_bytes()
    for size in [0, 1, 10, 30, 100, 200, len(whole) - 40, len(whole) - 1]:
        path.write_bytes(whole[:size])
        with pytest.raises(ControlVectorError, match=r"x\.gguf"):
            read_control_vector(path)
    path.write_bytes(b"not a gguf file at all, but long enough to look at")
    with pytest.raises(ControlVectorError, match="not a readable GGUF"):
        read_control_vector(path)


def test_only_zero_vectors_are_no_concept(tmp_path: Path) -> None:
    with pytest.raises(ControlVectorError, match=r"x\.gguf"):
        import_control_vector(write_foreign(tmp_path / "x.gguf", {"direction.1": ONES * 0}))
