"""`--check-equivalence`: what equals one process passes within rounding; what does not is refused, by the right name, and leaves nothing."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import typer
from tests.clusters.test_torchrun import TORCHRUN
from tests.laws.reference import Augmented, Odd, Ragged, Regression, seed
from tests.variants import rest_slow
from torch import Tensor, nn

import weft
from weft import AllReduce, LocalSGD, Sharded
from weft.cli import app
from weft.config import CHECKED_STEPS, RunFolder
from weft.data.keys import key_int
from weft.data.sampler import Sampler
from weft.driver import equivalence
from weft.driver.requests import make_config
from weft.errors import ConfigError, Incompatible, MemberFailed, NotEquivalent, RunFolderError, TaskError
from weft.events import read_events
from weft.patterns.mean import JoinedMean
from weft.patterns.training import Replica
from weft.testing import kill
from weft.update import Dense, Update

EQUAL = 1e-14  # float64: some ulps, far below the tolerance


def checked(tmp_path: Path, task: Any, **settings: Any) -> dict[str, Any]:
    """The event of a run that was compared first."""
    settings = {"cluster": "inprocess", "steps": 4, "dtype": "float64", "check_equivalence": True} | settings
    run_dir = tmp_path / "run"
    result = weft.run(task, run_dir=run_dir, **settings)
    assert result.steps == settings["steps"]
    assert sorted(p.name for p in run_dir.iterdir() if p.name.startswith(".")) == [".lock"]
    (event,) = [e for e in read_events(RunFolder(run_dir).events) if e.kind == "equivalence"]
    assert event.values["text"] == result.equivalence
    assert len(event.values["steps"]) == int(settings["check_equivalence"]) * (
        CHECKED_STEPS if settings["check_equivalence"] is True else 1
    )
    return event.values


def difference(values: dict[str, Any]) -> float:
    return max(step["difference"] for step in values["steps"])


def refused(tmp_path: Path, task: Any, **settings: Any) -> NotEquivalent:
    """Nothing was trained, and nothing is left."""
    with pytest.raises(NotEquivalent) as caught:
        checked(tmp_path, task, **settings)
    assert not (tmp_path / "run").exists()
    assert "Nothing was trained" in str(caught.value)
    return caught.value


class Dropout(Regression):
    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Dropout(0.5), nn.Linear(16, 1))


class Summed(Regression):
    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        x, y = batch
        return F.mse_loss(model(x), y, reduction="sum")


class Normed(Regression):
    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 1))


class Scaled(nn.Linear):
    """The gradient of its weight depends on how many examples it is made of."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.detach() + (self.weight - self.weight.detach()) * len(x)
        return F.linear(x, weight, self.bias)


class Scaling(Regression):
    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), Scaled(16, 1))


class Drawing(Regression):
    """Random numbers that no seed governs."""

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        x, y = batch
        generator = torch.Generator()
        generator.seed()
        return F.mse_loss(model(x + torch.randn(x.shape, generator=generator).to(x)), y)


# -- what is equal


@pytest.mark.parametrize("workers", [1, 2, 3])
@pytest.mark.parametrize("task", [Regression(), Regression("adamw"), Odd(), Ragged()], ids=lambda t: type(t).__name__)
def test_threads_equal_one_process(tmp_path: Path, task: weft.Task, workers: int) -> None:
    values = checked(tmp_path, task, workers=workers)
    assert difference(values) <= EQUAL
    assert not values["by_shares"]
    assert all(step["loss_difference"] <= EQUAL for step in values["steps"])


@pytest.mark.parametrize(
    "settings",
    [
        {"pattern": AllReduce(accumulate=3, clip_norm=0.01)},
        {"partition": "contiguous", "batch": 23},
        {"pattern": LocalSGD(start=3, every=2)},
        {"pattern": LocalSGD(start=3, every=2, within=AllReduce(clip_norm=0.01, accumulate=2))},
        {"balance": "auto"},
        {"check_equivalence": 4},
        {"pattern": AllReduce(compress="auto")},
    ],
    ids=str,
)
def test_no_setting_changes_that(tmp_path: Path, settings: dict[str, Any]) -> None:
    assert difference(checked(tmp_path, Regression("adamw"), workers=3, **settings)) <= EQUAL


