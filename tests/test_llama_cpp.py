"""A direction steers the same model alike in llama.cpp and in transformers.

Both engines run the packaged weights: llama.cpp from the GGUF file itself, transformers from the file's values in fp32. What
is compared is the shift of the next token's logits, steered minus unsteered, with two tolerances for two sources of difference:

- Of the file's values written out as F32 both engines compute in fp32. Unsteered logits then differ by 1e-6 of their size, and
  shifts, which are 5 % to 300 % of the logits, by 1e-6 to 2e-5 of theirs. They must agree to 1e-4; one layer off they differ
  by 0.1 to 1.
- From the Q4_1 file itself llama.cpp rounds activations to 8 bits before every product, and unsteered logits differ by 3 %. As
  much noise is in the steered logits, so shifts must agree to twice that difference, the most that the two make together
  (seen: 1.2 to 1.5 times; independent noise makes the root of 2).
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from emovec.bank import Bank, load_bank
from emovec.gguf import export_control_vector, import_control_vector
from emovec.hook import attach
from emovec.models import _packaged_file, encode, load_model

gguf = pytest.importorskip("gguf")
llama_cpp = pytest.importorskip("llama_cpp")
pytestmark = pytest.mark.engine

NAME = "smollm2-135m-instruct"
EXACT = 1e-4  # of the shift
NOISE = 2.0  # times the difference of the unsteered logits
QUANTISED = 0.05  # how far the unsteered logits may differ, so that the line above means something
PROMPTS = ("The old man sat by the window and", "I can't believe you said that to me. I")
QUESTION = "My cat died this morning. What should I do?"
WEAK = {"calm": 0.05}
VALUES = ({"desperate": -0.1}, {"happy": 0.1, "angry": -0.05}, {"afraid": 0.3})


class Llama:
    """llama.cpp by its C functions: one model, one context, keys and values in fp32."""

    def __init__(self, path: Path) -> None:
        params = llama_cpp.llama_model_default_params()
        params.n_gpu_layers = 0
        self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = params.n_batch = params.n_ubatch = 256
        params.n_threads = params.n_threads_batch = 1
        params.type_k = params.type_v = llama_cpp.GGML_TYPE_F32
        params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self.context = llama_cpp.llama_init_from_model(self.model, params)
        self.vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        self.width = llama_cpp.llama_model_n_embd(self.model)
        self.layers = llama_cpp.llama_model_n_layer(self.model)

    def close(self) -> None:
        llama_cpp.llama_free(self.context)
        llama_cpp.llama_model_free(self.model)

    def steer(self, control: Path, off: int = 0) -> None:
        """Use the control vector in a file, or one written ``off`` layers away."""
        # what llama.cpp's own loader makes of a file: rows from layer 1 on, zero where the file has none
        data = np.zeros((self.layers - 1, self.width), np.float32)
        for tensor in gguf.GGUFReader(control).tensors:
            data[int(tensor.name.removeprefix("direction.")) - 1 + off] = tensor.data
        pointer = data.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        assert llama_cpp.llama_set_adapter_cvec(self.context, pointer, data.size, self.width, 1, self.layers) == 0

    def logits(self, ids: Tensor) -> Tensor:
        """The next token's logits [V] after ``ids`` [1, T]."""
        tokens = (ctypes.c_int32 * ids.numel())(*ids[0].tolist())  # the batch only points at it
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), True)
        assert llama_cpp.llama_decode(self.context, llama_cpp.llama_batch_get_one(tokens, len(tokens))) == 0
        pointer = llama_cpp.llama_get_logits_ith(self.context, -1)
        return torch.from_numpy(np.ctypeslib.as_array(pointer, (self.vocabulary,)).copy())

    def shift(self, ids: Tensor, control: Path, off: int = 0) -> Tensor:
        """How far the control vector moves the logits [V]."""
        assert llama_cpp.llama_set_adapter_cvec(self.context, None, 0, self.width, -1, -1) == 0
        unsteered = self.logits(ids)
        self.steer(control, off)
        return self.logits(ids) - unsteered


class Transformers:
    """emovec's side: the same weights in fp32, steered by ``attach``."""

    def __init__(self) -> None:
        self.model, tokenizer = load_model(NAME, dtype=torch.float32, device="cpu")
        self.prompts = [encode(tokenizer, text, chat=False)["input_ids"] for text in PROMPTS]
        self.prompts.append(encode(tokenizer, QUESTION)["input_ids"])

    def logits(self, ids: Tensor) -> Tensor:
        with torch.inference_mode():
            logits: Tensor = self.model(ids).logits[0, -1]
        return logits

    def shift(self, ids: Tensor, bank: Bank, value: Mapping[str, Any]) -> Tensor:
        unsteered = self.logits(ids)
        with attach(self.model, bank, steer=value, read=False):
            return self.logits(ids) - unsteered


@pytest.fixture(scope="module")
def bank() -> Bank:
    return load_bank(NAME)


@pytest.fixture(scope="module")
def ours() -> Transformers:
    return Transformers()


@pytest.fixture(scope="module")
def quiet() -> Iterator[None]:
    silent = llama_cpp.llama_log_callback(lambda *_: None)
    llama_cpp.llama_log_set(silent, ctypes.c_void_p(0))
    yield
    llama_cpp.llama_log_set(llama_cpp.llama_log_callback(0), ctypes.c_void_p(0))


