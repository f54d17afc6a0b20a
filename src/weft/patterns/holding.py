"""What one server holds: its pieces of the parameters, the optimizer that steps them, and what it needs of earlier versions."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn

from weft.comm.buffers import Buffers, Bytes
from weft.config import FIRST_PART
from weft.data.keys import key_int
from weft.errors import CheckpointError, Incompatible
from weft.patterns.base import BufferFact, Context, Facts
from weft.patterns.elementwise import is_large
from weft.patterns.optimizer_state import load_optimizer_state_by_name, optimizer_state_by_name
from weft.patterns.parameter_server import ParameterServer
from weft.patterns.randomness import seed_everything
from weft.patterns.training import first_names, stored_once, trainable
from weft.resilience.checkpoint import unlike
from weft.servers.ranges import Piece

PLACE = 8  # bytes of a row's number
BLOCK = 1 << 18  # numbers: joined before they leave the cache
LARGE = 1 << 22  # bytes: memcpy writes so much past the cache, and torch does not


class Flat:
    """Pieces of tensors end to end in memory, those of one dtype together, and after the parameters the running buffers: what travels
    between a worker and this server, in one stretch of ``nbytes``. Of ``tables`` (pieces of sparse parameters) only rows do. Both sides
    make it of the same facts."""

    def __init__(
        self,
        pieces: Sequence[Piece],
        dtypes: Mapping[str, torch.dtype],
        running: Sequence[BufferFact],
        tables: Sequence[Table] = (),
    ) -> None:
        self.pieces, self.running, self.tables = list(pieces), list(running), list(tables)
        places: list[tuple[torch.dtype, int]] = [(dtypes[p.name], p.stop - p.start) for p in pieces]
        places += [(dtype := dtype_of(b), b.nbytes // dtype.itemsize) for b in running]
        order = sorted(range(len(places)), key=lambda k: (-places[k][0].itemsize, str(places[k][0]), k >= len(pieces)))
        self.places: list[tuple[int, torch.dtype, int]] = [(0, torch.uint8, 0)] * len(
            places
        )  # begin (bytes), dtype, numel
        self.nbytes = 0
        for k in order:  # wide types first: each begins at a multiple of its size
            dtype, numel = places[k]
            self.places[k] = (self.nbytes, dtype, numel)
            self.nbytes += numel * dtype.itemsize
        # neighbours of one kind and dtype as one: an operation on each instead of one on each piece
        self.stretches: list[tuple[int, torch.dtype, int]] = []
        for k in order:
            begin, dtype, numel = self.places[k]
            if k >= len(pieces):
                continue
            if self.stretches and self.stretches[-1][1] == dtype:
                self.stretches[-1] = (self.stretches[-1][0], dtype, self.stretches[-1][2] + numel)
            else:
                self.stretches.append((begin, dtype, numel))

    def views(self, memory: Bytes) -> tuple[list[Tensor], list[Tensor]]:
        """Flat tensors of each piece, and of each running buffer, in such memory."""
        whole = torch.from_numpy(memory)
        tensors = [whole[b : b + n * d.itemsize].view(d) for b, d, n in self.places]
        return tensors[: len(self.pieces)], tensors[len(self.pieces) :]

    def parameters(self, memory: Bytes) -> list[Tensor]:
        """All pieces of one dtype as one tensor."""
        whole = torch.from_numpy(memory)
        return [whole[b : b + n * d.itemsize].view(d) for b, d, n in self.stretches]

    def memory(self) -> Bytes:
        return np.zeros(self.nbytes, np.uint8)

    def holds(self, lent: memoryview | None) -> bool:
        """It is such memory, as its sender has it."""
        return lent is not None and len(lent) == self.nbytes


class Table(NamedTuple):
    """Rows ``piece.start`` to ``piece.stop`` of a sparse parameter, each ``width`` numbers."""

    piece: Piece
    width: int
    dtype: torch.dtype

    @property
    def row_bytes(self) -> int:
        return self.width * self.dtype.itemsize


class SomeRows(NamedTuple):
    """``places`` (K,) int64 in a table; ``values`` (K, width)."""

    places: Tensor
    values: Tensor


def rows_bytes(tables: Sequence[Table], counts: Sequence[int]) -> int:
    return sum(count * (PLACE + table.row_bytes) for table, count in zip(tables, counts, strict=True))


def rows_in(memory: Bytes, tables: Sequence[Table], counts: Sequence[int]) -> list[SomeRows]:
    """Of each table, what lies in this memory: the places of all, then the values of all."""
    whole, at, result = torch.from_numpy(memory), 0, []
    places = []
    for count in counts:
        places.append(numbers_at(whole, at, count, torch.int64))
        at += count * PLACE
    for table, count, own in zip(tables, counts, places, strict=True):
        values = numbers_at(whole, at, count * table.width, table.dtype).view(count, table.width)
        at += count * table.row_bytes
        result.append(SomeRows(own, values))
    return result


def numbers_at(memory: Tensor, at: int, numel: int, dtype: torch.dtype) -> Tensor:
    if not numel:
        return torch.empty(0, dtype=dtype)
    part = memory[at : at + numel * dtype.itemsize]
    return (part.clone() if at % dtype.itemsize else part).view(dtype)


def dtype_of(fact: BufferFact) -> torch.dtype:
    return cast(torch.dtype, getattr(torch, fact.dtype))


def flats(pattern: ParameterServer, facts: Facts) -> list[Flat]:
    """Each server's. The first has the running buffers, too."""
    dtypes = {p.name: cast(torch.dtype, getattr(torch, p.dtype)) for p in facts.params}
    widths = {p.name: math.prod(p.shape[1:]) for p in facts.params if p.sparse}
    result = []
    for k, pieces in enumerate(pattern.pieces(facts)):
        tables = [Table(p, widths[p.name], dtypes[p.name]) for p in pieces if p.name in widths]
        dense = [p for p in pieces if p.name not in widths]
        result.append(Flat(dense, dtypes, [] if k else facts.running, tables))
    return result


