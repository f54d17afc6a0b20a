"""The first steps of a run in throw-away members, joined as the run's will be: to compare them with one process's, or to time them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import torch

from weft.clusters.base import Seat, resolve
from weft.comm.link import WORLD, Link
from weft.comm.wrappers import Fault, FaultyLink
from weft.config import Config
from weft.loading import load_task
from weft.patterns import registry
from weft.patterns.base import Context, Facts, SafePoint
from weft.patterns.preflight import own_device
from weft.patterns.training import Exchange, Replica
from weft.resilience.faulty_task import strike_task
from weft.update import Update


@contextlib.contextmanager
def first_steps(
    seat: Seat,
    config: Config,
    facts: Facts,
    total_steps: int,
    steps: int,
    watch: Callable[[Replica, Exchange, Update], None] | None = None,
) -> Iterator[Iterator[SafePoint]]:
    """A safe point after each. Of the config's faults those count that last from the start: a network, or a
    worker, that is slow."""
    torch.set_num_threads(config.threads)
    pattern, rank = registry.build(config.pattern, config.pattern_options), seat.spec.member
    role = next(r for r in pattern.roles(config.workers) if r.name == seat.spec.role)
    names = [g.name for g in pattern.groups(facts, config.workers) if rank in g.members]
    lasting = [fault for f in config.faults if (fault := Fault.from_dict(f)).step is None]
    with contextlib.ExitStack() as at_end:
        links: dict[str, Link] = {name: at_end.enter_context(contextlib.closing(seat.link(name))) for name in names}
        if lasting:
            links = {name: FaultyLink(link, lasting, step=lambda: 0, rank=rank) for name, link in links.items()}
        task = load_task(config.task)
        strike_task(task, [fault for fault in lasting if fault.rank == rank], step=lambda: 0)
        context = Context(
            task=task,
            pattern=pattern,
            config=config,
            facts=facts,
            rank=rank,
            world=config.workers,
            total_steps=total_steps,
            device=own_device(facts.device, rank),
            link=links.pop(WORLD),
            groups=links,
            stop_requested=lambda: False,
            watch=watch,
        )
        points: Any = at_end.enter_context(contextlib.closing(resolve(role.entry)(context)))
        yield islice(points, steps)
