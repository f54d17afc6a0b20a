"""Seconds and choices by formula."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from weft.cost import (
    COLLECTIVES,
    LinkSpeed,
    all_reduce_seconds,
    choose,
    choose_broadcast,
    picks,
    picks_in_words,
)

LAN = LinkSpeed(latency_s=1e-3, bytes_per_s=12.5e6)  # 100 Mbit/s
speeds = st.builds(LinkSpeed, st.floats(1e-6, 0.5), st.floats(1e4, 1e11))


def test_the_ring_takes_what_was_measured() -> None:
    """25 MB took Gloo 2023 ms (p=2) and 3063 ms (p=4) over 100 Mbit/s and 1 ms, 1 KB 4.6 and 14.9 ms (alpha as it found it)."""
    assert all_reduce_seconds("ring", 25_000_000, 2, LAN) == pytest.approx(2.023, rel=0.02)
    assert all_reduce_seconds("ring", 25_000_000, 4, LAN) == pytest.approx(3.063, rel=0.02)


@given(st.integers(0, 10**10), st.integers(2, 300), speeds)
def test_the_choice_is_the_quickest_that_is_able(nbytes: int, world: int, speed: LinkSpeed) -> None:
    choice = choose(nbytes, world, speed)
    for other in COLLECTIVES:
        if other in choice.reason:
            assert all_reduce_seconds(choice.algorithm, nbytes, world, speed) <= all_reduce_seconds(
                other, nbytes, world, speed
            )
    assert {"ring", "halving"} <= {choice.algorithm, *choice.reason.split()}


def test_size_world_and_speed_decide() -> None:
    assert choose(100, 3, LAN).algorithm == "direct"
    assert choose(100, 64, LinkSpeed(5e-5, 1e9)).algorithm == "tree"
    assert choose(10**8, 8, LAN).algorithm == "halving"
    assert choose(10**8, 5, LAN).algorithm == "ring", "a fold sends everything once more"
    assert choose(10**8, 2, LAN).algorithm == "ring"
    assert choose_broadcast(10**8, 8, LAN) == "tree"
    assert choose_broadcast(100, 8, LAN) == "direct"


@given(st.integers(2, 64), speeds)
def test_picks_are_where_the_choice_changes(world: int, speed: LinkSpeed) -> None:
    found = picks(world, speed)
    for (start, algorithm), (end, _) in zip(found, [*found[1:], (1 << 40, "")]):
        assert choose(start, world, speed).algorithm == algorithm
        assert choose(end - 1, world, speed).algorithm == algorithm


def test_words_for_the_plan() -> None:
    assert picks_in_words(4, "tree") == "tree (asked for)"
    assert picks_in_words(4).endswith("assumed: not measured)")
    words = picks_in_words(8, speed=LAN)
    assert words.startswith("auto: direct, from ")
    assert words.endswith("halving (1000 us, 12.5 MB/s, measured)")
