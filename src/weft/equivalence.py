"""What members do for `--check-equivalence`: the layout's first steps, kept by rank 0; and those of one process, compared with them.

A step of the layout is kept as .npy arrays, one after the other in a file, with their names and the joined loss beside it. So nobody
holds more than one parameter of it at a time.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import cast

import msgspec
import numpy as np
import torch
from torch import Tensor

from weft.clusters.base import Seat
from weft.comm.link import SoloLink
from weft.data.keys import key_int
from weft.data.partition import Indices
from weft.data.partition import parse as parse_partitioner
from weft.data.sampler import part_of
from weft.data.shards import Shards
from weft.driver.equivalence import Equivalence, Order, StepFound
from weft.first_steps import first_steps
from weft.loading import load_task
from weft.patterns import registry
from weft.patterns.base import Context
from weft.patterns.feeds import make_feed
from weft.patterns.preflight import own_device
from weft.patterns.randomness import host_state, seed_everything, seed_torch, set_host_state
from weft.patterns.training import AS_IS, Exchange, Replica, trainable
from weft.task import Task
from weft.update import Update


class Kept(msgspec.Struct, frozen=True):
    """Of a step of the layout, beside its gradients. ``names``: in their order."""

    names: list[str]
    loss: float


# -- the layout's side


def take_steps(seat: Seat) -> None:
    """Entry. The roles of the run itself, for its first steps."""
    order = msgspec.convert(seat.spec.payload, Order, strict=False)
    rank = seat.spec.member

    def watch(replica: Replica, exchange: Exchange, update: Update) -> None:
        whole = exchange.whole(update)
        if rank == 0:
            report = replica.report
            keep(Path(order.folder), replica.step + 1, whole, sum(report.losses) / sum(report.weights))
        deque(whole, maxlen=0)  # the other ranks' part in it

    with first_steps(seat, order.config, order.facts, order.total_steps, order.steps, watch) as points:
        deque(points, maxlen=0)


def keep(folder: Path, step: int, whole: Iterator[tuple[str, Tensor]], loss: float) -> None:
    names = []
    with (folder / f"{step}.npy").open("wb") as file:
        for name, tensor in whole:
            names.append(name)
            np.save(file, tensor.detach().cpu().numpy())
    (folder / f"{step}.json").write_bytes(msgspec.json.encode(Kept(names, loss)))


def kept(folder: Path, step: int) -> tuple[Kept, Iterator[tuple[str, Tensor]]]:
    about = msgspec.json.decode((folder / f"{step}.json").read_bytes(), type=Kept)

    def tensors() -> Iterator[tuple[str, Tensor]]:
        with (folder / f"{step}.npy").open("rb") as file:
            for name in about.names:
                yield name, torch.from_numpy(np.load(file))

    return about, tensors()


# -- one process


def compare(seat: Seat) -> None:
    """Entry. Stops at the first step that differs by too much.

    A step is made of the layout's gradient, once it has been compared: so rounding does not add up (AdamW makes much of it where a
    gradient is nearly 0), and an optimizer that the layout steps wrongly shows in the gradients of the next step.
    """
    order = msgspec.convert(seat.spec.payload, Order, strict=False)
    torch.set_num_threads(order.config.threads)
    one, folder = OneProcess(order, load_task(order.config.task)), Path(order.folder)
    by_shares, agrees, steps = False, False, list[StepFound]()
    for step in range(1, order.steps + 1):
        one.draw()
        loss = math.nan
        if not by_shares:
            loss, by_shares = one.at_once()
        if by_shares:
            loss = one.share_by_share()
        steps.append(difference(step, one.gradients(), folder, loss))
        if not steps[-1].difference <= order.tolerance:
            if not by_shares:
                loss = one.share_by_share()
                agrees = difference(step, one.gradients(), folder, loss).difference <= order.tolerance
            break
        one.apply(kept(folder, step)[1])
        for path in folder.glob(f"{step}.*"):
            path.unlink()
    found = Equivalence(tolerance=order.tolerance, by_shares=by_shares, steps=steps, agrees_by_shares=agrees)
    seat.send({"found": msgspec.to_builtins(found)})


class OneProcess:
    """The plain loop that the workers together should equal: it is told what they draw, and shares no code of theirs beyond that."""

    def __init__(self, order: Order, task: Task) -> None:
        config, self.loop, self.task = order.config, order.loop, task
        self.device = own_device(order.facts.device, 0)
        dtype = cast(torch.dtype, getattr(torch, config.dtype))
        seed_everything(key_int(config.seed, "data"))
        train, _ = task.data()
        seed_everything(key_int(config.seed, "init"))
        self.model = task.model().to(self.device, dtype)
        self.params = trainable(self.model)
        self.optimizer = task.optimizer(list(self.params.values()))
        self.schedule = task.schedule(self.optimizer, order.total_steps)
        self.world = registry.build(config.pattern, config.pattern_options).shares(config.workers)
        self.step = 0
        # joined batches depend on who owns what, where a worker draws from its own examples only
        fixed = isinstance(train, Shards) or parse_partitioner(config.partition).fixed
        places = [(rank, self.world) for rank in range(self.world)] if fixed else [(0, 1)]
        self.feeds = [make_feed(train, self._context(order, *place), dtype) for place in places]
        self.seeds = [key_int(config.seed, "step", rank) >> 1 for rank in range(self.world)]
        self.hosts = []  # of Python's and numpy's generators, by worker
        for rank in range(self.world):
            seed_everything(key_int(config.seed, "worker", rank, 0))
            self.hosts.append(host_state())

    def _context(self, order: Order, rank: int, world: int) -> Context:
        return Context(
            task=self.task,
            pattern=registry.build("allreduce", {}),  # a share for each rank
            config=order.config,
            facts=order.facts,
            rank=rank,
            world=world,
            total_steps=order.total_steps,
            device=self.device,
            link=SoloLink(),
            stop_requested=lambda: False,
        )

    def draw(self) -> None:
        """The next joined batch, as the workers share it."""
        drawn = [feed.next().indices for feed in self.feeds]
        if len(drawn) < self.world:
            (joined,), bounds = drawn, range(self.world + 1)
            drawn = [joined[slice(*part_of(len(joined), bounds, rank))] for rank in range(self.world)]
        self.shares: list[Indices] = drawn
        self.buffers = {name: b.detach().clone() for name, b in self.model.named_buffers()}

    def at_once(self) -> tuple[float, bool]:
        """The loss of the joined batch, and whether random numbers were drawn for it: then it is not what the workers have."""
        self._forget()
        self._begin(0)
        before = random_state()
        loss, _ = self._backward(np.concatenate(self.shares), weighted=False)
        return loss, any(not torch.equal(a, b) for a, b in zip(before, random_state(), strict=True))

    def share_by_share(self) -> float:
        """The same, each worker's share with its own random numbers, in as many pieces as it takes."""
        self._forget()
        losses, weights = 0.0, 0.0
        for rank, share in enumerate(self.shares):
            self._begin(rank)
            for piece in np.array_split(share, self.loop.accumulate):
                if len(piece):
                    loss, weight = self._backward(piece, weighted=True)
                    losses, weights = losses + loss * weight, weights + weight
            self.hosts[rank] = host_state()
        for gradient in self.gradients().values():
            gradient /= weights
        return losses / weights

    def _forget(self) -> None:
        for p in self.params.values():
            p.grad = None

    def _begin(self, rank: int) -> None:
        """As this worker begins the step."""
        seed_torch(self.seeds[rank] + self.step)
        set_host_state(self.hosts[rank])
        with torch.no_grad():
            for name, buffer in self.model.named_buffers():
                buffer.copy_(self.buffers[name])

    def _backward(self, indices: Indices, weighted: bool) -> tuple[float, float]:
        """Returns (loss, its weight)."""
        batch = self.feeds[0].batch(indices)
        weight = float(self.task.num_examples(batch))
        with torch.autocast(self.device.type, torch.bfloat16) if self.loop.autocast else AS_IS:
            loss = self.task.loss(self.model, batch)
        loss.backward(gradient=torch.full_like(loss, weight if weighted else 1.0))
        return loss.item(), weight

    def gradients(self) -> dict[str, Tensor]:
        return {name: p.grad for name, p in self.params.items() if p.grad is not None}

    def apply(self, gradients: Iterator[tuple[str, Tensor]]) -> None:
        """One step by these, clipped; sparse ones stay what they were."""
        own = self.gradients()
        self._forget()
        for name, gradient in gradients:
            mine = own.pop(name, None)
            self.params[name].grad = mine if mine is not None and mine.is_sparse else gradient.to(self.device)
        if (largest := self.loop.clip_norm) is not None:
            found = list(self.gradients().values())
            scale = largest / (math.sqrt(sum(square(g) for g in found)) + 1e-6)  # as torch's clip_grad_norm_
            for gradient in found if scale < 1 else ():
                gradient *= scale
        self.optimizer.step()
        if self.schedule is not None:
            self.schedule.step()
        self.step += 1


