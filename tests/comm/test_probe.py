"""The measurement against links whose latency and rate are known: of a virtual clock, and one that the kernel paces."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from weft.comm import probe
from weft.comm.link import Link, Traffic
from weft.comm.probe import QUICK, THOROUGH, Effort


class Clocked(Link):
    """Takes the time of a ring between ``world`` members, on a clock of its own. ``burst``: bytes that a token bucket lets
    through at once; it fills while nothing is sent."""

    def __init__(self, latency_s: float, bytes_per_s: float, world: int = 2, burst: float = 0.0) -> None:
        self.rank, self.world, self.deadline_s, self.carrier = 0, world, 60.0, "clocked"
        self.traffic = Traffic()
        self.latency_s, self.bytes_per_s = latency_s, bytes_per_s
        self.burst = self.tokens = burst
        self.now = self.sent = 0.0

    def _send(self, nbytes: float, rounds: int) -> None:
        free = min(self.tokens, nbytes)
        seconds = rounds * self.latency_s + (nbytes - free) / self.bytes_per_s
        self.tokens = min(self.burst, self.tokens - free + rounds * self.latency_s * self.bytes_per_s)
        self.now += seconds
        self.sent += seconds

    def all_reduce(self, buffers: Any, op: str = "sum") -> None:
        nbytes = sum(b.nbytes for b in buffers)
        if nbytes <= 64 << 10:
            self._send((self.world - 1) * nbytes, 1)
        else:
            self._send(self.all_reduce_bytes(nbytes), 2 * (self.world - 1))

    def all_gather(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        self._send((self.world - 1) * tensor.nbytes, 1)
        return [tensor] * self.world

    def broadcast(self, buffers: Any, root: int = 0) -> None:
        raise NotImplementedError

    def all_reduce_bytes(self, nbytes: int) -> int:
        return 2 * (self.world - 1) * nbytes // self.world


def measured(link: Clocked, effort: Effort) -> probe.LinkSpeed:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(probe, "time", SimpleNamespace(perf_counter=lambda: link.now))
        return probe.measure(link, effort, torch.device("cpu"))


@given(
    latency_s=st.floats(1e-6, 5e-3),
    bytes_per_s=st.floats(1e6, 1e10),
    world=st.integers(2, 5),
    effort=st.sampled_from([QUICK, THOROUGH]),
)
def test_latency_and_rate_are_told_apart(latency_s: float, bytes_per_s: float, world: int, effort: Effort) -> None:
    link = Clocked(latency_s, bytes_per_s, world)
    found = measured(link, effort)
    small_s = latency_s + 32 * (world - 1) / bytes_per_s
    assert found.latency_s == pytest.approx(small_s, rel=0.01)
    # Where the largest transfer is over before its latencies are, the rate may be told too low, never too high.
    largest = link.all_reduce_bytes(effort.max_bytes) / bytes_per_s
    assert found.bytes_per_s <= 1.01 * bytes_per_s
    if largest > 2 * (world - 1) * latency_s:
        assert found.bytes_per_s == pytest.approx(bytes_per_s, rel=0.01)


@pytest.mark.parametrize("burst", [64e3, 128e3])
def test_a_first_burst_is_not_taken_for_the_rate(burst: float) -> None:
    """A token bucket as in the test hosts: each transfer begins with some bytes for nothing."""
    found = measured(Clocked(2e-4, 12.5e6, burst=burst), THOROUGH)
    assert found.bytes_per_s == pytest.approx(12.5e6, rel=0.05)


@pytest.mark.parametrize("mbit", [1, 10, 100, 10_000])
def test_it_ends_in_time_on_any_link(mbit: float) -> None:
    for effort, most in ((QUICK, 0.6), (THOROUGH, 3.0)):
        link = Clocked(1e-4, mbit * 125e3)
        measured(link, effort)
        assert link.sent <= max(most, 7 * probe.FIRST_BYTES / link.bytes_per_s)
