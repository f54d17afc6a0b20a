"""Pieces of a terminal picture: labelled values, a progress bar, a stacked bar, a curve. No frames, no padding."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.segment import Segment
from rich.text import Text

from weft.report.human import format_metric

#: Glyphs differ as well as colours, for terminals without colour.
SHARE_LOOK = {
    "compute": ("█", "green"),
    "communication": ("▓", "cyan"),
    "waiting": ("▒", "yellow"),
    "data": ("░", "magenta"),
}
#: The bits of Unicode's braille patterns (U+2800 on): left and right column of dots, from the top.
BRAILLE = ((0x01, 0x02, 0x04, 0x40), (0x08, 0x10, 0x20, 0x80))


class Facts:
    """Labels beside values. A value wraps inside its column; a label that repeats the one above is left out."""

    def __init__(self, rows: Iterable[tuple[str, RenderableType]], indent: int = 0, style: str = "dim") -> None:
        self.rows, self.indent, self.style = list(rows), indent, style

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        margin = self.indent + max((len(label) for label, _ in self.rows), default=0) + 2
        inner = options.update(width=max(20, options.max_width - margin), height=None)
        style = console.get_style(self.style)
        above = None
        for label, value in self.rows:
            shown = "" if label == above else label
            above = label
            for line in console.render_lines(Text(value) if isinstance(value, str) else value, inner, pad=False):
                yield Segment(f"{' ' * self.indent}{shown}".ljust(margin), style)
                yield from line
                yield Segment.line()
                shown = ""


class Progress:
    """A bar over the width that its caption leaves."""

    def __init__(self, step: int, steps: int, caption: str) -> None:
        self.step, self.steps, self.caption = step, steps, caption

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        count = f"{self.step} of {self.steps}"
        width = max(5, options.max_width - len(count) - len(self.caption) - 4)
        done = min(width, width * self.step // max(1, self.steps))
        yield Text.assemble(count, "  ", ("━" * done, "green"), ("─" * (width - done), "dim"), "  ", self.caption)


def share_bar(shares: Mapping[str, float], width: int) -> Text:
    """A stacked bar of exactly ``width`` cells (largest remainders round up); empty when nothing was measured."""
    whole = sum(shares.values())
    if not whole:
        return Text(" " * width)
    exact = {name: share / whole * width for name, share in shares.items()}
    cells = {name: int(x) for name, x in exact.items()}
    by_remainder = sorted(exact, key=lambda name: cells[name] - exact[name])
    for name in by_remainder[: width - sum(cells.values())]:
        cells[name] += 1
    return Text.assemble(*((SHARE_LOOK[name][0] * n, SHARE_LOOK[name][1]) for name, n in cells.items()))


def braille_curve(points: Sequence[float], width: int, height: int) -> list[str]:
    """A line chart, ``height`` lines of at most ``width`` characters of 2 x 4 dots. What is not finite leaves a gap."""
    columns = _resample(points, 2 * width)
    finite = [y for y in columns if math.isfinite(y)]
    low, high = min(finite, default=0.0), max(finite, default=0.0)
    bottom = 4 * height - 1
    scale = bottom / (high - low) if high > low else 0.0
    cells = [[0] * ((len(columns) + 1) // 2) for _ in range(height)]
    before: int | None = None
    for x, y in enumerate(columns):
        if not math.isfinite(y):
            before = None
            continue
        row = round((high - y) * scale) if scale else bottom
        step_to = row if before is None else before + (row > before) - (row < before)  # the line is drawn on, not twice
        for dot in range(min(row, step_to), max(row, step_to) + 1):
            cells[dot // 4][x // 2] |= BRAILLE[x % 2][dot % 4]
        before = row
    return ["".join(chr(0x2800 + cell) for cell in line) for line in cells]


def _resample(points: Sequence[float], num: int) -> list[float]:
    """Means over ``num`` nearly equal stretches; fewer points are repeated to fill the width."""
    if not points:
        return []
    bounds = [i * len(points) / num for i in range(num + 1)]
    stretches = (points[int(a) : max(int(a) + 1, int(b))] for a, b in pairwise(bounds))
    return [sum(s) / len(s) for s in stretches]


class Curve:
    """A curve with its highest and lowest value before it and the value it has reached behind it."""

    def __init__(self, points: Sequence[float], height: int, reached: float) -> None:
        self.points, self.height, self.reached = points, height, reached

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        now = Text(format_metric(self.reached), "bold" if math.isfinite(self.reached) else "bold red")
        finite = [y for y in self.points if math.isfinite(y)]
        if not finite:
            yield now
            return
        top, bottom = format_metric(max(finite)), format_metric(min(finite))
        margin = max(len(top), len(bottom))
        lines = braille_curve(self.points, max(4, min(options.max_width - margin - len(now) - 2, 60)), self.height)
        lines[-1] += " "
        for label, line in zip([top, *[""] * (self.height - 2), bottom], lines, strict=True):
            end = now if line is lines[-1] else ""
            yield Text.assemble((f"{label:>{margin}} ", "dim"), (line, "green"), end)
