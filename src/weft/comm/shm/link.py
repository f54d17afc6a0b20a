"""One rank's end of the map: calls, the syncs between them, and errors that all ranks learn of."""

from __future__ import annotations

import contextlib
import functools
import math
import os
import select
import threading
import time
from collections.abc import Callable, Hashable, Sequence
from time import perf_counter
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import msgspec

from weft.comm.link import DEADLINE_S, Link, Op, Traffic, late_error, name_ranks
from weft.comm.shm.arrays import BLOCK, Array, arrays_of, flat_of, name_of, write_back
from weft.comm.shm.plan import OUTSIDE, SCATTERED, CallsAgain, Kept, Plan, calls_again, make_plan
from weft.comm.shm.region import (
    ARRIVED,
    BROKEN,
    CLOSED,
    DEAD,
    GAVE_UP,
    LAST_WORDS,
    LENGTH,
    LINE,
    PAGE,
    PID,
    SCRATCH,
    SIGNATURE,
    SLOT,
    TEXT,
    TEXT_BYTES,
    Region,
    align,
)
from weft.comm.sites import call_site
from weft.errors import CommError, Mismatch, PeerLost, from_wire, to_wire

if TYPE_CHECKING:
    import torch

T = TypeVar("T")

SPINS = 2000  # looks at a counter, about 60 us in all, before the core is offered to others
GLANCES = 12  # of these looks before the clock is asked; half a microsecond
YIELD_S = 2e-3  # then this long of sched_yield, then naps
NAP_S, NAP_PART, MAX_NAP_S = 50e-6, 1 / 16, 1e-3  # a nap is a part of what has been waited so far
MAX_PLANS = 256
TELL_S = 1.0  # for all to say where they called what others did not


