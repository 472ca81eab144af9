"""Write the tables of docs/kernels.md from the results of bench/cpu.py and bench/gpu.sh: `python bench/kernel_tables.py`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pages
import provenance

PAGE = pages.DOCS / "kernels.md"


def cpu(found: dict[str, Any]) -> str:
    """The tables of the CPU: bf16, fp32, one vector added, two threads."""
    results, name = found["results"], found["provenance"]["name"]
    form = results["form"]
    cases = {(case["dtype"], case["work"], case["tokens"], case["width"]): case for case in results["cases"]}
    shapes = [(tokens, width) for dtype, work, tokens, width in cases if (dtype, work) == ("bf16", "read")]
    lines = [
        f"{name}, 171 concepts, one thread, median microseconds. By itself emovec takes `{form}` there.",
        "Peaks are those of the instruction that a form multiplies with, measured in the same turns.",
        "",
        "| bf16: tokens x width | read | of peak | torch | torch / emovec | read, norm and add | of the read | torch | torch / emovec |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for shape in shapes:
        read, add = cases["bf16", "read", *shape], cases["bf16", "read + norm + add", *shape]
        cells = [*pair(read, form, f"{read['share_of_peak'].get(form, 0):.0%}"), *pair(add, form, f"{add['times_read'][form]:.2f}")]
        lines.append(f"| {shape[0]} x {shape[1]} | {' | '.join(cells)} |")
    times = [case["min_median_max_us"] for case in results["cases"] if "high" in case["min_median_max_us"]]
    ratios = [each["high"][1] / each[form][1] for each in times]
    lines += [
        "",
        f'With `precision="high"` a read of these takes {min(ratios):.1f} to {max(ratios):.1f} times as long: its readers are fp32.',
    ]
    lines += [
        "",
        "| fp32, read: tokens x width | AVX-512 | of peak | AVX2 | of peak | torch | torch / AVX-512 | torch / AVX2 |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for shape in shapes:
        case = cases["fp32", "read", *shape]
        (wide, share, torch, of_wide), (narrow, narrow_share, _, of_narrow) = (
            pair(case, one, f"{case['share_of_peak'].get(one, 0):.0%}") for one in ("cpu_avx512", "cpu_avx2")
        )
        lines.append(f"| {shape[0]} x {shape[1]} | {wide} | {share} | {narrow} | {narrow_share} | {torch} | {of_wide} | {of_narrow} |")
    versions = results["peers"]
    peers = [f"{package} {versions[package]}" for package in versions]
    lines += [
        "",
        f"| one vector added, bf16: tokens x width | the op | torch `add_` | emovec's hook | {' | '.join(peers)} |",
        "|---|---|---|---|---|---|",
    ]
    for shape in shapes:
        times = cases["bf16", "add", *shape]["min_median_max_us"]
        cells = [f"{times[one][1]:,.1f}" for one in (form, "torch", "emovec's hook", *versions)]
        lines.append(f"| {shape[0]} x {shape[1]} | {' | '.join(cells)} |")
    lines += ["", "| two threads against one, bf16: tokens x width | work | emovec | torch |", "|---|---|---|---|"]
    for case in results["two_threads"]:
        speedup = case["speedup"]
        lines.append(f"| {case['tokens']} x {case['width']} | {case['work']} | {speedup[form]:.2f} | {speedup['torch']:.2f} |")
    lines += [
        "",
        "Measured by `make bench`; more in bench/results/cpu.json. Torch's side is its best form: the fastest of `mm` with a padded,",
        "contiguous bank, `linear`, `addmm` and `mv`; a fused norm, a gather and an in-place add.",
    ]
    return "\n".join(lines)


def torch_form(case: Mapping[str, Any]) -> str:
    """The name of torch's fastest form of a work."""
    times = case["min_median_max_us"]
    return min((name for name in times if name.startswith("torch")), key=lambda name: float(times[name][1]))


def best_torch(case: Mapping[str, Any]) -> float:
    """Its median in microseconds."""
    return float(case["min_median_max_us"][torch_form(case)][1])


def pair(case: dict[str, Any], form: str, between: str) -> list[str]:
    """Ours, a remark on it, torch's best, and how many times as long that takes."""
    ours, torch = case["min_median_max_us"][form][1], best_torch(case)
    return [f"{ours:,.{0 if ours >= 100 else 1}f}", between, f"{torch:,.{0 if torch >= 100 else 1}f}", f"{torch / ours:.2f}"]


