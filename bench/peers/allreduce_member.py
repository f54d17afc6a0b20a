"""One rank of a contender of allreduce.py, or for Weft all of them. It does what it is told over a Unix socket, a line of JSON at a time.

    {"way": "gloo", "nbytes": 1024, "calls": 50, "batches": 5}  ->  {"seconds": [of a call, in each batch]}

A batch: fill the buffer, barrier, the calls under the clock, compare. Rank r begins with i % 251 + r at element i, so that one call
gives S = world * (i % 251) + world (world - 1) / 2, and each further one the same times ``world``, a power of two: every float32 is
exact, and what is compared is what was timed.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import socket
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

PERIOD = 251
PIECE = 1 << 18  # elements filled and compared at a time: a multiple of PERIOD would hide a shift
GLOO_THREADS = (2, 1, 4)  # 2 is torch's default


class Way(NamedTuple):
    """``array`` is the contender's memory; ``call`` reduces the first bytes of it, made once for each size."""

    array: np.ndarray
    call: Callable[[int], Callable[[], object]]
    barrier: Callable[[], object]
    check: Callable[[np.ndarray, int], None] | None = None  # other than that of an all-reduce; (of the size, calls)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("contender", choices=["weft", "gloo", "mpi", "deepspeed"])
    parser.add_argument("--socket", required=True, help="where to connect to")
    parser.add_argument("--world", type=int, required=True)
    parser.add_argument("--rank", type=int, help="mpirun knows it, Weft forks them all")
    parser.add_argument("--nbytes", type=int, required=True, help="of the largest buffer")
    parser.add_argument(
        "--port", type=int, default=0, help="where Gloo's ranks meet; part of the name of DeepSpeed's memory"
    )
    args = parser.parse_args()
    {"weft": weft, "gloo": gloo, "mpi": mpi, "deepspeed": deepspeed}[args.contender](args)


