"""A cluster gives places to members: it starts, signals and ends them, and brings back what they say.

A member runs ``entry(seat)`` where ``entry`` is "module:function"; everything it needs comes through its Seat.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from weft.comm.last_call import LastCall
from weft.comm.link import WORLD
from weft.cost import AUTO, LinkSpeed, all_reduce_bytes
from weft.errors import Interrupted

if TYPE_CHECKING:
    from weft.comm.endpoint import Endpoint
    from weft.comm.link import Link

PATIENCE_S = 1e7  # of a call that another deadline than its own ends


@dataclass(frozen=True)
class StoreSpec:
    """A torch TCPStore that all members reach. ``prefix`` keeps this group's keys apart from all others' in it."""

    host: str
    port: int
    prefix: str


@dataclass(frozen=True)
class LinkSpec:
    """How the members of one group are joined. ``nbytes``: what one member allocates in the carrier (shared memory).

    A member may stand in several groups (all workers; its island), in one of each name.
    ``speed`` and ``collective`` are the same for all: the choices that follow from them must be.
    ``host``: the address where this member listens. ``store``: where gloo and nccl meet (None: a file of this host).
    """

    carrier: str
    world: int
    deadline_s: float
    nbytes: int = 0
    port: int = 0  # tcp: rank r listens on port + r; 0: any free port
    device: str = "cpu"
    host: str = "127.0.0.1"
    store: StoreSpec | None = None
    group: str = WORLD
    aside: bool = False  # its messages travel while members compute, each when it is there: its calls wait for as long as it takes
    members: tuple[int, ...] = ()  # who is rank 0, 1, ...; empty: member r is rank r
    speed: LinkSpeed | None = None  # of the slowest way between two of them, where it was measured
    collective: str = AUTO  # how messages all-reduce
    hosts: tuple[tuple[int, ...], ...] = ()  # hierarchical: its ranks by host
    frames: bool = False  # an Endpoint each: its members may go while others stay

    @property
    def call_s(self) -> float:
        """The deadline of its calls."""
        return PATIENCE_S if self.aside else self.deadline_s

    def rank_of(self, member: int) -> int | None:
        """None if the member is not of this group."""
        if self.members:
            return self.members.index(member) if member in self.members else None
        return member if 0 <= member < self.world else None


@dataclass(frozen=True)
class MemberSpec:
    member: int
    role: str
    entry: str
    payload: dict[str, Any]


class Seat(ABC):
    """What a member sees of its cluster."""

    spec: MemberSpec

    @abstractmethod
    def send(self, message: dict[str, Any]) -> None:
        """To the driver. Blocks while the driver is behind; the member dies with the driver."""

    @abstractmethod
    def stop_requested(self) -> bool: ...

    @abstractmethod
    def note(self, call: LastCall) -> None:
        """Write down what is called now, where it can be read whatever becomes of this member."""

    @abstractmethod
    def link(self, group: str = WORLD) -> Link:
        """Join the group of this name (blocks until all its members came, or the deadline)."""

    @abstractmethod
    def endpoint(self, group: str = WORLD) -> Endpoint:
        """The same for a group of frames."""


@dataclass(frozen=True)
class Message:
    member: int
    data: dict[str, Any]


@dataclass(frozen=True)
class Output:
    """Text that a member printed."""

    member: int
    text: str


@dataclass(frozen=True)
class Exited:
    """``error``: what the member raised (errors.to_wire), None if it ended well or was killed. ``signal``: 0 if none."""

    member: int
    code: int
    signal: int = 0
    error: dict[str, Any] | None = None

    @property
    def failed(self) -> bool:
        return self.code != 0 or self.signal != 0 or self.error is not None


@dataclass(frozen=True)
class Asked:
    """What a member was at when ``Session.ask`` came to it.

    ``state``: the kernel's letter (R at work, S asleep, D waits for a disk, T stopped), X of one that has ended, "" of a
    thread. ``stack``: as faulthandler writes it, innermost first; empty if it did not answer. ``call``: the newest, and
    how many seconds ago it began and ended (None: it has not); None if it has called nothing.
    """

    member: int
    pid: int
    state: str
    stack: str
    call: LastCall | None = None
    began_s: float = 0.0
    ended_s: float | None = None

    @property
    def is_stopped(self) -> bool:
        """By a signal or a debugger."""
        return self.state in ("T", "t")


@dataclass(frozen=True)
class StopAsked:
    """Somebody signalled another process of the run to end."""

    rank: int


SessionEvent = Message | Output | Exited | Asked | StopAsked


class Session(ABC):
    """An open cluster. Used by one thread.

    Where an outer launcher started a process for each member, one of these processes drives the run and the others
    follow it: ``join`` tells which. Everywhere else there is nobody to join, and the defaults hold.
    """

    launch: str = ""  # names what an outer launcher started, the same after it has restarted us; "": there is none
    restart: int = 0  # how often it did
    notes: tuple[str, ...] = ()  # for the plan
    hosts: tuple[tuple[int, ...], ...] = ()  # the members on each, where the processes stand on several

    def join(self, request: Mapping[str, str], deadline_s: float, insecure: bool) -> bool:
        """Meet the other processes; all must have the same ``request``. True: drive the run. False: ``follow``."""
        return True

    def follow(self, task: dict[str, Any], stop_asked: Callable[[], bool]) -> dict[str, Any]:
        """Serve the process that drives, until it tells how the run ended. ``task``: as this process finds it."""
        raise NotImplementedError

    def finish(self, outcome: dict[str, Any]) -> None:
        """Tell those who follow how the run ended: {"result": ...} or {"error": ...}."""

    @abstractmethod
    def start(self, members: Sequence[MemberSpec], links: Sequence[LinkSpec]) -> None: ...

    @abstractmethod
    def request_stop(self) -> None:
        """Ask every member to stop at its next safe point."""

    @abstractmethod
    def ask(self) -> None:
        """Ask every member started last, also those that have ended, where it is. An Asked comes of each, within a second;
        none of those whose host is gone. It disturbs nobody."""

    @abstractmethod
    def kill(self) -> None:
        """End every member now. Their Exited events still come."""

    @abstractmethod
    def poll(self, timeout_s: float) -> list[SessionEvent]:
        """What happened, oldest first; empty after ``timeout_s`` of silence."""

    @abstractmethod
    def close(self) -> None:
        """End everything. Safe to call twice."""

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class Cluster(ABC):
    name: str
    restart: int = 0  # how often an outer launcher has restarted this process

    def world(self, workers: int | None) -> int:
        """How many workers, where the user asked for ``workers``. ConfigError if there cannot be that many."""
        return 1 if workers is None else workers

    @abstractmethod
    def open(self, preload: Sequence[str]) -> Session:
        """``preload``: modules that every member will import."""

    def check(self, carrier: str) -> None:
        """Refuse a carrier that cannot work here."""

    @abstractmethod
    def default_carrier(self, world: int, device: str) -> tuple[str, str]:
        """The best carrier for this group, and why."""


@dataclass
class Call:
    """Run one entry in a throw-away member and wait for what it sends."""

    session: Session
    on_output: Callable[[Output], None]
    reply: dict[str, Any] = field(default_factory=dict)

    def __call__(self, entry: str, payload: dict[str, Any]) -> Exited:
        """``reply`` holds what the member sent; the Exited tells how it ended. There is no deadline: a model may be slow,
        and the user sees it and can interrupt."""
        self.reply = {}
        self.session.start([MemberSpec(-1, "preflight", entry, payload)], [])
        while True:
            for event in self.session.poll(1.0):
                if isinstance(event, Message):
                    self.reply.update(event.data)
                elif isinstance(event, Output):
                    self.on_output(event)
                elif isinstance(event, StopAsked):
                    raise Interrupted(
                        f"stopped before training began (by a signal to rank {event.rank}): nothing was lost."
                    )
                elif isinstance(event, Exited):
                    return event


def bytes_by(specs: Sequence[LinkSpec]) -> Callable[[int, int], int]:
    """(bytes, world) -> what a member sends to all-reduce them in its group of that size."""
    by_world = {spec.world: spec for spec in reversed(specs)}

    def bytes_for(nbytes: int, world: int) -> int:
        spec = by_world.get(world, specs[0])
        return all_reduce_bytes(
            spec.carrier, nbytes, world, spec.collective, spec.speed, [len(ranks) for ranks in spec.hosts]
        )

    return bytes_for


def hosts_of(members: Sequence[int], hosts: Sequence[Sequence[int]]) -> tuple[tuple[int, ...], ...]:
    """The ranks of a group by host: rank r is ``members[r]``."""
    rank_of = {member: rank for rank, member in enumerate(members)}
    by_host = [tuple(rank_of[m] for m in host if m in rank_of) for host in hosts]
    return tuple(ranks for ranks in by_host if ranks)


def resolve(entry: str) -> Callable[..., Any]:
    module, _, name = entry.partition(":")
    function: Callable[..., Any] = getattr(importlib.import_module(module), name)
    return function
