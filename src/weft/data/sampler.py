"""Which examples a rank draws at each step, so that over an epoch every example is drawn exactly once, by one rank.

An epoch is one order of all examples; joined batch t is order[t*B:(t+1)*B], and a rank draws what it owns of it. The
order follows from (seed, epoch) and how many examples were drawn under which world, so that a few numbers are the whole
cursor. O(n log n) once an epoch, O(B) a step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from weft.data.keys import keyed
from weft.data.partition import Indices, Partitioner, Shuffle, check_shards, position_in_group
from weft.errors import ConfigError


class Draw(NamedTuple):
    """One rank's part of a joined batch."""

    indices: Indices  # (own,), may be empty
    total: int  # examples that all ranks draw in this step
    epoch: int
    last: bool  # this step ends the epoch


class Sampler:
    """Draws for one rank. All ranks build it with the same arguments, ``rank`` apart, and call ``next`` in step.

    ``batch`` is the joined batch of all ranks; the last of an epoch may be smaller, none crosses into the next epoch.

    Under ``Shuffle`` the joined batches do not depend on the world: each is cut into ``world`` parts whose sizes differ
    by at most one, or as ``cut`` says. Under a fixed partition a rank draws its own shard only, and the shards are merged so that each is
    drawn from in proportion to its size and all end together; a rank may then draw nothing in a small batch.

    Raises DataError when there are more ranks than examples or the partition cannot be made.
    """

    def __init__(
        self,
        num_examples: int,
        batch: int,
        rank: int,
        world: int,
        seed: int,
        partitioner: Partitioner = Shuffle(),  # noqa: B008  (frozen)
        labels: npt.ArrayLike | None = None,
        keys: npt.ArrayLike | None = None,
    ) -> None:
        if batch < 1:
            raise ConfigError(f"batch={batch}: a joined batch holds at least 1 example.")
        if not 0 <= rank < world:
            raise ConfigError(f"rank {rank} of world {world}: ranks go from 0 to world - 1.")
        check_shards(num_examples, world)
        self.num_examples, self.batch, self.rank, self.world, self.seed = num_examples, batch, rank, world, seed
        self.partitioner = partitioner
        self._labels, self._keys = labels, keys
        self._owner = self._owners(world)
        self._bounds: Sequence[int] = range(world + 1)  # in proportion: where a rank's part of a joined batch begins
        self.epoch = 0
        self._past: list[tuple[int, int]] = []  # (world, examples drawn under it), earlier in this epoch
        self._drawn = 0  # under this world, after what is past
        self._order: Indices | None = None  # of what is left after what is past; made when first drawn from

    @property
    def steps_per_epoch(self) -> int:
        """Joined batches in an epoch that is drawn with this batch size throughout."""
        return -(-self.num_examples // self.batch)

    @property
    def epoch_position(self) -> float:
        """Epochs drawn so far: 1.25 is a quarter into the second."""
        return self.epoch + (sum(drawn for _, drawn in self._past) + self._drawn) / self.num_examples

    def next(self) -> Draw:
        if self._order is None:
            self._order = self._arrange()
        joined = self._order[self._drawn : self._drawn + self.batch]
        draw = Draw(self._own(joined), len(joined), self.epoch, self._drawn + len(joined) == len(self._order))
        if draw.last:
            self._begin(self.epoch + 1, [])
        else:
            self._drawn += len(joined)
        return draw

    def cut(self, shares: Sequence[int]) -> None:
        """From the next draw on rank r takes ``shares[r]`` of a joined batch (of a smaller one in proportion), in rank
        order. Which examples the batch holds stays the same. Not part of ``state_dict``.
        """
        if self._owner is not None:
            raise ConfigError(
                f"partition {self.partitioner.name!r} gives each rank its own examples, whose shares follow from it: "
                "use 'shuffle' where shares shall be chosen."
            )
        self._bounds = bounds_of(shares, self.world, self.batch)

    def state_dict(self) -> dict[str, Any]:
        """The cursor: small, JSON-able, the same on every rank.

        ``segments``: [world, number of examples drawn under it], in turn, of the current epoch.
        """
        current = [(self.world, self._drawn)] if self._drawn else []
        return {
            "num_examples": self.num_examples,
            "seed": self.seed,
            "partition": str(self.partitioner),
            "epoch": self.epoch,
            "segments": [list(segment) for segment in (*self._past, *current)],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where ``state`` was taken, by any rank. World and batch may be others than then: under a fixed
        partition the new world's owners take over what is left of the epoch.

        Raises ConfigError when num_examples, seed or partition are not those of ``state``.
        """
        mine = self.state_dict()
        for what in ("num_examples", "seed", "partition"):
            if state[what] != mine[what]:
                raise ConfigError(
                    f"the epoch was begun with {what}={state[what]!r} and cannot go on with {mine[what]!r}: "
                    f"resume with {what}={state[what]!r}, or start a new run."
                )
        self._begin(state["epoch"], [(world, drawn) for world, drawn in state["segments"]])

    def _begin(self, epoch: int, segments: list[tuple[int, int]]) -> None:
        self.epoch, self._past, self._drawn, self._order = epoch, segments, 0, None
        if segments and segments[-1][0] == self.world:
            *self._past, (_, self._drawn) = segments

    def _own(self, joined: Indices) -> Indices:
        if self._owner is None:
            begin, end = part_of(len(joined), self._bounds, self.rank)
            return joined[begin:end]
        own: Indices = joined[self._owner[joined] == self.rank]
        return own

    def _owners(self, world: int) -> Indices | None:
        if not self.partitioner.fixed:
            return None
        return self.partitioner.owners(self.num_examples, world, self.seed, self._labels, self._keys)

    def _arrange(self) -> Indices:
        """The epoch's order from the start of the current segment on."""
        left = keyed(self.seed, "epoch", self.epoch).permutation(self.num_examples)
        for world, drawn in self._past:
            unseen = np.ones(self.num_examples, np.bool_)
            unseen[_merge(left, self._owners(world))[:drawn]] = False
            left = left[unseen[left]]
        return _merge(left, self._owner)


def bounds_of(shares: Sequence[int], world: int, batch: int) -> list[int]:
    if len(shares) != world or sum(shares) != batch or min(shares) < 0:
        raise ValueError(f"shares {list(shares)} are not {world} numbers that add up to {batch}")
    return [0, *accumulate(shares)]


def part_of(count: int, bounds: Sequence[int], rank: int) -> tuple[int, int]:
    """Where the rank's part of ``count`` examples begins and ends, in proportion to ``bounds``."""
    return count * bounds[rank] // bounds[-1], count * bounds[rank + 1] // bounds[-1]


def _merge(examples: Indices, owner: Indices | None) -> Indices:
    """Reorder so that any stretch holds of every shard its share: example j of a shard of m comes at (j + 1/2) / m.

    Within a shard the order stays. No prefix holds more than 1/2 + shards/2 * share examples too many or too few of a
    shard.
    """
    if owner is None:
        return examples
    shard = owner[examples]
    place = (position_in_group(shard) + 0.5) / np.bincount(shard)[shard]
    return examples[
        np.lexsort((shard, place))
    ]  # equal fractions are equal floats, and the lower shard then comes first
