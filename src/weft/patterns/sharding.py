"""What Sharded does with a model: torch's fully_shard (FSDP2) over the task's blocks, on Weft's links.

A worker holds a part of each parameter, of its gradient and of the optimizer's state. A block's other parts are gathered as its turn
comes, forward and backward, and let go after it; its gradients are added up where they belong (Rajbhandari et al. 2020, stage 3;
Zhao et al. 2023, 2304.11277).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.fsdp._fully_shard._fsdp_api import AllGather, ReduceScatter
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor

from weft.comm.torch_backend import process_groups
from weft.patterns.blocks import find_blocks
from weft.patterns.elementwise import ELEMENTWISE, is_large
from weft.patterns.late import Later, all_tensors
from weft.patterns.mean import JoinedMean
from weft.patterns.optimizer_state import load_optimizer_state_by_name, optimizer_state_by_name
from weft.patterns.sharded import ACROSS, SHARD, Sharded
from weft.patterns.training import Arena, Replica
from weft.update import ClipNorm, Dense, Update, norm
from weft.usage import leave_no_gaps

if TYPE_CHECKING:
    from weft.patterns.base import Context


class ShardedReplica(Replica):
    """``params`` and all that belongs to them are DTensors: torch's optimizers take them as they are."""

    computes_jointly = True

    def __init__(self, ctx: Context, pattern: Sharded, **settings: Any) -> None:
        self.pattern = pattern
        self.at_end = ExitStack()
        if ctx.world > 1:
            leave_no_gaps()
        with ExitStack() as on_error:
            on_error.callback(self.at_end.close)
            super().__init__(ctx, **settings)
            on_error.pop_all()
        self.optimizer_state = self._optimizer_state
        #: What the optimizer steps: this worker's parts as plain tensors, which every kernel of torch's takes, and without DTensor's
        #: cost for each call; of an optimizer that looks at a parameter as a whole, the DTensors.
        self.parts: dict[str, nn.Parameter] = {}
        if self.link.world > 1 and type(self.optimizer) in ELEMENTWISE:
            self._step_parts()

    def _step_parts(self) -> None:
        names = {id(p): n for n, p in self.params.items()}
        self.parts = {n: nn.Parameter(local(p.detach())) for n, p in self.params.items()}
        for group in self.optimizer.param_groups:
            group["params"] = [self.parts[names[id(p)]] for p in group["params"]]
        states = {names[id(p)]: state for p, state in self.optimizer.state.items()}
        self.optimizer.state.clear()
        for name, state in states.items():
            self.optimizer.state[self.parts[name]] = {
                key: local(value) if is_large(key, value) else value for key, value in state.items()
            }
        self.stepped = self.parts

    def _make_model(self, dtype: torch.dtype) -> nn.Module:
        if self.link.world == 1:
            return super()._make_model(dtype)
        if self.ctx.facts.made_whole:
            model, later = super()._make_model(dtype), None
        else:
            with Later() as later:
                model = self.task.model().to(dtype)
        groups = {
            ranks: self.ctx.groups[name] for name, ranks in self.pattern.own_groups(self.ctx.rank, self.ctx.world)
        }
        self.at_end.enter_context(process_groups(self.link, groups))
        shape = (self.pattern.replicas, self.ctx.world // self.pattern.replicas)
        names = (ACROSS, SHARD)
        mesh = (
            init_device_mesh("cpu", shape, mesh_dim_names=names) if shape[0] > 1 else init_device_mesh("cpu", shape[1:])
        )
        for block in find_blocks(self.task, model).values():
            self._give(later, block)
            fully_shard(block, mesh=mesh, reshard_after_forward=self.pattern.reshard)
        self._give(later, model)
        fully_shard(model, mesh=mesh)
        room = Room()
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_custom_all_gather(GatherIn(room))
                module.set_custom_reduce_scatter(ScatterFrom(room))
                # each worker's gradient is its share of the joined mean's: they are added up, not averaged
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)
                # a call is done when it returns: to gather the next block early would hide nothing, and hold one more. Itself it has already
                module.set_modules_to_backward_prefetch([module])
        return model

    def _give(self, later: Later | None, module: nn.Module) -> None:
        """Numbers, the same on all workers, to what is not in parts yet."""
        tensors = [t for _, t in all_tensors(module) if not isinstance(t, DTensor)]
        if later is not None:
            later.give(tensors)
        if self.ctx.resume is None:
            self.link.broadcast([t.detach() for t in tensors])

    def gradients(self) -> Update:
        """What was exchanged meanwhile is no computing."""
        before = self._seconds_in_links()
        for part in self.parts.values():
            part.grad = None
        update = super().gradients()
        self.report.compute_s -= self._seconds_in_links() - before
        return update

    def _seconds_in_links(self) -> float:
        links = (self.link, *self.ctx.groups.values())
        return sum(link.traffic.busy_s + link.traffic.wait_s for link in links)

    def _equalise(self) -> None:
        """Done while the model was whole."""

    def broken(self) -> list[str]:
        flags = torch.tensor([float(not local(p).isfinite().all()) for p in self.params.values()])
        self.link.all_reduce([flags], op="max")
        return [n for n, flag in zip(self.params, flags.tolist(), strict=True) if flag]

    # -- state, whole as one process would have it, so that every other pattern can read it

    def _model_state(self) -> dict[str, Any]:
        return self._gathered(self.model.state_dict())

    def _gathered(self, tensors: Mapping[str, Any]) -> dict[str, Any]:
        """On rank 0, one at a time; the other ranks keep none."""
        result = {}
        for name, value in tensors.items():
            whole = value.full_tensor() if isinstance(value, DTensor) else value
            if self.link.rank == 0:
                result[name] = whole
        return result

    def _optimizer_state(self) -> dict[str, Any]:
        own = optimizer_state_by_name(self.optimizer, self.stepped)
        states = {
            name: self._gathered(
                {k: placed(v, self.params[name]) if self.parts and is_large(k, v) else v for k, v in state.items()}
            )
            for name, state in own["state"].items()
        }
        return own | {"state": states}

    def _load_model(self, state: Mapping[str, Any]) -> None:
        own = self.model.state_dict()
        self._same_names(own, state)
        with torch.no_grad():
            for name, value in own.items():
                local(value).copy_(local(part_of(state[name], value)))

    @staticmethod
    def _same_names(own: Mapping[str, Any], state: Mapping[str, Any]) -> None:
        wrong = [
            name for name in own.keys() | state.keys()
            if name not in own or name not in state or own[name].shape != state[name].shape
        ]  # fmt: skip
        if wrong:
            raise RuntimeError(f"{', '.join(sorted(wrong)[:5])} differ in name or shape")

    def _load_optimizer(self, state: Mapping[str, Any]) -> None:
        parts = {
            name: {k: part_of(v, self.params[name]) if is_like(v, self.params[name]) else v for k, v in each.items()}
            for name, each in state["state"].items()
            if name in self.params
        }
        load_optimizer_state_by_name(self.optimizer, self.params, {**state, "state": parts})


