"""Endpoints as servers and peers use them: messages, joins and losses, deadlines, limits. Also listen()."""

from __future__ import annotations

import re
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, suppress
from typing import Any

import pytest

from weft.comm import endpoint as endpoint_module
from weft.comm import tcp, wire
from weft.comm.endpoint import Arrival, Endpoint, Event, Joined, Lost, Silent
from weft.comm.inproc import inproc_endpoints
from weft.comm.shm import Region, ShmEndpoint
from weft.comm.tcp import TcpEndpoint, listen
from weft.comm.wire import HEADER_BYTES, Head, Kind, Meta
from weft.errors import AddressInUse, CommError, ConfigError, DeadlineExceeded, PeerLost

DEADLINE_S = 20.0


def in_thread(fn: Callable[[], Any]) -> Callable[[], Any]:
    """Start fn; the function returned waits for its result."""
    result: list[Any] = []

    def go() -> None:
        try:
            result.append(fn())
        except BaseException as error:
            result.append(error)

    thread = threading.Thread(target=go, daemon=True)
    thread.start()

    def wait() -> Any:
        thread.join(DEADLINE_S)
        assert result, "hangs"
        if isinstance(result[0], BaseException):
            raise result[0]
        return result[0]

    return wait


class Mesh:
    """TCP endpoints of one process, and their addresses; with a heap each of ``heap`` bytes, if that is given."""

    def __init__(self, num_members: int, heap: int = 0) -> None:
        listeners = [listen() for _ in range(num_members)]
        self.region = Region.create(num_members, heap) if heap else None
        self.addresses = {k: sock.getsockname() for k, sock in enumerate(listeners)}
        waits = [in_thread(lambda k=k: self.join(k, listeners[k])) for k in range(num_members)]
        self.members: list[TcpEndpoint] = [wait() for wait in waits]

    def join(self, member: int, listener: socket.socket, incarnation: int = 0, rejoin: bool = False) -> TcpEndpoint:
        if self.region is not None:
            ranks = {k: k for k in self.addresses}
            return ShmEndpoint(member, listener, self.addresses, self.region, ranks, DEADLINE_S, incarnation, rejoin)
        return TcpEndpoint(member, listener, self.addresses, DEADLINE_S, incarnation, rejoin)


def tcp_endpoints(num_members: int) -> list[Endpoint]:
    return list(Mesh(num_members).members)


@pytest.fixture(params=["inproc", "tcp", "shm"])
def three(request: pytest.FixtureRequest) -> Iterator[list[Endpoint]]:
    made: dict[str, Callable[[], Sequence[Endpoint]]] = {
        "inproc": lambda: inproc_endpoints(3),
        "tcp": lambda: tcp_endpoints(3),
        "shm": lambda: Mesh(3, 1 << 20).members,
    }
    members = list(made[request.param]())
    yield members
    for member in members:
        member.close()


def kill(endpoint: Endpoint) -> None:
    """What the kernel does when the process of a TCP endpoint is killed."""
    assert isinstance(endpoint, TcpEndpoint)
    for connection in endpoint._connected.values():
        connection.sock.close()
    endpoint._listener.close()


def test_a_server_hears_all_and_answers(three: list[Endpoint]) -> None:
    server, *clients = three
    assert [m.peers for m in three] == [(1, 2), (0, 2), (0, 1)]

    def client(endpoint: Endpoint) -> list[bytes]:
        answers = []
        for k in range(20):
            question = bytes([endpoint.member]) * (k * 1000)
            endpoint.send(0, k, Meta("ask", tag=str(k)), [question[: k * 10], question[k * 10 :]])
            answer = endpoint.recv_any()
            assert isinstance(answer, Arrival)
            assert answer.head.seq == k
            answers.append(bytes(answer.payload[0]))
        return answers

    waits = [in_thread(lambda e=e: client(e)) for e in clients]
    for _ in range(40):
        arrival = server.recv_any(DEADLINE_S)
        assert isinstance(arrival, Arrival)
        assert arrival.meta == Meta("ask", tag=str(arrival.head.seq))
        assert bytes(arrival.payload[0]) == bytes([arrival.peer]) * (arrival.head.seq * 1000)
        server.isend(arrival.peer, arrival.head.seq, Meta("answer").encode(), [b"%d" % arrival.head.seq])
    # What was queued goes out while the server waits for more.
    with pytest.raises(DeadlineExceeded):
        server.recv_any(0.2)
    assert [wait() for wait in waits] == [[b"%d" % k for k in range(20)]] * 2


