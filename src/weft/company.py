"""Processes that come and go with this one, and such as keep this machine's other cores busy while something is timed."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator

PR_SET_PDEATHSIG = 1
SETTLE_S = 0.1  # until those beside us compute


def die_with_parent(parent: int) -> None:
    """Linux: the kernel kills this process when the thread that made it ends. ``parent`` closes the race at the start."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)


@contextlib.contextmanager
def company(count: int, work: Callable[[], object]) -> Iterator[None]:
    """While ``count`` copies of this process do ``work`` over and over: what cores share (memory, caches, clock) then has as many users as it will have. Where
    processes cannot be copied in the middle of their work (elsewhere than on Linux), nobody is beside us."""
    copies: list[int] = []
    here = os.getpid()
    try:
        for _ in range(count if sys.platform == "linux" else 0):
            if (pid := os.fork()) == 0:
                _keep_at_it(here, work)
            copies.append(pid)
        if copies:
            time.sleep(SETTLE_S)
        yield
    finally:
        for pid in copies:
            os.kill(pid, signal.SIGKILL)
        for pid in copies:
            os.waitpid(pid, 0)


def _keep_at_it(parent: int, work: Callable[[], object]) -> None:
    """Never returns: nothing of the copied process may go on here."""
    try:
        die_with_parent(parent)
        silence = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silence, 1)
        os.dup2(silence, 2)
        while True:
            work()
    finally:
        os._exit(0)
