"""What an encoding leaves out is added to the next one, so that it arrives late and not never.

Seide et al. 2014; why it is needed and suffices: Stich et al. 2018, Karimireddy et al. 2019. Each rank's residual is its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from weft.codecs.base import Codec, Exchanging, Keys, Segments
from weft.codecs.sparsify import TopK


def by_name(flat: Tensor, segments: Segments) -> dict[str, Tensor]:
    parts = torch.split(flat, [shape.numel() for _, shape in segments])
    return {name: part.view(shape) for (name, shape), part in zip(segments, parts, strict=True)}


def fill(flat: Tensor, segments: Segments, state: Mapping[str, Any], what: str) -> None:
    views = by_name(flat, segments)
    if set(views) != set(state):
        raise ValueError(f"{what} of {sorted(views)} is kept, and the checkpoint holds that of {sorted(state)}")
    for name, view in views.items():
        view.copy_(state[name])


class Plain:
    """Without feedback: for codecs that round without bias."""

    def __init__(self, codec: Codec) -> None:
        self.codec = codec

    def exchange(self, x: Tensor, keys: Keys, world: int) -> Exchanging:
        yield from self.codec.exchange(x, keys, world)

    def take_back(self, name: str, share: Tensor) -> None:
        """This rank's share of what came for a parameter and could not be used."""

    def state_dict(self) -> dict[str, Any]:
        """Alike on all ranks."""
        return {"codec": self.codec.state_dict()}

    def own_state_dict(self) -> dict[str, Any]:
        """This rank's."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any], own: Mapping[str, Any]) -> None:
        self.codec.load_state_dict(state.get("codec", {}))


class ErrorFeedback(Plain):
    """e + x is encoded; e keeps what that left out."""

    def __init__(self, codec: Codec, segments: Segments, like: Tensor) -> None:
        super().__init__(codec)
        self.segments, self.residual = segments, torch.zeros_like(like)

    def exchange(self, x: Tensor, keys: Keys, world: int) -> Exchanging:
        yield from self.codec.exchange(x, keys, world, self.residual)

    def take_back(self, name: str, share: Tensor) -> None:
        by_name(self.residual, self.segments)[name].add_(share)

    def own_state_dict(self) -> dict[str, Any]:
        return {"residual": by_name(self.residual, self.segments)}

    def load_state_dict(self, state: Mapping[str, Any], own: Mapping[str, Any]) -> None:
        """Without an ``own`` of this rank (another world than then) nothing is left over."""
        super().load_state_dict(state, own)
        self.residual.zero_()
        if own:
            fill(self.residual, self.segments, own["residual"], "the residual")


class MomentumCorrection(Plain):
    """Deep Gradient Compression (Lin et al. 2018, eq. 4 and 5): momentum is taken before the choice, of what waits.

    u = m u + x; v = v + u; v is encoded; where v was sent, u and v begin anew (momentum factor masking). The optimizer after it
    must have no momentum of its own. The ratio starts at 1/4 and falls to the codec's over ``warmup`` exchanges.
    """

    def __init__(self, codec: TopK, momentum: float, warmup: int, segments: Segments, like: Tensor) -> None:
        super().__init__(codec)
        self.final_ratio, self.momentum, self.warmup, self.segments = codec.ratio, momentum, warmup, segments
        self.u, self.v = torch.zeros_like(like), torch.zeros_like(like)
        self.exchanges = 0

    def ratio_now(self) -> float:
        """1/4, 1/16, ... as in the paper, but falling evenly instead of at each epoch."""
        if self.exchanges >= self.warmup or self.final_ratio >= 0.25:
            return self.final_ratio
        return float(0.25 * (self.final_ratio / 0.25) ** (self.exchanges / self.warmup))

    def exchange(self, x: Tensor, keys: Keys, world: int) -> Exchanging:
        codec = self.codec
        assert isinstance(codec, TopK)
        codec.ratio = self.ratio_now()
        self.u.mul_(self.momentum).add_(x)
        x.copy_(self.u)
        before = self.v.add(x)
        yield from codec.exchange(x, keys, world, self.v)
        self.u.masked_fill_(self.v != before, 0.0)
        self.exchanges += 1

    def take_back(self, name: str, share: Tensor) -> None:
        by_name(self.v, self.segments)[name].add_(share)

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"exchanges": self.exchanges}

    def own_state_dict(self) -> dict[str, Any]:
        return {"u": by_name(self.u, self.segments), "v": by_name(self.v, self.segments)}

    def load_state_dict(self, state: Mapping[str, Any], own: Mapping[str, Any]) -> None:
        super().load_state_dict(state, own)
        self.exchanges = int(state.get("exchanges", 0))
        for flat, name in ((self.u, "u"), (self.v, "v")):
            flat.zero_()
            if own:
                fill(flat, self.segments, own[name], name)
