"""The clock: closed forms, lower bounds, work that is neither lost nor done twice, and a slower clock that comes to the same."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.pipelines.test_schedules import programs

from weft.cost import LinkSpeed
from weft.errors import ConfigError
from weft.pipelines.channels import channel_order, in_flight
from weft.pipelines.costs import Cost
from weft.pipelines.schedules import Action, Program, find, program
from weft.pipelines.simulate import FREE, peak_activations, simulate

links = st.builds(LinkSpeed, st.floats(0, 2), st.floats(0.2, 100) | st.just(math.inf))
randoms = st.randoms(use_true_random=False)


def any_costs(lists: Program, rnd: random.Random) -> list[Cost]:
    def one() -> Cost:
        return Cost(
            forward_s=rnd.uniform(0.1, 2),
            input_gradient_s=rnd.uniform(0.1, 2),
            weight_gradient_s=rnd.uniform(0, 2),
            output_bytes=rnd.choice([0, 1, 3]),
            activation_bytes=rnd.randrange(10),
        )

    return [one() for _ in range(lists.stages)]


def even_costs(v: int, output_bytes: float = 1.0) -> Cost:
    return Cost(
        forward_s=1 / v, input_gradient_s=1 / v, weight_gradient_s=1 / v, output_bytes=output_bytes, activation_bytes=1
    )


def seconds_of(action: Action, costs: list[Cost]) -> float:
    cost = costs[action.stage]
    return {
        "F": cost.forward_s,
        "I": cost.input_gradient_s,
        "W": cost.weight_gradient_s,
        "B": cost.input_gradient_s + cost.weight_gradient_s,
    }[action.kind]


@given(st.integers(1, 9), st.integers(1, 40), st.floats(0.01, 9), st.floats(0.01, 9), st.floats(0, 9))
def test_gpipe_and_1f1b_bubble_as_in_closed_form(ranks: int, microbatches: int, f: float, i: float, w: float) -> None:
    costs = [Cost(forward_s=f, input_gradient_s=i, weight_gradient_s=w)] * ranks
    for name in ("gpipe", "1f1b"):
        found = simulate(program(name, ranks, microbatches), costs)
        assert found.bubble == pytest.approx((ranks - 1) / (microbatches + ranks - 1))
        assert found.step_s == pytest.approx((microbatches + ranks - 1) * (f + i + w))


def test_bubbles_of_earlier_trials() -> None:
    """4 ranks, 16 microbatches, F = I = W: free links, and hops of 0.3 of a rank's forward. In percent."""
    free = {"gpipe": 15.8, "1f1b": 15.8, "looped-bfs": 8.6, "interleaved-1f1b": 8.6}
    free |= {"interleaved-zb": 3.0, "zbv": 3.0, "dualpipe-v": 3.0}
    hops = {"gpipe": 18.4, "1f1b": 26.6, "looped-bfs": 11.6, "interleaved-1f1b": 15.3}
    for name, percent in free.items():
        v = max(find(name).least_stages, 2 if name == "interleaved-zb" else 1)
        lists = program(name, 4, 16, v)
        assert 100 * simulate(lists, [even_costs(v)] * lists.stages).bubble == pytest.approx(percent, abs=0.05)
        if name in hops:
            for hop in (LinkSpeed(0.3, math.inf), LinkSpeed(0.0, 1 / 0.3)):
                bubble = simulate(lists, [even_costs(v)] * lists.stages, hop).bubble
                assert 100 * bubble == pytest.approx(hops[name], abs=0.05)


@given(programs(), randoms, links)
def test_a_step_takes_no_less_than_it_must_and_no_more_than_one_after_the_other(
    lists: Program, rnd: random.Random, link: LinkSpeed
) -> None:
    costs = any_costs(lists, rnd)
    found = simulate(lists, costs, link)
    work = [sum(seconds_of(a, costs) for a in row) for row in lists.actions]
    hops = sum(
        link.latency_s + costs[s].output_bytes / link.bytes_per_s
        for s in range(lists.stages - 1)
        if lists.ranks > 1 and lists.placement[s] != lists.placement[s + 1]
    )
    through = sum(c.forward_s + c.input_gradient_s for c in costs) + 2 * hops  # one microbatch, there and back
    travel = sum(link.latency_s + n / link.bytes_per_s for n in sent_bytes(lists, costs))
    assert found.step_s >= max(*work, through) * (1 - 1e-9)
    assert found.step_s <= (sum(work) + travel) * (1 + 1e-9)
    assert found.busy_s == pytest.approx(work)
    assert found.bubble == pytest.approx(1 - sum(work) / (lists.ranks * found.step_s))


