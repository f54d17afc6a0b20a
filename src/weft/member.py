"""What a member of a run does: the entries that clusters start. Everything here runs beside torch, in the member."""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import torch

from weft import compat, events
from weft.clusters.base import Seat, resolve
from weft.comm.tracing import TracedLink, measure_clock
from weft.comm.wrappers import Fault, FaultyLink
from weft.config import CHECKPOINTS, FIRST_PART, SPANS, Config
from weft.driver import Job, save_interval
from weft.errors import CheckpointError
from weft.events import Event
from weft.loading import load_task
from weft.patterns import registry
from weft.patterns.base import Context, Resume, SafePoint
from weft.patterns.preflight import preflight
from weft.resilience import checkpoint
from weft.spans import Spans, local_clock
from weft.task import Defaults
from weft.usage import Usage

TICK_S = 0.2
USAGE_S = 1.0


def learn_facts(seat: Seat) -> None:
    """Preflight: one step in a throw-away process, so that what is wrong with a task shows before any worker starts."""
    job = msgspec.convert(seat.spec.payload, Job, strict=False)
    torch.set_num_threads(job.config.threads)
    task = load_task(job.config.task)
    config = complete(job.config, task.defaults)
    compat.check(config)
    pattern = registry.build(config.pattern, config.pattern_options)
    facts = preflight(task, pattern, config)
    if job.run_dir:
        state_bytes = sum(p.nbytes for p in facts.params) + facts.optimizer_bytes + sum(b.nbytes for b in facts.buffers)
        checkpoint.check_writable(Path(job.run_dir) / CHECKPOINTS, state_bytes)
    seat.send({"facts": msgspec.to_builtins(facts), "config": msgspec.to_builtins(config)})


def complete(config: Config, defaults: Defaults) -> Config:
    """What the user left open is as the task likes it."""
    if config.steps is None and config.epochs is None:
        length = {"steps": defaults.steps} if defaults.steps is not None else {"epochs": defaults.epochs}
        config = msgspec.structs.replace(config, **length)
    return msgspec.structs.replace(config, batch=config.batch or defaults.batch)


def find_checkpoint(seat: Seat) -> None:
    """The newest good checkpoint, and why newer ones were passed over."""
    found, skipped = checkpoint.newest_good(Path(seat.spec.payload["run_dir"]) / CHECKPOINTS)
    seat.send({"skipped": skipped})
    if found is not None:
        seat.send({"path": str(found.path), "step": found.step, "world": found.world})


