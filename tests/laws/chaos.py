"""All members of a parameter-server run on a network that is drawn by key: who goes on, which frame arrives, who is killed, frozen or cut off, and when.

The members are the real ones (patterns/working.py, leading.py), each in a thread of which one runs at a time; only endpoint and clock are not. Time is
virtual: a schedule of minutes takes a second, and the same key gives the same schedule.
"""

from __future__ import annotations

import dataclasses
import importlib
import random
import threading
import types
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from weft.comm.endpoint import Arrival, Event, Lost, Sending, Silent
from weft.comm.link import SoloLink
from weft.comm.wire import Head, Kind
from weft.config import Config, TaskRef
from weft.errors import CommError, DeadlineExceeded, WeftError
from weft.patterns import registry
from weft.patterns.base import Context, Deposed
from weft.patterns.parameter_server import ParameterServer
from weft.patterns.preflight import preflight
from weft.servers import messages as m

MODULES = ("serving", "leading", "succession", "working")
DEADLINE_S = 20.0
GIVE_UP_S = 120.0  # virtual seconds


class Killed(BaseException):
    """This member is no more."""


@dataclasses.dataclass
class Frame:
    head: Head
    payload: Sequence[Any]
    ready: float  # when it may arrive
    sending: Sending


@dataclasses.dataclass
class Plan:
    """What goes wrong: of a member, at which of the frames that it sends."""

    kind: str  # "kill", "freeze", "cut"
    member: int
    at: int
    seconds: float = 0.0
    others: tuple[int, ...] = ()  # cut: from whom; kill: who goes with it


class Wire:
    """Stands for an Endpoint."""

    def __init__(self, net: Net, member: int) -> None:
        self.net, self.member, self.deadline_s = net, member, DEADLINE_S
        self.patience: dict[int, float] = {}
        self.lost: set[int] = set()
        self.told_silent: set[int] = set()
        self.sent = 0
        self.closed = False

    @property
    def peers(self) -> tuple[int, ...]:
        return tuple(p for p in range(self.net.size) if p != self.member and p not in self.lost)

    @property
    def silent(self) -> frozenset[int]:
        return frozenset(p for p in self.peers if self.net.is_silent(self.member, p))

    def memory(self, nbytes: int) -> memoryview:
        return np.zeros(nbytes, np.uint8).data

    def look(self, peers: Any, doing: object) -> None: ...

    def isend(self, peer: int, seq: int, meta: bytes, payload: Sequence[Any] = ()) -> Sending:
        sending = Sending(peer)
        if self.closed:  # a generator that is thrown away says goodbye, and who was killed does not
            return sending
        self.sent += 1
        self.net.strike(self)
        head = Head(Kind.DATA, self.member, 0, seq, meta, sum(memoryview(p).nbytes for p in payload))
        self.net.put(self.member, peer, Frame(head, list(payload), 0.0, sending))
        return sending

    def recv_any(self, timeout_s: float | None, place: Callable[[Head], Sequence[memoryview]]) -> Event:
        return self.net.wait(self, self.deadline_s if timeout_s is None else timeout_s, place)


