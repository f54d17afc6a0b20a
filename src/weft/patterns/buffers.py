"""Buffers that a training step writes to (BatchNorm's statistics), where a step must not."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, nn

#: Of a module, and the name in it.
Place = tuple[dict[str, Tensor | None], str]


def places(model: nn.Module, names: Collection[str]) -> dict[str, list[Place]]:
    """Where each stands; one that several modules share at several."""
    of = {id(b): n for n, b in model.named_buffers() if n in names}
    found: dict[str, list[Place]] = {n: [] for n in of.values()}
    for module in model.modules():
        for key, buffer in module._buffers.items():
            if id(buffer) in of:
                found[of[id(buffer)]].append((module._buffers, key))
    return found


@contextmanager
def aside(buffers: Sequence[Place]) -> Iterator[None]:
    """What is written to them meanwhile is lost."""
    kept = [of[name] for of, name in buffers]
    for of, name in buffers:
        of[name] = torch.clone(cast(Tensor, of[name]))
    try:
        yield
    finally:
        for (of, name), buffer in zip(buffers, kept, strict=True):
            of[name] = buffer
