"""All members as threads of this process: for notebooks, debuggers and tests.

torch's generators belong to the process, so one rank computes at a time, with its own generator state: it holds a baton,
lets go of it while it waits in an exchange, and takes it again before it goes on.
"""

from __future__ import annotations

import queue
import random
import threading
import traceback
from collections.abc import Mapping, Sequence
from typing import Any

from weft.clusters.base import Cluster, Exited, LinkSpec, MemberSpec, Message, Seat, Session, SessionEvent, resolve
from weft.comm.inproc import inproc_endpoints
from weft.comm.link import WORLD, Link, SoloLink
from weft.errors import Incompatible, to_wire

CARRIERS = ("inproc", "none")


class Baton:
    """A lock that swaps the generator state of its holder in and out. ``with baton:`` around a member's whole life."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kept = threading.local()

    def acquire(self) -> None:
        self._lock.acquire()
        if (state := getattr(self._kept, "state", None)) is not None:
            _set_random_state(state)

    def release(self) -> None:
        self._kept.state = _random_state()
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
    def __init__(self, spec: MemberSpec, session: InProcessSession, links: Mapping[str, Link]) -> None:
        self.spec, self._session, self._links = spec, session, links

    def send(self, message: dict[str, Any]) -> None:
        self._session.events.put(Message(self.spec.member, message))

    def stop_requested(self) -> bool:
        return self._session.stop.is_set()

    def link(self, group: str = WORLD) -> Link:
        return self._links[group]


class InProcessSession(Session):
    def __init__(self) -> None:
        self.events: queue.Queue[SessionEvent] = queue.Queue()
        self.stop = threading.Event()
        self._threads: list[threading.Thread] = []
        self._links: list[dict[str, Link]] = []
        self._before: tuple[Any, int] | None = (_random_state(), _num_threads())  # the caller's own

    def start(self, members: Sequence[MemberSpec], links: Sequence[LinkSpec]) -> None:
        baton = Baton()
        self._threads = [t for t in self._threads if t.is_alive()]
        made = [(link, self._make_links(link, baton)) for link in links]
        self._links = []
        for spec in members:
            own = {link.group: ends[rank] for link, ends in made if (rank := link.rank_of(spec.member)) is not None}
            self._links.append(own)
            thread = threading.Thread(
                target=self._live, args=(spec, own, baton), name=f"{spec.role} {spec.member}", daemon=True
            )
            self._threads.append(thread)
            thread.start()

    @staticmethod
    def _make_links(spec: LinkSpec, baton: Baton) -> list[Link]:
        if spec.carrier == "none":
            return [SoloLink()]
        from weft.comm.collectives import RingLink

        endpoints = inproc_endpoints(spec.world, baton=baton, deadline_s=spec.deadline_s)
        chosen: dict[str, Any] = {"collective": spec.collective, "speed": spec.speed}
        return [RingLink(e, e.member, spec.world, "inproc", spec.deadline_s, **chosen) for e in endpoints]

    def _live(self, spec: MemberSpec, links: Mapping[str, Link], baton: Baton) -> None:
        error: dict[str, Any] | None = None
        baton.acquire()
        try:
            resolve(spec.entry)(ThreadSeat(spec, self, links))
        except BaseException as raised:
            error = to_wire(raised, traceback.format_exc())
        finally:
            for link in links.values():
                link.close()
            baton.release()
            self.events.put(Exited(spec.member, 1 if error else 0, 0, error))

    def request_stop(self) -> None:
        self.stop.set()

    def kill(self) -> None:
        """A thread cannot be killed: its exchanges fail at once, and it ends there."""
        for own in self._links:
            for link in own.values():
                link.close()

    def poll(self, timeout_s: float) -> list[SessionEvent]:
        try:
            found = [self.events.get(timeout=timeout_s)]
        except queue.Empty:
            return []
        while not self.events.empty():
            found.append(self.events.get_nowait())
        return found

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
