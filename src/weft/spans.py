"""Spans that a member records while it works: what, from when to when. One tuple each; batches of them go to a file.

Times are CLOCK_MONOTONIC, which all processes of a host share. Bounded on disk: of a long run the first ``segment`` spans
and the last one to two times ``segment`` are kept. report/trace.py makes one timeline of all members' files.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec

#: The clock of all spans. On Linux the same as time.monotonic, and as every other process's of this host.
clock = time.perf_counter

SEGMENT = 250_000  # spans; about 10 MB
SECOND_THREAD = "weft-exchange"  # its name, where a member has one that works beside its own
BESIDE = "beside: "  # begins the name of what it did
BATCH = 256  # spans in memory
FLUSH_S = 0.2


class Clock(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What tells how this member's clock stands to others': those of one ``boot`` are the same clock.

    ``offset_s``: this clock minus that of the boot ``over``, known to +-``error_s`` (None: not measured).
    """

    boot: str
    wall_minus_clock_s: float
    over: str = ""
    offset_s: float | None = None
    error_s: float = 0.0


class Header(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The first line of each file. Later lines: lists of (name, begin, end, step)."""

    role: str
    member: int
    pid: int
    segment: int
    clock: Clock


Span = tuple[str, float, float, int]


def local_clock() -> Clock:
    """Containers of one host have one clock; a host that was started anew has another."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        boot = os.uname().nodename
    return Clock(boot=boot, wall_minus_clock_s=time.time() - clock())


def clock_offset(own: Sequence[tuple[float, float]], theirs: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """(offset, error): our clock minus theirs, from rounds in which everybody waits for everybody.

    A round is (clock on entering, clock on leaving) of each side. Nobody leaves before both have entered, so each round
    proves  own_in - their_out <= offset <= own_out - their_in ; all rounds together leave an interval (Marzullo 1984),
    whose middle is the estimate and whose half width bounds its error, whatever the delays were. A clock that drifts or
    jumps meanwhile can leave no interval: the least contradiction is then taken, and told as the error.
    """
    if not own or len(own) != len(theirs):
        raise ValueError(f"{len(own)} own rounds and {len(theirs)} of the other: give as many of each, one or more")
    low = max(mine[0] - other[1] for mine, other in zip(own, theirs))
    high = min(mine[1] - other[0] for mine, other in zip(own, theirs))
    return (low + high) / 2, abs(high - low) / 2


class Spans:
    """Of one member. ``step`` is what new spans belong to. ``on_error`` hears once, in words, why recording ended."""

    def __init__(
        self,
        folder: Path,
        role: str,
        member: int,
        own_clock: Clock,
        on_error: Callable[[str], None] = lambda text: None,
        segment: int = SEGMENT,
    ) -> None:
        self.step = 0
        self._lock = threading.Lock()
        self._role, self._member, self._clock = role, member, own_clock
        self._on_error, self._segment_size = on_error, segment
        self._stem = f"{role}-{member}.{time.time_ns()}"
        self._folder = folder
        self._batch: list[Span] = []
        self._number, self._written = -1, segment
        self._file: Any = None
        self._flushed = clock()
        self._encode = msgspec.json.Encoder().encode

    def add(self, name: str, begin: float, end: float) -> None:
        if threading.current_thread().name == SECOND_THREAD:
            name = BESIDE + name
        with self._lock:
            self._batch.append((name, begin, end, self.step))
            if len(self._batch) >= BATCH or end - self._flushed > FLUSH_S:
                self._flushed = end
                self._flush()

    def flush(self) -> None:
        """What was recorded survives a kill from here on."""
        with self._lock:
            self._flush()

    def _flush(self) -> None:
        batch, self._batch = self._batch, []
        if not batch or self._number == -2:
            return
        try:
            if self._written >= self._segment_size:
                self._next_segment()
            self._file.write(self._encode(batch) + b"\n")
            self._written += len(batch)
        except OSError as error:  # a full disk ends the trace, not the training
            self._number = -2
            self._on_error(f"the trace of {self._role} {self._member} ends here: cannot write it ({error.strerror})")

    def _next_segment(self) -> None:
        if self._file is not None:
            self._file.close()
        self._number, self._written = self._number + 1, 0
        self._folder.mkdir(exist_ok=True)
        self._file = self._path(self._number).open("xb", buffering=0)
        header = Header(role=self._role, member=self._member, pid=os.getpid(), segment=self._number, clock=self._clock)
        self._file.write(self._encode(header) + b"\n")
        if self._number >= 3:
            self._path(self._number - 2).unlink(missing_ok=True)

    def _path(self, number: int) -> Path:
        return self._folder / f"{self._stem}.{number:06d}.jsonl"

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        begin = clock()
        try:
            yield
        finally:
            self.add(name, begin, clock())

    def close(self) -> None:
        self.flush()
        if self._file is not None:
            self._file.close()
            self._file, self._number = None, -2
