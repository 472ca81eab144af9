"""The post-training shift: what two models feel like from inside on the same prompts. ``docs/compare.md`` describes it.

>>> from emovec.comparison import compare
>>> found = compare(before, after, tokenizer, tokenizer, bank)      # doctest: +SKIP
>>> found.up(5), found.families, found.axes["valence"]              # doctest: +SKIP
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

from torch import nn

from emovec.bank import Bank, BankError, fingerprint
from emovec.bank_layer import shown
from emovec.comparison.alarm import AXES, Alarm, AlarmError
from emovec.comparison.reading import Reader, random_shifts
from emovec.comparison.result import Comparison
from emovec.comparison.shifts import Estimate, Shift
from emovec.extraction import corpus
from emovec.extraction.corpus import Source
from emovec.fingerprint import differences, template_hash

__all__ = ["ANSWERS", "AXES", "POSITIONS", "Alarm", "AlarmError", "Comparison", "Estimate", "Shift", "compare"]

POSITIONS = ("prompt", "turn_start", "answer")
"""Where models can be compared; the first is the default."""

ANSWERS = ("own", "same")
"""Whose answers can be read, where they are not given."""

FEWEST = 8
"""Prompts of a kind, below which an interval means nothing."""


def compare(
    model_a: nn.Module,
    model_b: nn.Module,
    tokenizer_a: Any,
    tokenizer_b: Any,
    bank_a: Bank,
    bank_b: Bank | None = None,
    prompts: Source | None = None,
    challenging: Source | None = None,
    *,
    on: str = "prompt",
    answers: str | Sequence[str] = "own",
    max_new_tokens: int = 24,
    match_norms: bool = True,
    batch_size: int = 16,
    resamples: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
    force: bool = False,
) -> Comparison:
    """Give both models the same prompts and read both at the same place: how far is each concept higher in B than in A?

    Args:
        model_a: the model from before, a decoder of transformers in evaluation mode.
        model_b: the model from after, on the same device or another.
        tokenizer_a: A's tokenizer, a fast one. Its chat template writes the prompts for both; B's if A's has none.
        tokenizer_b: B's.
        bank_a: made for A. Without ``bank_b`` it reads both, in units of A's baseline.
        bank_b: made for B: each model is read with its own, in units of its own baseline. Needed for models of other shapes.
        prompts: ordinary prompts, objects with ``content``; default: those that come with emovec.
        challenging: prompts that put a model under strain; default: likewise; ``()`` for none.
        on: "prompt": the mean over the user's words; "turn_start": the last token before the answer; "answer": the mean
            over the tokens of an answer.
        answers: with ``on="answer"``, "own": each model's own greedy answer; "same": A's greedy answer for both; or a text
            for each prompt, the ordinary ones first, for both.
        max_new_tokens: of an answer that a model writes.
        match_norms: read B's stream at A's length, layer by layer, so that a longer stream is no shift. With ``bank_b`` the
            baselines see to that.
        batch_size: prompts in a forward pass. It changes the last digits only.
        resamples: of the bootstrap over prompts, and sign flips.
        confidence: of the intervals.
        seed: of both.
        force: use banks that were made for other models than A and B.

    Returns:
        Shifts with intervals, of concepts, families, valence and arousal.

    Raises:
        BankError: a bank that is not the model's, or models of other shapes without ``bank_b``.
        CorpusError: a line of the prompts that is wrong.
        ValueError: naming the argument; fewer than 8 prompts of a kind; a prompt that is too long.
    """
    given = list(answers) if not isinstance(answers, str) else None
    _check(on, answers, max_new_tokens, batch_size, resamples, confidence)
    ordinary = list(corpus.prompts(corpus.shipped("ordinary.jsonl") if prompts is None else prompts)())
    hard = list(corpus.prompts(corpus.shipped("challenging.jsonl") if challenging is None else challenging)())
    for what, found in (("prompts", ordinary), ("challenging prompts", hard)):
        if len(found) < FEWEST and (found or what == "prompts"):
            raise ValueError(f"an interval needs at least {FEWEST} {what}, got {len(found)}")
    if given is not None and len(given) != len(ordinary) + len(hard):
        raise ValueError(f"{len(given)} answers for {len(ordinary) + len(hard)} prompts")
    names = _names(bank_a, bank_b)
    bank_a.check(model_a, tokenizer_a, force=force)
    if bank_b is None:
        _check_shapes(model_a, model_b)
    else:
        bank_b.check(model_b, tokenizer_b, force=force)

    template = tokenizer_b.chat_template if tokenizer_a.chat_template is None else tokenizer_a.chat_template
    if None not in (tokenizer_a.chat_template, tokenizer_b.chat_template) and template_hash(tokenizer_a) != template_hash(tokenizer_b):
        warnings.warn("the tokenizers' chat templates differ; A's writes the prompts for both models", stacklevel=2)
    turns = [*ordinary, *hard]
    reader_a = Reader(model_a, tokenizer_a, template, turns, bank_a.layers, batch_size)
    reader_b = Reader(model_b, tokenizer_b, template, turns, (bank_b or bank_a).layers, batch_size)
    if on == "answer" and answers == "same":
        reader_a.room(max_new_tokens + 1, "A")
        given = [tokenizer_a.decode(tokens, skip_special_tokens=True) for tokens in reader_a.answers(max_new_tokens)]
    readers, tokenizers = (reader_a, reader_b), (tokenizer_a, tokenizer_b)
    forced = [None if given is None else _tokens(tokenizer, given) for tokenizer in tokenizers]
    for reader, tokens, who in zip(readers, forced, "AB", strict=True):
        new = max_new_tokens + 1 if tokens is None else max(map(len, tokens)) + 1
        reader.room(new if on == "answer" else 0, who)

    norms_a, norms_b = (reader.norms() for reader in readers)
    same = bank_b is None
    options: dict[str, Any] = {"random": same, "new": max_new_tokens}
    a = reader_a.read(bank_a, on, norms=norms_a, given=forced[0], force=force, **options)
    if bank_b is None:  # the one place where a bank reads a model that it was not made for
        scale = {layer: norms_a[layer] / norms_b[layer] for layer in bank_a.layers} if match_norms else None
        b = reader_b.read(bank_a, on, norms=norms_b, given=forced[1], force=True, scale=scale, **options)
    else:
        b = reader_b.read(bank_b, on, norms=norms_b, given=forced[1], force=force, **options)
    rows = [[bank.names.index(name) for name in names] for bank in (bank_a, bank_b or bank_a)]
    written = None if on != "answer" else answers if isinstance(answers, str) else "given"
    facts = {
        "on": on,
        "answers": written,
        "layers": {"a": list(a.layers), "b": list(b.layers)},
        "bank": "A's for both" if same else "each model's own",
        "unit": f"{a.unit} of {'A' if same else 'each model'}",
        "norms": {who: {str(layer): norm for layer, norm in readout.norms.items()} for who, readout in (("a", a), ("b", b))},
        "norms_matched": same and match_norms,
    }
    return Comparison(
        names,
        bank_a.families,
        a.scores[:, rows[0]],
        b.scores[:, rows[1]],
        [turn[0]["content"] for turn in turns],
        [False] * len(ordinary) + [True] * len(hard),
        random=random_shifts(a, b),
        facts=facts,
        resamples=resamples,
        confidence=confidence,
        seed=seed,
    )


def _check(on: str, answers: str | Sequence[str], max_new_tokens: int, batch_size: int, resamples: int, confidence: float) -> None:
    if on not in POSITIONS:
        raise ValueError(f"on must be one of {', '.join(POSITIONS)}, got {shown(on)}")
    if isinstance(answers, str) and answers not in ANSWERS:
        raise ValueError(f"answers must be {', '.join(ANSWERS)} or a text for each prompt, got {shown(answers)}")
    if answers != "own" and on != "answer":
        raise ValueError(f"answers={shown(answers)} is about on='answer', but on is {on!r}")
    for name, value, least in (("max_new_tokens", max_new_tokens, 1), ("batch_size", batch_size, 1), ("resamples", resamples, 100)):
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ValueError(f"{name} must be at least {least}, got {shown(value)}")
    if not 0.5 <= confidence < 1:
        raise ValueError(f"confidence must be from 0.5 to below 1, got {shown(confidence)}")


def _names(bank_a: Bank, bank_b: Bank | None) -> list[str]:
    """The concepts that can be compared: those of both banks, with a baseline."""
    names = [name for name in bank_a.names if bank_b is None or name in bank_b.names]
    if not names:
        raise BankError("the two banks have no concept in common")
    for bank in (bank_a, bank_b):
        if bank is not None:
            raw = {name for layer in bank.values() for name in layer.uncalibrated}
            together = {} if bank.readout is None else bank.readout.baselines
            missing = [baseline.mean.isnan().tolist() for baseline in together.values()]
            raw |= {name for column in missing for name, lacks in zip(bank.names, column, strict=True) if lacks}
            if lacking := [name for name in names if name in raw]:
                raise BankError(
                    f"concepts without a baseline cannot be compared, their scores have no unit: {shown(lacking)}; see Bank.subset"
                )
    return names


def _check_shapes(model_a: nn.Module, model_b: nn.Module) -> None:
    """Refuse a B that A's directions mean nothing in."""
    known = fingerprint(model_a)
    found = fingerprint(model_b, like=known)
    words = {"model_type": "model type", "d": "residual width", "layers": "number of layers"}
    different = [f"{word}: {known[key]} and {found[key]}" for key, word in words.items() if known[key] != found[key]]
    if different:
        raise BankError(f"B is not a model of A's shape ({'; '.join(different)}), so A's bank cannot read it; give B a bank of its own")
    for difference in differences(known, found):
        if difference.endswith("(another model)"):
            warnings.warn(f"B does not look like a descendant of A, so A's directions may mean nothing in it: {difference}", stacklevel=3)


def _tokens(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    found: list[list[int]] = [list(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]
    for text, tokens in zip(texts, found, strict=True):
        if not tokens:
            raise ValueError(f"an answer without a token cannot be read: {shown(text)}")
    return found
