"""How far apart two runs ended: the largest difference of any parameter, also relative to the global norm."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from weft.errors import ConfigError


@dataclass(frozen=True)
class Difference:
    """``max_abs``: the largest absolute difference of two entries; ``name``: of the tensor it is in ("" if all are
    equal); ``relative_to_norm``: ``max_abs`` over the global L2 norm of all tensors of the first run."""

    max_abs: float
    name: str
    relative_to_norm: float


def largest_difference(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> Difference:
    """Compare two runs' parameters by name, in float64.

    Entries that are equal, or both NaN, differ by 0; where only one is NaN or infinite the difference is infinite.
    Raises ConfigError if names or shapes differ; dtypes may.
    """
    if differs := unlike(a, b, "the first run", "the second"):
        raise ConfigError(
            f"the runs have different parameters: {differs}: compare two runs of the same task and options"
        )
    largest, largest_name, squares = 0.0, "", 0.0
    for name, tensor in a.items():
        x, y = _wide(tensor), _wide(b[name])
        squares += float(torch.linalg.vector_norm(x)) ** 2
        gap = (x - y).abs().nan_to_num(nan=math.inf, posinf=math.inf)
        gap[(x == y) | (x.isnan() & y.isnan())] = 0.0
        if gap.numel() and float(gap.max()) > largest:
            largest, largest_name = float(gap.max()), name
    norm = math.sqrt(squares)
    if largest == 0.0:
        return Difference(0.0, "", 0.0)
    return Difference(largest, largest_name, largest / norm if 0.0 < norm < math.inf else math.inf)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().to(torch.complex128 if tensor.is_complex() else torch.float64)


def unlike(a: Mapping[str, Any], b: Mapping[str, Any], first: str, second: str, most: int = 5) -> str:
    """By which names and shapes ``a`` (called ``first``) and ``b`` differ, ``most`` of them; empty if by none."""
    found = [f"{name} (only in {first if name in a else second})" for name in sorted(a.keys() ^ b.keys())]
    for name in (name for name in a if name in b):
        shape, other = (tuple(getattr(each[name], "shape", ())) for each in (a, b))
        if shape != other:
            found.append(f"{name} has shape {shape} in {first} and {other} in {second}")
    return ", ".join(found[:most]) + (f" and {len(found) - most} more" if len(found) > most else "")
