"""Memory to send from, in buffers of one size, each written to again when nobody reads it any more."""

from __future__ import annotations

from typing import Any

import numpy as np

from weft.comm.endpoint import Endpoint, Sending

Bytes = np.ndarray[Any, np.dtype[np.uint8]]


class Buffers:
    """As many as are in use at once. What a peer had when it was lost is never used again: it may still read it."""

    def __init__(self, endpoint: Endpoint, nbytes: int) -> None:
        self._endpoint, self._nbytes = endpoint, nbytes
        self._left: list[Bytes] = []
        self._sendings: dict[int, list[Sending]] = {}  # by id of the buffer, which lives as long as there are any

    def take(self) -> Bytes:
        """One to write to: of zeros, or with what was in it."""
        for k, buffer in enumerate(self._left):
            if not self.is_read(buffer):
                return self._left.pop(k)
        return np.frombuffer(self._endpoint.memory(self._nbytes), np.uint8)

    def leave(self, buffer: Bytes) -> None:
        """It may be taken again, once nobody reads it."""
        self._left.append(buffer)

    def sent(self, buffer: Bytes, sending: Sending) -> None:
        if not sending.done:
            self._sendings.setdefault(id(buffer), []).append(sending)

    def is_read(self, buffer: Bytes) -> bool:
        sendings = [s for s in self._sendings.pop(id(buffer), ()) if not s.done]
        if sendings:
            self._sendings[id(buffer)] = sendings
        return bool(sendings)
