"""A rank that others wait for in vain: one page says which, at which line it stands, and what all others did last.

One that is frozen is in test_recovery.py.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from tests.variants import rest_slow

import weft
from weft.clusters.base import Asked
from weft.comm.last_call import Board, LastCall, recorder
from weft.driver.hang import Hang, frames_in
from weft.errors import MemberFailed
from weft.resilience.policy import Failure, culprit
from weft.tasks.digits import DigitsMLP
from weft.testing import skip

JOB = {"workers": 3, "steps": 40, "batch": 60, "deadline_s": 2.0}


class Stuck(DigitsMLP):
    """From the third step on, the first worker that comes is stuck in its loss."""

    def __init__(self, how: str, marker: str) -> None:
        super().__init__()
        self.how, self.marker, self.calls = how, marker, 0

    def loss(self, model, batch):
        self.calls += 1
        if self.calls > 2 and first_to_come(self.marker):
            {"sleep": self.sleep, "lock": self.lock, "spin": self.spin}[self.how]()
        return super().loss(model, batch)

    def sleep(self):
        time.sleep(1e6)  # the line: sleep

    def lock(self):
        lock = threading.Lock()
        lock.acquire()
        lock.acquire()  # the line: lock

    def spin(self):
        sum(iter(int, 1))  # the line: spin


def first_to_come(marker: str) -> bool:
    try:
        os.close(os.open(marker, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True


def line_of(how: str) -> str:
    """file:line of a line of this file."""
    for number, line in enumerate(Path(__file__).read_text().splitlines(), 1):
        if line.rstrip().endswith(f"# the line: {how}"):
            return f"{__file__}:{number} in {how}"
    raise LookupError(how)


@pytest.mark.multiprocess
@pytest.mark.parametrize(
    ("link", "how"), rest_slow([("shm", "sleep"), ("tcp", "spin"), ("gloo", "lock"), ("inproc", "sleep")])
)
def test_a_rank_that_never_comes_back_from_the_loss_shows_its_line(tmp_path: Path, link: str, how: str) -> None:
    run_dir = tmp_path / "run"
    cluster = "inprocess" if link == "inproc" else "local"
    job = JOB | ({"deadline_s": 0.5} if link == "inproc" else {})
    with pytest.raises(MemberFailed) as caught:
        weft.run(Stuck(how, str(tmp_path / "marker")), **job, link=link, cluster=cluster, run_dir=run_dir)
    page, m = (run_dir / "hang.txt").read_text(), caught.value.member
    assert page == caught.value.page
    assert f"What each rank did last: {run_dir / 'hang.txt'}" in str(caught.value)
    assert f"worker {m} is at {line_of(how)}: " in str(caught.value)
    first, line, *rest = page.split("\n\n")
    if link != "inproc":  # there the others wait for the processor, not in a call
        assert first.startswith(f"worker {m} did not come to call ")
        assert "all_reduce" in first
        assert "within 2 s" in first
        assert f"rank {m} did not come within 2 s to " in str(caught.value), "alike on every carrier"
        assert "stopped, stuck, or much slower than the others. See what it does, or allow" in str(caught.value)
    assert line.startswith(f"worker {m} is at {line_of(how)}")
    assert rest[0].startswith(f"worker {m} (process ")
    assert "ended" in rest[0].splitlines()[1]
    assert rest[0].index(line_of(how)) < rest[0].index("in loss")
    for other in {0, 1, 2} - {m}:
        (part,) = [p for p in rest if p.startswith(f"worker {other} ")]
        assert "gave up: DeadlineExceeded" in part or link == "inproc"
        assert "and not ended" in part or link == "inproc"
        assert "training.py" in part
    assert rest[-1].startswith("What to do: see what that line waits for")


@pytest.mark.slow
@pytest.mark.multiprocess
def test_a_rank_that_skipped_a_call_is_told_by_its_step(tmp_path: Path) -> None:
    """Its calls look like those of all others, one step late; in the end it has fewer."""
    with pytest.raises(MemberFailed) as caught:
        weft.run("digits-mlp", **JOB, link="tcp", run_dir=tmp_path / "run", faults=[skip(rank=1, step=5)])
    page = caught.value.page
    assert "some rank left out a call or made one too many" in page, page


LOCAL = ("-m", "weft.cli")
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "weft.cli")


@pytest.mark.multiprocess
@pytest.mark.slow
@pytest.mark.parametrize("launch", [LOCAL, TORCHRUN], ids=["local", "torchrun"])
def test_the_command_line_shows_the_page(tmp_path: Path, launch: tuple[str, ...]) -> None:
    """Under torchrun each process has a supervisor of its own, and rank 0's collects what they say."""
    run_dir = tmp_path / "run"
    own = ("--workers", "2", "--deadline", "2") if launch == LOCAL else ("--deadline", "10")  # also for all to meet
    settings = (*own, "--steps", "20", "--run-dir", str(run_dir))
    done = subprocess.run(
        [sys.executable, *launch, "run", f"{__file__}:FromFile", *settings],
        capture_output=True,
        text=True,
        timeout=100,
        env={**os.environ, "STUCK_MARKER": str(tmp_path / "marker")},
    )
    assert done.returncode != 0
    assert "hang.txt" in done.stderr, done.stderr
    page = (run_dir / "hang.txt").read_text()
    assert f"is at {line_of('sleep')}: time.sleep(1e6)" in page.split("\n\n")[1]
    assert "and not ended" in page
    shown = [line.strip() for line in done.stderr.splitlines()]
    assert {line.strip() for line in page.splitlines()} <= set(shown)
    last = f"What each rank did last: {run_dir / 'hang.txt'}"
    assert shown[-1] == last if launch == LOCAL else last in shown


