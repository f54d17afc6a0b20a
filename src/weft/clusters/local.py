"""Supervised processes on this machine, forked from one zygote. The default cluster."""

from __future__ import annotations

from collections.abc import Sequence

from weft.clusters.base import Cluster
from weft.clusters.processes import ProcessSession
from weft.cost import HIERARCHICAL
from weft.errors import Incompatible


class Local(Cluster):
    name = "local"

    def open(self, preload: Sequence[str]) -> ProcessSession:
        return ProcessSession(preload)

    def check(self, carrier: str) -> None:
        if carrier == "inproc":
            raise Incompatible("link 'inproc' joins threads, not processes: use --cluster inprocess, or --link shm.")
        if carrier == HIERARCHICAL:
            raise Incompatible("link 'hierarchical' joins several hosts, and there is one: use --link shm.")
        if carrier == "shm":
            from weft.comm.shm import supported

            if why := supported():
                raise Incompatible(f"link 'shm' does not work here ({why}): use --link tcp.")

    def default_carrier(self, world: int, device: str) -> tuple[str, str]:
        from weft.comm.shm import supported

        if world == 1:
            return "none", "one worker has nobody to talk to"
        if device == "cuda":
            return "nccl", "gradients on GPUs"
        if why := supported():
            return "tcp", f"no shared memory: {why}"
        return "shm", "all workers on one host: gradients live in shared memory"
