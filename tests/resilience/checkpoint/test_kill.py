"""SIGKILL at any moment of saving leaves a good checkpoint: before every call to the file system, at random times."""

from __future__ import annotations

import gc
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

ROOT = Path(__file__).parents[3]


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[Path]:
    """In memory if there is room: a kill is as sudden there, and hundreds of fsyncs do not wait for a busy disk."""
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK) or shutil.disk_usage(memory).free < 32e6:
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=memory) as name:
        yield Path(name)


@pytest.mark.multiprocess
@pytest.mark.parametrize("how", ["before_every_call", "at_random_times"])
def test_sigkill_while_saving_leaves_a_good_checkpoint(directory: Path, how: str) -> None:
    """In a process of its own, whose threads and memory are few, since it forks for every kill."""
    run = subprocess.run(
        [sys.executable, __file__, how, str(directory)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)])},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    kills = int(run.stdout)
    assert kills >= 20, f"only {kills} savers died"


#: What changes a file system, and its neighbours.
CALLS = {"mkdir", "open", "write", "flush", "fsync", "close", "rename", "scandir", "unlink", "rmdir"}


def parts(step: int, numel: int) -> dict[str, Any]:
    import torch

    return {f"worker-{rank}": {"w": torch.full((numel,), float(step))} for rank in range(2)}


def save_step(root: Path, step: int, numel: int) -> None:
    from weft.resilience import checkpoint

    checkpoint.save(root, parts(step, numel), step=step, world=2, meta={"cursor": step}, keep=1)


def newest_step(root: Path, numel: int) -> int:
    """The step of the newest good checkpoint; nothing that is listed may be damaged, and its content is its step's."""
    import torch

    from weft.resilience import checkpoint

    newest, skipped = checkpoint.newest_good(root)
    assert newest is not None, "no good checkpoint is left"
    assert skipped == []
    for path in checkpoint.list_checkpoints(root):  # some, if one saver after the other died before it could prune
        assert checkpoint.verify(path) == []
    expected = parts(newest.step, numel)
    assert newest.parts.keys() == expected.keys()
    assert all(torch.equal(newest.parts[name]["w"], expected[name]["w"]) for name in expected)
    assert newest.meta == {"cursor": newest.step}
    return newest.step


def before_every_call(directory: Path) -> int:
    """Saver 0, 1, 2, ... is killed before call 0, 1, 2, ... of those in CALLS, until one lives to the end."""
    seen = set()
    for kills in range(1000):
        root = Path(tempfile.mkdtemp(dir=directory))
        save_step(root, 1, numel=5)
        if (pid := os.fork()) == 0:
            gc.freeze()  # what the parent left to collect may wait for threads of the parent
            countdown = kills

            def kill_at_zero(frame: FrameType, event: str, function: Any) -> None:
                nonlocal countdown
                if event == "c_call" and function.__name__ in CALLS:
                    countdown -= 1
                    if countdown < 0:
                        os.kill(os.getpid(), signal.SIGKILL)

            sys.setprofile(kill_at_zero)
            save_step(root, 2, numel=5)
            sys.setprofile(None)
            os._exit(0)
        _, status = os.waitpid(pid, 0)
        seen.add(newest_step(root, numel=5))
        if kills % 10 == 0:
            save_step(root, 3, numel=5)
            assert [path.name for path in root.iterdir()] == ["step-00000003"], "leftovers"
        if os.WIFEXITED(status):
            assert os.WEXITSTATUS(status) == 0
            assert seen == {1, 2}
            return kills
    raise AssertionError("saving makes more calls than expected")


def at_random_times(directory: Path) -> int:
    """Savers that write one checkpoint after the other, a megabyte each, are killed while they do."""
    rng = random.Random(0)
    numel = 125_000
    save_step(directory, 0, numel)
    newest = 0
    for kills in range(1, 500):
        if (pid := os.fork()) == 0:
            gc.freeze()  # what the parent left to collect may wait for threads of the parent
            for step in range(newest + 1, newest + 1000):
                save_step(directory, step, numel)
            os._exit(0)
        time.sleep(rng.uniform(0, 0.05))
        os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        assert os.WIFSIGNALED(status)
        after = newest_step(directory, numel)
        assert after >= newest
        newest = after
        if kills >= 25 and newest > 3:
            return kills
    raise AssertionError("hardly a saver came to the end of a checkpoint")


if __name__ == "__main__":
    import torch

    torch.set_num_threads(1)  # a child forked from a process with computing threads waits for them for ever
    print({"before_every_call": before_every_call, "at_random_times": at_random_times}[sys.argv[1]](Path(sys.argv[2])))