@pytest.mark.multiprocess
@pytest.mark.parametrize(
    ("task", "workers", "settings"),
    rest_slow(
        [
            (Regression(), 2, {"pattern": AllReduce(shared_step="on")}),
            (Dropout("adamw"), 2, {"pattern": Sharded()}),
            (Regression("adamw"), 1, {"pattern": AllReduce()}),
            (Dropout("adamw"), 3, {"pattern": AllReduce(shared_step="on", clip_norm=0.01)}),
            (Odd(), 3, {"pattern": AllReduce()}),
            (Regression("adamw"), 3, {"pattern": AllReduce(shared_step="off")}),
            (Odd(), 3, {"pattern": AllReduce(), "link": "tcp", "collective": "ring"}),
            (Dropout(), 2, {"pattern": AllReduce(overlap="on"), "link": "tcp", "port": 47110}),
            (Regression("adamw"), 4, {"pattern": Sharded(replicas=2)}),
            (Dropout(), 4, {"pattern": Sharded(replicas=2, accumulate=2, clip_norm=0.01)}),
            (Regression("adamw"), 4, {"pattern": Sharded(reshard=False), "link": "tcp"}),
            (Regression(), 1, {"pattern": Sharded()}),
        ],
        keep=2,
    ),
    ids=lambda value: type(value).__name__ if isinstance(value, weft.Task) else str(value),
)
def test_processes_equal_one_process(tmp_path: Path, task: weft.Task, workers: int, settings: dict[str, Any]) -> None:
    values = checked(tmp_path, task, workers=workers, cluster="local", **settings)
    assert difference(values) <= EQUAL
    assert values["by_shares"] == isinstance(task, Dropout)


@pytest.mark.parametrize("task", [Dropout("adamw"), Augmented()], ids=lambda t: type(t).__name__)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_random_numbers_are_those_of_the_workers(tmp_path: Path, task: weft.Task, accumulate: int) -> None:
    values = checked(tmp_path, task, workers=3, pattern=AllReduce(accumulate=accumulate))
    assert values["by_shares"]
    assert difference(values) <= EQUAL
    assert "with its own random numbers" in values["text"]


@pytest.mark.parametrize("data", ["counting", "shuffled", "stateful"])
def test_streams_are_drawn_alike(tmp_path: Path, data: str) -> None:
    from tests.streaming_task import Watched

    (tmp_path / "notes").mkdir()
    assert difference(checked(tmp_path, Watched(data, str(tmp_path / "notes")), workers=3)) <= EQUAL


def test_shards_are_drawn_alike(tmp_path: Path) -> None:
    import numpy as np
    from tests.streaming_task import Watched

    (tmp_path / "notes").mkdir()
    (tmp_path / "data").mkdir()
    for k in range(4):
        np.save(tmp_path / "data" / f"{k}.npy", np.arange(50 * k, 50 * k + 50)[:, None])
    task = Watched(str(tmp_path / "data" / "*.npy"), str(tmp_path / "notes"))
    assert difference(checked(tmp_path, task, workers=3)) <= EQUAL


def test_float32_and_bf16_have_tolerances_of_their_own(tmp_path: Path) -> None:
    single = checked(tmp_path / "float32", Regression(), workers=3, dtype="float32")
    assert EQUAL < difference(single) <= single["tolerance"] == 1e-5
    half = checked(tmp_path / "bf16", Regression(), workers=3, dtype="float32", pattern=AllReduce(autocast="bf16"))
    assert single["tolerance"] < difference(half) <= half["tolerance"] == 2**-8 * (1 + math.sqrt(3))


