"""The weighted mean of the ranks' gradients in one exchange, and with it what ranks must agree on.

The exchange carries: the gradient arena; BatchNorm-like running buffers; and a small float64 tail with a row per rank
(weight, loss, stop flag, seconds: nobody else writes there, so the sum is a gather) and one presence count per parameter.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from weft.codecs.spec import NONE, parse
from weft.comm.link import Link
from weft.config import FIRST_PART
from weft.errors import TaskError
from weft.patterns.base import NUM_COLUMNS, tail_numel
from weft.patterns.compression import STATE, CompressedArena, check_momentum, make_arena, take_momentum, taken_velocity
from weft.patterns.training import Arena, Exchange, Replica, flat_buffer
from weft.update import Dense, Entry, Rows, Update, multiply

if TYPE_CHECKING:
    from weft.patterns.base import Resume


class Running:
    """Buffers that a training step changes (BatchNorm's statistics): their mean over ranks, weighted; of integers the largest."""

    def __init__(self, replica: Replica, link: Link, elsewhere: Collection[str] = ()) -> None:
        """``elsewhere``: names of those that another worker computes for this share."""
        self.link = link
        self.floats = [b for b in replica.running.values() if b.is_floating_point()]
        self.integers = [b for b in replica.running.values() if not b.is_floating_point()]
        self.elsewhere = [b for n, b in replica.running.items() if n in elsewhere]
        device = replica.ctx.device
        self.staged = [flat_buffer(link, b.numel(), b.dtype, device).view(b.shape) for b in self.floats]

    def stage(self, scale: float) -> list[Tensor]:
        """What to all-reduce together with the rest. ``scale``: this worker's share of the mean."""
        for buffer in self.elsewhere:  # what stands there is of no step: it must not count
            buffer.fill_(0 if buffer.is_floating_point() else torch.iinfo(buffer.dtype).min)
        for staged, buffer in zip(self.staged, self.floats, strict=True):
            torch.mul(buffer, scale, out=staged)
        return self.staged

    def take(self, correction: float) -> None:
        """After that all-reduce, by all ranks."""
        if self.integers:
            self.link.all_reduce(self.integers, op="max")
        if self.floats:
            if correction != 1.0:
                torch._foreach_mul_(self.staged, correction)
            torch._foreach_copy_(self.floats, self.staged)


class JoinedMean(Exchange):
    """Of all ranks of ``link``, who are the workers ``ranks``: of the whole world, or of one island in it."""

    def __init__(self, replica: Replica, link: Link, ranks: Sequence[int] | None = None, compress: str = NONE) -> None:
        self.replica, self.link = replica, link
        self.ranks = ranks or range(link.world)
        self.position = {name: k for k, name in enumerate(replica.names)}
        self.arena: Arena | None = None
        self.compress = compress
        self.took_momentum = False
        self.narrow = compress != NONE and parse(compress).choice.narrow
        self.given: Update | None = None  # own gradients of the last step, if what carries them may overflow
        if link.world == 1:
            return
        self.arena = self._make_arena()
        if compress != NONE:
            self.writers = range(link.world)
        self.tail = flat_buffer(link, tail_numel(link.world, len(self.position)), torch.float64, replica.ctx.device)
        self.rows = self.tail[: link.world * NUM_COLUMNS].view(link.world, NUM_COLUMNS)
        self.presence = self.tail[link.world * NUM_COLUMNS :]
        self.running = self._make_running()

    def _make_running(self) -> Running:
        return Running(self.replica, self.link)

    def _make_arena(self) -> Arena:
        replica, compress = self.replica, self.compress
        dense = {n: p for n, p in replica.params.items() if n not in replica.sparse}
        momentum = take_momentum(replica, compress) if compress != NONE else None
        self.took_momentum = momentum is not None
        steps = replica.ctx.total_steps
        return make_arena(dense, self.link, compress, seed=replica.seed, momentum=momentum, steps=steps)

    def gradients(self, update: Update) -> Update:
        return self._join(update) if self.link.world > 1 else self._alone(update)

    def _alone(self, update: Update) -> Update:
        """The same with nobody to talk to."""
        replica = self.replica
        self.stop = replica.ctx.stop_requested()
        if not replica.joined:
            return update  # it drew nothing in this step
        self._check(replica.report.losses, [update.weight])
        multiply(update.tensors(), replica.joined / update.weight)
        return update

    def _join(self, update: Update) -> Update:
        assert self.arena is not None
        replica, rank = self.replica, self.link.rank
        if self.took_momentum:
            check_momentum(replica.optimizer)
        self._fill_arena(update)
        self.tail.zero_()
        stop = float(replica.ctx.stop_requested())
        own = (update.weight, replica.report.losses[0], stop, replica.seconds)
        self.rows[rank] = torch.tensor(own, dtype=torch.float64, device=self.tail.device)
        if len(update.entries) == len(self.position):
            self.presence.fill_(1.0)
        else:
            self.presence[[self.position[n] for n in update.entries]] = 1.0
        staged = self.running.stage(replica.drawn / replica.joined)

        self._exchange([*staged, self.tail])

        weights, losses, stops, seconds = self.rows.T.tolist()
        replica.report.losses, replica.report.weights = losses, weights
        replica.report.skew_s = max(seconds) - seconds[rank]
        if self.link.world == replica.ctx.world:
            replica.rebalance(seconds)
        self.stop = any(stops)
        if not sum(weights) and self.link.world < replica.ctx.world:
            return Update({}, 0.0, update.version)  # of a small batch this island drew nothing
        self._check(losses, weights)
        present = self.presence.tolist()
        if not all(present):
            self.arena.take_back(n for n, p in zip(self.position, present, strict=True) if not p)
        correction = replica.joined / sum(weights)  # 1 unless shares or the task's own counts are uneven
        multiply(self.arena.sums, correction)  # who holds the only copy of a part has none
        self.running.take(correction)
        self.given = update if self.narrow else None
        return self._combined(update, correction, present)

    def _exchange(self, beside: list[Tensor]) -> None:
        assert self.arena is not None
        self.arena.all_reduce(self.link, beside, self.replica.step)

    def _fill_arena(self, update: Update) -> None:
        """A parameter that this rank's examples did not touch adds nothing to the sum."""
        assert self.arena is not None
        source: list[Tensor] = []
        target: list[Tensor] = []
        for name, view in self.arena.views.items():
            if not self._to_copy(name):
                continue
            entry = update.entries.get(name)
            if entry is None:
                view.zero_()
            else:
                assert isinstance(entry, Dense)
                source.append(entry.tensor)
                target.append(view)
        if target:
            torch._foreach_copy_(target, source)

    def _to_copy(self, name: str) -> bool:
        """Its gradient is not yet in the arena."""
        return True

    def _check(self, losses: list[float], weights: list[float]) -> None:
        if math.isfinite(sum(losses)) and sum(weights) > 0:
            return
        step = self.replica.step
        broken = self.replica.broken()
        if broken and step > 0:
            why = (
                f"the gradients of step {step} were finite and their sum was not, for compress={self.compress} overflows beyond 65504: "
                "use bf16 or int8."
                if self._overflowed()
                else f"a gradient of step {step} was not finite though the loss was. Look for sqrt, log, norm or a division at 0 in the "
                "loss, lower the learning rate, or run with torch.autograd.set_detect_anomaly(True) in the task: it names the operation."
            )
            raise TaskError(
                f"the loss is {losses[0]} at step {step + 1}, for parameters were no numbers before it ({broken[0]!r}, {len(broken)} in "
                f"all): {why}"
            )
        for rank, loss in zip(self.ranks, losses, strict=True):
            if not math.isfinite(loss):
                raise TaskError(
                    f"the loss is {loss} on rank {rank} at step {step + 1}: no update was made. Lower the learning rate, "
                    "set -o clip_norm=1.0, or look at the examples of that step."
                )
        if sum(weights) <= 0:
            raise TaskError(
                f"num_examples added up to {sum(weights)} over all workers at step {step + 1}: it must be positive."
            )

    def _overflowed(self) -> bool:
        """Every rank's own gradients of the last step were finite. All ranks call."""
        if self.given is None:
            return False
        strange = torch.tensor(
            float(not all(t.isfinite().all() for t in self.given.tensors())), device=self.tail.device
        )
        self.link.all_reduce([strange], op="max")
        return not strange

    def _combined(self, update: Update, correction: float, presence: list[float]) -> Update:
        assert self.arena is not None
        entries: dict[str, Entry] = {}
        for name, present in zip(self.position, presence, strict=True):
            if not present:
                continue
            if name in self.arena.views:
                entries[name] = Dense(self.arena.views[name])
            else:
                rows = update.entries[name]
                assert isinstance(rows, Rows)
                entries[name] = self._gather(rows, correction)
        return Update(entries, sum(self.replica.report.weights), update.version)

    def state(self) -> dict[str, Any]:
        return {STATE: state} if self.arena is not None and (state := self.arena.state()) else {}

    def own_state(self) -> dict[str, Any]:
        return {STATE: self.arena.own_state()} if self.arena is not None else {}

    def load(self, resume: Resume) -> None:
        if self.arena is None:
            return
        self.arena.load(resume)
        compressed = STATE in resume.parts[FIRST_PART]["exchange"]
        if isinstance(self.arena, CompressedArena) and self.arena.momentum is not None and not compressed:
            self.arena.begin_with(*taken_velocity(self.replica, self.arena.momentum))

    def _gather(self, rows: Rows, correction: float) -> Rows:
        indices: Tensor = torch.cat(self.link.all_gather(rows.indices))
        values = torch.cat(self.link.all_gather(rows.values)) * correction
        joined = torch.sparse_coo_tensor(indices[None], values, rows.shape, check_invariants=False).coalesce()
        return Rows(joined.indices()[0], joined.values(), rows.shape)