def test_payloads_land_where_the_receiver_says(three: list[Endpoint]) -> None:
    first, second, _ = three
    memory = bytearray(3_000_000)
    view = memoryview(memory)
    filled: list[int] = []
    receiving = second.irecv(0, lambda head: [view[:1], view[1:1], view[1:]], filled.append)
    payload = bytes(range(250)) * 12_000
    wait = in_thread(lambda: first.send(1, 1, Meta("data"), [payload]))
    second.wait([receiving], time.monotonic() + DEADLINE_S)
    wait()
    assert memory == payload
    assert filled == [0, 1, 2]


def test_large_messages_cross_in_both_directions(three: list[Endpoint]) -> None:
    """Both send before either receives: more than any kernel buffer."""
    size = 30_000_000

    def exchange(mine: Endpoint, peer: int) -> bool:
        memory = bytearray(size)
        receiving = mine.irecv(peer, lambda head: [memoryview(memory)])
        sending = mine.isend(peer, 1, b"", [bytes([mine.member]) * size])
        mine.wait([sending, receiving], time.monotonic() + DEADLINE_S)
        return memory == bytes([peer]) * size

    wait = in_thread(lambda: exchange(three[1], 0))
    assert exchange(three[0], 1)
    assert wait()


def test_a_frame_waits_until_it_is_wanted(three: list[Endpoint]) -> None:
    """Frames from others do not disturb who waits for one peer, and each peer's order is kept."""
    three[1].isend(0, 0, b"", [])
    three[2].isend(0, 9, b"", [])
    three[0].wait([three[0].irecv(2, lambda head: [])], time.monotonic() + DEADLINE_S)
    for k in (1, 2):
        early = three[0].recv_any()
        assert isinstance(early, Arrival)
        assert (early.peer, early.head.seq) == (1, k - 1)
        three[1].isend(0, k, b"", [b"from one"])
    last = three[0].recv_any()
    assert isinstance(last, Arrival)
    assert bytes(last.payload[0]) == b"from one"


def test_nothing_is_a_deadline(three: list[Endpoint]) -> None:
    with pytest.raises(DeadlineExceeded):
        three[0].recv_any(0.05)
    receiving = three[0].irecv(1, lambda head: [])
    words = rf"rank 1 did not come within {three[0].deadline_s:g} s to an exchange: stopped, .* allow a longer deadline"
    with pytest.raises(DeadlineExceeded, match=words) as caught:
        three[0].wait([receiving], time.monotonic() + 0.05)
    assert caught.value.ranks == (1,)
    three[1].send(0, 4, Meta("late"), [b"for another"])  # the receive above has been withdrawn
    arrival = three[0].recv_any()
    assert isinstance(arrival, Arrival)
    assert bytes(arrival.payload[0]) == b"for another"


def test_the_deadline_names_who_is_silent(three: list[Endpoint]) -> None:
    """0 waits for 1, 1 waits for 2, 2 does nothing: 2 is to blame, for both."""
    waits = []
    for me, needed in ((0, 1), (1, 2)):
        three[me].deadline_s = 1.0
        receiving = three[me].irecv(needed, lambda head: [])
        until = time.monotonic() + 1.0
        waits.append(in_thread(lambda me=me, r=receiving, u=until: three[me].wait([r], u, watch=three[me].peers)))
    for wait in waits:
        with pytest.raises(DeadlineExceeded) as caught:
            wait()
        assert caught.value.ranks == (2,)


