"""What happened, when, to whom: one versioned struct for all roles, one JSON line each in events.jsonl.

Kinds and their ``values``:
  plan      text; the whole plan is in plan.json
  started   pid
  ticks     steps that ended since the last tick: first, last, loss (list: mean over the joined batch, one entry a
            step), examples (joined), compute_s, exchange_s, wait_s, data_s (this member's seconds), bytes_sent
  usage     of this member's process, about once a second: pid, cpu_percent (since the one before; 100 is one core),
            rss_bytes, peak_rss_bytes; with a GPU gpu_bytes, peak_gpu_bytes and, where it can be told, gpu_percent
  eval      metrics on held-out data by name (loss among them)
  saved     path, seconds, bytes
  resumed   path, step
  failed    cause, traceback
  restarted attempt, from_step
  warning   text
  stopped   reason
  finished  metrics, seconds
"""

from __future__ import annotations

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
