"""torch's collectives over Weft's links: what fully_shard, DTensor and device meshes need of a backend."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from weft.comm.link import Link
from weft.comm.shm import Region, ShmLink, supported
from weft.comm.torch_backend import process_groups
from weft.errors import CommError, Incompatible, Mismatch, PeerLost
from weft.testing.conformance import Make, Outcome, in_processes
from weft.usage import PeakMemory

pytestmark = [
    pytest.mark.multiprocess,
    pytest.mark.skipif(supported() is not None, reason=f"{supported()}"),
]

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.int64)


def shm() -> Make:
    return in_processes(
        connect=lambda rank, world, region, deadline_s: ShmLink(region, rank, deadline_s),
        prepare=lambda world: Region.create(world, 1 << 20),
        clean_up=lambda region: region.close(),
    )


def ranks(world: int, fn: Callable[[Link], Any], deadline_s: float = 20.0) -> list[Outcome]:
    def within(link: Link) -> Any:
        with process_groups(link):
            return fn(link)

    return shm()(world)(within, deadline_s)


def given(rank: int, numel: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.arange(numel).mul(rank + 1).remainder(11).to(dtype)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_collectives_do_what_torch_says_they_do(world: int) -> None:
    def each(link: Link) -> list[Any]:
        told: list[Any] = []
        for dtype in DTYPES:
            x = given(link.rank, 6 * world, dtype)
            gathered = torch.empty(6 * world * world, dtype=dtype)
            dist.all_gather_into_tensor(gathered, x)
            part, kept = torch.empty(6, dtype=dtype), x.clone()
            dist.reduce_scatter_tensor(part, x)
            assert torch.equal(x, kept), "reduce_scatter leaves what it was given"
            summed, largest, least = x.clone(), x.clone(), x.clone()
            dist.all_reduce(summed)
            dist.all_reduce(largest, dist.ReduceOp.MAX)
            dist.all_reduce(least, dist.ReduceOp.MIN)
            sent = x.clone()
            dist.broadcast(sent, src=world - 1)
            listed = [torch.empty_like(x) for _ in range(world)]
            dist.all_gather(listed, x)
            told.append([t.tolist() for t in (gathered, part, summed, largest, least, sent, torch.cat(listed))])
        mean = torch.tensor([float(link.rank)])
        dist.all_reduce(mean, dist.ReduceOp.AVG)
        objects: list[Any] = [None] * world
        dist.all_gather_object(objects, {"rank": link.rank})
        dist.barrier()
        return [told, mean.item(), objects]

    outcomes = [outcome.get() for outcome in ranks(world, each)]
    for rank, (told, mean, objects) in enumerate(outcomes):
        for dtype, (gathered, part, summed, largest, least, sent, listed) in zip(DTYPES, told, strict=True):
            all_of = torch.stack([given(r, 6 * world, dtype) for r in range(world)])
            assert gathered == listed == all_of.reshape(-1).tolist()
            assert summed == all_of.sum(0).tolist()
            assert part == all_of.sum(0)[6 * rank : 6 * rank + 6].tolist()
            assert (largest, least) == (all_of.amax(0).tolist(), all_of.amin(0).tolist())
            assert sent == all_of[-1].tolist()
        assert mean == pytest.approx((world - 1) / 2)
        assert objects == [{"rank": r} for r in range(world)]


def test_large_collectives_take_little_beside_their_tensors() -> None:
    numel, MB = 12_000_000, 1_000_000

    def each(link: Link) -> tuple[float, float]:
        whole, part = torch.zeros(2 * numel), torch.zeros(numel)
        taken = []
        for call in (dist.all_gather_into_tensor, lambda a, b: dist.reduce_scatter_tensor(b, a)):
            memory = PeakMemory.of(torch.device("cpu"))
            assert memory is not None
            memory.begin()
            call(whole, part)
            memory.end()
            taken.append(memory.peak_bytes / MB)
        return taken[0], taken[1]

    for outcome in ranks(2, each):
        assert max(outcome.get()) < 12, "a copy of a part would be 48"


def test_dtensors_are_laid_out_and_joined() -> None:
    whole = torch.arange(35.0).view(7, 5)

    def each(link: Link) -> list[Any]:
        mesh = init_device_mesh("cpu", (3,))
        cut = distribute_tensor(whole, mesh, [Shard(0)])
        moved = cut.redistribute(placements=[Replicate()])
        product = (cut @ cut.T.redistribute(placements=[Replicate()])).full_tensor()
        total = DTensor.from_local(cut.to_local().sum(), mesh).sum()
        return [cut.to_local().shape[0], moved.to_local().tolist(), product.tolist(), float(total.full_tensor())]

    outcomes = [outcome.get() for outcome in ranks(3, each)]
    assert [o[0] for o in outcomes] == [3, 3, 1]
    for _, moved, product, _ in outcomes:
        assert moved == whole.tolist()
        assert product == (whole @ whole.T).tolist()


def test_bytes_are_counted_and_a_mismatch_is_named() -> None:
    def each(link: Link) -> int:
        dist.all_reduce(torch.zeros(1000 + 8 * (link.rank == 1)))
        return link.traffic.bytes_sent

    for outcome in ranks(2, each):
        with pytest.raises(Mismatch, match=r"1000.*1008|1008.*1000"):
            outcome.get()

    def counted(link: Link) -> int:
        dist.all_reduce(torch.zeros(1000))
        return link.traffic.bytes_sent

    assert [o.get() for o in ranks(2, counted)] == [4000, 4000]


def test_a_lost_peer_is_named_from_within_torch() -> None:
    def each(link: Link) -> None:
        if link.rank == 1:
            return
        dist.all_reduce(torch.zeros(3))

    first, _, third = ranks(3, each)
    for outcome in (first, third):
        with pytest.raises(PeerLost) as caught:
            outcome.get()
        assert caught.value.ranks == (1,)


def test_what_it_cannot_do_is_said() -> None:
    def each(link: Link) -> str:
        with pytest.raises(Incompatible, match="sum, avg, max and min"):
            dist.all_reduce(torch.ones(2), dist.ReduceOp.PRODUCT)
        with pytest.raises(CommError, match="no link of their own"):
            dist.new_group([0, 1])
        with pytest.raises(CommError, match="default process group"), process_groups(link):
            pass
        return "done"

    def two(link: Link) -> str:
        return each(link) if link.rank == 0 else "done"

    assert [o.get() for o in ranks(3, two)] == ["done"] * 3


def test_groups_use_the_links_that_were_laid_for_them() -> None:
    """A mesh of 2 x 2 on four workers, each pair of which has a link of its own."""
    regions = {pair: Region.create(2, 1 << 16) for pair in ((0, 1), (2, 3), (0, 2), (1, 3))}

    def within(link: Link) -> list[float]:
        mine = {p: ShmLink(r, p.index(link.rank), 20.0) for p, r in regions.items() if link.rank in p}
        with process_groups(link, mine):
            mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("outer", "inner"))
            sums = []
            for name in ("outer", "inner"):
                x = torch.tensor([10.0**link.rank])
                dist.all_reduce(x, group=mesh.get_group(name))
                sums.append(x.item())
            link.barrier()  # nobody closes what another still reads
            return sums

    try:
        outcomes = [o.get() for o in shm()(4)(within, 20.0)]
    finally:
        for region in regions.values():
            region.close()
    assert outcomes == [[101, 11], [1010, 11], [101, 1100], [1010, 1100]]
