"""Pipeline is one process on the joined batch: every schedule, every cut, whatever the task's own code does between its blocks."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.laws.reference import Regression, distance, train_plainly
from tests.laws.test_sharded import Deep
from tests.variants import rest_slow
from torch import nn
from torch.utils.checkpoint import checkpoint

import weft
from weft.compare import final_parameters
from weft.config import RunFolder
from weft.errors import ConfigError, MemberFailed
from weft.events import read_events
from weft.patterns.base import Pattern
from weft.patterns.mesh import Mesh
from weft.patterns.pipeline import Pipeline
from weft.patterns.stages import input_gradient
from weft.pipelines.schedules import names
from weft.tasks.codelm import CodeLM
from weft.tasks.digits import Digits
from weft.testing import kill, throttle

STEPS = 5
EQUAL = 1e-9

pytestmark = pytest.mark.multiprocess


def train(path: Path, task: weft.Task, pattern: Pattern, workers: int, **settings: Any) -> dict[str, torch.Tensor]:
    settings = {"dtype": "float64", "steps": STEPS, "batch": 24, "seed": 3, "cluster": "local"} | settings
    result = weft.run(task, workers=workers, pattern=pattern, run_dir=path, **settings)
    return final_parameters(result.run_dir)


class Masked(Regression):
    """Something made of the batch alone is used in all stages; a block returns two tensors and a None; a last micro-batch is smaller."""

    def model(self) -> nn.Module:
        return MaskedNet()


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: torch.Tensor, y: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        return torch.tanh(self.a(x)) * mask, torch.tanh(self.b(y)) + x, None


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
            x, y, _ = block(x, y, mask)
        return self.end((x + y) * self.scale)


@pytest.mark.parametrize(
    "schedule", rest_slow(["1f1b", "zbv", *(n for n in names() if n not in ("1f1b", "zbv"))], keep=2)
)
def test_every_schedule_equals_one_process(tmp_path: Path, schedule: str) -> None:
    truth = train_plainly(Masked("adamw"), steps=STEPS, batch=23, run_seed=3)
    pattern = Pipeline(schedule=schedule, microbatches=5)
    assert distance(train(tmp_path / "run", Masked("adamw"), pattern, 2, batch=23), truth) <= EQUAL


class Noisy(Masked):
    """Draws something for all blocks at once, and more in each and between."""

    def model(self) -> nn.Module:
        return NoisyNet()


class NoisyNet(MaskedNet):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mask = (torch.rand_like(x) < 0.9).to(x.dtype)
        x, y = x * self.scale, x
        for block in self.blocks:
            x, y, _ = block(nn.functional.dropout(x, 0.2, self.training), y, mask)
        return self.end((x + y) * self.scale)


@pytest.mark.slow
def test_what_is_drawn_does_not_depend_on_cuts_or_schedule(tmp_path: Path) -> None:
    truth = train(tmp_path / "truth", Noisy(), Pipeline(schedule="gpipe", microbatches=4), 2)
    for name, workers in [("zbv", 2), ("1f1b", 3), ("interleaved-zb", 2)]:
        pattern = Pipeline(schedule=name, microbatches=4)
        assert distance(train(tmp_path / f"{name}-{workers}", Noisy(), pattern, workers), truth) <= EQUAL
    others = train(tmp_path / "others", Noisy(), Pipeline(schedule="gpipe", microbatches=4), 2, seed=4)
    assert distance(others, truth) > 1e-3, "nothing was drawn"


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


@pytest.mark.parametrize(("link", "between_stages"), [("auto", "tcp"), ("shm", "shm")])
def test_what_carries_between_stages_is_in_the_plan_and_changes_nothing(
    tmp_path: Path, link: str, between_stages: str
) -> None:
    """Who waits there waits beside a computation; shared memory is taken where it was asked for."""
    truth = train_plainly(Masked(), steps=STEPS, batch=24, run_seed=3)
    assert distance(train(tmp_path / "run", Masked(), Pipeline(schedule="zbv"), 2, link=link), truth) <= EQUAL
    links = json.loads((tmp_path / "run" / "plan.json").read_text())["links"]
    assert {one["carrier"] for one in links if one["group"] == "pipeline"} == {between_stages}
    assert {one["carrier"] for one in links if one["group"] != "pipeline"} == {"shm"}


@pytest.mark.slow
def test_the_last_batch_of_an_epoch_is_smaller(tmp_path: Path) -> None:
    """211 = 8 x 26 + 3 examples, in four micro-batches."""
    truth = train_plainly(Masked(), steps=10, batch=26, run_seed=3)
    assert distance(train(tmp_path / "run", Masked(), Pipeline(microbatches=4), 2, batch=26, steps=10), truth) <= EQUAL


@pytest.mark.slow
def test_the_schedule_follows_a_slow_link_and_a_stopped_run_goes_on_by_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When it is resumed the link is quick: who measured again would find another. Whether it is worth measuring depends on how quick this
    machine is (tests/patterns/test_pipelined.py tells the seconds); here it always is."""
    monkeypatch.setattr(importlib.import_module("weft.patterns.split"), "goes_by_link", lambda *_: True)
    job: dict[str, Any] = {"batch": 200, "steps": 6, "save_every": 2, "link": "tcp"}
    slow = [throttle(rank, 2_000_000) for rank in range(2)]
    with pytest.raises(MemberFailed):
        train(tmp_path / "run", Masked("adamw"), Pipeline(), 2, **job, faults=[*slow, kill(rank=1, step=4)])
    before = RunFolder(tmp_path / "run").config().measured
    assert before is not None
    assert before.pipeline is not None
    assert before.neighbours["0-1"].bytes_per_s < 1e7
    assert "measured" in before.pipeline.why
    assert weft.resume(tmp_path / "run", task=Masked("adamw")).steps == 6
    assert RunFolder(tmp_path / "run").config().measured == before
    assert [e.kind for e in read_events(tmp_path / "run" / "events.jsonl")].count("measured") == 1
    truth = train_plainly(Masked("adamw"), steps=6, batch=200, run_seed=3)
    assert distance(final_parameters(tmp_path / "run"), truth) <= EQUAL


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