def describe(model: nn.Module) -> list[tuple[str, list[int], str]]:
    """Of each parameter and buffer, its name, shape and dtype."""
    return [(n, list(t.shape), str(t.dtype).removeprefix("torch.")) for n, t in model.state_dict().items()]


def untrained(model: nn.Module, facts: Facts) -> list[Tensor]:
    """What no server steps and no step changes: frozen parameters, and buffers that stay."""
    running = {b.name for b in facts.running}
    frozen = [p for p in model.parameters() if not p.requires_grad]
    return [t.detach() for t in frozen] + [b for n, b in model.named_buffers() if n not in running]


@dataclass
class Pushed:
    """A share's gradients on this server. ``absent``: places of pieces that no example touched; ``version``: on which they were computed."""

    memory: Bytes
    version: int
    weight: float
    worker: int
    absent: frozenset[int] = field(default_factory=frozenset)
    rows: Sequence[SomeRows] = ()  # by table


class Built:
    """What every worker builds for itself, or a checkpoint's: of it a server's holdings are cut, and on the lead a whole one is put together again."""

    def __init__(self, ctx: Context) -> None:
        assert ctx.endpoint is not None
        self.task, self.total_steps, self.endpoint = ctx.task, ctx.total_steps, ctx.endpoint
        config = ctx.config
        seed_everything(key_int(config.seed, "data"))
        self.train, _ = self.task.data()  # it may draw what model() draws after it
        seed_everything(key_int(config.seed, "init"))
        self.model = self.task.model().to(ctx.device, cast(torch.dtype, getattr(torch, config.dtype)))
        self.first_names = first_names(self.model)
        self.params = trainable(self.model)
        for p in self.params.values():
            p.data = p.data.contiguous()  # pieces are of the numbers in their order
        self.version = ctx.resume.step if ctx.resume else 0
        self.loaded = ctx.resume.parts[FIRST_PART] if ctx.resume else None
        if self.loaded is not None:
            if differs := unlike(self.loaded["model"], self.model.state_dict(), "the checkpoint", "the task's model"):
                raise CheckpointError(
                    f"the checkpoint is of another model: {differs}. Resume with the task, and its options, that it was made by."
                )
            self.model.load_state_dict(self.loaded["model"])

    def optimizer(self) -> tuple[torch.optim.Optimizer, Any]:
        """Another one of all parameters, as they began, and its schedule."""
        optimizer = self.task.optimizer(list(self.params.values()))
        schedule = self.task.schedule(optimizer, self.total_steps)
        names = {id(p): n for n, p in self.params.items()}
        self.groups = [[names[id(p)] for p in group["params"]] for group in optimizer.param_groups]
        if self.loaded is not None:
            load_optimizer_state_by_name(optimizer, self.params, self.loaded["optimizer"])
            if schedule is not None and self.loaded["schedule"] is not None:
                schedule.load_state_dict(self.loaded["schedule"])
        return optimizer, schedule

    def let_go(self) -> None:
        """Of what is needed to put a whole together only, or to begin with."""
        del self.model, self.params, self.train


