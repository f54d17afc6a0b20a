"""A Link of two Links: ranks of one host meet in its shared memory, one leader of each host meets the others over TCP.

An all-reduce of n bytes over h hosts: reduced in each host, then between the leaders, then handed out in each host. Each
host sends 2(h-1)/h n over the network, however many ranks it has. All of a host get their leader's bytes, and leaders hold
the same bits, so all ranks do.

An error of either part is raised on all ranks. Three deadlines, one after the other, see to it that the culprit is
named, and not who waits for it: first the ranks of a host give up, then leaders, then those who wait for their leader.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from weft.comm.link import DEADLINE_S, Link, Op, SoloLink, Traffic
from weft.cost import AUTO, HIERARCHICAL, LinkSpeed
from weft.errors import CommError, DeadlineExceeded, Incompatible

if TYPE_CHECKING:
    import torch
    from torch._C._distributed_c10d import Store

    from weft.comm.collectives import RingLink


class HierarchicalLink(Link):
    """``hosts``: the ranks of each host; its first leads. ``inner`` joins ``rank``'s host, in that order; ``outer`` the
    leaders, in the order of hosts (None: not a leader, or there is one host). Both speak of ranks of the whole in errors."""

    carrier = HIERARCHICAL

    def __init__(
        self,
        inner: Link,
        outer: Link | None,
        hosts: Sequence[Sequence[int]],
        rank: int,
        deadline_s: float = DEADLINE_S,
    ) -> None:
        self.rank, self.world, self.deadline_s = rank, sum(map(len, hosts)), deadline_s
        self.hosts = hosts
        self._host = next(k for k, ranks in enumerate(hosts) if rank in ranks)
        self._inner, self._outer = inner, outer
        self._parts = [inner] if outer is None else [outer, inner]
        self.traffic = Traffic()
        for part in self._parts:  # they never work at the same time
            part.traffic = self.traffic
        self._grace_s = min(1.0, deadline_s / 4)
        self._until = 0.0
        self._error: CommError | None = None

    def allocate(self, numel: int, dtype: torch.dtype) -> torch.Tensor:
        return self._inner.allocate(numel, dtype)

    def all_reduce(self, buffers: Sequence[torch.Tensor], op: Op = "sum") -> None:
        if op not in ("sum", "max"):
            raise ValueError(f"op {op!r} is not known, possible: sum, max")
        with self._call(f"all_reduce {op}"):
            self._inner.all_reduce(buffers, op)
            if leaders := self._leaders():
                leaders.all_reduce(buffers, op)
            self._hand_out(buffers)

    def broadcast(self, buffers: Sequence[torch.Tensor], root: int = 0) -> None:
        if not 0 <= root < self.world:
            raise ValueError(f"root {root} is not a rank, possible: 0 to {self.world - 1}")
        home = next(k for k, ranks in enumerate(self.hosts) if root in ranks)
        with self._call(f"broadcast from {root}"):
            if self._host == home:
                self._inner.broadcast(buffers, self.hosts[home].index(root))
            else:
                self._inner.barrier()
            if leaders := self._leaders():
                leaders.broadcast(buffers, home)
            self._hand_out(buffers)

    def barrier(self) -> None:
        with self._call("barrier"):
            self._inner.barrier()
            if leaders := self._leaders():
                leaders.barrier()
            if len(self.hosts) > 1:
                self._before_handing_out()
                self._inner.barrier()

    def all_gather(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """The parts of a host travel together: first how long each is, then all of them one after the other."""
        import torch

        rows = tensor.detach() if tensor.dim() else tensor.detach().reshape(1)
        with self._call("all_gather"):
            parts = self._inner.all_gather(rows)
            if len(self.hosts) == 1:
                gathered, order = parts, list(self.hosts[0])
            else:
                order = [rank for ranks in self.hosts for rank in ranks]
                lengths = torch.tensor([len(part) for part in parts])
                if leaders := self._leaders():
                    lengths = torch.cat(leaders.all_gather(lengths))
                    whole = torch.cat(leaders.all_gather(torch.cat(parts)))
                else:
                    lengths = torch.empty(self.world, dtype=torch.int64)
                self._hand_out([lengths])
                if not leaders:
                    whole = rows.new_empty((int(lengths.sum()), *rows.shape[1:]))
                self._hand_out([whole])
                gathered = [part.clone() for part in torch.split(whole, lengths.tolist())]
        by_rank = dict(zip(order, gathered, strict=True))
        return [by_rank[k] if tensor.dim() else by_rank[k].reshape(()) for k in range(self.world)]

    def all_reduce_bytes(self, nbytes: int) -> int:
        within = self._inner.all_reduce_bytes(nbytes)
        if self._outer is None:
            return within
        return within + self._outer.all_reduce_bytes(nbytes) + (self._inner.world - 1) * nbytes

    def pace(self, bytes_per_s: float) -> None:
        if self._outer is None:
            raise Incompatible(
                f"rank {self.rank} sends within its host only, in shared memory: pace rank {self.hosts[self._host][0]}, "
                "which leads it."
            )
        self._outer.pace(bytes_per_s)

    def interrupt(self, error: CommError) -> None:
        for part in self._parts:
            part.interrupt(error)

    def fail(self, error: CommError) -> None:
        self._error = self._error or error
        for part in self._parts:
            part.fail(error)

    def close(self) -> None:
        for part in self._parts:
            part.close()

    # The phases of a call

    @contextmanager
    def _call(self, purpose: str) -> Iterator[None]:
        if self._error is not None:
            raise self._error
        self._until = time.monotonic() + self.deadline_s
        self._inner.deadline_s = self.deadline_s
        for part in self._parts:
            part.purpose = purpose
        try:
            yield
        except BaseException as error:
            self.fail(
                error if isinstance(error, CommError) else CommError(f"{purpose} failed: {error!r}", (self.rank,))
            )
            raise

    def _leaders(self) -> Link | None:
        """For the second phase, if this rank takes part in it."""
        if self._outer is not None:
            self._outer.deadline_s = self._left(1)
        return self._outer

    def _hand_out(self, buffers: Sequence[torch.Tensor]) -> None:
        if len(self.hosts) > 1:
            self._before_handing_out()
            self._inner.broadcast(buffers, 0)

    def _before_handing_out(self) -> None:
        self._inner.deadline_s = self._left(2)

    def _left(self, graces: int) -> float:
        return round(max(self._until - time.monotonic(), 0.0) + graces * self._grace_s, 3)


def join_hosts(
    rank: int,
    hosts: Sequence[Sequence[int]],
    store: Store,
    *,
    address: str,
    nbytes: int,
    deadline_s: float,
    members: Sequence[int] = (),
    collective: str = AUTO,
    speed: LinkSpeed | None = None,
) -> HierarchicalLink:
    """Meet the others by a torch store that all reach. ``address``: where this host listens; whoever reaches it may join.

    ``members``: what errors call the ranks. Returns when all are there; DeadlineExceeded if somebody does not come.
    """
    names = tuple(members) or tuple(range(sum(map(len, hosts))))
    here = next(ranks for ranks in hosts if rank in ranks)
    inner = _meet_in_memory(rank, here, store, nbytes, deadline_s, names) if len(here) > 1 else SoloLink()
    outer = None
    if rank == here[0] and len(hosts) > 1:
        leaders = [ranks[0] for ranks in hosts]
        chosen: dict[str, Any] = {"members": names, "collective": collective, "speed": speed}
        outer = join_by_store(rank, leaders, store, address=address, deadline_s=deadline_s, **chosen)
    return HierarchicalLink(inner, outer, hosts, rank, deadline_s)


def _meet_in_memory(
    rank: int, here: Sequence[int], store: Store, nbytes: int, deadline_s: float, names: Sequence[int]
) -> Link:
    """The leader makes a memory file, which has no name; the others open it by the leader's process."""
    from weft.comm.shm import Region, ShmLink

    key = f"memory/{here[0]}"
    if rank == here[0]:
        fd = os.memfd_create("weft", os.MFD_CLOEXEC)
        region = Region.create(len(here), nbytes, fd)
        store.set(key, f"{os.getpid()} {fd} {int(region.crowded)}")
    else:
        pid, theirs, crowded = _said_by(here[0], key, store, deadline_s, names).split()
        fd = os.open(f"/proc/{pid}/fd/{theirs}", os.O_RDWR | os.O_CLOEXEC)
        region = Region.create(len(here), nbytes, fd, crowded == "1")
    try:
        link = ShmLink(region, here.index(rank), deadline_s, members=[names[r] for r in here])
        link.barrier()  # all have opened it
    finally:
        os.close(fd)
    return link


