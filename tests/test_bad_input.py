"""Bad input gets an error that names value, choices and cure, before any worker starts where that is possible."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.laws.reference import Regression
from torch import nn
from torch.utils.data import TensorDataset

import weft
from weft.clusters.inprocess import InProcessSession
from weft.comm.torchdist import has_nccl
from weft.config import RunFolder
from weft.errors import (
    AddressInUse,
    CheckpointError,
    ConfigError,
    DataError,
    Incompatible,
    MemberFailed,
    RunFolderError,
    TaskError,
    UnknownName,
    WeftError,
)
from weft.patterns.preflight import choose_device
from weft.testing import kill


def run(task: Any = None, **settings: Any) -> weft.RunResult:
    settings = {"cluster": "inprocess", "run_dir": settings.pop("run_dir", None)} | settings
    return weft.run(Regression() if task is None else task, **settings)


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A refused run leaves nothing behind."""
    folder = tmp_path / "cwd"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


# -- names, options, values: each message names the value, what was possible, what to do


@pytest.mark.parametrize(
    ("settings", "kind", "words"),
    [
        ({"task": "digitz"}, UnknownName, ["'digitz'", "digits", "codelm", "file.py:MyTask"]),
        ({"task": "nowhere.py:Mine"}, TaskError, ["'nowhere.py'", "path of a Python file"]),
        ({"task": "no.such.module:Mine"}, TaskError, ["'no.such.module'", "package.module:Class"]),
        ({"task": "weft.tasks.digits:Digit"}, UnknownName, ["'Digit'", "Digits", "DigitsMLP"]),
        ({"task": Regression}, TaskError, ["class Regression", "Regression()"]),
        ({"task": object()}, TaskError, ["object", "model, data, loss, optimizer"]),
        ({"pattern": "allreduse"}, UnknownName, ["'allreduse'", "Did you mean 'allreduce'"]),
        ({"pattern_options": {"acumulate": 2}}, UnknownName, ["'acumulate'", "Did you mean 'accumulate'"]),
        ({"pattern_options": {"accumulate": "two"}}, ConfigError, ["accumulate='two'", "valid integer"]),
        ({"pattern_options": {"accumulate": 0}}, ConfigError, ["accumulate=0", "1"]),
        ({"pattern_options": {"clip_norm": -1.0}}, ConfigError, ["clip_norm=-1.0", "positive"]),
        ({"pattern_options": {"autocast": "fp8"}}, ConfigError, ["autocast='fp8'", "none", "bf16"]),
        ({"pattern_options": {"accumulate": 40}}, ConfigError, ["accumulate=40", "24 examples"]),
        ({"pattern_options": {"autocast": "bf16"}, "dtype": "float64"}, Incompatible, ["bf16", "float64"]),
        ({"task": "digits-mlp", "task_options": {"hiden": 3}}, UnknownName, ["'hiden'", "'hidden'"]),
        ({"task": "digits-mlp", "task_options": {"hidden": 0}}, ConfigError, ["hidden", "0"]),
        ({"task_options": {"lr": 1}}, ConfigError, ["given by name"]),
        ({"cluster": "lokal"}, UnknownName, ["'lokal'", "local", "inprocess"]),
        ({"workers": 0}, ConfigError, ["workers=0", "1 or more"]),
        ({"workers": 3, "batch": 2}, ConfigError, ["batch 2", "world of 3", "--batch 3"]),
        ({"workers": 5000, "batch": 9999}, ConfigError, ["5000", "4096"]),
        ({"batch": 0}, ConfigError, ["batch=0"]),
        ({"steps": 0}, ConfigError, ["steps=0"]),
        ({"steps": 3, "epochs": 1}, ConfigError, ["steps=3", "epochs=1", "one of them"]),
        ({"epochs": -1.0}, ConfigError, ["epochs=-1"]),
        ({"dtype": "float16"}, UnknownName, ["'float16'", "float32", "float64"]),
        ({"device": "tpu"}, UnknownName, ["'tpu'", "cpu", "cuda"]),
        ({"link": "infiniband"}, UnknownName, ["'infiniband'", "shm", "tcp"]),
        ({"link": "shm", "workers": 2}, Incompatible, ["'shm'", "inprocess", "--cluster local"]),
        ({"link": "tcp"}, Incompatible, ["only one", "--link"]),
        ({"link": "nccl", "workers": 2, "device": "cpu"}, Incompatible, ["nccl", "cuda"]),
        ({"port": 5000, "workers": 2}, Incompatible, ["port=5000", "--link tcp"]),
        ({"port": 70000, "workers": 2, "link": "tcp"}, ConfigError, ["port=70000", "65535"]),
        ({"deadline_s": 0}, ConfigError, ["deadline=0"]),
        ({"deadline_s": 1e-6}, ConfigError, ["deadline=1e-06", "0.01 or more"]),
        ({"deadline_s": math.nan}, ConfigError, ["deadline=nan", "0.01 or more"]),
        ({"keep": 0}, ConfigError, ["keep=0"]),
        ({"restarts": -1}, ConfigError, ["restarts=-1"]),
        ({"save_every": -1}, ConfigError, ["save-every=-1"]),
        ({"partition": "dirichelt:0.3"}, UnknownName, ["'dirichelt'", "'dirichlet'"]),
        ({"partition": "dirichlet:-1"}, ConfigError, ["alpha=-1"]),
        ({"partition": "by-key"}, TaskError, ["def client_of(self, index)"]),
        ({"balance": "equal", "workers": 2}, UnknownName, ["'equal'", "none", "auto"]),
        ({"balance": "auto"}, Incompatible, ["'auto'", "only one", "--balance out"]),
        (
            {"balance": "auto", "workers": 2, "partition": "contiguous"},
            Incompatible,
            ["'contiguous'", "own shard", "--partition shuffle"],
        ),
        ({"workers": 250, "batch": 250}, DataError, ["250 workers", "211"]),
        ({"batch": 500}, ConfigError, ["batch 500", "211"]),
    ],
)
def test_is_refused_in_words(settings: dict[str, Any], kind: type[WeftError], words: list[str]) -> None:
    with pytest.raises(kind) as caught:
        run(**settings)
    for word in words:
        assert word in str(caught.value), str(caught.value)
    assert caught.value.code == 2
    assert os.listdir(".") in ([], ["runs"])
    assert not Path("runs").exists() or os.listdir("runs") == []


