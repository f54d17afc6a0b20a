"""Those who keep other cores busy while something is timed are there, and are gone, whatever happens."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from weft.company import company


def is_gone(pid: int, within_s: float = 5.0) -> bool:
    until = time.monotonic() + within_s
    while time.monotonic() < until:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.01)
    return False


SCRIPT = """
import os, sys, time
from weft.company import company
marks = sys.argv[1]
def work():
    with open(f"{marks}/{os.getpid()}", "a") as file:
        file.write("x")
    time.sleep(0.01)
    print("nobody shall read this")
with company(int(sys.argv[2]), work):
    time.sleep(0.3)
    print("beside", len(os.listdir(marks)), flush=True)
    exec(sys.argv[3])
print("alone", flush=True)
"""


def run(marks: Path, count: int, then: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", SCRIPT, str(marks), str(count), then]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.multiprocess
@pytest.mark.parametrize("count", [0, 1, 3])
def test_they_work_beside_us_and_are_gone(tmp_path: Path, count: int) -> None:
    found = run(tmp_path, count, "pass")
    assert found.stdout.splitlines() == [f"beside {count}", "alone"], found.stderr
    assert all(is_gone(int(path.name)) for path in tmp_path.iterdir())
    assert all(len(path.read_text()) > 1 for path in tmp_path.iterdir()), "over and over"


@pytest.mark.multiprocess
@pytest.mark.parametrize("then", ["raise SystemExit(3)", "os.kill(os.getpid(), 9)"])
def test_they_go_with_us(tmp_path: Path, then: str) -> None:
    found = run(tmp_path, 2, then)
    assert found.returncode in (3, -signal.SIGKILL)
    assert len(list(tmp_path.iterdir())) == 2
    assert all(is_gone(int(path.name)) for path in tmp_path.iterdir())


@pytest.mark.multiprocess
def test_one_that_fails_is_no_harm(tmp_path: Path) -> None:
    """It ends there, not here: nothing of us goes on twice."""
    code = "from weft.company import company\nwith company(2, lambda: 1 / 0):\n    print('once', flush=True)\nprint('end', flush=True)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert found.stdout.splitlines() == ["once", "end"]
    assert found.returncode == 0


def test_nobody_beside_us_is_no_fork(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fork", lambda: pytest.fail("forked"))
    with company(0, lambda: None):
        pass
