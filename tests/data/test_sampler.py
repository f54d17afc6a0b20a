"""Over an epoch every example exactly once, whatever is stopped, resumed or resized. All ranks run side by side."""

from __future__ import annotations

import json
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from weft.data.partition import (
    ByKey,
    Contiguous,
    Dirichlet,
    Partitioner,
    Pathological,
    PowerLaw,
    Quantity,
    Random,
    Shuffle,
    Stratified,
)
from weft.data.sampler import Draw, Sampler
from weft.errors import ConfigError, DataError

FIXED = [Random(), Stratified(), Contiguous(), ByKey(), Dirichlet(0.3), Pathological(9), Quantity(0.3), PowerLaw(1.5)]
PARTITIONERS = st.sampled_from([Shuffle(), *FIXED])
SEEDS = st.integers(0, 2**32)
WORLDS = st.integers(1, 5)


def labels_of(n: int) -> np.ndarray:
    return np.arange(n) * 7 % 9


def keys_of(n: int) -> np.ndarray:
    return np.arange(n) * 3 % 8


def ranks(n: int, batch: int, world: int, seed: int = 0, partitioner: Partitioner = Shuffle()) -> list[Sampler]:  # noqa: B008
    """All ranks of a run."""
    return [Sampler(n, batch, r, world, seed, partitioner, labels_of(n), keys_of(n)) for r in range(world)]


def step(samplers: list[Sampler]) -> list[Draw]:
    """One draw on each rank, with what must agree between them."""
    draws = [sampler.next() for sampler in samplers]
    assert len({draw[1:] for draw in draws}) == 1
    assert draws[0].total == sum(len(draw.indices) for draw in draws)
    assert all(draw.indices.dtype == np.int64 for draw in draws)
    assert all(sampler.state_dict() == samplers[0].state_dict() for sampler in samplers)
    return draws


def joined(draws: list[Draw]) -> list[int]:
    return [i for draw in draws for i in draw.indices.tolist()]


def handed_on(old: list[Sampler], new: list[Sampler]) -> list[Sampler]:
    """``new`` goes on where ``old`` stopped; the cursor passes through JSON."""
    state = json.loads(json.dumps(old[-1].state_dict()))
    for sampler in new:
        sampler.load_state_dict(state)
    return new


def epoch_of(samplers: list[Sampler]) -> list[list[Draw]]:
    """The steps up to the end of the epoch; there cannot be more of them than examples."""
    steps: list[list[Draw]] = []
    for _ in range(samplers[0].num_examples):
        steps.append(step(samplers))
        if steps[-1][0].last:
            return steps
    raise AssertionError("the epoch does not end")


class Leg(NamedTuple):
    """So many steps before the run is stopped and goes on otherwise."""

    world: int
    batch: int
    steps: int


LEGS = st.lists(st.builds(Leg, WORLDS, st.integers(1, 30), st.integers(0, 6)), min_size=1, max_size=8)


# ------------------------------------------------------------------------------------------------- every example, once


@given(st.integers(8, 60), SEEDS, PARTITIONERS, LEGS)
def test_exactly_once_an_epoch_over_any_stops_and_resizes(
    n: int, seed: int, partitioner: Partitioner, legs: list[Leg]
) -> None:
    seen: dict[int, list[int]] = {}
    samplers = ranks(n, legs[0].batch, legs[0].world, seed, partitioner)
    for leg in legs:
        samplers = handed_on(samplers, ranks(n, leg.batch, leg.world, seed, partitioner))
        for _ in range(leg.steps):
            before = len(seen.get(samplers[0].epoch, []))
            draws = step(samplers)
            seen.setdefault(draws[0].epoch, []).extend(joined(draws))
            assert draws[0].total == min(leg.batch, n - before)
            assert draws[0].last == (len(seen[draws[0].epoch]) == n)
    current = samplers[0].epoch
    assert samplers[0].epoch_position == current + len(seen.get(current, [])) / n
    seen.setdefault(current, []).extend(i for draws in epoch_of(samplers) for i in joined(draws))
    assert sorted(seen) == list(range(current + 1))
    assert all(sorted(examples) == list(range(n)) for examples in seen.values())


@given(st.integers(8, 60), SEEDS, PARTITIONERS, st.lists(WORLDS, min_size=1, max_size=6), st.integers(1, 30))
def test_after_a_resize_ranks_draw_what_the_new_partition_gives_them(
    n: int, seed: int, partitioner: Partitioner, worlds: list[int], batch: int
) -> None:
    samplers = ranks(n, batch, worlds[0], seed, partitioner)
    for world in worlds:
        samplers = handed_on(samplers, ranks(n, batch, world, seed, partitioner))
        draws = step(samplers)
        if partitioner.fixed:
            shards = partitioner.split(n, world, seed, labels_of(n), keys_of(n))
            assert all(set(d.indices.tolist()) <= set(s.tolist()) for d, s in zip(draws, shards))


