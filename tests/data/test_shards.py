"""Shards on disk: what is counted is what is there, any record can be read by itself, bad files are named."""

from __future__ import annotations

import csv
import io
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.data.streaming import FORMATS, ids_of, write, write_shards

from weft.data import Shards
from weft.data.formats import Csv, Lines, Windows, cut, record_ends
from weft.data.shard_sampler import ShardSampler
from weft.data.shards import GROUP, MB, Reader
from weft.errors import ConfigError, DataError

SIZES = [23, 40, 0, 17, 31]  # a file without records is no error
TINY = 1500 * GROUP / MB  # a buffer of 16 parts of 1.5 kB


def reader_of(*args: Any, **kwargs: Any) -> Reader:
    shards = Shards(*args, **kwargs)
    return Reader(shards, shards.scan())


# ------------------------------------------------------------------------------------------------------ what is there


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("split", [1, 3])
def test_every_record_by_its_number(tmp_path: Path, kind: str, split: int) -> None:
    reader = reader_of(write_shards(tmp_path, SIZES, kind), split=split, buffer_mb=TINY)
    n = sum(SIZES)
    assert len(reader) == n == reader.index.num_records
    assert len(reader.index.part_sizes()) > len(SIZES)
    order = np.random.default_rng(0).permutation(n)
    assert ids_of(reader.records(order)) == order.tolist()
    assert [ids_of(reader.records(np.array([i])))[0] for i in order[:20]] == order[:20].tolist()
    shards = reader.index.shards()
    assert len(shards) == 4 * split
    assert sorted(p for parts in shards for p in parts) == list(range(len(reader.index.part_sizes())))


def test_records_are_rows_dicts_and_lines(tmp_path: Path) -> None:
    for kind in FORMATS:
        write_shards(tmp_path / kind, [5], kind)
    assert reader_of(tmp_path / "npy/s000.npy")[3].tolist() == [3, 6]
    assert reader_of(tmp_path / "lines/s000.txt")[3] == "line 3ééé"
    assert reader_of(tmp_path / "csv/s000.csv")[3] == {"id": 3, "half": 1.5, "text": 'a, "b"\nc3'}
    assert reader_of(tmp_path / "parquet/s000.parquet")[3] == {"id": 3, "half": 1.5, "text": "t3"}
    tripled = reader_of(tmp_path / "npy/s000.npy", transform=lambda row: int(row[0]) * 3)
    assert tripled.__getitems__([4, 0]) == [12, 0]
    with pytest.raises(IndexError, match="record 5 of 5"):
        tripled[5]


@pytest.mark.parametrize("dtype", [">f4", "<i8", "u1", "?", "<f2", "<c8"])
@pytest.mark.parametrize("shape", [(7,), (7, 2, 3)])
def test_npy_of_any_dtype_and_shape(tmp_path: Path, dtype: str, shape: tuple[int, ...]) -> None:
    array = np.random.default_rng(0).integers(0, 2, shape).astype(dtype)
    np.save(tmp_path / "a.npy", array)
    records = reader_of(tmp_path / "a.npy", split=3).records(np.arange(7)[::-1])
    assert records.dtype.isnative
    assert np.array_equal(records, array[::-1])


CELLS = st.text(st.sampled_from('ab,"\n\ré '), max_size=6)


@settings(max_examples=60)
@given(st.lists(st.tuples(CELLS, CELLS), min_size=1, max_size=30), st.sampled_from(["\n", "\r\n"]), st.integers(1, 60))
def test_csv_records_are_those_of_pythons_csv_module(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, str]], end: str, part_bytes: int
) -> None:
    path = tmp_path_factory.mktemp("csv") / "a.csv"
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator=end, quoting=csv.QUOTE_ALL)
    writer.writerows([("x", "y"), *rows])
    path.write_bytes(text.getvalue().encode())
    shards = Shards(path, format=Csv(types={"x": "string", "y": "string"}))
    with path.open("rb") as file:
        scan = shards._format([str(path)]).scan(file, str(path), part_bytes, MB)
    assert sum(scan.counts) == len(rows)
    got = reader_of(path, format=shards.format, split=4).records(np.arange(len(rows)))
    assert list(zip(got["x"], got["y"])) == rows


