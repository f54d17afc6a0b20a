"""What a member of a run does: the entries that clusters start. Everything here runs beside torch, in the member."""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import msgspec
import torch

from weft import compat, events
from weft.clusters.base import Seat, resolve
from weft.comm.endpoint import Endpoint
from weft.comm.last_call import recorder
from weft.comm.link import WORLD, Link, SoloLink, tell_all
from weft.comm.tracing import TracedLink, measure_clock
from weft.comm.wrappers import Fault, FaultyLink, strike
from weft.config import CHECKPOINTS, DATA, FIRST_PART, SPANS, Config, part_of
from weft.data.shards import Index
from weft.driver.prepare import Job
from weft.errors import CheckpointError, CommError, RunFolderError
from weft.events import Event
from weft.loading import load_task
from weft.patterns import registry
from weft.patterns.base import Context, Deposed, Pattern, Resume, SafePoint, StepReport, left_behind
from weft.patterns.handover import without
from weft.patterns.preflight import own_device, preflight
from weft.resilience import checkpoint
from weft.resilience.faulty_task import strike_task
from weft.spans import Spans, local_clock
from weft.task import Defaults
from weft.usage import Usage

TICK_S = 0.2
SUMS = ("examples", "compute_s", "exchange_s", "wait_s", "skew_s", "hidden_s", "data_s", "bytes_sent", "messages")
USAGE_S = 1.0


def learn_facts(seat: Seat) -> None:
    """Preflight: one step in a throw-away process, so that what is wrong with a task shows before any worker starts."""
    job = msgspec.convert(seat.spec.payload, Job, strict=False)
    torch.set_num_threads(job.config.threads)
    task = load_task(job.config.task)
    config = complete(job.config, task.defaults)
    compat.check(config)
    pattern = registry.build(config.pattern, config.pattern_options)
    facts = preflight(task, pattern, config, known_indexes(job.run_dir), job.per_host)
    if job.run_dir:
        state_bytes = sum(p.nbytes for p in facts.params) + facts.optimizer_bytes + sum(b.nbytes for b in facts.buffers)
        checkpoint.check_writable(Path(job.run_dir) / CHECKPOINTS, state_bytes)
    seat.send({"facts": msgspec.to_builtins(facts), "config": msgspec.to_builtins(config)})


def known_indexes(run_dir: str) -> dict[str, Index]:
    """What was counted when the run began; empty for a new run, and for data that is not in shards."""
    path = Path(run_dir) / DATA
    if not run_dir or not path.is_file():
        return {}
    try:
        return msgspec.json.decode(path.read_bytes(), type=dict[str, Index])
    except (msgspec.MsgspecError, OSError) as error:
        raise RunFolderError(f"{path} cannot be read: {error}. Remove it: the data is then counted again.") from error


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
        pattern = saved_under(found.path, found.meta)
        told = {"pattern": pattern.name, "pattern_options": registry.options_of(pattern)}
        seat.send({"path": str(found.path), "step": found.step, "world": found.world, **told})


def work(seat: Seat) -> None:
    """A member of the run proper."""
    job = msgspec.convert(seat.spec.payload, Job, strict=False)
    config, rank = job.config, seat.spec.member
    assert job.facts is not None
    torch.set_num_threads(config.threads)
    device = own_device(job.facts.device, rank)
    task = load_task(config.task)
    pattern = registry.build(config.pattern, config.pattern_options)
    role = next(r for r in pattern.roles(config.workers) if r.name == seat.spec.role)
    reporter = Reporter(seat, Usage(device), config.workers, pattern.lead(config.workers))
    resume: Resume | None = None
    if job.resume_from:
        resume = take_up(Path(job.resume_from), pattern, config, rank)
        reporter.step = resume.step
    groups = [g for g in pattern.groups(job.facts, config.workers) if rank in g.members]
    names = [g.name for g in groups if not g.frames]
    spans: Spans | None = None
    endpoint: Endpoint | None = None
    with contextlib.ExitStack() as at_end:
        if any(g.frames for g in groups):
            endpoint = at_end.enter_context(closing_with_reason(seat.endpoint()))
            if config.faults:
                strike(endpoint, [Fault.from_dict(f) for f in config.faults], step=lambda: reporter.step + 1)
        links = {name: at_end.enter_context(contextlib.closing(seat.link(name))) for name in names}
        for name, link in links.items():
            link.traffic.on_call = recorder(name, seat.note, step=lambda: reporter.step + 1)
        if config.trace:
            clock = measure_clock(links[WORLD], device, local_clock())
            place = Path(job.run_dir) / SPANS
            spans = Spans(place, role.name, rank, clock, lambda text: reporter.send("warning", text=text))
            at_end.callback(spans.close)
            links = {n: TracedLink(link, spans) for n, link in links.items()}
        if config.faults:
            faults = [Fault.from_dict(f) for f in config.faults]
            links = {
                n: FaultyLink(link, faults, step=lambda: reporter.step + 1, rank=rank) for n, link in links.items()
            }
            strike_task(task, [f for f in faults if f.rank == rank], step=lambda: reporter.step + 1)
        at_end.callback(reporter.close)  # what was done before an error is known, to the step
        world = links.pop(WORLD, None) or SoloLink()
        context = Context(
            task=task,
            pattern=pattern,
            config=config,
            facts=job.facts,
            rank=rank,
            world=config.workers,
            total_steps=job.total_steps,
            device=device,
            link=world,
            groups=links,
            endpoint=endpoint,
            save_every=job.save_every,
            tell=reporter.send,
            stop_requested=seat.stop_requested,
            resume=resume,
            spans=spans,
        )
        drive(resolve(role.entry)(context), reporter, job, world, spans)


