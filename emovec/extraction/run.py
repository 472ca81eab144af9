"""An extraction from its plan to the bank: one pass over the stories for all layers, then two short ones over neutral and ordinary text."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from itertools import islice
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from emovec.bank import Bank, BankError, BankLayer, fingerprint, template_hash, unknown
from emovec.extraction import corpus, ranks, recipe, state
from emovec.extraction.blocks import Blocks
from emovec.extraction.calibrate import calibrate, texts_of
from emovec.extraction.corpus import CorpusError, Source, Story
from emovec.extraction.progress import Progress
from emovec.extraction.recipe import Recipe
from emovec.extraction.sums import NeutralMoments, StoryMoments
from emovec.extraction.tokens import UNUSED, Tokens, batches, dialogue_tokens, story_tokens
from emovec.models import residual_width

BATCH_TOKENS = {"cpu": 2048, "cuda": 16384}
CHECKPOINT_SECONDS = 60.0


@dataclass(frozen=True)
class Plan:
    """What an extraction will do, known before it starts.

    Attributes:
        names: the concepts.
        stories: stories that are used.
        short: stories left out because they have no token after the skip.
        story_tokens: tokens of the stories that are used.
        tokens: tokens of all passes.
        layers: the layers extracted.
        bytes: memory for the sums, on the model's devices.
        digest: a hash of all stories' tokens and concepts.
    """

    names: tuple[str, ...]
    stories: int
    short: int
    story_tokens: int
    tokens: int
    layers: tuple[int, ...]
    bytes: int
    digest: str


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
        read_layer: int | None = None,
        steer_layers: Sequence[int] | None = None,
        batch_tokens: int | None = None,
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
        for layer in (*(() if read_layer is None else (read_layer,)), *(steer_layers or ())):
            if layer not in self.blocks.layers:
                raise BankError(f"layer {layer} is not among those extracted, {list(self.blocks.layers)}")
        self._read_layer, self._steer_layers = read_layer, steer_layers
        self._stories = corpus.stories(corpus.shipped("stories.jsonl") if stories is None else stories)
        self._neutral = corpus.shipped("neutral.jsonl") if neutral is None else neutral
        self._ordinary = corpus.shipped("ordinary.jsonl") if ordinary is None else ordinary
        self._families, self._meta, self._model_name = families, dict(meta or {}), model_name
        self._resume = None if resume is None else Path(resume)
        self._progress = progress and ranks.rank() == 0
        self._dialogues = list(corpus.dialogues(self._neutral)())
        self._prompts = list(corpus.prompts(self._ordinary)())
        self.plan, self._counts = self._planned(names)
        self.summary: Summary | None = None

    # --- before -----------------------------------------------------------------------------------------------------

    def _planned(self, names: Sequence[str] | None) -> tuple[Plan, Counter[str]]:
        """Read everything once, so that what is wrong with it is known before anything is computed or written."""
        used: Counter[str] = Counter()
        short: Counter[str] = Counter()
        tokens = 0

        def said() -> Iterator[Any]:
            nonlocal tokens
            for number, story in enumerate(self._stories()):
                if names is not None and story.emotion not in names:
                    raise CorpusError(f"story {number}: {unknown(story.emotion, names)}")
                ids = self._tokens(story, 0)
                self._check_length(ids, f"story {number}")
                if _usable(ids):
                    used[story.emotion] += 1
                    tokens += len(ids.ids)
                else:
                    short[story.emotion] += 1
                yield story.emotion, ids.ids

        digest = corpus.digest(said())
        found = tuple(dict.fromkeys([*used, *short]) if names is None else names)
        for name in found:
            if not used[name]:
                why = f"its {short[name]} stories are no longer than the {self.recipe.skip} tokens skipped" if short[name] else "it has no stories"
                raise CorpusError(f"empty emotion {name!r}: {why}")
        if len(found) < 2:
            raise CorpusError(f"a contrast needs two emotions at least, got {list(found)}")
        extra = 0
        for text in self._calibration_texts():
            self._check_length(text, "a prompt or dialogue")
            extra += len(text.ids)
        extra += sum(len(text.ids) for text in self._neutral_texts()) if self.recipe.denoise else 0
        size = self._moments(len(found)).bytes + (self._neutral_moments({}).bytes if self.recipe.denoise else 0)
        plan = Plan(found, used.total(), short.total(), tokens, tokens + extra, self.blocks.layers, size, digest)
        return plan, used

    def _check_length(self, text: Tokens, what: str) -> None:
        limit = self.blocks.max_tokens
        if limit is not None and len(text.ids) > limit:
            raise CorpusError(f"{what} has {len(text.ids)} tokens, more than the {limit} that the model takes")

    def _tokens(self, story: Story, label: int) -> Tokens:
        return story_tokens(self.tokenizer, story.text, skip=self.recipe.skip, chat=self.recipe.format == "chat", label=label)

    def _story_texts(self) -> Iterator[Tokens]:
        label = {name: index for index, name in enumerate(self.plan.names)}
        return filter(_usable, (self._tokens(story, label[story.emotion]) for story in self._stories()))

    def _neutral_texts(self) -> Iterable[Tokens]:
        return (dialogue_tokens(self.tokenizer, turns) for turns in self._dialogues)

    def _calibration_texts(self) -> Iterable[Tokens]:
        return texts_of(self.tokenizer, self._prompts, self._dialogues)

    def _moments(self, concepts: int) -> StoryMoments:
        return StoryMoments(concepts, residual_width(self.model), self.blocks.layers, scatter=self.recipe.readers == "whitened")

    def _neutral_moments(self, about: Mapping[int, Tensor]) -> NeutralMoments:
        return NeutralMoments(residual_width(self.model), self.blocks.layers, about, dialogues=self.recipe.denoise == "dialogues")

    # --- the passes ---------------------------------------------------------------------------------------------------

    def run(self) -> Bank:
        """Do it. In a group of processes each returns the whole bank.

        Raises:
            StateError: the file to resume from belongs to another extraction.
            BankError: a layer's activations are not finite.
        """
        started = time.monotonic()
        with Progress(-(-self.plan.tokens // ranks.world()), visible=self._progress) as progress:
            moments = self._pass_over_stories(progress)
            layers = self._directions(moments, progress)
            layers = calibrate(
                self.model,
                self.tokenizer,
                layers,
                [{"content": turns[0]["content"]} for turns in self._prompts],
                [{"turns": turns} for turns in self._dialogues],
                batch_tokens=self.batch_tokens,
                progress=progress,
            )
            done = progress.done
        self.summary = Summary(self.plan.stories, self.plan.short, done, time.monotonic() - started)
        bank = Bank(layers, self._read_layer, self._steer_layers, self._families_of(), self._described(layers))
        if self._resume is not None:
            self._state_path.unlink(missing_ok=True)
        return bank

    def _pass_over_stories(self, progress: Progress) -> StoryMoments:
        moments = self._moments(len(self.plan.names))
        done, tokens, tensors = (0, 0, {}) if self._resume is None else state.read(self._state_path, self._belongs_to())
        moments.load(tensors)
        progress.resume(tokens)
        written = time.monotonic()
        stream = islice(ranks.share(batches(self._story_texts(), self.batch_tokens)), done, None)
        with self.blocks.shown_to(moments.see):
            for done, batch in enumerate(stream, start=done + 1):
                moments.take(batch)
                self.blocks.run(batch)
                tokens += batch.tokens
                progress.advance(batch.tokens)
                if self._resume is not None and time.monotonic() - written >= CHECKPOINT_SECONDS:
                    state.write(self._state_path, self._belongs_to(), done, tokens, moments.tensors)
                    written = time.monotonic()
        if self._resume is not None:
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
            "recipe": self.recipe.to_dict(),
            "batch_tokens": self.batch_tokens,
            "processes": ranks.world(),
            "rank": ranks.rank(),
        }

    def _directions(self, moments: StoryMoments, progress: Progress) -> list[BankLayer]:
        count = moments.at("count")
        found = {layer: recipe.contrast(moments.at(f"sum.{layer}"), count) for layer in self.blocks.layers}
        for layer, (differences, _) in found.items():
            if not bool(differences.isfinite().all()):
                raise BankError(f"layer {layer}: activations are not finite; try bfloat16 or float32")
        neutral = self._neutral_moments({layer: grand for layer, (_, grand) in found.items()})
        if self.recipe.denoise:
            with self.blocks.shown_to(neutral.see):
                for batch in ranks.share(batches(self._neutral_texts(), self.batch_tokens)):
                    neutral.take(batch)
                    self.blocks.run(batch)
                    progress.advance(batch.tokens)
            neutral.over_ranks()
        layers = []
        self._components: dict[int, int] = {}
        for layer, (differences, grand) in found.items():
            rows = differences
            if self.recipe.denoise:
                components = recipe.leading(neutral.covariance(layer), self.recipe.variance)
                self._components[layer] = len(components)
                rows = recipe.project_out(rows, components)
            directions, norm = recipe.unit(rows)
            readers = None
            if self.recipe.readers == "whitened":
                covariance = recipe.within(moments.at(f"scatter.{layer}"), moments.at(f"sum.{layer}"), count)
                readers = recipe.whiten(directions, covariance, self.recipe.shrinkage)
            layers.append(
                BankLayer(
                    layer,
                    self.plan.names,
                    directions.float().cpu(),
                    readers=None if readers is None else readers.float().cpu(),
                    raw_norm=norm.float().cpu(),
                    grand_mean=grand.float().cpu(),
                )
            )
        return layers

    # --- what is said about it ----------------------------------------------------------------------------------------

    def _families_of(self) -> dict[str, list[str]]:
        """The given families, or of the paper's what is among the concepts."""
        if self._families is not None:
            return {family: list(members) for family, members in self._families.items()}
        known = set(self.plan.names)
        kept = {family: [name for name in members if name in known] for family, members in corpus.families().items()}
        return {family: members for family, members in kept.items() if members}

    def _described(self, layers: Sequence[BankLayer]) -> dict[str, Any]:
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
                "stories_per_concept": [min(self._counts.values()), max(self._counts.values())],
                "neutral": {"digest": corpus.digest(self._dialogues), "dialogues": len(self._dialogues)},
                "ordinary": {"digest": corpus.digest(self._prompts), "prompts": len(self._prompts)},
            },
            "recipe": self.recipe.to_dict() | {"neutral_components": {str(layer): count for layer, count in self._components.items()}},
            "dtype": str(next(self.model.parameters()).dtype).removeprefix("torch."),
            "versions": {name: metadata.version(name) for name in ("emovec", "torch", "transformers")},
            **self._meta,
        }