class SplitMean(JoinedMean):
    """Gradients are added up where they are made, in backward; what is left to exchange is what all must agree on."""

    replica: ShardedReplica

    def _make_arena(self) -> Arena:
        return Arena({}, self.link)

    def _combined(self, update: Update, correction: float, presence: list[float]) -> Update:
        tensors = update.tensors()
        if correction != 1.0 and tensors:
            torch._foreach_mul_(tensors, correction)
        for clip in self.replica.chain:
            if isinstance(clip, ClipNorm):
                clip.norm = self._norm(tensors)
        for name, part in self.replica.parts.items():
            entry = update.entries.get(name)
            part.grad = local(entry.tensor) if isinstance(entry, Dense) else None
        update.weight = sum(self.replica.report.weights)
        return update

    def _norm(self, tensors: Iterable[Tensor]) -> float:
        """Of the whole gradient, of which each rank holds a part; what several hold counts once."""
        squares = sum(norm([local(t)]) ** 2 / copies(t, self.link.world) for t in tensors)
        total = torch.tensor([squares], dtype=torch.float64)
        self.link.all_reduce([total])
        return math.sqrt(total.item())

    def close(self) -> None:
        self.replica.at_end.close()


# -- what travels


class Room:
    """Memory in which a block's parameters come together and its gradients stand ready, taken once: a fresh one for each would cost the
    kernel more than the moving. Calls are done when they return, and what came is copied out at once: one room does for all."""

    def __init__(self) -> None:
        self._kept = torch.empty(0, dtype=torch.uint8)

    def take(self, size: Sequence[int | torch.SymInt], dtype: torch.dtype) -> Tensor:
        nbytes = int(math.prod(size)) * dtype.itemsize
        if self._kept.numel() < nbytes:
            self._kept = torch.empty(0, dtype=torch.uint8)  # two at a time would be one too many
            self._kept = torch.empty(nbytes, dtype=torch.uint8)
        return self._kept[:nbytes].view(dtype).view(*size)


class GatherIn(AllGather):
    def __init__(self, room: Room) -> None:
        self.room = room

    def allocate(self, size: Sequence[int | torch.SymInt], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return self.room.take(size, dtype)

    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, group: Any, async_op: bool = False) -> Any:
        return dist.all_gather_single(output_tensor, input_tensor, group=group, async_op=async_op)


class ScatterFrom(ReduceScatter):
    """fully_shard asks by turns for where a block's gradients stand ready and for where this worker's part of the sum goes, which
    stays: the gradient."""

    def __init__(self, room: Room) -> None:
        self.room, self.stays = room, False

    def allocate(self, size: Sequence[int | torch.SymInt], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        stays, self.stays = self.stays, not self.stays
        return torch.empty(*size, dtype=dtype, device=device) if stays else self.room.take(size, dtype)

    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, group: Any, op: Any, async_op: bool = False) -> Any:
        return dist.reduce_scatter_single(output_tensor, input_tensor, op=op, group=group, async_op=async_op)


# -- DTensors


def local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def copies(tensor: Tensor, world: int) -> int:
    """How many of ``world`` ranks hold the same part of it."""
    if not isinstance(tensor, DTensor):
        return world
    sizes = zip(tensor.device_mesh.shape, tensor.placements, strict=True)
    return math.prod(size for size, placement in sizes if isinstance(placement, Replicate))


def placed(part: Tensor, like: Tensor) -> Tensor:
    """This worker's ``part`` of something that is laid out as ``like`` is."""
    if not isinstance(like, DTensor):
        return part
    whole = DTensor.from_local(
        part, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )
    return cast(Tensor, whole)


def is_like(value: Any, param: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape == param.shape and value.dim() > 0


def part_of(whole: Tensor, like: Tensor) -> Tensor:
    """Laid out as ``like`` is, by each rank from what it has: nothing travels."""
    if not isinstance(like, DTensor):
        return whole
    return cast(Tensor, distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None))
