"""Who works on what, and what may be read: the book of the server that hands out work. Pure.

The unit is a share: a joined batch is cut into as many as there were workers at the start, and each is computed by whoever is free, its own
worker first. So a slow worker holds up one share, not a worker's worth of every batch, and one that is gone only leaves its share to another.
A batch is closed when its shares are in (all, or all but ``backups``: Chen et al. 2016), and becomes one update. A share of batch b is
handed out once every batch before b - staleness is closed (Ho et al. 2013, with batches as clocks): 0 is one process's order, None no
bound; 0 for all before ``start``. If updates are made in the batches' order, none of its gradients is later than ``staleness`` updates. Before a pause nothing beyond it is handed out, so that there the state is that of so many whole batches.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple


class Share(NamedTuple):
    batch: int
    share: int


@dataclass
class _Open:
    """A batch that is not closed. ``free``: nobody is at it; ``held``: by whom; ``in_``: who is done, with all servers."""

    free: set[int]
    held: dict[int, set[int]] = field(default_factory=dict)
    done: set[int] = field(default_factory=set)
    weight: float = 0.0  # of these


class Ledger:
    """``begin``: the first batch that is not closed; ``closed``: those after it that are; ``start``: how many are synchronous."""

    def __init__(
        self,
        shares: int,
        begin: int,
        staleness: int | None = 0,
        backups: int = 0,
        start: int = 0,
        closed: Collection[int] = (),
    ) -> None:
        self.shares, self.staleness, self.backups, self.start = shares, staleness, backups, start
        self.lowest = begin  # all batches before it are closed
        self._closed = set(closed)  # above ``lowest``
        self._next = max([begin, *(batch + 1 for batch in closed)])  # the first that is not begun
        self.limit = self._next  # the next pause: batches before it may begin
        self.closed = begin + len(self._closed)  # how many are closed, of the run
        self._open = {b: self._all_free() for b in range(begin, self._next) if b not in self._closed}  # those begun

    def _all_free(self) -> _Open:
        return _Open(set(range(self.shares)))

    @property
    def bound(self) -> int | None:
        """How far ahead anybody may be now."""
        return 0 if self.lowest < self.start else self.staleness

    @property
    def begun(self) -> int:
        """Batches of which something was handed out."""
        return self._next

    def is_open(self, batch: int) -> bool:
        return self.lowest <= batch < self.limit and batch not in self._closed

    def take(self, worker: int) -> Share | None:
        """What this worker shall do now; None: nothing may begin."""
        for batch in self._startable():
            if free := self._begin(batch).free:
                share = worker if worker in free else min(free)
                free.remove(share)
                self._open[batch].held[share] = {worker}
                return Share(batch, share)
        return None

    def _startable(self) -> Iterator[int]:
        yield from sorted(self._open)
        bound = self.limit if self.bound is None else min(self.limit, self.lowest + self.bound + 1)
        if self._next < bound:
            yield self._next

    def _begin(self, batch: int) -> _Open:
        if batch not in self._open:
            self._open[batch] = self._all_free()
            self._next = batch + 1
        return self._open[batch]

    def done(self, share: Share, weight: float = 1.0) -> list[int]:
        """All servers have it. The shares of its batch, in order, if it closes with this; a share that is not waited for changes nothing.
        ``weight``: of its examples; a batch is not closed early with shares of nothing."""
        batch = self._open.get(share.batch)
        if batch is None or share.share in batch.done:
            return []
        batch.done.add(share.share)
        batch.free.discard(share.share)
        batch.held.pop(share.share, None)
        batch.weight += weight
        if len(batch.done) < (self.shares - self.backups if batch.weight else self.shares):
            return []
        del self._open[share.batch]
        self._closed.add(share.batch)
        self.closed += 1
        while self.lowest in self._closed:
            self._closed.remove(self.lowest)
            self.lowest += 1
        return sorted(batch.done)

    def lost(self, worker: int) -> list[Share]:
        """What it was at, which is free again."""
        freed = []
        for number, batch in sorted(self._open.items()):
            for share, holders in list(batch.held.items()):
                if worker in holders:
                    del batch.held[share]
                    batch.free.add(share)
                    freed.append(Share(number, share))
        return freed

    def pause(self, at: int) -> None:
        """Nothing from batch ``at`` on is handed out, or, where it is begun already, from the next that is not."""
        self.limit = max(at, self._next)
