"""A real vLLM with emovec, and what to compare it with: transformers with ``emovec.attach``."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from emovec import models
from emovec.bank import load_bank
from emovec.hook import attach

NAME = "smollm2-135m-instruct"
EAGER = os.environ.get("EMOVEC_TEST_COMPILED") != "1"  # of servers and ranks, which compile for minutes
TIED = 1e-2  # logits nearer than this may come out either way: the two engines differ by 1e-4 or so in fp32
CLOSE = {"rtol": 2e-3, "atol": 2e-2}  # of scores, in standard deviations

SIXTEEN: list[Any] = [
    {"calm": 0.05},
    {"calm": 0.08},
    {"calm": -0.05},
    {"desperate": 0.1},
    {"happy": 0.05, "angry": -0.03},
    {"afraid": "ablate"},
    {"desperate": {"at_most": 0.5}, "calm": {"at_least": 1.0}},
    {"angry": {"set": 0.0}, "hostile": {"set": 0.0}},
    {"calm": 0.06, "on": "generated"},
    {"calm": 0.06, "on": "prompt"},
    {"afraid": {"add": 0.08, "when": "desperate > 0.5"}},
    {"afraid": {"add": 0.08, "when": "desperate > 0.5"}, "calm": 0.03},
    {"proud": {"set": 2.0, "on": "generated"}, "calm": {"add": 0.03, "on": "prompt"}},
    {"desperate": {"at_most": 0.0, "on": "prompt"}, "stressed": {"at_most": 0.0}, "happy": {"add": 0.04}},
    {"bored": {"add": -0.05, "at_least": -1.0}},
    None,
]
TEXTS = (
    "My deadline is in ten minutes, every test fails and I will lose my job.",
    "Write one line on rain.",
    "My cat died this morning. What should I do?",
    "Tell me how to boil an egg.",
)
ESSAY = "The old man sat by the window and watched the rain fall on the empty street below, and he thought of the years gone by. " * 6


@contextmanager
def started(**options: Any) -> Iterator[Any]:
    """An engine in fp32, so that its tokens can be compared; small budgets, so that prompts are computed in chunks."""
    from vllm import LLM

    settings: dict[str, Any] = {
        "model": models.local_path(NAME),
        "dtype": "float32",
        "max_model_len": 512,
        "max_num_seqs": 16,
        "max_num_batched_tokens": 64,
        "block_size": 32,  # the smallest there is on a CPU
        "additional_config": {"emovec": {"bank": NAME}},
        "seed": 0,
    }
    engine = LLM(**{**settings, **options})
    try:
        yield engine
    finally:
        engine.llm_engine.engine_core.shutdown()


def params(value: Any = None, scores: Any = None, **options: Any) -> Any:
    from vllm import SamplingParams

    extra = {key: given for key, given in (("emotion_bias", value), ("emotion_scores", scores)) if given is not None}
    return SamplingParams(**{"temperature": 0.0, "max_tokens": 12, "extra_args": extra or None, **options})


def generate(engine: Any, prompts: Sequence[Sequence[int]], given: Sequence[Any], **options: Any) -> list[Any]:
    outputs = engine.generate([{"prompt_token_ids": list(ids)} for ids in prompts], list(given), use_tqdm=False, **options)
    return [output.outputs[0] for output in outputs]


def preemptions(engine: Any) -> float:
    return sum(metric.value for metric in engine.get_metrics() if metric.name == "vllm:num_preemptions")


class Oracle:
    """A model in transformers, by default the same; every run is alone."""

    def __init__(self, model: Any = None, bank: Any = None) -> None:
        self.model, self.tokenizer = (model, None) if model else models.load_model(NAME, dtype=torch.float32, device="cpu")
        self.bank = bank or load_bank(NAME)
        self._known: dict[Any, Any] = {}

    def ids(self, text: str, *, chat: bool = True) -> list[int]:
        return models.encode(self.tokenizer, text, chat=chat)["input_ids"][0].tolist()

    def run(self, ids: Sequence[int], value: Any, tokens: int) -> tuple[list[int], torch.Tensor, Any]:
        """The tokens that are written, the logits that each was chosen from, and the reading."""
        key = (tuple(ids), repr(value), tokens)
        if key not in self._known:
            prompt = torch.tensor([list(ids)])
            options = {"max_new_tokens": tokens, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of strengths at which the model writes worse
                probe = attach(self.model, self.bank, steer=value, force=self.tokenizer is None)  # given models may be fine-tuned
            with probe:
                out = self.model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
            self._known[key] = (out.sequences[0, len(ids) :].tolist(), torch.cat(out.logits), probe[0])
        return self._known[key]

    def check(self, ids: Sequence[int], value: Any, output: Any, *, on: str = "generated", tokens: int = 12) -> int:
        """Hold an output against the run alone: tokens but for ties, and scores as far as the tokens are the same.

        Returns how many tokens were the same.
        """
        expected, logits, reading = self.run(ids, value, tokens)
        found = list(output.token_ids)
        same = next((i for i, pair in enumerate(zip(found, expected, strict=False)) if pair[0] != pair[1]), min(len(found), len(expected)))
        if same < min(len(found), len(expected)):
            gap = float(logits[same, expected[same]] - logits[same, found[same]])
            assert gap < TIED, f"{value}: token {same} is {found[same]} and not {expected[same]}, {gap:.3g} above it"
        else:
            assert len(found) == len(expected), f"{value}: {len(found)} tokens and not {len(expected)}"
        if output.reading is not None:
            first = {"generated": len(ids), "prompt": 0, "all": 0}[on]
            last = len(ids) if on == "prompt" else len(ids) + min(same, len(expected) - 1)
            assert output.reading.positions[0] == first
            mine = output.reading.scores[max(first, 1) - first : last - first]  # the first token of all means nothing
            theirs = reading.scores[max(first, 1) : last]
            assert len(mine) == len(theirs) > 0
            torch.testing.assert_close(mine, theirs, **CLOSE)
        return same


def profiles(path: Path, named: Mapping[str, Any]) -> str:
    lines = [line for name, value in named.items() for line in (f"[{name}]", *(f"{key} = {entry}" for key, entry in value.items()))]
    path.write_text("\n".join(lines))
    return str(path)
