"""The peers of split.py: codelm split over workers by plain torch over Gloo, each way as its documentation has it, under torchrun.

fsdp: fully_shard over each block and over the model. tensor: parallelize_module, columns and rows in pairs, each worker its heads. Others:
torch.distributed.pipelining, the stages cut by hand in equal numbers of blocks; gradients of the embedding that the head shares are summed
over both. Model, weights, data, optimizer and schedule are the task's own. Rank 0 prints one JSON object: seconds per step, and the losses of
the first steps, by which the harness sees that both sides train alike.
"""

from __future__ import annotations

import argparse
import json
import os
import types
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import pipelining
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch_loop import batches_of, seconds_per_step

from weft.data.keys import key_int
from weft.tasks.codelm import Block, ByteTransformer, CodeLM

PIPELINES: dict[str, tuple[Any, tuple[int, ...]]] = {  # the schedule, and where each stage lives on two workers
    "gpipe": (pipelining.ScheduleGPipe, (0, 1)),
    "1f1b": (pipelining.Schedule1F1B, (0, 1)),
    "looped-bfs": (pipelining.ScheduleLoopedBFS, (0, 1, 0, 1)),
    "interleaved-1f1b": (pipelining.ScheduleInterleaved1F1B, (0, 1, 0, 1)),
    "interleaved-zb": (pipelining.ScheduleInterleavedZeroBubble, (0, 1, 0, 1)),
    "zbv": (pipelining.ScheduleZBVZeroBubble, (0, 1, 1, 0)),
    "dualpipe-v": (pipelining.ScheduleDualPipeV, (0, 1, 1, 0)),
}
TOLD = 3  # losses

Step = Callable[[], float | None]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("way", choices=["fsdp", "tensor", *PIPELINES])
    parser.add_argument("--options", type=json.loads, default={}, help="arguments of the task, as JSON")
    parser.add_argument("--batch", type=int, required=True, help="examples per step, of all workers")
    parser.add_argument("--microbatches", type=int, default=8)
    parser.add_argument("--warmup", type=int, required=True)
    parser.add_argument("--steps", type=int, required=True, help="steps under the clock")
    args = parser.parse_args()

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    task = CodeLM(**args.options)
    torch.manual_seed(key_int(0, "init"))
    model = task.model()
    assert isinstance(model, ByteTransformer)
    total = args.warmup + args.steps
    make = {"fsdp": sharded, "tensor": tensor}.get(args.way)
    step = make(task, model, args.batch, total) if make else pipeline(task, model, args, total)
    losses: list[float] = []

    def stepped() -> None:
        loss = step()
        if loss is not None and len(losses) < TOLD:
            losses.append(loss)

    step_s = seconds_per_step(stepped, args.warmup, args.steps)
    told: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(told, losses)
    if dist.get_rank() == 0:
        # each told what it counts of the loss, or nothing
        parts = [each for each in told if each]
        print(json.dumps({"step_s": step_s, "losses": [sum(each) for each in zip(*parts, strict=True)]}), flush=True)
    dist.barrier()
    os._exit(0)  # torch 2.13 at times aborts while it takes Gloo's threads down