def gpu(found: dict[str, Any]) -> str:
    """The table of the GPU, in bf16."""
    results = found["results"]
    copy, product = results["ceilings"]["copy_bytes_per_s"] / 1e12, results["ceilings"]["product_flop_per_s"] / 1e12
    lines = [
        f"{found['provenance']['name']}, bf16, 171 concepts, median microseconds; each variant is checked against fp64 before it is timed.",
        f"A copy ran at {copy:.2f} TB/s (read and written) and bf16 products at {product:.0f} TFLOP/s in the same run.",
        "",
        "| tokens x width | work | floor | emovec | of the floor | started early | portable | sliced | Triton | torch | torch / emovec |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for case in sorted(plain(results["cases"]), key=lambda case: (case["width"], -case["tokens"])):
        floor = case["floor_us"]
        ours, portable, sliced, triton, torch = (
            case["min_median_max_us"][name][1] for name in ("auto", "portable", "sliced", "triton", "torch")
        )
        early = f"{case['min_median_max_us']['decode_sm90_pdl'][1]:,.1f}" if case["tokens"] <= 192 else ""
        lines.append(
            f"| {case['tokens']:,} x {case['width']} | {case['work']} | {floor:,.1f} | {ours:,.1f} | {floor / ours:.0%} "
            f"| {early} | {portable:,.0f} | {sliced:,.0f} | {triton:,.0f} | {torch:,.1f} | {torch / ours:.1f} |"
        )
    lines += [
        "",
        "Calls are replayed from CUDA graphs over rotated buffers, the bank among them, so it comes from memory.",
        '"emovec" is the automatic choice; "started early" is `cuda_decode_sm90_pdl`, by name only.',
        "torch: its best eager form (padded bank, fused norm, gather, in-place add), in a graph too.",
        "Measured by `bench/gpu.sh time`; every form, minima and maxima are in bench/results/gpu.json.",
    ]
    return "\n".join(lines)


def plain(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The cases with rotated buffers and nothing between the calls."""
    return [case for case in cases if case["case"].split()[0] not in ("hot", "chain")]


def around(found: dict[str, Any]) -> str:
    """Adding with a warm bank, and between two norms, on a GPU."""
    lines = ["| tokens | what | emovec | started early | torch |", "|---|---|---|---|---|"]
    for case in found["results"]["cases"]:
        kind, times = case["case"].split()[0], case["min_median_max_us"]
        if kind not in ("hot", "chain"):
            continue
        none = times["none"][1] if kind == "chain" else 0.0
        what = "the same buffers again and again" if kind == "hot" else f"between two RMSNorms, which take {none:.1f} µs alone"
        cells = [f"{times[name][1] - none:.1f}" for name in ("auto", "decode_sm90_pdl", "torch")]
        lines.append(f"| {case['tokens']} | {what} | {' | '.join(cells)} |")
    return "\n".join(
        [
            *lines,
            "",
            f"{found['provenance']['name']}, d = 4096, bf16: median microseconds that reading and adding add. bench/results/gpu.json.",
        ]
    )


def model(found: dict[str, Any]) -> str:
    """What hooks cost a whole model on a GPU."""
    cases = [case for case in found["results"]["cases"] if case["way"] == "graph"]
    settings = list(dict.fromkeys(case["setting"] for case in cases))
    lines = [
        f"| batch | {' | '.join(settings)} |",
        "|---" * (len(settings) + 1) + "|",
    ]
    for batch in dict.fromkeys(case["batch"] for case in cases):
        row = {case["setting"]: case for case in cases if case["batch"] == batch}
        cells = []
        for one in settings:
            ratio = f" (x {row[one]['ratio']:.3f})" if row[one]["hooked_layers"] else ""
            cells.append(f"{row[one]['ms_min_median_max'][1]:.2f} ms{ratio}")
        lines.append(f"| {batch} | {' | '.join(cells)} |")
    lines += [
        "",
        f"{found['provenance']['name']}: median time from one token to the next, as a CUDA graph of the step. Measured by",
        "`python bench/end_to_end.py`; called from Python token by token, where the host is the limit, it is in",
        "bench/results/end_to_end.json too.",
    ]
    return "\n".join(lines)


def tables() -> dict[str, str]:
    """Every table of the page, from the committed results."""
    return {
        "cpu": cpu(provenance.read("cpu")),
        "gpu": gpu(provenance.read("gpu")),
        "around": around(provenance.read("gpu")),
        "model": model(provenance.read("end_to_end")),
    }


if __name__ == "__main__":
    pages.write(PAGE, tables())
