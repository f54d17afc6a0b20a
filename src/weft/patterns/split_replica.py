"""A worker that holds a part of a model: what torch makes of it, on Weft's links, inside the one training loop.

First tensors are cut (``tensors``), then what is left of each is spread (fully_shard over the task's blocks: FSDP2; Rajbhandari et al. 2020,
stage 3; Zhao et al. 2023, 2304.11277). Both give DTensors. Gradients come out summed over these axes; those of copies of a part are joined over
the axis ``data``, once a step.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.fsdp._fully_shard._fsdp_api import AllGather, ReduceScatter
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.overrides import TorchFunctionMode

from weft.comm.link import Link, SoloLink, tell_all
from weft.comm.torch_backend import process_groups
from weft.config import FIRST_PART
from weft.config import part_of as part_name
from weft.data.keys import key_int
from weft.data.sampler import Draw
from weft.patterns import tensors
from weft.patterns.blocks import find_blocks
from weft.patterns.compression import STATE, CompressedArena, make_arena
from weft.patterns.copies import held_by_several
from weft.patterns.elementwise import ELEMENTWISE, PER_PARAMETER, is_large
from weft.patterns.late import Later, all_tensors
from weft.patterns.layout import AXES, DATA, PIPELINE, SHARDED, TENSOR
from weft.patterns.mean import JoinedMean, Running
from weft.patterns.metrics import checked_parts
from weft.patterns.optimizer_state import (
    load_optimizer_state_by_name,
    optimizer_state_by_name,
    scalar,
    shapes,
)
from weft.patterns.pipelined import CHANNEL, Chosen
from weft.patterns.pipelining import PipelineWork, move_away
from weft.patterns.split import SplitPattern
from weft.patterns.stages import LOOKS
from weft.patterns.training import Arena, Replica, first_names
from weft.update import ClipNorm, Dense, Update, multiply, norm
from weft.usage import keep_what_is_freed, leave_no_gaps

if TYPE_CHECKING:
    from weft.patterns.base import Context, Resume


class LooksAtWhole(TorchFunctionMode):
    """To read a DTensor as a number gives, in torch, that of this worker's part (a norm's share of the sum)."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in LOOKS and isinstance(args[0], DTensor):
            args = (whole(args[0]), *args[1:])
        # what is given as a number (alpha=) is read in C++
        rest = {key: value if key == "out" else summed(value) for key, value in (kwargs or {}).items()}
        return func(*args[:1], *map(summed, args[1:]), **rest)


def summed(value: Any) -> Any:
    """A single number in parts that are still to be added up: the sum. Else ``value``."""
    if isinstance(value, DTensor) and value.dim() == 0 and any(at.is_partial() for at in value.placements):
        return value.redistribute(placements=[Replicate()] * value.device_mesh.ndim)
    return value


