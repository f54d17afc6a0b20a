"""State by name: between layouts that hold parameters in another order, and the mean of several workers'."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from weft.errors import CheckpointError
from weft.patterns.optimizer_state import load_optimizer_state_by_name, mean_state, optimizer_state_by_name
from weft.patterns.training import load_chain
from weft.update import Transform, Update


def params(*names: str) -> dict[str, nn.Parameter]:
    return {name: nn.Parameter(torch.zeros(2)) for name in names}


def stepped(own: dict[str, nn.Parameter], groups: list[dict[str, Any]] | None = None) -> torch.optim.Optimizer:
    """An SGD whose momentum buffers say whose they are."""
    optimizer = torch.optim.SGD(groups or list(own.values()), lr=0.1, momentum=0.9)
    for p in own.values():
        p.grad = torch.full((2,), float(ord(next(n for n, q in own.items() if q is p))))
    optimizer.step()
    return optimizer


def buffers(optimizer: torch.optim.Optimizer, own: dict[str, nn.Parameter]) -> dict[str, float]:
    return {n: float(optimizer.state[p]["momentum_buffer"][0]) for n, p in own.items()}


@pytest.mark.parametrize("order", ["abc", "cab", "bca"])
def test_another_order_of_parameters(order: str) -> None:
    before, after = params("a", "b", "c"), params(*order)
    optimizer = torch.optim.SGD(after.values(), lr=0.5, momentum=0.9)
    load_optimizer_state_by_name(optimizer, after, optimizer_state_by_name(stepped(before), before))
    assert buffers(optimizer, after) == {"a": 97.0, "b": 98.0, "c": 99.0}
    assert optimizer.param_groups[0]["lr"] == 0.1


def test_other_groups_are_refused() -> None:
    before, after = params("a", "b"), params("a", "b")
    state = optimizer_state_by_name(stepped(before), before)
    two = torch.optim.SGD([{"params": [after["a"]]}, {"params": [after["b"]], "lr": 0.2}], lr=0.1)
    with pytest.raises(CheckpointError, match=r"has its parameters in 1 group\(s\), the task's in 2"):
        load_optimizer_state_by_name(two, after, state)
    other = params("a", "c")
    optimizer = torch.optim.SGD(other.values(), lr=0.1)
    with pytest.raises(CheckpointError, match=r"holds parameters \['b', 'c'\]"):
        load_optimizer_state_by_name(optimizer, other, state)


def test_the_mean_of_states() -> None:
    states = [{"state": {"a": {"step": torch.tensor(3.0), "exp_avg": torch.tensor([x])}}, "param_groups": []} for x in (1.0, 2.0)]  # fmt: skip
    assert mean_state(states)["state"]["a"] == {"step": torch.tensor(3.0), "exp_avg": torch.tensor([1.5])}


# -- chains of another length


class Counting(Transform):
    def __init__(self) -> None:
        self.count = 0

    def __call__(self, update: Update) -> Update:
        return update

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count = state["count"]


class Noise(Counting):
    pass


def test_each_transform_finds_its_own_state() -> None:
    chain = [Noise(), Counting(), Counting()]
    load_chain(chain, [["Counting", {"count": 1}], ["Counting", {"count": 2}]])
    assert [each.count for each in chain] == [0, 1, 2]


def test_state_that_nobody_takes_is_refused() -> None:
    with pytest.raises(CheckpointError, match="holds the state of Noise"):
        load_chain([Counting()], [["Counting", {"count": 1}], ["Noise", {"count": 2}]])
