"""Training apart and meeting now and then: the mean of how far all ranks moved, and a step of the outer optimizer along it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from weft.codecs.spec import NONE
from weft.comm.link import Link, SoloLink
from weft.config import FIRST_PART, part_of
from weft.errors import TaskError
from weft.patterns.base import own_rows_numel
from weft.patterns.compression import STATE, make_arena
from weft.patterns.mean import JoinedMean, Running
from weft.patterns.optimizer_state import load_optimizer_state_by_name, optimizer_state_by_name
from weft.patterns.training import Arena, Exchange, Replica, flat_buffer
from weft.update import Update

if TYPE_CHECKING:
    from weft.patterns.base import Resume
    from weft.patterns.local_sgd import Outer

WEIGHT, STOP = range(2)
MOMENTUM = "outer momentum"


class PeriodicMean(Exchange):
    """``island``: the link of the ranks that train as one (None: each for itself), ``size`` of them.

    The first meeting comes after exactly ``every`` updates, or where an epoch ends; a flush is a meeting too if anybody has
    moved since the last one, and the count begins anew. So a checkpoint needs to hold nothing of a period.
    """

    def __init__(
        self,
        replica: Replica,
        every: int | Literal["epoch"],
        outer: Outer,
        start: int,
        island: Link | None,
        size: int,
        compress: str = NONE,
    ) -> None:
        ctx, self.outer = replica.ctx, outer
        self.replica, self.link, self.every, self.start = replica, replica.link, every, start
        first = ctx.rank - ctx.rank % size
        self.inner = JoinedMean(replica, island or SoloLink(), range(first, first + size))
        self.size = size
        self.writers = range(0, ctx.world, size if compress == NONE else 1)
        self.apart = replica.step >= start
        self.together = None if self.apart else JoinedMean(replica, self.link)
        # what all agreed on last, flat and by name; how far this rank went from there; the step along their mean
        with torch.no_grad():
            self.delta = make_arena(replica.params, self.link, compress, seed=replica.seed)
            self.anchor = Arena(replica.params, SoloLink(), first=self.delta.first)
        self.optimizer = torch.optim.SGD(
            [nn.Parameter(flat) for flat in self.anchor.buffers],
            lr=outer.lr,
            momentum=outer.momentum,
            nesterov=outer.nesterov,
        )
        self.tail = flat_buffer(self.link, own_rows_numel(ctx.world), torch.float64, ctx.device)
        self.rows = self.tail.view(ctx.world, 2)
        self.running = Running(replica, self.link)
        self._set_out()

    def gradients(self, update: Update) -> Update:
        if self.together is not None and not self.apart:
            update = self.together.gradients(update)
            self.stop = self.together.stop
            return update
        self.weight += update.weight
        self.expected += self.replica.report.examples
        return self.inner.gradients(update)

    def parameters(self, step: int) -> None:
        if not self.apart:
            if step >= self.start:
                self.apart = True
                self._set_out()
            return
        self.since += 1
        if self.replica.epoch_ended if self.every == "epoch" else self.since >= self.every:
            self.meet()

    def flush(self) -> None:
        if self.since:
            self.meet()

    @torch.no_grad()
    def meet(self) -> None:
        replica, deltas = self.replica, list(self.delta.views.values())
        params: list[torch.Tensor] = list(replica.params.values())
        anchors = list(self.anchor.views.values())
        torch._foreach_copy_(deltas, anchors)
        torch._foreach_sub_(deltas, params)
        scale = self.weight / self.expected
        if scale != 1.0:
            torch._foreach_mul_(deltas, scale)
        self.tail.zero_()
        self.rows[self.link.rank, WEIGHT] = self.weight
        self.rows[self.link.rank, STOP] = float(replica.ctx.stop_requested())
        self.delta.all_reduce(self.link, [*self.running.stage(scale), self.tail], replica.step)
        weights, stops = self.rows.T.tolist()
        self.stop = any(stops)
        if sum(weights) <= 0:
            raise TaskError(
                f"num_examples added up to {sum(weights)} over all workers in {self.since} steps: it must be positive."
            )
        correction = self.expected / sum(weights)  # 1 unless the task counts examples its own way
        if correction != 1.0:
            torch._foreach_mul_(self.delta.buffers, correction)
        self.running.take(correction)
        for flat, delta in zip(self.optimizer.param_groups[0]["params"], self.delta.buffers, strict=True):
            flat.grad = delta
        self.optimizer.step()
        torch._foreach_copy_(params, anchors)
        self._count_anew()

    def _set_out(self) -> None:
        """From where the replica stands now; so do all others."""
        with torch.no_grad():
            torch._foreach_copy_(list(self.anchor.views.values()), list(self.replica.params.values()))
        self.replica.averaged_over = self.size if self.apart else self.link.world
        self._count_anew()

    def _count_anew(self) -> None:
        self.since, self.weight, self.expected = 0, 0.0, 0

    # -- state

    def state(self) -> dict[str, Any]:
        flats = [self.optimizer.state[flat].get("momentum_buffer") for flat in self.optimizer.param_groups[0]["params"]]
        met = all(flat is not None for flat in flats)
        kept = self.delta.state()
        return {MOMENTUM: self.anchor.by_name(flats) if met else {}} | ({STATE: kept} if kept else {})

    def own_state(self) -> dict[str, Any]:
        own = {"optimizer": optimizer_state_by_name(self.replica.optimizer, self.replica.params)}
        return own | {STATE: self.delta.own_state()}

    def load(self, resume: Resume) -> None:
        """The inner optimizer is this island's own, if it was before; else the replica has loaded that of all."""
        if (momentum := resume.parts[FIRST_PART]["exchange"].get(MOMENTUM)) and self.outer.momentum:
            flats = [torch.zeros_like(flat) for flat in self.anchor.buffers]
            for name, view in self.anchor.by_name(flats).items():
                view.copy_(momentum[name])
            for param, flat in zip(self.optimizer.param_groups[0]["params"], flats, strict=True):
                self.optimizer.state[param]["momentum_buffer"] = flat
        writers = (part_of(rank) for rank in (self.link.rank, self.inner.ranks[0]))
        states = (
            resume.parts[writer]["optimizer"] for writer in writers if "optimizer" in resume.parts.get(writer, {})
        )
        if (own := next(states, None)) is not None:
            load_optimizer_state_by_name(self.replica.optimizer, self.replica.params, own)
        self.delta.load(resume)
        self._set_out()
