"""Flat arrays of one dtype: how they are seen in the map, copied and combined.

numpy costs a tenth of torch's time to call. torch has bfloat16 and float8, and is the quicker one with float16.
"""

from __future__ import annotations

import functools
import mmap
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import torch

Array = Any  # a flat numpy array or torch tensor
Combine = Callable[[Sequence[Array], Array], Any]  # (parts in rank order, into); into may be one of the parts

BLOCK = 256 << 10  # bytes: combined and written back before they leave the cache


class Arrays(NamedTuple):
    view: Callable[[mmap.mmap, int, int], Array]  # (memory, byte offset, numel)
    flat: Callable[[torch.Tensor], Array]
    empty: Callable[[int], Array]
    copy: Callable[[Array, Array], Any]  # (into, from)
    combine: Callable[[str], Combine]  # of an op
    add_two: Callable[
        [str], Callable[[Array, Array, Array], Any] | None
    ]  # of an op: the third becomes the first two, combined


@functools.cache
def arrays_of(dtype: torch.dtype) -> Arrays:
    import torch

    try:
        torch.empty(0, dtype=dtype).numpy()
    except TypeError:
        return _torch_arrays(dtype)
    return _torch_arrays(dtype) if dtype == torch.float16 else _numpy_arrays(dtype)


def _numpy_arrays(dtype: torch.dtype) -> Arrays:
    import numpy as np
    import torch

    kind = torch.empty(0, dtype=dtype).numpy().dtype

    @functools.cache
    def combine(op: str) -> Combine:
        if op == "max" and dtype.is_complex:
            raise ValueError(f"{name_of(dtype)} numbers have no order, so no maximum: use op 'sum'")
        plus = np.add if op == "sum" else np.maximum
        held = np.empty(BLOCK // dtype.itemsize, kind)

        def combined(parts: Sequence[Array], into: Array) -> None:
            total = parts[0]
            for part in parts[1:-1]:
                total = plus(total, part, held[: len(into)])
            plus(total, parts[-1], into)

        return combined

    return Arrays(
        view=lambda memory, offset, numel: np.frombuffer(memory, kind, numel, offset),
        flat=lambda tensor: tensor.numpy().reshape(-1),
        empty=lambda numel: np.empty(numel, kind),
        copy=np.copyto,
        combine=combine,
        add_two=lambda op: np.add if op == "sum" else np.maximum,
    )


def _torch_arrays(dtype: torch.dtype) -> Arrays:
    import torch

    @functools.cache
    def combine(op: str) -> Combine:
        if dtype not in (torch.bfloat16, torch.float16):
            raise ValueError(f"{name_of(dtype)} cannot be combined: use float16, bfloat16, or a wider dtype")
        plus = torch.add if op == "sum" else torch.maximum
        held = torch.empty(BLOCK // dtype.itemsize)  # float32: a sum is rounded once, whatever the number of ranks

        def combined(parts: Sequence[Array], into: Array) -> None:
            if len(parts) == 2:  # torch itself adds in float32
                plus(*parts, out=into)
                return
            total = held[: len(into)].copy_(parts[0])
            for part in parts[1:]:
                plus(total, part, out=total)
            into.copy_(total)

        return combined

    return Arrays(
        view=lambda memory, offset, numel: torch.frombuffer(memory, dtype=dtype, count=numel, offset=offset),
        flat=lambda tensor: tensor.reshape(-1),
        empty=lambda numel: torch.empty(numel, dtype=dtype),
        copy=torch.Tensor.copy_,
        combine=combine,
        add_two=lambda op: None,
    )


def flat_of(tensor: torch.Tensor) -> Array:
    """The tensor's own memory in one dimension, or a copy where it is not contiguous."""
    if not tensor.is_cpu:
        raise ValueError(f"shared memory exchanges CPU tensors, this one is on {tensor.device}: use --link nccl")
    return arrays_of(tensor.dtype).flat(tensor.detach() if tensor.requires_grad else tensor)


def write_back(tensor: torch.Tensor, array: Array) -> None:
    """Undo ``flat_of`` where it made a copy."""
    import torch

    tensor.detach().copy_(torch.as_tensor(array).view(tensor.shape))


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
