"""Where a worker's training examples come from: which it draws at each step, and what they are.

The loop knows only ``Feed``. A draw names its examples by number; ``batch`` may be asked for a draw in pieces.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, cast

import torch

from weft.data.partition import Indices
from weft.data.partition import parse as parse_partitioner
from weft.data.sampler import Draw, Sampler
from weft.patterns.base import Context
from weft.patterns.batches import Batches, groups_of


class Feed(Protocol):
    """One rank's; all ranks build it alike and call ``next`` in step."""

    def next(self) -> Draw:
        """This rank's part of the next joined batch. Every rank learns ``total`` without asking the others."""

    def batch(self, indices: Indices) -> Any:
        """Examples of the newest draw as a batch on the device."""

    def state_dict(self) -> dict[str, Any]:
        """The cursor: small, JSON-able, the same on every rank."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where ``state`` was taken, also in another world. Raises ConfigError if the data is not that of then."""


class Indexed:
    """A feed of examples that can be asked for by number: a sampler says which, ``Batches`` fetches them."""

    def __init__(self, sampler: Sampler, batches: Batches) -> None:
        # bound once: the loop calls these at every step
        self.next, self.batch = sampler.next, batches.__call__
        self.state_dict, self.load_state_dict = sampler.state_dict, sampler.load_state_dict


def make_feed(train: Any, ctx: Context, dtype: torch.dtype) -> Feed:
    """The feed of the task's training set on this rank."""
    config = ctx.config
    partitioner = parse_partitioner(config.partition)
    sampler = Sampler(
        len(cast(Any, train)),
        config.batch,
        ctx.rank,
        ctx.world,
        config.seed,
        partitioner,
        *groups_of(train, ctx.task, partitioner),
    )
    return Indexed(sampler, Batches(train, ctx.task, ctx.device, dtype))
