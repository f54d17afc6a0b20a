"""The role of a worker under a parameter server: ask for a share, read what has changed, compute, push, ask again.

It keeps nothing that the others need: who comes after it goes on with its share.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import nn
from torch.utils.data import IterableDataset

from weft.comm.buffers import Buffers, Bytes
from weft.comm.endpoint import Arrival, Lost, Sending, Silent
from weft.comm.wire import Head
from weft.config import FIRST_PART
from weft.data.keys import key_int
from weft.data.sampler import Draw
from weft.errors import CommError, DeadlineExceeded, PeerLost, TaskError
from weft.patterns.base import Context, SafePoint, StepReport
from weft.patterns.feeds import Feed, make_feed
from weft.patterns.holding import Flat, SomeRows, copy_all, describe, flats, untrained
from weft.patterns.parameter_server import ParameterServer
from weft.patterns.randomness import seed_everything
from weft.patterns.training import Replica
from weft.servers import messages as m
from weft.servers.views import View, Voter, first_view
from weft.update import Dense, Rows, Update

BETWEEN_EPOCHS = m.Propose | m.Moved | m.Busy
LOOK_S = 0.25  # how often one that waits looks whether those are there for whom others may follow


class Feeds:
    """Any share of any batch: a feed for each share that this worker was ever given, brought to the batch that is asked for."""

    def __init__(self, ctx: Context, train: Any) -> None:
        self.ctx, self.train = ctx, train
        self.dtype = cast(torch.dtype, getattr(torch, ctx.config.dtype))
        self.begin = ctx.resume.step if ctx.resume else 0
        self._feeds: dict[int, Feed] = {}
        self._next: dict[int, int] = {}  # the batch that each draws next
        self._first: dict[str, Any] = {}  # the cursor where all begin

    def at(self, batch: int, share: int) -> tuple[Feed, Draw]:
        feed = self._feeds.get(share)
        if feed is None:
            feed = self._feeds[share] = self._make(share)
            self._next[share] = self.begin
        if self._next[share] > batch:
            feed.load_state_dict(self._first)
            self._load_stream(feed)
            self._next[share] = self.begin
        while True:
            draw = feed.next()
            self._next[share] += 1
            if self._next[share] > batch:
                return feed, draw

    def _make(self, share: int) -> Feed:
        train = self.train
        if self._feeds and isinstance(train, IterableDataset):  # one that others are in the middle of
            seed_everything(key_int(self.ctx.config.seed, "data"))
            train, _ = self.ctx.task.data()
        feed = make_feed(train, dataclasses.replace(self.ctx, rank=share), self.dtype)
        if self.ctx.resume is not None:
            feed.load_state_dict(self.ctx.resume.meta["sampler"])
            self._load_stream(feed)
        self._first = self._first or feed.state_dict()
        return feed

    def _load_stream(self, feed: Feed) -> None:
        if self.ctx.resume is not None:
            feed.load_stream_state(self.ctx.resume.parts[FIRST_PART].get("stream"))


class Borrower(Replica):
    """A model whose parameters are the servers'."""

    def __init__(self, ctx: Context) -> None:
        pattern = cast(ParameterServer, ctx.pattern)
        super().__init__(
            dataclasses.replace(ctx, resume=None), accumulate=pattern.accumulate, autocast=pattern.autocast
        )
        self.feeds = Feeds(ctx, self.train)
        self.drawn_in_all = 0

    def _make_optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(
            list(self.params.values()), lr=0.0
        )  # never stepped: the task's may hold a table's worth of state

    def _make_schedule(self) -> None:
        return None

    def of_share(self, batch: int, share: int) -> Update:
        """Its part of the joined gradient."""
        seed_everything(key_int(self.seed, "share", batch, share))
        feed, draw = self.feeds.at(batch, share)
        self.feed, self.drawn_in_all = cast(Feed, Located(feed, draw)), draw.total
        self.step, self.share, self.step_seed = batch, share, key_int(self.seed, "step", share) >> 1
        return self.gradients()


class Located:
    """A feed of one draw."""

    def __init__(self, feed: Feed, draw: Draw) -> None:
        self.batch, self._draw = feed.batch, draw

    def next(self) -> Draw:
        return self._draw


