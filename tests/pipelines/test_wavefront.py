"""Programs of time chunks: they run, each stage goes through time and back, and take as long as the closed form and the bound say."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from weft.errors import ConfigError
from weft.pipelines.bound import sequential_s
from weft.pipelines.channels import arrivals, in_flight, validate
from weft.pipelines.choose import rank_schedules
from weft.pipelines.costs import Cost, by_chunk
from weft.pipelines.schedules import SCHEDULES, Action, program
from weft.pipelines.simulate import peak_activations, simulate

WHOLE = [schedule for schedule in SCHEDULES if not schedule.splits_backward]
ONE = Cost(forward_s=1.0, input_gradient_s=1.0, weight_gradient_s=1.0, output_bytes=8, activation_bytes=8)


@given(st.sampled_from(WHOLE), st.integers(1, 5), st.integers(1, 6), st.integers(1, 5), st.integers(1, 3))
def test_all_run_and_go_through_time_and_back(schedule, ranks: int, microbatches: int, chunks: int, v: int) -> None:
    if not schedule.takes(v):
        v = schedule.least_stages
    lists = program(schedule, ranks, microbatches, v, chunks)
    validate(lists)
    for stage in range(lists.stages):
        for m in range(microbatches):
            mine = [a for row in lists.actions for a in row if a.stage == stage and a.microbatch // chunks == m]
            times = [(a.kind, a.microbatch % chunks) for a in mine]
            assert times == [*(("F", t) for t in range(chunks)), *(("B", t) for t in reversed(range(chunks)))]
    whole = program(schedule, ranks, microbatches, v)
    assert in_flight(lists) == tuple(chunks * held for held in in_flight(whole))
    assert {c: a.messages for c, a in arrivals(lists).items()} == {
        c: chunks * a.messages for c, a in arrivals(whole).items()
    }
    costs = [ONE] * lists.stages
    assert peak_activations(lists, costs) == pytest.approx(peak_activations(whole, costs))


def test_a_chunk_before_its_state_is_no_program() -> None:
    lists = program("1f1b", 2, 1, chunks=2)
    row = lists.actions[0]
    for at, says in ((0, "0F1, before 0F0, whose state"), (2, "0B0, before 0B1, from which the gradient")):
        turned = [*row[:at], row[at + 1], row[at], *row[at + 2 :]]
        with pytest.raises(ConfigError, match=says):
            validate(replace(lists, actions=(tuple(turned), lists.actions[1])))
    assert row[0] == Action(0, "F", 0)


@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 6))
def test_steps_as_in_closed_form(ranks: int, microbatches: int, chunks: int) -> None:
    """As with so many more microbatches: ranks - 1 pieces are waited for at each end."""
    for name in ("gpipe", "1f1b"):
        found = simulate(program(name, ranks, microbatches, chunks=chunks), [ONE] * ranks)
        pieces = microbatches * chunks
        at_least = 3 * (pieces + ranks - 1) / chunks
        assert found.step_s >= at_least - 1e-9
        if name == "gpipe" and microbatches == 1:
            assert found.step_s == pytest.approx(at_least)


@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 4))
def test_the_bound_of_alike_chunks_and_blocks(blocks: int, chunks: int, microbatches: int) -> None:
    costs = by_chunk([ONE] * blocks, [[1 / chunks] * chunks] * blocks)
    assert sequential_s(costs, microbatches) == pytest.approx(3 * (microbatches * chunks + blocks - 1) / chunks)


@given(
    st.lists(st.tuples(st.floats(0, 3), st.floats(0, 3)), min_size=1, max_size=5),
    st.integers(1, 4),
    st.integers(1, 4),
    st.randoms(),
)
def test_no_program_is_quicker_than_the_bound(times, microbatches: int, chunks: int, rnd) -> None:
    blocks = [Cost(forward_s=f, input_gradient_s=b, weight_gradient_s=0.1) for f, b in times]
    shares = []
    for _ in blocks:
        parts = [rnd.uniform(0, 1) + 0.01 for _ in range(chunks)]
        shares.append([part / sum(parts) for part in parts])
    costs = by_chunk(blocks, shares)
    for name in ("gpipe", "1f1b"):
        found = simulate(program(name, len(blocks), microbatches, chunks=chunks), costs)
        assert found.step_s >= sequential_s(costs, microbatches) - 1e-9


def test_the_choice_knows_of_chunks() -> None:
    """One micro-batch of four layers: only chunks let them work at once; none that splits the backward is among the schedules."""
    whole = rank_schedules([ONE] * 4, 2, 1, schedules=["1f1b"])
    found = rank_schedules([ONE] * 4, 2, 1, shares=[[0.25] * 4] * 4)
    assert found[0].step_s < 0.7 * whole[0].step_s
    assert not any(one.schedule.splits_backward for one in found)
    with pytest.raises(ConfigError, match="costs of 2 time chunks for 3"):
        simulate(program("1f1b", 2, 1, chunks=3), [[ONE] * 2] * 2)