def test_balance_is_refused_of_a_pattern_that_knows_no_speeds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weft.AllReduce, "balances", False)
    with pytest.raises(Incompatible, match=r"balance 'auto' needs every worker's time.*pattern 'allreduce'"):
        run(workers=2, balance="auto")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_without_a_gpu() -> None:
    with pytest.raises(ConfigError, match="no GPU here"):
        run(device="cuda")


@pytest.mark.multiprocess
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize(
    "command", [["run", "digits-mlp"], ["explain", "digits-mlp"], ["probe"], ["probe", "digits-mlp"]]
)
def test_nccl_without_a_gpu_is_refused_before_a_worker_starts(command: list[str]) -> None:
    done = weft_command(*command, "--workers", "2", "--link", "nccl")
    assert done.returncode == 2
    assert "link=nccl, but torch sees no GPU here: use --link gloo or shm." in done.stderr
    assert "Traceback" not in done.stderr
    assert os.listdir(".") in ([], ["runs"])
    assert not Path("runs").exists() or os.listdir("runs") == []


@pytest.mark.skipif(has_nccl(), reason="there is NCCL")
def test_a_torch_without_nccl_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ConfigError, match="link=nccl, but this torch was built without NCCL: use --link gloo or shm"):
        choose_device("auto", "nccl")


# -- tasks that return the wrong thing


class Bad(Regression):
    def __init__(self, **wrong: Any) -> None:
        super().__init__()
        for name, function in wrong.items():
            setattr(self, name, function)


def constant(value: Any) -> Any:
    return lambda *args, **kwargs: value


def mean_loss(model: nn.Module, batch: Any) -> torch.Tensor:
    return (model(batch[0]) - batch[1]).pow(2).mean()