class ShmLink(Link):
    """``rank``'s end of ``region``, made after the fork in the rank's own process. One call at a time.

    ``members``: what errors call the ranks (by default 0 to world-1).
    Who raises an error writes it into the map, and all raise the same; what was being exchanged is then undefined, and
    the link of no more use.
    """

    carrier = "shm"

    def __init__(
        self, region: Region, rank: int, deadline_s: float = DEADLINE_S, *, members: Sequence[int] = ()
    ) -> None:
        import torch

        self._ids = tuple(members) or tuple(range(region.world))

        self.region, self.rank, self.world, self.deadline_s = region, rank, region.world, deadline_s
        self.traffic = Traffic()
        self._heap_start = torch.frombuffer(region.memory, dtype=torch.uint8).data_ptr() + region.heap(rank)
        self._heap_used = 0
        self._words = region.words
        self._controls = [region.control(r) // 8 for r in range(self.world)]  # as words
        self._mine = self._controls[rank]
        self._others = [control for control in self._controls if control != self._mine]
        self._words[self._mine + PID] = os.getpid()
        self._spins = SPINS if self.world <= len(os.sched_getaffinity(0)) else 0
        self._calls = self._syncs = self._passed = 0  # _passed: the syncs to which all have come
        self._deadline = 0.0
        self._plans: dict[Hashable, Plan] = {}
        self._kept: dict[int, Kept] = {}  # by the id of a buffer in the heap, which each keeps alive
        self._again: dict[Hashable, CallsAgain] = {}
        self._now = Plan("no call")  # the call under way
        self._said: list[Plan | None] = [None, None]  # whose texts stand in the control page
        self._error: CommError | None = None
        self._interruption: CommError | None = None

    def allocate(self, numel: int, dtype: torch.dtype) -> torch.Tensor:
        """A zeroed flat buffer in the heap; once it does not fit (on all ranks alike), an ordinary tensor."""
        import torch

        start, nbytes = align(self._heap_used, LINE), numel * dtype.itemsize
        if numel == 0 or start + nbytes > self.region.nbytes_per_rank:
            return torch.zeros(numel, dtype=dtype)
        self._heap_used = start + nbytes
        offset = self.region.heap(self.rank) + start
        return torch.frombuffer(self.region.memory, dtype=dtype, count=numel, offset=offset)

    def views(self, buffer: torch.Tensor) -> list[torch.Tensor]:
        import torch

        if (offset := self._place(buffer)) < 0:
            return []
        heaps = [self.region.heap(rank) + offset for rank in range(self.world)]
        memory, dtype, numel = self.region.memory, buffer.dtype, buffer.numel()
        return [torch.frombuffer(memory, dtype=dtype, count=numel, offset=heap).view(buffer.shape) for heap in heaps]

    def all_reduce(self, buffers: Sequence[torch.Tensor], op: Op = "sum") -> None:
        if len(buffers) == 1 and not self.purpose and (kept := self._kept.get(id(buffers[0]))) is not None:
            if kept[1].is_set_to(buffers[0]) and kept[2] == op and self._error is None:
                self._all_reduce_again(kept)
                return
        if op not in ("sum", "max"):
            raise ValueError(f"op {op!r} is not known: use 'sum' or 'max'")
        self.traffic.bytes_sent += self.all_reduce_bytes(self._exchange("all_reduce", op, buffers))
        if len(buffers) == 1 and self.world > 1 and not self.purpose:
            self._keep(buffers[0], op)

    def broadcast(self, buffers: Sequence[torch.Tensor], root: int = 0) -> None:
        if not 0 <= root < self.world:
            raise ValueError(f"root {root} is not a rank: use 0 to {self.world - 1}")
        nbytes = self._exchange("broadcast", root, buffers)
        if self.rank == root:
            self.traffic.bytes_sent += (self.world - 1) * nbytes

    def barrier(self) -> None:
        self._exchange("barrier", "", ())

    def all_gather(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        import torch

        if self.world == 1:
            return [tensor.detach().clone()]
        length, *rest = tensor.shape or (1,)
        text = f"all_gather of {name_of(tensor.dtype)}[{', '.join(map(str, ['any', *rest])) if tensor.dim() else ''}]"
        text = f"{self.purpose}: {text}" if self.purpose else text
        plan = self._planned((self._calls & 1, text), lambda: Plan(text))
        gathered = self._run(plan, self._do_gather, flat_of(tensor), tensor.dtype, length, math.prod(rest))
        self.traffic.bytes_sent += (self.world - 1) * tensor.nbytes
        return [torch.as_tensor(each).view((n, *rest) if tensor.dim() else ()) for n, each in gathered]

    def all_gather_into(self, whole: torch.Tensor, mine: torch.Tensor) -> None:
        if self.world == 1:
            whole[0].copy_(mine)
            return
        self._run(self._plan_of("all_gather_into", mine), self._do_gather_into, whole, mine)
        self.traffic.bytes_sent += (self.world - 1) * mine.nbytes

    def reduce_scatter(self, mine: torch.Tensor, given: torch.Tensor) -> None:
        if self.world == 1:
            mine.copy_(given[0])
            return
        self._run(self._plan_of("reduce_scatter", mine), self._do_reduce_scatter, mine, given)
        self.traffic.bytes_sent += (self.world - 1) * mine.nbytes

    def _plan_of(self, name: str, mine: torch.Tensor) -> Plan:
        text = f"{name} of {name_of(mine.dtype)}[{mine.numel()}]"
        text = f"{self.purpose}: {text}" if self.purpose else text
        return self._planned((self._calls & 1, text), lambda: Plan(text))

    def all_reduce_bytes(self, nbytes: int) -> int:
        """Of this rank's share of ``nbytes``, the p-1 copies that it reads and the p-1 that it writes.

        That is 2(p-1)/p of ``nbytes`` and, summed over ranks, what a ring sends (Patarasuk & Yuan 2009).
        """
        first, last = nbytes * self.rank // self.world, nbytes * (self.rank + 1) // self.world
        return 2 * (self.world - 1) * (last - first)

    def interrupt(self, error: CommError) -> None:
        self._interruption = error

    def fail(self, error: CommError) -> None:
        if self._error is None:
            self._leave(error)

    def close(self) -> None:
        if self._error is None:
            self._words[self._mine + CLOSED] = 1
            self._error = CommError("it was closed")
        self._plans.clear()
        self._kept.clear()
        self._again.clear()

    # -- calls

    def _exchange(self, name: str, argument: str | int, buffers: Sequence[torch.Tensor]) -> int:
        """The bytes exchanged."""
        if self.world == 1:
            return 0
        parity = self._calls & 1
        places = [(self._place(buffer), buffer.shape, buffer.dtype) for buffer in buffers]
        key = (self.purpose, parity, name, argument, *places)
        make = functools.partial(make_plan, self.region, self.rank, name, argument, places, parity, self.purpose)
        plan = self._planned(key, make)
        arrays = [flat_of(buffer) if home is None else home for buffer, home in zip(buffers, plan.homes, strict=True)]
        self._run(plan, self._do_rounds, arrays)
        for i in plan.scattered:
            write_back(buffers[i], arrays[i])
        return plan.nbytes

    def _keep(self, buffer: torch.Tensor, op: Op) -> None:
        """See to it that the same call takes less time when it comes again."""
        place = (self._place(buffer), buffer.shape, buffer.dtype)
        if place[0] < 0 or not buffer.numel():
            return
        if (calls := self._again.get((op, place))) is None:
            if len(self._again) >= MAX_PLANS:
                self._again.clear()
            calls = self._again[op, place] = calls_again(self.region, self.rank, op, place)
        if len(self._kept) >= MAX_PLANS:
            self._kept.clear()
        sent = self.all_reduce_bytes(buffer.nbytes)
        self._kept[id(buffer)] = Kept(buffer, buffer.detach(), op, sent, calls)

    def _all_reduce_again(self, kept: Kept) -> None:
        """What ``_exchange`` comes to once all is known, in one piece: a small call takes little longer than Python does.

        Of the time, only waiting that is more than a glance is counted, and what follows it in a call with two syncs.
        """
        words, traffic, parity = self._words, self.traffic, self._calls & 1
        self._now, signature, my_signature, stage, home, others, work, second_sync = kept[4][parity]
        if traffic.on_call is not None:
            traffic.on_call(self._calls + 1, self._now.text)
        try:
            if self._said[parity] is not self._now:
                self._say()
                self._said[parity] = self._now
            stage[:] = home
            words[my_signature] = signature
            self._syncs = words[self._mine + ARRIVED] = target = self._syncs + 1
            agreed = True
            for arrived, their_signature in others:
                looks = GLANCES
                while words[arrived] < target:
                    if looks:
                        looks -= 1
                        continue
                    before = perf_counter()
                    self._deadline = before + self.deadline_s
                    self._wait(arrived, target)
                    traffic.waited(before, perf_counter())
                if words[their_signature] != signature:
                    agreed = False
            if words[BROKEN]:
                self._heed_who_gave_up()
            self._passed = target
            if not agreed:
                self._raise_mismatch()
            if second_sync:
                self._work_and_sync(work)
            else:
                for step in work:
                    step()
        except BaseException as error:
            self._leave(error)
            raise
        self._calls += 1
        traffic.messages += 1
        traffic.bytes_sent += kept[3]
        if traffic.on_call is not None:
            traffic.on_call(self._calls, None)

    def _work_and_sync(self, work: Sequence[Callable[[], object]]) -> None:
        words, traffic, began = self._words, self.traffic, perf_counter()
        self._deadline = began + self.deadline_s
        for step in work:
            if words[BROKEN]:
                self._heed_who_gave_up()
            step()
        self._sync()
        traffic.busy_s += perf_counter() - began

    def _place(self, buffer: torch.Tensor) -> int:
        if not buffer.is_contiguous():
            return SCATTERED
        offset = buffer.data_ptr() - self._heap_start
        return offset if 0 <= offset < self._heap_used else OUTSIDE

    def _planned(self, key: Hashable, make: Callable[[], Plan]) -> Plan:
        plan = self._plans.get(key)
        if plan is None:
            if len(self._plans) >= MAX_PLANS:
                self._plans.clear()
            plan = self._plans[key] = make()
        return plan

    def _run(self, plan: Plan, body: Callable[..., T], *args: Any) -> T:
        """``body(plan, *args)`` as one call: timed, numbered, and the link's last one if it fails."""
        if self._error is not None:
            raise type(self._error)(f"{plan.text}: this link is of no more use: {self._error}", self._error.ranks)
        traffic, started = self.traffic, perf_counter()
        waited = traffic.wait_s
        self._now, self._deadline = plan, started + self.deadline_s
        if traffic.on_call is not None:
            traffic.on_call(self._calls + 1, plan.text)
        try:
            result = body(plan, *args)
        except BaseException as error:
            self._leave(error)
            raise
        self._calls += 1
        if traffic.on_call is not None:
            traffic.on_call(self._calls, None)
        traffic.busy_s += perf_counter() - started - (traffic.wait_s - waited)
        return result

    def _do_rounds(self, plan: Plan, arrays: list[Array]) -> None:
        words, sync = self._words, self._meet
        for now in plan.rounds:
            for copy, buffer, part, stage in now.fill:
                copy(stage, arrays[buffer][part])
            sync()
            for combine, parts, mine, copy, theirs in now.blocks:
                if words[BROKEN]:
                    self._heed_who_gave_up()
                combine(parts, mine)
                for other in theirs:
                    copy(other, mine)
            for copy, buffer, part, stage in now.take:
                copy(arrays[buffer][part], stage)
            sync = self._sync
            if now.second_sync:
                sync()
            for copy, buffer, part, stage in now.drain:
                copy(arrays[buffer][part], stage)

    def _do_gather(self, plan: Plan, data: Array, dtype: torch.dtype, length: int, row: int) -> list[tuple[int, Array]]:
        """Of each rank: its length in dim 0, and its data, ``row`` elements for each index of dim 0."""
        arrays, memory, parity = arrays_of(dtype), self.region.memory, self._calls & 1
        slot, scratch = functools.partial(self.region.slot, parity=parity), self.region.scratch
        self._words[self._mine + LENGTH + parity] = length
        if 0 < len(data) * dtype.itemsize <= SLOT:
            arrays.copy(arrays.view(memory, slot(self.rank), len(data)), data)
        self._meet()
        lengths = [self._words[control + LENGTH + parity] for control in self._controls]
        gathered = [arrays.empty(n * row) for n in lengths]
        longest = max(lengths) * row
        if longest * dtype.itemsize <= SLOT:
            for rank, into in enumerate(gathered):
                if len(into):
                    arrays.copy(into, arrays.view(memory, slot(rank), len(into)))
            return list(zip(lengths, gathered, strict=True))
        step = SCRATCH // dtype.itemsize
        for start in range(0, longest, step):
            if len(mine := data[start : start + step]):
                arrays.copy(arrays.view(memory, scratch(self.rank), len(mine)), mine)
            self._sync()
            for rank, whole in enumerate(gathered):
                if len(into := whole[start : start + step]):
                    arrays.copy(into, arrays.view(memory, scratch(rank), len(into)))
            self._sync()
        return list(zip(lengths, gathered, strict=True))

    def _do_gather_into(self, plan: Plan, whole: torch.Tensor, mine: torch.Tensor) -> None:
        arrays, memory, nbytes = arrays_of(mine.dtype), self.region.memory, mine.nbytes
        rows, data = [flat_of(row) for row in whole], flat_of(mine)
        area, room, second_sync = self._area(nbytes)
        sync = self._meet
        step = room // mine.element_size()
        for start in range(0, max(1, len(data)), step):
            piece = data[start : start + step]
            if len(piece):
                arrays.copy(arrays.view(memory, area(self.rank), len(piece)), piece)
            sync()
            for rank, row in enumerate(rows):
                if len(into := row[start : start + step]):
                    arrays.copy(into, piece if rank == self.rank else arrays.view(memory, area(rank), len(into)))
            if second_sync:
                self._sync()
            sync = self._sync

    def _do_reduce_scatter(self, plan: Plan, mine: torch.Tensor, given: torch.Tensor) -> None:
        """In rank order, as an all-reduce adds up."""
        arrays, memory, size = arrays_of(mine.dtype), self.region.memory, mine.element_size()
        rows, result = [flat_of(row) for row in given], flat_of(mine)
        area, room, second_sync = self._area(given.nbytes)
        step, block = room // (self.world * size), BLOCK // size
        sync, combine = self._meet, arrays.combine("sum")
        for start in range(0, max(1, len(result)), step):
            n = min(step, len(result) - start)
            for rank, row in enumerate(rows if n else ()):
                if rank != self.rank:
                    arrays.copy(arrays.view(memory, area(self.rank) + rank * step * size, n), row[start : start + n])
            sync()
            for first in range(0, n, block):
                last = min(first + block, n)
                parts = [
                    rows[rank][start + first : start + last]
                    if rank == self.rank
                    else arrays.view(memory, area(rank) + (self.rank * step + first) * size, last - first)
                    for rank in range(self.world)
                ]
                combine(parts, result[start + first : start + last])
            if second_sync:
                self._sync()
            sync = self._sync

    def _area(self, nbytes: int) -> tuple[Callable[[int], int], int, bool]:
        """Where each rank leaves what others take, how many bytes at a time, and whether it is to be left alone until all have it."""
        if nbytes <= SLOT:
            return functools.partial(self.region.slot, parity=self._calls & 1), SLOT, False
        return self.region.scratch, SCRATCH, True

    # -- syncs

    def _meet(self) -> None:
        """The first sync of a call: say what is called, wait for all, see that all call the same."""
        plan, words, parity = self._now, self._words, self._calls & 1
        if self._said[parity] is not plan:
            self._say()
            self._said[parity] = plan
        words[self._mine + SIGNATURE + parity] = plan.signature
        before = perf_counter()
        self._sync()
        self.traffic.waited(before, perf_counter())
        for control in self._others:
            if words[control + SIGNATURE + parity] != plan.signature:
                self._raise_mismatch()

    def _say(self, where: str = "") -> None:
        """What we call, into our control page."""
        site = where.encode()[-TEXT_BYTES // 2 :]
        text = self._now.text.encode()[: TEXT_BYTES - 1 - len(site)] + site
        self.region.write_text(self.rank, TEXT + (self._calls & 1) * TEXT_BYTES, text)

    def _sync(self) -> None:
        """Count up, and wait until all others have."""
        words = self._words
        self._syncs += 1
        words[self._mine + ARRIVED] = target = self._syncs
        for control in self._others:
            if words[control + ARRIVED] < target:
                self._wait(control + ARRIVED, target)
        if words[BROKEN]:
            self._heed_who_gave_up()
        self._passed = target
        self.traffic.messages += 1

    def _wait(self, counter: int, target: int) -> None:
        words = self._words
        for _ in range(self._spins):
            if words[counter] >= target:
                return
        # in another thread than the first, someone computes beside us, who needs the core and Python's lock
        aside = threading.current_thread() is not threading.main_thread()
        begin = perf_counter()
        nap_from = begin if aside else begin + YIELD_S
        while words[counter] < target:
            if words[BROKEN]:
                self._heed_who_gave_up()
            if self._interruption is not None:
                raise self._interruption
            now = perf_counter()
            self._look_for_missing(target, long=now > nap_from, late=now > self._deadline)
            if now < nap_from:
                os.sched_yield()
            else:
                time.sleep(min(max(NAP_S, NAP_PART * (now - begin)), MAX_NAP_S))

    # -- errors

    def _look_for_missing(self, target: int, long: bool, late: bool) -> None:
        """Flags are looked at always, processes once it takes ``long``; ``late`` is too late."""
        words, missing = self._words, self._missing(target)
        gone = set()
        for rank in missing:
            control = self._controls[rank]
            if words[control + DEAD] or words[control + CLOSED] or (long and _has_ended(words[control + PID])):
                gone.add(rank)
        if gone and (lost := tuple(r for r in self._missing(target) if r in gone)):  # again: it may have come, and left
            raise PeerLost(
                f"{self._named(lost)} died or closed the link before the end of {self._call_text()}",
                self._members(lost),
            )
        if missing and late:
            raise late_error(self._members(missing), self.deadline_s, self._call_text())

    def _missing(self, target: int) -> list[int]:
        return [rank for rank, control in enumerate(self._controls) if self._words[control + ARRIVED] < target]

    def _raise_mismatch(self) -> NoReturn:
        """All ranks come here, for each sees that not all call the same: one more sync, and each can tell where it called."""
        parity, callers = self._calls & 1, dict[tuple[int, str], list[int]]()
        self._say(f" at {call_site()}")
        self._deadline = min(self._deadline, time.perf_counter() + TELL_S)
        with contextlib.suppress(CommError):  # who cannot come any more has said what it called, if not where
            self._sync()
        for rank, control in enumerate(self._controls):
            text = self.region.read_text(rank, TEXT + parity * TEXT_BYTES, TEXT_BYTES)
            callers.setdefault((self._words[control + SIGNATURE + parity], text), []).append(rank)
        most = max(callers.values(), key=len)  # the first of equals
        said = "; ".join(f"{self._named(ranks)} called {text}" for (_, text), ranks in callers.items())
        raise Mismatch(
            f"call {self._calls + 1} is not the same on all ranks: {said}. Each rank must make the same calls in the "
            "same order, with the same shapes and dtypes",
            self._members([rank for ranks in callers.values() if ranks is not most for rank in ranks]),
        )

    def _leave(self, error: BaseException) -> None:
        """Tell the others, who would else wait for their deadline."""
        if not isinstance(error, CommError):
            cause = f"{type(error).__name__}: {error}".rstrip(": ")
            error = PeerLost(
                f"{self._named([self.rank])} broke off {self._call_text()}: {cause}", (self._ids[self.rank],)
            )
        self._error = error
        if not self._words[BROKEN]:
            wire = to_wire(error) | {"message": error.message[:600], "ranks": error.ranks[:64]}
            self.region.write_text(self.rank, LAST_WORDS, msgspec.json.encode(wire))
            self._words[self._mine + GAVE_UP] = self._passed + 1
            self._words[BROKEN] = 1 + self.rank

    def _heed_who_gave_up(self) -> None:
        """Raise what the rank raised that left: its memory is its own again.

        Unless it left in a later sync than the one we are in: then all came to ours, and we shall hear of it soon.
        """
        first = self._words[BROKEN] - 1
        if self._words[self._controls[first] + GAVE_UP] > self._passed + 1:
            return
        error = from_wire(msgspec.json.decode(self.region.read_text(first, LAST_WORDS, PAGE - LAST_WORDS)))
        assert isinstance(error, CommError)
        raise type(error)(f"{self._named([first])} gave up: {error}", error.ranks)

    def _members(self, ranks: Sequence[int]) -> tuple[int, ...]:
        return tuple(self._ids[rank] for rank in ranks)

    def _named(self, ranks: Sequence[int]) -> str:
        return name_ranks(self._members(ranks))

    def _call_text(self) -> str:
        return f"call {self._calls + 1}, {self._now.text}"


def _has_ended(pid: int) -> bool:
    """Also while nobody has reaped it; False of pid 0, a rank that has not come yet."""
    if not pid:
        return False
    try:
        process = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    except OSError:  # no pidfd here: the supervisor's word and the deadline remain
        return False
    try:
        poll = select.poll()
        poll.register(process, select.POLLIN)
        return bool(poll.poll(0))
    finally:
        os.close(process)
