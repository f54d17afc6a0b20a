"""Which records of a sharded set a rank draws at each step, so that over an epoch every record is drawn exactly once.

A rank owns whole shards and draws their parts in an order of its own, GROUP parts shuffled together. Which records come
follows from (seed, epoch) and how many were drawn under which world: as with ``sampler``, a few numbers are the whole
cursor, and no rank asks another. O(parts) an epoch, O(batch) a step; never O(records) but for the group at hand.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np

from weft.data.keys import keyed
from weft.data.partition import Indices
from weft.data.sampler import Draw
from weft.data.shards import GROUP, Index
from weft.errors import ConfigError, DataError


class Group(NamedTuple):
    """Parts that are shuffled together, and how many of their records are drawn already."""

    parts: tuple[int, ...]
    drawn: int


class ShardSampler:
    """Draws for one rank; all ranks build it with the same arguments, ``rank`` apart, and call ``next`` in step.

    Each step ranks together draw ``batch`` records, each in proportion to what it owns: all end together, and a rank may
    draw nothing. Owners stay the same from epoch to epoch. In another world what is left of the epoch is dealt anew: a
    group begun, and what is untouched of a shard, each go to one rank.

    Raises DataError when there are more ranks than shards.
    """

    def __init__(self, index: Index, batch: int, rank: int, world: int, seed: int) -> None:
        if batch < 1:
            raise ConfigError(f"batch={batch}: a joined batch holds at least 1 example.")
        if not 0 <= rank < world:
            raise ConfigError(f"rank {rank} of world {world}: ranks go from 0 to world - 1.")
        self.batch, self.rank, self.world, self.seed = batch, rank, world, seed
        self._shards, self._sizes = index.shards(), index.part_sizes()
        check_enough(index, world)
        self._first = np.cumsum([0, *self._sizes])  # number of each part's first record
        self.num_examples = int(self._first[-1])
        self._digest = index.digest()
        self._drawn = self._own_drawn = 0  # under this world, after what is past: by all ranks, by this one
        self._begin(0, [])

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.num_examples // self.batch)

    def next(self) -> Draw:
        if self._groups is None:
            self._arrange()
        drawn = min(self._drawn + self.batch, self._left)
        counts = seats(self._owned, drawn)
        own = self._take(counts[self.rank] - self._own_drawn)
        total, last, epoch = drawn - self._drawn, drawn == self._left, self.epoch
        self._drawn, self._own_drawn = drawn, counts[self.rank]
        if last:
            self._begin(epoch + 1, [])
        return Draw(own, total, epoch, last)

    def cut(self, shares: Sequence[int]) -> None:
        raise ConfigError("of a sharded set each rank draws its own shards, whose sizes set its share.")

    def owned(self) -> list[int]:
        """Records of each rank in a full epoch."""
        return [sum(size for size, _ in hand) for hand in dealt(self._pieces([], self._shards), self.world)]

    def state_dict(self) -> dict[str, Any]:
        """The cursor, as that of ``Sampler``; ``partition`` tells the data and how it is cut."""
        current = [(self.world, self._drawn)] if self._drawn else []
        return {
            "num_examples": self.num_examples,
            "seed": self.seed,
            "partition": f"shards {self._digest}",
            "epoch": self.epoch,
            "segments": [list(segment) for segment in (*self._past, *current)],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where ``state`` was taken, by any rank; world and batch may be others than then."""
        mine = self.state_dict()
        for what in ("num_examples", "seed", "partition"):
            if state.get(what) != mine[what]:
                raise ConfigError(
                    f"the epoch was begun with {what}={state.get(what)!r} and cannot go on with {mine[what]!r}: resume with "
                    "the same files, split and buffer_mb, or start a new run."
                )
        self._begin(state["epoch"], [(world, drawn) for world, drawn in state["segments"]])

    def _begin(self, epoch: int, segments: list[tuple[int, int]]) -> None:
        self.epoch, self._past, self._drawn = epoch, segments, 0
        self._groups: list[Group] | None = None  # own, of what is left after what is past; made when first drawn from
        if segments and segments[-1][0] == self.world:
            *self._past, (_, self._drawn) = segments

    def _arrange(self) -> None:
        """The order of the current segment, by going through those before it."""
        self._place = keyed(self.seed, "parts", self.epoch).permutation(len(self._sizes))  # of each part in the epoch
        begun: list[Group] = []
        fresh: Sequence[Sequence[int]] = self._shards
        for world, drawn in self._past:
            begun, fresh = self._rest(self._hands(begun, fresh, world), drawn)
        hands = self._hands(begun, fresh, self.world)
        self._owned = [sum(map(self._remaining, groups)) for groups in hands]
        self._left = sum(self._owned)
        self._groups = hands[self.rank]
        self._next_group, self._order, self._at = 0, np.empty(0, np.int64), 0
        self._own_drawn = seats(self._owned, self._drawn)[self.rank]
        self._skip(self._own_drawn)

    def _pieces(self, begun: Sequence[Group], fresh: Sequence[Sequence[int]]) -> list[tuple[int, Group]]:
        """What goes to one rank each, with its size: groups begun, and what is untouched of a shard."""
        pieces = [*begun, *(Group(tuple(parts), 0) for parts in fresh)]
        return [(self._remaining(piece), piece) for piece in pieces]

    def _hands(self, begun: Sequence[Group], fresh: Sequence[Sequence[int]], world: int) -> list[list[Group]]:
        """The groups of each rank, in order: those begun, then its parts, mixed over its shards."""
        hands: list[list[Group]] = []
        for hand in dealt(self._pieces(begun, fresh), world):
            parts = sorted(
                (p for _, piece in hand if not piece.drawn for p in piece.parts), key=self._place.__getitem__
            )
            groups = [piece for _, piece in hand if piece.drawn]
            groups += [Group(tuple(parts[k : k + GROUP]), 0) for k in range(0, len(parts), GROUP)]
            hands.append(groups)
        return hands

    def _rest(self, hands: Sequence[Sequence[Group]], drawn: int) -> tuple[list[Group], list[list[int]]]:
        """What is left after ``drawn`` joint draws: groups begun, and the untouched parts of each shard."""
        begun: list[Group] = []
        untouched: set[int] = set()
        counts = seats([sum(map(self._remaining, groups)) for groups in hands], drawn)
        for groups, count in zip(hands, counts, strict=True):
            for group in groups:
                here = min(count, self._remaining(group))
                count -= here
                if group.drawn + here == 0:
                    untouched.update(group.parts)
                elif here < self._remaining(group):
                    begun.append(Group(group.parts, group.drawn + here))
        fresh = [[part for part in parts if part in untouched] for parts in self._shards]
        return begun, [parts for parts in fresh if parts]

    def _remaining(self, group: Group) -> int:
        return sum(self._sizes[part] for part in group.parts) - group.drawn

    def _take(self, count: int) -> Indices:
        """The next ``count`` records of this rank."""
        taken = [self._order[self._at : self._at + count]]
        self._at += len(taken[0])
        while (missing := count - sum(map(len, taken))) > 0:
            self._open_group()
            taken.append(self._order[:missing])
            self._at = len(taken[-1])
        return taken[0] if len(taken) == 1 else np.concatenate(taken)

    def _skip(self, count: int) -> None:
        assert self._groups is not None
        while count and count >= (here := self._remaining(self._groups[self._next_group])):
            self._next_group += 1
            count -= here
        if count:
            self._open_group()
            self._at = count

    def _open_group(self) -> None:
        assert self._groups is not None
        group = self._groups[self._next_group]
        numbers = np.concatenate([np.arange(self._first[p], self._first[p + 1]) for p in group.parts])
        rng = keyed(self.seed, "shuffle", self.epoch, group.parts[0])
        self._order, self._at = rng.permutation(numbers)[group.drawn :], 0
        self._next_group += 1


