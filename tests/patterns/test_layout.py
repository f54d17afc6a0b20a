"""Every worker stands at one place of a mesh, and in one group on each axis."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from weft.errors import ConfigError
from weft.patterns.layout import AXES, Layout

degrees = st.integers(1, 3)
layouts = st.builds(Layout, degrees, degrees, degrees, degrees)


@given(layouts)
def test_place_and_rank_are_inverse(layout: Layout) -> None:
    places = [layout.place(rank) for rank in range(layout.world)]
    assert [layout.rank(**place) for place in places] == list(range(layout.world))


@given(layouts)
def test_each_axis_parts_the_workers(layout: Layout) -> None:
    for axis in AXES:
        groups = layout.groups(axis)
        assert sorted(rank for ranks in groups for rank in ranks) == list(range(layout.world))
        for ranks in groups:
            assert [layout.place(rank)[axis] for rank in ranks] == list(range(getattr(layout, axis)))
            assert len({tuple(v for a, v in layout.place(r).items() if a != axis) for r in ranks}) == 1


@given(layouts)
def test_as_many_workers_draw_each_share(layout: Layout) -> None:
    drawn = [layout.share_of(rank) for rank in range(layout.world)]
    assert {drawn.count(share) for share in range(layout.shares)} == {layout.pipeline * layout.tensor}


def test_who_talk_most_stand_side_by_side() -> None:
    layout = Layout(data=2, tensor=2)
    assert layout.groups("tensor") == [(0, 1), (2, 3)]
    assert layout.groups("data") == [(0, 2), (1, 3)]


@given(layouts, st.integers(1, 8))
def test_the_innermost_axis_stays_inside_hosts_that_it_divides(layout: Layout, times: int) -> None:
    size = times * layout.tensor
    hosts = [range(k, k + size) for k in range(0, layout.world, size)]
    assert layout.crossing("tensor", hosts) == []


def test_groups_that_stand_on_several_hosts_are_found() -> None:
    layout = Layout(data=3, tensor=2)
    assert layout.crossing("tensor", [(0, 1, 2), (3, 4, 5)]) == [(2, 3)]
    assert layout.crossing("data", [(0, 1, 2), (3, 4, 5)]) == [(0, 2, 4), (1, 3, 5)]
    assert layout.crossing("tensor", [range(6)]) == layout.crossing("tensor", []) == []


def test_a_world_that_does_not_fill_it_is_refused() -> None:
    with pytest.raises(
        ConfigError,
        match="7 workers cannot hold tensor=2 x pipeline|7 workers cannot hold pipeline=2 x tensor=2, which takes 4",
    ):
        Layout(pipeline=2, tensor=2).check(7)