def sent_bytes(lists: Program, costs: list[Cost]) -> list[float]:
    return [
        costs[a.stage if a.kind == "F" else a.stage - 1].output_bytes
        for sent in channel_order(lists).values()
        for a in sent
    ]


@given(programs(), randoms, links, st.sampled_from([1.0, 1.5, 2.0, math.inf]), st.sampled_from(["aside", "blocks"]))
def test_ranks_compute_their_lists_in_order_and_after_their_inputs(
    lists: Program, rnd: random.Random, link: LinkSpeed, cores: float, sending: Any
) -> None:
    costs = any_costs(lists, rnd)
    found = simulate(lists, costs, link, cores=cores, sending=sending)
    assert [[span.action for span in spans] for spans in found.timeline] == [list(row) for row in lists.actions]
    given_at = {lists.gives(span.action): span.end_s for spans in found.timeline for span in spans}
    for spans in found.timeline:
        end = 0.0
        for span in spans:
            assert span.start_s >= end - 1e-9
            end = span.end_s
            needed = lists.needs(span.action)
            if needed is not None:
                assert span.start_s >= given_at[needed] - 1e-9


@given(programs(), randoms, links)
def test_a_plain_clock_tells_the_same(lists: Program, rnd: random.Random, link: LinkSpeed) -> None:
    """Each end is that of what it waits for: repeated until nothing changes."""
    costs = any_costs(lists, rnd)
    ends: dict[Action, float] = {}
    arrived: dict[Any, float] = {}
    changed = True
    while changed:
        changed = False
        for row in lists.actions:
            clock = 0.0
            for action in row:
                needed = lists.needs(action)
                if needed is not None and needed not in arrived:
                    break
                start = max(clock, arrived[needed] if needed is not None else 0.0)
                clock = start + seconds_of(action, costs)
                changed |= ends.get(action) != clock
                ends[action] = clock
                if lists.sends(action) is None:
                    arrived[lists.gives(action)] = clock
        for sent in channel_order(lists).values():
            free = 0.0
            for action in sent:
                if action not in ends:
                    break
                source = action.stage if action.kind == "F" else action.stage - 1
                free = max(free, ends[action]) + costs[source].output_bytes / link.bytes_per_s
                arrived[lists.gives(action)] = free + link.latency_s
    found = simulate(lists, costs, link)
    for spans in found.timeline:
        for span in spans:
            assert span.end_s == pytest.approx(ends[span.action])


@given(programs(), randoms, links)
def test_slower_is_never_quicker(lists: Program, rnd: random.Random, link: LinkSpeed) -> None:
    costs = any_costs(lists, rnd)
    step_s = simulate(lists, costs, link).step_s
    worse = [
        simulate(lists, costs, LinkSpeed(link.latency_s + 0.1, link.bytes_per_s)),
        simulate(lists, costs, LinkSpeed(link.latency_s, link.bytes_per_s / 2)),
        simulate(lists, costs, link, sending="blocks"),
        simulate(lists, costs, link, cores=lists.ranks / 2),
        simulate(lists, costs, link, action_s=0.1),
    ]
    assert all(one.step_s >= step_s * (1 - 1e-9) for one in worse)
    assert simulate(lists, costs, link, cores=lists.ranks).step_s == pytest.approx(step_s)
    assert simulate(lists, costs, dict.fromkeys(channel_order(lists), link)).step_s == pytest.approx(step_s)


@given(programs(), randoms, st.sampled_from([1.0, 1.5, 2.0, 3.0]))
def test_shared_cores_do_all_the_work_and_never_idle_while_there_is_some(
    lists: Program, rnd: random.Random, cores: float
) -> None:
    """With free links some rank can always compute: one core is busy from beginning to end."""
    costs = any_costs(lists, rnd)
    work = sum(seconds_of(a, costs) for row in lists.actions for a in row)
    found = simulate(lists, costs, cores=cores)
    assert work / cores * (1 - 1e-9) <= found.step_s <= work * (1 + 1e-9)
    assert simulate(lists, costs, cores=1).step_s == pytest.approx(work)


