"""The server that leads: hands out shares, closes batches, and has the run evaluated, saved and stopped where nothing is half done.

``Replicated``: every server of a run with replicas, each of which may come to lead.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import msgspec
import numpy as np
import torch

from weft.comm.endpoint import Lost, Silent
from weft.comm.wire import Head
from weft.config import FIRST_PART
from weft.data.keys import key_int
from weft.errors import CommError, DeadlineExceeded, Incompatible, PeerLost, TaskError, WeftError
from weft.patterns.base import Context, Deposed, SafePoint, StepReport
from weft.patterns.feeds import make_feed
from weft.patterns.holding import Flat, Holding, describe, untrained, whole_state
from weft.patterns.metrics import Totals
from weft.patterns.randomness import host_state, seed_everything
from weft.patterns.serving import BETWEEN_EPOCHS, TICK_S, Server, Shard, Step, bytes_of, handler_name, tree_dtype
from weft.patterns.succession import Succession
from weft.resilience.checkpoint import state as tree
from weft.servers import messages as m
from weft.servers.ledger import Ledger, Share

OF_SUCCESSION = BETWEEN_EPOCHS | m.Busy | m.Misses
LOOK_S = 0.02  # how often, while somebody is missed
ALL_SILENT = 10  # deadlines: one that computes a share gives no sign of life either


class Lead(Server):
    def __init__(self, ctx: Context, all_flats: Sequence[Flat]) -> None:
        super().__init__(ctx, all_flats)
        self.workers: set[int] = set(range(ctx.world))
        self.applied: deque[tuple[int, StepReport]] = deque()  # that nobody has been told of
        self.evaluation = 0
        self.taken: dict[int, int | None] = {}  # of the evaluation under way: who is at it
        self.sums: dict[int, np.ndarray[Any, Any]] = {}
        self.states: dict[int, dict[str, Any]] = {}  # by shard
        self.totals = Totals(ctx.task, ctx.facts.sums)
        self.stopping = False
        self.announced = self.version  # the last update that was told of
        self.all_silent_since = math.inf
        self.description = describe(self.built.model)
        self.welcome = [bytes_of(t) for t in untrained(self.built.model, ctx.facts)]
        dtype = cast(torch.dtype, getattr(torch, ctx.config.dtype))
        self.feed = make_feed(self.built.train, dataclasses.replace(ctx, rank=0), dtype)
        self.feed_at = self.version
        if ctx.resume is not None:
            self.feed.load_state_dict(ctx.resume.meta["sampler"])
            self.feed.load_stream_state(ctx.resume.parts[FIRST_PART].get("stream"))
        self.take_up()

    def take_up(self) -> None:
        """The work, where nothing is under way."""
        pattern, shares = self.pattern, self.pattern.shares(self.ctx.world)
        self.ledger = Ledger(shares, self.open_from, pattern.bound, pattern.backup_workers, pattern.start, self.closed)
        self.idle: list[int] = []
        self.dones: dict[Share, tuple[int, m.Done]] = {}  # who has done it
        self.closing: dict[int, list[int]] = {}  # by batch, the shares to be joined
        self.squares: dict[int, float] = {}  # by shard, of the update that all of them join
        self.ordered = self.version  # updates that all servers have been told of
        self.joining = False

    @property
    def leads(self) -> bool:
        return self.voter.view.lead == self.rank

    @property
    def others(self) -> list[int]:
        return [server for server in sorted(self.voter.view.servers) if server != self.rank]

    def run(self) -> Iterator[SafePoint]:
        try:
            yield from self.lead()
        except GeneratorExit:
            self.finish()
            raise
        self.finish()

    def lead(self) -> Iterator[SafePoint]:
        """Until the run has ended, or another leads."""
        total = self.ctx.total_steps
        if self.is_due(self.version):  # who led before died after its last update, before its result
            self.ledger.limit = self.version
            yield from self.at_pause(self.version, StepReport())
        if self.version < total:
            self.ledger.pause(self.next_pause(self.version))
            self.hand_out()
        while self.version < total and self.leads and not self.left:
            self.turn(TICK_S)
            while self.applied and self.leads:
                version, report = self.applied.popleft()
                self.follow(version)
                if version == self.ledger.limit:
                    yield from self.at_pause(version, report)
                    if not self.stopping and self.leads:
                        self.ledger.pause(self.next_pause(version))
                        self.hand_out()
                else:
                    self.announced = version
                    yield self.safe_point(version, report)
            if self.leads and not self.stopping and self.ctx.stop_requested():
                self.stopping = True
                begun = self.ledger.begun  # one more where nothing is under way: what is not new is not saved
                self.ledger.limit = min(total, max(begun, self.ledger.closed + 1))
                self.hand_out()

    def at_pause(self, version: int, report: StepReport) -> Iterator[SafePoint]:
        self.announced = version
        yield self.safe_point(version, report)

    def is_due(self, version: int) -> bool:
        """It was a pause, and nobody is known to have saved and evaluated there."""
        return version == self.ctx.total_steps

    def next_pause(self, version: int) -> int:
        """The next version at which the run is saved or evaluated."""
        asked = [every for every in (self.ctx.save_every, self.ctx.config.eval_every) if every]
        return min([self.ctx.total_steps, *((version // every + 1) * every for every in asked)])

    def safe_point(self, version: int, report: StepReport) -> SafePoint:
        report.bytes_sent, self.bytes_sent = self.bytes_sent, 0
        report.messages, self.messages = self.messages, 0
        stop = self.stopping and version == self.ledger.limit
        ended = version == self.ctx.total_steps
        return SafePoint(version, stop, ended, report, self.parts, False, self.meta, self.evaluate, leads=True)

    def finish(self) -> None:
        for worker in self.idle:
            self.send(worker, m.Finish())
        for other in self.servers:
            if other != self.rank:
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
        self.send(peer, m.Welcome(self.voter.view), self.welcome)

    def on_ask(self, peer: int, ask: m.Ask, payload: Sequence[memoryview]) -> None:
        if peer not in self.idle:
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
            self.on_ask(peer, m.Ask(push.epoch, push.done), ())

    def payload_of(self, message: m.Any) -> int:
        if isinstance(message, m.Ask) and message.part is not None:
            return self.totals.flat.nbytes
        return super().payload_of(message)

    def refusal_now(self, message: m.Any, sender: int) -> str:
        if isinstance(message, m.Ask | m.Push) and (done := message.done) is not None:
            if isinstance(message, m.Push) and (
                len(self.flats) > 1 or (done.batch, done.share) != (message.batch, message.share)
            ):
                return f"worker {sender} pushed share {message.share} of batch {message.batch}, and says that all is done of another"
            if not (math.isfinite(done.loss) and 0 <= done.weight < math.inf and done.drawn > 0):
                return f"worker {sender} has a loss of {done.loss} over {done.weight} of {done.drawn} examples"
            if not 0 <= done.version <= self.ordered:
                return f"worker {sender} computed at version {done.version} of {self.ordered}"
        return super().refusal_now(message, sender)

    def hand_out(self) -> None:
        """Something to do for everybody who asks, as long as there is."""
        silent = self.endpoint.silent  # who does not answer is not waited for
        for worker in [worker for worker in self.idle if worker not in silent]:
            order = self.work_for(worker)
            if order is not None:
                self.idle.remove(worker)
                self.give(worker, order)

    def give(self, worker: int, order: m.Train | m.Evaluate) -> None:
        """With shard 0 as it is now, if that will do."""
        first = self.shards[0] if self.voter.view.chains[0][0] == self.rank else None
        if first is None or isinstance(order, m.Evaluate) or order.version > first.holding.version:
            self.send(worker, order)
            return
        given = msgspec.structs.replace(order, given=first.holding.version)
        self.send_values(worker, first, given, first.reading.get(worker, -1))

    def work_for(self, worker: int) -> m.Train | m.Evaluate | None:
        left = [part for part, who in self.taken.items() if who is None and part not in self.sums]
        if left:
            part = worker if worker in left else left[0]
            self.taken[part] = worker
            return m.Evaluate(self.epoch, self.evaluation, part, len(self.taken), self.version)
        share = self.ledger.take(worker)
        # what is closed may not be applied yet: then its reading waits
        version = self.ordered if self.ledger.bound is None else self.ledger.lowest
        return None if share is None else m.Train(self.epoch, share.batch, share.share, version)

    def on_done(self, peer: int, done: m.Done) -> None:
        share = Share(done.batch, done.share)
        if not self.is_closed(done.batch) and self.has_all_of(share):
            self.dones.setdefault(share, (peer, done))
            if shares := self.ledger.done(share, done.weight):
                self.closing[done.batch] = shares
                self.close_next()

    def has_all_of(self, share: Share) -> bool:
        """As far as it can be seen here."""
        return all(share in self.shards[number].held for number in self.voter.view.served_by(self.rank))

    def close_next(self) -> None:
        """Batches whose shares all servers have, each as one update, on all servers in the same order: the batches', or, where nothing bounds
        who is ahead, the one in which they came."""
        while not self.joining:
            batch = next(iter(self.closing), -1) if self.pattern.bound is None else self.ordered
            if batch not in self.closing:
                return
            shares = self.closing.pop(batch)
            dones = [self.dones.pop(Share(batch, share))[1] for share in shares]
            for share in [share for share in self.dones if share.batch == batch]:
                del self.dones[share]
            weight = sum(done.weight for done in dones)
            if not weight > 0:
                raise TaskError(
                    f"num_examples added up to {weight} over all workers at step {batch + 1}: it must be positive."
                )
            self.report.losses, self.report.weights = [d.loss for d in dones], [d.weight for d in dones]
            self.report.examples = dones[0].drawn
            self.report.staleness = [self.ordered - done.version for done in dones]
            self.ordered += 1
            self.joining = self.pattern.waits
            close = m.Close(self.epoch, self.ordered, batch, shares, dones[0].drawn / weight, self.pattern.waits)
            for other in self.others:
                self.send(other, close)
            self.on_close(self.rank, close, ())

    def on_joined(self, peer: int, joined: m.Joined, _: Any) -> None:
        if not self.joining or joined.version != self.ordered:
            raise CommError(f"server {peer} joined update {joined.version}, out of turn", (peer,))
        self.squares[joined.shard] = joined.square
        if len(self.squares) == len(self.flats):
            norm = math.sqrt(math.fsum(self.squares.values()))
            apply = m.Apply(self.epoch, joined.version, norm)
            self.squares.clear()
            for other in self.others:
                self.send(other, apply)
            self.joining = False
            self.on_apply(self.rank, apply, ())
            self.close_next()

    def count(self, step: Step) -> None:
        super().count(step)
        if self.leads:
            self.applied.append((self.version, self.report))
            self.report = StepReport()

    # -- who goes

    def on_lost(self, lost: Lost) -> None:
        super().on_lost(lost)
        if lost.peer >= self.ctx.world:
            return
        self.workers.discard(lost.peer)
        if lost.peer in self.idle:
            self.idle.remove(lost.peer)
        if not self.workers:
            raise PeerLost(f"all workers are gone, the last of them member {lost.peer} ({lost.reason})", (lost.peer,))
        self.free(lost.peer)

    def on_lost_server(self, lost: Lost) -> None:
        if lost.error is not None:
            raise lost.error
        raise PeerLost(f"server {lost.peer} is gone ({lost.reason})", (lost.peer,))

    def on_silent(self, silent: Silent) -> None:
        if silent.peer >= self.ctx.world:
            self.on_silent_server(silent)
            return
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
            self.turn_as_lead()
        self.totals.flat.copy_(torch.from_numpy(np.sum([self.sums[part] for part in sorted(self.sums)], axis=0)))
        self.taken = {}
        return self.totals.summary()

    def turn_as_lead(self) -> None:
        self.turn(TICK_S)
        if not self.leads:
            raise Deposed(f"server {self.rank} does not lead any more")

    def collect(self) -> list[dict[str, Any]]:
        """All shards' states, in order."""
        self.states, asked = {n: shard.holding.state() for n, shard in self.shards.items()}, -1
        while len(self.states) < len(self.flats):
            if asked != self.epoch:
                asked = self.epoch
                for shard, chain in enumerate(self.voter.view.chains):
                    if shard not in self.states:
                        self.send(chain[0], m.Collect(self.epoch, shard, self.version))
            self.turn_as_lead()
        return [self.states[shard] for shard in sorted(self.states)]

    def on_state(self, peer: int, state: m.State, payload: Sequence[memoryview]) -> None:
        self.states[state.shard] = decoded(peer, state, payload)

    def parts(self) -> dict[str, Any]:
        """A checkpoint as one process would write it."""
        whole = whole_state(self.built, self.collect(), self.flats)
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
            seed_everything(key_int(self.ctx.config.seed, "worker", rank, self.version))
            states.append(host_state())
        return states

    def follow(self, version: int) -> None:
        """In the data, batch by batch: of a stream all at once would take long."""
        while self.feed_at < version:
            self.feed.next()
            self.feed_at += 1

    def meta(self) -> dict[str, Any]:
        return {"sampler": self.feed.state_dict()}


