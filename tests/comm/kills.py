"""Kill a member in the middle of a collective, and see when each survivor knows. ``python -m tests.comm.kills`` measures.

A trial is drawn from its key: carrier, world, size, victim and moment. The survivors are processes that all-reduce without
end; the victim gets a SIGKILL from outside, at a moment that no rank chooses.
"""

from __future__ import annotations

import gc
import json
import os
import random
import select
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tests.comm.test_links import connect_gloo, connect_tcp

from weft.comm.link import Link
from weft.comm.shm import Region, ShmLink
from weft.comm.tcp import listen
from weft.errors import CommError

DEADLINE_S = 60.0  # far beyond every bound that is looked at: nobody may owe his error to it
SIZES = (10, 20_000, 1_000_000)  # float32: in one message or slot; a ring of short frames; many blocks and rounds
CALLS_BEFORE = 3
MOMENT_S = 0.05  # a kill comes up to this long after all have begun
PATIENCE_S = 30.0
OUTLIVES_S = 2.0

#: How each carrier is prepared before the fork, joined after it, and cleaned up.
CARRIERS: dict[str, tuple[Callable[[int], Any], Callable[[int, int, Any, float], Link], Callable[[Any], None]]] = {
    "shm": (
        lambda world: Region.create(world, 1 << 20),
        lambda rank, world, region, deadline_s: ShmLink(region, rank, deadline_s),
        lambda region: region.close(),
    ),
    "tcp": (
        lambda world: [listen() for _ in range(world)],
        connect_tcp,
        lambda listeners: [sock.close() for sock in listeners] and None,
    ),
    "gloo": (lambda world: tempfile.TemporaryDirectory(), connect_gloo, lambda folder: folder.cleanup()),
}


@dataclass(frozen=True)
class Trial:
    carrier: str
    world: int
    numel: int
    victim: int
    moment_s: float
    has_child: bool  # the victim has forked a process that outlives it for a while, as a DataLoader does

    @classmethod
    def draw(cls, key: int, carrier: str = "", world: int = 0) -> Trial:
        dice = random.Random(f"kill {key}")
        carrier = carrier or dice.choice(list(CARRIERS))
        world = world or dice.randint(2, 4)
        numel, victim, moment_s = dice.choice(SIZES), dice.randrange(world), dice.uniform(0, MOMENT_S)
        return cls(carrier, world, numel, victim, moment_s, dice.randrange(2) == 0)


@dataclass(frozen=True)
class Survivor:
    """``seconds``: from the kill to the error; inf if none came."""

    rank: int
    seconds: float
    error: str = ""
    ranks: tuple[int, ...] = ()


def commit(trial: Trial) -> list[Survivor]:
    """Run the trial; returns what became of each survivor. All processes are gone afterwards."""
    prepare, connect, clean_up = CARRIERS[trial.carrier]
    shared = prepare(trial.world)
    children: dict[int, tuple[int, int]] = {}  # rank -> (pid, where it can be heard)
    try:
        for rank in range(trial.world):
            forks = trial.has_child and rank == trial.victim
            children[rank] = _fork(partial(connect, rank, trial.world, shared, DEADLINE_S), trial.numel, forks)
        said = dict.fromkeys(children, b"")
        _hear(children, said, lambda: all(text.startswith(b"!") for text in said.values()))
        assert all(text.startswith(b"!") for text in said.values()), f"{trial}: the ranks did not begin: {said}"
        time.sleep(trial.moment_s)
        killed = time.monotonic()
        os.kill(children[trial.victim][0], signal.SIGKILL)
        survivors = [rank for rank in children if rank != trial.victim]
        _hear(children, said, lambda: all(said[rank].endswith(b"\n") for rank in survivors))
        return [_survivor(rank, children[rank][0], said[rank], killed) for rank in survivors]
    finally:
        for pid, pipe in children.values():
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            os.close(pipe)
        clean_up(shared)