def test_two_ranks_on_one_core_take_turns() -> None:
    """By hand, F = B = 1: rank 0 alone until 1; both at half speed until 3 (0F1, 1F0); rank 1 alone until 5; both until 7."""
    costs = [Cost(forward_s=1, input_gradient_s=0.5, weight_gradient_s=0.5)] * 2
    found = simulate(program("gpipe", 2, 2), costs, cores=1)
    assert [t for span in found.timeline[0] for t in span[:2]] == pytest.approx([0, 1, 1, 3, 5, 7, 7, 8])
    assert [t for span in found.timeline[1] for t in span[:2]] == pytest.approx([1, 3, 3, 4, 4, 5, 5, 7])
    assert found.bubbles == pytest.approx((1 - 6 / 8, 1 - 6 / 8)), "by the clock: waiting, not sharing"


def test_a_channel_carries_one_message_at_a_time_and_a_copying_sender_computes_later() -> None:
    """By hand: F 1 s, messages 3 s and 10 s of latency. They leave at 1 and 4; or the second F begins when the first is copied."""
    costs = [Cost(forward_s=1, input_gradient_s=0, weight_gradient_s=0, output_bytes=3)] * 2
    link = LinkSpeed(10.0, 1.0)
    aside = simulate(program("gpipe", 2, 2), costs, link).timeline
    assert [s.start_s for s in aside[0][:2]] == [0, 1]
    assert [s.start_s for s in aside[1][:2]] == [14, 17]
    blocks = simulate(program("gpipe", 2, 2), costs, link, sending="blocks").timeline
    assert [s.start_s for s in blocks[0][:2]] == [0, 4]
    assert [s.start_s for s in blocks[1][:2]] == [14, 18]


@given(programs(), randoms)
def test_memory_and_bytes_are_counted(lists: Program, rnd: random.Random) -> None:
    costs = any_costs(lists, rnd)
    found = simulate(lists, costs)
    assert found.messages == sum(map(len, channel_order(lists).values()))
    assert found.bytes_sent == sum(sent_bytes(lists, costs))
    held = in_flight(lists)
    for rank in range(lists.ranks):
        stages = [s for s in range(lists.stages) if lists.placement[s] == rank]
        each = [held[s] * costs[s].activation_bytes for s in stages]
        assert max(each) <= found.activation_bytes[rank] <= sum(each)


def test_uneven_microbatches() -> None:
    costs = [even_costs(1)] * 3
    lists = program("gpipe", 3, 2)
    found = simulate(lists, costs, sizes=[1.0, 0.5])
    assert found.busy_s == pytest.approx((4.5,) * 3)
    assert found.activation_bytes == (1.5,) * 3
    assert found.bytes_sent == pytest.approx(4 * 1.5)
    assert peak_activations(program("1f1b", 3, 2), costs, [1.0, 0.5]) == (1.5, 1.5, 1.0)
    assert simulate(lists, costs, sizes=[2.0, 2.0]).step_s == pytest.approx(2 * simulate(lists, costs).step_s)


def test_refusals() -> None:
    lists, costs = program("gpipe", 2, 2), [even_costs(1)] * 2
    with pytest.raises(ConfigError, match="1 costs for 2 stages"):
        simulate(lists, costs[:1])
    with pytest.raises(ConfigError, match="give 2 positive numbers, one for each microbatch"):
        simulate(lists, costs, sizes=[1.0])
    with pytest.raises(ConfigError, match="cores=0"):
        simulate(lists, costs, cores=0)
    with pytest.raises(ConfigError, match="action_s=-1"):
        simulate(lists, costs, action_s=-1)
    with pytest.raises(ConfigError, match="no speed is given from rank 1 to 0, which gpipe uses"):
        simulate(lists, costs, {(0, 1): FREE})
    with pytest.raises(ConfigError, match="is no speed of a link"):
        simulate(lists, costs, LinkSpeed(0.0, 0.0))
    with pytest.raises(ConfigError, match="sending='asid'"):
        simulate(lists, costs, sending="asid")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="forward_s=nan is no cost"):
        Cost(forward_s=math.nan, input_gradient_s=0, weight_gradient_s=0)
    with pytest.raises(ConfigError, match="computes of microbatch 1 nothing"):
        simulate(
            replace(lists, actions=tuple(tuple(a for a in row if a.microbatch == 0) for row in lists.actions)), costs
        )
