"""What the plugin costs vLLM: `python bench/serving.py` decodes one batch in settings that take turns.

Three engines are up: one without the plugin's configuration ("absent"), one with it, and one that counts the scores of all concepts for
its metrics. On the second the same prompts are run with nothing of emovec in the requests ("idle"), with scores for all of them
("reading"), with one steering value for all ("one value") and with as many values as requests ("16 values"); on the third with nothing
in the requests ("metrics"). Timed is each step in which every request gets one token, from one step's output to the next; a setting's
round is its median. Settings take turns within each round, so what else the machine does falls on all of them alike; a setting is
compared with "absent" of the same round, and the spread over rounds is given with the median.

Needs vLLM beside emovec (see docs/serving.md). On a GPU the same command does, with `--dtype bfloat16` and a model and bank of your own.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from typing import Any

import pages
import provenance

from emovec.bank import load_bank
from emovec.models import local_path

PAGE = pages.DOCS / "serving.md"
STRENGTH = 0.05


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--bank", default=None, help="default: that of the model's name")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--prompt", type=int, default=64, help="tokens")
    parser.add_argument("--tokens", type=int, default=48, help="to generate")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--eager", action="store_true")
    parser.add_argument("--memory", type=float, default=None, help="share of a GPU's memory for each of the three engines")
    parser.add_argument("--name", default="serving")
    o = parser.parse_args()
    bank = o.bank or o.model
    names = load_bank(bank).names
    shared: dict[str, Any] = {
        "dtype": o.dtype,
        "enforce_eager": o.eager,
        "max_model_len": o.prompt + o.tokens + 1,
        "max_num_seqs": o.requests,
    }
    shared |= {"enable_prefix_caching": False} | ({} if o.memory is None else {"gpu_memory_utilization": o.memory})
    from vllm import LLM  # here, since the table needs none

    absent = LLM(local_path(o.model), **shared)
    ours = LLM(local_path(o.model), **shared, additional_config={"emovec": {"bank": bank}})
    counting = LLM(local_path(o.model), **shared, additional_config={"emovec": {"bank": bank, "metrics": "all"}})
    one = {"emotion_bias": {names[0]: STRENGTH}}
    several = [{"emotion_bias": {names[i]: STRENGTH, names[i + 1]: -STRENGTH}} for i in range(o.requests)]
    settings: dict[str, tuple[Any, list[Any]]] = {
        "absent": (absent, [None] * o.requests),
        "idle": (ours, [None] * o.requests),
        "reading": (ours, [{"emotion_scores": True}] * o.requests),
        "metrics": (counting, [None] * o.requests),
        "one value": (ours, [one] * o.requests),
        f"{o.requests} values": (ours, several),
    }
    steps: dict[str, list[float]] = {name: [] for name in settings}
    for number in range(-2, o.rounds):  # the first two rounds warm up
        order = list(settings.items())
        for name, (engine, extra) in order if number % 2 else order[::-1]:
            found = decode(engine, extra, o)
            if number >= 0:
                steps[name].append(found)
        print(number, {name: round(1e3 * found[-1], 3) for name, found in steps.items() if found}, flush=True)
    results = {name: summary(found, steps["absent"]) for name, found in steps.items()}
    print(json.dumps(results, indent=1))
    provenance.write(o.name, {"options": vars(o), "cpus": os.environ.get("VLLM_CPU_OMP_THREADS_BIND"), "settings": results})
    if o.name == "serving":
        found = provenance.read("serving")
        pages.write(PAGE, {"cost": table(found["results"], found["provenance"]["name"])})


def table(results: dict[str, Any], machine: str) -> str:
    """What docs/serving.md says of the cost."""
    o, settings = results["options"], results["settings"]
    idle = settings["idle"]["step_ms"]
    lines = ["| requests with | ms a step | to absent | middle half of rounds | to idle |", "|---|---|---|---|---|"]
    for name, found in settings.items():
        ratio, low, high = (f"{found[key]:.3f}" for key in ("ratio", "ratio_low_quarter", "ratio_high_quarter"))
        lines.append(f"| {name} | {found['step_ms']:.1f} | {ratio} | {low} to {high} | {found['step_ms'] / idle:.3f} |")
    mode = "eager" if o["eager"] else "compiled"
    how = f"{o['model']}, {o['requests']} requests, {o['rounds']} rounds of {o['tokens']} tokens each, {mode}"
    where = f"Measured by `python bench/serving.py` on {machine}, one thread; more in bench/results/serving.json."
    return "\n".join([*lines, "", f"{how}. {where}"])


def decode(engine: Any, extra: list[Any], o: argparse.Namespace) -> float:
    """The median time of a step, in seconds, in which all requests get a token."""
    from vllm import SamplingParams

    core = engine.llm_engine
    for number, args in enumerate(extra):
        params = SamplingParams(temperature=0.0, max_tokens=o.tokens, ignore_eos=True, extra_args=args, detokenize=False)
        core.add_request(str(number), {"prompt_token_ids": [100 + number, *range(200, 199 + o.prompt)]}, params)
    times = []
    while core.has_unfinished_requests():
        begin = time.perf_counter()
        core.step()
        times.append(time.perf_counter() - begin)
    return statistics.median(times[4:-2])


def summary(found: list[float], absent: list[float]) -> dict[str, float]:
    ratios = [mine / theirs for mine, theirs in zip(found, absent, strict=True)]
    low, _, high = statistics.quantiles(ratios, n=4)
    times = {"step_ms": 1e3 * statistics.median(found), "step_ms_min": 1e3 * min(found), "step_ms_max": 1e3 * max(found)}
    return times | {"ratio": statistics.median(ratios), "ratio_low_quarter": low, "ratio_high_quarter": high}


if __name__ == "__main__":
    main()
