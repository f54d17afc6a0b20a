"""One direction between two members: messages that leave while their sender goes on, and arrive while their receiver does something else.

A thread at each end carries them, one after the other, over a link of these two that nobody else uses. A message is some tensors and a tag
(plain data), by which its receiver asks for it: what comes before it is asked for is kept. That is bounded by what was announced (``expect``).

The link's own calls have no deadline to speak of, for what is announced may come at the end of a long step. Who needs a message, or wants what
was sent to be away, has one: ``deadline_s`` from then on, or from the last message. Sent is what need not be kept any more: the carrier has it,
and the receiver, perhaps, not yet.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import msgspec
import torch

from weft.comm.link import Link, late_error
from weft.errors import CommError
from weft.spans import SECOND_THREAD

ALIGN = 64
MAX_QUEUED = 1024  # messages that wait to be sent
JOIN_S = 1.0  # for threads to end: what waits is interrupted within half a second

Tag = Hashable
Message = Sequence[torch.Tensor]


class Channel:
    """``sends``: this member's end; ``peer``: who is at the other. Errors of the thread are raised by the next call of its owner."""

    def __init__(self, link: Link, sends: bool, peer: int, deadline_s: float) -> None:
        self.link, self.sends, self.peer, self.deadline_s = link, sends, peer, deadline_s
        self.waited_s = 0.0  # of the owner, in ``take`` and ``flush``
        self._queue: queue.Queue[tuple[Tag, Message] | int | None] = queue.Queue(MAX_QUEUED)
        self._arrived: dict[Tag, Message] = {}
        self._change = threading.Condition()
        self._under_way = 0  # sent or announced, and not yet done
        self._error: BaseException | None = None
        self._why: CommError | None = None
        self.on_error: Callable[[BaseException], None] | None = None  # hears of one of the thread's, in it
        self._thread: threading.Thread | None = None

    def send(self, tag: Tag, message: Message) -> None:
        """Queue it. Its tensors must not be written to before ``flush``."""
        self._begin((tag, message), 1)

    def expect(self, number: int) -> None:
        """So many more messages will come."""
        self._begin(number, number)

    def take(self, tag: Tag) -> Message:
        """The message of that tag, which was announced."""
        found: Message = self._wait(lambda: self._arrived.pop(tag, None), f"send {tag}")
        return found

    def flush(self) -> None:
        """Wait until all that was queued is sent."""
        self._wait(lambda: True if not self._under_way else None, "take what was sent")

    def fail(self, error: BaseException) -> None:
        """Something is wrong elsewhere: who waits here, or comes to, raises it."""
        with self._change:
            self._error = self._error or error
            self._change.notify_all()

    def stop(self, why: CommError) -> None:
        """What has not been sent or has not come is dropped; a peer that waits for us raises ``why``."""
        self.fail(CommError("this channel is closed"))
        self._why = why if self._under_way else None
        self.link.interrupt(why)

    def join(self, until: float) -> None:
        """Wait, at most until then (time.monotonic), for the thread to end: before, the link is its own."""
        if self._thread is not None:
            with contextlib.suppress(queue.Full):
                self._queue.put(None, timeout=max(0.0, until - time.monotonic()))
            self._thread.join(max(0.0, until - time.monotonic()))
            if self._why is not None and not self._thread.is_alive():
                self.link.fail(self._why)

    def _begin(self, work: Any, number: int) -> None:
        self._check()
        with self._change:
            self._under_way += number
        if self._thread is None:
            self._thread = threading.Thread(target=self._carry, name=SECOND_THREAD, daemon=True)
            self._thread.start()
        try:
            self._queue.put(work, timeout=self.deadline_s)
        except queue.Full:
            raise late_error([self.peer], self.deadline_s, "take what was sent") from None

    def _wait(self, ready: Any, what: str) -> Any:
        begin = since = time.monotonic()  # since: when the last message was done
        with self._change:
            under_way = self._under_way
            while (found := ready()) is None:
                self._check()
                if self._under_way != under_way:
                    under_way, since = self._under_way, time.monotonic()
                left = self.deadline_s - (time.monotonic() - since)
                if left <= 0:
                    raise late_error([self.peer], self.deadline_s, what)
                self._change.wait(left)
        self._check()
        self.waited_s += time.monotonic() - begin
        return found

    def _check(self) -> None:
        if self._error is not None:
            raise self._error

    def _carry(self) -> None:
        while (work := self._queue.get()) is not None:
            for _ in range(work if isinstance(work, int) else 1):
                self._carry_one(work)

    def _carry_one(self, work: tuple[Tag, Message] | int) -> None:
        if self._error is not None:
            return
        try:
            arrived = self._exchange(work)
        except BaseException as error:  # handed over to the owner's thread
            arrived, self._error = None, error
        with self._change:
            self._under_way -= 1
            if arrived is not None:
                self._arrived[arrived[0]] = arrived[1]
            self._change.notify_all()
        if self._error is not None and self.on_error is not None:
            self.on_error(self._error)

    def _exchange(self, work: tuple[Tag, Message] | int) -> tuple[Tag, Message] | None:
        if isinstance(work, int):
            return unpacked(self.link.receive())
        self.link.send(packed(*work))
        return None


def fail_together(channels: Sequence[Channel]) -> None:
    """Of one owner, who waits at one of them, and would not see for long what is wrong with another."""

    def tell(error: BaseException) -> None:
        for channel in channels:
            channel.fail(error)

    for channel in channels:
        channel.on_error = tell


def close_all(channels: Sequence[Channel], why: CommError) -> None:
    """``why``: what peers that still wait are told. At most JOIN_S."""
    for channel in channels:
        channel.stop(why)
    until = time.monotonic() + JOIN_S
    for channel in channels:
        channel.join(until)


def packed(tag: Tag, message: Message) -> torch.Tensor:
    """Length of the head, head, then each tensor, at multiples of ALIGN bytes."""
    kinds = [(str(t.dtype).removeprefix("torch."), list(t.shape)) for t in message]
    head = msgspec.msgpack.encode((tag, kinds))
    pieces = [torch.tensor([len(head)]).view(torch.uint8), torch.frombuffer(bytearray(head), dtype=torch.uint8)]
    pieces += [t.detach().contiguous().reshape(-1).view(torch.uint8) for t in message]
    ends, at = [], 0
    for piece in pieces:
        ends.append(at + len(piece))
        at = aligned(at + len(piece))
    flat = torch.empty(at, dtype=torch.uint8)
    for piece, end in zip(pieces, ends, strict=True):
        flat[end - len(piece) : end] = piece
    return flat


def unpacked(flat: torch.Tensor) -> tuple[Tag, Message]:
    """Views of ``flat``."""
    length = int(flat[:8].view(torch.int64).item())
    at = aligned(8)
    tag, kinds = msgspec.msgpack.decode(flat[at : at + length].numpy().tobytes())
    at = aligned(at + length)
    message = []
    for name, shape in kinds:
        dtype = getattr(torch, name)
        nbytes = dtype.itemsize * torch.Size(shape).numel()
        message.append(flat[at : at + nbytes].view(dtype).view(shape))
        at = aligned(at + nbytes)
    return tuple(tag) if isinstance(tag, list) else tag, message


def aligned(at: int) -> int:
    return -(-at // ALIGN) * ALIGN
