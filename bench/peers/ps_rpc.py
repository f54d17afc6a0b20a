"""A parameter server over torch.distributed.rpc, as its tutorials have it: a worker sends its gradient, the server steps in place and sends
the parameters back. Prints one JSON list: seconds of each push and pull of worker 0, after a warm-up.

TensorPipe is told what was quickest inside one host of two cores: calls over a socket, tensors from memory to memory (cross-memory attach). Left
to itself it sends calls through shared memory, and 25 MB took it twice as long.

    python ps_rpc.py NUMEL WORKERS REPEATS
"""

from __future__ import annotations

import json
import os
import socket
import sys
import time

import torch
import torch.distributed.rpc as rpc
import torch.multiprocessing as mp

WARM_UP = 5


class Server:
    """One thread carries out calls, one after the other: no lock. What is returned is sent as it is by then, and not copied first."""

    def __init__(self, numel: int) -> None:
        self.parameters = torch.zeros(numel)

    def step(self, gradient: torch.Tensor) -> torch.Tensor:
        self.parameters.add_(gradient, alpha=-0.01)
        return self.parameters


SERVER: Server | None = None


def push_pull(gradient: torch.Tensor) -> torch.Tensor:
    assert SERVER is not None
    return SERVER.step(gradient)


def member(rank: int, numel: int, workers: int, repeats: int, port: int) -> None:
    global SERVER
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    SERVER = Server(numel) if rank == 0 else None
    options = rpc.TensorPipeRpcBackendOptions(
        num_worker_threads=1 if rank == 0 else 4, rpc_timeout=120, _transports=["uv"], _channels=["cma", "basic"]
    )
    rpc.init_rpc(f"member{rank}", rank=rank, world_size=workers + 1, rpc_backend_options=options)
    if rank:
        gradient, seconds = torch.ones(numel), []
        for _ in range(WARM_UP + repeats):
            begun = time.perf_counter()
            rpc.rpc_sync("member0", push_pull, (gradient,))
            seconds.append(time.perf_counter() - begun)
        if rank == 1:
            print(json.dumps(seconds[WARM_UP:]), flush=True)
    rpc.shutdown()


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


if __name__ == "__main__":
    numel, workers, repeats = map(int, sys.argv[1:])
    mp.spawn(member, (numel, workers, repeats, free_port()), nprocs=workers + 1)