def test_a_server_hears_who_is_silent_and_who_is_not(three: list[Endpoint]) -> None:
    """Member 1 answers, as it serves itself; member 2 does nothing. Nobody is waited for by name."""
    server, serving, frozen = three
    for member in three:
        member.deadline_s = 0.4

    def serve() -> Event:
        while True:
            with suppress(DeadlineExceeded):
                if not isinstance(event := serving.recv_any(), Silent):
                    return event

    wait = in_thread(serve)
    begin = time.monotonic()
    event = server.recv_any(DEADLINE_S)
    assert isinstance(event, Silent)
    assert (event.peer, event.incarnation) == (2, 0)
    assert 0.4 <= event.seconds <= time.monotonic() - begin + 0.4
    with pytest.raises(DeadlineExceeded):  # it is told of once
        server.recv_any(1.0)
    assert server.peers == (1, 2)
    frozen.send(0, 1, Meta("back"))
    assert isinstance(server.recv_any(), Arrival)
    while not isinstance(event := server.recv_any(DEADLINE_S), Silent):
        pass
    assert event.peer == 2, "silent again"
    server.send(1, 1, Meta("end"))
    assert isinstance(wait(), Arrival)


def test_one_that_was_busy_does_not_take_answers_it_has_not_read_for_silence(three: list[Endpoint]) -> None:
    server, *others = three
    for member in three:
        member.deadline_s = 0.2
    for _ in range(4):
        time.sleep(0.3)  # busy: it cannot hear
        for other in others:
            other.send(0, 1, Meta("work"))
        for _ in others:
            assert isinstance(server.recv_any(DEADLINE_S), Arrival)
    time.sleep(0.3)
    begin = time.monotonic()
    assert isinstance(server.recv_any(), Silent)
    assert time.monotonic() - begin >= 0.05, "it gave them no time to answer"


def test_a_deadline_of_nothing_takes_what_is_there(three: list[Endpoint]) -> None:
    first, second, _ = three
    second.send(0, 1, Meta("here"))
    until = time.monotonic() + DEADLINE_S
    while True:  # the kernel may take its time
        with suppress(DeadlineExceeded):
            assert isinstance(first.recv_any(0.0), Arrival)
            break
        assert time.monotonic() < until


def test_one_that_leaves_is_lost(three: list[Endpoint]) -> None:
    three[1].close(PeerLost("rank 7 is gone", (7,)))
    three[2].close()
    lost = {event.peer: event for event in (three[0].recv_any(), three[0].recv_any()) if isinstance(event, Lost)}
    assert lost[2].left
    assert lost[2].error is None
    assert isinstance(lost[1].error, PeerLost)
    assert lost[1].error.ranks == (7,)
    assert three[0].peers == ()
    with pytest.raises(PeerLost, match="rank 7"):
        three[0].send(1, 0, Meta())
    with pytest.raises(PeerLost, match="rank 2"):
        three[0].send(2, 0, Meta())


def test_a_full_queue_is_a_deadline(three: list[Endpoint], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint_module, "MAX_QUEUED", 4)
    three[0].deadline_s = 0.2
    payload = bytes(1_000_000)

    def flood() -> None:
        for k in range(100):
            three[0].isend(1, k, b"", [payload])

    with pytest.raises(DeadlineExceeded, match="has not taken 4 frames"):
        flood()


# TCP alone


