"""Which pipeline: schedule, cuts, placement, chosen from what the preflight measured. No torch here; the driver and each worker come to the same."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from weft.config import Settled
from weft.cost import GIGABIT, UNMEASURED, LinkSpeed
from weft.errors import ConfigError
from weft.patterns.base import Facts, ItemFact, PipelineFacts
from weft.patterns.prediction import activation_bytes, assumed, compute_s, slowest_in_words
from weft.payoff import format_size
from weft.pipelines.bound import sequential_s
from weft.pipelines.channels import Channel, channel_order
from weft.pipelines.choose import Ranked, best, in_words, rank_schedules, why
from weft.pipelines.costs import Cost, by_chunk, by_stage
from weft.pipelines.schedules import Program, find, names, program
from weft.pipelines.simulate import Simulation, peak_activations, simulate

AUTO = "auto"
CHANNEL = "stage "  # how the names of its groups begin
#: What a link may be, from the worst to the best: between processes of one host, and anywhere.
IN_HOST = (LinkSpeed(1e-3, 3e8), UNMEASURED, LinkSpeed(10e-6, 1e10))
#: Of what is tried: so many, predicted to take so much longer than the best at most. On a slow link predictions leave out as much.
MOST, WITHIN = 6, 0.30
WORTH = 0.05  # of a step: for less nobody has to measure
ANYWHERE = (LinkSpeed(0.2, 1e5), LinkSpeed(1e-3, 1e7), GIGABIT, LinkSpeed(10e-6, 1e11))
MICROBATCHES_PER_WORKER = 4  # where the user does not say: a bubble of a fifth at most

SCHEDULE: dict[str, Any] = {"doc": f"{AUTO} (what is predicted to be quickest), or one of {', '.join(names())}"}
MICROBATCHES: dict[str, Any] = {
    "doc": f"pieces of a share that flow through the stages; 0: {MICROBATCHES_PER_WORKER} for each worker"
}
PER_WORKER: dict[str, Any] = {"doc": "stages on each worker; 0: what the schedule takes"}
TRIAL: dict[str, Any] = {
    "doc": "before the run, steps of each schedule that may be quickest, in its place; auto: where that takes less than a twentieth of the run"
}
CHUNKS: dict[str, Any] = {
    "doc": "pieces of time in which a recurrent model takes each sequence, so that its layers work on it at once; 1: none"
}


class Pipelined(NamedTuple):
    """What was asked for."""

    schedule: str = AUTO
    microbatches: int = 0
    per_worker: int = 0
    chunks: int = 1
    tensor: int = 1  # workers that hold each tensor of a stage together


class Chosen(NamedTuple):
    program: Program
    stages: tuple[range, ...]  # items of each
    words: str  # the schedule's name, with what it leaves open
    activation_bytes: tuple[float, ...]  # at most at once, by place in the pipeline
    why: str

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
    result, shares = [0.0] * chosen.program.ranks, facts.shares
    for (sender, _), actions in channel_order(chosen.program).items():
        for action in actions:
            cut = action.stage if action.kind == "F" else action.stage - 1
            item, chunk = chosen.stages[cut].stop - 1, action.microbatch % chosen.program.chunks
            result[sender] += facts.items[item].output_bytes * (shares[item][chunk] if shares else 1.0)
    return [round(nbytes) for nbytes in result]


def at_least_s(facts: PipelineFacts) -> float:
    """Seconds that a step computes however many workers there are; 0 if the model is not recurrent."""
    costs = by_chunk([cost_of(item) for item in facts.items], facts.shares)
    return sequential_s(costs, facts.microbatches) if facts.recurrent else 0.0


def cost_of(item: ItemFact, state_bytes: float = 0.0, computed: float = 1.0, kept: float = 1.0) -> Cost:
    """``computed``, ``kept``: the part of its seconds and of its activations that one worker has."""
    return Cost(
        forward_s=computed * item.forward_s,
        input_gradient_s=computed * item.input_gradient_s,
        weight_gradient_s=computed * item.weight_gradient_s,
        split_s=computed * item.split_s,
        output_bytes=item.output_bytes,
        activation_bytes=kept * item.activation_bytes,
        state_bytes=state_bytes,
    )


def check_pipelined(asked: Pipelined, accumulate: int) -> None:
    if asked.schedule != AUTO:
        find(asked.schedule).stages_per_rank(asked.per_worker)
    for option, value in (("microbatches", asked.microbatches), ("stages_per_worker", asked.per_worker)):
        if value < 0:
            raise ConfigError(f"{option}={value} is not possible: give 1 or more, or 0 to leave it to the schedule.")
    if asked.chunks != 1:
        program("gpipe" if asked.schedule == AUTO else asked.schedule, 1, 1, chunks=asked.chunks)
    if accumulate > 1:
        raise ConfigError(
            f"accumulate={accumulate}: a pipeline's pieces are its microbatches: use -o microbatches={accumulate}."
        )


def num_microbatches(asked: Pipelined, workers: int, share: int, least: int = 1) -> int:
    """Of a share of so many examples. ``least``: examples that one needs, where nothing was asked for."""
    if asked.microbatches > share:
        raise ConfigError(
            f"microbatches={asked.microbatches} is more than the {share} examples of a share: use at most {share}, or a larger --batch."
        )
    return asked.microbatches or min(-(-MICROBATCHES_PER_WORKER * workers // asked.chunks), max(1, share // least))


def choose(facts: Facts, asked: Pipelined, workers: int) -> Chosen:
    """``workers``: of a pipeline. What is settled stays; else it is chosen. ConfigError where nothing is possible."""
    assert facts.pipeline is not None
    known = Known(facts, asked)
    if (kept := facts.pipeline.settled) is not None:
        schedule = find(kept.schedule)
        lists = program(schedule, workers, facts.pipeline.microbatches, kept.stages_per_worker, asked.chunks)
        ends = itertools.accumulate(kept.items, initial=0)
        stages = tuple(itertools.starmap(range, itertools.pairwise(ends)))
        held = peak_activations(lists, known.costs_of(stages))
        return Chosen(lists, stages, in_words(schedule, kept.stages_per_worker), held, kept.why)
    ranked = _rank(known, asked, workers)
    one = _best(ranked)
    stages = one.partition.stages
    held = peak_activations(one.predicted.program, known.costs_of(stages))
    why = "; ".join([_why(ranked), slowest_in_words(known.measured.values(), known.speed)])
    return Chosen(one.predicted.program, stages, one.words, held, why)


def contenders(facts: Facts, asked: Pipelined, workers: int, of: str) -> list[Settled]:
    """Of those that fit the memory, what might be the quickest as far as predictions go: what is chosen by these first, then the quickest; and the simplest, since
    what predictions leave out speaks for it. None where none fits. ``of``: as in Settled."""
    known = Known(facts, asked)
    ranked = _rank(known, asked, workers)
    chosen = _best(ranked)
    if not chosen.fits:
        return []
    near = [one for one in ranked if one.fits and one.step_s <= (1 + WITHIN) * chosen.step_s]
    unlike: dict[Any, Ranked] = {}
    for one in (chosen, *near):
        unlike.setdefault((one.predicted.program.actions, one.partition.stages), one)
    near = list(unlike.values())
    simplest, among = min(near, key=lambda one: one.simplicity), near[:MOST]
    if all(one is not simplest for one in among):
        among[-1] = simplest
    speed = slowest_in_words(known.measured.values(), known.speed)
    return [
        Settled(
            of=of,
            schedule=one.schedule.name,
            stages_per_worker=one.stages_per_rank,
            items=[len(items) for items in one.partition.stages],
            why=speed,
        )
        for one in among
    ]


def _best(ranked: Sequence[Ranked]) -> Ranked:
    """Where none fits the memory, what comes nearest to it: whether it really does not, is not for a prediction to say."""
    return best(ranked) if any(one.fits for one in ranked) else min(ranked, key=lambda one: max(one.memory_bytes))


def _why(ranked: Sequence[Ranked]) -> str:
    one = _best(ranked)
    if one.fits:
        return why(ranked).removeprefix(f"{one.words}: ")
    return f"of all the nearest to {format_size(one.allowed_bytes)} of memory a worker, with {format_size(max(one.memory_bytes))}"


def goes_by_link(facts: Facts, asked: Pipelined, workers: int, far: bool) -> bool:
    """Whether what is chosen for the assumed link would cost more than WORTH somewhere in the range of what the link may be. ``far``: it may be
    anything, not only what links within a host are."""
    known = Known(facts, asked)
    assumed = _best(_rank(Known(facts, asked, known.speed), asked, workers))
    for speed in ANYWHERE if far else IN_HOST:
        ranked = _rank(Known(facts, asked, speed), asked, workers)
        same = (assumed.schedule, assumed.stages_per_rank)
        as_assumed = next(one for one in ranked if (one.schedule, one.stages_per_rank) == same)
        if as_assumed.step_s > (1 + WORTH) * _best(ranked).step_s:
            return True
    return False


def pairs_of(workers: int) -> list[tuple[int, int]]:
    """Places of a pipeline that may talk to each other."""
    return sorted({(k, k + 1) for k in range(workers - 1)} | {(0, workers - 1)})


def pair_name(a: int, b: int) -> str:
    return f"{min(a, b)}-{max(a, b)}"


class Known:
    """Facts, as a key of a cache: by what the choice depends on. ``speed``: of all links, in place of what is known of them.

    Items were measured whole. Where each tensor is held by several workers, all are taken to shrink alike, as the whole step does."""

    def __init__(self, facts: Facts, asked: Pipelined, speed: LinkSpeed | None = None) -> None:
        assert facts.pipeline is not None
        self.pipeline: PipelineFacts = facts.pipeline
        self.measured = {} if speed else facts.pipeline.speeds
        self.speed = speed or assumed(facts)
        self.cores, self.per_host = facts.cores, facts.per_host
        self.memory_bytes = facts.memory_left / max(1, facts.per_host) if facts.memory_left else math.inf
        ratio = 1 + 1 + facts.optimizer_bytes / max(1, sum(p.nbytes for p in facts.params if p.trainable))
        self.state = [0.0] * len(self.pipeline.items)
        cut = facts.tensor.parameters if facts.tensor and asked.tensor > 1 else ()
        for p in facts.params:
            held = p.nbytes / (asked.tensor if p.name in cut else 1)
            for k in self.pipeline.uses[p.name]:
                self.state[k] += held * (ratio if p.trainable else 1)
        #: Of what was measured whole, what one worker has of it.
        self.computed = _part(compute_s(facts, asked.tensor), compute_s(facts, 1))
        self.kept = _part(activation_bytes(facts, asked.tensor), facts.activation_bytes)
        self._key = (
            tuple(map(str, self.pipeline.items)),
            self.pipeline.microbatches,
            tuple(map(tuple, self.pipeline.shares)),
            self.pipeline.unsplit,
            tuple(self.state),
            (self.computed, self.kept),
            self.speed,
            tuple(sorted(self.measured.items())),
            (self.cores, self.per_host, self.memory_bytes),
        )

    @property
    def costs(self) -> list[Cost]:
        states = zip(self.pipeline.items, self.state, strict=True)
        return [cost_of(item, state, self.computed, self.kept) for item, state in states]

    def costs_of(self, stages: Sequence[range]) -> list[list[Cost]]:
        """By time chunk, by stage."""
        return [by_stage(costs, stages) for costs in by_chunk(self.costs, self.pipeline.shares)]

    def links(self, workers: int) -> LinkSpeed | Mapping[Channel, LinkSpeed]:
        """Of a pipeline of so many, which need not be the one whose links were measured."""
        if not self.measured:
            return self.speed
        slowest = max(self.measured.values(), key=lambda speed: (speed.latency_s, -speed.bytes_per_s))
        ways = [(a, b, self.measured.get(pair_name(a, b), slowest)) for a, b in pairs_of(workers)]
        return {way: speed for a, b, speed in ways for way in ((a, b), (b, a))}

    def cores_of(self, workers: int) -> float:
        """What one pipeline has: others may stand on the same hosts."""
        return self.cores * workers / (self.per_host or workers)

    def __hash__(self) -> int:
        return hash(self._key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Known) and self._key == other._key


def _part(of_one: float, whole: float) -> float:
    return of_one / whole if whole else 1.0


@functools.lru_cache(maxsize=16)
def _rank(known: Known, asked: Pipelined, workers: int) -> list[Ranked]:
    among: tuple[str, ...] = () if asked.schedule == AUTO else (asked.schedule,)
    if known.pipeline.unsplit:
        whole = tuple(name for name in names() if not find(name).splits_backward)
        if among and find(asked.schedule).splits_backward:
            raise ConfigError(
                f"schedule={asked.schedule} splits the backward, which torch cannot do of this model ({known.pipeline.unsplit}): use "
                f"-o schedule={AUTO}, or one of {', '.join(whole)}."
            )
        among = among or whole
    return rank_schedules(
        known.costs,
        workers,
        known.pipeline.microbatches,
        known.links(workers),
        schedules=among,
        stages_per_rank=(asked.per_worker,) if asked.per_worker else (1, 2),
        memory_bytes=known.memory_bytes,
        cores=known.cores_of(workers),
        shares=known.pipeline.shares,
    )


def predicted(facts: Facts, asked: Pipelined, chosen: Chosen) -> Simulation:
    known, workers = Known(facts, asked), chosen.program.ranks
    costs = known.costs_of(chosen.stages)
    return simulate(chosen.program, costs, known.links(workers), cores=known.cores_of(workers))