def ordinary(nbytes: int) -> np.ndarray:
    """numpy asks the kernel for huge pages, torch does not."""
    return np.zeros(nbytes // 4, np.float32)


# -- the contenders


def weft(args: argparse.Namespace) -> None:
    """Ways: heap, ordinary (tensors outside the link's own memory), tcp, and copy: ranks 0 and 1 copy the bytes at once."""
    import torch

    from weft.comm.collectives import RingLink
    from weft.comm.shm import Region, ShmLink
    from weft.comm.tcp import TcpEndpoint, listen

    torch.set_num_threads(1)
    region = Region.create(args.world, args.nbytes)
    listeners = [listen() for _ in range(args.world)]
    addresses = {rank: each.getsockname() for rank, each in enumerate(listeners)}

    def rank_of(rank: int) -> None:
        for other, listener in enumerate(listeners):
            if other != rank:
                listener.close()
        shm = ShmLink(region, rank)
        tcp = RingLink(TcpEndpoint(rank, listeners[rank], addresses), rank, args.world)
        heap = shm.allocate(args.nbytes // 4, torch.float32)
        plain = torch.from_numpy(ordinary(args.nbytes))
        into = ordinary(args.nbytes)

        def way(link: Any, tensor: torch.Tensor) -> Way:
            def call(nbytes: int) -> Callable[[], object]:
                return functools.partial(link.all_reduce, [tensor[: nbytes // 4]])

            return Way(tensor.numpy(), call, link.barrier)

        def copy(nbytes: int) -> Callable[[], object]:
            if rank > 1:
                return lambda: None
            return functools.partial(np.copyto, into[: nbytes // 4], plain.numpy()[: nbytes // 4])

        def copied(array: np.ndarray, calls: int) -> None:
            if rank < 2 and not np.array_equal(into[: len(array)], array):
                raise AssertionError("the copy differs")

        serve(
            args,
            rank,
            {
                "heap": way(shm, heap),
                "ordinary": way(shm, plain),
                "tcp": way(tcp, plain),
                "copy": Way(plain.numpy(), copy, shm.barrier, copied),
            },
        )

    children = []
    for rank in range(args.world):
        child = os.fork()
        if child == 0:
            try:
                rank_of(rank)
                os._exit(0)
            except BaseException as error:
                print(f"rank {rank}: {error!r}", file=sys.stderr, flush=True)
                os._exit(1)
        children.append(child)
    sys.exit(max(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children))


def gloo(args: argparse.Namespace) -> None:
    """Ways: gloo, and gloo-T for a process group with T threads, called without torch.distributed's Python."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", args.port, args.world, is_master=args.rank == 0)
    dist.init_process_group("gloo", store=store, rank=args.rank, world_size=args.world)
    tensor = torch.from_numpy(ordinary(args.nbytes))

    def by_dist(nbytes: int) -> Callable[[], object]:
        return functools.partial(dist.all_reduce, tensor[: nbytes // 4])

    ways = {"gloo": Way(tensor.numpy(), by_dist, dist.barrier)}
    for threads in GLOO_THREADS:
        options = dist.ProcessGroupGloo._Options()
        options._devices = [dist.ProcessGroupGloo.create_device(hostname="127.0.0.1")]
        options._threads = threads
        group = dist.ProcessGroupGloo(dist.PrefixStore(str(threads), store), args.rank, args.world, options)

        def by_group(nbytes: int, group: Any = group) -> Callable[[], object]:
            buffers = [tensor[: nbytes // 4]]
            return lambda: group.allreduce(buffers).wait()

        ways[f"gloo-{threads}"] = Way(tensor.numpy(), by_group, dist.barrier)
    serve(args, args.rank, ways)
    os._exit(0)  # torch 2.13 at times aborts while it takes Gloo's threads down


def mpi(args: argparse.Namespace) -> None:
    from mpi4py import MPI

    world = MPI.COMM_WORLD
    array = ordinary(args.nbytes)

    def call(nbytes: int) -> Callable[[], object]:
        return functools.partial(world.Allreduce, MPI.IN_PLACE, array[: nbytes // 4])

    serve(args, world.rank, {"mpi": Way(array, call, world.Barrier)})


def deepspeed(args: argparse.Namespace) -> None:
    os.environ |= {"DS_ACCELERATOR": "cpu", "LOCAL_SIZE": str(args.world)}
    os.environ |= {"MASTER_ADDR": "weft-bench", "MASTER_PORT": str(args.port)}  # names of its memory in /dev/shm
    import torch
    from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder

    torch.set_num_threads(1)
    op = ShareMemCommBuilder().load(verbose=False)
    op.initialize(args.world, args.rank)
    if op.vector_kernel_level() < 1:
        raise SystemExit("DeepSpeed's shared-memory all-reduce of float32 needs AVX2")
    tensor, small = torch.from_numpy(ordinary(args.nbytes)), torch.zeros(16)
    reduce = torch.ops.deepspeed.inference_all_reduce_

    def call(nbytes: int) -> Callable[[], object]:
        return functools.partial(reduce, tensor[: nbytes // 4])

    serve(args, args.rank, {"deepspeed": Way(tensor.numpy(), call, functools.partial(reduce, small))})


# -- what all do


def serve(args: argparse.Namespace, rank: int, ways: Mapping[str, Way]) -> None:
    """Until the other side is gone."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(args.socket)
        lines = sock.makefile("rw")

        def say(answer: dict[str, Any]) -> None:
            lines.write(json.dumps(answer) + "\n")
            lines.flush()

        say({"rank": rank, "ways": list(ways)})
        for line in lines:
            wanted = json.loads(line)
            try:
                way = ways[wanted["way"]]
                seconds = measure(way, rank, args.world, wanted["nbytes"], wanted["calls"], wanted["batches"])
                say({"seconds": seconds})
            except Exception as error:
                say({"error": f"rank {rank}, {line.strip()}: {error!r}"})
                raise


def measure(way: Way, rank: int, world: int, nbytes: int, calls: int, batches: int) -> list[float]:
    """Seconds of a call in each batch; one more goes before, untold."""
    array, call, seconds = way.array[: nbytes // 4], way.call(nbytes), []
    for _ in range(1 + batches):
        for start, numbers in pieces(len(array)):
            np.add(numbers, rank, out=array[start : start + PIECE])
        way.barrier()
        begin = time.perf_counter()
        for _ in range(calls):
            call()
        seconds.append((time.perf_counter() - begin) / calls)
        (way.check or functools.partial(check_sum, world))(array, calls)
    return seconds[1:]


def check_sum(world: int, array: np.ndarray, calls: int) -> None:
    for start, numbers in pieces(len(array)):
        truth = (numbers * world + world * (world - 1) // 2) * np.float32(world) ** (calls - 1)
        if not np.array_equal(truth, array[start : start + PIECE]):
            raise AssertionError(f"wrong sum among elements {start} to {start + len(truth) - 1}")


NUMBERS = (np.arange(PIECE + PERIOD) % PERIOD).astype(np.float32)


def pieces(numel: int) -> list[tuple[int, np.ndarray]]:
    """(start, i % PERIOD for the elements i from there on)."""
    return [(start, NUMBERS[start % PERIOD :][: min(PIECE, numel - start)]) for start in range(0, numel, PIECE)]


if __name__ == "__main__":
    main()