class Net:
    def __init__(self, size: int, key: int, plans: Sequence[Plan]) -> None:
        self.size, self.dice, self.plans = size, random.Random(key), list(plans)
        self.now = 0.0
        self.channels: dict[tuple[int, int], deque[Frame]] = {(a, b): deque() for a in range(size) for b in range(size)}
        self.wires = [Wire(self, k) for k in range(size)]
        self.turns = [threading.Semaphore(0) for _ in range(size)]
        self.mine = threading.Semaphore(0)
        self.waiting: dict[int, float] = {}  # until when
        self.ended: dict[int, BaseException | None] = {}
        self.left: set[int] = set()  # with a goodbye
        self.frozen: dict[int, float] = {}  # until when
        self.cuts: list[tuple[int, frozenset[int], float]] = []
        self.quiet_since: dict[tuple[int, int], float] = {}
        self.partial: dict[tuple[int, int], tuple[Frame, Sequence[memoryview]]] = {}  # placed, and not all there
        self.inbox: list[deque[Event]] = [deque() for _ in range(size)]
        self.log: list[tuple[Any, ...]] = []

    # -- what members do

    def put(self, sender: int, receiver: int, frame: Frame) -> None:
        if receiver in self.ended:
            return
        frame.ready = self.now + self.dice.expovariate(1000.0)
        self.channels[sender, receiver].append(frame)

    def strike(self, wire: Wire) -> None:
        for plan in [p for p in self.plans if p.member == wire.member and wire.sent >= p.at]:
            self.plans.remove(plan)
            self.log.append((round(self.now, 3), plan.kind, plan.member, plan.others))
            if plan.kind == "kill":
                for member in {wire.member, *plan.others}:
                    self.wires[member].closed, self.waiting[member] = True, 0.0
                del self.waiting[wire.member]
                raise Killed
            if plan.kind == "freeze":
                self.frozen[wire.member] = self.now + plan.seconds
                self.hand_over(wire.member, self.now)
            else:
                self.cuts.append((plan.member, frozenset(plan.others), self.now + plan.seconds))

    def wait(self, wire: Wire, timeout_s: float, place: Callable[[Head], Sequence[memoryview]]) -> Event:
        until, me = self.now + timeout_s, wire.member
        while True:
            if self.inbox[me]:
                return self.inbox[me].popleft()
            self.take_in(wire, place)
            if self.inbox[me]:
                continue
            if self.now >= until:
                raise DeadlineExceeded("nothing")
            self.hand_over(me, until)

    def take_in(self, wire: Wire, place: Callable[[Head], Sequence[memoryview]]) -> None:
        """What has arrived: one frame, now and then more; a frame may be placed, and its payload come later."""
        me = wire.member
        for peer in wire.peers:
            quiet = self.is_silent(me, peer)
            if quiet and peer not in wire.told_silent:
                self.inbox[me].append(Silent(peer, 0, 1.0))
            (wire.told_silent.add if quiet else wire.told_silent.discard)(peer)
        while senders := [p for p in range(self.size) if self.arrives(p, me)]:
            sender = self.dice.choice(senders)
            channel = self.channels[sender, me]
            if (sender, me) in self.partial:
                frame, views = self.partial.pop((sender, me))
            elif channel:
                frame = channel.popleft()
                try:
                    views = place(frame.head)
                except CommError as refusal:
                    raise AssertionError(f"member {me} refused a frame: {refusal}") from refusal
                if views and self.dice.random() < 0.2:
                    self.partial[sender, me] = (frame, views)
                    frame.ready = self.now + self.dice.expovariate(100.0)
                    continue
            else:
                wire.lost.add(sender)
                left = sender in self.left
                self.inbox[me].append(Lost(sender, 0, "it closed its link" if left else "connection closed", left))
                return
            data = b"".join(bytes(memoryview(p).cast("B")) for p in frame.payload)
            at = 0
            for view in views:
                view[:] = data[at : at + len(view)]
                at += len(view)
            frame.sending.done = True
            self.inbox[me].append(Arrival(sender, frame.head, views))
            if self.dice.random() < 0.7:
                return

    def arrives(self, sender: int, me: int) -> bool:
        if sender == me or sender in self.wires[me].lost or self.is_cut(sender, me):
            return False
        if (sender, me) in self.partial:
            if sender in self.ended and sender not in self.left:  # the rest of it never comes
                del self.partial[sender, me]
                self.channels[sender, me].clear()
                return True
            return sender not in self.frozen and self.partial[sender, me][0].ready <= self.now
        channel = self.channels[sender, me]
        return channel[0].ready <= self.now if channel else sender in self.ended

    def is_cut(self, a: int, b: int) -> bool:
        return any((a == one and b in others) or (b == one and a in others) for one, others, _ in self.cuts)

    def is_silent(self, me: int, peer: int) -> bool:
        quiet = peer in self.frozen or self.is_cut(me, peer)
        if not quiet:
            self.quiet_since.pop((me, peer), None)
            return False
        since = self.quiet_since.setdefault((me, peer), self.now)
        return self.now - since >= self.wires[me].patience.get(peer, DEADLINE_S)

    # -- whose turn it is

    def hand_over(self, me: int, until: float) -> None:
        self.waiting[me] = until
        self.mine.release()
        self.turns[me].acquire()
        if self.wires[me].closed:
            raise Killed

    def run(self, bodies: Sequence[Callable[[], None]]) -> None:
        def live(me: int) -> None:
            self.turns[me].acquire()
            error: BaseException | None = None
            try:
                if not self.wires[me].closed:
                    bodies[me]()
                    self.left.add(me)
            except BaseException as reason:
                error = reason
            self.ended[me] = error
            self.mine.release()

        threads = [threading.Thread(target=live, args=(k,), daemon=True) for k in range(self.size)]
        for k, thread in enumerate(threads):
            self.waiting[k] = 0.0
            thread.start()
        try:
            while len(self.ended) < self.size and self.now < GIVE_UP_S:
                self.step()
        finally:
            for k in range(self.size):
                if k not in self.ended:
                    self.wires[k].closed = True
                    self.turns[k].release()
                    self.mine.acquire()
            for thread in threads:
                thread.join(10)

    def step(self) -> None:
        """Somebody goes on for whom there is something; else time does."""
        self.frozen = {k: until for k, until in self.frozen.items() if until > self.now}
        self.cuts = [cut for cut in self.cuts if cut[2] > self.now]
        able = [k for k in self.waiting if k not in self.ended and k not in self.frozen]
        ready = [k for k in able if self.waiting[k] <= self.now or any(self.arrives(p, k) for p in range(self.size))]
        if not ready:
            whens = [self.waiting[k] for k in able] + [*self.frozen.values()] + [until for _, _, until in self.cuts]
            whens += [c[0].ready for (_, b), c in self.channels.items() if c and b in able]
            whens += [frame.ready for frame, _ in self.partial.values()]
            later = [when for when in whens if when > self.now]
            self.now = min([*later, self.now + 0.05]) + 1e-6
            return
        chosen = self.dice.choice(ready)
        del self.waiting[chosen]
        self.turns[chosen].release()
        self.mine.acquire()


