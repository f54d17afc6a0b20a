"""A cluster gives places to members: it starts, signals and ends them, and brings back what they say.

A member runs ``entry(seat)`` where ``entry`` is "module:function"; everything it needs comes through its Seat.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from weft.comm.link import WORLD

if TYPE_CHECKING:
    from weft.comm.link import Link


@dataclass(frozen=True)
class LinkSpec:
    """How the members of one group are joined. ``nbytes``: what one member allocates in the carrier (shared memory).

    A member may stand in several groups (all workers; its island), in one of each name.
    """

    carrier: str
    world: int
    deadline_s: float
    nbytes: int = 0
    port: int = 0  # tcp: rank r listens on port + r; 0: any free port
    device: str = "cpu"
    group: str = WORLD
    members: tuple[int, ...] = ()  # who is rank 0, 1, ...; empty: member r is rank r

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
    def link(self, group: str = WORLD) -> Link:
        """Join the group of this name (blocks until all its members came, or the deadline)."""


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


SessionEvent = Message | Output | Exited


class Session(ABC):
    """An open cluster. Used by one thread."""

    @abstractmethod
    def start(self, members: Sequence[MemberSpec], links: Sequence[LinkSpec]) -> None: ...

    @abstractmethod
    def request_stop(self) -> None:
        """Ask every member to stop at its next safe point."""

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
                else:
                    return event


def resolve(entry: str) -> Callable[..., Any]:
    module, _, name = entry.partition(":")
    function: Callable[..., Any] = getattr(importlib.import_module(module), name)
    return function