def _usable(text: Tokens) -> bool:
    """Whether a story has a token after the skip."""
    return any(kind != UNUSED for kind in text.kinds)


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
    read_layer: int | None = None,
    steer_layers: Sequence[int] | None = None,
    batch_tokens: int | None = None,
    resume: str | Path | None = None,
    progress: bool = True,
    model_name: str | None = None,
    meta: Mapping[str, Any] | None = None,
    **options: Any,
) -> Bank:
    """Make a bank of directions from labelled stories.

    One pass over the stories for all layers at once; no activation is kept, and memory does not grow with their number. The
    same inputs on the same machine give the same bank, bit for bit. Under ``torchrun`` each process does its share.

    Args:
        model: a decoder of transformers, of any dtype and on any devices.
        tokenizer: its tokenizer; its padding side does not matter.
        stories: a JSON Lines file, several, or objects, each with ``emotion`` and ``text``. Default: emovec's own.
        neutral: dialogues without feeling, objects with ``turns`` of ``role`` and ``content``. Default: emovec's own.
        ordinary: everyday prompts, objects with ``content``. Default: emovec's own.
        names: the concepts in the order of the bank; default: as they first occur in the stories.
        families: family -> its concepts; default: the paper's, as far as their members are among the concepts.
        layers: decoder blocks, counted from 0; default: all.
        read_layer, steer_layers: among ``layers``; defaults as for :class:`emovec.bank.Bank`.
        batch_tokens: tokens in a batch, padding included; default: 2,048 on a CPU, 16,384 on a GPU.
        resume: a file for the state, written every minute. If it exists, the pass goes on from there; removed at the end.
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
        resume=resume,
        progress=progress,
        model_name=model_name,
        meta=meta,
    )
    return job.run()
