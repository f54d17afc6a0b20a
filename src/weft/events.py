"""What happened, when, to whom: one versioned struct for all roles, one JSON line each in events.jsonl.

Kinds and their ``values``:
  plan      text; the whole plan is in plan.json
  collective by group ("collective", "collective of island"): how messages all-reduce, by size, and why
  started   pid
  ticks     steps that ended since the last tick: first, last, loss (list: mean over the joined batch, one entry a
            step), examples (joined), compute_s, exchange_s, wait_s, skew_s (of wait_s: for slower members' compute), hidden_s
            (of exchanges beside these two, while backward went on), data_s (this member's seconds), bytes_sent, messages; sent (bytes by group) where it stands in several.
            Where the member knows its own share only: own_loss and own_weight (lists) in place of loss; neither where another
            member tells the loss. staleness: by updates since it was read, how many shares were joined
  loss      first, last, loss (list): the joined mean, put together by the driver from all members' own
  balance   shares (examples of a joined batch by rank, from the next step on), reason
  usage     of this member's process, about once a second: pid, cpu_percent (since the one before; 100 is one core),
            rss_bytes, peak_rss_bytes; with a GPU gpu_bytes, peak_gpu_bytes and, where it can be told, gpu_percent
  memory    of this member after the first steps, beyond what its process had before the model: peak_bytes (the most in a step),
            held_bytes (between steps)
  measured  before the run: world, carrier, latency_s, bytes_per_s (of each worker's link, while all use theirs); where
            `compress=auto`: compress, why, ways (what each candidate would send and compute in an exchange)
  trying    before the run, to who looks: text
  equivalence before the run: text, detail; tolerance, steps (each: difference, loss, loss_difference, name, shape, worst, own), by_shares
  eval      metrics on held-out data by name (loss among them)
  saved     path, seconds, bytes
  resumed   path, step; pattern, world: what saved it
  left      member, cause: the others go on without it
  failed    cause, traceback
  restarted attempt, from_step
  warning   text
  stopped   reason
  finished  metrics, seconds
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

VERSION = 1


class Event(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``time``: seconds since the epoch; ``step``: updates applied so far; ``member``: -1 is the driver."""

    kind: str
    time: float = msgspec.field(default_factory=time.time)
    role: str = "worker"
    member: int = -1
    step: int = 0
    values: dict[str, Any] = msgspec.field(default_factory=dict)
    v: int = VERSION


_encoder = msgspec.json.Encoder()
_decoder = msgspec.json.Decoder(Event)


class EventLog:
    """Append events to a file, a line each, flushed at once: after a crash all but the last line can be read."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("a+b", buffering=0)
        self._cut_torn_line()

    def _cut_torn_line(self) -> None:
        """Of a writer that was killed, or had no room: the next line would join it, and both be lost."""
        end = self._file.seek(0, os.SEEK_END)
        start = end
        while start > 0:
            begin = max(0, start - (1 << 16))
            self._file.seek(begin)
            found = (self._file.read(start - begin) or b"").rfind(b"\n")
            if found >= 0:
                start = begin + found + 1
                break
            start = begin
        if start < end:
            self._file.truncate(start)

    def write(self, event: Event) -> None:
        self._file.write(_encoder.encode(event) + b"\n")

    def close(self) -> None:
        self._file.close()


def read_events(path: Path) -> Iterator[Event]:
    """Events in the order written; a torn last line (the writer was killed) is left out."""
    with path.open("rb") as file:
        for line in file:
            if line.endswith(b"\n"):
                yield _decoder.decode(line)


def losses_of(event: Event) -> Iterator[tuple[int, float]]:
    """(step, loss of the joined batch) of every step that this event tells; a step may be told by several members."""
    if event.kind in ("ticks", "loss"):
        for step, loss in enumerate(event.values.get("loss", ()), event.values["first"]):
            yield step, math.nan if loss is None else loss  # JSON has no NaN


class LossJoiner:
    """From what members tell of their own shares to the loss of each joined batch, once all have told it."""

    def __init__(self, members: int) -> None:
        self.members = members
        self._open: dict[int, list[float]] = {}  # by step: sum, weight, how many members

    def add(self, tick: Event) -> Event | None:
        """The "loss" event of the steps that this tick completes. All members go through the same steps in order."""
        values = tick.values
        done: list[float | None] = []
        last = 0
        for step, loss, weight in zip(
            range(values["first"], values["last"] + 1), values["own_loss"], values["own_weight"], strict=True
        ):
            entry = self._open.setdefault(step, [0.0, 0.0, 0])
            entry[0] += weight * (math.nan if loss is None else loss) if weight else 0.0
            entry[1] += weight
            entry[2] += 1
            if entry[2] == self.members:
                del self._open[step]
                mean = entry[0] / entry[1] if entry[1] else math.nan
                done.append(mean if math.isfinite(mean) else None)
                last = step
        if not done:
            return None
        return Event(
            kind="loss", role="driver", step=last, values={"first": last - len(done) + 1, "last": last, "loss": done}
        )