@dataclasses.dataclass
class Course:
    """What came of it."""

    finals: list[dict[str, torch.Tensor]]  # of each who led at the end
    errors: dict[int, BaseException | None]
    applied: list[tuple[int, int, int, int, bytes]]  # member, epoch, shard, version, what it then is
    closes: list[tuple[int, int, int, int, tuple[int, ...]]]  # member, epoch, version, batch, shares
    staleness: list[int]
    events: list[tuple[str, dict[str, Any]]]
    log: list[tuple[Any, ...]]
    sent: list[int]


def run(
    monkeypatch: pytest.MonkeyPatch,
    task: Any,
    pattern: ParameterServer,
    workers: int,
    key: int,
    plans: Sequence[Plan],
    *,
    steps: int,
    batch: int = 12,
    save_every: int = 4,
) -> Course:
    options = registry.options_of(pattern)
    config = Config(
        task=TaskRef("none"),
        pattern="ps",
        pattern_options=options,
        workers=workers,
        steps=steps,
        batch=batch,
        dtype="float64",
        seed=3,
    )
    facts = preflight(task, pattern, config)
    size = workers + pattern.servers
    net = Net(size, key, plans)
    for name in MODULES:
        clock = types.SimpleNamespace(monotonic=lambda: net.now, perf_counter=lambda: net.now)
        monkeypatch.setattr(importlib.import_module(f"weft.patterns.{name}"), "time", clock)
    course = Course([], net.ended, [], [], [], [], net.log, [])
    roles = {role.name: role for role in pattern.roles(workers)}

    def body(rank: int) -> Callable[[], None]:
        def live() -> None:
            entry = roles["worker" if rank < workers else "server"].entry
            module, name = entry.split(":")
            ctx = Context(
                task=task,
                pattern=pattern,
                config=config,
                facts=facts,
                rank=rank,
                world=workers,
                total_steps=steps,
                device=torch.device("cpu"),
                link=SoloLink(),
                stop_requested=lambda: False,
                endpoint=net.wires[rank],  # type: ignore[arg-type]
                save_every=save_every,
                tell=lambda kind, **values: course.events.append((kind, {"time": net.now, "member": rank, **values})),
            )
            for point in getattr(importlib.import_module(module), name)(ctx):
                if point.follows:
                    continue
                course.staleness += point.report.staleness
                try:
                    if point.ended or point.version % save_every == 0:
                        (whole,) = point.parts().values()
                        if point.ended:
                            course.finals.append({n: t.clone() for n, t in whole["model"].items()})
                    if point.ended:
                        point.evaluate()
                except Deposed:
                    continue

        return live

    watch_holdings(monkeypatch, course)
    net.run([body(rank) for rank in range(size)])
    course.sent = [wire.sent for wire in net.wires]
    return course