class SplitReplica(Replica):
    """``params`` and all that belongs to them are DTensors where they are cut: torch's optimizers take them as they are."""

    computes_jointly = True

    def __init__(self, ctx: Context, pattern: SplitPattern, **settings: Any) -> None:
        self.pattern = pattern
        self.layout = pattern.layout(ctx.world)
        self.place = self.layout.place(ctx.rank)
        self.chosen = pattern.chosen(ctx.facts, ctx.world)
        self.work: PipelineWork | None = None
        #: Of the workers that draw the same share, the one that tells of it.
        self.tells = self.place[TENSOR] == 0 and (
            self.chosen is None or self.place[PIPELINE] == self.chosen.program.placement[-1]
        )
        self.at_end = ExitStack()
        #: A pipeline makes each gradient anew for each micro-batch, which the kernel must not clear each time: after its first step, which makes
        #: the last of what lives on, it is to keep what it frees. False: it does, or it is none.
        self.is_to_keep = self.layout.sharded == self.layout.tensor == 1
        leave_no_gaps((1 if self.is_to_keep else 4) << 20)
        with ExitStack() as on_error:
            on_error.callback(self.at_end.close)
            super().__init__(ctx, **settings)
            on_error.pop_all()
        self.optimizer_state = self._optimizer_state
        #: What the optimizer steps: this worker's parts as plain tensors, which every kernel of torch's takes, and without DTensor's
        #: cost for each call; of an optimizer that looks at a parameter as a whole, the DTensors.
        self.parts: dict[str, nn.Parameter] = {}
        self.steps_parts = self.link.world > 1 and type(self.optimizer) in ELEMENTWISE
        if self.steps_parts and self.params:
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

    def _make_optimizer(self) -> torch.optim.Optimizer:
        """The task may sort parameters into groups, by place or shape: it is given all, and the groups are the same on all workers. Those that live
        elsewhere are then left out."""
        stands_for = {
            id(p): nn.Parameter(torch.zeros((), dtype=p.dtype).expand(p.shape))  # of this shape, in no memory
            for p in self.model.parameters()
            if p.requires_grad and p.is_meta
        }
        optimizer = self.task.optimizer([stands_for.get(id(p), p) for p in self.model.parameters() if p.requires_grad])
        elsewhere = {id(p) for p in stands_for.values()}
        for group in optimizer.param_groups:
            group["params"] = [p for p in group["params"] if id(p) not in elsewhere]
        for p in stands_for.values():
            optimizer.state.pop(p, None)
        return optimizer

    def link_on(self, axis: str) -> Link:
        """Of those that differ from this worker in their place on ``axis`` alone."""
        size = getattr(self.layout, axis)
        return SoloLink() if size == 1 else self.link if size == self.ctx.world else self.ctx.groups[axis]

    def _make_model(self, dtype: torch.dtype) -> nn.Module:
        if self.link.world == 1:
            return super()._make_model(dtype)
        if self.pattern.made_whole(self.ctx.facts, self.layout):
            model, later = super()._make_model(dtype), None
        else:
            with Later() as later:
                model = self.task.model().to(dtype)
            self.first_names = first_names(model)
        mesh = self._make_mesh()
        if self.layout.tensor > 1:
            assert self.ctx.facts.tensor is not None
            tensors.cut(model, self.ctx.facts.tensor, mesh[TENSOR], lambda module: self._give(later, module))
        if self.layout.sharded > 1:
            self._shard(model, mesh, later)
        else:
            self._give(later, model)
            self._know_whole(model, model, mesh)
        if self.chosen is not None:
            self._keep_stages(model, self.chosen)
        return model

    def _give(self, later: Later | None, module: nn.Module) -> None:
        """Numbers, the same on all workers, to what is not in parts yet."""
        unparted = [t for _, t in all_tensors(module) if not isinstance(t, DTensor)]
        if later is not None:
            later.give(unparted)
        if self.ctx.resume is None:
            self.link.broadcast([t.detach() for t in unparted])

    def _make_mesh(self) -> DeviceMesh:
        rank = self.ctx.rank
        axes = [axis for axis in AXES if getattr(self.layout, axis) > 1]
        groups = {
            next(ranks for ranks in self.layout.groups(axis) if rank in ranks): self.link_on(axis) for axis in axes
        }
        self.at_end.enter_context(process_groups(self.link, groups))
        return init_device_mesh("cpu", tuple(getattr(self.layout, a) for a in axes), mesh_dim_names=tuple(axes))

    def _know_whole(self, model: nn.Module, part: nn.Module, mesh: DeviceMesh) -> None:
        if self.layout.tensor > 1:
            assert self.ctx.facts.tensor is not None
            tensors.make_whole(model, part, self.ctx.facts.tensor.within, self.first_names, mesh[TENSOR])

    def _shard(self, model: nn.Module, mesh: DeviceMesh, later: Later | None) -> None:
        for block in find_blocks(self.task, model).values():
            self._give(later, block)
            self._know_whole(model, block, mesh)
            fully_shard(block, mesh=mesh[SHARDED], reshard_after_forward=self.pattern.gathers_twice)
        self._give(later, model)
        self._know_whole(model, model, mesh)
        fully_shard(model, mesh=mesh[SHARDED])
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

    def _keep_stages(self, model: nn.Module, chosen: Chosen) -> None:
        facts, place = self.ctx.facts.pipeline, self.place[PIPELINE]
        assert facts is not None
        move_away(model, facts.uses, chosen, place)
        running = {b.name for b in self.ctx.facts.running}
        self.pieces = facts.microbatches
        row = next(row for row in self.layout.groups(PIPELINE) if self.ctx.rank in row)
        self.work = PipelineWork(
            self.task, model, chosen, place, facts, self.ctx.groups, row, running, self.ctx.config.deadline_s
        )
        self.at_end.callback(self.work.close)
        self.carried_aside = [name for name in self.ctx.groups if name.startswith(CHANNEL)]

    @property
    def names(self) -> Sequence[str]:
        return [p.name for p in self.ctx.facts.params if p.trainable]

    def holders(self, name: str) -> list[int]:
        """Places in the pipeline at which a parameter or buffer lives; a tied one may at several."""
        if self.chosen is None:
            return [0]
        assert self.ctx.facts.pipeline is not None
        return sorted({self.chosen.worker_of(item) for item in self.ctx.facts.pipeline.uses[name]})

    def gradients(self) -> Update:
        """What was exchanged meanwhile is no computing."""
        before, waited = self._seconds_in_links(), self.work.waited_s if self.work else 0.0
        for part in self.parts.values():
            part.grad = None
        with self._cut():
            update = super().gradients()
        waited = (self.work.waited_s if self.work else 0.0) - waited
        self.report.wait_s += waited
        self.report.compute_s -= self._seconds_in_links() - before + waited
        if not self.tells:
            update.weight, self.report.losses, self.report.weights = 0.0, [0.0], [0.0]
        return update

    def _compute(self, draw: Draw) -> tuple[float, float, float]:
        done = self._flow(draw) if self.work is not None else super()._compute(draw)
        for p in self.params.values():
            # of an embedding whose rows are cut, and of what is used within a pair, torch leaves a sum that is still to be made
            if isinstance(p.grad, DTensor) and isinstance(p, DTensor) and p.grad.placements != p.placements:
                p.grad = p.grad.redistribute(placements=p.placements)
            elif isinstance(p.grad, DTensor) and not isinstance(p, DTensor):  # it was not used in the rehearsal
                p.grad = whole(p.grad)
        if self.work is not None:
            self._join_tied()
        return done

    def _flow(self, draw: Draw) -> tuple[float, float, float]:
        """The same as a pipeline."""
        assert self.work is not None
        assert self.ctx.facts.pipeline is not None
        begin = time.perf_counter()
        pieces = self._pieces(draw)
        batches = [self.feed.batch(each) if len(each) else self._spare_batch() for each in pieces]
        weights = [
            float(self.task.num_examples(batch)) if len(each) else 0.0
            for batch, each in zip(batches, pieces, strict=True)
        ]
        loaded = time.perf_counter()
        shares = [n / self.joined for n in weights]
        losses = self.work.step(batches, shares, key_int(self.seed, "step", self.share, self.step) >> 1, self.precision)
        if self.spans is not None:
            self.spans.add("pipeline", loaded, time.perf_counter())
        return loaded - begin, sum(loss * n for loss, n in zip(losses, weights, strict=True)), sum(weights)

    def _join_tied(self) -> None:
        """Gradients of parameters that stages on several workers use."""
        for name, p in self.model.named_parameters():
            if p.requires_grad and len(self.holders(name)) > 1:
                grad = local(p.grad) if p.grad is not None else torch.zeros(local(p).shape, dtype=p.dtype)
                self.link_on(PIPELINE).all_reduce([grad])
                if not p.is_meta and p.grad is None:
                    p.grad = placed(grad, p)

    def _cut(self) -> AbstractContextManager[Any]:
        """Around what computes with tensors that are cut, forward and backward."""
        return tensors.computing(self.ctx.facts.tensor) if self.layout.tensor > 1 else nullcontext()

    def _loss(self, batch: Any) -> Tensor:
        loss: Tensor = whole(super()._loss(batch))
        return loss

    def evaluate(self) -> dict[str, float]:
        with self._cut():
            return super().evaluate()

    def _evaluate(self, batch: Any) -> Mapping[str, tuple[Tensor, float]]:
        if self.work is None:
            parts = super()._evaluate(batch)
        else:
            parts = self._evaluate_in_stages(self.work, batch)
        # what all who draw this share have computed counts once
        joined = {n: (whole(total), count) for n, (total, count) in parts.items()}
        return joined if self.tells else {}

    def _evaluate_in_stages(self, work: PipelineWork, batch: Any) -> Mapping[str, tuple[Tensor, float]]:
        """Nothing, but where the last stage is."""
        task, model, facts = self.task, self.model, self.ctx.facts.pipeline
        assert facts is not None
        parts = work.evaluate(lambda: task.evaluate(model, batch))
        loss = work.evaluate(lambda: task.loss(model, batch)) if facts.loss_aside else None
        return {} if parts is None else checked_parts(task, batch, parts, lambda: loss)

    def _seconds_in_links(self) -> float:
        links = [self.link, *(link for name, link in self.ctx.groups.items() if name not in self.carried_aside)]
        return sum(link.traffic.busy_s + link.traffic.wait_s for link in links)

    def _equalise(self) -> None:
        """Done while the model was whole."""

    def broken(self) -> list[str]:
        own = {n for n, p in self.params.items() if not local(p).isfinite().all()}
        flags = torch.tensor([float(n in own) for n in self.names])
        self.link.all_reduce([flags], op="max")
        return [n for n, flag in zip(self.names, flags.tolist(), strict=True) if flag]

    # -- state, whole as one process would have it, so that every other pattern can read it

    def _model_state(self) -> dict[str, Any]:
        first = self.first_names
        return self._gathered({n: (t, self.holders(first[n])[0]) for n, t in self.model.state_dict().items()})

    def _gathered(self, tensors: Mapping[str, tuple[Tensor, int]]) -> dict[str, Any]:
        """``tensors``: with the place in the pipeline that holds each. On rank 0, one at a time; the other ranks keep none."""
        result, row, place = {}, self.link_on(PIPELINE), self.place[PIPELINE]
        for name, (value, holder) in tensors.items():
            all_of_it = whole(value) if holder == place else torch.empty(value.shape, dtype=value.dtype)
            if row.world > 1:
                row.broadcast([all_of_it], holder)
            if self.link.rank == 0:
                result[name] = all_of_it
        return result

    def _optimizer_state(self) -> dict[str, Any]:
        own = optimizer_state_by_name(self.optimizer, self.stepped)
        params = {p.name: p for p in self.ctx.facts.params}
        row = self.link_on(PIPELINE)
        with LooksAtWhole():
            kept = {n: shapes(state) for n, state in own["state"].items()}
        told = tell_all(row, [kept, own["param_groups"]])
        states: dict[str, dict[str, Any]] = {}
        for name in self.names:
            holder = self.holders(name)[0]
            if name not in told[holder][0]:
                continue
            here = holder == self.place[PIPELINE]
            kinds: dict[str, Any] = told[holder][0][name]
            tensors: dict[str, tuple[Tensor, int]] = {}
            for key, kind in kinds.items():
                if not isinstance(kind, dict):
                    continue
                if not here:  # of parts by themselves only those tell their shape that have one
                    shape = params[name].shape if self.steps_parts else kind["shape"]
                    tensors[key] = torch.empty(shape, dtype=getattr(torch, kind["dtype"])), holder
                elif self.steps_parts:
                    tensors[key] = placed(own["state"][name][key], self.params[name]), holder
                else:
                    tensors[key] = own["state"][name][key], holder
            states[name] = {k: None if isinstance(v, dict) else scalar(v) for k, v in kinds.items()}
            states[name] |= self._gathered(tensors)
        groups = [
            dict(group) | {"params": [n for n in self.names if any(n in t[1][k]["params"] for t in told)]}
            for k, group in enumerate(own["param_groups"])
        ]
        return {"state": states, "param_groups": groups}

    def dtype_of(self, name: str) -> torch.dtype:
        return cast(torch.dtype, getattr(torch, next(p.dtype for p in self.ctx.facts.params if p.name == name)))

    def _load_model(self, state: Mapping[str, Any]) -> None:
        own = self.model.state_dict()
        with torch.no_grad():
            for name, value in own.items():
                if not value.is_meta:
                    local(value).copy_(local(part_of(state[name], value)))

    def _load_optimizer(self, state: Mapping[str, Any]) -> None:
        parts = {
            name: {k: self._own_part(k, v, self.params[name]) for k, v in each.items()}
            for name, each in state["state"].items()
            if name in self.params
        }
        groups = [
            dict(group) | {"params": [n for n in group["params"] if n in self.params or n not in self.names]}
            for group in state["param_groups"]
        ]
        load_optimizer_state_by_name(self.optimizer, self.params, {"state": parts, "param_groups": groups})

    def _own_part(self, key: str, value: Any, param: Tensor) -> Any:
        """Of what the optimizer keeps for a parameter. What is not laid out as that is, an optimizer that steps DTensors has whole, as one of them."""
        if is_like(value, param):
            return part_of(value, param)
        mixes = isinstance(param, DTensor) and type(self.optimizer) not in ELEMENTWISE
        if not mixes or not isinstance(value, Tensor) or key in PER_PARAMETER:
            return value
        assert isinstance(param, DTensor)
        everywhere = [Replicate()] * param.device_mesh.ndim
        return DTensor.from_local(value, param.device_mesh, everywhere, run_check=False)

    def apply(self, update: Update) -> None:
        """An optimizer that looks at whole parameters may read a number of what is in parts: it is given that of the whole."""
        with nullcontext() if self.steps_parts else LooksAtWhole():
            super().apply(update)
        if self.is_to_keep:
            self.is_to_keep = False
            keep_what_is_freed()


