"""From a name to a task: a shipped one, "package.module:Class", "path/to/file.py:Class", or a live object."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import traceback
from pathlib import Path
from types import ModuleType
from typing import Any

from weft.config import TaskRef
from weft.errors import TaskError, UnknownName, WeftError
from weft.options import construct
from weft.task import Task

REQUIRED = ("model", "data", "loss", "optimizer")


def load_task(ref: TaskRef) -> Task:
    """Import and build it. A module that raises keeps its own traceback, cut to where the user's code begins."""
    if ref.pickled:
        import cloudpickle

        task = cloudpickle.loads(ref.pickled)
    else:
        task = construct(load_class(ref.target), ref.options, f"task {ref.name!r}")
    check_task(task)
    assert isinstance(task, Task)
    return task


def load_class(target: str) -> type:
    place, colon, name = target.rpartition(":")
    if not colon:
        raise TaskError(f"task {target!r} names no class: write path/to/file.py:MyTask or package.module:MyTask.")
    module = _load_file(Path(place)) if place.endswith(".py") else _load_module(place)
    found = getattr(module, name, None)
    if not isinstance(found, type):
        classes = [k for k, v in vars(module).items() if isinstance(v, type) and v.__module__ == module.__name__]
        raise UnknownName.of(f"task class in {place}:", name, classes)
    return found


def check_task(task: Any) -> None:
    if isinstance(task, type):
        raise TaskError(f"the task is the class {task.__name__}: give an instance, {task.__name__}().")
    missing = [m for m in REQUIRED if not callable(getattr(task, m, None))]
    if missing:
        raise TaskError(f"{type(task).__name__} is no task: it has no method {', '.join(missing)}. See weft.Task.")
    if not isinstance(task, Task):
        raise TaskError(
            f"{type(task).__name__} does not derive from weft.Task: write class {type(task).__name__}(weft.Task)."
        )


def _load_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise TaskError(f"there is no file {str(path)!r}: give the path of a Python file, as in tasks/mine.py:MyTask.")
    name = f"weft_task_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    folder = str(path.resolve().parent)
    if folder not in sys.path:
        sys.path.insert(0, folder)  # as `python file.py` does: a task may import its neighbours
    try:
        spec.loader.exec_module(module)
    except BaseException as error:
        del sys.modules[name]
        raise _import_failed(str(path), error) from error
    return module


def _load_module(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name and (name == error.name or name.startswith(error.name + ".")):
            raise TaskError(
                f"there is no module {name!r}: give a shipped task, package.module:Class or path/to/file.py:Class."
            ) from error
        raise _import_failed(name, error) from error
    except Exception as error:
        raise _import_failed(name, error) from error


def _import_failed(what: str, error: BaseException) -> WeftError:
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if f.filename != __file__ and not f.filename.startswith("<frozen")]
    lines = traceback.format_list(own) + traceback.format_exception_only(error)
    return TaskError(f"{what} raised {type(error).__name__} on import:\n{''.join(lines)}".rstrip())
