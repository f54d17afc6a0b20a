"""Over an epoch every record exactly once, whatever is stopped, resumed or resized. All ranks run side by side."""

from __future__ import annotations

import json
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from weft.data.formats import FileIndex
from weft.data.sampler import Draw
from weft.data.shard_sampler import ShardSampler, seats
from weft.data.shards import GROUP, Index
from weft.errors import ConfigError, DataError

SEEDS = st.integers(0, 2**32)
WORLDS = st.integers(1, 5)
#: records of each part of each file; five files at least, for worlds up to five
FILES = st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=40), min_size=5, max_size=9)


def index_of(files: list[list[int]], split: int = 1) -> Index:
    return Index({}, split, [FileIndex(f"f{k}", 0, 0, [0] * (len(c) + 1), c) for k, c in enumerate(files)])


def ranks(index: Index, batch: int, world: int, seed: int = 0) -> list[ShardSampler]:
    return [ShardSampler(index, batch, r, world, seed) for r in range(world)]


def step(samplers: list[ShardSampler]) -> list[Draw]:
    draws = [sampler.next() for sampler in samplers]
    assert len({draw[1:] for draw in draws}) == 1
    assert draws[0].total == sum(len(draw.indices) for draw in draws)
    assert all(draw.indices.dtype == np.int64 for draw in draws)
    assert all(sampler.state_dict() == samplers[0].state_dict() for sampler in samplers)
    return draws


def joined(draws: list[Draw]) -> list[int]:
    return [i for draw in draws for i in draw.indices.tolist()]


def handed_on(old: list[ShardSampler], new: list[ShardSampler]) -> list[ShardSampler]:
    state = json.loads(json.dumps(old[-1].state_dict()))
    for sampler in new:
        sampler.load_state_dict(state)
    return new


class Leg(NamedTuple):
    world: int
    batch: int
    steps: int


LEGS = st.lists(st.builds(Leg, WORLDS, st.integers(1, 300), st.integers(0, 6)), min_size=1, max_size=8)


@given(FILES, SEEDS, LEGS, st.integers(1, 3))
def test_exactly_once_an_epoch_over_any_stops_and_resizes(
    files: list[list[int]], seed: int, legs: list[Leg], split: int
) -> None:
    index = index_of(files, split)
    n = index.num_records
    drawn: dict[int, list[int]] = {}
    samplers = ranks(index, legs[0].batch, legs[0].world, seed)
    for leg in legs:
        samplers = handed_on(samplers, ranks(index, leg.batch, leg.world, seed))
        for _ in range(leg.steps):
            draws = step(samplers)
            before = len(drawn.get(draws[0].epoch, []))
            drawn.setdefault(draws[0].epoch, []).extend(joined(draws))
            assert draws[0].total == min(leg.batch, n - before)
            assert draws[0].last == (before + draws[0].total == n)
    for _ in range(n):
        draws = step(samplers)
        drawn.setdefault(draws[0].epoch, []).extend(joined(draws))
        if draws[0].last:
            break
    assert sorted(drawn) == list(range(max(drawn) + 1))
    assert all(sorted(records) == list(range(n)) for records in drawn.values())


@given(FILES, st.integers(1, 90), SEEDS, WORLDS, st.integers(0, 40))
def test_a_resumed_run_draws_what_the_undisturbed_one_does(
    files: list[list[int]], batch: int, seed: int, world: int, stop: int
) -> None:
    undisturbed, stopped = (ranks(index_of(files), batch, world, seed) for _ in range(2))
    for _ in range(stop):
        step(undisturbed)
        step(stopped)
    resumed = handed_on(stopped, ranks(index_of(files), batch, world, seed))
    for _ in range(5):
        for a, b in zip(step(undisturbed), step(resumed)):
            assert a.indices.tolist() == b.indices.tolist()
            assert a[1:] == b[1:]


@given(FILES, st.integers(1, 50), SEEDS, WORLDS)
def test_a_rank_draws_from_its_own_files_only_in_every_epoch(
    files: list[list[int]], batch: int, seed: int, world: int
) -> None:
    index = index_of(files)
    bounds = np.cumsum([0, *map(sum, files)])
    owners: dict[int, set[int]] = {k: set() for k in range(len(files))}
    samplers = ranks(index, batch, world, seed)
    for _ in range(2 * samplers[0].steps_per_epoch):
        for rank, draw in enumerate(step(samplers)):
            for k in np.unique(np.searchsorted(bounds, draw.indices, side="right") - 1).tolist():
                owners[k].add(rank)
    assert samplers[0].epoch == 2
    assert all(len(ranks) == 1 for ranks in owners.values())
    assert set().union(*owners.values()) == set(range(world))
    loads = [sum(sum(files[k]) for k in owners if owners[k] == {rank}) for rank in range(world)]
    assert samplers[0].owned() == loads


