"""What a call does where: the copies and sums of each of its rounds, as views into the map.

Making the views costs more than a small call takes, so a plan is made once for each kind of call and kept.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from weft.comm.shm.arrays import BLOCK, Array, Combine, arrays_of, name_of
from weft.comm.shm.region import ARRIVED, HOME_SLOT, LINE, SCRATCH, SIGNATURE, SLOT, Region, align

if TYPE_CHECKING:
    import torch

Area = Callable[[int], int]  # rank -> where its slot, scratch or heap starts in the map
Place = tuple[int, "torch.Size", "torch.dtype"]  # of a buffer; first its offset in the heap, or one of these:
OUTSIDE, SCATTERED = -1, -2  # SCATTERED: not contiguous, so that it is exchanged as a copy


class Copy(NamedTuple):
    """Between ``arrays[buffer][part]`` of a call and ``stage``."""

    copy: Callable[[Array, Array], Any]
    buffer: int
    part: slice
    stage: Array


class Block(NamedTuple):
    """``mine`` becomes all ``parts`` combined, then ``theirs`` become ``mine``."""

    combine: Combine
    parts: Sequence[Array]  # in rank order
    mine: Array
    copy: Callable[[Array, Array], Any]
    theirs: Sequence[Array]


@dataclass
class Round:
    """In the order of work; the first sync comes after ``fill``."""

    fill: list[Copy] = field(default_factory=list)  # into our staging area
    blocks: list[Block] = field(default_factory=list)
    take: list[Copy] = field(default_factory=list)  # out of another rank's memory
    second_sync: bool = True
    drain: list[Copy] = field(default_factory=list)  # out of our own


@dataclass
class Plan:
    """``text`` tells all in which ranks must agree."""

    text: str
    rounds: list[Round] = field(default_factory=list)
    homes: list[Array | None] = field(default_factory=list)  # of the buffers that live in the heap
    scattered: list[int] = field(default_factory=list)  # the buffers that are written back
    nbytes: int = 0
    signature: int = field(init=False)

    def __post_init__(self) -> None:
        digest = hashlib.blake2b(self.text.encode(), digest_size=8).digest()
        self.signature = int.from_bytes(digest, "little", signed=True)


def make_plan(
    region: Region, rank: int, name: str, argument: str | int, places: list[Place], parity: int, purpose: str = ""
) -> Plan:
    """Of all_reduce (``argument`` is the op) or broadcast (it is the root)."""
    layout = _lay_out(region, places, parity)
    if isinstance(argument, int):
        rounds = _broadcast_rounds(region, rank, layout, root=argument)
    else:
        rounds = _reduce_rounds(region, rank, layout, op=argument)
    home, buffers = region.heap(rank), []
    for offset, shape, dtype in places:
        at = f" at heap byte {offset}" if offset >= 0 and not layout.small else ""
        buffers.append(f"{name_of(dtype)}{list(shape)}{at}")
    return Plan(
        (purpose or f"{name}({argument})") + (f" of {' + '.join(buffers)}" if buffers else ""),
        rounds,
        homes=[arrays_of(d).view(region.memory, home + at, s.numel()) if at >= 0 else None for at, s, d in places],
        scattered=[i for i, (offset, _, _) in enumerate(places) if offset == SCATTERED],
        nbytes=sum(shape.numel() * dtype.itemsize for _, shape, dtype in places),
    )


class CallAgain(NamedTuple):
    """``stage`` becomes ``home``; sync; each of ``work`` is called; sync again if a second one is needed."""

    plan: Plan
    signature: int
    my_signature: int  # where it is told: a word, as those of the others
    stage: memoryview
    home: memoryview
    others: Sequence[tuple[int, int]]  # of each: where it counts up, where it tells its signature
    work: Sequence[Callable[[], object]]
    second_sync: bool


CallsAgain = tuple[CallAgain, CallAgain]  # for even and for odd calls


class Kept(NamedTuple):
    """An all-reduce of one buffer in the heap, to be called again.

    ``twin`` shows the memory that the buffer showed then: it may be made to show other memory in place.
    """

    buffer: torch.Tensor  # kept, so that no other has its id
    twin: torch.Tensor
    op: str
    bytes_sent: int
    calls: CallsAgain


def calls_again(region: Region, rank: int, op: str, place: Place) -> CallsAgain:
    offset, shape, dtype = place
    arrays, heap, nbytes = arrays_of(dtype), region.heap(rank) + offset, shape.numel() * dtype.itemsize
    memory, controls = memoryview(region.memory), [region.control(r) // 8 for r in range(region.world)]

    def combining(block: Block) -> Callable[[], object]:
        if len(block.parts) == 2 and (add := arrays.add_two(op)) is not None:
            first, second = block.parts
            return functools.partial(add, first, second, block.mine)
        return functools.partial(block.combine, block.parts, block.mine)

    def call(parity: int) -> CallAgain:
        plan = make_plan(region, rank, "all_reduce", op, [place], parity)
        (only,) = plan.rounds
        told = [(control + ARRIVED, control + SIGNATURE + parity) for control in controls]
        _, my_signature = told.pop(rank)
        if not only.second_sync:
            slot, into = region.slot(rank, parity), arrays.view(region.memory, heap, shape.numel())
            stage, home = memory[slot : slot + nbytes], memory[heap : heap + nbytes]
            work = [combining(block._replace(mine=into)) for block in only.blocks]  # the slots hold what it was
            return CallAgain(plan, plan.signature, my_signature, stage, home, told, work, False)
        work = []
        for block in only.blocks:
            work.append(combining(block))
            work += [functools.partial(block.copy, other, block.mine) for other in block.theirs]
        return CallAgain(plan, plan.signature, my_signature, memory[:0], memory[:0], told, work, True)

    return call(0), call(1)


class _Piece(NamedTuple):
    buffer: int
    part: slice  # of the buffer's elements
    at: slice  # of the stream's elements


@dataclass
class _Stream:
    """Elements of one dtype, one after the other at byte ``offset`` of every rank's area."""

    dtype: torch.dtype
    offset: int
    numel: int = 0
    pieces: list[_Piece] = field(default_factory=list)

    def add(self, buffer: int, part: slice) -> None:
        end = self.numel + part.stop - part.start
        self.pieces.append(_Piece(buffer, part, slice(self.numel, end)))
        self.numel = end

    def views(self, region: Region, area: Area) -> list[Array]:
        """The stream in every rank's area."""
        view = arrays_of(self.dtype).view
        return [view(region.memory, area(rank) + self.offset, self.numel) for rank in range(region.world)]


