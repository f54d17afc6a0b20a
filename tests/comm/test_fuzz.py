"""Mutated frames against the reader, a live endpoint and a live link: typed errors, bounded memory, no hang, no one else
harmed. The default suite sends a few thousand; ``-m slow`` the 100,000."""

from __future__ import annotations

import random
import socket
import threading
import time
from contextlib import closing, suppress

import psutil
import pytest
import torch
from tests.comm.fuzz import frame, mutate, streams
from tests.variants import rest_slow

from weft.comm import wire
from weft.comm.collectives import RingLink
from weft.comm.endpoint import Arrival, allocate
from weft.comm.tcp import TcpEndpoint, listen
from weft.comm.wire import Head, Kind, Meta, Reader
from weft.errors import CommError, DeadlineExceeded

#: The largest frame that is sent is 4 KB, the metadata of one that is promised at most 1 MB: for the interpreter's own
#: wants and what malloc keeps, sixty times that.
MAX_GROWTH = 64 << 20
DEADLINE_S = 20.0


@pytest.fixture(autouse=True)
def memory_is_bounded():
    """Of pages in use: one who promises 64 GB and sends 40 bytes may cost an address, not memory."""
    grown = Growth()
    yield grown
    grown.check()


class Growth:
    def __init__(self) -> None:
        self.process = psutil.Process()
        self.before = self.process.memory_info().rss

    def check(self) -> None:
        grown = self.process.memory_info().rss - self.before
        assert grown < MAX_GROWTH, f"{grown:,} bytes"


def hello(member: int, incarnation: int = 0) -> bytes:
    return wire.encode_head(Head(Kind.HELLO, member, incarnation, 0, b"", 0))


@pytest.mark.parametrize("frames", rest_slow([5000, 60_000]))
def test_the_reader_takes_anything(frames: int, memory_is_bounded: Growth) -> None:
    """It ends with whole frames, within one, or with a CommError; never with another error, never with more than came."""
    seen = {"whole": 0, "within": 0, "refused": 0}
    for k, (dice, stream) in enumerate(streams("reader", frames)):
        data, reader = b"".join(stream), Reader()
        whole = 0
        try:
            while True:
                space = reader.space()
                if space is None:
                    assert reader.head is not None
                    if not reader.placed:
                        with suppress(CommError):
                            wire.decode_meta(reader.head.meta)
                        reader.place(allocate(reader.head))
                    if reader.complete:
                        whole += 1
                        reader.reset()
                    continue
                if not data:
                    break
                piece = data[: dice.randint(1, len(space))]
                space[: len(piece)] = piece
                reader.advance(len(piece))
                data = data[len(piece) :]
        except CommError:
            seen["refused"] += 1
        else:
            seen["within" if reader.within_frame else "whole"] += 1
        assert whole <= 2 * len(stream)
        if k % 100 == 0:
            memory_is_bounded.check()
    assert min(seen.values()) > 0.05 * sum(seen.values()), f"the mutations are one-sided: {seen}"


@pytest.mark.parametrize("frames", rest_slow([2000, 35_000]))
def test_an_endpoint_serves_on(frames: int, memory_is_bounded: Growth) -> None:
    """Strangers, and a member that comes back again and again, send garbage to a server; another member is answered."""
    listeners = [listen() for _ in range(3)]
    addresses = {k: sock.getsockname() for k, sock in enumerate(listeners)}
    members: dict[int, TcpEndpoint] = {}
    listeners[2].close()

    def join(member: int) -> None:
        members[member] = TcpEndpoint(member, listeners[member], addresses, DEADLINE_S)

    threads = [threading.Thread(target=join, args=(k,), daemon=True) for k in (0, 1)]
    broken = _Broken(addresses)
    # Member 2 is nobody but garbage: it has a listener that is closed, so members 0 and 1 cannot wait for it to join.
    addresses.pop(2)
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE_S)
    server, honest = members[0], members[1]
    server._members |= {2}  # from now on it may come
    arrivals = dropped = 0
    with closing(server), closing(honest):
        for number, (dice, stream) in enumerate(streams("endpoint", frames, most=20)):
            broken.send(dice, stream)
            while True:
                try:
                    event = server.recv_any(0.0)
                except DeadlineExceeded:
                    if broken.is_read():
                        break
                    continue
                if isinstance(event, Arrival):
                    arrivals += 1
                    with suppress(CommError):
                        assert isinstance(event.meta, Meta)
                elif event.peer == 2:
                    dropped += 1
                else:
                    raise AssertionError(f"member 1 was harmed: {event}")
            broken.close()
            if number % 20 == 0:
                honest.isend(0, number, Meta("ask", tag=str(number)).encode(), [b"0123456789" * dice.randrange(1000)])
                while not (isinstance(event := server.recv_any(DEADLINE_S), Arrival) and event.peer == 1):
                    pass
                assert (event.meta.op, event.head.seq) == ("ask", number)
                server.isend(1, number, Meta("answer").encode())
                answer = honest.recv_any(DEADLINE_S)
                assert isinstance(answer, Arrival)
                assert answer.head.seq == number
                memory_is_bounded.check()
        assert server.peers in ((1,), (1, 2))
    assert arrivals > frames / 50, "hardly a frame came through: the fuzz does not reach far"
    assert dropped > frames / 100


