"""Collectives by messages in detail; what every Link must do is in test_links.py."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.comm import test_links
from tests.comm.test_links import CARRIERS, connect_inproc, connect_tcp, inproc
from tests.variants import rest_slow

from weft import cost
from weft.comm import collectives
from weft.comm.collectives import RingLink
from weft.comm.inproc import inproc_endpoints
from weft.comm.link import Link
from weft.comm.sites import call_site
from weft.comm.tcp import TcpEndpoint, listen
from weft.cost import COLLECTIVES, LinkSpeed
from weft.errors import CommError, Mismatch, PeerLost
from weft.testing.conformance import DTYPES, assert_reduced, contribution, in_processes, in_threads

calls = st.lists(
    st.tuples(st.lists(st.integers(0, 40), max_size=2).map(tuple), st.sampled_from(DTYPES)), min_size=1, max_size=6
)


@settings(max_examples=60, deadline=None)
@given(
    calls,
    st.integers(2, 5),
    st.sampled_from([64, 192]),
    st.sampled_from(["sum", "max"]),
    st.sampled_from(COLLECTIVES),
)
def test_blocks_that_cut_runs_anywhere(call: list, world: int, block: int, op: str, algorithm: str) -> None:
    """With tiny blocks every border between dtypes, chunks and blocks is crossed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(collectives, "BLOCK_BYTES", block)

        def fn(link: Link) -> list[torch.Tensor]:
            buffers = [contribution(shape, dtype, link.rank, key) for key, (shape, dtype) in enumerate(call)]
            link.all_reduce(buffers, op)
            for key, (buffer, (shape, dtype)) in enumerate(zip(buffers, call)):
                assert_reduced(buffer, shape, dtype, world, op, key)
            assert link.traffic.bytes_sent == link.all_reduce_bytes(sum(b.nbytes for b in buffers))
            return buffers

        assert_same_bits([outcome.get() for outcome in inproc(algorithm)(world)(fn)])


def assert_same_bits(of_ranks: list[list[torch.Tensor]]) -> None:
    first, *others = ([bytes(t.contiguous().view(-1).view(torch.uint8).numpy()) for t in ts] for ts in of_ranks)
    assert all(other == first for other in others)