def work(seat: Seat) -> None:
    """A member of the run proper."""
    job = msgspec.convert(seat.spec.payload, Job, strict=False)
    config, rank = job.config, seat.spec.member
    assert job.facts is not None
    torch.set_num_threads(config.threads)
    device = torch.device(job.facts.device)
    if device.type == "cuda":
        device = torch.device("cuda", rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
    task = load_task(config.task)
    pattern = registry.build(config.pattern, config.pattern_options)
    role = next(r for r in pattern.roles(config.workers) if r.name == seat.spec.role)
    reporter = Reporter(seat, Usage(device))
    step = 0
    resume: Resume | None = None
    if job.resume_from:
        found = checkpoint.load(Path(job.resume_from))
        state = found.parts[FIRST_PART]
        assert isinstance(state, dict)
        step = found.step
        resume = Resume(found.step, found.world, state, found.meta)
        reporter.step = step
    link = seat.link()
    spans: Spans | None = None
    try:
        if config.trace:
            clock = measure_clock(link, device, local_clock())
            place = Path(job.run_dir) / SPANS
            spans = Spans(place, role.name, rank, clock, lambda text: reporter.send("warning", text=text))
            link = TracedLink(link, spans)
        if config.faults:
            faults = [Fault.from_dict(f) for f in config.faults]
            link = FaultyLink(link, faults, step=lambda: reporter.step + 1)
        context = Context(
            task=task,
            pattern=pattern,
            config=config,
            facts=job.facts,
            rank=rank,
            world=config.workers,
            total_steps=job.total_steps,
            device=device,
            link=link,
            stop_requested=seat.stop_requested,
            resume=resume,
            spans=spans,
        )
        drive(resolve(role.entry)(context), reporter, config, Path(job.run_dir), job.total_steps, spans)
    finally:
        reporter.flush()  # what was done before an error is known, to the step
        reporter.sample()
        if spans is not None:
            spans.close()
        link.close()


class Reporter:
    """Tells the driver what happens, many steps in one message."""

    def __init__(self, seat: Seat, usage: Usage, clock: Callable[[], float] = time.monotonic) -> None:
        self.seat, self.usage, self.clock, self.step = seat, usage, clock, 0
        self.rank = seat.spec.member
        self._sent = self._sampled = clock()
        self._clear()

    def _clear(self) -> None:
        self._first = self.step + 1
        self._loss: list[float | None] = []
        self._sums = dict.fromkeys(("examples", "compute_s", "exchange_s", "wait_s", "data_s", "bytes_sent"), 0.0)

    def send(self, kind: str, **values: Any) -> None:
        event = Event(kind=kind, role=self.seat.spec.role, member=self.rank, step=self.step, values=values)
        self.seat.send({"event": msgspec.to_builtins(event)})

    def begin(self, step: int) -> None:
        self.step = step
        self._clear()
        self.send("started", pid=os.getpid())
        self.sample()

    def add(self, point: SafePoint) -> None:
        r, s = point.report, self._sums
        self.step = point.version
        joined = sum(r.examples)
        loss = sum(r.losses) / joined if joined else math.nan
        self._loss.append(loss if math.isfinite(loss) else None)
        s["examples"] += joined
        s["compute_s"] += r.compute_s
        s["exchange_s"] += r.exchange_s
        s["wait_s"] += r.wait_s
        s["data_s"] += r.data_s
        s["bytes_sent"] += r.bytes_sent
        if self.clock() - self._sent >= TICK_S or self.step == 1:
            self.flush()

    def flush(self) -> None:
        if self._loss:
            self.send("ticks", first=self._first, last=self.step, loss=self._loss, **self._sums)
        self._sent = self.clock()
        if self._sent - self._sampled >= USAGE_S:
            self.sample()
        self._clear()

    def sample(self) -> None:
        self._sampled = self.clock()
        self.send("usage", **self.usage.sample())


def drive(
    points: Any, reporter: Reporter, config: Config, run_dir: Path, total_steps: int, spans: Spans | None = None
) -> None:
    """At each safe point: evaluate, save or stop, as the run's settings say. All members decide alike."""
    save_every = save_interval(config, total_steps)
    span = spans.span if spans is not None else lambda name: contextlib.nullcontext()
    reporter.begin(reporter.step)
    for point in points:
        is_new = point.version > reporter.step
        if is_new:
            reporter.add(point)
        done = point.ended or point.stop
        if is_new and (done or (save_every and point.version % save_every == 0)):
            reporter.flush()
            with span("save"):
                state = point.state()  # by all members together
                if reporter.rank == 0:
                    save(state, point, reporter, config, run_dir)
        if point.ended or (config.eval_every and point.version % config.eval_every == 0):
            reporter.flush()
            with span("evaluate"):
                metrics = point.evaluate()
            if reporter.rank == 0:
                reporter.send("eval", **metrics)
        if point.stop and not point.ended:
            if reporter.rank == 0:
                reporter.send("stopped", reason="asked to")
            return


def save(state: dict[str, Any], point: SafePoint, reporter: Reporter, config: Config, run_dir: Path) -> None:
    """Written by rank 0: with whole replicas its state is everyone's."""
    meta = {
        **point.meta(),
        "step": point.version,
        "pattern": config.pattern,
        "seed": config.seed,
        "events": events.VERSION,
    }
    try:
        saved = checkpoint.save(
            run_dir / CHECKPOINTS,
            {FIRST_PART: state},
            step=point.version,
            world=config.workers,
            meta=meta,
            keep=config.keep,
        )
    except CheckpointError as error:
        reporter.send("warning", text=str(error))
        raise
    reporter.send("saved", path=str(saved.path), seconds=saved.seconds, bytes=saved.bytes)
