"""Which pipeline a run takes: by its link, within its memory, settled once. Pure: links and seconds are told."""

from __future__ import annotations

import importlib
from typing import Any

import msgspec
import pytest
from tests.patterns.predicted import MB, NUM_BLOCKS, facts_of

from weft.clusters.base import LinkSpec
from weft.config import Config, TaskRef
from weft.cost import GIGABIT, UNMEASURED, LinkSpeed
from weft.driver.probe import Found, Order, Resolved, alike, resolve
from weft.patterns import registry
from weft.patterns.base import Facts
from weft.patterns.mesh import Mesh
from weft.patterns.pipeline import Pipeline
from weft.patterns.pipelined import Known, Pipelined, choose
from weft.payoff import LinkRow
from weft.pipelines.choose import best, rank_schedules
from weft.report.observers import Silent
from weft.testing import throttle

QUICK, SLOW = LinkSpeed(10e-6, 1e10), LinkSpeed(0.2, 1e5)
SCHEDULES = {QUICK: "interleaved-1f1b", SLOW: "1f1b"}  # of two workers, by the simulator


class Hosts:
    """Of a session, all that is asked of it here."""

    def __init__(self, *hosts: tuple[int, ...]) -> None:
        self.hosts = hosts


class Measuring:
    """Stands for throw-away members; ``speeds``: of each pair, else ``speed``."""

    def __init__(self, speed: LinkSpeed, speeds: dict[tuple[int, int], LinkSpeed] | None = None) -> None:
        self.speed, self.speeds, self.orders = speed, speeds or {}, list[Order]()

    def __call__(self, order: Order, *_: Any) -> Found:
        self.orders.append(order)
        each = [(list(pair), self.speeds.get(pair, self.speed)) for pair in order.pairs]
        each.append((list(range(order.config.workers)), self.speed))
        return Found([LinkRow(members=m, latency_s=s.latency_s, bytes_per_s=s.bytes_per_s) for m, s in each], [])


def config_of(workers: int, pattern: str = "pipeline", **options: Any) -> Config:
    slow = [throttle(rank, 400_000).to_dict() for rank in range(workers)]  # a link that may be anything
    return Config(
        task=TaskRef("none"), pattern=pattern, pattern_options=options, workers=workers, batch=24, faults=slow
    )


def resolved(
    monkeypatch: pytest.MonkeyPatch, config: Config, facts: Facts, measuring: Measuring, *, carrier: str = "tcp"
) -> Resolved:
    monkeypatch.setattr(importlib.import_module("weft.driver.probe"), "measure", measuring)
    pattern = registry.build(config.pattern, config.pattern_options)
    link = LinkSpec(carrier, config.workers, 60.0)
    return resolve(config, facts, pattern, link, Hosts(), Silent())  # type: ignore[arg-type]


def taken(found: Resolved) -> tuple[str, tuple[range, ...]]:
    """By what driver and workers ask."""
    assert isinstance(found.pattern, Pipeline | Mesh)
    chosen = found.pattern.chosen(found.facts, found.config.workers)
    assert chosen is not None
    return chosen.program.schedule, chosen.stages


# -- by the link


def test_it_is_measured_only_where_the_choice_depends_on_it() -> None:
    facts = facts_of(microbatches=8)
    near, far = msgspec.structs.replace(config_of(2), faults=[]), config_of(2)
    assert Pipeline().neighbours(facts, near) == {}
    assert Pipeline().neighbours(facts, far) == {"0-1": [(0, 1)]}
    assert Pipeline().neighbours(msgspec.structs.replace(facts, between_hosts=True), near) == {"0-1": [(0, 1)]}
    assert Pipeline(schedule="1f1b").neighbours(facts, far) == {}, "there is nothing to choose"
    copies = Mesh(data=2, pipeline=2).neighbours(facts, config_of(4))
    assert copies == {"0-1": [(0, 1), (2, 3)]}
    assert Pipeline().neighbours(facts_of(microbatches=3), config_of(3)).keys() == {"0-1", "1-2", "0-2"}


