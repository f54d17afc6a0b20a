"""What a link does, in a loop: adds up, or hands round."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from weft.codecs.base import Exchanging, Gather, Sum


def exchange_all(exchanges: Sequence[Exchanging]) -> int:
    """Every rank's exchange to its end; the bytes that each rank encoded."""
    nbytes = 0
    asked = [next(e) for e in exchanges]
    while True:
        assert len({type(a) for a in asked}) == 1
        answers: list[list[Tensor] | None] = [None] * len(exchanges)
        if isinstance(asked[0], Sum):
            for buffers in zip(*(a.buffers for a in asked), strict=True):  # type: ignore[union-attr]
                nbytes += buffers[0].nbytes
                total = torch.stack([b.clone() for b in buffers]).sum(0)
                for buffer in buffers:
                    buffer.copy_(total)
        else:
            payloads = [a.payload.clone() for a in asked if isinstance(a, Gather)]
            nbytes += payloads[0].nbytes
            answers = [list(payloads)] * len(exchanges)
        after = []
        for exchange, answer in zip(exchanges, answers, strict=True):
            try:
                after.append(exchange.send(answer))
            except StopIteration:
                after.append(None)
        if all(a is None for a in after):
            return nbytes
        assert all(a is not None for a in after), "some ranks want more than others"
        asked = after  # type: ignore[assignment]
