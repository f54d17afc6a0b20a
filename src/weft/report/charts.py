"""Charts as inline SVG that stretches to any width while its labels, which are HTML, keep their size.

No script: colours come from the page's style sheet (light, dark, print), numbers stand in a table behind each chart.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from markupsafe import Markup

from weft.report.history import Mark, downsample, means
from weft.report.human import format_metric, format_seconds
from weft.sections import Chart, Line

WIDTH, HEIGHT = 1000, 260  # of the drawing's own units
BUCKETS = 300
SMOOTH_FROM = 120  # points, from which on a curve gets a line of means
NUM_COLOURS = 8
LONG_TEXT = 28  # characters of a cell, from which on it may wrap
TIME_STEPS_S = (1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 10800, 21600, 43200, 86400)
LIMIT = 1e100  # what is larger has diverged, and is drawn as what is not finite
LOG_FROM = 50.0  # greatest over least, from which on an axis is logarithmic

#: How what happened looks on a time axis. Glyphs differ as well as colours.
GLYPHS = {
    "failed": "✕",
    "restarted": "↻",
    "resumed": "▶",
    "stopped": "■",
    "warning": "!",
    "finished": "✓",
    "saved": "▾",
}
QUIET = {"saved"}  # many: a tick below, no line


@dataclass(frozen=True)
class Axis:
    """Maps values to 0..1. ``ticks``: (place, label)."""

    low: float
    high: float
    log: bool
    ticks: list[tuple[float, str]]

    def place(self, value: float) -> float:
        if self.log:  # what is not positive lies at the bottom
            bottom = math.log(self.low)
            return (math.log(max(value, self.low)) - bottom) / (math.log(self.high) - bottom)
        return (value - self.low) / (self.high - self.low)


def make_axis(
    values: Iterable[float],
    text: Callable[[float], str],
    *,
    from_zero: bool = False,
    may_log: bool = False,
    rounded: bool = False,
) -> Axis:
    """Over all finite values, with some four round ticks inside; ``rounded``: it ends at ticks."""
    finite = [v for v in values if abs(v) < LIMIT]
    low, high = min(finite, default=0.0), max(finite, default=1.0)
    positive = min((v for v in finite if v > 1 / LIMIT), default=0.0)
    if may_log and low >= 0 and positive and high / positive > LOG_FROM:
        low = positive
        first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
        every = max(1, (last - first) // 4)
        axis = Axis(low, high, True, [])
        at = [10.0**k for k in range(first, last + 1, every) if low <= 10.0**k <= high]
        return Axis(low, high, True, [(axis.place(v), text(v)) for v in at])
    if from_zero:
        low, high = min(0.0, low), max(0.0, high)
    if high - low <= max(1e-12 * abs(high), 1 / LIMIT):
        pad = abs(low) / 2 or 0.5
        low, high = (low, low + 2 * pad) if from_zero else (low - pad, high + pad)
    step = round_step((high - low) / 6)
    if rounded:
        low, high = math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step
    first = math.ceil(low / step - 1e-9)
    at = [k * step for k in range(first, math.floor(high / step + 1e-9) + 1)]
    return Axis(low, high, False, [((v - low) / (high - low), text(0.0 if abs(v) < step / 1e6 else v)) for v in at])


def time_axis(seconds: float) -> Axis:
    """0 to ``seconds``, with ticks as a clock has them."""
    rough = seconds / 6
    step = next((s for s in TIME_STEPS_S if s >= rough), 86400.0) if rough > 1 else round_step(rough)
    unit, name = (3600.0, "h") if step >= 3600 else (60.0, "min") if step >= 60 else (1.0, "")
    at = [k * step for k in range(int(seconds / step + 1e-9) + 1)]
    return Axis(0.0, seconds, False, [(t / seconds, f"{t / unit:g} {name}" if name else format_seconds(t)) for t in at])


def round_step(rough: float) -> float:
    """The next of 1, 2, 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(rough))
    return next(m * power for m in (1, 2, 5, 10) if m * power >= rough * (1 - 1e-9))


def format_step(step: float) -> str:
    return f"{step:,.10g}"


def format_tick(value: float) -> str:
    return f"{value:.6g}"


