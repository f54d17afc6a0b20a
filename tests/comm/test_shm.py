"""Shared memory: the laws of every Link, then what only this carrier promises. Ranks are forked processes."""

from __future__ import annotations

import os
import platform
import signal
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from weft.comm.link import Link
from weft.comm.shm import Region, ShmLink, plan, supported
from weft.comm.shm.arrays import BLOCK, arrays_of
from weft.comm.shm.link import MAX_PLANS
from weft.comm.shm.region import LINE, SCRATCH, SLOT
from weft.errors import CommError, ConfigError, DeadlineExceeded, Mismatch, PeerLost
from weft.testing.conformance import (
    DEADLINE_S,
    DTYPES,
    LAWS,
    Make,
    Outcome,
    assert_reduced,
    contribution,
    in_processes,
)

pytestmark = [
    pytest.mark.multiprocess,
    pytest.mark.skipif(supported() is not None, reason=f"{supported()}"),
]

HEAP = 24 << 20

torch.testing.assert_close(torch.ones(1), torch.ones(1))  # imports for half a second: here, not in each rank


def ranks(world: int, fn: Callable[[Any], Any], deadline_s: float = DEADLINE_S, heap: int = HEAP) -> list[Outcome]:
    """What became of each rank that ran ``fn(link)``."""
    return shm(heap)(world)(fn, deadline_s)


def shm(heap: int = HEAP) -> Make:
    return in_processes(
        connect=lambda rank, world, region, deadline_s: ShmLink(region, rank, deadline_s),
        prepare=lambda world: Region.create(world, heap),
        clean_up=lambda region: region.close(),
    )


def values(outcomes: list[Outcome]) -> list[Any]:
    return [outcome.get() for outcome in outcomes]


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.double().numpy().tobytes()


@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
def test_obeys_the_laws_of_a_link(law: Callable[[Make, int], None], world: int) -> None:
    law(shm(), world)


# -- sums

WHERE = ("heap", "inside a heap buffer", "outside", "scattered")
buffer_specs = st.tuples(st.sampled_from(WHERE), st.sampled_from(DTYPES), st.sampled_from([0, 1, 3, 200, 5000, 40_001]))
calls = st.lists(st.tuples(st.sampled_from(["sum", "max"]), st.lists(buffer_specs, max_size=4)), min_size=1, max_size=4)


def place(link: Link, where: str, values: torch.Tensor) -> torch.Tensor:
    if where == "outside":
        return values.clone()
    if where == "scattered":
        return torch.stack([values, values], 1)[:, 0]
    around = 40 if where == "inside a heap buffer" else 0
    buffer = link.allocate(len(values) + 2 * around, values.dtype)[around : len(values) + around]
    return buffer.copy_(values)


@settings(max_examples=20, deadline=None)
@given(world=st.integers(1, 4), room=st.sampled_from([plan.SLOT + 1000, plan.SCRATCH]), calls=calls)
def test_all_reduce_equals_one_process(world: int, room: int, calls: list[Any]) -> None:
    """``room``: what is staged goes in many rounds, or in one."""

    def fn(link: Link) -> list[bytes]:
        seen = []
        for key, (op, specs) in enumerate(calls):
            given = [contribution((numel,), dtype, link.rank, key) for _, dtype, numel in specs]
            buffers = [place(link, where, each) for (where, _, _), each in zip(specs, given, strict=True)]
            for _ in range(2):  # as a new call, and as one whose plan is known
                for buffer, each in zip(buffers, given, strict=True):
                    buffer.copy_(each)
                link.all_reduce(buffers, op)
                for buffer, (_, dtype, numel) in zip(buffers, specs, strict=True):
                    assert_reduced(buffer, (numel,), dtype, world, op, key)
            seen += [bits(buffer) for buffer in buffers]
        return seen

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "SCRATCH", room)
        first, *others = values(ranks(world, fn))
    assert all(other == first for other in others)


