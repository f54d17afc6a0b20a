"""The joined mean, begun during backward: gradients leave in buckets, the last parameters' first, as soon as they are there.

Backward comes to the last layers first, so their exchange can go on while the earlier ones are computed (Sergeev & Del Balso
2018; Li et al. 2020). All ranks send the same buckets in one fixed order: a bucket leaves when all its gradients are there and
all before it have left; what is not there at the end of backward, because this rank's examples did not touch it, leaves as
zeros then. The last bucket takes along what ranks tell each other beside the gradients, so nothing of that depends on overlap.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from weft.comm.background import Background, Hidden
from weft.comm.link import Link
from weft.cost import cut_buckets
from weft.errors import TaskError
from weft.patterns.mean import JoinedMean
from weft.patterns.training import Arena, Replica
from weft.update import Update


class BucketArena(Arena):
    """``watch`` before the backward of a step; then gradients are copied here as they come, and sent."""

    def __init__(self, params: Mapping[str, nn.Parameter], link: Link, bucket_bytes: int) -> None:
        super().__init__(params, link)
        self.background = Background(link)
        self.hidden = Hidden(0.0, 0.0)  # of the newest exchange
        self.arrived: set[str] = set()  # gradients of this step that were copied during backward
        self.watching = False
        names = list(params)
        parts = cut_buckets([self.views[name].nbytes for name in names], bucket_bytes)
        self.bucket_of = {names[k]: number for number, part in enumerate(parts) for k in part}
        self.sizes = [len(part) for part in parts]
        self.buckets = [self._slices([self.views[names[k]] for k in part]) for part in parts]
        self.num_left = 0  # buckets that have left
        for name, p in params.items():
            p.register_post_accumulate_grad_hook(partial(self._arrive, name))

    def _slices(self, views: Sequence[Tensor]) -> list[Tensor]:
        """Neighbours of one dtype are one stretch of its buffer."""
        slices = []
        for buffer in self.buffers:
            if own := [v for v in views if v.dtype == buffer.dtype]:
                start = min(v.storage_offset() for v in own) - buffer.storage_offset()
                slices.append(buffer[start : start + sum(v.numel() for v in own)])
        return slices

    def watch(self) -> None:
        self.watching, self.num_left = True, 0
        self.arrived.clear()
        self.missing = list(self.sizes)

    def _arrive(self, name: str, p: Tensor) -> None:
        """Called by autograd when the gradient of a parameter is whole."""
        if not self.watching or p.grad is None or p.grad.is_sparse:
            return
        number = self.bucket_of[name]
        if number < self.num_left:
            self.watching = False
            raise TaskError(
                f"the gradient of {name} came a second time in one backward, after it had been sent (as reentrant checkpointing "
                "does): use -o overlap=off, or checkpoint with use_reentrant=False."
            )
        self.views[name].copy_(p.grad)
        if name in self.arrived:
            return
        self.arrived.add(name)
        self.missing[number] -= 1
        while self.num_left < len(self.buckets) - 1 and not self.missing[self.num_left]:
            self._leave()

    def _leave(self) -> None:
        self.background.all_reduce(self.buckets[self.num_left])
        self.num_left += 1

    def all_reduce(self, link: Link, beside: Sequence[Tensor], number: int) -> None:
        self.watching = False
        while self.num_left < len(self.buckets) - 1:
            self._leave()
        self.hidden = self.background.join()
        link.all_reduce([*self.buckets[-1], *beside])
        self.num_left = 0
        self.arrived.clear()


class OverlappedMean(JoinedMean):
    """The same numbers as JoinedMean, but for the order in which more than two ranks are added up."""

    arena: BucketArena

    def __init__(self, replica: Replica, link: Link, bucket_bytes: int) -> None:
        self.bucket_bytes = bucket_bytes
        super().__init__(replica, link)
        replica.before_last_backward = self.arena.watch

    def _make_arena(self) -> BucketArena:
        dense = {n: p for n, p in self.replica.params.items() if n not in self.replica.sparse}
        return BucketArena(dense, self.link, self.bucket_bytes)

    @torch.no_grad()
    def gradients(self, update: Update) -> Update:
        joined = super().gradients(update)
        report, hidden = self.replica.report, self.arena.hidden
        report.exchange_s -= hidden.busy_s  # what is left stood in the way of a step
        report.wait_s -= hidden.wait_s
        report.hidden_s = hidden.busy_s + hidden.wait_s
        return joined

    def _to_copy(self, name: str) -> bool:
        return name not in self.arena.arrived

    def close(self) -> None:
        self.arena.watching = False
        self.arena.background.close()