class _Broken:
    """Who sends the garbage, over a connection of its own for each stream."""

    def __init__(self, addresses: dict[int, tuple[str, int]]) -> None:
        self.address = addresses[0]
        self.incarnation = 0
        self.sock: socket.socket | None = None

    def send(self, dice: random.Random, stream: list[bytes]) -> None:
        self.sock = socket.create_connection(self.address, timeout=DEADLINE_S)
        begin = b""
        if dice.randrange(4):  # a member that has said who it is; else a stranger
            begin = hello(2, self.incarnation)
        data = begin + b"".join(_as_of(frame, self.incarnation) for frame in stream)
        self.incarnation += 1
        with suppress(OSError):  # it may be refused in the middle
            self.sock.sendall(data)
        with suppress(OSError):
            self.sock.shutdown(socket.SHUT_WR)

    def is_read(self) -> bool:
        """Whether the server has read all and closed: it does at the end, and at the first thing it cannot read."""
        assert self.sock is not None
        self.sock.settimeout(0)
        try:
            return not self.sock.recv(1 << 16)
        except BlockingIOError:
            return False
        except OSError:
            return True

    def close(self) -> None:
        assert self.sock is not None
        self.sock.close()


def _as_of(frame: bytes, incarnation: int) -> bytes:
    """As member 2 sends it now, if the mutation left sender and incarnation alone."""
    if frame[8:16] == (1).to_bytes(4, "big") + (0).to_bytes(4, "big"):
        return frame[:8] + (2).to_bytes(4, "big") + incarnation.to_bytes(4, "big") + frame[16:]
    return frame


@pytest.mark.parametrize("frames", rest_slow([500, 5000]))
def test_a_link_ends_each_call_with_its_result_or_a_typed_error(frames: int) -> None:
    """Rank 0 is broken: what it sends for the call that rank 1 is in is mutated. A payload of the right form is data."""
    errors = whole = 0
    for number in range(frames):
        dice = random.Random(f"link {number}")
        gather, numel = dice.randrange(2), dice.choice((1, 30, 40_000))
        shape = (dice.randrange(4), 3) if gather else (numel,)
        meta = Meta("all_gather" if gather else "all_reduce sum", (shape,), ("float32",))
        payload = bytes(4 * (shape[0] * (3 if gather else 1)))
        sent = frame(dice, sender=0, meta=meta)[: wire.HEADER_BYTES]
        head = Head(Kind.DATA, 0, 0, 1, meta.encode(), len(payload))
        sent = mutate(dice, wire.encode_head(head) + payload)
        with listen() as listener, socket.create_connection(listener.getsockname()) as broken:
            broken.sendall(hello(0))
            broken.setblocking(False)
            with suppress(OSError):
                broken.sendall(sent)
            broken.shutdown(socket.SHUT_WR)
            addresses = {0: ("127.0.0.1", 1), 1: listener.getsockname()}
            link = RingLink(TcpEndpoint(1, listener.dup(), addresses, DEADLINE_S), 1, 2, "tcp", DEADLINE_S)
            begin = time.monotonic()
            with closing(link):
                try:
                    if gather:
                        first, second = link.all_gather(torch.ones(2, 3))
                        assert second.shape == (2, 3)
                        assert first.shape[1:] == (3,)
                    else:
                        buffer = torch.ones(numel)
                        link.all_reduce([buffer])
                    whole += 1
                except CommError:
                    errors += 1
            assert time.monotonic() - begin < DEADLINE_S / 2, "it waited for its deadline"
    assert errors > whole
