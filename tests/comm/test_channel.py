"""Messages come whole, under their tags, in whatever order they are asked for; who sends does not wait."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.comm.test_links import connect_inproc

from weft.comm.channel import Channel, close_all, fail_together, packed, unpacked
from weft.comm.collectives import RingLink
from weft.comm.inproc import inproc_endpoints
from weft.comm.tcp import TcpEndpoint, listen
from weft.comm.wire import Kind
from weft.errors import CommError, Mismatch

SHAPES = st.lists(st.integers(0, 5), max_size=3)
DTYPES = st.sampled_from([torch.float32, torch.float64, torch.int64, torch.uint8, torch.bfloat16, torch.bool])


@given(st.lists(st.tuples(SHAPES, DTYPES), max_size=4))
def test_what_is_packed_comes_out(kinds: list[tuple[list[int], torch.dtype]]) -> None:
    message = [torch.randint(0, 2, shape).to(dtype) for shape, dtype in kinds]
    tag, got = unpacked(packed((3, True, 7), message))
    assert tag == (3, True, 7)
    assert [(t.dtype, t.shape) for t in got] == [(t.dtype, t.shape) for t in message]
    assert all(torch.equal(a, b) for a, b in zip(got, message, strict=True))


@pytest.fixture
def ends() -> Iterator[tuple[Channel, Channel]]:
    endpoints = inproc_endpoints(2)
    first, second = (connect_inproc(rank, 2, endpoints, 1000.0) for rank in range(2))
    sender, receiver = Channel(first, True, peer=7, deadline_s=2.0), Channel(second, False, peer=4, deadline_s=2.0)
    yield sender, receiver
    close_all([sender, receiver], CommError("the test has ended"))
    for channel in (sender, receiver):
        assert not (channel._thread and channel._thread.is_alive())
        channel.link.close()


def test_a_sender_goes_on_and_the_receiver_asks_in_any_order(ends: tuple[Channel, Channel]) -> None:
    sender, receiver = ends
    for k in range(5):
        sender.send((k,), [torch.full((3,), float(k)), torch.tensor(k)])
    receiver.expect(5)
    for k in (3, 0, 4, 1, 2):
        values, number = receiver.take((k,))
        assert values.tolist() == [k] * 3
        assert number.item() == k
    sender.flush()
    assert not receiver._arrived


def test_what_never_comes_is_an_error_that_names_who_is_late(ends: tuple[Channel, Channel]) -> None:
    _, receiver = ends
    receiver.expect(1)
    with pytest.raises(CommError, match="did not come within 2 s"):
        receiver.take((0,))


def test_a_sender_that_dies_is_seen_by_who_waits(ends: tuple[Channel, Channel]) -> None:
    sender, receiver = ends
    receiver.expect(1)
    threading.Timer(0.2, lambda: sender.link.fail(CommError("gone for a reason"))).start()
    with pytest.raises(CommError):
        receiver.take((0,))


def test_a_wait_names_the_peer_by_its_number_in_the_run(ends: tuple[Channel, Channel]) -> None:
    sender, _ = ends
    sender.deadline_s = 0.1
    sender._under_way = 1  # that no thread carries
    with pytest.raises(CommError, match="rank 7 did not come within 0.1 s to take what was sent") as raised:
        sender.flush()
    assert raised.value.ranks == (7,)


def test_the_deadline_runs_from_when_a_message_is_needed(ends: tuple[Channel, Channel]) -> None:
    sender, receiver = ends
    receiver.deadline_s = sender.deadline_s = 0.5
    receiver.expect(1)
    time.sleep(1.0)  # computing: the thread has waited longer than the deadline
    threading.Timer(0.2, lambda: sender.send((0,), [torch.tensor(3)])).start()
    assert receiver.take((0,))[0].item() == 3


@pytest.mark.parametrize("waits_s", [0.0, 0.2])
def test_who_closes_amid_a_message_says_why(ends: tuple[Channel, Channel], waits_s: float) -> None:
    sender, receiver = ends
    receiver.expect(1)
    time.sleep(waits_s)  # its thread is in the link's call
    close_all([receiver], CommError("the loss was NaN"))
    with contextlib.suppress(CommError):
        sender.send((0,), [torch.tensor(0)])  # it may have found its receiver waiting
        sender.send((1,), [torch.tensor(1)])
    with pytest.raises(CommError, match="the loss was NaN"):
        sender.flush()


@pytest.mark.slow
def test_messages_that_move_on_may_take_longer_than_the_deadline_together() -> None:
    """More than a kernel holds: each is away when it is taken."""
    listeners = [listen() for _ in range(2)]
    with ThreadPoolExecutor() as pool:
        first, second = pool.map(lambda rank: connect(rank, listeners), range(2))
    sender, receiver = Channel(first, True, peer=1, deadline_s=2.0), Channel(second, False, peer=0, deadline_s=2.0)
    for k in range(3):
        sender.send((k,), [torch.full((10_000_000,), float(k))])

    def take_slowly() -> None:
        for _ in range(3):
            time.sleep(1.2)
            receiver.expect(1)

    thread = threading.Thread(target=take_slowly)
    thread.start()
    sender.flush()
    assert sender.waited_s > sender.deadline_s
    thread.join()
    assert [receiver.take((k,))[0][-1].item() for k in range(3)] == [0, 1, 2]
    close_all([sender, receiver], CommError("the test has ended"))
    first.close()
    second.close()


def connect(rank: int, listeners: list[socket.socket]) -> RingLink:
    endpoint = TcpEndpoint(rank, listeners[rank], {k: sock.getsockname() for k, sock in enumerate(listeners)})
    return RingLink(endpoint, rank, 2, "tcp", 1000.0)


def test_who_waits_at_one_channel_hears_of_what_is_wrong_with_another() -> None:
    links = [connect_inproc(0, 2, inproc_endpoints(2), 1000.0) for _ in range(2)]
    sender, receiver = (Channel(link, sends, peer=1, deadline_s=20.0) for link, sends in zip(links, (True, False)))
    fail_together([sender, receiver])
    links[0].send = lambda tensor: (_ for _ in ()).throw(MemoryError("no room to pack it"))  # type: ignore[method-assign]
    receiver.expect(1)
    threading.Timer(0.1, lambda: sender.send((0,), [torch.tensor(0)])).start()
    begun = time.monotonic()
    with pytest.raises(MemoryError, match="no room"):
        receiver.take((0,))
    assert time.monotonic() - begun < 10.0
    close_all([sender, receiver], CommError("the test has ended"))


def test_who_sends_needs_nobody_to_receive_yet() -> None:
    first, second = (connect_inproc(rank, 2, ends, 2.0) for ends in [inproc_endpoints(2)] for rank in range(2))
    for k in range(3):
        first.send(torch.full((4,), k, dtype=torch.uint8))
    assert [second.receive().tolist() for _ in range(3)] == [[k] * 4 for k in range(3)]
    assert second.traffic.bytes_sent == 0
    first.close()
    second.close()


def test_who_only_sends_hears_of_the_end_behind_many_signs_of_life() -> None:
    first, second = inproc_endpoints(2)
    for _ in range(7):
        second._send(0, second._control(Kind.PONG), ())
    second.close(CommError("the loss was NaN"))
    with pytest.raises(CommError, match="the loss was NaN"):
        first.look([1], "a test")
    first.close()


def test_two_who_send_disagree() -> None:
    first, second = (connect_inproc(rank, 2, ends, 2.0) for ends in [inproc_endpoints(2)] for rank in range(2))
    first.send(torch.zeros(4, dtype=torch.uint8))
    with pytest.raises(Mismatch, match="message of rank 1.*message of rank 0"):
        second.send(torch.zeros(4, dtype=torch.uint8))
    first.close()
    second.close()
