"""Endpoints of one host: payloads that are read where their sender has them; who may write there when; frames that lie; processes that die."""

from __future__ import annotations

import itertools
import os
import signal
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import cast

import numpy as np
import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.comm.test_endpoint import DEADLINE_S, Mesh, in_thread

from weft.comm import wire
from weft.comm.buffers import Buffers
from weft.comm.endpoint import Arrival, Endpoint, Joined, Lost, Place, Sending
from weft.comm.shm import Region, ShmEndpoint
from weft.comm.shm.endpoint import LEAST_LENT
from weft.comm.tcp import listen
from weft.comm.wire import Head, Kind, Meta
from weft.errors import CommError, Incompatible

HEAP = 4 << 20
LARGE = 3 * LEAST_LENT


def in_place(head: Head) -> Sequence[memoryview]:
    """What is lent where it is, the rest in fresh memory."""
    lent = [] if head.lent is None else [head.lent]
    return [*lent, memoryview(bytearray(head.payload_bytes - sum(len(view) for view in lent)))]


@pytest.fixture
def two() -> Iterator[list[ShmEndpoint]]:
    members = cast(list[ShmEndpoint], Mesh(2, HEAP).members)
    yield members
    for member in members:
        member.close()


def filled(endpoint: Endpoint, nbytes: int, with_: int = 1) -> memoryview:
    memory = endpoint.memory(nbytes)
    np.frombuffer(memory, np.uint8)[:] = with_
    return memory


def arrival(endpoint: Endpoint, place: Place = in_place) -> Arrival:
    event = endpoint.recv_any(DEADLINE_S, place)
    assert isinstance(event, Arrival)
    return event


def is_done(sending: Sending, *endpoints: Endpoint) -> bool:
    for _ in range(20):
        for endpoint in endpoints:
            endpoint._progress(0.002)
    return sending.done


def test_it_is_read_where_it_lies_until_the_last_view_is_let_go(two: list[ShmEndpoint]) -> None:
    lender, reader = two
    memory = filled(lender, LARGE)
    sending = lender.isend(1, 7, Meta("take").encode(), [memory, b"and more"])
    came = arrival(reader)
    assert (came.head.seq, came.meta, came.head.payload_bytes) == (7, Meta("take"), LARGE + 8)
    assert bytes(came.payload[0]) == bytes(memory)
    assert bytes(came.payload[1]) == b"and more"
    memory[LARGE - 1] = 9
    assert came.payload[0][LARGE - 1] == 9, "it was copied"
    tail = np.frombuffer(came.payload[0], np.uint8)[-1:]
    del came
    assert not is_done(sending, *two), "somebody still looks at it"
    del tail
    assert is_done(sending, *two)


def test_of_a_payload_that_is_placed_elsewhere_nothing_stays(two: list[ShmEndpoint]) -> None:
    lender, reader = two
    views = [memoryview(bytearray(n)) for n in (0, 10, LARGE - 20, 0, 30)]  # not where the sender's end
    filled_in: list[int] = []
    receiving = reader.irecv(0, lambda head: views, filled_in.append)
    sending = lender.isend(1, 1, b"", [filled(lender, LARGE, 5), bytes(range(20))])
    reader.wait([receiving], time.monotonic() + DEADLINE_S)
    assert b"".join(views) == bytes([5]) * LARGE + bytes(range(20))
    assert filled_in == [0, 1, 2, 3, 4]
    del receiving
    assert is_done(sending, *two)
    sending = lender.isend(1, 1, b"", [filled(lender, LARGE, 6)])
    came = arrival(reader, lambda head: [memoryview(bytearray(head.payload_bytes))])
    assert is_done(sending, *two), "its arrival still refers to it"
    assert set(came.payload[0]) == {6}


@settings(deadline=None, max_examples=60)
@given(
    first=st.sampled_from([0, 1, LEAST_LENT - 1, LEAST_LENT, LARGE]),
    own=st.booleans(),
    rest=st.lists(st.integers(0, 5000), max_size=3),
    cuts=st.lists(st.integers(0, LARGE + 15_000), max_size=4),
    keeps=st.booleans(),
)
def test_any_payload_arrives_whole(
    pair: list[ShmEndpoint], first: int, own: bool, rest: list[int], cuts: list[int], keeps: bool
) -> None:
    lender, reader = pair
    dice = np.random.default_rng(first + sum(rest))
    memory = BUFFERS[id(lender)] if own else memoryview(bytearray(LARGE))
    memory[:] = dice.bytes(LARGE)
    payload = [memory[:first], *(dice.bytes(n) for n in rest)]
    whole = b"".join(payload)

    def place(head: Head) -> Sequence[memoryview]:
        lent = [head.lent] if keeps and head.lent is not None else []
        room = memoryview(bytearray(head.payload_bytes - sum(map(len, lent))))
        bounds = [0, *sorted(min(cut, len(room)) for cut in cuts), len(room)]
        return [*lent, *(room[a:b] for a, b in itertools.pairwise(bounds))]

    sending = lender.isend(1, 1, b"", payload)
    came = arrival(reader, place)
    assert b"".join(came.payload) == whole
    del came
    until = time.monotonic() + DEADLINE_S
    while not sending.done and time.monotonic() < until:
        reader._progress(0.0)
        lender._progress(0.001)
    assert sending.done


