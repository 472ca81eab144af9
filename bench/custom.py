"""One new concept from ten stories: does it read what it was not made from? `python bench/custom.py`

Makes `sarcastic` from the ten stories of examples/sarcastic.jsonl, into the shipped bank: each against the same scene told plainly
and against one in which the same words are meant. Beside it directions from the plain contrasts alone, of the first four, six,
eight and all ten stories, and from no contrasts, against the mean of the bank's corpus. Tests each on
examples/sarcastic_messages.jsonl, twelve chat messages as users' turns: another register and other topics, though the same writer.
Each stands beside the same message said plainly, and beside one that praises in the same words and means it. The 171 emotions
read the same pairs, as a null.

Writes bench/results/custom.json and the tables of docs/custom.md; with `--page` the tables alone. `--sums FILE` keeps the pass over
the bank's corpus, which takes nearly all of the time.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pages
import provenance
import torch
from heldout import means
from torch import Tensor

from emovec.bank import BankLayer, load_bank
from emovec.extraction import ConceptExtraction
from emovec.extraction.blocks import Blocks
from emovec.extraction.tokens import dialogue_tokens
from emovec.models import load_model
from emovec.stats import wilson

PAGE = pages.DOCS / "custom.md"
EXAMPLES = Path(__file__).parents[1] / "examples"
MODEL, CONCEPT = "smollm2-135m-instruct", "sarcastic"
FEWER = (4, 6, 8)
PLAIN = "plain contrasts only"
KINDS = ("text", "contrast", "sincere")
MEAN = "against the corpus's mean"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--page", action="store_true", help="write the page's tables from the results there are")
    parser.add_argument("--sums", type=Path, help="keep the sums of the bank's corpus here, and use them if they are there")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if not options.page:
        results = measured(options.sums)
        del sys.argv[1:]  # where the sums were kept changes nothing, and is nobody's business
        provenance.write("custom", results)
    found = provenance.read("custom")
    pages.write(PAGE, tables(found["results"], found["provenance"]["name"]))


def measured(sums: Path | None) -> dict[str, Any]:
    model, tokenizer = load_model(MODEL)
    bank = load_bank(MODEL)
    stories = [json.loads(line) for line in (EXAMPLES / "sarcastic.jsonl").read_text(encoding="utf-8").splitlines()]
    plain = stories[: len(stories) // 2]  # the same stories come again after it, with the other contrasts
    variants = {CONCEPT: stories, PLAIN: plain, **{f"{PLAIN}, {count} stories": plain[:count] for count in FEWER}}
    variants[MEAN] = [{key: value for key, value in story.items() if key != "contrast"} for story in plain]
    concepts = [{**story, "concept": name} for name, part in variants.items() for story in part]
    job = ConceptExtraction(model, tokenizer, bank, concepts, resume=sums)
    made = job.run()
    layer = made[made.read_layer]
    messages = [json.loads(line) for line in (EXAMPLES / "sarcastic_messages.jsonl").read_text(encoding="utf-8").splitlines()]
    told = [[{"role": "user", "content": message[kind]}] for message in messages for kind in KINDS]
    tokens = [dialogue_tokens(tokenizer, turns) for turns in told]
    labelled = [replace(text, label=number) for number, text in enumerate(tokens)]
    rows = means(Blocks(model, [layer.index]), labelled)[:, 0].double()
    main_direction = layer.direction(CONCEPT)
    found = {
        "model": MODEL,
        "layer": layer.index,
        "stories": len(plain),
        "messages": len(messages),
        "evidence": {name: evidence.to_dict() for name, evidence in job.evidence.items()},
        "read": {name: read(layer, name, rows) | {"cosine": round(float(layer.direction(name) @ main_direction), 4)} for name in variants},
    }
    return found | {"emotions": {kind: others(layer, bank.names, rows, kind) for kind in KINDS[1:]}}


def others(layer: BankLayer, names: Sequence[str], rows: Tensor, kind: str) -> dict[str, Any]:
    """How many of the bank's own concepts tell as many pairs apart."""
    right = torch.tensor([int(hits(layer, name, rows, kind).sum()) for name in names])
    best = [[names[k], int(right[k])] for k in right.argsort(descending=True, stable=True)[:5].tolist()]
    as_good = int((right >= int(hits(layer, CONCEPT, rows, kind).sum())).sum())
    return {"concepts": len(names), "as_good": as_good, "mean": round(float(right.double().mean()), 2), "best": best}