@given(st.integers(8, 60), st.integers(1, 70), SEEDS, PARTITIONERS, WORLDS, st.integers(0, 40))
def test_a_resumed_run_draws_what_the_undisturbed_one_does(
    n: int, batch: int, seed: int, partitioner: Partitioner, world: int, stop: int
) -> None:
    undisturbed, stopped = (ranks(n, batch, world, seed, partitioner) for _ in range(2))
    for _ in range(stop):
        step(undisturbed)
        step(stopped)
    resumed = handed_on(stopped, ranks(n, batch, world, seed, partitioner))
    for _ in range(5):
        for a, b in zip(step(undisturbed), step(resumed)):
            assert a.indices.tolist() == b.indices.tolist()
            assert a[1:] == b[1:]


@given(st.integers(8, 60), st.integers(1, 20), SEEDS, PARTITIONERS, WORLDS, WORLDS)
def test_a_world_that_drew_nothing_leaves_no_trace(
    n: int, batch: int, seed: int, partitioner: Partitioner, world: int, other: int
) -> None:
    samplers = ranks(n, batch, world, seed, partitioner)
    step(samplers)
    idle = handed_on(samplers, ranks(n, batch, other, seed, partitioner))
    assert idle[0].state_dict() == samplers[0].state_dict()
    back = handed_on(idle, ranks(n, batch, world, seed, partitioner))
    assert joined(step(samplers)) == joined(step(back))


def test_the_cursor_stays_small() -> None:
    samplers = ranks(20_000, 8, 3, 0, Dirichlet())
    for _ in range(1000):
        samplers[0].next()
    assert len(json.dumps(samplers[0].state_dict())) < 200


# ------------------------------------------------------------------------------------------------------------- shuffle


@given(st.integers(5, 60), st.integers(1, 70), SEEDS, WORLDS)
def test_joined_batches_do_not_depend_on_the_world(n: int, batch: int, seed: int, world: int) -> None:
    alone, together = ranks(n, batch, 1, seed), ranks(n, batch, world, seed)
    for _ in range(2 * alone[0].steps_per_epoch):
        draws = step(together)
        assert joined(draws) == joined(step(alone))
        sizes = [len(draw.indices) for draw in draws]
        assert max(sizes) - min(sizes) <= 1


@given(st.integers(5, 60), st.integers(1, 10), SEEDS, st.lists(WORLDS, min_size=1, max_size=6))
def test_joined_batches_do_not_depend_on_resizes(n: int, batch: int, seed: int, worlds: list[int]) -> None:
    alone, samplers = ranks(n, batch, 1, seed), ranks(n, batch, worlds[0], seed)
    for world in worlds:
        samplers = handed_on(samplers, ranks(n, batch, world, seed))
        assert joined(step(samplers)) == joined(step(alone))


def test_shuffle_is_uniform_over_places() -> None:
    """Each example is equally often in each tenth of the epoch (chi-square, 99.99 % of 81 degrees of freedom: 137)."""
    counts = np.zeros((10, 10))
    sampler = Sampler(10, 1, 0, 1, seed=0)
    for _ in range(2000):
        for place in range(10):
            counts[place, sampler.next().indices[0]] += 1
    assert ((counts - 200) ** 2 / 200).sum() < 137


# ---------------------------------------------------------------------------------------------------- fixed partitions


@given(st.integers(8, 200), st.integers(1, 40), SEEDS, st.sampled_from(FIXED), WORLDS)
def test_every_stretch_holds_shares_in_proportion(
    n: int, batch: int, seed: int, partitioner: Partitioner, world: int
) -> None:
    sizes = np.array([len(s) for s in partitioner.split(n, world, seed, labels_of(n), keys_of(n))])
    drawn = np.zeros(world)
    for draws in epoch_of(ranks(n, batch, world, seed, partitioner)):
        drawn += [len(draw.indices) for draw in draws]
        assert (np.abs(drawn - drawn.sum() * sizes / n) <= 0.5 + world / 2 * sizes / n + 1e-9).all()


def test_equal_shards_give_equal_shares_of_every_batch() -> None:
    for draws in epoch_of(ranks(120, 12, 4, 0, Random())):
        assert [len(draw.indices) for draw in draws] == [3, 3, 3, 3]


def test_a_small_batch_leaves_a_small_shard_out() -> None:
    steps = epoch_of(ranks(100, 2, 5, 0, PowerLaw(2.0)))
    assert any(len(draw.indices) == 0 for draws in steps for draw in draws)


@given(SEEDS, st.sampled_from(FIXED))
def test_the_merge_is_the_sort_by_fraction(seed: int, partitioner: Partitioner) -> None:
    """Against the definition: sort all (j + 1/2) / n_shard, ties to the lower shard, in exact fractions."""
    n, world = 48, 4
    shards = partitioner.split(n, world, seed, labels_of(n), keys_of(n))
    places = sorted((Fraction(2 * j + 1, 2 * len(s)), shard) for shard, s in enumerate(shards) for j in range(len(s)))
    samplers = ranks(n, 1, world, seed, partitioner)
    turns = [next(r for r, draw in enumerate(draws) if len(draw.indices)) for draws in epoch_of(samplers)]
    assert turns == [shard for _, shard in places]


