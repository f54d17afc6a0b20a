"""Endpoints of one host: sockets as over TCP, but a payload that begins with memory from ``memory`` travels by reference.

The frame says where in the sender's heap it lies, and the receiver reads it there: in place, or straight to where it shall go. A sending is done
when the receiver has given it back; what a peer still had when it was lost is never done, for it may be read all the same (its process may
live, and what it has accepted must stay as it was). The map has no name and is gone with the last who has it: who dies leaves nothing behind.
"""

from __future__ import annotations

import itertools
import socket
import struct
import weakref
from collections import deque
from collections.abc import Mapping, Sequence

import numpy as np

from weft.comm.endpoint import Endpoint, Lost, Sending
from weft.comm.link import DEADLINE_S
from weft.comm.shm.region import LINE, TAKEN, Region, align
from weft.comm.tcp import Address, Connection, TcpEndpoint, is_from
from weft.comm.wire import MAX_PAYLOAD, Head, Kind
from weft.errors import CommError

LEAST_LENT = 64 << 10  # bytes: less is sooner copied than given back
_LOAN = struct.Struct("!QQQ")  # number, offset in the sender's heap, bytes
_NUMBER = struct.Struct("!Q")


class ShmEndpoint(TcpEndpoint):
    """``ranks``: whose heap of ``region`` (made before all were forked) is whose, by member."""

    def __init__(
        self,
        member: int,
        listener: socket.socket,
        addresses: Mapping[int, Address],
        region: Region,
        ranks: Mapping[int, int],
        deadline_s: float = DEADLINE_S,
        incarnation: int = 0,
        rejoin: bool = False,
    ) -> None:
        self._region, self._ranks = region, dict(ranks)
        self._heap = np.frombuffer(region.memory, np.uint8, region.nbytes_per_rank, region.heap(ranks[member]))
        self._begin = self._heap.ctypes.data
        self._numbers = itertools.count()
        self._lent: dict[tuple[int, int], Sending] = {}  # by peer and number, what it has not given back
        self._returns: deque[tuple[int, int, int]] = deque()  # peer, incarnation, number: to be given back
        self._borrowed: dict[Connection, Head] = {}  # of frames that nobody takes yet
        super().__init__(member, listener, addresses, deadline_s, incarnation, rejoin)

    def memory(self, nbytes: int) -> memoryview:
        word = self._region.control(self._ranks[self.member]) // 8 + TAKEN
        begin = self._region.words[word]  # one that comes back spares what it lent before
        if not nbytes or begin + nbytes > len(self._heap):
            return super().memory(nbytes)
        self._region.words[word] = begin + align(nbytes, LINE)
        return self._heap[begin : begin + nbytes].data

    def pace(self, bytes_per_s: float) -> None:
        Endpoint.pace(self, bytes_per_s)

    # Lending

    def _send(self, peer: int, head: Head, payload: Sequence[memoryview]) -> Sending:
        if self._returns:
            self._give_back()
        if head.kind is not Kind.DATA or not payload or len(payload[0]) < LEAST_LENT:
            return super()._send(peer, head, payload)
        offset = np.frombuffer(payload[0], np.uint8).ctypes.data - self._begin
        nbytes = len(payload[0])
        if not 0 <= offset <= len(self._heap) - nbytes:
            return super()._send(peer, head, payload)
        number, sending = next(self._numbers), Sending(peer)
        meta, rest = _LOAN.pack(number, offset, nbytes) + head.meta, head.payload_bytes - nbytes
        super()._send(peer, head._replace(kind=Kind.LENT, meta=meta, payload_bytes=rest), payload[1:])
        if peer in self._connected:
            self._lent[peer, number] = sending
        return sending

    def _give_back(self) -> None:
        while self._returns:
            peer, incarnation, number = self._returns.popleft()
            if peer in self._connected and self._connected[peer].incarnation == incarnation:
                super()._send(peer, self._control(Kind.RETURN, _NUMBER.pack(number)), ())

    def _progress(self, timeout_s: float) -> None:
        if self._returns:
            self._give_back()
        super()._progress(timeout_s)

    # Borrowing

    def _take_head(self, connection: Connection, head: Head) -> bool:
        peer = connection.peer
        if peer is not None and is_from(head, connection):
            if head.kind is Kind.LENT:
                return self._take_loan(peer, connection, head)
            if head.kind is Kind.RETURN and not head.payload_bytes and len(head.meta) == _NUMBER.size:
                if (sending := self._lent.pop((peer, *_NUMBER.unpack(head.meta)), None)) is None:
                    raise ConnectionResetError("it gave back what it does not have")
                sending.done = True
                connection.reader.place(())
                return True
        return super()._take_head(connection, head)

    def _take_loan(self, peer: int, connection: Connection, told: Head) -> bool:
        head = self._borrowed.pop(connection, None) or self._borrow(peer, connection.incarnation, told)
        receiving = self._receiving(peer, head)
        if receiving is None:
            self._borrowed[connection] = head
            return False
        connection.filling = receiving
        rest: list[memoryview] = []
        ends: list[int] = []
        lent = head.lent
        for index, view in enumerate(receiving.views):
            if lent is not None and view is lent:
                lent = None
                continue
            left = view
            if lent is not None:
                num_bytes = min(len(lent), len(view))
                np.copyto(np.frombuffer(view, np.uint8, num_bytes), np.frombuffer(lent, np.uint8, num_bytes))
                lent = lent[num_bytes:] if num_bytes < len(lent) else None
                left = view[num_bytes:]
            if len(left):
                rest.append(left)
                ends.append(index)
            elif receiving.filled is not None:
                receiving.filled(index)
        filled = receiving.filled
        connection.reader.place(rest, None if filled is None else lambda k: filled(ends[k]))
        return True

    def _borrow(self, peer: int, incarnation: int, told: Head) -> Head:
        """The head as its sender meant it. What is lent is given back when nothing refers to it any more."""
        if len(told.meta) < _LOAN.size:
            raise ConnectionResetError("it lent nothing")
        number, offset, nbytes = _LOAN.unpack_from(told.meta)
        if not 0 < nbytes <= MAX_PAYLOAD or offset + nbytes > self._region.nbytes_per_rank:
            raise ConnectionResetError(
                f"it lent bytes {offset} to {offset + nbytes} of a heap of {self._region.nbytes_per_rank}"
            )
        place = self._region.heap(self._ranks[peer]) + offset
        array = np.frombuffer(self._region.memory, np.uint8, nbytes, place)
        weakref.finalize(array, self._returns.append, (peer, incarnation, number)).atexit = False
        return Head(
            Kind.DATA,
            told.sender,
            told.incarnation,
            told.seq,
            told.meta[_LOAN.size :],
            told.payload_bytes + nbytes,
            array.data,
        )

    def _drop(self, connection: Connection, reason: str, left: bool = False, error: CommError | None = None) -> None:
        self._borrowed.pop(connection, None)
        super()._drop(connection, reason, left, error)

    def _has_lost(self, lost: Lost) -> None:
        self._lent = {key: sending for key, sending in self._lent.items() if key[0] != lost.peer}
        super()._has_lost(lost)

    def close(self, error: CommError | None = None) -> None:
        self._give_back()
        super().close(error)