class Desk:
    """A worker's side of all conversations."""

    def __init__(self, ctx: Context, own: Sequence[Flat]) -> None:
        assert ctx.endpoint is not None
        pattern = cast(ParameterServer, ctx.pattern)
        self.endpoint, self.flats = ctx.endpoint, own
        self.servers = range(ctx.world, ctx.world + len(own))
        self.voter = Voter(first_view(self.servers, pattern.replicas))
        self.detect_s = pattern.detect_s if pattern.replicas > 1 else self.endpoint.deadline_s
        self.replicated = pattern.replicas > 1
        for server in self.servers:
            self.endpoint.patience[server] = self.detect_s
        self.buffers = [Buffers(self.endpoint, flat.nbytes) for flat in own]
        self.grads: list[Bytes] = []
        self.gone_since: float | None = None
        self.reasons: dict[int, str] = {}
        self.seq = self.bytes_sent = self.messages = 0
        self.over = False  # the lead has closed its link with no error
        self.forget()

    def forget(self) -> None:
        """What was read. Memory of its own: what an earlier server still sends may come into the old one."""
        self.values: dict[int, Bytes] = {}  # by shard, what came of it: its server's own memory, if that is here
        self._taken: dict[int, Bytes] = {}  # where values are put that are not read where they lie
        self.has = [-1] * len(self.flats)

    @property
    def view(self) -> View:
        return self.voter.view

    @property
    def epoch(self) -> int:
        return self.voter.view.epoch

    def send(self, server: int, message: m.Any, payload: Sequence[Any] = ()) -> Sending | None:
        """To one that may have gone: then somebody follows it, or ``hear`` says that nobody does."""
        if self.replicated and server not in self.endpoint.peers:
            return None
        self.seq += 1
        meta = m.encode(message)
        sending = self.endpoint.isend(server, self.seq, meta, payload)
        self.bytes_sent += len(meta) + sum(len(each) for each in payload)
        self.messages += 1
        return sending

    def hear(self) -> tuple[int, Any]:
        """The next message that is of this epoch: (who, what). A server that is slow is waited for; one that is gone or silent is an error, unless
        another may follow it."""
        while True:
            try:
                event = self.endpoint.recv_any(LOOK_S if self.replicated else None, self._place)
            except DeadlineExceeded:
                self.look_for_lead()
                continue  # nobody has anything to say; who does not even answer is told of as Silent
            if event.peer not in self.servers:
                continue
            if isinstance(event, Lost) and self.is_over(event):
                return event.peer, m.Finish()
            if isinstance(event, Silent) and not self.replicated:
                raise DeadlineExceeded(
                    f"server {event.peer} gave no sign of life for {event.seconds:.0f} s", (event.peer,)
                )
            if isinstance(event, Arrival):
                message = m.decode(event.head.meta)
                if isinstance(message, BETWEEN_EPOCHS):
                    self.vote(event.peer, message)
                elif getattr(message, "epoch", self.epoch) == self.epoch:
                    return event.peer, message

    def is_over(self, lost: Lost) -> bool:
        if lost.error is not None:
            raise lost.error
        self.reasons[lost.peer] = lost.reason
        if lost.left and lost.peer == self.view.lead:
            self.over = True
        elif not (lost.left or self.replicated):
            raise PeerLost(f"server {lost.peer} is gone ({lost.reason})", (lost.peer,))
        return self.over

    def is_there(self, server: int) -> bool:
        return server in self.endpoint.peers and server not in self.endpoint.silent

    def look_for_lead(self) -> None:
        """PeerLost if a server is missed and nobody follows it."""
        gone = [server for server in sorted(self.view.servers) if not self.is_there(server)]
        if not (self.replicated and gone):
            self.gone_since = None
            return
        self.gone_since = self.gone_since or time.monotonic()
        if time.monotonic() - self.gone_since > self.endpoint.deadline_s:
            reason = self.reasons.get(gone[0], "no sign of life")
            raise PeerLost(f"server {gone[0]} is gone ({reason}), and no other follows it", tuple(gone))

    def vote(self, peer: int, message: m.Propose | m.Moved | m.Busy) -> None:
        if isinstance(message, m.Propose):
            if self.voter.grants(message.epoch, peer, message.view, self.is_there):
                self.send(peer, m.Grant(message.epoch, self.view))
            else:
                self.send(peer, m.Deny(self.voter.promised, self.epoch))
        elif isinstance(message, m.Busy):
            self.endpoint.patience[peer] = self.endpoint.deadline_s if message.busy else self.detect_s
        elif self.voter.adopts(message.view):
            self.forget()
            for server in self.servers:
                self.endpoint.patience[server] = self.detect_s
            raise Redo

    def _place(self, head: Head) -> Sequence[memoryview]:
        message = m.decode(head.meta)
        if not head.payload_bytes:
            return []
        expected = self._expected_bytes(message)
        if head.payload_bytes != expected:
            raise CommError(
                f"{head.payload_bytes} bytes come with {type(message).__name__}, where {expected} belong",
                (head.sender,),
            )
        if isinstance(message, m.Values | m.Train) and message.epoch == self.epoch:
            shard = message.shard if isinstance(message, m.Values) else 0
            if head.lent is not None and self.flats[shard].holds(head.lent):
                self.values[shard] = np.frombuffer(head.lent, np.uint8)
                return [head.lent]
            if shard not in self._taken:
                self._taken[shard] = self.flats[shard].memory()
            self.values[shard] = self._taken[shard]
            return [self.values[shard].data]
        memory = np.empty(head.payload_bytes, np.uint8)
        if isinstance(message, m.Rows) and message.epoch == self.epoch:
            self.rows = memory
        if isinstance(message, m.Welcome):
            self.welcome = memory
        return [memory.data]

    def _expected_bytes(self, message: m.Any) -> int:
        if isinstance(message, m.Values) and 0 <= message.shard < len(self.flats):
            return self.flats[message.shard].nbytes
        if isinstance(message, m.Train) and message.given >= 0:
            return self.flats[0].nbytes
        if isinstance(message, m.Rows):
            return self.looked_bytes
        return self.welcome_bytes if isinstance(message, m.Welcome) else 0

    def expect(self, kinds: type | tuple[type, ...]) -> Any:
        server, message = self.hear()
        if isinstance(message, m.Finish) and not isinstance(message, kinds):
            raise Over
        if isinstance(message, m.Refused):
            raise CommError(f"server {server} refused: {message.why}", (server,))
        if not isinstance(message, kinds):
            raise CommError(f"server {server} said {type(message).__name__} out of turn", (server,))
        return message

    # -- what a worker wants

    def join(self, model: list[tuple[str, list[int], str]], nbytes: int) -> np.ndarray[Any, Any]:
        """``nbytes``: of what no server trains."""
        self.welcome, self.welcome_bytes = np.empty(0, np.uint8), nbytes
        while True:
            try:
                self.send(self.view.lead, m.Join(model))
                self.expect(m.Welcome)
            except Redo:
                continue
            return self.welcome

    def ask(self, done: m.Done | None, part: Part | None, asked: bool) -> m.Train | m.Evaluate | m.Finish:
        """``asked``: the push did."""
        if part is None and not asked:
            self.send(self.view.lead, m.Ask(self.epoch, done))
        elif part is not None:
            self.send(self.view.lead, m.Ask(self.epoch, None, part.part, part.number), [part.sums])
        return cast(m.Train | m.Evaluate | m.Finish, self.expect((m.Train, m.Evaluate, m.Finish)))

    def pull(self, version: int, given: int = -1) -> list[int]:
        """The shards' values, at that version or later, are in ``values``, where they have changed; which have. ``given``: the first's came with the
        order."""
        asked = range(1 if given >= 0 else 0, len(self.flats))
        for shard in asked:
            self.send(self.view.chains[shard][0], m.Pull(self.epoch, shard, version, self.has[shard]))
        for _ in asked:
            values = self.expect(m.Values)
            self.has[values.shard] = values.version
        if given >= 0:
            self.has[0] = given
        return sorted(self.values)

    def begin(self) -> list[Bytes]:
        """Memory for the gradients that are pushed next; what was pushed before may still be read."""
        self.grads = [buffers.take() for buffers in self.buffers]
        return self.grads

    def look(self, shard: int, table: int, places: torch.Tensor, version: int) -> torch.Tensor:
        """Rows of a shard's table, (K, width)."""
        own = self.flats[shard].tables[table]
        self.looked_bytes = len(places) * own.row_bytes
        look = m.Look(self.epoch, shard, version, table, len(places))
        self.send(self.view.chains[shard][0], look, [places.numpy().view(np.uint8).data])
        self.expect(m.Rows)
        return torch.from_numpy(self.rows).view(own.dtype).view(len(places), own.width)

    def push(
        self,
        batch: int,
        share: int,
        weight: float,
        absent: Sequence[list[int]],
        rows: Sequence[Sequence[SomeRows]],
        done: m.Done,
    ) -> bool:
        """``grads``, and rows of tables, are with all servers; whether that was said with the push, and more asked for."""
        alone = len(self.flats) == 1
        for shard, memory in enumerate(self.grads):
            counts = [len(each.places) for each in rows[shard]]
            told = done if alone else None
            push = m.Push(self.epoch, shard, batch, share, self.has[shard], weight, absent[shard], counts, told)
            payload = [each.places for each in rows[shard]] + [each.values for each in rows[shard]]
            numbers = [t.contiguous().reshape(-1).view(torch.uint8).numpy().data for t in payload]
            sending = self.send(self.view.chains[shard][0], push, [memory.data, *numbers])
            if sending is not None:
                self.buffers[shard].sent(memory, sending)
            self.buffers[shard].leave(memory)
        if not alone:
            for _ in self.flats:
                self.expect(m.Ack)
        return alone


