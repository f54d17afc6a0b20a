"""The one training loop of every pattern whose workers each hold a whole replica of the model.

draw a share of the joined batch -> gradients -> Exchange.gradients -> optimizer -> Exchange.parameters -> safe point.
Patterns differ only in their Exchange. What the loop itself costs is some 30 us a step (bench/step.py holds it to that), so
here plain code beats pretty code: no object per tensor that need not be, checks that pass by one test.
"""

from __future__ import annotations

import contextlib
import math
import time
from abc import ABC
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from weft.comm.link import WORLD, Link
from weft.config import FIRST_PART, part_of
from weft.data.balance import Balancer
from weft.data.keys import key_int
from weft.data.sampler import Draw
from weft.errors import CheckpointError, TaskError
from weft.patterns.base import Context, Resume, SafePoint, StepReport
from weft.patterns.batches import Batches, check_loss
from weft.patterns.buffers import aside, places
from weft.patterns.feeds import make_feed, readable
from weft.patterns.metrics import Totals, evaluate_batch, evaluating
from weft.patterns.optimizer_state import load_optimizer_state_by_name, optimizer_state_by_name
from weft.patterns.randomness import host_state, host_state_kept, seed_everything, seed_torch, set_host_state
from weft.resilience.checkpoint import unlike
from weft.update import Dense, Entry, Rows, Transform, Update, apply_all
from weft.usage import PeakMemory

AS_IS: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
WATCHED_STEPS = 3  # whose peak of memory is told: the first makes the optimizer's state, the second meets it
EVAL_SHARE = 4  # evaluation keeps no activations: it takes this many times a training share at once


