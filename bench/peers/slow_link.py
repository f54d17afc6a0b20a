"""The peers of slowlink.py: torch DDP over Gloo on a task of Weft's, with torch's own communication hooks.

Model, first weights, loss, optimizer, schedule, evaluation and the order of the data are those of a Weft run of the same seed.
Rank 0 prints one JSON object a line: after each step {"step", "time"}, after each evaluation {"step", "loss", "time"}.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import time
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import TensorDataset

from weft.data.keys import key_int
from weft.data.sampler import Sampler

VIEW = {"gradient_as_bucket_view": True, "static_graph": True}  # the best of step.py's settings
ONE_BUCKET_MB = 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("task", help="module:Class")
    parser.add_argument("--options", type=json.loads, default={}, help="arguments of the task, as JSON")
    parser.add_argument("--hook", default="none", help="none, fp16, powersgd:RANK")
    parser.add_argument("--batch", type=int, required=True, help="joined batch of all workers")
    parser.add_argument("--steps", type=int, required=True, help="for which the schedule is made")
    parser.add_argument("--until-step", type=int, required=True, help="stop here")
    parser.add_argument("--until-loss", type=float, default=float("-inf"), help="or at the first evaluation this good")
    parser.add_argument("--eval-every", type=int, required=True)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    module, name = args.task.split(":")
    task = getattr(importlib.import_module(module), name)(**args.options)
    train, test = task.data()
    assert isinstance(train, TensorDataset)
    torch.manual_seed(key_int(args.seed, "init"))
    model = task.model()
    optimizer = task.optimizer([p for p in model.parameters() if p.requires_grad])
    schedule = task.schedule(optimizer, args.steps)
    ddp = wrap(model, args.hook)
    sampler = Sampler(len(train), args.batch, rank, world, args.seed)
    held_out = [t[rank::world] for t in test.tensors]
    for step in range(1, args.until_step + 1):
        indices = torch.from_numpy(sampler.next().indices)
        optimizer.zero_grad()
        task.loss(ddp, [t[indices] for t in train.tensors]).backward()
        optimizer.step()
        if schedule is not None:
            schedule.step()
        tell(rank, step=step)
        if step % args.eval_every == 0 or step == args.until_step:
            loss = evaluate(task, model, held_out)
            tell(rank, step=step, loss=loss)
            if loss <= args.until_loss:
                break
    dist.barrier()
    os._exit(0)  # torch 2.13 at times aborts while it takes Gloo's threads down


def wrap(model: torch.nn.Module, hook: str) -> DistributedDataParallel:
    kind, _, rank = hook.partition(":")
    if kind != "powersgd":
        ddp = DistributedDataParallel(model, **VIEW)
        if kind == "fp16":
            ddp.register_comm_hook(None, default_hooks.fp16_compress_hook)
        return ddp
    # With several buckets the hook starts its all-reduces from callbacks, in an order that differs between ranks: it crashes or
    # hangs. Compressing begins with the third step, the earliest that the hook allows with error feedback.
    ddp = DistributedDataParallel(model, bucket_cap_mb=ONE_BUCKET_MB, **VIEW)
    state = powerSGD_hook.PowerSGDState(None, matrix_approximation_rank=int(rank), start_powerSGD_iter=2)
    ddp.register_comm_hook(state, powerSGD_hook.powerSGD_hook)
    return ddp


@torch.no_grad()
def evaluate(task: Any, model: torch.nn.Module, held_out: list[torch.Tensor]) -> float:
    """This rank's share in one batch, added up over ranks."""
    model.eval()
    value, count = task.evaluate(model, held_out)["loss"]
    model.train()
    sums = torch.tensor([float(value), float(count)], dtype=torch.float64)
    dist.all_reduce(sums)
    return float(sums[0] / sums[1])


def tell(rank: int, **what: float) -> None:
    if rank == 0:
        print(json.dumps(what | {"time": time.time()}), flush=True)


if __name__ == "__main__":
    main()