@pytest.mark.parametrize("world", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("numel", [0, 1, 4099, 150_001])
def test_algorithms_agree_with_each_other(numel: int, world: int) -> None:
    """In float64 to rounding; each by itself to the bit on all ranks, also where two ranks bring different NaNs."""

    def fn(link: Link) -> list[torch.Tensor]:
        buffer, odd = contribution((numel,), torch.float64, link.rank), torch.ones(8)
        odd.view(torch.int32)[link.rank] = 0x7FC00000 + link.rank
        odd.view(torch.int32)[5] = 0x7FC00100 + link.rank
        link.all_reduce([buffer, odd])
        return [buffer, odd]

    results = []
    for algorithm in COLLECTIVES:
        of_ranks = [outcome.get() for outcome in inproc(algorithm)(world)(fn)]
        assert_same_bits(of_ranks)
        results.append(of_ranks[0][0])
    for result in results:
        torch.testing.assert_close(result, results[0], rtol=0, atol=1e-13)
        assert_reduced(result, (numel,), torch.float64, world, "sum")


def test_auto_follows_size_and_speed() -> None:
    slow = LinkSpeed(1e-3, 12.5e6)
    links = [RingLink(e, e.member, 4, speed=slow) for e in inproc_endpoints(4)]
    assert [links[1].algorithm_for(n) for n in (10, 10_000, 10**8)] == [
        cost.choose(n, 4, slow).algorithm for n in (10, 10_000, 10**8)
    ]
    assert links[0].algorithm_for(10) == "direct"
    assert links[0].algorithm_for(10**8) == "halving"
    with pytest.raises(ValueError, match="possible: auto, direct"):
        RingLink(inproc_endpoints(2)[0], 0, 2, collective="rings")


@pytest.mark.parametrize("usual", COLLECTIVES)
@pytest.mark.parametrize("other", COLLECTIVES)
def test_a_mismatch_is_seen_whoever_waits_for_whom(usual: str, other: str) -> None:
    """A rank whose sizes differ may take another way, and speak to others than those who wait for it."""

    def connect(rank: int, world: int, endpoints: Any, deadline_s: float) -> Link:
        return connect_inproc(rank, world, endpoints, deadline_s, other if rank == odd else usual)

    def fn(link: Link) -> str:
        with pytest.raises(Mismatch) as caught:
            link.all_reduce([torch.ones(100 if link.rank == odd else 50)])
        assert odd in caught.value.ranks
        return str(caught.value)

    for world in (3, 5):
        for odd in range(world):
            begin = time.monotonic()
            for outcome in in_threads(connect, inproc_endpoints)(world)(fn):
                assert f"rank {odd} called all_reduce sum(float32[100]) at " in outcome.get()
            assert time.monotonic() - begin < 10, "it was seen, not waited for"


def test_ranks_may_call_from_different_places() -> None:
    def fn(link: Link) -> None:
        if link.rank == 0:
            link.broadcast([torch.ones(3)])
            link.all_gather(torch.ones(2))
        else:
            link.broadcast([torch.ones(3)])
            link.all_gather(torch.ones(1))

    for outcome in inproc()(3)(fn):
        outcome.get()


def test_errors_speak_of_members() -> None:
    """Of an island, whose ranks have other numbers in the run."""
    endpoints = inproc_endpoints(5)
    for endpoint in endpoints:
        endpoint._connect([e for e in endpoints if e.member in (2, 4)])
    links = {m: RingLink(endpoints[m], r, 2, deadline_s=5, members=(2, 4)) for r, m in enumerate((2, 4))}
    links[4].close()
    with pytest.raises(PeerLost, match="rank 4 is gone") as caught:
        links[2].all_reduce([torch.ones(2)])
    assert caught.value.ranks == (4,)


class DyingEndpoint(TcpEndpoint):
    """Its process is killed as it begins to send for the ``last``-th time."""

    last = 10**9

    def isend(self, *args: Any, **more: Any) -> Any:
        self.last -= 1
        if self.last < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().isend(*args, **more)


PHASES = [(a, k) for a in COLLECTIVES for k in range(4)]


@pytest.mark.multiprocess
@pytest.mark.parametrize(("algorithm", "sends"), rest_slow(PHASES, keep=16))
def test_a_rank_that_dies_in_any_phase_is_named(algorithm: str, sends: int) -> None:
    """Before its first message, between two, in the fold, on the way back. Who needed it no more finds out in the next call."""
    dead = 2

    def connect(rank: int, world: int, listeners: Any, deadline_s: float) -> Link:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(test_links, "TcpEndpoint", DyingEndpoint)
            return connect_tcp(rank, world, listeners, deadline_s, algorithm)

    def fn(link: Link) -> tuple[tuple[int, ...], float]:
        link.all_reduce([torch.ones(70_001)])
        if link.rank == dead:
            link._endpoint.last = sends
        begin = time.monotonic()
        try:
            for _ in range(5):
                link.all_reduce([torch.ones(70_001)])
        except PeerLost as error:
            return error.ranks, time.monotonic() - begin
        return (), 0.0

    make = in_processes(connect, lambda world: [listen() for _ in range(world)], lambda ls: [s.close() for s in ls])
    outcomes = make(5)(fn)
    assert outcomes.pop(dead).died
    for outcome in outcomes:
        ranks, seconds = outcome.get()
        assert ranks == (dead,)
        assert seconds < 10, "at once, not at the deadline"


def test_a_call_site_is_quick_and_short() -> None:
    def here() -> str:
        return call_site()

    assert here() == f"tests/comm/test_collectives.py:{here.__code__.co_firstlineno + 1}"


def test_bad_arguments_are_refused_before_anything_is_sent() -> None:
    endpoints = inproc_endpoints(2)
    link = RingLink(endpoints[0], 0, 2)
    with pytest.raises(ValueError, match="possible: sum, max"):
        link.all_reduce([torch.ones(1)], "mean")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="root 2"):
        link.broadcast([torch.ones(1)], 2)
    with pytest.raises(ValueError, match="rank 1 of 2"):
        RingLink(endpoints[0], 1, 2)
    assert (link.traffic.messages, link.traffic.bytes_sent) == (0, 0)


def test_what_torch_cannot_add_breaks_the_link_for_all() -> None:
    def fn(link: Link) -> str:
        with pytest.raises(RuntimeError):
            link.all_reduce([torch.ones(3, dtype=torch.complex64)], "max")
        with pytest.raises(CommError) as caught:
            link.barrier()
        return str(caught.value)

    for outcome in CARRIERS["inproc"](2)(fn):
        assert "all_reduce max" in outcome.get()
