"""Memory and speed of streaming a generated set ten times its buffer: resident memory at each tenth of an epoch.

    python bench/stream.py [--kind npy] [--buffer-mb 32]

Runs without torch, so that what is measured is the reader's. Beside it the same records in the order of the files, each file
read at once: what reading costs without shuffling.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil

from weft.data.shard_sampler import ShardSampler
from weft.data.shards import MB, Reader, Shards

FILES = 20
ROW = 1024  # float32 numbers, 4 kB


def write_set(folder: Path, kind: str, nbytes: int) -> None:
    rows = nbytes // FILES // ROW // 4
    for k in range(FILES):
        data = np.random.default_rng(k).random((rows, ROW), np.float32)
        if kind == "npy":
            np.save(folder / f"{k}.npy", data)
        elif kind == "parquet":
            import pyarrow as pa
            from pyarrow import parquet

            table = pa.table({"id": np.arange(rows), "x": [row.tobytes() for row in data]})
            parquet.write_table(table, folder / f"{k}.parquet", row_group_size=128)
        else:
            lines = (f"{i},{row.tobytes().hex()[: ROW * 4]}\n" for i, row in enumerate(data))
            (folder / f"{k}.{kind}").write_text(("id,x\n" if kind == "csv" else "") + "".join(lines))


def resident_mb() -> float:
    return psutil.Process().memory_info().rss / MB


def measure(kind: str, buffer_mb: float) -> None:
    with tempfile.TemporaryDirectory() as folder:
        write_set(Path(folder), kind, int(10 * buffer_mb * MB))
        total = sum(file.stat().st_size for file in Path(folder).iterdir()) / MB
        begun = time.perf_counter()
        shards = Shards(f"{folder}/*", buffer_mb=buffer_mb)
        index = shards.scan()
        counted = time.perf_counter() - begun
        before = resident_mb()
        sampler, reader = ShardSampler(index, 32, 0, 1, 0), Reader(shards, index)
        curve = []
        begun = time.perf_counter()
        for step in range(sampler.steps_per_epoch):
            reader.records(sampler.next().indices)
            if (step + 1) % max(1, sampler.steps_per_epoch // 10) == 0:
                curve.append(resident_mb() - before)
        streamed = time.perf_counter() - begun
        begun = time.perf_counter()
        for file in Path(folder).iterdir():
            file.read_bytes()
        read = time.perf_counter() - begun
        print(
            f"{kind:8} {total:6.0f} MB  counted in {counted:.2f} s  streamed at {total / streamed:5.0f} MB/s "
            f"(the files alone {total / read:5.0f})  resident over the start, MB: {' '.join(f'{mb:.0f}' for mb in curve)}"
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--buffer-mb", type=float, default=32.0)
    parser.add_argument("--kind", choices=["npy", "parquet", "csv", "txt"], default="npy")
    arguments = parser.parse_args()
    measure(arguments.kind, arguments.buffer_mb)
