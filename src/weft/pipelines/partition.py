"""Where a row of blocks is cut into stages, so that a step of M microbatches on P ranks is short:

    M * pace + (P - 1) * slowest stage        the middle of a step, and the bubble at its ends

The pace, in seconds for each microbatch, is that of the slowest rank, whose stages add up (one stage on a rank; a V). Round and round
(looped) all ranks are at their k-th stages together, so that the slowest of each k add up; that is never quicker than the slowest rank.
Of cuts alike in that: the fewest bytes sent between ranks; then the least memory where it is most (a V: the quickest slowest stage).

All by dynamic programming. One stage on a rank: exact. Several: the quickest pace is exact for each of a few bounds of the slowest stage
(SLOWEST), and the best of these is taken. Only where memory forbids that and ranks have several stages, it is what moving cuts found.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, combinations, pairwise

from weft.errors import ConfigError
from weft.payoff import format_size
from weft.pipelines.costs import Cost
from weft.pipelines.schedules import place

#: Bounds of the slowest stage, as multiples of the least that is possible.
SLOWEST = (1.0, 1.1, 1.25, 1.5, 2.0, math.inf)
SAME = 1 + 1e-9  # sums of the same seconds in another order differ by less


@dataclass(frozen=True, kw_only=True)
class Partition:
    """``stages``: the blocks of each. Seconds are of computing for one microbatch."""

    stages: tuple[range, ...]
    pace_s: float
    slowest_rank_s: float
    slowest_stage_s: float
    cut_bytes: float  # that one microbatch sends between ranks, forward and back
    memory_bytes: tuple[float, ...]  # by rank: state, and activations of as many microbatches as were given
    moved: bool  # for memory, and so not by dynamic programming


def partition(
    blocks: Sequence[Cost],
    placement: int | Sequence[int],
    *,
    microbatches: int = 0,
    memory_bytes: float = math.inf,
    in_flight: Sequence[int] = (),
) -> Partition:
    """``placement``: how many stages, each on a rank of its own; or the rank of each stage, looped or in a V. ``microbatches``: of a
    step; 0, four for each rank. ``memory_bytes``: what a rank may hold of state and of activations of ``in_flight`` microbatches (by
    stage; 1 if not given).

    Raises ConfigError if there are fewer blocks than stages, or if no cut that was found fits the memory."""
    ranks = tuple(range(placement)) if isinstance(placement, int) else tuple(placement)
    held = tuple(in_flight) or (1,) * len(ranks)
    num_ranks = len(set(ranks))
    per_rank = len(ranks) // num_ranks if ranks else 0
    looped = bool(ranks) and ranks == place("looped", num_ranks, per_rank)
    if not looped and not (per_rank == 2 and ranks == place("v", num_ranks, 2)):
        raise ConfigError(f"placement={list(ranks)} is neither looped (0 1 2 0 1 2) nor a V (0 1 2 2 1 0)")
    if len(held) != len(ranks):
        raise ConfigError(f"in_flight has {len(held)} numbers for {len(ranks)} stages: give one for each")
    if len(blocks) < len(ranks):
        raise ConfigError(_too_few(len(blocks), num_ranks, per_rank))

    if not any(block.seconds for block in blocks):
        raise ConfigError("every block costs 0 seconds: measure them, or give each block 1")

    table = _Table(blocks, ranks, num_ranks, held, memory_bytes, looped, microbatches or 4 * num_ranks)
    moved = False
    if per_rank == 1:
        cuts = _within_memory(table)
    else:
        cuts = _looped(table) if looped else _v(table)
        if max(table.memory_by_rank(cuts)) > memory_bytes:
            cuts, moved = _move_cuts(table, cuts), True
    memory = table.memory_by_rank(cuts)
    if max(memory) > memory_bytes:
        raise ConfigError(
            f"{len(ranks)} stages on {num_ranks} ranks need {format_size(max(memory))} of memory on the fullest rank, "
            f"however they are cut{' (as far as was tried)' if moved else ''}, and {format_size(memory_bytes)} are allowed: "
            "use more ranks, or smaller microbatches"
        )
    return Partition(
        stages=tuple(range(begin, end) for begin, end in pairwise(cuts)),
        pace_s=table.pace(cuts),
        slowest_rank_s=max(table.seconds_by_rank(cuts)),
        slowest_stage_s=table.slowest_stage(cuts),
        cut_bytes=table.sent(cuts),
        memory_bytes=tuple(memory),
        moved=moved,
    )


def _too_few(blocks: int, ranks: int, per_rank: int) -> str:
    cures = [f"at most {blocks // per_rank} ranks"] if blocks >= per_rank else []
    cures += [f"at most {blocks // ranks} on each rank"] if per_rank > 1 and blocks >= ranks else []
    cures += ["let the task give more, smaller blocks"]
    each = f" ({per_rank} on each of {ranks} ranks)" if per_rank > 1 else ""
    return f"{blocks} parts (the model's blocks, and what follows the last) cannot fill {ranks * per_rank} stages{each}: {', or '.join(cures)}"


Cuts = tuple[int, ...]  # where stages begin, and the number of blocks
Price = tuple[float, float]  # what adds up, and what counts where it is largest
Sides = tuple[tuple[int, int], tuple[int, int]]  # of a V: a rank's first stage and its last, each from block, to block


class _Table:
    """Sums over blocks, so that each question about a stage is a subtraction."""

    def __init__(
        self,
        blocks: Sequence[Cost],
        ranks: Sequence[int],
        num_ranks: int,
        held: Sequence[int],
        allowed: float,
        looped: bool,
        microbatches: int,
    ) -> None:
        self.num_blocks, self.num_ranks, self.microbatches = len(blocks), num_ranks, microbatches
        self.ranks, self.held, self.allowed, self.looped = ranks, held, allowed, looped
        self._seconds = [0.0, *accumulate(block.seconds for block in blocks)]
        self._activations = [0.0, *accumulate(block.activation_bytes for block in blocks)]
        self._state = [0.0, *accumulate(block.state_bytes for block in blocks)]
        self.outputs = [block.output_bytes for block in blocks]

    # of a stage

    def seconds(self, begin: int, end: int) -> float:
        return self._seconds[end] - self._seconds[begin]

    def memory(self, stage: int, begin: int, end: int) -> float:
        activations = self._activations[end] - self._activations[begin]
        return self._state[end] - self._state[begin] + self.held[stage] * activations

    def cut_bytes(self, stage: int, begin: int) -> float:
        """Between the stage that begins there and the one before."""
        if stage == 0 or self.ranks[stage] == self.ranks[stage - 1]:
            return 0.0
        return 2 * self.outputs[begin - 1]

    # of all

    def seconds_by_rank(self, cuts: Cuts) -> list[float]:
        result = [0.0] * self.num_ranks
        for rank, stage in zip(self.ranks, pairwise(cuts)):
            result[rank] += self.seconds(*stage)
        return result

    def memory_by_rank(self, cuts: Cuts) -> list[float]:
        result = [0.0] * self.num_ranks
        for stage, (begin, end) in enumerate(pairwise(cuts)):
            result[self.ranks[stage]] += self.memory(stage, begin, end)
        return result

    def pace(self, cuts: Cuts) -> float:
        if not self.looped:
            return max(self.seconds_by_rank(cuts))
        seconds = [self.seconds(*stage) for stage in pairwise(cuts)]
        return sum(max(seconds[k : k + self.num_ranks]) for k in range(0, len(seconds), self.num_ranks))

    def slowest_stage(self, cuts: Cuts) -> float:
        return max(self.seconds(*stage) for stage in pairwise(cuts))

    def step(self, cuts: Cuts) -> float:
        return self.microbatches * self.pace(cuts) + (self.num_ranks - 1) * self.slowest_stage(cuts)

    def sent(self, cuts: Cuts) -> float:
        return sum(self.cut_bytes(stage, begin) for stage, begin in enumerate(cuts[:-1]))


# A row of stages


def _best_cuts(table: _Table, price: Callable[[int, int, int], Price | None]) -> Cuts | None:
    """The least sum, and of equals the least maximum, over stages of ``price(stage, begin, end)``. None: the stage may not be so, nor
    any longer one with the same end."""
    best: list[tuple[Price, Cuts] | None] = [((0.0, 0.0), (0,))] + [None] * table.num_blocks  # by end
    for stage in range(len(table.ranks)):
        before, best = best, [None] * (table.num_blocks + 1)
        for end in range(stage + 1, table.num_blocks + 1):
            for begin in reversed(range(stage, end)):
                priced = price(stage, begin, end)
                if priced is None:
                    break
                found, so_far = best[end], before[begin]
                if so_far is not None:
                    (added, largest), cuts = so_far
                    here = (added + priced[0], max(largest, priced[1]))
                    if found is None or here < found[0]:
                        best[end] = here, (*cuts, end)
    last = best[table.num_blocks]
    return None if last is None else last[1]


def _fewest_bytes(table: _Table, slowest: Sequence[float], allowed: float) -> Cuts:
    """No stage takes longer than its ``slowest``, none more memory than is allowed; there is such a cut."""

    def price(stage: int, begin: int, end: int) -> Price | None:
        memory = table.memory(stage, begin, end)
        if table.seconds(begin, end) > slowest[stage] * SAME or memory > allowed:
            return None
        return table.cut_bytes(stage, begin), memory

    cuts = _best_cuts(table, price)
    assert cuts is not None
    return cuts


def _within_memory(table: _Table) -> Cuts:
    """One stage on each rank. If nothing fits the memory, the least memory."""

    def seconds(stage: int, begin: int, end: int) -> Price | None:
        return (0.0, table.seconds(begin, end)) if table.memory(stage, begin, end) <= table.allowed else None

    quickest = _best_cuts(table, seconds)
    if quickest is not None:
        return _fewest_bytes(table, [table.pace(quickest)] * len(table.ranks), table.allowed)
    least = _best_cuts(table, lambda *stage: (0.0, table.memory(*stage)))
    assert least is not None
    return least


def _bounds(table: _Table) -> list[float]:
    """Of the slowest stage."""
    evenest = _best_cuts(table, lambda stage, begin, end: (0.0, table.seconds(begin, end)))
    assert evenest is not None
    return [table.slowest_stage(evenest) * times * SAME for times in SLOWEST]


def _looped(table: _Table) -> Cuts:
    """Whatever the memory."""
    rounds = [_slowest_of_round(table, begin) for begin in range(table.num_blocks)]
    found = [_best_rounds(table, rounds, bound) for bound in _bounds(table)]
    slowest = min(found, key=lambda slowest: table.microbatches * sum(slowest) + (table.num_ranks - 1) * max(slowest))
    return _fewest_bytes(table, [seconds for seconds in slowest for _ in range(table.num_ranks)], math.inf)


def _best_rounds(table: _Table, rounds: Sequence[Sequence[float]], bound: float) -> tuple[float, ...]:
    """The slowest stage of each round, for the least sum if none is slower than ``bound``. ``rounds``: by first block and end."""
    impossible: tuple[float, tuple[float, ...]] = (math.inf, ())
    best = [(0.0, ()), *[impossible] * table.num_blocks]  # by end
    for _ in range(len(table.ranks) // table.num_ranks):
        before, best = best, [impossible] * (table.num_blocks + 1)
        for begin, slowest in enumerate(rounds):
            seconds, so_far = before[begin]
            for end in range(begin + table.num_ranks, table.num_blocks + 1):
                if slowest[end] <= bound and seconds + slowest[end] < best[end][0]:
                    best[end] = seconds + slowest[end], (*so_far, slowest[end])
    return best[-1][1]


def _slowest_of_round(table: _Table, begin: int) -> list[float]:
    """By end: of the blocks from ``begin`` on, cut into a stage for each rank, the slowest stage at best. inf: too few blocks."""
    best = [math.inf] * (table.num_blocks + 1)
    best[begin] = 0.0
    for stage in range(table.num_ranks):
        before, best = best, [math.inf] * (table.num_blocks + 1)
        for end in range(begin + stage + 1, table.num_blocks + 1):
            for middle in reversed(range(begin + stage, end)):
                last = table.seconds(middle, end)
                if last >= best[end]:
                    break
                best[end] = min(best[end], max(last, before[middle]))
    return best


# A V


def _v(table: _Table) -> Cuts:
    """Whatever the memory."""
    tried = _looped(table)

    def seconds(at: Sides) -> Price:
        return 0.0, sum(table.seconds(*stage) for stage in at)

    def sent(at: Sides) -> Price:
        (_, a), (b, _) = at
        return 2 * (table.outputs[a - 1] + table.outputs[b - 1]), max(table.seconds(*stage) for stage in at)

    found = []
    for bound in _bounds(table):
        possible = table.pace(tried) if table.slowest_stage(tried) <= bound else 2 * bound
        found.append(_inwards(table, possible, bound, seconds))
    cuts = min(found, key=table.step)
    return _inwards(table, table.pace(cuts), table.slowest_stage(cuts), sent)


def _inwards(table: _Table, rank_s: float, stage_s: float, price: Callable[[Sides], Price]) -> Cuts:
    """Each rank takes a stage from the left and one from the right of what is left: the least sum, and of equals the least maximum,
    over ranks of ``price``. No rank takes longer than ``rank_s``, no stage than ``stage_s``; there is such a cut."""
    rank_s, stage_s = rank_s * SAME, stage_s * SAME
    found: dict[tuple[int, int], tuple[Price, Cuts, Cuts]] = {
        (0, table.num_blocks): ((0.0, 0.0), (0,), (table.num_blocks,))
    }
    for ranks_left in reversed(range(1, table.num_ranks)):
        before, found = found, {}
        for (i, j), (so_far, left, right) in before.items():
            for a, b in _both_sides(table, i, j, ranks_left, rank_s, stage_s):
                added, largest = price(((i, a), (b, j)))
                here = (so_far[0] + added, max(so_far[1], largest))
                if (a, b) not in found or here < found[a, b][0]:
                    found[a, b] = here, (*left, a), (b, *right)
    # The innermost rank's stages are neighbours.
    ways = [
        (
            (so_far[0], max(so_far[1], price(((i, m), (m, j)))[1]), max(table.seconds(i, m), table.seconds(m, j))),
            (*left, m, *right),
        )
        for (i, j), (so_far, left, right) in found.items()
        for m in range(i + 1, j)
        if table.seconds(i, j) <= rank_s and max(table.seconds(i, m), table.seconds(m, j)) <= stage_s
    ]
    return min(ways)[1]


def _both_sides(
    table: _Table, i: int, j: int, ranks_left: int, rank_s: float, stage_s: float
) -> Iterator[tuple[int, int]]:
    """(a, b) such that a rank can take i to a and b to j, and those that are left the rest."""
    for a in range(i + 1, j):
        if table.seconds(i, a) > stage_s:
            return
        for b in reversed(range(a + 2 * ranks_left, j)):
            if table.seconds(b, j) > stage_s or table.seconds(i, a) + table.seconds(b, j) > rank_s:
                break
            if table.seconds(a, b) <= ranks_left * rank_s:
                yield a, b


# Where memory forbids the quickest


def _move_cuts(table: _Table, cuts: Cuts) -> Cuts:
    """Until no move helps, first to fit the memory."""

    def rate(cuts: Cuts) -> tuple[float, ...]:
        memory = table.memory_by_rank(cuts)
        excess = sum(max(0.0, nbytes - table.allowed) for nbytes in memory)
        # Nine digits: sums of the same numbers in another order must be the same.
        return tuple(float(f"{x:.9g}") for x in (excess, table.step(cuts), table.sent(cuts), max(memory)))

    rating = rate(cuts)
    moved = True
    while moved:
        moved = False
        for other in _moves(cuts):
            if (rated := rate(other)) < rating:
                cuts, rating, moved = other, rated, True
                break
    return cuts


def _moves(cuts: Cuts) -> Iterator[Cuts]:
    """A block goes from one stage to another, through those between them; or two cuts move, each its own way."""
    inner = range(1, len(cuts) - 1)
    together = [range(a, b + 1) for a in inner for b in inner if a <= b]
    shifts = [dict.fromkeys(at, by) for at in together for by in (-1, 1)]
    shifts += [{a: by, b: -by} for a, b in combinations(inner, 2) for by in (-1, 1)]
    for shift in shifts:
        other = tuple(cut + shift.get(k, 0) for k, cut in enumerate(cuts))
        if all(begin < end for begin, end in pairwise(other)):
            yield other