class Normed(Regression):
    """A norm between pairs that tensor= cuts; within one, its results would be in parts, and so is no cut of the pipeline."""

    def model(self) -> nn.Module:
        first, second = nn.BatchNorm1d(6), nn.BatchNorm1d(8, momentum=None)
        pair, other = (nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8)), (nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1))
        return nn.Sequential(first, *pair, second, nn.Tanh(), *other)


class NormedFirst(Regression):
    """The norm is no block: it runs with the code before the first one."""

    def model(self) -> nn.Module:
        return NormedNet()

    def blocks(self, model: nn.Module) -> list[nn.Module]:
        return [module for module in model.modules() if isinstance(module, nn.Linear)]


class NormedNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(6)
        self.blocks = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.blocks(self.norm(x))
        return out


@pytest.mark.parametrize("task", [Normed(), NormedFirst()])
@pytest.mark.parametrize(
    ("pattern", "workers"),
    rest_slow(
        [
            (
                Mesh(data=2, pipeline=2, microbatches=3, schedule="zbv"),
                4,
            ),  # a worker of two stages asks for the first one's shapes
            *((Pipeline(microbatches=3, schedule=schedule), 2) for schedule in ("1f1b", "looped-bfs", "dualpipe-v")),
            (Mesh(tensor=2, pipeline=2, microbatches=3, schedule="1f1b"), 4),
        ]
    ),
)
def test_running_buffers_are_those_of_data_parallelism_in_pieces(
    tmp_path: Path, pattern: Pattern, workers: int, task: weft.Task
) -> None:
    """Each lives where its block is, and is joined from there."""
    truth = train(tmp_path / "plain", task, weft.AllReduce(accumulate=3), pattern.shares(workers), batch=23)
    assert any("running_mean" in name for name in truth)
    assert distance(train(tmp_path / "run", task, pattern, workers, batch=23), truth) <= EQUAL


def test_by_default_no_piece_is_too_small_for_a_norm(tmp_path: Path) -> None:
    """Shares of 7 examples: pieces of one could not be normalised. 8 pieces, and these, are the default without a norm."""
    train(tmp_path / "run", Normed(), Mesh(data=2, pipeline=2), 4, batch=14)
    notes = json.loads((tmp_path / "run" / "plan.json").read_text())["notes"]
    assert any(note.startswith("3 micro-batches of 3 examples") for note in notes)


@pytest.mark.parametrize("task", [Normed(), NormedFirst()])
@pytest.mark.parametrize("pattern", rest_slow([Pipeline(schedule="1f1b"), Pipeline(schedule="zbv")]))
def test_a_last_batch_too_small_for_all_pieces_is_that_of_accumulation(
    tmp_path: Path, task: weft.Task, pattern: Pattern
) -> None:
    """211 = 8 x 26 + 3 examples: one piece, for two would have one that no norm can take, and what fills the others leaves no trace."""
    job: dict[str, Any] = {"batch": 26, "steps": 10}
    truth = train(tmp_path / "plain", task, weft.AllReduce(accumulate=8), 1, **job)
    assert distance(train(tmp_path / "run", task, pattern, 2, **job), truth) <= EQUAL


