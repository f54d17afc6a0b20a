"""Spans on disk: bounded, readable after a kill; clocks brought together to within what was proven."""

from __future__ import annotations

import math
import os
import random
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from weft.comm.collectives import RingLink
from weft.comm.inproc import inproc_endpoints
from weft.comm.tracing import TracedLink, measure_clock
from weft.report.trace import read_header, read_spans, shifts
from weft.spans import Clock, Spans, clock, clock_offset, local_clock

CLOCK = Clock(boot="a", wall_minus_clock_s=1000.0)


def spans_in(folder: Path) -> list[tuple[str, float, float, int]]:
    return [span for path in sorted(folder.glob("*")) for batch in read_spans(path) for span in batch]


def test_what_is_added_comes_back(tmp_path: Path) -> None:
    spans = Spans(tmp_path / "spans", "worker", 3, CLOCK)
    spans.step = 7
    spans.add("data", 1.25, 1.5)
    with spans.span("save"):
        pass
    spans.close()
    first, second = spans_in(tmp_path / "spans")
    assert tuple(first) == ("data", 1.25, 1.5, 7)
    assert second[0] == "save"
    assert second[1] <= second[2] <= clock()
    (path,) = (tmp_path / "spans").glob("*")
    header = read_header(path)
    assert header is not None
    assert (header.role, header.member, header.pid, header.clock) == ("worker", 3, os.getpid(), CLOCK)


@given(st.integers(1, 6000))
def test_the_disk_is_bounded_and_keeps_the_first_and_the_last(
    tmp_path_factory: pytest.TempPathFactory, num: int
) -> None:
    folder = tmp_path_factory.mktemp("spans")
    spans = Spans(folder, "worker", 0, CLOCK, segment=100)
    for k in range(num):
        spans.step = k
        spans.add("x", 0.0, 0.0)
        if k % 10 == 9:
            spans.flush()
    spans.close()
    kept = [step for *_, step in spans_in(folder)]
    assert len(kept) <= 300
    assert kept == sorted(kept)
    assert kept[: min(num, 100)] == list(range(min(num, 100)))
    late = min(num, 100)
    assert kept[-late:] == list(range(num - late, num))
    if num <= 300:
        assert kept == list(range(num)), "nothing is dropped before it must be"


def test_a_killed_writer_leaves_what_it_flushed(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys; from pathlib import Path; from weft.spans import *\n"
        f"spans = Spans(Path({str(tmp_path / 'spans')!r}), 'worker', 0, local_clock())\n"
        "for k in range(5000): spans.add('x', k, k)\n"
        "spans._file.write(b'[[\"torn\",1')\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", code], timeout=60, check=False)
    assert done.returncode == -signal.SIGKILL
    found = spans_in(tmp_path / "spans")
    assert [begin for _, begin, _, _ in found] == list(range(len(found)))
    assert len(found) >= 4864


def test_a_full_disk_ends_the_trace_and_not_the_training(tmp_path: Path) -> None:
    said: list[str] = []
    spans = Spans(tmp_path / "spans", "worker", 0, CLOCK, said.append)
    (tmp_path / "spans").write_text("in the way")
    for _ in range(3):
        spans.add("x", 0.0, 1e9)
        spans.flush()
    spans.close()
    assert len(said) == 1
    assert "worker 0" in said[0]


# -- clocks


@given(
    offset=st.floats(-1e4, 1e4),
    entered=st.lists(
        st.tuples(st.floats(0, 1), st.floats(0, 1), st.floats(0, 2), st.floats(0, 2)), min_size=1, max_size=12
    ),
)
def test_the_true_offset_lies_within_the_error(offset: float, entered: list[tuple[float, float, float, float]]) -> None:
    """Both enter a round when they like; each leaves any time after both have entered: delays need not be symmetric."""
    own, theirs, start = [], [], 0.0
    for mine_s, their_s, mine_delay_s, their_delay_s in entered:
        mine, other = start + mine_s, start + their_s
        met = max(mine, other)
        own.append((mine + offset, met + mine_delay_s + offset))
        theirs.append((other, met + their_delay_s))
        start = met + max(mine_delay_s, their_delay_s)
    found, error = clock_offset(own, theirs)
    assert abs(found - offset) <= error + 1e-6


