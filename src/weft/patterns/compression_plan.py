"""What ``compress`` does to a plan: bytes, memory, words. Without torch until bytes are asked for."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import TYPE_CHECKING

from weft.codecs.spec import is_compressed, parse
from weft.cost import all_gather_bytes

if TYPE_CHECKING:
    from weft.patterns.base import Facts, ParamFact


class CompressionPlan:
    """Of ``compress`` (not "none") for a task of these facts. ``of_gradients``: else of deltas, for which no optimizer gives up
    its momentum, and nothing warms up."""

    def __init__(self, compress: str, facts: Facts, of_gradients: bool = True) -> None:
        self.compress, self.facts, self.of_gradients = compress, facts, of_gradients
        self.spec = parse(compress)

    @cached_property
    def large(self) -> list[ParamFact]:
        return [p for p in self.facts.params if p.trainable and not p.sparse and is_compressed(p.shape)]

    @property
    def takes_momentum(self) -> bool:
        return self.of_gradients and self.facts.momentum is not None and self.spec.takes_momentum

    def bytes_sent(
        self, beside: int, workers: int, bytes_for: Callable[[int, int], int], carrier: str, steps: int = 0
    ) -> int:
        """By one worker in an exchange of all trained tensors, the mean over ``steps``; ``beside`` bytes travel whole with the
        first sum."""
        from weft.patterns.compression import bytes_per_exchange  # imports torch

        sums, gathered = bytes_per_exchange(self.facts, self.spec, steps if self.of_gradients else 0)
        result = sum(bytes_for(n, workers) for n in (sums[0] + beside, *sums[1:]))
        return result + sum(all_gather_bytes(carrier, n, workers) for n in gathered)

    def payload_bytes(self) -> int:
        """What one worker makes of all its dense trained tensors, after the warm-up."""
        from weft.patterns.compression import bytes_per_exchange  # imports torch

        sums, gathered = bytes_per_exchange(self.facts, self.spec, 0)
        return sum(sums) + sum(gathered)

    def kept_bytes(self) -> int:
        """On a worker: what the codec left out and, of gradients, the momentum taken before it."""
        return sum(p.nbytes for p in self.large) * (int(self.spec.choice.biased) + int(self.takes_momentum))

    def notes(self, workers: int) -> list[str]:
        name = f"compress={self.compress}"
        if workers == 1:
            return [f"{name}: one worker sends nothing, so nothing is compressed"]
        if not self.large:
            return [f"{name}: no tensor of this model is large enough to be compressed, so all travel whole"]
        result = []
        optimizer, momentum, stays = self.facts.optimizer, self.facts.momentum, self.facts.momentum_stays
        if (compressed := self.payload_bytes()) >= (whole := sum(self.facts.gradient_bytes.values())):
            result.append(
                f"{name} makes {compressed:,} bytes of the {whole:,} that would be sent without it: leave it out, or ask for less"
            )
        if self.takes_momentum:
            assert momentum is not None
            result.append(
                f"{optimizer}'s momentum of {momentum[0]:g} is taken before {self.spec.name}, and not after it"
            )
        elif self.of_gradients and self.spec.takes_momentum:
            result.append(
                f"{name} does better with a momentum taken before it, and {optimizer} has none that could be: {stays}"
            )
        return result