class Grouped(Masked):
    """Groups by place in the list, or by shape; of the latter some stages have none."""

    def __init__(self, by: str) -> None:
        super().__init__()
        self.by = by

    def optimizer(self, params: Any) -> torch.optim.Optimizer:
        given = list(params)
        matrices, rest = [p for p in given if p.dim() > 1], [p for p in given if p.dim() <= 1]
        first, second = (given[:-3], given[-3:]) if self.by == "place" else (matrices, rest)
        groups = [{"params": first}, {"params": second, "lr": 0.2, "weight_decay": 0.1}]
        return torch.optim.SGD([group for group in groups if group["params"]], lr=0.05, momentum=0.9)


@pytest.mark.parametrize("by", rest_slow(["place", "shape"]))
def test_groups_of_parameters_are_those_of_the_whole_model(tmp_path: Path, by: str) -> None:
    """Also in what is saved: the second half is another pattern's."""
    truth = train_plainly(Grouped(by), steps=STEPS, batch=24, run_seed=3)
    job: dict[str, Any] = {"dtype": "float64", "steps": STEPS, "batch": 24, "seed": 3, "cluster": "local"}
    for k, (first, then, workers) in enumerate(
        [(Pipeline(schedule="zbv"), weft.AllReduce(), 1), (weft.AllReduce(), Pipeline(schedule="1f1b"), 2)]
    ):
        place, begun = tmp_path / f"run{k}", job | {"save_every": STEPS // 2, "faults": [kill(rank=0, step=STEPS - 1)]}
        with pytest.raises(MemberFailed):
            weft.run(Grouped(by), workers=3 - workers, pattern=first, run_dir=place, **begun)
        weft.resume(place, task=Grouped(by), pattern=then, workers=workers)
        assert distance(final_parameters(place), truth) <= EQUAL


class Sized(Regression):
    """Its examples come to an evaluation a few at a time."""

    def evaluate(self, model: nn.Module, batch: Any) -> dict[str, Any]:
        assert len(batch[0]) <= 4 * 3, "four micro-batches of a share"
        return super().evaluate(model, batch)


def test_an_evaluation_takes_as_much_at_once_as_micro_batches_do(tmp_path: Path) -> None:
    train(tmp_path / "run", Sized(), Pipeline(schedule="1f1b"), 2, batch=24, steps=2)


class Checkpointed(Regression):
    """Blocks forget what they computed, and backward computes it again."""

    def model(self) -> nn.Module:
        return CheckpointedNet()


class CheckpointedNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 1)
        self.blocks = nn.ModuleList(Forgetful() for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        out: torch.Tensor = self.last(x)
        return out


class Forgetful(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inside = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Dropout(0.1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = checkpoint(self.inside, x, use_reentrant=False)
        return out


@pytest.mark.parametrize("schedule", rest_slow(["1f1b", "zbv"]))
def test_blocks_may_be_checkpointed(tmp_path: Path, schedule: str) -> None:
    truth = train(tmp_path / "plain", Checkpointed(), Pipeline(schedule="gpipe", microbatches=4), 4)
    run = train(tmp_path / "run", Checkpointed(), Pipeline(schedule=schedule, microbatches=4), 2)
    assert distance(run, truth) <= EQUAL


class Counts(Regression):
    """Held-out metrics without the loss, which then takes a pass of its own."""

    def evaluate(self, model: nn.Module, batch: Any) -> dict[str, Any]:
        x, y = batch
        return {"error": ((model(x) - y).abs().sum(), len(x))}


def test_the_loss_may_be_left_out_of_the_metrics(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"dtype": "float64", "steps": 3, "batch": 24, "cluster": "local"}
    truth = weft.run(Counts(), workers=1, run_dir=tmp_path / "one", **settings)
    got = weft.run(Counts(), workers=2, pattern=Pipeline(), run_dir=tmp_path / "run", **settings)
    assert (got.loss, got.metrics["error"]) == pytest.approx((truth.loss, truth.metrics["error"]), rel=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["1f1b", "zbv"])
def test_fewer_microbatches_than_stages_are_slow_and_equal(tmp_path: Path, schedule: str) -> None:
    truth = train_plainly(Masked(), steps=STEPS, batch=24, run_seed=3)
    assert distance(train(tmp_path / "run", Masked(), Pipeline(schedule=schedule, microbatches=1), 2), truth) <= EQUAL


# -- what is refused


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
