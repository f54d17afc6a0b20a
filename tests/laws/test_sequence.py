"""Activations in parts between the tensors that are cut: the same steps, the same dropout, as many bytes as the plan says, and less memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.laws.reference import Regression, distance, train_plainly
from tests.variants import rest_slow
from torch import Tensor, nn

import weft
from weft import Mesh
from weft.compare import final_parameters
from weft.events import read_events
from weft.patterns.base import Pattern

STEPS = 5
EQUAL = 1e-9
LENGTH = 5  # of two workers or three, none has as much as another; of four, the last has none

pytestmark = pytest.mark.multiprocess


class Layer(nn.Module):
    """Norms before and after, a gate that is whole on all, dropout outside the pair."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.before, self.after = nn.LayerNorm(4), nn.LayerNorm(4)
        self.up, self.down = nn.Linear(4, 12), nn.Linear(12, 4)
        self.gate = nn.Parameter(torch.linspace(0.5, 1.5, 4))
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        made = self.down(F.gelu(self.up(self.before(x))))
        x = x + F.dropout(made, self.dropout, self.training) * self.gate
        return self.after(x + F.normalize(x, dim=-1))


class Sequences(Regression):
    def __init__(self, optimizer: str = "sgd", dropout: float = 0.0) -> None:
        super().__init__(optimizer)
        self.dropout = dropout

    def model(self) -> nn.Module:
        return SequenceNet(self.dropout)

    def evaluate(self, model: nn.Module, batch: Any) -> Any:
        with torch.inference_mode():  # in which torch shows what it composes of other operations
            return super().evaluate(model, batch)


class SequenceNet(nn.Module):
    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.first = nn.Linear(6, 4 * LENGTH)
        self.layers = nn.ModuleList(Layer(dropout) for _ in range(3))
        self.end = nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).view(len(x), LENGTH, 4)
        for layer in self.layers:
            x = layer(x)
        return self.end(x[:, 0] + x.mean(1))


LAYOUTS: dict[str, tuple[Pattern, int]] = {
    "tensor": (weft.Tensor(sequence=True), 2),
    "tensor of 4": (weft.Tensor(sequence=True), 4),
    "data x tensor": (Mesh(data=2, tensor=2, sequence=True), 4),
    "sharded x tensor": (Mesh(sharded=2, tensor=2, sequence=True), 4),
    "tensor x pipeline": (Mesh(tensor=2, pipeline=2, schedule="1f1b", sequence=True), 4),
}


def run(path: Path, task: weft.Task, pattern: Pattern, workers: int, **settings: Any) -> weft.RunResult:
    settings = {"dtype": "float64", "steps": STEPS, "batch": 24, "seed": 3, "cluster": "local"} | settings
    return weft.run(task, workers=workers, pattern=pattern, run_dir=path, **settings)


@pytest.mark.parametrize("layout", rest_slow(LAYOUTS))
@pytest.mark.parametrize("optimizer", rest_slow(["adamw", "sgd"]))
def test_equals_one_process_on_the_joined_batch(tmp_path: Path, layout: str, optimizer: str) -> None:
    truth = train_plainly(Sequences(optimizer), steps=STEPS, batch=24, run_seed=3)
    run(tmp_path / "run", Sequences(optimizer), *LAYOUTS[layout])
    assert distance(final_parameters(tmp_path / "run"), truth) <= EQUAL


@pytest.mark.parametrize("workers", rest_slow([4, 2]))
def test_dropout_and_what_is_held_out_are_as_without(tmp_path: Path, workers: int) -> None:
    of, without = (
        run(tmp_path / name, Sequences(dropout=0.4), weft.Tensor(sequence=name == "in parts"), workers)
        for name in ("in parts", "whole")
    )
    assert distance(final_parameters(of.run_dir), final_parameters(without.run_dir)) <= EQUAL
    assert of.metrics == pytest.approx(without.metrics, rel=EQUAL)
    plain = train_plainly(Sequences(), steps=STEPS, batch=24, run_seed=3)
    assert distance(final_parameters(of.run_dir), plain) > 1e-3, "nothing was dropped"


@pytest.mark.parametrize("layout", rest_slow(["data x tensor", "sharded x tensor"]))
def test_counted_bytes_are_the_planned_ones(tmp_path: Path, layout: str) -> None:
    steps = 40
    run(tmp_path / "run", Sequences(), *LAYOUTS[layout], link="tcp", save_every=0, steps=steps)
    plan = json.loads((tmp_path / "run" / "plan.json").read_text())
    (planned,) = (link["bytes_per_step"] for link in plan["links"] if link["group"] == "tensor")
    told = [e.values for e in read_events(tmp_path / "run" / "events.jsonl") if "sent" in e.values]
    counted = sum(values["sent"]["tensor"] for values in told) / steps / 4
    assert counted == pytest.approx(planned, rel=0.05)
