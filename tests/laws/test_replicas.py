"""Servers with copies: real processes that are killed, stopped, and woken; the result is that of a run in which nobody was (test_history.py draws such
courses by the hundred, frame by frame)."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.laws.reference import Odd, Regression, distance, train_plainly
from tests.laws.test_parameter_server import EQUAL, STEPS, Normed, train, train_under
from tests.variants import rest_slow
from torch import nn

import weft
from weft import AllReduce, ParameterServer
from weft.compare import final_parameters
from weft.config import RunFolder
from weft.errors import ConfigError, Incompatible, MemberFailed
from weft.events import Event, read_events
from weft.testing import freeze, kill


def events_of(run_dir: Path, kind: str) -> list[Event]:
    return [e for e in read_events(RunFolder(run_dir).events) if e.kind == kind]


@pytest.mark.parametrize(("servers", "replicas"), rest_slow([(2, 2), (3, 2), (3, 3)], keep=2))
@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("make", [lambda: Regression("adamw"), Odd])
def test_synchronous_equals_one_process(tmp_path: Path, make: Any, workers: int, servers: int, replicas: int) -> None:
    """Also with sparse rows, weights that some steps do not touch, and tied ones."""
    truth = train_plainly(make(), steps=STEPS, batch=17, run_seed=3)
    pattern = ParameterServer(servers=servers, replicas=replicas)
    assert distance(train(tmp_path, make(), workers, pattern, batch=17), truth) <= EQUAL


@pytest.mark.multiprocess
@pytest.mark.parametrize("server", [2, 3, 4])
def test_a_killed_server_is_followed(tmp_path: Path, server: int) -> None:
    """Nothing is lost, nothing restarted; the first of them led."""
    truth = train_plainly(Odd(), steps=STEPS, batch=17, run_seed=3)
    settings: dict[str, Any] = {"cluster": "local", "batch": 17, "save_every": 4, "faults": [kill(rank=server, step=6)]}
    assert distance(train(tmp_path, Odd(), 2, ParameterServer(servers=3, replicas=2), **settings), truth) <= EQUAL
    (view,) = events_of(tmp_path / "run", "view")
    assert view.values["gone"] == [server]
    assert view.values["lead"] == (3 if server == 2 else 2)
    assert all(len(chain) == 2 and server not in chain for chain in view.values["chains"])
    assert not events_of(tmp_path / "run", "restarted")
    assert events_of(tmp_path / "run", "saved")[-1].step == STEPS


@pytest.mark.multiprocess
def test_running_buffers_and_the_norm_survive_a_server(tmp_path: Path) -> None:
    truth = train_under(tmp_path / "all", AllReduce(clip_norm=0.05))
    settings: dict[str, Any] = {"dtype": "float64", "steps": 6, "batch": 24, "seed": 3, "run_dir": tmp_path / "run"}
    pattern = ParameterServer(servers=2, replicas=2, clip_norm=0.05)
    weft.run(Normed(), pattern, workers=3, faults=[kill(rank=3, step=3)], **settings)
    assert distance(final_parameters(tmp_path / "run"), truth) <= EQUAL


class Slow(Regression):
    """Long enough that a server is missed, followed, and back before the end."""

    def loss(self, model: nn.Module, batch: Any) -> torch.Tensor:
        time.sleep(0.02 if torch.is_grad_enabled() else 0.0)
        return super().loss(model, batch)


@pytest.mark.multiprocess
@pytest.mark.parametrize("server", [2, 3])
def test_a_frozen_server_is_followed_and_taken_in_again(tmp_path: Path, server: int) -> None:
    """And once it has copies again the other may go."""
    truth = train_plainly(Slow(), steps=200, batch=24, run_seed=3)
    pattern = ParameterServer(servers=2, replicas=2, detect_s=0.5)
    settings: dict[str, Any] = {"cluster": "local", "batch": 24, "steps": 200, "faults": [freeze(rank=server, step=6)]}
    other = 5 - server
    seen: list[str] = []

    def tend() -> None:
        """Wakes it when it is followed, kills the other when both hold everything."""
        events, until = RunFolder(tmp_path / "run").events, time.monotonic() + 60
        while time.monotonic() < until and len(seen) < 2:
            time.sleep(0.05)
            found = list(read_events(events)) if events.exists() else []
            pids = {e.member: e.values["pid"] for e in found if e.kind == "started"}
            views = [e.values for e in found if e.kind == "view"]
            if len(views) == 1 and not seen:
                assert views[0]["gone"] == [server]
                os.kill(pids[server], signal.SIGCONT)
                seen.append("woken")
            if len(views) == 2 and len(seen) == 1:
                assert all(sorted(chain) == [2, 3] for chain in views[1]["chains"])
                time.sleep(0.3)
                os.kill(pids[other], signal.SIGKILL)
                seen.append("killed")

    watcher = threading.Thread(target=tend)
    watcher.start()
    found = train(tmp_path, Slow(), 2, pattern, **settings)
    watcher.join()
    assert seen == ["woken", "killed"]
    assert distance(found, truth) <= EQUAL


@pytest.mark.multiprocess
def test_where_all_copies_are_gone_the_run_ends_and_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    truth = train_plainly(Regression(), steps=STEPS, batch=24, run_seed=3)
    faults = [kill(rank=2, step=6), kill(rank=3, step=6)]
    settings: dict[str, Any] = {"cluster": "local", "batch": 24, "save_every": 4, "faults": faults}
    with pytest.raises(MemberFailed, match="server [23] failed.*SIGKILL"):
        train(tmp_path, Regression(), 2, ParameterServer(servers=2, replicas=2), **settings)
    weft.resume(tmp_path / "run", task=Regression(), pattern=AllReduce())
    assert distance(final_parameters(tmp_path / "run"), truth) <= EQUAL


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ConfigError, match="replicas=3.*servers=3"):
        ParameterServer(servers=2, replicas=3)
    with pytest.raises(ConfigError, match="replicas=0"):
        ParameterServer(replicas=0)
    with pytest.raises(ConfigError, match="detect_s=0"):
        ParameterServer(servers=2, replicas=2, detect_s=0.0)
    with pytest.raises(Incompatible, match="detect_s"):
        ParameterServer(detect_s=1.0)
