"""No test may leave a process behind: one that does fails, and what it left is killed.

A child is found by its parent, or, when it has outlived its parent, by a mark that processes inherit in their
environment.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch
from filelock import FileLock
from hypothesis import settings

import weft
from weft.clusters import local
from weft.testing.hosts import why_not

MARK = "WEFT_TEST_SESSION"
#: A child that has been told to end gets this long; it is not a measure of speed.
GRACE_S = 5.0
#: multiprocessing keeps these for the life of the whole test session.
HELPERS = ("multiprocessing.resource_tracker", "multiprocessing.forkserver")

os.environ[MARK] = str(os.getpid())

pytest.register_assert_rewrite("weft.testing.conformance")  # a law that fails shows what it saw

# A process that has computed with threads hangs the children it forks, and many tests fork.
torch.set_num_threads(1)

# The machine may be busy: hypothesis must not call a slow example an error. The same examples each time, so that a red run
# tells of the change it tests; `pytest --hypothesis-profile search` looks further, anew each time.
settings.register_profile("weft", deadline=None, derandomize=True)
settings.register_profile("search", deadline=None, max_examples=1000)
settings.load_profile("weft")


@pytest.fixture(scope="session", autouse=True)
def warm() -> Iterator[None]:
    """Importing torch would be most of what the tests take. Those of the command line begin cold, as users do."""
    of_a_process = local.surroundings

    def of_a_test() -> object:
        """pytest keeps the name of what runs in the environment."""
        variables, *place = of_a_process()
        return {name: value for name, value in variables.items() if name != "PYTEST_CURRENT_TEST"}, *place

    with pytest.MonkeyPatch.context() as patch, weft.warm():
        patch.setattr(local, "surroundings", of_a_test)
        yield


@pytest.fixture(autouse=True)
def alone_with_hosts(request: pytest.FixtureRequest) -> Iterator[None]:
    """They are of the whole machine: tests count them, and who makes some sweeps what others have left."""
    if request.node.get_closest_marker("hosts") is None:
        yield
        return
    if why := why_not():
        pytest.skip(why)
    with FileLock(Path(tempfile.gettempdir()) / f"weft-tests-hosts-{os.getuid()}.lock"):
        yield


@pytest.fixture(autouse=True)
def no_stray_processes() -> Iterator[None]:
    before = strays()
    yield
    left = strays() - before
    if not left:
        return
    _, left_alive = psutil.wait_procs(list(left), timeout=GRACE_S)
    if left_alive:
        names = [describe(process) for process in left_alive]
        for process in left_alive:
            process.kill()
        psutil.wait_procs(left_alive, timeout=GRACE_S)
        pytest.fail(f"the test left {len(names)} processes running:\n" + "\n".join(names))


def strays() -> set[psutil.Process]:
    """Every running process, zombies left out, that stems from this test session."""
    me = psutil.Process()
    found = set(me.children(recursive=True))
    found |= {process for process in psutil.process_iter() if process.pid != me.pid and is_marked(process)}
    kept = local.KEPT.get()
    at_rest = kept.idle.pid if kept is not None and kept.idle is not None else None
    return {process for process in found if process.pid != at_rest and is_running(process)}


def is_marked(process: psutil.Process) -> bool:
    try:
        return process.environ().get(MARK) == str(os.getpid())
    except psutil.Error:
        return False


def is_running(process: psutil.Process) -> bool:
    try:
        if process.status() == psutil.STATUS_ZOMBIE:
            return False
        return not any(helper in argument for argument in process.cmdline() for helper in HELPERS)
    except psutil.NoSuchProcess:
        return False


def describe(process: psutil.Process) -> str:
    try:
        return f"  {process.pid}: {' '.join(process.cmdline()) or process.name()}"
    except psutil.Error:
        return f"  {process.pid}: ended meanwhile"
