"""A folder of checkpoints: write one, read one, find the newest that is good, keep the last k."""

from __future__ import annotations

import os
import re
import secrets
import shutil
import time
import zlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec

from weft.errors import CheckpointError, ConfigError, DamagedCheckpoint
from weft.resilience.checkpoint.disk import fsync_directory, writing
from weft.resilience.checkpoint.parts import Part, check_name, read_tensors, write_tensors
from weft.resilience.checkpoint.state import Json, State, decode, encode, encode_meta

VERSION = 1
MANIFEST = "manifest.json"


class Manifest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``world``: members of the run; ``meta``: what was given to ``commit``."""

    step: int
    world: int
    meta: Json
    parts: list[Part]


@dataclass(frozen=True)
class Saved:
    path: Path
    bytes: int
    seconds: float


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint. Its tensors are new, on the CPU, and belong to the caller."""

    path: Path
    step: int
    world: int
    meta: dict[str, Json]
    parts: dict[str, State]


# ---- write


def save(
    root: Path, parts: Mapping[str, State], *, step: int, world: int, meta: Mapping[str, Json], keep: int = 3
) -> Saved:
    """Write a checkpoint with one file per part under ``root``, then delete old ones (see ``commit``).

    ``meta``: what else a resumed run needs: data cursor, config fingerprint, choices made. Raises CheckpointError,
    with nothing written, if ``parts`` or ``meta`` hold a value that ``State`` does not allow; and, with the older
    checkpoints untouched and the temporary files removed, if the disk refuses.

        save(run / "checkpoints", {"worker-0": {"model": model.state_dict()}}, step=300, world=1, meta={"epoch": 2})
    """
    start = time.perf_counter()
    encoded = {name: encode(name, state) for name, state in parts.items()}
    _check(list(parts), meta, keep)
    staging = begin(root, step)
    try:
        written = [write_tensors(staging, name, tree, tensors) for name, (tree, tensors) in encoded.items()]
        saved = commit(staging, written, step=step, world=world, meta=meta, keep=keep)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    return replace(saved, seconds=time.perf_counter() - start)


def begin(root: Path, step: int) -> Path:
    """Make the temporary directory of a new checkpoint, and remove those that killed writers left behind.

    With several members: the coordinator calls ``begin`` and tells the others the path; each calls ``write_part`` and
    sends its Part back; the coordinator calls ``commit``. One checkpoint of a root at a time.
    """
    with writing(root):
        root.mkdir(parents=True, exist_ok=True)
        fsync_directory(root.parent)
        for leftover in (*root.glob(".saving-*"), *root.glob(".removing-*")):
            shutil.rmtree(leftover, ignore_errors=True)
        staging = root / f".saving-{step:08d}-{secrets.token_hex(4)}"
        staging.mkdir()
    return staging


def write_part(staging: Path, name: str, state: State) -> Part:
    """Write ``state`` durably to ``staging/NAME.safetensors``. Raises CheckpointError as ``save`` does."""
    check_name(name)
    return write_tensors(staging, name, *encode(name, state))


def commit(
    staging: Path, parts: Sequence[Part], *, step: int, world: int, meta: Mapping[str, Json], keep: int = 3
) -> Saved:
    """Write the manifest, make the checkpoint visible in one rename, then delete old ones; ``seconds`` are this call's.

    The new one stays, and so do the newest intact ones of ``keep - 1`` other steps (manifest and file sizes are looked
    at, not every byte); what is older goes. A damaged one goes only then, so that its owner can look at it.
    """
    start = time.perf_counter()
    _check([part.name for part in parts], meta, keep)
    manifest = Manifest(step=step, world=world, meta=encode_meta(meta), parts=list(parts))
    data = _seal(msgspec.json.format(msgspec.json.encode(manifest), indent=1)[1:])
    root, path = staging.parent, _free_name(staging.parent, step)
    with writing(path, len(data)):
        with (staging / MANIFEST).open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        fsync_directory(staging)
        os.rename(staging, path)
        fsync_directory(root)
    with writing(root):
        _prune(root, path, keep)
    return Saved(path, len(data) + sum(part.bytes for part in parts), time.perf_counter() - start)


def _check(names: Sequence[str], meta: Mapping[str, Json], keep: int) -> None:
    for name in names:
        check_name(name)
    if twice := [name for name in set(names) if names.count(name) > 1]:
        raise CheckpointError(f"two members wrote a part named {twice[0]!r}: give each its own name, as worker-RANK")
    encode_meta(meta)
    if keep < 1:
        raise ConfigError(f"keep={keep} would delete the checkpoint just saved: keep at least 1")


def _free_name(root: Path, step: int) -> Path:
    """A step saved again gets a new name: to replace a directory takes two renames, and a kill may fall between."""
    times = max((times for found, times, _ in _named(root) if found == step), default=0)
    return root / (f"step-{step:08d}-{times + 1}" if times else f"step-{step:08d}")


def _prune(root: Path, newest: Path, keep: int) -> None:
    kept = {_number(newest)[0]}
    for path in reversed(list_checkpoints(root)):
        step, _ = _number(path)
        if path == newest:
            continue
        if step in kept or len(kept) >= keep:
            _remove(path)
        elif _looks_intact(path):
            kept.add(step)