@pytest.fixture(scope="module")
def packaged(quiet: None) -> Iterator[Llama]:
    llama = Llama(_packaged_file(NAME))
    yield llama
    llama.close()


@pytest.fixture(scope="module")
def exact(quiet: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Llama]:
    """The packaged file's values, written out as F32 by llama.cpp itself."""
    path = tmp_path_factory.mktemp("llama") / "f32.gguf"
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.allow_requantize, params.nthread = llama_cpp.LLAMA_FTYPE_ALL_F32, True, 1
    assert llama_cpp.llama_model_quantize(str(_packaged_file(NAME)).encode(), str(path).encode(), ctypes.byref(params)) == 0
    llama = Llama(path)
    yield llama
    llama.close()
    path.unlink()  # half a gigabyte


def distance(found: Tensor, expected: Tensor) -> float:
    """The size of the difference of two vectors of logits. What is added to all logits alike changes nothing, and is left out."""
    difference = found - expected
    return float((difference - difference.mean()).norm())


def error(found: Tensor, expected: Tensor) -> float:
    """The distance in units of the expected shift."""
    return distance(found, expected) / distance(expected, torch.zeros_like(expected))


@pytest.mark.parametrize("value", [WEAK, *VALUES], ids=str)
def test_an_exported_value_steers_llama_cpp_as_attach_steers_transformers(
    value: Mapping[str, float], bank: Bank, ours: Transformers, exact: Llama, tmp_path: Path
) -> None:
    control = tmp_path / "control.gguf"
    export_control_vector(bank, value, control)
    for ids in ours.prompts:
        expected = ours.shift(ids, bank, value)
        found = exact.shift(ids, control)
        assert error(found, expected) < EXACT
        assert float(torch.cosine_similarity(found, expected, dim=0)) > 1 - EXACT


@pytest.mark.parametrize("layer", [1, 9, 15, 29])
def test_direction_n_is_the_output_of_block_n_and_no_other(
    layer: int, bank: Bank, ours: Transformers, exact: Llama, tmp_path: Path
) -> None:
    """At the format's first block, the model's last, and two of the bank's; any direction does."""
    control = tmp_path / "control.gguf"
    one = Bank([replace(bank[15], index=layer)], meta=bank.meta)
    value = {"calm": 0.3}
    export_control_vector(one, value, control)
    for ids in ours.prompts:
        expected = ours.shift(ids, one, value)
        assert error(exact.shift(ids, control), expected) < EXACT
        for off in (-1, 1):
            if 1 <= layer + off < exact.layers:
                assert error(exact.shift(ids, control, off), expected) > 100 * EXACT


@pytest.mark.parametrize("value", VALUES, ids=str)
def test_the_packaged_file_agrees_but_for_its_rounding_of_activations(
    value: Mapping[str, float], bank: Bank, ours: Transformers, packaged: Llama, tmp_path: Path
) -> None:
    control = tmp_path / "control.gguf"
    export_control_vector(bank, value, control)
    for ids in ours.prompts:
        expected = ours.shift(ids, bank, value)
        assert llama_cpp.llama_set_adapter_cvec(packaged.context, None, 0, packaged.width, -1, -1) == 0
        unsteered = ours.logits(ids)
        floor = distance(packaged.logits(ids), unsteered)
        assert floor < QUANTISED * distance(unsteered, torch.zeros_like(unsteered))
        assert distance(packaged.shift(ids, control), expected) < NOISE * floor
        for off in (-1, 1):
            assert distance(packaged.shift(ids, control, off), expected) > NOISE * floor


@pytest.mark.parametrize("scale", [1.0, -0.5])
def test_a_control_vector_of_other_tools_steers_here_as_in_llama_cpp(
    scale: float, ours: Transformers, bank: Bank, exact: Llama, tmp_path: Path
) -> None:
    """Laid out as llama.cpp's cvector-generator and repeng do: a direction for every block from 1 on, of any length."""
    control = tmp_path / "theirs.gguf"
    generator = torch.Generator().manual_seed(5)
    writer = gguf.GGUFWriter(control, "controlvector")
    writer.add_string("controlvector.model_hint", "llama")
    writer.add_uint32("controlvector.layer_count", exact.layers - 1)
    for layer in range(1, exact.layers):
        direction = torch.randn(exact.width, generator=generator) * 0.1 * (1 + layer / 10)
        writer.add_tensor(f"direction.{layer}", scale * direction.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    theirs = import_control_vector(control, name="theirs")
    # a vector's own length as the unit of strength: strength 1 is then the file at scale 1
    whole = [replace(layer, residual_norm=float(layer.raw_norm[0])) for layer in theirs.values() if layer.raw_norm is not None]
    whole_bank = Bank(whole, steer_layers=theirs.steer_layers, meta=bank.meta)
    back = tmp_path / "back.gguf"
    export_control_vector(whole_bank, {"theirs": 1.0}, back)
    for ids in ours.prompts:
        expected = exact.shift(ids, control)
        assert error(ours.shift(ids, whole_bank, {"theirs": 1.0}), expected) < EXACT
        assert error(exact.shift(ids, back), expected) < EXACT
