"""What every way to split a model promises, for each of them: gradients, precision, optimizers, clipping, accumulation, random numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from tests.laws.reference import distance, train_plainly
from tests.laws.test_split import Dropped, Wide
from tests.variants import rest_slow
from torch import nn

import weft
from weft import Mesh, Pipeline, Sharded, Tensor
from weft.compare import final_parameters
from weft.events import read_events
from weft.patterns.base import Pattern
from weft.pipelines.schedules import names
from weft.tasks.codelm import CodeLM

EQUAL = 1e-9
STEPS = 5

pytestmark = pytest.mark.multiprocess


class SGDLM(CodeLM):
    def optimizer(self, params: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.SGD(params, lr=0.1)


LAYOUTS: dict[str, tuple[Pattern, int]] = {
    "sharded x tensor": (Mesh(sharded=2, tensor=2), 4),
    "data x pipeline": (Mesh(data=2, pipeline=2), 4),
    "sharded-2": (Sharded(), 2),
    "sharded-4": (Sharded(), 4),
    "tensor-2": (Tensor(), 2),
    "data x tensor": (Mesh(data=2, tensor=2), 4),
    "tensor x pipeline": (Mesh(tensor=2, pipeline=2), 4),
    "tensor-2 by sequence": (Tensor(sequence=True), 2),
    "sharded x tensor by sequence": (Mesh(sharded=2, tensor=2, sequence=True), 4),
    "tensor x pipeline by sequence": (Mesh(tensor=2, pipeline=2, sequence=True), 4),
    **{f"pipeline-2 {name}": (Pipeline(schedule=name), 2) for name in names()},
    **{f"pipeline-4 {name}": (Pipeline(schedule=name), 4) for name in names()},
}
#: Heads must be divisible by 2 where tensors are cut, and 8 blocks fill 4 workers with two stages each.
SHAPES: dict[bool, dict[str, Any]] = {
    True: {"size": "small", "layers": 2},
    False: {"size": "tiny", "layers": 8},
}


def language_model(layout: str) -> SGDLM:
    return SGDLM(**SHAPES["tensor" in layout], seq_len=16, test_windows=8)


@pytest.mark.parametrize("layout", rest_slow(LAYOUTS))
def test_gradients_equal_one_process_s(tmp_path: Path, layout: str) -> None:
    """In float64, as --check-equivalence compares them."""
    pattern, workers = LAYOUTS[layout]
    found = differences(tmp_path / "run", language_model(layout), pattern, workers, dtype="float64", batch=8)
    assert max(found) <= EQUAL


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_five_sgd_steps_in_float32_equal_one_process_s(tmp_path: Path, layout: str) -> None:
    pattern, workers = LAYOUTS[layout]
    truth = train_plainly(language_model(layout), steps=STEPS, batch=8, run_seed=3, dtype=torch.float32)
    got = train(tmp_path / "run", language_model(layout), pattern, workers, dtype="float32", batch=8)
    assert distance(got, truth) <= 1e-5


def train(path: Path, task: weft.Task, pattern: Pattern, workers: int, **settings: Any) -> dict[str, torch.Tensor]:
    settings = {"dtype": "float64", "steps": STEPS, "batch": 24, "seed": 3, "cluster": "local"} | settings
    return final_parameters(weft.run(task, pattern, workers=workers, run_dir=path, **settings).run_dir)


def differences(path: Path, task: weft.Task, pattern: Pattern, workers: int, **settings: Any) -> list[float]:
    """Of each step that is compared with one process's, in the norm of its gradient; none is above what the plan allows."""
    train(path, task, pattern, workers, steps=2, check_equivalence=2, **settings)
    (event,) = [e for e in read_events(path / "events.jsonl") if e.kind == "equivalence"]
    return [step["difference"] for step in event.values["steps"]]


# -- with everything that a run may have


class Stepped(Wide):
    """AdamW as it is asked for, with weight decay."""

    def __init__(self, **how: bool) -> None:
        super().__init__("adamw")
        self.how = how

    def optimizer(self, params: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.AdamW(params, lr=0.01, weight_decay=0.1, **self.how)


class Feature(NamedTuple):
    task: Callable[[], weft.Task]
    options: dict[str, Any] = {}  # of the pattern
    clip: float | None = None


FEATURES = {
    "foreach": Feature(lambda: Stepped(foreach=True)),
    "fused": Feature(lambda: Stepped(fused=True)),
    "clipped": Feature(Wide, {"clip_norm": 0.05}, 0.05),
    "clipped, fused": Feature(lambda: Stepped(fused=True), {"clip_norm": 0.05}, 0.05),
    "accumulated": Feature(lambda: Stepped(foreach=False), {"accumulate": 3}),
}
MESHES = {
    "data x tensor": ({"data": 2, "tensor": 2}, 4),
    "sharded x tensor": ({"sharded": 2, "tensor": 2}, 4),
    "tensor": ({"tensor": 2}, 2),
}


@pytest.mark.parametrize("mesh", rest_slow(MESHES))
@pytest.mark.parametrize("feature", rest_slow(FEATURES))
def test_it_changes_nothing(tmp_path: Path, feature: str, mesh: str) -> None:
    (axes, workers), of = MESHES[mesh], FEATURES[feature]
    truth = train_plainly(of.task(), steps=STEPS, batch=24, run_seed=3, clip=of.clip)
    assert distance(train(tmp_path / "run", of.task(), Mesh(**axes, **of.options), workers), truth) <= EQUAL
    if of.clip is not None:
        assert distance(train_plainly(of.task(), steps=STEPS, batch=24, run_seed=3), truth) > 1e-3


@pytest.mark.parametrize("mesh", rest_slow(MESHES, keep=0))
def test_bf16_is_within_its_error(tmp_path: Path, mesh: str) -> None:
    axes, workers = MESHES[mesh]
    found = differences(tmp_path / "run", Wide(), Mesh(**axes, autocast="bf16"), workers, dtype="float32")
    assert max(found) > 1e-4, "bf16 was not used"


@pytest.mark.parametrize("mesh", rest_slow(MESHES))
def test_dropout_is_that_of_data_parallelism(tmp_path: Path, mesh: str) -> None:
    """Shares draw different numbers; workers that hold a tensor together draw the same, and keep each its own."""
    axes, workers = MESHES[mesh]
    pattern = Mesh(**axes)
    truth = train(tmp_path / "plain", Dropped(), weft.AllReduce(), pattern.shares(workers))
    assert distance(train(tmp_path / "run", Dropped(), pattern, workers), truth) <= EQUAL
    assert distance(train_plainly(Wide(), steps=STEPS, batch=24, run_seed=3), truth) > 1e-3
