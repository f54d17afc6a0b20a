"""Which schedule, and the sentence that says why."""

from __future__ import annotations

import re

import pytest

from weft.cost import LinkSpeed
from weft.errors import ConfigError
from weft.pipelines.choose import TIE, Ranked, best, rank_schedules, why
from weft.pipelines.costs import Cost
from weft.pipelines.schedules import SCHEDULES
from weft.pipelines.simulate import FREE

BLOCK = Cost(
    forward_s=0.01,
    input_gradient_s=0.01,
    weight_gradient_s=0.01,
    output_bytes=1e6,
    activation_bytes=20e6,
    state_bytes=100e6,
)
BLOCKS = [BLOCK] * 24
SLOW = LinkSpeed(1e-3, 12.5e6)


def names(ranked: list[Ranked]) -> set[str]:
    return {one.words for one in ranked}


def test_all_that_are_possible_are_there_sorted() -> None:
    ranked = rank_schedules(BLOCKS, 4, 16)
    assert len(ranked) == 2 + 3 + 3 + 4 + 2 == len(names(ranked))
    assert {one.schedule for one in ranked} == set(SCHEDULES)
    assert [one.step_s for one in ranked] == sorted(one.step_s for one in ranked)
    ten = rank_schedules(BLOCKS[:10], 4, 16)
    assert names(ten) == {one.words for one in ranked if one.stages_per_rank <= 2}, (
        "10 blocks fill two stages on each of 4 ranks"
    )
    assert names(rank_schedules(BLOCKS, 4, 16, schedules=["ZBVZeroBubble", "1f1b"])) == {"zbv", "1f1b"}
    assert names(rank_schedules(BLOCKS, 4, 16, stages_per_rank=[1])) == {
        "1f1b",
        "gpipe",
        "interleaved-zb with 1 stage a rank",
    }


def test_free_links_take_away_the_bubble_and_slow_ones_the_messages() -> None:
    quick, slow = best(rank_schedules(BLOCKS, 4, 12)), best(rank_schedules(BLOCKS, 4, 16, SLOW))
    assert quick.schedule.splits_backward
    assert quick.predicted.bubble < 0.05
    assert slow.words == "gpipe"
    assert slow.predicted.messages == 2 * 3 * 16


def test_what_does_not_fit_comes_last_and_is_not_taken() -> None:
    ranked = rank_schedules(BLOCKS, 4, 16, SLOW, memory_bytes=1.2e9)
    fits = [one.fits for one in ranked]
    assert fits == sorted(fits, reverse=True)
    assert {True, False} == set(fits)
    assert all((max(one.memory_bytes) <= 1.2e9) == one.fits for one in ranked)
    assert best(ranked).fits
    assert not next(one for one in ranked if one.words == "gpipe").fits, "6 blocks a rank, 16 microbatches: 2.5 GB"
    assert re.search(r"; gpipe would take .* s, and 2.52 GB of memory where 1.2 GB are allowed$", why(ranked))
    with pytest.raises(
        ConfigError,
        match=r"no schedule fits 700 MB on each rank. 1f1b comes nearest, with 1.08 GB where it is cut for speed: use",
    ):
        best(rank_schedules(BLOCKS, 4, 16, memory_bytes=7e8, schedules=["1f1b", "gpipe"]))


def test_memory_may_ask_for_another_cut() -> None:
    """1f1b holds 4 microbatches on rank 0 and one on rank 3, which can take blocks from it."""
    free = rank_schedules(BLOCKS, 4, 16, schedules=["1f1b"])[0]
    tight = rank_schedules(BLOCKS, 4, 16, schedules=["1f1b"], memory_bytes=1e9)[0]
    assert [len(stage) for stage in free.partition.stages] == [6, 6, 6, 6]
    assert tight.fits
    assert len(tight.partition.stages[0]) == 5
    assert tight.step_s > free.step_s


def test_of_equals_the_simpler_is_taken() -> None:
    """On one rank all schedules take the same time."""
    ranked = rank_schedules(BLOCKS, 1, 16)
    assert len({round(one.step_s, 9) for one in ranked}) == 1
    assert best(ranked).words == "1f1b"
    ranked = rank_schedules(BLOCKS, 4, 64)
    taken = best(ranked)
    assert taken.step_s <= ranked[0].step_s * (1 + TIE)
    assert all(one.simplicity > taken.simplicity for one in ranked if one.step_s < taken.step_s)
    assert any(one.step_s < taken.step_s for one in ranked), "the case is there"
    assert "is less than 5 % quicker and less simple" in why(ranked)


def test_the_sentence() -> None:
    assert why(rank_schedules(BLOCKS, 4, 16, schedules=["1f1b"])) == "1f1b: step 3.42 s, bubble 16 %"
    assert (
        why(rank_schedules(BLOCKS, 4, 16, schedules=["1f1b", "looped-bfs", "zbv"], stages_per_rank=[1, 2]))
        == "zbv: step 2.97 s, bubble 3 %; looped-bfs with 2 stages a rank 3.15 s, bubble 8.6 %, 1.2x the messages; "
        "1f1b 3.42 s, bubble 16 %, 0.5x the messages"
    )
    assert why(rank_schedules(BLOCKS, 4, 16, SLOW, schedules=["1f1b", "gpipe"])).startswith("gpipe: step ")


def test_few_cores_even_out_what_schedules_gain() -> None:
    """Four ranks on one core: nobody waits for long, whatever the order."""
    ranked = rank_schedules(BLOCKS, 4, 16, FREE, cores=1)
    assert {round(one.step_s, 6) for one in ranked} == {round(24 * 16 * 0.03, 6)}
    assert best(ranked).words == "1f1b"


def test_starting_an_action_costs_those_most_that_cut_most() -> None:
    taken = best(rank_schedules(BLOCKS, 4, 16, action_s=0.02))
    assert taken.stages_per_rank == 1


def test_refusals() -> None:
    with pytest.raises(ConfigError, match="3 parts .* cannot fill 4 stages: at most 3 ranks"):
        rank_schedules(BLOCKS[:3], 4, 16)
    with pytest.raises(ConfigError, match=r"7 parts .* cannot fill 8 stages \(2 on each of 4 ranks\): at most 3 ranks"):
        rank_schedules(BLOCKS[:7], 4, 16, schedules=["zbv"])
    with pytest.raises(ConfigError, match="zbv takes 2 stages on each rank, and 3 is asked for"):
        rank_schedules(BLOCKS, 4, 16, schedules=["zbv"], stages_per_rank=[3])
    with pytest.raises(ConfigError, match="unknown schedule 'pipedream'"):
        rank_schedules(BLOCKS, 4, 16, schedules=["pipedream"])
