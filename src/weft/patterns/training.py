"""The one training loop of every pattern whose workers each hold a whole replica of the model.

draw a share of the joined batch -> gradients -> Exchange.gradients -> optimizer -> Exchange.parameters -> safe point.
Patterns differ only in their Exchange. What the loop itself costs is some 30 us a step (bench/step.py holds it to that), so
here plain code beats pretty code: no object per tensor that need not be, checks that pass by one test.
"""

from __future__ import annotations

import contextlib
import math
import time
from abc import ABC
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from weft.comm.link import Link
from weft.data.keys import key_int
from weft.data.partition import parse as parse_partitioner
from weft.data.sampler import Sampler
from weft.errors import CheckpointError, TaskError
from weft.patterns.base import Context, SafePoint, StepReport
from weft.patterns.batches import Batches, check_loss, evaluate_batch, groups_of
from weft.patterns.optimizer_state import load_optimizer_state_by_name, optimizer_state_by_name
from weft.patterns.randomness import host_state, host_state_kept, seed_everything, seed_torch, set_host_state
from weft.update import Dense, Rows, Transform, Update, apply_all

AS_IS: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
EVAL_SHARE = 4  # evaluation keeps no activations: it takes this many times a training share at once


def flat_buffer(link: Link, numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros where the carrier reduces them fastest: in shared memory, where ranks share a host; else on the device."""
    return link.allocate(numel, dtype) if device.type == "cpu" else torch.zeros(numel, dtype=dtype, device=device)


class Arena:
    """One flat buffer per dtype that holds all dense gradients, so that an exchange is one call and not one per tensor.

    Alone there is no exchange: gradients then stay where autograd puts them, and the arena is empty.
    """

    def __init__(self, params: Mapping[str, nn.Parameter], link: Link) -> None:
        self.buffers: list[Tensor] = []
        self.views: dict[str, Tensor] = {}
        if link.world == 1:
            return
        for dtype in dict.fromkeys(p.dtype for p in params.values()):
            members = {n: p for n, p in params.items() if p.dtype == dtype}
            device = next(iter(members.values())).device
            flat = flat_buffer(link, sum(p.numel() for p in members.values()), dtype, device)
            self.buffers.append(flat)
            offset = 0
            for name, p in members.items():
                self.views[name] = flat[offset : offset + p.numel()].view(p.shape)
                offset += p.numel()


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters that need a gradient, each once (tied ones under their first name)."""
    return {n: p for n, p in model.named_parameters() if p.requires_grad}


class Replica:
    """A whole model on one worker: its arena, optimizer, schedule, place in the data."""

    def __init__(
        self, ctx: Context, *, accumulate: int = 1, autocast: str = "none", chain: Sequence[Transform] = ()
    ) -> None:
        config, task = ctx.config, ctx.task
        self.ctx, self.task, self.link, self.chain = ctx, task, ctx.link, list(chain)
        self.accumulate = accumulate
        dtype = cast(torch.dtype, getattr(torch, config.dtype))
        seed_everything(key_int(config.seed, "data"))
        train, test = task.data()
        seed_everything(key_int(config.seed, "init"))
        self.model = task.model().to(ctx.device, dtype)
        self.params = trainable(self.model)
        self.sparse = frozenset(p.name for p in ctx.facts.params if p.sparse)
        self.arena = Arena({n: p for n, p in self.params.items() if n not in self.sparse}, ctx.link)
        running = {b.name for b in ctx.facts.buffers if b.running}
        self.running = {n: b for n, b in self.model.named_buffers() if n in running}
        self.optimizer = task.optimizer(list(self.params.values()))
        self.schedule = task.schedule(self.optimizer, ctx.total_steps)
        self.train_batches = Batches(train, task, ctx.device, dtype)
        self.test_batches = Batches(test, task, ctx.device, dtype)
        self.num_test = len(cast(Any, test))
        partitioner = parse_partitioner(config.partition)
        self.sampler = Sampler(
            len(cast(Any, train)),
            config.batch,
            ctx.rank,
            ctx.world,
            config.seed,
            partitioner,
            *groups_of(train, task, partitioner),
        )
        self.seed = config.seed
        self.step_seed = key_int(config.seed, "step", ctx.rank) >> 1  # room to add the step
        self.autocast = autocast == "bf16"
        self.step = 0
        self.joined = 0  # examples drawn by all ranks in this step
        self.report = StepReport()
        self.spans = ctx.spans
        seed_everything(key_int(config.seed, "worker", ctx.rank, ctx.resume.step if ctx.resume else 0))
        if ctx.resume is not None:
            self.load(ctx.resume.state, ctx.resume.meta)
            if ctx.resume.world == ctx.world:
                set_host_state(ctx.resume.state["host_random"][ctx.rank])
        else:
            # same seed, same model: unless the task's own code differs between processes
            ctx.link.broadcast([t.detach() for t in (*self.model.parameters(), *self.model.buffers())])

    # -- one step ------------------------------------------------------------------------------------------------

    def gradients(self) -> Update:
        """This worker's share of the joined batch, summed over its examples and divided by the joined count.

        The sum of these over ranks is the gradient of the joined batch. ``p.grad`` of every dense parameter with a
        gradient is then its view of the arena, if there is one.
        """
        begun = time.perf_counter()
        if (spans := self.spans) is not None:
            spans.step = self.step + 1
        draw = self.sampler.next()
        self.joined = draw.total
        seed_torch(self.step_seed + self.step)
        for p in self.params.values():
            p.grad = None
        data_s, loss_sum, weight = 0.0, 0.0, 0.0
        pieces = np.array_split(draw.indices, self.accumulate) if self.accumulate > 1 else [draw.indices]
        for indices in pieces:
            if len(indices) == 0:
                continue
            loading = time.perf_counter()
            batch = self.train_batches(indices)
            loaded = time.perf_counter()
            data_s += loaded - loading
            n = self.task.num_examples(batch)
            with self.precision():
                loss = self.task.loss(self.model, batch)
            check_loss(loss, self.task)
            share = n / draw.total
            if spans is not None:
                spans.add("data", loading, loaded)
                spans.add("forward", loaded, forwarded := time.perf_counter())
            loss.backward(gradient=None if share == 1.0 else torch.full_like(loss, share))
            loss_sum += loss.item() * n
            weight += n
            if spans is not None:
                spans.add("backward", forwarded, time.perf_counter())
        update = self._collect(weight)
        r = self.report
        r.losses, r.examples = [loss_sum], [weight]
        r.data_s = data_s
        r.compute_s = time.perf_counter() - begun - data_s
        return update

    def _collect(self, weight: float) -> Update:
        """Move fresh gradients into the arena. A parameter without one keeps None: zeros would make AdamW move it."""
        update = Update({}, weight, self.step, self.ctx.rank)
        views = self.arena.views
        if not views and not self.sparse:
            update.entries = {n: Dense(p.grad) for n, p in self.params.items() if p.grad is not None}
            return update
        source: list[Tensor] = []
        target: list[Tensor] = []
        for name, p in self.params.items():
            if name in self.sparse:
                update.entries[name] = sparse_rows(name, p)
                continue
            grad = p.grad
            if grad is None:
                continue
            if grad.is_sparse:  # of a parameter whose gradients were dense at first
                grad = p.grad = grad.to_dense()
            if views:
                source.append(grad)
                grad = views[name]
                target.append(grad)
            update.entries[name] = Dense(grad)
        if target:
            torch._foreach_copy_(target, source)
        return update

    def apply(self, update: Update) -> None:
        """Clip and the other transforms, then one step of the task's optimizer and schedule."""
        begun = time.perf_counter()
        if self.chain:
            update = apply_all(self.chain, update)
        for name, p in self.params.items():
            entry = update.entries.get(name)
            if entry is None:
                p.grad = None
            elif isinstance(entry, Dense):
                if p.grad is not entry.tensor:
                    p.grad = entry.tensor
            else:
                p.grad = torch.sparse_coo_tensor(
                    entry.indices[None], entry.values, entry.shape, is_coalesced=True, check_invariants=False
                )
        self.optimizer.step()
        if self.schedule is not None:
            self.schedule.step()
        self.step += 1
        ended = time.perf_counter()
        self.report.compute_s += ended - begun
        if self.spans is not None:
            self.spans.add("optimizer", begun, ended)

    def precision(self) -> contextlib.AbstractContextManager[Any]:
        return torch.autocast(self.ctx.device.type, torch.bfloat16) if self.autocast else AS_IS

    # -- evaluation, state ---------------------------------------------------------------------------------------

    @torch.no_grad()
    @host_state_kept()
    def evaluate(self) -> dict[str, float]:
        """Held-out metrics over all ranks: sums and counts add up in rank order, so every rank gets the same numbers."""
        ctx = self.ctx
        self.link.barrier()  # what rank 0 saves is safe before a task's evaluation can raise
        size = max(1, EVAL_SHARE * math.ceil(ctx.config.batch / ctx.world / self.accumulate))
        totals: dict[str, list[float]] = {name: [0.0, 0.0] for name in ctx.facts.metrics}
        mine = np.arange(ctx.rank, self.num_test, ctx.world)
        modes = [(module, module.training) for module in self.model.modules()]  # a task may keep some in eval mode
        self.model.eval()
        seed_torch(key_int(self.seed, "evaluate"))
        try:
            for start in range(0, len(mine), size):
                batch = self.test_batches(mine[start : start + size])
                with self.precision():
                    parts = evaluate_batch(self.task, self.model, batch)
                if strange := parts.keys() - totals.keys():
                    raise TaskError(
                        f"{type(self.task).__name__}.evaluate returned the metric {min(strange)!r} for some batches only: return the "
                        f"same names for every batch (at first: {', '.join(totals)}), with a count of 0 where there is nothing."
                    )
                for name, (total, count) in parts.items():
                    totals[name][0] += float(total)
                    totals[name][1] += float(count)
        finally:
            for module, mode in modes:
                module.training = mode
        own = torch.tensor(list(totals.values()), dtype=torch.float64, device=ctx.device)
        joined = torch.stack(self.link.all_gather(own)).sum(0).tolist()
        return {name: s / c if c else math.nan for name, (s, c) in zip(totals, joined, strict=True)}

    def state(self) -> dict[str, Any]:
        """Everything by parameter name, so that another pattern or layout can read it. All ranks call together."""
        own = host_state().to(self.ctx.device)
        return {
            "host_random": [state.cpu() for state in self.link.all_gather(own)],  # by rank
            "model": dict(self.model.state_dict()),
            "optimizer": optimizer_state_by_name(self.optimizer, self.params),
            "schedule": self.schedule.state_dict() if self.schedule is not None else None,
            "chain": [t.state_dict() for t in self.chain],
        }

    def meta(self) -> dict[str, Any]:
        return {"sampler": self.sampler.state_dict()}

    def load(self, state: Mapping[str, Any], meta: Mapping[str, Any]) -> None:
        try:
            self.model.load_state_dict(state["model"])
        except RuntimeError as error:
            raise CheckpointError(
                f"the checkpoint is of another model: {error}. Resume with the task it was made by."
            ) from error
        load_optimizer_state_by_name(self.optimizer, self.params, state["optimizer"])
        if self.schedule is not None and state["schedule"] is not None:
            self.schedule.load_state_dict(state["schedule"])
        for transform, kept in zip(self.chain, state["chain"], strict=True):
            transform.load_state_dict(kept)
        self.sampler.load_state_dict(meta["sampler"])
        self.step = int(meta["step"])


class Exchange(ABC):  # noqa: B024  (a pattern overrides what it needs; doing nothing is local training)
    """When and what the replicas exchange. ``stop`` is what all members agreed on in the last exchange."""

    stop: bool = False

    def gradients(self, update: Update) -> Update:
        """Between backward and the optimizer."""
        return update

    def parameters(self, step: int) -> None:
        """After ``step`` updates."""

    def flush(self) -> None:
        """Bring replicas together before evaluating, saving and at the end."""


def train(ctx: Context) -> Iterator[SafePoint]:
    """The role of a worker with a whole replica."""
    replica = ctx.pattern.replica(ctx)
    exchange = ctx.pattern.exchange(replica, ctx.link)
    traffic = ctx.link.traffic
    at_safe_point = (replica.state, replica.meta, replica.evaluate)
    if replica.step == ctx.total_steps:  # it died after its last update, before its result
        yield SafePoint(replica.step, False, True, StepReport(), *at_safe_point)
    while replica.step < ctx.total_steps:
        busy_s, wait_s, sent = traffic.busy_s, traffic.wait_s, traffic.bytes_sent
        report = replica.report = StepReport()
        replica.apply(exchange.gradients(replica.gradients()))
        exchange.parameters(replica.step)
        report.exchange_s, report.wait_s = traffic.busy_s - busy_s, traffic.wait_s - wait_s
        report.bytes_sent = traffic.bytes_sent - sent
        ended = replica.step == ctx.total_steps
        if ended or exchange.stop:
            exchange.flush()
        yield SafePoint(replica.step, exchange.stop, ended, report, *at_safe_point)


# -- helpers -----------------------------------------------------------------------------------------------------


def sparse_rows(name: str, p: nn.Parameter) -> Rows:
    if p.grad is None:
        grad = torch.sparse_coo_tensor(torch.zeros(1, 0, dtype=torch.int64), p.new_zeros(0, *p.shape[1:]), p.shape)
    elif p.grad.is_sparse:
        grad = p.grad.coalesce()
    else:
        raise TaskError(
            f"parameter {name!r} had sparse gradients at first and now a dense one: use it only through sparse lookups, "
            "or make it dense (sparse=False)."
        )
    return Rows(grad.coalesce().indices()[0], grad.coalesce().values(), tuple(p.shape))