@given(st.binary(max_size=300), st.integers(1, 50))
def test_lines_are_cut_where_a_line_ends(data: bytes, part_bytes: int) -> None:
    cuts, counts = cut(record_ends(io.BytesIO(data), quoted=False), 0, part_bytes, MB, "")
    lines = data.split(b"\n")
    lines = lines if lines[-1] else lines[:-1]
    assert sum(counts) == len(lines)
    assert cuts[-1] == len(data)
    assert [data[a:b].count(b"\n") + (not data[a:b].endswith(b"\n")) for a, b in pairwise(cuts)] == counts
    assert all(b - a >= part_bytes for a, b in pairwise(cuts[:-1]))


def test_records_that_cross_the_chunks_of_a_scan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.csv", np.arange(50), "csv")
    text = path.read_text() + "\r\n\r\n\n"  # empty lines are no records
    path.write_bytes(text.replace("plain\n", "plain\n\r\n").encode())
    for chunk in (1, 2, 3, 7, 64):
        monkeypatch.setattr("weft.data.formats.CHUNK", chunk)
        assert ids_of(reader_of(path, split=4).records(np.arange(50))) == list(range(50))


def test_windows_share_what_their_stride_leaves(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abcdefghijk")
    (tmp_path / "b").write_bytes(b"ABCDE")
    (tmp_path / "c").write_bytes(b"ABC")
    reader = reader_of([tmp_path / "a", tmp_path / "b", tmp_path / "c"], format=Windows(4, 3), split=2)
    assert [bytes(w) for w in reader.records(np.arange(len(reader)))] == [b"abcd", b"defg", b"ghij", b"ABCD"]
    assert len(reader_of(tmp_path / "a", format=Windows(4, 3, end=lambda size: size - 2))) == 2
    with pytest.raises(ConfigError, match="size=4 every stride=5"):
        Windows(4, 5)


def test_types_of_csv_columns_hold_for_all_files(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("x,day,empty\n1,2020-01-01,\n2,2020-01-02,\n")
    (tmp_path / "b.csv").write_text("x,day,empty\n1.5,2020-01-03,7\n")
    reader = reader_of(tmp_path / "*.csv")
    assert reader.index.schema == {"x": "double", "day": "string", "empty": "int64"}
    (tmp_path / "a.csv").write_text("x,day,empty\n1,2020-01-01,5\n2,2020-01-02,6\n")
    records = reader_of(tmp_path / "*.csv").records(np.array([2, 0]))
    assert records["x"].tolist() == [1.5, 1.0]
    assert records["day"].tolist() == ["2020-01-03", "2020-01-01"]


def test_only_the_files_that_are_needed_are_opened(tmp_path: Path) -> None:
    """By the interpreter's own audit of every open()."""
    for kind in FORMATS:
        shards = Shards(write_shards(tmp_path / kind, [40, 40, 40, 40], kind), buffer_mb=TINY)
        index = shards.scan()
        script = (
            "import sys, msgspec\n"
            "opened = set()\n"
            "sys.addaudithook(lambda event, args: opened.add(str(args[0])) if event == 'open' else None)\n"
            "from weft.data.shards import Index, Reader, Shards\n"
            "from weft.data.shard_sampler import ShardSampler\n"
            f"index = msgspec.json.decode({index_json(index)!r}, type=Index)\n"
            f"reader = Reader(Shards({shards.paths!r}), index)\n"
            "sampler = ShardSampler(index, 10, 1, 2, 0)\n"
            "for _ in range(2 * sampler.steps_per_epoch): reader.records(sampler.next().indices)\n"
            f"print(*sorted(path for path in opened if path.startswith({str(tmp_path)!r})))\n"
        )
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        assert [Path(p).stem for p in done.stdout.split()] == ["s001", "s003"]


def index_json(index: Any) -> bytes:
    import msgspec

    return msgspec.json.encode(index)


@pytest.mark.parametrize("kind", FORMATS)
def test_memory_stays_flat_on_a_set_ten_times_its_cap(tmp_path: Path, kind: str) -> None:
    """Under a limit of the kernel's: 3 times the buffer (csv and parquet are decoded) beside what Python needs."""
    buffer_mb, megabytes = 4, 40
    for k in range(8):
        ids = np.arange(k * 1000, (k + 1) * 1000)
        wide = np.repeat(ids[:, None], megabytes * MB // 8000 // 8, 1)
        if kind == "npy":
            np.save(tmp_path / f"{k}.npy", wide)
        elif kind == "parquet":
            import pyarrow as pa
            from pyarrow import parquet

            table = pa.table({"id": ids, "wide": [row.tobytes() for row in wide]})
            parquet.write_table(table, tmp_path / f"{k}.parquet", row_group_size=40)
        else:
            body = "\n".join(f"{i}," + "x" * (megabytes * MB // 8000) for i in ids)
            (tmp_path / f"{k}.{'csv' if kind == 'csv' else 'txt'}").write_text(
                ("id,text\n" if kind == "csv" else "") + body
            )
    script = (
        "import resource, sys, numpy as np\n"
        "from weft.data.shards import Reader, Shards\n"
        "from weft.data.shard_sampler import ShardSampler\n"
        "import weft.data.formats as f\n"
        f"shards = Shards({str(tmp_path / '*.*')!r}, buffer_mb={buffer_mb})\n"
        "if sys.argv[1] in ('csv', 'parquet'): import pyarrow.csv, pyarrow.parquet\n"
        "def data_kb(): return int(next(l for l in open('/proc/self/status') if l.startswith('VmData')).split()[1])\n"
        "warm = Reader(shards, shards.scan()); warm.records(np.arange(9)); del warm\n"
        f"limit = data_kb() * 1024 + 3 * {buffer_mb * MB} + {4 * MB}\n"
        "resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))\n"
        "index = shards.scan()\n"
        "sampler, reader, seen = ShardSampler(index, 64, 0, 1, 0), Reader(shards, index), 0\n"
        "for _ in range(sampler.steps_per_epoch):\n"
        "    records = reader.records(sampler.next().indices)\n"
        "    seen += len(records) if not isinstance(records, dict) else len(next(iter(records.values())))\n"
        "assert seen == len(reader) == 8000, seen\n"
    )
    done = subprocess.run([sys.executable, "-c", script, kind], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr


# ---------------------------------------------------------------------------------------------------------- bad files


def refused(shards: Shards, *words: str) -> None:
    def read_all() -> None:
        reader = Reader(shards, shards.scan())
        reader.records(np.arange(len(reader)))

    with pytest.raises(DataError) as caught:
        read_all()
    for word in words:
        assert word in str(caught.value), str(caught.value)


def test_a_glob_that_matches_nothing_and_a_missing_file(tmp_path: Path) -> None:
    refused(Shards(tmp_path / "*.npy"), "no file matches", "*.npy")
    refused(Shards(tmp_path / "a.npy"), "a.npy cannot be read", "No such file")
    refused(Shards(tmp_path, format=Lines()), "cannot be read: Is a directory")


def test_an_empty_set(tmp_path: Path) -> None:
    refused(Shards(write_shards(tmp_path, [0, 0], "npy")), "s000.npy and 1 more hold no records")
    (tmp_path / "a.txt").touch()
    refused(Shards(tmp_path / "a.txt"), "a.txt", "no records")
    (tmp_path / "a.csv").touch()
    refused(Shards(tmp_path / "a.csv"), "a.csv has no header")


def test_unknown_and_mixed_formats(tmp_path: Path) -> None:
    (tmp_path / "a.log").write_text("x\n")
    (tmp_path / "a.txt").write_text("x\n")
    refused(Shards(tmp_path / "a.log"), "a.log", ".npy, .csv, .parquet, .txt, .jsonl", "Lines()")
    refused(Shards(tmp_path / "a.*"), ".log, .txt", "narrow the glob")
    assert len(reader_of(tmp_path / "a.*", format=Lines())) == 2
    refused(Shards([tmp_path / "a.txt", tmp_path / "a.txt"]), "a.txt is named twice")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"paths": []}, "no paths"),
        ({"split": 0}, "split=0"),
        ({"buffer_mb": 0}, "buffer_mb=0"),
        ({"transform": str, "batch_transform": str}, "give one of them"),
    ],
)
def test_impossible_arguments(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Shards(**({"paths": "x.npy"} | arguments))


def test_npy_that_cannot_stream(tmp_path: Path) -> None:
    path = tmp_path / "a.npy"
    np.save(path, np.zeros((100, 3)))
    path.write_bytes(path.read_bytes()[:-5])
    refused(Shards(path), "a.npy is truncated", "100 rows", "24 bytes")
    path.write_bytes(b"PK" + path.read_bytes()[2:])
    refused(Shards(path), "a.npy is not a .npy file")
    for array, what in [
        (np.asfortranarray(np.zeros((4, 3))), "Fortran order"),
        (np.array(3.0), "a single number"),
        (np.array([{}], object), "dtype object"),
        (np.zeros(3, [("a", "f4")]), "dtype [('a'"),
    ]:
        np.save(path, array, allow_pickle=True)
        refused(Shards(path), "a.npy cannot stream", what, "ascontiguousarray")


def test_shards_that_differ(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.zeros((4, 3)))
    np.save(tmp_path / "b.npy", np.zeros((4, 2)))
    refused(Shards(tmp_path / "*.npy"), "shape is [3]", "a.npy", "[2]", "b.npy")
    np.save(tmp_path / "b.npy", np.zeros((4, 3), np.float32))
    refused(Shards(tmp_path / "*.npy"), "dtype is <f8", "<f4")
    (tmp_path / "a.csv").write_text("x,y\n1,2\n")
    (tmp_path / "b.csv").write_text("x,z\n1,2\n")
    refused(Shards(tmp_path / "*.csv"), "different columns", "x, y", "b.csv has x, z")
    (tmp_path / "b.csv").write_text("x,y\n1,two\n")
    refused(Shards(tmp_path / "*.csv"), "column 'y' is int64", "string", "b.csv", 'Csv(types={"y"')
    import pyarrow as pa
    from pyarrow import parquet

    parquet.write_table(pa.table({"x": [1]}), tmp_path / "a.parquet")
    parquet.write_table(pa.table({"x": [1.0]}), tmp_path / "b.parquet")
    refused(Shards(tmp_path / "*.parquet"), "column 'x' is int64", "double", "b.parquet", "one type")


def test_a_bad_cell_is_named_with_file_record_and_column(tmp_path: Path) -> None:
    rows = [f"{i},{i}" for i in range(3000)]
    rows[2345] = "2345,oops"
    path = tmp_path / "a.csv"
    path.write_text("\n".join(["x,y", *rows]))
    refused(Shards(path, buffer_mb=TINY), "a.csv, record 2346, column 'y'", "oops", 'types={"y": "string"}')
    rows[2345] = "2345,"
    path.write_text("\n".join(["x,y", *rows]))
    refused(Shards(path, buffer_mb=TINY), "a.csv, record 2346: column 'y' is empty", "int64")
    rows[2345] = "2345"
    path.write_text("\n".join(["x,y", *rows]))
    refused(Shards(path, buffer_mb=TINY), "a.csv, record 2346", "Expected 2 columns, got 1")
    rows[2345] = '2345,"7'
    path.write_text("\n".join(["x,y", *rows]))
    refused(Shards(path, buffer_mb=TINY), "a.csv: a quoted value has no end", "byte")
    path.write_text('x,y\n5" pipe,1\n6" pipe,2\n')
    refused(Shards(path), "a.csv", "RFC 4180", "records 1 to")
    path.write_text("x,x\n1,2\n")
    refused(Shards(path), "a.csv names a column twice")
    path.write_text("x,y\n1,2\n")
    refused(Shards(path, format=Csv(types={"z": "int64"})), "'z'", "x, y")
    with pytest.raises(ConfigError, match="'number' is no type"):
        Shards(path, format=Csv(types={"x": "number"})).scan()


def test_text_that_is_not_utf8_is_named_with_its_line(tmp_path: Path) -> None:
    lines = [f"line {i}".encode() for i in range(3000)]
    lines[2345] = b"caf\xe9"
    (tmp_path / "a.txt").write_bytes(b"\n".join(lines))
    refused(Shards(tmp_path / "a.txt", buffer_mb=TINY), "a.txt, line 2346", "byte 4 (0xe9)", "iconv")


def test_parquet_that_is_damaged(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", np.arange(50), "parquet")
    good = path.read_bytes()
    path.write_bytes(good[:-9])
    refused(Shards(path), "a.parquet is damaged")
    path.write_bytes(good[:30] + bytes(len(good) // 3) + good[30 + len(good) // 3 :])
    refused(Shards(path), "a.parquet, row group", "is damaged")


def test_a_record_that_the_buffer_cannot_hold(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("short\n" + "x" * 5000 + "\nshort\n")
    refused(Shards(tmp_path / "a.txt", buffer_mb=TINY), "a.txt: a record", "5001 bytes", "buffer_mb")
    np.save(tmp_path / "a.npy", np.zeros((3, 1000)))
    refused(Shards(tmp_path / "a.npy", buffer_mb=TINY), "a row takes 8000 bytes", "buffer_mb")
    write(tmp_path / "a.parquet", np.arange(700), "parquet")
    refused(Shards(tmp_path / "a.parquet", buffer_mb=50 * GROUP / MB), "row group 0 takes", "buffer_mb")


def test_without_pyarrow_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [write(tmp_path / f"a.{kind}", np.arange(5), kind) for kind in ("csv", "parquet")]
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    for path in paths:
        refused(Shards(path), 'pip install "weft[stream]"')


def test_files_that_changed_since_they_were_counted(tmp_path: Path) -> None:
    shards = Shards(write_shards(tmp_path, [20, 20], "npy"))
    index = shards.scan()
    assert shards.same(index) is index
    with pytest.raises(ConfigError, match=r"began with split=1, and split=2"):
        Shards(shards.paths, split=2).same(index)
    with pytest.raises(ConfigError, match=r"began with buffer_mb=64, and buffer_mb=8"):
        Shards(shards.paths, buffer_mb=8).same(index)
    with pytest.raises(DataError, match=r"s001.npy was among the shards"):
        Shards(tmp_path / "s000.npy").same(index)
    path = tmp_path / "s001.npy"
    kept, stat = path.read_bytes(), path.stat()
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    with pytest.raises(DataError, match=r"s001.npy has changed .*written again"):
        shards.same(index)
    with pytest.raises(DataError, match=r"s001.npy has changed"):
        Reader(shards, index).records(np.arange(40))
    path.write_bytes(kept + b"x")
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    with pytest.raises(DataError, match=rf"s001.npy has changed .*{len(kept)} bytes.*{len(kept) + 1} bytes"):
        shards.same(index)
    path.unlink()
    with pytest.raises(DataError, match=r"s001.npy has vanished .*20 records"):
        shards.same(index)
    path.write_bytes(kept)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    write(tmp_path / "s002.npy", np.arange(3), "npy")
    with pytest.raises(DataError, match=r"s002.npy was not among the shards"):
        shards.same(index)


def test_an_epoch_reads_every_part_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = reader_of(write_shards(tmp_path, [200, 300, 250], "npy"), buffer_mb=100 * GROUP / MB)
    parts = len(reader.index.part_sizes())
    assert parts > 3 * GROUP
    reads = []
    original = reader.format.read
    monkeypatch.setattr(type(reader.format), "read", lambda self, *a: reads.append(a[1:3]) or original(*a))
    sampler = ShardSampler(reader.index, 13, 0, 1, 0)
    order = [i for _ in range(sampler.steps_per_epoch) for i in ids_of(reader.records(sampler.next().indices))]
    assert sorted(order) == list(range(750))
    assert len(reads) == parts
