"""Programs: they run, each action is there once, and they hold and bubble as their papers say."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from weft.errors import ConfigError, UnknownName
from weft.pipelines.channels import in_flight, validate
from weft.pipelines.costs import Cost
from weft.pipelines.schedules import SCHEDULES, Program, Schedule, find, names, place, program
from weft.pipelines.simulate import simulate


def programs() -> st.SearchStrategy[Program]:
    def of(schedule: Schedule) -> st.SearchStrategy[Program]:
        most = schedule.most_stages or 3
        return st.builds(
            program, st.just(schedule), st.integers(1, 5), st.integers(1, 12), st.integers(schedule.least_stages, most)
        )

    return st.sampled_from(SCHEDULES).flatmap(of)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: s.name)
def test_every_program_runs(schedule: Schedule) -> None:
    for ranks in (1, 2, 3, 4, 5, 8, 11):
        for microbatches in (*range(1, 10), 12, 13, 17, 24, 31):
            for v in filter(schedule.takes, (1, 2, 3)):
                validate(program(schedule, ranks, microbatches, v))


@given(programs())
def test_the_backward_is_split_only_where_the_table_says_so(lists: Program) -> None:
    kinds = {action.kind for row in lists.actions for action in row}
    assert kinds <= ({"F", "B", "I", "W"} if find(lists.schedule).splits_backward else {"F", "B"})


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("rounds", [2, 3, 5])
def test_bubbles_are_those_of_the_papers(ranks: int, rounds: int) -> None:
    """In seconds that a step takes beyond computing; a rank's F, I and W take 1 each."""
    expected = {
        "gpipe": lambda v: 3 * (ranks - 1),
        "1f1b": lambda v: 3 * (ranks - 1),
        "interleaved-1f1b": lambda v: 3 * (ranks - 1) / v,
        "looped-bfs": lambda v: 3 * (ranks - 1) / v,
        "interleaved-zb": lambda v: (ranks - 1) / v,
        "zbv": lambda v: (ranks - 1) / v,
        "dualpipe-v": lambda v: (ranks - 1) / v,
    }
    microbatches = rounds * ranks
    for schedule in SCHEDULES:
        for v in filter(schedule.takes, (1, 2, 3)):
            one = Cost(forward_s=1 / v, input_gradient_s=1 / v, weight_gradient_s=1 / v)
            step_s = simulate(program(schedule, ranks, microbatches, v), [one] * (ranks * v)).step_s
            assert step_s - 3 * microbatches == pytest.approx(expected[schedule.name](v)), (schedule.name, v)


@given(st.integers(1, 8), st.integers(1, 30))
def test_what_stages_hold(ranks: int, microbatches: int) -> None:
    assert in_flight(program("gpipe", ranks, microbatches)) == (microbatches,) * ranks
    assert in_flight(program("1f1b", ranks, microbatches)) == tuple(
        min(ranks - rank, microbatches) for rank in range(ranks)
    )
    for name in ("zbv", "dualpipe-v"):
        held = in_flight(program(name, ranks, microbatches))
        by_rank = [held[rank] + held[2 * ranks - 1 - rank] for rank in range(ranks)]
        assert max(by_rank) <= 2 * ranks + 1, "halves of stages: about as many whole ones as 1f1b's first rank"


def test_placement() -> None:
    assert place("looped", 3, 2) == (0, 1, 2, 0, 1, 2)
    assert place("v", 3, 2) == (0, 1, 2, 2, 1, 0)
    assert program("zbv", 3, 6).placement == (0, 1, 2, 2, 1, 0)


def test_a_program_reads_as_in_the_paper() -> None:
    rows = [" ".join(map(str, row)) for row in program("1f1b", 3, 4).actions]
    assert rows == [
        "0F0 0F1 0F2 0B0 0F3 0B1 0B2 0B3",
        "1F0 1F1 1B0 1F2 1B1 1F3 1B2 1B3",
        "2F0 2B0 2F1 2B1 2F2 2B2 2F3 2B3",
    ]


def test_names_are_ours_or_those_of_torch() -> None:
    assert len(set(names())) == len(SCHEDULES) == 7
    assert [find(s.torch_name) for s in SCHEDULES] == [find(s.name.upper()) for s in SCHEDULES] == list(SCHEDULES)
    with pytest.raises(UnknownName, match="unknown schedule 'zvb'.*Did you mean 'zbv'"):
        find("zvb")


def test_from_how_many_microbatches_on_it_is_full() -> None:
    assert {s.name: s.fills_from(4) for s in SCHEDULES} == {
        "1f1b": 4,
        "gpipe": 4,
        "interleaved-1f1b": 4,
        "looped-bfs": 4,
        "interleaved-zb": 4,
        "zbv": 7,
        "dualpipe-v": 8,
    }


def test_refusals() -> None:
    with pytest.raises(
        ConfigError, match="zbv takes 2 stages on each rank, not 3: ask for that, or choose interl.* or interleaved-zb"
    ):
        program("zbv", 2, 4, 3)
    with pytest.raises(ConfigError, match="1f1b takes 1 stage on each rank, not 2"):
        program("1f1b", 2, 4, 2)
    with pytest.raises(ConfigError, match="looped-bfs takes 2 or more stages on each rank, not 1"):
        program("looped-bfs", 2, 4, 1)
    with pytest.raises(ConfigError, match="needs a rank and a microbatch, not 2 and 0"):
        program("gpipe", 2, 0)
    with pytest.raises(ConfigError, match="placement v needs 2 stages"):
        place("v", 2, 3)
