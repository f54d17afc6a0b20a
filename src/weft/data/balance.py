"""How many examples of each joined batch a worker takes, by its measured speed: those who wait for nobody waste nothing.

A worker's seconds between two exchanges are taken as t = a + b n, of n examples; the best shares make the slowest worker
as quick as can be. Pure: all ranks see the same times, and so come to the same shares at the same step.
"""

from __future__ import annotations

import heapq
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

HALF = 8  # steps in each of the two stretches by whose medians shares are judged
GAIN = 0.05  # a change must promise at least this part of the slowest worker's time
MAX_FIXED = 0.5  # a is at most this part of t: see `learn_fixed`
TELLING = 0.25  # a change of n by this part shows how t depends on n


class Decision(NamedTuple):
    shares: tuple[int, ...]  # examples by rank, from the next step on
    reason: str


class Workers(NamedTuple):
    """What is believed of each rank: ``fixed[r] + per_example[r] * n`` seconds for n examples."""

    fixed: Sequence[float]
    per_example: Sequence[float]

    @classmethod
    def seen(cls, shares: Sequence[int], seconds: Sequence[float], fixed: Sequence[float]) -> Workers:
        """From ``seconds`` at ``shares``, where ``fixed`` is what an earlier change of shares taught."""
        a = [min(f, MAX_FIXED * t) for f, t in zip(fixed, seconds, strict=True)]
        return cls(a, [(t - f) / n for t, f, n in zip(seconds, a, shares, strict=True)])

    def slowest_s(self, shares: Sequence[int]) -> float:
        return max(a + b * n for a, b, n in zip(self.fixed, self.per_example, shares, strict=True))


def equal_shares(batch: int, world: int) -> tuple[int, ...]:
    return tuple(batch * (r + 1) // world - batch * r // world for r in range(world))


def best_shares(workers: Workers, batch: int, least: int = 1) -> tuple[int, ...]:
    """Sum to ``batch``, at least ``least`` each, and no others have a quicker slowest worker.

    One example after the other goes to whoever would be done with it first: exact, as times grow with n. Needs
    ``batch`` >= ``least`` times the number of ranks. O(batch log ranks).
    """
    world = len(workers.fixed)
    if batch < least * world:
        raise ValueError(f"{batch} examples are not {least} for each of {world} ranks")
    shares = [least] * world
    costs = list(zip(workers.fixed, workers.per_example, strict=True))
    queue = [(a + (least + 1) * b, r) for r, (a, b) in enumerate(costs)]
    heapq.heapify(queue)
    for _ in range(batch - least * world):
        _, r = queue[0]
        shares[r] += 1
        a, b = costs[r]
        heapq.heapreplace(queue, (a + b * (shares[r] + 1), r))
    return tuple(shares)


def decide(
    shares: Sequence[int], older: Sequence[float], newer: Sequence[float], fixed: Sequence[float], least: int = 1
) -> Decision | None:
    """New shares, or None if no change would pay. ``older`` and ``newer``: seconds by rank in two stretches at ``shares``.

    What both together propose must promise to pay by each: noise proposes too, but seldom twice the same.
    """
    seconds = [(a + b) / 2 for a, b in zip(older, newer, strict=True)]
    both, *each = (Workers.seen(shares, s, fixed) for s in (seconds, older, newer))
    proposed = best_shares(both, sum(shares), least)
    if any(seen.slowest_s(proposed) > (1 - GAIN) * seen.slowest_s(shares) for seen in each):
        return None
    return Decision(proposed, _reason(shares, proposed, seconds, both.slowest_s(shares), both.slowest_s(proposed)))


def _reason(old: Sequence[int], new: Sequence[int], seconds: Sequence[float], now_s: float, then_s: float) -> str:
    """Of the worker whose share changes most."""
    who = max(range(len(old)), key=lambda r: abs(math.log(new[r] / old[r])))
    pace = [1e3 * t / n for t, n in zip(seconds, old, strict=True)]
    others = sorted(p for r, p in enumerate(pace) if r != who)
    theirs = f"{others[0]:.3g}" + (f" to {others[-1]:.3g}" if others[-1] > 1.1 * others[0] else "")
    return (
        f"worker {who} takes {new[who]} of {sum(new)} examples instead of {old[who]}: it needs {pace[who]:.3g} ms an example, "
        f"the others {theirs} (so the slowest should take {1e3 * then_s:.3g} ms a step instead of {1e3 * now_s:.3g})"
    )


def learn_fixed(
    fixed: Sequence[float],
    before: tuple[Sequence[int], Sequence[float]],
    after: tuple[Sequence[int], Sequence[float]],
) -> list[float]:
    """a of each rank, from its (shares, seconds) before and after a change; where that changed little, what was known.

    Wherever all ranks take equally long the shares stay, whatever a is: an error in a makes steps to the best shares too
    short or too long, and never moves the goal. With a of at most half of t a step is at most twice too long.
    """
    learned = list(fixed)
    for r, (n0, t0, n1, t1) in enumerate(zip(*before, *after, strict=True)):
        if abs(n1 - n0) >= TELLING * max(n0, n1):
            slope = (t1 - t0) / (n1 - n0)
            learned[r] = min(max(t1 - slope * n1, 0.0), MAX_FIXED * t1)
    return learned


class Balancer:
    """Shares that follow the measured times. All ranks call ``observe`` with the same numbers after each step."""

    def __init__(self, batch: int, world: int, least: int = 1) -> None:
        self.shares = equal_shares(batch, world)
        self.least = min(least, *self.shares)
        self._fixed = [0.0] * world
        self._before: tuple[Sequence[int], Sequence[float]] | None = None  # shares and seconds before the last change
        self._window: list[Sequence[float]] = []  # seconds by rank, a row a step
        self._warm = False  # the first step at new shapes is slow, and is not counted

    def observe(self, seconds: Sequence[float]) -> Decision | None:
        """After a step of a whole joined batch, each rank's seconds in it. The shares of the next one if they change."""
        if not self._warm:
            self._warm = True
            return None
        self._window.append(list(seconds))
        if len(self._window) < 2 * HALF:
            return None
        older, newer = (
            [statistics.median(c) for c in zip(*half)] for half in (self._window[:HALF], self._window[HALF:])
        )
        self._window = []
        if self._before is not None:
            self._fixed = learn_fixed(self._fixed, self._before, (self.shares, older))
            self._before = None
        decision = decide(self.shares, older, newer, self._fixed, self.least)
        if decision is not None:
            self._before = (self.shares, newer)
            self.shares, self._warm = decision.shares, False
        return decision

    def state_dict(self) -> dict[str, Any]:
        """Small, JSON-able, the same on every rank."""
        return {
            "shares": list(self.shares),
            "fixed": self._fixed,
            "before": self._before,
            "window": self._window,
            "warm": self._warm,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with recorded shares; those of another world say nothing about this one, and equal ones stay."""
        if len(state["shares"]) != len(self.shares) or sum(state["shares"]) != sum(self.shares):
            return
        self.shares = tuple(state["shares"])
        self._fixed, self._window, self._warm = (
            list(state["fixed"]),
            [list(row) for row in state["window"]],
            state["warm"],
        )
        self._before = tuple(state["before"]) if state["before"] is not None else None
