"""The model of a run as a file for plain torch: what is in it, which checkpoint it is of, what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, load_model
from tests.laws.reference import Regression
from torch import Tensor, nn

import weft
from weft.compare import final_parameters
from weft.errors import CheckpointError, ConfigError, MemberFailed, RunFolderError, UnknownName
from weft.tasks.codelm import CodeLM
from weft.testing import raise_error


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of steps 2, 4, 6."""
    run_dir = tmp_path_factory.mktemp("export") / "run"
    weft.run(Regression(), cluster="inprocess", workers=2, steps=6, save_every=2, run_dir=run_dir)
    return run_dir


def test_plain_torch_loads_it(tmp_path: Path, finished: Path) -> None:
    done = weft.export(finished, output=tmp_path / "deep" / "m.safetensors")
    state = load_file(done.path)
    assert {n: t.tolist() for n, t in state.items()} == {n: t.tolist() for n, t in final_parameters(finished).items()}
    Regression().model().load_state_dict(state)
    with safe_open(done.path, "pt") as file:
        assert file.metadata() == {"format": "pt", "task": "Regression", "step": "6", "weft": weft.__version__}
    assert (done.step, done.num_tensors, done.bytes) == (6, 4, done.path.stat().st_size)
    assert [p.name for p in done.path.parent.iterdir()] == ["m.safetensors"], "nothing half written"


def test_of_a_step(tmp_path: Path, finished: Path) -> None:
    first, last = (
        load_file(weft.export(finished, output=tmp_path / f"{step}", step=step).path) for step in (2, 6)
    )  # fmt: skip
    assert not torch.equal(first["0.weight"], last["0.weight"])
    with pytest.raises(CheckpointError, match=r"has no checkpoint of step 3: it has 2, 4, 6\."):
        weft.export(finished, output=tmp_path / "3", step=3)


@pytest.mark.parametrize("positions", ["learned", "rotary"])
def test_a_tied_head_is_stored_once_and_stays_tied(tmp_path: Path, positions: str) -> None:
    task = CodeLM(size="tiny", seq_len=16, test_windows=8, positions=positions)
    weft.run(task, cluster="inprocess", workers=2, steps=2, batch=4, run_dir=tmp_path / "run")
    done = weft.export(tmp_path / "run")
    assert "embed.weight" in load_file(done.path)
    assert "head.weight" not in load_file(done.path)
    model = task.model()
    load_model(model, done.path)
    assert model.head.weight is model.embed.weight
    as_torch = task.model()
    as_torch.load_state_dict(torch.load(weft.export(tmp_path / "run", "torch").path))
    truth = final_parameters(tmp_path / "run")
    for each in (model, as_torch):
        assert all(torch.equal(t, truth[n]) for n, t in each.state_dict().items() if n in truth)


class Unusual(Regression):
    """Another order in memory; two names whose values are equal and who are not tied; a buffer of integers; plain data."""

    def __init__(self, extra: bool = False) -> None:
        super().__init__()
        self.extra = extra

    def model(self) -> nn.Module:
        model = nn.Sequential(
            nn.Linear(6, 4),
            nn.Unflatten(1, (4, 1, 1)),
            nn.Conv2d(4, 4, 1),
            nn.Flatten(),
            Versioned() if self.extra else Twins(),
        )
        return model.to(memory_format=torch.channels_last)


class Twins(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4), requires_grad=False)
        self.c = nn.Parameter(torch.ones(4), requires_grad=False)
        self.register_buffer("count", torch.tensor(7))

    def forward(self, x: Tensor) -> Tensor:
        return (x * self.a * self.b * self.c).sum(1, keepdim=True)


class Versioned(Twins):
    def get_extra_state(self) -> dict[str, int]:
        return {"version": 2}

    def set_extra_state(self, state: dict[str, int]) -> None: ...


def test_what_is_alike_is_not_taken_for_tied(tmp_path: Path) -> None:
    weft.run(Unusual(), cluster="inprocess", workers=1, steps=2, run_dir=tmp_path / "run")
    model = Unusual().model()
    state = load_file(weft.export(tmp_path / "run").path)
    model.load_state_dict(state)
    assert state["4.b"].equal(state["4.c"])
    assert state["4.count"] == 7


def test_what_safetensors_cannot_hold_is_named(tmp_path: Path) -> None:
    weft.run(Unusual(extra=True), cluster="inprocess", workers=1, steps=2, run_dir=tmp_path / "run")
    with pytest.raises(ConfigError, match="4._extra_state of this model is none: use --to torch"):
        weft.export(tmp_path / "run")
    assert not (tmp_path / "run" / "model.safetensors").exists()
    assert torch.load(weft.export(tmp_path / "run", "torch").path)["4._extra_state"] == {"version": 2}


def test_nothing_is_overwritten_unasked(tmp_path: Path, finished: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    with pytest.raises(ConfigError, match=r"mine' exists already: give force \(--force\)"):
        weft.export(finished, output=tmp_path / "mine")
    assert (tmp_path / "mine").read_text() == "mine"
    assert load_file(weft.export(finished, output=tmp_path / "mine", force=True).path)


@pytest.mark.parametrize(
    ("settings", "kind", "says"),
    [
        ({"to": "safetensor"}, UnknownName, "unknown format 'safetensor'. Did you mean 'safetensors'"),
        ({"output": "."}, ConfigError, "is a folder"),
        ({"output": "/proc/weft/m.safetensors"}, CheckpointError, "cannot write /proc/weft"),
    ],
)
def test_what_cannot_be_is_refused(finished: Path, settings: dict[str, Any], kind: type[Exception], says: str) -> None:
    with pytest.raises(kind, match=says):
        weft.export(finished, **settings)


def test_a_run_that_has_saved_nothing(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError):
        weft.export(tmp_path)
    with pytest.raises(MemberFailed):
        weft.run(Regression(), cluster="inprocess", steps=6, run_dir=tmp_path / "run", faults=[raise_error(0, 2)])
    with pytest.raises(CheckpointError, match="has no checkpoint yet"):
        weft.export(tmp_path / "run")


@pytest.mark.multiprocess
def test_from_the_command_line_under_another_pattern(tmp_path: Path) -> None:
    """allreduce, then sharded, then out; a damaged checkpoint is passed over, and said."""
    run_dir = tmp_path / "run"
    job: dict[str, Any] = {"workers": 1, "steps": 8, "batch": 60, "save_every": 2}
    with pytest.raises(MemberFailed):
        weft.run("digits-mlp", run_dir=run_dir, faults=[raise_error(rank=0, step=6)], **job)
    command = ["resume", str(run_dir), "--pattern", "sharded", "-o", "replicas=2", "--workers", "2", "--json"]
    done = weft_command(*command)
    assert json.loads(done.stdout.splitlines()[-1])["world"] == 2
    assert "goes on from step 4 of allreduce with 1 worker" in done.stderr
    newest = run_dir / "checkpoints" / "step-00000008" / "worker-0.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1])
    done = weft_command("export", str(run_dir), "--output", str(tmp_path / "m"), "--json")
    assert json.loads(done.stdout)["step"] == 6
    assert "skipped a damaged checkpoint" in done.stderr
    assert weft_command("export", str(run_dir), "--to", "torch", "--step", "6").stdout.startswith(
        str(run_dir / "model.pt")
    )


def weft_command(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "weft.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=110, check=True)
