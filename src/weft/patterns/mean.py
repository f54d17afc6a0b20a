"""The weighted mean of all ranks' gradients in one exchange, and with it what ranks must agree on.

The exchange carries: the gradient arena; BatchNorm-like running buffers; and a small float64 tail with a row per rank
(weight, loss, stop flag, seconds: nobody else writes there, so the sum is a gather) and one presence count per parameter.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from weft.comm.link import Link
from weft.errors import TaskError
from weft.patterns.base import NUM_COLUMNS, tail_numel
from weft.patterns.training import Exchange, Replica, flat_buffer
from weft.update import Dense, Entry, Rows, Update

WEIGHT, LOSS, STOP, SECONDS = range(NUM_COLUMNS)


class JoinedMean(Exchange):
    def __init__(self, replica: Replica, link: Link) -> None:
        self.replica, self.link = replica, link
        self.stop_requested: Callable[[], bool] = replica.ctx.stop_requested
        names = list(replica.params)
        self.position = {name: k for k, name in enumerate(names)}
        device = replica.ctx.device
        self.tail = flat_buffer(link, tail_numel(link.world, len(names)), torch.float64, device)
        self.rows = self.tail[: link.world * NUM_COLUMNS].view(link.world, NUM_COLUMNS)
        self.presence = self.tail[link.world * NUM_COLUMNS :]
        self.floats = [b for b in replica.running.values() if b.is_floating_point()]
        self.integers = [b for b in replica.running.values() if not b.is_floating_point()]
        self.staged = [flat_buffer(link, b.numel(), b.dtype, device).view(b.shape) for b in self.floats]

    def gradients(self, update: Update) -> Update:
        return self._join(update) if self.link.world > 1 else self._alone(update)

    def _alone(self, update: Update) -> Update:
        """The same with nobody to talk to."""
        replica = self.replica
        self.stop = self.stop_requested()
        self._check(replica.report.losses, [update.weight])
        if (correction := replica.joined / update.weight) != 1.0:
            torch._foreach_mul_(update.tensors(), correction)
        return update

    def _join(self, update: Update) -> Update:
        replica, rank = self.replica, self.link.rank
        self._zero_absent(update)
        self.tail.zero_()
        own = self.rows[rank]
        own[WEIGHT], own[LOSS], own[STOP] = update.weight, replica.report.losses[0], float(self.stop_requested())
        own[SECONDS] = replica.seconds
        if len(update.entries) == len(self.position):
            self.presence.fill_(1.0)
        else:
            self.presence[[self.position[n] for n in update.entries]] = 1.0
        for staged, buffer in zip(self.staged, self.floats, strict=True):
            torch.mul(buffer, update.weight / replica.joined, out=staged)

        self.link.all_reduce([*replica.arena.buffers, *self.staged, self.tail])
        if self.integers:
            self.link.all_reduce(self.integers, op="max")

        weights, losses, stops, seconds = self.rows.T.tolist()
        replica.report.losses, replica.report.examples = losses, weights
        replica.report.skew_s = max(seconds) - seconds[rank]
        replica.rebalance(seconds)
        self.stop = any(stops)
        self._check(losses, weights)
        correction = replica.joined / sum(weights)  # 1 unless the task counts examples its own way
        if correction != 1.0:
            torch._foreach_mul_([*replica.arena.buffers, *self.staged], correction)
        if self.floats:
            torch._foreach_copy_(self.floats, self.staged)
        return self._combined(update, correction)

    def _zero_absent(self, update: Update) -> None:
        """A parameter that this rank's examples did not touch adds nothing to the sum."""
        for name, view in self.replica.arena.views.items():
            if name not in update.entries:
                view.zero_()

    def _check(self, losses: list[float], weights: list[float]) -> None:
        step = self.replica.step
        for rank, loss in enumerate(losses):
            if not math.isfinite(loss):
                raise TaskError(
                    f"the loss is {loss} on rank {rank} at step {step + 1}: no update was made. Lower the learning rate, "
                    "set -o clip_norm=1.0, or look at the examples of that step."
                )
        if sum(weights) <= 0:
            raise TaskError(
                f"num_examples added up to {sum(weights)} over all workers at step {step + 1}: it must be positive."
            )

    def _combined(self, update: Update, correction: float) -> Update:
        entries: dict[str, Entry] = {}
        for name, present in zip(self.position, self.presence.tolist(), strict=True):
            if not present:
                continue
            if name in self.replica.arena.views:
                entries[name] = Dense(self.replica.arena.views[name])
            else:
                rows = update.entries[name]
                assert isinstance(rows, Rows)
                entries[name] = self._gather(rows, correction)
        return Update(entries, sum(self.replica.report.examples), update.version)

    def _gather(self, rows: Rows, correction: float) -> Rows:
        indices: Tensor = torch.cat(self.link.all_gather(rows.indices))
        values = torch.cat(self.link.all_gather(rows.values)) * correction
        joined = torch.sparse_coo_tensor(indices[None], values, rows.shape, check_invariants=False).coalesce()
        return Rows(joined.indices()[0], joined.values(), rows.shape)