def random_state() -> list[Tensor]:
    """Of all generators that are seeded."""
    on_gpu = [torch.cuda.get_rng_state()] if torch.cuda.is_initialized() else []
    return [torch.get_rng_state(), host_state(), *on_gpu]


def square(tensor: Tensor) -> float:
    """Of the norm, in float64."""
    return (
        float(torch.linalg.vector_norm(tensor.coalesce().values() if tensor.is_sparse else tensor, dtype=torch.float64))
        ** 2
    )


def difference(step: int, gradients: Mapping[str, Tensor], folder: Path, loss: float) -> StepFound:
    """Of the layout's step from one process's ``gradients``. No gradient counts as zeros."""
    about, theirs = kept(folder, step)
    squares = {name: square(gradient) for name, gradient in gradients.items()}
    shapes = {name: tuple(gradient.shape) for name, gradient in gradients.items()}
    apart = dict(squares)  # of those that the layout has none of
    for name, gradient in theirs:
        mine, gradient = gradients.get(name), gradient.double()
        apart[name] = square(gradient if mine is None else gradient - mine.to_dense().cpu())
        shapes[name] = tuple(gradient.shape)
    norm = math.sqrt(sum(squares.values()))
    worst = max(apart, key=lambda name: apart[name] if math.isfinite(apart[name]) else math.inf)
    return StepFound(
        step=step,
        difference=ratio(math.sqrt(sum(apart.values())), norm),
        loss=loss,
        loss_difference=abs(about.loss - loss),
        name=worst,
        shape=shapes[worst],
        worst=ratio(math.sqrt(apart[worst]), norm),
        own=ratio(math.sqrt(apart[worst]), math.sqrt(squares.get(worst, 0.0))),
    )


def ratio(a: float, b: float) -> float:
    return a / b if b else (math.inf if a else 0.0)
