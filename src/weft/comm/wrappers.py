"""Faults as sentences, and a Link that commits them: ``FaultyLink(link, [kill(rank=2, step=5)], step=lambda: step)``.

Patterns never know of them. Those of a member's own work are committed by ``weft.resilience.faulty_task``. Faults are plain data, so that a launcher can hand them to its workers.
"""

from __future__ import annotations

import dataclasses
import math
import os
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

from weft.comm.endpoint import Buffer, Endpoint, Sending
from weft.comm.link import Link, Op
from weft.errors import CommError, ConfigError, PeerLost

if TYPE_CHECKING:
    import torch

FaultKind = Literal[
    "kill", "freeze", "delay", "drop", "corrupt", "raise_error", "skip", "throttle", "slow", "slow_loading"
]
STRIKES_LINK = ("kill", "freeze", "delay", "drop", "corrupt", "raise_error", "skip")


@dataclass(frozen=True)
class Fault:
    """What happens to ``rank`` at its first exchange in ``step`` or after it (None: at every exchange, or all the time)."""

    kind: FaultKind
    rank: int
    step: int | None = None
    seconds: float = 0.0
    factor: float = 1.0
    bytes_per_s: int = 0

    def __post_init__(self) -> None:
        if self.kind not in get_args(FaultKind):
            raise ConfigError(f"unknown fault {self.kind!r}, possible: {', '.join(get_args(FaultKind))}")
        if not (self.seconds >= 0 and math.isfinite(self.seconds)):
            raise ConfigError(f"fault {self.kind} of seconds={self.seconds}: give a number of 0 or more.")
        if not (self.factor >= 1 and math.isfinite(self.factor)):
            raise ConfigError(f"fault {self.kind} of factor={self.factor}: give 1 (nothing changes) or more.")
        if self.kind == "throttle" and not 0 < self.bytes_per_s < 2**31:
            raise ConfigError(
                f"fault throttle of bytes_per_s={self.bytes_per_s}: give a whole number from 1 to 2**31 - 1."
            )

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Fault:
        return cls(**data)


def kill(rank: int, step: int) -> Fault:
    """The process ends as by SIGKILL: no clean-up, no goodbye."""
    return Fault("kill", rank, step)


def freeze(rank: int, step: int) -> Fault:
    """The process stops as by SIGSTOP: it is there, and silent."""
    return Fault("freeze", rank, step)


def delay(rank: int, seconds: float, step: int | None = None) -> Fault:
    """What the rank sends in an exchange leaves ``seconds`` late, as over a link of that latency."""
    return Fault("delay", rank, step, seconds)


def drop(rank: int, step: int) -> Fault:
    """The rank's link breaks: PeerLost there, and a peer that is gone for the others."""
    return Fault("drop", rank, step)


def corrupt(rank: int, step: int) -> Fault:
    """One byte of what the rank gives is flipped (the middle one of its first tensor that has any)."""
    return Fault("corrupt", rank, step)


def raise_error(rank: int, step: int) -> Fault:
    """The rank's own code raises a RuntimeError."""
    return Fault("raise_error", rank, step)


def skip(rank: int, step: int) -> Fault:
    """The rank leaves out one exchange and goes on, as code does that only some ranks run."""
    return Fault("skip", rank, step)


def throttle(rank: int, bytes_per_s: int) -> Fault:
    """The rank's sockets send no more than this to each peer, paced by the kernel (carrier tcp)."""
    return Fault("throttle", rank, bytes_per_s=bytes_per_s)


def slow(rank: int, factor: float, step: int | None = None) -> Fault:
    """The rank's compute takes ``factor`` times as long: it sleeps after it, in proportion to what it took."""
    return Fault("slow", rank, step, factor=factor)


def slow_loading(rank: int, seconds: float, step: int | None = None) -> Fault:
    """Each batch takes the rank ``seconds`` longer to load."""
    return Fault("slow_loading", rank, step, seconds)


