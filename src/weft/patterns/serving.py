"""The role of a server: hold pushes, apply a batch when it is closed, give out values. One of them also leads (leading.py).

A server is one thread that waits for whatever comes. What comes with a frame is checked before any memory is given for it.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, cast

import msgspec
import numpy as np
import torch

from weft.comm.buffers import Bytes
from weft.comm.endpoint import Arrival, Lost, Sending, Silent
from weft.comm.wire import Head
from weft.errors import CommError, DeadlineExceeded, PeerLost, TaskError
from weft.patterns.base import Context, SafePoint, StepReport
from weft.patterns.holding import (
    PLACE,
    Built,
    Flat,
    Holding,
    Pushed,
    flats,
    held_of,
    rows_bytes,
    rows_in,
)
from weft.patterns.optimizer_state import dtype_name
from weft.patterns.parameter_server import ParameterServer
from weft.resilience.checkpoint import state as tree
from weft.servers import messages as m
from weft.servers.ledger import Share
from weft.servers.views import CopyState, Told, Voter, first_view
from weft.update import EPSILON

TICK_S = 0.5  # after which one that hears nothing looks whether it shall stop

FROM_WORKERS = (m.Join, m.Ask, m.Pull, m.Look, m.Push)
FROM_SERVERS = (
    *(m.Close, m.Copy, m.Joined, m.Apply, m.Collect, m.State, m.Leave),
    *(m.Busy, m.Misses, m.Propose, m.Install, m.Ready),
)
VIEWS = m.Propose | m.Grant | m.Install
BETWEEN_EPOCHS = m.Propose | m.Grant | m.Deny | m.Install | m.Ready


class Step(NamedTuple):
    """An update between its Close and its Apply."""

    version: int
    batch: int


class Shard:
    """This server's copy of a shard, and what is on its way to it."""

    def __init__(self, number: int, holding: Holding) -> None:
        self.number, self.holding, self.flat = number, holding, holding.flat
        self.held: dict[Share, Pushed] = {}
        self.reading: dict[int, int] = {}  # by worker: the version that it is at work on
        self.waiting: list[tuple[int, m.Pull | m.Look, Any]] = []  # for a version that is not there yet
        self.joined: Step | None = None  # what is joined, and not applied

    def state(self) -> CopyState:
        joined = self.joined or Step(-1, -1)
        return CopyState(self.number, self.holding.version, joined.version, self.holding.square, joined.batch)

    def forget(self) -> None:
        """Versions that nobody is at work on."""
        self.holding.forget([*self.reading.values(), *(p.version for p in self.held.values())])

    def drop(self) -> None:
        """All that is not applied."""
        self.held, self.waiting, self.joined = {}, [], None
        self.reading = {}
        self.forget()


