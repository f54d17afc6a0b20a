"""Runs in ``weft.warm()`` share a zygote, and nothing else."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch

import weft
from weft.clusters import local
from weft.clusters.base import Exited, LinkSpec, MemberSpec, Message, Seat, Session
from weft.clusters.local import Local
from weft.compare import final_parameters

pytestmark = pytest.mark.multiprocess
PATIENCE_S = 20.0


@pytest.fixture(autouse=True)
def anew() -> Iterator[None]:
    """A ``warm`` inside that of all tests: none of theirs is at rest in it."""
    with weft.warm():
        yield


def tell(seat: Seat) -> None:
    seat.send({"variable": os.environ.get("WEFT_TEST_VARIABLE", ""), "directory": os.getcwd(), "path": sys.path})


def leave_a_sleeper(seat: Seat) -> None:
    seat.send({"sleeper": subprocess.Popen(["sleep", "60"]).pid})


def linger(seat: Seat) -> None:
    seat.send({"here": os.getpid()})
    time.sleep(60)


def told(session: Session, entry: str = "tell", links: list[LinkSpec] | None = None, *, whole: bool = True) -> dict:
    """What a member has said, when it has ended; or, not ``whole``, as soon as it has said anything."""
    session.start([MemberSpec(0, "worker", f"{__name__}:{entry}", {})], links or [])
    said: dict = {}
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        for event in session.poll(0.1):
            if isinstance(event, Message):
                said |= event.data
                if not whole:
                    return said
            if isinstance(event, Exited):
                assert not event.failed, event.error
                return said
    raise AssertionError("it did not end")


def pid_of_one() -> int:
    with Local().open([]) as session:
        told(session)
        return session.pid


def is_gone(pid: int) -> bool:
    deadline = time.monotonic() + PATIENCE_S
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def test_runs_share_it_until_the_end() -> None:
    with weft.warm():
        first = pid_of_one()
        assert [pid_of_one() for _ in range(3)] == [first] * 3
        with Local().open([]) as session:
            assert session.pid == first
            session.close()
            session.close()
            assert psutil.pid_exists(first), "closing twice gives back once"
    assert is_gone(first)
    with local.Local().open([]) as session:
        assert session.pid != first


@pytest.mark.slow
def test_without_it_a_session_ends_its_zygote() -> None:
    token = local.KEPT.set(None)
    try:
        assert is_gone(pid_of_one())
    finally:
        local.KEPT.reset(token)


@pytest.mark.slow
def test_an_environment_that_changed_is_seen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    first = pid_of_one()
    monkeypatch.setenv("WEFT_TEST_VARIABLE", "seen")
    with Local().open([]) as session:
        assert told(session)["variable"] == "seen"
        second = session.pid
    assert second != first
    assert is_gone(first)
    monkeypatch.chdir(tmp_path)
    with Local().open([]) as session:
        assert told(session)["directory"] == str(tmp_path)
        assert session.pid not in (first, second)
        third = session.pid
    monkeypatch.syspath_prepend("/nowhere/at/all")
    with Local().open([]) as session:
        assert told(session)["path"][0] == "/nowhere/at/all"
        assert session.pid == third, "that it can be told"


@pytest.mark.slow
def test_what_members_leave_running_ends_with_their_run() -> None:
    with Local().open([]) as session:
        sleeper, pid = told(session, "leave_a_sleeper")["sleeper"], session.pid
        assert psutil.pid_exists(sleeper)
    assert is_gone(sleeper)
    assert is_gone(pid)


@pytest.mark.slow
def test_members_that_have_not_ended_are_killed() -> None:
    with Local().open([]) as session:
        member, pid = told(session, "linger", whole=False)["here"], session.pid
    assert is_gone(member)
    assert is_gone(pid)


@pytest.mark.slow
def test_one_that_was_killed_or_frozen_at_rest_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    first = pid_of_one()
    os.kill(first, signal.SIGKILL)
    assert is_gone(first)
    second = pid_of_one()
    assert second != first
    monkeypatch.setattr("weft.clusters.processes.REST_S", 0.2)
    with Local().open([]) as session:
        assert session.pid == second
        told(session)
        os.kill(second, signal.SIGSTOP)
    assert is_gone(second)
    assert pid_of_one() != second


@pytest.mark.slow
def test_two_at_once_have_one_each_and_one_is_kept() -> None:
    with Local().open([]) as one:
        with Local().open([]) as other:
            assert told(one)["directory"] == told(other)["directory"]
            assert one.pid != other.pid
        pids = {one.pid, other.pid}
    kept = pid_of_one()
    assert kept in pids
    assert is_gone((pids - {kept}).pop())


def test_at_rest_it_holds_nothing_of_a_run() -> None:
    held = []
    for _ in range(3):
        with Local().open([]) as session:
            told(session, links=[LinkSpec("tcp", 1, 5.0), LinkSpec("shm", 1, 5.0, nbytes=1 << 20, group="other")])
            pid = session.pid
        process = psutil.Process(pid)
        assert process.net_connections("tcp") == []
        held.append(process.num_fds())
    assert held == held[:1] * 3


def in_a_fork(answer) -> None:
    answer.put(pid_of_one())


@pytest.mark.slow
def test_a_forked_process_has_its_own() -> None:
    """It has the socket, too: two who speak into it would be heard as one."""
    first = pid_of_one()
    fork = multiprocessing.get_context("fork")
    answer = fork.SimpleQueue()
    child = fork.Process(target=in_a_fork, args=(answer,))
    child.start()
    child.join(PATIENCE_S)
    assert child.exitcode == 0
    assert answer.get() != first
    assert pid_of_one() == first


@pytest.mark.slow
def test_runs_in_it_are_those_outside(tmp_path: Path) -> None:
    def run(name: str) -> dict[str, torch.Tensor]:
        weft.run("digits-mlp", workers=2, steps=20, run_dir=tmp_path / name)
        return final_parameters(tmp_path / name)

    token = local.KEPT.set(None)
    try:
        outside = run("outside")
    finally:
        local.KEPT.reset(token)
    for name in ("first", "second"):
        inside = run(name)
        assert all(torch.equal(inside[k], outside[k]) for k in outside)