@contextlib.contextmanager
def closing_with_reason(endpoint: Endpoint) -> Iterator[Endpoint]:
    """Who leaves in an error says so: to the others it is no end of the run."""
    try:
        yield endpoint
    except BaseException as error:
        endpoint.close(
            error if isinstance(error, CommError) else CommError(f"{type(error).__name__}: {error}", (endpoint.member,))
        )
        raise
    endpoint.close()


def saved_under(path: Path, meta: Mapping[str, Any]) -> Pattern:
    """The pattern that saved a checkpoint. Raises CheckpointError for one of before checkpoints said so in full."""
    if "pattern_options" not in meta:
        raise CheckpointError(
            f"checkpoint {path} is of an older Weft, whose checkpoints do not name the options of their pattern: resume with the version "
            "of Weft that saved it."
        )
    return registry.build(meta["pattern"], meta["pattern_options"])


def take_up(path: Path, pattern: Pattern, config: Config, rank: int) -> Resume:
    """What a checkpoint, of whatever pattern and world, holds for this rank."""
    manifest = checkpoint.read_manifest(path)
    saved = saved_under(path, manifest.meta)
    lost = [kept.kind for kept in left_behind(saved, manifest.world, pattern, config.workers)]
    own = pattern.writer_for(rank)
    alike = manifest.world == config.workers and not lost and saved.writer_for(rank) == own
    found = checkpoint.load(path, only=(FIRST_PART, part_of(own)) if alike else None)
    parts = cast(Any, found.parts)
    return Resume(found.step, found.world, without(parts, lost) if lost else parts, found.meta)


