"""A log of events survives its writer: what was whole is read, and what was torn does not spoil what follows."""

from __future__ import annotations

from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from weft.events import Event, EventLog, read_events


@given(torn=st.binary(max_size=200_000).filter(lambda b: b"\n" not in b), num=st.integers(0, 3))
def test_a_torn_line_is_cut_before_the_next_is_written(tmp_path_factory, torn: bytes, num: int) -> None:
    path: Path = tmp_path_factory.mktemp("log") / "events.jsonl"
    whole = [Event(kind="a", step=k) for k in range(num)]
    log = EventLog(path)
    for event in whole:
        log.write(event)
    log.close()
    with path.open("ab") as file:
        file.write(torn)
    log = EventLog(path)
    log.write(last := Event(kind="b"))
    log.close()
    assert list(read_events(path)) == [*whole, last]


def test_a_long_torn_line_too(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_bytes(b"x" * 300_000)
    EventLog(path).close()
    assert path.read_bytes() == b""
