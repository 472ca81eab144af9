"""Requests with and without an adapter (LoRA) in one batch, each with and without steering."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from safetensors.torch import save_file
from vllm_engine import ESSAY, NAME, TEXTS, Oracle, generate, params, started

pytest.importorskip("vllm")

pytestmark = pytest.mark.engine

RANK, ALPHA = 4, 8
MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
VALUES = [None, {"calm": 0.08}, {"desperate": {"at_most": 0.0}, "happy": {"add": 0.04}}, {"desperate": 0.1, "on": "generated"}]


@pytest.fixture(scope="module")
def adapter(oracle, tmp_path_factory):
    """A random adapter on every matrix of every layer, and the oracle of the model that it is merged into."""
    generator, folder = torch.Generator().manual_seed(0), tmp_path_factory.mktemp("adapter")
    merged, tensors = copy.deepcopy(oracle.model), {}
    for name, linear in merged.named_modules():
        if name.split(".")[-1] in MODULES:
            a = torch.randn(RANK, linear.in_features, generator=generator) * linear.in_features**-0.5
            b = torch.randn(linear.out_features, RANK, generator=generator) * float(linear.weight.detach().std()) / 2
            linear.weight.data += ALPHA / RANK * b @ a
            tensors |= {f"base_model.model.{name}.lora_A.weight": a, f"base_model.model.{name}.lora_B.weight": b}
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": NAME, "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps({**config, "r": RANK, "lora_alpha": ALPHA, "target_modules": MODULES}))
    return str(folder), Oracle(merged, oracle.bank)


@pytest.fixture(scope="module")
def engine():
    """With a slot more than adapters: on a CPU vLLM takes the last slot for the requests without one that run beside others."""
    with started(enable_lora=True, max_lora_rank=8, max_loras=2) as engine:
        yield engine


def test_adapters_and_steering_in_one_batch(engine, adapter, oracle):
    from vllm.lora.request import LoRARequest

    folder, changed = adapter
    lora = LoRARequest("random", 1, folder)
    cases = [(oracle.ids(text), value, adapted) for text, value in zip(TEXTS, VALUES, strict=True) for adapted in (True, False)]
    given = [params(value, {"on": "all"}) for _, value, _ in cases]
    outputs = generate(engine, [ids for ids, _, _ in cases], given, lora_request=[lora if adapted else None for _, _, adapted in cases])
    for (ids, value, adapted), output in zip(cases, outputs, strict=True):
        (changed if adapted else oracle).check(ids, value, output, on="all")
    assert all(one.token_ids != other.token_ids for one, other in zip(outputs[::2], outputs[1::2], strict=True)), "adapters do something"


def test_blocks_of_an_adapter_are_its_own_steered_or_not(engine, adapter, oracle):
    from vllm.lora.request import LoRARequest

    lora = LoRARequest("random", 1, adapter[0])
    ids = oracle.ids(ESSAY, chat=False)[:100]  # three whole blocks of 32

    def ask(value, adapted):
        prompt = [{"prompt_token_ids": ids}]
        (output,) = engine.generate(prompt, [params(value, max_tokens=4)], use_tqdm=False, lora_request=lora if adapted else None)
        (adapter[1] if adapted else oracle).check(ids, value, output.outputs[0], tokens=4)
        return output.num_cached_tokens

    kinds = [(value, adapted) for value in (None, {"calm": 0.08}) for adapted in (True, False)]
    assert [ask(*kind) for kind in kinds] == [0] * 4
    assert [ask(*kind) for kind in kinds] == [96] * 4
