"""Faults strike the rank and step they name, once, and travel as plain data."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable

import pytest
import torch
from tests.comm.test_links import CARRIERS

from weft.comm.link import Link, SoloLink
from weft.comm.tcp import SO_MAX_PACING_RATE
from weft.errors import CommError, ConfigError, DeadlineExceeded, Incompatible, PeerLost
from weft.testing import (
    Fault,
    FaultyLink,
    corrupt,
    delay,
    drop,
    freeze,
    kill,
    raise_error,
    skip,
    slow,
    slow_loading,
    throttle,
)
from weft.testing.conformance import Outcome

ALL = [
    kill(rank=2, step=5),
    freeze(rank=0, step=1),
    delay(rank=1, seconds=0.5),
    drop(rank=1, step=2),
    corrupt(rank=1, step=2),
    raise_error(rank=1, step=3),
    skip(rank=1, step=2),
    throttle(rank=0, bytes_per_s=1000),
    slow(rank=2, factor=3),
    slow_loading(rank=1, seconds=0.1),
]


def run(carrier: str, faults: list[Fault], deadline_s: float = 20.0) -> list[Outcome]:
    """Three ranks, four steps of two all-reduces each; what each rank has, or the step and error that ended it."""

    def fn(link: Link) -> tuple[int, object]:
        step = 0
        faulty = FaultyLink(link, [Fault.from_dict(f.to_dict()) for f in faults], lambda: step)
        total = torch.zeros(3)
        for step in range(4):
            for _ in range(2):
                value = torch.ones(3)
                try:
                    faulty.all_reduce([value])
                except (CommError, RuntimeError) as error:
                    return step, error
                total += value
        return 4, total.tolist()

    return CARRIERS[carrier](3)(fn, deadline_s)


@pytest.mark.parametrize("fault", ALL, ids=lambda f: f.kind)
def test_faults_travel_as_json(fault: Fault) -> None:
    assert Fault.from_dict(json.loads(json.dumps(fault.to_dict()))) == fault


def test_an_unknown_fault_is_refused() -> None:
    with pytest.raises(ConfigError, match="possible: kill"):
        Fault.from_dict({"kind": "kil", "rank": 1})


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: slow(rank=0, factor=0.5), "factor=0.5: give 1"),
        (lambda: slow(rank=0, factor=float("inf")), "factor=inf"),
        (lambda: slow_loading(rank=0, seconds=-1), "seconds=-1: give a number of 0 or more"),
        (lambda: throttle(rank=0, bytes_per_s=0), "bytes_per_s=0: give a whole number"),
    ],
)
def test_a_fault_that_cannot_be_is_refused(make: Callable[[], Fault], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        make()


def test_no_fault_changes_nothing() -> None:
    faults = [
        kill(rank=7, step=1),
        slow(rank=1, factor=3),
        slow_loading(rank=1, seconds=9),
    ]  # the last two: not a link's
    assert [o.get() for o in run("inproc", faults)] == [(4, [24.0] * 3)] * 3


@pytest.mark.multiprocess
def test_kill_and_freeze() -> None:
    cases: list[tuple[Callable[..., Fault], type[CommError]]] = [(kill, PeerLost), (freeze, DeadlineExceeded)]
    for fault, expected in cases:
        first, second, victim = run("tcp", [fault(rank=2, step=1)], deadline_s=1.5 if fault is freeze else 20.0)
        assert victim.died
        for outcome in (first, second):
            step, error = outcome.get()
            assert step == 1
            assert isinstance(error, expected)
            assert error.ranks == (2,)


def test_drop_is_seen_by_all() -> None:
    for outcome in run("inproc", [drop(rank=1, step=2)]):
        step, error = outcome.get()
        assert step == 2
        assert isinstance(error, PeerLost)
        assert error.ranks == (1,)


def test_corrupt_flips_one_byte_once() -> None:
    """Of 1.0, 0x3f800000, the byte 0x80 becomes 0x7f: 0.99609375, in one of 24 terms."""
    for outcome in run("inproc", [corrupt(rank=1, step=2)]):
        assert outcome.get() == (4, [24.0, 23.99609375, 24.0])


def test_skip_leaves_one_call_out() -> None:
    """Nobody sees it before the one that made fewer calls has gone."""
    first, skipped, third = run("inproc", [skip(rank=1, step=2)])
    assert skipped.get() == (4, [3.0 * 7 + 1] * 3)
    for step, error in (first.get(), third.get()):
        assert (step, type(error), error.ranks) == (3, PeerLost, (1,))


def test_raise_error_and_delay() -> None:
    outcomes = [o.get() for o in run("inproc", [raise_error(rank=0, step=3), delay(rank=0, seconds=0.001)])]
    assert outcomes[0][0] == 3
    assert "raise_error" in str(outcomes[0][1])
    assert [type(error) for _, error in outcomes[1:]] == [PeerLost, PeerLost]


@pytest.mark.multiprocess
def test_throttle_sets_the_pace_of_every_socket_of_its_rank() -> None:
    def fn(link: Link) -> tuple[int, list[int]]:
        faulty = FaultyLink(link, [throttle(rank=1, bytes_per_s=123_456)], lambda: 0)
        connections = link._endpoint._connected.values()  # type: ignore[attr-defined]
        rates = [c.sock.getsockopt(socket.SOL_SOCKET, SO_MAX_PACING_RATE) for c in connections]
        faulty.barrier()  # nobody leaves before all have looked
        return link.rank, rates

    for outcome in CARRIERS["tcp"](3)(fn):
        rank, rates = outcome.get()
        assert len(rates) == 2
        assert (set(rates) == {123_456}) == (rank == 1)


def test_throttle_needs_sockets() -> None:
    with pytest.raises(Incompatible, match="use --link tcp"):
        run("inproc", [throttle(rank=r, bytes_per_s=1000) for r in range(3)])[0].get()
    with pytest.raises(Incompatible, match="'none'.*use --link tcp"):
        FaultyLink(SoloLink(), [throttle(rank=0, bytes_per_s=1000)], lambda: 0)


def test_a_delay_adds_to_the_waiting_of_all() -> None:
    def fn(link: Link) -> tuple[float, float, float]:
        begin = time.monotonic()
        FaultyLink(link, [delay(rank=1, seconds=0.2)], lambda: 0).all_reduce([torch.ones(1)])
        return link.traffic.wait_s, link.traffic.busy_s, time.monotonic() - begin

    for outcome in CARRIERS["inproc"](2)(fn):
        wait_s, busy_s, elapsed_s = outcome.get()
        assert wait_s > 0.1  # also of the rank whose messages leave late
        assert busy_s > 0
        assert wait_s + busy_s <= elapsed_s


def test_in_a_smaller_group_a_fault_is_of_the_rank_in_the_world() -> None:
    with pytest.raises(RuntimeError, match="raised as"):
        FaultyLink(SoloLink(), [raise_error(rank=3, step=1)], lambda: 1, rank=3).barrier()
    FaultyLink(SoloLink(), [raise_error(rank=0, step=1)], lambda: 1, rank=3).barrier()
