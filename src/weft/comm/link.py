"""A Link joins a fixed list of members: rank, world, and collectives. Carriers override what they do better.

Every collective is called by all ranks in the same order. A call that differs between ranks in operation, shapes or
dtypes raises ``Mismatch`` naming the ranks; one that does not end within ``deadline_s`` raises ``DeadlineExceeded``
naming who is missing; a member that is gone raises ``PeerLost``. Results are bit-identical on every rank.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from weft.errors import CommError, DeadlineExceeded, Incompatible, Mismatch

if TYPE_CHECKING:
    import torch

Op = Literal["sum", "max"]
DEADLINE_S = 60.0
PIECE_BYTES = 8 << 20  # of a large exchange that is done piece by piece: what it may take beside its tensors
WORLD = "world"  # the name of the group of all members


def name_ranks(ranks: Sequence[int]) -> str:
    """ "rank 2", "ranks 1, 3"."""
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"


def late_error(
    ranks: Sequence[int], deadline_s: float, doing: object, why: str = "stopped, stuck, or much slower than the others"
) -> DeadlineExceeded:
    """What every carrier says of ``ranks`` that keep the others waiting."""
    return DeadlineExceeded(
        f"{name_ranks(ranks)} did not come within {deadline_s:g} s to {doing}: {why}. See what it does, or allow a longer deadline",
        tuple(ranks),
    )


@dataclass
class Traffic:
    """What this member has moved and waited for since the start."""

    bytes_sent: int = 0
    messages: int = 0
    busy_s: float = 0.0  # inside exchanges, waiting left out
    wait_s: float = 0.0  # until the others had come
    on_wait: Callable[[float, float], None] | None = None  # hears when each wait began and ended
    #: Hears the number of each call and what it is (its str) as it begins, and (number, None) when it has ended well.
    on_call: Callable[[int, object | None], None] | None = None

    def waited(self, begin: float, end: float) -> None:
        """A carrier waited for others; times by time.monotonic or time.perf_counter."""
        self.wait_s += end - begin
        if self.on_wait is not None:
            self.on_wait(begin, end)

    def call(self, number: int, what: object | None) -> None:
        """A carrier begins a call, or (None) has ended it. ``what`` is hashable."""
        if self.on_call is not None:
            self.on_call(number, what)


class Link(ABC):
    rank: int
    world: int
    deadline_s: float
    traffic: Traffic
    carrier: str  # the name that --link knows
    purpose: str = (
        ""  # of a link that is part of another: what its calls are for; ranks must agree in it, errors name it
    )

    def allocate(self, numel: int, dtype: torch.dtype) -> torch.Tensor:
        """A zeroed flat buffer in which this carrier reduces fastest. All ranks allocate the same, in the same order."""
        import torch

        return torch.zeros(numel, dtype=dtype)

    def views(self, buffer: torch.Tensor) -> list[torch.Tensor]:
        """A buffer from ``allocate`` as each rank holds it, in rank order; none where ranks cannot see each other's memory.

        What a rank writes there is seen by those that come to a later call with it. Who reads while another writes, or
        writes where another does, gets anything: so that it cannot happen is up to the caller.
        """
        return []

    @abstractmethod
    def all_reduce(self, buffers: Sequence[torch.Tensor], op: Op = "sum") -> None:
        """Combine each buffer over all ranks, in place. One call, one exchange, however many buffers and dtypes."""

    @abstractmethod
    def all_gather(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """Every rank's tensor, in rank order. Lengths in dim 0 may differ (also 0); other dims and dtype may not."""

    @abstractmethod
    def broadcast(self, buffers: Sequence[torch.Tensor], root: int = 0) -> None:
        """Every rank's buffers become those of ``root``, in place."""

    def all_gather_into(self, whole: torch.Tensor, mine: torch.Tensor) -> None:
        """Row r of ``whole`` (world, n) becomes rank r's ``mine`` (n,), which may lie in ``whole`` as its row. Both contiguous."""
        for part in self._pieces(mine):
            for row, piece in zip(
                whole, self.all_gather(mine[part][None]), strict=True
            ):  # only in dim 0 might they differ
                row[part].copy_(piece[0])

    def reduce_scatter(self, mine: torch.Tensor, given: torch.Tensor) -> None:
        """``mine`` (n,) becomes the sum over ranks of this rank's row of their ``given`` (world, n), which stays. Both contiguous."""
        for part in self._pieces(mine):
            held = given[:, part].clone()
            self.all_reduce([held])
            mine[part].copy_(held[self.rank])

    def send(self, tensor: torch.Tensor) -> None:
        """Flat bytes to the other of a link of two, whose call is ``receive``. Done when their memory may be used again."""
        self._check_two()
        if self.all_gather(tensor)[1 - self.rank].numel():
            raise Mismatch("ranks disagree: both ends of a link of two send, and neither receives", (0, 1))

    def receive(self) -> torch.Tensor:
        """What the other of a link of two sends, however much."""
        import torch

        self._check_two()
        return self.all_gather(torch.empty(0, dtype=torch.uint8))[1 - self.rank]

    def _check_two(self) -> None:
        if self.world != 2:
            raise CommError(f"only a link of two passes messages one way, and this one has {self.world} members.")

    def _pieces(self, mine: torch.Tensor) -> Iterator[slice]:
        """Of n numbers, of which each rank has as many: all ranks' of a piece are together at most PIECE_BYTES."""
        step = max(1, PIECE_BYTES // (self.world * mine.element_size()))
        for start in range(0, max(1, mine.numel()), step):
            yield slice(start, min(start + step, mine.numel()))

    def barrier(self) -> None:
        import torch

        self.all_reduce([torch.zeros(1)])

    @abstractmethod
    def all_reduce_bytes(self, nbytes: int) -> int:
        """Bytes that this rank sends in an all-reduce of ``nbytes`` (for the plan; a law says that counting agrees)."""

    def pace(self, bytes_per_s: float) -> None:
        """Send no more than this to each peer from now on, to see how a slower network would do."""
        raise Incompatible(f"link {self.carrier!r} has no sockets whose pace could be set: use --link tcp.")

    def interrupt(self, error: CommError) -> None:
        """From another thread than the link's: the call under way, if it waits, raises this within half a second, and the link is closed by it."""

    def fail(self, error: CommError) -> None:
        """Tell the others that we leave, and why, so that they raise it, too; the link is of no more use."""
        self.close()

    def close(self) -> None:
        """Release sockets and memory; safe to call twice."""


def tell_all(link: Link, value: Any) -> list[Any]:
    """Every rank's value (plain data), by rank."""
    import torch

    own = torch.frombuffer(bytearray(msgspec.json.encode(value)), dtype=torch.uint8)
    return [msgspec.json.decode(t.cpu().numpy().tobytes()) for t in link.all_gather(own)]


class SoloLink(Link):
    """A world of one: every collective is already done."""

    def __init__(self) -> None:
        self.rank, self.world, self.deadline_s = 0, 1, DEADLINE_S
        self.traffic, self.carrier = Traffic(), "none"

    def all_reduce(self, buffers: Sequence[torch.Tensor], op: Op = "sum") -> None:
        pass

    def all_gather(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        return [tensor.detach().clone()]

    def broadcast(self, buffers: Sequence[torch.Tensor], root: int = 0) -> None:
        pass

    def all_reduce_bytes(self, nbytes: int) -> int:
        return 0
