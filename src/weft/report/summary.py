"""A run so far, summed from its events: the live view and the closing summary read the same numbers.

Constant memory however long the run, but for one entry per evaluation, save and restart.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from weft.events import Event, losses_of

#: Of a result, in the order in which they are told. What else stands in it are the task's metrics.
RESULT_KEYS = (
    "loss",
    "train_loss",
    "steps",
    "seconds",
    "examples_per_s",
    "bytes_sent",
    "world",
    "run_dir",
    "bottleneck",
    "notes",
    "equivalence",
)

#: What a member's time goes into, and the key of its seconds in a "ticks" event.
SHARES = {"compute": "compute_s", "communication": "exchange_s", "waiting": "wait_s", "data": "data_s"}
#: Weight of the past in the smoothed loss, per step: it looks back over about 50 steps.
SMOOTHING = 0.98


def number(value: float | None) -> float:
    """JSON has no NaN: msgspec writes null, which comes back as None."""
    return math.nan if value is None else value


class Curve:
    """A sequence of any length as at most ``max_points`` means over equal stretches; when full, neighbours merge."""

    def __init__(self, max_points: int = 512) -> None:
        if max_points < 2 or max_points % 2:
            raise ValueError(f"max_points is {max_points}: neighbours merge in pairs, so use an even number, 2 or more")
        self.max_points = max_points
        self.stretch = 1
        self._means: list[float] = []
        self._sum, self._count = 0.0, 0  # of the stretch that is not full yet

    def add(self, value: float) -> None:
        self._sum += value
        self._count += 1
        if self._count == self.stretch:
            self._means.append(self._sum / self._count)
            self._sum, self._count = 0.0, 0
            if len(self._means) == self.max_points:
                pairs = zip(self._means[::2], self._means[1::2], strict=True)
                self._means = [(a + b) / 2 for a, b in pairs]
                self.stretch *= 2

    def truncate(self, length: int) -> None:
        """Forget all but the first ``length`` values (a stretch that is cut keeps its mean)."""
        full, rest = divmod(length, self.stretch)
        if full < len(self._means):
            self._sum, self._count = self._means[full] * rest, rest
            del self._means[full:]
        elif full == len(self._means) and rest < self._count:
            self._sum, self._count = self._sum / self._count * rest, rest

    @property
    def points(self) -> list[float]:
        return [*self._means, self._sum / self._count] if self._count else list(self._means)


@dataclass
class MemberTotals:
    """One member's sums. ``steps`` counts work done: steps that a restart repeats are counted again."""

    steps: int = 0
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(SHARES, 0.0))
    bytes_sent: int = 0

    @property
    def shares(self) -> dict[str, float]:
        return shares_of([self])

    @property
    def bytes_per_step(self) -> float:
        return self.bytes_sent / self.steps if self.steps else 0.0


def shares_of(members: Iterable[MemberTotals]) -> dict[str, float]:
    """Shares of the members' summed time by name; all zero before any time was spent."""
    totals = list(members)
    sums = {name: sum(m.seconds[name] for m in totals) for name in SHARES}
    whole = sum(sums.values())
    return {name: s / whole if whole else 0.0 for name, s in sums.items()}


