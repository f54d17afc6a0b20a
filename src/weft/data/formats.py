"""File formats of shards. One bounded pass counts a file's records and cuts it into parts of about equal bytes; afterwards
any part is read by itself, so that memory follows the size of a part and never that of a file.

``cuts`` of a file are where its parts begin, and the end (bytes; for Parquet row groups); ``counts`` their records.
"""

from __future__ import annotations

import csv
import io
import math
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, BinaryIO, ClassVar, Protocol

import msgspec
import numpy as np
import numpy.typing as npt

from weft.data.partition import Indices
from weft.errors import ConfigError, DataError

CHUNK = 1 << 20  # bytes of a file that a scan looks at together

#: Records side by side: an array whose first axis counts them, or one such array per column. Text is an object array.
Columns = Any


class FileIndex(msgspec.Struct, frozen=True):
    """One file as it was when its records were counted."""

    path: str
    size: int
    mtime_ns: int
    cuts: list[int]  # (parts + 1,)
    counts: list[int]  # (parts,)


class Scan(msgspec.Struct, frozen=True):
    schema: dict[str, Any]
    cuts: list[int]
    counts: list[int]


class Block(Protocol):
    """One part in memory."""

    def take(self, rows: Indices) -> Columns: ...


class Format(ABC):
    """How one kind of file is counted, cut and read. Files come open; all errors are DataErrors that name the file."""

    name: ClassVar[str]

    @abstractmethod
    def scan(self, file: BinaryIO, path: str, part_bytes: int, most: int) -> Scan:
        """Parts of about ``part_bytes``; no record (or row group) may be longer than ``most`` bytes."""

    @abstractmethod
    def read(self, file: BinaryIO, entry: FileIndex, part: int, schema: Mapping[str, Any]) -> Block: ...

    def join(self, one: dict[str, Any], other: dict[str, Any], paths: tuple[str, str]) -> dict[str, Any]:
        """The schema of both files, or a DataError that says where they differ."""
        for what in one:
            if one[what] != other[what]:
                raise DataError(
                    f"the shards differ: {what} is {one[what]} in {paths[0]} and {other[what]} in {paths[1]}. "
                    "Shards of one set hold records of one kind: write them alike, or leave one out."
                )
        return one


@dataclass(frozen=True)
class Rows:
    """An array, or arrays by column, in memory."""

    columns: Columns

    def take(self, rows: Indices) -> Columns:
        if isinstance(self.columns, dict):
            return {name: column[rows] for name, column in self.columns.items()}
        return self.columns[rows]


