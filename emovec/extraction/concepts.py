"""New concepts for a bank that there is: from few stories to directions, readers and baselines at all its layers, with evidence."""

from __future__ import annotations

import copy
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from emovec.bank import Bank, BankError, BankLayer
from emovec.bank_file import as_json
from emovec.bank_layer import check_names
from emovec.extraction import corpus, ranks
from emovec.extraction.blocks import Blocks
from emovec.extraction.calibrate import calibrate
from emovec.extraction.corpus import CorpusError, Source, Story
from emovec.extraction.differences import Differences
from emovec.extraction.evidence import Evidence, judged, nearest
from emovec.extraction.plain import Plain
from emovec.extraction.plan import Texts, usable
from emovec.extraction.progress import Progress
from emovec.extraction.recipe import Recipe, Whiten, contrast, leading, project_out, unit, whitening, within
from emovec.extraction.run import BATCH_TOKENS, Extraction
from emovec.extraction.sums import StoryMoments
from emovec.extraction.tokens import Tokens, batches, story_tokens
from emovec.readout import Readout

OWN, TOPIC, MEAN = "own text", "same topic", "mean"


@dataclass(frozen=True)
class ConceptPlan:
    """What there is to do, known before it starts.

    Attributes:
        names: the new concepts.
        stories: stories that are used.
        short: stories left out because they, or their contrasts, have no token after the skip.
        contrasts: what the stories are contrasted with -> stories; see :class:`Evidence`.
        tokens: tokens of all passes.
        corpus_tokens: of these, those of the bank's own corpus.
        bytes: memory for the sums.
    """

    names: tuple[str, ...]
    stories: int
    short: int
    contrasts: dict[str, int]
    tokens: int
    corpus_tokens: int
    bytes: int