class Reporter:
    """Tells the driver what happens, many steps in one message."""

    def __init__(
        self, seat: Seat, usage: Usage, world: int, lead: int = 0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.seat, self.usage, self.clock, self.step = seat, usage, clock, 0
        self.rank, self.world, self.leads = seat.spec.member, world, seat.spec.member == lead
        self._sent = self._sampled = clock()
        self._joined = True
        self._clear()

    def _clear(self) -> None:
        self._first = self.step + 1
        self._reports: list[StepReport] = []

    def send(self, kind: str, **values: Any) -> None:
        event = Event(kind=kind, role=self.seat.spec.role, member=self.rank, step=self.step, values=values)
        self.seat.send({"event": msgspec.to_builtins(event)})

    def begin(self, step: int) -> None:
        self.step = step
        self._clear()
        self.send("started", pid=os.getpid())
        self.sample()

    def add(self, point: SafePoint) -> None:
        r = point.report
        joined = len(r.weights) == self.world or (self.leads and bool(r.staleness))
        if joined != self._joined:
            self.flush()  # a tick tells either the joined loss of its steps or this member's own
            self._joined = joined
        self.step = max(self.step, point.version)
        self._reports.append(r)
        if r.balance is not None and self.rank == 0:
            self.send("balance", shares=r.balance.shares, reason=r.balance.reason)
        if r.memory is not None:
            self.send("memory", peak_bytes=r.memory[0], held_bytes=r.memory[1])
        if self.clock() - self._sent >= TICK_S or self.step == 1:
            self.flush()

    def flush(self) -> None:
        if reports := self._reports:
            weights = [sum(r.weights) for r in reports]
            losses = [
                sum(r.losses) / weight if weight else math.nan for r, weight in zip(reports, weights, strict=True)
            ]
            told: dict[str, Any] = {}
            if any(r.losses for r in reports):
                told["loss" if self._joined else "own_loss"] = [x if math.isfinite(x) else None for x in losses]
                if not self._joined:
                    told["own_weight"] = weights
            if staleness := Counter(tau for r in reports for tau in r.staleness):
                told["staleness"] = {str(tau): count for tau, count in sorted(staleness.items())}
            sent = Counter[str]()
            for r in reports:
                sent.update(r.sent)
            if sent:
                told["sent"] = dict(sent)
            told |= {name: float(sum(getattr(r, name) for r in reports)) for name in SUMS}
            self.send("ticks", first=min(self._first, self.step), last=self.step, **told)
        self._sent = self.clock()
        if self._sent - self._sampled >= USAGE_S:
            self.sample()
        self._clear()

    def close(self) -> None:
        self.flush()
        self.sample()

    def sample(self) -> None:
        self._sampled = self.clock()
        self.send("usage", **self.usage.sample())


def drive(points: Any, reporter: Reporter, job: Job, link: Link, spans: Spans | None = None) -> None:
    """At each safe point: evaluate, save or stop, as the run's settings say. All members decide alike."""
    span = spans.span if spans is not None else lambda name: contextlib.nullcontext()
    reporter.begin(reporter.step)
    led = reporter.step  # up to here what is due was done
    for point in points:
        if point.follows:
            reporter.leads = False
            reporter.add(point)
            continue
        reporter.leads = reporter.leads or point.leads
        is_new = point.version > led
        led = max(led, point.version)
        if is_new:
            reporter.add(point)
        try:
            keep(point, is_new, reporter, job, link, span)
        except Deposed:
            continue
        if point.stop and not point.ended:
            if reporter.leads:
                reporter.send("stopped", reason="asked to")
            return


def keep(
    point: SafePoint,
    is_new: bool,
    reporter: Reporter,
    job: Job,
    link: Link,
    span: Callable[[str], contextlib.AbstractContextManager[Any]],
) -> None:
    """What is due here is saved and evaluated."""
    save_every, eval_every = job.save_every, job.config.eval_every
    done = point.ended or point.stop
    if is_new and (done or (save_every and point.version % save_every == 0)):
        reporter.flush()
        with span("save"):
            save(point, reporter, job, link)
    if point.ended or (eval_every and point.version % eval_every == 0):
        reporter.flush()
        with span("evaluate"):
            metrics = point.evaluate()
        if reporter.leads:
            reporter.send("eval", **metrics)


def save(point: SafePoint, reporter: Reporter, job: Job, link: Link) -> None:
    """By all members together. What all hold alike rank 0 writes alone; where others hold state of their own, each its part."""
    root, config, begun = Path(job.run_dir) / CHECKPOINTS, job.config, time.perf_counter()
    parts = point.parts()
    meta = {
        **point.meta(),
        "step": point.version,
        "pattern": config.pattern,
        "pattern_options": config.pattern_options,
        "seed": config.seed,
        "events": events.VERSION,
    }
    known: dict[str, Any] = {"step": point.version, "world": config.workers, "meta": meta, "keep": config.keep}
    try:
        if point.joint:
            saved = save_jointly(root, parts, link, known)
        elif reporter.leads:
            saved = checkpoint.save(root, parts, **known)
        else:
            return
    except CheckpointError as error:
        reporter.send("warning", text=str(error))
        raise
    if saved is not None:
        reporter.send("saved", path=str(saved.path), seconds=time.perf_counter() - begun, bytes=saved.bytes)


def save_jointly(
    root: Path, parts: Mapping[str, checkpoint.State], link: Link, known: dict[str, Any]
) -> checkpoint.Saved | None:
    """Rank 0 makes the folder and commits; every rank writes its parts into it. They must share a file system.

    Returns None on the other ranks. Raises CheckpointError on all ranks if one could not write, and names it.
    """
    staging = ""
    if link.rank == 0:
        staging = str(checkpoint.begin(root, known["step"]))
    staging = tell_all(link, staging)[0]
    reply: dict[str, Any] = {"parts": [], "error": ""}
    try:
        reply["parts"] = [msgspec.to_builtins(checkpoint.write_part(Path(staging), n, s)) for n, s in parts.items()]
    except CheckpointError as error:
        reply["error"] = f"worker {link.rank}: {error.message}"
    replies = tell_all(link, reply)
    try:
        if wrong := [r["error"] for r in replies if r["error"]]:
            raise CheckpointError("; ".join(wrong))
        if link.rank:
            return None
        written = [msgspec.convert(p, checkpoint.Part) for r in replies for p in r["parts"]]
        return checkpoint.commit(Path(staging), written, **known)
    except BaseException:
        if link.rank == 0:
            shutil.rmtree(staging, ignore_errors=True)
        raise
