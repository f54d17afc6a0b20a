"""The blocks of a model: the parts that a split pattern gathers, places or cuts at, in the order in which they compute."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from weft.errors import TaskError
from weft.task import Task

EXAMPLE = """    def blocks(self, model):
        return list(model.layers)  # modules of the model, in the order in which they compute"""


def find_blocks(task: Task, model: nn.Module) -> dict[str, nn.Module]:
    """By name. What the task says; else the children of its outermost lists and sequences of modules; else those of the model itself.

    No block lies in another, and each has parameters.
    """
    names = {module: name for name, module in model.named_modules() if name}
    own = type(task).blocks is not Task.blocks
    found = check(task, names, task.blocks(model)) if own else list(outermost(model))
    blocks = {names[block]: block for block in found if block is not model}
    shared = shared_parameter(blocks)
    if shared:
        raise TaskError(
            f"parameter {shared[0]} is used by the blocks {shared[1]} and {shared[2]} of {type(task).__name__}, which would each hold "
            f"a copy of its own: make one block of them, or leave both out. Write:\n{EXAMPLE}"
        )
    return blocks


def check(task: Task, names: dict[nn.Module, str], given: Any) -> Sequence[nn.Module]:
    who = f"{type(task).__name__}.blocks"
    if isinstance(given, nn.ModuleList | nn.Sequential):
        given = list(given)
    if not isinstance(given, list | tuple) or not all(isinstance(block, nn.Module) for block in given):
        raise TaskError(f"{who} returned {type(given).__name__}: return modules of the model. Write:\n{EXAMPLE}")
    for block in given:
        if block not in names:
            raise TaskError(f"{who} returned a {type(block).__name__} that is no part of the model. Write:\n{EXAMPLE}")
        if not any(True for _ in block.parameters()):
            raise TaskError(f"{who} returned {names[block]!r}, which has no parameters: leave it out.")
    for inner in given:
        for outer in given:
            if inner is not outer and names[inner].startswith(f"{names[outer]}."):
                raise TaskError(f"{who}: {names[inner]!r} lies in {names[outer]!r}: return the one or the other.")
    if len({id(block) for block in given}) < len(given):
        raise TaskError(f"{who} returned a module twice: return each once.")
    return list(given)


def outermost(module: nn.Module) -> Sequence[nn.Module]:
    """Children of lists and sequences, those within such children too; of a model without any, its own children."""
    found: list[nn.Module] = []

    def walk(module: nn.Module, listed: bool) -> None:
        for child in module.children():
            if isinstance(child, nn.ModuleList | nn.Sequential):
                walk(child, True)
            elif listed:
                if any(True for _ in child.parameters()) and child not in found:
                    found.append(child)
            else:
                walk(child, False)

    walk(module, isinstance(module, nn.ModuleList | nn.Sequential))
    return found or [child for child in module.children() if any(True for _ in child.parameters())]


def shared_parameter(blocks: dict[str, nn.Module]) -> tuple[str, str, str] | None:
    """(parameter, block, other block) if a parameter belongs to two."""
    owner: dict[int, tuple[str, str]] = {}
    for block_name, block in blocks.items():
        for name, p in block.named_parameters():
            if owner.setdefault(id(p), (block_name, name))[0] != block_name:
                return f"{block_name}.{name}", owner[id(p)][0], block_name
    return None