class ConceptExtraction:
    """New concepts, planned when it is made and done by :meth:`run`; :func:`add_concepts` does both, and has the arguments.

    ``plan`` says what there is to do, ``evidence`` what speaks for each concept once it is done.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        bank: Bank,
        concepts: Source,
        stories: Source | None = None,
        neutral: Source | None = None,
        ordinary: Source | None = None,
        *,
        whitened: bool | None = None,
        family: str | None = None,
        batch_tokens: int | None = None,
        resume: str | Path | None = None,
        progress: bool = True,
        force: bool = False,
    ) -> None:
        ranks.join()
        bank.check(model, tokenizer, force=force)
        self.model, self.tokenizer, self.bank, self._family = model, tokenizer, bank, family
        self.recipe = recipe_of(bank)
        if whitened is not None:
            self.recipe = replace(self.recipe, readers="whitened" if whitened else None)
        self.whitened = self.recipe.readers == "whitened"
        self.blocks = Blocks(model, bank.layers)
        self.batch_tokens = BATCH_TOKENS.get(self.blocks.device.type, 4096) if batch_tokens is None else batch_tokens
        self._progress = progress and ranks.rank() == 0
        self._texts = Texts(tokenizer, self.recipe, [], neutral, ordinary)
        self._stories, short = self._read(concepts)
        names = check_names(dict.fromkeys(story.emotion for story in self._stories))
        self._of_corpus, self._source = self._corpus(stories, neutral, ordinary, resume)
        self._topics = self._topics_of_corpus()
        kinds = [self._contrasted_with(story) for story in self._stories]
        if MEAN in kinds and any(layer.grand_mean is None for layer in bank.values()):
            where = self._stories[kinds.index(MEAN)].where
            raise CorpusError(f"{where}: no 'contrast', and the bank has no mean to compare the story with")
        tokens = sum(len(text.ids) for text in self._tokens())
        tokens += sum(len(text.ids) for text in chain(self._texts.calibration(), self._texts.neutral(), self._texts.words()))
        corpus_plan = self._of_corpus.plan if self._of_corpus is not None and self.whitened else None
        over = (0 if corpus_plan is None else corpus_plan.story_tokens) + sum(len(text.ids) for text in self._topic_texts())
        self._sums = Differences(self._stories, names, bank.width, sorted({0, *bank.layers}), (0, bank.read_layer))
        size = self._sums.bytes + (0 if corpus_plan is None else corpus_plan.bytes)
        self.plan = ConceptPlan(names, len(self._stories), short, dict(Counter(kinds)), tokens + over, over, size)
        self.evidence: dict[str, Evidence] = {}

    # --- what there is to do ------------------------------------------------------------------------------------------

    def _read(self, source: Source) -> tuple[list[Story], int]:
        found, limit = list(corpus.pairs(source)()), self.blocks.max_tokens
        for story in found:
            if story.emotion in self.bank.names:
                raise CorpusError(f"{story.where}: the bank has {story.emotion!r} already")
            for text in filter(None, (story.text, story.contrast)):
                if limit is not None and (length := len(self._cut(text).ids)) > limit:
                    raise CorpusError(f"{story.where} has {length} tokens, more than the {limit} that the model takes")
        used = [story for story in found if all(usable(self._cut(text)) for text in filter(None, (story.text, story.contrast)))]
        for name in dict.fromkeys(story.emotion for story in found):
            topics = {_topic(story) for story in used if story.emotion == name}
            if len(topics) < 2:
                count = sum(story.emotion == name for story in found)
                raise CorpusError(
                    f"{name!r} has {count} stories, of which those longer than the {self.recipe.skip} tokens skipped are on "
                    f"{len(topics)} topics; it takes two at least to hold one out"
                )
        if not used:
            raise CorpusError("no stories of new concepts")
        return used, len(found) - len(used)

    def _cut(self, text: str, label: int = 0) -> Tokens:
        recipe = self.recipe
        chat = recipe.format == "chat"
        return story_tokens(self.tokenizer, text, skip=recipe.skip, share=recipe.skip_share, chat=chat, label=label)

    def _tokens(self) -> list[Tokens]:
        """The stories, and after them their contrasts, labelled by the row of the story; of contrasts the label is ~row."""
        found = [self._cut(story.text, row) for row, story in enumerate(self._stories)]
        return found + [self._cut(story.contrast, ~row) for row, story in enumerate(self._stories) if story.contrast is not None]

    def _corpus(
        self, stories: Source | None, neutral: Source | None, ordinary: Source | None, resume: str | Path | None
    ) -> tuple[Extraction | None, Source | None]:
        """The pass over the corpus that the bank was made from; None where nothing needs it."""
        if not self.whitened and all(story.contrast is not None for story in self._stories):
            return None, None
        shipped = [corpus.shipped(name) for name in ("stories.jsonl", "messages.jsonl")]
        expected = self.bank.meta.get("corpus", {}).get("digest")
        # a bank that does not say what it was made from is taken to be made from what the caller says, not from what comes along
        candidates: list[Source] = [stories] if stories is not None else [] if expected is None else [shipped, shipped[0]]
        for source in candidates:
            job = Extraction(
                self.model,
                self.tokenizer,
                source,
                neutral,
                ordinary,
                recipe=self.recipe,
                layers=self.bank.layers,
                batch_tokens=self.batch_tokens,
                resume=resume,
                progress=False,
            )
            if expected in (None, job.plan.digest):
                return job, source
        if self.whitened or stories is not None:
            which = "that come with emovec" if stories is None else "given"
            raise CorpusError(
                f"the stories {which} are not those that the bank was made from, which whitened readers are made with; give those, "
                "or do without whitening"
            )
        return None, None

    def _topics_of_corpus(self) -> list[str]:
        """Topics of stories without a contrast that the corpus has as well."""
        wanted = {story.topic for story in self._stories if story.contrast is None and story.topic}
        if self._source is None or not wanted:
            return []
        return sorted(wanted & {story.topic for story in corpus.stories(self._source)()})

    def _topic_texts(self) -> Iterator[Tokens]:
        """The corpus's stories on those topics, labelled by topic."""
        label = {topic: index for index, topic in enumerate(self._topics)}
        if self._source is not None and label:
            found = (self._cut(story.text, label[story.topic]) for story in corpus.stories(self._source)() if story.topic in label)
            yield from filter(usable, found)

    def _contrasted_with(self, story: Story) -> str:
        return OWN if story.contrast is not None else TOPIC if story.topic in self._topics else MEAN

    # --- the passes ---------------------------------------------------------------------------------------------------

    def run(self) -> Bank:
        """The bank with the new concepts. In a group of processes each returns the whole of it.

        Raises:
            StateError: the file to resume from belongs to another extraction.
            BankError: activations are not finite, or nothing is left of a direction.
        """
        with Progress(self.plan.tokens, visible=self._progress) as progress:
            # few texts, so that each process does them all
            Blocks(self.model, self._sums.layers).over(batches(self._tokens(), self.batch_tokens), self._sums, progress)
            moments = None
            if self._of_corpus is not None and self.whitened:
                moments = self._of_corpus.over_stories(progress)
            self._sums.less(self._references(progress))
            plain = self._plain().over(self.blocks, self._texts, self.batch_tokens, progress)
            added, reads = [], {}
            for layer in self.bank.layers:
                made, removed, whitened = self._derived(layer, moments, plain)
                added.append(made)
                reads[layer] = (removed, whitened)
            added, readout = calibrate(
                self.model,
                self.tokenizer,
                added,
                [{"content": turns[0]["content"]} for turns in self._texts.prompts],
                [{"turns": turns} for turns in self._texts.dialogues],
                together=() if self.bank.readout is None else self.bank.readout.layers,
                batch_tokens=self.batch_tokens,
                progress=progress,
            )
        read = next(layer for layer in added if layer.index == self.bank.read_layer)
        self.evidence = {name: self._judged(name, read, *reads[read.index]) for name in self.plan.names}
        return self._joined(added, readout)

    def _references(self, progress: Progress) -> dict[int, Tensor]:
        """What stories without a contrast of their own are compared with: layer -> [n, d], zero for the others."""
        kinds = [self._contrasted_with(story) for story in self._stories]
        sums = StoryMoments(max(len(self._topics), 1), self.bank.width, self.blocks.layers, scatter=False)
        if self._topics:
            self.blocks.over(ranks.share(batches(self._topic_texts(), self.batch_tokens)), sums, progress)
            sums.over_ranks()
        found = {}
        for layer in self.blocks.layers:
            rows = torch.zeros(len(self._stories), self.bank.width, dtype=torch.float64)
            means = sums.at(f"sum.{layer}").cpu() / sums.at("count").clamp_min(1)[:, None] if self._topics else None
            grand = self.bank[layer].grand_mean
            for row, kind in enumerate(kinds):
                if kind == TOPIC:
                    assert means is not None
                    rows[row] = means[self._topics.index(self._stories[row].topic)]
                elif kind == MEAN and grand is not None:
                    rows[row] = grand.double()
            found[layer] = rows
        return found

    def _plain(self) -> Plain:
        about = {
            layer: self._sums.centre(layer) if made.grand_mean is None else made.grand_mean.double() for layer, made in self.bank.items()
        }
        return Plain(self.recipe, self.bank.width, self.blocks.layers, about)

    def _derived(self, layer: int, moments: StoryMoments | None, plain: Plain) -> tuple[BankLayer, Tensor, Whiten | None]:
        """A layer of the new concepts without baselines, the neutral components [c, d], and how readers are whitened."""
        rows = self._sums.at(f"sum.{layer}").cpu()
        if not bool(rows.isfinite().all()):
            raise BankError(f"layer {layer}: activations are not finite; try bfloat16 or float32")
        neutral, ordinary = plain.neutral(layer), plain.ordinary(layer)
        removed = rows[:0] if neutral is None else leading(neutral.cpu(), self.recipe.variance)
        directions, norm = unit(project_out(rows, removed))
        if not bool((norm > 1e-6 * rows.norm(dim=1)).all()):
            raise BankError(f"layer {layer}: nothing is left of a direction without {len(removed)} neutral components")
        whitened = None
        if moments is not None:
            scatter, sums, count = (moments.at(key).cpu() for key in (f"scatter.{layer}", f"sum.{layer}", "count"))
            whitened = whitening(self.recipe, within(scatter, sums, count), contrast(sums, count)[1], ordinary)
        readers = None if whitened is None else whitened(rows, directions).float()
        made = BankLayer(layer, self.plan.names, directions.float(), readers=readers, raw_norm=norm.float())
        return made, removed, whitened

    # --- what comes of it ---------------------------------------------------------------------------------------------

    def _judged(self, name: str, layer: BankLayer, removed: Tensor, whitened: Whiten | None) -> Evidence:
        mine = [row for row, story in enumerate(self._stories) if story.emotion == name]
        topics = [_topic(self._stories[row]) for row in mine]
        known = sorted(set(topics))

        rows = self._sums.rows[layer.index][mine]
        if whitened is None:  # what is read with the direction does not see what was projected out of it
            rows = project_out(rows, removed)

        def read(rows: Tensor) -> Tensor:
            return rows if whitened is None else whitened(rows, unit(rows)[0])

        return judged(
            name,
            layer.index,
            rows,
            self._sums.rows[0][mine] if all(self._stories[row].contrast is not None for row in mine) else None,
            read,
            removed,
            torch.tensor([known.index(topic) for topic in topics]),
            Counter(self._contrasted_with(self._stories[row]) for row in mine),
            float(layer.baselines["prompt"].std[layer.resolve(name)]),
            nearest(layer.direction(name), self.bank.names, self.bank[layer.index].directions),
        )

    def _joined(self, added: Sequence[BankLayer], readout: Readout | None) -> Bank:
        bank = self.bank
        for row, name in enumerate(self.plan.names):
            parts = {layer.index: layer.subset([name]) for layer in added}
            bank = bank.add(
                name,
                {index: part.directions[0] * part.raw_norm for index, part in parts.items() if part.raw_norm is not None},
                readers={index: part.readers[0] for index, part in parts.items() if part.readers is not None},
                baselines={index: part.baselines for index, part in parts.items()},
                readout=None if readout is None else readout.subset([row]).baselines,
                family=self._family,
            )
        said = {name: found.to_dict() for name, found in self.evidence.items()}
        digest = corpus.digest([story.emotion, story.text, story.contrast] for story in self._stories)
        described = [*bank.meta.get("custom", []), {"digest": digest, "concepts": said}]
        bank = copy.copy(bank)
        bank.meta = as_json({**bank.meta, "custom": described})
        return bank


