"""Before a run whose settings ask for it, and for `weft probe`: measure the link and the codecs, and choose.

What was measured and chosen becomes part of the run's config (``Measured``): a resume in the same world goes by it and never
measures again, or the order of sums and the codec could change under it.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from weft.clusters import pick_carrier
from weft.clusters.base import LinkSpec, Session, hosts_of
from weft.codecs.spec import AUTO, NONE, is_compressed, parse
from weft.comm.probe import HEAP_BYTES
from weft.config import Config, Measured
from weft.cost import HIERARCHICAL, LinkSpeed, carrier_aside
from weft.driver.calls import call, call_all
from weft.errors import ConfigError
from weft.patterns import registry
from weft.patterns.base import Facts, Pattern
from weft.payoff import Choice, LinkRow, Probe, Way, choose
from weft.report.observers import Observer

ALL_PAIRS = 8  # in a larger world, and where all pairs are alike, the neighbours in the ring are measured
SAME_MEMORY = ("shm", "inproc")


class Order(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What every measuring member is told. ``codecs``: to be timed; ``pairs``: those with a link of their own; ``hosts``: how
    many workers each has, of a hierarchical link."""

    config: Config
    facts: Facts
    carrier: str
    codecs: list[str]
    pairs: list[tuple[int, int]] = []
    hosts: list[int] = []
    thorough: bool = False


@dataclass
class Found:
    """What measuring members have said."""

    links: list[LinkRow]  # the last: of all workers at once
    ways: list[Way]

    def among(self, pairs: Sequence[tuple[int, ...]]) -> LinkSpeed:
        """The slowest of these; where none was measured by itself, what all had at once."""
        rows = [row for row in self.links[:-1] if tuple(row.members) in pairs] or self.links[-1:]
        return LinkSpeed(max(row.latency_s for row in rows), min(row.bytes_per_s for row in rows))


def pair_name(pair: tuple[int, int]) -> str:
    return f"{pair[0]}-{pair[1]}"


def pairs_of(world: int, carrier: str) -> list[tuple[int, int]]:
    if world <= 3 or (world <= ALL_PAIRS and carrier not in SAME_MEMORY):
        return list(itertools.combinations(range(world), 2))
    return sorted([(k, k + 1) for k in range(world - 1)] + [(0, world - 1)])


def measure(
    order: Order, link: LinkSpec, session: Session, observer: Observer, say: Callable[[str], None], of_pairs: str = ""
) -> Found:
    """In throw-away members, joined as ``link`` says, and each pair by such a link of its own (or by the carrier ``of_pairs``)."""
    found = Found([], [])

    def hear(said: dict[str, Any]) -> None:
        if "doing" in said:
            say(said["doing"])
        if "link" in said:
            found.links.append(msgspec.convert(said["link"], LinkRow))
        if "ways" in said:
            found.ways += msgspec.convert(said["ways"], list[Way])

    whole = dataclasses.replace(link, nbytes=HEAP_BYTES, port=0)
    pairs = [
        dataclasses.replace(
            whole,
            carrier=of_pairs or link.carrier,
            world=2,
            group=pair_name(pair),
            members=pair,
            hosts=hosts_of(pair, link.hosts),
        )
        for pair in order.pairs
    ]
    call_all(session, observer, "weft.measure:measure", msgspec.to_builtins(order), [whole, *pairs], hear)
    return found


@dataclass(frozen=True)
class Resolved:
    """``facts``: with what is known of links, and what was settled. ``news``: what was found now, for the run's events; ``choice``: of a
    codec, a line for the plan, if there is one to tell."""

    config: Config
    facts: Facts
    pattern: Pattern
    speed: LinkSpeed | None
    choice: str = ""
    news: dict[str, Any] | None = None
    is_new: bool = False  # a pipeline was chosen now, not kept
    tried_s: float = 0.0  # what a step of it has taken in a trial; 0: nobody tried


