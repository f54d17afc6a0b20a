"""Optimizers that may be given a part of a parameter, for they treat each number by itself."""

from __future__ import annotations

from typing import Any

from torch import Tensor, optim

#: At every step, in all their ways (loop, foreach, fused); tests/patterns/test_shared_step.py holds them to it, to the bit.
#: Trying out a few steps of an unknown optimizer would prove nothing: some begin to mix numbers (Shampoo, LAMB) or to
#: quantise them in blocks (8-bit Adam) only later, or in large tensors. So it is exactly these, and no subclass.
ELEMENTWISE: tuple[type[optim.Optimizer], ...] = (
    *(optim.SGD, optim.Adam, optim.AdamW, optim.NAdam, optim.RAdam, optim.Adamax),
    *(optim.RMSprop, optim.Adagrad, optim.Adadelta, optim.ASGD, optim.Rprop),
)
#: What these keep once for a parameter. All else that they keep is as large as the parameter.
PER_PARAMETER = frozenset({"step", "mu_product", "mu", "eta"})


def is_large(key: str, value: Any) -> bool:
    """Whether what they keep under ``key`` is as large as the parameter."""
    return isinstance(value, Tensor) and key not in PER_PARAMETER