class Server:
    def __init__(self, ctx: Context, all_flats: Sequence[Flat]) -> None:
        assert ctx.endpoint is not None
        self.ctx, self.endpoint, self.pattern = ctx, ctx.endpoint, cast(ParameterServer, ctx.pattern)
        self.rank, self.flats = ctx.rank, all_flats
        self.servers = range(ctx.world, ctx.world + len(all_flats))
        self.voter = Voter(first_view(self.servers, self.pattern.replicas))
        self.built = Built(ctx)
        own = self.voter.view.held_by(self.rank)
        self.shards = {n: Shard(n, Holding(self.built, self.flats[n], self.pattern)) for n in own}
        self.built.loaded = None
        self.version = self.built.version
        self.open_from = self.version  # all batches before it are closed
        self.closed: set[int] = set()  # and these
        self.pending: Step | None = None  # which somebody still joins
        self.left = False
        self.seq = self.bytes_sent = self.messages = 0
        self.spare: dict[int, list[Bytes]] = {n: [] for n in range(len(self.flats))}  # by shard
        self.placed: dict[int, deque[tuple[Bytes, Bytes]]] = {}  # by peer: where what it pushes comes in
        held = sum(p.nbytes for p in ctx.facts.params) + ctx.facts.optimizer_bytes + ctx.facts.running_bytes
        self.most_state_bytes = 2 * held + (1 << 20)
        self.own: deque[m.Any] = deque()  # what it says to itself
        self.report = StepReport()

    def run(self) -> Iterator[SafePoint]:
        self.built.let_go()  # only who leads makes a whole
        while not self.left:
            version = self.version
            self.turn(TICK_S)
            if self.version > version:
                yield self.point(self.version)

    def point(self, version: int) -> SafePoint:
        report = self.reported()
        return SafePoint(version, False, False, report, dict, False, dict, dict, follows=True)

    def reported(self) -> StepReport:
        report, self.report = self.report, StepReport()
        report.bytes_sent, self.bytes_sent = self.bytes_sent, 0
        report.messages, self.messages = self.messages, 0
        return report

    # -- frames

    def turn(self, timeout_s: float) -> None:
        """Serve what comes next, if anything does in time."""
        self.settle()
        try:
            event = self.endpoint.recv_any(timeout_s, self.place)
        except DeadlineExceeded:
            return
        if isinstance(event, Arrival):
            self.take(event.peer, m.decode(event.head.meta), event.payload)
        elif isinstance(event, Lost):
            self.on_lost(event)
        elif isinstance(event, Silent):
            self.on_silent(event)
        self.settle()

    def settle(self) -> None:
        while self.own:
            self.take(self.rank, self.own.popleft(), ())

    def take(self, peer: int, message: m.Any, payload: Sequence[memoryview]) -> None:
        if isinstance(message, m.Push | m.Copy):
            memory, rows = self.placed[peer].popleft()
            if self.is_current(peer, message):
                self.handler(message)(peer, message, memory, rows)
            else:
                self.keep(message.shard, memory)
        elif self.is_current(peer, message):
            self.handler(message)(peer, message, payload)

    def handler(self, message: m.Any) -> Callable[..., None]:
        found: Callable[..., None] = getattr(self, handler_name(message))
        return found

    def hears(self, message: m.Any) -> bool:
        return hasattr(self, handler_name(message))

    def is_current(self, peer: int, message: m.Any) -> bool:
        """Of this server's epoch, as far as it may still take part in that."""
        epoch = getattr(message, "epoch", None)
        return epoch is None or epoch == self.epoch

    def place(self, head: Head) -> Sequence[memoryview]:
        """Memory for a payload. CommError, which ends the connection, if the frame is not what it should be."""
        message = m.decode(head.meta)
        if why := self.refusal(message, head):
            raise CommError(f"{why}; it was a {type(message).__name__}", (head.sender,))
        if isinstance(message, m.Push | m.Copy):
            flat, spare = self.flats[message.shard], self.spare[message.shard]
            rows = np.empty(head.payload_bytes - flat.nbytes, np.uint8)
            placed = self.placed.setdefault(head.sender, deque())
            if isinstance(message, m.Push) and head.lent is not None and flat.holds(head.lent):
                placed.append(
                    (np.frombuffer(head.lent, np.uint8), rows)
                )  # read where the worker has it, who leaves it as it is
                return [head.lent, rows.data]
            memory = spare.pop() if spare else flat.memory()
            placed.append((memory, rows))
            return [memory.data, rows.data]
        return [np.empty(head.payload_bytes, np.uint8).data] if head.payload_bytes else []

    def refusal(self, message: m.Any, head: Head) -> str:
        """Why it cannot be taken; empty if it can."""
        sender = head.sender
        if not self.hears(message):
            return f"member {sender} said what is not for this server"
        if isinstance(message, FROM_SERVERS) and sender not in self.servers:
            return f"member {sender} said what only servers do"
        if isinstance(message, FROM_WORKERS) and sender >= self.ctx.world:
            return f"server {sender} said what only workers do"
        if not 0 <= (shard := getattr(message, "shard", 0)) < len(self.flats):
            return f"member {sender} spoke of shard {shard} of {len(self.flats)}"
        if isinstance(message, VIEWS) and not message.view.is_of(self.servers, len(self.flats)):
            return f"member {sender} told of a view that cannot be"
        if head.payload_bytes != (expected := self.payload_of(message)):
            return f"member {sender} sent {head.payload_bytes} bytes where {expected} belong"
        if isinstance(message, m.State) and (
            expected > self.most_state_bytes or any(n < 0 for _, shape, _ in message.tensors for n in shape)
        ):
            return f"server {sender} told of a state of {expected} bytes"
        if isinstance(message, m.Push | m.Copy) and (why := self.refusal_of_gradient(message, sender)):
            return why
        if isinstance(message, m.Look) and (why := self.refusal_of_look(message, sender)):
            return why
        if not self.is_current(sender, message):
            return ""  # it is not looked at
        return self.refusal_now(message, sender)

    def refusal_now(self, message: m.Any, sender: int) -> str:
        """Of what is of this epoch."""
        view = self.voter.view
        if isinstance(message, m.Close | m.Apply | m.Collect) and sender != view.lead:
            return f"member {sender} said what only the lead does"
        if isinstance(message, m.Pull | m.Look | m.Push) and view.chains[message.shard][0] != self.rank:
            return f"worker {sender} asked of shard {message.shard}, which others serve"
        if isinstance(message, m.Copy) and self.rank not in after(view.chains[message.shard], sender):
            return f"server {sender} passed shard {message.shard} on, and is not before this one in its chain"
        if isinstance(message, m.Push):
            return self.refusal_of_push(message, sender)
        return ""

    def refusal_of_look(self, look: m.Look, worker: int) -> str:
        tables = self.flats[look.shard].tables
        if not 0 <= look.table < len(tables):
            return f"worker {worker} looked at table {look.table} of {len(tables)}"
        piece = tables[look.table].piece
        if not 0 <= look.count <= piece.stop - piece.start:
            return (
                f"worker {worker} looked at {look.count} rows of the {piece.stop - piece.start} of {piece.name!r} here"
            )
        return ""

    def payload_of(self, message: m.Any) -> int:
        if isinstance(message, m.Look):
            return message.count * PLACE
        if isinstance(message, m.Push | m.Copy):
            flat = self.flats[message.shard]
            counts = message.rows if len(message.rows) == len(flat.tables) else [0] * len(flat.tables)
            return flat.nbytes + rows_bytes(flat.tables, counts)
        if isinstance(message, m.State):
            return sum(math.prod(shape) * tree_dtype(name).itemsize for _, shape, name in message.tensors)
        return 0

    def refusal_of_gradient(self, message: m.Push | m.Copy, sender: int) -> str:
        flat = self.flats[message.shard]
        sizes = [table.piece.stop - table.piece.start for table in flat.tables]
        if len(message.rows) != len(sizes) or any(not 0 <= k <= n for k, n in zip(message.rows, sizes, strict=True)):
            return f"member {sender} pushed {message.rows} rows of tables of {sizes}"
        if not set(message.absent) <= set(range(len(flat.pieces))):
            return f"member {sender} pushed for {len(flat.pieces)} pieces, and left out {message.absent}"
        return ""

    def refusal_of_push(self, push: m.Push, worker: int) -> str:
        version = self.shards[push.shard].reading.get(worker)
        if version != push.version:
            return f"worker {worker} computed at version {push.version}, and read {version}"
        if not 0 <= push.share < self.pattern.shares(self.ctx.world) or not 0 <= push.batch < self.ctx.total_steps:
            return f"worker {worker} pushed share {push.share} of batch {push.batch}, which there is not"
        if not (math.isfinite(push.weight) and push.weight >= 0):
            return f"worker {worker} pushed a weight of {push.weight}"
        return ""

    def send(self, peer: int, message: m.Any, payload: Sequence[Any] = ()) -> Sending | None:
        """To one that may have gone: it is told of by an event."""
        if peer == self.rank:
            self.own.append(message)
            return None
        if peer not in self.endpoint.peers:
            return None
        self.seq += 1
        meta = m.encode(message)
        sending = self.endpoint.isend(peer, self.seq, meta, payload)
        self.bytes_sent += len(meta) + sum(len(each) for each in payload)
        self.messages += 1
        return sending

    @property
    def epoch(self) -> int:
        return self.voter.view.epoch

    # -- workers

    def on_pull(self, peer: int, pull: m.Pull, payload: Any) -> None:
        shard = self.shards[pull.shard]
        if pull.version > shard.holding.version:
            shard.waiting.append((peer, pull, payload))
            return
        self.send_values(peer, shard, m.Values(self.epoch, pull.shard, shard.holding.version), pull.has)

    def send_values(self, peer: int, shard: Shard, message: m.Values | m.Train, has: int) -> None:
        version = shard.reading[peer] = shard.holding.version
        values = shard.holding.read()  # dc will look at them again
        sending = self.send(peer, message, [] if has == version else [values.data])
        if sending is not None:
            shard.holding.buffers.sent(values, sending)

    def on_look(self, peer: int, look: m.Look, payload: Sequence[memoryview]) -> None:
        shard = self.shards[look.shard]
        if look.version > shard.holding.version:
            shard.waiting.append((peer, look, payload))
            return
        places = torch.from_numpy(np.frombuffer(payload[0], np.int64).copy()) if payload else torch.empty(0).long()
        table = shard.holding.tables[look.table]
        if not are_places(places, len(table)):
            self.refuse(peer, f"worker {peer} looked beyond the {len(table)} rows of table {look.table}")
            return
        self.send(peer, m.Rows(self.epoch, look.shard, look.table), [bytes_of(table[places])])

    def keep(self, shard: int, memory: Bytes) -> None:
        """For another push, if it is ours."""
        if memory.flags.owndata:
            self.spare[shard].append(memory)

    def refuse(self, peer: int, why: str) -> None:
        """What only its payload shows."""
        self.ctx.tell("warning", text=f"{why}: refused")
        self.send(peer, m.Refused(why))

    def on_push(self, peer: int, push: m.Push, memory: Bytes, row_memory: Bytes) -> None:
        shard, share = self.shards[push.shard], Share(push.batch, push.share)
        rows = rows_in(row_memory, shard.flat.tables, push.rows)
        for some, table in zip(rows, shard.holding.tables, strict=True):
            if not are_places(some.places, len(table)):
                self.keep(push.shard, memory)
                self.refuse(peer, f"worker {peer} pushed beyond the {len(table)} rows of a table")
                return
        if share in shard.held or self.is_closed(push.batch):  # another has done it meanwhile, or this is said again
            self.keep(push.shard, memory)
        else:
            pushed = Pushed(memory, push.version, push.weight, peer, frozenset(push.absent), rows)
            check_finite(shard.flat, pushed, push.batch)
            shard.held[share] = pushed
        self.acknowledge(peer, push)

    def acknowledge(self, peer: int, push: m.Push) -> None:
        self.send(peer, m.Ack(self.epoch, push.shard, push.batch, push.share))

    def is_closed(self, batch: int) -> bool:
        return (
            batch < self.open_from or batch in self.closed or (self.pending is not None and self.pending.batch == batch)
        )

    # -- closing a batch

    def on_close(self, peer: int, close: m.Close, _: Any) -> None:
        begun = time.perf_counter()
        self.pending = Step(close.version, close.batch)
        for number in self.voter.view.served_by(self.rank):
            self.join(self.shards[number], close)
        self.report.compute_s += time.perf_counter() - begun
        if not close.wait:
            self.apply()

    def join(self, shard: Shard, close: m.Close) -> None:
        if missing := [share for share in close.shares if Share(close.batch, share) not in shard.held]:
            raise CommError(
                f"batch {close.batch} was closed with share {missing[0]}, which server {self.rank} never got for shard {shard.number}"
            )
        pushed = [shard.held.pop(Share(close.batch, share)) for share in close.shares]
        shard.holding.join(pushed, close.factor)
        others = [share for share in shard.held if share.batch == close.batch]  # that nobody waits for
        for each in [*pushed, *(shard.held.pop(share) for share in others)]:
            self.keep(shard.number, each.memory)
        shard.joined = Step(close.version, close.batch)
        if close.wait:
            shard.holding.measure()
            self.pass_on(shard)

    def pass_on(self, shard: Shard) -> None:
        """A joined update, to the next in the shard's chain; the last tells the lead."""
        holding, chain = shard.holding, self.voter.view.chains[shard.number]
        assert shard.joined is not None
        version, batch = shard.joined
        behind = after(chain, self.rank)
        if not behind:
            self.send(self.voter.view.lead, m.Joined(self.epoch, shard.number, version, holding.square))
            return
        counts = [len(rows.places) for rows in holding.rows]
        copy = m.Copy(self.epoch, shard.number, version, batch, holding.square, sorted(holding.absent), counts)
        parts = [rows.places for rows in holding.rows] + [rows.values for rows in holding.rows]
        self.send(behind[0], copy, [holding.joined.data, *(bytes_of(part) for part in parts)])

    def on_copy(self, peer: int, copy: m.Copy, memory: Bytes, row_memory: Bytes) -> None:
        shard = self.shards.get(copy.shard)
        if shard is None or shard.joined is not None or copy.version != self.version + 1:
            raise CommError(
                f"server {peer} passed update {copy.version} of shard {copy.shard} on, out of turn", (peer,)
            )
        holding = shard.holding
        self.spare[copy.shard].append(holding.joined)
        rows = rows_in(row_memory, shard.flat.tables, copy.rows)
        holding.take(memory, frozenset(copy.absent), rows)
        holding.square = copy.square
        self.pending = shard.joined = Step(copy.version, copy.batch)
        self.pass_on(shard)

    def on_apply(self, peer: int, apply: m.Apply, _: Any) -> None:
        if self.pending is None or self.pending.version != apply.version:
            raise CommError(f"update {apply.version} was to be applied, and {self.pending} is joined", (peer,))
        self.apply(self.scale(apply.norm))

    def scale(self, norm: float) -> float:
        limit = self.pattern.clip_norm
        return 1.0 if limit is None else min(1.0, limit / (norm + EPSILON))

    def apply(self, scale: float = 1.0) -> None:
        assert self.pending is not None
        begun = time.perf_counter()
        for shard in self.shards.values():
            self.step(shard, scale)
        self.count(self.pending)
        self.report.compute_s += time.perf_counter() - begun
        for shard in self.shards.values():
            ready, shard.waiting = shard.waiting, []
            for peer, wish, payload in ready:
                self.handler(wish)(peer, wish, payload)

    def step(self, shard: Shard, scale: float) -> None:
        shard.holding.step(scale)
        shard.joined = None
        shard.forget()

    def count(self, step: Step) -> None:
        """It is applied."""
        self.version, self.pending = step.version, None
        self.closed.add(step.batch)
        while self.open_from in self.closed:
            self.closed.remove(self.open_from)
            self.open_from += 1

    def told(self) -> Told:
        """What is here, for who forms a view."""
        copies = [shard.state() for shard in self.shards.values()]
        return Told(self.epoch, self.version, copies, self.open_from, sorted(self.closed))

    def on_collect(self, peer: int, collect: m.Collect, _: Any) -> None:
        self.send_state(peer, self.shards[collect.shard])

    def send_state(self, peer: int, shard: Shard) -> None:
        state, tensors = tree.encode("server", shard.holding.state())
        told = [(name, list(t.shape), dtype_name(t)) for name, t in tensors.items()]
        message = m.State(self.epoch, shard.number, shard.holding.version, msgspec.json.encode(state), told)
        self.send(peer, message, [bytes_of(t.detach().clone()) for t in tensors.values()])

    def on_leave(self, peer: int, leave: m.Leave, _: Any) -> None:
        self.left = True

    # -- who goes

    def on_lost(self, lost: Lost) -> None:
        self.placed.pop(lost.peer, None)
        if lost.peer < self.ctx.world:
            if not lost.left:
                self.ctx.tell("warning", text=f"worker {lost.peer} is gone: {lost.reason}")
            for shard in self.shards.values():
                shard.reading.pop(lost.peer, None)
                shard.waiting = [wish for wish in shard.waiting if wish[0] != lost.peer]
        else:
            self.on_lost_server(lost)

    def on_lost_server(self, lost: Lost) -> None:
        if self.voter.view.lead not in (lost.peer, self.rank):
            return  # the lead misses it, and says so
        if lost.error is not None:
            raise lost.error
        raise PeerLost(f"server {lost.peer} is gone ({lost.reason})", (lost.peer,))

    def on_silent(self, silent: Silent) -> None:
        if silent.peer == self.voter.view.lead:
            self.on_silent_server(silent)

    def on_silent_server(self, silent: Silent) -> None:
        raise DeadlineExceeded(f"server {silent.peer} gave no sign of life for {silent.seconds:.0f} s", (silent.peer,))


