"""What a member does that measures: the link it stands on, the codecs beside its fellows, steps of what may be chosen."""

from __future__ import annotations

import contextlib
import itertools
import math
import time
from collections.abc import Sequence

import msgspec
import torch

from weft.clusters.base import Seat
from weft.codecs import speed
from weft.codecs.feedback import Momentum
from weft.codecs.spec import NONE, is_compressed, parse
from weft.comm import probe
from weft.comm.link import WORLD, Link
from weft.comm.wrappers import Fault, FaultyLink
from weft.config import Config
from weft.cost import LinkSpeed, all_reduce_bytes
from weft.driver.probe import Order, pair_name
from weft.driver.trial import Trial
from weft.first_steps import first_steps
from weft.patterns import registry
from weft.patterns.base import Facts, ParamFact
from weft.patterns.compression import bytes_per_exchange
from weft.patterns.preflight import choose_device, own_device
from weft.payoff import LinkRow, Way

SMALL_BYTES = 64 << 10  # all send to all at once
MAX_NUMEL = {False: 1 << 20, True: 4 << 20}  # values that a codec is timed on, quickly or thoroughly
BUDGET_S = {False: 0.01, True: 0.3}  # for each codec


def measure(seat: Seat) -> None:
    """Entry. The pairs one after the other, while the rest wait; then all at once; then the codecs, all at once too."""
    order = msgspec.convert(seat.spec.payload, Order, strict=False)
    config, rank = order.config, seat.spec.member
    torch.set_num_threads(config.threads)
    device = own_device(order.facts.device, rank)
    effort = probe.THOROUGH if order.thorough else probe.QUICK
    with contextlib.ExitStack() as at_end:
        # a slow network is slow before the first step, too
        lasting = [fault for f in config.faults if (fault := Fault.from_dict(f)).step is None]

        def joined(group: str) -> Link:
            link: Link = seat.link(group)
            return FaultyLink(link, lasting, step=lambda: 0, rank=rank) if lasting else link

        world = at_end.enter_context(contextlib.closing(joined(WORLD)))

        def say(what: str) -> None:
            if rank == 0:
                seat.send({"doing": what})

        for pair in order.pairs:
            say(f"worker {pair[0]} and worker {pair[1]}")
            if rank in pair:
                with contextlib.closing(joined(pair_name(pair))) as link:
                    found = probe.measure(link, effort, device)
                if rank == pair[0]:
                    seat.send({"link": row(pair, found)})
            world.barrier()
        say(f"all {config.workers} workers at once")
        found = probe.measure(world, effort, device)
        ways = []
        for compress in order.codecs:
            say(compress)
            ways.append(way(compress, order, world, device))
        if rank == 0:
            seat.send({"link": row(range(config.workers), found), "ways": msgspec.to_builtins(ways)})


def try_steps(seat: Seat) -> None:
    """Entry. The seconds of each step but the first, which makes what is made once."""
    order = msgspec.convert(seat.spec.payload, Trial, strict=False)
    with first_steps(seat, order.config, order.facts, order.total_steps, order.steps) as points:
        ended = [time.perf_counter() for _ in points]
    if seat.spec.member == 0:
        seat.send({"seconds": [b - a for a, b in itertools.pairwise(ended)]})


def look(seat: Seat) -> None:
    """Entry, where there is no task: 25 MB of matrices trained by AdamW stand for one."""
    config = msgspec.convert(seat.spec.payload["config"], Config, strict=False)
    params = [ParamFact(f"matrix {k}", (1024, 1024), config.dtype, 4 << 20, True, False) for k in range(6)]
    facts = Facts(
        params=params,
        buffers=[],
        train_examples=None,
        test_examples=0,
        optimizer_bytes=0,
        activation_bytes=0,
        sums={},
        notes={},
        device=choose_device(config.device, config.link).type,
        optimizer="AdamW",
        momentum=(0.9, True),
    )
    seat.send({"config": msgspec.to_builtins(config), "facts": msgspec.to_builtins(facts)})


def row(members: Sequence[int], found: LinkSpeed) -> dict[str, object]:
    return msgspec.to_builtins(  # type: ignore[no-any-return]
        LinkRow(members=list(members), latency_s=found.latency_s, bytes_per_s=found.bytes_per_s)
    )


def way(compress: str, order: Order, link: Link, device: torch.device) -> Way:
    """One exchange of what the pattern exchanges; its bytes as the plan counts them, a sparsifier's warm-up included."""
    config, facts, world = order.config, order.facts, order.config.workers
    pattern = registry.build(config.pattern, {**config.pattern_options, "compress": compress})

    def bytes_for(nbytes: int, world: int) -> int:
        return all_reduce_bytes(order.carrier, nbytes, world, config.collective, None, order.hosts)

    planned = pattern.links(facts, config, bytes_for, order.carrier)[-1]
    bytes_sent = planned.bytes_per_step / pattern.exchanges_per_step(facts, config)
    large = large_of(facts)
    if compress == NONE or not large:
        return Way(compress=compress, bytes_sent=bytes_sent, rounds=rounds(order, [sum(facts.gradient_bytes.values())]))
    segments = speed.sample_segments(large, MAX_NUMEL[order.thorough])
    share = sum(math.prod(shape) for _, shape in large) / sum(shape.numel() for _, shape in segments)

    def agree(seconds: float) -> float:
        told = torch.tensor([seconds], dtype=torch.float64, device=device)
        link.all_reduce([told], op="max")
        return float(told)

    took = speed.measure(
        compress,
        segments,
        world,
        dtype=getattr(torch, config.dtype),
        device=device,
        momentum=Momentum(*facts.momentum) if facts.momentum else None,
        budget_s=BUDGET_S[order.thorough],
        agree=agree,
    )
    sums, gathered = bytes_per_exchange(facts, parse(compress), 0)
    arrivals = world if took.gathers else 1
    return Way(
        compress=compress,
        bytes_sent=bytes_sent,
        rounds=rounds(order, sums, len(gathered)),
        encode_s=agree(took.encode_s) * share,
        decode_s=agree(took.decode_s) * share * arrivals,
        arrivals=arrivals,
    )


def large_of(facts: Facts) -> list[tuple[str, tuple[int, ...]]]:
    """What a codec gets to see."""
    return [(p.name, p.shape) for p in facts.params if p.trainable and not p.sparse and is_compressed(p.shape)]


def rounds(order: Order, sums: Sequence[int], gathers: int = 0) -> int:
    """Messages that wait for one another: a ring's 2(p-1), one where all send to all at once; torch.distributed's slots."""
    slots = len(sums) + gathers if order.carrier in ("gloo", "nccl") else 0
    return slots + gathers + sum(1 if n <= SMALL_BYTES else 2 * (order.config.workers - 1) for n in sums)
