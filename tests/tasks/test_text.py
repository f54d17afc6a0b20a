from __future__ import annotations

import json
import math
import subprocess
import sys
import sysconfig
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from weft.data.shards import Reader
from weft.errors import DataError
from weft.options import construct, describe
from weft.tasks.codelm import CodeLM
from weft.tasks.text import Text, held_out

STDLIB = Path(sysconfig.get_path("stdlib"))


@pytest.fixture
def books(tmp_path: Path) -> list[Path]:
    texts = {"a.txt": b"abcdefghij" * 100, "b.txt": bytes(range(256)) * 3, "c.txt": b"short"}
    for name, text in texts.items():
        (tmp_path / name).write_bytes(text)
    return [tmp_path / name for name in texts]


def test_every_byte_is_on_one_side_of_the_split(books: list[Path]) -> None:
    task = Text(str(books[0].parent / "*.txt"), seq_len=8)
    train, test = task.data()
    reader = Reader(train, train.scan())
    windows = reader.records(np.arange(len(reader)))
    assert windows.shape[1] == 9
    expected = []
    for text in (book.read_bytes() for book in books):
        kept = text[: len(text) - held_out(len(text), 1 << 20)]
        expected += [kept[at : at + 9] for at in range(0, len(kept) - 8, 8)]
    assert [bytes(w) for w in windows] == expected
    held = [text[len(text) - len(text) // 10 :] for text in (book.read_bytes() for book in books)]
    expected = [text[at : at + 9] for text in held for at in range(0, len(text) - 8, 8)]
    assert [w.numpy().tobytes() for w in test.tensors[0]] == expected
    few = Text(str(books[0].parent / "*.txt"), seq_len=8, test_windows=5).data()[1].tensors[0]
    assert [w.numpy().tobytes() for w in few] == [expected[k * len(expected) // 5] for k in range(5)]
    (entropy,) = task.notes().values()
    count = Counter(b"".join(held))
    assert entropy == pytest.approx(-sum(n / count.total() * math.log(n / count.total()) for n in count.values()))


def test_what_is_held_out_is_bounded() -> None:
    assert held_out(1000, 1 << 20) == 100
    assert held_out(1 << 40, 1 << 20) == 1 << 20


def test_the_model_is_that_of_codelm_and_data_comes_first() -> None:
    text = construct(Text, {"data": "x.txt", "size": "small", "seq_len": "64"}, "task 'text'")
    code = CodeLM(size="small", seq_len=64)
    assert [p.shape for p in text.model().parameters()] == [p.shape for p in code.model().parameters()]
    options = describe(Text)
    assert (options[0].name, options[0].type, options[0].default) == ("data", "str", "required")
    assert all(option.doc for option in options)


def test_too_little_text_is_refused(books: list[Path]) -> None:
    with pytest.raises(DataError, match=r"too little text for seq_len=128.*smaller -t seq_len"):
        Text(str(books[2])).data()
    with pytest.raises(DataError, match="no file matches"):
        Text(str(books[0].parent / "*.md")).data()


def weft_command(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "weft.cli", *arguments], capture_output=True, text=True, timeout=110, cwd=cwd
    )


@pytest.mark.slow
@pytest.mark.multiprocess
def test_learns_a_file_from_the_command_line(tmp_path: Path) -> None:
    """Four of Python's own modules, on two workers: below the entropy of their bytes in a few seconds."""
    source = b"".join((STDLIB / f"{name}.py").read_bytes() for name in ("argparse", "typing", "tarfile", "inspect"))
    (tmp_path / "mine.txt").write_bytes(source)
    done = weft_command(
        *("run", "text", "--data", "mine.txt", "--workers", "2", "--steps", "240", "--json", "--run-dir", "run"),
        *("-t", "seq_len=64", "-t", "lr=5e-3"),
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["loss"] < result["notes"]["unigram entropy of the held-out text (nats/byte)"] - 0.1
    options = json.loads((tmp_path / "run" / "config.json").read_text())["task"]["options"]
    assert options["data"] == str(tmp_path / "mine.txt"), "a resume may start elsewhere"


def test_data_is_refused_where_a_task_has_no_such_option_or_is_given_twice(tmp_path: Path) -> None:
    done = weft_command("run", "digits", "--data", "mine.txt", cwd=tmp_path)
    assert done.returncode == 2
    assert "unknown option of task 'digits': 'data'" in " ".join(done.stderr.split())
    done = weft_command("run", "text", "--data", "mine.txt", "-t", "data=other.txt", cwd=tmp_path)
    assert done.returncode == 2
    assert "'data' is given twice" in " ".join(done.stderr.split())
    done = weft_command("run", "text", cwd=tmp_path)
    assert done.returncode == 2
    assert "needs the option 'data'" in " ".join(done.stderr.split())
