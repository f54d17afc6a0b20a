"""A parameter server as a Ray actor: a worker's gradient and the new parameters travel through the object store, in shared memory.
Prints one JSON list: seconds of each push and pull of worker 0, after a warm-up.

    python ps_ray.py NUMEL WORKERS REPEATS
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
import warnings

import numpy as np

WARM_UP = 5

os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_DEDUP_LOGS": "0", "OMP_NUM_THREADS": "1"}
import ray  # noqa: E402


@ray.remote(num_cpus=1)
class Server:
    """Calls to an actor run one after the other: no lock, no half-done step in what is returned."""

    def __init__(self, numel: int) -> None:
        import torch

        torch.set_num_threads(1)
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        self.parameters = torch.zeros(numel)

    def push_pull(self, gradient: np.ndarray) -> np.ndarray:
        """``gradient`` is a read-only look into the object store; what is returned is copied there, once."""
        import torch

        self.parameters.add_(torch.from_numpy(gradient), alpha=-0.01)
        return self.parameters.numpy()


@ray.remote(num_cpus=1)
class Worker:
    def __init__(self, server: ray.actor.ActorHandle, numel: int) -> None:
        self.server, self.gradient = server, np.ones(numel, np.float32)

    def ready(self) -> None:
        pass

    def work(self, repeats: int) -> list[float]:
        seconds = []
        for _ in range(WARM_UP + repeats):
            begun = time.perf_counter()
            # small ones go with the call itself, others as by ray.put
            parameters = ray.get(self.server.push_pull.remote(self.gradient))
            seconds.append(time.perf_counter() - begun)
            del parameters  # else the store keeps it
        return seconds[WARM_UP:]


def main(numel: int, workers: int, repeats: int) -> None:
    ray.init(
        num_cpus=workers + 1,
        object_store_memory=max(512 << 20, (workers + 1) * 16 * 4 * numel),
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
    )
    server = Server.remote(numel)
    members = [Worker.remote(server, numel) for _ in range(workers)]
    ray.get([member.ready.remote() for member in members])
    found = ray.get([member.work.remote(repeats) for member in members])
    print(json.dumps(found[0]), flush=True)
    ray.shutdown()


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