class Summary:
    """Give it every event in order. Kinds that it does not know are passed over.

    Where all ranks report the same joined loss, each step's is taken from the rank that tells it first.
    """

    def __init__(self) -> None:
        self.first_step = 0  # where this run began: 0, or the step it was resumed at
        self.step = 0
        self.curve = Curve()  # training loss from first_step on
        self.members: dict[tuple[str, int], MemberTotals] = {}  # by (role, member)
        self.started: set[tuple[str, int]] = set()
        self.evals: list[tuple[int, dict[str, float]]] = []  # (step, metrics)
        self.memory: dict[tuple[str, int], int] = {}  # bytes that a member took at the peak of its first steps
        self.saves: list[Event] = []
        self.balances: list[tuple[int, list[int]]] = []  # (step, shares from then on)
        self.restarts: list[int] = []  # the steps it went back to
        self.failures: list[Event] = []  # of the current attempt, the culprit first
        self.warnings: dict[str, int] = {}  # text -> how often
        self._loss_step = 0  # the last step whose loss is known
        self._last_loss = math.nan
        self._smooth_sum, self._smooth_weight = 0.0, 0.0
        self._rates: deque[float] = deque(maxlen=1024)
        self._marks: deque[tuple[float, int]] = deque(maxlen=128)  # (time, step), for the speed of late

    def add(self, event: Event) -> None:
        values = event.values
        for step, loss in losses_of(event):
            if step > self._loss_step:
                self._add_loss(loss)
                self._loss_step = step
        match event.kind:
            case "started":
                self.started.add((event.role, event.member))
            case "ticks":
                self._add_ticks(event)
            case "memory":
                self.memory[event.role, event.member] = values["peak_bytes"]
            case "eval":
                self.evals.append((event.step, {name: number(value) for name, value in values.items()}))
            case "saved":
                self.saves.append(event)
            case "balance":
                self.balances.append((event.step, list(values["shares"])))
            case "resumed":
                self._go_to(values["step"])
            case "restarted":
                step = values["from_step"]
                self.restarts.append(step)
                self.failures.clear()
                self._go_to(step)
            case "failed":
                self.failures.append(event)
            case "warning":
                text = values["text"]
                self.warnings[text] = self.warnings.get(text, 0) + 1

    def _add_ticks(self, event: Event) -> None:
        values = event.values
        member = self.members.setdefault((event.role, event.member), MemberTotals())
        member.steps += values["last"] - values["first"] + 1
        member.bytes_sent += values.get("bytes_sent", 0)
        spent_s = 0.0
        for name, key in SHARES.items():
            seconds = values.get(key, 0.0)
            member.seconds[name] += seconds
            spent_s += seconds
        if values.get("examples") and spent_s > 0:
            self._rates.append(values["examples"] / spent_s)
        last = values["last"]
        if last > self.step:
            self.step = last
            self._marks.append((event.time, last))

    def _add_loss(self, loss: float) -> None:
        self._last_loss = loss
        self.curve.add(loss)
        if math.isfinite(self._last_loss):
            self._smooth_sum = SMOOTHING * self._smooth_sum + (1 - SMOOTHING) * self._last_loss
            self._smooth_weight = SMOOTHING * self._smooth_weight + (1 - SMOOTHING)

    def _go_to(self, step: int) -> None:
        """Training goes on from ``step``: what was seen of later steps no longer counts."""
        if not self.members:
            self.first_step = step
        self.step = self._loss_step = step
        self.curve.truncate(max(0, step - self.first_step))
        self.evals = [e for e in self.evals if e[0] <= step]
        self.balances = [b for b in self.balances if b[0] <= step]
        self._smooth_sum = self._smooth_weight = 0.0
        self._marks.clear()

    @property
    def loss(self) -> float:
        """Exponential mean over about the last 50 steps, bias-corrected; NaN or inf as soon as the last one is."""
        if not math.isfinite(self._last_loss) or not self._smooth_weight:
            return self._last_loss
        return self._smooth_sum / self._smooth_weight

    @property
    def examples_per_s(self) -> float:
        """Median over the latest ticks of all members (evaluations and saves are outside ticks); 0 before the first."""
        return statistics.median(self._rates) if self._rates else 0.0

    @property
    def steps_per_s(self) -> float:
        """Of late, by the clock: evaluations and saves are inside. 0 until two ticks have come."""
        if len(self._marks) < 2:
            return 0.0
        (time0, step0), (time1, step1) = self._marks[0], self._marks[-1]
        return (step1 - step0) / (time1 - time0) if time1 > time0 else 0.0

    @property
    def shares(self) -> dict[str, float]:
        return shares_of(self.members.values())

    @property
    def bytes_sent(self) -> int:
        return sum(m.bytes_sent for m in self.members.values())
