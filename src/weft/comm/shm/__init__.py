"""A Link for the ranks of one host: collectives in a shared memory map, with no copy through the kernel.

Buffers from ``allocate`` live in the map, at the same heap offset on every rank. All-reduce of n bytes over p ranks:
sync; rank r combines chunk r of all ranks, in rank order, in blocks that fit its cache and, while they are there,
writes them back to every rank; sync. Each rank reads n bytes and writes n bytes whatever p is. Small messages need one
sync. Ordinary tensors pass through a scratch area and cost a copy in and a copy out more.

The order of stores is all that guards the memory: a rank stores its data, then its counter; who sees the counter sees
the data. x86-64 keeps that order without fences (Intel SDM 3A, 8.2.2), other machines do not: see ``supported``.

Endpoints of one host exchange large payloads through the same kind of map (endpoint.py).

Read region.py (the memory), link.py (calls, syncs, errors), plan.py (what a call does where), arrays.py (the sums).
"""

from weft.comm.shm.endpoint import ShmEndpoint
from weft.comm.shm.link import ShmLink
from weft.comm.shm.region import Region, supported

__all__ = ["Region", "ShmEndpoint", "ShmLink", "supported"]
