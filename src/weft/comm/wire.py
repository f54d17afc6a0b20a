"""Frames on the wire: a fixed header, metadata of a known schema (msgpack), raw bytes. No pickle.

Lengths are checked before any memory is taken for them, so that a hostile or broken peer costs an error, not memory.
Overhead: 36 bytes a frame and the metadata.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from enum import IntEnum
from typing import NamedTuple

import msgspec

from weft.errors import CommError

MAGIC = b"WEFT"
VERSION = 1
MAX_META = 1 << 20
MAX_PAYLOAD = 1 << 36

# magic, version, kind, (2 bytes pad), sender, incarnation, meta length, sequence number, payload length
_HEADER = struct.Struct("!4sBBxxIIIQQ")
HEADER_BYTES = _HEADER.size


class Kind(IntEnum):
    HELLO = 1  # first on every connection: who I am
    DATA = 2
    PING = 3  # "are you there?", answered by PONG
    PONG = 4  # a sign of life, asked for or not
    GOODBYE = 5  # last on every connection; its metadata may carry the error that made the sender leave
    LENT = 6  # DATA whose payload begins in memory that both map: its metadata begins with where
    RETURN = 7  # what was lent is not read any more


class Meta(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """What a frame is about. ``tag`` is free text of the caller; ``shapes`` and ``dtypes`` describe the payload."""

    op: str = ""
    shapes: tuple[tuple[int, ...], ...] = ()
    dtypes: tuple[str, ...] = ()
    tag: str = ""

    def encode(self) -> bytes:
        data = _meta_encoder.encode(self)
        if len(data) > MAX_META:
            raise CommError(
                f"the metadata of {self.op!r} takes {len(data)} bytes, at most {MAX_META} can be sent: "
                "pass fewer tensors in one call, or one flat tensor"
            )
        return data

    def __str__(self) -> str:
        tensors = ", ".join(f"{d}{list(s)}" for s, d in zip(self.shapes[:4], self.dtypes, strict=False))
        more = f", ... {len(self.shapes)} tensors" if len(self.shapes) > 4 else ""
        return f"{self.op}({tensors}{more})"


_meta_encoder = msgspec.msgpack.Encoder()
_meta_decoder = msgspec.msgpack.Decoder(Meta)


def decode_meta(data: bytes) -> Meta:
    try:
        return _meta_decoder.decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise CommError(f"metadata that does not fit the schema: {error}") from error


class Head(NamedTuple):
    """A frame but for its payload. ``meta`` is left encoded: equal calls have equal bytes. ``lent``: the payload's beginning, where the
    sender has it; who places this very view as the first reads it there, and gives it back by letting go of all that was made of it."""

    kind: Kind
    sender: int
    incarnation: int
    seq: int
    meta: bytes
    payload_bytes: int
    lent: memoryview | None = None


def encode_head(head: Head) -> bytes:
    return (
        _HEADER.pack(
            MAGIC, VERSION, head.kind, head.sender, head.incarnation, len(head.meta), head.seq, head.payload_bytes
        )
        + head.meta
    )


def decode_header(data: bytes | bytearray | memoryview) -> tuple[Head, int]:
    """(head without metadata, length of the metadata)."""
    magic, version, kind, sender, incarnation, meta_bytes, seq, payload_bytes = _HEADER.unpack(data)
    if magic != MAGIC:
        raise CommError(f"not a Weft frame: it begins with {bytes(magic)!r}, not {MAGIC!r}")
    if version != VERSION:
        raise CommError(f"wire version {version}, this side speaks {VERSION}: install the same weft on all members")
    if kind not in Kind._value2member_map_:
        raise CommError(f"unknown kind of frame {kind}, possible: {', '.join(k.name for k in Kind)}")
    if meta_bytes > MAX_META or payload_bytes > MAX_PAYLOAD:
        raise CommError(
            f"a frame of {meta_bytes} + {payload_bytes} bytes is refused, limits are {MAX_META} + {MAX_PAYLOAD}"
        )
    return Head(Kind(kind), sender, incarnation, seq, b"", payload_bytes), meta_bytes


class Reader:
    """Turns a stream of bytes into frames. It says where the next bytes go, so that payloads land in place.

    while (space := reader.space()) is not None:      # None: a head is complete, where shall the payload go?
        reader.advance(sock.recv_into(space))
    reader.place(views, filled)                       # filled(i) is called when views[i] is full
    ... until reader.complete; then reader.reset()
    """

    def __init__(self) -> None:
        self._header = bytearray(HEADER_BYTES)
        self.reset()

    def reset(self) -> None:
        """Be ready for the next frame."""
        self.head: Head | None = None
        self.placed = False
        self.complete = False
        self._partial: Head | None = None
        self._meta = bytearray()
        self._space: memoryview | None = memoryview(self._header)
        self._views: Sequence[memoryview] = ()
        self._filled: Callable[[int], None] | None = None
        self._index = 0

    @property
    def within_frame(self) -> bool:
        return self._partial is not None or self._space is None or len(self._space) < HEADER_BYTES

    def space(self) -> memoryview | None:
        return self._space

    def advance(self, num_bytes: int) -> None:
        assert self._space is not None
        self._space = self._space[num_bytes:]
        if not len(self._space):
            self._region_full()

    def _region_full(self) -> None:
        if self.placed:
            if self._filled is not None:
                self._filled(self._index)
            self._next_view(self._index + 1)
            return
        if self._partial is None:
            self._partial, meta_bytes = decode_header(self._header)
            self._meta = bytearray(meta_bytes)
            self._space = memoryview(self._meta)
            if meta_bytes:
                return
        self.head = self._partial._replace(meta=bytes(self._meta))
        self._space = None

    def place(self, views: Sequence[memoryview], filled: Callable[[int], None] | None = None) -> None:
        """Memory for the payload. The same memory may come several times: ``filled`` empties it in between."""
        assert self.head is not None
        assert sum(len(v) for v in views) == self.head.payload_bytes
        self._views, self._filled, self.placed = views, filled, True
        self._next_view(0)

    def _next_view(self, index: int) -> None:
        while index < len(self._views) and not len(self._views[index]):
            if self._filled is not None:
                self._filled(index)
            index += 1
        self._index = index
        self.complete = index == len(self._views)
        self._space = None if self.complete else self._views[index]