class Replicated(Lead):
    """One of several servers that hold copies of each other's shards."""

    def __init__(self, ctx: Context, all_flats: Sequence[Flat]) -> None:
        super().__init__(ctx, all_flats)
        self.expected: set[int] = set()  # shards of which we are to be given a copy
        self.early: list[
            tuple[int, m.State, Sequence[memoryview]]
        ] = []  # copies that came before the view that promises them
        self.is_active = True  # all are ready for the view
        self.pausing = False
        self.succession = Succession(self, ctx.world + len(all_flats))
        self.expect_signs()

    def expect_signs(self) -> None:
        for server in self.servers:
            if server != self.rank:
                self.endpoint.patience[server] = self.pattern.detect_s

    @property
    def leads(self) -> bool:
        return super().leads and self.is_active and self.voter.is_free and not self.succession.is_behind

    def run(self) -> Iterator[SafePoint]:
        try:
            while not self.left:
                if self.leads:
                    self.applied.clear()
                    self.follow(self.version)
                    yield from self.lead()
                    if self.has_ended():
                        self.finish()
                        return
                    continue
                version = self.version
                self.turn(TICK_S)
                if self.version > version:
                    self.follow(self.version)
                    yield self.point(self.version)
        except GeneratorExit:
            if self.leads:
                self.finish()
            raise

    def has_ended(self) -> bool:
        """It did not stop leading for another who does."""
        return self.leads and not self.left

    def at_pause(self, version: int, report: StepReport) -> Iterator[SafePoint]:
        self.pausing = True
        self.tell_busy(True)
        yield from super().at_pause(version, report)
        self.tell_busy(False)
        self.pausing = False

    def tell_busy(self, busy: bool) -> None:
        """The run is saved between two of our turns, and nobody hears from us."""
        for member in range(self.ctx.world + len(self.flats)):
            if member != self.rank:
                self.send(member, m.Busy(self.epoch, busy))

    def is_due(self, version: int) -> bool:
        is_pause = version > self.built.version and self.next_pause(version - 1) == version
        return super().is_due(version) or (is_pause and version > self.announced)

    # -- frames

    def turn(self, timeout_s: float) -> None:
        super().turn(timeout_s if self.succession.is_settled else min(timeout_s, LOOK_S))
        self.succession.tend()
        self.settle()

    def handler(self, message: m.Any) -> Callable[..., None]:
        if isinstance(message, OF_SUCCESSION):
            found: Callable[..., None] = getattr(self.succession, handler_name(message))
            return found
        return super().handler(message)

    def hears(self, message: m.Any) -> bool:
        return isinstance(message, OF_SUCCESSION) or super().hears(message)

    def is_current(self, peer: int, message: m.Any) -> bool:
        if isinstance(message, BETWEEN_EPOCHS | m.Join | m.Leave):
            return True
        return super().is_current(peer, message) and self.voter.is_free

    def refusal(self, message: m.Any, head: Head) -> str:
        shards = range(len(self.flats))
        if isinstance(message, m.Grant) and (message.told is None) != (head.sender < self.ctx.world):
            return f"member {head.sender} granted as what it is not"
        if isinstance(message, m.Grant) and message.told and any(c.shard not in shards for c in message.told.copies):
            return f"server {head.sender} has a shard that there is not"
        if isinstance(message, m.Install):
            chains = dict(enumerate(message.view.chains))
            if message.view.lead != head.sender or any(m not in chains.get(n, ()) for n, m in message.fresh):
                return f"server {head.sender} told of a view that cannot be"
        return super().refusal(message, head)

    def refusal_now(self, message: m.Any, sender: int) -> str:
        if isinstance(message, m.Ask | m.Joined) and self.voter.view.lead != self.rank:
            return f"member {sender} asked of this server what only the lead does"
        return super().refusal_now(message, sender)

    def take(self, peer: int, message: m.Any, payload: Sequence[memoryview]) -> None:
        if isinstance(message, m.State) and message.epoch > self.epoch:
            self.early.append((peer, message, payload))
            return
        if not self.is_current(peer, message) and peer in self.servers:
            if getattr(message, "epoch", self.epoch) < self.voter.promised:
                self.send(peer, m.Deny(self.voter.promised, self.epoch))
        super().take(peer, message, payload)

    def on_join(self, peer: int, join: m.Join, _: Any) -> None:
        if self.leads:
            super().on_join(peer, join, _)

    def hand_out(self) -> None:
        if self.leads:
            super().hand_out()

    def close_next(self) -> None:
        if self.leads:
            super().close_next()

    # -- a view

    def install(self, install: m.Install) -> None:
        """It is this server's from now on: all its copies go to one version, and what is not applied is given up."""
        view, fresh = install.view, {(shard, member) for shard, member in install.fresh}
        self.is_active, self.joining = False, False
        self.expect_signs()
        was = self.version
        for number, shard in list(self.shards.items()):
            if self.rank in view.chains[number] and (number, self.rank) not in fresh:
                self.bring(shard, install)
            else:
                shard.drop()
                del self.shards[number]
        self.version, self.open_from, self.closed, self.pending = (
            install.version,
            install.lowest,
            set(install.closed),
            None,
        )
        if self.version > was and view.lead == self.rank:
            self.applied.append((self.version, self.report))
        self.report = StepReport()
        for number, member in sorted(fresh):
            if view.chains[number][0] == self.rank:
                self.send_state(member, self.shards[number])
        self.expected = {number for number, member in fresh if member == self.rank}
        early, self.early = self.early, []
        for peer, state, payload in early:
            if state.epoch >= view.epoch:
                self.take(peer, state, payload)
        self.tell_ready()

    def bring(self, shard: Shard, install: m.Install) -> None:
        """To the version that all go to."""
        if shard.joined is not None and shard.joined.version == install.version:
            shard.holding.step(self.scale(install.norm))
        shard.drop()
        shard.holding.take(
            shard.flat.memory(), frozenset(), []
        )  # one that is left out may still be sent what was joined
        if shard.holding.version != install.version:
            raise CommError(
                f"server {self.rank} has shard {shard.number} after {shard.holding.version} updates, and all are to go on from {install.version}"
            )

    def on_state(self, peer: int, state: m.State, payload: Sequence[memoryview]) -> None:
        if state.shard not in self.expected:
            super().on_state(peer, state, payload)
            return
        shard = Shard(state.shard, Holding(self.built, self.flats[state.shard], self.pattern))
        shard.holding.become(decoded(peer, state, payload), state.version)
        self.shards[state.shard] = shard
        self.expected.remove(state.shard)
        self.tell_ready()

    def tell_ready(self) -> None:
        if not self.expected:
            self.send(self.voter.view.lead, m.Ready(self.epoch))

    def activate(self) -> None:
        """All servers are ready for the view that we lead."""
        self.is_active = True
        self.take_up()
        if self.stopping:
            self.ledger.limit = min(self.ctx.total_steps, max(self.ledger.begun, self.ledger.closed + 1))
        elif self.pausing or (self.applied and self.next_pause(self.version - 1) == self.version):
            self.ledger.limit = self.version
        else:
            self.ledger.pause(self.next_pause(self.version))
        self.taken = {part: who if part in self.sums else None for part, who in self.taken.items()}
        for worker in sorted(self.workers):
            self.send(worker, m.Moved(self.voter.view))
        if self.pausing:
            self.tell_busy(True)

    # -- who goes

    def on_lost(self, lost: Lost) -> None:
        if lost.left and self.workers <= {lost.peer}:
            self.left = True  # the run has ended, and we were not there
        else:
            super().on_lost(lost)

    def on_lost_server(self, lost: Lost) -> None:
        self.succession.reasons[lost.peer] = lost.reason
        if not lost.left:
            self.ctx.tell("warning", text=f"server {lost.peer} is gone: {lost.reason}")

    def on_silent_server(self, silent: Silent) -> None:
        self.ctx.tell("warning", text=f"server {silent.peer} gave no sign of life for {silent.seconds:.1f} s")


def decoded(peer: int, state: m.State, payload: Sequence[memoryview]) -> dict[str, Any]:
    data, at, tensors = np.frombuffer(payload[0], np.uint8) if payload else np.empty(0, np.uint8), 0, {}
    try:
        for name, shape, dtype in state.tensors:
            kind = tree_dtype(dtype)
            tensors[name] = tensor = torch.empty(shape, dtype=kind)
            tensor.view(-1).view(torch.uint8).numpy()[:] = data[at : at + tensor.nbytes]
            at += tensor.nbytes
        return cast(dict[str, Any], tree.decode(msgspec.json.decode(state.tree), tensors))
    except (ValueError, TypeError, KeyError, RuntimeError, msgspec.MsgspecError, WeftError) as error:
        raise CommError(f"server {peer} sent a state that cannot be read: {error}", (peer,)) from error


def dict_of(model: Sequence[tuple[str, list[int], str]]) -> dict[str, str]:
    return {name: f"{dtype}{list(shape)}" for name, shape, dtype in model}
