"""Who holds which shard, and who leads: views, numbered by epochs, and how the next one is found when a server is gone. Pure.

A view names for each shard the servers that hold a copy of it, in a chain (van Renesse and Schneider, OSDI'04) whose first takes pushes and answers
reads, and the server that leads: closes batches and tells all to apply them. In its epoch nobody else does either. The next epoch is granted by a
majority of the members that the run began with, workers included, each of which promises to take nothing more of an earlier one. An update is
applied anywhere only once all copies of all shards have it, so:

- whatever was applied somewhere is with every copy that is left, and the next epoch applies it everywhere (``decide``);
- who was left out, partitioned or frozen can apply nothing more: some member of every chain has promised not to take part.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import msgspec

from weft.errors import PeerLost


class View(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """``chains``: by shard, the members that hold it, the one that serves it first; ``since``: in which epoch each was given it."""

    epoch: int
    lead: int
    chains: list[list[int]]
    since: list[list[int]]

    def is_of(self, servers: Collection[int], shards: int) -> bool:
        """It names so many shards, each with servers among these; else whoever sent it is not to be believed."""
        members = {self.lead, *(member for chain in self.chains for member in chain)}
        alike = len(self.chains) == len(self.since) == shards
        return (
            alike
            and self.epoch >= 0
            and members <= set(servers)
            and all(
                chain and len(chain) == len(since) == len(set(chain))
                for chain, since in zip(self.chains, self.since, strict=True)
            )
        )

    @property
    def servers(self) -> set[int]:
        """That hold something, or lead."""
        return {self.lead, *(member for chain in self.chains for member in chain)}

    def served_by(self, member: int) -> list[int]:
        return [shard for shard, chain in enumerate(self.chains) if chain[0] == member]

    def held_by(self, member: int) -> list[int]:
        return [shard for shard, chain in enumerate(self.chains) if member in chain]


def first_view(members: Sequence[int], replicas: int) -> View:
    """Of as many shards as servers (``members``): each server's own, its copies on those after it."""
    n = len(members)
    chains = [[members[(shard + k) % n] for k in range(replicas)] for shard in range(n)]
    return View(0, members[0], chains, [[0] * replicas for _ in chains])


