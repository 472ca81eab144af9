"""What an extraction costs over the bare forward pass, batch by batch and side by side: `python bench/bench_extract.py`.

Each batch is run bare and with all layers looked at, in alternating order, several times. On a CPU the clock is the
process's own processor time on one thread, so that what else runs on the machine hardly matters. The linear algebra at the end is
timed once and spread over the tokens of the whole corpus.

Writes bench/results/extract.json and the paragraph of docs/extraction.md; with `--page` the paragraph alone.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any

import pages
import provenance
import torch
from heldout import PAGE

from emovec.bank import BankLayer
from emovec.extraction.calibrate import _ProjectionSums
from emovec.extraction.recipe import derive
from emovec.extraction.run import Extraction
from emovec.extraction.sums import Mean, NeutralMoments, Sums
from emovec.extraction.tokens import Batch, Tokens, batches
from emovec.models import load_model, residual_width

GOAL = 0.9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batches", type=int, default=4, help="batches of each pass")
    parser.add_argument("--repeats", type=int, default=5, help="times that each batch is run in each way")
    parser.add_argument("--page", action="store_true", help="write the page's paragraph from the results there are")
    options = parser.parse_args()
    if not options.page:
        measure(options)
    if options.device == "cpu":
        found = provenance.read("extract")
        text = {"cost": paragraph(found["results"], found["provenance"]["name"])}
        pages.write(PAGE, text)


def measure(options: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    model, tokenizer = load_model(options.model, device=options.device)
    job = Extraction(model, tokenizer, progress=False)
    now = clock(job.blocks.device)
    names, layers = job.plan.names, job.blocks.layers
    made = [BankLayer.from_directions(torch.randn(len(names), residual_width(model)), names, layer) for layer in layers]
    width, about = residual_width(model), dict.fromkeys(layers, made[0].directions[0])
    passes = {
        "stories": compare(job, job._moments(), job._texts.stories(names), options, now),
        "neutral": compare(job, NeutralMoments(width, layers, about, dialogues=False), iter(job._texts.neutral()), options, now),
        "ordinary": compare(job, Mean(width, layers, about), iter(job._texts.words()), options, now),
        "calibration": compare(job, _ProjectionSums(made), iter(job._texts.calibration()), options, now),
    }
    algebra = len(layers) * algebra_of(job, now)
    texts = {"neutral": job._texts.neutral(), "ordinary": job._texts.words(), "calibration": job._texts.calibration()}
    tokens = {"stories": job.plan.story_tokens, **{name: sum(len(text.ids) for text in part) for name, part in texts.items()}}
    bare = sum(tokens[name] / passes[name]["bare_tokens_per_s"] for name in tokens)
    whole = sum(tokens[name] / passes[name]["bare_tokens_per_s"] / passes[name]["ratio"] for name in tokens) + algebra
    results = {
        "model": options.model,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": options.device,
        "clock": "processor time, one thread" if options.device == "cpu" else "wall clock, synchronised",
        "layers": len(layers),
        "batch_tokens": job.batch_tokens,
        "passes": passes,
        "tokens": tokens,
        "algebra_s": round(algebra, 3),
        "ratio": round(bare / whole, 4),
        "goal": GOAL,
    }
    print(f"extraction of all {len(layers)} layers at {bare / whole:.3f} of the bare forward pass (goal {GOAL}); {passes}")
    print(provenance.write("extract" if options.device == "cpu" else f"extract_{torch.device(options.device).type}", results))


def paragraph(results: dict[str, Any], machine: str) -> str:
    """What docs/extraction.md says of the cost."""
    each = ", ".join(
        f"{name} {found['ratio']:.2f} ({found['quartiles'][0]:.2f} to {found['quartiles'][1]:.2f})"
        for name, found in results["passes"].items()
    )
    return (
        f"All {results['layers']} layers of {results['model']} ({results['dtype']}) are extracted at {results['ratio']:.2f} of "
        f"the bare forward pass's tokens per second, the algebra at the end included; by pass {each}: medians and quartiles of pairs.\n"
        f"Measured by `python bench/bench_extract.py` on {machine}, {results['clock']}."
    )


def compare(job: Extraction, sums: Any, texts: Iterator[Tokens], options: argparse.Namespace, now: Callable[[], float]) -> dict[str, Any]:
    """Tokens per second bare, and the looked-at pass's share of it: the median over pairs and its quartiles."""
    few = list(islice(batches(texts, job.batch_tokens), options.batches))
    job.blocks.run(few[-1])
    timed(job, few[0], sums, now)
    ratios, speeds = [], []
    for repeat in range(options.repeats):
        for batch in few:
            order = (None, sums) if repeat % 2 else (sums, None)
            found = {which is None: timed(job, batch, which, now) for which in order}
            ratios.append(found[True] / found[False])
            speeds.append(batch.tokens / found[True])
    low, middle, high = quartiles(ratios)
    return {
        "bare_tokens_per_s": round(statistics.median(speeds), 1),
        "ratio": round(middle, 4),
        "quartiles": [round(low, 4), round(high, 4)],
        "pairs": len(ratios),
        "batch_shapes": [list(batch.ids.shape) for batch in few],
    }


def algebra_of(job: Extraction, now: Callable[[], float]) -> float:
    """Seconds from one layer's sums to its directions and readers."""
    concepts, width = len(job.plan.names), residual_width(job.model)
    sums, rows = (torch.randn(count, width, dtype=torch.float64, device=job.blocks.device) for count in (concepts, 4 * width))
    started = now()
    derive(job.recipe, sums, torch.full((concepts,), 10.0, dtype=torch.float64), rows.T @ rows, rows.T @ rows, rows[0])
    return now() - started


def timed(job: Extraction, batch: Batch, sums: Sums | None, now: Callable[[], float]) -> float:
    started = now()
    if sums is None:
        job.blocks.run(batch)
    else:
        with job.blocks.shown_to(sums.see):  # type: ignore[attr-defined]
            sums.take(batch)  # type: ignore[attr-defined]
            job.blocks.run(batch)
    return now() - started


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    low, middle, high = statistics.quantiles(values, n=4)
    return low, middle, high


def clock(device: torch.device) -> Callable[[], float]:
    if device.type == "cpu":
        return time.process_time

    def synchronised() -> float:
        torch.accelerator.synchronize()
        return time.perf_counter()

    return synchronised


if __name__ == "__main__":
    main()