class _Layout(NamedTuple):
    small: bool  # all fits the slots
    area: Area  # where the rounds are staged
    rounds: list[list[_Stream]]  # at least one
    at_home: list[_Stream]  # not staged: a buffer in the heap each


def _lay_out(region: Region, places: Sequence[Place], parity: int) -> _Layout:
    at_home = not region.crowded and all(offset >= 0 for offset, _, _ in places)
    rounds = _pack(dict(enumerate(places)), HOME_SLOT if at_home else SLOT)
    if len(rounds) <= 1:
        return _Layout(True, functools.partial(region.slot, parity=parity), rounds or [[]], [])
    streams = []
    for buffer, (offset, shape, dtype) in enumerate(places):
        if offset >= 0:
            streams.append(_Stream(dtype, offset))
            streams[-1].add(buffer, slice(0, shape.numel()))
    rounds = _pack({i: place for i, place in enumerate(places) if place[0] < 0}, SCRATCH)
    return _Layout(False, region.scratch, rounds or [[]], streams)


def _pack(places: dict[int, Place], room: int) -> list[list[_Stream]]:
    """Buffers, by dtype and cut where they must be, in rounds of at most ``room`` bytes."""
    rounds: list[list[_Stream]] = []
    used = room
    for dtype in dict.fromkeys(dtype for _, _, dtype in places.values()):
        stream = None
        for buffer, (_, shape, _) in ((i, place) for i, place in places.items() if place[2] == dtype):
            start = 0
            while start < shape.numel():
                begin = used if stream else align(used, LINE)
                fit = (room - begin) // dtype.itemsize
                if fit <= 0:
                    rounds.append([])
                    stream, used = None, 0
                    continue
                if stream is None:
                    stream = _Stream(dtype, begin)
                    rounds[-1].append(stream)
                stop = min(start + fit, shape.numel())
                stream.add(buffer, slice(start, stop))
                used, start = begin + (stop - start) * dtype.itemsize, stop
    return rounds


def _reduce_rounds(region: Region, rank: int, layout: _Layout, op: str) -> list[Round]:
    rounds = []
    for streams in layout.rounds:
        now = Round(second_sync=not layout.small)
        for stream in streams:
            arrays, staged = arrays_of(stream.dtype), stream.views(region, layout.area)
            if layout.small:  # each rank combines all of it, into memory of its own
                result = arrays.empty(stream.numel)
                now.blocks.append(Block(arrays.combine(op), staged, result, arrays.copy, ()))
            else:
                result = staged[rank]
                now.blocks += _chunk_blocks(staged, rank, stream.dtype, op)
            for buffer, part, at in stream.pieces:
                now.fill.append(Copy(arrays.copy, buffer, part, staged[rank][at]))
                now.drain.append(Copy(arrays.copy, buffer, part, result[at]))
        rounds.append(now)
    for stream in layout.at_home:
        rounds[0].blocks += _chunk_blocks(stream.views(region, region.heap), rank, stream.dtype, op)
    return rounds


def _chunk_blocks(views: list[Array], rank: int, dtype: torch.dtype, op: str) -> list[Block]:
    """Chunk ``rank`` of the views, cut between lines, in blocks."""
    numel, world, per_line = len(views[0]), len(views), LINE // dtype.itemsize
    lines, step = -(-numel // per_line), BLOCK // dtype.itemsize
    first, last = (min(numel, lines * r // world * per_line) for r in (rank, rank + 1))
    arrays, blocks = arrays_of(dtype), []
    for start in range(first, last, step):
        parts = [view[start : min(start + step, last)] for view in views]
        theirs = [part for r, part in enumerate(parts) if r != rank]
        blocks.append(Block(arrays.combine(op), parts, parts[rank], arrays.copy, theirs))
    return blocks


def _broadcast_rounds(region: Region, rank: int, layout: _Layout, root: int) -> list[Round]:
    rounds = []
    for streams in layout.rounds:
        now = Round(second_sync=not layout.small)
        for stream in streams:
            copy, staged = arrays_of(stream.dtype).copy, stream.views(region, layout.area)[root]
            copies = [Copy(copy, buffer, part, staged[at]) for buffer, part, at in stream.pieces]
            (now.fill if rank == root else now.take).extend(copies)
        rounds.append(now)
    for stream in layout.at_home if rank != root else ():
        copy, whole = arrays_of(stream.dtype).copy, stream.views(region, region.heap)[root]
        rounds[0].take += [Copy(copy, buffer, part, whole) for buffer, part, _ in stream.pieces]
    return rounds