def test_a_frame_may_end_where_a_turn_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing more comes after it that would wake the reader."""
    monkeypatch.setattr(tcp, "TURN_BYTES", 1)
    monkeypatch.setattr(tcp, "CHUNK_BYTES", 1000)
    first, second = Mesh(2).members
    for num_bytes in (0, 1, 1000, 1001, 20_000):
        wait = in_thread(lambda n=num_bytes: first.send(1, n, Meta("data"), [bytes(n)]))
        arrival = second.recv_any()
        wait()
        assert isinstance(arrival, Arrival)
        assert arrival.head.payload_bytes == num_bytes
    first.close()
    second.close()


def test_the_end_of_a_frame_that_comes_in_one_turn_with_the_rest_wakes_its_reader(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It had found too little, and was to be woken by more than that end is."""
    monkeypatch.setattr(tcp, "TURN_BYTES", 100_000)
    monkeypatch.setattr(tcp, "CHUNK_BYTES", 100_000)
    first, second = Mesh(2).members
    sent = bytes(range(250)) * 601
    memory = bytearray(len(sent))
    receiving = second.irecv(0, lambda head: [memoryview(memory)])
    sock = first._connected[1].sock
    sock.send(wire.encode_head(Head(Kind.DATA, 0, 0, 0, Meta("data").encode(), len(sent))) + sent[:1])
    until = time.monotonic() + 1.0
    while not receiving.views and time.monotonic() < until:
        second._progress(0.01)
    assert second._connected[0].wakes_at > 1
    sock.send(sent[1:])
    second._progress(1.0)  # a turn
    begun = time.monotonic()
    second.wait([receiving], begun + 2.0)
    assert memory == sent
    first.close()
    second.close()


def test_why_a_member_left_is_heard_by_one_that_only_sends() -> None:
    """It closes with something unread, which resets the connection: the other's next write fails."""
    first, second = Mesh(2).members
    first.send(1, 0, Meta("unread"), [bytes(1000)])
    second.close(PeerLost("rank 7 is gone", (7,)))
    for k in range(1, 100):
        try:
            first.send(1, k, Meta("more"), [bytes(1000)])
        except PeerLost:
            break
        time.sleep(0.001)
    lost = first.recv_any()
    assert isinstance(lost, Lost)
    assert lost.left
    assert isinstance(lost.error, PeerLost)
    assert lost.error.ranks == (7,)
    first.close()


def test_a_payload_that_trickles_in_is_a_sign_of_life() -> None:
    """All of it is less than a receiver is woken for."""
    first, second = Mesh(2).members
    second.deadline_s = 1.0  # of silence; the whole takes longer
    sent = bytes(range(250)) * 20
    sock = first._connected[1].sock
    sock.send(wire.encode_head(Head(Kind.DATA, 0, 0, 0, Meta("data").encode(), len(sent))))

    def trickle() -> None:
        for at in range(0, len(sent), 200):
            time.sleep(0.1)
            sock.send(sent[at : at + 200])

    wait = in_thread(trickle)
    arrival = second.recv_any(DEADLINE_S)
    wait()
    assert isinstance(arrival, Arrival), arrival
    assert b"".join(arrival.payload) == sent
    first.close()
    second.close()


def receive(endpoint: Endpoint, num_bytes: int) -> bytes:
    into = bytearray(num_bytes)
    endpoint.wait([endpoint.irecv(0, lambda head: [memoryview(into)])], time.monotonic() + DEADLINE_S, doing="a test")
    return bytes(into)


def test_what_was_sent_arrives_though_its_sender_has_closed_before_it_read_a_sign_of_life() -> None:
    """More than the receiver's kernel holds: the rest is with the sender's, which forgets it if it closes with something unread."""
    first, second = Mesh(2).members
    sent = bytes(range(250)) * 10_000
    first.isend(1, 0, Meta("data").encode(), [sent])
    second._send(0, second._control(Kind.PONG), ())
    wait = in_thread(first.close)
    time.sleep(0.1)  # so that it closes before anything is read, if it will
    assert receive(second, len(sent)) == sent
    wait()
    second.close()


def test_what_was_sent_is_taken_though_a_sign_of_life_finds_its_sender_gone() -> None:
    first, second = Mesh(2).members
    for k in range(3):
        first.send(1, k, Meta("data"), [bytes([k]) * 1000])
    first.close()
    for k in range(3):
        for _ in range(3):
            second._send(0, second._control(Kind.PONG), ())
            time.sleep(0.01)  # the kernel of the one that is gone answers that it is
        assert receive(second, 1000) == bytes([k]) * 1000
    lost = second.recv_any()
    assert isinstance(lost, Lost)
    assert lost.left, "also the goodbye"
    second.close()


