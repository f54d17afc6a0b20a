"""Our lists against those of torch.distributed.pipelining, action for action.

torch's objects are built as its users build them, with stages that compute nothing. GPipe and 1F1B are read from what they run: the
list that torch's 1F1B tells (`_get_pipeline_order`) counts the last rank's microbatches from one, what it runs does not.
"""

from __future__ import annotations

from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn
from torch.distributed.pipelining import schedules as theirs

from weft.pipelines.schedules import SCHEDULES, Action, Schedule, place, program

RANKS = range(1, 7)
MICROBATCHES = (*range(1, 10), 11, 12, 13, 16, 20, 25)
PER_RANK = (1, 2, 3)

SINGLE = [s for s in SCHEDULES if s.most_stages == 1]
MULTI = [s for s in SCHEDULES if s.most_stages != 1]


class Recorder(SimpleNamespace):
    """A stage that writes down what it is asked to compute."""

    def forward_one_chunk(self, microbatch: int, *args: Any, **kwargs: Any) -> None:
        self.seen.append(Action(self.stage_index, "F", microbatch))

    def backward_one_chunk(self, microbatch: int, **kwargs: Any) -> None:
        self.seen.append(Action(self.stage_index, "B", microbatch))

    def get_fwd_recv_ops(self, microbatch: int) -> list[Any]:
        return []

    get_fwd_send_ops = get_bwd_recv_ops = get_bwd_send_ops = get_fwd_recv_ops

    def perform_reduce_grad(self, factor: int) -> None: ...


def stages_of(rank: int, ranks: int, placement: tuple[int, ...]) -> list[Any]:
    return [
        Recorder(
            stage_index=stage,
            num_stages=len(placement),
            group_size=ranks,
            group_rank=rank,
            has_backward=True,
            is_first=stage == 0,
            is_last=stage == len(placement) - 1,
            submod=nn.Identity(),
            seen=[],
        )
        for stage in range(len(placement))
        if placement[stage] == rank
    ]


def run_by_torch(
    schedule: Schedule, rank: int, ranks: int, microbatches: int, monkeypatch: pytest.MonkeyPatch
) -> list[Action]:
    (stage,) = stages_of(rank, ranks, place("looped", ranks, 1))
    its = theirs.get_schedule_class(schedule.torch_name)(stage, microbatches)
    monkeypatch.setattr(its, "_initialize_stage", lambda *args, **kwargs: None)
    its._step_microbatches([()] * microbatches)
    seen: list[Action] = stage.seen
    return seen


def listed_by_torch(schedule: Schedule, ranks: int, microbatches: int, per_rank: int) -> list[list[Action]]:
    stages = stages_of(0, ranks, place(schedule.placement, ranks, per_rank))
    its = theirs.get_schedule_class(schedule.torch_name)(stages, microbatches)
    assert tuple(its.stage_index_to_group_rank[s] for s in sorted(its.stage_index_to_group_rank)) == place(
        schedule.placement, ranks, per_rank
    )
    return [list(plain(its._calculate_single_rank_operations(rank))) for rank in range(ranks)]


def plain(actions: Iterable[Any]) -> Iterable[Action]:
    """Without bubbles; pairs of a forward and a backward one after the other."""
    for action in actions:
        if action is not None and action.sub_actions:
            yield from plain(action.sub_actions)
        elif action is not None:
            yield Action(action.stage_index, action.computation_type.value, action.microbatch_index)


@pytest.mark.parametrize("schedule", SINGLE, ids=lambda s: s.name)
def test_one_stage_on_a_rank(schedule: Schedule, monkeypatch: pytest.MonkeyPatch) -> None:
    for ranks in RANKS:
        for microbatches in MICROBATCHES:
            if schedule.name == "1f1b" and microbatches < ranks:
                continue  # torch refuses
            ours = program(schedule, ranks, microbatches)
            for rank in range(ranks):
                assert list(ours.actions[rank]) == run_by_torch(schedule, rank, ranks, microbatches, monkeypatch)


@pytest.mark.parametrize("schedule", MULTI, ids=lambda s: s.name)
def test_several_stages_on_a_rank(schedule: Schedule) -> None:
    compared, refused = 0, set()
    for ranks in RANKS:
        for microbatches in MICROBATCHES:
            for per_rank in filter(schedule.takes, PER_RANK):
                ours = program(schedule, ranks, microbatches, per_rank)
                try:
                    expected = listed_by_torch(schedule, ranks, microbatches, per_rank)
                except ValueError:
                    refused.add((ranks, microbatches))
                    continue
                compared += 1
                assert [list(row) for row in ours.actions] == expected, (ranks, microbatches, per_rank)
    assert compared > 50
    # Where torch refuses, ours is its list for a number of microbatches that torch takes, without those that are too many.
    assert all(schedule.whole(ranks, m) > m for ranks, m in refused), refused


def test_every_schedule_of_torch_is_known() -> None:
    known = {theirs.get_schedule_class(s.torch_name) for s in SCHEDULES}
    public = {cls for name, cls in vars(theirs).items() if name.startswith("Schedule") and isinstance(cls, type)}
    assert known == public
