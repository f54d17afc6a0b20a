"""Which of several, by trial: predictions name the few that may be quickest, and before a long run throw-away members take steps of each.

A simulation leaves out what it costs to send beside computing, and a machine's pace changes between a profile and a run: predictions of pipelines are
good to about a sixth, and schedules often lie closer together. A step in the run's own place leaves nothing out.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from weft.clusters.base import LinkSpec, Session, bytes_by
from weft.config import Config, Settled
from weft.driver.calls import call_all
from weft.driver.probe import Resolved
from weft.events import Event
from weft.patterns.base import Facts, Pattern
from weft.payoff import format_time
from weft.pipelines.choose import in_words
from weft.pipelines.schedules import find
from weft.report.observers import Observer

STEPS = 4  # of a trial; the first of them is not timed
ROUNDS = 2  # the second for those that came near the best in the first: machines have quick and slow times
NEAR = 0.10
START_S = 5.0  # of a trial, besides its steps
PART = 0.05  # of the run's predicted time, that trials may take

LinksOf = Callable[[Pattern, Facts], list[LinkSpec]]


class Trial(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What every member is told."""

    config: Config
    facts: Facts
    total_steps: int
    steps: int


def decide(resolved: Resolved, links_of: LinksOf, total_steps: int, session: Session, observer: Observer) -> Resolved:
    """With the quickest of the pattern's contenders, if it has some and a trial of them pays. MemberFailed where one fails."""
    config, pattern = resolved.config, resolved.pattern
    contenders = pattern.contenders(resolved.facts, config.workers)
    if not contenders or not pays(resolved, links_of, len(contenders), total_steps):
        return resolved
    steps = min(STEPS, total_steps)
    if steps < 2:
        return resolved
    took: dict[int, list[float]] = {}
    for number in range(ROUNDS):
        best_s = min(map(statistics.median, took.values()), default=math.inf)
        again = [
            k for k in range(len(contenders)) if k not in took or statistics.median(took[k]) <= (1 + NEAR) * best_s
        ]
        for k in again if number == 0 else reversed(again):
            words = words_of(contenders[k])
            text = f"trying {words}: {steps} steps (round {number + 1} of {ROUNDS})"
            observer.on_event(Event(kind="trying", role="driver", values={"text": text}))
            took.setdefault(k, []).extend(
                try_out(resolved, contenders[k], links_of, total_steps, steps, session, observer)
            )
    seconds = {k: statistics.median(each) for k, each in took.items()}
    return with_choice(resolved, contenders, seconds)


def pays(resolved: Resolved, links_of: LinksOf, contenders: int, total_steps: int) -> bool:
    config, facts, pattern = resolved.config, resolved.facts, resolved.pattern
    if pattern.tries == "always":
        return True
    links = links_of(pattern, facts)
    step = pattern.predict(facts, config, bytes_by(links), links[0].carrier)
    if step is None:
        return False
    takes_s = ROUNDS * contenders * (START_S + STEPS * step.whole_s)
    return takes_s <= PART * total_steps * step.whole_s


def try_out(
    resolved: Resolved,
    settled: Settled,
    links_of: LinksOf,
    total_steps: int,
    steps: int,
    session: Session,
    observer: Observer,
) -> list[float]:
    """Seconds of each step but the first."""
    config = msgspec.structs.replace(
        resolved.config,
        faults=[fault for fault in resolved.config.faults if fault.get("step") is None],
        balance="none",
        trace=False,
    )
    facts = with_settled(resolved.facts, settled)
    links = [dataclasses.replace(link, port=0) for link in links_of(resolved.pattern, facts)]
    links[0] = dataclasses.replace(links[0], speed=resolved.speed)
    took: list[float] = []

    def hear(said: dict[str, Any]) -> None:
        took.extend(said["seconds"])

    call_all(
        session,
        observer,
        "weft.measure:try_steps",
        msgspec.to_builtins(Trial(config=config, facts=facts, total_steps=total_steps, steps=steps)),
        links,
        hear,
        doing=f"in a trial of {words_of(settled)}",
        silence_s=math.inf,  # a model may be slow; the user sees it, and can interrupt
    )
    return took


def with_choice(resolved: Resolved, contenders: Sequence[Settled], seconds: dict[int, float]) -> Resolved:
    """``seconds``: of a step, by contender."""
    order = sorted(seconds, key=seconds.__getitem__)
    said = [
        format_time(seconds[order[0]]),
        *(f"{words_of(contenders[k])} {format_time(seconds[k])}" for k in order[1:]),
    ]
    first = contenders[order[0]]
    settled = msgspec.structs.replace(
        first, why=f"tried before the run, a step takes {'; '.join(said)}; {first.why}", tried_s=seconds[order[0]]
    )
    measured = resolved.config.measured
    assert measured is not None  # a pipeline that is chosen is recorded
    measured = msgspec.structs.replace(measured, pipeline=settled)
    return dataclasses.replace(
        resolved,
        config=msgspec.structs.replace(resolved.config, measured=measured),
        facts=with_settled(resolved.facts, settled),
        news={**(resolved.news or {}), **msgspec.to_builtins(measured)},
    )


def with_settled(facts: Facts, settled: Settled) -> Facts:
    assert facts.pipeline is not None
    return msgspec.structs.replace(facts, pipeline=msgspec.structs.replace(facts.pipeline, settled=settled))


def settled_in(facts: Facts) -> Settled | None:
    return facts.pipeline.settled if facts.pipeline is not None else None


def words_of(settled: Settled) -> str:
    return in_words(find(settled.schedule), settled.stages_per_worker)
