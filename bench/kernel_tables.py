"""Write the tables of docs/kernels.md from the results of bench/cpu.py and bench/gpu.sh: `python bench/kernel_tables.py`."""

from __future__ import annotations

from typing import Any

import pages
import provenance

PAGE = pages.DOCS / "kernels.md"
FORM = "cpu_amx"  # what the machine of the committed result takes by itself


def cpu(found: dict[str, Any]) -> str:
    """The table of the CPU, in bf16."""
    lines = [
        "bf16, 171 concepts, one thread, median microseconds:",
        "",
        "| tokens x width | read | torch | read, norm and add | torch | torch / emovec |",
        "|---|---|---|---|---|---|",
    ]
    for case in found["results"]["cases"]:
        read, add = case["read"], case["read + norm + add"]
        if case["dtype"] == "bf16":
            cells = (read[FORM], read["torch"], add[FORM], add["torch"])
            numbers = " | ".join(f"{value:,.0f}" for value in cells)
            lines.append(f"| {case['tokens']} x {case['width']} | {numbers} | {add['torch'] / add[FORM]:.1f} |")
    lines += [
        "",
        f"Measured by `python bench/cpu.py` on {found['provenance']['name']}; fp32 and other forms: bench/results/cpu.json.",
        "Torch's side is its best form: a product with a padded, contiguous bank, a norm, a gather and an in-place add.",
    ]
    return "\n".join(lines)


def gpu(found: dict[str, Any]) -> str:
    """The table of the GPU, in bf16."""
    results = found["results"]
    copy, product = results["ceilings"]["copy_bytes_per_s"] / 1e12, results["ceilings"]["product_flop_per_s"] / 1e12
    lines = [
        f"{found['provenance']['name']}, bf16, 171 concepts, median microseconds; each variant is checked against fp64 before it is timed.",
        f"Copies ran at {copy:.2f} TB/s and bf16 products at {product:.0f} TFLOP/s in the same run.",
        "",
        "| tokens x width | work | floor | emovec | of the floor | portable form | torch | torch / emovec |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for case in results["cases"]:
        floor = case["floor_us"]
        ours, portable, torch = (case["min_median_max_us"][name][1] for name in ("auto", "portable", "torch"))
        lines.append(
            f"| {case['tokens']:,} x {case['width']} | {case['work']} | {floor:,.1f} | {ours:,.1f} | {floor / ours:.0%} "
            f"| {portable:,.0f} | {torch:,.1f} | {torch / ours:.1f} |"
        )
    lines += [
        "",
        'Prefill is timed with rotated buffers, decode in graphs of 240 calls over 80 of them. "emovec" is the automatic choice:',
        "`stream_sm90` from 2,048 tokens on, `decode_sm90` up to 512, portable between. torch: its best eager form (padded bank, fused",
        "norm, gather, in-place add). Measured by `bench/gpu.sh time`; more in bench/results/gpu.json.",
    ]
    return "\n".join(lines)


def tables() -> dict[str, str]:
    """Every table of the page, from the committed results."""
    return {"cpu": cpu(provenance.read("cpu")), "gpu": gpu(provenance.read("gpu"))}


if __name__ == "__main__":
    pages.write(PAGE, tables())
