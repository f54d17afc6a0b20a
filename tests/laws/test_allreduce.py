"""AllReduce(n) is one process on the joined batch."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.laws.reference import Odd, Ragged, Regression, distance, seed, train_plainly
from tests.variants import rest_slow
from torch import Tensor, nn

import weft
from weft.compare import final_parameters
from weft.data import partition
from weft.data.keys import key_int
from weft.data.sampler import Sampler
from weft.resilience import checkpoint
from weft.tasks.codelm import CodeLM
from weft.tasks.digits import Digits

STEPS = 12
EQUAL = 1e-9


def train(tmp_path: Path, task: weft.Task, workers: int, **settings: Any) -> dict[str, Tensor]:
    settings = {
        "cluster": "inprocess",
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
    "digits": (lambda: Digits(width=4), 30),
    "odd": (lambda: Odd(), 17),
    "ragged": (lambda: Ragged(), 10),
}


@pytest.mark.parametrize("workers", [1, 2, 3, 4])
@pytest.mark.parametrize("name", TASKS)
def test_equals_one_process_on_the_joined_batch(tmp_path: Path, name: str, workers: int) -> None:
    make, batch = TASKS[name]
    truth = train_plainly(make(), steps=STEPS, batch=batch, run_seed=3)
    assert distance(train(tmp_path, make(), workers, batch=batch), truth) <= EQUAL


def test_equals_one_process_on_a_language_model(tmp_path: Path) -> None:
    task = CodeLM(size="tiny", seq_len=16, test_windows=8)
    truth = train_plainly(task, steps=4, batch=6, run_seed=3)
    assert distance(train(tmp_path, task, 3, batch=6, steps=4), truth) <= EQUAL


@pytest.mark.multiprocess
@pytest.mark.parametrize("link", rest_slow(["shm", "tcp", "gloo"]))
def test_every_carrier_gives_the_same(tmp_path: Path, link: str) -> None:
    truth = train_plainly(Odd(), steps=STEPS, batch=17, run_seed=3)
    assert distance(train(tmp_path, Odd(), 3, batch=17, cluster="local", link=link), truth) <= EQUAL


def test_float32_after_five_sgd_steps(tmp_path: Path) -> None:
    truth = train_plainly(Regression(), steps=5, batch=24, run_seed=3, dtype=torch.float32)
    assert distance(train(tmp_path, Regression(), 3, batch=24, steps=5, dtype="float32"), truth) <= 1e-5


# -- the weight law


class OneTwoFive(partition.Partitioner):
    """Three shards of 1:2:5."""

    name = "one-two-five"

    def _owners(self, groups: Any, shards: int, rng: np.random.Generator) -> Any:
        return rng.choice(np.repeat(np.arange(3), (1, 2, 5)), size=len(groups))


def joined_batches(task: weft.Task, workers: int, batch: int, spec: str, run_seed: int) -> Any:
    torch.manual_seed(0)
    n = len(task.data()[0])
    samplers = [Sampler(n, batch, r, workers, run_seed, partition.parse(spec)) for r in range(workers)]
    while True:
        yield np.concatenate([s.next().indices for s in samplers])


@pytest.mark.parametrize("name", ["regression", "ragged"])
def test_unequal_shards_weigh_by_their_examples(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(partition.ALL, "one-two-five", OneTwoFive)
    make, batch = TASKS[name]
    truth = train_plainly(
        make(), steps=STEPS, batch=batch, run_seed=3, joined=lambda: joined_batches(make(), 3, batch, "one-two-five", 3)
    )
    assert distance(train(tmp_path, make(), 3, batch=batch, partition="one-two-five"), truth) <= EQUAL


def test_a_rank_without_examples_still_takes_part(tmp_path: Path) -> None:
    """The epoch's last joined batch of 211 = 8 x 26 + 3 examples leaves one of four ranks with nothing."""
    truth = train_plainly(Regression(), steps=18, batch=26, run_seed=3)
    assert distance(train(tmp_path, Regression(), 4, batch=26, steps=18), truth) <= EQUAL


# -- options


@pytest.mark.parametrize("accumulate", [2, 3, 5])
def test_accumulation_changes_nothing(tmp_path: Path, accumulate: int) -> None:
    truth = train_plainly(Ragged(), steps=STEPS, batch=10, run_seed=3)
    got = train(tmp_path, Ragged(), 2, batch=10, pattern=weft.AllReduce(accumulate=accumulate))
    assert distance(got, truth) <= EQUAL


@pytest.mark.parametrize("workers", [1, 3])
def test_clipping_is_of_the_joined_gradient(tmp_path: Path, workers: int) -> None:
    truth = train_plainly(Regression(), steps=STEPS, batch=24, run_seed=3, clip=0.05)
    unclipped = train_plainly(Regression(), steps=STEPS, batch=24, run_seed=3)
    got = train(tmp_path, Regression(), workers, batch=24, pattern=weft.AllReduce(clip_norm=0.05))
    assert distance(got, truth) <= EQUAL
    assert distance(got, unclipped) > 1e-3


def test_bf16_autocast_is_close_by_loss(tmp_path: Path) -> None:
    losses = [
        weft.run(
            Digits(),
            pattern=weft.AllReduce(autocast=kind),
            workers=2,
            cluster="inprocess",
            epochs=2,
            run_dir=tmp_path / kind,
        ).loss
        for kind in ("none", "bf16")
    ]
    assert losses[0] != losses[1]
    assert losses[1] == pytest.approx(losses[0], rel=0.05)


# -- BatchNorm: local normalisation, statistics averaged by examples at each step


class Normed(Regression):
    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 1))