@pytest.mark.parametrize("speed", SCHEDULES)
def test_the_schedule_is_the_best_for_the_link_that_was_measured(
    monkeypatch: pytest.MonkeyPatch, speed: LinkSpeed
) -> None:
    facts, measuring = facts_of(microbatches=8), Measuring(speed)
    found = resolved(monkeypatch, config_of(2), facts, measuring)
    assert len(measuring.orders) == 1
    assert taken(found)[0] == SCHEDULES[speed]
    truth = best(rank_schedules(Known(facts, Pipelined()).costs, 2, 8, speed, stages_per_rank=(1, 2), cores=8.0 / 2))
    assert taken(found) == (truth.schedule.name, truth.partition.stages)
    assert found.config.measured is not None
    assert found.config.measured.neighbours == {"0-1": speed}
    assert found.news == msgspec.to_builtins(found.config.measured) | {"ways": []}
    assert "measured" in found.pattern.choices(found.facts, found.config, "tcp")["schedule"]


def test_the_slowest_of_the_links_between_two_places_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies of a pipeline go step by step together."""
    config = config_of(4, "mesh", data=2, pipeline=2)
    apart = Hosts((0,), (1,), (2,), (3,))
    measuring = Measuring(QUICK, {(2, 3): SLOW})
    monkeypatch.setattr(importlib.import_module("weft.driver.probe"), "measure", measuring)
    pattern, link = Mesh(data=2, pipeline=2), LinkSpec("tcp", 4, 60.0)
    found = resolve(config, facts_of(microbatches=8), pattern, link, apart, Silent())  # type: ignore[arg-type]
    assert measuring.orders[0].pairs == [(0, 1), (2, 3)]
    assert taken(found)[0] == SCHEDULES[SLOW]


def test_of_pairs_on_the_same_hosts_one_is_measured() -> None:
    neighbours = {"0-1": [(0, 2), (1, 3)], "1-2": [(2, 4), (3, 5)]}
    assert alike(neighbours, [(0, 1), (2, 3, 4, 5)]) == {(0, 2): (0, 2), (1, 3): (0, 2), (2, 4): (2, 4), (3, 5): (2, 4)}
    assert set(alike(neighbours, []).values()) == {(0, 2)}


def test_what_is_not_measured_is_settled_too(monkeypatch: pytest.MonkeyPatch) -> None:
    config, measuring = msgspec.structs.replace(config_of(2), faults=[]), Measuring(SLOW)
    found = resolved(monkeypatch, config, facts_of(microbatches=8), measuring, carrier="shm")
    assert not measuring.orders
    assert found.config.measured is not None
    assert found.config.measured.pipeline is not None
    assert found.config.measured.pipeline.schedule == SCHEDULES[QUICK]
    assert found.news is not None
    assert "assumed" in found.config.measured.pipeline.why


# -- once


def test_a_resume_keeps_the_pipeline_whatever_the_link_and_the_blocks_take_now(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = resolved(monkeypatch, config_of(2), facts_of(microbatches=8), Measuring(SLOW))
    config = msgspec.json.decode(msgspec.json.encode(before.config), type=Config)
    slower = facts_of(microbatches=8)
    assert slower.pipeline is not None
    first, *rest = slower.pipeline.items
    items = [msgspec.structs.replace(first, forward_s=1.0), *rest]
    uneven = msgspec.structs.replace(slower, pipeline=msgspec.structs.replace(slower.pipeline, items=items))
    measuring = Measuring(QUICK)
    again = resolved(monkeypatch, config, uneven, measuring)
    assert not measuring.orders
    assert again.news is None
    assert taken(again) == taken(before)
    assert taken(again) != taken(resolved(monkeypatch, config_of(2), uneven, measuring)), "else it is no test"


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({"data": 2, "pipeline": 2}, {"pipeline": 4}),
        ({"pipeline": 4}, {"data": 2, "pipeline": 2}),
        ({"pipeline": 4}, {"pipeline": 4, "stages_per_worker": 2}),
    ],
)
def test_another_layout_of_as_many_workers_is_measured_and_chosen_anew(
    monkeypatch: pytest.MonkeyPatch, before: dict[str, int], after: dict[str, int]
) -> None:
    facts = facts_of(microbatches=8)
    was = resolved(monkeypatch, config_of(4, "mesh", **before), facts, Measuring(QUICK))
    config = msgspec.structs.replace(was.config, pattern_options=after)
    measuring = Measuring(SLOW)
    now = resolved(monkeypatch, config, facts, measuring)
    assert len(measuring.orders) == 1
    assert taken(now) == taken(resolved(monkeypatch, config_of(4, "mesh", **after), facts, measuring))
    assert now.config.measured is not None
    assert set(now.config.measured.neighbours.values()) == {SLOW}


def test_over_another_carrier_it_is_chosen_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    facts = facts_of(microbatches=8)
    was = resolved(monkeypatch, config_of(2), facts, Measuring(QUICK))
    now = resolved(monkeypatch, was.config, facts, Measuring(SLOW), carrier="gloo")
    assert (taken(was)[0], taken(now)[0]) == (SCHEDULES[QUICK], SCHEDULES[SLOW])


def test_but_what_a_codec_holds_back_is_of_these_cuts(monkeypatch: pytest.MonkeyPatch) -> None:
    facts, options = facts_of(microbatches=8), {"data": 2, "pipeline": 2, "compress": "int8"}
    was = resolved(monkeypatch, config_of(4, "mesh", **options), facts, Measuring(QUICK))
    measuring = Measuring(SLOW)
    now = resolved(monkeypatch, was.config, facts, measuring, carrier="gloo")
    assert taken(now) == taken(was)
    assert not measuring.orders
    again = resolved(monkeypatch, now.config, facts, measuring, carrier="gloo")
    assert taken(again) == taken(was)


def test_where_nothing_has_to_be_measured_another_layout_forgets_the_old(monkeypatch: pytest.MonkeyPatch) -> None:
    facts = facts_of(microbatches=8)
    was = resolved(monkeypatch, config_of(4, "mesh", pipeline=4), facts, Measuring(QUICK))
    after = {"pipeline": 4, "schedule": "gpipe"}
    config = msgspec.structs.replace(was.config, pattern_options=after)
    now = resolved(monkeypatch, config, facts, Measuring(SLOW))
    assert taken(now)[0] == "gpipe"
    assert now.config.measured is not None
    assert now.config.measured.neighbours == {}


@pytest.mark.parametrize("measured", [None, {"world": 2, "carrier": "tcp", "compress": "", "why": ""}])
def test_the_config_of_an_older_run_still_resumes(
    monkeypatch: pytest.MonkeyPatch, measured: dict[str, Any] | None
) -> None:
    old = msgspec.to_builtins(config_of(2)) | {"measured": measured}
    config = msgspec.json.decode(msgspec.json.encode(old), type=Config)
    found = resolved(monkeypatch, config, facts_of(microbatches=8), Measuring(SLOW))
    assert taken(found)[0] == SCHEDULES[SLOW]


def test_what_is_no_pipeline_settles_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    measuring = Measuring(QUICK)
    found = resolved(monkeypatch, config_of(2, "sharded"), facts_of(), measuring)
    assert (found.config.measured, found.news, measuring.orders) == (None, None, [])


# -- within memory


def taken_bytes(facts: Facts, workers: int) -> float:
    """Of the fullest worker: parameters, gradients and AdamW's two moments of its blocks, and its activations at the peak."""
    chosen = choose(facts, Pipelined(), workers)
    state = [0.0] * workers
    for stage, items in enumerate(chosen.stages):
        state[chosen.program.placement[stage]] += len(items) * 4 * 10 * MB
    return max(s + a for s, a in zip(state, chosen.activation_bytes, strict=True))