EMPTY = TensorDataset(torch.zeros(0, 6), torch.zeros(0, 1))
SOME = TensorDataset(torch.zeros(30, 6), torch.zeros(30, 1))


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"loss": lambda m, b: m(b[0]).squeeze(1)}, ["shape (24,)", "scalar", ".mean()"]),
        ({"loss": constant(1.0)}, ["float", "not a tensor"]),
        ({"loss": lambda m, b: mean_loss(m, b) * float("nan")}, ["nan", "first batch"]),
        ({"loss": lambda m, b: mean_loss(m, b).detach()}, ["needs no gradient", "detach()"]),
        ({"loss": lambda m, b: torch.ones(3, requires_grad=True).sum()}, ["reaches no parameter"]),
        ({"loss": lambda m, b: torch.tensor(1)}, ["int64", "floating-point"]),
        ({"model": lambda: nn.ReLU()}, ["no parameters"]),
        ({"model": lambda: nn.ParameterList([torch.ones(1, dtype=torch.complex64)])}, ["complex", "two real tensors"]),
        ({"model": constant(3)}, ["int", "torch.nn.Module"]),
        ({"model": lambda: nn.Linear(6, 1).requires_grad_(False)}, ["only frozen"]),
        ({"data": constant((EMPTY, SOME))}, ["training set has no examples"]),
        ({"data": constant((SOME, EMPTY))}, ["held-out set has no examples"]),
        ({"data": constant(SOME)}, ["two datasets"]),
        ({"data": constant((iter([1]), SOME))}, ["map-style"]),
        ({"optimizer": constant(None)}, ["NoneType", "torch optimizer"]),
        ({"optimizer": lambda p: torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=1)}, ["not among the given params"]),
        ({"optimizer": lambda p: torch.optim.LBFGS(p)}, ["LBFGS", "closure", "AdamW"]),
        ({"schedule": lambda o, n: torch.optim.lr_scheduler.ReduceLROnPlateau(o)}, ["ReduceLROnPlateau", "metric"]),
        ({"schedule": constant(3)}, ["int", "LRScheduler"]),
        ({"evaluate": constant(3)}, ["int", "dict"]),
        ({"evaluate": constant({"accuracy": 0.5})}, ["'accuracy'", "(sum over the batch, count)"]),
        ({"num_examples": constant(0)}, ["num_examples", "positive"]),
    ],
)
def test_task_that_returns_the_wrong_thing(wrong: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(TaskError) as caught:
        run(Bad(**wrong), steps=2)
    for word in words:
        assert word in str(caught.value), str(caught.value)


def test_a_loss_that_becomes_nan_names_rank_and_step() -> None:
    class Explodes(Regression):
        def loss(self, model: nn.Module, batch: Any) -> torch.Tensor:
            loss = mean_loss(model, batch)
            self.calls = getattr(self, "calls", 0) + 1
            return loss * float("nan") if self.calls == 4 else loss

    with pytest.raises(MemberFailed, match=r"loss is nan on rank 0 at step 4"):
        run(Explodes(), steps=9)


def test_a_gradient_that_is_nan_though_the_loss_is_not_is_told_from_a_loss() -> None:
    class Root(Regression):
        def loss(self, model: nn.Module, batch: Any) -> torch.Tensor:
            loss = mean_loss(model, batch)
            self.calls = getattr(self, "calls", 0) + 1
            nothing = sum(p.sum() for p in model.parameters()) * 0.0
            return loss + nothing.sqrt() if self.calls == 6 else loss

    with pytest.raises(
        MemberFailed, match=r"loss is nan at step \d, for parameters were no numbers before it .* a gradient of step \d"
    ) as caught:
        weft.run(Root(), workers=2, cluster="inprocess", steps=9)
    found = re.search(r"at step (\d), for .* of step (\d) was", str(caught.value))
    assert found is not None
    assert int(found[1]) == int(found[2]) + 1


def test_a_metric_of_some_batches_only_is_named_and_nothing_is_lost(tmp_path: Path) -> None:
    class Moody(Regression):
        def evaluate(self, model: nn.Module, batch: Any) -> dict[str, Any]:
            return {"odd" if len(batch[0]) > 2 else "even": (1.0, 1)}

    with pytest.raises(MemberFailed, match=r"metric 'odd' for some batches only"):
        run(Moody(), steps=3, workers=2, run_dir=tmp_path / "run")
    assert (tmp_path / "run" / "checkpoints" / "step-00000003" / "manifest.json").exists()


def test_an_exception_of_the_task_shows_its_own_traceback() -> None:
    class Raises(Regression):
        def loss(self, model: nn.Module, batch: Any) -> torch.Tensor:
            raise KeyError("pixel")

    with pytest.raises(TaskError, match=r"(?s)in loss\n.*raise KeyError\(.pixel.\)"):
        run(Raises())


# -- from the command line


def weft_command(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "weft.cli", *arguments], capture_output=True, text=True, timeout=110, cwd=cwd
    )


