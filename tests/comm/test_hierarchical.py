"""A Link of two Links obeys every law of a Link, whoever shares a host with whom; errors cross from one part to the other."""

from __future__ import annotations

import os
import signal
import tempfile
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed
from tests.variants import rest_slow

from weft.comm.collectives import RingLink
from weft.comm.hierarchical import HierarchicalLink, join_hosts
from weft.comm.link import Link, SoloLink
from weft.comm.shm import Region, ShmLink, supported
from weft.comm.tcp import TcpEndpoint, listen
from weft.errors import CommError, Incompatible, Mismatch, PeerLost
from weft.testing.conformance import LAWS, Make, in_processes

pytestmark = [
    pytest.mark.multiprocess,
    pytest.mark.skipif(supported() is not None, reason=f"{supported()}"),
]

HEAP = 24 << 20
Hosts = list[tuple[int, ...]]


class Shared:
    """What a launcher makes before it forks: memory for each host, a socket for each leader."""

    def __init__(self, hosts: Hosts) -> None:
        self.hosts = hosts
        self.regions = [Region.create(len(ranks), HEAP) for ranks in hosts]
        self.listeners = {ranks[0]: listen() for ranks in hosts}

    def connect(self, rank: int, deadline_s: float) -> Link:
        host = next(k for k, ranks in enumerate(self.hosts) if rank in ranks)
        here = self.hosts[host]
        inner: Link = SoloLink()
        if len(here) > 1:
            inner = ShmLink(self.regions[host], here.index(rank), deadline_s, members=here)
        outer = None
        for leader, listener in self.listeners.items():
            if leader != rank:
                listener.close()
        if rank in self.listeners and len(self.hosts) > 1:
            addresses = self.addresses
            endpoint = TcpEndpoint(rank, self.listeners[rank], addresses, deadline_s)
            outer = RingLink(endpoint, host, len(self.hosts), "tcp", deadline_s, members=list(addresses))
        return HierarchicalLink(inner, outer, self.hosts, rank, deadline_s)

    def prepare(self) -> Shared:
        self.addresses = {leader: listener.getsockname() for leader, listener in self.listeners.items()}
        return self

    def close(self) -> None:
        for region in self.regions:
            region.close()
        for listener in self.listeners.values():
            listener.close()


def on(hosts: Hosts) -> Make:
    return in_processes(
        connect=lambda rank, world, shared, deadline_s: shared.connect(rank, deadline_s),
        prepare=lambda world: Shared(hosts).prepare(),
        clean_up=lambda shared: shared.close(),
    )


LAYOUTS: list[Hosts] = [
    [(0, 1), (2,)],
    [(0, 1), (2, 3)],
    [(0, 2), (1, 3)],
    [(0,), (1, 2)],
    [(0,), (1,)],
    [(0, 1, 2)],
    [(0, 1), (2,), (3, 4)],
    [(0,)],
]


@pytest.mark.parametrize("hosts", rest_slow(LAYOUTS, keep=2), ids=str)
@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
def test_it_obeys(hosts: Hosts, law: Callable[[Make, int], None]) -> None:
    law(on(hosts), sum(map(len, hosts)))


# -- ranks that no common parent has prepared: they meet by a store


def joined(hosts: Hosts, members: tuple[int, ...] = ()) -> Make:
    def connect(rank: int, world: int, folder: Any, deadline_s: float) -> Link:
        store = torch.distributed.FileStore(f"{folder.name}/store", world)
        store.set_timeout(timedelta(seconds=deadline_s))
        return join_hosts(rank, hosts, store, address="127.0.0.1", nbytes=HEAP, deadline_s=deadline_s, members=members)

    return in_processes(connect, lambda world: tempfile.TemporaryDirectory(), lambda folder: folder.cleanup())


@pytest.mark.parametrize("hosts", rest_slow(LAYOUTS[1:4]), ids=str)
def test_those_who_meet_by_a_store_share_memory_without_a_name(hosts: Hosts) -> None:
    def fn(link: Link) -> tuple[torch.Tensor, int]:
        held = link.allocate(1000, torch.float32)
        held.fill_(link.rank)
        link.all_reduce([held])
        with open("/proc/self/maps") as maps:
            return held, sum("memfd:weft" in line for line in maps)

    outcomes = [outcome.get() for outcome in joined(hosts)(sum(map(len, hosts)))(fn)]
    for rank, (held, mapped) in enumerate(outcomes):
        assert (held == sum(range(len(outcomes)))).all()
        assert bool(mapped) == (len(next(ranks for ranks in hosts if rank in ranks)) > 1)
    assert not [name for name in os.listdir("/dev/shm") if "weft" in name]


def test_errors_speak_of_members_also_across_hosts() -> None:
    """Of a group whose ranks are members 10, 11, 12: killed within a host, named on the other."""

    def fn(link: Link) -> CommError:
        link.barrier()
        if link.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        with pytest.raises(PeerLost) as caught:
            link.all_reduce([torch.ones(10)])
        return caught.value

    outcomes = joined([(0, 1), (2,)], (10, 11, 12))(3)(fn)
    assert outcomes.pop(1).died
    for outcome in outcomes:
        assert outcome.get().ranks == (11,)
        assert "rank 11" in str(outcome.get())


def test_roots_that_differ_are_seen_within_a_host_and_between_hosts() -> None:
    for odd in (1, 3):

        def fn(link: Link, odd: int = odd) -> str:
            with pytest.raises(Mismatch) as caught:
                link.broadcast([torch.ones(3)], root=0 if link.rank == odd else 2)
            return str(caught.value)

        for outcome in on([(0, 1), (2, 3)])(4)(fn):
            assert "broadcast from 0" in outcome.get()
            assert "broadcast from 2" in outcome.get()


def test_who_has_no_socket_cannot_be_paced() -> None:
    link = HierarchicalLink(SoloLink(), None, [(0, 1)], 1)
    with pytest.raises(Incompatible, match="pace rank 0, which leads it"):
        link.pace(1e6)
