"""All members as threads of this process: for notebooks, debuggers and tests.

torch's generators belong to the process, so one rank computes at a time, with its own generator state: it holds a baton,
lets go of it while it waits in an exchange, and takes it again before it goes on.
"""

from __future__ import annotations

import math
import os
import queue
import random
import sys
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from typing import Any

from weft.clusters.base import (
    Asked,
    Cluster,
    Exited,
    LinkSpec,
    MemberSpec,
    Message,
    Seat,
    Session,
    SessionEvent,
    resolve,
)
from weft.comm.endpoint import Endpoint
from weft.comm.inproc import inproc_endpoints
from weft.comm.last_call import LastCall
from weft.comm.link import WORLD, Link, SoloLink
from weft.errors import CommError, Incompatible, to_wire

GIVE_UP_S = 5.0  # a thread that was told to end gets this long
CARRIERS = ("inproc", "none")


class Baton:
    """A lock that swaps the generator state of its holder in and out. Who gave up waiting for it has nothing to release."""

    def __init__(self) -> None:
        self.holder: int | None = None  # a member
        self._lock = threading.Lock()
        self._kept = threading.local()

    def begin(self, member: int) -> None:
        """For the thread of this member, before all else."""
        self._kept.member = member
        self.acquire()

    def acquire(self, *, timeout: float = -1) -> bool:
        """False if it could not be had within ``timeout`` seconds (negative: wait for ever)."""
        self._kept.holds = self._lock.acquire(timeout=timeout)
        if self._kept.holds:
            self.holder = self._kept.member
            if (state := getattr(self._kept, "state", None)) is not None:
                _set_random_state(state)
        return bool(self._kept.holds)

    def release(self) -> None:
        if self._kept.holds:
            self._kept.state = _random_state()
            self._kept.holds = False
            self._lock.release()


def _random_state() -> tuple[Any, Any, Any]:
    import numpy as np
    import torch

    return torch.get_rng_state(), np.random.get_state(), random.getstate()


def _set_random_state(state: tuple[Any, Any, Any]) -> None:
    import numpy as np
    import torch

    torch.set_rng_state(state[0])
    np.random.set_state(state[1])
    random.setstate(state[2])


def _num_threads() -> int:
    import torch

    return torch.get_num_threads()


def _set_num_threads(number: int) -> None:
    import torch

    torch.set_num_threads(number)


class ThreadSeat(Seat):
    def __init__(self, spec: MemberSpec, session: InProcessSession, links: Mapping[str, Link | Endpoint]) -> None:
        self.spec, self._session, self._links = spec, session, links

    def send(self, message: dict[str, Any]) -> None:
        self._session.events.put(Message(self.spec.member, message))

    def stop_requested(self) -> bool:
        return self._session.stop.is_set()

    def note(self, call: LastCall) -> None:
        self._session.calls[self.spec.member] = call

    def link(self, group: str = WORLD) -> Link:
        link = self._links[group]
        assert isinstance(link, Link)
        return link

    def endpoint(self, group: str = WORLD) -> Endpoint:
        endpoint = self._links[group]
        assert isinstance(endpoint, Endpoint)
        return endpoint


