"""Which pipeline: schedule, cuts, placement, chosen from what the preflight measured. No torch here; the driver and each worker come to the same."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

from weft.cost import GIGABIT, UNMEASURED
from weft.errors import ConfigError
from weft.patterns.base import Facts, PipelineFacts
from weft.pipelines.channels import channel_order
from weft.pipelines.choose import Ranked, best, rank_schedules, why
from weft.pipelines.costs import Cost
from weft.pipelines.schedules import Program, find, names, program

AUTO = "auto"
CHANNEL = "stage "  # how the names of its groups begin
MICROBATCHES_PER_WORKER = 4  # where the user does not say: a bubble of a fifth at most

SCHEDULE: dict[str, Any] = {"doc": f"{AUTO} (what is predicted to be quickest), or one of {', '.join(names())}"}
MICROBATCHES: dict[str, Any] = {
    "doc": f"pieces of a share that flow through the stages; 0: {MICROBATCHES_PER_WORKER} for each worker"
}
PER_WORKER: dict[str, Any] = {"doc": "stages on each worker; 0: what the schedule takes"}


class Pipelined(NamedTuple):
    """What was asked for."""

    schedule: str = AUTO
    microbatches: int = 0
    per_worker: int = 0


class Chosen(NamedTuple):
    program: Program
    stages: tuple[range, ...]  # items of each
    why: str
    ranked: Sequence[Ranked]
    activation_bytes: tuple[float, ...]  # at most at once, by place in the pipeline

    def stages_of(self, item: int) -> list[int]:
        return [k for k, items in enumerate(self.stages) if item in items]

    def workers_of(self, items: Sequence[int]) -> set[int]:
        """Places in the pipeline at which these are computed."""
        return {self.worker_of(item) for item in items}

    def worker_of(self, item: int) -> int:
        """Its place in the pipeline."""
        return self.program.placement[self.stages_of(item)[0]]


def channel_name(sender: int, receiver: int) -> str:
    """Of the group of two that a channel of the pipeline is: their places in it."""
    return f"{CHANNEL}{sender}>{receiver}"


def sent_bytes(chosen: Chosen, facts: PipelineFacts) -> list[int]:
    """In a step, by place in the pipeline."""
    result = [0] * chosen.program.ranks
    for (sender, _), actions in channel_order(chosen.program).items():
        for action in actions:
            cut = action.stage if action.kind == "F" else action.stage - 1
            result[sender] += facts.items[chosen.stages[cut].stop - 1].output_bytes
    return result


def check_pipelined(asked: Pipelined, accumulate: int) -> None:
    if asked.schedule != AUTO:
        find(asked.schedule).stages_per_rank(asked.per_worker)
    for option, value in (("microbatches", asked.microbatches), ("stages_per_worker", asked.per_worker)):
        if value < 0:
            raise ConfigError(f"{option}={value} is not possible: give 1 or more, or 0 to leave it to the schedule.")
    if accumulate > 1:
        raise ConfigError(
            f"accumulate={accumulate}: a pipeline's pieces are its microbatches: use -o microbatches={accumulate}."
        )


def num_microbatches(asked: Pipelined, workers: int, share: int) -> int:
    if asked.microbatches > share:
        raise ConfigError(
            f"microbatches={asked.microbatches} is more than the {share} examples of a share: use at most {share}, or a larger --batch."
        )
    return asked.microbatches or min(MICROBATCHES_PER_WORKER * workers, share)


def choose(facts: Facts, asked: Pipelined, workers: int) -> Chosen:
    """``workers``: of a pipeline. ConfigError where nothing is possible."""
    assert facts.pipeline is not None
    return _choose(Known(facts), asked, workers)


class Known:
    """Facts, as a key of a cache: by what the choice depends on."""

    def __init__(self, facts: Facts) -> None:
        assert facts.pipeline is not None
        self.pipeline: PipelineFacts = facts.pipeline
        self.between_hosts = facts.between_hosts
        ratio = 1 + 1 + facts.optimizer_bytes / max(1, sum(p.nbytes for p in facts.params if p.trainable))
        self.state = [0.0] * len(self.pipeline.items)
        for p in facts.params:
            for k in self.pipeline.uses[p.name]:
                self.state[k] += p.nbytes * (ratio if p.trainable else 1)
        self._key = (
            tuple(map(str, self.pipeline.items)),
            self.pipeline.microbatches,
            tuple(self.state),
            self.between_hosts,
        )

    def __hash__(self) -> int:
        return hash(self._key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Known) and self._key == other._key


@functools.lru_cache(maxsize=8)
def _choose(known: Known, asked: Pipelined, workers: int) -> Chosen:
    facts = known.pipeline
    costs = [
        Cost(
            forward_s=item.forward_s,
            input_gradient_s=item.input_gradient_s,
            weight_gradient_s=item.weight_gradient_s,
            output_bytes=item.output_bytes,
            activation_bytes=item.activation_bytes,
            state_bytes=state,
        )
        for item, state in zip(facts.items, known.state, strict=True)
    ]
    ranked = rank_schedules(
        costs,
        workers,
        facts.microbatches,
        GIGABIT if known.between_hosts else UNMEASURED,
        schedules=() if asked.schedule == AUTO else (asked.schedule,),
        stages_per_rank=(asked.per_worker,) if asked.per_worker else (1, 2),
        cores=float("inf") if known.between_hosts else facts.cores,
    )
    chosen = best(ranked)
    lists = program(chosen.schedule, workers, facts.microbatches, chosen.stages_per_rank)
    return Chosen(lists, chosen.partition.stages, why(ranked), ranked, chosen.predicted.activation_bytes)
