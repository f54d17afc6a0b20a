"""A Link that records each exchange and its waiting as spans, and how far two members' clocks are apart."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import msgspec

from weft.comm.link import Link, Op
from weft.errors import CommError
from weft.spans import Clock, Spans, clock, clock_offset

if TYPE_CHECKING:
    import torch

ROUNDS = 8


def measure_clock(link: Link, device: torch.device, own: Clock, now: Callable[[], float] = clock) -> Clock:
    """``own``, with its offset to rank 0's. All ranks call it together: some barriers and two all-gathers."""
    import torch

    if link.world == 1:
        return own
    names = link.all_gather(torch.tensor(list(own.boot.encode()), dtype=torch.int64, device=device))
    rounds: list[tuple[float, float]] = []
    for _ in range(ROUNDS):
        begin = now()
        link.barrier()
        rounds.append((begin, now()))
    gathered = link.all_gather(torch.tensor(rounds, dtype=torch.float64, device=device))
    first = [(float(begin), float(end)) for begin, end in gathered[0].tolist()]
    offset_s, error_s = (0.0, 0.0) if link.rank == 0 else clock_offset(rounds, first)
    over = bytes(names[0].tolist()).decode()
    return msgspec.structs.replace(own, over=over, offset_s=offset_s, error_s=error_s)


class TracedLink(Link):
    """``link``, with a span for each call and one for each wait inside it."""

    def __init__(self, link: Link, spans: Spans) -> None:
        self.rank, self.world, self.deadline_s = link.rank, link.world, link.deadline_s
        self.traffic, self.carrier = link.traffic, link.carrier
        self.traffic.on_wait = lambda begin, end: spans.add("wait", begin, end)
        self._link, self._spans = link, spans

    def allocate(self, numel: int, dtype: torch.dtype) -> torch.Tensor:
        return self._link.allocate(numel, dtype)

    def views(self, buffer: torch.Tensor) -> list[torch.Tensor]:
        return self._link.views(buffer)

    def all_reduce(self, buffers: Sequence[torch.Tensor], op: Op = "sum") -> None:
        begin = clock()
        self._link.all_reduce(buffers, op)
        self._spans.add("all_reduce", begin, clock())

    def all_gather(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        begin = clock()
        gathered = self._link.all_gather(tensor)
        self._spans.add("all_gather", begin, clock())
        return gathered

    def all_gather_into(self, whole: torch.Tensor, mine: torch.Tensor) -> None:
        begin = clock()
        self._link.all_gather_into(whole, mine)
        self._spans.add("all_gather", begin, clock())

    def reduce_scatter(self, mine: torch.Tensor, given: torch.Tensor) -> None:
        begin = clock()
        self._link.reduce_scatter(mine, given)
        self._spans.add("reduce_scatter", begin, clock())

    def broadcast(self, buffers: Sequence[torch.Tensor], root: int = 0) -> None:
        begin = clock()
        self._link.broadcast(buffers, root)
        self._spans.add("broadcast", begin, clock())

    def send(self, tensor: torch.Tensor) -> None:
        begin = clock()
        self._link.send(tensor)
        self._spans.add("send", begin, clock())

    def receive(self) -> torch.Tensor:
        begin = clock()
        message = self._link.receive()
        self._spans.add("receive", begin, clock())
        return message

    def barrier(self) -> None:
        begin = clock()
        self._link.barrier()
        self._spans.add("barrier", begin, clock())

    def all_reduce_bytes(self, nbytes: int) -> int:
        return self._link.all_reduce_bytes(nbytes)

    def pace(self, bytes_per_s: float) -> None:
        self._link.pace(bytes_per_s)

    def fail(self, error: CommError) -> None:
        self._link.fail(error)

    def interrupt(self, error: CommError) -> None:
        self._link.interrupt(error)

    def close(self) -> None:
        self._link.close()
