"""Schedules by themselves: carried out on sets of ranks, in one process, every byte gets every rank's share exactly once."""

from __future__ import annotations

from collections import Counter, deque
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from weft import cost
from weft.comm.schedules import ALIGN, NOBODY, SCHEDULES, Step, broadcast_tree, bytes_sent, chunk_bounds


@given(st.integers(0, 10**12), st.integers(1, 300))
def test_chunks_cover_everything_once_and_stay_aligned(nbytes: int, world: int) -> None:
    bounds = chunk_bounds(nbytes, world)
    assert (len(bounds), bounds[0], bounds[-1]) == (world + 1, 0, nbytes)
    sizes = [hi - lo for lo, hi in pairwise(bounds)]
    assert min(sizes) >= 0
    assert max(sizes) < nbytes / world + ALIGN
    assert all(bound % ALIGN == 0 or bound == nbytes for bound in bounds)


def carry_out(algorithm: str, world: int, nbytes: int) -> list[list[Counter[int]]]:
    """What each rank holds in the end, a counter of ranks for each ALIGN bytes. Messages arrive in order; nobody is in step."""
    cells = -(-nbytes // ALIGN)
    held = [[Counter([rank]) for _ in range(cells)] for rank in range(world)]
    left = [deque(SCHEDULES[algorithm](rank, world, nbytes)) for rank in range(world)]
    sent = [False] * world
    mail: dict[tuple[int, int], deque[list[Counter[int]]]] = {}

    def part(span: tuple[int, int]) -> slice:
        assert span[0] % ALIGN == 0 or span == (nbytes, nbytes)
        return slice(-(-span[0] // ALIGN), -(-span[1] // ALIGN))

    def advance(rank: int, step: Step) -> bool:
        if step.to != NOBODY and not sent[rank]:
            mail.setdefault((rank, step.to), deque()).append(held[rank][part(step.gives)])
            sent[rank] = True
        if step.source != NOBODY:
            if not (letters := mail.get((step.source, rank))):
                return False
            came, mine = letters.popleft(), held[rank][part(step.takes)]
            assert len(came) == len(mine), "the sender gives what the receiver takes"
            held[rank][part(step.takes)] = [a + b for a, b in zip(mine, came)] if step.adds else came
        sent[rank] = False
        left[rank].popleft()
        return True

    while any(left):
        moved = [advance(rank, left[rank][0]) for rank in range(world) if left[rank]]
        assert any(moved), "all wait for each other"
    assert not any(mail.values()), "a message that nobody took"
    return held


@pytest.mark.parametrize("algorithm", SCHEDULES)
@pytest.mark.parametrize("world", range(1, 14))
def test_everybody_gets_everything_once(algorithm: str, world: int) -> None:
    for nbytes in (0, 1, ALIGN, world * ALIGN, 40 * ALIGN + 17):
        for cells in carry_out(algorithm, world, nbytes):
            assert all(cell == Counter(range(world)) for cell in cells), nbytes


@given(st.sampled_from(cost.COLLECTIVES), st.integers(2, 40), st.integers(0, 10**7))
def test_bytes_of_all_ranks_are_those_of_the_formula(algorithm: str, world: int, nbytes: int) -> None:
    exact = sum(bytes_sent(algorithm, rank, world, nbytes) for rank in range(world)) / world
    assert exact == pytest.approx(cost.message_all_reduce_bytes(algorithm, nbytes, world), abs=1)


@pytest.mark.parametrize(("algorithm", "steps"), [("ring", 14), ("halving", 6), ("tree", 3)])
def test_as_many_steps_as_the_papers_say(algorithm: str, steps: int) -> None:
    assert len(list(SCHEDULES[algorithm](3, 8, 1 << 20))) == steps


@given(st.integers(1, 70), st.data())
def test_a_broadcast_tree_reaches_all_in_few_steps(world: int, data: st.DataObject) -> None:
    root = data.draw(st.integers(0, world - 1))
    came = {root: 0}  # the step after which a rank has it; a rank sends to one child in each step
    waiting = deque([root])
    while waiting:
        rank = waiting.popleft()
        for number, child in enumerate(broadcast_tree(rank, world, root)[1], 1):
            assert child not in came
            assert broadcast_tree(child, world, root)[0] == rank
            came[child] = came[rank] + number
            waiting.append(child)
    assert sorted(came) == list(range(world))
    assert max(came.values()) <= (world - 1).bit_length()
