"""The ring in detail; what every Link must do is in test_links.py."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.comm.test_links import CARRIERS

from weft.comm import collectives
from weft.comm.collectives import ALIGN, RingLink, chunk_bounds
from weft.comm.inproc import inproc_endpoints
from weft.comm.link import Link
from weft.errors import CommError
from weft.testing.conformance import DTYPES, assert_reduced, contribution


@given(st.integers(0, 10**12), st.integers(1, 300))
def test_chunks_cover_everything_once_and_stay_aligned(num_bytes: int, world: int) -> None:
    bounds = chunk_bounds(num_bytes, world)
    assert len(bounds) == world + 1
    assert (bounds[0], bounds[-1]) == (0, num_bytes)
    sizes = [hi - lo for lo, hi in pairwise(bounds)]
    assert min(sizes) >= 0
    assert max(sizes) < num_bytes / world + ALIGN
    assert all(bound % ALIGN == 0 or bound == num_bytes for bound in bounds)


calls = st.lists(
    st.tuples(st.lists(st.integers(0, 40), max_size=2).map(tuple), st.sampled_from(DTYPES)), min_size=1, max_size=6
)


@settings(max_examples=40, deadline=None)
@given(calls, st.integers(2, 4), st.sampled_from([64, 192]), st.sampled_from(["sum", "max"]))
def test_blocks_that_cut_runs_anywhere(call: list, world: int, block: int, op: str) -> None:
    """With tiny blocks every border between dtypes, chunks and blocks is crossed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(collectives, "SMALL_BYTES", -1)
        patch.setattr(collectives, "BLOCK_BYTES", block)

        def fn(link: Link) -> None:
            buffers = [contribution(shape, dtype, link.rank, key) for key, (shape, dtype) in enumerate(call)]
            link.all_reduce(buffers, op)
            for key, (buffer, (shape, dtype)) in enumerate(zip(buffers, call)):
                assert_reduced(buffer, shape, dtype, world, op, key)
            assert link.traffic.bytes_sent == link.all_reduce_bytes(sum(b.nbytes for b in buffers))

        for outcome in CARRIERS["inproc"](world)(fn):
            outcome.get()


@pytest.mark.parametrize("numel", [1, 100, 16_384])
def test_ring_and_direct_agree(numel: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def fn(link: Link) -> torch.Tensor:
        buffer = contribution((numel,), torch.float64, link.rank)
        link.all_reduce([buffer])
        return buffer

    direct = CARRIERS["inproc"](3)(fn)[0].get()
    monkeypatch.setattr(collectives, "SMALL_BYTES", -1)
    ring = CARRIERS["inproc"](3)(fn)[0].get()
    torch.testing.assert_close(ring, direct, rtol=0, atol=1e-14)


def test_bad_arguments_are_refused_before_anything_is_sent() -> None:
    endpoints = inproc_endpoints(2)
    link = RingLink(endpoints[0], 0, 2)
    with pytest.raises(ValueError, match="possible: sum, max"):
        link.all_reduce([torch.ones(1)], "mean")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="root 2"):
        link.broadcast([torch.ones(1)], 2)
    with pytest.raises(ValueError, match="rank 1 of 2"):
        RingLink(endpoints[0], 1, 2)
    assert (link.traffic.messages, link.traffic.bytes_sent) == (0, 0)


def test_what_torch_cannot_add_breaks_the_link_for_all() -> None:
    def fn(link: Link) -> str:
        with pytest.raises(RuntimeError):
            link.all_reduce([torch.ones(3, dtype=torch.complex64)], "max")
        with pytest.raises(CommError) as caught:
            link.barrier()
        return str(caught.value)

    for outcome in CARRIERS["inproc"](2)(fn):
        assert "all_reduce max" in outcome.get()
