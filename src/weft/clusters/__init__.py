"""Where runs run. Quick to import: the zygote is to be under way before anything else."""

from __future__ import annotations

import os

from weft.clusters.base import Cluster
from weft.errors import ConfigError, UnknownName

PRELOAD = ("weft.member", "pydantic.main")  # what members import, as every session is told
CLUSTERS = ("auto", "local", "torchrun", "inprocess")


def pick_cluster(cluster: Cluster | str) -> Cluster:
    """``auto``: torchrun where torchrun started this process, else local."""
    if isinstance(cluster, Cluster):
        return cluster
    if cluster == "auto":
        cluster = "torchrun" if under_torchrun() else "local"
    if cluster == "local":
        from weft.clusters.local import Local

        return Local()
    if cluster == "torchrun":
        from weft.clusters.torchrun import Torchrun

        return Torchrun()
    if cluster == "inprocess":
        from weft.clusters.inprocess import InProcess

        return InProcess()
    raise UnknownName.of("cluster", cluster, CLUSTERS)


def pick_carrier(cluster: str, link: str, world: int, device: str) -> tuple[str, str]:
    """What joins the workers, and why. Raises Incompatible where ``link`` cannot work."""
    place = pick_cluster(cluster)
    carrier, why = (link, "asked for") if link != "auto" else place.default_carrier(world, device)
    place.check(carrier)
    return carrier, why


def under_torchrun() -> bool:
    """ConfigError where somebody else started several processes: each would train alone, and none would know."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return True
    if "RANK" in os.environ and os.environ.get("WORLD_SIZE", "1") != "1":
        raise ConfigError(
            f"the environment says that this is process {os.environ['RANK']} of {os.environ['WORLD_SIZE']} (RANK, WORLD_SIZE), "
            "and TORCHELASTIC_RUN_ID, by which torchrun is known, is not set: start by torchrun, or use --cluster local to "
            "train in this process's own workers alone."
        )
    return False


def follows(cluster: str) -> bool:
    """Whether another process than this one tells the user what happens."""
    return cluster == "torchrun" and os.environ.get("RANK") != "0"
