"""A training set in many files that need not fit into memory: counted once, dealt to workers by shard, read part by part.

A record has a number, and the order in which numbers are drawn (``shard_sampler``) keeps close what lies close: a reader
that holds GROUP parts reads every part once an epoch. So the shuffle needs no state beside the place in that order.
"""

from __future__ import annotations

import glob
import os
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any, BinaryIO

import msgspec
import numpy as np

from weft.data.formats import BY_SUFFIX, Block, Columns, FileIndex, Format
from weft.data.partition import Indices
from weft.errors import ConfigError, DataError

GROUP = 16  # parts that are shuffled together, and in memory together
MB = 1 << 20


class Index(msgspec.Struct, frozen=True):
    """What was counted, and how it is cut: JSON-able, made once and carried to every worker, who opens only what it reads."""

    schema: dict[str, Any]
    split: int
    files: list[FileIndex]
    format: str = ""
    buffer_bytes: int = 0

    @property
    def num_records(self) -> int:
        return sum(sum(file.counts) for file in self.files)

    def shards(self) -> list[list[int]]:
        """The parts of each shard, by number; parts are numbered through all files."""
        shards, first = [], 0
        for file in self.files:
            parts = len(file.counts)
            num = min(self.split, parts)
            shards += [list(range(first + parts * k // num, first + parts * (k + 1) // num)) for k in range(num)]
            first += parts
        return shards

    def part_sizes(self) -> list[int]:
        return [count for file in self.files for count in file.counts]

    def digest(self) -> str:
        """Of everything that the order of records depends on."""
        return blake2b(msgspec.json.encode(self), digest_size=8).hexdigest()


class Shards:
    """Files of records as a data set of a task: ``data()`` may return it for training and for what is held out.

        Shards("corpus/*.npy")
        Shards("clicks-*.parquet", batch_transform=lambda columns: (features(columns), columns["clicked"]))

    ``paths``: a file, a glob, or several. ``format``: by the suffix (.npy, .csv, .parquet; .txt and .jsonl: lines), or
    one of weft.data.formats. Each file is one shard, and a shard is read by one worker; ``split`` cuts every file into so
    many shards. ``buffer_mb``: bytes of files that one worker holds and shuffles (text, CSV and Parquet take several
    times as much once decoded).

    A record is a row of the array; a dict of column values; a line. ``transform(record)`` makes it an example, which the
    task's ``collate`` (torch's by default) joins to batches. ``batch_transform(records)`` is the faster way: it gets
    many at once (an array; a dict of arrays; an object array of str) and returns the batch. With neither, and no
    ``collate``, the batch is that array or dict as tensors, and text as lists.

    Raises ConfigError for arguments that cannot be; DataError, when the files are looked at, for what is in them.
    """

    def __init__(
        self,
        paths: str | Path | Iterable[str | Path],
        *,
        format: Format | None = None,
        transform: Callable[[Any], Any] | None = None,
        batch_transform: Callable[[Any], Any] | None = None,
        split: int = 1,
        buffer_mb: float = 64.0,
    ) -> None:
        if transform is not None and batch_transform is not None:
            raise ConfigError("Shards: transform (a record) and batch_transform (many) do the same: give one of them.")
        if split < 1:
            raise ConfigError(f"Shards: split={split} is not possible: 1 (a file is a shard) or more.")
        if not buffer_mb > 0:
            raise ConfigError(f"Shards: buffer_mb={buffer_mb} is not possible: give a positive number of megabytes.")
        given = [paths] if isinstance(paths, (str, Path)) else list(paths)
        if not given:
            raise ConfigError("Shards: no paths were given.")
        self.paths = [os.fspath(path) for path in given]
        self.format, self.transform, self.batch_transform = format, transform, batch_transform
        self.split, self.buffer_bytes = split, int(buffer_mb * MB)

    def files(self) -> list[str]:
        """The files of ``paths``, absolute, sorted within each glob. Raises DataError for a path or glob without any."""
        found: list[str] = []
        for path in self.paths:
            is_glob = glob.has_magic(path) and not os.path.exists(path)
            some = sorted(filter(os.path.isfile, glob.glob(path, recursive=True))) if is_glob else [path]
            if not some:
                raise DataError(
                    f"no file matches {path!r} (looked from {os.getcwd()}): mend the glob, or make the files."
                )
            found += [os.path.abspath(one) for one in some]
        if len(set(found)) < len(found):
            twice = next(path for path in found if found.count(path) > 1)
            raise DataError(f"{twice} is named twice among the shards: its records would count twice. Name it once.")
        return found

    def scan(self) -> Index:
        """Count every file's records: a look at the header where it tells, else one pass in bounded memory."""
        paths = self.files()
        format = self._format(paths)
        most = max(1, self.buffer_bytes // GROUP)
        schema: dict[str, Any] | None = None
        entries: list[FileIndex] = []
        for path in paths:
            with open_shard(path) as file:
                stat = os.fstat(file.fileno())
                # twice as many parts as shards, so that there are enough wherever records end
                part_bytes = max(1, min(most, stat.st_size // (2 * self.split)))
                scan = format.scan(file, path, part_bytes, most)
            schema = scan.schema if schema is None else format.join(schema, scan.schema, (entries[0].path, path))
            entries.append(FileIndex(path, stat.st_size, stat.st_mtime_ns, scan.cuts, scan.counts))
        assert schema is not None
        index = Index(schema, self.split, entries, format.name, self.buffer_bytes)
        if index.num_records == 0:
            raise DataError(f"{_these(paths)} hold no records: there is nothing to read.")
        return index

    def same(self, known: Index) -> Index:
        """``known`` again, if the files are still those: nothing is counted anew. Raises DataError naming what changed, and
        ConfigError if they are to be cut in another way."""
        for what, old, new in (
            ("split", known.split, self.split),
            ("buffer_mb", known.buffer_bytes / MB, self.buffer_bytes / MB),
        ):
            if old != new:
                raise ConfigError(
                    f"Shards: the run began with {what}={old:g}, and {what}={new:g} would change the order of its records: "
                    f"resume with {what}={old:g}, or start a new run."
                )
        for file in known.files:
            if not os.path.exists(file.path):
                raise DataError(
                    f"{file.path} has vanished since the run began: put it back (it had {file.size} bytes and "
                    f"{sum(file.counts)} records), or start a new run."
                )
        now, then = self.files(), {file.path for file in known.files}
        if added := [path for path in now if path not in then]:
            raise DataError(
                f"{added[0]} was not among the shards when the run began: a run goes on with the data it began with. "
                "Take the file away, or start a new run."
            )
        if left := sorted(then - set(now)):
            raise DataError(
                f"{left[0]} was among the shards when the run began, and is not any more: give the same paths, or start a new run."
            )
        for file in known.files:
            with open_shard(file.path) as opened:
                check_unchanged(opened, file)
        return known

    def _format(self, paths: Sequence[str]) -> Format:
        if self.format is not None:
            return self.format
        suffixes = sorted({Path(path).suffix.lower() for path in paths})
        if len(suffixes) > 1:
            raise DataError(
                f"shards of one set are of one format, and these end in {', '.join(suffixes)}: narrow the glob."
            )
        if suffixes[0] not in BY_SUFFIX:
            raise DataError(
                f"{paths[0]} does not tell its format by its name: known are {', '.join(BY_SUFFIX)}. Give another as "
                "Shards(..., format=weft.data.formats.Lines())."
            )
        return BY_SUFFIX[suffixes[0]]

    def __repr__(self) -> str:
        return f"Shards({_these(self.paths)})"


class Reader:
    """The records of ``Shards`` by number, with at most GROUP parts in memory: made for an order that keeps close what
    lies close. Opens a file only while it reads a part of it, and sees that the file is still the one counted."""

    def __init__(self, shards: Shards, index: Index) -> None:
        self.shards, self.index = shards, index
        self.format = shards._format([file.path for file in index.files])
        self._first = np.cumsum([0, *index.part_sizes()])  # (parts + 1,) number of each part's first record
        self._file_first = np.cumsum([0, *(len(file.counts) for file in index.files)])  # and of each file's first part
        self._blocks: OrderedDict[int, Block] = OrderedDict()  # newest last

    def __len__(self) -> int:
        return int(self._first[-1])

    def __getitem__(self, number: int) -> Any:
        if not 0 <= number < len(self):
            raise IndexError(f"record {number} of {len(self)}")
        return self.__getitems__([number])[0]

    def __getitems__(self, numbers: Sequence[int]) -> list[Any]:
        """Examples: records after ``transform``."""
        records = each(self.records(np.asarray(numbers, np.int64)))
        transform = self.shards.transform
        return records if transform is None else [transform(record) for record in records]

    def records(self, numbers: Indices) -> Columns:
        """Records (k,) in the order asked for, as the format gives them: an array, or a dict of arrays."""
        part = np.searchsorted(self._first, numbers, side="right") - 1
        distinct, begin = np.unique(part, return_index=True)
        pieces: list[tuple[Indices, Columns]] = []
        for one in distinct[np.argsort(begin)].tolist():  # as they first occur: what is needed no more goes first
            places = np.flatnonzero(part == one)
            pieces.append((places, self._block(one).take(numbers[places] - self._first[one])))
        return assemble(pieces, len(numbers))

    def _block(self, part: int) -> Block:
        if part in self._blocks:
            self._blocks.move_to_end(part)
            return self._blocks[part]
        while len(self._blocks) >= GROUP:
            self._blocks.popitem(last=False)
        which = int(np.searchsorted(self._file_first, part, side="right")) - 1
        entry = self.index.files[which]
        with open_shard(entry.path) as file:
            check_unchanged(file, entry)
            block = self.format.read(file, entry, part - int(self._file_first[which]), self.index.schema)
        self._blocks[part] = block
        return block


def open_shard(path: str) -> BinaryIO:
    try:
        return open(path, "rb")
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}.") from error


def check_unchanged(file: BinaryIO, entry: FileIndex) -> None:
    stat = os.fstat(file.fileno())
    if (stat.st_size, stat.st_mtime_ns) != (entry.size, entry.mtime_ns):
        what = f"it has {stat.st_size} bytes" if stat.st_size != entry.size else "it was written again"
        raise DataError(
            f"{entry.path} has changed since its records were counted at the start of the run (then {entry.size} bytes; "
            f"now {what}): bring the old file back, or start a new run."
        )


def assemble(pieces: Sequence[tuple[Indices, Columns]], total: int) -> Columns:
    """Put the pieces' records at their places of one array, or of one array per column."""
    if len(pieces) == 1:
        return pieces[0][1]  # its places are 0, 1, ...
    like = pieces[0][1]
    if isinstance(like, dict):
        return {name: assemble([(places, piece[name]) for places, piece in pieces], total) for name in like}
    out = np.empty((total, *like.shape[1:]), like.dtype)
    for places, piece in pieces:
        out[places] = piece
    return out


def each(columns: Columns) -> list[Any]:
    """Records one by one."""
    if isinstance(columns, dict):
        return [dict(zip(columns, values)) for values in zip(*columns.values())]
    return list(columns)


def _these(paths: Sequence[str]) -> str:
    return paths[0] if len(paths) == 1 else f"{paths[0]} and {len(paths) - 1} more"
