"""Does a program run, and what travels between ranks, in which order.

Which rank computes what next is fixed, so whether all come to their end does not depend on how fast they or the links are: any run
in which each goes on when it can tells it. A channel is one direction between two ranks; its messages arrive in the order sent.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

from weft.errors import ConfigError
from weft.pipelines.schedules import Action, Input, Program

Channel = tuple[int, int]  # (from rank, to rank)


class Arrivals(NamedTuple):
    """What the receiver of a channel must be ready to keep, in messages.

    ``overtaken``: of those read so far, at most so many are needed later than the one it reads for; 0: they come in the order of need.
    ``held``: at most so many have arrived and are not yet used, if the sender never waits to send and the receiver is as slow as can be.
    """

    messages: int
    overtaken: int
    held: int


def validate(program: Program) -> None:
    """Every stage computes each microbatch once (F, then B or I and W), time chunks forward in rising and backward in falling order, on its
    rank, in lists that all come to their end.

    Raises ConfigError: it names the action, or of lists that wait for one another what each rank waits for.
    """
    _check_counts(program)
    run = _Run(program)
    run.go_on()
    if not run.ended:
        waiting = "; ".join(f"rank {rank} {what}" for rank, what in run.waits())
        raise ConfigError(
            f"the lists of {program.schedule} never end: {waiting}. Put what is waited for earlier in its rank's list"
        )


def channel_order(program: Program) -> dict[Channel, list[Action]]:
    """What is sent on each channel, as the actions whose outcome it is, in the order in which the sender computes them."""
    order: dict[Channel, list[Action]] = {}
    for row in program.actions:
        for action in row:
            channel = program.sends(action)
            if channel is not None:
                order.setdefault(channel, []).append(action)
    return order


def arrivals(program: Program) -> dict[Channel, Arrivals]:
    held: Counter[Channel] = Counter()
    for receiver in range(program.ranks):
        held.update(_most_held(program, receiver))
    return {
        channel: Arrivals(len(sent), _most_overtaken(program, channel, sent), held[channel])
        for channel, sent in channel_order(program).items()
    }


def in_flight(program: Program) -> tuple[int, ...]:
    """By stage: of how many pieces (microbatches, or time chunks of such) at once it holds activations, at most. From F until B or W."""
    now: Counter[int] = Counter()
    most: Counter[int] = Counter()
    for row in program.actions:
        for stage, kind, _ in row:
            now[stage] += {"F": 1, "I": 0, "B": -1, "W": -1}[kind]
            most[stage] = max(most[stage], now[stage])
    return tuple(most[stage] for stage in range(program.stages))


class _Run:
    """A program on ranks and links without speed: each rank goes on while what it needs is there."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.position = [0] * program.ranks
        self.there: set[Input] = set()
        self._waiting: dict[Input, int] = {}  # what ranks stand still for

    @property
    def ended(self) -> bool:
        return all(at == len(row) for at, row in zip(self.position, self.program.actions))

    def go_on(self, but: int | None = None) -> list[Action]:
        """All ranks as far as they come; rank ``but`` stands still. Returns what was computed."""
        done: list[Action] = []
        ready = [rank for rank in range(self.program.ranks) if rank != but]
        while ready:
            rank = ready.pop()
            while (action := self.next_of(rank)) is not None:
                needed = self.program.needs(action)
                if needed is not None and needed not in self.there:
                    self._waiting[needed] = rank
                    break
                given = self.step(rank)
                done.append(action)
                if given in self._waiting:
                    ready.append(self._waiting.pop(given))
        return done

    def step(self, rank: int) -> Input | None:
        """The rank's next action, whose input is there. Returns what it gives."""
        given = self.program.gives(self.program.actions[rank][self.position[rank]])
        self.position[rank] += 1
        if given is not None:
            self.there.add(given)
        return given

    def next_of(self, rank: int) -> Action | None:
        row = self.program.actions[rank]
        return row[self.position[rank]] if self.position[rank] < len(row) else None

    def waits(self) -> Iterator[tuple[int, str]]:
        for rank in range(self.program.ranks):
            action = self.next_of(rank)
            if action is not None:
                before = self.program.needs(action)
                assert before is not None
                what = f"{before.stage - 1}F" if before.forward else f"{before.stage + 1}B or I"
                yield rank, f"waits before {action} for {what} of microbatch {before.microbatch}"


def _check_counts(program: Program) -> None:
    done: set[Action] = set()
    for rank, row in enumerate(program.actions):
        for action in row:
            stage, kind, m = action
            wrong = ""
            if not (0 <= stage < program.stages and 0 <= m < program.pieces):
                wrong = f"there are {program.stages} stages and {program.microbatches} microbatches" + (
                    f" of {program.chunks} time chunks" if program.chunks > 1 else ""
                )
            elif program.placement[stage] != rank:
                wrong = f"stage {stage} stands on rank {program.placement[stage]}"
            elif action in done:
                wrong = "for the second time"
            elif kind != "F" and Action(stage, "F", m) not in done:
                wrong = f"before {stage}F{m}"
            elif kind == "W" and Action(stage, "I", m) not in done:
                wrong = f"before {stage}I{m}"
            elif kind in "BI" and Action(stage, "I" if kind == "B" else "B", m) in done:
                wrong = "after the other: a backward is either whole (B) or split (I, W)"
            elif kind == "F" and m % program.chunks and Action(stage, "F", m - 1) not in done:
                wrong = f"before {stage}F{m - 1}, whose state its time chunk goes on from"
            elif kind != "F" and (m + 1) % program.chunks and Action(stage, kind, m + 1) not in done:
                wrong = f"before {stage}{kind}{m + 1}, from which the gradient of its time chunk's state comes"
            if wrong:
                raise ConfigError(f"{program.schedule}: rank {rank} would compute {action}, {wrong}")
            done.add(action)
    for stage in range(program.stages):
        for m in range(program.pieces):
            kinds = "".join(kind for kind in "FBIW" if Action(stage, kind, m) in done)  # type: ignore[arg-type]
            if kinds not in ("FB", "FIW"):
                raise ConfigError(
                    f"{program.schedule}: stage {stage} computes of microbatch {m} {', '.join(kinds) or 'nothing'}: "
                    "it needs F and B, or F, I and W"
                )


def _most_held(program: Program, receiver: int) -> Counter[Channel]:
    """All others run as far as they come before the receiver takes each single step."""
    run = _Run(program)
    now: Counter[Channel] = Counter()
    most: Counter[Channel] = Counter()
    while True:
        for action in run.go_on(but=receiver):
            channel = program.sends(action)
            if channel is not None and channel[1] == receiver:
                now[channel] += 1
                most[channel] = max(most[channel], now[channel])
        taken = run.next_of(receiver)
        if taken is None:
            return most
        needed = program.needs(taken)
        if needed is not None:
            assert needed in run.there, "validate the program first"
            source = program.placement[needed.stage - 1 if needed.forward else needed.stage + 1]
            if source != receiver:
                now[source, receiver] -= 1
        run.step(receiver)


def _most_overtaken(program: Program, channel: Channel, sent: list[Action]) -> int:
    arriving = iter(sent)
    kept: set[Input] = set()
    most = 0
    coming = {program.gives(action) for action in sent}
    for action in program.actions[channel[1]]:
        needed = program.needs(action)
        if needed is None or needed not in coming:
            continue
        while needed not in kept:
            given = program.gives(next(arriving))
            assert given is not None
            kept.add(given)
        kept.remove(needed)
        most = max(most, len(kept))
    return most
