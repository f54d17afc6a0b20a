"""A recurrent model's stages take a micro-batch in time chunks, one after the other, so that several layers work on it at once: a wavefront.

The blocks from the first to the last that carries state through time compute a chunk from the state that their own chunk before has left;
gradients go the same way back, none is cut off, so all is as in one pass over the whole sequence. What comes before those blocks is computed
whole at the first chunk, what comes after them (the loss) whole at the last, when all of the sequence is there.

A block carries state if it is torch's RNN, GRU or LSTM, or has an attribute ``time_dim`` (where time lies in what it takes and makes) and a
``forward(x, state=None) -> (y, state)``; the state is a tensor or a tuple of such.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from msgspec.structs import replace
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from weft.errors import Incompatible, TaskError
from weft.patterns.base import PipelineFacts
from weft.patterns.stages import Cuts, take_grad, tensors_of, whole_backward
from weft.task import Task

#: In chunks and whole must be alike within this part of the largest number: float32 and another order of sums leave less.
SAME = 1e-3
CURE = "Use -o chunks=1"


def time_dim(block: nn.Module) -> int | None:
    """None: it carries no state."""
    if isinstance(block, nn.RNNBase):
        return 1 if block.batch_first else 0
    found: int | None = getattr(block, "time_dim", None)
    return found


def recurrent(cuts: Cuts) -> list[int]:
    return [k for k, block in enumerate(cuts.blocks) if time_dim(block) is not None]


class Wave:
    """A stage's way through the chunks of one micro-batch: ``forward`` in rising, ``backward`` in falling order.

    Of autograd's graph each chunk has a part of its own, between leaves: what it was given, the states that it goes on from, and, at the seams
    to what is computed whole, its part of a sequence. Gradients pass from leaf to ``seams``, in the tensors whose copies leaves are.
    """

    def __init__(self, cuts: Cuts, items: range, through_time: range, chunks: int) -> None:
        self.cuts, self.items, self.inside, self.chunks = cuts, items, through_time, chunks
        self.given: list[list[Tensor]] = [[] for _ in range(chunks)]
        self.made: list[list[Tensor]] = [[] for _ in range(chunks)]
        #: At the end of a chunk: (tensor, the leaf that goes on in its place)
        self.seams: list[list[tuple[Tensor, Tensor]]] = [[] for _ in range(chunks)]
        self.states: dict[int, Any] = {}  # by block, that the next chunk goes on from
        self.parts: list[Tensor] = []  # of what the first of the blocks takes, by chunk
        self.whole: list[
            tuple[Tensor, list[Tensor]]
        ] = []  # (what was computed before the first chunk, the leaves in its place)
        self.ends: list[Tensor] = []  # of what the last of the blocks has made, by chunk
        self.now = 0

    @property
    def receives(self) -> bool:
        """At each chunk; else at the first one, or at the last, all at once."""
        return self.inside.start < self.items.start <= self.inside.stop

    @property
    def finishes(self) -> bool:
        """Goes on behind the blocks that carry state, at the last chunk."""
        return self.items.stop > self.inside.stop

    def forward(self, chunk: int, given: Any, code: Callable[[], Any]) -> list[Tensor]:
        """``given``: what arrived, as leaves; None if nothing did. Returns what goes on, empty if nothing does."""
        self.now, first, last = chunk, chunk == 0, chunk == self.chunks - 1
        begin, end, inside = self.items.start, self.items.stop, self.inside
        self.given[chunk] = [t for t in tensors_of(given) if t.requires_grad]
        if end <= inside.start:
            made = self._run(code, begin, end, given) if first else None
        elif begin > inside.stop:
            made = self._run(code, begin, end, given) if last else None
        elif begin == inside.stop:
            self.ends.append(given[0])
            made = self._run(code, begin, end, self._joined(given[1])) if last else None
        else:
            end = end if last else min(end, inside.stop)
            if begin <= inside.start and not first:  # what comes before it is done
                self.cuts.on_item(inside.start)
                given = self._compute(inside.start, self.cuts.calls[inside.start], (), {})
                begin = inside.start + 1
            made = given if begin == end else self._run(code, begin, end, given)
            if self.finishes and not last:
                made = None
        tensors = [t for t in tensors_of(made) if t.is_floating_point()]
        self.made[chunk] = tensors
        return tensors

    def _run(self, code: Callable[[], Any], begin: int, end: int, given: Any) -> Any:
        outer, self.cuts.compute = self.cuts.compute, self._compute
        try:
            return self.cuts.run(code, begin, end, given)
        finally:
            self.cuts.compute = outer

    def _compute(self, k: int, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if k not in self.inside or time_dim(self.cuts.blocks[k]) is None:
            return forward(*args, **kwargs)
        x, state = taken(*args, **kwargs)
        if k == self.inside.start:
            if self.now == 0:
                state = self._open(x, state)
            x = self.parts[self.now]
        if self.now > 0:
            state = self.states[k]
        y, after = forward(x) if state is None else forward(x, state)
        if self.now < self.chunks - 1:
            self.states[k] = self._seam(after)
        if k == self.inside.stop - 1 and self.finishes:
            self.ends.append(self._seam(y))
            if self.now == self.chunks - 1:
                return self._joined(self._seam(after))
        return y, after

    def _seam(self, made: Any) -> Any:
        goes_on = leaves_of(made)
        self.seams[self.now] += zip(tensors_of(made), tensors_of(goes_on), strict=True)
        return goes_on

    def _open(self, x: Tensor, state: Any) -> Any:
        """Cut what the first block takes. Returns its first state, as leaves."""
        dim = time_dim(self.cuts.blocks[self.inside.start])
        assert dim is not None
        self.parts = [leaves_of(part) for part in x.split(even(x.shape[dim], self.chunks, self.cuts), dim)]
        self.whole.append((x, self.parts))
        first = leaves_of(state)
        self.whole += [(t, [leaf]) for t, leaf in zip(tensors_of(state), tensors_of(first), strict=True)]
        return first

    def _joined(self, state: Any) -> Any:
        """What the last of the blocks would have made of the whole."""
        dim = time_dim(self.cuts.blocks[self.inside.stop - 1])
        assert dim is not None
        return torch.cat(self.ends, dim), state

    def backward(self, chunk: int, grads: Sequence[Tensor]) -> list[Tensor]:
        """``grads``: of what ``forward`` returned. Adds to those of weights; returns those of what was given."""
        made, grads = self.made[chunk], list(grads)
        if self.finishes and made:  # behind the last chunk, whose part begins at leaves of its own
            run_back(zip(made, grads, strict=True))
            made, grads = [], []
        seams = self.seams[chunk]
        run_back([*zip(made, grads, strict=True), *((t, take_grad(leaf)) for t, leaf in seams if t.requires_grad)])
        if chunk == 0:
            run_back(self._grads_of_whole())
        back = [take_grad(t) for t in self.given[chunk]]
        self.made[chunk], self.seams[chunk], self.given[chunk] = [], [], []
        return back

    def _grads_of_whole(self) -> Iterator[tuple[Tensor, Tensor]]:
        dim = time_dim(self.cuts.blocks[self.inside.start])
        for t, leaves in self.whole:
            if t.requires_grad:
                found = [take_grad(leaf) for leaf in leaves]
                yield t, torch.cat(found, dim or 0) if len(found) > 1 else found[0]


def run_back(pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
    able = [(t, grad) for t, grad in pairs if t.requires_grad]
    whole_backward([t for t, _ in able], [grad for _, grad in able], [])


def leaves_of(made: Any) -> Any:
    return tree_map(lambda t: t.detach().requires_grad_(t.requires_grad) if isinstance(t, Tensor) else t, made)


def taken(*args: Any, **kwargs: Any) -> tuple[Any, Any]:
    """(x, state), however the model's code hands them over; None where it does not."""
    x, state, *_ = [*args, *kwargs.values(), None, None]
    return x, state


