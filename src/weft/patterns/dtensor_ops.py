"""What torch's DTensor lacks on CPUs, or gives each worker a part of where its code would see the whole: attention, random numbers, numbers read in Python.

Importing this registers it. The one place that knows how torch is told; tests/patterns/test_tensors.py holds it to that.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.debug import _clear_sharding_prop_cache

aten = torch.ops.aten


def _by_head(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Attention forward or backward, by examples (dim 0) and heads (dim 1), which are independent of each other. A mask may say the same for all of them."""
    parts = [t for t in (*args, *kwargs.values()) if isinstance(t, DTensor)]
    mesh, cuttable = parts[0].device_mesh, (Shard(0), Shard(1))
    like = next((t for t in parts if any(p in cuttable for p in t.placements)), parts[0])
    at = [p if p in cuttable else Replicate() for p in like.placements]

    def part(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if isinstance(value, DTensor):
            cut = [p if isinstance(p, Replicate) or of_each(value, p.dim) else Replicate() for p in at]
            return value.redistribute(mesh, cut).to_local()
        for axis, p in enumerate(at):
            if not isinstance(p, Replicate) and of_each(value, p.dim):
                value = value.chunk(mesh.size(axis), p.dim)[mesh.get_local_rank(axis)]
        return value

    made = op(*map(part, args), **{key: part(value) for key, value in kwargs.items()})
    return tuple(DTensor.from_local(t, mesh, at, run_check=False) for t in made)


def of_each(value: Tensor, dim: int) -> bool:
    """It is another for each place of a dim: a mask may have fewer dims, or one that stands for all."""
    return value.dim() > 2 and value.shape[dim] > 1


for _attention in (
    aten._scaled_dot_product_flash_attention_for_cpu.default,
    aten._scaled_dot_product_flash_attention_for_cpu_backward.default,
):
    DTensor._op_dispatcher._custom_op_handlers[_attention] = _by_head  # type: ignore[assignment]


def _drawn_whole(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Random numbers, the same as one process draws: each worker draws all and keeps its part. Generators stay alike."""
    given, mesh = args[0], args[0].device_mesh
    blank = torch.empty(given.shape, dtype=given.dtype, device=given.device)
    drawn = op(given.full_tensor() if op in BY_VALUES else blank, *map(_whole, args[1:]), **kwargs)
    whole = DTensor.from_local(drawn, mesh, [Replicate()] * mesh.ndim, run_check=False)
    if drawn.shape != given.shape:
        return whole
    if not op._schema.is_mutable:
        return whole if any(at.is_partial() for at in given.placements) else whole.redistribute(mesh, given.placements)
    if any(at.is_partial() for at in given.placements):
        raise RuntimeError("random numbers are written into a sum that is still to be made")
    given.to_local().copy_(whole.redistribute(mesh, given.placements).to_local())
    return given


def _whole(value: Any) -> Any:
    return value.full_tensor() if isinstance(value, DTensor) else value


#: What is drawn depends on the numbers given, not on their shape alone.
BY_VALUES = {aten.bernoulli.default, aten.multinomial.default, aten.poisson.default}

for _op in (
    *(aten.bernoulli_.float, aten.bernoulli_.Tensor, aten.bernoulli.p, *BY_VALUES),
    *(aten.uniform_.default, aten.normal_.default, aten.exponential_.default, aten.log_normal_.default),
    *(
        aten.cauchy_.default,
        aten.geometric_.default,
        aten.random_.default,
        aten.random_.to,
        getattr(aten.random_, "from"),
    ),
    *(aten.rand_like.default, aten.randn_like.default, aten.randint_like.default, aten.randint_like.low_dtype),
):
    DTensor._op_dispatcher._custom_op_handlers[_op] = _drawn_whole  # type: ignore[assignment]


def _not_in_parts(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    raise RuntimeError(f"{op} draws random numbers, and torch would draw each worker's part by itself")


for _op in (aten.native_dropout.default, aten.rrelu_with_noise.default, aten.rrelu_with_noise_.default):
    DTensor._op_dispatcher._custom_op_handlers[_op] = _not_in_parts  # type: ignore[assignment]


def _number(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What Python reads of a tensor: of the whole, and so the same on every worker. torch gives that of this worker's part."""
    return op(args[0].full_tensor())


DTensor._op_dispatcher._custom_op_handlers[aten._local_scalar_dense.default] = _number  # type: ignore[assignment]


@contextmanager
def as_another_rank() -> Iterator[None]:
    """torch remembers what comes of an operation together with the mesh, in which a rank has its place: forgotten before and after."""
    _clear_sharding_prop_cache()
    try:
        yield
    finally:
        _clear_sharding_prop_cache()
