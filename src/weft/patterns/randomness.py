"""Where a worker's random numbers come from.

torch's generators are seeded anew in each step from (seed, "step", rank) and the step: nothing of them is carried along. Python's
and numpy's, which a dataset may use, would cost 20 us a step to seed: they are seeded once and their states saved.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import msgspec
import numpy as np
import torch


def seed_torch(seed: int) -> None:
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed(seed)


def seed_everything(seed: int) -> None:
    """torch's, numpy's and Python's global generators."""
    seed_torch(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


def host_state() -> torch.Tensor:
    """Of Python's and numpy's generators, as bytes (K,) uint8."""
    state = np.random.get_state(legacy=False)
    inner = state["state"]
    parts = (random.getstate(), inner["key"].tobytes(), inner["pos"], state["has_gauss"], state["gauss"])
    return torch.frombuffer(bytearray(msgspec.msgpack.encode(parts)), dtype=torch.uint8)


def set_host_state(saved: torch.Tensor) -> None:
    (version, words, gauss_next), key, pos, has_gauss, gauss = msgspec.msgpack.decode(saved.cpu().numpy().tobytes())
    random.setstate((version, tuple(words), gauss_next))
    np.random.set_state(("MT19937", np.frombuffer(key, np.uint32), pos, has_gauss, gauss))


@contextmanager
def host_state_kept() -> Iterator[None]:
    """What happens inside leaves Python's and numpy's generators as they were."""
    before = host_state()
    try:
        yield
    finally:
        set_host_state(before)
