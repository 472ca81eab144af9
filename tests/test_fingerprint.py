"""A bank knows its model, in whatever form the weights come, and refuses another."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from banks import make_bank

from emovec.bank import Bank, BankError, fingerprint, template_hash

torch.set_num_threads(1)


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
