"""Seconds and memory of a program, before anybody runs it.

Each rank computes its list in order, as soon as what an action needs has come (list scheduling). A message of n bytes leaves when it
is computed and its channel is free, keeps the channel for n / bytes_per_s, and is there latency_s later: one message at a time in each
direction. Ranks that share fewer cores share them evenly at every moment (processor sharing).
"""

from __future__ import annotations

import heapq
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, cast, get_args

from weft.cost import LinkSpeed
from weft.errors import ConfigError
from weft.pipelines.channels import Channel, validate
from weft.pipelines.costs import Cost, by_chunk
from weft.pipelines.schedules import Action, Input, Program

FREE = LinkSpeed(latency_s=0.0, bytes_per_s=math.inf)

#: By stage, of a microbatch of size 1, which its time chunks share evenly; or the same of each time chunk.
Costs = Sequence[Cost] | Sequence[Sequence[Cost]]

#: aside: a message travels while its sender computes on. blocks: the sender copies it first, as between processes of one host.
Sending = Literal["aside", "blocks"]


class Span(NamedTuple):
    start_s: float
    end_s: float
    action: Action


@dataclass(frozen=True, kw_only=True)
class Simulation:
    """Of one step, without the sum of gradients over replicas and the optimizer. Tuples are by rank."""

    program: Program
    step_s: float
    busy_s: tuple[float, ...]  # of computing, by the clock
    timeline: tuple[tuple[Span, ...], ...]
    activation_bytes: tuple[float, ...]  # at most at once
    messages: int
    bytes_sent: float

    @property
    def bubbles(self) -> tuple[float, ...]:
        """The share of the step in which a rank does not compute."""
        return tuple(1 - busy / self.step_s if self.step_s else 0.0 for busy in self.busy_s)

    @property
    def bubble(self) -> float:
        """1 - busy / (ranks * step)."""
        return sum(self.bubbles) / len(self.bubbles)


def simulate(
    program: Program,
    costs: Costs,
    link: LinkSpeed | Mapping[Channel, LinkSpeed] = FREE,
    *,
    sizes: Sequence[float] = (),
    action_s: float = 0.0,
    cores: float = math.inf,
    sending: Sending = "aside",
) -> Simulation:
    """``sizes``: by microbatch, if they are not all 1; ``action_s``: what each action takes besides (starting it). ``link``: one speed, or one for each channel. ``cores``: those that the ranks have together, if fewer
    than ranks; each computes on one at most. Raises ConfigError for a program that does not run."""
    sizes = sizes or (1.0,) * program.microbatches
    _check(program, costs, link, sizes, cores, action_s, sending)
    run = _Simulator(program, of_chunks(program, costs), link, sizes, action_s, cores, blocks=sending == "blocks")
    run.go()
    sent = [(action, run.bytes_of(action)) for row in program.actions for action in row if program.sends(action)]
    return Simulation(
        program=program,
        step_s=run.now,
        busy_s=tuple(sum(span.end_s - span.start_s for span in spans) for spans in run.timeline),
        timeline=tuple(tuple(spans) for spans in run.timeline),
        activation_bytes=peak_activations(program, costs, sizes),
        messages=len(sent),
        bytes_sent=sum(nbytes for _, nbytes in sent),
    )


def of_chunks(program: Program, costs: Costs) -> Sequence[Sequence[Cost]]:
    """By time chunk, by stage."""
    if costs and isinstance(costs[0], Cost):
        stages = cast(Sequence[Cost], costs)
        return by_chunk(stages, [[1 / program.chunks] * program.chunks] * len(stages))
    return cast(Sequence[Sequence[Cost]], costs)


def peak_activations(program: Program, costs: Costs, sizes: Sequence[float] = ()) -> tuple[float, ...]:
    """By rank, the most bytes of activations at once. The lists alone decide it, not how fast anybody is. What has arrived and is not
    yet used comes on top (``channels.arrivals``)."""
    peaks, chunked = [], of_chunks(program, costs)
    for row in program.actions:
        now = most = 0.0
        for stage, kind, piece in row:
            m, chunk = divmod(piece, program.chunks)
            nbytes = chunked[chunk][stage].activation_bytes * (sizes[m] if sizes else 1.0)
            now += {"F": nbytes, "I": 0.0, "B": -nbytes, "W": -nbytes}[kind]
            most = max(most, now)
        peaks.append(most)
    return tuple(peaks)


