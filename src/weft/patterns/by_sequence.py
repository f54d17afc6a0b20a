"""Sequence parallelism (Korthikanti et al. 2022, 2205.05198): what lies between the pairs of matrices that are cut is in parts, too, by its last dimension but one.

A row's result is reduce-scattered instead of all-reduced, and gathered before the next columns. What lies between is the model's own code: it
is watched in the rehearsal, and may do there only what treats each place of the sequence by itself.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

from weft.errors import Incompatible

aten = torch.ops.aten


def keep_in_parts(
    model: nn.Module, columns: Iterable[str], blocks: Iterable[str], ends: Iterable[str], mesh: DeviceMesh
) -> None:
    """``columns``: modules that need all they are given. ``blocks``: those between which activations pass; ``ends``: after which of them they are whole."""
    modules, gathered = dict(model.named_modules()), Gathered()
    for name in columns:
        modules[name].register_forward_pre_hook(gathered, prepend=True)
    for name in blocks:
        modules[name].register_forward_pre_hook(
            lambda module, args, kwargs: (entered(args, mesh), {k: entered(v, mesh) for k, v in kwargs.items()}),
            with_kwargs=True,
        )
    for name in ends:
        modules[name].register_forward_hook(lambda module, args, made: tree_map(joined, made))


def entered(value: Any, mesh: DeviceMesh) -> Any:
    """What is whole, so that its gradient comes back whole: of parts each worker makes only its own. A list or dict stays the caller's, who may
    look into it afterwards."""
    if type(value) is tuple:
        return tuple(entered(each, mesh) for each in value)
    if not isinstance(value, Tensor) or isinstance(value, DTensor) or not value.is_floating_point():
        return value
    return DTensor.from_local(value, mesh, [Replicate()], run_check=False)


def joined(value: Any) -> Any:
    """Whole on every worker, as a plain tensor."""
    return everywhere(value).to_local() if isinstance(value, DTensor) else value


def everywhere(tensor: DTensor) -> DTensor:
    return tensor.redistribute(placements=[Replicate()] * tensor.device_mesh.ndim)


class Gathered:
    """Before columns: what they are given becomes whole, once for those that are given the same. torch would choose by a guess at costs, and
    might gather the matrix."""

    def __init__(self) -> None:
        self._given: Callable[[], Tensor | None] = lambda: None
        self._whole: Callable[[], Tensor | None] = lambda: None

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        given = args[0]
        if not isinstance(given, DTensor) or not in_parts(given):
            return None
        if self._given() is not given or (whole := self._whole()) is None:
            whole = everywhere(given)
            self._given, self._whole = weakref.ref(given), weakref.ref(whole)
        return whole, *args[1:]


#: Beside what torch calls pointwise: what treats each place of the sequence by itself.
BY_ITSELF = {
    *(aten.bernoulli_.float, aten.empty_like.default, aten.zeros_like.default, aten.ones_like.default),
    *(aten.clone.default, aten.detach.default, aten.alias.default, aten._to_copy.default),
}
#: The same, if what it is taken over is not in parts: the argument at this place says which dimensions.
OVER = {aten.mean.dim: 1, aten.sum.dim_IntList: 1, aten.var.correction: 1, aten.linalg_vector_norm.default: 2}
NORMS = {aten.native_layer_norm.default, aten._fused_rms_norm.default}  # over the last ones, of this shape


class BetweenPairs(TorchDispatchMode):
    """Incompatible for an operation on what is in parts of the sequence, if it may need more than a worker has; torch would exchange, or,
    of some operations, compute with the part. ``on``: we are between pairs."""

    def __init__(
        self, who: str, model: nn.Module, rows: Iterable[str], columns: Iterable[str], ends: Iterable[str]
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.who, self.on = who, False
        modules = dict(model.named_modules())
        for name in rows:
            modules[name].register_forward_hook(lambda *_: self._turn(True))
        for name in columns:
            modules[name].register_forward_pre_hook(lambda *_: self._turn(False), prepend=True)
        for name in ends:
            modules[name].register_forward_hook(lambda *_: self._turn(False))

    def _turn(self, on: bool) -> None:
        self.on = on

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.on and any(isinstance(t, DTensor) and in_parts(t) for t in tree_flatten((args, kwargs))[0]):
            if not (torch.Tag.pointwise in func.tags or func in BY_ITSELF or is_over_wholes(func, args)):
                with self:  # in inference mode what torch composes of others comes as it is
                    made = func.decompose(*args, **kwargs)
                if made is not NotImplemented:
                    return made
                raise Incompatible(
                    f"sequence=true: between its pairs of Linears, {self.who}'s model calls {func}. In parts of the sequence goes only what treats each of its "
                    "places by itself: sums, products, activations, dropout, norms over the last dimension. Leave sequence=true out."
                )
        return func(*args, **kwargs)


def in_parts(tensor: DTensor) -> bool:
    return not all(at.is_replicate() for at in tensor.placements)


def is_over_wholes(func: Any, args: tuple[Any, ...]) -> bool:
    """A norm, a sum, a mean over dimensions that each worker has whole; or their repetition."""
    given = args[0]
    if func in NORMS:
        dims = list(range(given.dim() - len(args[1]), given.dim()))
    elif func in OVER and len(args) > OVER[func] and args[OVER[func]]:
        dims = [dim % given.dim() for dim in args[OVER[func]]]
    elif func is aten.expand.default:
        before = len(args[1]) - given.dim()
        dims = [d for d in range(given.dim()) if args[1][before + d] not in (-1, given.shape[d])]
    else:
        return False
    return not any(at.is_partial() or (at.is_shard() and at.dim in dims) for at in given.placements)
