"""Endpoints over TCP: a full mesh of plain sockets, one selector, no threads.

Costs a copy into the kernel and one out of it: payloads are sent from the caller's memory and received into it. The
kernel tells at once when a peer's process is gone.
"""

from __future__ import annotations

import errno
import ipaddress
import os
import selectors
import socket
import struct
import termios
import time
import weakref
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from fcntl import ioctl
from itertools import islice

from weft.comm import wire
from weft.comm.endpoint import Endpoint, Lost, Receiving, Sending, error_in
from weft.comm.link import DEADLINE_S
from weft.comm.wire import Head, Kind, Reader
from weft.errors import AddressInUse, CommError, ConfigError, DeadlineExceeded, PeerLost

CHUNK_BYTES = 1 << 20  # at most this much in one system call: both directions get their turn
TURN_BYTES = 4 << 20  # at most this much from one peer before the others are looked at
AT_ONCE_BYTES = 64 << 10  # of a payload that comes slowly; who is woken by each packet takes time from who computes
GLANCE_S = (
    0.25  # after this one looks at what comes slowly all the same, when one looks at all: any of it is a sign of life
)
FLUSH_S = 1.0  # how long a closing endpoint waits for peers that take nothing more of what it has sent
LOOK_S = 0.0005  # at how much of it they have taken, for the kernel does not tell
MAX_STRANGERS = 64  # connections that have not yet said who they are
SO_MAX_PACING_RATE = 47  # Linux 3.13 and later; Python 3.11's socket does not name it
READ, WRITE = selectors.EVENT_READ, selectors.EVENT_WRITE

Address = tuple[str, int]


def listen(host: str = "127.0.0.1", port: int = 0, *, insecure: bool = False) -> socket.socket:
    """A listening socket; port 0 takes a free one (``sock.getsockname()[1]`` tells which).

    A parent makes one for every rank before it forks. AddressInUse if the port is taken. Any host but a loopback one
    is refused unless ``insecure``: whoever reaches the port could join, and read what travels.
    """
    if not insecure and not _is_loopback(host):
        raise ConfigError(
            f"refusing to listen on {host!r}: connections are neither encrypted nor authenticated. "
            "Use a loopback address (127.0.0.1), or insecure=True on a network you trust"
        )
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((host, port))
        sock.listen(128)
    except OSError as error:
        sock.close()
        if error.errno == errno.EADDRINUSE:
            raise AddressInUse(
                f"port {port} on {host} is in use: stop what listens there (`ss -ltnp 'sport = :{port}'` names it), "
                "or use port 0 for a free one"
            ) from error
        raise ConfigError(f"cannot listen on {host}:{port}: {error.strerror}") from error
    sock.setblocking(False)
    return sock


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class _Queued:
    """A frame on its way out: what is left of it, and whom to tell when nothing is."""

    def __init__(self, views: Sequence[memoryview], sending: Sending, is_data: bool) -> None:
        self.views = deque(views)
        self.sending = sending
        self.is_data = is_data

    def advance(self, num_bytes: int) -> None:
        while num_bytes:
            first = self.views.popleft()
            if num_bytes < len(first):
                self.views.appendleft(first[num_bytes:])
                return
            num_bytes -= len(first)


class Connection:
    """One socket and what is under way on it. ``peer`` is None until its HELLO has come."""

    def __init__(self, sock: socket.socket, expected: int | None) -> None:
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.sock = sock
        self.expected = expected  # whom we dialled
        self.peer: int | None = None
        self.incarnation = 0
        self.reader = Reader()
        self.filling: Receiving | None = None
        self.out: deque[_Queued] = deque()
        self.held = False  # a head is here and nobody takes it: no reading until somebody does
        self.interest = READ  # what the selector watches
        self.wakes_at = 1  # bytes that must be there before it does
        self.deaf = False  # it takes nothing more, but what it has sent before may still be here
        self.dropped = False

    def wake_at(self, num_bytes: int) -> None:
        """The end of a connection does so at any time."""
        if num_bytes != self.wakes_at:
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, num_bytes)
            self.wakes_at = num_bytes

    def write(self) -> None:
        """As much as the kernel takes now, up to one turn."""
        budget = TURN_BYTES
        while self.out and budget > 0:
            queued = self.out[0]
            if queued.views:
                try:
                    num_bytes = self.sock.sendmsg(_up_to(queued.views, CHUNK_BYTES))
                except BlockingIOError:
                    return
                queued.advance(num_bytes)
                budget -= num_bytes
            if not queued.views:
                self.out.popleft()
                queued.sending.done = True


