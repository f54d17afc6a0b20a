"""A model made without its numbers, which then come block by block, the same as if it had been made at once.

While ``task.model()`` runs, large tensors are only described, and what is done to them is written down. Randomness is drawn as ever,
into memory that is let go at once; where each draw began is kept. A tensor's numbers are then what was written down, done for it alone.
(torchdistx's deferred_init has the idea; ours keeps the order of draws.) It costs each draw twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map, tree_map_only

META = torch.device("meta")
LARGE_BYTES = 64 << 10  # a tensor of less is made at once


class CannotWait(Exception):
    """Numbers are asked for while the model is made."""


@dataclass(frozen=True)
class Described:
    """A tensor of the log: a look at memory number ``key``."""

    key: int
    dtype: torch.dtype
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    def within(self, memory: Mapping[int, torch.UntypedStorage]) -> Tensor:
        return torch.empty(0, dtype=self.dtype).set_(memory[self.key], self.offset, self.size, self.stride)


class Done(NamedTuple):
    op: Callable[..., Any]
    args: tuple[Any, ...]  # tensors as Described, small ones as they were
    kwargs: dict[str, Any]
    reads: frozenset[int]  # keys
    writes: frozenset[int]
    makes: tuple[tuple[int, Described], ...]  # which of its results
    generator: torch.Generator | None  # that it draws from
    began: Tensor | None  # the generator's state before


class Later(TorchDispatchMode):
    """``with Later() as later: model = task.model()``, then ``later.give(tensors)``."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.log: list[Done] = []
        self._keys: dict[int, int] = {}  # of a storage
        self._given: set[int] = set()
        self._storages: list[torch.UntypedStorage] = []  # kept: an address has one storage

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, Tensor)]
        if not any(t.is_meta for t in given):
            if given or "device" not in {a.name for a in func._schema.arguments}:
                return func(*args, **kwargs)
            asked = torch.device(kwargs.get("device") or "cpu")
            described = func(*args, **kwargs | {"device": META})
            if asked.type not in ("cpu", "meta") or (asked != META and described.nbytes < LARGE_BYTES):
                return func(*args, **kwargs)
            self._note(func, args, kwargs | {"device": torch.device("cpu")}, described)
            return described
        on_meta = tree_map_only(Tensor, lambda t: t if t.is_meta else t.to(META), (args, kwargs))
        if "device" in kwargs and torch.device(kwargs["device"] or "cpu") != META:
            on_meta[1]["device"] = META
            kwargs = kwargs | {"device": torch.device("cpu")}
        try:
            result = func(*on_meta[0], **on_meta[1])
        except (NotImplementedError, RuntimeError) as error:
            raise CannotWait(str(func)) from error
        if written := [t for t, w in self._with_writes(func, args, kwargs) if w and not t.is_meta]:
            raise CannotWait(f"{func} writes to a small tensor ({len(written)})")
        self._note(func, args, kwargs, result)
        return result

    def _note(self, func: Any, args: Any, kwargs: dict[str, Any], result: Any) -> None:
        reads = {self._known(t) for t in tree_flatten((args, kwargs))[0] if isinstance(t, Tensor) and t.is_meta}
        before = len(self._storages)
        writes = {self._key(t) for t, written in self._with_writes(func, args, kwargs) if written}
        results = [t for t in tree_flatten(result)[0] if isinstance(t, Tensor)]
        makes = tuple((k, self._described(t)) for k, t in enumerate(results) if self._key(t) >= before)
        if not (makes or writes):
            return  # a view
        kept = tree_map_only(Tensor, lambda t: self._described(t) if t.is_meta else self._small(t), (args, kwargs))
        kept[1].update({"device": torch.device("cpu")} if kept[1].get("device") == META else {})
        generator, began = None, None
        if torch.Tag.nondeterministic_seeded in func.tags:
            generator = kwargs.get("generator") or torch.default_generator
            began = generator.get_state()
        done = Done(func, kept[0], kept[1], frozenset(reads), frozenset(writes), makes, generator, began)
        if generator is not None:
            scratch = {key: torch.UntypedStorage(self._storages[key].nbytes()) for key in reads}
            _do(done, scratch)  # the draw itself; where it began is kept
        self.log.append(done)

    def _with_writes(self, func: Any, args: Any, kwargs: Any) -> Iterator[tuple[Tensor, bool]]:
        for k, argument in enumerate(func._schema.arguments):
            value = args[k] if k < len(args) else kwargs.get(argument.name)
            written = argument.alias_info is not None and argument.alias_info.is_write
            yield from ((t, written) for t in tree_flatten(value)[0] if isinstance(t, Tensor))

    def _small(self, tensor: Tensor) -> Tensor:
        if tensor.nbytes >= LARGE_BYTES:
            raise CannotWait("a large tensor is made outside torch")
        return tensor.clone()

    def _known(self, tensor: Tensor) -> int:
        if tensor.untyped_storage()._cdata not in self._keys:
            raise CannotWait("a tensor is on the meta device by itself")
        return self._key(tensor)

    def _key(self, tensor: Tensor) -> int:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._keys:
            self._keys[storage._cdata] = len(self._storages)
            self._storages.append(storage)
        return self._keys[storage._cdata]

    def _described(self, t: Tensor) -> Described:
        return Described(self._key(t), t.dtype, tuple(t.shape), tuple(t.stride()), int(t.storage_offset()))

    def give(self, tensors: Iterable[Tensor]) -> None:
        """Those that are only described become real, in place: whoever holds one holds it still. One memory at a time."""
        with torch.no_grad():
            for tensor in {id(t): t for t in tensors if t.is_meta}.values():
                if (key := self._key(tensor)) in self._given:
                    raise CannotWait("two of its tensors share their memory")
                self._given.add(key)
                real = self._look(tensor)
                own: Tensor = nn.Parameter(real, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else real
                own.__dict__.update(tensor.__dict__)
                torch.utils.swap_tensors(tensor, own)

    def _memory(self, key: int) -> dict[int, torch.UntypedStorage]:
        wanted, needed = {key}, []
        for done in reversed(self.log):
            if wanted & (done.writes | {made.key for _, made in done.makes}):
                needed.append(done)
                wanted |= done.reads
        memory: dict[int, torch.UntypedStorage] = {}
        for done in reversed(needed):
            if done.generator is None or done.began is None:
                _do(done, memory)
                continue
            now = done.generator.get_state()
            done.generator.set_state(done.began)
            _do(done, memory)
            done.generator.set_state(now)
        return memory

    def _look(self, tensor: Tensor) -> Tensor:
        """Its numbers, in memory of their own."""
        described = self._described(tensor)
        return described.within(self._memory(described.key))


def _do(done: Done, memory: dict[int, torch.UntypedStorage]) -> None:
    def real(a: Any) -> Any:
        return a.within(memory) if isinstance(a, Described) else a

    args, kwargs = tree_map(real, (done.args, done.kwargs))
    results = [t for t in tree_flatten(done.op(*args, **kwargs))[0] if isinstance(t, Tensor)]
    for index, made in done.makes:
        result = results[index]
        if result.stride() != made.stride or result.storage_offset() != made.offset:
            raise CannotWait(f"{done.op} lays out what it makes in another way than it says")
        memory[made.key] = result.untyped_storage()


def why_not(make: Callable[[], nn.Module], model: nn.Module) -> str:
    """Empty if ``make``, done late, gives exactly ``model``, as made with the same randomness; else why it cannot."""
    try:
        with Later() as later:
            other = make()
        names, mine = dict(all_tensors(other)), dict(all_tensors(model))
        if names.keys() != mine.keys():
            return "it is made in another way each time"
        for name, tensor in names.items():
            waited = tensor.is_meta
            later.give([tensor])
            equal = tensor.dtype == mine[name].dtype and same(tensor, mine[name])
            if waited:
                tensor.untyped_storage().resize_(0)  # one at a time here, too
            if not equal:
                return f"{name} comes out otherwise if it is to wait (torch's orthogonal_ and trunc_normal_ look at what they fill)"
    except Exception as error:
        return f"it needs numbers, or places in memory, while it is made ({type(error).__name__}: {str(error).partition(chr(10))[0]})"
    return ""


def all_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()


def same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)