def _fork(connect: Callable[[], Link], numel: int, forks: bool) -> tuple[int, int]:
    read_end, write_end = os.pipe()
    if pid := os.fork():
        os.close(write_end)
        return pid, read_end
    try:
        gc.freeze()  # what the parent left to collect may wait for threads that are not here
        torch.set_num_threads(1)
        link = connect()
        if forks:
            _fork_one_that_outlives_us()
        buffer = torch.ones(numel)
        for k in range(10**9):
            if k == CALLS_BEFORE:
                os.write(write_end, b"!")
            try:
                link.all_reduce([buffer])
            except CommError as error:
                now = time.monotonic()
                os.write(write_end, json.dumps([now, type(error).__name__, error.ranks, str(error)]).encode() + b"\n")
                break
            buffer.fill_(1.0)
        signal.pause()  # that a survivor ends shall be no news to the others
    except BaseException as error:
        os.write(write_end, json.dumps([time.monotonic(), type(error).__name__, [], repr(error)]).encode() + b"\n")
    finally:
        os._exit(0)


def _fork_one_that_outlives_us() -> None:
    """It holds whatever a fork gives it."""
    parent = os.getpid()
    if os.fork() == 0:
        while os.getppid() == parent:
            time.sleep(0.01)
        time.sleep(OUTLIVES_S)
        os._exit(0)


def _hear(children: dict[int, tuple[int, int]], said: dict[int, bytes], enough: Callable[[], bool]) -> None:
    until = time.monotonic() + PATIENCE_S
    pipes = {pipe: rank for rank, (_, pipe) in children.items()}
    while pipes and not enough() and time.monotonic() < until:
        for pipe in select.select(list(pipes), [], [], 0.1)[0]:
            if part := os.read(pipe, 1 << 16):
                said[pipes[pipe]] += part
            else:
                del pipes[pipe]


def _survivor(rank: int, pid: int, text: bytes, killed: float) -> Survivor:
    if not text.endswith(b"\n"):
        state = "it has ended itself" if _has_ended(pid) else "it hangs"
        return Survivor(rank, float("inf"), f"nothing heard: {state}")
    when, kind, ranks, message = json.loads(text.removeprefix(b"!"))
    return Survivor(rank, when - killed, f"{kind}: {message}", tuple(ranks))


def _has_ended(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"


def standing() -> dict[str, set[str]]:
    """What trials may leave on this machine: children, what this process still has open, listening sockets of its own, and
    shared memory with a name that no living process has (others come and go here, and use theirs)."""
    me = os.getpid()
    mine = {link for fd in os.listdir("/proc/self/fd") if (link := _link_of(fd))}
    listening = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in mine:
                listening.add(fields[1])
    return {
        "children": {pid for pid in os.listdir("/proc") if pid.isdigit() and _parent(pid) == me},
        "open": {link for link in mine if link.startswith(("socket:", "pipe:", "anon_inode:"))},
        "listening": listening,
        "shared memory": {name for name in os.listdir("/dev/shm") if not _is_used(f"/dev/shm/{name}")},
    }


def _link_of(fd: str) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{fd}")
    except OSError:
        return ""


def _is_used(path: str) -> bool:
    for pid in os.listdir("/proc"):
        try:
            if pid.isdigit() and path in Path(f"/proc/{pid}/maps").read_text():
                return True
        except OSError:
            continue
    return False


def _parent(pid: str) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return -1


def main() -> None:
    """20 kills for each carrier and world, and for each carrier the worst and the median in milliseconds."""
    number, *chosen = [int(sys.argv[1]) if len(sys.argv) > 1 else 20, *sys.argv[2:]]
    for carrier in chosen or CARRIERS:
        seconds: list[float] = []
        wrong = 0
        for key in range(number):
            trial = Trial.draw(key, carrier)
            outcomes = commit(trial)
            seconds += [s.seconds for s in outcomes]
            for s in outcomes:
                if s.ranks != (trial.victim,) or not s.error.startswith("PeerLost"):
                    wrong += 1
                    print(trial, s, file=sys.stderr)
        seconds.sort()
        print(
            json.dumps(
                {
                    "carrier": carrier,
                    "kills": number,
                    "survivors": len(seconds),
                    "median_ms": round(1e3 * seconds[len(seconds) // 2], 1),
                    "worst_ms": round(1e3 * seconds[-1], 1),
                    "not_named": wrong,
                }
            )
        )


if __name__ == "__main__":
    main()