@pytest.mark.parametrize("per_host", [2, 4])
def test_it_is_the_quickest_within_the_memory_of_a_host(per_host: int) -> None:
    slow = {"between_hosts": True, "output_bytes": 8 * MB}  # where it is better to send less, and hold more
    free = facts_of(microbatches=8, per_host=per_host, activation_bytes=1600 * MB, **slow)
    most = taken_bytes(free, 2)
    tight = msgspec.structs.replace(free, memory_left=int(per_host * 0.9 * most))
    assert taken_bytes(tight, 2) <= 0.9 * most
    assert choose(tight, Pipelined(), 2).program.schedule != choose(free, Pipelined(), 2).program.schedule
    assert taken_bytes(msgspec.structs.replace(free, memory_left=int(per_host * 1.01 * most)), 2) == most


def test_workers_that_share_a_core_have_no_bubbles_to_fill() -> None:
    facts = facts_of(microbatches=8, cores=1.0, per_host=2)
    truth = best(rank_schedules(Known(facts, Pipelined()).costs, 2, 8, UNMEASURED, stages_per_rank=(1, 2), cores=1.0))
    assert choose(facts, Pipelined(), 2).program.schedule == truth.schedule.name == "1f1b"
    assert choose(facts_of(microbatches=8), Pipelined(), 2).program.schedule == "interleaved-1f1b"