BUFFERS: dict[int, memoryview] = {}


@pytest.fixture(scope="module")
def pair() -> Iterator[list[ShmEndpoint]]:
    members = cast(list[ShmEndpoint], Mesh(2, HEAP).members)
    BUFFERS[id(members[0])] = members[0].memory(LARGE)
    yield members
    for member in members:
        member.close()


def test_a_frame_that_waits_is_lent_once(two: list[ShmEndpoint]) -> None:
    lender, reader = two
    sending = lender.isend(1, 1, b"", [filled(lender, LARGE)])
    for _ in range(5):
        reader._progress(0.01)  # nobody wants it yet
        lender._progress(0.01)
    came = arrival(reader)
    lender._progress(0.05)
    assert not sending.done
    del came
    assert is_done(sending, *two)


def test_a_frame_that_nobody_took_goes_with_its_connection(two: list[ShmEndpoint]) -> None:
    lender, reader = two
    lender.isend(1, 1, b"", [filled(lender, LARGE)])
    for _ in range(5):
        reader._progress(0.01)
    assert len(reader._borrowed) == 1
    reader._drop(reader._connected[0], "the connection broke")
    assert reader._borrowed == {}


def refuse(head: Head) -> Sequence[memoryview]:
    raise CommError("no such parameter")


def test_what_is_small_or_not_of_the_heap_is_sent_by_value(two: list[ShmEndpoint]) -> None:
    lender, reader = two
    for memory in (filled(lender, LEAST_LENT - 1), memoryview(bytearray(LARGE)), reader.memory(LARGE)):
        lender.isend(1, 1, b"", [memory])
        came = arrival(reader)
        memory[0] = 77
        assert came.payload[0][0] != 77
    assert lender._lent == {}


