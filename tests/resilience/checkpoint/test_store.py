"""A folder of checkpoints: order on disk, several members, pruning, and disks that refuse."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.resilience.checkpoint.same import assert_same

from weft.errors import CheckpointError, ConfigError
from weft.resilience.checkpoint import (
    begin,
    check_writable,
    commit,
    list_checkpoints,
    load,
    newest_good,
    read_manifest,
    save,
    verify,
    write_part,
)


def save_step(root: Path, step: int, *, keep: int = 3, numel: int = 4) -> Path:
    state = {"worker-0": {"w": torch.full((numel,), float(step))}}
    return save(root, state, step=step, world=1, meta={}, keep=keep).path


def steps(root: Path) -> list[int]:
    return [read_manifest(path).step for path in list_checkpoints(root)]


def names(root: Path) -> list[str]:
    """Everything in the folder, temporary things too."""
    return sorted(path.name for path in root.iterdir())


def damage(path: Path) -> None:
    (path / "manifest.json").write_bytes(b"x")


# ---- several members


def test_several_members_write_their_parts_and_the_coordinator_commits(tmp_path: Path) -> None:
    states = {f"worker-{rank}": {"rng": torch.full((3,), rank)} for rank in range(3)}
    staging = begin(tmp_path, 7)
    written = [write_part(staging, name, state) for name, state in states.items()]
    assert list_checkpoints(tmp_path) == []
    saved = commit(staging, written, step=7, world=3, meta={"cursor": 5})
    checkpoint = load(saved.path)
    assert (checkpoint.step, checkpoint.world, checkpoint.meta) == (7, 3, {"cursor": 5})
    assert_same(states, checkpoint.parts)
    assert names(tmp_path) == ["step-00000007"]


def test_two_members_of_the_same_name_are_refused(tmp_path: Path) -> None:
    staging = begin(tmp_path, 7)
    written = [write_part(staging, "worker-0", {"rank": rank}) for rank in range(2)]
    with pytest.raises(CheckpointError, match="two members wrote a part named 'worker-0'"):
        commit(staging, written, step=7, world=2, meta={})


# ---- order on disk: a power cut may undo whatever was not fsynced, and reorder the rest


def test_everything_is_durable_before_it_is_visible(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[tuple[str, str, int]] = []
    real_fsync, real_rename = os.fsync, os.rename

    def fsync(fd: int) -> None:
        log.append(("fsync", os.path.basename(os.readlink(f"/proc/self/fd/{fd}")), os.fstat(fd).st_size))
        real_fsync(fd)

    def rename(source: Path, target: Path) -> None:
        log.append(("rename", os.path.basename(target), 0))
        real_rename(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "rename", rename)
    path = save_step(tmp_path / "root", 1)
    sizes = {file.name: file.stat().st_size for file in path.iterdir()}
    what = [entry[:2] for entry in log]
    assert what[0] == ("fsync", tmp_path.name), "the new root's own name"
    assert what[1:3] == [("fsync", "worker-0.safetensors"), ("fsync", "manifest.json")]
    assert what[3][1].startswith(".saving-"), "the names in the new directory"
    assert what[4:] == [("rename", "step-00000001"), ("fsync", "root")]
    assert [log[1][2], log[2][2]] == [sizes["worker-0.safetensors"], sizes["manifest.json"]], "fsync before flush"


# ---- pruning


def test_the_last_k_stay(tmp_path: Path) -> None:
    for step in range(1, 7):
        save_step(tmp_path, step * 100, keep=3)
    assert names(tmp_path) == ["step-00000400", "step-00000500", "step-00000600"]


def test_order_is_by_number_also_past_eight_digits(tmp_path: Path) -> None:
    for step in (99_999_999, 100_000_000, 100_000_001):
        save_step(tmp_path, step, keep=2)
    assert steps(tmp_path) == [100_000_000, 100_000_001]


def test_keep_must_leave_something(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="keep=0"):
        save_step(tmp_path / "root", 1, keep=0)
    assert not (tmp_path / "root").exists()


def test_damaged_ones_do_not_count_and_go_when_they_are_old(tmp_path: Path) -> None:
    paths = [save_step(tmp_path, step, keep=9) for step in (1, 2, 3, 4)]
    damage(paths[2])
    damage(paths[3])
    save_step(tmp_path, 5, keep=2)
    assert names(tmp_path) == [f"step-0000000{n}" for n in (2, 3, 4, 5)], "2 and 5 are the two good ones"
    save_step(tmp_path, 6, keep=2)
    assert names(tmp_path) == ["step-00000005", "step-00000006"]


def test_a_step_saved_again_replaces_the_first_only_once_it_is_there(tmp_path: Path) -> None:
    first = save_step(tmp_path, 1)
    damage(first)
    again = save_step(tmp_path, 1)
    assert names(tmp_path) == ["step-00000001-2"]
    assert load(again).step == 1
    third = save_step(tmp_path, 1)
    assert names(tmp_path) == [third.name]


def test_what_was_just_saved_stays_even_if_later_steps_exist(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save_step(tmp_path, step)
    path = save_step(tmp_path, 1, keep=1)
    assert names(tmp_path) == [path.name]


def test_leftovers_of_killed_writers_go_and_other_files_stay(tmp_path: Path) -> None:
    write_part(begin(tmp_path, 1), "worker-0", {"w": torch.zeros(3)})  # and then it was killed
    (tmp_path / ".removing-step-00000000-abcd").mkdir()
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "step-9").mkdir()
    save_step(tmp_path, 2, keep=1)
    assert names(tmp_path) == ["notes.txt", "step-00000002", "step-9"]


# ---- disks that refuse


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 kB of its own."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "weft-test", str(disk)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True, timeout=10).returncode != 0:
        pytest.skip("may not mount a file system")
    yield disk
    subprocess.run(["umount", str(disk)], check=True, timeout=10)


def test_a_full_disk_leaves_the_previous_checkpoint_and_says_what_to_do(small_disk: Path) -> None:
    root = small_disk / "checkpoints"
    save_step(root, 1, numel=30_000)  # 120 kB
    with pytest.raises(CheckpointError) as caught:
        save_step(root, 2, numel=60_000)
    for words in ("worker-0.safetensors: No space left on device", "240 kB to write, 1", "kB free", "keep fewer"):
        assert words in caught.value.message
    assert names(root) == ["step-00000001"]
    checkpoint, skipped = newest_good(root)
    assert checkpoint is not None
    assert (checkpoint.step, skipped) == (1, [])
    save_step(root, 3, numel=30_000, keep=1)


def test_a_disk_full_at_any_point_of_saving(small_disk: Path) -> None:
    """The disk is full but for 0, 1, 2, ... pages, until a checkpoint fits."""
    root, filler = small_disk / "checkpoints", small_disk / "filler"
    save_step(root, 1)
    with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    failed = 0
    while True:
        try:
            save_step(root, 2, keep=1, numel=3000)  # 12 kB
            break
        except CheckpointError:
            failed += 1
        assert names(root) == ["step-00000001"]
        assert verify(root / "step-00000001") == []
        os.truncate(filler, filler.stat().st_size - 4096)
    assert failed > 3
    assert names(root) == ["step-00000002"]
    assert verify(root / "step-00000002") == []


def test_a_read_only_disk(small_disk: Path) -> None:
    root = small_disk / "checkpoints"
    save_step(root, 1)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True, timeout=10)
    for attempt in (lambda: save_step(root, 2), lambda: check_writable(root, 1)):
        with pytest.raises(CheckpointError, match=r"Read-only file system \(.*kB free\)\. Make it writable, or choose"):
            attempt()
    checkpoint, _ = newest_good(root)
    assert checkpoint is not None
    assert checkpoint.step == 1


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_directory(tmp_path: Path) -> None:
    tmp_path.chmod(0o555)
    for attempt in (lambda: save_step(tmp_path, 2), lambda: check_writable(tmp_path, 1)):
        with pytest.raises(CheckpointError, match=r"Permission denied .* Make it writable"):
            attempt()


def test_a_file_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("mine")
    for root in (tmp_path / "checkpoints", tmp_path / "checkpoints" / "below"):
        for attempt in (lambda root=root: save_step(root, 1), lambda root=root: check_writable(root, 1)):
            with pytest.raises(CheckpointError, match="A file is in the way"):
                attempt()


def test_a_limit_on_file_size(tmp_path: Path) -> None:
    save_step(tmp_path, 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        with pytest.raises(CheckpointError, match=r"File too large \(240 kB to write"):
            save_step(tmp_path, 2, numel=60_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert names(tmp_path) == ["step-00000001"]


def failing(real: Callable[..., Any], at: int, error: BaseException) -> Callable[..., Any]:
    calls = 0

    def call(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == at:
            raise error
        return real(*args)

    return call


@pytest.mark.parametrize("error", [OSError(errno.EIO, "Input/output error"), KeyboardInterrupt()])
@pytest.mark.parametrize(("function", "at"), [*(("fsync", n) for n in range(1, 5)), ("rename", 1), ("mkdir", 2)])
def test_an_error_at_any_step_before_the_rename_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str, at: int, error: BaseException
) -> None:
    save_step(tmp_path, 1)
    monkeypatch.setattr(os, function, failing(getattr(os, function), at, error))
    with pytest.raises(CheckpointError if isinstance(error, OSError) else KeyboardInterrupt):
        save_step(tmp_path, 2, keep=1)
    monkeypatch.undo()
    assert names(tmp_path) == ["step-00000001"]
    assert steps(tmp_path) == [1]


def test_check_writable_before_a_run(tmp_path: Path) -> None:
    check_writable(tmp_path / "new" / "checkpoints", 1000)
    assert names(tmp_path / "new" / "checkpoints") == []
    with pytest.raises(CheckpointError, match=r"No space left on device \(1e\+03 PB to write|TB to write"):
        check_writable(tmp_path, 10**18)
