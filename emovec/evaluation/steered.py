"""Running the model while directions are added: the next word, the loss on given text, and text of its own.

Concepts and random directions go through the same hooks in the same batches: a sequence's result does not depend on the others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from emovec.bank import Bank, BankLayer
from emovec.hook import attach
from emovec.models import encode

SEQUENCES = 64  # in a batch
Value = dict[str, Any]


def with_random(bank: Bank, count: int, generator: torch.Generator) -> Bank:
    """A bank to steer with: the concepts, and random unit directions ``random 0``, ... that are the same at each layer.

    A concept's directions are much alike from layer to layer, so that what they add adds up; so must what random ones add.
    """
    random = torch.randn(count, bank.width, generator=generator)
    names = [f"random {number}" for number in range(count)]
    layers = []
    for index in bank.steer_layers:
        rows = torch.cat([bank[index].directions, random / random.norm(dim=1, keepdim=True)])
        layers.append(replace(BankLayer.from_directions(rows, [*bank.names, *names], index), residual_norm=bank[index].residual_norm))
    kept: dict[str, Any] = {key: bank.meta[key] for key in ("model", "fingerprint", "chat_template") if key in bank.meta}
    return Bank(layers, bank.steer_layers[0], bank.steer_layers, meta=kept)


class Steered:
    """The model under steering values.

    Args:
        model, tokenizer: of transformers.
        bank: to steer with.
        force: steer although the bank was made for another model.
        advance: told of the tokens run.
    """

    def __init__(
        self, model: Any, tokenizer: Any, bank: Bank, *, force: bool = False, advance: Callable[[int], None] = lambda _: None
    ) -> None:
        self.model, self.tokenizer, self.bank = model, tokenizer, bank
        self._force, self._advance = force, advance

    def next_tokens(self, texts: Sequence[str], values: Sequence[Value], tokens: Sequence[int]) -> Tensor:
        """Log-probabilities [V, T, W] of W tokens after each of T texts under each of V values, in fp64."""
        found = []
        for chunk in _chunks(values, max(1, SEQUENCES // len(texts))):
            batch = encode(self.tokenizer, list(texts) * len(chunk), chat=False, device=self.model.device)
            with torch.inference_mode(), self._under(_each(chunk, len(texts))):
                logits = self.model(**batch, logits_to_keep=1).logits[:, -1]
            found.append(logits.double().log_softmax(-1)[:, list(tokens)].cpu().reshape(len(chunk), len(texts), -1))
            self._advance(int(batch["attention_mask"].sum()))
        return torch.cat(found)

    def losses(self, texts: Tensor, values: Sequence[Value], skip: int) -> Tensor:
        """Mean loss [V, T] in nats per token of ``texts`` [T, S], token ids, from the token after the first ``skip`` on."""
        found = []
        for chunk in _chunks(values, max(1, SEQUENCES // len(texts))):
            ids = texts.repeat(len(chunk), 1).to(self.model.device)
            with torch.inference_mode(), self._under(_each(chunk, len(texts))):
                logits = self.model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[:, skip - 1 : -1]
            losses = torch.nn.functional.cross_entropy(logits.float().transpose(1, 2), ids[:, skip:], reduction="none")
            found.append(losses.double().mean(1).cpu().reshape(len(chunk), len(texts)))
            self._advance(ids.numel())
        return torch.cat(found)

    def written(self, prompts: Sequence[str], values: Sequence[Value], new_tokens: int) -> list[list[list[int]]]:
        """What the model writes, greedily, after each user message under each value: value -> prompt -> token ids."""
        found: list[list[list[int]]] = []
        stop = {self.tokenizer.eos_token_id, self.tokenizer.pad_token_id, *_listed(self.model.generation_config.eos_token_id)}
        for chunk in _chunks(values, max(1, SEQUENCES // len(prompts))):
            batch = encode(self.tokenizer, list(prompts) * len(chunk), device=self.model.device)
            options = {"max_new_tokens": new_tokens, "do_sample": False, "pad_token_id": self.tokenizer.pad_token_id}
            with torch.inference_mode(), self._under(_each(chunk, len(prompts))):
                out = self.model.generate(**batch, **options)[:, batch["input_ids"].shape[1] :].cpu()
            rows = [_until(row, stop) for row in out.tolist()]
            found += [rows[start : start + len(prompts)] for start in range(0, len(rows), len(prompts))]
            self._advance(int(batch["attention_mask"].sum()) + out.numel())
        return found

    def _under(self, values: list[Value]) -> Any:
        if not any(values):
            return nullcontext()
        return attach(self.model, self.bank, steer=values, steer_layers=self.bank.steer_layers, read=False, force=self._force)


def _each(values: Sequence[Value], times: int) -> list[Value]:
    return [value for value in values for _ in range(times)]


def _chunks(values: Sequence[Value], size: int) -> Iterator[Sequence[Value]]:
    return (values[start : start + size] for start in range(0, len(values), size))


def _listed(value: Any) -> list[int]:
    return [] if value is None else list(value) if isinstance(value, list | tuple) else [value]


def _until(ids: list[int], stop: set[Any]) -> list[int]:
    """The ids up to the first that ends a text."""
    return ids[: next((place for place, token in enumerate(ids) if token in stop), len(ids))]
