"""Where a worker's training examples come from: which it draws at each step, and what they are.

The loop knows only ``Feed``. A draw names its examples by number; ``batch`` may be asked for a draw in pieces.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, Protocol, cast

import numpy as np
import torch
from torch.utils.data import IterableDataset

from weft.data.keys import key_int
from weft.data.partition import Indices
from weft.data.partition import parse as parse_partitioner
from weft.data.sampler import Draw, Sampler, bounds_of, part_of
from weft.data.shard_sampler import ShardSampler
from weft.data.shards import Index, Reader, Shards
from weft.errors import ConfigError, DataError
from weft.patterns.base import Context
from weft.patterns.batches import Batches, groups_of
from weft.patterns.randomness import host_state_kept, seed_everything


class Feed(Protocol):
    """One rank's; all ranks build it alike and call ``next`` in step."""

    def next(self) -> Draw:
        """This rank's part of the next joined batch. Every rank learns ``total`` without asking the others."""

    def batch(self, indices: Indices) -> Any:
        """Examples of the newest draw as a batch on the device."""

    def cut(self, shares: Sequence[int]) -> None:
        """From the next draw on rank r takes ``shares[r]`` of a whole joined batch. Not part of ``state_dict``."""

    def state_dict(self) -> dict[str, Any]:
        """The cursor: small, JSON-able, the same on every rank."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where ``state`` was taken, also in another world. Raises ConfigError if the data is not that of then."""

    def stream_state(self) -> Any:
        """What a stream itself wants saved beside the cursor, the same on every rank; None if nothing."""

    def load_stream_state(self, state: Any) -> None: ...


class Indexed:
    """A feed of examples that can be asked for by number: a sampler says which, ``Batches`` fetches them."""

    def __init__(self, sampler: Sampler | ShardSampler, batches: Batches) -> None:
        # bound once: the loop calls these at every step
        self.next, self.batch, self.cut = sampler.next, batches.__call__, sampler.cut
        self.state_dict, self.load_state_dict = sampler.state_dict, sampler.load_state_dict

    def stream_state(self) -> None:
        return None

    def load_stream_state(self, state: Any) -> None:
        pass


