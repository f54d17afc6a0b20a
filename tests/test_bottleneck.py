"""Real runs of real processes over sockets, each with one thing made slow: the result names it.

The task's work is sleeping, so that workers do not compete for cores and what is slow is what was made so.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.variants import rest_slow
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

import weft
from weft.events import read_events
from weft.testing import Fault, delay, slow, slow_loading, throttle

pytestmark = pytest.mark.multiprocess

COMPUTE_S = 0.02
SIXTY = r"(6\d|[7-9]\d|\d{3,})(\.\d)?"  # what sleeps for 60 ms takes no less, and on a busy machine more


class Sleeper(weft.Task):
    """The work is ``COMPUTE_S`` a step for a third of a batch of 48; ``width`` squared is what travels."""

    defaults = weft.Defaults(batch=48, steps=25, epochs=None)

    def __init__(self, width: int = 8, compute_s: float = COMPUTE_S) -> None:
        self.width, self.example_s = width, compute_s / 16

    def model(self) -> nn.Module:
        return nn.Linear(self.width, self.width)

    def data(self) -> tuple[Dataset, Dataset]:
        x = torch.randn(480, self.width)
        return TensorDataset(x), TensorDataset(x[:4])

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        (x,) = batch
        if model.training:
            time.sleep(self.example_s * len(x))
        return model(x).pow(2).mean()

    def optimizer(self, params: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.SGD(params, lr=0.01)


CASES: dict[str, tuple[Sleeper, list[Fault], str]] = {
    "compute": (Sleeper(), [], "compute: "),
    "latency": (Sleeper(), [delay(rank=1, seconds=0.04)], "latency: "),
    "latency of all": (Sleeper(), [delay(rank=r, seconds=0.04) for r in range(3)], "latency: "),
    "bandwidth": (
        Sleeper(width=512, compute_s=0.01),
        [throttle(rank=r, bytes_per_s=10_000_000) for r in range(3)],
        "bandwidth: ",
    ),
    "slow loader": (Sleeper(), [slow_loading(rank=1, seconds=0.06)], rf"loading: worker 1 takes {SIXTY} ms"),
    "slow loaders": (Sleeper(), [slow_loading(rank=r, seconds=0.06) for r in range(3)], "loading: fetching examples"),
    "slow worker": (Sleeper(), [slow(rank=2, factor=3)], rf"waiting for worker 2: it computes {SIXTY} ms"),
}


@pytest.mark.parametrize("name", rest_slow(["slow worker", *sorted(CASES.keys() - {"slow worker"})]))
def test_what_was_made_slow_is_named(tmp_path: Path, name: str) -> None:
    task, faults, said = CASES[name]
    result = weft.run(task, workers=3, link="tcp", save_every=0, faults=faults, run_dir=tmp_path / "run")
    assert re.match(said, result.bottleneck), result.bottleneck
    assert json.loads((tmp_path / "run" / "result.json").read_text())["bottleneck"] == result.bottleneck


@pytest.mark.slow
def test_balance_takes_the_waiting_away(tmp_path: Path) -> None:
    """A worker at a third of the others' speed ends with about a third of their share, and is no bottleneck any more."""
    result = weft.run(
        Sleeper(),
        workers=3,
        steps=100,
        link="tcp",
        balance="auto",
        save_every=0,
        faults=[slow(rank=2, factor=3)],
        run_dir=tmp_path / "run",
    )
    found = [e for e in read_events(tmp_path / "run" / "events.jsonl") if e.kind == "balance"]
    first, last = found[0], found[-1].values["shares"]
    assert "worker 2 takes" in first.values["reason"]
    assert sum(last) == 48
    assert last[2] < 10 < 17 < min(last[:2])
    assert result.bottleneck.startswith("compute: "), result.bottleneck
