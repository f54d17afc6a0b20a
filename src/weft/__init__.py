"""Weft: write what to train once; choose how it is distributed with one flag; see which pattern wins."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from weft.clusters.inprocess import InProcess as InProcess
    from weft.clusters.local import Local as Local
    from weft.clusters.local import warm as warm
    from weft.clusters.torchrun import Torchrun as Torchrun
    from weft.driver import RunResult as RunResult
    from weft.driver import resume as resume
    from weft.driver import run as run
    from weft.errors import ConfigError as ConfigError
    from weft.errors import Interrupted as Interrupted
    from weft.errors import MemberFailed as MemberFailed
    from weft.errors import TaskError as TaskError
    from weft.errors import WeftError as WeftError
    from weft.exporting import export as export
    from weft.patterns.allreduce import AllReduce as AllReduce
    from weft.patterns.local_sgd import LocalSGD as LocalSGD
    from weft.patterns.local_sgd import Outer as Outer
    from weft.patterns.mesh import Mesh as Mesh
    from weft.patterns.parameter_server import ParameterServer as ParameterServer
    from weft.patterns.pipeline import Pipeline as Pipeline
    from weft.patterns.sharded import Sharded as Sharded
    from weft.patterns.tensor import Tensor as Tensor
    from weft.task import Defaults as Defaults
    from weft.task import Task as Task

__version__ = "0.1.0"

# Imported when first asked for: `weft --help` and `import weft` stay quick, and torch is left to those who train.
_HOMES = {
    "AllReduce": "weft.patterns.allreduce",
    "ConfigError": "weft.errors",
    "Defaults": "weft.task",
    "InProcess": "weft.clusters.inprocess",
    "Interrupted": "weft.errors",
    "Local": "weft.clusters.local",
    "LocalSGD": "weft.patterns.local_sgd",
    "MemberFailed": "weft.errors",
    "Mesh": "weft.patterns.mesh",
    "Outer": "weft.patterns.local_sgd",
    "ParameterServer": "weft.patterns.parameter_server",
    "Pipeline": "weft.patterns.pipeline",
    "RunResult": "weft.driver",
    "Sharded": "weft.patterns.sharded",
    "Task": "weft.task",
    "TaskError": "weft.errors",
    "Tensor": "weft.patterns.tensor",
    "Torchrun": "weft.clusters.torchrun",
    "WeftError": "weft.errors",
    "export": "weft.exporting",
    "resume": "weft.driver",
    "run": "weft.driver",
    "warm": "weft.clusters.local",
}

__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'weft' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
