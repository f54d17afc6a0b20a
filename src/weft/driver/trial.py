"""Which of several, by trial: predictions name the few that may be quickest, and before a long run throw-away members take steps of each.

A simulation leaves out what it costs to send beside computing, and a machine's pace changes from one moment to the next: predictions of pipelines are good to
about a tenth, and schedules often lie closer together. A step in the run's own place leaves nothing out.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from weft.clusters.base import LinkSpec, Session, bytes_by
from weft.config import Config, Settled
from weft.cost import LinkSpeed
from weft.driver.calls import call_all
from weft.driver.probe import Resolved
from weft.errors import DeadlineExceeded, MemberFailed
from weft.events import Event
from weft.patterns.base import Facts, Pattern
from weft.payoff import format_time
from weft.pipelines.choose import in_words
from weft.pipelines.schedules import find
from weft.report.observers import Observer

STEPS = 4  # of a trial; the first of them is not timed
ROUNDS = 2  # the second for those that came near the best in the first: machines have quick and slow times
NEAR = 0.10
START_S = 5.0  # of a trial, besides its steps, as long as none has been seen
PART = 0.05  # of the predicted time of what is left of the run, that trials may take

#: The links of a pattern's groups, the first with this speed where it is known.
LinksOf = Callable[[Pattern, Facts, LinkSpeed | None], list[LinkSpec]]


class Trial(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What every member is told."""

    config: Config
    facts: Facts
    total_steps: int
    steps: int


@dataclasses.dataclass
class Budget:
    """Seconds that trials may take; a trial is as long as the longest so far."""

    seconds: float
    trial_s: float
    spent_s: float = 0.0

    def allows(self, trials: int) -> bool:
        return self.spent_s + trials * self.trial_s <= self.seconds

    def spend(self, seconds: float) -> None:
        self.spent_s += seconds
        self.trial_s = max(self.trial_s, seconds)


def budget_of(resolved: Resolved, links_of: LinksOf, steps: int) -> Budget:
    """``steps``: that are left of the run."""
    config, facts, pattern = resolved.config, resolved.facts, resolved.pattern
    if pattern.tries == "always":
        return Budget(math.inf, 0.0)
    links = links_of(pattern, facts, resolved.speed)
    step = pattern.predict(facts, config, bytes_by(links), links[0].carrier)
    step_s = step.whole_s if step is not None else 0.0
    return Budget(PART * steps * step_s, START_S + STEPS * step_s)


def pays(resolved: Resolved, links_of: LinksOf, steps: int) -> bool:
    """Whether there is a choice, and the run is so long that a trial of all is a small part of it. If always asked for, it does."""
    pattern = resolved.pattern
    if pattern.tries == "never" or steps < 2:
        return False
    contenders = pattern.contenders(resolved.facts, resolved.config.workers)
    if pattern.tries == "always":
        return bool(contenders)
    return len(contenders) > 1 and budget_of(resolved, links_of, steps).allows(ROUNDS * len(contenders))


def decide(
    resolved: Resolved, links_of: LinksOf, total_steps: int, steps: int, session: Session, observer: Observer
) -> Resolved:
    """With the quickest of the pattern's contenders. ``steps``: that are left of the run. One that fails is left out, and told; MemberFailed or
    DeadlineExceeded if it is what would have been chosen without a trial."""
    contenders = resolved.pattern.contenders(resolved.facts, resolved.config.workers)
    budget = budget_of(resolved, links_of, steps)
    took: dict[int, list[float]] = {}
    left = list(range(len(contenders)))
    for number in range(ROUNDS):
        for k in left if number == 0 else reversed(left):
            if took and not budget.allows(1):
                break
            settled = contenders[k]
            text = f"trying {words_of(settled)}: {STEPS} steps (round {number + 1} of {ROUNDS})"
            observer.on_event(Event(kind="trying", role="driver", values={"text": text}))
            begun = time.monotonic()
            try:
                seconds = try_out(resolved, settled, links_of, total_steps, min(STEPS, steps), session, observer)
                took.setdefault(k, []).extend(seconds)
            except (MemberFailed, DeadlineExceeded) as error:
                if k == 0:
                    raise
                text = f"{words_of(settled)} is left out, since its trial failed: {error}"
                observer.on_event(Event(kind="warning", role="driver", values={"text": text}))
                took.pop(k, None)
            budget.spend(time.monotonic() - begun)
        best_s = min(map(statistics.median, took.values()))
        left = [k for k in took if statistics.median(took[k]) <= (1 + NEAR) * best_s]
        if len(left) < 2:
            break
    return with_choice(resolved, contenders, {k: statistics.median(each) for k, each in took.items()})


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
    facts = with_settled(resolved.facts, settled)
    order = Trial(config=resolved.config, facts=facts, total_steps=total_steps, steps=steps)
    links = [dataclasses.replace(link, port=0) for link in links_of(resolved.pattern, facts, resolved.speed)]
    took: list[float] = []

    def hear(said: dict[str, Any]) -> None:
        took.extend(said["seconds"])

    call_all(
        session,
        observer,
        "weft.measure:try_steps",
        msgspec.to_builtins(order),
        links,
        hear,
        doing=f"in a trial of {words_of(settled)} (-o trial=never leaves trials out)",
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
    settled = msgspec.structs.replace(first, why=f"tried before the run, a step took {'; '.join(said)}; {first.why}")
    measured = resolved.config.measured
    assert measured is not None  # a pipeline that is chosen is recorded
    measured = msgspec.structs.replace(measured, pipeline=settled)
    return dataclasses.replace(
        resolved,
        config=msgspec.structs.replace(resolved.config, measured=measured),
        facts=with_settled(resolved.facts, settled),
        news={**(resolved.news or {}), **msgspec.to_builtins(measured)},
        tried_s=seconds[order[0]],
    )


def with_settled(facts: Facts, settled: Settled) -> Facts:
    assert facts.pipeline is not None
    return msgspec.structs.replace(facts, pipeline=msgspec.structs.replace(facts.pipeline, settled=settled))


def words_of(settled: Settled) -> str:
    return in_words(find(settled.schedule), settled.stages_per_worker)
