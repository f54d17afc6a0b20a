"""Which schedule: all that are possible, each cut and simulated, and the one to take, with its reason."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from weft.cost import LinkSpeed
from weft.errors import ConfigError
from weft.payoff import format_size, format_time
from weft.pipelines.channels import Channel, in_flight
from weft.pipelines.costs import Cost, by_chunk, by_stage
from weft.pipelines.partition import Partition, partition
from weft.pipelines.schedules import SCHEDULES, Program, Schedule, find, program
from weft.pipelines.simulate import FREE, Sending, Simulation, peak_activations, simulate

#: Steps that differ by less of themselves are equally quick: then the simpler schedule is taken. Predictions are no better than that, and all that they
#: leave out (a message's work for processors, a backward in two beside another worker) speaks against the less simple.
TIE = 0.05


@dataclass(frozen=True, kw_only=True)
class Ranked:
    schedule: Schedule
    partition: Partition
    predicted: Simulation
    memory_bytes: tuple[float, ...]  # by rank: state and the most activations at once
    allowed_bytes: float

    @property
    def fits(self) -> bool:
        return max(self.memory_bytes) <= self.allowed_bytes

    @property
    def step_s(self) -> float:
        return self.predicted.step_s

    @property
    def stages_per_rank(self) -> int:
        return self.predicted.program.stages_per_rank

    @property
    def words(self) -> str:
        """The name, with the stages on each rank where the schedule leaves them open."""
        return in_words(self.schedule, self.stages_per_rank)

    @property
    def simplicity(self) -> tuple[bool, int, int]:
        """The less, the simpler: the backward whole, few stages on a rank, then as in SCHEDULES."""
        return self.schedule.splits_backward, self.stages_per_rank, SCHEDULES.index(self.schedule)


def in_words(schedule: Schedule, stages_per_rank: int) -> str:
    if schedule.most_stages == schedule.least_stages:
        return schedule.name
    return f"{schedule.name} with {stages_per_rank} stage{'s' * (stages_per_rank != 1)} a rank"


def rank_schedules(
    blocks: Sequence[Cost],
    ranks: int,
    microbatches: int,
    link: LinkSpeed | Mapping[Channel, LinkSpeed] = FREE,
    *,
    schedules: Sequence[str] = (),
    stages_per_rank: Sequence[int] = (1, 2, 3, 4),
    memory_bytes: float = math.inf,
    sizes: Sequence[float] = (),
    action_s: float = 0.0,
    cores: float = math.inf,
    sending: Sending = "aside",
    shares: Sequence[Sequence[float]] = (),
) -> list[Ranked]:
    """Those that fit the memory first, of these the quickest. ``schedules``: these only (none: all); each with those of
    ``stages_per_rank`` that it takes and that the blocks fill. ``memory_bytes``: allowed on each rank. ``shares``: by block, the part of its
    microbatch that it computes in each time chunk, if there are several. The rest as in ``simulate``.

    Raises ConfigError if nothing is possible."""
    chunks = len(shares[0]) if shares else 1
    among = [find(name) for name in schedules] or [s for s in SCHEDULES if chunks == 1 or not s.splits_backward]
    wanted = [(schedule, v) for schedule in among for v in sorted(set(stages_per_rank)) if schedule.takes(v)]
    if not wanted:
        raise ConfigError(
            f"{among[0].name} takes {among[0].stages_in_words}, and {', '.join(map(str, stages_per_rank)) or 'nothing'} is asked for"
        )
    possible = [(schedule, v) for schedule, v in wanted if ranks * v <= len(blocks)]
    if not possible:
        schedule, v = min(wanted, key=lambda at: at[1])
        partition(blocks, program(schedule, ranks, 1, v).placement)  # says what to do
    cuts = _Cuts(blocks, memory_bytes, sizes, shares)
    found = []
    for schedule, v in possible:
        lists = program(schedule, ranks, microbatches, v, chunks)
        cut = cuts.of(lists)
        costs = cuts.costs(cut)
        predicted = simulate(lists, costs, link, sizes=sizes, action_s=action_s, cores=cores, sending=sending)
        found.append(
            Ranked(
                schedule=schedule,
                partition=cut,
                predicted=predicted,
                memory_bytes=_memory(lists, costs, sizes),
                allowed_bytes=memory_bytes,
            )
        )
    return sorted(found, key=lambda one: (not one.fits, one.step_s, one.simplicity))


def best(ranked: Sequence[Ranked]) -> Ranked:
    """What ``auto`` takes: the quickest that fits the memory; of those as quick, the simplest. Raises ConfigError if none fits."""
    able = [one for one in ranked if one.fits]
    if not able:
        least = min(ranked, key=lambda one: max(one.memory_bytes))
        raise ConfigError(
            f"no schedule fits {format_size(least.allowed_bytes)} on each rank. {least.words} comes nearest, with "
            f"{format_size(max(least.memory_bytes))} where it is cut for speed: use more ranks, or smaller microbatches"
        )
    quickest = min(one.step_s for one in able)
    return min((one for one in able if one.step_s <= quickest * (1 + TIE)), key=lambda one: one.simplicity)


def why(ranked: Sequence[Ranked]) -> str:
    """One sentence about ``best``: "looped-bfs with 2 stages a rank: step 1.8 s, bubble 9 %; 1f1b 2 s, bubble 16 %, 0.43x the messages"."""
    choice = best(ranked)
    parts = [f"{choice.words}: step {_seconds_and_bubble(choice)}"]
    rest = [one for one in ranked if one is not choice]
    able = [one for one in rest if one.fits]
    as_quick = [one for one in able if one.step_s < choice.step_s]
    if as_quick:
        parts.append(f"{as_quick[0].words} is less than {TIE:.0%} quicker and less simple".replace("%", " %"))
    others = sorted((one for one in able if one not in as_quick), key=lambda one: one.step_s)[:1]
    others += [one for one in sorted(able, key=lambda one: one.simplicity)[:1] if one not in others + as_quick]
    parts += [f"{one.words} {_seconds_and_bubble(one)}{_messages(one, choice)}" for one in others]
    quicker = [one for one in rest if not one.fits and one.step_s < choice.step_s]
    if quicker:
        one = min(quicker, key=lambda one: one.step_s)
        parts.append(
            f"{one.words} would take {format_time(one.step_s)}, and {format_size(max(one.memory_bytes))} of memory where "
            f"{format_size(one.allowed_bytes)} are allowed"
        )
    return "; ".join(parts)


class _Cuts:
    """Cuts of the same blocks; each is looked for once."""

    def __init__(
        self, blocks: Sequence[Cost], memory_bytes: float, sizes: Sequence[float], shares: Sequence[Sequence[float]]
    ) -> None:
        self.memory_bytes, self.sizes = memory_bytes, sizes
        self.chunks = by_chunk(blocks, shares)
        #: Of a piece; a cut takes all of them to be alike.
        self.pieces = [block.part(1 / len(self.chunks)) for block in blocks]
        self._known: dict[tuple[tuple[int, ...], tuple[int, ...]], Partition] = {}

    def of(self, lists: Program) -> Partition:
        """The quickest; if that does not fit the memory, the quickest that does; if none, the quickest."""
        held = in_flight(lists)
        key = (lists.placement, held)
        if key not in self._known:
            self._known[key] = self._find(lists, held)
        return self._known[key]

    def costs(self, cut: Partition) -> list[list[Cost]]:
        """By time chunk, by stage."""
        return [by_stage(blocks, cut.stages) for blocks in self.chunks]

    def _find(self, lists: Program, held: tuple[int, ...]) -> Partition:
        quickest = partition(self.pieces, lists.placement, microbatches=lists.pieces, in_flight=held)
        if max(_memory(lists, self.costs(quickest), self.sizes)) <= self.memory_bytes:
            return quickest
        try:
            return partition(
                self.pieces,
                lists.placement,
                microbatches=lists.pieces,
                in_flight=held,
                memory_bytes=self.memory_bytes,
            )
        except ConfigError:
            return quickest


def _memory(lists: Program, costs: Sequence[Sequence[Cost]], sizes: Sequence[float]) -> tuple[float, ...]:
    memory = list(peak_activations(lists, costs, sizes))
    for stage, cost in enumerate(costs[0]):
        memory[lists.placement[stage]] += cost.state_bytes
    return tuple(memory)


def _seconds_and_bubble(one: Ranked) -> str:
    return f"{format_time(one.step_s)}, bubble {100 * one.predicted.bubble:.2g} %"


def _messages(one: Ranked, choice: Ranked) -> str:
    if not choice.predicted.messages or one.predicted.messages == choice.predicted.messages:
        return ""
    return f", {one.predicted.messages / choice.predicted.messages:.2g}x the messages"