def watch_holdings(monkeypatch: pytest.MonkeyPatch, course: Course) -> None:
    serving = importlib.import_module("weft.patterns.serving")
    leading = importlib.import_module("weft.patterns.leading")
    step, bring, close = serving.Server.step, leading.Replicated.bring, serving.Server.on_close

    def closed(server: Any, peer: int, close_: m.Close, payload: Any) -> None:
        if peer == server.rank:
            course.closes.append((peer, close_.epoch, close_.version, close_.batch, tuple(close_.shares)))
        close(server, peer, close_, payload)

    def stepped(server: Any, shard: Any, scale: float) -> None:
        step(server, shard, scale)
        note(server, shard)

    def brought(server: Any, shard: Any, install: Any) -> None:
        before = shard.holding.version
        bring(server, shard, install)
        if shard.holding.version > before:
            note(server, shard)

    def note(server: Any, shard: Any) -> None:
        values = np.concatenate([v.detach().numpy().reshape(-1) for v in shard.holding.values])
        course.applied.append((server.rank, server.epoch, shard.number, shard.holding.version, values.tobytes()))

    monkeypatch.setattr(serving.Server, "on_close", closed)
    monkeypatch.setattr(serving.Server, "step", stepped)
    monkeypatch.setattr(leading.Replicated, "bring", brought)


def check(course: Course, pattern: ParameterServer, steps: int, text: str = "") -> None:
    """Copies of a shard are alike after each update, whoever made it; each epoch has one lead; of no share more than one update is; nobody was read
    too late."""
    seen: dict[tuple[int, int], bytes] = {}
    for member, _, shard, version, values in course.applied:
        assert seen.setdefault((shard, version), values) == values, (
            f"shard {shard} at {version} is another on server {member}; {text}"
        )
    leads: dict[int, set[int]] = {}
    for member, epoch, _, _, _ in course.closes:
        leads.setdefault(epoch, set()).add(member)
    assert all(len(who) == 1 for who in leads.values()), f"{leads}; {text}"
    last = {version: (batch, shares) for _, _, version, batch, shares in sorted(course.closes, key=lambda c: c[1])}
    batches = [batch for version, (batch, _) in sorted(last.items()) if version <= steps]
    assert sorted(batches) == list(range(steps)), f"{batches}; {text}"
    if pattern.bound is not None:
        assert max(course.staleness, default=0) <= pattern.bound


def ended_badly(course: Course) -> list[str]:
    return [
        f"{member}: {error!r}"
        for member, error in course.errors.items()
        if not isinstance(error, Killed | WeftError | None)
    ]
