"""The peers of step.py: a plain torch loop on a task of Weft's; under torchrun in DDP over Gloo, HF Accelerate, Lightning Fabric.

Model, data, loss, optimizer and schedule are the task's own, so that both sides do the same work, and batches are cut
by direct indexing, not by a DataLoader. Each setting is timed on a new model in the same process; of DDP's the harness
takes the best, and Accelerate and Fabric, which wrap DDP, get the same bucket views. Rank 0 prints one JSON object: seconds per step by setting, and when the very first step ended.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import TensorDataset, default_collate

from weft.data.keys import key_int

Model = torch.nn.Module

DDP: dict[str, dict[str, bool]] = {
    "copy": {"gradient_as_bucket_view": False},
    "view": {"gradient_as_bucket_view": True},
    "view+static": {"gradient_as_bucket_view": True, "static_graph": True},
}
VIEW = DDP["view+static"]
STRETCH_S = 0.2  # as Weft's members tell of their steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("task", help="module:Class")
    parser.add_argument("--options", type=json.loads, default={}, help="arguments of the task, as JSON")
    parser.add_argument("--batch", type=int, required=True, help="examples per worker and step")
    parser.add_argument("--warmup", type=int, required=True, help="steps before the clock starts")
    parser.add_argument("--steps", type=int, required=True, help="steps under the clock")
    parser.add_argument(
        "--settings", nargs="+", choices=[*DDP, "accelerate", "fabric"], default=["view"], help="in turn"
    )
    args = parser.parse_args()

    torch.set_num_threads(1)
    world, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    if world > 1:
        dist.init_process_group("gloo")
    module, name = args.task.split(":")
    task = getattr(importlib.import_module(module), name)(**args.options)
    batches = batches_of(task, args.batch, rank, world)

    first_step_at: list[float] = []
    step_s = {}
    for setting in args.settings if world > 1 else ["plain"]:
        torch.manual_seed(key_int(0, "init"))  # Weft's weights: a step's time depends on them (max-pooling branches)
        model: Model = task.model()
        optimizer = task.optimizer([p for p in model.parameters() if p.requires_grad])
        schedule = task.schedule(optimizer, args.warmup + args.steps)
        model, optimizer, backward = prepare(setting, model, optimizer, world)
        step_s[setting] = time_steps(
            task, model, optimizer, schedule, backward, batches, args.warmup, args.steps, first_step_at
        )
    if rank == 0:
        print(json.dumps({"step_s": step_s, "first_step_at": first_step_at[0]}), flush=True)
    if world > 1:
        dist.barrier()
        os._exit(0)  # torch 2.13 at times aborts while it takes Gloo's threads down


def prepare(setting: str, model: Model, optimizer: Any, world: int) -> tuple[Model, Any, Callable[[Any], None]]:
    """Model, optimizer and the call that goes backward from a loss, as this setting's own documentation has them."""
    if setting == "accelerate":
        from accelerate import Accelerator, DistributedDataParallelKwargs

        accelerator = Accelerator(cpu=True, kwargs_handlers=[DistributedDataParallelKwargs(**VIEW)])
        model, optimizer = accelerator.prepare(model, optimizer)
        return model, optimizer, accelerator.backward
    if setting == "fabric":
        from lightning_fabric import Fabric
        from lightning_fabric.strategies import DDPStrategy

        strategy = DDPStrategy(process_group_backend="gloo", **VIEW)
        fabric = Fabric(accelerator="cpu", devices=world, strategy=strategy)
        fabric.launch()
        model, optimizer = fabric.setup(model, optimizer)
        return model, optimizer, fabric.backward
    wrapped = DistributedDataParallel(model, **DDP[setting]) if world > 1 else model
    return wrapped, optimizer, lambda loss: loss.backward()


def time_steps(
    task: Any,
    model: Model,
    optimizer: Any,
    schedule: Any,
    backward: Callable[[Any], None],
    batches: Iterator[Any],
    warmup: int,
    steps: int,
    first_step_at: list[float],
) -> float:
    def step() -> None:
        optimizer.zero_grad()
        backward(task.loss(model, next(batches)))
        optimizer.step()
        if schedule is not None:
            schedule.step()
        if not first_step_at:
            first_step_at.append(time.time())

    return seconds_per_step(step, warmup, steps)


def seconds_per_step(step: Callable[[], None], warmup: int, steps: int) -> float:
    """Over ``steps`` calls after ``warmup``: the median of stretches of about STRETCH_S."""
    marks: list[tuple[float, int]] = []
    for number in range(warmup + steps):
        if number >= warmup and (not marks or time.perf_counter() - marks[-1][0] >= STRETCH_S):
            marks.append((time.perf_counter(), number))
        step()
    marks.append((time.perf_counter(), warmup + steps))
    return statistics.median((b[0] - a[0]) / (b[1] - a[1]) for a, b in pairwise(marks))


def batches_of(task: Any, size: int, rank: int, world: int) -> Iterator[Any]:
    """This rank's batches, epoch after epoch, in an order that all ranks draw alike."""
    dataset, _ = task.data()
    fetch = fetcher(task, dataset)
    generator = torch.Generator().manual_seed(0)
    while True:
        order = torch.randperm(len(dataset), generator=generator)[rank::world]
        for start in range(0, len(dataset) // world - size + 1, size):
            yield fetch(order[start : start + size])


def fetcher(task: Any, dataset: Any) -> Callable[[torch.Tensor], Any]:
    if isinstance(dataset, TensorDataset) and task.collate is None:
        tensors = dataset.tensors
        return lambda index: [t[index] for t in tensors]
    collate = task.collate or default_collate
    if hasattr(dataset, "__getitems__"):
        return lambda index: collate(dataset.__getitems__(index.tolist()))
    return lambda index: collate([dataset[i] for i in index.tolist()])


if __name__ == "__main__":
    main()