def projections(layer: BankLayer, name: str, rows: Tensor, *, direction: bool = False) -> Tensor:
    """What the concept's reader, or its direction, reads in rows [3 n, d]: [n, 3], by ``KINDS``."""
    onto = layer.directions if direction or layer.readers is None else layer.readers
    return (rows @ onto[layer.resolve(name)].double()).view(-1, len(KINDS))


def hits(layer: BankLayer, name: str, rows: Tensor, kind: str, *, direction: bool = False) -> Tensor:
    """[n], where a message reads higher than its counterpart of this kind."""
    found = projections(layer, name, rows, direction=direction)
    return found[:, 0] > found[:, KINDS.index(kind)]


def read(layer: BankLayer, name: str, rows: Tensor) -> dict[str, Any]:
    """How many of the pairs it tells apart, with what chance would do, and the mean score of each kind."""
    baseline, row = layer.baselines["prompt"], layer.resolve(name)
    scores = (projections(layer, name, rows) - float(baseline.mean[row])) / float(baseline.std[row])
    found: dict[str, Any] = {"scores": {kind: round(float(scores[:, column].mean()), 3) for column, kind in enumerate(KINDS)}}
    for kind in KINDS[1:]:
        right, count = int(hits(layer, name, rows, kind).sum()), len(scores)
        found[kind] = {
            "right": right,
            "right_by_direction": int(hits(layer, name, rows, kind, direction=True).sum()),
            "of": count,
            "interval": [round(end, 4) for end in wilson(right, count)],
            "p": round(sum(math.comb(count, k) for k in range(right, count + 1)) / 2**count, 6),
        }
    return found


def tables(results: dict[str, Any], machine: str) -> dict[str, str]:
    """The tables of docs/custom.md by name."""
    found, plain, mean = (results["evidence"][name] for name in (CONCEPT, PLAIN, MEAN))
    source = f"Measured by `python bench/custom.py` on {machine}; more in bench/results/custom.json."

    def interval(ends: list[float]) -> str:
        return f"{ends[0]:.2f} to {ends[1]:.2f}"

    def near(which: dict[str, Any]) -> str:
        return ", ".join(f"{name} {cosine:+.2f}" for name, cosine in which["nearest"][:3])

    def words(which: dict[str, Any]) -> str:
        return "-" if which["words"] is None else f"{which['words']:.2f}"

    both = [
        ("held-out stories that read higher than their contrast", lambda which: f"{which['accuracy']:.2f} ({interval(which['interval'])})"),
        ("p of sign flips", lambda which: f"{which['p']:.3g} of {which['flips']}"),
        ("the words alone (layer 0)", words),
        ("by, in standard deviations of ordinary tokens", lambda which: f"{which['margin']:.2f}"),
        ("cosine of the directions of two halves", lambda which: f"{which['halves']:.2f}"),
        ("nearest concepts", near),
        ("warnings", lambda which: str(len(which["warnings"]))),
    ]
    evidence = [
        f"| at layer {results['layer']} | plain and sincere contrasts | {PLAIN} | {MEAN} |",
        "|---|---|---|---|",
        *(f"| {what} | {say(found)} | {say(plain)} | {say(mean)} |" for what, say in both),
    ]
    rows = [
        "| made | higher than plain | p | higher than sincere praise | p | mean score | plain | sincere | cosine with the first |",
        "|---|---|---|---|---|---|---|---|---|",
        *(
            f"| {'plain and sincere contrasts' if name == CONCEPT else name} | "
            + " | ".join(
                f"{row[kind]['right']} of {row[kind]['of']} ({interval(row[kind]['interval'])}) | {row[kind]['p']:.2g}"
                for kind in KINDS[1:]
            )
            + f" | {' | '.join(f'{score:+.2f}' for score in row['scores'].values())} | {row['cosine']:.2f} |"
            for name, row in results["read"].items()
        ),
    ]
    said = []
    for kind, null in results["emotions"].items():
        best = ", ".join(f"{name} {right}" for name, right in null["best"][:3])
        beside = "plain ones" if kind == "contrast" else "sincere ones"
        said.append(
            f"Beside {beside} {null['as_good']} of the {null['concepts']} emotions do as well (mean {null['mean']:.1f}; best: {best})."
        )
    return {"evidence": "\n".join([*evidence, "", source]), "messages": "\n".join([*rows, "", *said, source])}


if __name__ == "__main__":
    main()