def join_by_store(
    rank: int,
    ranks: Sequence[int],
    store: Store,
    *,
    address: str,
    deadline_s: float,
    members: Sequence[int] = (),
    collective: str = AUTO,
    speed: LinkSpeed | None = None,
) -> RingLink:
    """A link over TCP between ``ranks``, one of which is ``rank``; the rest as in ``join_hosts``."""
    from weft.comm.collectives import RingLink
    from weft.comm.tcp import TcpEndpoint, listen

    names = members or range(max(ranks) + 1)
    listener = listen(address, insecure=True)  # the session has asked whether that may be
    store.set(f"leader/{rank}", f"{address} {listener.getsockname()[1]}")
    addresses: dict[int, Any] = {}
    try:
        for other in ranks:
            host, port = _said_by(other, f"leader/{other}", store, deadline_s, names).split()
            addresses[names[other]] = (host, int(port))
    except BaseException:
        listener.close()
        raise
    endpoint = TcpEndpoint(names[rank], listener, addresses, deadline_s)
    chosen: dict[str, Any] = {"members": list(addresses), "collective": collective, "speed": speed}
    return RingLink(endpoint, ranks.index(rank), len(ranks), "tcp", deadline_s, **chosen)


def _said_by(rank: int, key: str, store: Store, deadline_s: float, names: Sequence[int]) -> str:
    try:
        return store.get(key).decode()
    except RuntimeError as error:
        raise DeadlineExceeded(
            f"rank {names[rank]} did not come within {deadline_s:g} s ({str(error).splitlines()[0]})", (names[rank],)
        ) from error