class SplitMean(JoinedMean):
    """Gradients of parts are added up where they are made, in backward. What is left to exchange: those of copies of a part, and what all must
    agree on."""

    replica: SplitReplica

    def __init__(self, replica: SplitReplica) -> None:
        self.copies = replica.link_on(DATA)
        super().__init__(replica, replica.link, compress=replica.pattern.codec)

    def _make_arena(self) -> Arena:
        replica = self.replica
        held = {n: local(p.detach()) for n, p in replica.params.items()} if self.copies.world > 1 else {}
        whole = held_by_several(replica.ctx.facts, replica.layout, replica.chosen)
        steps = replica.ctx.total_steps
        return make_arena(cast(Any, held), self.copies, self.compress, seed=replica.seed, steps=steps, whole=whole)

    def _join(self, update: Update) -> Update:
        joined = super()._join(update)
        if self.given is not None:
            self.given = Update({n: Dense(local(t)) for n, t in named(update)}, update.weight)
        return joined

    def _make_running(self) -> Running:
        """Of those that draw a share together, one computes each buffer for all."""
        replica, place = self.replica, self.replica.place
        own = {n for n in replica.running if place[TENSOR] == 0 and replica.holders(n)[0] == place[PIPELINE]}
        return Running(replica, self.link, replica.running.keys() - own)

    def _fill_arena(self, update: Update) -> None:
        super()._fill_arena(Update({n: Dense(local(t)) for n, t in named(update)}, update.weight))

    def _exchange(self, beside: list[Tensor]) -> None:
        assert self.arena is not None
        self.link.all_reduce(beside)
        if self.copies.world > 1:
            self.arena.all_reduce(self.copies, [], self.replica.step)

    def _combined(self, update: Update, correction: float, presence: list[float]) -> Update:
        assert self.arena is not None
        replica, views = self.replica, self.arena.views
        grads: dict[str, Tensor] = {}
        for name, p in replica.params.items():
            if not presence[self.position[name]]:
                continue
            entry = update.entries.get(name)
            own = entry.tensor if isinstance(entry, Dense) else placed(torch.zeros_like(local(p)), p)
            grads[name] = placed(views[name], own) if views else own
        if not views:
            multiply([local(grad) for grad in grads.values()], correction)
        for clip in replica.chain:
            if isinstance(clip, ClipNorm):
                clip.norm = self._norm(grads)
        stepped = {n: Dense(local(grad) if replica.parts else grad) for n, grad in grads.items()}
        return Update(cast(Any, stepped), sum(replica.report.weights), update.version)

    def whole(self, update: Update) -> Iterator[tuple[str, Tensor]]:
        replica, own = self.replica, dict(named(update))
        row, place = replica.link_on(PIPELINE), replica.place[PIPELINE]
        params = {p.name: p for p in replica.ctx.facts.params}
        known = tell_all(row, list(own))
        for name in replica.names:
            holder = replica.holders(name)[0]
            if name not in known[holder]:
                continue
            tensor = torch.empty(params[name].shape, dtype=replica.dtype_of(name))
            if holder == place:
                part = own[name]
                tensor = whole(part if isinstance(part, DTensor) else placed(part, replica.params[name]))
            if row.world > 1:
                row.broadcast([tensor], holder)
            if self.link.rank == 0:
                yield name, tensor

    # What a codec keeps is of a worker's own part, also where copies of that part keep it alike.

    def state(self) -> dict[str, Any]:
        return {STATE: {"momentum": None}} if isinstance(self.arena, CompressedArena) else {}

    def own_state(self) -> dict[str, Any]:
        assert self.arena is not None
        return {STATE: {"state": self.arena.state(), "own": self.arena.own_state()}}

    def load(self, resume: Resume) -> None:
        if isinstance(self.arena, CompressedArena) and STATE in resume.parts[FIRST_PART]["exchange"]:
            kept = resume.parts[part_name(self.link.rank)][STATE]
            self.arena.restore(kept["state"], kept["own"])

    def _norm(self, tensors: Mapping[str, Tensor]) -> float:
        """Of the whole gradient, of which each rank holds a part; what several hold counts once."""
        replica = self.replica
        at_one_place = self.link.world // replica.layout.pipeline
        squares = sum(
            norm([local(t)]) ** 2 / copies(t, at_one_place) / len(replica.holders(n)) for n, t in tensors.items()
        )
        total = torch.tensor([squares], dtype=torch.float64)
        self.link.all_reduce([total])
        return math.sqrt(total.item())

    def close(self) -> None:
        self.replica.at_end.close()


