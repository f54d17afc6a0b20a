"""Pipeline is one process on the joined batch: every schedule, every cut, whatever the task's own code does between its blocks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.laws.reference import Regression, distance, train_plainly
from tests.laws.test_sharded import Deep
from tests.variants import rest_slow
from torch import nn

import weft
from weft.compare import final_parameters
from weft.errors import ConfigError, Incompatible, TaskError
from weft.patterns.base import Pattern
from weft.patterns.mesh import Mesh
from weft.patterns.pipeline import Pipeline
from weft.patterns.stages import input_gradient
from weft.pipelines.schedules import names
from weft.tasks.codelm import CodeLM
from weft.tasks.digits import Digits

STEPS = 5
EQUAL = 1e-9

pytestmark = pytest.mark.multiprocess


def train(path: Path, task: weft.Task, pattern: Pattern, workers: int, **settings: Any) -> dict[str, torch.Tensor]:
    settings = {"dtype": "float64", "steps": STEPS, "batch": 24, "seed": 3, "cluster": "local"} | settings
    result = weft.run(task, workers=workers, pattern=pattern, run_dir=path, **settings)
    return final_parameters(result.run_dir)


class Masked(Regression):
    """Something made of the batch alone is used in all stages; a block returns two tensors; a last micro-batch is smaller."""

    def model(self) -> nn.Module:
        return MaskedNet()


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: torch.Tensor, y: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.tanh(self.a(x)) * mask, torch.tanh(self.b(y)) + x


class MaskedNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(6))  # used before the first block and after the last
        self.blocks = nn.ModuleList([Two() for _ in range(4)])
        self.end = nn.Linear(6, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mask = (x.abs() < 2).to(x.dtype)
        x, y = x * self.scale, x
        for block in self.blocks:
            x, y = block(x, y, mask)
        return self.end((x + y) * self.scale)


@pytest.mark.parametrize(
    "schedule", rest_slow(["1f1b", "zbv", *(n for n in names() if n not in ("1f1b", "zbv"))], keep=2)
)
def test_every_schedule_equals_one_process(tmp_path: Path, schedule: str) -> None:
    truth = train_plainly(Masked("adamw"), steps=STEPS, batch=23, run_seed=3)
    pattern = Pipeline(schedule=schedule, microbatches=5)
    assert distance(train(tmp_path / "run", Masked("adamw"), pattern, 2, batch=23), truth) <= EQUAL


@pytest.mark.slow
@pytest.mark.parametrize("schedule", names())
def test_every_schedule_on_four_workers(tmp_path: Path, schedule: str) -> None:
    task = CodeLM(size="tiny", layers=8, seq_len=16, test_windows=8)
    truth = train_plainly(task, steps=3, batch=8, run_seed=3)
    assert distance(train(tmp_path / "run", task, Pipeline(schedule=schedule), 4, batch=8, steps=3), truth) <= EQUAL


TIED = {
    "data x pipeline": (Mesh(data=2, pipeline=2), 4),
    "tensor x pipeline": (Mesh(tensor=2, pipeline=2), 4),
    "three": (Pipeline(), 3),
}


@pytest.mark.parametrize("layout", rest_slow(list(TIED)))
def test_tied_embeddings_at_both_ends(tmp_path: Path, layout: str) -> None:
    task = CodeLM(size="small", layers=3, seq_len=16, test_windows=8)
    truth = train_plainly(task, steps=3, batch=6, run_seed=3)
    assert distance(train(tmp_path / "run", task, *TIED[layout], batch=6, steps=3), truth) <= EQUAL


@pytest.mark.slow
@pytest.mark.parametrize("make", [lambda: Digits(width=4), lambda: Deep()])
def test_blocks_that_are_found(tmp_path: Path, make: Any) -> None:
    truth = train_plainly(make(), steps=STEPS, batch=24, run_seed=3)
    assert distance(train(tmp_path / "run", make(), Pipeline(), 2), truth) <= EQUAL


@pytest.mark.slow
def test_clipping_is_of_the_whole_gradient(tmp_path: Path) -> None:
    """Also of what stands at both ends, which counts once."""
    truth = train_plainly(Masked(), steps=STEPS, batch=24, run_seed=3, clip=0.05)
    for k, (pattern, workers) in enumerate(
        [(Pipeline(clip_norm=0.05), 2), (Mesh(data=2, pipeline=2, clip_norm=0.05), 4)]
    ):
        assert distance(train(tmp_path / f"run{k}", Masked(), pattern, workers), truth) <= 1e-5


@pytest.mark.slow
def test_the_last_batch_of_an_epoch_is_smaller(tmp_path: Path) -> None:
    """211 = 8 x 26 + 3 examples, in four micro-batches."""
    truth = train_plainly(Masked(), steps=10, batch=26, run_seed=3)
    assert distance(train(tmp_path / "run", Masked(), Pipeline(microbatches=4), 2, batch=26, steps=10), truth) <= EQUAL


def test_the_backward_of_what_returns_a_view_is_split() -> None:
    linear, x = nn.Linear(4, 4), torch.randn(3, 4, requires_grad=True)
    linear(x)[:, 1:].sum().backward()
    assert x.grad is not None
    assert linear.weight.grad is not None
    truth, weights = x.grad.clone(), linear.weight.grad.clone()
    x.grad = linear.weight.grad = linear.bias.grad = None
    (back,), later = input_gradient([linear(x)[:, 1:]], [torch.ones(3, 3)], [x], list(linear.parameters()))
    later()
    assert torch.equal(back, truth)
    assert torch.equal(linear.weight.grad, weights)


# -- what is refused, before step 1


class Skips(MaskedNet):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mask = torch.ones_like(x)
        early = x * self.scale
        x, y = early, x
        for block in self.blocks:
            x, y = block(x, y, mask)
        return self.end(x + early)


class Twice(MaskedNet):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mask, y = torch.ones_like(x), x
        for block in [*self.blocks, self.blocks[0]]:
            x, y = block(x, y, mask)
        return self.end(x)


class Dictionary(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, x: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {"x": self.linear(x["x"])}


class Dictionaries(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks, self.end = nn.ModuleList([Dictionary(), Dictionary()]), nn.Linear(6, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = {"x": x}
        for block in self.blocks:
            y = block(y)
        return self.end(y["x"])


class Alone(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(6, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight


class Of(Regression):
    def __init__(self, net: type[nn.Module]) -> None:
        super().__init__()
        self.net = net

    def model(self) -> nn.Module:
        return self.net()


@pytest.mark.parametrize(
    ("net", "settings", "kind", "says"),
    [
        (MaskedNet, {"workers": 8}, ConfigError, "8 stages|at most 5 ranks"),
        (
            MaskedNet,
            {"pattern": Pipeline(microbatches=25)},
            ConfigError,
            "microbatches=25 is more than the 24 examples of a share",
        ),
        (MaskedNet, {"pattern": Pipeline(stages=3)}, ConfigError, "stages=3 takes as many workers, and there are 2"),
        (
            MaskedNet,
            {"pattern": Mesh(data=3, pipeline=2), "workers": 4},
            ConfigError,
            "4 workers cannot hold data=3 x pipeline=2, which takes 6",
        ),
        (Skips, {}, TaskError, "uses what it computed before that block ended"),
        (Twice, {}, TaskError, "runs block 'blocks.0' twice"),
        (Dictionaries, {}, Incompatible, "block 'blocks.0' of Of's model returns a dict"),
        (Alone, {}, Incompatible, "has no blocks that run one after the other"),
    ],
)
def test_what_cannot_be_is_refused_with_the_cure(
    tmp_path: Path, net: type[nn.Module], settings: dict[str, Any], kind: type[Exception], says: str
) -> None:
    settings = {"pattern": Pipeline(), "workers": 2} | settings
    with pytest.raises(kind, match=says):
        train(tmp_path / "run", Of(net), **settings)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"schedule": "fast"}, "unknown schedule 'fast'"),
        ({"schedule": "1f1b", "stages_per_worker": 2}, "1f1b takes 1 stage on each rank, not 2"),
        ({"microbatches": -1}, "microbatches=-1 is not possible"),
        ({"accumulate": 2}, "use -o microbatches=2"),
        ({"stages": 0}, "stages=0 is not possible"),
    ],
)
def test_options_that_cannot_be(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        Pipeline(**options)
