"""What "the same state" means here: equal types, equal keys in equal order, equal bits."""

from __future__ import annotations

from typing import Any

import torch


def assert_same(a: Any, b: Any, at: str = "state") -> None:
    if isinstance(a, torch.Tensor):
        assert isinstance(b, torch.Tensor), at
        assert (a.dtype, a.shape, a.layout) == (b.dtype, b.shape, b.layout), at
        if a.layout is torch.sparse_coo:
            assert a.is_coalesced() == b.is_coalesced(), at
            assert_same(a._indices(), b._indices(), at)
            assert_same(a._values(), b._values(), at)
        else:
            assert bits(a) == bits(b), at
        return
    assert type(a) is type(b), f"{at}: {type(a)} and {type(b)}"
    if isinstance(a, dict):
        assert list(a) == list(b), at
        assert [type(key) for key in a] == [type(key) for key in b], at
        for key in a:
            assert_same(a[key], b[key], f"{at}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), at
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{at}.{i}")
    else:
        assert repr(a) == repr(b), at  # repr tells -0.0 from 0.0, and nan is nan


def bits(tensor: torch.Tensor) -> list[int]:
    plain = tensor.detach().clone(memory_format=torch.contiguous_format).resolve_conj().resolve_neg()
    return plain.reshape(-1).view(torch.uint8).tolist()
