"""Does an extraction's memory grow with the number of stories? `python bench/extract_scale.py`

SmolLM2 cut to its first layer, so that 20,000 stories end in minutes on one core; what is kept per story does not depend
on how deep a model is. Each size runs in a process of its own: the highest resident memory after the model is loaded, after
the plan and at the end (Linux only), and the speed in the process's own processor time, on one thread, so that what else runs on
the machine hardly matters. The stories are the shipped ones over and over, their words in another order each time, in a file of
JSON Lines (or of Parquet, the last row).

Writes bench/results/extract_scale.json and the table of docs/extraction.md; with `--page` the table alone.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import pages
import provenance
import torch
from heldout import PAGE

from emovec.extraction import Extraction, corpus
from emovec.models import load_model

MODEL, LAYERS = "smollm2-135m-instruct", 1
SIZES = (200, 2_000, 20_000)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--page", action="store_true", help="write the page's table from the results there are")
    parser.add_argument("--one", type=Path, help="run one extraction of this file and print its figures")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.one is not None:
        print(json.dumps(extracted(options.one)))
        return
    if not options.page:
        measure()
    found = provenance.read("extract_scale")
    pages.write(PAGE, {"scale": table(found["results"], found["provenance"]["name"])})


def measure() -> None:
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for count, form in [*((size, "jsonl") for size in SIZES), (SIZES[-1], "parquet")]:
            path = written(Path(folder) / f"stories.{form}", count)
            done = subprocess.run([sys.executable, __file__, "--one", str(path)], capture_output=True, text=True, check=False)
            if done.returncode:
                raise SystemExit(done.stderr)
            rows.append({"stories": count, "file": form, "file_mib": round(path.stat().st_size / 2**20, 1), **json.loads(done.stdout)})
            print(rows[-1], flush=True)
    provenance.write(
        "extract_scale", {"model": MODEL, "layers": LAYERS, "dtype": "bfloat16", "clock": "processor time, one thread", "rows": rows}
    )


def extracted(path: Path) -> dict[str, Any]:
    """One extraction's figures: memory in MiB, the highest so far."""
    model, tokenizer = load_model(MODEL, dtype=torch.bfloat16)
    model.model.layers = model.model.layers[:LAYERS]
    model.config.num_hidden_layers = LAYERS
    loaded = forget_peak()
    started = time.process_time()
    job = Extraction(model, tokenizer, path, progress=False)
    planned, planning = peak(), time.process_time() - started
    started = time.process_time()
    job.run()
    took = time.process_time() - started
    return {
        "tokens": job.plan.tokens,
        "sums_mib": round(job.plan.bytes / 2**20, 1),
        "loaded_mib": loaded,
        "planned_mib": planned,
        "peak_mib": peak(),
        "plan_s": round(planning, 1),
        "run_s": round(took, 1),
        "tokens_per_s": round(job.plan.tokens / took),
    }


def forget_peak() -> float:
    """Let the highest resident memory start anew from what there is now, in MiB: loading a model takes more than keeping it."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    return peak()


def peak() -> float:
    """The highest resident memory of this process since :func:`forget_peak`, in MiB."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return round(int(fields["VmHWM"].removesuffix("kB")) / 1024, 1)


def written(path: Path, count: int) -> Path:
    """A file of ``count`` stories. Parquet in groups of 1,000 rows, as writers do."""
    if path.suffix == ".jsonl":
        with path.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(story) + "\n" for story in stories(count))
        return path
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(list(stories(count))), path, row_group_size=1000)
    return path


def stories(count: int) -> Iterator[dict[str, str]]:
    shuffle = random.Random(0).shuffle
    for story in islice(cycle(corpus.stories(corpus.shipped("stories.jsonl"))()), count):
        words = story.text.split()
        shuffle(words)
        yield {"emotion": story.emotion, "topic": story.topic, "text": " ".join(words)}


def table(results: dict[str, Any], machine: str) -> str:
    lines = [
        "| stories | file | plan | tokens/s | memory once loaded | after the plan | at most |",
        "|---|---|---|---|---|---|---|",
        *(
            f"| {row['stories']:,} | {row['file_mib']:.1f} MiB of {FORMS[row['file']]} | {row['plan_s']:.0f} s | {row['tokens_per_s']:,} "
            f"| {row['loaded_mib']:,.0f} MiB | {row['planned_mib']:,.0f} MiB | {row['peak_mib']:,.0f} MiB |"
            for row in results["rows"]
        ),
    ]
    source = (
        f"{results['model']} ({results['dtype']}), cut to {results['layers']} layer; processor time of one thread; "
        "the process's highest resident memory.\n"
        f"Measured by `python bench/extract_scale.py` on {machine}."
    )
    return "\n".join([*lines, "", source])


FORMS = {"jsonl": "JSON Lines", "parquet": "Parquet"}


if __name__ == "__main__":
    main()