def serve(ctx: Context) -> Iterator[SafePoint]:
    from weft.patterns.leading import Lead, Replicated

    pattern = cast(ParameterServer, ctx.pattern)
    own = flats(pattern, ctx.facts)
    kind = Replicated if pattern.replicas > 1 else Lead if ctx.rank == ctx.world else Server
    yield from kind(ctx, own).run()


def check_finite(flat: Flat, pushed: Pushed, batch: int) -> None:
    given = [*flat.parameters(pushed.memory), *(some.values for some in pushed.rows)]
    if all(math.isfinite(t.sum().item()) or bool(t.isfinite().all()) for t in given):
        return
    views = [*flat.views(pushed.memory)[0], *(some.values for some in pushed.rows)]
    names = [piece.name for piece, _ in held_of(flat)]
    name = next(name for name, view in zip(names, views, strict=True) if not view.isfinite().all())
    raise TaskError(
        f"a gradient of parameter {name!r} that worker {pushed.worker} pushed at step {batch + 1} is not finite though the loss was: nothing of "
        "that batch was applied. Look for sqrt, log, norm or a division at 0 in the loss, lower the learning rate, or run with "
        "torch.autograd.set_detect_anomaly(True) in the task: it names the operation."
    )


def handler_name(message: m.Any) -> str:
    return f"on_{type(message).__name__.lower()}"


def after(chain: Sequence[int], member: int) -> list[int]:
    """Those behind it."""
    return list(chain[chain.index(member) + 1 :]) if member in chain else []


def bytes_of(tensor: torch.Tensor) -> memoryview:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data


def are_places(places: torch.Tensor, rows: int) -> bool:
    return not len(places) or bool((places.min() >= 0) & (places.max() < rows))


def tree_dtype(name: str) -> torch.dtype:
    kind = getattr(torch, name, None)
    if not isinstance(kind, torch.dtype):
        raise CommError(f"a tensor of type {name!r}, which there is not")
    return kind
