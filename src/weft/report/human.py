"""Numbers as a person reads them: three significant digits, decimal units (1 MB = 1,000,000 bytes)."""

from __future__ import annotations

import math
from collections.abc import Iterable

from weft.plan import Plan


def format_bytes(num_bytes: float) -> str:
    """25_400_000 -> "25.4 MB"."""
    value, unit = _scale(num_bytes, ["B", "kB", "MB", "GB", "TB", "PB"])
    return f"{value:g} {unit}"


def format_count(count: float) -> str:
    """12_345 -> "12,345", 3_260_000 -> "3.26M"."""
    if abs(count) < 100:
        return f"{count:.3g}"
    if abs(count) < 100_000:
        return f"{count:,.0f}"
    value, unit = _scale(count, ["", "k", "M", "B", "T"])
    return f"{value:g}{unit}"


def format_seconds(seconds: float) -> str:
    """0.104 -> "104 ms", 12.34 -> "12.3 s", 125 -> "2 min 05 s", 3900 -> "1 h 05 min"."""
    if not math.isfinite(seconds):
        return "?"
    if seconds == 0:
        return "0 s"
    if seconds < 59.95:  # beyond, "60 s" would be shown
        value, unit = _scale(seconds * 1e6, ["us", "ms", "s"])
        return f"{value:g} {unit}"
    minutes, rest_s = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest_s:02d} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    if hours < 24:
        return f"{hours} h {minutes:02d} min"
    days, hours = divmod(round(seconds / 3600), 24)
    return f"{days} d {hours:02d} h"


def format_metric(value: float) -> str:
    """Four significant digits, trailing zeros kept so that a changing number does not jump: 2.5 -> "2.500"."""
    return f"{value:#.4g}".rstrip(".")


def format_share(share: float) -> str:
    """0.724 -> "72 %"."""
    return f"{100 * share:.0f} %"


def format_members(role: str, members: Iterable[int]) -> str:
    """("worker", [1, 2, 3, 5]) -> "workers 1-3, 5"; the driver has number -1."""
    ids = sorted(members)
    if ids == [-1]:
        return role
    ranges: list[list[int]] = []
    for i in ids:
        if ranges and i == ranges[-1][1] + 1:
            ranges[-1][1] = i
        else:
            ranges.append([i, i])
    numbers = ", ".join(f"{first}" if first == last else f"{first}-{last}" for first, last in ranges)
    return f"{role}{'s' if len(ids) > 1 else ''} {numbers}"


def _scale(value: float, units: list[str]) -> tuple[float, str]:
    """Rounded to three digits before the unit is chosen: 999,700 bytes are 1 MB, not 1000 kB."""
    value = float(f"{value:.3g}")
    last = len(units) - 1
    for unit in units[:last]:
        if abs(value) < 1000:
            return value, unit
        value = float(f"{value / 1000:.3g}")
    return value, units[last]


def plan_size(plan: Plan) -> str:
    text = f"{format_count(plan.num_parameters)} parameters"
    trained = f" ({format_count(plan.num_trainable)} trained)" if plan.num_trainable != plan.num_parameters else ""
    return text + trained


def plan_length(plan: Plan) -> str:
    text = f"{format_count(plan.steps)} steps of {plan.batch:,} examples"
    return text if plan.epochs is None else f"{text} = {format_count(plan.epochs)} epochs"


def plan_examples(plan: Plan) -> str:
    train = "a stream" if plan.train_examples is None else f"{format_count(plan.train_examples)} examples"
    return f"{train} to train on, {format_count(plan.test_examples)} held out"