@pytest.mark.multiprocess
def test_a_task_file_that_raises_on_import_shows_its_own_traceback(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text("import weft\n\ndef helper():\n    return 1 / 0\n\nhelper()\n")
    done = weft_command("run", f"{file}:Mine")
    assert done.returncode == 2
    assert "raised ZeroDivisionError on import" in done.stderr
    assert 'mine.py", line 4, in helper' in done.stderr
    assert "importlib" not in done.stderr
    assert "weft/loading.py" not in done.stderr


def test_unknown_option_of_the_command_line() -> None:
    done = weft_command("run", "digits", "-t", "width")
    assert done.returncode == 2
    assert "'width' is not of the form key=value" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("command", "kind", "says"),
    [
        (["run", "digits", "--steps", "0", "--json"], "ConfigError", "steps=0"),
        (["resume", "nowhere", "--json"], "RunFolderError", "'nowhere' is not the folder of a run"),
        (["export", "nowhere", "--json"], "RunFolderError", "'nowhere' is not the folder of a run"),
    ],
)
def test_an_error_is_one_json_object_where_json_is_asked_for(command: list[str], kind: str, says: str) -> None:
    done = weft_command(*command)
    assert done.returncode == 2
    told = json.loads(done.stdout)
    assert (told["kind"], says in told["error"]) == (kind, True), told
    assert says in done.stderr
    assert weft_command(*command[:-1]).stdout == ""


@pytest.mark.multiprocess
def test_a_port_in_use_is_named_before_any_worker_starts(tmp_path: Path) -> None:
    """And the corrected command may use the same folder."""
    job: dict[str, Any] = {"workers": 2, "steps": 2, "link": "tcp", "run_dir": tmp_path / "run"}
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(AddressInUse, match=str(port)):
            weft.run("digits-mlp", port=port, trace=True, **job)
    assert not (tmp_path / "run").exists()
    assert weft.run("digits-mlp", **job).steps == 2


