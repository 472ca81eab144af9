"""From a model and a bank to a report: texts are run once, each finished section is kept, a killed run goes on where it was."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import nn

from emovec import extras
from emovec.bank import Bank, BankError, fingerprint
from emovec.bank_file import replacing
from emovec.evaluation import texts
from emovec.evaluation.activations import MOMENTS_OF, Activations
from emovec.evaluation.labelled import recipe_of
from emovec.evaluation.material import Material, Options
from emovec.evaluation.page import write as write_page
from emovec.evaluation.reading import read_layers
from emovec.evaluation.sections import Section, chosen
from emovec.evaluation.verdict import verdicts
from emovec.extraction import CorpusError
from emovec.extraction.blocks import Blocks
from emovec.extraction.corpus import shipped
from emovec.extraction.plan import Texts as ExtractionTexts
from emovec.extraction.progress import Progress
from emovec.extraction.run import BATCH_TOKENS
from emovec.models import decoder_layers, residual_width

SWEPT = 11  # layers of the sweep, besides the bank's


@dataclass(frozen=True)
class Report:
    """What an evaluation has found, as report.json holds it; ``directory`` holds the page and the figures."""

    directory: Path
    content: Mapping[str, Any]


def evaluate(
    model: nn.Module,
    tokenizer: Any,
    bank: Bank,
    out: str | os.PathLike[str],
    *,
    sections: Sequence[str] | None = None,
    layers: Sequence[int] | None = None,
    stories: Sequence[str | os.PathLike[str]] | None = None,
    others: str | os.PathLike[str] | None = None,
    norms: str | os.PathLike[str] | None = None,
    options: Options | None = None,
    batch_tokens: int | None = None,
    force: bool = False,
    progress: bool = True,
) -> Report:
    """Put a bank on trial and write a report about it.

    ``out`` gets ``report.html``, ``report.json`` (every number), ``figures/`` and ``state/``: the activations and the results of
    finished sections. Nothing of the state is used for another bank, model, text or option; it may be removed.

    Args:
        model: a decoder of transformers, that of the bank.
        tokenizer: its tokenizer.
        bank: calibrated.
        out: a directory, made if it is not there.
        sections: names of sections; default: all.
        layers: layers to sweep besides those of the bank and layer 0; default: eleven spread evenly.
        stories: files of labelled texts, a register each; default: those that come with emovec.
        others: labelled texts by other writers, for the bank's own directions to read.
        norms: a table of ``word,valence,arousal``; default: the ratings that come with emovec.
        options: how much is drawn.
        batch_tokens: tokens in a batch, padding included.
        force: go on although the bank was made for another model.
        progress: show a bar with an estimate.

    Raises:
        BankError: the bank is not this model's, or not calibrated at its reading layer.
        CorpusError: a file of texts or norms is wrong.
        ValueError: an unknown section.
        ModuleNotFoundError: matplotlib is missing.
    """
    options = options or Options()
    picked = chosen(sections)
    extras.require("matplotlib", extra="report")
    bank.check(model, tokenizer, force=force)
    _check_calibrated(bank)
    recipe = recipe_of(bank)
    corpus = texts.load(tokenizer, bank.names, recipe, stories=stories, others=others, norms=norms, quick=options.quick)
    blocks = Blocks(model, _layers(bank, len(decoder_layers(model)), layers))
    _check_lengths(corpus, blocks.max_tokens)
    directory = Path(out)
    for place in (directory, directory / "figures", directory / "state"):
        place.mkdir(parents=True, exist_ok=True)
    side = {
        "model": fingerprint(model),
        "dtype": str(next(model.parameters()).dtype),
        "device": blocks.device.type,
        "torch": torch.__version__,
    }
    belongs_to = {
        **side,
        "bank": bank_digest(bank),
        "texts": corpus.digest,
        "options": asdict(options),
        "layers": list(blocks.layers),
        "emovec": metadata.version("emovec"),
    }
    states = {part.name: State(directory / "state", part, belongs_to) for part in picked}
    total = sum(part.tokens for part in corpus.sets.values()) + sum(part.cost for part in picked)
    results: dict[str, Any] = {}
    with Progress(total, "evaluating", visible=progress) as bar:
        activations = Activations(
            blocks, residual_width(model), directory / "state", side, batch_tokens or BATCH_TOKENS.get(blocks.device.type, 2048)
        )
        means = {name: activations.means(part, bar) for name, part in corpus.sets.items() if name not in MOMENTS_OF}
        first = means[next(iter(corpus.labels))][:, 0].double().mean(0)
        moments = activations.moments(corpus.sets, dict(zip(blocks.layers, first, strict=True)), tuple(sorted(read_layers(bank))), bar)
        meter = Meter(bar)
        own = _own_corpus(bank, tokenizer, recipe, stories)
        material = Material(bank, recipe, corpus, blocks.layers, means, moments, options, own, model, tokenizer, force, meter.advance)
        say = _say if progress else _quiet
        for section in picked:
            results[section.name] = states[section.name].kept(partial(section.result, material), say)
            meter.finish(section.cost)
    content = {
        "format": 1,
        "bank": {
            "digest": belongs_to["bank"],
            "concepts": list(bank.names),
            "layers": list(bank.layers),
            "read_layers": list(read_layers(bank)),
            "steer_layers": list(bank.steer_layers),
            "families": {name: list(part) for name, part in bank.families.items()},
        },
        "model": {"name": bank.meta.get("model"), **{key: value for key, value in side.items() if key != "model"}},
        "emovec": belongs_to["emovec"],
        "options": belongs_to["options"],
        "texts": {
            "digest": corpus.digest,
            "sets": {name: len(part.texts) for name, part in corpus.sets.items()},
            "left_out": list(corpus.left_out),
        },
        "layers": list(blocks.layers),
        "verdict": verdicts(results),
        "sections": results,
    }
    _put_json(directory / "report.json", content)
    write_page(directory, content, picked)
    return Report(directory, content)


class Meter:
    """Tells a bar of the tokens that a section runs, and at its end of what is left of its cost."""

    def __init__(self, bar: Progress) -> None:
        self._bar, self._run = bar, 0

    def advance(self, tokens: int) -> None:
        self._run += tokens
        self._bar.advance(tokens)

    def finish(self, cost: int) -> None:
        self._bar.advance(max(0, cost - self._run))
        self._run = 0


class State:
    """The result of one section in a file that belongs to all it was computed from."""

    def __init__(self, directory: Path, part: Section, belongs_to: Mapping[str, Any]) -> None:
        self._part = part
        self._key = hashlib.sha256(json.dumps({**belongs_to, "section": part.name, "code": part.code}, sort_keys=True).encode()).hexdigest()
        self.path = directory / f"{part.name}-{self._key[:16]}.json"

    def kept(self, compute: Callable[[], dict[str, Any]], say: Callable[[str], None]) -> dict[str, Any]:
        """The result kept, or computed and kept; as it comes back from JSON either way."""
        if self.path.exists():
            try:
                found = json.loads(self.path.read_text(encoding="utf-8"))
                if found["key"] == self._key:
                    say(f"{self._part.name}: kept from an earlier run")
                    kept: dict[str, Any] = found["result"]
                    return kept
            except (ValueError, KeyError, TypeError):
                pass
        say(f"{self._part.name}: {self._part.title}")
        result = json.loads(json.dumps(finite(compute()), allow_nan=False))
        _put_json(self.path, {"key": self._key, "result": result})
        fresh: dict[str, Any] = result
        return fresh


def finite(value: Any) -> Any:
    """``value`` with None for numbers that are not finite, which JSON does not have."""
    if isinstance(value, float):
        return value if value - value == 0 else None
    if isinstance(value, Mapping):
        return {key: finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [finite(part) for part in value]
    return value


def bank_digest(bank: Bank) -> str:
    """A hash of all that a bank holds."""
    tensors, facts = {}, []
    for layer in bank.values():
        for name in ("directions", "readers", "raw_norm", "grand_mean"):
            if (tensor := getattr(layer, name)) is not None:
                tensors[f"{layer.index}.{name}"] = tensor.clone()
        for kind, baseline in layer.baselines.items():
            tensors |= {f"{layer.index}.{kind}.mean": baseline.mean.clone(), f"{layer.index}.{kind}.std": baseline.std.clone()}
        facts.append([layer.index, layer.residual_norm])
    for kind, baseline in () if bank.readout is None else bank.readout.baselines.items():
        tensors |= {f"readout.{kind}.mean": baseline.mean.clone(), f"readout.{kind}.std": baseline.std.clone()}
    header = [bank.names, bank.read_layer, bank.read_layers, bank.steer_layers, bank.families, bank.meta, facts]
    return hashlib.sha256(json.dumps(header, sort_keys=True).encode() + safetensors.torch.save(tensors)).hexdigest()


def _put_json(path: Path, content: Mapping[str, Any]) -> None:
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, ensure_ascii=False, allow_nan=False, indent=1) + "\n", encoding="utf-8")


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def _quiet(message: str) -> None:
    pass


def _check_calibrated(bank: Bank) -> None:
    for index in {*read_layers(bank), *bank.steer_layers}:
        layer = bank[index]
        if not layer.calibrated:
            raise BankError(f"layer {index} of the bank is not calibrated, so its readings have no unit to judge them in")
        if layer.uncalibrated:
            raise BankError(f"layer {index} has no baseline for {', '.join(layer.uncalibrated[:3])}; leave them out with Bank.subset")


def _layers(bank: Bank, count: int, asked: Sequence[int] | None) -> list[int]:
    """Layer 0, the bank's layers, and those asked for or an even spread."""
    spread = {round(index * (count - 1) / (SWEPT - 1)) for index in range(SWEPT)} if asked is None else set(asked)
    return sorted({0, *bank.layers, *spread})


def _check_lengths(corpus: texts.Corpus, limit: int | None) -> None:
    for part in corpus.sets.values():
        for number, text in enumerate(part.texts, start=1):
            if limit is not None and len(text.ids) > limit:
                raise CorpusError(f"text {number} of {part.name} has {len(text.ids)} tokens, more than the {limit} that the model takes")


def _own_corpus(bank: Bank, tokenizer: Any, recipe: Any, stories: Any) -> bool | None:
    """Whether the bank says that it was made from these very texts."""
    said = bank.meta.get("corpus", {})
    if recipe is None or not isinstance(said, Mapping) or "digest" not in said:
        return None
    default = [shipped("stories.jsonl"), shipped("messages.jsonl")]
    try:
        plan = ExtractionTexts(tokenizer, recipe, stories or default, None, None).plan(bank.names, None)
    except ValueError:
        return False
    return bool(plan.digest == said["digest"])
