"""Shares against brute force, and the balancer against workers whose times are known."""

from __future__ import annotations

import itertools
import json
import math
import random
from collections.abc import Callable

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from weft.data.balance import (
    GAIN,
    HALF,
    MAX_FIXED,
    Balancer,
    Decision,
    Workers,
    best_shares,
    decide,
    equal_shares,
    learn_fixed,
)

TIMES = st.floats(1e-4, 1.0)
Seconds = Callable[[int, int], float]  # (rank, examples) -> seconds


def workers(fixed: list[float], per_example: list[float]) -> Workers:
    return Workers(fixed, per_example)


@given(st.data(), st.integers(1, 4), st.integers(0, 8), st.integers(0, 2))
def test_no_other_shares_are_better(data: st.DataObject, world: int, more: int, least: int) -> None:
    cost = workers(
        data.draw(st.lists(st.floats(0, 1.0), min_size=world, max_size=world)),
        data.draw(st.lists(TIMES, min_size=world, max_size=world)),
    )
    batch = least * world + more
    got = best_shares(cost, batch, least)
    assert sum(got) == batch
    assert min(got) >= least
    every = (s for s in itertools.product(range(least, batch + 1), repeat=world) if sum(s) == batch)
    assert cost.slowest_s(got) == min(map(cost.slowest_s, every))


def test_too_few_examples_are_refused() -> None:
    with pytest.raises(ValueError, match="5 examples are not 2 for each of 3 ranks"):
        best_shares(workers([0.0] * 3, [1.0] * 3), 5, least=2)


def test_no_share_falls_below_the_least() -> None:
    balancer = Balancer(60, 3, least=8)
    run(balancer, lambda r, n: n * (100.0 if r == 1 else 1.0), 100)
    assert balancer.shares == (26, 8, 26)


def run(balancer: Balancer, seconds: Seconds, steps: int) -> list[Decision]:
    found = []
    for _ in range(steps):
        if (decision := balancer.observe([seconds(r, n) for r, n in enumerate(balancer.shares)])) is not None:
            assert decision.shares == balancer.shares
            found.append(decision)
    return found


def test_a_worker_three_times_slower_gets_a_third_and_the_change_says_why() -> None:
    balancer = Balancer(98, 3)
    (decision,) = run(balancer, lambda r, n: n * (0.003 if r == 2 else 0.001), 200)
    assert decision.shares == (42, 42, 14)
    assert decision.reason == (
        "worker 2 takes 14 of 98 examples instead of 33: it needs 3 ms an example, the others 1 (so the slowest should take "
        "42 ms a step instead of 99)"
    )


def test_a_reason_tells_how_far_the_others_are_apart() -> None:
    seconds = [0.1, 0.2, 0.3, 1.2]
    decision = decide((100, 100, 100, 100), seconds, seconds, [0.0] * 4)
    assert decision is not None
    assert (
        "worker 3 takes 17 of 400 examples instead of 100: it needs 12 ms an example, the others 1 to 3 ("
        in decision.reason
    )


def test_nothing_changes_before_both_halves_are_seen_and_the_first_step_does_not_count() -> None:
    slow: Seconds = lambda r, n: n * (r + 1.0)  # noqa: E731
    assert run(Balancer(30, 2), slow, 2 * HALF) == []
    assert len(run(Balancer(30, 2), slow, 2 * HALF + 1)) == 1
    balancer = Balancer(30, 2)
    balancer.observe([100.0, 1.0])
    assert run(balancer, lambda r, n: n, 50) == []


@given(
    st.lists(st.tuples(st.floats(0, 0.9), st.floats(1e-4, 1e-2)), min_size=2, max_size=6),
    st.integers(1, 40),
)
@example([(0.9, 1e-4), (0.0, 1e-2)], 40)
@example([(0.0, 0.0078125), (0.875, 0.005859375)], 2)
@example([(0.9, 1e-2), (0.9, 1e-4), (0.9, 1e-4)], 40)
def test_shares_come_to_rest_near_the_best_whatever_part_is_fixed(cost: list[tuple[float, float]], per: int) -> None:
    """(part of the time at equal shares that is fixed, seconds an example in all)."""
    world = len(cost)
    batch = per * world
    model = workers([f * b * per for f, b in cost], [(1 - f) * b for f, b in cost])
    balancer = Balancer(batch, world)
    seconds: Seconds = lambda r, n: model.fixed[r] + model.per_example[r] * n  # noqa: E731
    changes = run(balancer, seconds, 40 * (2 * HALF + 1))
    assert run(balancer, seconds, 5 * HALF) == []
    slowest = [model.slowest_s(equal_shares(batch, world)), *(model.slowest_s(d.shares) for d in changes)]
    assert slowest[-1] <= min(slowest) * (1 + GAIN)
    best = model.slowest_s(best_shares(model, batch))
    resting = balancer.shares
    one_example = max(seconds(r, n) / n for r, n in enumerate(resting))  # shares are whole: with few, each is much
    assert slowest[-1] <= best * 1.2 + one_example


