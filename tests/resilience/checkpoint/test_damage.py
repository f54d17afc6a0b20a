"""Every byte of a checkpoint is vouched for: flipped, cut, missing, added or foreign, it is noticed and named."""

from __future__ import annotations

import json
import os
import random
import shutil
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.resilience.checkpoint.same import assert_same

from weft.errors import CheckpointError, DamagedCheckpoint
from weft.resilience.checkpoint import list_checkpoints, load, newest_good, read_manifest, save, verify


def state(step: int) -> dict[str, object]:
    return {
        "model": {"weight": torch.full((5, 3), float(step)), "half": torch.ones(3, dtype=torch.bfloat16)},
        "optimizer": {"state": {0: {"step": torch.tensor(float(step)), "mask": torch.tensor([True, False])}}},
    }


def parts(step: int) -> dict[str, object]:
    return {"worker-0": state(step), "worker-1": {"rng": torch.arange(16, dtype=torch.uint8)}}


def save_steps(root: Path, *steps: int) -> list[Path]:
    return [save(root, parts(step), step=step, world=2, meta={"cursor": step}, keep=9).path for step in steps]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tests put back what they change."""
    return save_steps(tmp_path_factory.mktemp("root"), 3)[0]


@contextmanager
def changed(file: Path, content: bytes) -> Iterator[None]:
    before = file.read_bytes()
    file.write_bytes(content)
    try:
        yield
    finally:
        file.write_bytes(before)


def flipped(content: bytes, position: int, bits: int) -> bytes:
    return content[:position] + bytes([content[position] ^ bits]) + content[position + 1 :]


def assert_damaged(path: Path, *names: str) -> None:
    problems = verify(path)
    assert problems
    with pytest.raises(DamagedCheckpoint, match="is damaged") as caught:
        load(path)
    for name in (*names, str(path), "resume from an older one"):
        assert name in caught.value.message
    for name in names:
        assert any(name in problem for problem in problems)


def regions(file: Path) -> dict[str, range]:
    """Where what lies in a safetensors file, by its published format."""
    content = file.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = content[8 : 8 + length]
    found = {"length": range(8), "header": range(8, 8 + len(header.rstrip(b" ")))}
    found["padding"] = range(found["header"].stop, 8 + length)
    for name, entry in json.loads(header).items():
        if name != "__metadata__":
            begin, end = entry["data_offsets"]
            found[f"tensor {name}"] = range(8 + length + begin, 8 + length + end)
    return found


# ---- flipped bytes


def test_50_random_flipped_bytes_are_detected_50_times(saved: Path) -> None:
    rng = random.Random(0)
    files = sorted(saved.iterdir())
    sizes = [file.stat().st_size for file in files]
    detected = 0
    for _ in range(50):
        (file,) = rng.choices(files, sizes)
        content = file.read_bytes()
        with changed(file, flipped(content, rng.randrange(len(content)), rng.randrange(1, 256))):
            assert_damaged(saved, file.name)
            detected += 1
    assert detected == 50
    assert verify(saved) == []


def test_every_single_byte_counts(saved: Path) -> None:
    rng = random.Random(1)
    for file in saved.iterdir():
        content = file.read_bytes()
        for position in range(len(content)):
            with changed(file, flipped(content, position, rng.randrange(1, 256))):
                assert verify(saved), f"{file.name}: byte {position}"
    assert verify(saved) == []


KINDS = ["length", "header", "padding", "tensor model.weight", "tensor model.half", "tensor optimizer.state.0.step"]


@given(data=st.data(), kind=st.sampled_from(KINDS), bits=st.integers(1, 255))
def test_a_flipped_byte_of_every_kind_is_named(saved: Path, data: st.DataObject, kind: str, bits: int) -> None:
    file = saved / "worker-0.safetensors"
    where = regions(file)[kind]
    assert len(where) > 0
    position = data.draw(st.integers(where.start, where.stop - 1))
    name = kind.removeprefix("tensor ") if kind.startswith("tensor") else "header"
    with changed(file, flipped(file.read_bytes(), position, bits)):
        assert_damaged(saved, "worker-0.safetensors", name)
        assert len(verify(saved)) == 1


@given(data=st.data(), bits=st.integers(1, 255))
def test_a_flipped_byte_of_the_manifest_is_detected_also_in_its_whitespace(
    saved: Path, data: st.DataObject, bits: int
) -> None:
    file = saved / "manifest.json"
    content = file.read_bytes()
    spaces = [i for i, byte in enumerate(content) if byte in b" \n"]
    position = data.draw(st.sampled_from(spaces) | st.integers(0, len(content) - 1))
    with changed(file, flipped(content, position, bits)):
        assert_damaged(saved, "manifest.json")


def test_the_manifest_is_json(saved: Path) -> None:
    manifest = json.loads((saved / "manifest.json").read_text())
    assert (manifest["step"], manifest["world"], manifest["meta"]) == (3, 2, {"cursor": 3})
    assert read_manifest(saved).meta == {"cursor": 3}


def test_the_regions_cover_the_whole_file(saved: Path) -> None:
    file = saved / "worker-0.safetensors"
    covered = sorted(position for where in regions(file).values() for position in where)
    assert covered == list(range(file.stat().st_size))


def test_tensors_are_aligned(saved: Path) -> None:
    """Readers that map the file into memory need it; the bf16 tensor of 6 bytes would shift what follows."""
    for name, where in regions(saved / "worker-0.safetensors").items():
        if name in ("tensor model.weight", "tensor optimizer.state.0.step"):
            assert where.start % 4 == 0, name


# ---- cut, missing, added, exchanged


@given(data=st.data(), name=st.sampled_from(["worker-0.safetensors", "worker-1.safetensors", "manifest.json"]))
def test_truncation_anywhere_is_detected(saved: Path, data: st.DataObject, name: str) -> None:
    content = (saved / name).read_bytes()
    with changed(saved / name, content[: data.draw(st.integers(0, len(content) - 1))]):
        assert_damaged(saved, name)


@pytest.mark.parametrize("name", ["worker-0.safetensors", "manifest.json"])
@pytest.mark.parametrize("tail", [b"\0", b" ", b"\n", b"{}"])
def test_bytes_too_many_are_detected(saved: Path, name: str, tail: bytes) -> None:
    with changed(saved / name, (saved / name).read_bytes() + tail):
        assert_damaged(saved, name)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    (path,) = save_steps(tmp_path, 3)
    (path / "worker-1.safetensors").unlink()
    assert_damaged(path, "worker-1.safetensors is missing")


def test_an_additional_file_is_named(tmp_path: Path) -> None:
    (path,) = save_steps(tmp_path, 3)
    (path / "worker-2.safetensors").write_bytes(b"")
    assert_damaged(path, "worker-2.safetensors does not belong here")


def test_a_part_of_another_step_is_detected(tmp_path: Path) -> None:
    first, second = save_steps(tmp_path, 3, 4)
    shutil.copy(first / "worker-0.safetensors", second / "worker-0.safetensors")
    assert_damaged(second, "worker-0.safetensors", "'model.weight'")
    assert len(verify(second)) == 2, "weight and step differ, half and mask are the same"


def test_another_programs_safetensors_in_place_of_ours_is_detected(saved: Path) -> None:
    file = saved / "worker-0.safetensors"
    theirs = safetensors.torch.save({"x": torch.zeros(file.stat().st_size, dtype=torch.uint8)})
    with changed(file, theirs[: file.stat().st_size]):
        assert_damaged(saved, "header of worker-0.safetensors")
    with changed(file, theirs):
        assert_damaged(saved, "worker-0.safetensors is")


# ---- foreign


def test_what_is_no_checkpoint_is_refused_saying_where_checkpoints_lie(tmp_path: Path) -> None:
    model = tmp_path / "model.safetensors"
    safetensors.torch.save_file({"x": torch.zeros(2)}, model)
    for path in (tmp_path, model, tmp_path / "nothing"):
        with pytest.raises(CheckpointError, match=r"is no checkpoint: .*RUN/checkpoints/step-") as caught:
            load(path)
        assert not isinstance(caught.value, DamagedCheckpoint)
        assert verify(path) == [caught.value.message]


@pytest.mark.parametrize("content", [b"", b"{}", b'{"name": "an app", "start_url": "."}', b"\xff\xfe", b"null"])
def test_another_programs_manifest_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "manifest.json").write_bytes(content)
    assert_damaged(tmp_path, "manifest.json is not as it was saved, or is another program's")


def test_a_newer_format_is_refused_as_such(saved: Path) -> None:
    file = saved / "manifest.json"
    body = b'"something": "new"}'
    newer = b'{"weft_checkpoint": 2, "crc32": "%08x",\n' % zlib.crc32(body, 2) + body
    with changed(file, newer), pytest.raises(CheckpointError, match="has format 2, and this Weft reads format 1") as e:
        load(saved)
    assert not isinstance(e.value, DamagedCheckpoint)
    relabelled = file.read_bytes().replace(b'"weft_checkpoint": 1', b'"weft_checkpoint": 2', 1)
    with changed(file, relabelled):
        assert_damaged(saved, "manifest.json")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
@pytest.mark.parametrize("name", ["manifest.json", "worker-0.safetensors"])
def test_an_unreadable_file_is_named(tmp_path: Path, name: str) -> None:
    (path,) = save_steps(tmp_path, 3)
    (path / name).chmod(0)
    assert_damaged(path, f"{name} cannot be read (Permission denied)")


@pytest.mark.parametrize("name", ["manifest.json", "worker-0.safetensors"])
def test_a_directory_in_place_of_a_file_is_named(tmp_path: Path, name: str) -> None:
    (path,) = save_steps(tmp_path, 3)
    (path / name).unlink()
    (path / name).mkdir()
    assert_damaged(path, name)


# ---- the newest good one


def test_damaged_ones_are_skipped_and_named(tmp_path: Path) -> None:
    saved = save_steps(tmp_path, 1, 2, 3, 4)
    (saved[3] / "manifest.json").unlink()
    file = saved[2] / "worker-0.safetensors"
    file.write_bytes(flipped(file.read_bytes(), file.stat().st_size - 1, 1))
    checkpoint, skipped = newest_good(tmp_path)
    assert checkpoint is not None
    assert checkpoint.step == 2
    assert_same(parts(2), checkpoint.parts)
    assert len(skipped) == 2
    assert str(saved[3]) in skipped[0]
    assert str(saved[2]) in skipped[1]
    assert "worker-0.safetensors" in skipped[1]


def test_none_good(tmp_path: Path) -> None:
    assert newest_good(tmp_path / "not there") == (None, [])
    assert list_checkpoints(tmp_path / "not there") == []
    (path,) = save_steps(tmp_path, 1)
    shutil.rmtree(path)
    path.mkdir()
    checkpoint, skipped = newest_good(tmp_path)
    assert checkpoint is None
    assert str(path) in skipped[0]
