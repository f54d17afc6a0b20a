"""Seconds of a step by its parts, and the note where fewer workers are quicker: by hand, from facts that are told."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from tests.patterns.predicted import MB, NUM_BLOCKS, facts_of

from weft import AllReduce
from weft.clusters.base import LinkSpec
from weft.config import Config, TaskRef
from weft.cost import UNMEASURED, LinkSpeed, all_gather_bytes, all_reduce_bytes, reduce_scatter_bytes
from weft.driver.prepare import make_plan
from weft.patterns.base import Facts, Pattern, tail_numel
from weft.patterns.mesh import Mesh
from weft.patterns.pipeline import Pipeline
from weft.patterns.pipelined import Known, Pipelined, pair_name, pairs_of
from weft.patterns.sharded import Sharded
from weft.patterns.split import SplitPattern
from weft.patterns.tensor import Tensor
from weft.pipelines.choose import best, rank_schedules
from weft.plan import StepPlan

SPEED = LinkSpeed(1e-3, 1e8)
WHOLE = NUM_BLOCKS * 10 * MB  # of the parameters
SNAIL = LinkSpeed(0.1, 1e6)  # nothing that travels over it pays
GB = 1 << 30


def on_link(speed: LinkSpeed, **known: Any) -> Facts:
    """Of which all links were measured."""
    facts = facts_of(speed=speed, **known)
    if facts.pipeline is None:
        return facts
    return msgspec.structs.replace(facts, pipeline=msgspec.structs.replace(facts.pipeline, speeds={"0-1": speed}))


def ring(nbytes: int, world: int) -> int:
    return all_reduce_bytes("shm", nbytes, world)


def config_of(pattern: Pattern, workers: int) -> Config:
    return Config(task=TaskRef("none"), pattern=pattern.name, workers=workers, batch=24, steps=20)


def predicted(pattern: Pattern, workers: int, facts: Facts) -> StepPlan:
    step = pattern.predict(facts, config_of(pattern, workers), ring, "shm")
    assert step is not None
    assert step.whole_s == sum(step.seconds.values())
    return step


def takes_s(exchanges: int, nbytes: float, speed: LinkSpeed = SPEED) -> float:
    return exchanges * speed.latency_s + nbytes / speed.bytes_per_s


def told_s(workers: int) -> float:
    """What all must agree on, once a step."""
    return takes_s(1, ring(8 * tail_numel(workers, NUM_BLOCKS), workers))


# -- each part


def test_tensor_is_a_part_of_the_computing_and_its_exchanges() -> None:
    facts = facts_of(tensor=2, speed=SPEED)
    step = predicted(Tensor(), 2, facts)
    assert step.seconds == pytest.approx(
        {
            "computing": 0.8,
            "optimizer": 0.05,
            "exchanging": takes_s(2 * NUM_BLOCKS, ring(8 * MB, 2)) + told_s(2),
        }
    )
    assert step.link == "link 800 Mbit/s measured"
    assert predicted(Tensor(), 2, facts_of(tensor=2)).link == "link 16 Gbit/s assumed"


def test_sharded_gathers_twice_and_scatters_once() -> None:
    gathered, reduced = all_gather_bytes("shm", 2 * WHOLE // 4, 4), reduce_scatter_bytes("shm", WHOLE, 4, ring)
    step = predicted(Sharded(), 4, facts_of(speed=SPEED))
    exchanging = takes_s(3 * NUM_BLOCKS + 2, gathered + reduced) + told_s(4)
    assert step.seconds == pytest.approx({"computing": 1.6, "optimizer": 0.025, "exchanging": exchanging})


def test_copies_exchange_their_part() -> None:
    step = predicted(Mesh(data=2, tensor=2), 4, facts_of(tensor=2, speed=SPEED))
    exchanging = takes_s(2 * NUM_BLOCKS, ring(8 * MB, 2)) + told_s(4) + takes_s(1, ring(WHOLE // 2, 2))
    assert step.seconds == pytest.approx({"computing": 0.8, "optimizer": 0.05, "exchanging": exchanging})


def test_of_stages_each_copy_exchanges_its_own() -> None:
    facts = facts_of(microbatches=8, speed=SPEED)
    step = predicted(Mesh(data=2, pipeline=2), 4, facts)
    flow = best(
        rank_schedules(Known(facts, Pipelined()).costs, 2, 8, UNMEASURED, stages_per_rank=(1, 2), cores=4.0)
    ).predicted
    assert step.seconds == pytest.approx(
        {
            "computing": max(flow.busy_s),
            "waiting for stages": flow.step_s - max(flow.busy_s),
            "optimizer": 0.05,
            "exchanging": told_s(4) + takes_s(1, ring(WHOLE // 2, 2)),
        }
    )


def test_workers_that_share_cores_take_longer() -> None:
    alone = predicted(Sharded(), 4, facts_of(cores=4.0)).seconds
    shared = predicted(Sharded(), 4, facts_of(cores=1.0)).seconds
    for part, times in (("computing", 4), ("optimizer", 4), ("exchanging", 1)):
        assert shared[part] == pytest.approx(times * alone[part])
    apart = predicted(Sharded(), 4, facts_of(cores=1.0, per_host=1, between_hosts=True)).seconds
    assert apart["computing"] == pytest.approx(alone["computing"])


def test_tensor_within_hosts_does_not_go_by_the_link_between_them() -> None:
    """Ranks of a host are consecutive, and tensor is the innermost axis."""
    inside = predicted(Mesh(data=2, tensor=2), 4, facts_of(tensor=2, between_hosts=True, per_host=2, speed=SPEED))
    across = predicted(Mesh(data=2, tensor=2), 4, facts_of(tensor=2, between_hosts=True, per_host=1, speed=SPEED))
    saved = takes_s(2 * NUM_BLOCKS, ring(8 * MB, 2)) - takes_s(2 * NUM_BLOCKS, ring(8 * MB, 2), UNMEASURED)
    assert across.seconds["exchanging"] - inside.seconds["exchanging"] == pytest.approx(saved)


@pytest.mark.parametrize("pattern", [Tensor(), Mesh(data=2, tensor=2)])
def test_tensor_across_hosts_is_said_in_the_plan(pattern: SplitPattern) -> None:
    workers = pattern.layout(2 if pattern.name == "tensor" else 4).world
    config = config_of(pattern, workers)
    across = facts_of(tensor=2, between_hosts=True, per_host=1)
    assert any("tensor=2 goes across hosts (workers 0 and 1" in note for note in pattern.notes(across, config))
    inside = facts_of(tensor=2, between_hosts=True, per_host=2)
    assert not any("across" in note for note in pattern.notes(inside, config))


def test_who_was_not_measured_predicts_nothing() -> None:
    facts = facts_of(step_s=0.0)
    assert Sharded().predict(facts, config_of(Sharded(), 2), ring, "shm") is None
    assert AllReduce().predict(facts_of(), config_of(AllReduce(), 2), ring, "shm") is None


# -- fewer workers

LAYOUTS: list[tuple[SplitPattern, int, dict[str, Any]]] = [
    (Sharded(), 2, {}),
    (Tensor(), 2, {"tensor": 2}),
    (Pipeline(), 2, {"microbatches": 8}),
    (Mesh(data=2, tensor=2), 4, {"tensor": 2}),
    (Mesh(data=2, pipeline=2), 4, {"microbatches": 8}),
    (Mesh(tensor=2, pipeline=2), 4, {"tensor": 2, "microbatches": 8}),
    (Sharded(replicas=2), 4, {}),
]
each_layout = pytest.mark.parametrize(("pattern", "workers", "known"), LAYOUTS, ids=lambda value: str(value))


@each_layout
def test_a_slow_link_makes_fewer_workers_quicker_and_the_plan_says_so(
    pattern: SplitPattern, workers: int, known: dict[str, Any]
) -> None:
    facts = on_link(SNAIL, **known)
    step = predicted(pattern, workers, facts)
    joined_s = pattern.shares(workers) * 1.6 + 0.1  # one worker computes all shares
    assert step.advice.startswith(f"predicted {step.whole_s:.3g} s a step; one worker alone takes {joined_s:.3g} s")
    assert step.advice.endswith("for speed use --pattern allreduce --workers 1")
    plan = make_plan(
        facts=facts,
        config=config_of(pattern, workers),
        pattern=pattern,
        specs=[LinkSpec("shm", workers, 60.0)],
        total_steps=20,
        save_every=0,
        why="auto",
    )
    assert plan.notes[0] == step.advice
    assert plan.step == step


@each_layout
def test_it_says_nothing_where_memory_forces_the_split(
    pattern: SplitPattern, workers: int, known: dict[str, Any]
) -> None:
    """Parameters, gradients and the optimizer of one worker alone take 320 MB, whatever the batch is cut into."""
    facts = on_link(SNAIL, memory_left=310 * MB, per_host=1, between_hosts=True, **known)
    assert "one worker alone" not in predicted(pattern, workers, facts).advice
    roomy = msgspec.structs.replace(facts, memory_left=4 * GB)
    assert "one worker alone" in predicted(pattern, workers, roomy).advice


@each_layout
def test_on_a_quick_link_there_is_nothing_to_say(pattern: SplitPattern, workers: int, known: dict[str, Any]) -> None:
    assert predicted(pattern, workers, facts_of(**known)).advice == ""


@pytest.mark.parametrize("pattern", [Sharded(), Sharded(accumulate=4)])
def test_alone_it_may_have_to_take_the_batch_in_pieces(pattern: SplitPattern) -> None:
    """320 MB of state, 320 MB of activations of both shares, 420 MB of memory: four pieces of 80 MB."""
    facts = facts_of(speed=SNAIL, memory_left=420 * MB)
    advice = predicted(pattern, 2, facts).advice
    assert "fits into the memory of a host (419 MB of 440 MB)" in advice
    assert "--pattern allreduce --workers 1 -o accumulate=4" in advice


def test_tensor_alone_takes_the_activations_of_the_whole() -> None:
    """Not those of a part: 320 + 160 MB do not go into 450."""
    facts = facts_of(speed=SNAIL, tensor=2, memory_left=450 * MB)
    assert "-o accumulate=2" in predicted(Tensor(), 2, facts).advice


def test_half_of_them_may_be_enough() -> None:
    """Where all of them would share the cores that are enough for two."""
    facts = facts_of(tensor=4, speed=SPEED, cores=2.0)
    step = predicted(Tensor(), 4, facts)
    halves = 0.8 + 0.05 + takes_s(2 * NUM_BLOCKS, ring(8 * MB, 2)) + told_s(2)
    assert f"a half of them (tensor=2) takes {1000 * halves:.3g} ms" in step.advice
    assert "for speed use --workers 2" in step.advice


def test_a_half_of_a_pipeline_goes_by_the_slowest_link_where_its_own_was_not_measured() -> None:
    """Of eight in a row the ends talk; of four others are the ends."""
    speeds = dict.fromkeys((pair_name(a, b) for a, b in pairs_of(8)), SNAIL)
    facts = facts_of(speed=SNAIL, microbatches=8)
    assert facts.pipeline is not None
    facts = msgspec.structs.replace(facts, pipeline=msgspec.structs.replace(facts.pipeline, speeds=speeds))
    assert "one worker alone" in predicted(Pipeline(), 8, facts).advice


def test_as_many_copies_may_be_quickest() -> None:
    facts = facts_of(tensor=2, speed=LinkSpeed(0.08, 1e9))
    advice = predicted(Tensor(), 2, facts).advice
    copies = 0.8 + 0.1 + takes_s(2, ring(WHOLE, 2) + ring(8 * tail_numel(2, NUM_BLOCKS), 2), LinkSpeed(0.08, 1e9))
    assert advice.endswith(f"or --pattern allreduce --workers 2 ({copies:.3g} s)")
    tight = msgspec.structs.replace(facts, memory_left=500 * MB)  # enough for one of them
    assert "workers 2" not in predicted(Tensor(), 2, tight).advice


def test_one_worker_gets_no_advice() -> None:
    assert predicted(Sharded(), 1, facts_of(speed=SNAIL)).advice == ""
