"""Errors of a regression as sums that add up over batches and workers, and what they are measured by."""

from __future__ import annotations

from torch import Tensor


def squares(predicted: Tensor, target: Tensor) -> dict[str, tuple[Tensor, float]]:
    """Sums and counts for ``Task.evaluate``, over all values of two tensors of one shape."""
    predicted, target = predicted.double(), target.double()
    n = target.numel()
    return {
        "loss": (((predicted - target) ** 2).sum(), n),
        "target": (target.sum(), n),
        "squared_target": ((target**2).sum(), n),
    }


def mean_squares(totals: dict[str, tuple[Tensor, float]]) -> tuple[Tensor, Tensor]:
    """(mean squared error, variance of the targets about their own mean): 1 - their ratio is R2."""
    error, target, squared = (
        total / count for total, count in (totals[k] for k in ("loss", "target", "squared_target"))
    )
    return error, squared - target**2