def check_enough(index: Index, world: int) -> None:
    """Every rank must own a shard."""
    shards = len(index.shards())
    if shards >= world:
        return
    files = sum(bool(file.counts) for file in index.files)
    raise DataError(
        f"{world} workers cannot share {shards} shard{'s' * (shards != 1)} ({files} file{'s' * (files != 1)} with records, "
        f"split={index.split}): a shard is read by one worker. Use at most {shards} workers, or cut the files finer: "
        f"Shards(..., split={-(-world // files)}) or more (Parquet: also in smaller row groups)."
    )


def dealt(pieces: Sequence[tuple[int, Group]], world: int) -> list[list[tuple[int, Group]]]:
    """Each rank's pieces: the largest first, to whom has least (Graham 1969: at most 4/3 of the best largest load)."""
    hands: list[list[tuple[int, Group]]] = [[] for _ in range(world)]
    loads = [(0, rank) for rank in range(world)]  # a heap
    for piece in sorted(pieces, key=lambda piece: -piece[0]):
        load, rank = loads[0]
        hands[rank].append(piece)
        heapq.heapreplace(loads, (load + piece[0], rank))
    return hands


def seats(sizes: Sequence[int], drawn: int) -> list[int]:
    """How many of the first ``drawn`` joint draws are each rank's, when record j of a rank of m comes at (j + 1/2) / m,
    ties to the lower rank: Webster's method (Sainte-Lague), where more draws never take a seat away."""
    n, world = sum(sizes), len(sizes)
    # Those at or before t = (drawn - world/2) / n are floor(t m + 1/2): never too many, and at most `world` too few.
    counts = [max(0, ((2 * drawn - world) * m + n) // (2 * n)) for m in sizes] if n else [0] * world
    missing = drawn - sum(counts)
    if not missing:
        return counts
    following = [(Fraction(2 * c + 1, m), rank) for rank, (c, m) in enumerate(zip(counts, sizes)) if m]
    heapq.heapify(following)
    for _ in range(missing):
        _, rank = following[0]
        counts[rank] += 1
        heapq.heapreplace(following, (Fraction(2 * counts[rank] + 1, sizes[rank]), rank))
    return counts
