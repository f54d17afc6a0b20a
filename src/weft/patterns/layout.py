"""Where each worker stands on the axes of a mesh. No torch here.

Ranks are numbered with the innermost axis first, so that those who talk most stand side by side, in one host where hosts hold several:
``tensor`` exchanges within a block, ``sharded`` at each block, ``pipeline`` at each cut, ``data`` once a step.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import astuple, dataclass

from weft.errors import ConfigError

DATA, PIPELINE, SHARDED, TENSOR = "data", "pipeline", "sharded", "tensor"
AXES = (DATA, PIPELINE, SHARDED, TENSOR)  # outermost first
#: An option of patterns that cut tensors.
SEQUENCE = {
    "doc": "with tensor: what is between its pairs is in parts, too, each worker's a piece of the sequence: less memory for activations, more exchanges"
}


@dataclass(frozen=True)
class Layout:
    """Degrees of the axes. A share of each batch is drawn for every place on ``data`` and ``sharded``."""

    data: int = 1
    pipeline: int = 1
    sharded: int = 1
    tensor: int = 1

    def __str__(self) -> str:
        """ "data=2 x tensor=2": the axes that have more than one place."""
        return " x ".join(f"{axis}={n}" for axis, n in zip(AXES, self.degrees, strict=True) if n > 1) or "one worker"

    @property
    def degrees(self) -> tuple[int, ...]:
        return astuple(self)

    @property
    def world(self) -> int:
        return math.prod(self.degrees)

    @property
    def shares(self) -> int:
        return self.data * self.sharded

    def place(self, rank: int) -> dict[str, int]:
        """Where ``rank`` stands on each axis."""
        places = {}
        for axis, n in zip(reversed(AXES), reversed(self.degrees), strict=True):
            rank, places[axis] = divmod(rank, n)
        return places

    def rank(self, **places: int) -> int:
        result = 0
        for axis, n in zip(AXES, self.degrees, strict=True):
            result = result * n + places.get(axis, 0)
        return result

    def share_of(self, rank: int) -> int:
        place = self.place(rank)
        return place[DATA] * self.sharded + place[SHARDED]

    def groups(self, axis: str) -> list[tuple[int, ...]]:
        """Ranks that differ in their place on ``axis`` alone, in order of it."""
        others = [(a, range(n)) for a, n in zip(AXES, self.degrees, strict=True) if a != axis]
        along = range(getattr(self, axis))
        return [
            tuple(self.rank(**dict(zip([a for a, _ in others], at, strict=True)), **{axis: k}) for k in along)
            for at in itertools.product(*(places for _, places in others))
        ]

    def crossing(self, axis: str, hosts: Sequence[Sequence[int]]) -> list[tuple[int, ...]]:
        """Groups of ``axis`` whose ranks stand on several of ``hosts``."""
        host_of = {rank: k for k, ranks in enumerate(hosts) for rank in ranks}
        return [ranks for ranks in self.groups(axis) if len({host_of.get(rank) for rank in ranks}) > 1]

    def check(self, workers: int) -> None:
        """ConfigError unless this many workers fill it."""
        if workers != self.world == 1:
            axes = ", ".join(f"-o {axis}={workers}" for axis in AXES)
            raise ConfigError(
                f"nothing says how {workers} workers stand: give degrees that multiply to {workers} ({axes}, or several of them)."
            )
        if workers != self.world:
            raise ConfigError(
                f"{workers} workers cannot hold {self}, which takes {self.world}: use --workers {self.world}, or other degrees."
            )