def named(update: Update) -> Iterable[tuple[str, Tensor]]:
    return ((n, entry.tensor) for n, entry in update.entries.items() if isinstance(entry, Dense))


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


def whole(tensor: Any) -> Any:
    """All ranks that hold parts of it call together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def copies(tensor: Tensor, world: int) -> int:
    """How many of ``world`` ranks hold the same part of it."""
    if not isinstance(tensor, DTensor):
        return world
    sizes = zip(tensor.device_mesh.shape, tensor.placements, strict=True)
    return world // math.prod(size for size, placement in sizes if not placement.is_replicate())


def placed(part: Tensor, like: Tensor) -> Tensor:
    """This worker's ``part`` of something that is laid out as ``like`` is."""
    if not isinstance(like, DTensor):
        return part
    result = DTensor.from_local(
        part, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )
    return cast(Tensor, result)


def is_like(value: Any, param: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape == param.shape and value.dim() > 0


def part_of(tensor: Tensor, like: Tensor) -> Tensor:
    """What this rank keeps of it, laid out as ``like`` is; nothing travels."""
    if not isinstance(like, DTensor):
        return tensor
    part = tensor
    at = like.device_mesh.get_coordinate()
    assert at is not None
    # the inner axes first: what is left after a cut is what the outer axes spread
    for axis in reversed(range(like.device_mesh.ndim)):
        placement = like.placements[axis]
        if not placement.is_replicate():  # torch's strided shard does not call itself one
            dim, size = cast(Shard, placement).dim, like.device_mesh.size(axis)
            chunks = part.chunk(size, dim)
            part = chunks[at[axis]] if at[axis] < len(chunks) else part.narrow(dim, 0, 0)
    return placed(part.contiguous(), like)