@dataclass(frozen=True)
class Npy(Format):
    """A record is a row of the array: all but its first axis."""

    name = "npy"

    def scan(self, file: BinaryIO, path: str, part_bytes: int, most: int) -> Scan:
        size = os.fstat(file.fileno()).st_size
        try:
            version = np.lib.format.read_magic(file)
            if version not in ((1, 0), (2, 0)):
                raise ValueError(f"version {version} is for structured arrays")
            header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, by_column, dtype = header(file)
        except ValueError as error:
            raise DataError(f"{path} is not a .npy file that can stream: {error}.") from error
        if not shape or by_column or dtype.hasobject or dtype.names:
            what = "a single number" if not shape else "in Fortran order" if by_column else f"of dtype {dtype}"
            raise DataError(
                f"{path} cannot stream: its array is {what}. Save rows of plain numbers, "
                "np.save(path, np.ascontiguousarray(array))."
            )
        begin, row = file.tell(), dtype.itemsize * math.prod(shape[1:])
        if begin + shape[0] * row != size:
            raise DataError(
                f"{path} is truncated or damaged: its header promises {shape[0]} rows of {row} bytes after the first "
                f"{begin}, {begin + shape[0] * row} bytes in all, and it has {size}. Write it again."
            )
        _check_length(row, most, path, "a row")
        counts = _equal_parts(shape[0], max(1, part_bytes // max(row, 1)))
        return Scan({"dtype": dtype.str, "shape": list(shape[1:])}, _offsets(begin, counts, row), counts)

    def read(self, file: BinaryIO, entry: FileIndex, part: int, schema: Mapping[str, Any]) -> Block:
        dtype = np.dtype(schema["dtype"])
        out = np.empty((entry.counts[part], *schema["shape"]), dtype)
        file.seek(entry.cuts[part])
        _read_into(file, out, entry)
        return Rows(out if dtype.isnative else out.astype(dtype.newbyteorder("=")))


@dataclass(frozen=True)
class Windows(Format):
    """A record is a window of ``size`` bytes; one begins every ``stride`` bytes, and only whole ones count.

    ``end``: from a file's size to where its windows must end, for those who keep its tail for other purposes.
    """

    name = "windows"
    size: int
    stride: int
    end: Callable[[int], int] | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.stride <= self.size:
            raise ConfigError(
                f"windows of size={self.size} every stride={self.stride} bytes are not possible: both at least 1, and "
                "stride at most size, or bytes would be left out."
            )

    def scan(self, file: BinaryIO, path: str, part_bytes: int, most: int) -> Scan:
        size = os.fstat(file.fileno()).st_size
        end = self.end(size) if self.end else size
        _check_length(self.size, most, path, "a window")
        num = (end - self.size) // self.stride + 1 if end >= self.size else 0
        counts = _equal_parts(num, max(1, part_bytes // self.stride))
        return Scan({"size": self.size, "stride": self.stride}, _offsets(0, counts, self.stride), counts)

    def read(self, file: BinaryIO, entry: FileIndex, part: int, schema: Mapping[str, Any]) -> Block:
        data = np.empty((entry.counts[part] - 1) * self.stride + self.size, np.uint8)
        file.seek(entry.cuts[part])
        _read_into(file, data, entry)
        return Rows(np.lib.stride_tricks.sliding_window_view(data, self.size)[:: self.stride])


@dataclass(frozen=True)
class Lines(Format):
    """A record is a line of UTF-8 text, without its end."""

    name = "lines"

    def scan(self, file: BinaryIO, path: str, part_bytes: int, most: int) -> Scan:
        cuts, counts = cut(record_ends(file, quoted=False), 0, part_bytes, most, path)
        return Scan({}, cuts, counts)

    def read(self, file: BinaryIO, entry: FileIndex, part: int, schema: Mapping[str, Any]) -> Block:
        data = _read_span(file, entry, part)
        ends = np.flatnonzero(np.frombuffer(data, np.uint8) == NEWLINE) + 1
        if data and not data.endswith(b"\n"):
            ends = np.append(ends, len(data))
        return TextLines(data, np.append(0, ends), entry.path, sum(entry.counts[:part]))


@dataclass(frozen=True)
class TextLines:
    data: bytes
    bounds: Indices  # (lines + 1,)
    path: str
    first: int  # lines of the file before this part

    def take(self, rows: Indices) -> Columns:
        out = np.empty(len(rows), object)
        for k, row in enumerate(rows.tolist()):
            line = self.data[self.bounds[row] : self.bounds[row + 1]].rstrip(b"\r\n")
            try:
                out[k] = line.decode()
            except UnicodeDecodeError as error:
                raise DataError(
                    f"{self.path}, line {self.first + row + 1}: byte {error.start + 1} ({line[error.start]:#04x}) is not UTF-8. "
                    "Convert the file (iconv -t utf-8), or mend the line."
                ) from error
        return out


# -- what pyarrow reads


class _Table(Format):
    """Records are rows with columns by name; numbers come as arrays of their type, all else as Python objects."""

    def join(self, one: dict[str, Any], other: dict[str, Any], paths: tuple[str, str]) -> dict[str, Any]:
        if list(one) != list(other):
            only = sorted(set(one) ^ set(other)) or "their order"
            raise DataError(
                f"the shards have different columns: {paths[0]} has {', '.join(one)}; {paths[1]} has {', '.join(other)} "
                f"(the difference: {only}). Shards of one set hold records of one kind: write them alike."
            )
        return {name: self.join_types(name, one[name], other[name], paths) for name in one}

    def join_types(self, name: str, one: str, other: str, paths: tuple[str, str]) -> str:
        if one == other:
            return one
        raise DataError(
            f"the shards differ: column {name!r} is {one} in {paths[0]} and {other} in {paths[1]}. {self.cure(name)}"
        )

    def cure(self, name: str) -> str:
        return "Write them with one type."


@dataclass(frozen=True)
class Csv(_Table):
    """Comma-separated values with a header (RFC 4180: a quoted value may hold commas and newlines, and "" for a quote).

    A column's type follows from the beginning of every file; ``types`` says it instead: Csv(types={"id": "string"}).
    """

    name = "csv"
    types: Mapping[str, str] = field(default_factory=dict)

    def scan(self, file: BinaryIO, path: str, part_bytes: int, most: int) -> Scan:
        header = next((ends for ends in record_ends(file, quoted=True, path=path) if len(ends)), None)
        if header is None:
            raise DataError(f"{path} has no header: the first line of a .csv file names its columns.")
        begin = int(header[0])
        file.seek(0)
        try:
            names = next(csv.reader(io.StringIO(file.read(begin).decode("utf-8-sig"), newline="")))
        except UnicodeDecodeError as error:
            raise DataError(f"{path}: its header is not UTF-8 text ({error.reason}).") from error
        if len(set(names)) < len(names):
            raise DataError(f"{path} names a column twice: {', '.join(names)}. Give each column a name of its own.")
        if strange := sorted(set(self.types) - set(names)):
            raise DataError(f"types name the column {strange[0]!r}, and {path} has: {', '.join(names)}.")
        file.seek(begin)
        cuts, counts = cut(record_ends(file, quoted=True, base=begin, path=path), begin, part_bytes, most, path)
        inferred = dict.fromkeys(names, "null")
        if counts:
            entry = FileIndex(path, cuts[-1], 0, cuts, counts)
            table = self._parse(_read_span(file, entry, 0), entry, 0, names, self.types)
            inferred = {name: str(kind) for name, kind in zip(names, table.schema.types)}
        return Scan({name: self._kind(name, inferred[name]) for name in names}, cuts, counts)

    def _kind(self, name: str, inferred: str) -> str:
        if name in self.types:
            return self.types[name]
        return inferred if inferred in ("null", "bool", "int64", "double") else "string"  # dates too: as written

    def join_types(self, name: str, one: str, other: str, paths: tuple[str, str]) -> str:
        if "null" in (one, other):  # no value there by which to tell
            return one if other == "null" else other
        if {one, other} == {"int64", "double"}:
            return "double"
        return super().join_types(name, one, other, paths)

    def cure(self, name: str) -> str:
        return f'Say which: format=Csv(types={{"{name}": "string"}}).'

    def read(self, file: BinaryIO, entry: FileIndex, part: int, schema: Mapping[str, Any]) -> Block:
        types = {name: "string" if kind == "null" else kind for name, kind in schema.items()}
        return ArrowRows.of(self._parse(_read_span(file, entry, part), entry, part, list(schema), types), entry, part)

    def _parse(self, data: bytes, entry: FileIndex, part: int, names: list[str], types: Mapping[str, str]) -> Any:
        pa = arrow()
        from pyarrow import csv as pacsv

        before = sum(entry.counts[:part])
        try:
            table = pacsv.read_csv(
                pa.BufferReader(data),
                pacsv.ReadOptions(use_threads=False, block_size=len(data) + 1, column_names=names),
                pacsv.ParseOptions(newlines_in_values=True),
                pacsv.ConvertOptions(column_types={n: _arrow_type(t) for n, t in types.items()}),
            )
        except pa.ArrowInvalid as error:
            text = str(error)
            row = re.search(r"Row #(\d+)", text)
            column = re.search(r"column #(\d+)", text)
            place = (
                f"record {before + int(row[1])}" if row else f"records {before + 1} to {before + entry.counts[part]}"
            )
            name = names[int(column[1])] if column and int(column[1]) < len(names) else ""
            place += f", column {name!r}" if name else ""
            cure = f' Mend it, or say format=Csv(types={{"{name}": "string"}}).' if name else " Mend it."
            raise DataError(f"{entry.path}, {place}: {text}.{cure}") from error
        if table.num_rows != entry.counts[part]:
            raise DataError(
                f"{entry.path}: its quotes are not those of RFC 4180 somewhere in records {before + 1} to "
                f"{before + entry.counts[part]} ({table.num_rows} rows were read there). A quote within a value is "
                'written "", and the value stands in quotes.'
            )
        return table


@dataclass(frozen=True)
class Parquet(_Table):
    """A part is a row group: it is read whole."""

    name = "parquet"

    def scan(self, file: BinaryIO, path: str, part_bytes: int, most: int) -> Scan:
        with _parquet_errors(path):
            opened = _parquet(file)
            groups = [opened.metadata.row_group(k) for k in range(opened.metadata.num_row_groups)]
            schema = {f.name: str(f.type) for f in opened.schema_arrow}
        for k, group in enumerate(groups):
            _check_length(group.total_byte_size, most, path, f"row group {k}")
        filled = [k for k, group in enumerate(groups) if group.num_rows]
        return Scan(schema, [*filled, len(groups)], [groups[k].num_rows for k in filled])

    def read(self, file: BinaryIO, entry: FileIndex, part: int, schema: Mapping[str, Any]) -> Block:
        with _parquet_errors(f"{entry.path}, row group {entry.cuts[part]}"):
            table = _parquet(file).read_row_group(entry.cuts[part], use_threads=False)
        return ArrowRows.of(table, entry, part)


class ArrowRows:
    """Rows of an Arrow table; columns of numbers are arrays at once, others become Python objects when taken."""

    def __init__(self, columns: dict[str, Any]) -> None:
        self.columns = columns

    @classmethod
    def of(cls, table: Any, entry: FileIndex, part: int) -> ArrowRows:
        pa = arrow()
        columns: dict[str, Any] = {}
        for name, column in zip(table.column_names, table.columns):
            kind = column.type
            if not (pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)):
                columns[name] = column
                continue
            if column.null_count and not pa.types.is_floating(kind):
                row = int(np.flatnonzero(column.is_null().to_numpy())[0])
                raise DataError(
                    f"{entry.path}, record {sum(entry.counts[:part]) + row + 1}: column {name!r} is empty there, and {kind} "
                    "knows no missing value. Fill it in, or store the column as floating point (it becomes NaN)."
                )
            columns[name] = column.to_numpy()
        return cls(columns)

    def take(self, rows: Indices) -> Columns:
        return {name: self._of(column, rows) for name, column in self.columns.items()}

    @staticmethod
    def _of(column: Any, rows: Indices) -> npt.NDArray[Any]:
        if isinstance(column, np.ndarray):
            return column[rows]
        out = np.empty(len(rows), object)
        out[:] = column.take(arrow().array(rows)).to_pylist()
        return out


def arrow() -> Any:
    try:
        import pyarrow
    except ModuleNotFoundError as error:
        raise DataError(
            '.csv and .parquet files are read by pyarrow, which is not installed: pip install "weft[stream]".'
        ) from error
    return pyarrow


def _arrow_type(name: str) -> Any:
    try:
        return arrow().type_for_alias(name)
    except ValueError as error:
        raise ConfigError(
            f"{name!r} is no type of a column: give for example string, int64, float, double or bool."
        ) from error


def _parquet(file: BinaryIO) -> Any:
    arrow()
    from pyarrow import parquet

    return parquet.ParquetFile(file)


class _parquet_errors:
    def __init__(self, where: str) -> None:
        self.where = where

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if error is not None and isinstance(error, (arrow().ArrowException, OSError)):
            raise DataError(f"{self.where} is damaged, or no Parquet: {error}. Write it again.") from error


# -- counting and cutting

NEWLINE, RETURN, QUOTE = b'\n\r"'


def record_ends(file: BinaryIO, *, quoted: bool, base: int = 0, path: str = "") -> Iterator[Indices]:
    """Where records end (the byte after), ascending, array by array; the file stands at ``base``, where one begins.

    A record ends with a line; ``quoted``: not within quotes, that is where the quotes before it are even in number (""
    within a value counts twice), and empty lines are no records. Some 1 GB/s.
    """
    last_byte, line_begin, num_quotes, opened_at = NEWLINE, base, 0, 0
    while chunk := file.read(CHUNK):
        data = np.frombuffer(chunk, np.uint8)
        newlines = np.flatnonzero(data == NEWLINE)
        if quoted:
            quotes = np.flatnonzero(data == QUOTE)
            newlines = newlines[(np.searchsorted(quotes, newlines) + num_quotes) % 2 == 0]
            num_quotes += len(quotes)
            opened_at = base + int(quotes[-1]) if len(quotes) else opened_at
        ends = newlines + (base + 1)
        if quoted:
            length = np.diff(ends, prepend=line_begin)
            before = np.where(newlines > 0, data[newlines - 1], last_byte)
            blank = (length == 1) | ((length == 2) & (before == RETURN))
            line_begin = int(ends[-1]) if len(ends) else line_begin
            ends = ends[~blank]
        else:
            line_begin = int(ends[-1]) if len(ends) else line_begin
        last_byte = int(data[-1])
        base += len(chunk)
        yield ends
    if num_quotes % 2:
        raise DataError(
            f'{path}: a quoted value has no end (the last quote is at byte {opened_at + 1}). Close it; a quote within a value is written "".'
        )
    if base > line_begin and not (quoted and base == line_begin + 1 and last_byte == RETURN):
        yield np.array([base])


def cut(ends: Iterable[Indices], begin: int, part_bytes: int, most: int, path: str) -> tuple[list[int], list[int]]:
    """Parts of at least ``part_bytes`` (the last may be shorter) that end where a record does."""
    cuts, counts, count, last = [begin], [], 0, begin
    for some in ends:
        if not len(some):
            continue
        _check_length(int(np.diff(some, prepend=last).max()), most, path, f"a record after byte {last}")
        last = int(some[-1])
        while len(some):
            k = int(np.searchsorted(some, cuts[-1] + part_bytes))
            if k == len(some):
                count += k
                break
            cuts.append(int(some[k]))
            counts.append(count + k + 1)
            count, some = 0, some[k + 1 :]
    if count:
        cuts.append(last)
        counts.append(count)
    return cuts, counts


def _equal_parts(records: int, largest: int) -> list[int]:
    """Sizes that add up to ``records``, none over ``largest``, no two differing by more than 1."""
    parts = -(-records // largest)
    return [records * (k + 1) // parts - records * k // parts for k in range(parts)]


def _offsets(begin: int, counts: list[int], stride: int) -> list[int]:
    return [begin, *(begin + stride * np.cumsum(counts, dtype=np.int64)).tolist()]


def _check_length(nbytes: int, most: int, path: str, what: str) -> None:
    if nbytes > most:
        raise DataError(
            f"{path}: {what} takes {nbytes} bytes, and the shuffle buffer has room for pieces of {most}: give "
            f"Shards(..., buffer_mb=...) of {nbytes / most:.3g} times as much, or write smaller ones."
        )


def _read_span(file: BinaryIO, entry: FileIndex, part: int) -> bytes:
    file.seek(entry.cuts[part])
    data = file.read(entry.cuts[part + 1] - entry.cuts[part])
    if len(data) != entry.cuts[part + 1] - entry.cuts[part]:
        raise _shorter(entry)
    return data


def _read_into(file: BinaryIO, out: npt.NDArray[Any], entry: FileIndex) -> None:
    if out.nbytes and file.readinto(out.reshape(-1).view(np.uint8).data) != out.nbytes:  # type: ignore[attr-defined]
        raise _shorter(entry)


def _shorter(entry: FileIndex) -> DataError:
    return DataError(f"{entry.path} ended early: it had {entry.size} bytes when its records were counted.")


BY_SUFFIX: dict[str, Format] = {
    ".npy": Npy(),
    ".csv": Csv(),
    ".parquet": Parquet(),
    ".txt": Lines(),
    ".jsonl": Lines(),
}
