"""What is special about torch.distributed; what every Link must do is in test_links.py."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from tests.comm.test_links import CARRIERS

from weft.comm.link import Link
from weft.comm.torchdist import INLINE_BYTES, TorchDistLink
from weft.cost import SLOT_BYTES
from weft.errors import CommError, ConfigError, DeadlineExceeded
from weft.testing.conformance import assert_reduced, contribution


@pytest.mark.multiprocess
def test_the_users_own_group_is_left_alone(tmp_path: Path) -> None:
    def fn(link: Link) -> bool:
        link.barrier()
        assert not dist.is_initialized()
        dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "own"), 2), rank=link.rank, world_size=2)
        value = torch.ones(1)
        dist.all_reduce(value)
        link.barrier()
        link.close()
        dist.all_reduce(value)
        dist.destroy_process_group()
        return value.item() == 4

    assert all(outcome.get() for outcome in CARRIERS["gloo"](2)(fn))


@pytest.mark.multiprocess
@pytest.mark.parametrize("numel", [INLINE_BYTES // 2, INLINE_BYTES // 2 + 1])
@pytest.mark.parametrize("dtype", [torch.int16, torch.bool])
def test_dtypes_that_gloo_does_not_know(dtype: torch.dtype, numel: int) -> None:
    def fn(link: Link) -> None:
        shape = (numel,) if dtype == torch.int16 else (2 * numel,)
        buffer = contribution(shape, dtype, link.rank)
        link.all_reduce([buffer], "max")
        assert_reduced(buffer, shape, dtype, link.world, "max")

    for outcome in CARRIERS["gloo"](2)(fn):
        outcome.get()


@pytest.mark.multiprocess
def test_an_uneven_gather_moves_what_there_is() -> None:
    def fn(link: Link) -> int:
        lengths = [0, 100_000, 30_000]
        gathered = link.all_gather(torch.full((lengths[link.rank],), float(link.rank)))
        assert [part.tolist() for part in gathered] == [[float(k)] * n for k, n in enumerate(lengths)]
        return link.traffic.bytes_sent

    sent = [outcome.get() for outcome in CARRIERS["gloo"](3)(fn)]
    assert sent == [2 * SLOT_BYTES + 2 * 4 * n for n in (0, 100_000, 30_000)]


def test_a_rank_that_never_comes_is_named(tmp_path: Path) -> None:
    with pytest.raises(DeadlineExceeded, match="rank 1 is not there") as caught:
        TorchDistLink(0, 2, store=tmp_path / "store", deadline_s=0.5)
    assert caught.value.ranks == (1,)


def test_bad_backends_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="possible: gloo, nccl"):
        TorchDistLink(0, 1, "mpi", store=tmp_path / "store")  # type: ignore[arg-type]
    if not dist.is_nccl_available():
        with pytest.raises(ConfigError, match="no NCCL"):
            TorchDistLink(0, 1, "nccl", store=tmp_path / "store")


@pytest.mark.multiprocess
def test_what_torch_cannot_combine_is_not_blamed_on_a_rank() -> None:
    def fn(link: Link) -> str:
        with pytest.raises(RuntimeError, match="complex"):
            link.all_reduce([torch.ones(3, dtype=torch.complex64)], "max")
        with pytest.raises(CommError) as caught:
            link.barrier()
        return str(caught.value)

    for outcome in CARRIERS["gloo"](2)(fn):
        assert "broken off" in outcome.get()