def flat_buffer(link: Link, numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros where the carrier reduces them fastest: in shared memory, where ranks share a host; else on the device."""
    return link.allocate(numel, dtype) if device.type == "cpu" else torch.zeros(numel, dtype=dtype, device=device)


class Arena:
    """One flat buffer per dtype with a view for each parameter, so that an exchange is one call and not one per tensor.

    Those named in ``first`` lie in buffers of their own, before the others.
    """

    def __init__(self, params: Mapping[str, nn.Parameter], link: Link, first: Collection[str] = ()) -> None:
        self.buffers: list[Tensor] = []
        self.views: dict[str, Tensor] = {}
        self.places: dict[str, tuple[int, int]] = {}  # which buffer, and where in it
        self.first = frozenset(first)
        kinds = {n: (n not in self.first, str(p.dtype)) for n, p in params.items()}
        for kind in sorted(set(kinds.values())):
            members = {n: p for n, p in params.items() if kinds[n] == kind}
            dtype = next(iter(members.values())).dtype
            device = next(iter(members.values())).device
            flat = flat_buffer(link, sum(p.numel() for p in members.values()), dtype, device)
            self.buffers.append(flat)
            offset = 0
            for name, p in members.items():
                self.views[name] = flat[offset : offset + p.numel()].view(p.shape)
                self.places[name] = len(self.buffers) - 1, offset
                offset += p.numel()
        self.views = {name: self.views[name] for name in params}  # in their order
        self.sums = self.buffers  # what is in use after an exchange

    def by_name(self, flats: Sequence[Tensor]) -> dict[str, Tensor]:
        """Views of tensors that are laid out as ``buffers`` are."""
        result = {}
        for name, view in self.views.items():
            k, start = self.places[name]
            result[name] = flats[k][start : start + view.numel()].view(view.shape)
        return result

    def all_reduce(self, link: Link, beside: Sequence[Tensor], number: int) -> None:
        """The sum over ranks, of ``beside`` too, in one exchange: the run's ``number``-th."""
        link.all_reduce([*self.buffers, *beside])

    def take_back(self, names: Iterable[str]) -> None:
        """What came for these parameters cannot be used in this step."""

    def state(self) -> dict[str, Any]:
        """What an exchange leaves behind, alike on all ranks."""
        return {}

    def own_state(self) -> dict[str, Any]:
        """What it leaves behind on this rank."""
        return {}

    def load(self, resume: Resume) -> None: ...


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters that need a gradient, each once (tied ones under their first name); those that live on this worker."""
    return {n: p for n, p in model.named_parameters() if p.requires_grad and not p.is_meta}


class Replica:
    """A whole model on one worker: its optimizer, schedule, place in the data."""

    #: All workers take part in each forward and backward, those too that have no example left.
    computes_jointly = False
    #: Groups whose links carry messages while the worker computes: what they take is not the loop's.
    carried_aside: Collection[str] = ()

    def __init__(
        self, ctx: Context, *, accumulate: int = 1, autocast: str = "none", chain: Sequence[Transform] = ()
    ) -> None:
        config, task = ctx.config, ctx.task
        self.ctx, self.task, self.link, self.chain = ctx, task, ctx.link, list(chain)
        self.accumulate = self.pieces = accumulate  # of a share, which are computed one after the other
        self.share, self.shares = ctx.pattern.share_of(ctx.rank, ctx.world), ctx.pattern.shares(ctx.world)
        dtype = cast(torch.dtype, getattr(torch, config.dtype))
        seed_everything(key_int(config.seed, "data"))
        train, test = task.data()
        self.memory = PeakMemory.of(ctx.device) if config.cluster != "inprocess" else None  # threads share a process
        seed_everything(key_int(config.seed, "init"))
        self.model = self._make_model(dtype)
        self.params = trainable(self.model)
        self.sparse = frozenset(p.name for p in ctx.facts.params if p.sparse)
        running = {b.name for b in ctx.facts.running}
        self.running = {n: b for n, b in self.model.named_buffers() if n in running}
        self.running_places = [place for each in places(self.model, running).values() for place in each]
        self.optimizer = self._make_optimizer()
        self.schedule = self._make_schedule()
        self.stepped: Mapping[str, nn.Parameter] = (
            self.params
        )  # by the optimizer: an exchange may leave it a part of them
        self.optimizer_state: Callable[[], dict[str, Any]] = partial(
            optimizer_state_by_name, self.optimizer, self.params
        )
        self.train = train
        self.feed = make_feed(train, ctx, dtype)
        test = readable(test, ctx.facts.indexes.get("held-out"))
        self.test_batches = Batches(test, task, ctx.device, dtype)
        self.num_test = len(cast(Any, test))
        self.balancer: Balancer | None = None
        if config.balance == "auto":
            # BatchNorm needs two examples to normalise by, and some more to do it well
            least = max(2, config.batch // self.shares // 4) if self.running else 1
            self.balancer = Balancer(config.batch, self.shares, least)
        self.seed = config.seed
        self.step_seed = key_int(config.seed, "step", self.share) >> 1  # room to add the step
        self.autocast = autocast == "bf16"
        self.step = 0
        self.averaged_over = self.shares  # shares whose gradients will be joined
        self.joined = 0.0  # examples that these draw in this step, as far as can be known
        self.drawn = 0.0  # the weight of this worker's share of them
        self.epoch_ended = False
        self.report = StepReport()
        self.attached = Update()  # the newest own one: its entries are the parameters' gradients
        self.applied_s = 0.0  # what the last ``apply`` took
        self.spans = ctx.spans
        self.before_last_backward: Callable[[], None] | None = None  # of a step: from then on its gradients are whole
        seed_everything(key_int(config.seed, "worker", self.share, ctx.resume.step if ctx.resume else 0))
        if ctx.resume is not None:
            state = ctx.resume.parts[FIRST_PART]
            self.load(state, ctx.resume.meta)
            if ctx.resume.world == ctx.world:
                set_host_state(state["host_random"][ctx.rank])
        else:
            self._equalise()

    def _make_optimizer(self) -> torch.optim.Optimizer:
        return self.task.optimizer(list(self.params.values()))

    def _make_schedule(self) -> Any:
        return self.task.schedule(self.optimizer, self.ctx.total_steps)

    @property
    def names(self) -> Sequence[str]:
        """Of all parameters that are trained, wherever they live."""
        return list(self.params)

    def _make_model(self, dtype: torch.dtype) -> nn.Module:
        model = self.task.model().to(self.ctx.device, dtype)
        self.first_names = first_names(model)  # of the whole
        return model

    def _equalise(self) -> None:
        """Same seed, same model: unless the task's own code differs between processes."""
        self.link.broadcast([t.detach() for t in (*self.model.parameters(), *self.model.buffers())])

    # -- one step ------------------------------------------------------------------------------------------------

    def gradients(self) -> Update:
        """This worker's share of the joined batch: its examples' sum, divided by the joined count.

        The sum of these over ranks is the gradient of the joined batch. ``averaged_over`` is 1 where each rank goes its
        own way: then it is the mean over this rank's own examples.
        """
        begun = time.perf_counter()
        if (spans := self.spans) is not None:
            spans.step = self.step + 1
        draw = self.feed.next()
        self.epoch_ended = draw.last
        if self.averaged_over == 1:
            self.joined = float(len(draw.indices))
        else:
            self.joined = draw.total * (self.averaged_over / self.shares)
        seed_torch(self.step_seed + self.step)
        self.attached = Update()  # else the last step's gradients live beside this one's
        for p in self.params.values():
            p.grad = None
        data_s, loss_sum, weight = self._compute(draw)
        update = self._collect(weight)
        self.drawn = weight
        r = self.report
        r.losses, r.weights, r.examples = [loss_sum], [weight], draw.total
        r.data_s = data_s
        r.compute_s = time.perf_counter() - begun - data_s
        return update

    def _compute(self, draw: Draw) -> tuple[float, float, float]:
        """Forward and backward of a share: (seconds of loading, sum of losses, their weight)."""
        spans, data_s, loss_sum, weight = self.spans, 0.0, 0.0, 0.0
        pieces = self._pieces(draw)
        last = max((k for k, indices in enumerate(pieces) if len(indices)), default=0)
        for k, indices in enumerate(pieces):
            if len(indices) == 0 and not self.computes_jointly:
                continue
            loading = time.perf_counter()
            batch = self.feed.batch(indices) if len(indices) else self._spare_batch()
            loaded = time.perf_counter()
            data_s += loaded - loading
            n = self.task.num_examples(batch) if len(indices) else 0.0
            with self.precision():
                loss = self._loss(batch) if len(indices) else self._uncounted_loss(batch)
            check_loss(loss, self.task)
            share = n / self.joined
            if spans is not None:
                spans.add("data", loading, loaded)
                spans.add("forward", loaded, forwarded := time.perf_counter())
            if k == last and self.before_last_backward is not None:
                self.before_last_backward()
            loss.backward(gradient=None if share == 1.0 else torch.full_like(loss, share))
            loss_sum += loss.item() * n
            weight += n
            if spans is not None:
                spans.add("backward", forwarded, time.perf_counter())
        return data_s, loss_sum, weight

    def _uncounted_loss(self, batch: Any) -> Tensor:
        """Of a spare batch: nothing of it may be kept."""
        with aside(self.running_places):
            return self._loss(batch)

    def _pieces(self, draw: Draw) -> list[Any]:
        """Of its examples, as evenly as can be; where a norm needs two of them, the last ones stay empty."""
        if self.pieces == 1:
            return [draw.indices]
        filled = min(self.pieces, max(1, len(draw.indices) // (2 if self.running else 1)))
        return [*np.array_split(draw.indices, filled), *[draw.indices[:0]] * (self.pieces - filled)]

    def _loss(self, batch: Any) -> Tensor:
        return self.task.loss(self.model, batch)

    def _evaluate(self, batch: Any) -> Mapping[str, tuple[Tensor, float]]:
        return evaluate_batch(self.task, self.model, batch)

    def _spare_batch(self) -> Any:
        """To compute with others who have examples, where there is none left."""
        return self.test_batches(np.arange(min(2, self.num_test)))

    def broken(self) -> list[str]:
        """Parameters that hold what is no number. All ranks call together, and get the same."""
        return [n for n, p in self.params.items() if not torch.isfinite(p).all()]

    def _collect(self, weight: float) -> Update:
        """Gradients where autograd put them. A parameter without one keeps None: zeros would make AdamW move it."""
        update = self.attached = Update({}, weight, self.step, self.ctx.rank)
        for name, p in self.params.items():
            if name in self.sparse:
                update.entries[name] = sparse_rows(name, p)
            elif (grad := p.grad) is not None:
                if grad.is_sparse:  # of a parameter whose gradients were dense at first
                    grad = p.grad = grad.to_dense()
                update.entries[name] = Dense(grad)
        return update

    def apply(self, update: Update) -> None:
        """Clip and the other transforms, then one step of the task's optimizer and schedule."""
        begun = time.perf_counter()
        if self.chain:
            update = apply_all(self.chain, update)
        where_collected = update is self.attached and not self.sparse
        for name, p in self.stepped.items() if not where_collected else ():
            entry = update.entries.get(name)
            if entry is None:
                p.grad = None
            elif isinstance(entry, Dense):
                if p.grad is not entry.tensor:
                    p.grad = entry.tensor
            else:
                p.grad = coalesced(entry)
        self.optimizer.step()
        if self.schedule is not None:
            self.schedule.step()
        self.step += 1
        ended = time.perf_counter()
        self.applied_s = ended - begun
        self.report.compute_s += self.applied_s
        if self.spans is not None:
            self.spans.add("optimizer", begun, ended)

    @property
    def seconds(self) -> float:
        """This worker's own, from the last exchange to this one: for these the others wait."""
        return self.applied_s + self.report.data_s + self.report.compute_s

    def rebalance(self, seconds: Sequence[float]) -> None:
        """``seconds`` of each rank for its share of this step's joined batch; all ranks call with the same."""
        if self.balancer is None or self.joined < self.ctx.config.batch:
            return
        self.report.balance = decision = self.balancer.observe(seconds)
        if decision is not None:
            self.feed.cut(decision.shares)

    def precision(self) -> contextlib.AbstractContextManager[Any]:
        return torch.autocast(self.ctx.device.type, torch.bfloat16) if self.autocast else AS_IS

    # -- evaluation, state ---------------------------------------------------------------------------------------

    @host_state_kept()
    def evaluate(self) -> dict[str, float]:
        """Held-out metrics over all ranks, the same numbers on each."""
        self.link.barrier()  # what rank 0 saves is safe before a task's evaluation can raise
        totals = self.evaluated(self.share, self.shares)
        totals.join(self.link, self.ctx.device)
        return totals.summary()

    def evaluated(self, share: int, shares: int) -> Totals:
        """Of one of so many parts of the held-out set."""
        ctx = self.ctx
        size = max(1, EVAL_SHARE * math.ceil(ctx.config.batch / self.shares / self.pieces))
        totals = Totals(self.task, ctx.facts.sums)
        mine = own_share(self.num_test, share, shares, neighbours="held-out" in ctx.facts.indexes)
        longest = math.ceil(self.num_test / shares) if self.computes_jointly else len(mine)
        seed_torch(key_int(self.seed, "evaluate"))
        with evaluating(self.model):
            for start in range(0, longest, size):
                indices = mine[start : start + size]
                batch = self.test_batches(indices) if len(indices) else self._spare_batch()
                with self.precision():
                    parts = self._evaluate(batch)
                if len(indices):
                    totals.add(parts)
        return totals

    def state(self) -> dict[str, Any]:
        """Everything by parameter name, so that another pattern or layout can read it. All ranks call together."""
        own = host_state().to(self.ctx.device)
        return {
            "host_random": [state.cpu() for state in self.link.all_gather(own)],  # by rank
            "model": stored_once(self._model_state(), self.first_names),
            "optimizer": self.optimizer_state(),
            "schedule": self.schedule.state_dict() if self.schedule is not None else None,
            "chain": [[type(t).__name__, kept] for t in self.chain if (kept := t.state_dict())],
            "stream": self.feed.stream_state(),
        }

    def _model_state(self) -> dict[str, Any]:
        return dict(self.model.state_dict())

    def _load_model(self, state: Mapping[str, Any]) -> None:
        self.model.load_state_dict(state)

    def _load_optimizer(self, state: Mapping[str, Any]) -> None:
        load_optimizer_state_by_name(self.optimizer, self.params, state)

    def meta(self) -> dict[str, Any]:
        meta = {"sampler": self.feed.state_dict()}
        return meta if self.balancer is None else meta | {"balance": self.balancer.state_dict()}

    def load(self, state: Mapping[str, Any], meta: Mapping[str, Any]) -> None:
        """What any pattern saved. Raises CheckpointError, with what differs, if it is of another model."""
        if differs := unlike(state["model"], self.model.state_dict(), "the checkpoint", "the task's model"):
            raise CheckpointError(
                f"the checkpoint is of another model: {differs}. Resume with the task, and its options, that it was made by."
            )
        self._load_model(state["model"])
        self._load_optimizer(state["optimizer"])
        if self.schedule is not None and state["schedule"] is not None:
            self.schedule.load_state_dict(state["schedule"])
        load_chain(self.chain, state["chain"])
        self.feed.load_state_dict(meta["sampler"])
        self.feed.load_stream_state(state.get("stream"))
        if self.balancer is not None and "balance" in meta:
            self.balancer.load_state_dict(meta["balance"])
            self.feed.cut(self.balancer.shares)
        self.step = int(meta["step"])


class Exchange(ABC):  # noqa: B024  (a pattern overrides what it needs; doing nothing is local training)
    """When and what the replicas exchange. ``stop`` is what all members agreed on in the last exchange."""

    stop: bool = False
    #: Ranks that keep state of their own, which they write to a checkpoint beside what rank 0 writes for all.
    writers: Sequence[int] = ()

    def gradients(self, update: Update) -> Update:
        """Between backward and the optimizer."""
        return update

    def whole(self, update: Update) -> Iterator[tuple[str, Tensor]]:
        """What ``update``, as ``gradients`` returned it, holds of the joined gradient: dense, by parameter name, one after the
        other, on rank 0. All ranks go through it to the end, before they apply the update."""
        for name, entry in update.entries.items():
            yield name, dense(entry)

    def parameters(self, step: int) -> None:
        """After ``step`` updates."""

    def check_task(self, method: str) -> None:
        """The task's own code has run: raises if it wrote where other workers read."""

    def flush(self) -> None:
        """Bring replicas together before evaluating, saving and at the end."""

    def state(self) -> dict[str, Any]:
        """What all members hold alike, after a flush."""
        return {}

    def own_state(self) -> dict[str, Any]:
        """What a writer holds for itself."""
        return {}

    def close(self) -> None:
        """At the end, also after an error in the middle of a step: nothing of the exchange goes on."""

    def load(self, resume: Resume) -> None:
        """Take over from a checkpoint what is not the replica's."""


class Meter:
    """What a member's links moved and waited in a step. Bytes: since the last step, an evaluation or a save between included."""

    def __init__(self, links: Mapping[str, Link], aside: Collection[str] = ()) -> None:
        self.aside = frozenset(aside)
        self.traffics = {name: link.traffic for name, link in links.items() if link.world > 1}
        self.sent = {name: t.bytes_sent for name, t in self.traffics.items()}
        self.begin()

    def begin(self) -> None:
        self.begun = [(t.busy_s, t.wait_s, t.messages) for t in self.traffics.values()]

    def end(self, report: StepReport) -> None:
        for (name, t), (busy_s, wait_s, messages) in zip(self.traffics.items(), self.begun, strict=True):
            if name not in self.aside:
                report.exchange_s += t.busy_s - busy_s
                report.wait_s += t.wait_s - wait_s
            report.messages += t.messages - messages
            sent, self.sent[name] = t.bytes_sent - self.sent[name], t.bytes_sent
            report.bytes_sent += sent
            if len(self.traffics) > 1:
                report.sent[name] = sent
        report.skew_s = min(report.skew_s, report.wait_s)


def train(ctx: Context) -> Iterator[SafePoint]:
    """The role of a worker with a whole replica."""
    replica = ctx.pattern.replica(ctx)
    exchange = ctx.pattern.exchange(replica)
    if ctx.resume is not None:
        exchange.load(ctx.resume)

    def parts() -> dict[str, Any]:
        exchange.flush()
        state = replica.state() | {"exchange": exchange.state()}
        own = {part_of(ctx.rank): exchange.own_state()} if ctx.rank in exchange.writers else {}
        return own | ({FIRST_PART: state | own.get(FIRST_PART, {})} if ctx.rank == 0 else {})

    def evaluate() -> dict[str, float]:
        exchange.flush()
        metrics = replica.evaluate()
        exchange.check_task("evaluate")
        return metrics

    at_safe_point = (parts, bool(exchange.writers), replica.meta, evaluate)
    if replica.step == ctx.total_steps:  # it died after its last update, before its result
        yield SafePoint(replica.step, False, True, StepReport(), *at_safe_point)
    meter = Meter({WORLD: ctx.link, **ctx.groups}, replica.carried_aside)
    memory, watched = replica.memory, min(ctx.total_steps, replica.step + WATCHED_STEPS)
    with contextlib.closing(exchange):
        while replica.step < ctx.total_steps:
            meter.begin()
            report = replica.report = StepReport()
            if memory is not None:
                memory.begin()
            update = exchange.gradients(replica.gradients())
            if ctx.watch is not None:
                ctx.watch(replica, exchange, update)
            replica.apply(update)
            del update  # or its gradients would live beside the next step's
            exchange.parameters(replica.step)
            ended = replica.step == ctx.total_steps
            if ended or exchange.stop:
                exchange.flush()
            meter.end(report)
            if memory is not None:
                memory.end()
                if ended or exchange.stop or replica.step == watched:
                    report.memory = (memory.peak_bytes, memory.held_bytes)
                    memory = None
            yield SafePoint(replica.step, exchange.stop, ended, report, *at_safe_point)


# -- helpers -----------------------------------------------------------------------------------------------------


def first_names(model: nn.Module) -> dict[str, str]:
    """By each name of a parameter or buffer, the first of its names."""
    first: dict[int, str] = {}
    everything = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    return {n: first.setdefault(id(t), n) for n, t in everything}


def stored_once(state: Mapping[str, Any], first: Mapping[str, str]) -> dict[str, Any]:
    """With one tensor under all names of a parameter, also where each name was gathered by itself."""
    return {name: state[first.get(name, name)] for name in state}


def load_chain(chain: Sequence[Transform], saved: Iterable[Sequence[Any]]) -> None:
    """``saved``: (kind, state) of each transform that had one. One that is new begins anew, but none may go unnoticed."""
    left = [each for each in saved if each]
    for transform in chain:
        own = next((each for each in left if each[0] == type(transform).__name__), None)
        if own is not None:
            left.remove(own)
            transform.load_state_dict(own[1])
    if left:
        raise CheckpointError(
            f"the checkpoint holds the state of {', '.join(kind for kind, _ in left)}, and the pattern as it is set now has no place "
            "for it: resume with the options that it was made by."
        )


def own_share(n: int, rank: int, world: int, neighbours: bool) -> np.ndarray[Any, np.dtype[np.int64]]:
    """A rank's share of 0..n-1: every ``world``-th, or, where neighbours are read together, one stretch."""
    return np.arange(n * rank // world, n * (rank + 1) // world) if neighbours else np.arange(rank, n, world)


def coalesced(rows: Rows) -> Tensor:
    """Of rows that are sorted and different."""
    return torch.sparse_coo_tensor(
        rows.indices[None], rows.values, rows.shape, is_coalesced=True, check_invariants=False
    )


def dense(entry: Entry) -> Tensor:
    return entry.tensor if isinstance(entry, Dense) else coalesced(entry).to_dense()


def sparse_rows(name: str, p: nn.Parameter) -> Rows:
    if p.grad is None:
        grad = torch.sparse_coo_tensor(torch.zeros(1, 0, dtype=torch.int64), p.new_zeros(0, *p.shape[1:]), p.shape)
    elif p.grad.is_sparse:
        grad = p.grad.coalesce()
    else:
        raise TaskError(
            f"parameter {name!r} had sparse gradients at first and now a dense one: use it only through sparse lookups, "
            "or make it dense (sparse=False)."
        )
    return Rows(grad.coalesce().indices()[0], grad.coalesce().values(), tuple(p.shape))
