"""Do the shipped bank's bounds hold, and do they catch anything? `python bench/guard.py`

The bounds, and the false alarms on the ordinary conversations that they were not found on, are in the bank (`emovec calibrate`). Here the
bank watches the packaged scenarios, each written to imply one feeling without naming it, and its target's bound fires or does not; as
does some bound of the target's family. Beside it stands how often the same bounds fire on the scenarios of other families.

Writes bench/results/guard.json and the table of docs/calibration.md; with `--tables` the table alone.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import asdict
from typing import Any

import pages
import provenance
import torch

from emovec.bank import load_bank
from emovec.calibration import Alarms, alarms_in, conversations
from emovec.extraction import corpus
from emovec.models import load_model
from emovec.stats import wilson

PAGE = pages.DOCS / "calibration.md"
MODEL = "smollm2-135m-instruct"
SHOWN = ("afraid", "angry", "desperate", "nervous", "sad", "guilty")


def measured() -> dict[str, Any]:
    bank = load_bank(MODEL)
    guard = bank.meta["guard"]
    alarms = Alarms.of(bank)
    above = torch.tensor([guard["above"][name] for name in bank.names], dtype=torch.float64)
    false, units = guard["measured"]["alarms"], guard["measured"]["units"]
    found = [json.loads(line) for line in corpus.shipped("scenarios.jsonl").read_text(encoding="utf-8").splitlines()]
    model, tokenizer = load_model(MODEL, dtype=torch.bfloat16)
    family = {name: members for members in bank.families.values() for name in members}
    fired: dict[str, set[str]] = {}
    readings = conversations(model, tokenizer, bank, [scenario["content"] for scenario in found])
    for scenario, reading in zip(found, readings, strict=True):
        counted = alarms_in([reading], above, alarms)["alarms"]
        fired[scenario["id"]] = {name for name, count in zip(bank.names, counted, strict=True) if count}
        print(f"{scenario['id']}: {len(fired[scenario['id']])} bounds crossed", flush=True)
    targets = []
    for target in dict.fromkeys(scenario["target"] for scenario in found):
        own = [scenario["id"] for scenario in found if scenario["target"] == target]
        others = [scenario["id"] for scenario in found if scenario["target"] not in family[target]]
        targets.append(
            {
                "target": target,
                "above": guard["above"][target],
                "false_alarms": false[target],
                "own": [sum(target in fired[key] for key in own), len(own)],
                "own_family": [sum(bool(fired[key] & set(family[target])) for key in own), len(own)],
                "others": [sum(target in fired[key] for key in others), len(others)],
                "others_family": [sum(bool(fired[key] & set(family[target])) for key in others), len(others)],
            }
        )
    total, most = sum(false.values()), expected_most(int(units), alarms.rate)
    return {
        "alarms": asdict(alarms),
        "ordinary": units,
        "false_rate": {"mean": round(total / len(false) / units, 4), "highest": max(false.values()) / units},
        "false_interval_of": {name: [round(end, 4) for end in wilson(false[name], int(units))] for name in SHOWN},
        "expected_most": most,
        "within_expected": sum(count <= most for count in false.values()),
        "within_interval": sum(wilson(count, int(units))[0] <= guard["rate"] for count in false.values()),
        "concepts": len(false),
        "targets": targets,
    }


def expected_most(conversations: int, rate: float) -> int:
    """The 97.5 % quantile of false alarms in as many conversations as a bound was found on, if both halves are of a kind.

    The bound is the j-th lowest of n peaks, so that the share of conversations above it is Beta(n + 1 - j, j) distributed, and the
    alarms in n others are beta-binomial.
    """
    n = conversations
    j = math.ceil((1 - rate) * (n + 1) - 1e-9)
    a, b = n + 1 - j, j

    def log_beta(x: float, y: float) -> float:
        return math.lgamma(x) + math.lgamma(y) - math.lgamma(x + y)

    reached = 0.0
    for count in range(n + 1):
        reached += math.comb(n, count) * math.exp(log_beta(count + a, n - count + b) - log_beta(a, b))
        if reached >= 0.975:
            return count
    return n


def table(results: dict[str, Any], machine: str) -> str:
    lines = [
        "| concept | bound | false alarms | its own scenarios | any of its family there | other scenarios | any of its family there |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in results["targets"]:
        cells = [f"{row[key][0]} of {row[key][1]}" for key in ("own", "own_family", "others", "others_family")]
        lines.append(f"| {row['target']} | {row['above']:+.2f} | {row['false_alarms']} of {results['ordinary']:g} | {' | '.join(cells)} |")
    caught, own = (sum(row["own"][part] for row in results["targets"]) for part in (0, 1))
    family = sum(row["own_family"][0] for row in results["targets"])
    lines += [
        "",
        f"False alarms over all {results['concepts']} concepts: {results['false_rate']['mean']:.3f} in a conversation on average, "
        f"{results['false_rate']['highest']:.2f} for the worst; for {results['within_interval']} of {results['concepts']} concepts the "
        f"95 % interval holds {results['alarms']['rate']:g} or lies below.",
        f"A bound found on {results['ordinary']:g} conversations is itself uncertain: of {results['ordinary']:g} others it is crossed in "
        f"{results['expected_most']} at most, with 97.5 % probability; so are {results['within_expected']} of the {results['concepts']}.",
        f"Of {own} scenarios the target's own bound fires in {caught}, one of its family's in {family}.",
        f"{machine}, `python bench/guard.py`, bench/results/guard.json.",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", action="store_true", help="write the page's table from the results there are")
    torch.set_num_threads(1)
    if not parser.parse_args().tables:
        provenance.write("guard", measured())
    found = provenance.read("guard")
    pages.write(PAGE, {"guard": table(found["results"], found["provenance"]["name"])})


if __name__ == "__main__":
    main()
