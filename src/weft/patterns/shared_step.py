"""One optimizer step for all workers of a host: parameters live once, where all see them, and each worker steps its part.

Each worker copies its gradients to where all can read them; sync; rank r adds up part r of all ranks', in rank order, and the
task's optimizer steps part r of the parameters in place; sync. So a worker does 1/p of the optimizer's work, keeps 1/p
of its state (as ZeRO's first stage does, Rajbhandari et al. 2020), and no rank writes anything back to another.

Between the two syncs parameters are written, each by one rank; at all other times all may read them, and nobody may
write: a task that does is told. A worker that dies in between leaves them half stepped: the second sync fails for all
others, and nobody uses them.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from weft.comm.link import Link, tell_all
from weft.errors import TaskError
from weft.patterns.allreduce import LINE
from weft.patterns.elementwise import ELEMENTWISE, is_large
from weft.patterns.mean import JoinedMean
from weft.patterns.optimizer_state import LARGE, described, optimizer_state_by_name, scalar
from weft.patterns.training import Arena, Replica, flat_buffer
from weft.update import ClipNorm, Dense, Entry, Update, norm

BLOCK = 64 << 10  # elements that are added up before they leave the cache


def why_not(model: nn.Module, optimizer: torch.optim.Optimizer, sparse: bool) -> str:
    """Why the step cannot be shared by workers of a host; empty if it can."""
    params = {n: p for n, p in model.named_parameters() if p.requires_grad}
    if sparse:
        return "some gradients are sparse"
    if any(p.device.type != "cpu" for p in params.values()):
        return "parameters are not in main memory"
    if len(dtypes := sorted({str(p.dtype).removeprefix("torch.") for p in params.values()})) > 1:
        return f"parameters are of several types ({', '.join(dtypes)})"
    for name, p in params.items():
        if not p.is_contiguous() or p.untyped_storage().nbytes() != p.numel() * p.element_size():
            return f"parameter {name} is a part of other memory, or not contiguous"
    if len({p.untyped_storage().data_ptr() for p in params.values() if p.numel()}) < sum(
        p.numel() > 0 for p in params.values()
    ):
        return "two parameters share their memory"
    if type(optimizer) not in ELEMENTWISE:
        known = ", ".join(kind.__name__ for kind in ELEMENTWISE)
        return f"{type(optimizer).__name__} is not known to treat each number by itself, as torch's {known} are"
    hooks = (optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks)
    if any(hooks):
        return f"{type(optimizer).__name__} has hooks, which would see a part of the parameters only"
    return ""


class Slice(NamedTuple):
    """What this rank steps of a parameter; all three tensors are flat."""

    param: nn.Parameter  # in the memory of all
    grad: Tensor  # where its gradients' sum comes
    part: slice  # of the parameter's numbers


class SharedArena(Arena):
    """Gradients where all ranks of the host can read them; ``all_reduce`` leaves the sum of this rank's part in ``sums``."""

    def __init__(self, params: Mapping[str, nn.Parameter], link: Link) -> None:
        first = next(iter(params.values()))
        per_line = LINE // first.element_size()
        self.first = frozenset()
        self.starts: dict[str, int] = {}
        numel = 0
        for name, p in params.items():
            self.starts[name] = numel
            numel += -(-p.numel() // per_line) * per_line
        own = flat_buffer(link, numel, first.dtype, first.device)
        self.buffers, self.all_grads = [own], link.views(own)
        shared = link.views(flat_buffer(link, numel, first.dtype, first.device))
        if not (self.all_grads and shared):
            raise RuntimeError(
                f"no room for {numel} numbers in memory that all ranks see"
            )  # Pattern.groups asked for it
        self.shared = shared[0]
        self.views = {n: own[s : s + params[n].numel()].view(params[n].shape) for n, s in self.starts.items()}
        lines = numel // per_line
        self.bounds = [lines * rank // link.world * per_line for rank in range(link.world + 1)]
        begin, end = self.bounds[link.rank : link.rank + 2]
        self.sums = [own[begin:end]]
        self.blocks = [
            ([grads[k : min(k + BLOCK, end)] for grads in self.all_grads], own[k : min(k + BLOCK, end)])
            for k in range(begin, end, BLOCK)
        ]
        self.held = torch.empty(BLOCK if link.world > 2 else 0, dtype=first.dtype)
        self._move(params, link)
        self.slices: dict[str, Slice] = {}
        for name, start in self.starts.items():
            k, stop = max(start, begin), min(start + params[name].numel(), end)
            if k < stop:
                param = nn.Parameter(self.shared[k:stop])
                self.slices[name] = Slice(param, own[k:stop], slice(k - start, stop - start))

    def _move(self, params: Mapping[str, nn.Parameter], link: Link) -> None:
        """Into the memory of all; they are the same on all ranks."""
        views = {n: self.shared[s : s + params[n].numel()].view(params[n].shape) for n, s in self.starts.items()}
        if link.rank == 0:
            with torch.no_grad():
                for name, p in params.items():
                    views[name].copy_(p)
        link.barrier()
        for name, p in params.items():
            p.data = views[name]

    @torch.no_grad()
    def all_reduce(self, link: Link, beside: Sequence[Tensor], number: int) -> None:
        """``beside`` over all of it. Who is in this call has written its gradients, so that they can be read after it."""
        link.all_reduce(beside)
        begun = time.perf_counter()
        for parts, into in self.blocks:
            total = parts[0]
            for part in parts[1:-1]:
                total = torch.add(total, part, out=self.held[: len(part)])
            torch.add(total, parts[-1], out=into)
        link.traffic.busy_s += time.perf_counter() - begun
        link.traffic.bytes_sent += link.world * self.sums[0].nbytes

    def whole(self, link: Link, parts: Mapping[str, Tensor]) -> Tensor | None:
        """On rank 0: all that the ranks give, flat, each for its own slices. All call together; gradients are lost."""
        for name, tensor in parts.items():
            self.slices[name].grad.copy_(tensor)
        link.barrier()
        pieces = zip(self.all_grads, self.bounds, self.bounds[1:], strict=False)
        whole = torch.cat([grads[a:b] for grads, a, b in pieces]) if link.rank == 0 else None
        link.barrier()
        return whole


class SharedMean(JoinedMean):
    """The task's optimizer, with its groups, rates and schedule, is left this rank's slices to step and their state to keep."""

    arena: SharedArena

    def __init__(self, replica: Replica, link: Link) -> None:
        super().__init__(replica, link)
        names = {id(p): n for n, p in replica.params.items()}
        optimizer, self.slices = replica.optimizer, self.arena.slices
        self.groups = [[names[id(p)] for p in group["params"]] for group in optimizer.param_groups]
        states = {names[id(p)]: state for p, state in optimizer.state.items()}
        optimizer.state.clear()
        for group, members in zip(optimizer.param_groups, self.groups, strict=True):
            group["params"] = [self.slices[n].param for n in members if n in self.slices]
        for name, state in states.items():
            if name in self.slices:
                optimizer.state[self.slices[name].param] = cut(state, self.slices[name].part)
        replica.stepped = {n: s.param for n, s in self.slices.items()}
        replica.optimizer_state = self.optimizer_state
        self.entries: dict[str, Entry] = {n: Dense(s.grad) for n, s in self.slices.items()}
        self.clips = [each for each in replica.chain if isinstance(each, ClipNorm)]
        self.trained = list(replica.params.values())
        #: These stay: the optimizer writes through ``slices``, whose versions are counted apart.
        self.versions = [p._version for p in self.trained]
        self.places = [p.data_ptr() for p in self.trained]

    def _make_arena(self) -> Arena:
        return SharedArena(self.replica.params, self.link)

    def gradients(self, update: Update) -> Update:
        if [p._version for p in self.trained] != self.versions:
            self.check_task("loss")
        return super().gradients(update)

    def check_task(self, method: str) -> None:
        """Before any is stepped again. What is written through ``p.data``, whose versions nobody counts, goes unseen; ``p.data``
        set to other memory is seen at the next evaluation."""
        kept = zip(self.replica.params.items(), self.versions, self.places, strict=True)
        for (name, p), version, place in kept:
            if p._version != version or p.data_ptr() != place:
                raise TaskError(
                    f"{type(self.replica.task).__name__}.{method} wrote to parameter {name!r} (or gave it other memory) while the other "
                    "workers of this host read it, who have it in common: use -o shared_step=off, or write to a copy."
                )

    def _combined(self, update: Update, correction: float, presence: list[float]) -> Update:
        """Of this rank's slices."""
        entries = self.entries
        if not all(presence):
            entries = {n: e for n, e in entries.items() if presence[self.position[n]]}
        joined = Update(entries, sum(self.replica.report.weights), update.version)
        if self.clips:
            square = torch.tensor([norm(joined.tensors()) ** 2], dtype=torch.float64)
            self.link.all_reduce([square])
            for clip in self.clips:
                clip.norm = math.sqrt(square.item())
        return joined

    def whole(self, update: Update) -> Iterator[tuple[str, Tensor]]:
        """``update`` is of this rank's slices; what the others have summed lies beside it."""
        flat = self.arena.whole(self.link, {})
        if flat is None:
            return
        for name, start in self.arena.starts.items():
            if self.presence[self.position[name]]:
                p = self.replica.params[name]
                yield name, flat[start : start + p.numel()].view(p.shape)

    def parameters(self, step: int) -> None:
        """All parameters are stepped before any is used."""
        self.link.barrier()

    def optimizer_state(self) -> dict[str, Any]:
        """As one process would have it; on rank 0, whole. All call together."""
        own = optimizer_state_by_name(self.replica.optimizer, self.replica.stepped)
        told = tell_all(self.link, {name: described(state) for name, state in own["state"].items()})
        known: dict[str, dict[str, Any]] = {n: kinds for each in reversed(told) for n, kinds in each.items()}
        keys = sorted({key for kinds in known.values() for key, kind in kinds.items() if kind == LARGE})
        states: dict[str, dict[str, Any]] = {
            name: {key: scalar(kind) for key, kind in kinds.items()} for name, kinds in sorted(known.items())
        }
        for key in keys:
            parts = {n: s[key] for n, s in own["state"].items() if described(s).get(key) == LARGE}
            flat = self.arena.whole(self.link, parts)
            for name, kinds in known.items():
                if flat is not None and kinds.get(key) == LARGE:
                    p, start = self.replica.params[name], self.arena.starts[name]
                    states[name][key] = flat[start : start + p.numel()].view(p.shape).clone()
        order = [name for members in self.groups for name in members if name in states]
        groups = [group | {"params": members} for group, members in zip(own["param_groups"], self.groups, strict=True)]
        return {"state": {name: states[name] for name in order}, "param_groups": groups}


# -- state of a parameter, whole and cut


def cut(state: Mapping[str, Any], part: slice) -> dict[str, Any]:
    return {key: value.reshape(-1)[part].clone() if is_large(key, value) else value for key, value in state.items()}