class FaultyLink(Link):
    """``link``, but for the faults of its ``rank`` (in the world, where that is not its rank in this group). ``step`` tells where
    the rank stands. Each fault with a step strikes once."""

    def __init__(self, link: Link, faults: Sequence[Fault], step: Callable[[], int], rank: int | None = None) -> None:
        who = link.rank if rank is None else rank
        self.rank, self.world, self.deadline_s = link.rank, link.world, link.deadline_s
        self.traffic, self.carrier = link.traffic, link.carrier
        self._link = link
        self._step = step
        self._faults = [fault for fault in faults if fault.rank == who and fault.kind in STRIKES_LINK]
        for fault in faults:
            if fault.rank == who and fault.kind == "throttle":
                link.pace(fault.bytes_per_s)

    def _strike(self, tensors: Sequence[torch.Tensor]) -> bool:
        """False: the exchange is left out."""
        due = [fault for fault in self._faults if fault.step is None or fault.step <= self._step()]
        self._faults = [fault for fault in self._faults if fault.step is None or fault not in due]
        for fault in due:
            if fault.kind == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            elif fault.kind == "freeze":
                os.kill(os.getpid(), signal.SIGSTOP)
            elif fault.kind == "delay":
                time.sleep(fault.seconds)
                self.traffic.wait_s += fault.seconds  # the others wait as long: it is the link's time, not the rank's
            elif fault.kind == "drop":
                self._link.close()
                raise PeerLost(f"the link of rank {self.rank} broke, as {fault} asks", (self.rank,))
            elif fault.kind == "corrupt":
                _flip_one_byte(tensors)
            elif fault.kind == "raise_error":
                raise RuntimeError(f"raised as {fault} asks")
        return all(fault.kind != "skip" for fault in due)

    def allocate(self, numel: int, dtype: torch.dtype) -> torch.Tensor:
        return self._link.allocate(numel, dtype)

    def views(self, buffer: torch.Tensor) -> list[torch.Tensor]:
        return self._link.views(buffer)

    def all_reduce(self, buffers: Sequence[torch.Tensor], op: Op = "sum") -> None:
        if self._strike(buffers):
            self._link.all_reduce(buffers, op)

    def all_gather(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        given = tensor.detach().clone() if self._faults else tensor
        return self._link.all_gather(given) if self._strike([given]) else [given] * self.world

    def all_gather_into(self, whole: torch.Tensor, mine: torch.Tensor) -> None:
        given = mine.detach().clone() if self._faults else mine
        if self._strike([given]):
            self._link.all_gather_into(whole, given)

    def reduce_scatter(self, mine: torch.Tensor, given: torch.Tensor) -> None:
        given = given.detach().clone() if self._faults else given
        if self._strike([given]):
            self._link.reduce_scatter(mine, given)

    def broadcast(self, buffers: Sequence[torch.Tensor], root: int = 0) -> None:
        if self._strike(buffers):
            self._link.broadcast(buffers, root)

    def send(self, tensor: torch.Tensor) -> None:
        given = tensor.detach().clone() if self._faults else tensor
        if self._strike([given]):
            self._link.send(given)

    def receive(self) -> torch.Tensor:
        return self._link.receive()

    def barrier(self) -> None:
        if self._strike(()):
            self._link.barrier()

    def all_reduce_bytes(self, nbytes: int) -> int:
        return self._link.all_reduce_bytes(nbytes)

    def fail(self, error: CommError) -> None:
        self._link.fail(error)

    def interrupt(self, error: CommError) -> None:
        self._link.interrupt(error)

    def close(self) -> None:
        self._link.close()


STRIKES_ENDPOINT = ("kill", "freeze", "delay", "drop", "raise_error", "throttle")


def strike(endpoint: Endpoint, faults: Sequence[Fault], step: Callable[[], int]) -> None:
    """Commit those of ``faults`` that concern this endpoint's member, from now on: each at a frame that it sends in its step or after it."""
    own = [fault for fault in faults if fault.rank == endpoint.member]
    for fault in own:
        if fault.kind == "throttle":
            endpoint.pace(fault.bytes_per_s)
    left = [fault for fault in own if fault.kind in STRIKES_ENDPOINT and fault.kind != "throttle"]
    send = endpoint.isend

    def isend(peer: int, seq: int, meta: bytes, payload: Sequence[Buffer] = ()) -> Sending:
        for fault in [fault for fault in left if fault.step is None or fault.step <= step()]:
            if fault.step is not None:
                left.remove(fault)
            if fault.kind == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            elif fault.kind == "freeze":
                os.kill(os.getpid(), signal.SIGSTOP)
            elif fault.kind == "delay":
                time.sleep(fault.seconds)
            elif fault.kind == "drop":
                raise PeerLost(f"the link of member {endpoint.member} broke, as {fault} asks", (endpoint.member,))
            elif fault.kind == "raise_error":
                raise RuntimeError(f"raised as {fault} asks")
        return send(peer, seq, meta, payload)

    endpoint.isend = isend  # type: ignore[method-assign]


def _flip_one_byte(tensors: Sequence[torch.Tensor]) -> None:
    import torch

    for tensor in tensors:
        if tensor.numel():
            flat = tensor.detach().reshape(-1).contiguous()
            data = flat.view(torch.uint8)
            data[data.numel() // 2] ^= 0xFF
            tensor.detach().copy_(flat.view(tensor.shape))
            return
