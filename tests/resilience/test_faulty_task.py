"""A slow worker computes the same, and sleeps as long as the fault says for what it computed."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from tests.laws.reference import Regression
from torch import Tensor, nn

from weft.resilience import faulty_task
from weft.resilience.faulty_task import own_time, strike_task
from weft.testing import kill, slow, slow_loading


class Timed(Regression):
    """A second of forward pass, two of backward, four of update: by a clock that only they move."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self.clock = clock

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        self.clock.now += 1
        x = batch[0].clone().requires_grad_(torch.is_grad_enabled())
        if x.requires_grad:
            x.register_hook(lambda grad: self.clock.add(2))
        return (model(x) - batch[1]).pow(2).mean()

    def optimizer(self, params: Any) -> torch.optim.Optimizer:
        made = super().optimizer(params)
        made.register_step_post_hook(lambda *_: self.clock.add(4))
        return made


class Clock:
    def __init__(self) -> None:
        self.now = 0.0
        self.slept: list[float] = []

    def add(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(faulty_task, "own_time", lambda: clock.now)
    monkeypatch.setattr(time, "sleep", clock.slept.append)
    return clock


def train(task: Regression, steps: int = 3) -> list[Tensor]:
    torch.manual_seed(0)
    model = task.model()
    optimizer = task.optimizer(list(model.parameters()))
    batch = torch.randn(8, 6), torch.randn(8, 1)
    for _ in range(steps):
        optimizer.zero_grad()
        task.loss(model, batch).backward()
        optimizer.step()
    return [p.detach() for p in model.parameters()]


def test_it_sleeps_for_forward_backward_and_update_and_computes_the_same(clock: Clock) -> None:
    truth = train(Timed(clock))
    assert clock.slept == []
    task = Timed(clock)
    strike_task(task, [slow(rank=0, factor=3), kill(rank=0, step=1)], lambda: 1)
    assert all(torch.equal(a, b) for a, b in zip(train(task), truth, strict=True))
    assert clock.slept == [2 * 3.0, 2 * 4.0] * 3


def test_of_one_step_only(clock: Clock) -> None:
    steps = [1]
    task = Timed(clock)
    strike_task(task, [slow(rank=0, factor=2, step=2)], lambda: steps[-1])
    for step in (1, 2, 3):
        steps.append(step)
        train(task, steps=1)
    assert clock.slept == [3.0, 4.0]


def test_evaluation_is_not_slowed(clock: Clock) -> None:
    task = Timed(clock)
    strike_task(task, [slow(rank=0, factor=2)], lambda: 1)
    with torch.no_grad():
        loss = task.loss(task.model(), (torch.zeros(2, 6), torch.zeros(2, 1)))
    assert not loss.requires_grad
    assert clock.slept == []


def test_slow_loading_sleeps_once_a_batch(clock: Clock) -> None:
    steps = [1]
    task = Regression()
    strike_task(task, [slow_loading(rank=0, seconds=0.5, step=2)], lambda: steps[-1])
    assert task.collate is not None
    examples = [(torch.ones(2), torch.zeros(1))] * 4
    for step in (1, 2, 3):
        steps.append(step)
        x, _ = task.collate(examples)
        assert x.shape == (4, 2)
    assert clock.slept == [0.5]


def test_own_time_goes_on_while_a_thread_sleeps() -> None:
    """Work that waits for a device or a disk is work."""
    begun = own_time()
    time.sleep(0.05)
    assert own_time() - begun > 0.025