@pytest.mark.multiprocess
@pytest.mark.slow
def test_under_torchrun_rank_0_s_host_compares(tmp_path: Path) -> None:
    command = ["-m", "weft", "run", "digits-mlp", "--steps", "4", "--check-equivalence", "--json"]
    command += ["--run-dir", str(tmp_path / "run")]
    done = subprocess.run(
        [*TORCHRUN, "--standalone", "--nproc-per-node", "2", *command], capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.strip().splitlines()[-1])["equivalence"].startswith("equal to one process within")


# -- what is not


@pytest.mark.parametrize(
    ("task", "name", "why"),
    [
        (Summed(), "", "not the mean over its examples"),
        (Normed(), "", "BatchNorm normalises each worker's share"),
        (Scaling(), "2.weight", "not the mean over its examples"),
        (Drawing(), "", "the task may use random numbers"),
    ],
    ids=lambda t: type(t).__name__,
)
def test_a_task_that_depends_on_the_shares_is_refused(tmp_path: Path, task: weft.Task, name: str, why: str) -> None:
    error = refused(tmp_path, task, workers=2)
    assert why in str(error)
    assert error.parameter in ([name] if name else dict(task.model().named_parameters()))
    assert f"in {error.parameter} (" in str(error)
    assert error.code == 3


def gradient_of_first_batch(task: weft.Task, batch: int) -> dict[str, Tensor]:
    """Plainly."""
    seed(key_int(0, "data"))
    train, _ = task.data()
    seed(key_int(0, "init"))
    model = task.model().double()
    x, y = (t.double() for t in train[Sampler(len(train), batch, 0, 1, 0).next().indices])
    task.loss(model, (x, y)).backward()
    return {n: p.grad for n, p in model.named_parameters()}


def scale_one(monkeypatch: pytest.MonkeyPatch, name: str, factor: float, from_step: int = 0) -> None:
    combined = JoinedMean._combined

    def scaled(self: JoinedMean, update: Update, *args: Any) -> Update:
        joined = combined(self, update, *args)
        entry = joined.entries[name]
        assert isinstance(entry, Dense)
        if self.replica.step >= from_step:
            entry.tensor *= factor
        return joined

    monkeypatch.setattr(JoinedMean, "_combined", scaled)


def test_what_is_shown_is_the_difference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gradient = gradient_of_first_batch(Regression(), 24)
    whole = math.sqrt(sum(float(g.pow(2).sum()) for g in gradient.values()))
    truth = 0.25 * float(gradient["0.bias"].norm()) / whole
    scale_one(monkeypatch, "0.bias", 1.25)
    values = checked(tmp_path, Regression(), workers=2, tolerance=0.9, check_equivalence=1)
    (step,) = values["steps"]
    assert step["difference"] == pytest.approx(truth, rel=1e-9)
    assert step["worst"] == pytest.approx(truth, rel=1e-9)
    assert step["own"] == pytest.approx(0.25, rel=1e-9)
    assert (step["name"], step["shape"]) == ("0.bias", [16])


@pytest.mark.parametrize("clip_norm", [None, 1e-3])
def test_a_wrong_exchange_is_refused_though_clipping_would_hide_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clip_norm: float | None
) -> None:
    scale_one(monkeypatch, "0.weight", 1 + 1e-6, from_step=1)
    error = refused(tmp_path, Regression(), workers=2, pattern=AllReduce(clip_norm=clip_norm))
    assert error.parameter == "0.weight"
    assert "at step 2" in str(error)
    assert "a fault of Weft's" in str(error)


