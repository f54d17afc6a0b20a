"""What is written is read back; anything else is a CommError before memory is taken for it."""

from __future__ import annotations

import tracemalloc
from contextlib import suppress
from itertools import pairwise

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from weft.comm import wire
from weft.comm.wire import Head, Kind, Meta, Reader
from weft.errors import CommError

metas = st.builds(
    Meta,
    op=st.text(max_size=20),
    shapes=st.lists(st.lists(st.integers(0, 2**40), max_size=4).map(tuple), max_size=5).map(tuple),
    dtypes=st.lists(st.text(max_size=8), max_size=5).map(tuple),
    tag=st.text(max_size=50),
)
frames = st.tuples(
    st.sampled_from(Kind),
    st.integers(0, 2**32 - 1),
    st.integers(0, 2**32 - 1),
    st.integers(0, 2**64 - 1),
    metas,
    st.binary(max_size=200),
)


def encode(frame: tuple[Kind, int, int, int, Meta, bytes]) -> bytes:
    kind, sender, incarnation, seq, meta, payload = frame
    return wire.encode_head(Head(kind, sender, incarnation, seq, meta.encode(), len(payload))) + payload


def read_all(data: bytes, at_most: int, split: int = 1) -> tuple[list[tuple[Head, bytes]], Reader]:
    """Frames in ``data``, which comes in pieces of ``at_most`` bytes; payloads are placed in ``split`` views."""
    reader, out = Reader(), []
    memory = bytearray()
    while True:
        space = reader.space()
        if space is None:
            assert reader.head is not None
            if not reader.placed:
                num_bytes = reader.head.payload_bytes
                assert num_bytes <= 200, "a payload that nobody sent"
                memory = bytearray(num_bytes)
                cuts = sorted({0, num_bytes, *(num_bytes * k // split for k in range(split))})
                reader.place([memoryview(memory)[a:b] for a, b in pairwise(cuts)])
            if reader.complete:
                out.append((reader.head, bytes(memory)))
                reader.reset()
            continue
        piece = data[: min(at_most, len(space))]
        if not piece:
            return out, reader
        space[: len(piece)] = piece
        data = data[len(piece) :]
        reader.advance(len(piece))


@given(st.lists(frames, max_size=4), st.integers(1, 300), st.integers(1, 4))
def test_frames_are_read_as_written(sent: list, at_most: int, split: int) -> None:
    got, reader = read_all(b"".join(map(encode, sent)), at_most, split)
    assert not reader.within_frame
    assert len(got) == len(sent)
    for (head, payload), frame in zip(got, sent):
        assert (head.kind, head.sender, head.incarnation, head.seq, wire.decode_meta(head.meta), payload) == frame


@given(frames, st.data())
def test_a_cut_frame_is_never_complete(frame: tuple, data: st.DataObject) -> None:
    encoded = encode(frame)
    cut = data.draw(st.integers(1, len(encoded) - 1))
    got, reader = read_all(encoded[:cut], 64)
    assert got == []
    assert reader.within_frame


@given(st.binary(min_size=wire.HEADER_BYTES, max_size=300))
def test_garbage_is_refused(data: bytes) -> None:
    with pytest.raises(CommError):
        read_all(data, 64)


@given(frames, st.integers(0, wire.HEADER_BYTES - 1), st.integers(1, 255))
def test_a_broken_header_costs_no_memory(frame: tuple, position: int, flip: int) -> None:
    """It is refused, or it promises other lengths; memory is taken for metadata up to its limit only."""
    encoded = bytearray(encode(frame)[: wire.HEADER_BYTES])
    encoded[position] ^= flip
    reader = Reader()
    space = reader.space()
    assert space is not None
    space[:] = encoded
    tracemalloc.start()
    with suppress(CommError):
        reader.advance(len(encoded))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < wire.MAX_META + 100_000


@given(st.binary(max_size=100))
def test_metadata_that_is_none_is_refused(data: bytes) -> None:
    with suppress(CommError):
        assert isinstance(wire.decode_meta(data), Meta)


def header(magic: bytes = b"WEFT", version: int = 1, kind: int = 2, meta: int = 0, payload: int = 0) -> bytes:
    return wire._HEADER.pack(magic, version, kind, 0, 0, meta, 0, payload)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (header(magic=b"HTTP"), "HTTP"),
        (header(version=9), "version 9"),
        (header(kind=77), "kind of frame 77"),
        (header(meta=wire.MAX_META + 1), "refused"),
        (header(payload=wire.MAX_PAYLOAD + 1), "refused"),
    ],
)
def test_errors_say_what_came(data: bytes, says: str) -> None:
    with pytest.raises(CommError, match=says):
        wire.decode_header(data)


def test_metadata_of_unknown_form_is_refused() -> None:
    too_many = msgspec.msgpack.encode(["op", [], [], "tag", "more"])
    with pytest.raises(CommError, match="schema"):
        wire.decode_meta(too_many)
    with pytest.raises(CommError, match="at most"):
        Meta(tag="x" * wire.MAX_META).encode()
