"""Histories of pushes, reads, kills, freezes and partitions, drawn by key: with replicas each share counts once, nobody reads too old, and no epoch has two
leads (chaos.py says how)."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import pytest
import torch
from tests.laws import chaos
from tests.laws.reference import Regression, distance, train_plainly
from tests.variants import rest_slow

from weft.errors import PeerLost
from weft.patterns.parameter_server import ParameterServer

STEPS, EQUAL = 8, 1e-9


class Constant(Regression):
    """Gradients that do not depend on the parameters; momentum tells one order of updates from another."""

    def loss(self, model: Any, batch: Any) -> torch.Tensor:
        x, _ = batch
        return sum(((p * x.mean()).sum() for p in model.parameters()), torch.zeros((), dtype=x.dtype))

    def schedule(self, optimizer: torch.optim.Optimizer, total_steps: int) -> None:
        return None


class InAnyOrder(Constant):
    def optimizer(self, params: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(params, lr=0.05)


TASKS = {0: Regression, 2: Constant, "none": InAnyOrder}  # by staleness
TRUTHS = {kind: train_plainly(kind(), steps=STEPS, batch=12, run_seed=3) for kind in TASKS.values()}


def drawn(key: int) -> tuple[ParameterServer, int, list[chaos.Plan]]:
    """A layout, and what goes wrong in it: one kill at most, and with one of a server nobody else is away for long, so that somebody has everything."""
    dice = random.Random(key)
    servers = dice.choice((2, 3, 3))
    replicas = dice.choice([r for r in (2, 3) if r <= servers])
    workers, staleness = dice.choice((1, 2, 3)), dice.choice((0, 0, 2, "none"))
    members, plans = range(workers + servers), []
    for _ in range(dice.randrange(1, 4)):
        kind, member = dice.choice(("kill", "freeze", "freeze", "cut", "cut")), dice.choice(members)
        others = tuple(dice.sample([k for k in members if k != member], dice.randrange(1, len(members))))
        if kind == "kill" and (any(p.kind == "kill" for p in plans) or (workers == 1 and member == 0)):
            continue
        seconds = dice.choice((0.5, 3.0, 8.0))
        plans.append(chaos.Plan(kind, member, dice.randrange(1, 110), seconds, others if kind == "cut" else ()))
    if any(p.kind == "kill" and p.member >= workers for p in plans) and replicas == 2:
        plans = [dataclasses.replace(p, seconds=0.5) for p in plans]
    clip = 0.5 if staleness == 0 and dice.random() < 0.3 else None
    return ParameterServer(servers=servers, replicas=replicas, staleness=staleness, clip_norm=clip), workers, plans


@pytest.mark.parametrize("keys", rest_slow([range(0, 25), range(25, 125), range(125, 225)]))
def test_any_history(keys: range) -> None:
    for key in keys:
        pattern, workers, plans = drawn(key)
        kind = TASKS[pattern.staleness]
        with pytest.MonkeyPatch.context() as patch:
            course = chaos.run(patch, kind(), pattern, workers, key, plans, steps=STEPS)
        text = f"key {key}: {pattern}, {workers} workers, {course.log}, {course.events}, {course.errors}"
        assert not chaos.ended_badly(course), text
        chaos.check(course, pattern, STEPS, text)
        truth = TRUTHS[kind] if pattern.clip_norm is None else clipped(pattern.clip_norm)
        assert course.finals, text
        assert max(distance(final, truth) for final in course.finals) <= EQUAL, text


def clipped(limit: float) -> dict[str, torch.Tensor]:
    return train_plainly(Regression(), steps=STEPS, batch=12, run_seed=3, clip=limit)


@pytest.mark.parametrize("at", rest_slow(range(1, 60), keep=6))
@pytest.mark.parametrize("server", [0, 1, 2])
def test_a_server_is_killed_between_any_two_frames(server: int, at: int) -> None:
    pattern, workers = ParameterServer(servers=3, replicas=2), 2
    with pytest.MonkeyPatch.context() as patch:
        course = chaos.run(patch, Regression(), pattern, workers, at, [chaos.Plan("kill", 2 + server, at)], steps=STEPS)
    chaos.check(course, pattern, STEPS, str(course.log))
    assert (
        [distance(final, TRUTHS[Regression]) <= EQUAL for final in course.finals] == [True] * len(course.finals) != []
    )


def test_a_second_server_may_go_once_there_are_two_copies_again() -> None:
    """The others were given copies of what the first had."""
    plans = [chaos.Plan("kill", 2, 20), chaos.Plan("kill", 3, 75)]
    with pytest.MonkeyPatch.context() as patch:
        course = chaos.run(patch, Regression(), ParameterServer(servers=3, replicas=2), 2, 1, plans, steps=STEPS)
    assert [kind for _, kind, _, _ in course.log] == ["kill", "kill"]
    assert [distance(final, TRUTHS[Regression]) <= EQUAL for final in course.finals] == [True]


def test_one_that_wakes_is_given_copies_and_may_be_the_last() -> None:
    plans = [chaos.Plan("freeze", 2, 20, 2.2), chaos.Plan("kill", 3, 400)]
    with pytest.MonkeyPatch.context() as patch:
        course = chaos.run(patch, Regression(), ParameterServer(servers=2, replicas=2), 2, 1, plans, steps=80)
    assert [kind for _, kind, _, _ in course.log] == ["freeze", "kill"]
    assert [member for member, error in sorted(course.errors.items()) if error is None] == [0, 1, 2]
    truth = train_plainly(Regression(), steps=80, batch=12, run_seed=3)
    assert [distance(final, truth) <= EQUAL for final in course.finals] == [True]


def test_where_no_copy_is_left_the_run_ends_and_says_of_what() -> None:
    plans = [chaos.Plan("kill", 4, 40, others=(5,))]
    with pytest.MonkeyPatch.context() as patch:
        course = chaos.run(patch, Regression(), ParameterServer(servers=3, replicas=2), 4, 1, plans, steps=STEPS)
    assert not course.finals
    assert any("no copy of shard 0" in str(e) for e in course.errors.values() if isinstance(e, PeerLost))


def test_a_minority_applies_nothing() -> None:
    """The lead is cut off with one worker of three: what they do there is not in the model, and the others go on."""
    plans = [chaos.Plan("cut", 3, 30, 60.0, (1, 2, 4, 5))]
    with pytest.MonkeyPatch.context() as patch:
        course = chaos.run(patch, Regression(), ParameterServer(servers=3, replicas=2), 3, 1, plans, steps=STEPS)
    chaos.check(course, ParameterServer(servers=3, replicas=2), STEPS, str(course.log))
    assert [distance(final, TRUTHS[Regression]) <= EQUAL for final in course.finals] == [True]
