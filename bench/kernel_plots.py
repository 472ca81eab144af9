"""Draw the figures of docs/kernels.md from the results of bench/cpu.py and bench/gpu.sh: `python bench/kernel_plots.py`."""

from __future__ import annotations

from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import pages
import provenance
from kernel_tables import plain, torch_form

Times = dict[str, list[tuple[int, float, float, float]]]  # by line: tokens, and microseconds: least, median, most
STYLES: dict[str, dict[str, Any]] = {
    "floor": {"color": "0.6", "linestyle": ":"},
    "peak": {"color": "0.6", "linestyle": ":"},
    "emovec": {"color": "#c2410c", "marker": "o", "linewidth": 2},
    "portable": {"color": "#c2410c", "linestyle": "--", "alpha": 0.5},
    "Triton": {"color": "#15803d", "linestyle": "--"},
    "torch": {"color": "#1d4ed8", "marker": "s", "markersize": 4},
}


def draw(name: str, title: str, panels: dict[str, Times]) -> None:
    """One panel of microseconds against tokens for each kind of work, both axes logarithmic; spreads as shades."""
    figure, axes = plt.subplots(1, len(panels), figsize=(4 * len(panels), 3.6), sharey=True, squeeze=False, layout="constrained")
    for axis, (work, times) in zip(axes[0], panels.items(), strict=True):
        for line, points in times.items():
            tokens, least, median, most = zip(*sorted(points), strict=True)
            axis.plot(tokens, median, label=line, **STYLES[line])
            axis.fill_between(tokens, least, most, color=STYLES[line]["color"], alpha=0.15, linewidth=0)
        axis.set(title=work, xscale="log", yscale="log", xlabel="tokens")
        axis.set_xscale("log", base=2)
        axis.grid(alpha=0.2)
    axes[0][0].set_ylabel("microseconds")
    axes[0][0].legend(fontsize="small")
    figure.suptitle(title, fontsize="medium")
    figure.savefig(pages.DOCS / name, metadata={"Date": None})


def gpu() -> None:
    found = provenance.read("gpu")
    panels: dict[str, Times] = {}
    for case in plain(found["results"]["cases"]):
        if case["width"] != 4096:
            continue
        times = panels.setdefault(case["work"], {})
        times.setdefault("floor", []).append((case["tokens"], *[case["floor_us"]] * 3))
        for line, variant in (("emovec", "auto"), ("portable", "portable"), ("Triton", "triton"), ("torch", "torch")):
            times.setdefault(line, []).append((case["tokens"], *case["min_median_max_us"][variant]))
    draw("kernels-gpu.svg", f"{found['provenance']['name']}, bf16, d = 4096, 171 concepts, in CUDA graphs", panels)


def cpu() -> None:
    found = provenance.read("cpu")
    form = found["results"]["form"]
    panels: dict[str, Times] = {}
    for case in found["results"]["cases"]:
        if case["width"] != 4096 or case["dtype"] != "bf16" or case["work"] == "add":
            continue
        times, measured = panels.setdefault(case["work"], {}), case["min_median_max_us"]
        times.setdefault("emovec", []).append((case["tokens"], *measured[form]))
        times.setdefault("torch", []).append((case["tokens"], *measured[torch_form(case)]))
        if share := case.get("share_of_peak", {}).get(form):
            times.setdefault("peak", []).append((case["tokens"], *[measured[form][1] * share] * 3))
    draw("kernels-cpu.svg", f"{found['provenance']['name']}, bf16, d = 4096, 171 concepts, one thread", panels)


if __name__ == "__main__":
    matplotlib.rcParams |= {"svg.hashsalt": "emovec", "svg.fonttype": "none"}  # the same file for the same figures; text as text
    gpu()
    cpu()
