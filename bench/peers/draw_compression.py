"""Draws what compression.py measured: python draw_compression.py CURVES.json PICTURE.svg"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path

import matplotlib as mpl

mpl.use("svg")
mpl.rcParams["svg.hashsalt"] = "weft"  # the same data give the same file
from matplotlib import pyplot as plt  # noqa: E402

COLOURS = ["#222222", "#1f77b4", "#2ca02c", "#ff7f0e", "#9467bd"]


def main() -> None:
    """Left: the mean over seeds by step. Right: how far each codec is behind the uncompressed run of the same seed."""
    curves: dict[str, list[list[tuple[int, float]]]] = json.loads(Path(sys.argv[1]).read_text())
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), constrained_layout=True)
    base = curves["none"]
    for colour, (name, seeds) in zip(COLOURS, curves.items(), strict=False):
        steps = [step for step, _ in seeds[0]]
        losses = [[loss for _, loss in curve] for curve in seeds]
        left.plot(steps, [statistics.mean(at) for at in zip(*losses)], color=colour, label=name, linewidth=1.6)
        if name == "none":
            continue
        gaps = [[100 * (v / w - 1) for (_, v), (_, w) in zip(curve, plain)] for curve, plain in zip(seeds, base)]
        each = list(zip(*gaps))
        right.plot(steps, [statistics.mean(at) for at in each], color=colour, linewidth=1.6)
        right.fill_between(steps, [min(at) for at in each], [max(at) for at in each], color=colour, alpha=0.15, lw=0)
    left.set(xlabel="step", ylabel="held-out loss, nats per byte", title=f"codelm small, mean of {len(base)} seeds")
    left.legend(frameon=False, fontsize=9)
    right.axhline(0, color="#222222", linewidth=0.8)
    right.set(xlabel="step", ylabel="%", title="Above the uncompressed run of the same seed")
    for axes in (left, right):
        axes.grid(visible=True, color="#e5e5e5", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(sys.argv[2], metadata={"Date": None})


if __name__ == "__main__":
    main()
