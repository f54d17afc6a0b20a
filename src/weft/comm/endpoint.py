"""An Endpoint exchanges frames with peers that come and go: servers, peers in a graph, and the ring all live on it.

Nothing is queued behind the caller's back: a payload waits with its sender until the receiver says where it shall go
(``irecv``, or ``recv_any``), and sends and receives progress together inside any call that waits. Use an endpoint from
one thread.

Who is there. A peer that dies is seen at once as ``Lost``. A frozen one keeps its connection, and no kernel tells: it
gives no sign of life. Signs are given by the calls that wait, with no thread beside them: a thread's heartbeat would go
on while the member it speaks for is stuck. So a sign means that the member itself is being served, and none that it is
frozen or at work elsewhere; both count only by the deadline, for whoever waits for it. Who waits together with others
(``wait`` with ``watch``) gives them a sign every so often, unasked, for a question may be stuck behind a frame that is not
taken; its error names those that gave none. A server that waits for nobody in particular (``recv_any``) asks those that
have been quiet for a while (PING), and tells of the silent by a ``Silent`` event.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass

import msgspec
import numpy as np

from weft.comm import wire
from weft.comm.link import DEADLINE_S, late_error, name_ranks
from weft.comm.wire import Head, Kind, Meta
from weft.errors import CommError, DeadlineExceeded, Incompatible, PeerLost, from_wire, to_wire

Buffer = bytes | bytearray | memoryview
#: Where a payload shall go: views whose lengths add up to ``head.payload_bytes``. May raise to refuse the frame.
Place = Callable[[Head], Sequence[memoryview]]

MAX_QUEUED = 256  # frames on their way to one peer; isend waits when they are more


@dataclass(frozen=True)
class Arrival:
    peer: int
    head: Head
    payload: Sequence[memoryview]

    @property
    def meta(self) -> Meta:
        return wire.decode_meta(self.head.meta)


@dataclass(frozen=True)
class Joined:
    peer: int
    incarnation: int


@dataclass(frozen=True)
class Lost:
    """``reason``: how it ended; ``left``: the peer said goodbye; ``error``: why, if it said so."""

    peer: int
    incarnation: int
    reason: str
    left: bool = False
    error: CommError | None = None


@dataclass(frozen=True)
class Silent:
    """No sign of life for ``seconds``, the deadline or more, though it was asked. It is still a peer, and may come back."""

    peer: int
    incarnation: int
    seconds: float


Event = Arrival | Joined | Lost | Silent


class Sending:
    """``done``: the payload's memory may be used again."""

    def __init__(self, peer: int) -> None:
        self.peer = peer
        self.done = False


class Receiving:
    """``began``: when the frame was there (time.monotonic). ``filled(i)`` is called as soon as views[i] is full."""

    def __init__(self, peer: int, place: Place, filled: Callable[[int], None] | None = None) -> None:
        self.peer = peer
        self.filled = filled
        self.views: Sequence[memoryview] = ()
        self.began = 0.0
        self.done = False
        self._place = place

    def begin(self, head: Head) -> None:
        self.began = time.monotonic()
        self.views = self._place(head)
        expected = sum(len(v) for v in self.views)
        if expected != head.payload_bytes:
            raise CommError(
                f"member {self.peer} sent {head.payload_bytes} bytes where {expected} were expected", (self.peer,)
            )

    def finish(self) -> None:
        self.done = True


class _ReceivingAny(Receiving):
    """A frame that nobody expected by name: it becomes an event."""

    def __init__(self, peer: int, place: Place, events: deque[Event]) -> None:
        super().__init__(peer, place)
        self._events = events

    def begin(self, head: Head) -> None:
        super().begin(head)
        self._head = head if head.lent is None else head._replace(lent=None)  # which is given back when the views are

    def finish(self) -> None:
        super().finish()
        self._events.append(Arrival(self.peer, self._head, self.views))


def allocate(head: Head) -> Sequence[memoryview]:
    """Fresh memory. Not zeroed: the kernel gives pages as bytes arrive, not for what a header merely promises."""
    try:
        return [np.empty(head.payload_bytes, np.uint8).data]
    except MemoryError as error:
        raise CommError(f"no memory for the {head.payload_bytes:,} bytes that member {head.sender} promises") from error


