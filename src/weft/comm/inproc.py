"""Endpoints of threads in one process, for notebooks, tests and debugging. A payload is copied twice."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

from weft.comm.endpoint import Endpoint, Lost, Sending, error_in
from weft.comm.link import DEADLINE_S
from weft.comm.wire import Head, Kind
from weft.errors import CommError, DeadlineExceeded, PeerLost

if TYPE_CHECKING:
    from collections.abc import Iterator


class Baton(Protocol):
    """Held by the one thread that computes: let go before waiting, taken again before going on."""

    def acquire(self, *, timeout: float = -1) -> bool: ...

    def release(self) -> None: ...


def inproc_endpoints(
    num_members: int, *, baton: Baton | None = None, deadline_s: float = DEADLINE_S
) -> list[InprocEndpoint]:
    """Endpoints 0 to num_members-1, all connected. Each is for one thread, which holds ``baton`` when it computes."""
    members = [InprocEndpoint(k, baton, deadline_s) for k in range(num_members)]
    for endpoint in members:
        endpoint._connect(members)
    return members


class InprocEndpoint(Endpoint):
    """Made by ``inproc_endpoints``."""

    def __init__(self, member: int, baton: Baton | None, deadline_s: float) -> None:
        super().__init__(member, deadline_s=deadline_s)
        self._baton = baton
        self._news = threading.Condition()
        self._has_news = False
        self._closed = False
        self._others: dict[int, InprocEndpoint] = {}
        self._inbox: dict[int, deque[tuple[Head, bytes]]] = {}

    def _connect(self, members: Sequence[InprocEndpoint]) -> None:
        self._others = {m.member: m for m in members if m is not self}
        self._inbox = {peer: deque() for peer in self._others}

    @property
    def peers(self) -> tuple[int, ...]:
        return tuple(p for p in sorted(self._others) if p not in self._lost)

    def _num_queued(self, peer: int) -> int:
        return len(self._other(peer)._inbox[self.member])

    def _other(self, peer: int) -> InprocEndpoint:
        other = self._others.get(peer)
        if other is None or peer in self._lost or self._closed:
            raise PeerLost(f"member {peer} is not connected to member {self.member}", (peer,))
        return other

    def _send(self, peer: int, head: Head, payload: Sequence[memoryview]) -> Sending:
        other = self._other(peer)
        other._inbox[self.member].append((head, b"".join(payload)))
        other._wake()
        sending = Sending(peer)
        sending.done = True
        return sending

    def _wake(self) -> None:
        with self._news:
            self._has_news = True
            self._news.notify()

    def _progress(self, timeout_s: float) -> None:
        with self._news:
            self._has_news = False
        delivered = [self._deliver(peer) for peer in self.peers]
        if any(delivered):
            return
        with self._baton_released(), self._news:
            self._news.wait_for(lambda: self._has_news, timeout_s)

    @contextmanager
    def _baton_released(self) -> Iterator[None]:
        if self._baton is None:
            yield
            return
        self._baton.release()
        try:
            yield
        finally:
            if not self._baton.acquire(timeout=self.deadline_s * (1 + len(self._others))):  # they compute one by one
                holder = getattr(self._baton, "holder", None)
                who = "another member" if holder is None else f"member {holder}"
                raise DeadlineExceeded(
                    f"{who} has computed for longer than all members' deadlines of {self.deadline_s:g} s together, and here "
                    "one computes at a time",
                    () if holder is None else (holder,),
                )

    def _deliver(self, peer: int) -> bool:
        """One frame of ``peer`` to whoever takes it; a frame that nobody takes stays where it is."""
        if not (inbox := self._inbox[peer]):
            return False
        head, payload = inbox[0]
        if head.kind is not Kind.DATA:
            inbox.popleft()
            self._heard[peer] = time.monotonic()
            if head.kind is Kind.GOODBYE:
                self._has_lost(Lost(peer, head.incarnation, "it closed its link", True, error_in(head)))
            else:
                self._answer(peer, head)
            return True
        by_name = bool(self._posted.get(peer))
        try:
            receiving = self._taker(peer, head)
        except CommError as refusal:
            if by_name or self._place_any is None:  # the error of the call under way
                raise
            inbox.clear()
            self._others[peer]._inbox[self.member].append((self._goodbye(refusal), b""))
            self._others[peer]._wake()
            self._has_lost(Lost(peer, head.incarnation, f"its frame was refused: {refusal}"))
            return True
        if receiving is None:
            return False
        inbox.popleft()
        self._heard[peer] = time.monotonic()
        self._others[peer]._wake()  # it may wait for room
        at = 0
        for index, view in enumerate(receiving.views):
            view[:] = payload[at : at + len(view)]
            at += len(view)
            if receiving.filled is not None:
                receiving.filled(index)
        receiving.finish()
        return True

    def close(self, error: CommError | None = None) -> None:
        if self._closed:
            return
        goodbye = self._goodbye(error)
        for peer in self.peers:
            self._send(peer, goodbye, ())
        self._closed = True