def _up_to(views: Iterable[memoryview], num_bytes: int) -> list[memoryview]:
    """The first views, of ``num_bytes`` together at most (and no more of them than one system call takes)."""
    batch: list[memoryview] = []
    for view in islice(views, 64):
        batch.append(view[:num_bytes])
        num_bytes -= len(batch[-1])
        if num_bytes == 0:
            break
    return batch


class TcpEndpoint(Endpoint):
    """Member ``member`` of a full mesh; ``addresses`` holds the listeners of all members, also its own.

    ``listener`` comes from ``listen`` and belongs to the endpoint from now on; copies of other members' listeners,
    inherited by a fork, should be closed by the caller. Every pair shares one connection, dialled by the lower id. A
    member that comes back (``rejoin``, with a higher ``incarnation``) dials all that are there. Returns when all are
    connected (rejoin: all that answer); DeadlineExceeded names those that did not come within ``deadline_s``.
    """

    def __init__(
        self,
        member: int,
        listener: socket.socket,
        addresses: Mapping[int, Address],
        deadline_s: float = DEADLINE_S,
        incarnation: int = 0,
        rejoin: bool = False,
    ) -> None:
        super().__init__(member, incarnation, deadline_s)
        self._members = frozenset(addresses) - {member}
        self._selector = selectors.DefaultSelector()
        self._connected: dict[int, Connection] = {}
        self._strangers: dict[Connection, None] = {}  # in order of arrival
        self._newest: dict[int, int] = {}  # incarnation of each member, also of those that are gone
        self._closed = False
        self._glanced = 0.0
        self._listener = listener
        _ENDPOINTS.add(self)
        listener.setblocking(False)
        self._selector.register(listener, READ, None)
        try:
            self._join(addresses, rejoin)
        except BaseException:
            self.close()
            raise

    def _join(self, addresses: Mapping[int, Address], rejoin: bool) -> None:
        until = time.monotonic() + self.deadline_s
        dialled = set(self._members) if rejoin else {p for p in self._members if p > self.member}
        absent = {peer for peer in sorted(dialled) if not self._dial(peer, addresses[peer], until, patient=not rejoin)}
        expected = dialled - absent if rejoin else self._members
        while missing := sorted(expected - self._connected.keys()):
            left = until - time.monotonic()
            if left <= 0:
                raise DeadlineExceeded(
                    f"member {self.member}: no connection with member {', '.join(map(str, missing))} "
                    f"within {self.deadline_s:g} s",
                    tuple(missing),
                )
            self._progress(left)
        self._events.clear()

    def _dial(self, peer: int, address: Address, until: float, patient: bool) -> bool:
        """Connect. A refusal means that nobody listens yet (``patient``: try again), or no more."""
        while True:
            try:
                sock = socket.create_connection(address, timeout=max(0.001, until - time.monotonic()))
            except OSError as error:
                if not patient:
                    return False
                if time.monotonic() + 0.05 > until:
                    raise DeadlineExceeded(
                        f"member {self.member} cannot reach member {peer} at {address[0]}:{address[1]}: {error}",
                        (peer,),
                    ) from error
                time.sleep(0.05)
            else:
                self._welcome(sock, expected=peer)
                return True

    def _welcome(self, sock: socket.socket, expected: int | None) -> None:
        """A new connection: both sides say hello at once."""
        if len(self._strangers) == MAX_STRANGERS:
            self._drop(next(iter(self._strangers)), "too many connections that do not say who they are")
        connection = Connection(sock, expected)
        self._strangers[connection] = None
        self._selector.register(sock, READ, connection)
        self._queue(connection, self._control(Kind.HELLO), ())

    # Sending

    @property
    def peers(self) -> tuple[int, ...]:
        return tuple(sorted(self._connected))

    def _connection(self, peer: int) -> Connection:
        if peer not in self._connected:
            reason = self._lost[peer].reason if peer in self._lost else "it never was"
            raise PeerLost(f"member {peer} is not connected to member {self.member} ({reason})", (peer,))
        return self._connected[peer]

    def _num_queued(self, peer: int) -> int:
        return len(self._connection(peer).out)

    def _send(self, peer: int, head: Head, payload: Sequence[memoryview]) -> Sending:
        return self._queue(self._connection(peer), head, payload)

    def _queue(self, connection: Connection, head: Head, payload: Sequence[memoryview]) -> Sending:
        sending = Sending(-1 if connection.peer is None else connection.peer)
        is_data = head.kind is Kind.DATA
        if connection.deaf and not is_data:
            return sending
        connection.out.append(_Queued([memoryview(wire.encode_head(head)), *payload], sending, is_data))
        if len(connection.out) == 1:  # most frames fit into the kernel's buffer: no need to ask the selector
            with self._serving(connection):
                self._write(connection)
        return sending

    # Moving bytes

    def _progress(self, timeout_s: float) -> None:
        glance = time.monotonic() - self._glanced > min(GLANCE_S, self.deadline_s / 8)
        if glance:
            self._glanced = time.monotonic()
        for connection in [c for c in self._connected.values() if c.held or (glance and c.wakes_at > 1)]:
            with self._serving(connection):
                self._read(connection)
            if not connection.held:
                timeout_s = 0.0
        for key, mask in self._selector.select(max(0.0, timeout_s)):
            connection = key.data
            if connection is None:
                with suppress(OSError):  # it may have gone again
                    self._welcome(self._listener.accept()[0], expected=None)
            elif not connection.dropped:
                with self._serving(connection):
                    if mask & WRITE:
                        self._write(connection)
                    if mask & READ:
                        self._read(connection)

    @contextmanager
    def _serving(self, connection: Connection) -> Iterator[None]:
        """What goes wrong with the connection ends the connection, not the caller."""
        try:
            yield
        except OSError as error:
            self._drop(connection, error.strerror or str(error))
        finally:
            if not connection.dropped:
                self._update_interest(connection)

    def _update_interest(self, connection: Connection) -> None:
        events = (0 if connection.held else READ) | (WRITE if connection.out else 0)
        if events == connection.interest:
            return
        if not events:
            self._selector.unregister(connection.sock)
        elif not connection.interest:
            self._selector.register(connection.sock, events, connection)
        else:
            self._selector.modify(connection.sock, events, connection)
        connection.interest = events

    def _drop(self, connection: Connection, reason: str, left: bool = False, error: CommError | None = None) -> None:
        if connection.dropped:
            return
        connection.dropped = True
        if connection.interest:
            self._selector.unregister(connection.sock)
        connection.sock.close()
        self._strangers.pop(connection, None)
        if connection.peer is not None:
            del self._connected[connection.peer]
            self._has_lost(Lost(connection.peer, connection.incarnation, reason, left, error))

    def _write(self, connection: Connection) -> None:
        try:
            connection.write()
        except OSError:
            if connection.peer is not None and not any(queued.is_data for queued in connection.out):
                connection.out.clear()  # signs of life, which nobody misses there
                connection.deaf = True
                return
            with suppress(OSError):  # a peer that closes says why before, and the kernel keeps what it said
                while not connection.dropped and self._read(connection):
                    pass
            raise

    def _read(self, connection: Connection) -> bool:
        """Up to the end of a frame (True), or of this connection's turn, or of what is there."""
        reader = connection.reader
        connection.held = False
        budget = TURN_BYTES
        while not connection.dropped:
            space = reader.space()
            if space is None:
                assert reader.head is not None
                if not reader.placed and not self._take_head(connection, reader.head):
                    connection.held = True
                    return False
                if reader.complete:
                    connection.wake_at(1)
                    if connection.filling is not None:
                        connection.filling.finish()
                        connection.filling = None
                    reader.reset()
                    return True
                continue
            if budget <= 0:
                connection.wake_at(1)  # the rest of the frame may be here, and be less than it would wake for
                return False
            try:
                num_bytes = connection.sock.recv_into(space[:CHUNK_BYTES])
            except BlockingIOError:
                connection.wake_at(min(len(space), AT_ONCE_BYTES) if reader.placed else 1)
                return False
            if not num_bytes:
                raise ConnectionResetError("connection closed" + (" within a frame" if reader.within_frame else ""))
            if connection.peer is not None:
                self._heard[connection.peer] = time.monotonic()
            budget -= num_bytes
            with garbage_is_a_broken_connection():
                reader.advance(num_bytes)
        return False

    def _take_head(self, connection: Connection, head: Head) -> bool:
        """Act on a head. False: a payload that nobody wants yet."""
        peer = connection.peer
        if head.kind is Kind.DATA and peer is not None and is_from(head, connection):
            receiving = self._receiving(peer, head)
            if receiving is None:
                return False
            connection.filling = receiving
            connection.reader.place(receiving.views, receiving.filled)
            return True
        if head.kind is Kind.DATA and peer is not None:
            raise ConnectionResetError(
                f"a frame of member {head.sender}, incarnation {head.incarnation}, came on the connection of member {peer}, "
                f"incarnation {connection.incarnation}"
            )
        if head.payload_bytes:
            raise ConnectionResetError(f"unexpected {head.kind.name} of {head.payload_bytes} bytes")
        connection.reader.place(())
        if peer is None:
            self._meet(connection, head)
        elif head.kind in (Kind.PING, Kind.PONG):
            self._answer(peer, head)
        elif head.kind is Kind.GOODBYE:
            with garbage_is_a_broken_connection():
                error = error_in(head)
            self._drop(connection, "it closed its link", left=True, error=error)
        else:
            raise ConnectionResetError(f"unexpected {head.kind.name}")
        return True

    def _receiving(self, peer: int, head: Head) -> Receiving | None:
        """Who takes this frame. What ``recv_any`` is refused to place ends the connection."""
        by_name = bool(self._posted.get(peer))
        try:
            return self._taker(peer, head)
        except CommError as refusal:
            if by_name or self._place_any is None:  # the error of the call under way
                raise
            raise ConnectionResetError(f"its frame was refused: {refusal}") from refusal

    def _meet(self, connection: Connection, hello: Head) -> None:
        """A stranger says who it is. An incarnation that is not newer than the last one seen is a ghost: refused."""
        peer = hello.sender
        if hello.kind is not Kind.HELLO or peer not in self._members or connection.expected not in (None, peer):
            raise ConnectionResetError(f"a stranger said {hello.kind.name} as member {peer}")
        if hello.incarnation <= self._newest.get(peer, -1):
            raise ConnectionResetError(f"member {peer} with old incarnation {hello.incarnation}")
        if peer in self._connected:
            self._drop(self._connected[peer], f"replaced by its incarnation {hello.incarnation}")
        del self._strangers[connection]
        connection.peer, connection.incarnation = peer, hello.incarnation
        self._newest[peer] = hello.incarnation
        self._connected[peer] = connection
        self._has_joined(peer, hello.incarnation)

    def _incarnation_of(self, peer: int) -> int:
        return self._connected[peer].incarnation

    def _is_ahead(self, peer: int) -> bool:
        return peer in self._connected and self._connected[peer].held

    def pace(self, bytes_per_s: float) -> None:
        for connection in self._connected.values():
            connection.sock.setsockopt(socket.SOL_SOCKET, SO_MAX_PACING_RATE, max(1, round(bytes_per_s)))

    def close(self, error: CommError | None = None) -> None:
        if self._closed:
            return
        self._closed = True
        goodbye = wire.encode_head(self._goodbye(error))
        for connection in self._connected.values():
            connection.out.append(_Queued([memoryview(goodbye)], Sending(-1), False))
        self._flush(set(self._connected.values()))
        for connection in (*self._connected.values(), *self._strangers):
            connection.sock.close()
        self._connected.clear()
        self._strangers.clear()
        self._selector.close()
        self._listener.close()

    def _flush(self, connections: set[Connection]) -> None:
        """Until the peers' kernels have all of it. What comes meanwhile is thrown away: a socket that is closed before it is read takes back what it
        has not delivered."""
        until = time.monotonic() + self.deadline_s
        quiet_since, left = time.monotonic(), -1
        waste = bytearray(CHUNK_BYTES)
        while connections and time.monotonic() < min(until, quiet_since + FLUSH_S):
            before, left = left, 0
            for connection in list(connections):
                try:
                    connection.write()
                    with suppress(BlockingIOError):
                        if not connection.sock.recv_into(waste):
                            raise ConnectionResetError
                    waiting = undelivered(connection.sock)
                except OSError:
                    connections.discard(connection)
                    continue
                if not connection.out and not waiting:
                    connections.discard(connection)
                left += waiting + sum(len(view) for queued in connection.out for view in queued.views)
            if connections:
                if left != before:
                    quiet_since = time.monotonic()
                time.sleep(LOOK_S)


def undelivered(sock: socket.socket) -> int:
    """Bytes that the kernel keeps until the peer's has them; 0 where it does not tell."""
    try:
        return int(struct.unpack("i", ioctl(sock, termios.TIOCOUTQ, b"\0" * 4))[0])
    except OSError:
        return 0


#: Of this process. A child of a fork (a DataLoader's worker) must not keep their connections open: it may outlive us, and
#: nobody would see that we are gone.
_ENDPOINTS: weakref.WeakSet[TcpEndpoint] = weakref.WeakSet()


def _let_go_of_what_is_the_parents() -> None:
    for endpoint in list(_ENDPOINTS):
        for connection in (*endpoint._connected.values(), *endpoint._strangers):
            connection.sock.close()
        endpoint._listener.close()
    _ENDPOINTS.clear()


os.register_at_fork(after_in_child=_let_go_of_what_is_the_parents)


def is_from(head: Head, connection: Connection) -> bool:
    return head.sender == connection.peer and head.incarnation == connection.incarnation


@contextmanager
def garbage_is_a_broken_connection() -> Iterator[None]:
    try:
        yield
    except CommError as error:
        raise ConnectionResetError(f"it sent garbage: {error}") from error
