"""Sharded(n) is one process on the joined batch, whichever carrier moves the parts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.laws.reference import Regression, distance, train_plainly
from tests.variants import rest_slow
from torch import Tensor, nn

import weft
from weft.compare import final_parameters
from weft.errors import ConfigError, Incompatible, MemberFailed
from weft.patterns.sharded import Sharded
from weft.tasks.codelm import CodeLM
from weft.tasks.digits import Digits
from weft.testing import kill

STEPS = 12
EQUAL = 1e-9

pytestmark = pytest.mark.multiprocess


class Deep(Regression):
    """Blocks of odd sizes, which no number of workers divides; one frozen, one parameter outside all blocks."""

    def model(self) -> nn.Module:
        return DeepNet()


class DeepNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(6))
        self.layers = nn.ModuleList([nn.Linear(6, 7), nn.Linear(7, 5), nn.Linear(5, 5), nn.Linear(5, 1)])
        self.layers[2].requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        x = x * self.scale
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


def train(tmp_path: Path, task: weft.Task, workers: int, **settings: Any) -> dict[str, Tensor]:
    settings = {
        "cluster": "local",
        "pattern": Sharded(),
        "dtype": "float64",
        "steps": STEPS,
        "seed": 3,
        "run_dir": tmp_path / "run",
    } | settings
    result = weft.run(task, workers=workers, **settings)
    return final_parameters(result.run_dir)


TASKS = {
    "regression": (lambda: Regression(), 24),
    "adamw": (lambda: Regression("adamw"), 24),
    "deep": (lambda: Deep(), 24),
    "digits": (lambda: Digits(width=4), 30),
}


@pytest.mark.parametrize("workers", rest_slow([2, 1, 3, 4]))
@pytest.mark.parametrize("name", TASKS)
def test_equals_one_process_on_the_joined_batch(tmp_path: Path, name: str, workers: int) -> None:
    make, batch = TASKS[name]
    truth = train_plainly(make(), steps=STEPS, batch=batch, run_seed=3)
    assert distance(train(tmp_path, make(), workers, batch=batch), truth) <= EQUAL


@pytest.mark.parametrize("workers", rest_slow([2, 4]))
def test_equals_one_process_on_a_language_model(tmp_path: Path, workers: int) -> None:
    task = CodeLM(size="tiny", seq_len=16, test_windows=8)
    truth = train_plainly(task, steps=4, batch=6, run_seed=3)
    assert distance(train(tmp_path, task, workers, batch=6, steps=4), truth) <= EQUAL


@pytest.mark.parametrize("link", rest_slow(["tcp", "gloo"]))
def test_every_carrier_gives_the_same(tmp_path: Path, link: str) -> None:
    truth = train_plainly(Deep(), steps=STEPS, batch=24, run_seed=3)
    assert distance(train(tmp_path, Deep(), 3, batch=24, link=link), truth) <= EQUAL


@pytest.mark.parametrize(
    "options", rest_slow([{"replicas": 2}, {"reshard": False}, {"accumulate": 3}, {"replicas": 4}], keep=2)
)
def test_no_option_changes_the_result(tmp_path: Path, options: dict[str, Any]) -> None:
    truth = train_plainly(Deep(), steps=STEPS, batch=24, run_seed=3)
    assert distance(train(tmp_path, Deep(), 4, batch=24, pattern=Sharded(**options)), truth) <= EQUAL


@pytest.mark.parametrize("replicas", [1, 2])
def test_clipping_is_of_the_joined_gradient(tmp_path: Path, replicas: int) -> None:
    truth = train_plainly(Deep(), steps=STEPS, batch=24, run_seed=3, clip=0.05)
    unclipped = train_plainly(Deep(), steps=STEPS, batch=24, run_seed=3)
    got = train(tmp_path, Deep(), 4, batch=24, pattern=Sharded(clip_norm=0.05, replicas=replicas))
    assert distance(got, truth) <= 1e-5  # torch divides by norm + 1e-6, we by the norm
    assert distance(got, unclipped) > 1e-3


def test_a_rank_without_examples_still_takes_part(tmp_path: Path) -> None:
    """The epoch's last joined batch of 211 = 8 x 26 + 3 examples leaves one of four ranks with nothing."""
    truth = train_plainly(Regression(), steps=18, batch=26, run_seed=3)
    assert distance(train(tmp_path, Regression(), 4, batch=26, steps=18), truth) <= EQUAL


def test_float32_after_five_sgd_steps(tmp_path: Path) -> None:
    truth = train_plainly(Regression(), steps=5, batch=24, run_seed=3, dtype=torch.float32)
    assert distance(train(tmp_path, Regression(), 3, batch=24, steps=5, dtype="float32"), truth) <= 1e-5


# -- when something breaks


@pytest.mark.parametrize(("optimizer", "replicas"), rest_slow([("adamw", 1), ("sgd", 2), ("adamw", 2)]))
def test_a_killed_worker_is_named_and_resume_is_bit_equal(tmp_path: Path, optimizer: str, replicas: int) -> None:
    job: dict[str, Any] = {"batch": 24, "pattern": Sharded(replicas=replicas), "save_every": 4, "steps": 10}
    undisturbed = train(tmp_path, Deep(optimizer), 2, run_dir=tmp_path / "undisturbed", **job)
    with pytest.raises(MemberFailed, match=r"worker 1 failed, last heard of after step \d+: killed by SIGKILL"):
        train(tmp_path, Deep(optimizer), 2, **job, faults=[kill(rank=1, step=7)])
    assert weft.resume(tmp_path / "run", task=Deep(optimizer)).steps == 10
    got = final_parameters(tmp_path / "run")
    assert all(torch.equal(got[n], undisturbed[n]) for n in undisturbed)


@pytest.mark.parametrize("workers", rest_slow([1, 3]))
def test_resume_with_another_world_is_equal_to_rounding(tmp_path: Path, workers: int) -> None:
    """Also from parts into one whole."""
    job: dict[str, Any] = {"batch": 24, "save_every": 4, "steps": 10}
    undisturbed = train(tmp_path, Deep(), 2, run_dir=tmp_path / "undisturbed", **job)
    with pytest.raises(MemberFailed):
        train(tmp_path, Deep(), 2, **job, faults=[kill(rank=0, step=7)])
    assert weft.resume(tmp_path / "run", task=Deep(), workers=workers).steps == 10
    assert distance(final_parameters(tmp_path / "run"), undisturbed) <= EQUAL


# -- what is refused


@pytest.mark.parametrize(
    ("settings", "kind", "says"),
    [
        ({"pattern": Sharded(replicas=2)}, ConfigError, "replicas=2 does not divide 3 workers: give one of 1, 3."),
        ({"cluster": "inprocess"}, Incompatible, "needs a process for each worker"),
    ],
)
def test_what_cannot_be_is_refused(tmp_path: Path, settings: dict[str, Any], kind: type[Exception], says: str) -> None:
    with pytest.raises(kind, match=says):
        train(tmp_path, Regression(), 3, batch=24, **settings)
