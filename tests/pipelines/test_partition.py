"""Cuts, against all cuts there are."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations, pairwise
from typing import Any

import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from weft.errors import ConfigError
from weft.pipelines.costs import Cost, total
from weft.pipelines.partition import Partition, partition
from weft.pipelines.schedules import place

NUMBERS = st.sampled_from([0.0, 1.0, 2.0, 3.0, 0.1, 7.5])
blocks_of = st.builds(
    Cost,
    forward_s=NUMBERS,
    input_gradient_s=NUMBERS,
    weight_gradient_s=st.sampled_from([0.5, 1.0]),
    output_bytes=st.sampled_from([1.0, 2.0, 5.0]),
    activation_bytes=st.sampled_from([0.0, 1.0, 4.0]),
    state_bytes=st.sampled_from([1.0, 2.0, 10.0]),
)


def even(n: int, **more: float) -> list[Cost]:
    return [Cost(forward_s=1, input_gradient_s=1, weight_gradient_s=1, **more)] * n


def all_cuts(blocks: Sequence[Cost], stages: int) -> list[list[range]]:
    ends = combinations(range(1, len(blocks)), stages - 1)
    return [[range(a, b) for a, b in pairwise((0, *inner, len(blocks)))] for inner in ends]


def measured(
    blocks: Sequence[Cost], cut: Sequence[range], ranks: Sequence[int], held: Sequence[int] = ()
) -> dict[str, Any]:
    stages = [total(blocks[k] for k in stage) for stage in cut]
    num_ranks = max(ranks) + 1
    by_rank = [[s for s in range(len(stages)) if ranks[s] == rank] for rank in range(num_ranks)]
    seconds = [sum(stages[s].seconds for s in own) for own in by_rank]
    rounds = [max(stages[own[k]].seconds for own in by_rank) for k in range(len(by_rank[0]))]
    is_v = len(ranks) == 2 * num_ranks and ranks[-1] == 0 and num_ranks > 1
    return {
        "pace": max(seconds) if is_v else sum(rounds),
        "rank": max(seconds),
        "stage": max(stage.seconds for stage in stages),
        "bytes": sum(2 * stages[s].output_bytes for s in range(len(stages) - 1) if ranks[s] != ranks[s + 1]),
        "memory": tuple(
            sum(stages[s].state_bytes + (held or [1] * len(stages))[s] * stages[s].activation_bytes for s in own)
            for own in by_rank
        ),
    }


def agree(blocks: Sequence[Cost], found: Partition, ranks: Sequence[int], held: Sequence[int] = ()) -> None:
    assert [k for stage in found.stages for k in stage] == list(range(len(blocks)))
    assert all(found.stages)
    seen = measured(blocks, found.stages, ranks, held)
    assert found.pace_s == pytest.approx(seen["pace"])
    assert found.slowest_rank_s == pytest.approx(seen["rank"])
    assert found.slowest_stage_s == pytest.approx(seen["stage"])
    assert found.cut_bytes == pytest.approx(seen["bytes"])
    assert found.memory_bytes == pytest.approx(seen["memory"])


@given(st.lists(blocks_of, min_size=1, max_size=9), st.data())
def test_one_stage_on_a_rank_is_as_quick_as_any_cut_then_sends_least_then_holds_least(
    blocks: list[Cost], data: st.DataObject
) -> None:
    stages = data.draw(st.integers(1, len(blocks)))
    held = data.draw(st.lists(st.integers(1, 4), min_size=stages, max_size=stages))
    found = partition(blocks, stages, in_flight=held)
    agree(blocks, found, range(stages), held)
    ways = [measured(blocks, cut, range(stages), held) for cut in all_cuts(blocks, stages)]
    best = min((round(w["rank"], 6), w["bytes"], max(w["memory"])) for w in ways)
    assert (round(found.slowest_rank_s, 6), found.cut_bytes, max(found.memory_bytes)) == pytest.approx(best)
    assert not found.moved


@given(st.lists(blocks_of, min_size=2, max_size=8), st.data(), st.floats(5, 60))
def test_one_stage_on_a_rank_within_memory_is_as_quick_as_any_that_fits(
    blocks: list[Cost], data: st.DataObject, allowed: float
) -> None:
    stages = data.draw(st.integers(1, len(blocks)))
    ways = [measured(blocks, cut, range(stages)) for cut in all_cuts(blocks, stages)]
    fit = [w for w in ways if max(w["memory"]) <= allowed]
    if not fit:
        least = min(max(w["memory"]) for w in ways)
        with pytest.raises(
            ConfigError, match=f"need {least:g} B of memory on the fullest rank, however they are cut, and"
        ):
            partition(blocks, stages, memory_bytes=allowed)
        return
    found = partition(blocks, stages, memory_bytes=allowed)
    agree(blocks, found, range(stages))
    assert found.slowest_rank_s == pytest.approx(min(w["rank"] for w in fit))
    assert max(found.memory_bytes) <= allowed


@settings(max_examples=60)
@given(
    st.lists(blocks_of, min_size=6, max_size=10),
    st.sampled_from([("looped", 2, 2), ("looped", 3, 2), ("looped", 2, 3), ("v", 2, 2), ("v", 3, 2), ("v", 1, 2)]),
)
def test_several_stages_on_a_rank_have_the_quickest_pace_if_microbatches_are_many(
    blocks: list[Cost], shape: tuple[Any, int, int]
) -> None:
    ranks = place(*shape)
    found = partition(blocks, ranks, microbatches=10**6)
    agree(blocks, found, ranks)
    ways = [measured(blocks, cut, ranks) for cut in all_cuts(blocks, len(ranks))]
    assert found.pace_s == pytest.approx(min(w["pace"] for w in ways), rel=1e-5)
    few = partition(blocks, ranks, microbatches=1)
    agree(blocks, few, ranks)
    for rated, m in ((found, 10**6), (few, 1)):
        step = [m * w["pace"] + (shape[1] - 1) * w["stage"] for w in ways]
        evenest = min((w["stage"], w["pace"]) for w in ways)
        ours = m * rated.pace_s + (shape[1] - 1) * rated.slowest_stage_s
        assert min(step) * (1 - 1e-9) <= ours <= (m * evenest[1] + (shape[1] - 1) * evenest[0]) * (1 + 1e-6)


@settings(max_examples=60)
@given(st.lists(blocks_of, min_size=4, max_size=8), st.sampled_from([("looped", 2, 2), ("v", 2, 2)]), st.floats(10, 60))
def test_several_stages_on_a_rank_within_memory(
    blocks: list[Cost], shape: tuple[Any, int, int], allowed: float
) -> None:
    """Moving cuts does not always find the quickest; what it finds fits, and is said to be moved."""
    ranks = place(*shape)
    fit = [w for cut in all_cuts(blocks, 4) if max((w := measured(blocks, cut, ranks))["memory"]) <= allowed]
    if not fit:
        with pytest.raises(ConfigError, match="as far as was tried"):
            partition(blocks, ranks, memory_bytes=allowed)
        return
    try:
        found = partition(blocks, ranks, memory_bytes=allowed)
    except ConfigError:
        event("missed")
        return
    agree(blocks, found, ranks)
    assert max(found.memory_bytes) <= allowed
    assert found.pace_s >= min(w["pace"] for w in fit) * (1 - 1e-9)
    if not found.moved:
        assert found == partition(blocks, ranks)


def test_a_head_that_costs_as_three_blocks() -> None:
    head = Cost(forward_s=3, input_gradient_s=3, weight_gradient_s=3)
    embedding = Cost(forward_s=0.1, input_gradient_s=0, weight_gradient_s=0.1)
    found = partition([embedding, *even(12), head], 4)
    assert [len(stage) for stage in found.stages] == [4, 4, 4, 2]
    assert found.slowest_rank_s == pytest.approx(12)
    on_v = partition([embedding, *even(12), head], place("v", 2, 2))
    assert on_v.slowest_rank_s == pytest.approx(24)
    assert on_v.slowest_stage_s == pytest.approx(12), "even stages, where that costs no pace"


def test_a_v_sends_nothing_where_it_turns() -> None:
    found = partition(even(8, output_bytes=5), place("v", 2, 2))
    assert found.cut_bytes == 2 * 2 * 5
    assert partition(even(8, output_bytes=5), place("looped", 2, 2)).cut_bytes == 3 * 2 * 5


def test_narrow_places_are_cut_first() -> None:
    wide, narrow = even(1, output_bytes=9)[0], even(1, output_bytes=1)[0]
    found = partition([wide, narrow, wide, wide, wide], 2)
    assert [len(stage) for stage in found.stages] == [2, 3]
    assert found.cut_bytes == 2


def test_refusals() -> None:
    with pytest.raises(
        ConfigError,
        match=r"3 parts .* cannot fill 4 stages: at most 3 ranks, or let the task give more, smaller blocks",
    ):
        partition(even(3), 4)
    with pytest.raises(
        ConfigError,
        match=r"7 parts .* cannot fill 12 stages \(3 on each of 4 ranks\): at most 2 ranks, or at most 1 on each rank, or let",
    ):
        partition(even(7), place("looped", 4, 3))
    with pytest.raises(ConfigError, match="every block costs 0 seconds"):
        partition([Cost(forward_s=0, input_gradient_s=0, weight_gradient_s=0)] * 4, 2)
    with pytest.raises(ConfigError, match="neither looped .* nor a V"):
        partition(even(8), [0, 0, 1, 1])
    with pytest.raises(ConfigError, match="neither looped"):
        partition(even(8), 0)
    with pytest.raises(ConfigError, match="in_flight has 1 numbers for 2 stages"):
        partition(even(8), 2, in_flight=[3])


def test_memory_goes_before_bytes() -> None:
    """The block in the middle takes no time: it may lie on either side, but for its memory."""
    one, light = {"input_gradient_s": 0, "weight_gradient_s": 0}, {"forward_s": 0, "input_gradient_s": 0}
    blocks = [
        Cost(forward_s=1, state_bytes=5, output_bytes=9, **one),
        Cost(weight_gradient_s=0, state_bytes=5, output_bytes=1, **light),
        Cost(forward_s=1, state_bytes=1, **one),
    ]
    assert partition(blocks, 2).stages == (range(2), range(2, 3))
    assert partition(blocks, 2, memory_bytes=8).stages == (range(1), range(1, 3))


@pytest.mark.parametrize("shape", [("looped", 2, 2), ("v", 2, 2)])
def test_cuts_are_moved_until_memory_suffices(shape: tuple[Any, int, int]) -> None:
    """The embedding's state makes rank 0 the fuller one; it gives a block away, and no more than that."""
    blocks = [*even(1, state_bytes=4), *even(7, state_bytes=1)]
    ranks = place(*shape)
    assert max(partition(blocks, ranks).memory_bytes) == 7
    found = partition(blocks, ranks, memory_bytes=6)
    assert found.moved
    assert found.memory_bytes == (6, 5)
    fit = [w for cut in all_cuts(blocks, 4) if max((w := measured(blocks, cut, ranks))["memory"]) <= 6]
    assert found.pace_s == min(w["pace"] for w in fit)
