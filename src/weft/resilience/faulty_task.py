"""Faults in a member's own work, committed on its task: slow compute, slow loading. The loop never knows of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import default_collate

from weft.comm.wrappers import Fault
from weft.task import Task


def strike_task(task: Task, faults: Sequence[Fault], step: Callable[[], int]) -> None:
    """Commit those of ``faults`` that concern the task, from now on and on this object. ``step`` tells where it stands."""
    for fault in faults:

        def is_due(fault: Fault = fault) -> bool:
            return fault.step in (None, step())

        if fault.kind == "slow":
            _slow(task, fault.factor, is_due)
        elif fault.kind == "slow_loading":
            _slow_loading(task, fault.seconds, is_due)


def _slow(task: Task, factor: float, is_due: Callable[[], bool]) -> None:
    """Sleeps stand where the time went: at the end of the backward pass (for loss and backward), and of the update."""
    loss_of, optimizer_of = task.loss, task.optimizer

    def loss(model: torch.nn.Module, batch: Any) -> Tensor:
        begun = own_time()
        value = loss_of(model, batch)
        if not (value.requires_grad and is_due()):
            return value
        return _Slower.apply(value, factor - 1, own_time() - begun)  # type: ignore[no-any-return, no-untyped-call]

    def optimizer(params: Any) -> torch.optim.Optimizer:
        made = optimizer_of(params)
        begun = [0.0]

        def before(*_: Any) -> None:
            begun[0] = own_time()

        def after(*_: Any) -> None:
            if is_due():
                _sleep((factor - 1) * (own_time() - begun[0]))

        made.register_step_pre_hook(before)
        made.register_step_post_hook(after)
        return made

    task.loss, task.optimizer = loss, optimizer  # type: ignore[method-assign]


def own_time() -> float:
    """The clock, but for the time that this thread was ready to run and had no core (Linux; else the plain clock).

    A slow worker takes longer for the same work; it does not feel its neighbours more than others do.
    """
    queued_ns = 0
    with suppress(OSError, ValueError):
        queued_ns = int(Path("/proc/thread-self/schedstat").read_text().split()[1])
    return time.perf_counter() - 1e-9 * queued_ns


def _sleep(seconds: float) -> None:
    time.sleep(max(0.0, seconds))  # the kernel counts time without a core late, at times more of it than had passed


class _Slower(torch.autograd.Function):
    """The identity, which makes the backward pass that begins with it last ``extra`` times (its time and the loss's) longer."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, extra: float, forward_s: float) -> Tensor:
        ctx.extra, ctx.forward_s = extra, forward_s
        return loss.view_as(loss)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        begun, extra, forward_s = own_time(), ctx.extra, ctx.forward_s

        def sleep() -> None:
            _sleep(extra * (forward_s + own_time() - begun))

        torch.autograd.Variable._execution_engine.queue_callback(sleep)
        return grad, None, None


def _slow_loading(task: Task, seconds: float, is_due: Callable[[], bool]) -> None:
    collate_of = task.collate or default_collate

    def collate(examples: list[Any]) -> Any:
        if is_due():
            time.sleep(seconds)
        return collate_of(examples)

    task.collate = collate
