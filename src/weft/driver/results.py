"""What a run says of itself at the end, added up from what its members tell."""

from __future__ import annotations

import dataclasses
import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from weft.diagnose import Spent
from weft.events import Event, losses_of
from weft.report.summary import RESULT_KEYS

if TYPE_CHECKING:
    pass


TRAIN_LOSS_STEPS = 50


@dataclass(frozen=True)
class RunResult:
    """``loss`` and ``metrics``: on held-out data; ``train_loss``: mean over the last 50 steps; ``bytes_sent``: by all
    members; ``seconds``: from starting the members to the end; ``bottleneck``: what limited it, and what would help;
    ``equivalence``: to one process, in words, where that was checked."""

    loss: float
    train_loss: float
    metrics: dict[str, float]
    steps: int
    seconds: float
    examples_per_s: float
    bytes_sent: int
    world: int
    run_dir: str
    bottleneck: str = ""
    notes: dict[str, float] = field(default_factory=dict)
    equivalence: str = ""

    def as_json(self) -> dict[str, Any]:
        """One flat object; the task's metrics stand in it by their names."""
        own = {"loss": self.loss, "train_loss": self.train_loss}
        return own | self.metrics | {k: getattr(self, k) for k in RESULT_KEYS if k not in own}

    @classmethod
    def from_json(cls, saved: Mapping[str, Any]) -> RunResult:
        """The inverse of ``as_json``, also of what a file made of it (there NaN is null)."""
        values: dict[str, Any] = {k: math.nan if v is None else v for k, v in saved.items()}
        own = {f.name: values.pop(f.name) for f in dataclasses.fields(cls) if f.name != "metrics"}
        return cls(metrics=values, **own)


class Totals:
    """What the result says, added up from ticks."""

    def __init__(self, total_steps: int, lead: int = 0) -> None:
        self.total_steps, self.lead = total_steps, lead
        self.losses: deque[tuple[int, float]] = deque(maxlen=4 * TRAIN_LOSS_STEPS)
        self.bytes_sent = 0
        self.metrics: dict[str, float] = {}
        self.equivalence = ""
        self.step = 0
        self.spent: dict[int, Spent] = {}  # by member, without step 1, which warms up
        self.saving_s = 0.0
        self._marks: list[tuple[float, float]] = []  # (time, joined examples since the mark before) by the lead

    def add(self, event: Event) -> None:
        if event.kind == "view":
            self.lead = event.values["lead"]
        if event.kind == "eval":
            self.metrics = dict(event.values)
        if event.kind == "started" and event.member == self.lead:
            self._marks = [(event.time, 0.0)]
        values = event.values
        if event.kind == "equivalence":
            self.equivalence = values["text"]
        if event.kind == "loss" or event.member == self.lead:
            self.losses += losses_of(event)
        if event.kind == "saved" and event.step < self.total_steps:  # what comes last makes nobody wait for a step
            self.saving_s += values["seconds"]
        if event.kind == "balance":  # what limits the run is what limits it with these shares
            self.spent.clear()
            self.saving_s = 0.0
        if event.kind != "ticks":
            return
        if event.role == "worker":
            self._add_spent(event)
        self.bytes_sent += int(values["bytes_sent"])
        if event.member == self.lead:
            self.step = values["last"]
            self._marks.append((event.time, values["examples"]))

    def _add_spent(self, event: Event) -> None:
        values = event.values
        if values["last"] == 1:
            return
        spent = self.spent.setdefault(event.member, Spent())
        spent.steps += values["last"] - values["first"] + 1
        for name in ("compute_s", "data_s", "exchange_s", "wait_s", "skew_s", "bytes_sent", "messages"):
            setattr(spent, name, getattr(spent, name) + values.get(name, 0))

    def go_back(self, step: int) -> None:
        kept = [(s, v) for s, v in self.losses if s <= step]
        self.losses.clear()
        self.losses += kept
        self._marks.clear()
        self.step = step

    @property
    def train_loss(self) -> float:
        late = [v for _, v in self.losses][-TRAIN_LOSS_STEPS:]
        return sum(late) / len(late) if late else math.nan

    @property
    def examples_per_s(self) -> float:
        """From the end of the first step (it warms up; in a short run: from the start) to the last tick."""
        marks = self._marks[1:] if len(self._marks) > 4 else self._marks
        if len(marks) < 2:
            return 0.0
        seconds = marks[-1][0] - marks[0][0]
        return sum(n for _, n in marks[1:]) / seconds if seconds > 0 else 0.0