class InProcessSession(Session):
    def __init__(self) -> None:
        self.events: queue.Queue[SessionEvent] = queue.Queue()
        self.stop = threading.Event()
        self.calls: dict[int, LastCall] = {}  # the newest of each member
        self._threads: list[threading.Thread] = []
        self._members: dict[int, threading.Thread] = {}  # those started last
        self._running: dict[threading.Thread, int] = {}  # whoever takes one out tells that it has ended
        self._give_up_at = math.inf
        self._links: list[dict[str, Link | Endpoint]] = []
        self._before: tuple[Any, int] | None = (_random_state(), _num_threads())  # the caller's own

    def start(self, members: Sequence[MemberSpec], links: Sequence[LinkSpec]) -> None:
        baton = Baton()
        self._threads = [t for t in self._threads if t.is_alive()]
        made = [(link, self._make_links(link, baton)) for link in links]
        self._links = []
        self._give_up_at = math.inf
        self.calls.clear()
        self._members.clear()
        for spec in members:
            own = {link.group: ends[rank] for link, ends in made if (rank := link.rank_of(spec.member)) is not None}
            self._links.append(own)
            thread = threading.Thread(
                target=self._live, args=(spec, own, baton), name=f"{spec.role} {spec.member}", daemon=True
            )
            self._threads.append(thread)
            self._members[spec.member] = thread
            self._running[thread] = spec.member
            thread.start()

    @staticmethod
    def _make_links(spec: LinkSpec, baton: Baton) -> Sequence[Link | Endpoint]:
        if spec.carrier == "none":
            return [SoloLink()]
        from weft.comm.collectives import RingLink

        endpoints = inproc_endpoints(spec.world, baton=baton, deadline_s=spec.deadline_s)
        if spec.frames:
            return endpoints
        chosen: dict[str, Any] = {"collective": spec.collective, "speed": spec.speed}
        return [RingLink(e, e.member, spec.world, "inproc", spec.deadline_s, **chosen) for e in endpoints]

    def _live(self, spec: MemberSpec, links: Mapping[str, Link | Endpoint], baton: Baton) -> None:
        error: dict[str, Any] | None = None
        baton.begin(spec.member)
        try:
            resolve(spec.entry)(ThreadSeat(spec, self, links))
        except BaseException as raised:
            error = to_wire(raised, traceback.format_exc())
        finally:
            for link in links.values():
                link.close()
            baton.release()
            if self._running.pop(threading.current_thread(), None) is not None:  # else it was given up
                self.events.put(Exited(spec.member, 1 if error else 0, 0, error))

    def request_stop(self) -> None:
        self.stop.set()

    def ask(self) -> None:
        frames = sys._current_frames()
        for member, thread in self._members.items():
            frame = frames.get(thread.ident or 0)
            stack = traceback.extract_stack(frame) if frame is not None else []
            lines = [f'  File "{f.filename}", line {f.lineno} in {f.name}\n' for f in reversed(stack)]
            call, now = self.calls.get(member), time.monotonic()
            began_s = now - call.began if call is not None else 0.0
            ended_s = now - call.ended if call is not None and call.ended else None
            state = "" if thread.is_alive() else "X"
            self.events.put(Asked(member, os.getpid(), state, "".join(lines), call, began_s, ended_s))

    def kill(self) -> None:
        """A thread cannot be killed: its exchanges fail at once, and it ends there. One that comes to none is given up."""
        for own in self._links:
            for link in own.values():
                if isinstance(link, Endpoint):
                    link.interrupt(CommError("this member was told to end"))
                link.close()
        self._give_up_at = time.monotonic() + GIVE_UP_S

    def poll(self, timeout_s: float) -> list[SessionEvent]:
        if time.monotonic() > self._give_up_at:
            self._give_up()
        try:
            found = [self.events.get(timeout=timeout_s)]
        except queue.Empty:
            return []
        while not self.events.empty():
            found.append(self.events.get_nowait())
        return found

    def _give_up(self) -> None:
        self._give_up_at = math.inf
        for member, thread in self._members.items():
            if self._running.pop(thread, None) is not None:
                self._threads.remove(thread)
                error = CommError(
                    f"worker {member} was told to end and does not: its thread stays until this program ends"
                )
                self.events.put(Exited(member, 1, 0, to_wire(error)))

    def close(self) -> None:
        self.stop.set()
        self.kill()
        for thread in self._threads:
            thread.join(timeout=10)
        if self._before is not None:
            state, threads = self._before
            _set_random_state(state)
            _set_num_threads(threads)
            self._before = None


class InProcess(Cluster):
    name = "inprocess"

    def open(self, preload: Sequence[str]) -> InProcessSession:
        return InProcessSession()

    def check(self, carrier: str) -> None:
        if carrier not in CARRIERS:
            raise Incompatible(
                f"link {carrier!r} joins processes, and the cluster 'inprocess' runs threads: use --link inproc, or --cluster local."
            )

    def default_carrier(self, world: int, device: str) -> tuple[str, str]:
        return ("inproc", "threads of one process") if world > 1 else ("none", "one worker has nobody to talk to")
