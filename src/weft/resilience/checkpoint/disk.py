"""Disks refuse: say what was to be written, how much room there was, and what to do."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from weft.errors import CheckpointError

_NO_ROOM = "Free space, keep fewer checkpoints, or put the run folder on a larger disk"
_NO_RIGHT = "Make it writable, or choose another run folder"
_IN_THE_WAY = "A file is in the way: choose another run folder"
_CURES = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), _NO_ROOM),
    **dict.fromkeys((errno.EROFS, errno.EACCES, errno.EPERM), _NO_RIGHT),
    **dict.fromkeys((errno.ENOTDIR, errno.EEXIST), _IN_THE_WAY),
}


def check_writable(root: Path, nbytes: int) -> None:
    """Before a run: can ``root`` be written to, and has it room for ``nbytes``? Raises CheckpointError if not."""
    with writing(root, nbytes):
        root.mkdir(parents=True, exist_ok=True)
        probe = root / f".saving-probe-{secrets.token_hex(4)}"
        probe.mkdir()
        probe.rmdir()
        if _free_bytes(root) < nbytes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@contextmanager
def writing(path: Path, nbytes: int = 0) -> Iterator[None]:
    """Turns an OSError from writing ``nbytes`` to ``path`` into a CheckpointError."""
    free = _free_bytes(path)  # now: later our own half-written file has taken it
    try:
        yield
    except OSError as error:
        size = f"{_human(nbytes)} to write, " if nbytes else ""
        cure = _CURES.get(error.errno or 0, "Choose another run folder, or look into the disk")
        raise CheckpointError(f"cannot write {path}: {error.strerror} ({size}{_human(free)} free). {cure}") from error


def fsync_directory(path: Path) -> None:
    """Make names made or renamed in ``path`` survive a power cut."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _free_bytes(path: Path) -> int:
    return shutil.disk_usage(next(p for p in (path, *path.absolute().parents) if p.exists())).free


def _human(nbytes: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 1000:
            return f"{nbytes:.3g} {unit}"
        nbytes /= 1000
    return f"{nbytes:.3g} TB"
