"""What one model's state is at the same place of many prompts, read through ``emovec.attach``."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from emovec.bank import Bank, BankLayer
from emovec.bank_layer import shown
from emovec.extraction.blocks import Blocks
from emovec.extraction.corpus import Turns
from emovec.extraction.tokens import PROMPT, Batch, Tokens, prompt_tokens
from emovec.hook import Probe, attach
from emovec.models import decoder_layers, unwrapped
from emovec.tap import stream_of

RANDOM_DIRECTIONS = 256


@dataclass(frozen=True)
class Measured:
    """One model's state, prompt by prompt, in fp64 on the CPU.

    Attributes:
        scores: [n, K], one row for each prompt.
        random: [n, L, R], projections on R random directions at each of the L layers that are read; None if not asked for.
        words: [W, L, R], the same over the words of all prompts.
        norms: layer -> median norm of the stream over the words of the prompts, as the model has it.
        layers: where was read, and ``unit`` of the scores, in words.
    """

    scores: Tensor
    random: Tensor | None
    words: Tensor | None
    norms: dict[int, float]
    layers: tuple[int, ...]
    unit: str


class Reader:
    """A model, its tokenizer and the prompts, ready to be read.

    Args:
        model: a decoder of transformers, in evaluation mode.
        tokenizer: a fast tokenizer.
        template: the chat template to write the prompts in; None: plainly.
        prompts: dialogues of one user turn.
        layers: those whose norms are measured, the bank's.
        batch_size: prompts in a forward pass.
    """

    def __init__(
        self, model: nn.Module, tokenizer: Any, template: Any, prompts: Sequence[Turns], layers: Sequence[int], batch_size: int
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        written = tokenizer
        if tokenizer.chat_template != template:
            written = copy.copy(tokenizer)
            written.chat_template = template
        self.texts = [prompt_tokens(written, turns) for turns in prompts]
        self._blocks = Blocks(model, layers)
        self._batch_size = batch_size

    def room(self, new: int, who: str) -> None:
        """Raise for a prompt that leaves no room for ``new`` tokens."""
        most = self._blocks.max_tokens
        for text in self.texts:
            if most is not None and len(text.ids) + new > most:
                start = shown(self.tokenizer.decode(text.ids, skip_special_tokens=True)[-80:])
                raise ValueError(
                    f"a prompt of {len(text.ids)} tokens with {new} of an answer is longer than the {most} that {who} takes: ...{start}"
                )

    @torch.inference_mode()
    def norms(self) -> dict[int, float]:
        """Layer -> the median norm of the stream over the words of the prompts."""
        found: dict[int, list[Tensor]] = {layer: [] for layer in self._blocks.layers}
        used = torch.empty(0)

        def see(layer: int, hidden: Tensor) -> None:
            found[layer].append(hidden[used.to(hidden.device)].float().norm(dim=-1).cpu())

        with self._blocks.shown_to(see):
            for rows in self._batches():
                batch = Batch.of([self.texts[row] for row in rows])
                used = batch.kinds == PROMPT
                self._blocks.run(batch)
        return {layer: float(torch.cat(values).double().median()) for layer, values in found.items()}

    def read(
        self,
        bank: Bank,
        on: str,
        *,
        scale: Mapping[int, float] | None = None,
        norms: dict[int, float],
        random: bool,
        force: bool,
        new: int = 0,
        given: Sequence[Sequence[int]] | None = None,
    ) -> Measured:
        """Read every prompt.

        Args:
            bank: whose scores.
            on: "prompt", "turn_start" or "answer".
            scale: layer -> what the stream is multiplied by before it is read; the model goes on with its own.
            norms: kept in the result.
            random: whether to project on random directions too.
            force: as for ``attach``.
            new: the most tokens of an answer of the model's own.
            given: instead, for each prompt the tokens of an answer.
        """
        scores: list[Tensor] = [torch.empty(0)] * len(self.texts)
        along: list[Tensor] = [torch.empty(0)] * len(self.texts)
        words: list[Tensor] = []
        layers, unit = bank.read_layers, ""
        with self._attached(bank, scale or {}, random=random, force=force) as probes:
            for rows in self._batches():
                lengths = self._run(rows, on, new, given)
                for place, (row, length) in enumerate(zip(rows, lengths, strict=True)):
                    readings = [probe[place] for probe in probes]
                    layers, unit = readings[0].read_layers, readings[0].unit
                    where = _places(self.texts[row], on, length)
                    scores[row] = readings[0].scores[where].double().cpu().mean(0)
                    if not bool(scores[row].isfinite().all()):
                        start = shown(self.tokenizer.decode(self.texts[row].ids, skip_special_tokens=True)[-80:])
                        raise ValueError(f"scores are not finite on the prompt ...{start}; try bfloat16 or float32")
                    if random:
                        projected = torch.stack([readings[1].at(layer).double().cpu() for layer in layers], 1)
                        along[row] = projected[where].mean(0)
                        words.append(projected[_places(self.texts[row], "prompt", 0)])
        return Measured(
            scores=torch.stack(scores),
            random=torch.stack(along) if random else None,
            words=torch.cat(words) if random else None,
            norms=norms,
            layers=layers,
            unit=unit,
        )

    def answers(self, new: int) -> list[list[int]]:
        """For each prompt the tokens of the model's own greedy answer, at most ``new``."""
        found: list[list[int]] = [[]] * len(self.texts)
        for rows in self._batches():
            for row, answer in zip(rows, self._generate(rows, new, None), strict=True):
                found[row] = answer
        return found

    # --- inside -------------------------------------------------------------------------------------------------------

    def _batches(self) -> Iterator[list[int]]:
        """Prompts of like length; which go together does not depend on their order."""
        order = sorted(range(len(self.texts)), key=lambda row: (len(self.texts[row].ids), self.texts[row].ids))
        for start in range(0, len(order), self._batch_size):
            yield order[start : start + self._batch_size]

    @contextmanager
    def _attached(self, bank: Bank, scale: Mapping[int, float], *, random: bool, force: bool) -> Iterator[list[Probe]]:
        blocks = decoder_layers(unwrapped(self.model))
        lenses = {index: _Lens(scale.get(index, 1.0)) for index in bank.layers}
        with ExitStack() as stack:
            for index, lens in lenses.items():
                stack.callback(blocks[index].register_forward_hook(lens.before).remove)
            with warnings.catch_warnings():
                if force or random:  # of the other model that is meant to be read, and of random directions, which belong to none
                    warnings.filterwarnings("ignore", message="the bank was made for|the bank carries no fingerprint")
                probes = [stack.enter_context(attach(self.model, bank, tokenizer=self.tokenizer, force=force))]
                if random:
                    probes.append(stack.enter_context(attach(self.model, _random_bank(bank))))
            for index, lens in lenses.items():
                stack.callback(blocks[index].register_forward_hook(lens.after).remove)
            yield probes

    def _run(self, rows: Sequence[int], on: str, new: int, given: Sequence[Sequence[int]] | None) -> list[int]:
        """One batch through the model; the lengths of the answers."""
        if on == "answer":
            return [len(answer) for answer in self._generate(rows, new, None if given is None else [given[row] for row in rows])]
        self._blocks.run(Batch.of([self.texts[row] for row in rows]))
        return [0] * len(rows)

    @torch.inference_mode()
    def _generate(self, rows: Sequence[int], new: int, given: Sequence[Sequence[int]] | None) -> list[list[int]]:
        """Answers to a batch, its own or ``given``. One token more is chosen than is kept: the last is not run through the model."""
        model: Any = self.model
        ids = [self.texts[row].ids for row in rows]
        width, device = max(map(len, ids)), self._blocks.device
        padded = torch.tensor([[0] * (width - len(text)) + text for text in ids], device=device)
        mask = torch.tensor([[0] * (width - len(text)) + [1] * len(text) for text in ids], device=device)
        inner: Any = unwrapped(model)
        ends = inner.generation_config.eos_token_id
        ending = [] if ends is None else list(ends) if isinstance(ends, list | tuple) else [int(ends)]
        for answer in given or ():
            if set(answer) & set(ending):
                raise ValueError(f"a given answer holds a token that ends it: {shown(self.tokenizer.decode(answer))}")
        most = new if given is None else max(map(len, given))
        forced = [] if given is None else [_Forced(given, width, ending[0] if ending else 0)]
        options = {"do_sample": False, "num_beams": 1, "max_new_tokens": most + 1, "pad_token_id": ending[0] if ending else 0}
        # an answer has one token at least, or there would be nothing to read
        options |= {"logits_processor": forced} if forced else {"min_new_tokens": 1}
        out = model.generate(input_ids=padded, attention_mask=mask, **options)
        if given is not None:
            return [list(answer) for answer in given]
        return [_until(row[:most], ending) for row in out[:, width:].tolist()]