class Holding:
    """One server's copy of a shard: its pieces, and the optimizer that steps them."""

    def __init__(self, built: Built, flat: Flat, pattern: ParameterServer) -> None:
        self.flat, self.pattern = flat, pattern
        self.optimizer, self.schedule = built.optimizer()
        if pattern.servers > 1 and (
            self.optimizer._optimizer_step_pre_hooks or self.optimizer._optimizer_step_post_hooks
        ):
            raise Incompatible(
                f"{type(self.optimizer).__name__} has hooks, which would see one server's part of the parameters: use servers=1."
            )
        self.version = built.version
        self.square = 0.0  # of the norm of what is joined, or was stepped by last
        self.buffers = Buffers(built.endpoint, flat.nbytes)
        self.memory = self.buffers.take()
        self.values, self.running = flat.views(self.memory)
        self._take_pieces(built)
        self.versions: dict[int, Bytes] = {}  # as they were read; the newest is ``memory`` itself
        self.take(flat.memory(), frozenset(), [])

    @torch.no_grad()
    def _take_pieces(self, built: Built) -> None:
        """The optimizer is left these to step, and their state to keep."""
        names = {id(p): n for n, p in built.params.items()}
        states = {names[id(p)]: state for p, state in self.optimizer.state.items()}
        self.stepped: dict[str, nn.Parameter] = {}
        for piece, values in zip(self.flat.pieces, self.values, strict=True):
            whole = built.params[piece.name]
            values.copy_(whole.reshape(-1)[piece.start : piece.stop])
            is_whole = piece.stop - piece.start == whole.numel()
            self.stepped[piece.name] = nn.Parameter(values.view(whole.shape) if is_whole else values)
        self.tables = []
        for piece, _, _ in self.flat.tables:
            whole = built.params[piece.name]
            self.tables.append(whole[piece.start : piece.stop].detach().clone())
            self.stepped[piece.name] = nn.Parameter(self.tables[-1])
        buffers = dict(built.model.named_buffers())
        for fact, running in zip(self.flat.running, self.running, strict=True):
            running.copy_(buffers[fact.name].reshape(-1))
        self.optimizer.state.clear()
        for group, members in zip(self.optimizer.param_groups, built.groups, strict=True):
            group["params"] = [self.stepped[n] for n in members if n in self.stepped]
        for piece, width in held_of(self.flat):
            if piece.name in states:
                own = cut(states[piece.name], piece.start * width, piece.stop * width, built.params[piece.name].numel())
                p = self.stepped[piece.name]
                is_part = p.numel() < built.params[piece.name].numel()  # of which each tensor is cut as it is
                self.optimizer.state[p] = {
                    k: v.view(p.shape) if is_part and is_large(k, v) else v for k, v in own.items()
                }

    # -- versions

    def read(self) -> Bytes:
        """The values as they are now, to be sent (tell ``buffers``): they stay so until nobody reads them, and ``forget``."""
        self.versions[self.version] = self.memory
        return self.memory

    def forget(self, needed: Iterable[int]) -> None:
        """All versions but these, if they are looked at again, and the newest."""
        keep = {self.version, *(needed if self.pattern.correction == "dc" else ())}
        for version in [v for v in self.versions if v not in keep]:
            self.buffers.leave(self.versions.pop(version))

    def _make_room(self) -> None:
        """What is stepped must not be what somebody reads, or what is needed as it was."""
        if self.version not in self.versions:
            return
        if self.pattern.correction != "dc" and not self.buffers.is_read(self.memory):
            del self.versions[self.version]
            return
        fresh = self.buffers.take()
        np.copyto(fresh, self.memory)
        self.memory = fresh
        self.values, self.running = self.flat.views(fresh)
        for piece, values in zip(self.flat.pieces, self.values, strict=True):
            p = self.stepped[piece.name]
            p.data = values.view(p.shape)

    # -- an update

    def take(self, memory: Bytes, absent: frozenset[int], rows: Sequence[SomeRows]) -> None:
        """A joined gradient, to be the next step. ``absent``: places of pieces that have none."""
        self.joined, self.absent, self.rows = memory, absent, list(rows)
        self.grads, self.joined_running = self.flat.views(memory)
        self.summed = self.grads  # by piece: what is stepped by

    @torch.no_grad()
    def join(self, pushed: Sequence[Pushed], factor: float) -> None:
        """The shares' sum times ``factor``, in the order in which they are given."""
        self._join_running(pushed)
        self.rows = [self._joined_rows(k, pushed, factor) for k in range(len(self.tables))]
        self.absent = frozenset.intersection(*(each.absent for each in pushed))
        self.summed = self._summed(pushed, factor)

    def _summed(self, pushed: Sequence[Pushed], factor: float) -> list[Tensor]:
        """By piece. Of a single share it is what was pushed, where it lies, if that is all that is done with it."""
        dc, alone = self.pattern.correction == "dc", not self.pattern.waits
        scales = [self._scale(each) for each in pushed]
        late = [dc and each.version < self.version for each in pushed]
        if len(pushed) == 1 and alone and not late[0] and scales[0] * factor == 1.0:
            return self.flat.views(pushed[0].memory)[0]
        targets, now = self.flat.parameters(self.joined), self.flat.parameters(self.memory)
        given = [self.flat.parameters(each.memory) for each in pushed]
        read = [
            self.flat.parameters(self.versions[each.version]) if is_late else now
            for each, is_late in zip(pushed, late, strict=True)
        ]
        for t, target in enumerate(targets):
            for low in range(0, len(target), BLOCK):
                part = slice(low, low + BLOCK)
                for k, scale in enumerate(scales):
                    g = given[k][t][part]
                    if late[k]:
                        g = moved(g, now[t][part] - read[k][t][part], self.pattern.dc_lambda)
                    if k == 0:
                        torch.mul(g, scale, out=target[part])
                    else:
                        target[part].add_(g, alpha=scale)
                if factor != 1.0:
                    target[part].mul_(factor)
        return self.grads

    def _joined_rows(self, k: int, pushed: Sequence[Pushed], factor: float) -> SomeRows:
        """The same of a table: rows that several have touched add up."""
        places = torch.cat([each.rows[k].places for each in pushed])
        values = torch.cat([each.rows[k].values * self._scale(each) for each in pushed])
        shape = (len(self.tables[k]), self.flat.tables[k].width)
        grad = torch.sparse_coo_tensor(places[None], values * factor, shape, check_invariants=False).coalesce()
        return SomeRows(grad._indices()[0], grad._values())

    def _scale(self, pushed: Pushed) -> float:
        return 1.0 / (self.version - pushed.version + 1) if self.pattern.correction == "rate" else 1.0

    def _join_running(self, pushed: Sequence[Pushed]) -> None:
        if not self.flat.running:
            return
        given = [(self.flat.views(each.memory)[1], each.weight) for each in pushed]
        total = sum(weight for _, weight in given)
        for k, joined in enumerate(self.joined_running):
            if joined.is_floating_point():
                joined.zero_()
                for buffers, weight in given:
                    joined.add_(buffers[k], alpha=weight / total)
            else:
                joined.copy_(torch.stack([buffers[k] for buffers, _ in given]).amax(0))

    def measure(self) -> None:
        """The square of the norm of what is joined."""
        numbers = [grad for k, grad in enumerate(self.grads) if k not in self.absent]
        numbers += [rows.values for rows in self.rows]
        self.square = math.fsum(float(torch.linalg.vector_norm(n, dtype=torch.float64)) ** 2 for n in numbers)

    @torch.no_grad()
    def step(self, scale: float = 1.0) -> None:
        """By what is joined, times ``scale``."""
        if scale != 1.0:
            for target in self.flat.parameters(self.joined):
                target.mul_(scale)
        self._make_room()
        for k, (piece, grad) in enumerate(zip(self.flat.pieces, self.summed, strict=True)):
            p = self.stepped[piece.name]
            p.grad = None if k in self.absent else grad.view(p.shape)
        for (piece, _, _), rows in zip(self.flat.tables, self.rows, strict=True):
            p = self.stepped[piece.name]
            values = (rows.values if scale == 1.0 else rows.values * scale).view(-1, *p.shape[1:])
            p.grad = torch.sparse_coo_tensor(
                rows.places[None], values, p.shape, is_coalesced=True, check_invariants=False
            )
        self.optimizer.step()
        for p in self.stepped.values():
            p.grad = None  # it may be a worker's memory
        self.summed = self.grads
        if self.schedule is not None:
            self.schedule.step()
        for running, joined in zip(self.running, self.joined_running, strict=True):
            running.copy_(joined)
        self.version += 1

    # -- state

    def state(self) -> dict[str, Any]:
        """Of this shard's pieces, by parameter name."""
        return {
            "values": {p.name: v for (p, _), v in zip(held_of(self.flat), [*self.values, *self.tables], strict=True)},
            "running": {fact.name: v for fact, v in zip(self.flat.running, self.running, strict=True)},
            "optimizer": optimizer_state_by_name(self.optimizer, self.stepped),
            "schedule": self.schedule.state_dict() if self.schedule is not None else None,
        }

    @torch.no_grad()
    def become(self, state: Mapping[str, Any], version: int) -> None:
        """Another server's copy of this shard, as its ``state`` says."""
        for (piece, _), values in zip(held_of(self.flat), [*self.values, *self.tables], strict=True):
            values.copy_(state["values"][piece.name].view(values.shape))
        for fact, running in zip(self.flat.running, self.running, strict=True):
            running.copy_(state["running"][fact.name])
        load_optimizer_state_by_name(self.optimizer, self.stepped, state["optimizer"])
        if self.schedule is not None:
            self.schedule.load_state_dict(state["schedule"])
        self.version = version
        self.versions.clear()


