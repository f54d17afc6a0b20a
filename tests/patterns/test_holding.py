"""What a server holds: versions that are read while the next is made, shares that are joined."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from weft import ParameterServer
from weft.comm.buffers import Buffers
from weft.comm.endpoint import Sending
from weft.comm.inproc import inproc_endpoints
from weft.patterns import holding as holding_module
from weft.patterns.holding import Flat, Holding, Pushed, copy_all, moved
from weft.servers.ranges import Piece

SIZES = {"a": 3, "b": 700, "c": 1}


def held(pattern: ParameterServer, dtype: torch.dtype = torch.float32) -> Holding:
    """SGD of rate 1 on three parameters of zeros."""
    flat = Flat([Piece(n, 0, k) for n, k in SIZES.items()], dict.fromkeys(SIZES, dtype), [])
    holding = object.__new__(Holding)
    holding.flat, holding.pattern, holding.version, holding.schedule = flat, pattern, 0, None
    holding.buffers = Buffers(inproc_endpoints(1)[0], flat.nbytes)
    holding.memory, holding.versions = holding.buffers.take(), {}
    holding.values, holding.running = flat.views(holding.memory)
    holding.take(flat.memory(), frozenset(), [])
    holding.stepped = {n: nn.Parameter(v) for n, v in zip(SIZES, holding.values, strict=True)}
    holding.tables = []
    holding.optimizer = torch.optim.SGD(holding.stepped.values(), lr=1.0)
    return holding


def pushed(holding: Holding, value: Any, version: int = 0) -> Pushed:
    memory = holding.flat.memory()
    (whole,) = holding.flat.parameters(memory)
    whole[:] = value
    return Pushed(memory, version, 1.0, 0)


def step(holding: Holding, value: float) -> None:
    holding.join([pushed(holding, value, holding.version)], 1.0)
    holding.step()
    holding.forget([])
    assert all(left is not holding.memory for left in holding.buffers._left), "somebody may write to what is stepped"


def test_a_version_stays_while_it_is_read_and_no_longer() -> None:
    holding = held(ParameterServer())
    read, sending = holding.read(), Sending(1)
    holding.buffers.sent(read, sending)
    step(holding, 1.0)
    assert not read.any(), "it was stepped while it was read"
    later = holding.read()
    assert all(v.eq(-1).all() for v in holding.flat.views(later)[0])
    step(holding, 1.0)
    assert holding.memory is later, "it was copied for nobody"
    assert all(p.eq(-2).all() for p in holding.stepped.values())
    holding.buffers.sent(holding.read(), Sending(2))
    sending.done = True
    step(holding, 1.0)
    assert holding.memory is read, "what is not read any more was not used again"
    assert all(p.eq(-3).all() for p in holding.stepped.values())


def test_dc_keeps_what_was_read_for_as_long_as_it_is_needed() -> None:
    holding = held(ParameterServer(staleness=2, correction="dc"))
    holding.read()
    holding.join([pushed(holding, 1.0)], 1.0)
    holding.step()
    holding.forget([0])
    assert not holding.versions[0].any()
    holding.join([pushed(holding, 1.0, version=0)], 1.0)
    now = holding.summed[list(SIZES).index("b")]
    assert torch.allclose(now, torch.zeros_like(now))
    holding.step()
    holding.forget([])
    assert 0 not in holding.versions


def test_a_share_alone_is_applied_from_where_it_lies() -> None:
    holding, share = held(ParameterServer()), None
    share = pushed(holding, 1.0)
    holding.join([share], 1.0)
    grad = holding.summed[list(SIZES).index("b")]
    address = share.memory.ctypes.data
    assert address <= grad.data_ptr() < address + share.memory.nbytes
    holding.step()
    assert all(p.grad is None for p in holding.stepped.values()), "it still holds the worker's memory"
    for other, factor in ((ParameterServer(clip_norm=1.0), 1.0), (ParameterServer(), 0.5)):
        holding = held(other)
        share = pushed(holding, 2.0)
        holding.join([share], factor)
        holding.step(0.25)
        assert share.memory.any()
        assert all(v.eq(2.0).all() for v in holding.flat.views(share.memory)[0]), "a worker's memory was written to"
        assert holding.stepped["a"].eq(-2.0 * factor * 0.25).all()


@settings(max_examples=40, deadline=None)
@given(
    shares=st.integers(1, 4),
    block=st.sampled_from([1, 7, 1000]),
    factor=st.sampled_from([1.0, 0.3]),
    correction=st.sampled_from(["none", "rate", "dc"]),
    data=st.data(),
)
def test_blocks_join_to_the_same_bits(shares: int, block: int, factor: float, correction: Any, data: Any) -> None:
    pattern = ParameterServer(staleness=4, correction=correction)
    holding = held(pattern)
    dice = np.random.default_rng(shares)
    total = sum(SIZES.values())
    read, now = dice.standard_normal((2, total)).astype(np.float32)
    holding.memory.view(np.float32)[:] = now
    holding.versions = {k: read.copy().view(np.uint8) for k in range(3)}
    holding.version = 2
    each = [(dice.standard_normal(total).astype(np.float32), data.draw(st.integers(0, 2))) for _ in range(shares)]
    given = [pushed(holding, torch.from_numpy(g), version) for g, version in each]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(holding_module, "BLOCK", block)
        holding.join(given, factor)
    truth: Any = None
    for g, version in ((torch.from_numpy(g), v) for g, v in each):
        if correction == "dc" and version < 2:
            g = moved(g, torch.from_numpy(now) - torch.from_numpy(read), pattern.dc_lambda)
        scale = 1.0 / (2 - version + 1) if correction == "rate" else 1.0
        truth = g * scale if truth is None else truth.add(g, alpha=scale)
    found = torch.cat(holding.summed)
    assert torch.equal(found, truth * factor)


@given(st.lists(st.integers(0, 50), max_size=8), st.sampled_from([torch.float32, torch.bfloat16, torch.float64]))
def test_large_and_small_are_copied_alike(sizes: list[int], dtype: torch.dtype) -> None:
    bounds = np.cumsum([0, *sizes]).tolist()
    source = torch.arange(bounds[-1], dtype=torch.float32).to(dtype)
    target = torch.zeros_like(source)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(holding_module, "LARGE", 20 * dtype.itemsize)
        copy_all([target[a:b] for a, b in pairwise(bounds)], [source[a:b] for a, b in pairwise(bounds)])
    assert torch.equal(target, source)
