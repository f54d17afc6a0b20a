"""What a codec is: ``encode`` makes a flat tensor small, ``add_to`` adds what the bytes say to another.

Two families (Agarwal et al. 2022, "On the utility of gradient compression"). **Linear** codecs: the sum of encodings is the
encoding of the sum, so encodings travel by all-reduce, whose cost per rank does not grow with the number of ranks. The others
travel by all-gather: p encodings arrive at each rank, which decodes all of them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor


class Keys(NamedTuple):
    """Randomness of exchange ``number`` of a run: of ``rank`` alone, or the same on all ranks."""

    seed: int
    number: int
    rank: int

    def own(self) -> int:
        """64 bits."""
        return int(np.random.SeedSequence([self.seed, self.number, 1 + self.rank]).generate_state(1, np.uint64)[0])

    def shared(self, exchanges: int = 1) -> np.random.Generator:
        """Anew every so many exchanges."""
        return np.random.Generator(np.random.Philox(np.random.SeedSequence([self.seed, self.number // exchanges])))


@dataclass
class Sum:
    """Please add these up over all ranks, in place."""

    buffers: list[Tensor]


@dataclass
class Gather:
    """Please send me everybody's: ``payload`` of each rank, in rank order."""

    payload: Tensor


#: yields what it needs exchanged, and is sent what came of a Gather
Exchanging = Generator[Sum | Gather, Sequence[Tensor] | None, None]
Segments = Sequence[tuple[str, torch.Size]]  # what a flat tensor holds, one after the other: (parameter, its shape)


class Codec(ABC):
    """Of flat tensors (numel,) of one floating dtype. It may keep scratch memory, but nothing that a resume would miss."""

    name: ClassVar[str]
    linear: ClassVar[bool] = False
    #: what encode(x) leaves out of x, it would leave out for ever: of no use without error feedback
    biased: ClassVar[bool] = True

    @abstractmethod
    def encode(self, x: Tensor, keys: Keys) -> Tensor:
        """A flat payload of ``nbytes(len(x))`` bytes: uint8, or of a dtype that can be summed if the codec is linear.

        It is valid until the next call.
        """

    @abstractmethod
    def add_to(self, out: Tensor, payload: Tensor, keys: Keys, alpha: float = 1.0) -> None:
        """``out += alpha * decoded``; ``keys`` are those of the encoding, but for the rank."""

    @abstractmethod
    def nbytes(self, numel: int, itemsize: int = 4) -> int:
        """Bytes of the payload of ``numel`` elements of ``itemsize`` bytes."""

    def sums(self, numel: int, itemsize: int = 4) -> list[int]:
        """Bytes of each sum that an exchange asks for, of a linear codec."""
        return [self.nbytes(numel, itemsize)]

    def decode(self, payload: Tensor, out: Tensor, keys: Keys) -> None:
        out.zero_()
        self.add_to(out, payload, keys)

    def encode_with_feedback(self, x: Tensor, residual: Tensor, keys: Keys) -> Tensor:
        """``encode`` of residual + x; ``residual`` becomes what that leaves out. ``x`` stays as it is.

        This is the plain way. Where a codec works through the cache in pieces, it does all three there: from memory they take
        three times as long as the encoding.
        """
        payload = self.encode(residual.add_(x), keys)
        self.add_to(residual, payload, keys, alpha=-1.0)
        return payload

    def decode_sum(self, payloads: Sequence[Tensor], out: Tensor, keys: Keys) -> None:
        """Of all ranks, in their order: the same bits everywhere. This, too, is the plain way."""
        out.zero_()
        for payload in payloads:
            self.add_to(out, payload, keys)

    def exchange(self, x: Tensor, keys: Keys, world: int, residual: Tensor | None = None) -> Exchanging:
        """``x`` becomes the sum over ``world`` ranks of what each encoded of x + residual; ``residual`` what is left of it.

        Whatever a codec does, the sum over ranks of x and residual stays what it was, to rounding.
        """
        payload = self.encode(x, keys) if residual is None else self.encode_with_feedback(x, residual, keys)
        if self.linear:
            yield Sum([payload])
            self.decode(payload, x, keys)
            return
        payloads = yield Gather(payload)
        assert payloads is not None
        self.decode_sum(payloads, x, keys)

    def warm_up(self, done: float) -> None:
        """How much of the warm-up is over, 0 to 1: a codec that leaves out much begins with less, and tells its bytes so."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if state:
            raise ValueError(f"codec {self.name} keeps no state, but the checkpoint holds {sorted(state)}")


class Scratch:
    """Memory that is kept: a fresh 100 MB buffer costs more than what is done with it."""

    def __init__(self) -> None:
        self._held: dict[str, Tensor] = {}

    def __call__(self, what: str, numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        held = self._held.get(what)
        if held is None or len(held) < numel or held.dtype != dtype or held.device != device:
            held = self._held[what] = torch.empty(numel, dtype=dtype, device=device)
        return held[:numel]