def whole_state(built: Built, parts: Sequence[Mapping[str, Any]], flats: Sequence[Flat]) -> dict[str, Any]:
    """As one process would have it. ``parts``: every shard's ``state``, in order."""
    with torch.no_grad():
        buffers = dict(built.model.named_buffers())
        for part, flat in zip(parts, flats, strict=True):
            for piece, width in held_of(flat):
                numbers = built.params[piece.name].view(-1)[piece.start * width : piece.stop * width]
                numbers.copy_(part["values"][piece.name].reshape(-1))
            for name, running in part["running"].items():
                buffers[name].copy_(running.view(buffers[name].shape))
    states: dict[str, dict[str, Any]] = {}
    for name, p in built.params.items():
        found = [part["optimizer"]["state"][name] for part in parts if name in part["optimizer"]["state"]]
        if found:
            states[name] = {key: put_together([s[key] for s in found], key, p.shape) for key in found[0]}
    groups = [
        {k: v for k, v in group.items() if k != "params"} | {"params": own}
        for group, own in zip(parts[0]["optimizer"]["param_groups"], built.groups, strict=True)
    ]
    order = [name for own in built.groups for name in own if name in states]
    return {
        "model": stored_once(dict(built.model.state_dict()), built.first_names),
        "optimizer": {"state": {name: states[name] for name in order}, "param_groups": groups},
        "schedule": parts[0]["schedule"],
    }