@pytest.mark.parametrize("numel", [100, 50_000, 1_500_000])  # one sync; one round; three rounds of scratch
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_sums_in_rank_order(dtype: torch.dtype, numel: int) -> None:
    """From left to right; halves are held in float32 and rounded once."""

    def fn(link: Link) -> None:
        given = [contribution((numel,), dtype, rank) for rank in range(link.world)]
        truth = given[0].float()
        for each in given[1:]:
            truth = truth + each.float()
        for where in ("heap", "outside"):
            buffer = place(link, where, given[link.rank])
            for _ in range(3):  # the later ones as calls that are known
                buffer.copy_(given[link.rank])
                link.all_reduce([buffer])
                assert torch.equal(buffer, truth.to(dtype))

    for world in (2, 4):
        values(ranks(world, fn))


@pytest.mark.parametrize("dtype", [torch.bool, torch.int8, torch.int16, torch.uint16, torch.complex64], ids=str)
def test_unusual_dtypes(dtype: torch.dtype) -> None:
    def fn(link: Link) -> None:
        for numel in (7, 20_000):
            given = [torch.arange(numel).add(r).remainder(3).sub(1).abs().to(dtype) for r in range(3)]
            buffer = given[link.rank].clone()
            link.all_reduce([buffer])
            wide = torch.complex128 if dtype.is_complex else torch.int64
            assert torch.equal(buffer, torch.stack([each.to(wide) for each in given]).sum(0).to(dtype))

    values(ranks(3, fn))


def test_max_of_nan_is_nan() -> None:
    def fn(link: Link) -> None:
        for dtype in (torch.float32, torch.bfloat16):
            for numel in (5, 20_000):
                buffer = torch.full((numel,), float(link.rank), dtype=dtype)
                buffer[link.rank] = torch.nan
                link.all_reduce([buffer], "max")
                assert buffer.isnan().nonzero().flatten().tolist() == [0, 1, 2]
                assert (buffer[3:] == 2).all()

    values(ranks(3, fn))


def test_only_the_view_is_touched() -> None:
    def fn(link: Link) -> None:
        flat = link.allocate(100_000, torch.float32).fill_(7.0)
        for begin, end in ((3, 99_000), (5, 20)):
            flat[begin:end] = link.rank + 1
            link.all_reduce([flat[begin:end]])
            assert (flat[begin:end] == 6).all()
            flat[begin:end] = 7.0
            assert (flat == 7.0).all()

    values(ranks(3, fn))


def test_all_gather_and_broadcast_of_any_size() -> None:
    def fn(link: Link) -> None:
        for numel in (SLOT, SLOT + 1, SCRATCH, 2 * SCRATCH + 5):
            lengths = [numel, 0, 3][: link.world]
            parts = link.all_gather(contribution((lengths[link.rank],), torch.uint8, link.rank))
            for rank, part in enumerate(parts):
                assert torch.equal(part, contribution((lengths[rank],), torch.uint8, rank))
            buffers = [place(link, where, contribution((numel,), torch.uint8, link.rank)) for where in WHERE]
            link.broadcast(buffers, root=1)
            for buffer in buffers:
                assert torch.equal(buffer, contribution((numel,), torch.uint8, 1))

    values(ranks(3, fn))


def test_thousands_of_exchanges_with_more_ranks_than_cores() -> None:
    def fn(link: Any) -> None:
        dice = torch.Generator().manual_seed(5)  # the same on all ranks
        heap = link.allocate(200_000, torch.float32)
        for key in range(1000):
            size, kind = (int(torch.randint(0, n, (), generator=dice)) for n in (6000, 8))
            size *= 30 if kind == 7 else 1
            buffer = heap[:size] if kind % 2 else torch.empty(size)
            buffer.copy_(torch.arange(size).add(key + link.rank).remainder(251))
            truth = sum(torch.arange(size).add(key + rank).remainder(251) for rank in range(link.world)).float()
            link.all_reduce([buffer])
            assert torch.equal(buffer, truth), key
            assert max(map(len, (link._plans, link._kept, link._again))) <= MAX_PLANS

    world = 2 * len(os.sched_getaffinity(0))
    values(ranks(world, fn))


