"""Draws what local_sgd.py measured: python draw_local_sgd.py DATA.json PICTURE.svg"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import matplotlib as mpl

mpl.use("svg")
mpl.rcParams["svg.hashsalt"] = "weft"  # the same data give the same file
from matplotlib import pyplot as plt  # noqa: E402

COLOURS = ["#222222", "#1f77b4", "#2ca02c", "#ff7f0e", "#9467bd", "#d62728"]


def main() -> None:
    data = json.loads(Path(sys.argv[1]).read_text())
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), constrained_layout=True)
    for colour, (name, curve) in zip(COLOURS, data["curves"].items(), strict=False):
        style = "--" if name.startswith("diloco") else "-"
        left.plot([s for s, _ in curve], [v for _, v in curve], style, color=colour, label=name, linewidth=1.6)
        if name in data["times"]:
            right.plot([b / 1e6 for b in data["links"]], data["times"][name], style, color=colour, linewidth=1.6)
    left.axhline(data["target"], color="#999999", linewidth=0.8, linestyle=":")
    left.set(xlabel="step", ylabel=f"held-out loss, {data['unit']}", title="Each step: allreduce learns most")
    left.legend(frameon=False, fontsize=9)
    right.set(
        xscale="log",
        yscale="log",
        xlabel="link, Mbit/s",
        ylabel="seconds",
        title=f"Time to {data['target']:.2f} (dotted at the left): on slow links, fewer meetings win",
    )
    for axes in (left, right):
        axes.grid(visible=True, color="#e5e5e5", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(sys.argv[2], metadata={"Date": None})


if __name__ == "__main__":
    main()
