"""What a block or a stage costs for one microbatch, and what it holds."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from functools import reduce

from weft.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Of one block, or of several that follow each other (``a + b``), for one microbatch.

    The embedding is a block, and so are the head and the loss. A whole backward takes ``input_gradient_s + weight_gradient_s``; in two, its second
    half takes ``split_s`` more.
    """

    forward_s: float
    input_gradient_s: float
    weight_gradient_s: float
    split_s: float = 0.0
    output_bytes: float = 0.0  # what goes on to the next block; as much comes back as its gradient
    activation_bytes: float = 0.0  # held from F until B or W
    state_bytes: float = 0.0  # parameters, gradients, optimizer: whatever the microbatch

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not (value >= 0 and math.isfinite(value)):
                raise ConfigError(f"{field.name}={value} is no cost: measure it again, or leave it at 0")

    @property
    def seconds(self) -> float:
        return self.forward_s + self.input_gradient_s + self.weight_gradient_s

    def part(self, share: float) -> Cost:
        """Of a part of the microbatch; the state is the same."""
        parts = {field.name: share * getattr(self, field.name) for field in fields(self)}
        return Cost(**{**parts, "state_bytes": self.state_bytes})

    def __add__(self, then: Cost) -> Cost:
        sums = {field.name: getattr(self, field.name) + getattr(then, field.name) for field in fields(self)}
        return Cost(**{**sums, "output_bytes": then.output_bytes})


def total(costs: Iterable[Cost]) -> Cost:
    """Of blocks that follow each other; at least one."""
    return reduce(Cost.__add__, costs)


def by_chunk(blocks: Sequence[Cost], shares: Sequence[Sequence[float]]) -> list[list[Cost]]:
    """``shares``: by block, the part of its microbatch that it computes in each time chunk; none: all in one."""
    if not shares:
        return [list(blocks)]
    return [[block.part(share[t]) for block, share in zip(blocks, shares, strict=True)] for t in range(len(shares[0]))]


def by_stage(blocks: Sequence[Cost], stages: Sequence[range]) -> list[Cost]:
    return [total(blocks[k] for k in stage) for stage in stages]
