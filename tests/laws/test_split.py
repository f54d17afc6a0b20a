"""Tensor and Mesh are one process on the joined batch, whatever the optimizer, clipping, precision and dropout."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.laws.reference import Ragged, Regression, distance, train_plainly
from tests.variants import rest_slow
from torch import nn

import weft
from weft.compare import final_parameters
from weft.errors import MemberFailed
from weft.patterns.base import Pattern
from weft.patterns.mesh import Mesh
from weft.patterns.pipeline import Pipeline
from weft.patterns.sharded import Sharded
from weft.patterns.tensor import Tensor
from weft.tasks.codelm import CodeLM
from weft.testing import freeze, kill

STEPS = 5
EQUAL = 1e-9

pytestmark = pytest.mark.multiprocess

T2 = (Tensor(), 2)
DATA2_TENSOR2 = (Mesh(data=2, tensor=2), 4)
SHARDED2_TENSOR2 = (Mesh(sharded=2, tensor=2), 4)
LAYOUTS = {"tensor": T2, "data x tensor": DATA2_TENSOR2, "sharded x tensor": SHARDED2_TENSOR2}


class Wide(Regression):
    """A stranger's MLP: pairs, a lone Linear, a norm between; dropout within a pair, where workers hold different columns, and outside."""

    dropout = 0.0

    def model(self) -> nn.Module:
        return WideNet(self.dropout)


class WideNet(nn.Module):
    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 4)
        self.gated = Gated(dropout)
        self.dropout = dropout

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.dropout(self.norm(torch.tanh(self.first(x))), self.dropout, self.training)
        return self.gated(torch.tanh(self.second(x)))


class Gated(nn.Module):
    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(4, 12), nn.Linear(4, 12), nn.Linear(12, 1)
        self.scale = nn.Parameter(torch.ones(12))  # whole on all, though what it scales is in parts
        self.dropout = dropout

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(F.dropout(torch.sigmoid(self.gate(x)) * self.up(x) * self.scale, self.dropout, self.training))


class Dropped(Wide):
    dropout = 0.3


def train(path: Path, task: weft.Task, pattern: Pattern, workers: int, **settings: Any) -> dict[str, torch.Tensor]:
    settings = {"dtype": "float64", "steps": STEPS, "batch": 24, "seed": 3, "cluster": "local"} | settings
    result = weft.run(task, workers=workers, pattern=pattern, run_dir=path, **settings)
    return final_parameters(result.run_dir)


@pytest.mark.parametrize("layout", rest_slow(list(LAYOUTS), keep=2))
@pytest.mark.parametrize("optimizer", rest_slow(["adamw", "sgd"]))
def test_equals_one_process_on_the_joined_batch(tmp_path: Path, layout: str, optimizer: str) -> None:
    truth = train_plainly(Wide(optimizer), steps=STEPS, batch=24, run_seed=3)
    assert distance(train(tmp_path / "run", Wide(optimizer), *LAYOUTS[layout]), truth) <= EQUAL


class Reads(Regression):
    """What is in parts, as a number: it is that of the whole, on every worker."""

    def model(self) -> nn.Module:
        return ReadsNet()

    def tensor_plan(self, model: nn.Module) -> dict[str, str]:
        return {"up": "column", "down": "row"}  # found by itself, the pair would stay whole, for this exchange


class ReadsNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.tanh(self.up(x))
        return self.down(h / (1 + h.detach().pow(2).mean().item()) if h.abs().sum() > 0 else h)


def test_numbers_that_code_reads_are_of_the_whole(tmp_path: Path) -> None:
    truth = train_plainly(Reads(), steps=STEPS, batch=24, run_seed=3)
    assert distance(train(tmp_path / "run", Reads(), *T2), truth) <= EQUAL


class Counted(Ragged, Wide):
    """Weights are numbers of the task's own, not of examples."""


#: One schedule, for each run would choose its own, and with it another order of sums.
ONE_COPY = {"sharded": (Sharded(), 2), "tensor": T2, "pipeline": (Pipeline(schedule="1f1b"), 2)}


@pytest.mark.parametrize("layout", [*ONE_COPY, *rest_slow([name for name in LAYOUTS if name not in ONE_COPY], keep=0)])
def test_the_mean_is_by_the_tasks_own_count(tmp_path: Path, layout: str) -> None:
    truth = train_plainly(Counted(), steps=STEPS, batch=24, run_seed=3)
    assert distance(train(tmp_path / "run", Counted(), *(LAYOUTS | ONE_COPY)[layout]), truth) <= EQUAL


class Normed(torch.optim.Optimizer):
    """Looks at each parameter as a whole: it keeps one number of it (NovoGrad's), reads another (LARS's), and one as large as the parameter."""

    def __init__(self, params: Iterable[nn.Parameter]) -> None:
        super().__init__(params, {"lr": 0.01})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for lr, p in ((group["lr"], p) for group in self.param_groups for p in group["params"] if p.grad is not None):
            state, square = self.state[p], p.grad.pow(2).sum()
            if not state:
                state["square"], state["moment"] = square.clone(), torch.zeros_like(p)
            state["square"].mul_(0.9).add_(square, alpha=0.1)
            state["moment"].mul_(0.9).add_(p.grad / (state["square"].sqrt() + 1e-8))
            p.add_(state["moment"], alpha=-lr / (1 + p.grad.norm().item()))


