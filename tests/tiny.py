"""Small random language models of every layout, and a bank for each; shared by the tests of models, hooks and the guard."""

from __future__ import annotations

import functools
import warnings

import torch
import transformers

from emovec.bank import Bank, BankLayer, Baseline, fingerprint

WIDTH, LAYERS, VOCAB = 64, 4, 128
CONCEPTS = ("calm", "afraid", "desperate", "happy", "angry")

transformers.logging.set_verbosity_error()

BASE = {
    "hidden_size": WIDTH,
    "intermediate_size": 96,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": VOCAB,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}
MOE = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "decoder_sparse_step": 1}
HEADS = {key: value for key, value in BASE.items() if key not in ("head_dim", "num_key_value_heads")}
FAMILIES = {
    "llama": BASE,
    "mistral": BASE,
    "gemma": BASE,
    "gemma2": {**BASE, "query_pre_attn_scalar": 16},
    "qwen2": {key: value for key, value in BASE.items() if key != "head_dim"},
    "qwen3": BASE,
    "gpt2": HEADS,
    "gpt_neox": HEADS,
    "bloom": HEADS,  # its blocks return tuples
    "mixtral": {**BASE, **MOE},
    "qwen3_moe": {**BASE, **MOE},
    "mamba": {"hidden_size": WIDTH, "num_hidden_layers": LAYERS, "vocab_size": VOCAB, "eos_token_id": None, "pad_token_id": 0},
}


@functools.cache
def model(family: str = "llama") -> transformers.PreTrainedModel:
    """The model of a family in fp32. It is shared: leave it as it was found."""
    return fresh(family)


def fresh(family: str = "llama", **changes: object) -> transformers.PreTrainedModel:
    torch.manual_seed(7)
    config = transformers.AutoConfig.for_model(family, **{**FAMILIES[family], **changes})
    made = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, weight in made.named_parameters():
            if weight.dim() >= 2 and "conv" not in name:
                weight.normal_(std=0.15)  # the default of 0.02 makes blocks that hardly change the stream
    made.generation_config.eos_token_id = None
    return made


@functools.cache
def bank(family: str = "llama") -> Bank:
    return bank_for(model(family))


def bank_for(made: torch.nn.Module) -> Bank:
    """A calibrated bank with random directions at all layers but the first."""
    g = torch.Generator().manual_seed(3)
    layers = []
    for index in range(1, LAYERS):
        bare = BankLayer.from_directions(torch.randn(len(CONCEPTS), WIDTH, generator=g), CONCEPTS, index)
        baselines = {
            kind: Baseline(torch.randn(len(CONCEPTS), generator=g), 0.5 + torch.rand(len(CONCEPTS), generator=g), 100)
            for kind in ("prompt", "turn_start", "generated")
        }
        layers.append(BankLayer(index, CONCEPTS, bare.directions, baselines=baselines, residual_norm=8.0))
    families = {"Low": CONCEPTS[:1], "High": CONCEPTS[1:3]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return Bank(layers, read_layer=2, steer_layers=(1, 2), families=families, meta={"model": "tiny", "fingerprint": fingerprint(made)})


def tokens(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(2, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def padded(prompts: list[torch.Tensor], side: str) -> dict[str, torch.Tensor]:
    """Prompts [T_i] as one batch with its attention mask."""
    longest = max(len(prompt) for prompt in prompts)
    ids = torch.zeros(len(prompts), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        where = slice(longest - len(prompt), longest) if side == "left" else slice(0, len(prompt))
        ids[row, where] = prompt
        mask[row, where] = 1
    return {"input_ids": ids, "attention_mask": mask}
