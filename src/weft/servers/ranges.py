"""Which server holds which part of the parameters: ranges of equal bytes of all parameters laid end to end (Li et al., OSDI'14), so that
one large tensor lies on several servers. An optimizer that does not treat each number by itself is given whole tensors, balanced by bytes.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from weft.errors import ConfigError

LINE = 64  # bytes: no two servers' parts share a line of the cache


class Size(NamedTuple):
    """Of a tensor."""

    numel: int
    itemsize: int

    @property
    def nbytes(self) -> int:
        return self.numel * self.itemsize


class Piece(NamedTuple):
    """Numbers ``start`` to ``stop`` (not included) of a tensor, flat."""

    name: str
    start: int
    stop: int


def cut(sizes: Mapping[str, Size], servers: int) -> list[list[Piece]]:
    """Each server's pieces, in the tensors' order. ConfigError if one would have none."""
    total = sum(size.nbytes for size in sizes.values())
    bounds = [total * k // servers // LINE * LINE for k in range(servers)] + [total]
    result: list[list[Piece]] = [[] for _ in range(servers)]
    begin = 0
    for name, size in sizes.items():
        for server, (low, high) in enumerate(itertools.pairwise(bounds)):
            start = min(
                size.numel, max(0, -((begin - low) // size.itemsize))
            )  # the first number that begins at low or after it
            stop = min(size.numel, max(0, -((begin - high) // size.itemsize)))
            if start < stop:
                result[server].append(Piece(name, start, stop))
        begin += size.nbytes
    return _checked(result, f"{total} bytes of parameters in parts of {LINE} bytes or more")


def whole(sizes: Mapping[str, Size], servers: int) -> list[list[Piece]]:
    """The same without cutting a tensor: the largest first, each to the server that has least (Graham 1969: at most 4/3 of the best)."""
    held = [0] * servers
    owner: dict[str, int] = {}
    for name in sorted(sizes, key=lambda name: -sizes[name].nbytes):
        owner[name] = held.index(min(held))
        held[owner[name]] += sizes[name].nbytes or 1
    result = [[Piece(n, 0, sizes[n].numel) for n in sizes if owner[n] == server] for server in range(servers)]
    return _checked(result, f"{len(sizes)} parameters, which this optimizer needs whole,")


def _checked(pieces: list[list[Piece]], what: str) -> list[list[Piece]]:
    filled = sum(bool(each) for each in pieces)
    if filled < len(pieces):
        raise ConfigError(f"servers={len(pieces)} cannot share {what}: use servers={max(1, filled)} or fewer.")
    return pieces


def nbytes(pieces: Sequence[Piece], sizes: Mapping[str, Size]) -> int:
    return sum((piece.stop - piece.start) * sizes[piece.name].itemsize for piece in pieces)
