"""Where a model may be taken apart: found by its structure, or as the task says."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from tests.laws.reference import Regression
from torch import nn

from weft.errors import TaskError
from weft.patterns.blocks import find_blocks
from weft.tasks.codelm import CodeLM
from weft.tasks.digits import Digits


def test_children_of_lists_and_sequences_are_found() -> None:
    assert list(find_blocks(Regression(), Regression().model())) == ["0", "2"]
    assert list(find_blocks(Digits(), Digits().model())) == ["0", "3", "7"]
    lm = CodeLM(size="tiny", layers=3)
    with torch.device("meta"):
        assert list(find_blocks(lm, lm.model())) == ["blocks.0", "blocks.1", "blocks.2"]


class Resnet(nn.Module):
    """Stages in sequences, and layers beside them that belong to no block."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(3, 4)
        self.stages = nn.ModuleList(nn.Sequential(Part(), Part()) for _ in range(2))
        self.head = nn.Linear(4, 2)


class Part(nn.Module):
    """Its own sequence is its own affair."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(4, 4), nn.ReLU())


class Flat(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.act, self.b = nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1)


def test_a_block_is_not_looked_into() -> None:
    assert list(find_blocks(Regression(), Resnet())) == ["stages.0.0", "stages.0.1", "stages.1.0", "stages.1.1"]


def test_a_model_without_lists_has_its_children() -> None:
    assert list(find_blocks(Regression(), Flat())) == ["a", "b"]
    assert find_blocks(Regression(), nn.Linear(2, 1)) == {}


class Says(Regression):
    def __init__(self, blocks: Callable[[Any], Any]) -> None:
        super().__init__()
        self.says = blocks

    def blocks(self, model: nn.Module) -> Sequence[nn.Module]:
        return self.says(model)


def test_what_the_task_says_is_taken_in_its_order() -> None:
    assert list(find_blocks(Says(lambda m: [m.head, m.stem]), Resnet())) == ["head", "stem"]
    assert list(find_blocks(Says(lambda m: m.stages), Resnet())) == ["stages.0", "stages.1"]
    assert find_blocks(Says(lambda m: []), Resnet()) == {}


@pytest.mark.parametrize(
    ("blocks", "says"),
    [
        (lambda m: "stages", "returned str: return modules of the model"),
        (lambda m: [nn.Linear(1, 1)], "a Linear that is no part of the model"),
        (lambda m: [m.stages, m.stages[0]], "'stages.0' lies in 'stages'"),
        (lambda m: [m.stem, m.stem], "a module twice"),
        (lambda m: [m.stages[0][0].inner[1]], "'stages.0.0.inner.1', which has no parameters"),
    ],
)
def test_what_cannot_be_a_block_is_refused(blocks: Callable[[Any], Any], says: str) -> None:
    with pytest.raises(TaskError, match=says):
        find_blocks(Says(blocks), Resnet())


def test_blocks_that_share_a_parameter_are_refused() -> None:
    model = Resnet()
    model.stages[1][0].inner[0].weight = model.stages[0][0].inner[0].weight
    with pytest.raises(
        TaskError, match=r"stages\.1\.0\.inner\.0\.weight is used by the blocks stages\.0\.0 and stages\.1\.0"
    ):
        find_blocks(Regression(), model)