def resolve(
    config: Config, facts: Facts, pattern: Pattern, link: LinkSpec, session: Session, observer: Observer
) -> Resolved:
    """Whatever is `auto` and needs a measurement, by the one that the run began with, or, in another world, by a new one.

    A codec once chosen stays: what its error feedback holds back, and a momentum taken before it, are its own. So does a pipeline, in the
    same layout: schedule and cuts decide the order of sums.
    """
    known = config.measured
    asked = config.pattern_options.get("compress") == AUTO or (known is not None and known.compress != "")
    between = len(link.hosts) > 1 and config.collective == AUTO  # whose choice depends on the way between hosts
    settled = known.pipeline if known is not None else None
    if settled is not None and settled.of != pattern.settles(facts, config.workers):
        settled = None  # of another layout
    here = known if known is not None and (known.world, known.carrier) == (link.world, link.carrier) else None
    if here is not None and settled is not None:
        return _settled(config, facts, link, here, "as recorded")
    if settled is not None and pattern.keeps(config.workers):
        # also over another carrier: what is held back is of these cuts
        return _settled(config, facts, link, Measured(world=link.world, carrier=link.carrier, pipeline=settled))
    neighbours = pattern.neighbours(facts, config)
    if here is not None and not neighbours:
        here = msgspec.structs.replace(here, pipeline=None, neighbours={})  # in another layout places were others
        return _settled(config, facts, link, here, "as recorded")
    predicts = pattern.splits and facts.between_hosts  # within a host it is known well enough
    speed_matters = between or predicts or (known is not None and known.bytes_per_s > 0)
    kept = known.compress if known is not None and known.compress != NONE else ""
    why_kept = "chosen when the run began, and kept with what it holds back" if kept else ""
    fresh = Measured(world=link.world, carrier=link.carrier)
    if not neighbours and (link.world == 1 or link.carrier in SAME_MEMORY or not (asked or speed_matters)):
        alone = "one worker has nobody to talk to" if link.world == 1 else "inside this host nothing pays"
        if asked:
            fresh = msgspec.structs.replace(fresh, compress=kept or NONE, why=why_kept or alone)
        return _settled(config, facts, link, fresh if asked else None)
    candidates, left_out = candidates_of(pattern, facts) if asked else ([], [])
    leaders = [ranks[0] for ranks in link.hosts] if link.carrier == HIERARCHICAL else []
    among_leaders = list(itertools.pairwise(leaders))
    stands_for = alike(neighbours, session.hosts)
    aside = carrier_aside(link.carrier, config.link)
    order = Order(
        config=with_compress(config, kept or NONE) if asked or kept else config,
        facts=facts,
        carrier=link.carrier,
        codecs=[NONE, *candidates] if asked and not kept else [],
        pairs=sorted({*among_leaders, *(stands_for.values() if link.world > 2 or aside != link.carrier else ())}),
        hosts=[len(ranks) for ranks in link.hosts],
    )
    found = measure(order, link, session, observer, lambda _: None, aside)
    speed = found.among(among_leaders)
    between_s = facts.step_s / pattern.exchanges_per_step(facts, config)
    if kept:
        choice = Choice(kept, why_kept)
    elif not asked:
        choice = Choice("", "")
    else:
        choice = choose(found.ways[0], found.ways[1:], speed, sum(facts.gradient_bytes.values()), between_s)
    measured = msgspec.structs.replace(
        fresh,
        latency_s=speed.latency_s,
        bytes_per_s=speed.bytes_per_s,
        compress=choice.compress,
        why="; ".join([choice.why, *left_out]),
        neighbours={name: found.among([stands_for[pair] for pair in pairs]) for name, pairs in neighbours.items()},
    )
    anew = f"measured anew for {link.world} workers over {link.carrier}" if known is not None else ""
    resolved = _settled(config, facts, link, measured, anew)
    news = {**msgspec.to_builtins(resolved.config.measured), "ways": msgspec.to_builtins(found.ways)}
    return dataclasses.replace(resolved, news=news)


def alike(
    neighbours: Mapping[str, Sequence[tuple[int, int]]], hosts: Sequence[Sequence[int]]
) -> dict[tuple[int, int], tuple[int, int]]:
    """Which pair is measured for each: one of all those that stand on the same hosts."""
    host_of = {rank: k for k, ranks in enumerate(hosts) for rank in ranks}
    first: dict[tuple[int, int], tuple[int, int]] = {}
    pairs = sorted({pair for each in neighbours.values() for pair in each})
    return {(a, b): first.setdefault((host_of.get(a, 0), host_of.get(b, 0)), (a, b)) for a, b in pairs}


