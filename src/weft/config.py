"""The complete description of a run: what, how, where, how long. Written to config.json; a resume starts from it."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from weft.cost import LinkSpeed
from weft.errors import RunFolderError


class TaskRef(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where a task's class is found. ``target`` is "package.module:Class" or "path/to/file.py:Class"; a task given as a
    live object travels pickled to our own child processes (never over a network) and cannot be resumed by name."""

    name: str
    target: str = ""
    options: dict[str, Any] = {}
    pickled: bytes = b""


class Settled(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The pipeline that a run began with: kept, since schedule and cuts decide the order of sums."""

    of: str  # what it was chosen for: in another layout, or with other options, it is chosen anew
    schedule: str
    stages_per_worker: int
    items: list[int]  # in each stage
    why: str


class Measured(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a run measured of its link before it began, and what followed: kept, so that a resume does not measure again.

    ``compress``: what `--compress auto` became; "": it was not asked for.
    """

    world: int
    carrier: str
    latency_s: float = 0.0
    bytes_per_s: float = 0.0  # 0: nothing had to be measured
    compress: str = ""
    why: str = ""
    neighbours: dict[str, LinkSpeed] = {}  # of a pipeline, by the name of their channel
    pipeline: Settled | None = None


class Config(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    task: TaskRef
    pattern: str
    pattern_options: dict[str, Any] = {}
    workers: int = 1
    steps: int | None = None
    epochs: float | None = None
    batch: int = 0  # joined; 0: as the task likes it
    seed: int = 0
    dtype: str = "float32"
    device: str = "auto"
    partition: str = "shuffle"
    balance: str = "none"
    link: str = "auto"
    port: int = 0
    collective: str = "auto"  # how messages all-reduce
    threads: int = 1
    deadline_s: float = 60.0
    save_every: int | None = None  # None: a tenth of the run, 25 at least; 0: only at the end
    eval_every: int = 0  # 0: only at the end
    keep: int = 3
    restarts: int = 0
    trace: bool = False  # record spans; trace.json at the end
    tensorboard: bool = False
    metrics_port: int = -1  # serve Prometheus metrics on it; 0: any free port, -1: no
    insecure: bool = False
    check_equivalence: int = 0  # steps that are compared with one process's before the run; 0: none
    tolerance: float | None = None  # of that comparison; None: by dtype
    cluster: str = "local"
    faults: list[dict[str, Any]] = []
    measured: Measured | None = None  # not asked for: found

    def steps_per_epoch(self, num_examples: int) -> int:
        """Joined batches in a pass over the training set; the last may be smaller."""
        return -(-num_examples // self.batch)

    def total_steps(self, num_examples: int | None) -> int:
        """``num_examples``: None if a stream does not tell; the preflight then asks for steps."""
        if self.steps is not None:
            return self.steps
        assert num_examples is not None
        return max(1, round((self.epochs or 1) * self.steps_per_epoch(num_examples)))


CONFIG, DATA, RESULT, EVENTS, PLAN = "config.json", "data.json", "result.json", "events.jsonl", "plan.json"
CHECKPOINTS, LOGS, SPANS, TENSORBOARD = "checkpoints", "logs", "spans", "tensorboard"
TRACE, REPORT, HANG = "trace.json", "report.html", "hang.txt"
CHECKED_STEPS = 3  # of --check-equivalence without a number
EQUIVALENCE = ".equivalence"  # gradients to be compared, before the run
LOCK = ".lock"
PARTS = (
    LOCK,
    CONFIG,
    DATA,
    RESULT,
    EVENTS,
    PLAN,
    CHECKPOINTS,
    LOGS,
    SPANS,
    TENSORBOARD,
    TRACE,
    REPORT,
    HANG,
    EQUIVALENCE,
)


def part_of(rank: int) -> str:
    """The name of what a worker writes to a checkpoint."""
    return f"worker-{rank}"


def partial_of(path: Path) -> Path:
    """Where a file is written, until it is whole."""
    return path.with_name(f".{path.name}.part")


FIRST_PART = part_of(0)  # what all workers hold alike


class RunFolder:
    """The folder of one run: config.json, plan.json, data.json (of shards: what was counted), events.jsonl, checkpoints/, logs/, result.json; hang.txt if ranks waited for each other in vain."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / CHECKPOINTS
        self.events = path / EVENTS
        self.logs = path / LOGS
        self.stood: frozenset[str] = frozenset()  # what was in it before it was made a run's
        self.began = False  # a member of the run has been heard

    @classmethod
    def open(cls, path: str | Path) -> RunFolder:
        folder = cls(Path(path))
        if not (folder.path / CONFIG).is_file():
            what = "does not exist" if not folder.path.exists() else f"holds no {CONFIG}"
            raise RunFolderError(
                f"{str(path)!r} is not the folder of a run: it {what}. Runs write theirs to runs/ by default."
            )
        return folder

    @staticmethod
    def holds_run(path: Path) -> bool:
        return (path / CONFIG).is_file()

    @classmethod
    def create(cls, path: Path) -> RunFolder:
        """Make the folder (its parents too); refused if a run stands there already or the disk cannot be written."""
        folder = cls(path)
        if (path / CONFIG).exists():
            raise RunFolderError(
                f"{str(path)!r} holds a run already: choose another --run-dir, or `weft resume {path}`."
            )
        if path.is_file():
            raise RunFolderError(f"{str(path)!r} is a file, and a run needs a folder: choose another --run-dir.")
        try:
            folder.stood = frozenset(os.listdir(path)) if path.exists() else frozenset()
            for each in (folder.path, folder.checkpoints, folder.logs):
                each.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunFolderError(
                f"cannot make the run folder {str(path)!r}: {error.strerror}. Choose a writable --run-dir."
            ) from error
        return folder

    def remove_if_unused(self) -> None:
        """A run that never began leaves nothing behind, and what is not its own stays. For who holds the lock."""
        if self.began:
            return
        for name in set(PARTS) - self.stood:
            for each in (self.path / name, partial_of(self.path / name)):
                with contextlib.suppress(OSError):
                    shutil.rmtree(each) if each.is_dir() else each.unlink()
        with contextlib.suppress(OSError):
            self.path.rmdir()

    def write(self, name: str, value: Any) -> None:
        try:
            text = msgspec.json.format(msgspec.json.encode(value, enc_hook=str), indent=2)  # NaN becomes null
            partial = partial_of(self.path / name)
            partial.write_bytes(text + b"\n")
            partial.replace(self.path / name)
        except OSError as error:
            raise RunFolderError(
                f"cannot write {name} in {str(self.path)!r}: {error.strerror}. Free the disk or choose another --run-dir."
            ) from error

    def write_config(self, config: Config) -> None:
        """All but a live task: it would have to be unpickled, and a folder may come from anywhere."""
        self.write(CONFIG, msgspec.structs.replace(config, task=msgspec.structs.replace(config.task, pickled=b"")))

    def config(self) -> Config:
        try:
            return msgspec.json.decode((self.path / CONFIG).read_bytes(), type=Config)
        except msgspec.MsgspecError as error:
            raise RunFolderError(
                f"{str(self.path / CONFIG)!r} is damaged or of another version of Weft: {error}"
            ) from error

    def result(self) -> dict[str, Any] | None:
        path = self.path / RESULT
        if not path.is_file():
            return None
        try:
            return dict(msgspec.json.decode(path.read_bytes()))
        except (msgspec.MsgspecError, TypeError, ValueError) as error:
            raise RunFolderError(f"{str(path)!r} is damaged: {error}. Remove it to resume the run.") from error

    def writer(self) -> int | None:
        """The process that runs or resumes here now, if one does."""
        try:
            with (self.path / LOCK).open() as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
                except BlockingIOError:
                    return int(file.read().strip() or 0)
        except OSError:  # none was ever made, or it is not ours to read
            pass
        return None

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """One run at a time writes here; the lock goes with the process. Raises RunFolderError."""
        try:
            file = (self.path / LOCK).open("a+")
        except OSError as error:
            raise RunFolderError(
                f"cannot write in {str(self.path)!r}: {error.strerror}. Choose a writable --run-dir."
            ) from error
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                raise RunFolderError(
                    f"the run in {str(self.path)!r} is still going (process {file.read().strip()}): wait for it, or stop it first."
                ) from None
            file.seek(0)
            file.truncate()
            file.write(str(os.getpid()))
            file.flush()
            yield