@pytest.mark.parametrize("numel", [100, 50_000])
def test_a_buffer_that_shows_other_memory_is_another_call(numel: int) -> None:
    def fn(link: Link) -> None:
        heap = link.allocate(3 * numel, torch.float32).fill_(1)
        buffer = heap[:numel]
        for _ in range(3):
            link.all_reduce([buffer])
        link.all_reduce([buffer], "max")
        buffer.set_(heap[2 * numel :])  # the same object
        link.all_reduce([buffer])
        buffer.resize_(numel // 2)
        link.all_reduce([buffer])
        sums = [(heap == value).sum().item() for value in (1, link.world, link.world**2, link.world**3)]
        assert sums == [numel, numel // 2, numel // 2, numel]

    values(ranks(3, fn))


# -- who does what where


@given(st.lists(st.tuples(st.sampled_from(DTYPES), st.integers(0, 700)), max_size=8), st.integers(64, 3000))
def test_pack_places_each_element_once(buffers: list[tuple[torch.dtype, int]], room: int) -> None:
    placed = [torch.zeros(numel, dtype=torch.int) for _, numel in buffers]
    places = {i: (plan.OUTSIDE, torch.Size([numel]), dtype) for i, (dtype, numel) in enumerate(buffers)}
    for streams in plan._pack(places, room):
        taken = torch.zeros(room, dtype=torch.int)
        for stream in streams:
            assert stream.offset % LINE == 0
            size = stream.dtype.itemsize
            for buffer, part, at in stream.pieces:
                assert (buffers[buffer][0], part.stop - part.start) == (stream.dtype, at.stop - at.start)
                placed[buffer][part] += 1
                assert stream.offset + at.stop * size <= room
                taken[stream.offset + at.start * size : stream.offset + at.stop * size] += 1
        assert (taken <= 1).all()
    assert all((each == 1).all() for each in placed)


@given(world=st.integers(2, 7), numel=st.integers(1, 300_000), dtype=st.sampled_from(DTYPES))
@settings(max_examples=30)
def test_chunks_share_the_work(world: int, numel: int, dtype: torch.dtype) -> None:
    """Each element is one rank's, and shares differ by less than two lines."""
    view = arrays_of(dtype).empty(numel)
    blocks = [plan._chunk_blocks([view] * world, rank, dtype, "sum") for rank in range(world)]
    shares = [sum(len(block.mine) for block in each) for each in blocks]
    assert sum(shares) == numel
    assert max(shares) - min(shares) <= 2 * LINE // dtype.itemsize
    assert all(len(block.mine) * dtype.itemsize <= BLOCK for each in blocks for block in each)


# -- the heap


def test_allocate_is_zeroed_aligned_and_falls_back_when_full() -> None:
    def fn(link: Any) -> list[int]:
        buffers = [link.allocate(numel, torch.float32) for numel in (3, 1000, 0, 1025, 7)]  # 1025: one too many
        for buffer in buffers:
            assert buffer.count_nonzero() == 0
        places = [link._place(buffer) for buffer in buffers]
        for buffer in buffers:
            buffer += link.rank + 1
        link.all_reduce(buffers)
        assert all((buffer == 3).all() for buffer in buffers)
        return places

    one, two = values(ranks(2, fn, heap=8192))
    assert one == two == [0, 64, -1, -1, 64 + 4032]


def test_tensors_outlive_the_region() -> None:
    region = Region.create(1, 4096)
    link = ShmLink(region, 0)
    buffer = link.allocate(10, torch.float32)
    link.close()
    link.close()
    region.close()
    region.close()
    assert buffer.add_(1).sum() == 10


# -- errors


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    ear, mouth = os.pipe()
    yield ear, mouth
    os.close(ear)
    os.close(mouth)


def test_a_mismatch_reads_well_and_changes_nothing() -> None:
    def fn(link: Link) -> tuple[str, tuple[int, ...]]:
        heap = link.allocate(60_000, torch.float32).fill_(link.rank)
        begin = 16 if link.rank == 2 else 0
        link.all_reduce([heap[begin : begin + 10].clone()])
        with pytest.raises(Mismatch) as caught:
            link.all_reduce([heap[begin : begin + 50_000]])
        assert (heap == link.rank).all()
        with pytest.raises(Mismatch, match="of no more use"):
            link.barrier()
        return str(caught.value), caught.value.ranks

    for message, blamed in values(ranks(3, fn)):
        assert blamed == (2,)
        assert "ranks 0, 1 called all_reduce(sum) of float32[50000] at heap byte 0" in message
        assert "rank 2 called all_reduce(sum) of float32[50000] at heap byte 64" in message


def test_small_buffers_may_lie_anywhere() -> None:
    def fn(link: Link) -> None:
        heap = link.allocate(100, torch.float32).fill_(1)
        buffer = heap[link.rank : link.rank + 10] if link.rank else torch.ones(10)
        link.all_reduce([buffer])
        assert (buffer == link.world).all()

    values(ranks(3, fn))


@pytest.mark.parametrize("numel", [100, 50_000])
def test_a_known_call_that_others_do_not_make(numel: int) -> None:
    def fn(link: Any) -> None:
        buffer = link.allocate(numel, torch.float32).fill_(link.rank)
        for _ in range(4):
            link.all_reduce([buffer])
        before = buffer.clone()
        with pytest.raises(Mismatch, match=r"rank 1 called all_reduce\(max\)") as caught:
            link.all_reduce([buffer], "max" if link.rank == 1 else "sum")
        assert caught.value.ranks == (1,)
        assert torch.equal(buffer, before)
        with pytest.raises(Mismatch, match="of no more use"):
            link.all_reduce([buffer])

    values(ranks(3, fn))


@pytest.mark.parametrize("numel", [100, 50_000])
def test_a_rank_lost_before_a_known_call_is_named_at_once(numel: int) -> None:
    def fn(link: Any) -> float:
        buffer = link.allocate(numel, torch.float32)
        for _ in range(4):
            link.all_reduce([buffer])
        if link.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        begin = time.monotonic()
        with pytest.raises(PeerLost, match="rank 1 ") as caught:
            link.all_reduce([buffer])
        assert caught.value.ranks == (1,)
        return time.monotonic() - begin

    first, lost, third = ranks(3, fn)
    assert lost.died
    assert max(first.get(), third.get()) < DEADLINE_S / 2


@pytest.mark.parametrize("marked", [False, True], ids=["seen by the others", "marked by the supervisor"])
def test_a_lost_rank_is_named_at_once(marked: bool) -> None:
    """Killed: its process is looked at. Marked as dead: believed, even where the process seems to live."""

    def fn(link: Any) -> float:
        heap = link.allocate(300_000, torch.float32)
        for _ in range(5):
            link.all_reduce([heap, torch.ones(3)])
        if link.rank == 1:
            if marked:
                link.region.mark_dead(1)
            os.kill(os.getpid(), signal.SIGSTOP if marked else signal.SIGKILL)
        begin = time.monotonic()
        with pytest.raises(PeerLost, match="rank 1 ") as caught:
            link.all_reduce([heap, torch.ones(3)])
        assert caught.value.ranks == (1,)
        return time.monotonic() - begin

    first, lost, third = ranks(3, fn)
    assert lost.died
    assert max(first.get(), third.get()) < DEADLINE_S / 2


def test_who_has_come_before_it_died_is_not_missed() -> None:
    def fn(link: Any) -> None:
        if link.rank == 1:
            while 2 in link._missing(1):
                time.sleep(0.001)
            link.region.mark_dead(2)
            time.sleep(0.05)  # rank 0 waits for this rank, not for the dead one
        link.barrier()

    values(ranks(3, fn))


def test_a_stopped_rank_leaves_the_memory_alone_when_it_goes_on() -> None:
    """It slept before the first sync of a large call; all others gave up; then it comes."""

    def fn(link: Any) -> tuple[str, tuple[int, ...]]:
        heap = link.allocate(100_000, torch.float32)
        pids = [int(part[0]) for part in link.all_gather(torch.tensor([os.getpid()]))]
        if link.rank == 2:
            os.kill(os.getpid(), signal.SIGSTOP)
        with pytest.raises(DeadlineExceeded) as caught:
            link.all_reduce([heap.fill_(1)])
        if link.rank != 2:
            if link.rank == 0:
                os.kill(pids[2], signal.SIGCONT)
            time.sleep(0.3)
            assert (heap == 1).all()
        return str(caught.value), caught.value.ranks

    for message, blamed in values(ranks(3, fn, deadline_s=1.0)):
        assert blamed == (2,)
        assert "rank 2 did not come within 1 s to call 2, all_reduce(sum) of float32[100000]" in message


def test_an_interrupted_rank_is_named(pipe: tuple[int, int]) -> None:
    """At once, by a rank that waits for another, and by one that comes later."""
    ear, mouth = pipe

    def fn(link: Link) -> None:
        if link.rank == 1:
            signal.signal(signal.SIGALRM, signal.default_int_handler)
            signal.setitimer(signal.ITIMER_REAL, 0.1)
            with pytest.raises(KeyboardInterrupt):
                link.barrier()
            with pytest.raises(PeerLost, match="of no more use"):
                link.barrier()
            return
        if link.rank == 2:
            os.read(ear, 1)
        with pytest.raises(PeerLost, match=r"rank 1 gave up: rank 1 broke off call 1, barrier.*KeyboardInterrupt"):
            link.barrier()
        os.write(mouth, b"!")

    values(ranks(3, fn))


def test_a_rank_that_closed_its_link_and_lives_is_named(pipe: tuple[int, int]) -> None:
    ear, mouth = pipe

    def fn(link: Link) -> None:
        if link.rank == 1:
            link.close()
            os.read(ear, 1)
        with pytest.raises(CommError, match="closed") as caught:
            link.barrier()
        if link.rank == 0:
            assert caught.type is PeerLost
            assert caught.value.ranks == (1,)
            os.write(mouth, b"!")

    values(ranks(2, fn))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda link: link.all_reduce([torch.ones(3)], "mean"), "op 'mean' is not known: use 'sum' or 'max'"),
        (lambda link: link.all_reduce([torch.ones(3, device="meta")]), "CPU tensors, this one is on meta"),
        (lambda link: link.all_gather(torch.ones(3, device="meta")), "CPU tensors, this one is on meta"),
        (lambda link: link.all_reduce([torch.ones(3, dtype=torch.complex64)], "max"), "complex64 .* use op 'sum'"),
        (lambda link: link.all_reduce([torch.ones(3).to(torch.float8_e5m2)]), "float8_e5m2 cannot be combined"),
        (lambda link: link.broadcast([torch.ones(3)], 2), "root 2 is not a rank: use 0 to 1"),
    ],
)
def test_a_refused_call_costs_nothing(call: Callable[[Link], Any], message: str) -> None:
    def fn(link: Link) -> None:
        with pytest.raises(ValueError, match=message):
            call(link)
        buffer = torch.ones(3)
        link.all_reduce([buffer])
        assert (buffer == 2).all()

    values(ranks(2, fn))


def test_what_cannot_be_mapped_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for world, nbytes in ((0, 10), (2, -1)):
        with pytest.raises(ConfigError, match="world >= 1"):
            Region.create(world, nbytes)
    for nbytes in (1 << 60, 1 << 70):
        with pytest.raises(ConfigError, match=r"cannot map .* --link tcp"):
            Region.create(2, nbytes)
    monkeypatch.setattr("weft.comm.shm.region.memory_left", lambda: 10_000_000)
    Region.create(2, 1_000_000).close()
    with pytest.raises(ConfigError, match=r"cannot map .* for 2 ranks \(10,000,000 bytes are left\).* --link tcp"):
        Region.create(2, 5_000_000)
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    assert "aarch64" in str(supported())
    with pytest.raises(ConfigError, match="store order of x86-64, this is aarch64"):
        Region.create(2, 10)
    monkeypatch.setattr(sys, "platform", "darwin")
    assert "darwin" in str(supported())