# ----------------------------------------------------------------------------------------------------- seeds and errors


@pytest.mark.parametrize("partitioner", [Shuffle(), *FIXED], ids=str)
def test_epochs_and_seeds_differ_and_repeat(partitioner: Partitioner) -> None:
    def orders(seed: int) -> list[list[int]]:
        (sampler,) = ranks(100, 100, 1, seed, partitioner)
        return [sampler.next().indices.tolist() for _ in range(3)]

    assert orders(1) == orders(1)
    assert len({tuple(order) for order in orders(1) + orders(2)}) == 6


def test_writing_into_a_draw_changes_no_other() -> None:
    (one,), (two,) = ranks(20, 5, 1), ranks(20, 5, 1)
    one.next().indices[:] = -1
    two.next()
    rest = [one.next().indices.tolist() for _ in range(3)]
    assert rest == [two.next().indices.tolist() for _ in range(3)]
    assert handed_on([one], ranks(20, 5, 1))[0].next().indices.tolist() == two.next().indices.tolist()


@pytest.mark.parametrize(("n", "batch", "steps"), [(10, 5, 2), (10, 3, 4), (10, 100, 1), (1, 1, 1)])
def test_steps_per_epoch(n: int, batch: int, steps: int) -> None:
    (sampler,) = ranks(n, batch, 1)
    assert sampler.steps_per_epoch == steps == len(epoch_of([sampler]))
    assert sampler.epoch_position == 1.0


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"num_examples": 31}, ["num_examples=30", "31"]),
        ({"seed": 1}, ["seed=0", "1"]),
        ({"partitioner": Dirichlet(0.5)}, ["dirichlet:alpha=0.3,min_size=1", "dirichlet:alpha=0.5,min_size=1"]),
        ({"partitioner": Shuffle()}, ["dirichlet:alpha=0.3,min_size=1", "shuffle"]),
    ],
)
def test_what_may_not_change_across_a_resume(change: dict[str, Any], says: list[str]) -> None:
    fixed: dict[str, Any] = {"num_examples": 30, "seed": 0, "partitioner": Dirichlet(0.3)}
    state = Sampler(batch=4, rank=0, world=2, labels=labels_of(30), **fixed).state_dict()
    other = {**fixed, **change}
    sampler = Sampler(batch=4, rank=0, world=2, labels=labels_of(other["num_examples"]), **other)
    with pytest.raises(ConfigError) as caught:
        sampler.load_state_dict(state)
    assert all(text in str(caught.value) for text in [*says, "resume with"])


def test_impossible_samplers() -> None:
    with pytest.raises(DataError, match=r"3 examples .* 5 shards"):
        Sampler(3, 5, 0, 5, 0)
    with pytest.raises(DataError, match="0 examples"):
        Sampler(0, 5, 0, 1, 0)
    with pytest.raises(DataError, match="needs labels"):
        Sampler(10, 5, 0, 2, 0, Stratified())
    with pytest.raises(ConfigError, match="batch=0"):
        Sampler(10, 0, 0, 1, 0)
    with pytest.raises(ConfigError, match="rank 2 of world 2"):
        Sampler(10, 5, 2, 2, 0)


# -- shares


@given(st.data(), st.integers(1, 4), st.integers(4, 30), st.integers(4, 80))
def test_chosen_shares_leave_the_joined_batches_as_they_are(
    data: st.DataObject, world: int, batch: int, n: int
) -> None:
    """However the cuts move from step to step; a smaller last batch is cut in proportion."""
    cut, plain = ranks(n, batch, world), ranks(n, batch, world)
    for _ in range(6):
        bounds = sorted(data.draw(st.lists(st.integers(0, batch), min_size=world - 1, max_size=world - 1)))
        shares = np.diff([0, *bounds, batch]).tolist()
        for sampler in cut:
            sampler.cut(shares)
        draws = step(cut)
        assert joined(draws) == joined(step(plain))
        for draw, share in zip(draws, shares, strict=True):
            assert abs(len(draw.indices) - share * draw.total / batch) < 1
            if draw.total == batch:
                assert len(draw.indices) == share


@pytest.mark.parametrize("shares", [[3, 4], [3, 3, 4], [-1, 9], [8]])
def test_shares_that_are_none_are_refused(shares: list[int]) -> None:
    with pytest.raises(ValueError, match="add up to 8"):
        ranks(20, 8, 2)[0].cut(shares)


@pytest.mark.parametrize("partitioner", FIXED, ids=lambda p: p.name)
def test_shares_of_a_fixed_partition_are_not_chosen(partitioner: Partitioner) -> None:
    with pytest.raises(ConfigError, match="use 'shuffle'"):
        ranks(40, 8, 2, 0, partitioner)[0].cut([3, 5])
