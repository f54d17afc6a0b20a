"""Run folders made of events by hand: every state that a run can be found in, without running one."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from weft.config import PLAN, RESULT, Config, RunFolder, TaskRef
from weft.events import Event, EventLog
from weft.plan import LinkPlan, MemberPlan, Plan

START = 1_700_000_000.0


def make_plan(workers: int, steps: int) -> Plan:
    memory = {"parameters": 1000, "gradients": 2000}
    return Plan(
        task="made",
        pattern="allreduce",
        tier="stable",
        answers={"when": "each step"},
        cluster="local",
        steps=steps,
        epochs=2.0,
        batch=60,
        num_parameters=250,
        num_trainable=250,
        train_examples=1000,
        test_examples=100,
        dtype="float32",
        members=[
            MemberPlan(role="worker", member=m, device="cpu", does="trains", examples_per_step=20, memory=memory)
            for m in range(workers)
        ],
        links=[LinkPlan(members="ring", carrier="shm", bytes_per_step=500, what="gradients")] if workers > 1 else [],
        checkpoints="at the end",
    )


def event(kind: str, at: float, member: int = -1, at_step: int = 0, /, **values: Any) -> Event:
    role = "worker" if member >= 0 else "driver"
    return Event(kind=kind, time=START + at, role=role, member=member, step=at_step, values=values)


def tick(at: float, member: int, first: int, losses: list[float | None], **values: Any) -> Event:
    seconds = {"compute_s": 0.1, "exchange_s": 0.02, "wait_s": 0.03, "data_s": 0.01}
    told = {"first": first, "last": first + len(losses) - 1, "loss": losses, "examples": 60.0, "bytes_sent": 500.0}
    return event("ticks", at, member, first + len(losses) - 1, **(told | seconds | values))


def usage(at: float, member: int, pid: int, **values: Any) -> Event:
    told = {"pid": pid, "cpu_percent": 90.0, "rss_bytes": 200_000_000, "peak_rss_bytes": 250_000_000}
    return event("usage", at, member, **(told | values))


def whole_run(workers: int = 2, steps: int = 40, losses: list[float | None] | None = None) -> list[Event]:
    """From plan to finished; ten steps a tick, half a second apart."""
    losses = losses or [2.0 / (k + 1) for k in range(steps)]
    out = [event("plan", 0.0, text="")]
    out += [event("started", 0.1, m, pid=100 + m) for m in range(workers)]
    out += [usage(0.1, m, 100 + m) for m in range(workers)]
    now = 0.1
    for first in range(1, steps + 1, 10):
        now += 0.5
        for m in range(workers):
            out.append(tick(now, m, first, losses[first - 1 : first + 9]))
            out.append(usage(now, m, 100 + m))
    out.append(event("saved", now + 0.1, 0, steps, path="checkpoints/step", seconds=0.01, bytes=1000))
    out.append(event("eval", now + 0.2, 0, steps, loss=0.5, accuracy=0.875))
    out.append(event("finished", now + 0.3, -1, steps, metrics={}, seconds=now + 0.3))
    return out


def make_folder(path: Path, events: Iterable[Event], workers: int = 2, steps: int = 40, **config: Any) -> RunFolder:
    folder = RunFolder.create(path)
    settings = {"task": TaskRef(name="made", target="made:Made"), "pattern": "allreduce", "workers": workers}
    folder.write_config(Config(**(settings | config)))
    folder.write(PLAN, make_plan(workers, steps))
    log = EventLog(folder.events)
    kinds = []
    for each in events:
        log.write(each)
        kinds.append(each.kind)
    log.close()
    if "finished" in kinds:
        folder.write(RESULT, {"loss": 0.5, "steps": steps, "examples_per_s": 1000.0})
    return folder