@given(FILES, st.integers(1, 50), SEEDS, WORLDS)
def test_a_rank_needs_no_more_than_a_group_of_parts_at_once(
    files: list[list[int]], batch: int, seed: int, world: int
) -> None:
    """Between the first and last record of a part, records of at most GROUP parts come: what a reader must hold."""
    bounds = np.cumsum([0, *(c for counts in files for c in counts)])
    for rank in range(world):
        sampler = ShardSampler(index_of(files), batch, rank, world, seed)
        order = np.concatenate([sampler.next().indices for _ in range(sampler.steps_per_epoch)])
        parts = (np.searchsorted(bounds, order, side="right") - 1).tolist()
        last = {part: k for k, part in enumerate(parts)}
        alive: set[int] = set()
        for k, part in enumerate(parts):
            alive.add(part)
            assert len(alive) <= GROUP
            alive = {p for p in alive if last[p] > k}


@given(st.lists(st.integers(0, 40), min_size=1, max_size=9))
def test_seats_are_those_of_the_sort_by_fraction(sizes: list[int]) -> None:
    """Against the definition: sort all (j + 1/2) / size, ties to the lower rank, in exact fractions."""
    order = sorted((Fraction(2 * j + 1, 2 * m), rank) for rank, m in enumerate(sizes) for j in range(m))
    counts = [0] * len(sizes)
    assert seats(sizes, 0) == counts
    for drawn, (_, rank) in enumerate(order, 1):
        counts[rank] += 1
        assert seats(sizes, drawn) == counts


def test_records_of_a_group_come_in_any_order() -> None:
    """Each of 20 records is equally often in each of 20 places (chi-square, 99.99 % of 361 degrees of freedom: 468)."""
    sampler = ShardSampler(index_of([[5, 5, 5, 5]]), 1, 0, 1, seed=0)
    counts = np.zeros((20, 20))
    for _ in range(2000):
        for place in range(20):
            counts[place, sampler.next().indices[0]] += 1
    assert ((counts - 100) ** 2 / 100).sum() < 468


def test_epochs_and_seeds_differ_and_repeat() -> None:
    def orders(seed: int) -> list[list[int]]:
        (sampler,) = ranks(index_of([[30, 30], [40]]), 100, 1, seed)
        return [sampler.next().indices.tolist() for _ in range(3)]

    assert orders(1) == orders(1)
    assert len({tuple(order) for order in orders(1) + orders(2)}) == 6


def test_the_cursor_stays_small() -> None:
    samplers = ranks(index_of([[50] * 100] * 8), 8, 3)
    for _ in range(1000):
        samplers[0].next()
    assert len(json.dumps(samplers[0].state_dict())) < 200


@pytest.mark.parametrize(
    ("other", "says"),
    [
        ({"seed": 1}, ["seed=0", "1"]),
        ({"index": index_of([[3, 4]])}, ["num_examples=6", "7"]),
        ({"index": index_of([[2, 4]])}, ["shards", "split and buffer_mb"]),
        ({"index": index_of([[3, 3]], split=2)}, ["shards", "split and buffer_mb"]),
    ],
)
def test_what_may_not_change_across_a_resume(other: dict[str, Any], says: list[str]) -> None:
    fixed: dict[str, Any] = {"index": index_of([[3, 3]]), "batch": 2, "rank": 0, "world": 1, "seed": 0}
    sampler = ShardSampler(**(fixed | other))
    with pytest.raises(ConfigError) as caught:
        sampler.load_state_dict(ShardSampler(**fixed).state_dict())
    assert all(text in str(caught.value) for text in says)


def test_more_workers_than_shards() -> None:
    with pytest.raises(DataError, match=r"5 workers cannot share 2 shards \(2 files.*at most 2 workers.*split=3"):
        ShardSampler(index_of([[4, 4, 4, 4], [4, 4, 4], []]), 5, 0, 5, 0)
    assert len(ranks(index_of([[4, 4, 4, 4], [4, 4, 4], []], split=3), 5, 5)) == 5
