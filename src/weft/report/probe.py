"""What `weft probe` has measured, as tables: links, codecs, and a sentence of advice."""

from __future__ import annotations

import math

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from weft.payoff import Probe, advice, break_even, format_rate, format_size, format_time
from weft.report.human import format_share


def render_probe(probe: Probe) -> RenderableType:
    title = Text.assemble((f"{probe.world} workers", "bold"), f" over {probe.carrier}")
    exchanged = Text.assemble(("an exchange of ", ""), (format_size(probe.nbytes), "bold"), f" ({probe.what})")
    parts: list[RenderableType] = [title, _links(probe), Text(), exchanged, _codecs(probe), Text()]
    if probe.step_s:
        parts.append(Text(f"a step of the task computes for {format_time(probe.step_s)}", "dim"))
    return Group(*parts, Text(advice(probe), "bold"))


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
    table.add_column(columns[0], no_wrap=True)
    for column in columns[1:]:
        table.add_column(column, justify="right")
    return table


def _links(probe: Probe) -> Table:
    table = _table("link", "latency", "MB/s", "rate")
    for row in probe.links:
        a, b = row.members[0], row.members[-1]
        who = f"worker {a} - worker {b}" if row is not probe.links[-1] else f"all {len(row.members)} at once"
        rate = format_rate(row.bytes_per_s)
        table.add_row(who, format_time(row.latency_s), _megabytes(row.bytes_per_s), rate)
    return table


def _codecs(probe: Probe) -> Table:
    table = _table("--compress", "encode", "decode", "bytes", "takes", "gain", "pays below")
    whole = probe.ways[0]
    for way in probe.ways:
        takes, style = way.seconds(probe.speed), "bold" if way.compress == probe.choice.compress else ""
        row = [way.compress, "", "", format_share(1), format_time(takes), "", ""]
        if way is not whole:
            below = break_even(whole, way, probe.speed.latency_s)
            row[1] = _speed(probe.compressible, way.encode_s)
            row[2] = _speed(probe.compressible * way.arrivals, way.decode_s)
            row[3] = f"{100 * way.bytes_sent / whole.bytes_sent:.3g} %"
            row[5] = f"{whole.seconds(probe.speed) / takes:.3g}x"
            row[6] = "any rate" if math.isinf(below) else format_rate(below) if below else "never"
        table.add_row(*row, style=style)
    return table


def _megabytes(nbytes: float) -> str:
    return f"{nbytes / 1e6:,.0f}" if nbytes >= 1e9 else f"{nbytes / 1e6:.3g}"


def _speed(nbytes: int, seconds: float) -> str:
    return f"{nbytes / seconds / 1e9:.2g} GB/s" if seconds else ""
