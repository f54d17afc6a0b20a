"""torch's process groups on Weft's links, so that fully_shard, DTensor and pipelines move their data over whatever carrier joins the
workers, and are counted, traced, checked and given deadlines as all else is.

The one place that knows how a backend is made: torch calls it stable only for C++. tests/comm/test_torch_backend.py holds it to
what the split patterns need. Calls are done when they return, so a Work is a future that is there.
"""

# mypy: disable-error-code="override"
# (torch's stubs list two ways to call each collective; a backend is called in the first)

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import HashStore, _create_work_from_future  # type: ignore[attr-defined]
from torch.futures import Future

from weft.comm.link import Link, SoloLink
from weft.errors import CommError, Incompatible

BACKEND = "weft"
#: Of the default group that torch is about to make, by rank: its constructor takes no argument of ours.
_LINKS: dict[tuple[int, ...], Link] = {}


class LinkGroup(dist.ProcessGroup):
    """One rank's end of a group. ``links``: of this group and of all others that this rank stands in, by their ranks in the world."""

    def __init__(self, links: Mapping[tuple[int, ...], Link], ranks: tuple[int, ...]) -> None:
        self.link, self.links = links[ranks], links
        super().__init__(self.link.rank, self.link.world)  # type: ignore[call-arg]  # a group of Python has no store

    def new_group(self, ranks: Sequence[int], **_: Any) -> LinkGroup | None:
        """As torch's default group is asked; all ranks ask for all groups."""
        if self.link.rank not in ranks:
            return None
        if len(ranks) == 1:
            return LinkGroup({tuple(ranks): SoloLink()}, tuple(ranks))
        if tuple(ranks) not in self.links:
            raise CommError(f"workers {list(ranks)} have no link of their own: Pattern.groups must ask for it.")
        return LinkGroup(self.links, tuple(ranks))

    def getBackendName(self) -> str:
        return BACKEND

    @property
    def group_name(self) -> str:
        """By which functional collectives (DTensor's) find it. torch's own asks a C++ backend, which there is none."""
        return str(dist.distributed_c10d._world.pg_names[self])

    def allreduce(self, tensors: Sequence[Tensor], opts: Any = None) -> Any:
        self._reduce(tensors, opts)
        return done(list(tensors))

    def allreduce_coalesced(self, tensors: Sequence[Tensor], opts: Any = None) -> Any:
        return self.allreduce(tensors, opts)

    def _reduce(self, tensors: Sequence[Tensor], opts: Any) -> None:
        op = opts.reduceOp if opts is not None else dist.ReduceOp.SUM
        if op == dist.ReduceOp.MAX:
            self.link.all_reduce(tensors, "max")
        elif op == dist.ReduceOp.MIN:
            negative = [-t for t in tensors]
            self.link.all_reduce(negative, "max")
            for tensor, n in zip(tensors, negative, strict=True):
                torch.neg(n, out=tensor)
        elif (
            op == dist.ReduceOp.SUM or op == dist.ReduceOp.AVG
        ):  # not `in`: a ReduceOp equals its kind, and not the reverse
            self.link.all_reduce(tensors)
            if op == dist.ReduceOp.AVG:
                torch._foreach_div_(list(tensors), self.link.world)
        else:
            raise Incompatible(f"reduction {op} over Weft's links is not possible: sum, avg, max and min are.")

    def all_gather_single(self, output: Tensor, mine: Tensor, opts: Any = None) -> Any:
        self.link.all_gather_into(output.view(self.link.world, -1), mine.reshape(-1))
        return done(output)

    def all_gather_single_coalesced(self, outputs: Sequence[Tensor], inputs: Sequence[Tensor], opts: Any = None) -> Any:
        for output, mine in zip(outputs, inputs, strict=True):
            self.all_gather_single(output, mine)
        return done(list(outputs))

    def allgather(self, outputs: Sequence[Sequence[Tensor]], inputs: Sequence[Tensor], opts: Any = None) -> Any:
        for into, mine in zip(outputs, inputs, strict=True):
            for output, part in zip(into, self.link.all_gather(mine.reshape(-1)), strict=True):
                output.copy_(part.view(output.shape))
        return done([list(into) for into in outputs])

    def reduce_scatter_single(self, output: Tensor, given: Tensor, opts: Any = None) -> Any:
        op, rows = opts.reduceOp if opts is not None else dist.ReduceOp.SUM, given.reshape(self.link.world, -1)
        if op == dist.ReduceOp.SUM or op == dist.ReduceOp.AVG:
            self.link.reduce_scatter(output.view(-1), rows)
            if op == dist.ReduceOp.AVG:
                output.div_(self.link.world)
        else:  # seldom, and never in a step
            whole = rows.clone()
            self._reduce([whole], opts)
            output.view(-1).copy_(whole[self.link.rank])
        return done(output)

    def reduce_scatter_single_coalesced(
        self, outputs: Sequence[Tensor], inputs: Sequence[Tensor], opts: Any = None
    ) -> Any:
        for output, given in zip(outputs, inputs, strict=True):
            self.reduce_scatter_single(output, given, opts)
        return done(list(outputs))

    def broadcast(self, tensors: Sequence[Tensor], opts: Any = None) -> Any:
        self.link.broadcast(tensors, opts.rootRank if opts is not None else 0)
        return done(list(tensors))

    def scatter(self, outputs: Sequence[Tensor], inputs: Sequence[Sequence[Tensor]], opts: Any = None) -> Any:
        """Seldom, and never in a step: as a broadcast, of which each keeps its part."""
        root, (output,) = opts.rootRank if opts is not None else 0, outputs
        numel = output.numel()
        whole = output.new_empty(self.link.world * numel)
        if self.link.rank == root:
            torch.cat([part.reshape(-1) for part in inputs[0]], out=whole)
        self.link.broadcast([whole], root)
        output.copy_(whole[self.link.rank * numel : (self.link.rank + 1) * numel].view(output.shape))
        return done(list(outputs))

    def barrier(self, opts: Any = None) -> Any:
        self.link.barrier()
        return done([])


def done(value: Any) -> Any:
    """A Work that has ended with ``value``."""
    future: Future[Any] = Future()
    future.set_result(value)
    return _create_work_from_future(future)


def _make(store: Any, rank: int, world: int, timeout: Any) -> LinkGroup:
    return LinkGroup(dict(_LINKS), tuple(range(world)))


@contextmanager
def process_groups(world: Link, groups: Mapping[tuple[int, ...], Link] | None = None) -> Iterator[None]:
    """torch's default group, of all ranks of ``world``, for as long as this lasts; torch can then make those of ``groups``, too.

    One at a time in a process, since torch keeps it in a global; where there is one already, CommError.
    """
    if dist.is_initialized():
        raise CommError("this process has a default process group of torch.distributed already: leave that to Weft.")
    if BACKEND.upper() not in dist.Backend._plugins:
        dist.Backend.register_backend(BACKEND, _make, devices=["cpu"])
    _LINKS.update(groups or {})
    _LINKS[tuple(range(world.world))] = world
    try:
        # nobody meets in this store: links know their members
        dist.init_process_group(BACKEND, store=HashStore(), rank=world.rank, world_size=world.world)
    finally:
        _LINKS.clear()
    try:
        yield
    finally:
        dist.destroy_process_group()