@pytest.mark.parametrize("world", [2, 3, 5, 8])
def test_noise_moves_nothing_to_speak_of(world: int) -> None:
    """Equal workers whose times vary by a tenth: of 58 chances to change in a run, one in 200 is taken."""
    changes = 0
    for seed in range(40):
        balancer, rng = Balancer(32 * world, world), random.Random(seed)
        changes += len(run(balancer, lambda _, n, rng=rng: n * rng.lognormvariate(0, 0.1), 1000))
        assert all(25 <= n <= 40 for n in balancer.shares)
    assert changes <= 40


def test_shares_follow_a_worker_that_slows_down_and_recovers() -> None:
    balancer = Balancer(90, 3)
    pace = [1.0, 1.0, 1.0]
    seconds: Seconds = lambda r, n: pace[r] * n  # noqa: E731
    assert run(balancer, seconds, 60) == []
    pace[1] = 4.0
    run(balancer, seconds, 60)
    assert balancer.shares == (40, 10, 40)
    pace[1] = 1.0
    run(balancer, seconds, 60)
    assert max(balancer.shares) - min(balancer.shares) <= 3


def test_one_slow_step_of_five_is_no_slow_worker() -> None:
    """A checkpoint, a garbage collection: the median passes over it."""
    steps = itertools.count()

    def seconds(rank: int, n: int) -> float:
        return n * (20.0 if rank == 0 and next(steps) % 5 == 0 else 1.0)

    assert run(Balancer(64, 2), seconds, 500) == []


def test_what_only_one_half_shows_is_not_believed() -> None:
    fast, slow = [10.0, 10.0], [10.0, 30.0]
    assert decide((10, 10), slow, slow, [0.0, 0.0]) is not None
    assert decide((10, 10), slow, fast, [0.0, 0.0]) is None
    assert decide((10, 10), fast, slow, [0.0, 0.0]) is None


def test_a_change_must_promise_enough() -> None:
    assert decide((100, 100), [1.0, 1.08], [1.0, 1.08], [0.0, 0.0]) is None  # 1.08 to 1.04
    assert decide((100, 100), [1.0, 1.2], [1.0, 1.2], [0.0, 0.0]) is not None  # 1.2 to 1.09


def test_the_fixed_part_is_learned_from_a_change_and_bounded() -> None:
    before, after = ((10, 10, 10), [15.0, 10.0, 20.0]), ((5, 11, 14), [10.0, 11.0, 20.5])
    a = learn_fixed([0.0, 0.7, 0.0], before, after)
    assert a[0] == pytest.approx(5.0)  # 5 + n
    assert a[1] == 0.7  # a change of a tenth tells nothing
    assert a[2] == MAX_FIXED * 20.5  # 18.75 by the line


def test_a_balancer_goes_on_from_its_record_whenever_it_was_taken() -> None:
    """With fixed parts, so that what a change has taught matters for the next."""
    seconds: Seconds = lambda r, n: 20 + (r + 1) ** 2 * n  # noqa: E731
    steps = 6 * HALF + 3
    truth = run(Balancer(50, 3), seconds, steps)
    assert len(truth) >= 2
    for stop in range(steps):
        first, second = Balancer(50, 3), Balancer(50, 3)
        got = run(first, seconds, stop)
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        assert got + run(second, seconds, steps - stop) == truth


def test_the_record_of_another_world_is_not_taken() -> None:
    other = Balancer(60, 3)
    run(other, lambda r, n: n * (r + 1.0), 40)
    mine = Balancer(60, 2)
    mine.load_state_dict(other.state_dict())
    assert mine.shares == (30, 30)


@given(st.integers(1, 500), st.integers(1, 50))
def test_equal_shares_are_equal(batch: int, world: int) -> None:
    shares = equal_shares(batch, world)
    assert sum(shares) == batch
    assert set(shares) <= {math.floor(batch / world), math.ceil(batch / world)}