class Part(NamedTuple):
    """Of an evaluation, done: its sums."""

    number: int
    part: int
    sums: memoryview


class Redo(Exception):
    """Another leads, or serves a shard: what this worker was at is to be asked for anew."""


class Over(Exception):
    """The run has ended while this worker was at something that nobody waits for."""


class Carrier:
    """Between the model and the memory in which its parts travel."""

    def __init__(self, replica: Borrower, desk: Desk) -> None:
        self.replica, self.desk = replica, desk
        self.running = list(replica.running.values())
        self._read = [torch.zeros_like(buffer) for buffer in self.running]

    @torch.no_grad()
    def take(self, shards: Sequence[int]) -> None:
        """What came of them, into the model; nothing of what came is looked at afterwards."""
        for shard in shards:
            flat = self.desk.flats[shard]
            pieces, running = flat.views(self.desk.values.pop(shard))
            copy_all([flat_of(self.replica.params[p.name])[p.start : p.stop] for p in flat.pieces], pieces)
            for kept, value in zip(self._read, running, strict=False):
                kept.copy_(value.view(kept.shape))
        for buffer, kept in zip(self.running, self._read, strict=True):  # our own last share has moved them
            buffer.copy_(kept)

    @torch.no_grad()
    def give(self, update: Update) -> list[list[int]]:
        """The gradients, to where they are pushed from; the places of those that are missing, by server."""
        missing = []
        for flat, memory in zip(self.desk.flats, self.desk.begin(), strict=True):
            pieces, running = flat.views(memory)
            absent, sources, targets = [], [], []
            for k, (piece, target) in enumerate(zip(flat.pieces, pieces, strict=True)):
                entry = update.entries.get(piece.name)
                if entry is None:
                    absent.append(k)
                    target.zero_()
                else:
                    sources.append(cast(Dense, entry).tensor.reshape(-1)[piece.start : piece.stop])
                    targets.append(target)
            copy_all(targets, sources)
            for buffer, target in zip(self.running, running, strict=False):
                target.copy_(buffer.reshape(-1))
            missing.append(absent)
        return missing


