"""Collectives over any Endpoint: a Link that picks, by size and speed, how an all-reduce travels.

The algorithms are schedules (schedules.py), which one loop here carries out; small messages among few ranks go straight
to everybody and each adds up in rank order. Every element is summed in an order that depends on sizes and ranks only, and
every rank ends with the same bits.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import TYPE_CHECKING, NamedTuple

from weft.comm.endpoint import Endpoint, Place, Receiving, Sending
from weft.comm.link import DEADLINE_S, Link, Op, Traffic
from weft.comm.schedules import ALIGN, NOBODY, SCHEDULES, Span, Step, broadcast_tree, bytes_sent
from weft.comm.sites import call_site
from weft.comm.wire import Head, Meta, decode_meta
from weft.cost import AUTO, COLLECTIVES, LinkSpeed, choose, choose_broadcast
from weft.errors import CommError, Mismatch

if TYPE_CHECKING:
    import torch

    Combine = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], object]  # the first and the second, into the third

BLOCK_BYTES = 512 << 10  # received and added up piece by piece, so that a piece is still in the cache


class Run(NamedTuple):
    """A stretch of one dtype in a stream of bytes, beginning at byte ``start``."""

    start: int
    tensor: torch.Tensor  # flat

    @property
    def end(self) -> int:
        return self.start + self.tensor.nbytes


class RingLink(Link):
    """A Link over ``endpoint``, whose members ``members`` (by default 0 to world-1) are the ranks; errors speak of members.

    ``collective``: how an all-reduce travels; ``auto`` chooses by ``speed`` (None: nobody measured). Both must be the same
    on all ranks. Tensors of a device pass through the CPU.

    Each frame carries the number, operation, shapes, dtypes and call site of its call. After an error the link is closed:
    the others are told the error and raise it too, whatever they were waiting for, and every later call raises it again.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        rank: int,
        world: int,
        carrier: str = "tcp",
        deadline_s: float = DEADLINE_S,
        *,
        collective: str = AUTO,
        speed: LinkSpeed | None = None,
        members: Sequence[int] = (),
    ) -> None:
        ids = tuple(members) or tuple(range(world))
        others = tuple(k for k in ids if k != ids[rank])
        if endpoint.member != ids[rank] or endpoint.peers != others:
            raise ValueError(
                f"rank {rank} of {world} needs the endpoint of member {ids[rank]} with peers {others}, "
                f"not member {endpoint.member} with peers {endpoint.peers}"
            )
        if collective not in (AUTO, *COLLECTIVES):
            raise ValueError(f"collective {collective!r} is not known, possible: {AUTO}, {', '.join(COLLECTIVES)}")
        self.rank, self.world, self.carrier, self.deadline_s = rank, world, carrier, deadline_s
        self.traffic = Traffic()
        self._endpoint = endpoint
        self._ids = ids
        self._others = others
        self._collective, self._speed = collective, speed
        self._seq = 0
        self._now: _Call | None = None
        self._error: CommError | None = None
        self._staging = _Kept()
        self._scratch = _Kept()
        endpoint.on_unclaimed = self._see_unclaimed

    # The collectives

    def all_reduce(self, buffers: Sequence[torch.Tensor], op: Op = "sum") -> None:
        if op not in _COMBINE:
            raise ValueError(f"op {op!r} is not known, possible: {', '.join(_COMBINE)}")
        if self.world == 1:
            return
        with self._call(f"all_reduce {op}", buffers) as call, self._staged(buffers) as (stream, runs):
            algorithm = self.algorithm_for(len(stream))
            if algorithm == "direct":
                self._all_reduce_direct(call, stream, runs, _COMBINE[op])
            else:
                steps = SCHEDULES[algorithm](self.rank, self.world, len(stream))
                self._follow(call, steps, stream, runs, _COMBINE[op])

    def algorithm_for(self, nbytes: int) -> str:
        """By which an all-reduce of so many bytes travels."""
        return choose(nbytes, self.world, self._speed).algorithm if self._collective == AUTO else self._collective

    def _follow(
        self, call: _Call, steps: Iterable[Step], stream: memoryview, runs: Sequence[Run], combine: Combine
    ) -> None:
        for step in steps:
            sends = {} if step.to == NOBODY else {step.to: [stream[slice(*step.gives)]]}
            if step.source == NOBODY:
                self._step(call, sends, {})
                continue
            lo, hi = step.takes
            if not step.adds:
                self._step(call, sends, {step.source: call.expect([stream[lo:hi]])})
                continue
            size = max(1, hi - lo) if step.overlaps else BLOCK_BYTES
            scratch, block = self._scratch.bytes(size)
            parts = [(start, min(size, hi - start)) for start in range(lo, hi, size)]
            theirs_first = step.source < self.rank  # so that two partners add in the same order

            def add(
                index: int, parts: list[Span] = parts, scratch: torch.Tensor = scratch, first: bool = theirs_first
            ) -> None:
                start, length = parts[index]
                _combine_bytes(combine, runs, start, scratch[:length], first)

            receives = {step.source: call.expect([block[:length] for _, length in parts])}
            self._step(call, sends, receives, None if step.overlaps else add)
            if step.overlaps and parts:  # what is on its way must not change: added to when all of it has left
                add(0)

    def _all_reduce_direct(self, call: _Call, stream: memoryview, runs: Sequence[Run], combine: Combine) -> None:
        stride = math.ceil(len(stream) / ALIGN) * ALIGN
        scratch, view = self._scratch.bytes(self.world * stride)
        rows = {k: slice(k * stride, k * stride + len(stream)) for k in range(self.world)}
        view[rows[self.rank]] = stream
        others = [k for k in range(self.world) if k != self.rank]
        self._step(call, {k: [stream] for k in others}, {k: call.expect([view[rows[k]]]) for k in others})
        first = scratch[rows[0]]
        total = [Run(run.start, first[run.start : run.end].view(run.tensor.dtype)) for run in runs]
        for k in range(1, self.world):
            _combine_bytes(combine, total, 0, scratch[rows[k]])
        stream[:] = view[rows[0]]

    def all_gather(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """Each rank sends to each: as many bytes as round a ring, in one step."""
        mine = tensor.detach().cpu().contiguous()
        gathered = {self._ids[self.rank]: tensor.detach().clone()}
        others = [k for k in range(self.world) if k != self.rank]
        with self._call("all_gather", [tensor], ragged=True) as call:
            place = call.expect_any_length(tensor.dtype, gathered)
            self._step(call, {k: [as_bytes(mine)] for k in others}, dict.fromkeys(others, place))
        return [gathered[k].to(tensor.device) for k in self._ids]

    def send(self, tensor: torch.Tensor) -> None:
        """Nothing comes back, which on a slow link would wait behind what the other sends."""
        self._check_two()
        with self._call(f"message of rank {self.rank}", [tensor], ragged=True) as call:
            self._endpoint.look(self._others, call)
            self._step(call, {1 - self.rank: [as_bytes(tensor)]}, {})

    def receive(self) -> torch.Tensor:
        import torch

        self._check_two()
        came: dict[int, torch.Tensor] = {}
        nothing = torch.empty(0, dtype=torch.uint8)
        with self._call(f"message of rank {1 - self.rank}", [nothing], ragged=True) as call:
            self._step(call, {}, {1 - self.rank: call.expect_any_length(torch.uint8, came)})
        (message,) = came.values()
        return message

    def all_gather_into(self, whole: torch.Tensor, mine: torch.Tensor) -> None:
        if mine.device.type != "cpu" or self.world == 1:
            super().all_gather_into(whole, mine)
            return
        others = [k for k in range(self.world) if k != self.rank]
        with self._call("all_gather_into", [mine]) as call:
            whole[self.rank].copy_(mine)
            receives = {k: call.expect([as_bytes(whole[k])]) for k in others}
            self._step(call, {k: [as_bytes(mine.detach())] for k in others}, receives)

    def reduce_scatter(self, mine: torch.Tensor, given: torch.Tensor) -> None:
        """Each rank sends each the row that is its, which adds up: as many bytes as round a ring, in one step for each piece."""
        if mine.device.type != "cpu" or self.world == 1:
            super().reduce_scatter(mine, given)
            return
        others = [k for k in range(self.world) if k != self.rank]
        with self._call("reduce_scatter", [given]) as call:
            for part in self._pieces(mine):
                total, rows = mine.detach()[part], given.detach()[:, part]
                stride = math.ceil(total.nbytes / ALIGN) * ALIGN
                scratch, view = self._scratch.bytes(self.world * stride)
                places = {k: slice(k * stride, k * stride + total.nbytes) for k in others}
                sends = {k: [as_bytes(rows[k])] for k in others}
                self._step(call, sends, {k: call.expect([view[places[k]]]) for k in others})
                came = [rows[k] if k == self.rank else scratch[places[k]].view(total.dtype) for k in range(self.world)]
                _add(came[0], came[1], total)
                for each in came[2:]:
                    _add(total, each, total)

    def broadcast(self, buffers: Sequence[torch.Tensor], root: int = 0) -> None:
        """The root sends to each, or by a binomial tree; who has no more to say sends empty frames, so that all see a
        mismatch."""
        if not 0 <= root < self.world:
            raise ValueError(f"root {root} is not a rank, possible: 0 to {self.world - 1}")
        with self._call(f"broadcast from {root}", buffers) as call, self._staged(buffers) as (stream, _):
            parent, children = root, [k for k in range(self.world) if k != root] if self.rank == root else []
            if self._broadcast_by(len(stream)) == "tree":
                parent, children = broadcast_tree(self.rank, self.world, root)
            others = [k for k in range(self.world) if k != self.rank]
            begin = time.monotonic()
            receives = {k: self._receive(k, call.expect([stream] if k == parent else [])) for k in others}
            sending = self._send(call, {k: [] for k in others if k not in children})
            if self.rank != root:
                self._wait(call, [receives.pop(parent)], [], begin)
            for child in children:  # one after the other: the first has the most to pass on
                self._wait(call, [], self._send(call, {child: [stream]}), time.monotonic())
            self._wait(call, list(receives.values()), sending, time.monotonic())

    def _broadcast_by(self, nbytes: int) -> str:
        if self._collective in ("direct", "tree"):
            return self._collective
        return choose_broadcast(nbytes, self.world, self._speed)

    def all_reduce_bytes(self, nbytes: int) -> int:
        return bytes_sent(self.algorithm_for(nbytes), self.rank, self.world, nbytes) if self.world > 1 else 0

    def pace(self, bytes_per_s: float) -> None:
        self._endpoint.pace(bytes_per_s)

    def interrupt(self, error: CommError) -> None:
        self._endpoint.interrupt(error)

    def fail(self, error: CommError) -> None:
        self._error = self._error or error
        self._endpoint.close(error)

    def close(self) -> None:
        self._endpoint.close(self._error)

    # What they share

    @contextmanager
    def _call(self, op: str, tensors: Sequence[torch.Tensor], ragged: bool = False) -> Iterator[_Call]:
        """Number and name the call, keep the time; tell the others if it fails."""
        if self._error is not None:
            raise self._error
        self._seq += 1
        begin, waited = time.monotonic(), self.traffic.wait_s
        op = self.purpose or op
        shapes, dtypes = tuple(tuple(t.shape) for t in tensors), tuple(str(t.dtype)[6:] for t in tensors)
        meta = Meta(op, shapes, dtypes, tag=call_site())
        self._now = _Call(self._ids[self.rank], self._seq, meta, begin + self.deadline_s, ragged)
        self.traffic.call(self._seq, meta)
        try:
            yield self._now
            self.traffic.call(self._seq, None)
        except BaseException as error:
            # Also one of ours or of torch: frames may be half-way, nobody can go on from here.
            self.fail(
                error if isinstance(error, CommError) else CommError(f"{op} failed: {error!r}", (self._now.rank,))
            )
            raise
        finally:
            self._now = None
            self.traffic.busy_s += time.monotonic() - begin - (self.traffic.wait_s - waited)

    def _step(
        self,
        call: _Call,
        sends: dict[int, list[memoryview]],
        receives: dict[int, Place],
        filled: Callable[[int], None] | None = None,
    ) -> None:
        """Send and receive one frame to and from each rank named, all at once."""
        begin = time.monotonic()
        receiving = [self._receive(rank, place, filled) for rank, place in receives.items()]
        self._wait(call, receiving, self._send(call, sends), begin)

    def _receive(self, rank: int, place: Place, filled: Callable[[int], None] | None = None) -> Receiving:
        return self._endpoint.irecv(self._ids[rank], place, filled)

    def _send(self, call: _Call, sends: dict[int, list[memoryview]]) -> list[Sending]:
        self.traffic.messages += len(sends)
        self.traffic.bytes_sent += sum(len(view) for views in sends.values() for view in views)
        return [self._endpoint.isend(self._ids[k], call.seq, call.encoded, views) for k, views in sends.items()]

    def _wait(self, call: _Call, receiving: list[Receiving], sending: list[Sending], begin: float) -> None:
        """Until all is done. The time until the last frame came is waiting, not work."""
        self._endpoint.wait([*receiving, *sending], call.until, watch=self._others, doing=call)
        came = max((r.began for r in receiving), default=begin)
        self.traffic.waited(begin, max(begin, came))

    def _see_unclaimed(self, peer: int, head: Head) -> None:
        """A frame that we do not wait for: of the peer's next call, or of another call than ours, which may wait for us
        while we wait for a third."""
        if self._now is not None and head.seq == self._now.seq:
            self._now.check(head)

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

    def __init__(self, rank: int, seq: int, meta: Meta, until: float, ragged: bool) -> None:
        self.rank, self.seq, self.meta, self.until, self.ragged = rank, seq, meta, until, ragged
        self.encoded = meta.encode()

    def __str__(self) -> str:
        return f"{self.meta}, call {self.seq} of rank {self.rank}"

    def expect(self, views: Sequence[memoryview]) -> Place:
        """A frame of this very call, into ``views``."""

        def place(head: Head) -> Sequence[memoryview]:
            self.check(head)
            return views

        return place

    def expect_any_length(self, dtype: torch.dtype, into: dict[int, torch.Tensor]) -> Place:
        """A frame of this very call, with a tensor of whatever length, which is put ``into`` by who sent it."""
        import torch

        def place(head: Head) -> list[memoryview]:
            shape = self.check(head).shapes[0]
            if math.prod(shape) * dtype.itemsize != head.payload_bytes:
                raise CommError(f"rank {head.sender} sent {head.payload_bytes} bytes as {list(shape)}", (head.sender,))
            try:
                into[head.sender] = torch.empty(shape, dtype=dtype)
            except RuntimeError as error:  # no memory for it
                raise CommError(
                    f"rank {head.sender} sent a tensor of shape {shape}: {error}", (head.sender,)
                ) from error
            return [as_bytes(into[head.sender])]

        return place

    def check(self, head: Head) -> Meta:
        """What the frame is about. Mismatch if not this very call, from wherever in the code."""
        if head.seq == self.seq and head.meta == self.encoded:
            return self.meta
        their = decode_meta(head.meta)
        if head.seq != self.seq or self._compared(their) != self._compared(self.meta):
            raise Mismatch(
                f"ranks disagree: {_said(self.rank, self.meta, self.seq)}, {_said(head.sender, their, head.seq)}",
                tuple(sorted((self.rank, head.sender))),
            )
        return their

    def _compared(self, meta: Meta) -> tuple[object, ...]:
        """In which ranks must agree: in a ragged gather, in all but the length."""
        shapes = tuple((len(s), s[1:]) for s in meta.shapes) if self.ragged else meta.shapes
        return meta.op, meta.dtypes, shapes


def _said(rank: int, meta: Meta, seq: int) -> str:
    return f"rank {rank} called {meta} at {meta.tag} (its call {seq})"


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


def _add(first: torch.Tensor, second: torch.Tensor, into: torch.Tensor) -> None:
    import torch

    torch.add(first, second, out=into)


def _max(first: torch.Tensor, second: torch.Tensor, into: torch.Tensor) -> None:
    import torch

    torch.maximum(first, second, out=into)


_COMBINE: dict[Op, Combine] = {"sum": _add, "max": _max}


def _combine_bytes(
    combine: Combine, runs: Sequence[Run], start: int, block: torch.Tensor, theirs_first: bool = False
) -> None:
    """Combine a block of bytes, which belongs at ``start`` of the stream, into the runs it touches."""
    for run in runs:
        lo, hi = max(start, run.start), min(start + block.numel(), run.end)
        if lo < hi:
            size = run.tensor.element_size()
            mine = run.tensor[(lo - run.start) // size : (hi - run.start) // size]
            theirs = block[lo - start : hi - start].view(mine.dtype)
            combine(*((theirs, mine) if theirs_first else (mine, theirs)), mine)