class FromFile(Stuck):
    def __init__(self) -> None:
        super().__init__("sleep", os.environ["STUCK_MARKER"])


# -- the page, from facts


def asked(member: int, number: int, step: int, ended: bool, what: str = "all_reduce", **more) -> Asked:
    call = LastCall(step, "world", number, what, 1.0, 2.0 if ended else 0.0)
    return Asked(member, 100 + member, more.pop("state", "S"), more.pop("stack", ""), call, 3.0, 2.0 if ended else None)


def hang(*answers: Asked, missing: int = 1, failed: tuple[int, ...] = (0,), kind: str = "DeadlineExceeded") -> Hang:
    failures = [Failure(m, kind=kind, message="late", blames=(missing,)) for m in failed]
    blamed = Failure(missing, kind=kind, message="late")
    return Hang(blamed, failures, {a.member: a for a in answers}, 5.0, {0: 3, 1: 3}, {0: 0.1, 1: 4.0})


@pytest.mark.parametrize(
    ("page", "line", "advice"),
    [
        (
            hang(asked(0, 4, 4, False), asked(1, 3, 3, True, state="T")),
            "is stopped; its last call",
            "who stopped process 101",
        ),
        (hang(asked(0, 4, 4, False), asked(1, 4, 4, False)), "is in call 4", "network"),
        (hang(asked(0, 4, 4, False), asked(1, 3, 5, True)), "did not answer", "left out a call or made one too many"),
        (hang(asked(0, 4, 5, False), asked(1, 5, 4, False)), "is in call 5", "left out a call or made one too many"),
        (
            hang(asked(0, 4, 4, False), asked(1, 3, 3, True, state="D")),
            "waiting in the kernel, for a disk",
            "--deadline",
        ),
        (hang(asked(0, 4, 4, False), asked(1, 3, 3, True, state="X")), "had ended", "did it have less to do"),
        (hang(asked(0, 4, 4, False), asked(1, 4, 4, False), failed=(0, 1)), "said so first, in call 4", "network"),
        (hang(asked(0, 4, 4, False)), "gave no answer: its host", "whether that host is up"),
        (
            hang(asked(0, 4, 4, False), asked(1, 4, 4, False), kind="Mismatch"),
            "is in call 4",
            "all ranks must make the same",
        ),
    ],
    ids=["stopped", "slow link", "skipped", "one too many", "disk", "ended", "all there", "host gone", "mismatch"],
)
def test_the_page_says_what_to_do(page: Hang, line: str, advice: str) -> None:
    assert line in page.line()
    assert advice in page.page().split("What to do: ")[1]


def test_frames_of_the_thread_that_does_the_work() -> None:
    own = str(Path(weft.__file__).parent / "member.py")
    text = (
        "Thread 0x1 (most recent call first):\n"
        '  File "/usr/lib/other.py", line 3 in helper\n\n'
        "Current thread 0x2 (most recent call first):\n"
        '  File "/home/me/task.py", line 7 in loss\n'
        f'  File "{own}", line 9 in work\n'
        '  File "/x/zygote.py", line 1 in main\n'
    )
    assert [str(f) for f in frames_in(text)] == ["/home/me/task.py:7 in loss", f"{own}:9 in work"]
    assert [f.is_users for f in frames_in(text)] == [True, False]
    assert frames_in("") == []


def test_the_newest_call_is_read_by_another_process() -> None:
    board = Board([4, 7])
    assert board.read(7) is None
    if (pid := os.fork()) == 0:
        on_call = recorder("world", lambda call: board.write(7, call), step=lambda: 12)
        on_call(3, "a call" * 500)
        on_call(3, None)
        on_call(4, "the next")
        os._exit(0)
    os.waitpid(pid, 0)
    call = board.read(7)
    assert call is not None
    assert (call.step, call.group, call.number, call.what, call.ended) == (12, "world", 4, "the next", 0.0)
    assert 0 < call.began <= time.monotonic()
    assert board.read(4) is None


LATE = "DeadlineExceeded"


@pytest.mark.parametrize(
    ("blames", "stopped", "expected"),
    [
        ({0: (1,), 1: (2,)}, (), 2),  # who gave up waited for somebody else
        ({0: (2,), 1: (2,), 2: (3,)}, (), 3),
        ({0: (1,), 1: (0,)}, (), 1),
        ({0: (1,), 1: (2,)}, (3,), 3),  # nobody came so far as to wait for it
        ({0: (1,), 2: (1,)}, (), 1),
    ],
)
def test_of_those_who_waited_it_is_none(
    blames: dict[int, tuple[int, ...]], stopped: tuple[int, ...], expected: int
) -> None:
    failures = [Failure(m, kind=LATE, message=f"{m} waited", blames=who) for m, who in blames.items()]
    found = culprit(failures, stopped)
    assert found.member == expected
    assert found.is_echo


def test_an_error_of_its_own_comes_before_who_is_stopped() -> None:
    failures = [Failure(0, kind=LATE, blames=(3,)), Failure(1, kind="ValueError", message="mine")]
    assert culprit(failures, (3,)).member == 1