def test_closing_waits_for_a_peer_that_takes_nothing_for_a_second_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tcp, "FLUSH_S", 0.1)
    first, second = Mesh(2).members
    for k in range(20):
        first.isend(1, k, Meta("data").encode(), [bytes(1_000_000)])
    in_thread(first.close)()
    second.close()


def test_a_killed_member_is_lost_and_may_come_back() -> None:
    mesh = Mesh(3)
    first, second, third = mesh.members
    kill(third)
    for member in (first, second):
        event = member.recv_any()
        assert event == Lost(2, 0, event.reason)  # type: ignore[union-attr]
    listener = listen()
    mesh.addresses[2] = listener.getsockname()
    back = in_thread(lambda: mesh.join(2, listener, incarnation=1, rejoin=True))
    assert [member.recv_any() for member in (first, second)] == [Joined(2, 1)] * 2
    third = back()
    assert third.peers == (0, 1)
    third.isend(0, 5, b"", [b"again"])
    arrival = first.recv_any()
    assert isinstance(arrival, Arrival)
    assert bytes(arrival.payload[0]) == b"again"
    for member in (first, second, third):
        member.close()


def test_a_newer_incarnation_replaces_an_older_and_never_the_reverse() -> None:
    mesh = Mesh(2)
    first, second = mesh.members
    newer = in_thread(lambda: mesh.join(1, listen(), incarnation=3, rejoin=True))
    events = [first.recv_any(), first.recv_any()]
    assert isinstance(events[0], Lost)
    assert "incarnation 3" in events[0].reason
    assert events[1] == Joined(1, 3)
    newer()
    stale = TcpEndpoint(1, listen(), {1: ("127.0.0.1", 0)}, DEADLINE_S, incarnation=2)
    with closing(stale):
        stale._members = frozenset({0})
        assert stale._dial(0, mesh.addresses[0], time.monotonic() + DEADLINE_S, patient=False)
        with pytest.raises(DeadlineExceeded):
            first.recv_any(0.2)
        assert first.peers == (1,)
        assert first._connected[1].incarnation == 3
    first.close()
    second.close()


@pytest.mark.parametrize("noise", [b"GET / HTTP/1.1\r\n" * 10, b"", b"W" * 3])
def test_strangers_do_not_disturb(noise: bytes) -> None:
    mesh = Mesh(2)
    first, second = mesh.members
    strangers = [socket.create_connection(mesh.addresses[0]) for _ in range(80)]
    for stranger in strangers:
        stranger.sendall(noise)
    second.isend(0, 1, b"", [b"hello"])
    arrival = first.recv_any()
    assert isinstance(arrival, Arrival)
    with pytest.raises(DeadlineExceeded):
        first.recv_any(0.2)
    assert len(first._strangers) <= 64
    for closable in (*strangers, first, second):
        closable.close()


def data(sender: int = 1, incarnation: int = 0, payload: int = 0, version: int = wire.VERSION, meta: int = 0) -> bytes:
    return wire._HEADER.pack(wire.MAGIC, version, Kind.DATA, sender, incarnation, meta, 1, payload)


