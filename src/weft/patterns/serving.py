"""The role of a server: hold pushes, apply a batch when it is closed, give out values. The first one also hands out the work.

A server is one thread that waits for whatever comes. What comes with a frame is checked before any memory is given for it.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any, cast

import msgspec
import numpy as np
import torch

from weft.comm.buffers import Bytes
from weft.comm.endpoint import Arrival, Lost, Sending, Silent
from weft.comm.wire import Head
from weft.config import FIRST_PART
from weft.data.keys import key_int
from weft.errors import CommError, DeadlineExceeded, Incompatible, PeerLost, TaskError
from weft.patterns.base import Context, SafePoint, StepReport
from weft.patterns.feeds import make_feed
from weft.patterns.holding import (
    PLACE,
    Flat,
    Holding,
    Pushed,
    describe,
    flats,
    held_of,
    rows_bytes,
    rows_in,
    untrained,
)
from weft.patterns.metrics import Totals
from weft.patterns.optimizer_state import dtype_name
from weft.patterns.parameter_server import ParameterServer
from weft.patterns.randomness import host_state, seed_everything
from weft.resilience.checkpoint import state as tree
from weft.servers import messages as m
from weft.servers.ledger import Ledger, Share
from weft.update import EPSILON

TICK_S = 0.5  # after which one that hears nothing looks whether it shall stop


ALL_SILENT = 10  # deadlines: one that computes a share gives no sign of life either
FROM_LEAD = (m.Close, m.Apply, m.Collect, m.Leave)
FROM_WORKERS = (m.Join, m.Ask, m.Pull, m.Look, m.Push)


def handler_of(message: m.Any) -> str:
    return f"on_{type(message).__name__.lower()}"


def serve(ctx: Context) -> Iterator[SafePoint]:
    own = flats(cast(ParameterServer, ctx.pattern), ctx.facts)
    server = Lead(ctx, own) if ctx.rank == ctx.world else Server(ctx, own)
    yield from server.run()


class Server:
    def __init__(self, ctx: Context, all_flats: Sequence[Flat]) -> None:
        assert ctx.endpoint is not None
        self.ctx, self.endpoint, self.pattern = ctx, ctx.endpoint, cast(ParameterServer, ctx.pattern)
        self.index, self.flats = ctx.rank - ctx.world, all_flats
        self.flat = all_flats[self.index]
        self.holding = Holding(ctx, self.flat)
        if self.index:
            del (
                self.holding.model,
                self.holding.params,
                self.holding.train,
            )  # only the first makes the whole of its parts
        self.held: dict[Share, Pushed] = {}
        self.closed: set[int] = set()  # batches, among the latest
        self.open_from = self.holding.version  # all batches before it are closed
        self.reading: dict[int, int] = {}  # by worker: the version that it is at work on
        self.waiting: list[tuple[int, m.Pull | m.Look, Any]] = []  # for a version that is not there yet
        self.left = False
        self.pending: m.Close | None = None  # joined, and its norm is asked for
        self.seq = self.bytes_sent = self.messages = 0
        self.spare: list[Bytes] = []
        self.placed: dict[int, tuple[Bytes, Bytes]] = {}  # by worker: where its push is coming in
        self.report = StepReport()

    def run(self) -> Iterator[SafePoint]:
        while not self.left:
            version = self.holding.version
            self.turn(TICK_S)
            if self.holding.version > version:
                yield self.point(self.holding.version)

    def point(self, version: int) -> SafePoint:
        report, self.report = self.report, StepReport()
        report.bytes_sent, self.bytes_sent = self.bytes_sent, 0
        report.messages, self.messages = self.messages, 0
        return SafePoint(version, False, False, report, dict, False, dict, dict, follows=True)

    def turn(self, timeout_s: float) -> None:
        """Serve what comes next, if anything does in time."""
        try:
            event = self.endpoint.recv_any(timeout_s, self.place)
        except DeadlineExceeded:
            return
        if isinstance(event, Arrival):
            message = m.decode(event.head.meta)
            getattr(self, handler_of(message))(event.peer, message, event.payload)
        elif isinstance(event, Lost):
            self.on_lost(event)
        elif isinstance(event, Silent):
            self.on_silent(event)

    def place(self, head: Head) -> Sequence[memoryview]:
        """Memory for a payload. CommError, which ends the connection, if the frame is not what it should be."""
        message = m.decode(head.meta)
        if why := self.refusal(message, head):
            raise CommError(f"{why}; it was a {type(message).__name__}", (head.sender,))
        if isinstance(message, m.Push):
            rows = np.empty(head.payload_bytes - self.flat.nbytes, np.uint8)
            if head.lent is not None and self.flat.holds(
                head.lent
            ):  # read where the worker has it, who leaves it as it is
                self.placed[head.sender] = (np.frombuffer(head.lent, np.uint8), rows)
                return [head.lent, rows.data]
            memory = self.spare.pop() if self.spare else self.flat.memory()
            self.placed[head.sender] = (memory, rows)
            return [memory.data, rows.data]
        return [np.empty(head.payload_bytes, np.uint8).data] if head.payload_bytes else []

    def refusal(self, message: m.Any, head: Head) -> str:
        """Why it cannot be taken; empty if it can."""
        if not hasattr(self, handler_of(message)):
            return f"member {head.sender} said what is not for this server"
        if isinstance(message, FROM_LEAD) and head.sender != self.ctx.world:
            return f"member {head.sender} said what only the first server does"
        if isinstance(message, FROM_WORKERS) and head.sender >= self.ctx.world:
            return f"server {head.sender} said what only workers do"
        if head.payload_bytes != (expected := self.payload_of(message)):
            return f"member {head.sender} sent {head.payload_bytes} bytes where {expected} belong"
        if isinstance(message, m.Push):
            return self.refusal_of_push(message, head.sender)
        if isinstance(message, m.Look):
            return self.refusal_of_look(message, head.sender)
        return ""

    def refusal_of_look(self, look: m.Look, worker: int) -> str:
        if not 0 <= look.table < len(self.flat.tables):
            return f"worker {worker} looked at table {look.table} of {len(self.flat.tables)}"
        piece = self.flat.tables[look.table].piece
        if not 0 <= look.count <= piece.stop - piece.start:
            return (
                f"worker {worker} looked at {look.count} rows of the {piece.stop - piece.start} of {piece.name!r} here"
            )
        return ""

    def payload_of(self, message: m.Any) -> int:
        if isinstance(message, m.Look):
            return message.count * PLACE
        if isinstance(message, m.Push):
            counts = message.rows if len(message.rows) == len(self.flat.tables) else [0] * len(self.flat.tables)
            return self.flat.nbytes + rows_bytes(self.flat.tables, counts)
        return 0

    def refusal_of_push(self, push: m.Push, worker: int) -> str:
        version = self.reading.get(worker)
        if version != push.version:
            return f"worker {worker} computed at version {push.version}, and read {version}"
        if not 0 <= push.share < self.pattern.shares(self.ctx.world) or not 0 <= push.batch < self.ctx.total_steps:
            return f"worker {worker} pushed share {push.share} of batch {push.batch}, which there is not"
        if not (math.isfinite(push.weight) and push.weight >= 0):
            return f"worker {worker} pushed a weight of {push.weight}"
        sizes = [table.piece.stop - table.piece.start for table in self.flat.tables]
        if len(push.rows) != len(sizes) or any(not 0 <= k <= n for k, n in zip(push.rows, sizes, strict=True)):
            return f"worker {worker} pushed {push.rows} rows of tables of {sizes}"
        if not set(push.absent) <= set(range(len(self.flat.pieces))):
            return f"worker {worker} pushed for {len(self.flat.pieces)} pieces, and left out {push.absent}"
        return ""

    def send(self, peer: int, message: m.Any, payload: Sequence[Any] = ()) -> Sending | None:
        """To one that may have gone: it is told of by an event."""
        if peer not in self.endpoint.peers:
            return None
        self.seq += 1
        meta = m.encode(message)
        sending = self.endpoint.isend(peer, self.seq, meta, payload)
        self.bytes_sent += len(meta) + sum(len(each) for each in payload)
        self.messages += 1
        return sending

    # -- workers

    def on_pull(self, peer: int, pull: m.Pull, payload: Any) -> None:
        if pull.version > self.holding.version:
            self.waiting.append((peer, pull, payload))
            return
        self.send_values(peer, m.Values(self.holding.version), pull.has)

    def send_values(self, peer: int, message: m.Values | m.Train, has: int) -> None:
        version = self.holding.version
        self.reading[peer] = version
        values = self.holding.read()  # dc will look at them again
        sending = self.send(peer, message, [] if has == version else [values.data])
        if sending is not None:
            self.holding.buffers.sent(values, sending)

    def on_look(self, peer: int, look: m.Look, payload: Sequence[memoryview]) -> None:
        if look.version > self.holding.version:
            self.waiting.append((peer, look, payload))
            return
        places = torch.from_numpy(np.frombuffer(payload[0], np.int64).copy()) if payload else torch.empty(0).long()
        table = self.holding.tables[look.table]
        if not are_places(places, len(table)):
            self.refuse(peer, f"worker {peer} looked beyond the {len(table)} rows of table {look.table}")
            return
        values = table[places]
        self.send(peer, m.Rows(look.table), [values.reshape(-1).view(torch.uint8).numpy().data])

    def keep(self, memory: Bytes) -> None:
        """For another push, if it is ours."""
        if memory.flags.owndata:
            self.spare.append(memory)

    def refuse(self, peer: int, why: str) -> None:
        """What only its payload shows."""
        self.ctx.tell("warning", text=f"{why}: refused")
        self.send(peer, m.Refused(why))

    def on_push(self, peer: int, push: m.Push, _: Any) -> None:
        share, (memory, row_memory) = Share(push.batch, push.share), self.placed.pop(peer)
        rows = rows_in(row_memory, self.flat.tables, push.rows)
        for some, table in zip(rows, self.holding.tables, strict=True):
            if not are_places(some.places, len(table)):
                self.keep(memory)
                self.refuse(peer, f"worker {peer} pushed beyond the {len(table)} rows of a table")
                return
        if share in self.held or self.is_closed(push.batch):  # another has done it meanwhile, or this is said again
            self.keep(memory)
        else:
            pushed = Pushed(memory, push.version, push.weight, peer, frozenset(push.absent), rows)
            self.check_finite(pushed, push.batch)
            self.held[share] = pushed
        self.acknowledge(peer, push)

    def acknowledge(self, peer: int, push: m.Push) -> None:
        self.send(peer, m.Ack(push.batch, push.share))

    def check_finite(self, pushed: Pushed, batch: int) -> None:
        given = [*self.flat.parameters(pushed.memory), *(some.values for some in pushed.rows)]
        if all(math.isfinite(t.sum().item()) or bool(t.isfinite().all()) for t in given):
            return
        views = [*self.flat.views(pushed.memory)[0], *(some.values for some in pushed.rows)]
        names = [piece.name for piece, _ in held_of(self.flat)]
        name = next(name for name, view in zip(names, views, strict=True) if not view.isfinite().all())
        raise TaskError(
            f"a gradient of parameter {name!r} that worker {pushed.worker} pushed at step {batch + 1} is not finite though the loss was: nothing of "
            "that batch was applied. Look for sqrt, log, norm or a division at 0 in the loss, lower the learning rate, or run with "
            "torch.autograd.set_detect_anomaly(True) in the task: it names the operation."
        )

    def is_closed(self, batch: int) -> bool:
        return batch < self.open_from or batch in self.closed

    # -- closing a batch

    def on_close(self, peer: int, close: m.Close, _: Any = None) -> None:
        begun = time.perf_counter()
        if missing := [share for share in close.shares if Share(close.batch, share) not in self.held]:
            raise CommError(
                f"batch {close.batch} was closed with share {missing[0]}, which server {self.ctx.rank} never got"
            )
        pushed = [self.held.pop(Share(close.batch, share)) for share in close.shares]
        self.holding.join(pushed, close.factor)
        if self.index == 0:  # once for all
            self.report.staleness = [self.holding.version - each.version for each in pushed]
        for each in pushed:
            self.keep(each.memory)
        for share in [share for share in self.held if share.batch == close.batch]:  # of those that nobody waits for
            self.keep(self.held.pop(share).memory)
        self.closed.add(close.batch)
        while self.open_from in self.closed:
            self.closed.remove(self.open_from)
            self.open_from += 1
        self.report.compute_s += time.perf_counter() - begun
        if close.norm:
            self.pending = close
            self.tell_square(m.Square(close.version, self.holding.square))
        else:
            self.apply()

    def tell_square(self, square: m.Square) -> None:
        self.send(self.ctx.world, square)

    def on_apply(self, peer: int, apply: m.Apply, _: Any = None) -> None:
        assert self.pattern.clip_norm is not None
        self.pending = None
        self.apply(min(1.0, self.pattern.clip_norm / (apply.norm + EPSILON)))

    def apply(self, scale: float = 1.0) -> None:
        begun = time.perf_counter()
        self.holding.step(scale)
        self.holding.forget([*self.reading.values(), *(p.version for p in self.held.values())])
        self.report.compute_s += time.perf_counter() - begun
        ready, self.waiting = self.waiting, []
        for peer, wish, payload in ready:
            getattr(self, handler_of(wish))(peer, wish, payload)

    def on_collect(self, peer: int, collect: m.Collect, _: Any) -> None:
        state, tensors = tree.encode("server", self.holding.state())
        told = [(name, list(t.shape), dtype_name(t)) for name, t in tensors.items()]
        payload = [t.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data for t in tensors.values()]
        self.send(peer, m.State(self.holding.version, msgspec.json.encode(state), told), payload)

    def on_leave(self, peer: int, leave: m.Leave, _: Any) -> None:
        self.left = True

    # -- who goes

    def on_lost(self, lost: Lost) -> None:
        if lost.peer < self.ctx.world:
            if not lost.left:
                self.ctx.tell("warning", text=f"worker {lost.peer} is gone: {lost.reason}")
            self.reading.pop(lost.peer, None)
            self.waiting = [wish for wish in self.waiting if wish[0] != lost.peer]
            if (placed := self.placed.pop(lost.peer, None)) is not None:
                self.keep(placed[0])
        elif self.ctx.world not in (lost.peer, self.ctx.rank):
            pass  # the first server misses it, and says so
        elif lost.error is not None:
            raise lost.error
        else:
            raise PeerLost(f"server {lost.peer} is gone ({lost.reason})", (lost.peer,))

    def on_silent(self, silent: Silent) -> None:
        if silent.peer == self.ctx.world:
            raise DeadlineExceeded(
                f"server {silent.peer} gave no sign of life for {silent.seconds:.0f} s", (silent.peer,)
            )


class Lead(Server):
    """Hands out shares, closes batches, and has the run evaluated, saved and stopped where nothing is half done."""

    def __init__(self, ctx: Context, all_flats: Sequence[Flat]) -> None:
        super().__init__(ctx, all_flats)
        self.others = range(ctx.world + 1, ctx.world + len(all_flats))
        begin = self.holding.version
        self.ledger = Ledger(self.pattern.shares(ctx.world), begin, self.pattern.bound, self.pattern.backup_workers)
        self.idle: list[int] = []
        self.workers: set[int] = set(range(ctx.world))
        self.told: dict[Share, tuple[int, m.Done]] = {}  # who has done it
        self.closing: dict[int, list[int]] = {}  # by batch, the shares to be joined
        self.squares: dict[int, float] = {}  # by server, of the update that is joined
        self.ordered = begin  # updates that all servers have been told of
        self.applied: deque[tuple[int, StepReport]] = deque()  # that nobody has been told of
        self.evaluation = 0
        self.taken: dict[int, int | None] = {}  # of the evaluation under way: who is at it
        self.sums: dict[int, np.ndarray[Any, Any]] = {}
        self.states: dict[int, dict[str, Any]] = {}  # by server
        self.totals = Totals(ctx.task, ctx.facts.sums)
        self.stopping = False
        self.all_silent_since = math.inf
        self.description = describe(self.holding.model)
        self.welcome = [
            t.contiguous().reshape(-1).view(torch.uint8).numpy().data for t in untrained(self.holding.model, ctx.facts)
        ]
        dtype = cast(torch.dtype, getattr(torch, ctx.config.dtype))
        self.feed = make_feed(self.holding.train, dataclasses.replace(ctx, rank=0), dtype)
        self.feed_at = begin
        if ctx.resume is not None:
            self.feed.load_state_dict(ctx.resume.meta["sampler"])
            self.feed.load_stream_state(ctx.resume.parts[FIRST_PART].get("stream"))

    def run(self) -> Iterator[SafePoint]:
        try:
            yield from self.lead()
        except GeneratorExit:
            self.finish()
            raise
        self.finish()

    def lead(self) -> Iterator[SafePoint]:
        total = self.ctx.total_steps
        if self.holding.version == total:  # it died after its last update, before its result
            yield self.safe_point(total, StepReport())
            return
        self.ledger.pause(self.next_pause(self.holding.version))
        while self.holding.version < total:
            self.turn(TICK_S)
            while self.applied:
                version, report = self.applied.popleft()
                self.follow(version)
                yield self.safe_point(version, report)
                if version == self.ledger.limit and not self.stopping:
                    self.ledger.pause(self.next_pause(version))
                    self.hand_out()
            if not self.stopping and self.ctx.stop_requested():
                self.stopping = True
                begun = self.ledger.begun  # one more where nothing is under way: what is not new is not saved
                self.ledger.limit = min(total, max(begun, self.ledger.closed + 1))
                self.hand_out()

    def next_pause(self, version: int) -> int:
        """The next version at which the run is saved or evaluated."""
        asked = [every for every in (self.ctx.save_every, self.ctx.config.eval_every) if every]
        return min([self.ctx.total_steps, *((version // every + 1) * every for every in asked)])

    def safe_point(self, version: int, report: StepReport) -> SafePoint:
        report.bytes_sent, self.bytes_sent = self.bytes_sent, 0
        report.messages, self.messages = self.messages, 0
        stop = self.stopping and version == self.ledger.limit
        ended = version == self.ctx.total_steps
        return SafePoint(version, stop, ended, report, self.parts, False, self.meta, self.evaluate)

    def finish(self) -> None:
        for worker in self.idle:
            self.send(worker, m.Finish())
        for other in self.others:
            self.send(other, m.Leave())

    # -- work

    def turn(self, timeout_s: float) -> None:
        super().turn(timeout_s)
        self.hand_out()  # also to one who has come back
        if self.endpoint.silent >= self.workers:
            self.all_silent_since = min(self.all_silent_since, time.monotonic())
            if time.monotonic() - self.all_silent_since > ALL_SILENT * self.endpoint.deadline_s:
                raise DeadlineExceeded(
                    f"no worker has given a sign of life for {ALL_SILENT} deadlines of {self.endpoint.deadline_s:g} s",
                    tuple(sorted(self.workers)),
                )
        else:
            self.all_silent_since = math.inf

    def on_join(self, peer: int, join: m.Join, _: Any) -> None:
        own, theirs = dict_of(self.description), dict_of(join.model)
        for name in [*own, *theirs]:
            if own.get(name) != theirs.get(name):
                raise Incompatible(
                    f"worker {peer} has another model than the servers: {name!r} is {theirs.get(name, 'missing')} there and "
                    f"{own.get(name, 'missing')} here. Start all members with the same task, options and version."
                )
        self.send(peer, m.Welcome(), self.welcome)

    def on_ask(self, peer: int, ask: m.Ask, payload: Sequence[memoryview]) -> None:
        self.idle.append(peer)
        if ask.done is not None:
            self.on_done(peer, ask.done)
        if ask.part is not None and ask.number == self.evaluation and ask.part in self.taken:
            self.sums.setdefault(ask.part, np.frombuffer(payload[0], np.float64))
        self.hand_out()

    def acknowledge(self, peer: int, push: m.Push) -> None:
        if push.done is None:
            super().acknowledge(peer, push)
        else:
            self.on_ask(peer, m.Ask(push.done), ())

    def payload_of(self, message: m.Any) -> int:
        if isinstance(message, m.Ask) and message.part is not None:
            return self.totals.flat.nbytes
        if isinstance(message, m.State):
            return sum(math.prod(shape) * tree_dtype(name).itemsize for _, shape, name in message.tensors)
        return super().payload_of(message)

    def refusal(self, message: m.Any, head: Head) -> str:
        if isinstance(message, m.State | m.Square) and head.sender not in self.others:
            return f"member {head.sender} said what only other servers do"
        if isinstance(message, m.Ask | m.Push) and (done := message.done) is not None:
            if isinstance(message, m.Push) and (
                len(self.flats) > 1 or (done.batch, done.share) != (message.batch, message.share)
            ):
                return f"worker {head.sender} pushed share {message.share} of batch {message.batch}, and says that all is done of another"
            if not (math.isfinite(done.loss) and 0 <= done.weight < math.inf and done.drawn > 0):
                return f"worker {head.sender} has a loss of {done.loss} over {done.weight} of {done.drawn} examples"
        return super().refusal(message, head)

    def hand_out(self) -> None:
        """Something to do for everybody who asks, as long as there is."""
        silent = self.endpoint.silent  # who does not answer is not waited for
        for worker in [worker for worker in self.idle if worker not in silent]:
            order = self.work_for(worker)
            if order is not None:
                self.idle.remove(worker)
                if isinstance(order, m.Train) and order.version <= self.holding.version:
                    order = msgspec.structs.replace(order, given=self.holding.version)
                    self.send_values(worker, order, self.reading.get(worker, -1))
                else:
                    self.send(worker, order)

    def work_for(self, worker: int) -> m.Train | m.Evaluate | None:
        left = [part for part, who in self.taken.items() if who is None and part not in self.sums]
        if left:
            part = worker if worker in left else left[0]
            self.taken[part] = worker
            return m.Evaluate(self.evaluation, part, len(self.taken), self.holding.version)
        share = self.ledger.take(worker)
        # what is closed may not be applied yet: then its reading waits
        version = self.ordered if self.pattern.bound is None else self.ledger.lowest
        return None if share is None else m.Train(share.batch, share.share, version)

    def on_done(self, peer: int, done: m.Done) -> None:
        share = Share(done.batch, done.share)
        if not self.is_closed(done.batch) and share in self.held:
            self.told.setdefault(share, (peer, done))
            if shares := self.ledger.done(share, done.weight):
                self.closing[done.batch] = shares
                self.close_next()

    def close_next(self) -> None:
        """Batches whose shares all servers have, each as one update, on all servers in the same order: the batches', or, where nothing bounds
        who is ahead, the one in which they came."""
        while self.pending is None:
            batch = next(iter(self.closing), -1) if self.pattern.bound is None else self.ordered
            if batch not in self.closing:
                return
            shares = self.closing.pop(batch)
            dones = [self.told.pop(Share(batch, share))[1] for share in shares]
            for share in [share for share in self.told if share.batch == batch]:
                del self.told[share]
            weight = sum(done.weight for done in dones)
            if not weight > 0:
                raise TaskError(
                    f"num_examples added up to {weight} over all workers at step {batch + 1}: it must be positive."
                )
            self.ordered += 1
            close = m.Close(self.ordered, batch, shares, dones[0].drawn / weight, self.pattern.clips)
            for other in self.others:
                self.send(other, close)
            self.report.losses, self.report.weights = [d.loss for d in dones], [d.weight for d in dones]
            self.report.examples = dones[0].drawn
            self.on_close(self.ctx.rank, close)

    def tell_square(self, square: m.Square) -> None:
        self.on_square(self.ctx.rank, square, None)

    def on_square(self, peer: int, square: m.Square, _: Any) -> None:
        self.squares[peer] = square.value
        if len(self.squares) == len(self.flats):
            apply = m.Apply(square.version, math.sqrt(math.fsum(self.squares.values())))
            self.squares.clear()
            for other in self.others:
                self.send(other, apply)
            self.on_apply(self.ctx.rank, apply)
            self.close_next()

    def apply(self, scale: float = 1.0) -> None:
        super().apply(scale)
        self.applied.append((self.holding.version, self.report))
        self.report = StepReport()

    # -- who goes

    def on_lost(self, lost: Lost) -> None:
        super().on_lost(lost)
        if lost.peer >= self.ctx.world:
            return
        self.workers.discard(lost.peer)
        if lost.peer in self.idle:
            self.idle.remove(lost.peer)
        self.free(lost.peer)
        if not self.workers:
            raise PeerLost(f"all workers are gone, the last of them member {lost.peer} ({lost.reason})", (lost.peer,))

    def on_silent(self, silent: Silent) -> None:
        if silent.peer >= self.ctx.world:
            raise DeadlineExceeded(
                f"server {silent.peer} gave no sign of life for {silent.seconds:.0f} s", (silent.peer,)
            )
        text = f"worker {silent.peer} gave no sign of life for {silent.seconds:.0f} s: others do what it was at"
        self.ctx.tell("warning", text=text)
        self.free(silent.peer)

    def free(self, worker: int) -> None:
        """What it was at is for others."""
        self.ledger.lost(worker)
        for part, who in self.taken.items():
            if who == worker and part not in self.sums:
                self.taken[part] = None
        self.hand_out()

    # -- where nothing is half done

    def evaluate(self) -> dict[str, float]:
        """Held-out metrics; the workers each take a part, added up in their order."""
        self.evaluation += 1
        self.taken, self.sums = dict.fromkeys(range(self.pattern.shares(self.ctx.world))), {}
        self.hand_out()
        while len(self.sums) < len(self.taken):
            self.turn(TICK_S)
        self.totals.flat.copy_(torch.from_numpy(np.sum([self.sums[part] for part in sorted(self.sums)], axis=0)))
        self.taken = {}
        return self.totals.summary()

    def parts_of_servers(self) -> list[dict[str, Any]]:
        self.states = {self.ctx.rank: self.holding.state()}
        for other in self.others:
            self.send(other, m.Collect(self.holding.version))
        while len(self.states) < len(self.flats):
            self.turn(TICK_S)
        return [self.states[server] for server in sorted(self.states)]

    def on_state(self, peer: int, state: m.State, payload: Sequence[memoryview]) -> None:
        data, at, tensors = np.frombuffer(payload[0], np.uint8) if payload else np.empty(0, np.uint8), 0, {}
        for name, shape, dtype in state.tensors:
            kind = tree_dtype(dtype)
            nbytes = math.prod(shape) * kind.itemsize
            tensors[name] = torch.from_numpy(data[at : at + nbytes].copy()).view(kind).view(shape)
            at += nbytes
        self.states[peer] = tree.decode(msgspec.json.decode(state.tree), tensors)

    def parts(self) -> dict[str, Any]:
        """A checkpoint as one process would write it."""
        whole = self.holding.whole_state(self.parts_of_servers(), self.flats)
        own = {
            "host_random": self.host_random(),
            "chain": [],
            "stream": self.feed.stream_state(),
            "exchange": {},
        }
        return {FIRST_PART: whole | own}

    def host_random(self) -> list[torch.Tensor]:
        """For a pattern whose ranks keep such: each its own. Here they follow from the share."""
        states = []
        for rank in range(self.ctx.world):
            seed_everything(key_int(self.ctx.config.seed, "worker", rank, self.holding.version))
            states.append(host_state())
        return states

    def follow(self, version: int) -> None:
        """In the data, batch by batch: of a stream all at once would take long."""
        while self.feed_at < version:
            self.feed.next()
            self.feed_at += 1

    def meta(self) -> dict[str, Any]:
        return {"sampler": self.feed.state_dict()}


def are_places(places: torch.Tensor, rows: int) -> bool:
    return not len(places) or bool((places.min() >= 0) & (places.max() < rows))


def dict_of(model: Sequence[tuple[str, list[int], str]]) -> dict[str, str]:
    return {name: f"{dtype}{list(shape)}" for name, shape, dtype in model}


def tree_dtype(name: str) -> torch.dtype:
    kind = getattr(torch, name, None)
    if not isinstance(kind, torch.dtype):
        raise CommError(f"a tensor of type {name!r}, which there is not")
    return kind
