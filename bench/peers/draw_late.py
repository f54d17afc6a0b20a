"""Draws what late.py measured: python draw_late.py DATA.json PICTURE.svg"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import matplotlib as mpl

mpl.use("svg")
mpl.rcParams["svg.hashsalt"] = "weft"  # the same data give the same file
from matplotlib import pyplot as plt  # noqa: E402

COLOURS = {"none": "#d62728", "rate": "#ff7f0e", "dc": "#1f77b4"}
STYLES = {"staleness4": "-", "async": "--"}
BOUNDS = {"staleness4": "staleness=4", "async": "staleness=none"}
UNITS = {"accuracy": "held-out accuracy", "loss": "held-out loss, nats per byte"}


def main() -> None:
    data = json.loads(Path(sys.argv[1]).read_text())
    figure, panels = plt.subplots(
        1, len(data["curves"]), figsize=(5.5 * len(data["curves"]), 4.2), constrained_layout=True, squeeze=False
    )
    for axes, (task, curves) in zip(panels[0], data["curves"].items(), strict=True):
        for arm, curve in curves.items():
            bound, _, correction = arm.partition("_")
            colour, style = COLOURS.get(correction, "#222222"), STYLES.get(bound, "-")
            label = f"{BOUNDS[bound]}, {correction}" if correction else arm
            axes.plot(*zip(*curve, strict=True), style, color=colour, label=label, linewidth=1.6)
        axes.set(xlabel="step", ylabel=UNITS[data["metrics"][task]], title=task)
        axes.grid(visible=True, color="#e5e5e5", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    lines, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(lines, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    figure.savefig(sys.argv[2], metadata={"Date": None})


if __name__ == "__main__":
    main()