def line_chart(
    key: str,
    chart: Chart,
    y_text: Callable[[float], str],
    *,
    seconds: float | None = None,
    marks: Sequence[Mark] = (),
    faint: Sequence[Line] = (),
    noisy: bool = False,
) -> Markup:
    """``seconds``: x is time, from 0 to these. ``faint``: lines behind, of what no longer counts.

    ``noisy``: long lines get one of means, the axis may be logarithmic, and what is not finite is marked and counted
    (elsewhere it is a gap).
    """
    chart = replace(chart, lines=[_within(line) for line in chart.lines])
    faint = [_within(line) for line in faint]
    every = [*chart.lines, *faint]
    xs = [x for line in every for x in line.xs]
    x_text = format_step if seconds is None else format_seconds
    x_axis = make_axis(xs, x_text) if seconds is None else time_axis(seconds)
    tick_text = format_tick if y_text is format_metric else y_text
    y_axis = make_axis(
        (y for line in every for y in line.ys), tick_text, from_zero=chart.from_zero, may_log=noisy, rounded=True
    )
    drawn = [Markup('<g class="undone">{}</g>').format(_path(line, x_axis, y_axis, "")) for line in faint]
    bad: list[float] = []
    for number, line in enumerate(chart.lines):
        colour = f"c{number % NUM_COLOURS}" + (" second" if number >= NUM_COLOURS else "")
        if noisy:
            bad += [x for x, y in zip(line.xs, line.ys) if not math.isfinite(y)]
        if line.dots:
            drawn.append(_dots(line, x_axis, y_axis, colour))
        elif noisy and len(line.xs) > SMOOTH_FROM:
            drawn.append(_path(line, x_axis, y_axis, f"{colour} raw"))
            xs_mean, ys_mean = means(list(line.xs), list(line.ys), SMOOTH_FROM // 2)
            drawn.append(_path(Line(line.label, xs_mean, ys_mean), x_axis, y_axis, colour))
        else:
            drawn.append(_path(line, x_axis, y_axis, colour))
    drawn += _bad(bad, x_axis)
    legend = [(f"c{n % NUM_COLOURS}", line.label) for n, line in enumerate(chart.lines)]
    if faint:
        legend.append(("undone", "taken back by a restart"))
    if bad:
        legend.append(("bad", f"{len(bad)} not finite (NaN or infinite), the first at {x_text(bad[0])}"))
    described = _describe(chart, y_text, x_text, y_axis.log)
    return _figure(
        key,
        chart.title + (" (log scale)" if y_axis.log else ""),
        described,
        x_axis,
        y_axis,
        drawn,
        legend if len(legend) > 1 or legend[0][1] else [],
        chart.x_label,
        marks,
        _points_table(chart, y_text, x_text),
    )


def area_chart(
    key: str,
    title: str,
    parts: Mapping[str, Sequence[float]],
    seconds: float,
    marks: Sequence[Mark] = (),
) -> Markup:
    """Shares of time, stacked: ``parts`` by name, each a share (0..1) for each of equal stretches of 0..seconds."""
    num = len(next(iter(parts.values())))
    x_axis = time_axis(seconds)
    y_axis = make_axis([0.0, 1.0], lambda y: f"{100 * y:.0f} %", from_zero=True)
    base = [0.0] * num
    drawn: list[Markup] = []
    for name, shares in parts.items():
        top = [b + s for b, s in zip(base, shares)]
        edge = [(b / num, y) for b in range(num) for y in (top[b],)]
        steps = "".join(f"L{x * WIDTH:.1f} {_y(y):.1f}h{WIDTH / num:.1f}" for x, y in edge)
        back = "".join(
            f"L{(b + 1) / num * WIDTH:.1f} {_y(base[b]):.1f}h{-WIDTH / num:.1f}" for b in range(num - 1, -1, -1)
        )
        drawn.append(Markup('<path class="area {}" d="M0 {} {}{}Z"/>').format(name, f"{_y(base[0]):.1f}", steps, back))
        base = top
    described = f"Mean over {format_seconds(seconds)}: " + ", ".join(
        f"{name} {100 * sum(shares) / num:.0f} %" for name, shares in parts.items()
    )
    return _figure(key, title, described, x_axis, y_axis, drawn, [], "", marks, None, small=True)


def share_bars(rows: Sequence[tuple[str, Mapping[str, float]]]) -> Markup:
    """A stacked bar for each row, of its shares (0..1) by name."""
    out = []
    for label, shares in rows:
        x, bars = 0.0, []
        for name, share in shares.items():
            width = share * WIDTH
            bars.append(
                Markup('<rect class="area {}" x="{}" y="0" width="{}" height="20"/>').format(
                    name, f"{x:.1f}", f"{width:.1f}"
                )
            )
            x += width
        text = ", ".join(f"{name} {100 * share:.1f} %" for name, share in shares.items())
        out.append(
            Markup(
                '<div class="bar"><span>{}</span><svg viewBox="0 0 1000 20" preserveAspectRatio="none" role="img" '
                'aria-label="{}: {}"><title>{}: {}</title>{}</svg></div>'
            ).format(label, label, text, label, text, Markup("").join(bars))
        )
    return Markup("").join(out)


def share_legend(names: Iterable[str]) -> Markup:
    items = (Markup('<li><i class="swatch {}"></i>{}</li>').format(name, name) for name in names)
    return Markup('<ul class="legend">{}</ul>').format(Markup("").join(items))


def html_table(columns: Sequence[str], rows: Iterable[Sequence[object]], caption: str = "") -> Markup:
    """Numbers (int, float) are set to the right. It scrolls by itself where it is too wide."""
    head = Markup("").join(Markup('<th scope="col">{}</th>').format(c) for c in columns)
    body = Markup("").join(Markup("<tr>{}</tr>").format(Markup("").join(_cell(v) for v in row)) for row in rows)
    title = Markup("<caption>{}</caption>").format(caption) if caption else ""
    return Markup(
        '<div class="scroll" tabindex="0" role="region" aria-label="{}"><table>{}<thead><tr>{}</tr></thead>'
        "<tbody>{}</tbody></table></div>"
    ).format(caption or "table", title, head, body)


def _cell(value: object) -> Markup:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return Markup('<td class="n">{}</td>').format(f"{value:,}" if isinstance(value, int) else f"{value:,.6g}")
    numeric = isinstance(value, str) and value[:1].isdigit() and len(value) < 14
    length = len(value.striptags() if isinstance(value, Markup) else str(value))
    kind = "n" if numeric else "long" if length > LONG_TEXT else "short"
    return Markup('<td class="{}">{}</td>').format(kind, value)


# -- pieces ----------------------------------------------------------------------------------------------------------


def _within(line: Line) -> Line:
    return replace(line, ys=[y if abs(y) < LIMIT else math.nan for y in line.ys])


def _y(share: float) -> float:
    return HEIGHT * (1 - share)


def _path(line: Line, x_axis: Axis, y_axis: Axis, colour: str) -> Markup:
    pieces: list[str] = []
    pen_down = False
    for x, y in zip(*downsample(list(line.xs), list(line.ys), BUCKETS)):
        if not math.isfinite(y):
            pen_down = False
            continue
        place = f"{x_axis.place(x) * WIDTH:.1f} {_y(y_axis.place(y)):.1f}"
        pieces.append(f"L{place}" if pen_down else f"M{place}h0")  # a point alone is a dot
        pen_down = True
    return Markup('<path class="line {}" d="{}"/>').format(colour, "".join(pieces))


def _dots(line: Line, x_axis: Axis, y_axis: Axis, colour: str) -> Markup:
    xs, ys = downsample(list(line.xs), list(line.ys), BUCKETS)
    dots = "".join(
        f"M{x_axis.place(x) * WIDTH:.1f} {_y(y_axis.place(y)):.1f}h0" for x, y in zip(xs, ys) if math.isfinite(y)
    )
    return _path(line, x_axis, y_axis, f"{colour} thin") + Markup('<path class="dots {}" d="{}"/>').format(colour, dots)


def _bad(xs: Sequence[float], x_axis: Axis) -> list[Markup]:
    if not xs:
        return []
    places = sorted({round(x_axis.place(x) * WIDTH) for x in xs})
    return [Markup('<path class="bad" d="{}"/>').format("".join(f"M{p} 0v14" for p in places))]


def _figure(
    key: str,
    title: str,
    described: str,
    x_axis: Axis,
    y_axis: Axis,
    drawn: Sequence[Markup],
    legend: Sequence[tuple[str, str]],
    x_label: str,
    marks: Sequence[Mark],
    table: Markup | None,
    small: bool = False,
) -> Markup:
    grid = "".join(f"M0 {_y(at):.1f}H{WIDTH}" for at, _ in y_axis.ticks)
    lines, glyphs = _marks(marks, x_axis)
    y_labels = Markup("").join(
        Markup('<span style="top:{}%">{}</span>').format(f"{100 * (1 - at):.2f}", text) for at, text in y_axis.ticks
    )
    x_labels = Markup("").join(
        Markup('<span class="{}" style="left:{}%">{}</span>').format(
            _edge(at) + (" odd" if number % 2 else ""), f"{100 * at:.2f}", text
        )
        for number, (at, text) in enumerate(x_axis.ticks)
    )
    items = Markup("").join(Markup('<li><i class="swatch {}"></i>{}</li>').format(c, text) for c, text in legend)
    return Markup(
        '<figure class="{}"><figcaption>{}</figcaption><div class="plot"><div class="glyphs" aria-hidden="true">{}</div>'
        '<div class="y" aria-hidden="true">{}</div>'
        '<svg viewBox="0 0 {} {}" preserveAspectRatio="none" role="img" aria-labelledby="{}-t {}-d">'
        '<title id="{}-t">{}</title><desc id="{}-d">{}</desc><path class="grid" d="{}"/>{}{}</svg>'
        '<div class="x" aria-hidden="true">{}</div><div class="xl" aria-hidden="true">{}</div></div>{}{}</figure>'
    ).format(
        "small" if small else "wide",
        title,
        glyphs,
        y_labels,
        *(WIDTH, HEIGHT, key, key, key, title, key, described, grid),
        lines,
        Markup("").join(drawn),
        x_labels,
        x_label,
        Markup('<ul class="legend">{}</ul>').format(items) if items else "",
        Markup("<details><summary>Table</summary>{}</details>").format(table) if table else "",
    )


def _edge(at: float) -> str:
    """Labels near an end are set towards the middle, so that none is cut off."""
    return "left" if at < 0.03 else "right" if at > 0.97 else "mid"


def _marks(marks: Sequence[Mark], x_axis: Axis) -> tuple[Markup, Markup]:
    """Lines in the drawing, and their glyphs above it; those that would stand on each other stand side by side."""
    lines: list[Markup] = []
    groups: list[tuple[float, list[Mark]]] = []
    for mark in marks:
        if mark.kind not in GLYPHS or not 0 <= (at := x_axis.place(mark.time)) <= 1.0001:
            continue
        if mark.kind in QUIET:
            lines.append(
                Markup('<path class="mark {}" d="M{} {}v12"/>').format(mark.kind, f"{at * WIDTH:.1f}", HEIGHT - 12)
            )
            continue
        lines.append(Markup('<path class="mark {}" d="M{} 0V{}"/>').format(mark.kind, f"{at * WIDTH:.1f}", HEIGHT))
        if groups and at - groups[-1][0] < 0.03:
            groups[-1][1].append(mark)
        else:
            groups.append((at, [mark]))
    glyphs = []
    for at, together in groups:
        kinds = dict.fromkeys(m.kind for m in together)
        inner = Markup("").join(Markup('<b class="{}">{}</b>').format(kind, GLYPHS[kind]) for kind in kinds)
        glyphs.append(Markup('<span class="{}" style="left:{}%">{}</span>').format(_edge(at), f"{100 * at:.2f}", inner))
    return Markup("").join(lines), Markup("").join(glyphs)


def _describe(chart: Chart, y_text: Callable[[float], str], x_text: Callable[[float], str], log: bool) -> str:
    parts = []
    for line in chart.lines:
        finite = [(x, y) for x, y in zip(line.xs, line.ys) if math.isfinite(y)]
        if not finite:
            parts.append(f"{line.label}: no finite value")
            continue
        (x0, first), (x1, last) = finite[0], finite[-1]
        least, most = min(y for _, y in finite), max(y for _, y in finite)
        parts.append(
            f"{line.label}: {y_text(first)} at {x_text(x0)}, {y_text(last)} at {x_text(x1)}, "
            f"between {y_text(least)} and {y_text(most)}"
        )
    return "; ".join(parts) + (" (log scale)" if log else "")


def _points_table(
    chart: Chart, y_text: Callable[[float], str], x_text: Callable[[float], str], rows: int = 40
) -> Markup:
    """Each line in at most ``rows`` stretches: mean, least, greatest."""
    out = []
    for line in chart.lines:
        per = max(1, math.ceil(len(line.xs) / rows))
        for start in range(0, len(line.xs), per):
            piece = [y for y in line.ys[start : start + per] if math.isfinite(y)]
            xs = line.xs[start : start + per]
            where = x_text(xs[0]) if len(xs) == 1 else f"{x_text(xs[0])} to {x_text(xs[-1])}"
            told = (
                [y_text(sum(piece) / len(piece)), y_text(min(piece)), y_text(max(piece))]
                if piece
                else ["not finite"] * 3
            )
            out.append((line.label, where, *told) if per > 1 else (line.label, where, told[0]))
    long = any(len(row) == 5 for row in out)
    columns = ["line", chart.x_label or "at", *(["mean", "least", "greatest"] if long else ["value"])]
    return html_table(
        columns, [row if len(row) == len(columns) else (*row, row[2], row[2]) for row in out], chart.title
    )
