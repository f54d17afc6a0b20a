"""All-reduces that go on while the caller computes: one thread carries them out, one after the other, in the order given.

A Link is used from one thread at a time. From the first ``all_reduce`` of a step until ``join`` it belongs to the thread,
which lives no longer than that: between steps there is none, so none can outlive an error or the run. Starting it costs some
60 us. A carrier with queues of its own (NCCL's streams) would offer these three calls itself, without a thread.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from weft.comm.link import Link
from weft.spans import SECOND_THREAD

if TYPE_CHECKING:
    import torch


class Hidden(NamedTuple):
    """Of what the exchanges of a step took: the part that went on while the caller did something else."""

    busy_s: float
    wait_s: float


class Background:
    """Of one rank; all ranks give the same buffers in the same order. The buffers are the thread's until ``join``."""

    def __init__(self, link: Link) -> None:
        self.link = link
        self._queue: queue.SimpleQueue[Sequence[torch.Tensor] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._dropped = False
        self._carried_s = 0.0

    def all_reduce(self, buffers: Sequence[torch.Tensor]) -> None:
        """Queue a sum. What goes wrong with it is raised by ``join``."""
        if self._thread is None:
            traffic = self.link.traffic
            self._before = (traffic.busy_s, traffic.wait_s)
            self._carried_s = 0.0
            self._thread = threading.Thread(target=self._carry_out, name=SECOND_THREAD, daemon=True)
            self._thread.start()
        self._queue.put(buffers)

    def join(self) -> Hidden:
        """Wait until all that was queued is done; the link is the caller's again. Raises what the first failed one raised."""
        begin = time.monotonic()
        if not self._end():
            return Hidden(0.0, 0.0)
        if self._error is not None:
            raise self._error
        stood_s, traffic = time.monotonic() - begin, self.link.traffic
        share = max(0.0, 1 - stood_s / self._carried_s) if self._carried_s else 0.0
        return Hidden(share * (traffic.busy_s - self._before[0]), share * (traffic.wait_s - self._before[1]))

    def close(self) -> None:
        """After an error of the caller: drop what has not begun, and wait for what has, at most until its deadline."""
        self._dropped = True
        self._end()

    def _end(self) -> bool:
        """False if nothing was begun."""
        if self._thread is None:
            return False
        self._queue.put(None)
        self._thread.join()  # each call of the link has a deadline, and after one that fails no other is begun
        self._thread = None
        return True

    def _carry_out(self) -> None:
        while (buffers := self._queue.get()) is not None:
            if self._error is not None or self._dropped:
                continue
            begin = time.monotonic()
            try:
                self.link.all_reduce(buffers)
            except BaseException as error:  # handed over to the caller's thread
                self._error = error
            self._carried_s += time.monotonic() - begin
