"""An extraction from its plan to the bank: one pass over the stories for all layers, then short ones over neutral and ordinary text."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from emovec.bank import Bank, BankError, BankLayer, fingerprint, template_hash, unknown
from emovec.bank_file import as_json
from emovec.bank_layer import shown
from emovec.extraction import corpus, ranks, state
from emovec.extraction.blocks import Blocks
from emovec.extraction.calibrate import calibrate
from emovec.extraction.corpus import Source
from emovec.extraction.plain import Plain
from emovec.extraction.plan import Texts
from emovec.extraction.progress import Progress
from emovec.extraction.recipe import Recipe, contrast, derive
from emovec.extraction.sums import StoryMoments
from emovec.extraction.tokens import batches
from emovec.models import residual_width

BATCH_TOKENS = {"cpu": 2048, "cuda": 16384}
CHECKPOINT_SECONDS = 60.0
_SUMMED = ("skip", "skip_share", "format", "readers")  # of the recipe what the sums over stories depend on


@dataclass(frozen=True)
class Summary:
    """What an extraction has done: this process's tokens, the seconds they took, and the stories used and left out."""

    stories: int
    short: int
    tokens: int
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / max(self.seconds, 1e-9)


class Extraction:
    """An extraction that is planned when it is made and done by :meth:`run`; :func:`extract` does both.

    The arguments are those of :func:`extract`. ``plan`` says what there is to do, ``summary`` what was done.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        stories: Source | None = None,
        neutral: Source | None = None,
        ordinary: Source | None = None,
        *,
        recipe: Recipe | None = None,
        names: Sequence[str] | None = None,
        families: Mapping[str, Sequence[str]] | None = None,
        layers: Sequence[int] | None = None,
        read_layer: int | Sequence[int] | None = None,
        steer_layers: Sequence[int] | None = None,
        batch_tokens: int | None = None,
        out: str | Path | None = None,
        resume: str | Path | None = None,
        progress: bool = True,
        model_name: str | None = None,
        meta: Mapping[str, Any] | None = None,
    ) -> None:
        ranks.join()
        self.model, self.tokenizer = model, tokenizer
        self.recipe = Recipe() if recipe is None else recipe
        self.blocks = Blocks(model, layers)
        self.batch_tokens = BATCH_TOKENS.get(self.blocks.device.type, 4096) if batch_tokens is None else batch_tokens
        if self.batch_tokens < 1:
            raise ValueError(f"batch_tokens must be at least 1, got {self.batch_tokens}")
        read = () if read_layer is None else (read_layer,) if isinstance(read_layer, int) else tuple(sorted(set(read_layer)))
        for layer in (*read, *(steer_layers or ())):
            if layer not in self.blocks.layers:
                raise BankError(f"layer {layer} is not among those extracted, {list(self.blocks.layers)}")
        self._read_layer, self._steer_layers = (read[len(read) // 2] if read else None), steer_layers
        self._together = read if len(read) > 1 else ()
        self._meta, self._model_name = as_json(meta or {}), model_name
        self._out, self._resume = (None if path is None else Path(path) for path in (out, resume))
        for path in (self._out, self._resume):
            if path is not None and not path.absolute().parent.is_dir():
                raise FileNotFoundError(f"{path}: there is no folder {path.parent}")
        self._progress = progress and ranks.rank() == 0
        self._texts = Texts(tokenizer, self.recipe, stories, neutral, ordinary)
        self.plan = replace(self._texts.plan(names, self.blocks.max_tokens), layers=self.blocks.layers)
        self.plan = replace(self.plan, bytes=self._moments().bytes + self._plain({}).bytes)
        self._families = _families(self.plan.names, families)
        self._components: dict[int, int] = {}
        self.summary: Summary | None = None

    def _moments(self) -> StoryMoments:
        scatter = self.recipe.readers == "whitened"
        return StoryMoments(len(self.plan.names), residual_width(self.model), self.blocks.layers, scatter=scatter)

    def _plain(self, about: Mapping[int, Tensor]) -> Plain:
        return Plain(self.recipe, residual_width(self.model), self.blocks.layers, about)

    # --- the passes ---------------------------------------------------------------------------------------------------

    def estimate(self) -> float:
        """About how many seconds :meth:`run` will take: the first batch is run twice, the second time against the clock."""
        first = next(batches(self._texts.stories(self.plan.names), self.batch_tokens))
        for _ in range(2):
            started = time.monotonic()
            self.blocks.run(first)
            if self.blocks.device.type != "cpu":
                torch.accelerator.synchronize()
        return self.plan.tokens / ranks.world() * (time.monotonic() - started) / first.tokens

    def run(self) -> Bank:
        """Do it. In a group of processes each returns the whole bank.

        Raises:
            StateError: the file to resume from belongs to another extraction.
            BankError: a layer's activations are not finite.
        """
        started = time.monotonic()
        with Progress(-(-self.plan.tokens // ranks.world()), visible=self._progress) as progress:
            moments = self.over_stories(progress)
            layers = self._directions(moments, progress)
            layers, readout = calibrate(
                self.model,
                self.tokenizer,
                layers,
                [{"content": turns[0]["content"]} for turns in self._texts.prompts],
                [{"turns": turns} for turns in self._texts.dialogues],
                together=self._together,
                batch_tokens=self.batch_tokens,
                progress=progress,
            )
            done = progress.done
        self.summary = Summary(self.plan.stories, self.plan.short, done, time.monotonic() - started)
        bank = Bank(layers, self._read_layer, self._steer_layers, self._families, self._described(), readout=readout)
        if self._out is not None:
            if ranks.rank() == 0:
                bank.save(self._out)
            if self._resume is not None:
                self._state_path.unlink(missing_ok=True)
        return bank

    def over_stories(self, progress: Progress) -> StoryMoments:
        """The sums of the pass over the stories, from the state on if there is one."""
        moments = self._moments()
        before, tokens, tensors = (0, 0, {}) if self._resume is None else state.read(self._state_path, self._belongs_to())
        moments.load(tensors)
        progress.resume(tokens)
        written, done = time.monotonic(), before
        stream = islice(ranks.share(batches(self._texts.stories(self.plan.names), self.batch_tokens)), before, None)
        with self.blocks.shown_to(moments.see):
            for done, batch in enumerate(stream, start=before + 1):
                moments.take(batch)
                self.blocks.run(batch)
                tokens += batch.tokens
                progress.advance(batch.tokens)
                if self._resume is not None and time.monotonic() - written >= CHECKPOINT_SECONDS:
                    state.write(self._state_path, self._belongs_to(), done, tokens, moments.tensors)
                    written = time.monotonic()
        if self._resume is not None and done > before:
            state.write(self._state_path, self._belongs_to(), done, tokens, moments.tensors)
        moments.over_ranks()
        return moments

    @property
    def _state_path(self) -> Path:
        assert self._resume is not None
        return self._resume if ranks.world() == 1 else self._resume.with_name(f"{self._resume.name}.{ranks.rank()}")

    def _belongs_to(self) -> dict[str, Any]:
        """What has to be the same for a state to be continued."""
        return {
            "corpus": self.plan.digest,
            "names": list(self.plan.names),
            "model": fingerprint(self.model),
            "dtype": str(next(self.model.parameters()).dtype),
            "layers": list(self.blocks.layers),
            **{f"recipe.{name}": getattr(self.recipe, name) for name in _SUMMED},
            "batch_tokens": self.batch_tokens,
            "processes": ranks.world(),
            "rank": ranks.rank(),
        }

    def _directions(self, moments: StoryMoments, progress: Progress) -> list[BankLayer]:
        about = {layer: contrast(moments.at(f"sum.{layer}"), moments.at("count"))[1] for layer in self.blocks.layers}
        plain = self._plain(about).over(self.blocks, self._texts, self.batch_tokens, progress)
        layers = []
        for layer in self.blocks.layers:
            try:
                found = derive(
                    self.recipe,
                    moments.at(f"sum.{layer}"),
                    moments.at("count"),
                    moments.at(f"scatter.{layer}") if moments.scatter else None,
                    plain.neutral(layer),
                    plain.ordinary(layer),
                )
            except BankError as error:
                raise BankError(f"layer {layer}: {error}") from None
            self._components[layer] = found.components
            layers.append(
                BankLayer(
                    layer,
                    self.plan.names,
                    found.directions.float().cpu(),
                    readers=None if found.readers is None else found.readers.float().cpu(),
                    raw_norm=found.raw_norm.float().cpu(),
                    grand_mean=found.grand_mean.float().cpu(),
                )
            )
        return layers

    # --- what is said about it ----------------------------------------------------------------------------------------

    def _described(self) -> dict[str, Any]:
        template = template_hash(self.tokenizer)
        return {
            "model": self._model_name or _name(self.model),
            "fingerprint": fingerprint(self.model),
            "chat_template": template,
            "dialogue_format": "plain" if template is None else "chat template",
            "layer_convention": "output of decoder block L, counted from 0",
            "padding_side": "right",
            "corpus": {
                "digest": self.plan.digest,
                "stories": self.plan.stories,
                "short": self.plan.short,
                "tokens": self.plan.story_tokens,
                "stories_per_concept": list(self.plan.stories_per_concept),
                "neutral": {"digest": corpus.digest(self._texts.dialogues), "dialogues": len(self._texts.dialogues)},
                "ordinary": {"digest": corpus.digest(self._texts.prompts), "prompts": len(self._texts.prompts)},
            },
            "recipe": self.recipe.to_dict() | {"neutral_components": {str(layer): count for layer, count in self._components.items()}},
            "dtype": str(next(self.model.parameters()).dtype).removeprefix("torch."),
            "versions": {name: metadata.version(name) for name in ("emovec", "torch", "transformers")},
            **self._meta,
        }


def _families(names: Sequence[str], given: Mapping[str, Sequence[str]] | None) -> dict[str, list[str]]:
    """The given families, or of the paper's what is among the concepts."""
    if given is None:
        kept = {family: [name for name in members if name in names] for family, members in corpus.families().items()}
        return {family: members for family, members in kept.items() if members}
    for family, members in given.items():
        for name in members:
            if name not in names:
                raise BankError(f"family {shown(family)}: {unknown(name, names)}")
    return {family: list(members) for family, members in given.items()}


