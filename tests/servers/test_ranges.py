"""Every number of every tensor lies on one server, in order, and the servers hold as many bytes each as can be."""

from __future__ import annotations

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from weft.errors import ConfigError
from weft.servers.ranges import LINE, Piece, Size, cut, nbytes, whole

SIZES = st.lists(st.builds(Size, st.integers(0, 5000), st.sampled_from([2, 4, 8])), min_size=1, max_size=12)


def named(sizes: list[Size]) -> dict[str, Size]:
    return {f"p{k}": size for k, size in enumerate(sizes)}


@given(sizes=SIZES, servers=st.integers(1, 6))
def test_cut_covers_each_number_once(sizes: list[Size], servers: int) -> None:
    by_name = named(sizes)
    try:
        pieces = cut(by_name, servers)
    except ConfigError:
        assume(False)
    for name, size in by_name.items():
        mine = [piece for each in pieces for piece in each if piece.name == name]
        assert [n for piece in mine for n in range(piece.start, piece.stop)] == list(range(size.numel))
        assert all(len([p for p in each if p.name == name]) <= 1 for each in pieces)


@given(sizes=SIZES, servers=st.integers(1, 6))
def test_cut_is_even(sizes: list[Size], servers: int) -> None:
    by_name = named(sizes)
    total = sum(size.nbytes for size in sizes)
    try:
        pieces = cut(by_name, servers)
    except ConfigError:
        assert total // servers < 2 * LINE
        return
    assert all(abs(nbytes(each, by_name) - total / servers) <= 2 * LINE for each in pieces)


@given(sizes=SIZES, servers=st.integers(1, 6))
def test_whole_tensors_lie_on_one_server_within_grahams_bound(sizes: list[Size], servers: int) -> None:
    by_name = named(sizes)
    if len(sizes) < servers:
        with pytest.raises(ConfigError, match=f"servers={len(sizes)} or fewer"):
            whole(by_name, servers)
        return
    pieces = whole(by_name, servers)
    assert sorted(piece for each in pieces for piece in each) == sorted(
        Piece(n, 0, s.numel) for n, s in by_name.items()
    )
    best = max(sum(s.nbytes for s in sizes) / servers, max(s.nbytes for s in sizes))
    assert max(nbytes(each, by_name) for each in pieces) <= 2 * best


def test_a_large_tensor_lies_on_all() -> None:
    assert cut({"a": Size(1024, 4)}, 2) == [[Piece("a", 0, 512)], [Piece("a", 512, 1024)]]
