"""The recipe of an extraction written out plainly, every activation in memory, and small corpora and tokenizers to run it on."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import tiny
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

MARKS = ["<pad>", "<s>", "<unk>", "user:", "assistant:", "system:", "<|user|>", "<|assistant|>", "<|end|>"]
WORDS = [f"w{number}" for number in range(tiny.VOCAB - len(MARKS))]
CHAT = (
    "{{ bos_token }} {% for message in messages %}<|{{ message['role'] }}|> {{ message['content'] }} <|end|> {% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def tokenizer(*, side: str = "left", chat: bool = True, bos: bool = False) -> PreTrainedTokenizerFast:
    """One token a word; ``bos``: texts start with one that is not theirs."""
    made = Tokenizer(models.WordLevel({word: index for index, word in enumerate([*MARKS, *WORDS])}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if bos:
        made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    fast = PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", pad_token="<pad>", unk_token="<unk>", padding_side=side)
    fast.chat_template = CHAT if chat else None
    return fast


@dataclass
class Corpus:
    """Stories of ``counts[k]`` for the k-th emotion, of words drawn from ``seed``; two dialogues and more, three prompts and more."""

    counts: tuple[int, ...] = (3, 2, 4)
    seed: int = 0
    shortest: int = 12
    longest: int = 40
    stories: list[dict[str, str]] = field(init=False)
    neutral: list[dict[str, Any]] = field(init=False)
    ordinary: list[dict[str, str]] = field(init=False)

    def __post_init__(self) -> None:
        draw = random.Random(self.seed)

        def words(shortest: int, longest: int) -> str:
            return " ".join(draw.choices(WORDS, k=draw.randint(shortest, longest)))

        self.stories = [
            {"emotion": f"emotion {k}", "topic": f"t{number}", "text": words(self.shortest, self.longest)}
            for k, count in enumerate(self.counts)
            for number in range(count)
        ]
        draw.shuffle(self.stories)
        roles = ("user", "assistant", "user", "assistant")
        self.neutral = [
            {"turns": [{"role": role, "content": words(3, 9)} for role in roles[: draw.randint(2, 4)]]} for _ in range(draw.randint(2, 5))
        ]
        self.ordinary = [{"content": words(1, 9)} for _ in range(draw.randint(3, 5))]

    @property
    def sources(self) -> tuple[list[dict[str, str]], list[dict[str, Any]], list[dict[str, str]]]:
        return self.stories, self.neutral, self.ordinary


def ids(text: str) -> list[int]:
    known = {word: index for index, word in enumerate([*MARKS, *WORDS])}
    return [known[word] for word in text.split()]


def outputs(model: Any, tokens: list[int]) -> np.ndarray:
    """The outputs [L, T, d] of all decoder blocks but the last (whose entry is after the final norm), of one text without padding."""
    with torch.no_grad():
        states = model(input_ids=torch.tensor([tokens]), output_hidden_states=True).hidden_states
    return torch.stack(states[1:-1])[:, 0].double().numpy()


def marked(turns: list[dict[str, str]], chat: bool, bos: bool, opened: bool) -> tuple[list[int], list[str | None]]:
    """A dialogue's ids as the template writes it, and whose words each is."""
    tokens, roles = (ids("<s>"), [None]) if chat or bos else ([], [])
    for turn in turns:
        content = ids(turn["content"])
        tokens += [*ids(f"<|{turn['role']}|>" if chat else f"{turn['role']}:"), *content, *(ids("<|end|>") if chat else [])]
        roles += [None, *[turn["role"]] * len(content), *([None] if chat else [])]
    if opened:
        tokens, roles = [*tokens, *ids("<|assistant|>" if chat else "assistant:")], [*roles, None]
    return tokens, roles


def bank(
    model: Any,
    corpus: Corpus,
    *,
    skip: int,
    skip_share: float = 1.0,
    chat: bool = True,
    bos: bool = False,
    format: str = "raw",
    denoise: str | None = "tokens",
    variance: float = 0.5,
    shrinkage: float = 0.5,
    level: bool = True,
) -> list[dict[str, Any]]:
    """For each layer but the last what a bank of ``corpus`` must hold, by numpy in fp64."""
    names = list(dict.fromkeys(story["emotion"] for story in corpus.stories))
    means: dict[str, list[np.ndarray]] = {name: [] for name in names}
    for story in corpus.stories:
        if format == "raw":
            tokens = [*(ids("<s>") if bos else []), *ids(story["text"])]
            used = list(range(len(tokens)))
        else:
            tokens, roles = marked([{"role": "user", "content": story["text"]}], chat, bos, opened=False)
            used = [position for position, role in enumerate(roles) if role]
        used = used[min(skip, int(skip_share * len(used))) :]
        if used:
            means[story["emotion"]].append(outputs(model, tokens)[:, used].mean(1))

    def said(turns: list[dict[str, str]], roles: tuple[str, ...], opened: bool) -> tuple[np.ndarray, np.ndarray]:
        tokens, whose = marked(turns, chat, bos, opened)
        found = outputs(model, tokens)
        return found[:, [role in roles for role in whose]], found[:, -1:]

    both = [said(item["turns"], ("user", "assistant"), False)[0] for item in corpus.neutral]
    neutral = np.concatenate(both if denoise == "tokens" else [rows.mean(1, keepdims=True) for rows in both], axis=1)
    prompts = [said([{"role": "user", "content": item["content"]}], ("user",), True) for item in corpus.ordinary]
    kinds = {
        "prompt": np.concatenate([words for words, _ in prompts], axis=1),
        "turn_start": np.concatenate([last for _, last in prompts], axis=1),
        "generated": np.concatenate([said(item["turns"], ("assistant",), False)[0] for item in corpus.neutral], axis=1),
    }
    found = []
    for layer in range(len(neutral)):
        of = [np.stack([mean[layer] for mean in means[name]]) for name in names]
        grand = np.stack([rows.mean(0) for rows in of]).mean(0)
        rows = np.stack([rows.mean(0) - grand for rows in of])
        differences = rows
        if denoise:
            values, vectors = np.linalg.eigh(np.cov(neutral[layer].T))
            values, vectors = values[::-1], vectors[:, ::-1]
            count = int(np.argmax(np.cumsum(values) / values.sum() >= variance)) + 1
            for component in vectors[:, :count].T:
                rows = rows - np.outer(rows @ component, component)
        norm = np.linalg.norm(rows, axis=1)
        directions = rows / norm[:, None]
        inside = np.concatenate([rows - rows.mean(0) for rows in of])
        covariance = inside.T @ inside / (len(inside) - len(names))
        inverse = np.linalg.inv((1 - shrinkage) * covariance + shrinkage * np.diag(np.diag(covariance)))
        if level:
            common = (grand - kinds["prompt"][layer].mean(0))[:, None]
            inverse = inverse - inverse @ common @ common.T @ inverse / (common.T @ inverse @ common)
        readers = differences @ inverse
        readers /= (readers * directions).sum(1, keepdims=True)
        read = {kind: rows[layer] @ readers.T for kind, rows in kinds.items()}
        words = np.concatenate([kinds["prompt"][layer], kinds["generated"][layer]])
        found.append(
            {
                "names": names,
                "directions": directions,
                "readers": readers,
                "raw_norm": norm,
                "grand_mean": grand,
                "projections": read,
                "baseline": {kind: (rows.mean(0), rows.std(0, ddof=1), len(rows)) for kind, rows in read.items()},
                "residual_norm": float(np.sort(np.linalg.norm(words, axis=1))[(len(words) - 1) // 2]),
                "components": count if denoise else 0,
            }
        )
    return found
