"""Every carrier obeys every law of a Link, at worlds 1 to 4."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.variants import rest_slow

from weft.comm.collectives import RingLink
from weft.comm.inproc import inproc_endpoints
from weft.comm.link import Link
from weft.comm.tcp import TcpEndpoint, listen
from weft.comm.torchdist import TorchDistLink
from weft.cost import COLLECTIVES
from weft.testing.conformance import LAWS, Make, in_processes, in_threads


def connect_inproc(rank: int, world: int, endpoints: Any, deadline_s: float, collective: str = "auto") -> Link:
    endpoints[rank].deadline_s = deadline_s
    return RingLink(endpoints[rank], rank, world, "inproc", deadline_s, collective=collective)


def connect_tcp(rank: int, world: int, listeners: Any, deadline_s: float, collective: str = "auto") -> Link:
    addresses = {k: sock.getsockname() for k, sock in enumerate(listeners)}
    for k, sock in enumerate(listeners):
        if k != rank:
            sock.close()
    endpoint = TcpEndpoint(rank, listeners[rank], addresses, deadline_s)
    return RingLink(endpoint, rank, world, "tcp", deadline_s, collective=collective)


def connect_gloo(rank: int, world: int, folder: Any, deadline_s: float) -> Link:
    return TorchDistLink(rank, world, store=Path(folder.name) / "store", deadline_s=deadline_s)


def tcp(collective: str = "auto") -> Make:
    return in_processes(
        functools.partial(connect_tcp, collective=collective),
        prepare=lambda world: [listen() for _ in range(world)],
        clean_up=lambda listeners: [sock.close() for sock in listeners],
    )


def inproc(collective: str = "auto") -> Make:
    return in_threads(functools.partial(connect_inproc, collective=collective), inproc_endpoints)


CARRIERS: dict[str, Make] = {
    "inproc": inproc(),
    "tcp": tcp(),
    "gloo": in_processes(
        connect_gloo,
        prepare=lambda world: tempfile.TemporaryDirectory(),
        clean_up=lambda folder: folder.cleanup(),
    ),
}


@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
@pytest.mark.parametrize(
    "carrier", ["inproc", *(pytest.param(name, marks=pytest.mark.multiprocess) for name in ("tcp", "gloo"))]
)
def test_carrier_obeys(carrier: str, law: Callable[[Make, int], None], world: int) -> None:
    law(CARRIERS[carrier], world)


@pytest.mark.parametrize("world", rest_slow([5, 2, 3, 4]))
@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
@pytest.mark.parametrize("algorithm", COLLECTIVES)
def test_algorithm_obeys(algorithm: str, law: Callable[[Make, int], None], world: int) -> None:
    law(inproc(algorithm), world)


@pytest.mark.multiprocess
@pytest.mark.parametrize("world", rest_slow([3, 2, 4, 5]))
@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
@pytest.mark.parametrize("algorithm", rest_slow(["halving", "tree", "ring", "direct"]))
def test_algorithm_obeys_over_tcp(algorithm: str, law: Callable[[Make, int], None], world: int) -> None:
    law(tcp(algorithm), world)
