"""The zygote hears everything that its children said, in whatever order they end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from weft.clusters.base import Exited, MemberSpec, Output, Seat
from weft.clusters.local import Local

pytestmark = pytest.mark.multiprocess
PATIENCE_S = 20.0


def speak_and_die(seat: Seat) -> None:
    """When it is its turn: member 0 at once, member 1 after it."""
    Path(seat.spec.payload["ready"]).touch()
    wait_for(lambda: Path(seat.spec.payload["turn"]).exists())
    print(f"last words of {seat.spec.member}", flush=True)
    os.kill(os.getpid(), signal.SIGKILL)


def wait_for(true) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_two_that_die_while_the_zygote_looks_away(tmp_path: Path) -> None:
    """It finds in one look that the first has ended, then what the second said and that it ended, too."""
    files = [(tmp_path / f"ready-{m}", tmp_path / f"turn-{m}") for m in (0, 1)]
    entry = f"{__name__}:speak_and_die"
    with Local().open([]) as session:
        session.start(
            [MemberSpec(m, "worker", entry, {"ready": str(r), "turn": str(t)}) for m, (r, t) in enumerate(files)], []
        )
        wait_for(lambda: all(r.exists() for r, _ in files))
        zygote = psutil.Process(session.pid)
        children = zygote.children()
        assert len(children) == 2
        zygote.suspend()
        for m, (_, turn) in enumerate(files):
            turn.touch()
            wait_for(lambda m=m: sum(c.status() == psutil.STATUS_ZOMBIE for c in children) == m + 1)
        zygote.resume()
        heard = []
        deadline = time.monotonic() + PATIENCE_S
        while sum(isinstance(e, Exited) for e in heard) < 2:
            assert time.monotonic() < deadline
            heard += session.poll(0.1)
    assert [(e.member, e.signal) for e in heard if isinstance(e, Exited)] == [(0, signal.SIGKILL), (1, signal.SIGKILL)]
    said = {m: "".join(e.text for e in heard if isinstance(e, Output) and e.member == m) for m in (0, 1)}
    assert said == {0: "last words of 0\n", 1: "last words of 1\n"}


#: A zygote that always hears first that somebody has ended, as it may when another ended just before.
WORST_ORDER = """
import os, socket, sys, time
from weft.clusters.base import MemberSpec
from weft.clusters.pipe import Pipe
from weft.clusters.zygote import Zygote

ours, theirs = socket.socketpair()
zygote = Zygote(Pipe(theirs))
launcher = Pipe(ours)
look = zygote.selector.select
zygote.selector.select = lambda timeout: sorted(look(timeout), key=lambda found: found[0].fileobj != zygote.wake_read)
for member in (0, 1):
    zygote._fork(MemberSpec(member, "worker", "builtins:print", {}))  # prints its seat and ends
time.sleep(0.5)
heard, deadline = [], time.monotonic() + 20
while sum(m["event"] == "exited" for m in heard) < 2 and time.monotonic() < deadline:
    zygote.serve_once(0.1)
    heard += launcher.read() if launcher.ready(0) else []
print(sorted((m["event"], m["member"]) for m in heard))
"""


def test_hearing_first_that_a_child_has_ended_loses_nothing_that_it_said() -> None:
    done = subprocess.run([sys.executable, "-c", WORST_ORDER], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[('exited', 0), ('exited', 1), ('output', 0), ('output', 1)]"
