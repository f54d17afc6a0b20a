"""Every accepted setting changes the plan or the result, or is refused. A setting that is swallowed trains another model."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from tests.laws.reference import Regression

import weft
from weft.compare import final_parameters
from weft.config import Config, RunFolder
from weft.errors import WeftError
from weft.events import read_events
from weft.patterns.registry import PATTERNS
from weft.testing import kill

BASE: dict[str, Any] = {"workers": 2, "cluster": "inprocess", "steps": 6, "batch": 24, "save_every": 0}

#: For each field of Config: a value that differs from BASE and the default.
CHANGES: dict[str, Any] = {
    "workers": 3,
    "steps": 7,
    "epochs": 0.5,
    "batch": 30,
    "seed": 1,
    "dtype": "float64",
    "device": "cuda",
    "partition": "contiguous",
    "balance": "auto",
    "link": "inproc",
    "port": 4711,
    "collective": "ring",
    "threads": 2,
    "deadline_s": 7.0,
    "save_every": 2,
    "eval_every": 2,
    "keep": 1,
    "restarts": 1,
    "trace": True,
    "tensorboard": True,
    "metrics_port": 0,
    "insecure": True,
    "check_equivalence": 2,
    "tolerance": 0.1,
    "cluster": "local",
    "faults": [kill(rank=1, step=3)],
}
#: Fields that are an argument by another name.
NOT_SETTINGS = {"task", "pattern", "pattern_options", "measured"}

SPLIT = {"accumulate": 2, "clip_norm": 0.01, "autocast": "bf16"}
PIPELINED = {"schedule": "gpipe", "microbatches": 3, "stages_per_worker": 1, "chunks": 2, "trial": "always"}

PATTERN_CHANGES = {
    "allreduce": {
        "accumulate": 2,
        "clip_norm": 0.01,
        "autocast": "bf16",
        "compress": "int8",
        "shared_step": "on",
        "overlap": "on",
    },
    "localsgd": {
        "every": 2,
        "outer": "diloco",
        "start": 3,
        "island": 2,
        "compress": "int8",
        "within": {"clip_norm": "0.01"},
    },
    "sharded": {"replicas": 2, "reshard": "false", "compress": "int8", **SPLIT},
    "tensor": {"degree": 3, "sequence": "true", **SPLIT},
    "pipeline": {"stages": 3, **PIPELINED, **SPLIT, "accumulate": 2},
    "mesh": {
        "data": 2,
        "sharded": 4,
        "tensor": 2,
        "pipeline": 2,
        "sequence": "true",
        "reshard": "false",
        "compress": "int8",
        **PIPELINED,
        **SPLIT,
    },
}
PATTERN_CHANGES["ps"] = {
    "servers": 2,
    "staleness": 1,
    "start": 1,
    "backup_workers": 1,
    "correction": "rate",
    "dc_lambda": 0.1,
    "clip_norm": 0.01,
    "accumulate": 2,
    "autocast": "bf16",
    "replicas": 2,
    "detect_s": 5.0,
}
#: What a pattern needs so that it can run for BASE's few steps.
PATTERN_BASE: dict[str, dict[str, Any]] = {
    "allreduce": {},
    "localsgd": {"every": 4},
    "sharded": {},
    "tensor": {},
    "pipeline": {"schedule": "1f1b"},
    "mesh": {"sharded": 2},
    "ps": {},
}


class Plans:
    def __init__(self) -> None:
        self.plan: Any = None

    def on_plan(self, plan: Any) -> None:
        self.plan = plan

    def on_event(self, event: Any) -> None: ...
    def on_output(self, member: int, text: str) -> None: ...
    def on_idle(self) -> None: ...


def outcome(run_dir: Path, **settings: Any) -> Any:
    """What a user could see of a run: its plan, parameters, events by kind, checkpoints; or the refusal."""
    plans = Plans()
    settings = {**BASE, **settings}
    if settings.get("epochs"):
        settings["steps"] = None
    try:
        weft.run(Regression(), observer=plans, run_dir=run_dir, **settings)
    except WeftError as error:
        return type(error), str(error)
    plan = msgspec.to_builtins(plans.plan)
    plan.pop("config")  # repeating a setting is not applying it
    parameters = {n: t.tolist() for n, t in final_parameters(run_dir).items()}
    kinds = [
        (e.kind, e.member, e.step) for e in read_events(RunFolder(run_dir).events) if e.kind not in ("ticks", "usage")
    ]
    files = sorted(p.name for p in run_dir.iterdir())
    return plan, parameters, sorted(kinds), files, len(list((run_dir / "checkpoints").iterdir()))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return outcome(tmp_path_factory.mktemp("base") / "run")


def test_the_table_knows_every_setting() -> None:
    assert CHANGES.keys() == set(Config.__struct_fields__) - NOT_SETTINGS
    for name, pattern in PATTERNS.items():
        assert PATTERN_CHANGES[name].keys() == {f.name for f in dataclasses.fields(pattern)}


@pytest.mark.parametrize(
    "name", sorted(CHANGES.keys() - {"cluster", "faults", "restarts", "threads", "deadline_s", "keep"})
)
def test_setting_is_seen(tmp_path: Path, base: Any, name: str) -> None:
    assert outcome(tmp_path / "run", **{name: CHANGES[name]}) != base


def every_option() -> list[Any]:
    """Those of splits take a process for each worker, and so some seconds."""
    pairs = [(p, o) for p, options in PATTERN_CHANGES.items() for o in options]
    return [pytest.param(p, o, marks=[pytest.mark.slow] if PATTERNS[p].splits else []) for p, o in pairs]


@pytest.mark.parametrize(("pattern", "option"), every_option())
def test_pattern_option_is_seen(tmp_path: Path, pattern: str, option: str) -> None:
    options, place = PATTERN_BASE[pattern], {"cluster": "local"} if PATTERNS[pattern].splits else {}
    as_it_was = outcome(tmp_path / "base", pattern=pattern, pattern_options=options, **place)
    changed = outcome(
        tmp_path / "run", pattern=pattern, pattern_options=options | {option: PATTERN_CHANGES[pattern][option]}, **place
    )
    assert not isinstance(as_it_was[0], type), "refused"
    assert changed != as_it_was


def test_keep_is_seen(tmp_path: Path) -> None:
    for keep in (1, 3):
        outcome(tmp_path / str(keep), save_every=1, keep=keep)
        assert len(list((tmp_path / str(keep) / "checkpoints").iterdir())) == keep


@pytest.mark.multiprocess
def test_threads_are_seen(tmp_path: Path) -> None:
    class Threads(Regression):
        def loss(self, model: Any, batch: Any) -> torch.Tensor:
            print("threads:", torch.get_num_threads())
            return super().loss(model, batch)

    weft.run(Threads(), workers=1, steps=1, threads=3, run_dir=tmp_path / "run")
    assert "threads: 3" in (tmp_path / "run" / "logs" / "worker-0.log").read_text()


# The deadline, faults, restarts and the local cluster are seen in tests/test_recovery.py.