def test_batchnorm_statistics_are_the_weighted_mean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One step from the same start: the joined statistics are the mean of each share's, weighted by its examples."""
    monkeypatch.setitem(partition.ALL, "one-two-five", OneTwoFive)
    got = train(tmp_path, Normed(), 3, batch=40, steps=1, partition="one-two-five")
    from tests.laws.reference import seed

    from weft.data.keys import key_int

    seed(key_int(3, "data"))
    x = Normed().data()[0].tensors[0].double()
    seed(key_int(3, "init"))
    first = Normed().model().double()[0]
    samplers = [Sampler(211, 40, r, 3, 3, partition.parse("one-two-five")) for r in range(3)]
    shares = [torch.from_numpy(s.next().indices) for s in samplers]
    means = torch.stack([first(x[s]).mean(0) for s in shares])
    weights = torch.tensor([len(s) for s in shares]).double() / 40
    assert len({len(s) for s in shares}) == 3
    torch.testing.assert_close(
        got["1.running_mean"], 0.1 * (weights[:, None] * means).sum(0).detach(), rtol=1e-9, atol=1e-12
    )


class CountingNet(nn.Linear):
    def __init__(self) -> None:
        super().__init__(6, 1)
        self.register_buffer("num_calls", torch.tensor(0))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.num_calls += 1
        return super().forward(x)


class Counted(Regression):
    def model(self) -> nn.Module:
        return CountingNet()


@pytest.mark.parametrize("workers", [1, 4])
def test_integer_buffers_count_every_step(tmp_path: Path, workers: int) -> None:
    """In step 9 of 4 workers rank 0 has no examples, and its own count stands still: the largest is right."""
    got = weft.run(Counted(), workers=workers, batch=26, steps=9, cluster="inprocess", run_dir=tmp_path / "run")
    state = checkpoint.newest_good(Path(got.run_dir) / "checkpoints")[0].parts["worker-0"]
    assert state["model"]["num_calls"].item() == 9


class Noisy(Regression):
    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(6, 16), nn.Dropout(0.5), nn.Linear(16, 1))


def test_dropout_repeats_between_runs(tmp_path: Path) -> None:
    first = train(tmp_path / "a", Noisy(), 2, batch=24)
    again = train(tmp_path / "b", Noisy(), 2, batch=24)
    assert all(torch.equal(first[n], again[n]) for n in first)


drawn: list[tuple[float, float, float]] = []


class Draws(Regression):
    """Tells what the three generators gave in each step of each rank."""

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        if model.training:
            drawn.append((torch.rand(()).item(), float(np.random.rand()), random.random()))
        return super().loss(model, batch)


def test_noise_differs_between_ranks_and_steps(tmp_path: Path) -> None:
    drawn.clear()
    train(tmp_path, Draws(), 3, batch=24, steps=4)
    steps = drawn[1:]  # the first is preflight's
    assert len(steps) == 3 * 4
    for generator in zip(*steps, strict=True):
        assert len(set(generator)) == 3 * 4


# -- what the result says


@pytest.mark.parametrize("workers", [1, 3])
def test_train_loss_is_of_the_joined_batch(tmp_path: Path, workers: int) -> None:
    """After one step, with examples of different length: the loss of the initial model on the joined batch."""
    settings = {"batch": 10, "steps": 1, "seed": 3, "dtype": "float64", "cluster": "inprocess"}
    result = weft.run(Ragged(), workers=workers, run_dir=tmp_path / "run", **settings)
    task = Ragged()
    train_set, _ = task.data()
    seed(key_int(3, "init"))
    model = task.model().double()
    indices = Sampler(len(train_set), 10, 0, 1, 3).next().indices
    with torch.no_grad():
        loss = task.loss(model, task.collate([train_set[int(i)] for i in indices]).double())
    assert result.train_loss == pytest.approx(loss.item(), rel=1e-12)


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_held_out_loss_is_of_the_whole_set(tmp_path: Path, workers: int) -> None:
    result = weft.run(
        Regression(), workers=workers, steps=3, dtype="float64", cluster="inprocess", run_dir=tmp_path / "run"
    )
    model = Regression().model().double()
    model.load_state_dict(final_parameters(result.run_dir))
    seed(key_int(0, "data"))
    x, y = (t.double() for t in Regression().data()[1].tensors)
    assert result.loss == pytest.approx(torch.nn.functional.mse_loss(model(x), y).item(), rel=1e-9)


@pytest.mark.parametrize(
    ("workers", "link"),
    rest_slow([(2, "shm"), (3, "tcp"), (3, "shm"), (2, "gloo")], keep=2),
)
@pytest.mark.multiprocess
def test_counted_bytes_are_the_planned_ones(tmp_path: Path, workers: int, link: str) -> None:
    """What all members sent in all steps, against the plan's bytes per step and member."""
    result = weft.run("digits-mlp", workers=workers, steps=6, link=link, run_dir=tmp_path / "run")
    plan = json.loads((tmp_path / "run" / "plan.json").read_text())
    assert result.bytes_sent == pytest.approx(6 * workers * plan["links"][0]["bytes_per_step"], rel=0.02)


def test_what_the_model_keeps_in_eval_mode_stays_so(tmp_path: Path) -> None:
    """Evaluation in the middle must not switch a frozen BatchNorm back to training."""

    class FrozenNorm(Normed):
        def model(self) -> nn.Module:
            model = super().model()
            model[1].eval()
            return model

    often = train(tmp_path / "a", FrozenNorm(), 2, batch=24, eval_every=1)
    never = train(tmp_path / "b", FrozenNorm(), 2, batch=24)
    assert all(torch.equal(often[n], never[n]) for n in never)
    assert torch.equal(often["1.running_mean"], torch.zeros(8, dtype=torch.float64))