def _name(model: nn.Module) -> str | None:
    """The name a model was loaded by; of a path only the last part, since the rest says nothing elsewhere."""
    name = getattr(getattr(model, "config", None), "_name_or_path", None) or None
    return Path(name).name if name and Path(name).is_absolute() else name


def extract(
    model: nn.Module,
    tokenizer: Any,
    stories: Source | None = None,
    neutral: Source | None = None,
    ordinary: Source | None = None,
    *,
    names: Sequence[str] | None = None,
    families: Mapping[str, Sequence[str]] | None = None,
    layers: Sequence[int] | None = None,
    read_layer: int | Sequence[int] | None = None,
    steer_layers: Sequence[int] | None = None,
    batch_tokens: int | None = None,
    out: str | Path | None = None,
    resume: str | Path | None = None,
    progress: bool = True,
    model_name: str | None = None,
    meta: Mapping[str, Any] | None = None,
    **options: Any,
) -> Bank:
    """Make a bank of directions from labelled stories.

    One pass over the stories for all layers at once; no activation is kept, and memory does not grow with their number. The
    same inputs on the same machine with as many threads give the same bank, bit for bit. Under ``torchrun`` each process does its share.

    Args:
        model: a decoder of transformers, of any dtype and on any devices.
        tokenizer: its tokenizer; its padding side does not matter.
        stories: a JSON Lines or Parquet file, several, or objects that can be iterated over more than once, such as a list or
            a data set of ``datasets``; each with ``emotion`` and ``text``. They are read one at a time. Default: emovec's own.
        neutral: dialogues without feeling, objects with ``turns`` of ``role`` and ``content``. Default: emovec's own.
        ordinary: everyday prompts, objects with ``content``. Default: emovec's own.
        names: the concepts in the order of the bank; default: as they first occur in the stories.
        families: family -> its concepts; default: the paper's, as far as their members are among the concepts.
        layers: decoder blocks, counted from 0; default: all.
        read_layer: the layer to read at, among ``layers``, or several whose mean z-score is read; default as for
            :class:`emovec.bank.Bank`.
        steer_layers: the layers to steer at; likewise.
        batch_tokens: tokens in a batch, padding included; default: 2,048 on a CPU, 16,384 on a GPU.
        out: a file for the bank; under ``torchrun`` the first process writes it.
        resume: a file for the state, written every minute. If it exists, the pass goes on from there. It is removed once
            the bank is in ``out``.
        progress: show a bar with an estimate.
        model_name: what the bank calls the model; default: the name that it was loaded by.
        meta: more to record in the bank, such as the evidence for the layers.
        options: fields of :class:`Recipe`, such as ``skip``, ``format``, ``denoise``, ``readers``.

    Raises:
        CorpusError: a bad line, named; a concept without stories that are long enough; a text too long for the model.
        BankError: a layer that does not exist; activations that are not finite.
        StateError: the state to resume from belongs to another extraction.
    """
    job = Extraction(
        model,
        tokenizer,
        stories,
        neutral,
        ordinary,
        recipe=Recipe(**options),
        names=names,
        families=families,
        layers=layers,
        read_layer=read_layer,
        steer_layers=steer_layers,
        batch_tokens=batch_tokens,
        out=out,
        resume=resume,
        progress=progress,
        model_name=model_name,
        meta=meta,
    )
    return job.run()
