"""One new concept from ten stories: does it read what it was not made from? `python bench/custom.py`

Makes `sarcastic` from the ten stories with contrasts of examples/sarcastic.jsonl, into the shipped bank; once with all of them, with
the first four, six and eight, and once without the contrasts, against the mean of the bank's corpus. Tests each on
examples/sarcastic_messages.jsonl, twelve chat messages as users' turns, each beside the same message meant as it stands: another
register and other topics, though the same writer. The 171 emotions read the same pairs, as a null.

Writes bench/results/custom.json and the tables of docs/custom.md; with `--page` the tables alone. `--sums FILE` keeps the pass over
the bank's corpus, which takes nearly all of the time.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import pages
import provenance
import torch
from heldout import means
from torch import Tensor

from emovec.bank import BankLayer, load_bank
from emovec.evaluation.stats import wilson
from emovec.extraction import ConceptExtraction, corpus
from emovec.extraction.blocks import Blocks
from emovec.extraction.tokens import dialogue_tokens
from emovec.models import load_model

PAGE = pages.DOCS / "custom.md"
EXAMPLES = Path(__file__).parents[1] / "examples"
MODEL, CONCEPT = "smollm2-135m-instruct", "sarcastic"
FEWER = (4, 6, 8)
MEAN = "against the corpus's mean"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--page", action="store_true", help="write the page's tables from the results there are")
    parser.add_argument("--sums", type=Path, help="keep the sums of the bank's corpus here, and use them if they are there")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if not options.page:
        provenance.write("custom", measured(options.sums))
    found = provenance.read("custom")
    pages.write(PAGE, tables(found["results"], found["provenance"]["name"]))


def measured(sums: Path | None) -> dict[str, Any]:
    model, tokenizer = load_model(MODEL)
    bank = load_bank(MODEL)
    stories = [json.loads(line) for line in (EXAMPLES / "sarcastic.jsonl").read_text(encoding="utf-8").splitlines()]
    variants = {CONCEPT: stories, **{f"from {count} stories": stories[:count] for count in FEWER}}
    variants[MEAN] = [{key: value for key, value in story.items() if key != "contrast"} for story in stories]
    concepts = [{**story, "concept": name} for name, part in variants.items() for story in part]
    job = ConceptExtraction(model, tokenizer, bank, concepts, resume=sums)
    made = job.run()
    layer = made[made.read_layer]
    pairs = list(corpus.pairs(EXAMPLES / "sarcastic_messages.jsonl")())
    told = [[{"role": "user", "content": text}] for pair in pairs for text in (pair.text, pair.contrast or "")]
    tokens = [dialogue_tokens(tokenizer, turns) for turns in told]
    labelled = [type(text)(text.ids, text.kinds, number) for number, text in enumerate(tokens)]
    rows = means(Blocks(model, [layer.index]), labelled)[:, 0].double()
    main_direction = layer.direction(CONCEPT)
    others = torch.stack([hits(layer, name, rows).double().mean() for name in bank.names])
    best = sorted(zip(bank.names, others.tolist(), strict=True), key=lambda each: -each[1])[:5]
    found = {
        "model": MODEL,
        "layer": layer.index,
        "stories": len(stories),
        "messages": len(pairs),
        "evidence": {name: evidence.to_dict() for name, evidence in job.evidence.items()},
        "read": {name: read(layer, name, rows) | {"cosine": round(float(layer.direction(name) @ main_direction), 4)} for name in variants},
    }
    own = float(hits(layer, CONCEPT, rows).double().mean())
    null = {"concepts": len(others), "as_good": int((others >= own).sum()), "mean": round(float(others.mean()), 4)}
    return found | {"emotions": null | {"best": [[name, round(share, 4)] for name, share in best]}}


def projections(layer: BankLayer, name: str, rows: Tensor, *, direction: bool = False) -> Tensor:
    """What the concept's reader, or its direction, reads in rows [2 n, d]: [n, 2], messages and contrasts."""
    onto = layer.directions if direction or layer.readers is None else layer.readers
    return (rows @ onto[layer.resolve(name)].double()).view(-1, 2)


def hits(layer: BankLayer, name: str, rows: Tensor, *, direction: bool = False) -> Tensor:
    found = projections(layer, name, rows, direction=direction)
    return found[:, 0] > found[:, 1]


def read(layer: BankLayer, name: str, rows: Tensor) -> dict[str, Any]:
    """How many of the pairs it tells apart, with what chance would do, and the mean scores of both sides."""
    right, count = int(hits(layer, name, rows).sum()), len(rows) // 2
    baseline, row = layer.baselines["prompt"], layer.resolve(name)
    scores = (projections(layer, name, rows) - float(baseline.mean[row])) / float(baseline.std[row])
    return {
        "right": right,
        "right_by_direction": int(hits(layer, name, rows, direction=True).sum()),
        "of": count,
        "interval": [round(end, 4) for end in wilson(right, count)],
        "p": round(sum(math.comb(count, k) for k in range(right, count + 1)) / 2**count, 6),
        "score": round(float(scores[:, 0].mean()), 3),
        "contrast_score": round(float(scores[:, 1].mean()), 3),
    }


def tables(results: dict[str, Any], machine: str) -> dict[str, str]:
    """The tables of docs/custom.md by name."""
    found, mean = results["evidence"][CONCEPT], results["evidence"][MEAN]
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
        f"| at layer {results['layer']} | contrasts of their own | {MEAN} |",
        "|---|---|---|",
        *(f"| {what} | {say(found)} | {say(mean)} |" for what, say in both),
    ]
    rows = [
        "| made | right: readers | right: directions | p | mean score: as meant | plain | cosine with the first |",
        "|---|---|---|---|---|---|---|",
        *(
            f"| {'from all ten stories' if name == CONCEPT else name} | {row['right']} of {row['of']} ({interval(row['interval'])}) "
            f"| {row['right_by_direction']} of {row['of']} | {row['p']:.2g} "
            f"| {row['score']:+.2f} | {row['contrast_score']:+.2f} | {row['cosine']:.2f} |"
            for name, row in results["read"].items()
        ),
    ]
    null = results["emotions"]
    best = ", ".join(f"{name} {share:.2f}" for name, share in null["best"][:3])
    said = f"Of the {null['concepts']} emotions {null['as_good']} tell as many pairs apart (mean {null['mean']:.2f}; best: {best})."
    return {"evidence": "\n".join([*evidence, "", source]), "messages": "\n".join([*rows, "", said, source])}


if __name__ == "__main__":
    main()
