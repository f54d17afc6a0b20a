"""What an encoding leaves out is added to the next one, so that it arrives late and not never.

Seide et al. 2014; why it is needed and suffices: Stich et al. 2018, Karimireddy et al. 2019. Each rank's residual is its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from weft.codecs.base import Codec, Exchanging, Keys, Segments
from weft.codecs.sparsify import Sparsifier


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
    """e + x is encoded; e keeps what that left out.

    In the first ``warmup`` exchanges the codec leaves out less (Codec.warm_up).
    """

    def __init__(self, codec: Codec, segments: Segments, like: Tensor, warmup: int = 0) -> None:
        super().__init__(codec)
        self.segments, self.residual = segments, torch.zeros_like(like)
        self.warmup, self.exchanges = warmup, 0

    def exchange(self, x: Tensor, keys: Keys, world: int) -> Exchanging:
        self._warm_up()
        self.exchanges += 1
        yield from self.codec.exchange(x, keys, world, self.residual)

    def _warm_up(self) -> None:
        self.codec.warm_up(min(1.0, self.exchanges / self.warmup) if self.warmup else 1.0)

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"exchanges": self.exchanges}

    def take_back(self, name: str, share: Tensor) -> None:
        by_name(self.residual, self.segments)[name].add_(share)

    def own_state_dict(self) -> dict[str, Any]:
        return {"residual": by_name(self.residual, self.segments)}

    def load_state_dict(self, state: Mapping[str, Any], own: Mapping[str, Any]) -> None:
        """Without an ``own`` of this rank nothing is left over."""
        self.exchanges = int(state.get("exchanges", 0))
        self._warm_up()
        super().load_state_dict(state, own)
        self.residual.zero_()
        if own:
            fill(self.residual, self.segments, own["residual"], "the residual")


@dataclass(frozen=True)
class Momentum:
    """The first moment that an optimizer keeps: SGD's u = m u + x, or Adam's u = m u + (1 - m) x, over 1 - m^t (``is_mean``)."""

    factor: float
    is_mean: bool = False


class RunningMomentum:
    """``x`` becomes its running momentum, in place."""

    def __init__(self, momentum: Momentum, like: Tensor) -> None:
        self.momentum, self.velocity, self.steps = momentum, torch.zeros_like(like), 0

    def __call__(self, x: Tensor) -> None:
        m = self.momentum
        self.steps += 1
        self.velocity.mul_(m.factor).add_(x, alpha=1 - m.factor if m.is_mean else 1.0)
        torch.mul(self.velocity, 1 / (1 - m.factor**self.steps) if m.is_mean else 1.0, out=x)


class MomentumCorrection(ErrorFeedback):
    """Momentum is taken before the codec instead of after it, by each rank of its own gradients: then what waits in the residual
    is momentum, and does not come all at once on top of what the optimizer still remembers.

    Deep Gradient Compression (Lin et al. 2018, eq. 4 and 5), for any codec; for sign it is 1-bit Adam's order (Tang et al. 2021),
    without its frozen variance. Where something of a value had waited as it is sent, its momentum begins anew (momentum factor
    masking). The rounding of values sent as fp16 waits, too, so that of these nearly all begin anew, as in the paper; where nothing is
    rounded and nothing waits, momentum is the optimizer's own. The optimizer must keep none of its own.
    """

    def __init__(self, codec: Codec, momentum: Momentum, warmup: int, segments: Segments, like: Tensor) -> None:
        super().__init__(codec, segments, like, warmup)
        self.momentum = RunningMomentum(momentum, like)

    def exchange(self, x: Tensor, keys: Keys, world: int) -> Exchanging:
        self.momentum(x)
        if not isinstance(self.codec, Sparsifier):
            yield from super().exchange(x, keys, world)
            return
        waited = self.residual != 0
        before = self.residual + x
        yield from super().exchange(x, keys, world)
        self.momentum.velocity.masked_fill_(waited.logical_and_(self.residual != before), 0.0)

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"steps": self.momentum.steps}

    def own_state_dict(self) -> dict[str, Any]:
        return super().own_state_dict() | {"velocity": by_name(self.momentum.velocity, self.segments)}

    def load_state_dict(self, state: Mapping[str, Any], own: Mapping[str, Any]) -> None:
        super().load_state_dict(state, own)
        self.momentum.steps = int(state.get("steps", 0))
        self.momentum.velocity.zero_()
        if own:
            fill(self.momentum.velocity, self.segments, own["velocity"], "the momentum")