def test_a_quick_round_makes_the_offset_sure() -> None:
    slow, quick = ((0.0, 9.0), (0.0, 9.0)), ((10.0, 10.001), (10.0, 10.001))
    own, theirs = zip(slow, quick)
    found, error = clock_offset([(a + 5, b + 5) for a, b in own], theirs)
    assert math.isclose(found, 5.0)
    assert math.isclose(error, 0.001)


def test_offsets_need_rounds_of_both() -> None:
    with pytest.raises(ValueError, match="1 own rounds and 0"):
        clock_offset([(0.0, 1.0)], [])


@pytest.mark.parametrize("world", [1, 2, 3])
def test_members_measure_each_others_clocks(world: int) -> None:
    """Every rank with a clock of its own that is off by hours."""
    off = [0.0, 7200.0, -3600.5][:world]
    links = [
        RingLink(e, e.member, world, carrier="inproc", deadline_s=20) for e in inproc_endpoints(world, deadline_s=20)
    ]
    found: list[Clock | None] = [None] * world

    def live(rank: int) -> None:
        own = Clock(boot=f"host {rank}", wall_minus_clock_s=0.0)
        found[rank] = measure_clock(links[rank], torch.device("cpu"), own, lambda: clock() + off[rank])

    threads = [threading.Thread(target=live, args=(r,)) for r in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    for link in links:
        link.close()
    for rank, its in enumerate(found):
        assert its is not None
        if world > 1:
            assert its.over == "host 0"
            assert its.offset_s is not None
            assert abs(its.offset_s - off[rank]) <= its.error_s + 1e-6
    # and the shifts bring them together
    shift = shifts([c for c in found if c is not None])
    for rank in range(world):
        assert abs(off[rank] + shift[f"host {rank}"]) < 30.0


def test_shifts_prefer_what_was_measured_and_never_across_reboots() -> None:
    a = Clock(boot="a", wall_minus_clock_s=100.0, over="a", offset_s=0.0)
    b = Clock(boot="b", wall_minus_clock_s=90.0, over="a", offset_s=10.5, error_s=0.1)
    surer = Clock(boot="b", wall_minus_clock_s=90.0, over="a", offset_s=10.25, error_s=0.01)
    again = Clock(boot="a2", wall_minus_clock_s=5000.0, over="a2", offset_s=0.0)  # the host of a, started anew
    assert shifts([a, b, surer]) == {"a": 0.0, "b": -10.25}
    assert shifts([a, again]) == {"a": 0.0, "a2": 4900.0}
    assert shifts([]) == {}


def test_this_host_has_one_clock() -> None:
    code = "from weft.spans import local_clock; c = local_clock(); print(c.boot, c.wall_minus_clock_s)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True).stdout
    boot, wall = out.split()
    assert boot == local_clock().boot
    assert abs(float(wall) - local_clock().wall_minus_clock_s) < 30.0


# -- the traced link


def test_each_exchange_and_its_waiting_are_spans(tmp_path: Path) -> None:
    endpoints = inproc_endpoints(2, deadline_s=20)
    links = [RingLink(e, e.member, 2, carrier="inproc", deadline_s=20) for e in endpoints]
    spans = [Spans(tmp_path / str(r), "worker", r, local_clock()) for r in range(2)]
    traced = [TracedLink(link, s) for link, s in zip(links, spans)]
    results: list[torch.Tensor] = [torch.full((1000,), float(r + 1)) for r in range(2)]

    def live(rank: int) -> None:
        traced[rank].all_reduce([results[rank]])
        traced[rank].all_gather(torch.tensor([rank]))
        traced[rank].broadcast([torch.zeros(3)])
        traced[rank].barrier()

    threads = [threading.Thread(target=live, args=(r,)) for r in range(2)]
    random.Random(0).shuffle(threads)
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    for rank in range(2):
        traced[rank].close()
        spans[rank].close()
        assert torch.equal(results[rank], torch.full((1000,), 3.0)), "the exchange itself is as it was"
        found = spans_in(tmp_path / str(rank))
        calls = [s for s in found if s[0] != "wait"]
        assert [s[0] for s in calls] == ["all_reduce", "all_gather", "broadcast", "barrier"]
        waits = [s for s in found if s[0] == "wait"]
        assert waits
        for _, begin, end, _ in waits:
            assert any(b <= begin <= end <= e for _, b, e, _ in calls), "a wait lies inside its exchange"
        assert math.isclose(sum(e - b for _, b, e, _ in waits), links[rank].traffic.wait_s, rel_tol=1e-6)