def test_bf16_does_not_hide_a_wrong_gradient(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scale_one(monkeypatch, "0.weight", 1.1)
    error = refused(tmp_path, Regression(), workers=2, dtype="float32", pattern=AllReduce(autocast="bf16"))
    assert error.parameter == "0.weight"
    assert "some thousandths" in str(error)


def test_a_gradient_that_is_no_number_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scale_one(monkeypatch, "2.bias", math.nan)
    error = refused(tmp_path, Regression(), workers=2)
    assert error.parameter == "2.bias"
    assert "at step 1" in str(error)
    assert "A gradient is no number" in str(error)


def test_a_wrong_optimizer_step_shows_in_the_next_gradient(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    apply = Replica.apply

    def twice(self: Replica, update: Update) -> None:
        apply(self, update)
        with torch.no_grad():
            self.params["2.bias"] += 1e-3

    monkeypatch.setattr(Replica, "apply", twice)
    assert "at step 2" in str(refused(tmp_path, Regression(), workers=2))


def test_one_step_tells_nothing_of_the_optimizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Replica, "apply", lambda self, update: setattr(self, "step", self.step + 1))
    checked(tmp_path, Regression(), workers=2, check_equivalence=1)


def test_a_larger_tolerance_lets_it_pass_and_a_smaller_one_does_not(tmp_path: Path) -> None:
    values = checked(tmp_path, Normed(), workers=2, tolerance=0.9)
    assert 0.01 < difference(values) < 0.9
    assert refused(tmp_path / "strict", Regression(), workers=2, tolerance=0.0).parameter


@pytest.mark.multiprocess
@pytest.mark.slow
@pytest.mark.parametrize("pattern", [AllReduce(), Sharded()], ids=str)
def test_processes_refuse_too(tmp_path: Path, pattern: weft.AllReduce) -> None:
    assert refused(tmp_path, Scaling(), workers=2, pattern=pattern, cluster="local").parameter == "2.weight"


@pytest.mark.multiprocess
@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "why"),
    [
        (Normed(), "BatchNorm normalises each micro-batch by itself"),
        (Dropout(), "each stage of a pipeline draws its own"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_a_pipeline_cannot_equal_is_told_by_its_cause(tmp_path: Path, task: weft.Task, why: str) -> None:
    assert why in str(refused(tmp_path, task, workers=2, pattern=weft.Pipeline(), cluster="local"))


@pytest.mark.multiprocess
def test_a_member_that_fails_is_named_and_nothing_is_left(tmp_path: Path) -> None:
    class Fails(Regression):
        def schedule(self, optimizer: torch.optim.Optimizer, total_steps: int) -> Any:
            self.clock = super().schedule(optimizer, total_steps)
            return self.clock

        def loss(self, model: nn.Module, batch: Any) -> Tensor:
            if self.clock.last_epoch == 1 and model.training:
                raise RuntimeError("the second batch")
            return super().loss(model, batch)

    with pytest.raises(MemberFailed, match="failed in the steps that are compared with one process's: .*second batch"):
        checked(tmp_path, Fails(), workers=2, cluster="local")
    assert not (tmp_path / "run").exists()


def test_one_process_that_fails_says_so(tmp_path: Path) -> None:
    class Large(Regression):
        def loss(self, model: nn.Module, batch: Any) -> Tensor:
            if len(batch[0]) > 12:
                raise RuntimeError("no memory")
            return super().loss(model, batch)

    with pytest.raises(TaskError, match=r"in one process, on the joined batch of all workers:\n[\s\S]*no memory"):
        checked(tmp_path, Large(), workers=2)
    assert not (tmp_path / "run").exists()


def test_a_disk_that_cannot_hold_the_gradients_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match=r"must hold 1,?220 PB .*--check-equivalence=1"):
        equivalence.make_room(tmp_path / "place", 1_220 * 10**15)


@pytest.mark.multiprocess
@pytest.mark.slow
def test_faults_wait_for_the_run_and_a_resume_does_not_compare_again(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    with pytest.raises(MemberFailed, match="worker 1 failed, last heard of after step"):
        weft.run(
            Regression(), workers=2, steps=4, check_equivalence=2, save_every=1, faults=[kill(1, 2)], run_dir=run_dir
        )
    result = weft.resume(run_dir, task=Regression())
    kinds = [e.kind for e in read_events(RunFolder(run_dir).events) if e.kind in ("equivalence", "failed", "finished")]
    assert kinds == ["equivalence", "failed", "finished"]
    assert RunFolder(run_dir).config().check_equivalence == 2
    assert result.steps == 4


@pytest.mark.parametrize(
    ("settings", "kind", "says"),
    [
        (
            {"check_equivalence": -1},
            ConfigError,
            "check-equivalence=-1 is not possible: give a whole number of 0 or more",
        ),
        ({"check_equivalence": 5}, ConfigError, "check_equivalence=5 is more than the 4 steps of the run"),
        ({"tolerance": 1.0}, ConfigError, "tolerance=1.0 is not possible: .* from 0 to below 1"),
        ({"tolerance": -1e-9}, ConfigError, "tolerance=-1e-09 is not possible"),
        ({"tolerance": math.nan}, ConfigError, "tolerance=nan is not possible"),
        ({"tolerance": 0.1, "check_equivalence": 0}, Incompatible, "not asked for: add --check-equivalence"),
        ({"pattern": AllReduce(compress="topk:0.1")}, Incompatible, "compress=topk:0.1 changes what a step is given"),
        ({"pattern": LocalSGD(every=2)}, Incompatible, "from step 1 on localsgd's workers step by their own gradients"),
        ({"pattern": LocalSGD(every=2, start=2)}, Incompatible, "from step 3 on .* check --pattern allreduce"),
    ],
    ids=str,
)
def test_what_cannot_be_compared_is_refused(tmp_path: Path, settings: dict[str, Any], kind: type, says: str) -> None:
    with pytest.raises(kind, match=says):
        checked(tmp_path, Regression(), workers=2, **settings)
    assert not (tmp_path / "run").exists()


# -- the bound of bf16, and the command


def test_the_bound_of_bf16_grows_with_the_root_of_the_pieces() -> None:
    def bound(workers: int, **options: Any) -> float:
        pattern = AllReduce(autocast="bf16", **options)
        config = make_config(
            "digits", pattern, "local", {}, {}, None, workers, partition="shuffle", check_equivalence=1
        )
        return equivalence.tolerance_of(config, equivalence.loop_of(pattern))

    assert bound(1) == 2 / 256
    assert bound(4) == bound(2, accumulate=2) == 3 / 256


@pytest.mark.parametrize(
    ("args", "steps"),
    [
        ([], 0),
        (["--check-equivalence"], CHECKED_STEPS),
        (["--check-equivalence", "--steps", "9"], CHECKED_STEPS),
        (["--check-equivalence", "5"], 5),
        (["--check-equivalence=7"], 7),
        (["--check-equivalence", "-1"], -1),
    ],
    ids=str,
)
@pytest.mark.parametrize("task_last", [False, True])
def test_the_number_of_steps_may_be_left_out(args: list[str], steps: int, task_last: bool) -> None:
    command = typer.main.get_command(app).commands["run"]  # type: ignore[attr-defined]
    context = command.make_context("run", [*args, "digits"] if task_last else ["digits", *args])
    assert context.params["check_equivalence"] == steps
    assert context.params["task"] == "digits"


@pytest.mark.multiprocess
def test_the_command_ends_with_3_and_says_why(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "weft", "run", "tests.test_equivalence:Scaling", "--workers", "2", "--steps", "4"]
    command += ["--check-equivalence", "--json", "--run-dir", str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 3
    told = json.loads(done.stdout.strip().splitlines()[-1])
    assert told["kind"] == "NotEquivalent"
    assert "most in 2.weight (1x16)" in told["error"]
    assert "equivalence = first 3 steps are compared with one process's" in done.stderr.replace("\n", " ").replace(
        "  ", " "
    )