class Endpoint(ABC):
    member: int
    incarnation: int
    deadline_s: float

    def __init__(self, member: int, incarnation: int = 0, deadline_s: float = DEADLINE_S) -> None:
        self.member = member
        self.incarnation = incarnation
        self.deadline_s = deadline_s
        self._events: deque[Event] = deque()
        self._posted: dict[int, deque[Receiving]] = {}
        self._lost: dict[int, Lost] = {}
        self._heard: dict[int, float] = {}  # when each peer last gave a sign of life
        #: Seconds without a sign of life after which a peer is told of as silent, where it is not the deadline.
        self.patience: dict[int, float] = {}
        self._asked: dict[int, float] = {}  # by recv_any: when those that have not answered yet were asked
        self._silent: set[int] = set()  # those told of
        self._silent_since: dict[int, float] = {}
        self._signed = 0.0  # when we last gave those that we wait with a sign of life
        self._look_again = 0.0
        self._place_any: Place | None = None
        self._interruption: CommError | None = None
        #: Hears of a frame that has come and that nobody takes; it may raise.
        self.on_unclaimed: Callable[[int, Head], None] | None = None

    # What a carrier brings

    @property
    @abstractmethod
    def peers(self) -> tuple[int, ...]:
        """Those present now, in order of their ids."""

    @abstractmethod
    def _send(self, peer: int, head: Head, payload: Sequence[memoryview]) -> Sending:
        """Queue a frame. PeerLost if the peer is not there."""

    @abstractmethod
    def _num_queued(self, peer: int) -> int:
        """Frames on their way to ``peer``."""

    @abstractmethod
    def _progress(self, timeout_s: float) -> None:
        """Move what can be moved, in all directions; wait for that at most ``timeout_s``."""

    @abstractmethod
    def close(self, error: CommError | None = None) -> None:
        """Say goodbye, and why, if with an error; release everything. Safe to call twice."""

    def memory(self, nbytes: int) -> memoryview:
        """Zeros to send from, for as long as this endpoint is there: in memory that peers map, if there is such and room in it, where a frame
        that begins with it is read (and not ``done`` before)."""
        return np.zeros(nbytes, np.uint8).data

    def pace(self, bytes_per_s: float) -> None:
        """Send no more than this to each peer present, from now on."""
        raise Incompatible(f"a {type(self).__name__} has no sockets whose pace could be set: use --link tcp.")

    # Messages

    def isend(self, peer: int, seq: int, meta: bytes, payload: Sequence[Buffer] = ()) -> Sending:
        """Start sending. The payload must not change until ``done``. ``meta`` comes from ``Meta.encode``.

        What goes to a peer that is lost is never done: ``wait`` says why.
        """
        if peer in self._lost:
            return Sending(peer)
        if self._num_queued(peer) >= MAX_QUEUED:
            self._wait_until(lambda: self._num_queued(peer) < MAX_QUEUED, peer)
        views = [v for v in (memoryview(p).cast("B") for p in payload) if len(v)]
        head = Head(Kind.DATA, self.member, self.incarnation, seq, meta, sum(len(v) for v in views))
        return self._send(peer, head, views)

    def irecv(self, peer: int, place: Place, filled: Callable[[int], None] | None = None) -> Receiving:
        """Expect the next frame of ``peer``. Its payload goes where ``place(head)`` says."""
        receiving = Receiving(peer, place, filled)
        self._posted.setdefault(peer, deque()).append(receiving)
        return receiving

    def send(
        self, peer: int, seq: int, meta: Meta, payload: Sequence[Buffer] = (), deadline_s: float | None = None
    ) -> None:
        """Send, and return when the payload's memory may be used again (not: when the peer has read it)."""
        until = time.monotonic() + (self.deadline_s if deadline_s is None else deadline_s)
        self.wait([self.isend(peer, seq, meta.encode(), payload)], until, doing=f"the sending of {meta}")

    def recv_any(self, deadline_s: float | None = None, place: Place = allocate) -> Event:
        """The next thing that happens: a frame from any peer, a peer that joined, was lost, or is silent.

        DeadlineExceeded if nothing does. ``place`` gives the memory for a payload (default: fresh memory); one that it
        refuses with a CommError, as the default does what there is no memory for, ends the connection that brought it.
        """
        until = time.monotonic() + (self.deadline_s if deadline_s is None else deadline_s)
        self._place_any = place
        try:
            while not self._events:
                if self._interruption is not None:
                    raise self._interruption
                left = until - time.monotonic()
                self._progress(max(0.0, min(left, self._look_every_s)))
                self._look_for_silent()
                if left <= 0 and not self._events:
                    raise DeadlineExceeded(f"member {self.member} heard nothing within its deadline")
            return self._events.popleft()
        finally:
            self._place_any = None

    def _ask_after_s(self, patience_s: float) -> float:
        """Of silence; and how long an answer may take."""
        return min(1.0, patience_s / 4)

    @property
    def _look_every_s(self) -> float:
        return self._ask_after_s(min([self.deadline_s, *self.patience.values()])) / 4

    def _look_for_silent(self) -> None:
        """What has come was read before: who has no sign of life there was asked in time, and did not answer."""
        now = time.monotonic()
        if now < self._look_again:  # a busy server has no time to look at all peers between any two frames
            return
        self._look_again = now + self._look_every_s
        for peer in self.peers:
            quiet_s, asked = now - self._heard.setdefault(peer, now), self._asked.get(peer)
            patience_s = self.patience.get(peer, self.deadline_s)
            answer_s = self._ask_after_s(patience_s)
            if quiet_s < answer_s:
                self._asked.pop(peer, None)
                self._silent.discard(peer)
            elif asked is None or asked < self._heard[peer]:
                self._asked[peer] = now
                self._send(peer, self._control(Kind.PING), ())
            elif quiet_s >= patience_s and now - asked >= answer_s and peer not in self._silent:
                self._silent.add(peer)
                self._silent_since[peer] = now
                self._events.append(Silent(peer, self._incarnation_of(peer), quiet_s))

    @property
    def silent(self) -> frozenset[int]:
        """Those told of as Silent of whom nothing has been heard since."""
        return frozenset(p for p in self._silent if self._heard.get(p, 0.0) <= self._silent_since.get(p, 0.0))

    def _incarnation_of(self, peer: int) -> int:
        return 0

    def _is_ahead(self, peer: int) -> bool:
        """A frame of it has come that nobody takes yet: what it sent later cannot be read."""
        return False

    def wait(
        self,
        handles: Iterable[Sending | Receiving],
        until: float,
        watch: Collection[int] = (),
        doing: object = "an exchange",
    ) -> None:
        """Until all are done, or ``until`` (time.monotonic) has come, or a peer that is needed is lost.

        ``watch``: members that wait together with us: their death matters even if no handle waits for them, and they are
        given signs of life. If the deadline passes, the error names the one that gave none, not the one that waits for it
        too. If it raises, receives that have not begun are withdrawn.
        """
        handles = list(handles)
        try:
            while pending := [h for h in handles if not h.done]:
                self._raise_if_lost({h.peer for h in pending}, watch, doing)
                if self._interruption is not None:
                    raise self._interruption
                now = time.monotonic()
                if now >= until:
                    raise self._late({h.peer for h in pending}, watch, until, doing)
                if watch and now - self._signed >= self._sign_every_s:
                    self._give_sign(watch)
                    self._signed = now
                self._progress(min(until, self._signed + self._sign_every_s if watch else until) - now)
        except BaseException:
            for posted in self._posted.values():  # they must not take what comes later
                for receiving in set(posted).intersection(handles):
                    posted.remove(receiving)
            raise

    def look(self, peers: Collection[int], doing: object) -> None:
        """Take in what has come, without waiting. Raises if one of ``peers`` is gone: who only sends would not hear of it, nor make room for it."""
        heard: list[float | None] | None = None
        while heard != (now := [self._heard.get(peer) for peer in sorted(peers)]):
            heard = now
            self._progress(0.0)
        self._raise_if_lost(peers, (), doing)

    def interrupt(self, error: CommError) -> None:
        """From another thread: the ``wait`` or ``recv_any`` under way, and any later one, raises it, within half a second."""
        self._interruption = error

    @property
    def _sign_every_s(self) -> float:
        """Four signs in the time after which a peer counts as silent: some may be late on a busy machine."""
        return min(0.5, self.deadline_s / 8)

    def _give_sign(self, watch: Collection[int]) -> None:
        for peer in set(watch).intersection(self.peers):
            if not self._num_queued(peer):  # or it is on its way, or stuck: one more does not help
                self._send(peer, self._control(Kind.PONG), ())

    def _raise_if_lost(self, needed: Collection[int], watch: Collection[int], doing: object) -> None:
        if not self._lost:
            return
        gone = [lost for peer, lost in sorted(self._lost.items()) if peer in watch or peer in needed]
        for lost in gone:
            if lost.error is not None:
                raise lost.error
        if dead := [lost for lost in gone if not lost.left]:
            ranks = tuple(lost.peer for lost in dead)
            raise PeerLost(f"{doing}: {ranks_are(ranks)} gone ({dead[0].reason})", ranks)
        if left := tuple(lost.peer for lost in gone if lost.peer in needed):
            raise PeerLost(f"{doing}: {ranks_are(left)} gone (it closed its link while it was needed)", left)

    def _late(self, needed: Collection[int], watch: Collection[int], until: float, doing: object) -> DeadlineExceeded:
        silent = {p for p in watch if p in self.peers and self._heard.get(p, 0.0) < until - 4 * self._sign_every_s}
        not_ahead = {p for p in silent if not self._is_ahead(p)}  # its signs wait behind a frame that we do not take
        ranks = tuple(sorted(not_ahead or silent or needed))
        if watch and not silent:
            return late_error(ranks, self.deadline_s, f"the end of {doing}", "there, but too slow to end")
        return late_error(ranks, self.deadline_s, doing)

    def _wait_until(self, ready: Callable[[], bool], peer: int) -> None:
        until = time.monotonic() + self.deadline_s
        while not ready():
            left = until - time.monotonic()
            if left <= 0:
                raise DeadlineExceeded(
                    f"member {peer} has not taken {MAX_QUEUED} frames within {self.deadline_s:g} s", (peer,)
                )
            self._progress(left)

    # For carriers

    def _control(self, kind: Kind, meta: bytes = b"") -> Head:
        return Head(kind, self.member, self.incarnation, 0, meta, 0)

    def _goodbye(self, error: CommError | None) -> Head:
        if error is None:
            return self._control(Kind.GOODBYE)
        short = type(error)(error.message[:10_000], error.ranks)  # a message may hold another member's traceback
        text = msgspec.json.encode(to_wire(short)).decode()
        return self._control(Kind.GOODBYE, Meta("goodbye", tag=text).encode())

    def _taker(self, peer: int, head: Head) -> Receiving | None:
        """Who takes this data frame; it has said where the payload goes. None: nobody wants it yet."""
        if posted := self._posted.get(peer):
            receiving = posted.popleft()
        elif self._place_any is not None:
            receiving = _ReceivingAny(peer, self._place_any, self._events)
        else:
            if self.on_unclaimed is not None:
                self.on_unclaimed(peer, head)
            return None
        receiving.begin(head)
        return receiving

    def _answer(self, peer: int, head: Head) -> None:
        """A sign of life was asked for, or came."""
        if head.kind is Kind.PING and self._num_queued(peer) < MAX_QUEUED:
            self._send(peer, self._control(Kind.PONG), ())

    def _has_joined(self, peer: int, incarnation: int) -> None:
        self._lost.pop(peer, None)
        self._heard[peer] = time.monotonic()
        self._events.append(Joined(peer, incarnation))

    def _has_lost(self, lost: Lost) -> None:
        self._lost[lost.peer] = lost
        self._asked.pop(lost.peer, None)
        self._silent.discard(lost.peer)
        self._events.append(lost)
        self._posted.pop(lost.peer, None)


def error_in(goodbye: Head) -> CommError | None:
    if not goodbye.meta:
        return None
    try:
        data = msgspec.json.decode(wire.decode_meta(goodbye.meta).tag)
        error = from_wire(data)
    except (msgspec.MsgspecError, KeyError, TypeError, AttributeError) as reason:
        raise CommError(f"a goodbye that cannot be read: {reason}") from reason
    return error if isinstance(error, CommError) else CommError(str(error))


def ranks_are(ranks: Sequence[int]) -> str:
    """ "rank 2 is", "ranks 1, 3 are"."""
    return f"{name_ranks(ranks)} {'is' if len(ranks) == 1 else 'are'}"