class Looker:
    """Before a module looks up rows of a sparse parameter, these are read from the servers: no more of it travels.

    A table is read through nn.Embedding and nn.EmbeddingBag alone; a task that uses one in another way is told."""

    def __init__(self, replica: Borrower, desk: Desk) -> None:
        self.replica, self.desk, self.version = replica, desk, 0
        self.places = {  # by parameter: on which server, which of its tables, from and to which row
            name: [
                (server, k, table.piece.start, table.piece.stop)
                for server, flat in enumerate(desk.flats)
                for k, table in enumerate(flat.tables)
                if table.piece.name == name
            ]
            for name in replica.sparse
        }
        names = {id(replica.params[name]): name for name in replica.sparse}
        self.seen: dict[str, list[torch.Tensor]] = {}
        for module in replica.model.modules():
            if isinstance(module, nn.Embedding | nn.EmbeddingBag) and id(module.weight) in names:
                if module.max_norm is not None:
                    raise TaskError(
                        f"{names[id(module.weight)]!r} has max_norm={module.max_norm}, which writes to rows that live on servers: leave it out."
                    )
                module.register_forward_pre_hook(partial(self._before, names[id(module.weight)]), with_kwargs=True)

    def begin(self, version: int) -> None:
        self.version = version
        self.seen = {name: [] for name in self.replica.sparse}

    @torch.no_grad()
    def _before(self, name: str, module: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        rows = (args[0] if args else named["input"]).reshape(-1).unique().long()
        self.seen[name].append(rows)
        table = self.replica.params[name]
        for server, k, start, stop in self.places[name]:
            own = rows[(rows >= start) & (rows < stop)]
            if len(own):
                values = self.desk.look(server, k, own - start, self.version)
                table[own] = values.view(-1, *table.shape[1:])

    def rows(self, update: Update) -> list[list[SomeRows]]:
        """What of their gradients goes to each server, table by table."""
        result: list[list[SomeRows]] = [[] for _ in self.desk.flats]
        for server, flat in enumerate(self.desk.flats):
            for table in flat.tables:
                name, start, stop = table.piece
                entry = cast(Rows, update.entries[name])
                if not torch.isin(entry.indices, torch.cat([*self.seen[name], entry.indices[:0]])).all():
                    raise TaskError(
                        f"{type(self.replica.task).__name__} uses rows of {name!r} that no nn.Embedding looked up, and under a parameter server only "
                        "such are there: read it through its module, or make it dense (sparse=False)."
                    )
                own = (entry.indices >= start) & (entry.indices < stop)
                result[server].append(SomeRows(entry.indices[own] - start, entry.values[own].reshape(-1, table.width)))
        return result


def flat_of(p: torch.Tensor) -> torch.Tensor:
    """Its numbers in order, to be written to."""
    if not p.is_contiguous():
        p.data = p.data.contiguous()
    return p.data.view(-1)


def work(ctx: Context) -> Iterator[SafePoint]:
    """Until there is nothing left to do."""
    desk = Desk(ctx, flats(cast(ParameterServer, ctx.pattern), ctx.facts))
    replica = Borrower(ctx)
    carrier, looker = Carrier(replica, desk), Looker(replica, desk)
    pattern = cast(ParameterServer, ctx.pattern)
    runs_ahead = pattern.staleness != 0 or pattern.backup_workers > 0
    done: m.Done | None = None
    part: Part | None = None
    asked_too = False
    step = ctx.resume.step if ctx.resume else 0
    try:
        nbytes = sum(t.nbytes for t in untrained(replica.model, ctx.facts))
        take_over(replica, desk.join(describe(replica.model), nbytes), ctx)
        while not desk.over:
            begun, sent, messages = time.perf_counter(), desk.bytes_sent, desk.messages
            try:
                order = desk.ask(done, part, asked_too)
                done, part, asked_too = None, None, False
                asked = time.perf_counter()
                if isinstance(order, m.Finish):
                    return
                carrier.take(desk.pull(order.version, order.given if isinstance(order, m.Train) else -1))
                if runs_ahead:  # what was read is given back before others' shares are applied
                    desk.endpoint.look((), "a look")
                pulled = time.perf_counter()
                looker.begin(order.version)
                if isinstance(order, m.Evaluate):
                    sums = replica.evaluated(order.part, order.parts).flat.numpy().view(np.uint8).data
                    part = Part(order.number, order.part, sums)
                    continue
                replica.report = report = StepReport()
                update = replica.of_share(order.batch, order.share)
                (loss,), weight = report.losses, update.weight
                if not math.isfinite(loss):
                    raise TaskError(
                        f"the loss is {loss} on rank {ctx.rank} at step {order.batch + 1}: no update was made. Lower the learning rate, "
                        "set -o clip_norm=1.0, or look at the examples of that step."
                    )
                absent = carrier.give(update)
                computed = time.perf_counter()
                done = m.Done(order.batch, order.share, min(desk.has), loss, weight, replica.drawn_in_all)
                asked_too = desk.push(order.batch, order.share, weight, absent, looker.rows(update), done)
            except Redo:
                done, part, asked_too = None, None, False
                continue
            step = max(step, order.batch + 1)
            report.losses, report.weights, report.examples = [], [], 0  # the lead tells these of all
            report.wait_s, report.exchange_s = asked - begun, pulled - asked + time.perf_counter() - computed
            report.bytes_sent, report.messages = desk.bytes_sent - sent, desk.messages - messages
            yield SafePoint(step, False, False, report, dict, False, dict, dict, follows=True)
    except Over:
        return


def take_over(replica: Borrower, data: np.ndarray[Any, Any], ctx: Context) -> None:
    """What no server trains, as the first server has it."""
    at = 0
    with torch.no_grad():
        for tensor in untrained(replica.model, ctx.facts):
            part = torch.from_numpy(data[at : at + tensor.nbytes].copy()).view(tensor.dtype)
            tensor.copy_(part.view(tensor.shape))
            at += tensor.nbytes
