"""Recurrent models in time chunks are one process on whole sequences: every cut, uneven chunks, states that models begin with and end on."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.laws.reference import Regression, distance, train_plainly
from tests.laws.test_pipeline import STEPS, MaskedNet, train
from tests.variants import rest_slow
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from weft.errors import ConfigError, Incompatible, TaskError
from weft.patterns.base import PipelineFacts
from weft.patterns.blocks import find_blocks
from weft.patterns.mesh import Mesh
from weft.patterns.pipeline import Pipeline
from weft.patterns.stages import Cuts, passed, rebuilt
from weft.patterns.stages import learn as learn_stages
from weft.patterns.wavefront import Wave, learn
from weft.pipelines.schedules import program
from weft.tasks.series import Series

EQUAL = 1e-9
TIME = 11


class Cell(nn.Module):
    """A recurrence of one's own, time first; its state is two tensors."""

    time_dim = 0

    def __init__(self, width: int) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(2 * width, width), nn.Linear(width, width)

    def forward(self, x: Tensor, state: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        h, c = state if state is not None else (torch.zeros_like(x[0]), torch.ones_like(x[0]))
        made = []
        for now in x:
            h = torch.tanh(self.a(torch.cat([now, h], 1))) * c
            c = torch.sigmoid(self.b(h)) + 0.5 * c
            made.append(h + c)
        return torch.stack(made), (h, c)


class Deep(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        return self.linear(x), state[-1]


class Net(nn.Module):
    """Before the recurrent blocks one that is not, between them another; the end takes all that the last one makes, and its state."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(3, 4)
        self.first = nn.LSTM(4, 4)
        self.norm = nn.LayerNorm(4)
        self.second = Cell(4)
        self.third = nn.GRU(4, 4, num_layers=2, batch_first=True)
        self.deep = Deep(4)
        self.h0 = nn.Parameter(0.1 * torch.ones(1, 1, 4))
        self.end = nn.Linear(8, 1)

    @property
    def row(self) -> list[nn.Module]:
        return [self.embed, self.first, self.norm, self.second, self.third, self.deep]

    def forward(self, x: Tensor) -> Tensor:  # (B, T, 3)
        x = torch.tanh(self.embed(x)).transpose(0, 1)
        h0 = self.h0.expand(1, x.shape[1], 4).contiguous()
        x, _ = self.first(x, (h0, x.mean(0, keepdim=True)))
        x, _ = self.second(torch.relu(self.norm(x)))
        x, state = self.third(2 * x.transpose(0, 1))
        x, state = self.deep(x, state)
        return self.end(torch.cat([x.mean(1), state], 1))


class Plain(nn.Module):
    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self.first = nn.GRU(3, 4, batch_first=True, **settings)
        self.second = nn.RNN(8 if settings.get("bidirectional") else 4, 4, batch_first=True)
        self.end = nn.Linear(4, 1)

    @property
    def row(self) -> list[nn.Module]:
        return [self.first, self.second]

    def between(self, x: Tensor) -> Tensor:
        return x

    def forward(self, x: Tensor) -> Tensor:
        x, _ = self.first(x)
        return self.end(self.second(self.between(x))[1][0])


class Reversed(Plain):
    def between(self, x: Tensor) -> Tensor:
        return x.flip(1)


class Positions(Plain):
    def between(self, x: Tensor) -> Tensor:
        return x + torch.arange(TIME)[:, None]


class BothWays(Plain):
    def __init__(self) -> None:
        super().__init__(bidirectional=True)


class Sequences(Regression):
    def __init__(self, net: Any = Net) -> None:
        super().__init__()
        self.net = net

    def model(self) -> nn.Module:
        return self.net()

    def blocks(self, model: nn.Module) -> list[nn.Module]:
        return model.row if hasattr(model, "row") else list(model.blocks)

    def data(self) -> tuple[Dataset, Dataset]:
        x = torch.randn(240, TIME, 3) if self.net is not MaskedNet else torch.randn(240, 6)
        y = x.flatten(1)[:, :1] + 0.1 * torch.randn(240, 1)
        return TensorDataset(x[:211], y[:211]), TensorDataset(x[211:], y[211:])

    def evaluate(self, model: nn.Module, batch: Any) -> dict[str, tuple[Tensor, float]]:
        """Without the loss, which is added."""
        x, y = batch
        return {"error": ((model(x) - y).abs().sum(), len(x))}


# -- in one process


def cuts_of(items: int) -> Iterator[list[range]]:
    for num in range(items):
        for at in itertools.combinations(range(1, items), num):
            yield list(itertools.starmap(range, itertools.pairwise([0, *at, items])))


def by_hand(
    task: Sequences, model: nn.Module, batch: Any, known: PipelineFacts, stages: list[range], chunks: int
) -> Tensor:
    """Forward and backward of one micro-batch; what passes a cut is handed on. Returns the loss."""
    model.zero_grad()
    cuts = Cuts(task, model, list(find_blocks(task, model)))
    waves = [Wave(cuts, stage, known.through_time, chunks) for stage in stages]
    try:
        for chunk in range(chunks):
            made: list[Tensor] = []
            for wave in waves:
                given = passed(rebuilt(known.made_of[wave.items.start - 1], made)) if made else None
                made = wave.forward(chunk, given, lambda: task.loss(model, batch))
        (loss,) = made
        for chunk in reversed(range(chunks)):
            grads = [torch.ones_like(loss)] if chunk == chunks - 1 else []
            for wave in reversed(waves):
                grads = wave.backward(chunk, grads)
    finally:
        cuts.undo()
    return loss


@pytest.mark.parametrize("chunks", [2, 4, TIME])
def test_every_cut_gives_the_gradients_of_the_whole(chunks: int) -> None:
    torch.manual_seed(0)
    task = Sequences()
    model = task.model().double()
    batch = [torch.randn(5, TIME, 3).double(), torch.randn(5, 1).double()]
    loss = task.loss(model, batch)
    loss.backward()
    truth = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    known = learn(task, model, batch, learn_stages(task, model, lambda n: batch, batch, len(batch[0]), 1), chunks)
    for stages in cuts_of(7):
        assert by_hand(task, model, batch, known, stages, chunks).item() == pytest.approx(loss.item(), rel=1e-12)
        found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        assert distance(found, truth) <= EQUAL, stages


def test_a_shorter_sequence_than_was_looked_at() -> None:
    """Chunks are cut of what comes; fewer steps than chunks are refused."""
    task = Sequences(Plain)
    model = task.model()
    batch = [torch.randn(5, TIME, 3), torch.randn(5, 1)]
    known = learn(task, model, batch, learn_stages(task, model, lambda n: batch, batch, 5, 1), 4)
    assert known.chunks == [3, 3, 3, 2]
    cuts = Cuts(task, model, list(find_blocks(task, model)))
    wave = Wave(cuts, range(3), known.through_time, 4)
    with pytest.raises(TaskError, match="chunks=4 is more than the 3 time steps that Sequences's model is given"):
        wave.forward(0, None, lambda: task.loss(model, [batch[0][:, :3], batch[1]]))
    cuts.undo()


# -- in many


RUNS: dict[str, tuple[Any, int]] = {
    "two": (Pipeline(chunks=4, microbatches=3), 2),
    "three, all forward first": (Pipeline(chunks=3, microbatches=2, schedule="gpipe"), 3),
    "two stages each": (Pipeline(chunks=4, microbatches=2, schedule="looped-bfs"), 2),
    "interleaved": (Pipeline(chunks=2, schedule="interleaved-1f1b"), 3),
    "one micro-batch": (Pipeline(chunks=TIME, microbatches=1), 3),
    "each block alone": (Pipeline(chunks=4, microbatches=2), 7),
    "data x pipeline": (Mesh(data=2, pipeline=2, chunks=4, microbatches=2), 4),
}


@pytest.mark.multiprocess
@pytest.mark.parametrize("run", rest_slow(list(RUNS), keep=2))
def test_equals_one_process(tmp_path: Path, run: str) -> None:
    """23 examples: micro-batches are uneven, too."""
    truth = train_plainly(Sequences(), steps=STEPS, batch=23, run_seed=3)
    assert distance(train(tmp_path / "run", Sequences(), *RUNS[run], batch=23), truth) <= EQUAL


@pytest.mark.multiprocess
@pytest.mark.slow
@pytest.mark.parametrize(("layers", "workers"), [(1, 2), (3, 3)])
def test_series(tmp_path: Path, layers: int, workers: int) -> None:
    task = Series(layers=layers)
    truth = train_plainly(task, steps=STEPS, batch=24, run_seed=3)
    assert distance(train(tmp_path / "run", task, Pipeline(chunks=5), workers), truth) <= EQUAL


# -- what is refused, before step 1


@pytest.mark.parametrize(
    ("net", "chunks", "kind", "says"),
    [
        (
            BothWays,
            4,
            Incompatible,
            "block 'first' of Sequences's model is bidirectional: .* Use -o chunks=1, or make it of one direction",
        ),
        (MaskedNet, 4, Incompatible, "no block of Sequences's model carries state through time"),
        (
            Plain,
            TIME + 1,
            TaskError,
            f"chunks={TIME + 1} is more than the {TIME} time steps .* use at most -o chunks={TIME}",
        ),
        (Reversed, 4, TaskError, "makes something else than of the whole sequence"),
        (Positions, 4, TaskError, "cannot be run in time chunks from block 'first' to 'second': The size of tensor"),
    ],
)
def test_what_cannot_be_is_refused_with_the_cure(
    net: type[nn.Module], chunks: int, kind: type[Exception], says: str
) -> None:
    task = Sequences(net)
    model, (train_set, _) = task.model(), task.data()
    batch = list(train_set[:5])
    known = learn_stages(task, model, lambda n: batch, batch, 5, 1)
    with pytest.raises(kind, match=says):
        learn(task, model, batch, known, chunks)


@pytest.mark.multiprocess
@pytest.mark.parametrize(
    ("options", "kind", "says"),
    [
        ({"chunks": TIME + 1}, TaskError, f"use at most -o chunks={TIME}"),
        (
            {"schedule": "zbv"},
            ConfigError,
            r"schedule=zbv splits the backward, which torch cannot do of this model \(in second: .* use -o schedule=auto, or one of 1f1b",
        ),
    ],
)
def test_that_is_before_step_1(tmp_path: Path, options: dict[str, Any], kind: type[Exception], says: str) -> None:
    with pytest.raises(kind, match=says):
        train(tmp_path / "run", Sequences(), Pipeline(**options), 2)


def test_options_that_cannot_be() -> None:
    with pytest.raises(ConfigError, match="chunks=0 is not possible: 1 .* or more"):
        Pipeline(chunks=0)
    with pytest.raises(
        ConfigError, match="schedule zbv splits the backward, .* choose 1f1b, gpipe, interleaved-1f1b or looped-bfs"
    ):
        Pipeline(chunks=2, schedule="zbv")
    with pytest.raises(Incompatible, match="chunks and trial are of a pipeline"):
        Mesh(data=2, chunks=2)
    assert program("1f1b", 2, 1, chunks=3).pieces == 3
