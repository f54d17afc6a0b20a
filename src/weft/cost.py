"""Bytes and seconds by formula, and the choice that follows. Pure numbers in, numbers out; links count the bytes, and a law
says that both agree."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import NamedTuple

SLOT_BYTES = 4096  # torch.distributed: every call begins with a gather of slots that hold signature and small data
SLOT_HEAD_BYTES = 24
LATENCY_SHARE = 0.05  # of a bucket's time
MIN_BUCKET_BYTES = 1 << 20

AUTO = "auto"
#: How message carriers all-reduce; of equals the first is chosen.
COLLECTIVES = ("direct", "tree", "ring", "halving")
MESSAGE_CARRIERS = ("tcp", "inproc")  # those that send messages, and so can do it in several ways
HIERARCHICAL = "hierarchical"  # shared memory in each host, tcp between them
MESSAGE_S = 50e-6  # of one rank's time for each message beyond the first that leave at once (LogP's overhead; Culler et al. 1993)
ADD_BYTES_PER_S = 8e9
MAX_COPIED_BYTES = (
    4 << 20
)  # direct and tree keep what comes until they add it: not for more than this, unless asked for


class LinkSpeed(NamedTuple):
    """Of one member's way to another: a message of n bytes takes latency_s + n / bytes_per_s (Hockney's alpha and 1/beta)."""

    latency_s: float
    bytes_per_s: float


#: What is assumed where nobody has measured: two busy cores that talk over loopback, or hand over in one process.
UNMEASURED = LinkSpeed(latency_s=100e-6, bytes_per_s=2e9)
GIGABIT = LinkSpeed(latency_s=200e-6, bytes_per_s=125e6)  # the same between hosts


class Choice(NamedTuple):
    algorithm: str
    reason: str


# Which algorithm


def all_reduce_seconds(algorithm: str, nbytes: int, world: int, speed: LinkSpeed) -> float:
    """Predicted, if every rank sends and receives at full speed at once. See comm/schedules.py for the algorithms."""
    if world == 1:
        return 0.0
    alpha, beta, gamma = speed.latency_s, nbytes / speed.bytes_per_s, nbytes / ADD_BYTES_PER_S
    doublings = world.bit_length() - 1
    size = 1 << doublings  # the ranks that do not stand aside
    fold = 2 * (alpha + beta) + gamma if world > size else 0.0
    match algorithm:
        case "direct":
            return alpha + (world - 2) * MESSAGE_S + (world - 1) * (beta + gamma)
        case "tree":
            return doublings * (alpha + beta + gamma) + fold
        case "ring":
            return 2 * (world - 1) * alpha + (world - 1) / world * (2 * beta + gamma)
        case "halving":
            return 2 * doublings * alpha + (size - 1) / size * (2 * beta + gamma) + fold
    raise ValueError(f"algorithm {algorithm!r} is not known, possible: {', '.join(COLLECTIVES)}")


@lru_cache(maxsize=4096)
def choose(nbytes: int, world: int, speed: LinkSpeed | None = None) -> Choice:
    """The quickest way to all-reduce by messages. It depends on its arguments only, so that all ranks choose alike, and a
    resumed run as it did before."""
    of = UNMEASURED if speed is None else speed
    able = [a for a in COLLECTIVES if nbytes <= MAX_COPIED_BYTES or a in ("ring", "halving")]
    seconds = {a: all_reduce_seconds(a, nbytes, world, of) for a in able}
    first, *others = sorted(able, key=lambda a: seconds[a])
    return Choice(first, f"{_ms(seconds[first])} by formula; {', '.join(f'{a} {_ms(seconds[a])}' for a in others)}")


def choose_broadcast(nbytes: int, world: int, speed: LinkSpeed | None = None) -> str:
    """``direct``: the root sends to each. ``tree``: who has it passes it on, which costs steps and spares the root."""
    alpha, beta = (speed or UNMEASURED).latency_s, nbytes / (speed or UNMEASURED).bytes_per_s
    direct = alpha + (world - 2) * MESSAGE_S + (world - 1) * beta
    return "tree" if (world - 1).bit_length() * (alpha + beta) < direct else "direct"


def picks(world: int, speed: LinkSpeed | None = None) -> list[tuple[int, str]]:
    """What ``choose`` picks, by size: (the first number of bytes, algorithm)."""
    result = [(0, choose(0, world, speed).algorithm)]
    below = 0
    for nbytes in (1 << k for k in range(1, 41)):
        while choose(nbytes, world, speed).algorithm != result[-1][1]:
            start = _first(lambda n: choose(n, world, speed).algorithm != result[-1][1], below, nbytes)
            result.append((start, choose(start, world, speed).algorithm))
        below = nbytes
    return result


def picks_in_words(world: int, collective: str = AUTO, speed: LinkSpeed | None = None) -> str:
    """For the plan: "auto: direct, from 24,577 bytes ring (100 us, 2,000 MB/s, assumed)"."""
    if collective != AUTO:
        return f"{collective} (asked for)"
    (_, smallest), *larger = picks(world, speed)
    by_size = "".join(f", from {start:,} bytes {algorithm}" for start, algorithm in larger)
    of, how = (UNMEASURED, "assumed: not measured") if speed is None else (speed, "measured")
    numbers = f"{1e6 * of.latency_s:.4g} us, {of.bytes_per_s / 1e6:,.4g} MB/s"
    return f"auto: {smallest}{by_size} ({numbers}, {how})"


def _first(holds: Callable[[int], bool], below: int, above: int) -> int:
    """Where it begins to hold, between a number for which it does not and one for which it does."""
    while above - below > 1:
        middle = (below + above) // 2
        below, above = (below, middle) if holds(middle) else (middle, above)
    return above


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:.3g} ms"


# Bytes


def ring_all_reduce_bytes(nbytes: int, world: int) -> int:
    """What one of ``world`` members sends to all-reduce ``nbytes``, on average over members (Patarasuk & Yuan 2009)."""
    return round(2 * (world - 1) / world * nbytes)


def message_all_reduce_bytes(algorithm: str, nbytes: int, world: int) -> int:
    """The same by messages, on average over members: those who stand aside in a fold send less, their partners more."""
    if algorithm == "direct":
        return (world - 1) * nbytes
    if algorithm == "tree":
        doublings = world.bit_length() - 1
        size = 1 << doublings
        return round((size * doublings + 2 * (world - size)) / world * nbytes)
    return ring_all_reduce_bytes(nbytes, world)  # folded or not, halving sends as much


def carrier_aside(carrier: str, asked: str) -> str:
    """Of messages that come while their receiver computes. Who waits in shared memory looks again and again, and takes the core and Python's lock
    from it; for a socket the kernel does. Gloo has no message that goes one way alone and tells what it is."""
    return "tcp" if carrier in ("shm", "gloo", HIERARCHICAL) and asked == AUTO else carrier


def carrier_of_frames(carrier: str) -> str:
    """Of members that may go while others stay, where nobody asked for one: it has an Endpoint."""
    return carrier if carrier in ("shm", *MESSAGE_CARRIERS) else "tcp"


def all_gather_bytes(carrier: str, nbytes: int, world: int, hosts: Sequence[int] = ()) -> int:
    """What one of ``world`` members sends so that all get its ``nbytes``, if all have as many."""
    if carrier == HIERARCHICAL and hosts:
        return _hierarchical_gather_bytes(nbytes, world, hosts)
    nbytes_sent = (world - 1) * nbytes
    return _after_slots(nbytes, nbytes_sent, world) if carrier in ("gloo", "nccl") else nbytes_sent


def reduce_scatter_bytes(carrier: str, nbytes: int, world: int, all_reduce: Callable[[int, int], int]) -> int:
    """What one of ``world`` members sends so that each gets its part of the sum of ``nbytes``; carriers that have no way of their own
    ``all_reduce`` (bytes, world) it."""
    if carrier == "shm" or carrier in MESSAGE_CARRIERS:
        return round((world - 1) / world * nbytes)
    return all_reduce(nbytes, world)


def _after_slots(nbytes: int, then: int, world: int) -> int:
    """What torch.distributed sends: slots, and ``then`` so many bytes if ``nbytes`` do not fit into a slot."""
    return (world - 1) * SLOT_BYTES + (0 if nbytes <= SLOT_BYTES - SLOT_HEAD_BYTES else then)


def all_reduce_bytes(
    carrier: str,
    nbytes: int,
    world: int,
    collective: str = AUTO,
    speed: LinkSpeed | None = None,
    hosts: Sequence[int] = (),
) -> int:
    """The same on a carrier of ours, on average over members. ``hosts``: how many of them each host has."""
    if world == 1:
        return 0
    if carrier in ("gloo", "nccl"):
        return _after_slots(nbytes, ring_all_reduce_bytes(nbytes, world), world)
    if carrier in MESSAGE_CARRIERS:
        algorithm = choose(nbytes, world, speed).algorithm if collective == AUTO else collective
        return message_all_reduce_bytes(algorithm, nbytes, world)
    if carrier == HIERARCHICAL and len(hosts) > 1:
        inside = sum(3 * (local - 1) * nbytes for local in hosts)  # reduced, and the result broadcast
        return round((inside + len(hosts) * all_reduce_bytes("tcp", nbytes, len(hosts), collective, speed)) / world)
    return ring_all_reduce_bytes(nbytes, world)


NUMBER_BYTES = 8  # of the length of a member's part in a ragged gather


def _hierarchical_gather_bytes(nbytes: int, world: int, hosts: Sequence[int]) -> int:
    inside = sum(local * (local - 1) * nbytes for local in hosts)
    if len(hosts) > 1:
        inside += sum((local - 1) * world * (nbytes + NUMBER_BYTES) for local in hosts)
    between = (len(hosts) - 1) * world * (nbytes + NUMBER_BYTES)
    return round((inside + between) / world)


# Overlap


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