class ByNorm(Wide):
    def optimizer(self, params: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        return Normed(params)


@pytest.mark.parametrize("layout", rest_slow([*ONE_COPY, *(name for name in LAYOUTS if name not in ONE_COPY)], keep=2))
def test_an_optimizer_that_looks_at_whole_parameters_sees_them_whole_also_when_it_goes_on(
    tmp_path: Path, layout: str
) -> None:
    pattern, workers = (LAYOUTS | ONE_COPY)[layout]
    with pytest.raises(MemberFailed):
        train(tmp_path / "run", ByNorm(), pattern, workers, save_every=2, faults=[kill(rank=1, step=4)])
    weft.resume(tmp_path / "run", task=ByNorm())
    truth = train_plainly(ByNorm(), steps=STEPS, batch=24, run_seed=3)
    assert distance(final_parameters(tmp_path / "run"), truth) <= EQUAL


@pytest.mark.parametrize("schedule", rest_slow(["1f1b", "zbv"]))
def test_attention_in_parts_goes_through_many_blocks(tmp_path: Path, schedule: str) -> None:
    """Blocks before a stage are not computed there, and what passes between them has its parts all the same."""
    task = CodeLM(size="small", layers=6, seq_len=16, test_windows=8)
    truth = train_plainly(task, steps=2, batch=8, run_seed=3)
    pattern = Mesh(tensor=2, pipeline=2, schedule=schedule)
    got = train(tmp_path / "run", task, pattern, 4, steps=2, batch=8, eval_every=1)
    assert distance(got, truth) <= 1e-7  # AdamW divides by what is nearly nothing


class HalfFrozen(Counted):
    """All that one stage holds is frozen."""

    def model(self) -> nn.Module:
        layers = [nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1)]
        for layer in layers[:3]:
            layer.requires_grad_(False)
        return nn.Sequential(*layers)


@pytest.mark.parametrize(
    "layout",
    [
        ((Pipeline(schedule="1f1b"), 2)),
        pytest.param((Mesh(tensor=2, pipeline=2, schedule="1f1b"), 4), marks=pytest.mark.slow),
    ],
)
def test_a_stage_may_have_nothing_to_train(tmp_path: Path, layout: Any) -> None:
    truth = train_plainly(HalfFrozen("adamw"), steps=STEPS, batch=24, run_seed=3)
    assert distance(train(tmp_path / "run", HalfFrozen("adamw"), *layout), truth) <= EQUAL


# -- when something breaks

SPLIT = LAYOUTS | {
    "pipeline": ONE_COPY["pipeline"],
    "data x pipeline": (Mesh(data=2, pipeline=2, schedule="1f1b"), 4),
    "tensor x pipeline": (Mesh(tensor=2, pipeline=2, schedule="1f1b"), 4),
}


@pytest.mark.parametrize("layout", rest_slow(list(SPLIT)[::-1], keep=1))
def test_a_killed_worker_is_named_and_resume_is_bit_equal(tmp_path: Path, layout: str) -> None:
    pattern, workers = SPLIT[layout]
    job: dict[str, Any] = {"save_every": 4, "steps": 10}
    undisturbed = train(tmp_path / "undisturbed", Dropped("adamw"), pattern, workers, **job)
    with pytest.raises(MemberFailed, match=r"worker 1 failed, last heard of after step \d+: killed by SIGKILL"):
        train(tmp_path / "run", Dropped("adamw"), pattern, workers, **job, faults=[kill(rank=1, step=7)])
    assert weft.resume(tmp_path / "run", task=Dropped("adamw")).steps == 10
    got = final_parameters(tmp_path / "run")
    assert all(torch.equal(got[n], undisturbed[n]) for n in undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("layout", [*SPLIT, "sharded", "pipeline of 3"])
def test_a_frozen_worker_is_named_and_not_who_waits_for_it(tmp_path: Path, layout: str) -> None:
    pattern, workers = (SPLIT | ONE_COPY | {"pipeline of 3": (Pipeline(schedule="1f1b"), 3)})[layout]
    last = workers - 1
    with pytest.raises(MemberFailed, match=f"worker {last} failed") as caught:
        train(tmp_path / "run", Wide(), pattern, workers, faults=[freeze(rank=last, step=3)], deadline_s=3.0)
    assert caught.value.member == last


@pytest.mark.slow
@pytest.mark.parametrize("layout", SPLIT)
def test_after_a_kill_fewer_workers_can_go_on(tmp_path: Path, layout: str) -> None:
    pattern, workers = SPLIT[layout]
    with pytest.raises(MemberFailed):
        train(tmp_path / "run", Wide(), pattern, workers, save_every=4, steps=10, faults=[kill(rank=1, step=7)])
    assert weft.resume(tmp_path / "run", task=Wide(), pattern=weft.AllReduce(), workers=1).steps == 10
    truth = train_plainly(Wide(), steps=10, batch=24, run_seed=3)
    assert distance(final_parameters(tmp_path / "run"), truth) <= EQUAL
