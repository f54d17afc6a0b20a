"""Where runs run. Quick to import: the zygote is to be under way before anything else."""

from __future__ import annotations

from weft.clusters.base import Cluster
from weft.errors import UnknownName

PRELOAD = ("weft.member",)  # what members import, as every session is told


def pick_cluster(cluster: Cluster | str) -> Cluster:
    if isinstance(cluster, Cluster):
        return cluster
    if cluster == "local":
        from weft.clusters.local import Local

        return Local()
    if cluster == "inprocess":
        from weft.clusters.inprocess import InProcess

        return InProcess()
    raise UnknownName.of("cluster", cluster, ("local", "inprocess"))
