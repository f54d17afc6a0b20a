"""Real kills of real processes: who is named, that nobody stays, and that what comes back is bit-equal."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from tests.laws.reference import Augmented
from tests.variants import rest_slow

import weft
from weft.compare import final_parameters
from weft.errors import Interrupted, MemberFailed
from weft.events import read_events
from weft.testing import delay, freeze, kill, raise_error

pytestmark = pytest.mark.multiprocess

#: The promise is 2 s. A test catches hangs; on a busy machine it allows ten times that.
GONE_S = 20.0
JOB = {"task": "digits-mlp", "workers": 3, "steps": 60, "batch": 60, "save_every": 20, "seed": 5}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    result = weft.run(**JOB, run_dir=tmp_path_factory.mktemp("undisturbed") / "run")
    assert result.steps == 60
    return final_parameters(result.run_dir)


def assert_bit_equal(run_dir: Path, truth: dict[str, torch.Tensor]) -> None:
    got = final_parameters(run_dir)
    assert got.keys() == truth.keys()
    assert all(torch.equal(got[n], truth[n]) for n in truth)


def members(run_dir: Path) -> list[psutil.Process]:
    """Every process that a run told of, zygote included."""
    pids = [e.values["pid"] for e in read_events(run_dir / "events.jsonl") if e.kind == "started"]
    return [psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)]


def assert_gone(processes: list[psutil.Process]) -> None:
    _, alive = psutil.wait_procs(processes, timeout=GONE_S)
    assert [p for p in alive if p.status() != psutil.STATUS_ZOMBIE] == []


@pytest.mark.parametrize("rank", rest_slow([1, 0, 2]))
def test_a_killed_worker_is_named_and_resume_is_bit_equal(tmp_path: Path, rank: int, undisturbed: dict) -> None:
    run_dir = tmp_path / "run"
    with pytest.raises(
        MemberFailed, match=rf"worker {rank} failed, last heard of after step \d+: killed by SIGKILL"
    ) as caught:
        weft.run(**JOB, run_dir=run_dir, faults=[kill(rank=rank, step=31)])
    assert caught.value.member == rank
    assert f"weft resume {run_dir}" in str(caught.value)
    assert_gone(members(run_dir))
    result = weft.resume(run_dir)
    assert result.steps == 60
    assert_bit_equal(run_dir, undisturbed)


@pytest.mark.parametrize("step", rest_slow([45, 3]))
def test_a_run_comes_back_by_itself(tmp_path: Path, step: int, undisturbed: dict) -> None:
    """Step 3 is before the first checkpoint: the run begins anew."""
    run_dir = tmp_path / "run"
    result = weft.run(**JOB, run_dir=run_dir, restarts=1, faults=[kill(rank=1, step=step)])
    assert result.steps == 60
    restarted = [e for e in read_events(run_dir / "events.jsonl") if e.kind == "restarted"]
    assert [e.values["from_step"] for e in restarted] == [step // 20 * 20]
    assert_bit_equal(run_dir, undisturbed)


@pytest.mark.parametrize("eval_every", rest_slow([7, 0]))
def test_noise_of_every_generator_goes_on_where_it_was(tmp_path: Path, eval_every: int) -> None:
    job = {"workers": 2, "steps": 30, "save_every": 10, "eval_every": eval_every}
    truth = final_parameters(weft.run(Augmented(), **job, run_dir=tmp_path / "truth").run_dir)
    run_dir = tmp_path / "run"
    weft.run(Augmented(), **job, run_dir=run_dir, restarts=1, faults=[kill(rank=1, step=26)])
    assert_bit_equal(run_dir, truth)


def test_an_error_of_the_task_leads_with_its_own_traceback(tmp_path: Path) -> None:
    with pytest.raises(MemberFailed, match=r"worker 2 failed.*RuntimeError: raised as") as caught:
        weft.run(**JOB, run_dir=tmp_path / "run", faults=[raise_error(rank=2, step=10)])
    assert "Traceback" in caught.value.traceback
    assert caught.value.member == 2


def test_a_frozen_worker_is_named_after_the_deadline(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    with pytest.raises(MemberFailed, match="worker 1 failed, last heard of after step 9: DeadlineExceeded") as caught:
        weft.run(**JOB, run_dir=run_dir, deadline_s=3, faults=[freeze(rank=1, step=10)])
    assert caught.value.member == 1
    title, line, *_, advice = (run_dir / "hang.txt").read_text().split("\n\n")
    assert title.startswith("worker 1 did not come to call ")
    assert title.endswith("(step 10), within 3 s")
    assert "is stopped; its last call was call " in line
    assert line.endswith("(step 9).")
    assert "find out who stopped process" in advice
    assert_gone(members(run_dir))


@pytest.mark.slow
@pytest.mark.parametrize("link", ["tcp", "gloo"])
def test_a_killed_worker_is_named_on_every_carrier(tmp_path: Path, link: str) -> None:
    with pytest.raises(MemberFailed, match=r"worker 1 failed, last heard of after step \d+: killed by SIGKILL"):
        weft.run(**JOB, run_dir=tmp_path / "run", link=link, faults=[kill(rank=1, step=10)])


# -- the launcher, from the command line


def start(run_dir: Path, *extra: str) -> subprocess.Popen[str]:
    """A run that takes long, once it has begun to train."""
    command = [
        sys.executable,
        "-m",
        "weft.cli",
        "run",
        "digits-mlp",
        "--workers",
        "2",
        "--steps",
        "200000",
        "--save-every",
        "50",
    ]
    process = subprocess.Popen(
        [*command, "--run-dir", str(run_dir), *extra], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    wait_for(lambda: any((run_dir / "checkpoints").glob("step-*")), process)
    return process


def wait_for(condition, process: subprocess.Popen[str]) -> None:
    until = time.monotonic() + 60
    while not condition():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < until, "it did not begin within 60 s"
        time.sleep(0.02)


@pytest.mark.parametrize("link", ["shm", "gloo"])
def test_killing_the_launcher_ends_everything(tmp_path: Path, link: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run_dir, temporary = tmp_path / "run", tmp_path / "tmp"
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    launcher = start(run_dir, "--link", link)
    everyone = psutil.Process(launcher.pid).children(recursive=True)
    assert len(everyone) >= 3, "the zygote and two workers"
    launcher.kill()
    launcher.communicate(timeout=GONE_S)
    assert_gone(everyone)
    assert not (run_dir / "result.json").exists()
    assert list(temporary.glob("weft*")) == []


def test_killing_the_zygote_ends_everything_and_is_told(tmp_path: Path) -> None:
    launcher = start(tmp_path / "run")
    zygote = psutil.Process(launcher.pid).children()[0]
    workers = zygote.children(recursive=True)
    zygote.kill()
    _, error = launcher.communicate(timeout=GONE_S)
    assert launcher.returncode == 1
    assert "supervisor of the workers" in error
    assert "SIGKILL" in error
    assert_gone(workers)


def test_killing_everyone_leaves_nothing(tmp_path: Path) -> None:
    launcher = start(tmp_path / "run")
    everyone = [psutil.Process(launcher.pid), *psutil.Process(launcher.pid).children(recursive=True)]
    for process in everyone:
        process.kill()
    launcher.communicate(timeout=GONE_S)
    assert_gone(everyone)


def test_ctrl_c_saves_and_says_how_to_resume(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    launcher = start(run_dir)
    everyone = psutil.Process(launcher.pid).children(recursive=True)
    launcher.send_signal(signal.SIGINT)
    _, error = launcher.communicate(timeout=60)
    assert launcher.returncode == 130
    assert f"weft resume {run_dir}" in error
    assert_gone(everyone)
    stopped = [e.step for e in read_events(run_dir / "events.jsonl") if e.kind == "stopped"]
    saved = [e.step for e in read_events(run_dir / "events.jsonl") if e.kind == "saved"]
    assert len(stopped) == 1
    assert stopped[0] == saved[-1], "what was trained is saved, to the step"


def test_ctrl_c_twice_stops_at_once(tmp_path: Path) -> None:
    """The second comes while a worker is frozen and the first cannot be followed."""
    run_dir = tmp_path / "run"
    launcher = start(run_dir)
    everyone = psutil.Process(launcher.pid).children(recursive=True)
    worker = members(run_dir)[1]
    worker.suspend()
    launcher.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert launcher.poll() is None
    launcher.send_signal(signal.SIGINT)
    _, error = launcher.communicate(timeout=GONE_S)
    assert launcher.returncode == 130
    assert "stopped at once" in error
    assert_gone(everyone)


def test_a_stop_and_a_resume_are_bit_equal(tmp_path: Path, undisturbed: dict) -> None:
    """Stop by signal somewhere in the middle, resume, compare; from Python, where Ctrl-C reaches the main thread."""

    class StopSoon:
        def on_plan(self, plan) -> None: ...
        def on_output(self, member, text) -> None: ...
        def on_idle(self) -> None: ...
        def on_event(self, event) -> None:
            if event.kind == "saved" and event.step == 20:
                os.kill(os.getpid(), signal.SIGINT)

    run_dir = tmp_path / "run"
    slow = [delay(rank=0, seconds=0.02)]
    with pytest.raises(Interrupted, match="weft resume"):
        weft.run(**JOB, run_dir=run_dir, observer=StopSoon(), faults=slow)
    assert weft.resume(run_dir).steps == 60
    assert_bit_equal(run_dir, undisturbed)


@pytest.mark.slow
def test_resume_with_another_world_is_equal_to_rounding(tmp_path: Path) -> None:
    job = JOB | {"dtype": "float64"}
    truth = final_parameters(weft.run(**job, run_dir=tmp_path / "truth").run_dir)
    run_dir = tmp_path / "run"
    with pytest.raises(MemberFailed):
        weft.run(**job, run_dir=run_dir, faults=[kill(rank=2, step=33)])
    assert weft.resume(run_dir, workers=2).world == 2
    got = final_parameters(run_dir)
    norm = sum(float(t.pow(2).sum()) for t in truth.values()) ** 0.5
    assert max(float((got[n] - truth[n]).abs().max()) for n in truth) <= 1e-9 * norm


@pytest.mark.slow
def test_two_quick_ctrl_c_still_say_how_to_resume(tmp_path: Path) -> None:
    for pause_s in (0.03, 0.07, 0.12):
        run_dir = tmp_path / str(pause_s)
        launcher = start(run_dir)
        launcher.send_signal(signal.SIGINT)
        time.sleep(pause_s)
        if launcher.poll() is None:
            launcher.send_signal(signal.SIGINT)
        _, error = launcher.communicate(timeout=60)
        assert launcher.returncode == 130
        assert f"weft resume {run_dir}" in error


class DiesOnce(Augmented):
    """Rank 1 is killed in its first evaluation, when all is trained and saved."""

    def __init__(self, marker: str) -> None:
        super().__init__()
        self.marker = marker

    def evaluate(self, model, batch):
        if len(batch[0]) > 2 and torch.utils.data.get_worker_info() is None:  # not preflight's batch of two
            try:
                os.close(os.open(self.marker, os.O_CREAT | os.O_EXCL))
            except FileExistsError:
                pass
            else:
                os.kill(os.getpid(), signal.SIGKILL)
        return super().evaluate(model, batch)


@pytest.mark.slow
def test_a_death_after_the_last_update_costs_no_result(tmp_path: Path) -> None:
    job = {"workers": 2, "steps": 30}
    truth = weft.run(Augmented(), **job, run_dir=tmp_path / "truth")
    result = weft.run(DiesOnce(str(tmp_path / "dead")), **job, run_dir=tmp_path / "run", restarts=1)
    assert (tmp_path / "dead").exists()
    assert result.loss == truth.loss
    assert result.train_loss == truth.train_loss
    with pytest.raises(MemberFailed):
        weft.run(DiesOnce(str(tmp_path / "dead2")), **job, run_dir=tmp_path / "again")
    resumed = weft.resume(tmp_path / "again", task=Augmented())
    assert (resumed.loss, resumed.train_loss, resumed.steps) == (truth.loss, truth.train_loss, 30)


def test_a_run_that_is_still_going_is_not_resumed(tmp_path: Path) -> None:
    launcher = start(tmp_path / "run")
    try:
        with pytest.raises(weft.WeftError, match=rf"is still going \(process {launcher.pid}\)"):
            weft.resume(tmp_path / "run")
    finally:
        launcher.kill()
        launcher.communicate(timeout=GONE_S)


@pytest.mark.parametrize("link", rest_slow(["shm", "tcp", "gloo"]))
def test_a_run_leaves_nothing_in_the_temporary_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, link: str
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    weft.run("digits-mlp", workers=2, steps=2, link=link, run_dir=tmp_path / "run")
    assert list((tmp_path / "tmp").glob("weft*")) == []


def test_closed_standard_output_is_no_reason_to_fail(tmp_path: Path) -> None:
    command = f"{sys.executable} -m weft.cli run digits-mlp --workers 2 --steps 3 --run-dir {tmp_path}/run >&-"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=100)
    assert (tmp_path / "run" / "result.json").exists(), done.stderr


def test_json_is_the_last_line(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "weft.cli", "run", "digits-mlp", "--workers", "2", "--steps", "5", "--json"]
    done = subprocess.run(
        [*command, "--run-dir", str(tmp_path / "run")], capture_output=True, text=True, timeout=100, check=True
    )
    result = json.loads(done.stdout.splitlines()[-1])
    assert result.keys() >= {
        "loss",
        "train_loss",
        "accuracy",
        "steps",
        "seconds",
        "examples_per_s",
        "bytes_sent",
        "world",
        "run_dir",
    }
    assert result["steps"] == 5
    assert result["world"] == 2
    assert result["bytes_sent"] > 0
