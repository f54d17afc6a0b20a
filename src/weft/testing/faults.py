"""Faults as sentences: ``kill(rank=2, step=5)``."""

from weft.comm.wrappers import (
    Fault,
    FaultyLink,
    corrupt,
    delay,
    drop,
    freeze,
    kill,
    raise_error,
    slow,
    slow_loading,
    throttle,
)

__all__ = [
    "Fault",
    "FaultyLink",
    "corrupt",
    "delay",
    "drop",
    "freeze",
    "kill",
    "raise_error",
    "slow",
    "slow_loading",
    "throttle",
]