def moved(grad: Tensor, way: Tensor, strength: float) -> Tensor:
    """What a gradient would be ``way`` from where it was computed: g + lambda g*g * way with lambda = strength / |g| (Zheng et al. 2017, DC-ASGD-a
    with m = 0). In proportion to g, so that it is the same however a batch is cut into shares. We depart: what is added is |g| at most, as
    the model of the curvature holds near where g was computed; so no number turns round, or more than doubles."""
    return grad.addcmul(grad.abs(), way.mul(strength).clamp_(-1, 1))


def copy_all(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Flat tensors, each into its own."""
    small = [k for k, target in enumerate(targets) if target.nbytes < LARGE]
    if small:
        torch._foreach_copy_([targets[k] for k in small], [sources[k] for k in small])
    for target, source in zip(targets, sources, strict=True):
        if target.nbytes >= LARGE:
            np.copyto(numbers_of(target), numbers_of(source))


def numbers_of(flat: Tensor) -> Bytes:
    return cast(Bytes, flat.detach().view(torch.uint8).numpy())


def held_of(flat: Flat) -> list[tuple[Piece, int]]:
    """Every piece, and how many numbers are one of its."""
    return [*((piece, 1) for piece in flat.pieces), *((table.piece, table.width) for table in flat.tables)]


def cut(state: Mapping[str, Any], start: int, stop: int, numel: int) -> dict[str, Any]:
    """Of an optimizer's state of a parameter of ``numel`` numbers, what goes with those from ``start`` to ``stop``."""
    if stop - start == numel:
        return dict(state)
    return {k: v.reshape(-1)[start:stop].clone() if is_large(k, v) else v for k, v in state.items()}


def put_together(values: Sequence[Any], key: str, shape: Sequence[int]) -> Any:
    """Undoes ``cut``."""
    if len(values) == 1 or not is_large(key, values[0]):
        return values[0]
    return torch.cat([v.reshape(-1) for v in values]).view(tuple(shape))
