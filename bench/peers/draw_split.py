"""Draws what split.py measured: python draw_split.py SAMPLES.json PICTURE.svg"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("svg")
mpl.rcParams["svg.hashsalt"] = "weft"  # the same data give the same file
from matplotlib import pyplot as plt  # noqa: E402

PURPOSES = {"parameters": "#1f77b4", "gradients": "#ff7f0e", "optimizer": "#2ca02c"}
OTHER = "#9467bd"  # whatever else a plan names
COLOURS = {
    "one worker": "#222222",
    "2 copies": "#7f7f7f",
    "sharded": "#1f77b4",
    "tensor": "#ff7f0e",
    "pipeline": "#2ca02c",
}
MEASURED = {"color": "#222222", "marker": "D", "linestyle": "none", "markersize": 5}


def main() -> None:
    samples = json.loads(Path(sys.argv[1]).read_text())
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), constrained_layout=True)
    draw_memory(left, samples["memory"])
    draw_steps(right, samples["layouts"])
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(sys.argv[2], metadata={"Date": None})


def draw_memory(axes: Any, found: dict[str, list[dict[str, Any]]]) -> None:
    """Bars: as planned, by purpose. Diamonds: as the kernel measured."""
    for k, runs in enumerate(found.values()):
        below = 0.0
        planned = runs[0]["predicted"]
        parts = {what: planned.get(what, 0) for what in PURPOSES}
        parts["activations, and room for gathering"] = sum(planned.values()) - sum(parts.values())
        for what, nbytes in parts.items():
            axes.bar(
                k, nbytes / 1e6, 0.6, bottom=below, color=PURPOSES.get(what, OTHER), label=what if k == 0 else None
            )
            below += nbytes / 1e6
        peak = statistics.median(run["peak_bytes"] for run in runs) / 1e6
        axes.plot(k, peak, **MEASURED, label="measured" if k == 0 else None)
    names = ["one worker" if name == "allreduce" else f"{name}, 4" for name in found]
    axes.set(ylabel="MB of one worker", title="codelm large: what a worker holds")
    axes.set_xticks(range(len(names)), names)
    axes.legend(frameon=False, fontsize=9, loc="upper right")
    axes.grid(visible=True, axis="y", color="#e5e5e5", linewidth=0.6)
    axes.set_axisbelow(True)


def draw_steps(axes: Any, found: dict[str, dict[str, list[dict[str, Any]]]]) -> None:
    """Bars: measured. Diamonds: as planned, where a plan says."""
    width = 0.16
    for k, (name, colour) in enumerate(COLOURS.items()):
        for place, each in enumerate(found.values()):
            if name not in each:
                continue
            at = place + (k - 2) * width
            measured = statistics.median(run["step_s"] for run in each[name])
            axes.bar(at, measured, 0.9 * width, color=colour, label=name if place == 0 else None)
            if planned := statistics.median(run["predicted_s"] for run in each[name]):
                label = "as planned" if place == 0 and name == "sharded" else None
                axes.plot(at, planned, **MEASURED, label=label, markerfacecolor="white")
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(plt.FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(
        plt.FuncFormatter(lambda value, _: f"{value:g}" if f"{value:.0e}"[0] in "25" else "")
    )
    axes.set(ylabel="seconds a step", title="codelm medium, 2 workers: a step, by their link")
    axes.set_xticks(range(len(found)), list(found))
    axes.legend(frameon=False, fontsize=9)
    axes.grid(visible=True, axis="y", color="#e5e5e5", linewidth=0.6)
    axes.set_axisbelow(True)


if __name__ == "__main__":
    main()