class _Simulator:
    """The clock stands at ``now``. ``worked``: the seconds of work that a rank has done which has computed since the start; it runs
    slower than the clock while ranks share cores, so that each job's end is known in it beforehand."""

    def __init__(
        self,
        program: Program,
        costs: Sequence[Sequence[Cost]],
        link: LinkSpeed | Mapping[Channel, LinkSpeed],
        sizes: Sequence[float],
        action_s: float,
        cores: float,
        blocks: bool,
    ) -> None:
        self.program, self.costs, self.sizes = program, costs, sizes
        self.link, self.action_s, self.cores, self.blocks = link, action_s, cores, blocks
        self.now = self.worked = 0.0
        self.timeline: list[list[Span]] = [[] for _ in range(program.ranks)]
        self.position = [0] * program.ranks
        self.started_s = [0.0] * program.ranks
        self.idle = [True] * program.ranks
        self.there: set[Input] = set()
        self.channel_free_s: defaultdict[Channel, float] = defaultdict(float)
        self.jobs: list[tuple[float, int, bool]] = []  # (where `worked` stands at its end, rank, copies a message)
        self.flying: list[tuple[float, int, Input]] = []  # (when it arrives, to rank, what)

    def go(self) -> None:
        for rank in range(self.program.ranks):
            self.begin(rank)
        while self.jobs or self.flying:
            speed = min(1.0, self.cores / len(self.jobs)) if self.jobs else 0.0
            job_ends = self.now + (self.jobs[0][0] - self.worked) / speed if self.jobs else math.inf
            if self.flying and self.flying[0][0] <= job_ends:
                arrives, rank, what = heapq.heappop(self.flying)
                if self.jobs:
                    self.worked = min(self.worked + (arrives - self.now) * speed, self.jobs[0][0])
                self.now = arrives
                self.there.add(what)
                self.begin(rank)
            else:
                self.now = job_ends
                self.worked, rank, copied = heapq.heappop(self.jobs)
                self.finish(rank, copied)

    def begin(self, rank: int) -> None:
        """The rank's next action, if it does nothing and what it needs is there."""
        if self.idle[rank] and self.position[rank] < len(self.program.actions[rank]):
            action = self.program.actions[rank][self.position[rank]]
            needed = self.program.needs(action)
            if needed is None or needed in self.there:
                self.idle[rank] = False
                self.started_s[rank] = self.now
                heapq.heappush(self.jobs, (self.worked + self.seconds_of(action), rank, False))

    def finish(self, rank: int, copied: bool) -> None:
        action = self.program.actions[rank][self.position[rank]]
        given, channel = self.program.gives(action), self.program.sends(action)
        if not copied:
            self.timeline[rank].append(Span(self.started_s[rank], self.now, action))
        if channel is not None and given is not None:
            speed = self.speed_of(channel)
            takes_s = self.bytes_of(action) / speed.bytes_per_s
            if self.blocks and not copied:
                heapq.heappush(self.jobs, (self.worked + takes_s, rank, True))
                return
            if not self.blocks:
                self.channel_free_s[channel] = max(self.channel_free_s[channel], self.now) + takes_s
            left_s = self.now if self.blocks else self.channel_free_s[channel]
            heapq.heappush(self.flying, (left_s + speed.latency_s, channel[1], given))
        elif given is not None:
            self.there.add(given)
        self.position[rank] += 1
        self.idle[rank] = True
        self.begin(rank)

    def seconds_of(self, action: Action) -> float:
        m, chunk = divmod(action.microbatch, self.program.chunks)
        cost = self.costs[chunk][action.stage]
        seconds = {
            "F": cost.forward_s,
            "B": cost.input_gradient_s + cost.weight_gradient_s,
            "I": cost.input_gradient_s,
            "W": cost.weight_gradient_s + cost.split_s,
        }
        return self.action_s + seconds[action.kind] * self.sizes[m]

    def bytes_of(self, action: Action) -> float:
        """An output, or the gradient of an input, which is as large as the output of the stage before."""
        source = action.stage if action.kind == "F" else action.stage - 1
        m, chunk = divmod(action.microbatch, self.program.chunks)
        return self.costs[chunk][source].output_bytes * self.sizes[m]

    def speed_of(self, channel: Channel) -> LinkSpeed:
        return self.link if isinstance(self.link, LinkSpeed) else self.link[channel]


def _check(
    program: Program,
    costs: Costs,
    link: LinkSpeed | Mapping[Channel, LinkSpeed],
    sizes: Sequence[float],
    cores: float,
    action_s: float,
    sending: str,
) -> None:
    validate(program)
    chunked = of_chunks(program, costs)
    if len(chunked) != program.chunks:
        raise ConfigError(f"costs of {len(chunked)} time chunks for {program.chunks}: give those of each")
    for stages in chunked:
        if len(stages) != program.stages:
            raise ConfigError(f"{len(stages)} costs for {program.stages} stages: give one for each")
    if len(sizes) != program.microbatches or not all(size > 0 and math.isfinite(size) for size in sizes):
        raise ConfigError(f"sizes={list(sizes)}: give {program.microbatches} positive numbers, one for each microbatch")
    if sending not in get_args(Sending):
        raise ConfigError(f"sending={sending!r} is neither aside nor blocks")
    if not cores > 0:
        raise ConfigError(f"cores={cores}: there must be some")
    if not 0 <= action_s < math.inf:
        raise ConfigError(f"action_s={action_s} is no number of seconds")
    channels = {program.sends(action) for row in program.actions for action in row} - {None}
    speeds = [link] if isinstance(link, LinkSpeed) else list(link.values())
    missing = [] if isinstance(link, LinkSpeed) else sorted(c for c in channels if c is not None and c not in link)
    if missing:
        raise ConfigError(
            f"no speed is given from rank {missing[0][0]} to {missing[0][1]}, which {program.schedule} uses"
        )
    for speed in speeds:
        if not (speed.latency_s >= 0 and speed.bytes_per_s > 0 and math.isfinite(speed.latency_s)):
            raise ConfigError(f"{speed} is no speed of a link: it needs latency_s >= 0 and bytes_per_s > 0")
