"""What the report shows of a run, gathered in one pass over its events.

Time is that of the run at work: between the end of one launch and its resume the axis stands still.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

from weft.events import Event, losses_of
from weft.report.human import format_bytes, format_members, format_metric, format_seconds
from weft.report.summary import SHARES, number

Who = tuple[str, int]  # role, member
Outcome = Literal["finished", "failed", "stopped", "going", "lost"]


@dataclass
class Tick:
    """A stretch of work of one member: from and to (run time), seconds by share, bytes sent, steps."""

    begin: float
    end: float
    seconds: dict[str, float]
    num_bytes: float
    steps: int


@dataclass
class Member:
    ticks: list[Tick] = field(default_factory=list)
    usage: list[tuple[float, dict[str, Any]]] = field(default_factory=list)
    sent: dict[str, float] = field(default_factory=dict)  # bytes by group, where it stands in several
    memory: dict[str, Any] = field(default_factory=dict)  # the newest "memory" event
    marked: float = 0.0  # until when its time is told

    def total(self, share: str) -> float:
        return sum(t.seconds[share] for t in self.ticks)

    @property
    def num_bytes(self) -> float:
        return sum(t.num_bytes for t in self.ticks)

    @property
    def steps(self) -> int:
        return sum(t.steps for t in self.ticks)


@dataclass(frozen=True)
class Mark:
    """Something that happened: for the axis and the table."""

    time: float
    step: int
    kind: str
    who: str
    text: str


@dataclass
class Stretch:
    """Values by step that belong together."""

    steps: list[int] = field(default_factory=list)
    values: list[float] = field(default_factory=list)

    def cut(self, step: int) -> Stretch:
        """Keep what lies up to ``step``; returns the rest."""
        kept = sum(1 for s in self.steps if s <= step)
        rest = Stretch(self.steps[kept:], self.values[kept:])
        del self.steps[kept:], self.values[kept:]
        return rest


class History:
    """Give it every event in order. Kinds that it does not know are passed over."""

    def __init__(self, events: Iterable[Event] = ()) -> None:
        self.loss = Stretch()  # training loss by step
        self.undone: list[Stretch] = []  # of steps that a restart or resume took back
        self.evals: dict[str, Stretch] = {}  # by metric
        self.members: dict[Who, Member] = {}
        self.marks: list[Mark] = []
        self.started_at: float | None = None  # by the wall clock
        self.ended_at = 0.0
        self.seconds = 0.0  # of work
        self.launches = 0
        self.failure: Event | None = None  # that ended it
        self.last: Literal["", "finished", "stopped", "failed"] = ""
        self._paused = 0.0
        self._loss_step = 0
        for event in events:
            self.add(event)

    @property
    def step(self) -> int:
        return self._loss_step

    def add(self, event: Event) -> None:
        if self.started_at is None:
            self.started_at = self.ended_at = event.time
        if event.kind == "plan":
            if self.launches:
                self._paused += max(0.0, event.time - self.ended_at)
            self.launches += 1
            self.last, self.failure = "", None
        self.ended_at = max(self.ended_at, event.time)
        now = event.time - self.started_at - self._paused
        self.seconds = max(self.seconds, now)
        values = event.values
        for step, loss in losses_of(event):
            if step > self._loss_step:  # all ranks tell the same
                self.loss.steps.append(step)
                self.loss.values.append(loss)
                self._loss_step = step
        match event.kind:
            case "started":
                self._member(event).marked = now
            case "ticks":
                self._add_ticks(event, now)
            case "usage":
                self._member(event).usage.append((now, values))
            case "memory":
                self._member(event).memory = values
            case "eval":
                for name, value in values.items():
                    stretch = self.evals.setdefault(name, Stretch())
                    stretch.cut(event.step - 1)
                    stretch.steps.append(event.step)
                    stretch.values.append(number(value))
            case "resumed":
                self._go_to(values["step"])
            case "restarted":
                self._go_to(values["from_step"])
                self.last, self.failure = "", None
            case "failed":
                self.last, self.failure = "failed", event
            case "stopped":
                self.last = "stopped"
            case "finished":
                self.last = "finished"
        if (text := describe(event)) is not None:
            who = format_members(event.role, [event.member])
            self.marks.append(Mark(now, event.step, event.kind, who, text))

    def outcome(self, writer: int | None) -> Outcome:
        """``writer``: the process that still writes here, if any. One that ended without a word was killed."""
        if writer is not None and self.last != "finished":
            return "going"
        return self.last or "lost"

    def _member(self, event: Event) -> Member:
        return self.members.setdefault((event.role, event.member), Member())

    def _add_ticks(self, event: Event, now: float) -> None:
        values, member = event.values, self._member(event)
        seconds = {name: max(0.0, values.get(key) or 0.0) for name, key in SHARES.items()}
        begin = min(now, max(member.marked, now - sum(seconds.values())))  # what lies before was evaluating or saving
        steps = values["last"] - values["first"] + 1
        member.ticks.append(Tick(begin, now, seconds, values.get("bytes_sent") or 0, steps))
        for group, num_bytes in values.get("sent", {}).items():
            member.sent[group] = member.sent.get(group, 0) + num_bytes
        member.marked = now

    def _go_to(self, step: int) -> None:
        if (undone := self.loss.cut(step)).steps:
            self.undone.append(undone)
        for stretch in self.evals.values():
            stretch.cut(step)
        self._loss_step = step


def describe(event: Event) -> str | None:
    """A line for the table of events; None for what the charts show."""
    values = event.values
    match event.kind:
        case "started":
            return f"process {values.get('pid', '?')}"
        case "eval":
            return ", ".join(f"{name} {format_metric(number(value))}" for name, value in values.items())
        case "saved":
            return f"{format_bytes(values['bytes'])} in {format_seconds(values['seconds'])}: {values['path']}"
        case "equivalence":
            return f"{values['text']}: {values['detail']}"
        case "resumed":
            by = f", saved by {values['pattern']} with {values['world']} workers" if "pattern" in values else ""
            return f"from {values['path']}{by}"
        case "restarted":
            return f"attempt {values['attempt']}, from step {values['from_step']}: {values.get('reason', '')}".rstrip(
                ": "
            )
        case "failed":
            return str(values["cause"])
        case "warning":
            return str(values["text"])
        case "stopped":
            return str(values["reason"])
        case "finished":
            return f"after {format_seconds(values['seconds'])}"
    return None


# -- series for charts ----------------------------------------------------------------------------------------------


def downsample(xs: list[float], ys: list[float], buckets: int) -> tuple[list[float], list[float]]:
    """At most 3 points for each of ``buckets`` equal stretches of x, and the two ends: the least, the greatest, and one
    that is not finite, if there is any, in their order. So no spike and no gap is lost, however many points there were.
    """
    if len(xs) <= 3 * buckets:
        return list(xs), list(ys)
    low, width = xs[0], (xs[-1] - xs[0]) / buckets or 1.0
    kept = {0, len(xs) - 1}
    best: dict[int, list[int]] = {}
    for i, (x, y) in enumerate(zip(xs, ys)):
        b = min(buckets - 1, int((x - low) / width))
        if not math.isfinite(y):
            best.setdefault(b, [-1, -1, -1])[2] = i
            continue
        found = best.setdefault(b, [-1, -1, -1])
        if found[0] < 0 or y < ys[found[0]]:
            found[0] = i
        if found[1] < 0 or y > ys[found[1]]:
            found[1] = i
    for found in best.values():
        kept.update(i for i in found if i >= 0)
    order = sorted(kept)
    return [xs[i] for i in order], [ys[i] for i in order]


def means(xs: list[float], ys: list[float], buckets: int) -> tuple[list[float], list[float]]:
    """The mean of what is finite in each of ``buckets`` runs of neighbours, at the middle of the run."""
    per = math.ceil(len(xs) / buckets)
    out_x: list[float] = []
    out_y: list[float] = []
    for start in range(0, len(xs), per):
        finite = [y for y in ys[start : start + per] if math.isfinite(y)]
        piece = xs[start : start + per]
        out_x.append((piece[0] + piece[-1]) / 2)
        out_y.append(sum(finite) / len(finite) if finite else math.nan)
    return out_x, out_y


def spread(amounts: Iterable[tuple[float, float, float]], seconds: float, buckets: int) -> list[float]:
    """(begin, end, amount) -> the amount in each of ``buckets`` equal stretches of 0..seconds; the sum stays the same."""
    out = [0.0] * buckets
    width = seconds / buckets if seconds > 0 else 1.0
    for begin, end, amount in amounts:
        first = min(buckets - 1, max(0, int(begin / width)))
        last = min(buckets - 1, max(first, int(end / width)))
        if first == last or end <= begin:
            out[last] += amount
            continue
        for b in range(first, last + 1):
            lo = begin if b == first else b * width
            hi = end if b == last else (b + 1) * width
            out[b] += amount * (hi - lo) / (end - begin)
    return out