@pytest.mark.parametrize(
    ("sent", "ends", "why"),
    [
        (b"x" * HEADER_BYTES, False, "it sent garbage: not a Weft frame"),
        (data(version=wire.VERSION + 1), False, f"wire version {wire.VERSION + 1}, this side speaks {wire.VERSION}"),
        (data(payload=2**60), False, "a frame of 0 [+] 1152921504606846976 bytes is refused"),
        (data(payload=wire.MAX_PAYLOAD), True, "connection closed within a frame|no memory for the"),
        (data(meta=2**31), False, "a frame of 2147483648 [+] 0 bytes is refused"),
        (data(incarnation=7), False, "of member 1, incarnation 7, came on the connection of member 1, incarnation 0"),
        (data(sender=2), False, "of member 2, incarnation 0, came on the connection of member 1, incarnation 0"),
        (data(payload=1000) + b"x" * 999, True, "connection closed within a frame"),
        (data()[:-1], True, "connection closed within a frame"),
        (wire.encode_head(Head(Kind.GOODBYE, 1, 0, 0, b"\xc1", 0)), False, "it sent garbage: metadata"),
        (wire.encode_head(Head(Kind.HELLO, 1, 5, 0, b"", 0)), False, "unexpected HELLO"),
        (wire.encode_head(Head(Kind.PING, 1, 0, 0, b"", 9)), False, "unexpected PING of 9 bytes"),
    ],
    ids=["noise", "version", "huge", "promise", "metadata", "epoch", "sender", "cut", "header", "bye", "hello", "ping"],
)
def test_a_member_that_sends_what_it_must_not_is_lost_and_nobody_else(sent: bytes, ends: bool, why: str) -> None:
    first, second, third = Mesh(3).members
    with closing(first), closing(second), closing(third):
        broken = second._connected[0].sock
        broken.sendall(sent)
        if ends:
            broken.shutdown(socket.SHUT_WR)
        event = first.recv_any()
        assert isinstance(event, Lost)
        assert event.peer == 1
        assert re.search(why, event.reason), event.reason
        third.send(0, 4, Meta("and I?"))
        arrival = first.recv_any()
        assert isinstance(arrival, Arrival)
        assert arrival.peer == 2


def test_a_frame_that_the_server_refuses_ends_its_connection_alone() -> None:
    """And the server's loop goes on: the error of one peer is not its own."""
    first, second, third = Mesh(3).members

    def place(head: Head) -> list[memoryview]:
        if head.payload_bytes > 10:
            raise CommError(f"at most 10 bytes, not {head.payload_bytes}")
        return [memoryview(bytearray(head.payload_bytes))]

    with closing(first), closing(second), closing(third):
        second.isend(0, 1, b"", [b"x" * 11])
        event = first.recv_any(place=place)
        assert isinstance(event, Lost)
        assert "refused: at most 10 bytes, not 11" in event.reason
        third.isend(0, 1, b"", [b"x" * 10])
        assert isinstance(first.recv_any(place=place), Arrival)


def test_a_member_that_never_comes_is_named() -> None:
    with closing(listen()) as silent:
        addresses = {0: ("127.0.0.1", 1), 1: silent.getsockname()}
        with pytest.raises(DeadlineExceeded, match="member 1") as caught:
            TcpEndpoint(0, listen(), addresses, deadline_s=0.3)
        assert caught.value.ranks == (1,)


def test_closing_leaves_no_socket_open() -> None:
    mesh = Mesh(2)
    for member in mesh.members:
        member.close()
        member.close()
    for address in mesh.addresses.values():
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(address, timeout=1)


def test_a_port_in_use_is_named() -> None:
    with closing(listen()) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(AddressInUse, match=f"port {port}.*port 0"):
            listen(port=port)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "example.org"])
def test_only_loopback_unless_told(host: str) -> None:
    with pytest.raises(ConfigError, match="insecure=True"):
        listen(host)
    if host == "0.0.0.0":
        listen(host, insecure=True).close()


# In-process alone


def test_the_baton_is_let_go_while_waiting() -> None:
    """With one baton for all, a waiting member does not keep others from computing."""
    baton = threading.Lock()
    first, second = inproc_endpoints(2, baton=baton, deadline_s=DEADLINE_S)

    def ping_pong(me: Endpoint, peer: int) -> bool:
        with baton:
            for k in range(50):
                if (k + me.member) % 2:
                    me.send(peer, k, Meta())
                else:
                    me.recv_any()
                assert baton.locked()
        return True

    waits = [in_thread(lambda: ping_pong(first, 1)), in_thread(lambda: ping_pong(second, 0))]
    assert all(wait() for wait in waits)
    assert not baton.locked()
