"""The spans of all members as one timeline that Perfetto (ui.perfetto.dev) and chrome://tracing open.

Chrome's trace event format, JSON object form: a process per member, times in microseconds. Spans stream from file to
file, so that memory does not grow with them.
"""

from __future__ import annotations

import gzip
import math
import statistics
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec

from weft.errors import RunFolderError
from weft.events import Event, read_events
from weft.plan import Plan
from weft.spans import BESIDE, Clock, Header, Span

LARGE_BYTES = 4 << 20  # of spans, from which on the trace is gzipped
#: Perfetto sorts and colours by these; an exchange's waiting lies inside it.
CATEGORIES = {
    "data": "data",
    "forward": "compute",
    "backward": "compute",
    "optimizer": "compute",
    "wait": "waiting",
    "evaluate": "evaluation",
    "save": "saving",
}
MARKED = {"failed", "restarted", "resumed", "saved", "warning", "stopped", "finished"}
COUNTERS = {"cpu_percent", "rss_bytes", "gpu_bytes", "gpu_percent"}

_encode = msgspec.json.Encoder().encode
_decode_header = msgspec.json.Decoder(Header).decode
_decode_spans = msgspec.json.Decoder(list[Span]).decode


class TraceWriter:
    """The exporter behind --trace: when the run has ended, well or not, it joins what the members have written."""

    name = "--trace"

    def __init__(self, spans: Path, target: Path, events: Path) -> None:
        self._spans, self._target, self._events = spans, target, events
        self.choices = {"trace": f"{target} (open it in ui.perfetto.dev)"}

    def on_plan(self, plan: Plan) -> None:
        pass

    def on_event(self, event: Event) -> None:
        pass

    def close(self) -> None:
        if self._spans.is_dir():
            merge(self._spans, self._target, read_events(self._events) if self._events.exists() else ())


def read_header(path: Path) -> Header | None:
    """Of a member's file; None if its writer was killed before a whole first line."""
    with path.open("rb") as file:
        line = file.readline()
    return _decode_header(line) if line.endswith(b"\n") else None


def read_spans(path: Path) -> Iterator[list[Span]]:
    """In the order they ended, some at a time; a torn last line (the writer was killed) is left out."""
    with path.open("rb") as file:
        file.readline()
        for line in file:
            if line.endswith(b"\n"):
                yield _decode_spans(line)


def shifts(clocks: Iterable[Clock]) -> dict[str, float]:
    """By boot, the seconds to add to its clock so that it agrees with the first one's.

    From measured offsets where a member of either boot has one over the same clock (the surest, if several); else from the
    wall clocks, which NTP holds together to milliseconds: of another host, or of this one before it was started anew.
    """
    clocks = list(clocks)
    if not clocks:
        return {}
    base = clocks[0].boot
    found = {base: 0.0}
    for boot in {c.boot for c in clocks} - {base}:
        pairs = [
            (mine.error_s + its.error_s, its.offset_s - mine.offset_s)
            for mine in clocks
            for its in clocks
            if (mine.boot, its.boot, mine.over) == (boot, base, its.over)
            and mine.offset_s is not None
            and its.offset_s is not None
        ]
        found[boot] = min(pairs)[1] if pairs else _wall(clocks, boot) - _wall(clocks, base)
    return found


def _wall(clocks: Iterable[Clock], boot: str) -> float:
    return statistics.median_low(c.wall_minus_clock_s for c in clocks if c.boot == boot)


def merge(folder: Path, target: Path, events: Iterable[Event] = ()) -> Path:
    """Write ``target``, or ``target``.gz if it is large; returns which. Raises RunFolderError if no span was recorded."""
    files = sorted(folder.glob("*.jsonl"))
    sources = [(header, path) for path in files if (header := read_header(path)) is not None]
    if not sources:
        raise RunFolderError(f"{str(folder)!r} holds no spans: run with --trace to record them.")
    packed = target.with_name(target.name + ".gz")
    large = sum(path.stat().st_size for path in files) > LARGE_BYTES
    chosen, other = (packed, target) if large else (target, packed)
    partial = chosen.with_name(f".{chosen.name}.part")
    try:
        with gzip.open(partial, "wb", compresslevel=4) if large else partial.open("wb") as out:
            out.write(b'{"displayTimeUnit":"ms","traceEvents":[\n')
            out.writelines(_joined(_records(sources, events)))
            out.write(b"\n]}\n")
        partial.replace(chosen)
        other.unlink(missing_ok=True)
    finally:
        partial.unlink(missing_ok=True)
    return chosen


def _joined(records: Iterable[dict[str, Any]]) -> Iterator[bytes]:
    for number, record in enumerate(records):
        yield (b",\n" if number else b"") + _encode(record)


def _records(sources: list[tuple[Header, Path]], events: Iterable[Event]) -> Iterator[dict[str, Any]]:
    shift = shifts(header.clock for header, _ in sources)
    zero = min(_first(path) + shift[header.clock.boot] for header, path in sources)
    who = sorted({(header.role, header.member) for header, _ in sources})
    numbers = {member: number for number, member in enumerate(who, 1)}

    yield _name("process_name", 0, "run")
    for (role, member), number in numbers.items():
        pids = sorted({header.pid for header, _ in sources if (header.role, header.member) == (role, member)})
        yield _name("process_name", number, f"{role} {member} (pid {', '.join(map(str, pids))})")
        yield _name("thread_name", number, f"{role} {member}")
        yield {"ph": "M", "name": "process_sort_index", "pid": number, "tid": 0, "args": {"sort_index": number}}

    with_second: set[int] = set()  # members with a second thread
    for header, path in sources:
        number, plus = numbers[header.role, header.member], shift[header.clock.boot] - zero
        for batch in read_spans(path):
            for name, begin, end, step in batch:
                beside, shown = name.startswith(BESIDE), name.removeprefix(BESIDE)
                if beside and number not in with_second:
                    with_second.add(number)
                    yield _name("thread_name", number, f"{header.role} {header.member}, beside backward") | {"tid": 2}
                yield {
                    "ph": "X",
                    "name": shown,
                    "cat": CATEGORIES.get(shown, "exchange"),
                    "ts": _us(begin + plus),
                    "dur": _us(max(0.0, end - begin)),
                    "pid": number,
                    "tid": 2 if beside else 1,
                    "args": {"step": step},
                }

    base = sources[0][0].clock
    for event in events:
        # an event bears the time of a wall clock
        yield from _told(event, _us(event.time - _wall([base], base.boot) - zero), numbers)


def _told(event: Event, ts: float, numbers: Mapping[tuple[str, int], int]) -> Iterator[dict[str, Any]]:
    """What happened as a mark, what was used as counters."""
    number = numbers.get((event.role, event.member), 0)
    if event.kind == "usage":
        for key, value in event.values.items():
            if key in COUNTERS:
                yield {"ph": "C", "name": key, "ts": ts, "pid": number, "tid": 1, "args": {key: value}}
    elif event.kind in MARKED:
        args = {key: value for key, value in event.values.items() if key != "traceback"} | {"step": event.step}
        scope = "p" if number else "g"
        yield {"ph": "i", "s": scope, "name": event.kind, "cat": "run", "ts": ts, "pid": number, "tid": 1, "args": args}


def _first(path: Path) -> float:
    return min((begin for _, begin, _, _ in next(read_spans(path), [])), default=math.inf)


def _name(what: str, pid: int, name: str) -> dict[str, Any]:
    return {"ph": "M", "name": what, "pid": pid, "tid": 1, "args": {"name": name}}


def _us(seconds: float) -> float:
    return round(seconds * 1e6, 3)