def _remove(path: Path) -> None:
    """Out of sight in one rename: half a deletion must not look like damage. What resists, ``begin`` tries again."""
    aside = path.with_name(f".removing-{path.name}-{secrets.token_hex(4)}")
    os.rename(path, aside)
    shutil.rmtree(aside, ignore_errors=True)


# ---- read


def load(path: Path, only: Collection[str] | None = None) -> Checkpoint:
    """Read and verify every byte; with ``only``, of the parts that have these names.

    Raises DamagedCheckpoint, naming file and tensor; or CheckpointError where there is no checkpoint, or one of another
    format version.
    """
    checkpoint, problems = _read(path, only)
    if problems:
        more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        raise _damaged(path, "; ".join(problems[:3]) + more)
    return checkpoint


def verify(path: Path) -> list[str]:
    """What is wrong with the checkpoint at ``path``, a phrase each; empty if every byte is as it was saved."""
    try:
        return _read(path)[1]
    except CheckpointError as error:
        return [error.message]


def newest_good(root: Path, only: Collection[str] | None = None) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint that verifies (None if there is none), and why each newer one was skipped. ``only``: see ``load``."""
    skipped: list[str] = []
    for path in reversed(list_checkpoints(root)):
        try:
            return load(path, only), skipped
        except CheckpointError as error:
            skipped.append(error.message)
    return None, skipped


def list_checkpoints(root: Path) -> list[Path]:
    """Finished checkpoints under ``root``, good or not, oldest first."""
    return [path for _, _, path in sorted(_named(root))]


def step_of(path: Path) -> int:
    """By its name alone."""
    return _number(path)[0]


def read_manifest(path: Path) -> Manifest:
    """The manifest alone, verified: quick, and says nothing of the tensors. Raises as ``load`` does."""
    try:
        data = (path / MANIFEST).read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointError(
            f"{path} is no checkpoint: it holds no {MANIFEST}. Checkpoints lie in RUN/checkpoints/step-*"
        ) from None
    except OSError as error:
        raise _damaged(path, f"{MANIFEST} cannot be read ({error.strerror})") from error
    head = _SEAL.match(data)
    if not head or data != _seal(data[head.end() :], int(head[1])):
        raise _damaged(path, f"{MANIFEST} is not as it was saved, or is another program's")
    if int(head[1]) != VERSION:
        raise CheckpointError(
            f"checkpoint {path} has format {int(head[1])}, and this Weft reads format {VERSION}: use the version of "
            "Weft that saved it"
        )
    manifest = msgspec.json.decode(b"{" + data[head.end() :], type=Manifest)
    return msgspec.structs.replace(manifest, meta=decode(manifest.meta, {}))


def _read(path: Path, only: Collection[str] | None = None) -> tuple[Checkpoint, list[str]]:
    manifest = read_manifest(path)
    problems = _wrong_files(path, manifest)
    parts: dict[str, State] = {}
    if not problems:
        for part in (p for p in manifest.parts if only is None or p.name in only):
            tensors, wrong = read_tensors(path / part.file, part)
            problems += wrong
            if not wrong:
                parts[part.name] = decode(part.state, tensors)
    return Checkpoint(path, manifest.step, manifest.world, manifest.meta, parts), problems


def _wrong_files(path: Path, manifest: Manifest) -> list[str]:
    """Files missing, foreign, or of the wrong length."""
    expected = {part.file: part.bytes for part in manifest.parts}
    found = {entry.name: entry.stat(follow_symlinks=False).st_size for entry in os.scandir(path)}
    del found[MANIFEST]
    problems = [f"{name} does not belong here" for name in sorted(found.keys() - expected.keys())]
    for name, size in expected.items():
        if name not in found:
            problems.append(f"{name} is missing")
        elif found[name] != size:
            problems.append(f"{name} is {found[name]} bytes long, {size} were saved")
    return problems


def _looks_intact(path: Path) -> bool:
    try:
        return not _wrong_files(path, read_manifest(path))
    except CheckpointError:
        return False


def _damaged(path: Path, why: str) -> DamagedCheckpoint:
    return DamagedCheckpoint(
        f"checkpoint {path} is damaged: {why}. Restore it from a copy, or resume from an older one "
        "(weft ckpt list RUN shows which are good)"
    )


# ---- names and seal

_NAME = re.compile(r"step-(\d{8,})(?:-(\d+))?")


def _named(root: Path) -> Iterator[tuple[int, int, Path]]:
    if root.is_dir():
        yield from ((*_number(path), path) for path in root.iterdir() if _NAME.fullmatch(path.name))


def _number(path: Path) -> tuple[int, int]:
    """(step, 1 if it is the first save of that step, 2 if the second, ...)."""
    match = _NAME.fullmatch(path.name)
    assert match
    return int(match[1]), int(match[2] or 1)


# The manifest's first line vouches for the rest of it. Its crc32 starts from the version and so covers that as well.
_SEAL = re.compile(rb'\{"weft_checkpoint": (\d{1,9}), "crc32": "[0-9a-f]{8}",\n')


def _seal(body: bytes, version: int = VERSION) -> bytes:
    """A JSON object less its opening brace -> the sealed object. ``_seal`` of an altered body gives another head."""
    return b'{"weft_checkpoint": %d, "crc32": "%08x",\n' % (version, zlib.crc32(body, version)) + body