class Streamed:
    """A feed from an IterableDataset. Every rank goes through all of it and keeps its part of each joined batch, so that
    which examples are drawn together does not depend on the world.

    That holds if every rank sees the same sequence. A dataset that draws from torch's, numpy's or Python's global
    generators does: they are seeded alike on all ranks, by the place in the stream, while it is asked.
    """

    def __init__(
        self, dataset: IterableDataset[Any], batch: int, rank: int, world: int, seed: int, batches: Batches
    ) -> None:
        self.dataset, self.size, self.rank, self.world, self.seed, self.batches = (
            dataset,
            batch,
            rank,
            world,
            seed,
            batches,
        )
        #: examples of a pass: its length if it has one; else known after the first pass
        self.num_examples = length_of(dataset)
        self.epoch, self.drawn = 0, 0
        self._bounds: Sequence[int] = range(world + 1)
        self._iterator: Iterator[Any] | None = None
        self._own: list[Any] = []
        self._own_first = 0  # place in the epoch of the first of these
        self._restored = False

    def next(self) -> Draw:
        joined = self._pull(self.size)
        if not joined and self.drawn:
            self._end_epoch()
            joined = self._pull(self.size)
        if not joined:
            raise DataError(f"{name_of(self.dataset)} has no examples: its epoch {self.epoch + 1} yielded nothing.")
        begin, end = part_of(len(joined), self._bounds, self.rank)
        self._own, self._own_first = joined[begin:end], self.drawn + begin
        draw = Draw(
            np.arange(self._own_first, self._own_first + len(self._own)),
            len(joined),
            self.epoch,
            len(joined) < self.size or self.drawn + len(joined) == self.num_examples,
        )
        self.drawn += len(joined)
        if draw.last:
            self._end_epoch()
        elif self.num_examples is not None and self.drawn > self.num_examples:
            raise self._longer(self.num_examples)
        return draw

    def batch(self, indices: Indices) -> Any:
        return self.batches.of([self._own[i - self._own_first] for i in indices.tolist()])

    def cut(self, shares: Sequence[int]) -> None:
        self._bounds = bounds_of(shares, self.world, self.size)

    def state_dict(self) -> dict[str, Any]:
        return {
            "stream": name_of(self.dataset),
            "batch": self.size,
            "num_examples": self.num_examples,
            "seed": self.seed,
            "epoch": self.epoch,
            "drawn": self.drawn,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        mine = self.state_dict()
        for what in ("stream", "batch", "seed"):
            if state.get(what) != mine[what]:
                raise ConfigError(
                    f"the epoch was begun with {what}={state.get(what)!r} and cannot go on with {mine[what]!r}: resume with "
                    f"{what}={state.get(what)!r}, or start a new run."
                )
        self.num_examples = state["num_examples"] if self.num_examples is None else self.num_examples
        self.epoch, self.drawn, self._iterator = state["epoch"], state["drawn"], None

    def stream_state(self) -> Any:
        return cast(Any, self.dataset).state_dict() if self.drawn and is_stateful(self.dataset) else None

    def load_stream_state(self, state: Any) -> None:
        if state is not None:
            self._set_epoch()
            cast(Any, self.dataset).load_state_dict(state)
            self._restored = True

    def _pull(self, count: int) -> list[Any]:
        """Up to ``count`` more examples of this epoch."""
        if self._iterator is None:
            self._iterator = self._begin()
        return self._ask(self._iterator, self.drawn, count)

    def _begin(self) -> Iterator[Any]:
        if not self._restored:
            self._set_epoch()
        with host_state_kept():
            seed_everything(key_int(self.seed, "stream", self.epoch))
            iterator = iter(self.dataset)
        if not self._restored:
            for place in range(0, self.drawn, self.size):  # as they were asked for before
                if len(self._ask(iterator, place, min(self.size, self.drawn - place))) == 0:
                    raise self._shorter(place)
        self._restored = False
        return iterator

    def _set_epoch(self) -> None:
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(self.epoch)

    def _ask(self, iterator: Iterator[Any], place: int, count: int) -> list[Any]:
        with host_state_kept():
            seed_everything(key_int(self.seed, "stream", self.epoch, place))
            return list(islice(iterator, count))

    def _end_epoch(self) -> None:
        if self.num_examples is not None and self.drawn < self.num_examples:
            raise self._shorter(self.drawn)
        if self.num_examples is not None and (self.drawn > self.num_examples or self._pull(1)):
            raise self._longer(self.num_examples)
        self.num_examples = self.num_examples or self.drawn
        self.epoch, self.drawn, self._iterator = self.epoch + 1, 0, None

    def _longer(self, expected: int) -> DataError:
        return DataError(
            f"{name_of(self.dataset)} gave more than {expected} examples in epoch {self.epoch + 1} (its length, or what an earlier "
            "pass gave): what comes after would never be used. Mend its __len__, or give a stream that is the same in every pass."
        )

    def _shorter(self, place: int) -> DataError:
        expected = self.num_examples or self.drawn
        return DataError(
            f"{name_of(self.dataset)} ended after {place} examples in epoch {self.epoch + 1}, and {expected} were expected "
            "(its length, or what an earlier pass gave): a stream must give the same examples in every pass. Mend it, or "
            "give one without a length whose first pass is complete."
        )


def length_of(dataset: Any) -> int | None:
    try:
        return len(dataset)
    except (TypeError, NotImplementedError):  # no __len__, or one that torch's wrappers pass on to a set without
        return None


def name_of(dataset: Any) -> str:
    return type(dataset).__name__


def is_stateful(dataset: Any) -> bool:
    return hasattr(dataset, "state_dict") and hasattr(dataset, "load_state_dict")


def readable(dataset: Any, index: Index | None) -> Any:
    """A dataset that answers by number; only Shards need be opened for that."""
    if isinstance(dataset, Shards):
        assert index is not None
        return Reader(dataset, index)
    return dataset


def make_feed(train: Any, ctx: Context, dtype: torch.dtype) -> Feed:
    """The feed of the task's training set on this rank."""
    config, index = ctx.config, ctx.facts.indexes.get("training")
    place = (ctx.pattern.share_of(ctx.rank, ctx.world), ctx.pattern.shares(ctx.world))
    where = (config.batch, *place, config.seed)
    batches = Batches(readable(train, index), ctx.task, ctx.device, dtype)
    if isinstance(train, Shards):
        assert index is not None
        return Indexed(ShardSampler(index, *where), batches)
    if isinstance(train, IterableDataset):
        return Streamed(train, *where, batches)
    partitioner = parse_partitioner(config.partition)
    groups = groups_of(train, ctx.task, partitioner)
    return Indexed(Sampler(len(cast(Any, train)), *where, partitioner, *groups), batches)
