"""Half-precision on the wire: 2 bytes a value. Linear, to the rounding of the sum."""

from __future__ import annotations

import torch
from torch import Tensor

from weft.codecs.base import Codec, Keys, Scratch

PIECE = 1 << 17  # values that are added together: they stay in the cache


class Cast(Codec):
    """bf16 keeps float32's range and 8 bits of its mantissa; fp16 keeps 11, overflows beyond 65504 and loses what is
    under 6e-8: a scale would have to be the same on all ranks, for one more exchange."""

    linear = True
    biased = False

    def __init__(self, name: str) -> None:
        self.name = name  # type: ignore[misc]
        self.dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[name]
        self._scratch = Scratch()

    def encode(self, x: Tensor, keys: Keys) -> Tensor:
        return self._scratch("payload", len(x), self.dtype, x.device).copy_(x)

    def add_to(self, out: Tensor, payload: Tensor, keys: Keys, alpha: float = 1.0) -> None:
        for start in range(0, len(out), PIECE):  # torch adds unlike types in a new tensor of the size of both
            part = out[start : start + PIECE]
            work = self._scratch("work", len(part), out.dtype, out.device)
            part.add_(work.copy_(payload[start : start + PIECE]), alpha=alpha)

    def decode(self, payload: Tensor, out: Tensor, keys: Keys) -> None:
        out.copy_(payload)

    def nbytes(self, numel: int, itemsize: int = 4) -> int:
        return 2 * numel
