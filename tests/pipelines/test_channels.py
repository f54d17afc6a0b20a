"""What runs and what does not; the order and the number of messages, against runs in any order."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.pipelines.test_schedules import programs

from weft.errors import ConfigError
from weft.pipelines.channels import arrivals, channel_order, validate
from weft.pipelines.schedules import Action, Program, program


def with_rows(lists: Program, *rows: str) -> Program:
    """Rows as "0F0 0B0"; stages and microbatches of one digit."""
    actions = tuple(tuple(Action(int(a[0]), a[1], int(a[2])) for a in row.split()) for row in rows)  # type: ignore[arg-type]
    return replace(lists, actions=actions)


TWO = program("1f1b", 2, 2)


def test_what_cannot_run_is_refused() -> None:
    wrong = {
        ("0F0 0F1 0B0 0B1", "1F0 1B0 1F1"): "stage 1 computes of microbatch 1 F: it needs F and B, or F, I and W",
        ("0F0 0F1 0B0 0B1", "1F0 1B0 1F1 1I1"): "of microbatch 1 F, I: it needs",
        ("0F0 0F1 0B0", "1F0 1B0 1F1 1B1"): "stage 0 computes of microbatch 1 F",
        ("0F0 0F1 0B0 0B1", "1F0 1B0 1B1 1F1"): "rank 1 would compute 1B1, before 1F1",
        ("0F0 0F1 0B0 0B1", "1F0 1W0 1I0 1F1 1B1"): "rank 1 would compute 1W0, before 1I0",
        ("0F0 0F1 0B0 0B1", "1F0 1I0 1B0 1F1 1B1"): "rank 1 would compute 1B0, after the other",
        ("0F0 0F1 0F0 0B0 0B1", "1F0 1B0 1F1 1B1"): "rank 0 would compute 0F0, for the second time",
        ("0F0 0F1 0B0 0B1 1F0", "1B0 1F1 1B1"): "rank 0 would compute 1F0, stage 1 stands on rank 1",
        ("0F0 0F1 0B0 0B1 0F2", "1F0 1B0 1F1 1B1"): "rank 0 would compute 0F2, there are 2 stages and 2 microbatches",
    }
    for rows, message in wrong.items():
        with pytest.raises(ConfigError, match=message):
            validate(with_rows(TWO, *rows))


def test_lists_that_wait_for_one_another_are_refused() -> None:
    with pytest.raises(
        ConfigError,
        match="never end: rank 0 waits before 0B0 for 1B or I of microbatch 0; rank 1 waits before 1F1 for 0F of microbatch 1",
    ):
        validate(with_rows(TWO, "0F0 0B0 0F1 0B1", "1F0 1F1 1B0 1B1"))


@given(programs(), st.randoms(use_true_random=False))
def test_two_neighbours_swapped_run_if_and_only_if_any_order_says_so(lists: Program, rnd: random.Random) -> None:
    rows = [list(row) for row in lists.actions]
    row = rows[rnd.randrange(len(rows))]
    k = rnd.randrange(len(row) - 1)
    row[k], row[k + 1] = row[k + 1], row[k]
    swapped = replace(lists, actions=tuple(map(tuple, rows)))
    try:
        validate(swapped)
    except ConfigError:
        assert not runs(swapped, rnd)[0]
    else:
        assert runs(swapped, rnd)[0]


@given(programs())
def test_both_sides_know_the_order_of_messages(lists: Program) -> None:
    order = channel_order(lists)
    sent = Counter(action for actions in order.values() for action in actions)
    needed = [
        (lists.placement[n.stage - 1 if n.forward else n.stage + 1], rank, n)
        for rank, row in enumerate(lists.actions)
        for action in row
        if (n := lists.needs(action)) is not None
    ]
    between = sorted((a, b, n) for a, b, n in needed if a != b)
    assert between == sorted((*channel, lists.gives(a)) for channel, actions in order.items() for a in actions)
    assert all(n == 1 for n in sent.values())
    for (source, _), actions in order.items():
        at = [lists.actions[source].index(action) for action in actions]
        assert at == sorted(at)


@settings(max_examples=40)
@given(programs(), st.randoms(use_true_random=False))
def test_no_order_of_running_holds_more_than_is_told(lists: Program, rnd: random.Random) -> None:
    told = arrivals(lists)
    _, held = runs(lists, rnd)
    assert all(held[channel] <= told[channel].held for channel in told)
    for receiver in range(lists.ranks):
        _, held = runs(lists, rnd, last=receiver)
        for channel in told:
            if channel[1] == receiver:
                assert held[channel] == told[channel].held, "the slowest receiver holds as many as are told"


def test_messages_come_in_the_order_of_need_but_for_a_v() -> None:
    """Down one arm of the V go outputs, down the other gradients, on one channel: one of them may come before its turn."""
    for name in ("gpipe", "1f1b", "interleaved-1f1b", "looped-bfs", "interleaved-zb"):
        for ranks in (3, 4, 7):
            assert all(a.overtaken == 0 for a in arrivals(program(name, ranks, 16)).values()), name
    for name in ("zbv", "dualpipe-v"):
        overtaken = {c: a.overtaken for c, a in arrivals(program(name, 4, 16)).items()}
        assert set(overtaken.values()) == {0, 1}, overtaken


def test_messages_in_numbers() -> None:
    assert arrivals(program("gpipe", 2, 8)) == {(0, 1): (8, 0, 8), (1, 0): (8, 0, 8)}
    assert arrivals(program("1f1b", 2, 8)) == {(0, 1): (8, 0, 2), (1, 0): (8, 0, 2)}
    assert arrivals(program("zbv", 1, 8)) == {}, "a V turns on the last rank, and one rank sends nothing"


def runs(lists: Program, rnd: random.Random, last: int = -1) -> tuple[bool, Counter[tuple[int, int]]]:
    """In an order that chance decides, rank ``last`` only when no other can: does it end, and what did channels hold at most."""
    at = [0] * lists.ranks
    there: set[object] = set()
    held: Counter[tuple[int, int]] = Counter()
    most: Counter[tuple[int, int]] = Counter()
    done: set[Action] = set()

    def able(rank: int) -> bool:
        if at[rank] == len(lists.actions[rank]):
            return False
        action = lists.actions[rank][at[rank]]
        stage, kind, m = action
        inside = {"F": [], "B": ["F"], "I": ["F"], "W": ["I"]}[kind]
        return (lists.needs(action) is None or lists.needs(action) in there) and all(
            Action(stage, before, m) in done
            for before in inside  # type: ignore[arg-type]
        )

    while ready := [rank for rank in range(lists.ranks) if able(rank)]:
        rank = rnd.choice([r for r in ready if r != last] or [last])
        action = lists.actions[rank][at[rank]]
        at[rank] += 1
        done.add(action)
        if (needed := lists.needs(action)) is not None:
            held[lists.placement[needed.stage + (-1 if needed.forward else 1)], rank] -= 1
        if (given := lists.gives(action)) is not None:
            there.add(given)
            channel = rank, lists.placement[given.stage]
            held[channel] += 1
            most[channel] = max(most[channel], held[channel])
    return all(k == len(row) for k, row in zip(at, lists.actions)), most
