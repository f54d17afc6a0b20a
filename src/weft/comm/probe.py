"""How quick a link is: latency from small exchanges, bandwidth from the difference of two large ones.

By the collectives themselves, so that it holds for every carrier, and for two members as for all at once. A transfer grows until
it takes long enough to be told from noise; bytes n and n/2 then take times whose difference has no latency in it, and no first
burst either (a token bucket lets some bytes through at once, after each pause as many). All ranks come to the same numbers.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from weft.comm.link import Link
from weft.cost import LinkSpeed

if TYPE_CHECKING:
    import torch


class Effort(NamedTuple):
    """``latency_s``: for all small exchanges; ``transfer_s``: what the largest should take, unless it has ``max_bytes``."""

    latency_s: float
    transfer_s: float
    max_bytes: int


QUICK = Effort(latency_s=0.005, transfer_s=0.05, max_bytes=4 << 20)  # before a run
THOROUGH = Effort(latency_s=0.1, transfer_s=0.25, max_bytes=32 << 20)
FIRST_BYTES = 256 << 10
HEAP_BYTES = THOROUGH.max_bytes + (1 << 16)  # in the carrier
MAX_SAMPLES = 7
MIN_CALLS, MAX_CALLS = 10, 300


def measure(link: Link, effort: Effort, device: torch.device) -> LinkSpeed:
    """To be called by all ranks of ``link``, with nothing else under way on it."""
    import torch

    small = torch.zeros(8, device=device)
    alpha = min(
        _small(link, effort, call) for call in (lambda: link.all_reduce([small]), lambda: link.all_gather(small))
    )
    buffer = link.allocate(effort.max_bytes // 4, torch.float32).to(device)

    def transfer(nbytes: int) -> float:
        return _agreed(link, _timed(lambda: link.all_reduce([buffer[: nbytes // 4]]), device), device)

    nbytes, slow = FIRST_BYTES, 0.0
    transfer(nbytes)  # it meets fresh memory, and a congestion window that has not opened
    while (slow := transfer(nbytes)) < effort.transfer_s and 2 * nbytes <= effort.max_bytes:
        nbytes *= 2
    samples = max(1, min(MAX_SAMPLES, round(4 * effort.transfer_s / slow)))
    pairs = [(transfer(nbytes), transfer(nbytes // 2)) for _ in range(samples)]
    whole, half = (min(column) for column in zip(*pairs, strict=True))  # whatever disturbs one makes it longer
    # With latency in it, this is too low; and at most half of the time of a transfer is latency.
    least = link.all_reduce_bytes(nbytes) / whole
    gained = link.all_reduce_bytes(nbytes) - link.all_reduce_bytes(nbytes // 2)
    rate = min(2 * least, max(least, gained / (whole - half))) if whole > half else least
    return LinkSpeed(alpha, 1 / _agreed(link, 1 / rate, device))


def _small(link: Link, effort: Effort, call: Callable[[], object]) -> float:
    """Median seconds; as many calls on all ranks."""
    import torch

    cpu = torch.device("cpu")
    for _ in range(3):
        call()
    first = _agreed(link, statistics.median(_timed(call, cpu) for _ in range(3)), cpu)
    calls = max(MIN_CALLS, min(MAX_CALLS, round(effort.latency_s / first)))
    return _agreed(link, statistics.median(_timed(call, cpu) for _ in range(calls)), cpu)


def _timed(call: Callable[[], object], device: torch.device) -> float:
    import torch

    begin = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begin


def _agreed(link: Link, seconds: float, device: torch.device) -> float:
    """The longest of all ranks'; and all are here when the next begins."""
    import torch

    told = torch.tensor([seconds], dtype=torch.float64, device=device)
    link.all_reduce([told], op="max")
    return float(told)