def even(length: int, chunks: int, cuts: Cuts) -> list[int]:
    """Steps in each chunk; the first ones may have one more."""
    if length < chunks:
        raise TaskError(
            f"chunks={chunks} is more than the {length} time steps that {type(cuts.task).__name__}'s model is given: use at most "
            f"-o chunks={length}."
        )
    return [length // chunks + (k < length % chunks) for k in range(chunks)]


# -- looking at a model


def learn(task: Task, model: nn.Module, batch: Any, facts: PipelineFacts, chunks: int) -> PipelineFacts:
    """``facts`` with what carries state; and, of more than one chunk, whether the model can be run so, by running it."""
    cuts = Cuts(task, model, [item.name for item in facts.items[:-1]])
    try:
        found = replace(facts, recurrent=recurrent(cuts))
        if chunks == 1:
            return found
        check(cuts, found.recurrent, chunks)
        return replace(found, chunks=rehearse(cuts, batch, found.recurrent, chunks))
    finally:
        cuts.undo()


def check(cuts: Cuts, carrying: Sequence[int], chunks: int) -> None:
    who = f"{type(cuts.task).__name__}'s model"
    if not carrying:
        raise Incompatible(
            f"chunks={chunks}: no block of {who} carries state through time, so nothing goes on from one chunk to the next. {CURE}; or let its "
            "blocks (the task's blocks(model)) be nn.RNN, nn.GRU or nn.LSTM, or modules with time_dim and forward(x, state) -> (y, state)."
        )
    for name, block in zip(cuts.names, cuts.blocks, strict=True):
        if getattr(block, "bidirectional", False):
            raise Incompatible(
                f"chunks={chunks}: block {name!r} of {who} is bidirectional: backward in time it begins with the last step, so no chunk can be computed "
                f"before all of the sequence is there. {CURE}, or make it of one direction."
            )


@torch.no_grad()
def rehearse(cuts: Cuts, batch: Any, carrying: Sequence[int], chunks: int) -> list[int]:
    """Both ways, without dropout: do the blocks make the same? Returns the steps in each chunk. TaskError if not."""
    who = f"{type(cuts.task).__name__}'s model"
    inside = range(carrying[0], carrying[-1] + 1)
    first, last = cuts.names[inside.start], cuts.names[inside.stop - 1]
    training = cuts.model.training

    def code() -> Any:
        torch.manual_seed(0)
        return cuts.task.loss(cuts.model, batch)

    lengths: list[int] = []

    def note(k: int, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if k == inside.start:
            x, dim = taken(*args, **kwargs)[0], time_dim(cuts.blocks[k])
            if not isinstance(x, Tensor) or dim is None or x.dim() < 3:
                what = f"a tensor of {x.dim()} dimensions" if isinstance(x, Tensor) else f"a {type(x).__name__}"
                raise Incompatible(
                    f"chunks={chunks}: block {first!r} of {who} is given {what}, and time chunks are cut of a tensor of three (batch, time, "
                    f"width): pad sequences to one length. {CURE}"
                )
            lengths.extend(even(x.shape[dim], chunks, cuts))
        return forward(*args, **kwargs)

    cuts.model.eval()
    try:
        with torch.random.fork_rng(devices=[]):
            cuts.compute = note
            whole = tensors_of(cuts.run(code, 0, inside.stop, None))
            wave = Wave(cuts, range(inside.stop), inside, chunks)
            try:
                parts = [wave.forward(t, None, code) for t in range(chunks)]
                dim = time_dim(cuts.blocks[inside.stop - 1])
                joined = [torch.cat([part[0] for part in parts], dim or 0), *parts[-1][1:]]
                off = max(
                    float((a - b).abs().max() / b.abs().max().clamp(min=1e-30))
                    for a, b in zip(joined, whole, strict=True)
                )
            except (RuntimeError, ValueError, TypeError, IndexError) as error:
                raise TaskError(
                    f"chunks={chunks}: {who} cannot be run in time chunks from block {first!r} to {last!r}: {error}. What stands between these blocks must "
                    f"take a part of the sequence as it takes the whole. {CURE}"
                ) from error
    finally:
        cuts.model.train(training)
    if not off <= SAME:
        raise TaskError(
            f"chunks={chunks}: in time chunks, {who} makes something else than of the whole sequence (block {last!r}, by {off:.2g} of its largest number): "
            f"between block {first!r} and {last!r} something looks from one time step at others, beside the state that blocks hand on. {CURE}"
        )
    return lengths