def test_what_a_cluster_refuses_leaves_only_what_stood_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise ConfigError("too little memory")

    monkeypatch.setattr(InProcessSession, "_make_links", refuse)
    (tmp_path / "logs").mkdir()
    (tmp_path / "mine.txt").touch()
    with pytest.raises(ConfigError, match="too little memory"):
        run(workers=2, tensorboard=True, trace=True, run_dir=tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["cwd", "logs", "mine.txt"]


def test_who_finds_a_run_going_takes_nothing_of_it(tmp_path: Path) -> None:
    """Both found no run there; the other one has the lock."""
    with RunFolder.create(tmp_path / "run").locked():
        before = sorted(os.listdir(tmp_path / "run"))
        with pytest.raises(RunFolderError, match="still going"):
            run(run_dir=tmp_path / "run")
        assert sorted(os.listdir(tmp_path / "run")) == before == [".lock", "checkpoints", "logs"]


# -- folders and checkpoints


@pytest.fixture(scope="module")
def killed_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that stopped at step 25 of 40 with checkpoints of steps 10 and 20."""
    run_dir = tmp_path_factory.mktemp("killed") / "run"
    with pytest.raises(MemberFailed):
        weft.run("digits-mlp", workers=2, steps=40, save_every=10, run_dir=run_dir, faults=[kill(rank=1, step=25)])
    return run_dir


def copy_of(run_dir: Path, to: Path) -> Path:
    subprocess.run(["cp", "-r", run_dir, to], check=True)
    return to


def tensors_of(run_dir: Path, step: int) -> Path:
    return run_dir / "checkpoints" / f"step-{step:08d}" / "worker-0.safetensors"


def test_a_folder_that_is_no_run(tmp_path: Path) -> None:
    for path in (tmp_path / "missing", tmp_path):
        with pytest.raises(RunFolderError, match="is not the folder of a run"):
            weft.resume(path)


def test_a_finished_run_is_not_resumed(tmp_path: Path) -> None:
    run(steps=2, run_dir=tmp_path / "run")
    with pytest.raises(RunFolderError, match=r"has finished \(step 2\)"):
        weft.resume(tmp_path / "run")


@pytest.mark.multiprocess
def test_a_live_task_is_asked_for_again(tmp_path: Path) -> None:
    """Only names are saved: a folder that comes from elsewhere must not be able to run code."""
    run_dir = tmp_path / "run"
    with pytest.raises(MemberFailed):
        weft.run(Regression(), workers=2, steps=9, run_dir=run_dir, faults=[kill(rank=1, step=5)])
    with pytest.raises(RunFolderError, match="task=") as caught:
        weft.resume(run_dir)
    assert "live object" in str(caught.value)
    assert weft.resume(run_dir, task=Regression()).steps == 9


def test_a_folder_that_holds_a_run_is_not_overwritten(tmp_path: Path) -> None:
    run(steps=2, run_dir=tmp_path / "run")
    before = (tmp_path / "run" / "result.json").read_bytes()
    with pytest.raises(RunFolderError, match="holds a run already"):
        run(steps=2, run_dir=tmp_path / "run")
    assert (tmp_path / "run" / "result.json").read_bytes() == before


@pytest.mark.multiprocess
def test_a_damaged_checkpoint_is_named_and_skipped(tmp_path: Path, killed_run: Path) -> None:
    run_dir = copy_of(killed_run, tmp_path / "run")
    damaged = tensors_of(run_dir, 20)
    data = bytearray(damaged.read_bytes())
    data[len(data) // 2] ^= 1
    damaged.write_bytes(data)
    listed = weft_command("ckpt", "verify", str(run_dir))
    assert listed.returncode == 1
    assert re.search(r"step-00000010  good", listed.stdout)
    assert re.search(r"step-00000020  DAMAGED", listed.stdout)
    done = weft_command("resume", str(run_dir), "--json")
    assert done.returncode == 0, done.stderr
    assert "skipped a damaged checkpoint" in done.stderr
    assert "resumed at step 10" in done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["steps"] == 40


@pytest.mark.multiprocess
@pytest.mark.parametrize("harm", ["truncate", "foreign", "flip"])
def test_no_good_checkpoint_left(tmp_path: Path, killed_run: Path, harm: str) -> None:
    run_dir = copy_of(killed_run, tmp_path / "run")
    for step in (10, 20):
        file = tensors_of(run_dir, step)
        data = file.read_bytes()
        bad = {"truncate": data[:-7], "foreign": b"PK\x03\x04" + data[4:], "flip": data[:-1] + bytes([data[-1] ^ 4])}
        file.write_bytes(bad[harm])
    with pytest.raises(CheckpointError, match="no checkpoint of .* is good"):
        weft.resume(run_dir)


@pytest.mark.multiprocess
def test_a_damaged_config_is_named(tmp_path: Path, killed_run: Path) -> None:
    run_dir = copy_of(killed_run, tmp_path / "run")
    (run_dir / "config.json").write_text('{"task": 3}')
    with pytest.raises(RunFolderError, match=r"config.json.* is damaged"):
        weft.resume(run_dir)


def test_a_run_folder_that_cannot_be_made() -> None:
    with pytest.raises(RunFolderError, match="cannot make the run folder '/proc/weft'"):
        run(run_dir="/proc/weft", steps=2)


def test_a_run_folder_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "afile").write_text("mine")
    with pytest.raises(RunFolderError, match="afile' is a file, and a run needs a folder: choose another --run-dir"):
        run(run_dir=tmp_path / "afile", steps=2)
    assert (tmp_path / "afile").read_text() == "mine"


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
def test_a_read_only_and_a_full_disk(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", disk], check=True)
    try:
        with pytest.raises(CheckpointError, match="(?i)free"):  # 3 MB of model on 256 kB
            run("digits-mlp", task_options={"hidden": 512}, steps=2, run_dir=disk / "run")
        assert os.listdir(disk) == []
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        with pytest.raises(RunFolderError, match="Read-only file system"):
            run(steps=2, run_dir=disk / "run")
    finally:
        subprocess.run(["umount", disk], check=True)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
@pytest.mark.skipif(shutil.which("unshare") is None, reason="needs util-linux")
@pytest.mark.slow
@pytest.mark.multiprocess
def test_a_small_file_system_for_shared_memory_is_no_limit(tmp_path: Path) -> None:
    """Docker gives 64 MB by default; what ranks share here is larger than the whole of it."""
    command = f"{sys.executable} -m weft.cli run digits-mlp -t hidden=512 --workers 2 --steps 3 --link shm --run-dir {tmp_path}/run"
    inside = f"mount -t tmpfs -o size=64k tmpfs /dev/shm && {command}"
    done = subprocess.run(["unshare", "--mount", "sh", "-c", inside], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "result.json").exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
@pytest.mark.multiprocess
def test_a_disk_that_fills_up_during_the_run_loses_no_checkpoint(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], check=True)

    class FillAtStep10:
        def on_plan(self, plan: Any) -> None: ...
        def on_output(self, member: int, text: str) -> None: ...
        def on_idle(self) -> None: ...
        def on_event(self, event: Any) -> None:
            if event.kind == "saved" and event.step == 10:
                free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
                (disk / "ballast").write_bytes(bytes(max(0, free - 40_000)))

    try:
        with pytest.raises(MemberFailed, match="No space left|disk is full|free"):
            weft.run("digits-mlp", workers=2, steps=60, save_every=10, run_dir=disk / "run", observer=FillAtStep10())
        (disk / "ballast").unlink()
        assert weft.resume(disk / "run").steps == 60
    finally:
        subprocess.run(["umount", disk], check=True)