def test_where_nothing_fits_it_is_what_comes_nearest_and_says_so() -> None:
    chosen = choose(facts_of(microbatches=8, memory_left=MB), Pipelined(), 2)
    assert "nearest to 262 kB of memory a worker" in chosen.why
    known = Known(facts_of(microbatches=8), Pipelined())
    ranked = rank_schedules(known.costs, 2, 8, UNMEASURED, stages_per_rank=(1, 2), cores=4.0)
    assert max(chosen.activation_bytes) + NUM_BLOCKS / 2 * 40 * MB == min(max(one.memory_bytes) for one in ranked)


def test_between_hosts_a_slower_link_is_assumed() -> None:
    facts = facts_of(microbatches=8)
    assert Known(facts, Pipelined()).speed == UNMEASURED
    assert Known(msgspec.structs.replace(facts, between_hosts=True), Pipelined()).speed == GIGABIT


def test_a_choice_is_of_frozen_facts() -> None:
    """The same for the driver and each worker: of equal facts, however they came."""
    facts = facts_of(microbatches=8)
    sent = msgspec.convert(msgspec.to_builtins(facts), Facts, strict=False)
    settled = Pipeline().settle(facts, 2, None)
    back = msgspec.convert(msgspec.to_builtins(settled), Facts, strict=False)
    assert choose(sent, Pipelined(), 2) == choose(facts, Pipelined(), 2)
    assert choose(back, Pipelined(), 2) == choose(settled, Pipelined(), 2)


def test_a_stage_held_by_two_workers_takes_and_holds_less_on_each() -> None:
    facts = facts_of(microbatches=8, tensor=2, activation_bytes=1600 * MB)
    assert facts.tensor is not None
    whole, halved = Known(facts, Pipelined()), Known(facts, Pipelined(tensor=2))
    computed = facts.tensor.compute_s / (facts.step_s - facts.optimizer_s)
    kept = facts.tensor.activation_bytes / facts.activation_bytes
    assert 0 < computed < 1
    assert 0 < kept < 1
    for one, other, state in zip(whole.costs, halved.costs, whole.state, strict=True):
        assert other.seconds == pytest.approx(computed * one.seconds)
        assert other.activation_bytes == pytest.approx(kept * one.activation_bytes)
        assert other.output_bytes == one.output_bytes  # what passes from stage to stage is whole
        assert other.state_bytes < state
    held = [choose(facts, Pipelined("1f1b", tensor=degree), 2).activation_bytes for degree in (1, 2)]
    assert held[1] == pytest.approx([kept * nbytes for nbytes in held[0]])
