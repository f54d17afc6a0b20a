"""Collectives over any Endpoint. A large all-reduce goes round a ring: reduce-scatter, then all-gather.

Each rank sends 2(W-1)/W of the buffers in 2(W-1) steps (Patarasuk & Yuan 2009: bandwidth-optimal, latency linear in W).
A small one goes straight to everybody and each rank adds up in rank order: one step, W-1 times the buffers. Every
element is summed in an order that depends on sizes and ranks only, and every rank ends with the same bits.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby, pairwise
from typing import TYPE_CHECKING, NamedTuple

from weft.comm.endpoint import Endpoint, Place
from weft.comm.link import DEADLINE_S, Link, Op, Traffic
from weft.comm.wire import Head, Meta, decode_meta
from weft.cost import SMALL_BYTES
from weft.errors import CommError, Mismatch

if TYPE_CHECKING:
    import torch

    Combine = Callable[[torch.Tensor, torch.Tensor], None]  # the second into the first

BLOCK_BYTES = 512 << 10  # received and added up piece by piece, so that a piece is still in the cache
ALIGN = 64  # chunks begin at multiples of this: of every dtype's size, and of a cache line


def chunk_bounds(num_bytes: int, world: int) -> list[int]:
    """Where the ``world`` chunks of a buffer begin and end, from its size alone; late chunks may be empty."""
    per_chunk = math.ceil(num_bytes / world / ALIGN) * ALIGN
    return [min(k * per_chunk, num_bytes) for k in range(world + 1)]


class Run(NamedTuple):
    """A stretch of one dtype in a stream of bytes, beginning at byte ``start``."""

    start: int
    tensor: torch.Tensor  # flat

    @property
    def end(self) -> int:
        return self.start + self.tensor.nbytes


class RingLink(Link):
    """A Link over ``endpoint``, whose members 0 to world-1 are the ranks. Tensors of a device pass through the CPU.

    Each frame carries the number, operation, shapes and dtypes of its call. After an error the link is closed: the
    others are told the error and raise it too, whatever they were waiting for, and every later call raises it again.
    """

    def __init__(
        self, endpoint: Endpoint, rank: int, world: int, carrier: str = "tcp", deadline_s: float = DEADLINE_S
    ) -> None:
        others = tuple(k for k in range(world) if k != rank)
        if endpoint.member != rank or endpoint.peers != others:
            raise ValueError(
                f"rank {rank} of {world} needs the endpoint of member {rank} with peers {others}, "
                f"not member {endpoint.member} with peers {endpoint.peers}"
            )
        self.rank, self.world, self.carrier, self.deadline_s = rank, world, carrier, deadline_s
        self.traffic = Traffic()
        self._endpoint = endpoint
        self._others = others
        self._seq = 0
        self._error: CommError | None = None
        self._staging = _Kept()
        self._scratch = _Kept()

    # The collectives

    def all_reduce(self, buffers: Sequence[torch.Tensor], op: Op = "sum") -> None:
        if op not in _COMBINE:
            raise ValueError(f"op {op!r} is not known, possible: {', '.join(_COMBINE)}")
        if self.world == 1:
            return
        combine = _COMBINE[op]
        with self._call(f"all_reduce {op}", buffers) as call, self._staged(buffers) as (stream, runs):
            if len(stream) <= SMALL_BYTES:
                self._all_reduce_small(call, stream, runs, combine)
            else:
                self._all_reduce_ring(call, stream, runs, combine)

    def _all_reduce_ring(self, call: _Call, stream: memoryview, runs: Sequence[Run], combine: Combine) -> None:
        bounds = list(pairwise(chunk_bounds(len(stream), self.world)))
        right, left = (self.rank + 1) % self.world, (self.rank - 1) % self.world
        scratch, block = self._scratch.bytes(BLOCK_BYTES)

        # Reduce-scatter: in step s, chunk rank-s goes on to the right, the one before comes and is added to ours.
        for step in range(self.world - 1):
            send_lo, send_hi = bounds[(self.rank - step) % self.world]
            lo, hi = bounds[(self.rank - step - 1) % self.world]
            starts = range(lo, hi, BLOCK_BYTES)

            def add(index: int, starts: range = starts, hi: int = hi) -> None:
                start = starts[index]
                _combine_bytes(combine, runs, start, scratch[: min(BLOCK_BYTES, hi - start)])

            views = [block[: min(BLOCK_BYTES, hi - start)] for start in starts]
            self._step(call, {right: [stream[send_lo:send_hi]]}, {left: call.expect(views)}, add)

        # All-gather: each rank has one chunk of the sum, rank+1; the chunks go round once more.
        for step in range(self.world - 1):
            send_lo, send_hi = bounds[(self.rank + 1 - step) % self.world]
            lo, hi = bounds[(self.rank - step) % self.world]
            self._step(call, {right: [stream[send_lo:send_hi]]}, {left: call.expect([stream[lo:hi]])})

    def _all_reduce_small(self, call: _Call, stream: memoryview, runs: Sequence[Run], combine: Combine) -> None:
        stride = math.ceil(len(stream) / ALIGN) * ALIGN
        scratch, view = self._scratch.bytes(self.world * stride)
        rows = {k: slice(k * stride, k * stride + len(stream)) for k in range(self.world)}
        view[rows[self.rank]] = stream
        receives = {k: call.expect([view[rows[k]]]) for k in self._others}
        self._step(call, {k: [stream] for k in self._others}, receives)
        first = scratch[rows[0]]
        total = [Run(run.start, first[run.start : run.end].view(run.tensor.dtype)) for run in runs]
        for k in range(1, self.world):
            _combine_bytes(combine, total, 0, scratch[rows[k]])
        stream[:] = view[rows[0]]

    def all_gather(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        import torch

        mine = tensor.detach().cpu().contiguous()
        gathered = {self.rank: tensor.detach().clone()}
        with self._call("all_gather", [tensor]) as call:

            def place(head: Head) -> list[memoryview]:
                shape = call.check_ragged(head)
                if math.prod(shape) * tensor.element_size() != head.payload_bytes:
                    raise CommError(
                        f"rank {head.sender} sent {head.payload_bytes} bytes as {list(shape)}", (head.sender,)
                    )
                try:
                    gathered[head.sender] = torch.empty(shape, dtype=tensor.dtype)
                except RuntimeError as error:  # no memory for it
                    raise CommError(
                        f"rank {head.sender} sent a tensor of shape {shape}: {error}", (head.sender,)
                    ) from error
                return [as_bytes(gathered[head.sender])]

            self._step(call, {k: [as_bytes(mine)] for k in self._others}, dict.fromkeys(self._others, place))
        return [gathered[k].to(tensor.device) for k in range(self.world)]

    def broadcast(self, buffers: Sequence[torch.Tensor], root: int = 0) -> None:
        """The root sends to each (W-1 times the buffers); the others send empty frames, so that all see a mismatch."""
        if not 0 <= root < self.world:
            raise ValueError(f"root {root} is not a rank, possible: 0 to {self.world - 1}")
        with self._call(f"broadcast from {root}", buffers) as call, self._staged(buffers) as (stream, _):
            mine = [stream] if self.rank == root else []
            receives = {k: call.expect([stream] if k == root else []) for k in self._others}
            self._step(call, dict.fromkeys(self._others, mine), receives)

    def all_reduce_bytes(self, nbytes: int) -> int:
        if self.world == 1:
            return 0
        if nbytes <= SMALL_BYTES:
            return (self.world - 1) * nbytes
        sizes = [hi - lo for lo, hi in pairwise(chunk_bounds(nbytes, self.world))]
        # Of all chunks, the reduce-scatter leaves out rank+1, the all-gather rank+2.
        return 2 * nbytes - sizes[(self.rank + 1) % self.world] - sizes[(self.rank + 2) % self.world]

    def pace(self, bytes_per_s: float) -> None:
        self._endpoint.pace(bytes_per_s)

    def close(self) -> None:
        self._endpoint.close(self._error)

    # What they share

    @contextmanager
    def _call(self, op: str, tensors: Sequence[torch.Tensor]) -> Iterator[_Call]:
        """Number and name the call, keep the time; tell the others if it fails."""
        if self._error is not None:
            raise self._error
        self._seq += 1
        begin, waited = time.monotonic(), self.traffic.wait_s
        meta = Meta(op, tuple(tuple(t.shape) for t in tensors), tuple(str(t.dtype)[6:] for t in tensors))
        self.traffic.call(self._seq, meta)
        try:
            yield _Call(self.rank, self._seq, meta, begin + self.deadline_s)
            self.traffic.call(self._seq, None)
        except BaseException as error:
            # Also one of ours or of torch: frames may be half-way, nobody can go on from here.
            self._error = error if isinstance(error, CommError) else CommError(f"{op} failed: {error!r}", (self.rank,))
            self._endpoint.close(self._error)
            raise
        finally:
            self.traffic.busy_s += time.monotonic() - begin - (self.traffic.wait_s - waited)

    def _step(
        self,
        call: _Call,
        sends: dict[int, list[memoryview]],
        receives: dict[int, Place],
        filled: Callable[[int], None] | None = None,
    ) -> None:
        """Send and receive one frame to and from each peer named, all at once."""
        begin = time.monotonic()
        receiving = [self._endpoint.irecv(k, place, filled) for k, place in receives.items()]
        sending = [self._endpoint.isend(k, call.seq, call.encoded, views) for k, views in sends.items()]
        self.traffic.messages += len(sends)
        self.traffic.bytes_sent += sum(len(view) for views in sends.values() for view in views)
        self._endpoint.wait([*receiving, *sending], call.until, watch=self._others, doing=str(call))
        came = max((r.began for r in receiving), default=begin)
        self.traffic.waited(begin, max(begin, came))

    @contextmanager
    def _staged(self, buffers: Sequence[torch.Tensor]) -> Iterator[tuple[memoryview, list[Run]]]:
        """The buffers as one stream of bytes, grouped by dtype. A single flat buffer is used where it lies."""
        tensors = [b.detach() for b in buffers if b.numel()]
        if len(tensors) == 1 and tensors[0].is_contiguous() and tensors[0].device.type == "cpu":
            flat = tensors[0].view(-1)
            yield as_bytes(flat), [Run(0, flat)]
            return
        tensors.sort(key=lambda t: (-t.element_size(), str(t.dtype)))  # the widest first: all stay aligned
        staging, view = self._staging.bytes(sum(t.nbytes for t in tensors))
        runs: list[Run] = []
        parts: list[torch.Tensor] = []
        start = 0
        for dtype, group in groupby(tensors, key=lambda t: t.dtype):
            run_start = start
            for tensor in group:
                part = staging[start : start + tensor.nbytes].view(dtype).view(tensor.shape)
                parts.append(part.copy_(tensor))
                start += tensor.nbytes
            runs.append(Run(run_start, staging[run_start:start].view(dtype)))
        yield view, runs
        for tensor, part in zip(tensors, parts, strict=True):
            tensor.copy_(part)


class _Call:
    """One collective call on this rank: its number, what it is, and when it must be over."""

    def __init__(self, rank: int, seq: int, meta: Meta, until: float) -> None:
        self.rank, self.seq, self.meta, self.until = rank, seq, meta, until
        self.encoded = meta.encode()

    def __str__(self) -> str:
        return f"{self.meta}, call {self.seq} of rank {self.rank}"

    def expect(self, views: Sequence[memoryview]) -> Place:
        """A frame of this very call, into ``views``."""

        def place(head: Head) -> Sequence[memoryview]:
            if head.seq != self.seq or head.meta != self.encoded:
                raise self._mismatch(head)
            return views

        return place

    def check_ragged(self, head: Head) -> tuple[int, ...]:
        """The shape that the sender brings to this all_gather: as ours, but for the length in dim 0."""
        their = decode_meta(head.meta)
        if head.seq != self.seq or _but_length(their) != _but_length(self.meta):
            raise self._mismatch(head)
        return their.shapes[0]

    def _mismatch(self, head: Head) -> Mismatch:
        their = decode_meta(head.meta)
        return Mismatch(
            f"ranks disagree: rank {self.rank} called {self.meta} (its call {self.seq}), "
            f"rank {head.sender} called {their} (its call {head.seq})",
            tuple(sorted((self.rank, head.sender))),
        )


def _but_length(meta: Meta) -> tuple[object, ...]:
    return meta.op, meta.dtypes, [(len(shape), shape[1:]) for shape in meta.shapes]


class _Kept:
    """Memory that stays: it grows to the largest size asked for, and is not zeroed."""

    def __init__(self) -> None:
        self._tensor: torch.Tensor | None = None

    def bytes(self, num_bytes: int) -> tuple[torch.Tensor, memoryview]:
        import torch

        if self._tensor is None or self._tensor.numel() < num_bytes:
            self._tensor = torch.empty(num_bytes, dtype=torch.uint8)
        part = self._tensor[:num_bytes]
        return part, as_bytes(part)


def as_bytes(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor of any dtype."""
    import torch

    return tensor.view(-1).view(torch.uint8).numpy().data


def _add(mine: torch.Tensor, theirs: torch.Tensor) -> None:
    mine.add_(theirs)


def _max(mine: torch.Tensor, theirs: torch.Tensor) -> None:
    import torch

    torch.maximum(mine, theirs, out=mine)


_COMBINE: dict[Op, Combine] = {"sum": _add, "max": _max}


def _combine_bytes(combine: Combine, runs: Sequence[Run], start: int, block: torch.Tensor) -> None:
    """Combine a block of bytes, which belongs at ``start`` of the stream, into the runs it touches."""
    for run in runs:
        lo, hi = max(start, run.start), min(start + block.numel(), run.end)
        if lo < hi:
            size = run.tensor.element_size()
            mine = run.tensor[(lo - run.start) // size : (hi - run.start) // size]
            combine(mine, block[lo - start : hi - start].view(mine.dtype))
