"""Whole messages over a stream socket between our own processes: 4 length bytes, then msgpack. A peer that sends anything
else, or more than ``limit`` bytes at once, counts as gone."""

from __future__ import annotations

import select
import socket
import struct
from typing import Any

import msgspec

_LENGTH = struct.Struct("<I")
LIMIT = 256 << 20  # a pickled task may be large; nothing else comes near


class Closed(Exception):
    """The other side is gone."""


class Pipe:
    def __init__(self, sock: socket.socket, limit: int = LIMIT) -> None:
        self.sock, self.limit = sock, limit
        self._buffer = bytearray()
        self._encode = msgspec.msgpack.Encoder(enc_hook=str).encode
        self._decode = msgspec.msgpack.Decoder().decode

    def fileno(self) -> int:
        return self.sock.fileno()

    def send(self, message: Any) -> None:
        data = self._encode(message)
        try:
            self.sock.sendall(_LENGTH.pack(len(data)) + data)
        except OSError as error:
            raise Closed from error

    def read(self) -> list[Any]:
        """Messages that are complete; takes what has arrived, waits for at least some bytes."""
        try:
            data = self.sock.recv(1 << 20)
        except BlockingIOError:
            return []
        except OSError as error:
            raise Closed from error
        if not data:
            raise Closed
        self._buffer += data
        messages = []
        while len(self._buffer) >= 4:
            (length,) = _LENGTH.unpack_from(self._buffer)
            if length > self.limit:
                raise Closed(f"a message of {length} bytes is no message of ours")
            if len(self._buffer) < 4 + length:
                break
            try:
                messages.append(self._decode(bytes(self._buffer[4 : 4 + length])))
            except msgspec.DecodeError as error:
                raise Closed(f"it sent garbage: {error}") from error
            del self._buffer[: 4 + length]
        return messages

    def ready(self, timeout_s: float) -> bool:
        return bool(select.select([self.sock], [], [], timeout_s)[0])

    def drain(self) -> list[Any]:
        """All messages already here, without waiting; also those before an end of the stream."""
        messages: list[Any] = []
        try:
            while self.ready(0):
                messages += self.read()
        except Closed:
            pass
        return messages

    def close(self) -> None:
        self.sock.close()