def sharded(task: CodeLM, model: ByteTransformer, batch: int, total: int) -> Step:
    world, rank = dist.get_world_size(), dist.get_rank()
    mesh = init_device_mesh("cpu", (world,))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    batches = batches_of(task, batch // world, rank, world)
    return training(task, model, [list(model.parameters())], lambda: next(batches), total, 1 / world)


def tensor(task: CodeLM, model: ByteTransformer, batch: int, total: int) -> Step:
    world, rank = dist.get_world_size(), dist.get_rank()
    mesh = init_device_mesh("cpu", (world,))
    plan: dict[str, Any] = {
        "qkv": ColwiseParallel(),
        "out": RowwiseParallel(),
        "up": ColwiseParallel(),
        "down": RowwiseParallel(),
    }
    for block in model.blocks:
        assert isinstance(block, Block)
        parallelize_module(block, mesh, plan, src_data_rank=None)
        block.heads //= world
        block.forward = types.MethodType(with_own_heads, block)  # type: ignore[method-assign]
    batches = batches_of(task, batch, 0, 1)
    cut = [p for p in model.parameters() if isinstance(p, DTensor)]
    rest = [p for p in model.parameters() if not isinstance(p, DTensor)]  # AdamW takes no mixture of both
    return training(task, model, [cut, rest], lambda: next(batches), total, 1.0 if rank == 0 else 0.0)


def with_own_heads(self: Block, x: Tensor) -> Tensor:
    """Block.forward, where qkv and up make this worker's part."""
    b, t, _ = x.shape
    made = self.qkv(self.norm1(x))
    width = made.shape[-1] // 3
    q, k, v = made.view(b, t, self.heads, 3, width // self.heads).permute(3, 0, 2, 1, 4)
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    x = x + self.out(y.transpose(1, 2).reshape(b, t, width))
    x = x + self.down(F.gelu(self.up(self.norm2(x))))
    return x


def training(
    task: CodeLM,
    model: nn.Module,
    groups: list[list[nn.Parameter]],
    batch: Callable[[], Any],
    total: int,
    counts: float,
) -> Step:
    optimizer, schedule = optimizing(task, groups, total)

    def step() -> float:
        optimizer.zero_grad()
        loss = task.loss(model, batch())
        loss.backward()
        optimizer.step()
        schedule.step()
        return counts * loss.item()

    return step


def optimizing(task: CodeLM, groups: list[list[nn.Parameter]], total: int) -> tuple[Any, Any]:
    optimizer = task.optimizer([{"params": params} for params in groups if params])  # type: ignore[arg-type]
    return optimizer, task.schedule(optimizer, total)


class Stage(nn.Module):
    """Some blocks of the model; the first with the embedding, the last with the head."""

    def __init__(self, model: ByteTransformer, blocks: range) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(model.blocks[k] for k in blocks)
        first, last = blocks.start == 0, blocks.stop == len(model.blocks)
        self.embed = model.embed if first else None
        self.position = model.position if first else None
        self.norm = model.norm if last else None
        self.head = model.head if last else None

    def forward(self, x: Tensor) -> Tensor:
        if self.embed is not None:
            assert self.position is not None
            x = self.embed(x) + self.position.weight[: x.shape[1]]
        for block in self.blocks:
            x = block(x)
        if self.norm is not None:
            assert self.head is not None
            x = self.head(self.norm(x))
        return x


def pipeline(task: CodeLM, model: ByteTransformer, args: argparse.Namespace, total: int) -> Step:
    rank = dist.get_rank()
    make, placement = PIPELINES[args.way]
    num, last = len(placement), placement[-1]
    cuts = [len(model.blocks) * k // num for k in range(num + 1)]
    modules = {k: Stage(model, range(cuts[k], cuts[k + 1])) for k in range(num) if placement[k] == rank}
    stages = [pipelining.PipelineStage(module, k, num, torch.device("cpu")) for k, module in modules.items()]

    def loss_of(logits: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    single = issubclass(make, pipelining.schedules.PipelineScheduleSingle)
    schedule: Any = make(stages[0] if single else stages, args.microbatches, loss_fn=loss_of)
    embed = model.embed.weight
    if (
        rank == placement[0] == last
    ):  # torch's split backward loses part of the gradient of a weight that two stages share
        model.head.weight = nn.Parameter(embed.detach().clone())
    params = list(dict.fromkeys(p for module in modules.values() for p in module.parameters()))
    optimizer, rates = optimizing(task, [params], total)
    batches = batches_of(task, args.batch, 0, 1)

    def step() -> float | None:
        windows = next(batches)[0].long()
        losses: list[Tensor] = []
        optimizer.zero_grad()
        inputs = (windows[:, :-1],) if rank == placement[0] else ()
        targets = {"target": windows[:, 1:], "losses": losses} if rank == last else {}
        schedule.step(*inputs, **targets)
        if placement[0] != last:
            dist.all_reduce(embed.grad)
        elif rank == last:
            embed.grad += model.head.weight.grad
            model.head.weight.grad = embed.grad
        optimizer.step()
        rates.step()
        return torch.stack(losses).mean().item() if rank == last else None

    return step


if __name__ == "__main__":
    main()
