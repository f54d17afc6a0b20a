"""A pattern's own part of a run's report, as plain data: the report decides how it looks (``Pattern.sections``)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Table:
    columns: Sequence[str]
    rows: Sequence[Sequence[str | float]]


@dataclass(frozen=True)
class Line:
    """A curve. What is not finite leaves a gap. ``dots``: points stand by themselves (few measurements)."""

    label: str
    xs: Sequence[float]
    ys: Sequence[float]
    dots: bool = False


@dataclass(frozen=True)
class Chart:
    """Lines over a common x axis, with the table of what they show."""

    title: str
    x_label: str
    lines: Sequence[Line]
    y_label: str = ""
    from_zero: bool = False


@dataclass(frozen=True)
class Section:
    title: str
    text: str = ""
    charts: Sequence[Chart] = field(default_factory=tuple)
    tables: Sequence[Table] = field(default_factory=tuple)
