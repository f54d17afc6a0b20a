"""What this process would run, as names and short words, so that processes started apart can be compared before they begin."""

from __future__ import annotations

import hashlib
import platform
import sys
from importlib.machinery import PathFinder
from importlib.metadata import version
from pathlib import Path

import msgspec

from weft import __version__
from weft.config import Config, TaskRef


def fingerprint(command: str, config: Config, run_dir: str = "") -> dict[str, str]:
    """``command``: run, explain or resume. Paths do not count (a task may lie elsewhere on another host), contents do."""
    settings = {
        name: repr(value) for name, value in msgspec.to_builtins(config, enc_hook=str).items() if name != "task"
    }
    return settings | {
        "command": command,
        "run-dir": run_dir or "the default",
        "task": config.task.name,
        "task options": repr(config.task.options),
        "task source": _digest([path] if (path := _source(config.task)) else []),
        "weft": f"{__version__}, code {_digest(sorted(Path(__file__).parent.rglob('*.py')))}",
        "torch": version("torch"),
        "python": platform.python_version(),
    }


def _source(task: TaskRef) -> Path | None:
    """The file in which the task stands; for a live object, the program that made it. None: not found."""
    if not task.target:
        main = getattr(sys.modules["__main__"], "__file__", None)
        return Path(main) if main else None
    place = task.target.rpartition(":")[0]
    return Path(place) if place.endswith(".py") else _find(place)


def _find(module: str) -> Path | None:
    """Without importing anything: packages may import torch, or the user's whole program."""
    path, name = None, ""
    spec = None
    for part in module.split("."):
        name = f"{name}.{part}" if name else part
        spec = PathFinder.find_spec(name, path)
        if spec is None:
            return None
        path = spec.submodule_search_locations
    return Path(spec.origin) if spec and spec.origin else None


def _digest(paths: list[Path]) -> str:
    found = hashlib.sha256()
    for path in paths:
        try:
            found.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
        except OSError:
            return "cannot be read"
    return found.hexdigest()[:12] if paths else "not found"
