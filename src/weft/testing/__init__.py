"""For those who test: faults as sentences, ``weft.run(..., faults=[kill(rank=2, step=5)])``; laws of a Link (conformance);
hosts of their own network on one machine (hosts)."""

from weft.comm.wrappers import (
    Fault,
    FaultyLink,
    corrupt,
    delay,
    drop,
    freeze,
    kill,
    raise_error,
    skip,
    slow,
    slow_loading,
    throttle,
)
from weft.testing.hosts import Host, hosts

__all__ = [
    "Fault",
    "FaultyLink",
    "Host",
    "corrupt",
    "delay",
    "drop",
    "freeze",
    "hosts",
    "kill",
    "raise_error",
    "skip",
    "slow",
    "slow_loading",
    "throttle",
]