def _settled(config: Config, facts: Facts, link: LinkSpec, measured: Measured | None, how: str = "") -> Resolved:
    """``measured``: None where nothing had to be. A pipeline that is chosen now is recorded, and news, all the same."""
    if measured is not None and measured.compress:
        config = with_compress(config, measured.compress)
    pattern = registry.build(config.pattern, config.pattern_options)
    speed = LinkSpeed(measured.latency_s, measured.bytes_per_s) if measured and measured.bytes_per_s else None
    facts = msgspec.structs.replace(facts, speed=speed)
    news, is_new = None, False
    if facts.pipeline is not None:
        measured = measured or Measured(world=link.world, carrier=link.carrier)
        pipeline = msgspec.structs.replace(facts.pipeline, speeds=measured.neighbours)
        facts = pattern.settle(msgspec.structs.replace(facts, pipeline=pipeline), link.world, measured.pipeline)
        assert facts.pipeline is not None
        if facts.pipeline.settled != measured.pipeline:
            measured = msgspec.structs.replace(measured, pipeline=facts.pipeline.settled)
            news, is_new = msgspec.to_builtins(measured), True
    config = msgspec.structs.replace(config, measured=measured)
    told = f"auto, {how}" if how else "auto"
    choice = f"{measured.compress} ({told}: {measured.why})" if measured and measured.compress else ""
    return Resolved(config, facts, pattern, speed, choice, news, is_new)


def with_compress(config: Config, compress: str) -> Config:
    return msgspec.structs.replace(config, pattern_options={**config.pattern_options, "compress": compress})


def candidates_of(pattern: Pattern, facts: Facts) -> tuple[list[str], list[str]]:
    """What `auto` may become for this task, and, in words, what it may not."""
    lost = [c for c in pattern.auto_compress if parse(c).takes_momentum and facts.momentum is None]
    words = [
        f"{', '.join(lost)} left out: {facts.optimizer} has no momentum to take before it ({facts.momentum_stays})"
    ]
    return [c for c in pattern.auto_compress if c not in lost], words if lost else []


#: What `weft probe` times, the gentlest first.
TABLE = ("bf16", "fp16", "int8", "qsgd", "sign", "powersgd:4", "topk:0.01", "randomk:0.01", "blocks:0.01")


def survey(config: Config, session: Session, observer: Observer, say: Callable[[str], None]) -> Probe:
    """Every link and every codec, for the gradients of the config's task, or for 25 MB where it has none."""
    if config.workers == 1:
        raise ConfigError("one worker has no link to measure: give --workers 2 or more, or start more processes.")
    alone = not (config.task.target or config.task.pickled)
    say("the task" if not alone else "the device")
    entry = "weft.measure:look" if alone else "weft.member:learn_facts"
    payload = {"config": msgspec.to_builtins(config)} | ({} if alone else {"run_dir": ""})
    reply = call(session, observer, entry, payload)
    config = msgspec.convert(reply["config"], Config, strict=False)
    if alone:
        config = msgspec.structs.replace(config, steps=1, batch=config.workers)
    facts = msgspec.convert(reply["facts"], Facts, strict=False)
    carrier, _ = pick_carrier(config.cluster, config.link, config.workers, facts.device)
    hosts = hosts_of(range(config.workers), session.hosts) if carrier == HIERARCHICAL else ()
    link = LinkSpec(carrier, config.workers, config.deadline_s, device=facts.device, hosts=hosts)
    pattern = registry.build(config.pattern, config.pattern_options)
    candidates, _ = candidates_of(pattern, facts)
    order = Order(
        config=config,
        facts=facts,
        carrier=carrier,
        codecs=[NONE, *TABLE],
        pairs=pairs_of(config.workers, carrier),
        hosts=[len(ranks) for ranks in hosts],
        thorough=True,
    )
    found = measure(order, link, session, observer, say)
    nbytes = sum(facts.gradient_bytes.values())
    whole, *ways = found.ways
    allowed = [way for way in ways if way.compress in candidates]
    if carrier in SAME_MEMORY:
        choice = Choice(NONE, "inside this host nothing pays")
    else:
        choice = choose(whole, allowed, found.links[-1].speed, nbytes, facts.step_s)
    return Probe(
        world=config.workers,
        carrier=carrier,
        links=found.links,
        what="25 MB of matrices" if alone else f"the gradients of {config.task.name}",
        nbytes=nbytes,
        compressible=sum(p.nbytes for p in facts.params if p.trainable and not p.sparse and is_compressed(p.shape)),
        step_s=facts.step_s,
        ways=found.ways,
        choice=choice,
    )