def test_a_heap_is_bounded_and_what_it_has_no_room_for_goes_by_value(two: list[ShmEndpoint]) -> None:
    lender, reader = two
    room = [lender.memory(HEAP // 4) for _ in range(5)]
    lender.isend(1, 1, b"", [room[-1]])
    came = arrival(reader)
    room[-1][0] = 1
    assert came.payload[0][0] == 0
    lender.isend(1, 2, b"", [room[0]])
    came = arrival(reader)
    room[0][0] = 1
    assert came.payload[0][0] == 1
    assert len({np.frombuffer(memory, np.uint8).ctypes.data // (HEAP // 4) for memory in room}) == 5, "they overlap"


def test_what_a_lost_peer_still_had_is_never_written_to_again() -> None:
    """It may still be there, and have accepted what it reads. Who comes back lends other memory."""
    mesh = Mesh(2, HEAP)
    lender, reader = cast(list[ShmEndpoint], mesh.members)
    memory = filled(lender, LARGE)
    sending = lender.isend(1, 1, b"", [memory])
    came = arrival(reader)
    for connection in list(lender._connected.values()):
        lender._drop(connection, "the connection broke")
    assert isinstance(reader.recv_any(DEADLINE_S), Lost)
    lender._listener.close()
    wait = in_thread(lambda: mesh.join(0, listen(), incarnation=1, rejoin=True))
    while not isinstance(reader.recv_any(DEADLINE_S), Joined):
        pass
    again = cast(ShmEndpoint, wait())
    filled(again, HEAP - 2 * LARGE, with_=8)
    assert set(came.payload[0]) == {1}
    del came
    reader._progress(0.01)  # it gives nothing back to the new incarnation, which did not lend it
    again._progress(0.05)
    assert again.peers == (1,)
    assert not sending.done
    for member in (lender, reader, again):
        member.close()


def loan(number: int, offset: int, nbytes: int) -> bytes:
    return number.to_bytes(8, "big") + offset.to_bytes(8, "big") + nbytes.to_bytes(8, "big")


BROKEN = {
    "beyond": (Kind.LENT, loan(0, HEAP - 10, LARGE), b""),
    "around": (Kind.LENT, loan(0, 2**64 - 1, 2), b""),
    "huge": (Kind.LENT, loan(0, 0, 2**63), b""),
    "nothing": (Kind.LENT, loan(0, 0, 0), b""),
    "short": (Kind.LENT, b"short", b""),
    "never lent": (Kind.RETURN, (5).to_bytes(8, "big"), b""),
    "return of what": (Kind.RETURN, b"", b""),
    "return with a payload": (Kind.RETURN, (5).to_bytes(8, "big"), b"payload"),
}


@pytest.mark.parametrize("how", BROKEN)
def test_a_frame_that_lies_ends_its_connection(how: str) -> None:
    kind, meta, payload = BROKEN[how]
    liar, honest, reader = cast(list[ShmEndpoint], Mesh(3, HEAP).members)
    head = Head(kind, 0, 0, 1, meta, len(payload))
    liar._connected[2].sock.sendall(wire.encode_head(head) + payload)
    lost = reader.recv_any(DEADLINE_S, in_place)
    assert isinstance(lost, Lost)
    assert lost.peer == 0
    honest.isend(2, 1, b"", [filled(honest, LARGE)])
    assert bytes(arrival(reader).payload[0]) == bytes([1]) * LARGE
    for member in (liar, honest, reader):
        member.close()


def test_over_tcp_nothing_can_be_lent() -> None:
    liar, reader = Mesh(2).members
    liar._connected[1].sock.sendall(wire.encode_head(Head(Kind.LENT, 0, 0, 1, loan(0, 0, LARGE), 0)))
    lost = reader.recv_any(DEADLINE_S)
    assert isinstance(lost, Lost)
    assert "unexpected LENT" in lost.reason
    for member in (liar, reader):
        member.close()


def test_what_is_refused_is_not_read(two: list[ShmEndpoint]) -> None:
    lender, reader = two
    lender.isend(1, 1, b"", [filled(lender, LARGE)])
    lost = reader.recv_any(DEADLINE_S, refuse)
    assert isinstance(lost, Lost)
    assert "no such parameter" in lost.reason
    assert reader._borrowed == {}
    assert not reader._returns or reader.peers == ()


def test_a_pace_is_refused(two: list[ShmEndpoint]) -> None:
    with pytest.raises(Incompatible, match="--link tcp"):
        two[0].pace(1e6)


def test_a_buffer_is_taken_again_when_nobody_reads_it(two: list[ShmEndpoint]) -> None:
    lender, reader = two
    buffers = Buffers(lender, LARGE)
    first = buffers.take()
    for number in range(2):  # to two readers
        buffers.sent(first, lender.isend(1, number, b"", [first.data]))
    buffers.leave(first)
    came = [arrival(reader), arrival(reader)]
    second = buffers.take()
    assert second is not first
    buffers.leave(second)
    for _ in range(2):
        assert buffers.take() is second
        buffers.leave(second)
        came.pop()
        for endpoint in (reader, lender):
            endpoint._progress(0.05)
    assert {id(buffers.take()), id(buffers.take())} == {id(first), id(second)}


# Processes


def fork_lender(region: Region, listeners: Sequence[object], addresses: dict[int, tuple[str, int]]) -> int:
    """Member 0, a process that lends its memory to member 1 and writes to it when it is done."""
    if pid := os.fork():
        return pid
    try:
        listeners[1].close()  # type: ignore[attr-defined]
        lender = ShmEndpoint(0, listeners[0], addresses, region, {0: 0, 1: 1}, DEADLINE_S)  # type: ignore[arg-type]
        memory = lender.memory(2 << 20)
        for number in range(1_000_000):
            np.frombuffer(memory, np.uint8)[:] = number % 251
            lender.send(1, number, Meta("here"), [memory])
    finally:
        os._exit(0)


@pytest.mark.multiprocess
def test_memory_of_one_that_is_killed_stays_readable_and_nothing_is_left_behind() -> None:
    process = psutil.Process()
    before = process.num_fds(), set(os.listdir("/dev/shm"))
    region, listeners = Region.create(2, HEAP), [listen() for _ in range(2)]
    addresses = {k: sock.getsockname() for k, sock in enumerate(listeners)}
    pid = fork_lender(region, listeners, addresses)
    listeners[0].close()
    reader = ShmEndpoint(1, listeners[1], addresses, region, {0: 0, 1: 1}, DEADLINE_S)
    try:
        for number in range(30):  # who lends it waits until it is given back
            came = arrival(reader)
            expected = number % 251
            assert came.head.seq == number
            assert bytes(came.payload[0][:: 1 << 12]) == bytes([expected]) * (2 << 8)
            if number < 29:
                del came
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    lost = reader.recv_any(DEADLINE_S, in_place)
    assert isinstance(lost, Lost)
    assert bytes(came.payload[0]) == bytes([29]) * (2 << 20), "it went with its owner"
    reader.close()
    region.close()
    del came, reader
    assert (process.num_fds(), set(os.listdir("/dev/shm"))) == before


def test_the_map_goes_with_the_last_that_has_it() -> None:
    def mapped() -> int:
        return sum("zero" in line for line in Path("/proc/self/maps").read_text().splitlines())

    before = mapped()
    mesh = Mesh(2, HEAP)
    lender, reader = cast(list[ShmEndpoint], mesh.members)
    lender.isend(1, 1, b"", [filled(lender, LARGE)])
    came = arrival(reader)
    assert mapped() > before
    for member in (lender, reader):
        member.close()
    assert mesh.region is not None
    mesh.region.close()
    assert came.payload[0][0] == 1
    del came, mesh, lender, reader, member
    assert mapped() == before
