"""Supervised processes on this machine, forked from one zygote. The default cluster."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

from weft.clusters.base import Cluster
from weft.clusters.processes import ProcessSession
from weft.cost import HIERARCHICAL
from weft.errors import Incompatible


class Local(Cluster):
    name = "local"

    def open(self, preload: Sequence[str]) -> ProcessSession:
        kept = KEPT.get()
        return ProcessSession(preload) if kept is None or kept.owner != here() else kept.take(preload)

    def check(self, carrier: str) -> None:
        if carrier == "inproc":
            raise Incompatible("link 'inproc' joins threads, not processes: use --cluster inprocess, or --link shm.")
        if carrier == HIERARCHICAL:
            raise Incompatible("link 'hierarchical' joins several hosts, and there is one: use --link shm.")
        if carrier == "shm":
            from weft.comm.shm import supported

            if why := supported():
                raise Incompatible(f"link 'shm' does not work here ({why}): use --link tcp.")

    def default_carrier(self, world: int, device: str) -> tuple[str, str]:
        from weft.comm.shm import supported

        if world == 1:
            return "none", "one worker has nobody to talk to"
        if device == "cuda":
            return "nccl", "gradients on GPUs"
        if why := supported():
            return "tcp", f"no shared memory: {why}"
        return "shm", "all workers on one host: gradients live in shared memory"


# -- runs one after the other


@contextmanager
def warm() -> Iterator[None]:
    """Runs that this thread begins inside it, one after the other, on this machine, keep the process that their workers are forked from.

    Starting Python and importing torch is most of what a short run takes, and is done once. Each run still has processes of its own. The
    kept process is let go when the environment or the working directory changes, after a run that left something running, and at the end.

        with weft.warm():
            results = [weft.run("digits-mlp", seed=seed) for seed in range(10)]
    """
    kept = Kept()
    token = KEPT.set(kept)
    try:
        yield
    finally:
        KEPT.reset(token)
        kept.close()


class Kept:
    """At most one zygote at rest."""

    def __init__(self) -> None:
        self.owner = here()
        self.open = True
        self.idle: WarmSession | None = None

    def take(self, preload: Sequence[str]) -> ProcessSession:
        session, self.idle = self.idle, None
        if session is not None:
            if session.started_in == surroundings() and session.wake(preload):
                session.lent = True
                return session
            session.end()
        return WarmSession(preload, self)

    def give_back(self, session: WarmSession) -> None:
        if self.open and self.idle is None and session.rest():
            self.idle = session
        else:
            session.end()

    def close(self) -> None:
        self.open = False
        if self.idle is not None:
            self.idle.end()
            self.idle = None


class WarmSession(ProcessSession):
    """Closing it gives it back."""

    def __init__(self, preload: Sequence[str], kept: Kept) -> None:
        self.kept, self.started_in, self.lent = kept, surroundings(), True
        super().__init__(preload)

    def close(self) -> None:
        if self.lent:
            self.lent = False
            self.kept.give_back(self)

    def end(self) -> None:
        super().close()


KEPT: ContextVar[Kept | None] = ContextVar("kept", default=None)


def here() -> tuple[int, int]:
    """A child of a fork has this memory, too, but not its processes; they die with the thread that started them."""
    return os.getpid(), threading.get_ident()


def surroundings() -> tuple[object, ...]:
    """What a process takes over from the one that starts it."""
    place = os.stat(".")
    return dict(os.environ), place.st_dev, place.st_ino
