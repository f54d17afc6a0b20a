"""Files to stream, shared by tests: every record carries its number."""

from __future__ import annotations

from pathlib import Path

import numpy as np

FORMATS = ("npy", "csv", "parquet", "lines")


def write_shards(folder: Path, sizes: list[int], kind: str, first: int = 0) -> str:
    """One file for each size, records numbered through all of them; the glob that finds the files."""
    folder.mkdir(parents=True, exist_ok=True)
    suffix = "txt" if kind == "lines" else kind
    for k, size in enumerate(sizes):
        write(folder / f"s{k:03}.{suffix}", np.arange(first, first + size), kind)
        first += size
    return str(folder / f"*.{suffix}")


def write(path: Path, ids: np.ndarray, kind: str) -> Path:
    if kind == "npy":
        np.save(path, np.stack([ids, ids * 2], 1))
    elif kind == "lines":
        path.write_text("".join(f"line {i}{'é' * (i % 5)}\n" for i in ids))
    elif kind == "csv":
        # every third value holds what makes CSV hard: commas, quotes, newlines
        rows = [f'{i},{i / 2},"a, ""b""\nc{i}"' if i % 3 == 0 else f"{i},{i / 2},plain" for i in ids]
        path.write_text("\n".join(["id,half,text", *rows, ""]))
    else:
        import pyarrow as pa
        from pyarrow import parquet

        table = pa.table({"id": ids, "half": ids / 2, "text": pa.array([f"t{i}" for i in ids], pa.string())})
        parquet.write_table(table, path, row_group_size=7)
    return path


def ids_of(records: object) -> list[int]:
    """The numbers that ``write`` put into records."""
    if isinstance(records, dict):
        return [int(i) for i in records["id"]]
    if isinstance(records, np.ndarray) and records.dtype == object:
        return [int(line.split()[1].rstrip("é")) for line in records]
    return [int(i) for i in np.asarray(records)[:, 0]]