def recipe_of(bank: Bank) -> Recipe:
    """The recipe that a bank was made by, as far as it says."""
    return Recipe.recorded(bank.meta) or Recipe()


def _topic(story: Story) -> str:
    return story.topic or story.where


def add_concepts(
    model: nn.Module,
    tokenizer: Any,
    bank: Bank,
    concepts: Source,
    stories: Source | None = None,
    neutral: Source | None = None,
    ordinary: Source | None = None,
    *,
    whitened: bool | None = None,
    family: str | None = None,
    batch_tokens: int | None = None,
    resume: str | Path | None = None,
    progress: bool = True,
    force: bool = False,
) -> Bank:
    """The bank with new concepts, made by its own recipe: directions, readers and baselines at each of its layers.

    A story is compared with its own ``contrast`` if it has one, the same text without what makes the concept: topic, writer and register
    then cancel. Without one it is compared with the stories of the bank's corpus on the same topic, else with the mean of that
    corpus, and a warning says that the writer does not cancel. ``bank.meta["custom"]`` records the evidence for each concept.

    Args:
        model: the model of the bank.
        tokenizer: its tokenizer.
        bank: the bank to add to; a new one is returned.
        concepts: JSON Lines, Parquet or objects with ``concept``, ``text`` and, if they can have them, ``topic`` and ``contrast``.
        stories: the stories that the bank was made from, which whitened readers need. Default: emovec's own.
        neutral: dialogues without feeling. Default: emovec's own.
        ordinary: everyday prompts. Default: emovec's own.
        whitened: whether the concepts get whitened readers; default: as the bank's recipe says. Without, they are read with
            their directions, and there is no pass over the corpus.
        family: a family to put the concepts into, new or known.
        batch_tokens: tokens in a batch, padding included.
        resume: a file for the sums of the bank's corpus. It stays, so that the next concept needs no pass over the corpus.
        progress: show a bar with an estimate.
        force: use the bank although it was made for another model.

    Raises:
        CorpusError: a bad line, named; a concept that the bank has, or with stories on fewer than two topics; another corpus.
        BankError: another model; activations that are not finite.
    """
    job = ConceptExtraction(
        model,
        tokenizer,
        bank,
        concepts,
        stories,
        neutral,
        ordinary,
        whitened=whitened,
        family=family,
        batch_tokens=batch_tokens,
        resume=resume,
        progress=progress,
        force=force,
    )
    made = job.run()
    for name, found in job.evidence.items():
        for said in found.warnings:
            warnings.warn(f"{name}: {said}", stacklevel=2)
    return made