class CopyState(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A copy of a shard after ``version`` updates. ``joined``: the update that it has, and was not told to apply; -1: none. ``square``: of its norm.
    ``batch``: of which it is."""

    shard: int
    version: int
    joined: int = -1
    square: float = 0.0
    batch: int = -1


class Told(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """What a server that grants an epoch has: its copies, as of the view of epoch ``of``, after ``version`` updates. Batches before ``lowest``, and those
    ``closed``, are in them."""

    of: int
    version: int
    copies: list[CopyState]
    lowest: int
    closed: list[int]


@dataclass(frozen=True)
class Decision:
    """``version``: to which all copies go; ``norm``: of the update that leads there; ``fresh``: (shard, member) that must be given a copy; ``lowest``,
    ``closed``: batches that are then done."""

    view: View
    version: int
    norm: float
    fresh: list[tuple[int, int]]
    lowest: int
    closed: list[int]


def majority(members: int) -> int:
    return members // 2 + 1


def decide(epoch: int, lead: int, base: View, told: Mapping[int, Told], replicas: int) -> Decision:
    """The next view. ``told``: by server that granted ``epoch``; ``base``: the newest view that one of them has. PeerLost if of a shard no copy is left."""
    since = [dict(zip(*both, strict=True)) for both in zip(base.chains, base.since, strict=True)]
    valid = {  # not those of one that was left out meanwhile, and is to be given them anew
        (c.shard, m): c
        for m, t in told.items()
        for c in t.copies
        if c.shard < len(since) and t.of >= since[c.shard].get(m, math.inf)
    }
    chains = [[m for m in chain if (shard, m) in valid] for shard, chain in enumerate(base.chains)]
    if empty := [shard for shard, chain in enumerate(chains) if not chain]:
        gone = tuple(sorted(set(base.chains[empty[0]]) - told.keys())) or tuple(base.chains[empty[0]])
        names = ", ".join(map(str, gone))
        raise PeerLost(
            f"no copy of shard {empty[0]} of the parameters is left: server {names} held it and is gone", gone
        )
    copies = list(valid.values())
    top = max(max(c.version, c.joined) for c in copies)
    if any(top not in (c.version, c.joined) for c in copies):
        top -= 1  # nobody can have been told to apply it
    squares = [max(valid[shard, m].square for m in chain) for shard, chain in enumerate(chains)]
    fresh = fill(chains, sorted(told), replicas)
    order_by_load(chains, fresh)
    for shard, member in fresh:
        since[shard][member] = epoch
    held_since = [[since[shard][m] for m in chain] for shard, chain in enumerate(chains)]
    ahead = max((told[m] for _, m in valid), key=lambda t: t.version)
    closed = {*ahead.closed, *(c.batch for c in copies if c.joined == top > ahead.version)}
    lowest = next(batch for batch in itertools.count(ahead.lowest) if batch not in closed)
    view = View(epoch, lead, chains, held_since)
    return Decision(
        view, top, math.sqrt(math.fsum(squares)), fresh, lowest, sorted(batch for batch in closed if batch > lowest)
    )


def fill(chains: list[list[int]], servers: Sequence[int], replicas: int) -> list[tuple[int, int]]:
    """Copies for shards that have too few, on servers that hold least; then from those that hold more than one above others to these. What was added."""
    held = Counter(dict.fromkeys(servers, 0))
    held.update(member for chain in chains for member in chain)
    fresh: list[tuple[int, int]] = []

    def add(shard: int, server: int) -> None:
        chains[shard].append(server)
        held[server] += 1
        fresh.append((shard, server))

    for shard in sorted(range(len(chains)), key=lambda shard: len(chains[shard])):
        for _ in range(min(replicas, len(servers)) - len(chains[shard])):
            add(shard, min((s for s in servers if s not in chains[shard]), key=lambda s: (held[s], s)))
    while True:
        moves = [
            (held[full] - held[least], shard, full, least)
            for least in servers
            for shard, chain in enumerate(chains)
            if least not in chain
            for full in chain
            if held[full] - held[least] > 1
            and (any((shard, m) not in fresh for m in chain if m != full) or (shard, full) in fresh)
        ]
        if not moves:
            return fresh
        _, shard, full, least = max(moves, key=lambda move: (move[0], -move[1]))
        chains[shard].remove(full)
        held[full] -= 1
        if (shard, full) in fresh:
            fresh.remove((shard, full))
        add(shard, least)


def order_by_load(chains: list[list[int]], fresh: Collection[tuple[int, int]]) -> None:
    """In each chain first who has the shard and serves fewest others; of equals who was first."""
    serves = Counter[int]()
    for shard, chain in enumerate(chains):
        able = [m for m in chain if (shard, m) not in fresh]
        first = min(able, key=lambda m: (serves[m], chain.index(m)))
        serves[first] += 1
        chain.remove(first)
        chain.insert(0, first)


class Voter:
    """What one member has promised. A view that it was told of counts as a promise, too."""

    def __init__(self, view: View) -> None:
        self.view, self.promised = view, view.epoch

    @property
    def is_free(self) -> bool:
        """It may still take part in its view."""
        return self.promised == self.view.epoch

    def grants(self, epoch: int, candidate: int, view: View, is_there: Callable[[int], bool]) -> bool:
        """``view``: the candidate's. Who hears the lead follows nobody else: else two servers that do not reach each other would take turns."""
        lead = max(self.view, view, key=lambda each: each.epoch).lead
        if epoch <= self.promised or not (candidate == lead or not is_there(lead)):
            return False
        self.promised = epoch
        return True

    def adopts(self, view: View) -> bool:
        if view.epoch < self.promised or view.epoch <= self.view.epoch:
            return False
        self.view, self.promised = view, view.epoch
        return True
