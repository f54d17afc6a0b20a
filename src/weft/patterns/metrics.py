"""Held-out metrics: a task's sums and counts, checked, added up over batches and then over ranks, and summarised."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from weft.comm.link import Link
from weft.errors import TaskError
from weft.task import Task


def evaluate_batch(task: Task, model: nn.Module, batch: Any) -> dict[str, tuple[Tensor, float]]:
    """The task's sums (float64, on the CPU) and counts; the loss is added where it is missing."""
    parts = task_sums(task, model, batch)
    return checked_sums(task, parts if "loss" in parts else {"loss": loss_sum(task, model, batch), **parts})


def task_sums(task: Task, model: nn.Module, batch: Any) -> Mapping[str, Any]:
    parts = task.evaluate(model, batch)
    if not isinstance(parts, Mapping):
        raise TaskError(
            f"{type(task).__name__}.evaluate returned {type(parts).__name__}: return a dict such as "
            "{'accuracy': (num_correct, num_examples)}."
        )
    return parts


def loss_sum(task: Task, model: nn.Module, batch: Any) -> tuple[Tensor, float]:
    n = task.num_examples(batch)
    return task.loss(model, batch) * n, n


def checked_sums(task: Task, parts: Mapping[str, Any]) -> dict[str, tuple[Tensor, float]]:
    who = f"{type(task).__name__}.evaluate"
    checked: dict[str, tuple[Tensor, float]] = {}
    for name, pair in parts.items():
        try:
            if not isinstance(pair, tuple | list):  # a tensor of two values would unpack as well
                raise TypeError(type(pair).__name__)
            total, count = pair
            checked[name] = (torch.as_tensor(total, dtype=torch.float64, device="cpu").detach(), float(count))
        except (TypeError, ValueError, RuntimeError) as error:
            raise TaskError(
                f"{who}[{name!r}] is {pair!r}: return a pair (sum over the batch, count), so that shards add up; the sum is "
                "a number or a tensor, the count a number."
            ) from error
    return checked


class Totals:
    """What ``evaluate_batch`` returns, added up: sums and counts in one flat vector, so that ranks join in one exchange."""

    def __init__(self, task: Task, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.task, self.who = task, type(task).__name__
        sizes = [math.prod(shape) for shape in shapes.values()]
        self.flat = torch.zeros(sum(sizes) + len(sizes), dtype=torch.float64)
        *sums, counts = self.flat.split([*sizes, len(sizes)])
        self.sums = {name: flat.view(shape) for (name, shape), flat in zip(shapes.items(), sums, strict=True)}
        self.counts = dict(zip(shapes, counts, strict=True))

    def add(self, parts: Mapping[str, tuple[Tensor, float]]) -> None:
        if strange := parts.keys() - self.sums.keys():
            raise TaskError(
                f"{self.who}.evaluate returned the metric {min(strange)!r} for some batches only: return the same names for "
                f"every batch (at first: {', '.join(self.sums)}), with a count of 0 where there is nothing."
            )
        for name, (total, count) in parts.items():
            if total.shape != (mine := self.sums[name]).shape:
                raise TaskError(
                    f"{self.who}.evaluate[{name!r}] has a sum of shape {tuple(total.shape)}, and at first it was "
                    f"{tuple(mine.shape)}: return the same shape for every batch, summed over its examples."
                )
            mine += total
            self.counts[name] += count

    def join(self, link: Link, device: torch.device) -> None:
        """Over all ranks, added in rank order: every rank then holds the same totals."""
        self.flat.copy_(torch.stack(link.all_gather(self.flat.to(device))).sum(0))

    def summary(self) -> dict[str, float]:
        """The task's metrics; its mean loss first, if it leaves the loss out."""
        totals = {name: (total.clone(), float(self.counts[name])) for name, total in self.sums.items()}
        loss, count = totals["loss"]
        metrics = self.task.summarise(totals)
        if not isinstance(metrics, Mapping):
            raise TaskError(
                f"{self.who}.summarise returned {type(metrics).__name__}: return a dict of numbers, such as {{'r2': 0.5}}."
            )
        if "loss" not in metrics:
            metrics = {"loss": loss / count if count else math.nan, **metrics}
        return {name: self._number(name, value) for name, value in metrics.items()}

    def _number(self, name: str, value: Any) -> float:
        if isinstance(value, Tensor) and value.dim() > 0:
            raise TaskError(
                f"{self.who}: the metric {name!r} has shape {tuple(value.shape)}, and a metric is one number. Write:\n"
                f"    def summarise(self, totals):\n        total, count = totals.pop({name!r})  # of the whole held-out set\n"
                f"        return super().summarise(totals) | {{'mine': ...}}  # a number made of total and count"
            )
        try:
            return float(value)
        except (TypeError, ValueError) as error:
            raise TaskError(f"{self.who}: the metric {name!r} is {value!r}: return a number.") from error