class _Lens:
    """Shows the hooks that are registered between its two the stream in fp32, ``ratio`` times as long; the model never sees it."""

    def __init__(self, ratio: float) -> None:
        self._ratio = ratio
        self._kept: Any = None

    def before(self, module: nn.Module, args: Any, output: Any) -> Tensor:
        self._kept = output
        hidden = stream_of(output, module)
        return hidden.float() * self._ratio

    def after(self, module: nn.Module, args: Any, output: Any) -> Any:
        kept, self._kept = self._kept, None
        return kept


class _Forced:
    """A logits processor that lets each sequence of a batch write nothing but its given answer, and then ``filler``."""

    def __init__(self, answers: Sequence[Sequence[int]], width: int, filler: int) -> None:
        self._answers, self._width, self._filler = answers, width, filler

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        step = ids.shape[1] - self._width
        scores = torch.full_like(scores, -torch.inf)
        for row, answer in enumerate(self._answers):
            scores[row, answer[step] if step < len(answer) else self._filler] = 0.0
        return scores


def _until(tokens: list[int], ending: Sequence[int]) -> list[int]:
    end = next((place for place, token in enumerate(tokens) if token in ending), len(tokens))
    return tokens[:end]


def _places(text: Tokens, on: str, length: int) -> list[int]:
    """The positions that are read; never the first of all, an attention sink."""
    end = len(text.ids)
    if on == "prompt":
        return [place for place, kind in enumerate(text.kinds) if kind == PROMPT and place > 0]
    return [end - 1] if on == "turn_start" else list(range(end, end + length))


def _random_bank(bank: Bank) -> Bank:
    """Random directions, the same at each layer that ``bank`` reads; uncalibrated, so that their scores are projections."""
    directions = torch.randn(RANDOM_DIRECTIONS, bank.width, generator=torch.Generator().manual_seed(0))
    return Bank([BankLayer.from_directions(directions, index=layer) for layer in bank.read_layers])


def random_shifts(a: Measured, b: Measured) -> Tensor | None:
    """[R]: how far random directions moved, in units of their spread over the words of A's prompts.

    As scores are: standardised at each layer, averaged over the layers that are read, and standardised again.
    """
    if a.random is None or b.random is None or a.words is None:
        return None
    spread = a.words.std(0)
    together = (a.words / spread).mean(1).std(0)
    shifts: Tensor = ((b.random - a.random).mean(0) / spread).mean(0) / together
    return shifts
