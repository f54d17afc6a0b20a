"""Pipeline schedules as programs: what each rank computes, in order, as the papers draw it.

S stages stand on P ranks, v = S / P on each; M microbatches go through all of them forward, then back. A rank runs its list in
order and waits for inputs; what it has computed for another rank leaves at once. With equal stages and free links, and
F = I = W = 1/v of a rank's forward, a step of 3M takes longer by

  gpipe             3 (P-1)        holds M microbatches             Huang et al. 2019
  1f1b              3 (P-1)        holds at most P                  Narayanan et al. 2021, 2.2.1 (PipeDream-flush)
  interleaved-1f1b  3 (P-1) / v    v times the messages             Narayanan et al. 2021, 2.2.2
  looped-bfs        3 (P-1) / v    holds M; messages have time      Lamy-Poirier 2022
  interleaved-zb    (P-1) / v      W fills the bubble               Qi et al. 2023, ZB-H1 (ZB1P), interleaved
  zbv               (P-1) / 2      V: the last stage is on rank 0   Qi et al. 2024
  dualpipe-v        (P-1) / 2      V; F and B in pairs              DeepSeek-AI 2024, DualPipeV

A test holds the lists against those of torch.distributed.pipelining, action for action.

A recurrent model's microbatch may go through the stages in T time chunks, a wavefront: a stage takes a chunk with the state that its own chunk
before has left, forward in rising order and backward, whose gradient of that state comes from the chunk after, in falling order. So what is
counted in actions are pieces, T to a microbatch.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

from weft.errors import ConfigError, UnknownName

Kind = Literal["F", "B", "I", "W"]
Placement = Literal["looped", "v"]


class Action(NamedTuple):
    """What ``stage`` computes of a microbatch: F, forward; B, the whole backward; or in its place first I, the gradient of its
    input, then W, the gradients of its weights. ``microbatch``: with T time chunks, T * microbatch + chunk."""

    stage: int
    kind: Kind
    microbatch: int

    def __str__(self) -> str:
        return f"{self.stage}{self.kind}{self.microbatch}"


class Input(NamedTuple):
    """What ``stage`` waits for: before F the output of the stage before it, before B or I the gradient from the stage after it."""

    stage: int
    forward: bool
    microbatch: int


@dataclass(frozen=True)
class Program:
    """``placement``: the rank of each stage. ``actions``: by rank, in the order in which it computes them. ``chunks``: of time, in which each
    microbatch goes through the stages."""

    schedule: str
    microbatches: int
    placement: tuple[int, ...]
    actions: tuple[tuple[Action, ...], ...]
    chunks: int = 1

    @property
    def pieces(self) -> int:
        """What a stage computes forward, one after the other."""
        return self.microbatches * self.chunks

    @property
    def ranks(self) -> int:
        return len(self.actions)

    @property
    def stages(self) -> int:
        return len(self.placement)

    @property
    def stages_per_rank(self) -> int:
        return self.stages // self.ranks

    def needs(self, action: Action) -> Input | None:
        """None: nothing from another stage (the first stage's F, the last one's B and I, every W)."""
        if action.kind == "F":
            return Input(action.stage, True, action.microbatch) if action.stage > 0 else None
        last = action.stage == self.stages - 1
        return None if action.kind == "W" or last else Input(action.stage, False, action.microbatch)

    def gives(self, action: Action) -> Input | None:
        """What another stage waits for, on this rank or another. None: nothing (the last stage's F, the first one's B and I, every W)."""
        if action.kind == "F":
            return Input(action.stage + 1, True, action.microbatch) if action.stage < self.stages - 1 else None
        return None if action.kind == "W" or action.stage == 0 else Input(action.stage - 1, False, action.microbatch)

    def sends(self, action: Action) -> tuple[int, int] | None:
        """The channel (from rank, to rank) that takes what it gives; None if that stays on its rank."""
        given = self.gives(action)
        if given is None or self.placement[given.stage] == self.placement[action.stage]:
            return None
        return self.placement[action.stage], self.placement[given.stage]


def place(placement: Placement, ranks: int, stages_per_rank: int) -> tuple[int, ...]:
    """The rank of each stage. looped: round the ranks, 0 1 2 0 1 2; v: there and back, 0 1 2 2 1 0."""
    if placement == "v":
        if stages_per_rank != 2:
            raise ConfigError(f"placement v needs 2 stages on each rank, not {stages_per_rank}")
        return (*range(ranks), *reversed(range(ranks)))
    return tuple(stage % ranks for stage in range(ranks * stages_per_rank))


# The lists. Each function writes one rank's.

Order = Callable[[int, int, int, int], Iterator[Action]]  # (rank, ranks, stages per rank, microbatches)


def gpipe(rank: int, ranks: int, per_rank: int, microbatches: int) -> Iterator[Action]:
    """All forward, then all backward, in the same order as torch does. (The paper's figure goes backward from the last; the time is the same.)"""
    for kind in ("F", "B"):
        for m in range(microbatches):
            yield Action(rank, kind, m)


def one_f_one_b(rank: int, ranks: int, per_rank: int, microbatches: int) -> Iterator[Action]:
    """A rank runs ahead by as many microbatches as there are ranks after it; then one forward, one backward."""
    forwards = [Action(rank, "F", m) for m in range(microbatches)]
    backwards = [Action(rank, "B", m) for m in range(microbatches)]
    return _alternate(forwards, backwards, warm_up=ranks - 1 - rank)


def looped_bfs(rank: int, ranks: int, per_rank: int, microbatches: int) -> Iterator[Action]:
    """Breadth first: each stage takes all microbatches, so that what it sends has long to arrive; then the same backwards."""
    forwards = [Action(stage, "F", m) for stage in _looped(rank, ranks, per_rank) for m in range(microbatches)]
    yield from forwards
    for stage, _, m in reversed(forwards):
        yield Action(stage, "B", m)


def interleaved_1f1b(rank: int, ranks: int, per_rank: int, microbatches: int) -> Iterator[Action]:
    """Depth first: a round of microbatches goes through a rank's first stage, then the next; backward the other way round."""
    round_size = _round_size(ranks, microbatches)
    forwards = _by_rounds("F", _looped(rank, ranks, per_rank), microbatches, round_size)
    backwards = _by_rounds("B", _looped(rank, ranks, per_rank)[::-1], microbatches, round_size)
    return _alternate(forwards, backwards, warm_up=(per_rank - 1) * round_size + 2 * (ranks - 1 - rank))


def interleaved_zb(rank: int, ranks: int, per_rank: int, microbatches: int) -> Iterator[Action]:
    """The same with half the head start, for I alone is what the rank before waits for. W follows ``rank`` microbatches behind:
    the later a rank's first I, the more W are left for its end, where it would otherwise wait."""
    round_size = _round_size(ranks, microbatches)
    forwards = _by_rounds("F", _looped(rank, ranks, per_rank), microbatches, round_size)
    backwards = _by_rounds("I", _looped(rank, ranks, per_rank)[::-1], microbatches, round_size)
    waiting: deque[Action] = deque()
    for action in _alternate(forwards, backwards, warm_up=(per_rank - 1) * round_size + ranks - 1 - rank):
        yield action
        if action.kind == "I":
            waiting.append(action._replace(kind="W"))
            if len(waiting) > rank:
                yield waiting.popleft()
    yield from waiting


def zbv(rank: int, ranks: int, per_rank: int, microbatches: int) -> Iterator[Action]:
    """Down the V and up again: the gradient of the last stage begins on rank 0, whose first stage it reaches last. For at least
    2 ranks - 1 microbatches."""
    first, last = rank, 2 * ranks - 1 - rank
    row = _Row()
    # warm-up
    for _ in range(2 * (ranks - rank) - 1):
        row.forward(first)
    for _ in range(rank):
        row.forward(last)
        row.forward(first)
    for _ in range(ranks - rank):
        row.forward(last)
        row.input_gradient(last)
        row.weight_gradient(last)
    # stable
    while row.num_forwards[last] < microbatches:
        if row.num_forwards[first] < microbatches:
            row.forward(first)
        row.input_gradient(first)
        row.weight_gradient(first)
        row.forward(last)
        row.input_gradient(last)
        row.weight_gradient(last)
    # cool-down
    for _ in range(rank):
        row.input_gradient(first)
        row.input_gradient(last)
    for _ in range(ranks - rank):
        row.input_gradient(first)
        row.weight_gradient(first)
    for stage in (last, first):
        for _ in range(rank):
            row.weight_gradient(stage)
    return iter(row.actions)


def dualpipe_v(rank: int, ranks: int, per_rank: int, microbatches: int) -> Iterator[Action]:
    """DualPipe's two directions folded into a V. In the main part each forward of one stage goes with a backward of the other, to
    hide the messages of the one behind the other. For at least 2 ranks microbatches. Steps as in github.com/deepseek-ai/DualPipe."""
    first, last = rank, 2 * ranks - 1 - rank
    row = _Row()
    for _ in range(2 * (ranks - 1 - rank)):  # step 1
        row.forward(first)
    for _ in range(rank + 1):  # step 2
        row.forward(first)
        row.forward(last)
    for _ in range(ranks - 1 - rank):  # step 3: zero bubble
        row.input_gradient(last)
        row.weight_gradient()
        row.forward(last)
    for _ in range(microbatches - 2 * ranks + rank + 1):  # step 4, the main one
        row.forward(first)
        row.backward(last)
        row.forward(last)
        row.backward(first)
    for _ in range(ranks - 1 - rank):  # step 5
        row.backward(last)
        row.forward(last)
        row.backward(first)
    for k in range(2 * (rank + 1)):  # step 6: its second half splits the backward
        stage = first if k % 2 else last
        if k <= rank:
            row.backward(stage)
        else:
            row.input_gradient(stage)
    for _ in range(ranks - 1 - rank):  # step 7
        row.weight_gradient()
        row.input_gradient(first)
    for _ in range(rank + 1):  # step 8
        row.weight_gradient()
    return iter(row.actions)


class _Row:
    """A rank's list, written action by action: each is for the next microbatch of its stage."""

    def __init__(self) -> None:
        self.actions: list[Action] = []
        self.num_forwards: defaultdict[int, int] = defaultdict(int)  # by stage
        self._num_backwards: defaultdict[int, int] = defaultdict(int)
        self._waiting: list[Action] = []  # W whose I is done, the oldest first

    def forward(self, stage: int) -> None:
        self.actions.append(Action(stage, "F", self.num_forwards[stage]))
        self.num_forwards[stage] += 1

    def backward(self, stage: int) -> None:
        self.actions.append(Action(stage, "B", self._num_backwards[stage]))
        self._num_backwards[stage] += 1

    def input_gradient(self, stage: int) -> None:
        self._waiting.append(Action(stage, "W", self._num_backwards[stage]))
        self.actions.append(Action(stage, "I", self._num_backwards[stage]))
        self._num_backwards[stage] += 1

    def weight_gradient(self, stage: int | None = None) -> None:
        """The oldest that waits, of ``stage`` or of any; nothing if none does."""
        for action in self._waiting:
            if stage in (None, action.stage):
                self._waiting.remove(action)
                self.actions.append(action)
                return


def _alternate(forwards: Sequence[Action], backwards: Sequence[Action], warm_up: int) -> Iterator[Action]:
    """Forwards first, then one of each, then what is left of the backwards."""
    warm_up = min(warm_up, len(forwards))
    yield from forwards[:warm_up]
    for forward, backward in zip(forwards[warm_up:], backwards):
        yield forward
        yield backward
    yield from backwards[len(forwards) - warm_up :]


def _looped(rank: int, ranks: int, per_rank: int) -> list[int]:
    return [rank + k * ranks for k in range(per_rank)]


def _round_size(ranks: int, microbatches: int) -> int:
    """A round has at least as many microbatches as there are ranks, where there are so many: else a rank would wait for the first
    to come round."""
    return microbatches // max(1, microbatches // ranks)


def _by_rounds(kind: Kind, stages: Sequence[int], microbatches: int, round_size: int) -> list[Action]:
    return [
        Action(stage, kind, m)
        for start in range(0, microbatches, round_size)
        for stage in stages
        for m in range(start, start + round_size)
    ]


# What there is


@dataclass(frozen=True)
class Schedule:
    """What a schedule is and asks for. ``least_stages``, ``most_stages``: on each rank (0: any number)."""

    name: str
    torch_name: str
    summary: str
    source: str
    placement: Placement
    least_stages: int
    most_stages: int
    splits_backward: bool
    order: Order
    #: (ranks, microbatches) -> the number, as many or more, for which ``order`` is written
    whole: Callable[[int, int], int]

    def stages_per_rank(self, asked: int = 0) -> int:
        """``asked`` if it can be so; 0: the fewest."""
        per_rank = asked or self.least_stages
        if per_rank < self.least_stages or (self.most_stages and per_rank > self.most_stages):
            others = [s.name for s in SCHEDULES if s.takes(per_rank)]
            raise ConfigError(
                f"schedule {self.name} takes {self.stages_in_words}, not {per_rank}: "
                f"{f'ask for that, or choose {_or(others)}' if others else f'at least {self.least_stages}'}"
            )
        return per_rank

    def takes(self, per_rank: int) -> bool:
        return per_rank >= self.least_stages and (not self.most_stages or per_rank <= self.most_stages)

    def fills_from(self, ranks: int) -> int:
        """The fewest microbatches that keep all ranks busy in the middle of a step; with fewer it runs, with a larger bubble."""
        return max(ranks, self.whole(ranks, 1))

    @cached_property
    def stages_in_words(self) -> str:
        if self.least_stages == self.most_stages:
            return f"{self.least_stages} stage{'s' if self.least_stages > 1 else ''} on each rank"
        return f"{self.least_stages} or more stages on each rank"


def _any(ranks: int, microbatches: int) -> int:
    return microbatches


def _rounds(ranks: int, microbatches: int) -> int:
    """The next number that is a multiple of its rounds."""
    while microbatches % max(1, microbatches // ranks):
        microbatches += 1
    return microbatches


#: Of equals the first is chosen.
SCHEDULES = (
    Schedule(
        name="1f1b",
        torch_name="1F1B",
        summary="one forward, one backward; no more microbatches are held than there are ranks",
        source="Narayanan et al. 2021, arXiv:2104.04473, 2.2.1 (PipeDream-flush)",
        placement="looped",
        least_stages=1,
        most_stages=1,
        splits_backward=False,
        order=one_f_one_b,
        whole=_any,
    ),
    Schedule(
        name="gpipe",
        torch_name="GPipe",
        summary="all forward, then all backward; messages have long to arrive, all microbatches are held",
        source="Huang et al. 2019, arXiv:1811.06965",
        placement="looped",
        least_stages=1,
        most_stages=1,
        splits_backward=False,
        order=gpipe,
        whole=_any,
    ),
    Schedule(
        name="interleaved-1f1b",
        torch_name="Interleaved1F1B",
        summary="several stages on a rank make the bubble smaller and the messages more; few microbatches are held",
        source="Narayanan et al. 2021, arXiv:2104.04473, 2.2.2",
        placement="looped",
        least_stages=2,
        most_stages=0,
        splits_backward=False,
        order=interleaved_1f1b,
        whole=_rounds,
    ),
    Schedule(
        name="looped-bfs",
        torch_name="LoopedBFS",
        summary="several stages on a rank, each takes all microbatches in a row: for slow links, if memory holds them all",
        source="Lamy-Poirier 2022, arXiv:2211.05953",
        placement="looped",
        least_stages=2,
        most_stages=0,
        splits_backward=False,
        order=looped_bfs,
        whole=_any,
    ),
    Schedule(
        name="interleaved-zb",
        torch_name="InterleavedZeroBubble",
        summary="the gradients of weights fill the bubble; one stage on a rank (ZB-H1) or several",
        source="Qi et al. 2023, arXiv:2401.10241, ZB-H1",
        placement="looped",
        least_stages=1,
        most_stages=0,
        splits_backward=True,
        order=interleaved_zb,
        whole=_rounds,
    ),
    Schedule(
        name="zbv",
        torch_name="ZBVZeroBubble",
        summary="two stages on a rank in a V, and the gradients of weights fill the bubble",
        source="Qi et al. 2023, arXiv:2401.10241, 6; Qi et al. 2024, arXiv:2405.15362",
        placement="v",
        least_stages=2,
        most_stages=2,
        splits_backward=True,
        order=zbv,
        whole=lambda ranks, microbatches: max(microbatches, 2 * ranks - 1),
    ),
    Schedule(
        name="dualpipe-v",
        torch_name="DualPipeV",
        summary="two stages on a rank in a V, forward of the one beside backward of the other; splits the backward at the ends only",
        source="DeepSeek-AI 2024, arXiv:2412.19437, 3.2.1; github.com/deepseek-ai/DualPipe",
        placement="v",
        least_stages=2,
        most_stages=2,
        splits_backward=True,
        order=dualpipe_v,
        whole=lambda ranks, microbatches: max(microbatches, 2 * ranks),
    ),
)


def names() -> list[str]:
    return [schedule.name for schedule in SCHEDULES]


def find(name: str) -> Schedule:
    """By our name or torch's, in any case."""
    for schedule in SCHEDULES:
        if name.lower() in (schedule.name, schedule.torch_name.lower()):
            return schedule
    raise UnknownName.of("schedule", name, names())


def program(
    schedule: str | Schedule, ranks: int, microbatches: int, stages_per_rank: int = 0, chunks: int = 1
) -> Program:
    """``stages_per_rank``: 0, the fewest that the schedule takes. ``chunks``: of time.

    Any number of microbatches goes: where an order is written for others (rounds; a V that must be filled), it is that for the next
    such number, without those that are too many. A list that runs still does when a microbatch is left out.
    """
    spec = schedule if isinstance(schedule, Schedule) else find(schedule)
    if ranks < 1 or microbatches < 1:
        raise ConfigError(f"a pipeline needs a rank and a microbatch, not {ranks} and {microbatches}")
    if chunks < 1:
        raise ConfigError(f"chunks={chunks} is not possible: 1 (all of a sequence at once) or more")
    if chunks > 1 and spec.splits_backward:
        whole_ones = [other.name for other in SCHEDULES if not other.splits_backward]
        raise ConfigError(
            f"schedule {spec.name} splits the backward, which does not go with time chunks (chunks={chunks}): choose {_or(whole_ones)}"
        )
    per_rank = spec.stages_per_rank(stages_per_rank)
    whole = spec.whole(ranks, microbatches)
    return Program(
        schedule=spec.name,
        microbatches=microbatches,
        placement=place(spec.placement, ranks, per_rank),
        actions=tuple(
            tuple(
                piece
                for action in spec.order(rank, ranks, per_rank, whole)
                if action.microbatch < microbatches
                for piece in _in_chunks(action, chunks)
            )
            for rank in range(ranks)
        ),
        chunks=chunks,
    )


def _in_chunks(action: Action, chunks: int) -> Iterator[Action]:
    """Each in place of one, so that no list waits for more than before: what another stage needs of a chunk is done no later."""
    order = range(chunks) if action.kind == "F" else reversed(range(chunks))
    return (action._replace(microbatch=chunks * action.microbatch + chunk) for chunk in order)


def _or(words: Sequence[str]) -> str:
    return " or ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else words[0]
