"""Who sends what to whom in an all-reduce, step by step: the algorithms as their papers draw them, with no socket in sight.

A schedule is what one rank does. It depends on sizes and ranks only, so the order of every sum does, too, and what a
rank sends is known before. ``collectives`` carries it out; a test adds up sets of ranks by it.

With p ranks, n bytes, alpha seconds for a message and beta for a byte, to which a fold adds 2 alpha + 2 n beta:
  ring      2(p-1) alpha + 2(p-1)/p n beta                 Patarasuk & Yuan 2009: bandwidth-optimal for any p
  halving   2 log2(p) alpha + 2(p-1)/p n beta, or folded   Rabenseifner 2004; Thakur, Rabenseifner & Gropp 2005, 4.4
  tree      log2(p) (alpha + n beta), or folded            recursive doubling, Thakur et al. 2005, 4.1
``cost.choose`` weighs them. Small messages among few ranks go straight to everybody, which needs no schedule.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import NamedTuple

ALIGN = 64  # chunks begin at multiples of this: of every dtype's size, and of a cache line
NOBODY = -1

Span = tuple[int, int]  # bytes of the stream, from and to
NOTHING: Span = (0, 0)


class Step(NamedTuple):
    """Both directions at once. What comes is added to ours (``adds``), or takes its place."""

    to: int
    gives: Span
    source: int
    takes: Span
    adds: bool

    @property
    def overlaps(self) -> bool:
        """What is sent must not change while it is on its way."""
        both = self.to != NOBODY and self.source != NOBODY
        return both and max(self.gives[0], self.takes[0]) < min(self.gives[1], self.takes[1])


Schedule = Callable[[int, int, int], Iterator[Step]]  # (rank, world, nbytes)


def chunk_bounds(nbytes: int, world: int) -> list[int]:
    """Where the ``world`` chunks of a buffer begin and end, from its size alone; late chunks may be empty."""
    per_chunk = math.ceil(nbytes / world / ALIGN) * ALIGN
    return [min(k * per_chunk, nbytes) for k in range(world + 1)]


def ring(rank: int, world: int, nbytes: int) -> Iterator[Step]:
    chunks = list(pairwise(chunk_bounds(nbytes, world)))
    right, left = (rank + 1) % world, (rank - 1) % world
    # Reduce-scatter: in step s, chunk rank-s goes on to the right, the one before comes and is added to ours.
    for s in range(world - 1):
        yield Step(right, chunks[(rank - s) % world], left, chunks[(rank - s - 1) % world], adds=True)
    # All-gather: each rank has one chunk of the sum, rank+1; the chunks go round once more.
    for s in range(world - 1):
        yield Step(right, chunks[(rank + 1 - s) % world], left, chunks[(rank - s) % world], adds=False)


def halving(rank: int, world: int, nbytes: int) -> Iterator[Step]:
    return _folded(rank, world, nbytes, _halving)


def tree(rank: int, world: int, nbytes: int) -> Iterator[Step]:
    """Every rank is the root of a binomial tree, and all trees grow at once.

    One tree and the way back down would take 2 log2(p) steps, for fewer bytes in all; but no rank would send less, as
    its root sends log2(p) n, and where messages are small it is steps that count.
    """
    return _folded(rank, world, nbytes, _doubling)


def _halving(rank: int, world: int, nbytes: int) -> Iterator[Step]:
    """For a power of two. The nearest exchange the most: half of everything."""
    bounds = chunk_bounds(nbytes, world)
    # Reduce-scatter by vector halving, distance doubling: chunks lo to hi are still ours to sum.
    lo, hi, halves = 0, world, list[tuple[int, int, int]]()
    distance = 1
    while distance < world:
        middle = (lo + hi) // 2
        keeps, gives = ((middle, hi), (lo, middle)) if rank & distance else ((lo, middle), (middle, hi))
        yield Step(rank ^ distance, _span(bounds, gives), rank ^ distance, _span(bounds, keeps), adds=True)
        halves.append((distance, *gives))
        lo, hi = keeps
        distance *= 2
    # All-gather by vector doubling, distance halving: back the same way.
    for distance, first, last in reversed(halves):
        yield Step(rank ^ distance, (bounds[lo], bounds[hi]), rank ^ distance, _span(bounds, (first, last)), adds=False)
        lo, hi = min(lo, first), max(hi, last)


def _doubling(rank: int, world: int, nbytes: int) -> Iterator[Step]:
    """For a power of two. Both partners add the same two sums, the lower ranks' first, and get the same bits."""
    distance = 1
    while distance < world:
        yield Step(rank ^ distance, (0, nbytes), rank ^ distance, (0, nbytes), adds=True)
        distance *= 2


def _folded(rank: int, world: int, nbytes: int, within: Schedule) -> Iterator[Step]:
    """Any world, by an algorithm for powers of two: of the first ranks every second stands aside.

    It gives what it has to the rank before it, and gets the result from there (Thakur et al. 2005, 4.4).
    """
    size = 1 << (world.bit_length() - 1)
    num_aside, whole = world - size, (0, nbytes)
    paired = rank < 2 * num_aside
    if paired and rank % 2:
        yield Step(rank - 1, whole, NOBODY, NOTHING, adds=False)
        yield Step(NOBODY, NOTHING, rank - 1, whole, adds=False)
        return
    if paired:
        yield Step(NOBODY, NOTHING, rank + 1, whole, adds=True)
    place = rank // 2 if paired else rank - num_aside
    for step in within(place, size, nbytes):
        partner = 2 * step.to if step.to < num_aside else step.to + num_aside
        yield step._replace(to=partner, source=partner)
    if paired:
        yield Step(rank + 1, whole, NOBODY, NOTHING, adds=False)


def _span(bounds: list[int], chunks: tuple[int, int]) -> Span:
    return bounds[chunks[0]], bounds[chunks[1]]


SCHEDULES: dict[str, Schedule] = {"ring": ring, "halving": halving, "tree": tree}


def bytes_sent(algorithm: str, rank: int, world: int, nbytes: int) -> int:
    """By one rank in an all-reduce of ``nbytes``, exactly; ``cost`` has the mean over ranks."""
    if algorithm == "direct":
        return (world - 1) * nbytes
    return sum(step.gives[1] - step.gives[0] for step in SCHEDULES[algorithm](rank, world, nbytes))


def broadcast_tree(rank: int, world: int, root: int) -> tuple[int, list[int]]:
    """(parent, children) in a binomial tree; the child that has most to pass on comes first. The root's parent is NOBODY."""
    place = (rank - root) % world
    lowest = place & -place if place else 1 << (world - 1).bit_length()
    distances = [1 << k for k in reversed(range(lowest.bit_length() - 1))]
    children = [(place + d + root) % world for d in distances if place + d < world]
    return ((place & (place - 1)) + root) % world if place else NOBODY, children
