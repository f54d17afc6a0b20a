"""Bytes by formula. Pure numbers in, numbers out; links count, and a law says that both agree."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

SMALL_BYTES = 64 << 10  # message carriers: up to here latency counts more than bandwidth, and all send to all at once
SLOT_BYTES = 4096  # torch.distributed: every call begins with a gather of slots that hold signature and small data
SLOT_HEAD_BYTES = 24
LATENCY_SHARE = 0.05  # of a bucket's time
MIN_BUCKET_BYTES = 1 << 20


class LinkSpeed(NamedTuple):
    """Of one member's way to another: a message of n bytes takes latency_s + n / bytes_per_s (Hockney's alpha and 1/beta)."""

    latency_s: float
    bytes_per_s: float


GIGABIT = LinkSpeed(200e-6, 125e6)  # between hosts, where nobody measured


def ring_all_reduce_bytes(nbytes: int, world: int) -> int:
    """What one of ``world`` members sends to all-reduce ``nbytes``, on average over members (Patarasuk & Yuan 2009)."""
    return round(2 * (world - 1) / world * nbytes)


def all_gather_bytes(carrier: str, nbytes: int, world: int) -> int:
    """What one of ``world`` members sends so that all get its ``nbytes``, if all have as many."""
    nbytes_sent = (world - 1) * nbytes
    return _after_slots(nbytes, nbytes_sent, world) if carrier in ("gloo", "nccl") else nbytes_sent


def _after_slots(nbytes: int, then: int, world: int) -> int:
    """What torch.distributed sends: slots, and ``then`` so many bytes if ``nbytes`` do not fit into a slot."""
    return (world - 1) * SLOT_BYTES + (0 if nbytes <= SLOT_BYTES - SLOT_HEAD_BYTES else then)


def all_reduce_bytes(carrier: str, nbytes: int, world: int) -> int:
    """The same on a carrier of ours, with what it does to small messages."""
    if world == 1:
        return 0
    if carrier in ("gloo", "nccl"):
        return _after_slots(nbytes, ring_all_reduce_bytes(nbytes, world), world)
    if carrier in ("tcp", "inproc") and nbytes <= SMALL_BYTES:
        return (world - 1) * nbytes
    return ring_all_reduce_bytes(nbytes, world)


def bucket_bytes(world: int, speed: LinkSpeed) -> int:
    """Of gradients that leave together during backward: the least for which the latency of a ring, 2(p-1)a, is at most a twentieth
    of its 2(p-1)/p n b. Smaller buckets leave earlier, and less is left for after backward; below a MiB calls cost more than that."""
    return max(MIN_BUCKET_BYTES, math.ceil(world * speed.latency_s * speed.bytes_per_s / LATENCY_SHARE))


def cut_buckets(sizes: Sequence[int], least: int) -> list[range]:
    """Neighbours in ``sizes``, from the last to the first, in parts of at least ``least`` together; the last part may be smaller."""
    parts: list[range] = []
    end, held = len(sizes), 0
    for k in reversed(range(len(sizes))):
        held += sizes[k]
        if held >= least or k == 0:
            parts.append(range(k, end))
            end, held = k, 0
    return parts
