"""Mutated frames, drawn by key: what a broken, old or hostile peer may send. The same key gives the same bytes."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

import msgspec

from weft.comm import wire
from weft.comm.wire import HEADER_BYTES, Head, Kind, Meta

SHAPES = (
    (),
    (0,),
    (3,),
    (7, 2),
    (1000,),
    (-1,),
    (-1, 0),
    (0, 3),
    (1, 3),
    (-1, 3),
    (2**62, 3),
    (2**40, 2**40),
    (2**63 - 1, 0),
    (2**70,),
    (5,) * 60,
)
DTYPES = ("float32", "float64", "bool", "complex128", "", "nonsense", "float32" * 100)
NUMBERS = (0, 1, 2, 255, 2**16, 2**31 - 1, 2**31, 2**32 - 1)
LENGTHS = (0, 1, 2**20, 2**20 + 1, 2**32, 2**36, 2**36 + 1, 2**63, 2**64 - 1)


def frame(
    dice: random.Random,
    kind: Kind = Kind.DATA,
    sender: int = 1,
    incarnation: int = 0,
    seq: int = 1,
    meta: Meta | None = None,
) -> bytes:
    """A whole frame; without ``meta`` one that describes a payload, rightly or not."""
    if meta is None:
        shapes = tuple(dice.choice(SHAPES[:5]) for _ in range(dice.randrange(3)))
        meta = Meta(dice.choice(("all_reduce sum", "all_gather", "", "x" * 50)), shapes, ("float32",) * len(shapes))
    payload = dice.randbytes(dice.choice((0, 1, 12, 40, 4000)) if kind is Kind.DATA else 0)
    return wire.encode_head(Head(kind, sender, incarnation, seq, meta.encode(), len(payload))) + payload


def _flip(dice: random.Random, data: bytearray) -> None:
    for _ in range(dice.choice((1, 1, 2, 8, 64))):
        data[dice.randrange(len(data))] ^= 1 << dice.randrange(8)


def _flip_in_header(dice: random.Random, data: bytearray) -> None:
    data[dice.randrange(min(HEADER_BYTES, len(data)))] ^= 1 << dice.randrange(8)


def _cut(dice: random.Random, data: bytearray) -> None:
    del data[dice.randrange(len(data)) :]


def _splice(dice: random.Random, data: bytearray) -> None:
    other = frame(dice, sender=dice.randrange(3), seq=dice.randrange(5))
    at = dice.randrange(len(data))
    data[at:] = other[dice.randrange(len(other)) :]


def _lengths(dice: random.Random, data: bytearray) -> None:
    """A promise of much more, or less, than comes."""
    if dice.randrange(2):
        data[16:20] = (dice.choice(LENGTHS) % 2**32).to_bytes(4, "big")
    else:
        data[28:36] = dice.choice(LENGTHS).to_bytes(8, "big")


def _version(dice: random.Random, data: bytearray) -> None:
    data[4] = dice.randrange(256)


def _kind(dice: random.Random, data: bytearray) -> None:
    data[5] = dice.randrange(256)


def _who(dice: random.Random, data: bytearray) -> None:
    """Another sender, or an epoch (incarnation) that is over or has not begun."""
    at = dice.choice((8, 12))
    data[at : at + 4] = dice.choice(NUMBERS).to_bytes(4, "big")


def _call_number(dice: random.Random, data: bytearray) -> None:
    data[20:28] = dice.choice(LENGTHS).to_bytes(8, "big")


def _meta(dice: random.Random, data: bytearray) -> None:
    """Shapes and dtypes that do not fit the payload, each other, or anything; or no metadata of ours at all."""
    count = dice.choice((0, 1, 2, 30))
    lies = [
        dice.choice(("all_reduce sum", "all_gather", "broadcast from 0", "")),
        [dice.choice(SHAPES[:-2] if dice.randrange(8) else SHAPES[:5]) for _ in range(count)],
        [dice.choice(DTYPES) for _ in range(dice.choice((count, 0, 3)))],
        "",
    ]
    other = dice.choice(([lies], [1, 2], {"op": 1}, lies[:2], [*lies, 5], None, "x", [b"\xff", [], [], ""]))
    encoded = msgspec.msgpack.encode(other if dice.randrange(3) == 0 else lies)
    data[HEADER_BYTES:] = encoded
    data[16:20] = len(encoded).to_bytes(4, "big")
    payload = dice.choice((0, 0, 12, 4000))
    data[28:36] = payload.to_bytes(8, "big")
    data += bytes(payload)


def _garbage(dice: random.Random, data: bytearray) -> None:
    data[:] = dice.randbytes(dice.choice((1, 35, 36, 37, 400)))


def _twice(dice: random.Random, data: bytearray) -> None:
    data.extend(bytes(data))


MUTATIONS: tuple[Callable[[random.Random, bytearray], None], ...] = (
    _flip,
    _flip_in_header,
    _cut,
    _splice,
    _lengths,
    _version,
    _kind,
    _who,
    _call_number,
    _meta,
    _garbage,
    _twice,
)


def mutate(dice: random.Random, data: bytes) -> bytes:
    """One mutation, at times two."""
    changed = bytearray(data)
    for mutation in dice.sample(MUTATIONS, dice.choice((1, 1, 1, 2))):
        if len(changed) >= HEADER_BYTES or mutation is _garbage:
            mutation(dice, changed)
    return bytes(changed)


def streams(purpose: str, frames: int, most: int = 8) -> Iterator[tuple[random.Random, list[bytes]]]:
    """What so many mutated frames come in: a few to a connection."""
    left, number = frames, 0
    while left > 0:
        dice = random.Random(f"{purpose} {number}")
        count = min(left, dice.randint(1, most))
        yield dice, [mutate(dice, frame(dice, seq=k + 1)) for k in range(count)]
        left -= count
        number += 1
