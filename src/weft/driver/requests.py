"""From what a user asks for to a complete, checked Config; the task itself is not touched yet."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from weft import compat, tasks
from weft.clusters import PRELOAD, pick_cluster
from weft.clusters.base import Cluster, Session
from weft.codecs.spec import AUTO
from weft.config import Config, TaskRef
from weft.data.partition import parse as parse_partitioner
from weft.errors import ConfigError, TaskError, UnknownName
from weft.patterns import registry
from weft.patterns.base import Pattern

if TYPE_CHECKING:
    from weft.task import Task


def make_config(
    task: Task | str,
    pattern: Pattern | str,
    cluster: Cluster | str,
    task_options: Mapping[str, Any],
    pattern_options: Mapping[str, Any],
    batch: int | None,
    workers: int | None,
    **settings: Any,
) -> Config:
    """Everything a run needs, checked as far as the task need not be touched. ``settings``: fields of Config."""
    name, options = name_pattern(pattern, pattern_options)
    parse_partitioner(settings["partition"])
    if batch is not None and batch < 1:
        raise ConfigError(f"batch={batch} is not possible: give a whole number of 1 or more.")
    place = pick_cluster(cluster)
    config = Config(
        task=refer(task, task_options),
        batch=batch or 0,
        pattern=name,
        pattern_options=options,
        cluster=place.name,
        workers=place.world(workers),
        **settings,
    )
    compat.check(config)
    return config


def name_pattern(pattern: Pattern | str, options: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Name and options, checked."""
    if isinstance(pattern, str):
        registry.build(pattern, options)
        return pattern, dict(options)
    if options:
        raise ConfigError("pattern_options are for a pattern given by name: set them on the pattern itself.")
    return pattern.name, registry.options_of(pattern)


def with_pattern(config: Config, pattern: Pattern | str | None, options: Mapping[str, Any]) -> Config:
    """Of a run to be resumed: another pattern, or other ``options`` of its own, of which those that are not given stay."""
    if pattern is None and not options:
        return config
    if pattern in (None, config.pattern):
        pattern, options = config.pattern, changed(config.pattern_options, options)
    assert pattern is not None
    name, options = name_pattern(pattern, options)
    same_codec = name == config.pattern and options.get("compress") == config.pattern_options.get("compress")
    return msgspec.structs.replace(
        config, pattern=name, pattern_options=options, measured=config.measured if same_codec else None
    )


def changed(options: Mapping[str, Any], by: Mapping[str, Any]) -> dict[str, Any]:
    """``outer.lr=0.5`` changes one option of ``outer``, ``outer=slowmo`` all of it."""
    result = dict(options)
    for name, value in by.items():
        old = result.get(name)
        if isinstance(value, Mapping) and "kind" not in value and old is not None:
            value = changed(old if isinstance(old, Mapping) else {"kind": old}, value)
        result[name] = value
    return result


def make_probe_config(
    task: str | None, cluster: Cluster, task_options: Mapping[str, Any], workers: int | None, **settings: Any
) -> Config:
    """Of `weft probe`: what the task's gradients would meet under allreduce, or, without a task, 25 MB. Two workers, if nobody
    says how many."""
    if workers is None and cluster.name != "torchrun":
        workers = 2
    if task is None and task_options:
        raise ConfigError(
            f"task options {sorted(task_options)} are given, and no task: write weft probe TASK -t key=value."
        )
    config = Config(
        task=refer(task, task_options) if task else TaskRef(name="25 MB"),
        pattern="allreduce",
        pattern_options={"compress": AUTO},
        cluster=cluster.name,
        workers=cluster.world(workers),
        **settings,
    )
    compat.check(config)
    return config


def refer(task: Task | str, options: Mapping[str, Any]) -> TaskRef:
    """Where members find the task. Its class is not imported here: it may import torch, or raise."""
    if not isinstance(task, str):
        if options:
            raise ConfigError("task_options are for a task given by name: set them on the task itself.")
        import cloudpickle

        from weft.loading import check_task

        check_task(task)
        return TaskRef(name=type(task).__name__, pickled=cloudpickle.dumps(task))
    if task in tasks.TASKS:
        return TaskRef(name=task, target=tasks.TASKS[task].target, options=dict(options))
    place, colon, name = task.rpartition(":")
    if not colon:
        raise UnknownName.of("task", task, tasks.TASKS, "Your own: path/to/file.py:MyTask.")
    if place.endswith(".py"):
        if not Path(place).is_file():
            raise TaskError(f"there is no file {place!r}: give the path of a Python file, as in tasks/mine.py:MyTask.")
        place = str(Path(place).resolve())  # a resume may start elsewhere
    return TaskRef(name=name, target=f"{place}:{name}", options=dict(options))


def open_cluster(config: Config, cluster: Cluster | str = "") -> Session:
    return pick_cluster(cluster or config.cluster).open(PRELOAD)
