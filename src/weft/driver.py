"""Task x Pattern x Cluster: check, learn the facts, show the plan, start the members, watch over them, bring the result.

This is the launcher's side. It does not import torch: models live in the members.
"""

from __future__ import annotations

import dataclasses
import datetime
import math
import os
import secrets
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec

from weft import compat, cost, errors, tasks
from weft.clusters import PRELOAD, pick_cluster, under_torchrun
from weft.clusters.base import Call, Cluster, Exited, LinkSpec, MemberSpec, Message, Output, Session, StopAsked
from weft.comm.link import WORLD
from weft.config import DATA, PLAN, RESULT, Config, RunFolder, TaskRef
from weft.data.partition import parse as parse_partitioner
from weft.diagnose import Setting, Spent, diagnose
from weft.errors import ConfigError, Interrupted, MemberFailed, RunFolderError, TaskError, UnknownName, to_wire
from weft.events import Event, EventLog, LossJoiner, losses_of, read_events
from weft.fingerprint import fingerprint
from weft.patterns import registry
from weft.patterns.base import Facts, Pattern
from weft.plan import MemberPlan, Plan
from weft.report.observers import Observer, Observers, Silent, exported
from weft.resilience.policy import Failure, culprit, decide

if TYPE_CHECKING:
    from weft.comm.wrappers import Fault
    from weft.task import Task

T = TypeVar("T")

RUNS = Path("runs")
HEAP_SLACK = 1 << 20
GRACE_S = 1.0  # for the culprit of a failure to speak after its echoes
STOP_S = 30.0  # of silence beyond the deadline, while members are on their way to where they stop and save
TRAIN_LOSS_STEPS = 50
BALANCE_AUTO = "equal shares at first, then by each worker's measured speed; who takes more examples needs more memory for activations"
MIN_SAVE_EVERY = 25


@dataclass(frozen=True)
class RunResult:
    """``loss`` and ``metrics``: on held-out data; ``train_loss``: mean over the last 50 steps; ``bytes_sent``: by all
    members; ``seconds``: from starting the members to the end; ``bottleneck``: what limited it, and what would help."""

    loss: float
    train_loss: float
    metrics: dict[str, float]
    steps: int
    seconds: float
    examples_per_s: float
    bytes_sent: int
    world: int
    run_dir: str
    bottleneck: str = ""
    notes: dict[str, float] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """One flat object; the task's metrics stand in it by their names."""
        own = {"loss": self.loss, "train_loss": self.train_loss}
        rest = ("steps", "seconds", "examples_per_s", "bytes_sent", "world", "run_dir", "bottleneck", "notes")
        return own | self.metrics | {k: getattr(self, k) for k in rest}

    @classmethod
    def from_json(cls, saved: Mapping[str, Any]) -> RunResult:
        """The inverse of ``as_json``, also of what a file made of it (there NaN is null)."""
        values: dict[str, Any] = {k: math.nan if v is None else v for k, v in saved.items()}
        own = {f.name: values.pop(f.name) for f in dataclasses.fields(cls) if f.name != "metrics"}
        return cls(metrics=values, **own)


class Job(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What every member of an attempt is told."""

    config: Config
    run_dir: str
    facts: Facts | None = None
    total_steps: int = 0
    save_every: int = 0  # 0: only at the end
    resume_from: str = ""


def run(
    task: Task | str,
    pattern: Pattern | str = "allreduce",
    cluster: Cluster | str = "auto",
    *,
    task_options: Mapping[str, Any] | None = None,
    pattern_options: Mapping[str, Any] | None = None,
    workers: int | None = None,
    steps: int | None = None,
    epochs: float | None = None,
    batch: int | None = None,
    seed: int = 0,
    dtype: str = "float32",
    device: str = "auto",
    partition: str = "shuffle",
    balance: str = "none",
    link: str = "auto",
    port: int = 0,
    threads: int = 1,
    deadline_s: float = 60.0,
    save_every: int | None = None,
    eval_every: int = 0,
    keep: int = 3,
    restarts: int = 0,
    trace: bool = False,
    tensorboard: bool = False,
    metrics_port: int = -1,
    insecure: bool = False,
    run_dir: str | Path | None = None,
    faults: Sequence[Fault] = (),
    observer: Observer | None = None,
) -> RunResult:
    """Train ``task`` under ``pattern`` on ``cluster`` and return the result. The same as ``weft run``.

    ``cluster`` "auto": torchrun where torchrun started this program, else local. Under torchrun every process calls this
    and gets the same result; ``workers`` is then what torchrun started (elsewhere 1 by default), and ``insecure`` says that
    its hosts may talk in the clear.

    ``steps`` or ``epochs`` (one of them; default: the task's) count joined batches of ``batch`` examples over all
    workers. ``save_every``: steps between checkpoints (None: a tenth of the run, 0: only at the end). ``deadline_s``
    bounds every wait of one member for another. ``balance="auto"``: each worker's share of a batch follows its measured
    speed, with the same update. ``trace``: record what each member does when, into trace.json; ``tensorboard``: write its
    events; ``metrics_port``: serve Prometheus (0: any free port, -1: no). ``faults``: from weft.testing, for trials of recovery.

    Raises ConfigError, TaskError or DataError before any worker starts; MemberFailed when a member fails and no restart
    is left; Interrupted when the user stopped it (the run can be resumed).

        result = weft.run("digits", workers=2, epochs=3)
        print(result.metrics["accuracy"], result.run_dir)
    """
    config = make_config(
        task,
        pattern,
        cluster,
        task_options or {},
        pattern_options or {},
        workers=workers,
        steps=steps,
        epochs=epochs,
        batch=batch,
        seed=seed,
        dtype=dtype,
        device=device,
        partition=partition,
        balance=balance,
        link=link,
        port=port,
        threads=threads,
        deadline_s=deadline_s,
        save_every=save_every,
        eval_every=eval_every,
        keep=keep,
        restarts=restarts,
        trace=trace,
        tensorboard=tensorboard,
        metrics_port=metrics_port,
        insecure=insecure,
        faults=[f.to_dict() for f in faults],
    )
    with open_cluster(config, cluster) as session:
        return start(config, session, observer or Silent(), run_dir)


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
    if isinstance(pattern, str):
        registry.build(pattern, pattern_options)
        name, options = pattern, dict(pattern_options)
    else:
        if pattern_options:
            raise ConfigError("pattern_options are for a pattern given by name: set them on the pattern itself.")
        name, options = pattern.name, registry.options_of(pattern)
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


# -- what a run goes through ---------------------------------------------------------------------------------------


def start(
    config: Config,
    session: Session,
    observer: Observer,
    run_dir: str | Path | None = None,
    interrupts: Interrupts | None = None,
) -> RunResult:
    """A new run, from preflight to result. One that an outer launcher has restarted goes on where it was."""

    def lead(interrupts: Interrupts) -> RunResult:
        path = Path(run_dir) if run_dir else RUNS / new_name(config, session.launch)
        if session.restart and RunFolder.holds_run(path):
            return go_on(path, config, session, observer, interrupts)
        folder = RunFolder.create(path)
        try:
            with folder.locked(), interrupts:
                return train(config, folder, session, observer, interrupts)
        except BaseException:
            folder.remove_if_unused()
            raise

    request = fingerprint("run", config, str(run_dir or ""))
    return together(config, session, request, lead, RunResult, interrupts)


def go_on(path: Path, config: Config, session: Session, observer: Observer, interrupts: Interrupts) -> RunResult:
    """After a restart by torchrun: the same command again, and the folder of the run that it began."""
    folder = RunFolder.open(path)
    if (result := folder.result()) is not None:
        return RunResult.from_json(result)
    config = msgspec.structs.replace(folder.config(), task=config.task, workers=config.workers, faults=[])
    compat.check(config)
    with folder.locked(), interrupts:
        return train(config, folder, session, observer, interrupts, resumes=True)


def resume(
    run_dir: str | Path,
    *,
    task: Task | None = None,
    workers: int | None = None,
    balance: str | None = None,
    link: str | None = None,
    port: int | None = None,
    threads: int | None = None,
    deadline_s: float | None = None,
    save_every: int | None = None,
    eval_every: int | None = None,
    keep: int | None = None,
    restarts: int | None = None,
    trace: bool | None = None,
    tensorboard: bool | None = None,
    metrics_port: int | None = None,
    insecure: bool = False,
    faults: Sequence[Fault] = (),
    observer: Observer | None = None,
    interrupts: Interrupts | None = None,
) -> RunResult:
    """Go on with a run from its newest good checkpoint: bit for bit, or with another number of workers.

    What is None stays as it was, but under torchrun there are as many workers as it started. ``task`` is needed where the
    run was started with a live object: only names are saved.
    Raises RunFolderError if there is no such run or it has ended; CheckpointError if no checkpoint of it is good.
    """
    folder = RunFolder.open(run_dir)
    observer = observer or Silent()
    config = folder.config()
    here = config.cluster
    if under_torchrun() or here == "torchrun":
        here = "auto"  # where we are now, not where it began
    place = pick_cluster(here)
    if (result := folder.result()) is not None:
        if place.restart:  # by torchrun, after all was done
            return RunResult.from_json(result)
        raise RunFolderError(
            f"the run in {str(run_dir)!r} has finished (step {result['steps']}): there is nothing to resume. Start a new run."
        )
    if place.name == "torchrun" or workers is not None:
        workers = place.world(workers)
    if workers == 1:
        link, balance = link or "auto", balance or "none"  # the old ones have nobody to join, nobody to share with
    asked = {
        "task": None if task is None else refer(task, {}),
        "cluster": place.name,
        "workers": workers,
        "balance": balance,
        "link": link,
        "port": 0 if port is None and link not in (None, "tcp") else port,
        "threads": threads,
        "deadline_s": deadline_s,
        "save_every": save_every,
        "eval_every": eval_every,
        "keep": keep,
        "restarts": restarts,
        "trace": trace,
        "tensorboard": tensorboard,
        "metrics_port": metrics_port,
        "insecure": insecure,
        "faults": [f.to_dict() for f in faults],
    }
    config = msgspec.structs.replace(config, **{name: value for name, value in asked.items() if value is not None})
    if not config.task.target and not config.task.pickled:
        raise RunFolderError(
            f"the task of {str(run_dir)!r} was a live object: resume with weft.resume(run_dir, task=...)."
        )
    compat.check(config)

    def lead(interrupts: Interrupts) -> RunResult:
        with folder.locked(), interrupts:
            return train(config, folder, session, observer, interrupts, resumes=True)

    with open_cluster(config) as session:
        request = fingerprint("resume", config, str(run_dir))
        return together(config, session, request, lead, RunResult, interrupts)


def explain(config: Config, session: Session, observer: Observer) -> Plan:
    """The plan, and nothing else."""
    request = fingerprint("explain", config)
    return together(config, session, request, lambda _: prepare(config, session, observer, None).plan, Plan)


def together(
    config: Config,
    session: Session,
    request: Mapping[str, str],
    lead: Callable[[Interrupts], T],
    kind: type[T],
    interrupts: Interrupts | None = None,
) -> T:
    """Of the processes of a session one leads, the others follow; all come to the same result, or the same error."""
    interrupts = interrupts or Interrupts()
    interrupts.once = bool(session.launch)
    try:
        if session.join(request, config.deadline_s, config.insecure):
            result = lead(interrupts)
            session.finish({"result": msgspec.to_builtins(result)})
            return result
    except BaseException as error:
        session.finish({"error": to_wire(error)})
        raise
    with interrupts:
        interrupts.training = True
        outcome = session.follow(msgspec.to_builtins(config.task), lambda: interrupts.count > 0)
    return msgspec.convert(outcome, kind, strict=False)


def train(
    config: Config,
    folder: RunFolder,
    session: Session,
    observer: Observer,
    interrupts: Interrupts,
    resumes: bool = False,
) -> RunResult:
    """In a folder that is ours: prepare, and run to the end, from the newest checkpoint if it ``resumes``."""
    with exported(config, folder, observer) as observers:
        found = find_checkpoint(session, folder, observers) if resumes else None
        prepared = prepare(config, session, observers, folder)
        folder.write_config(prepared.config)
        folder.write(PLAN, prepared.plan)
        if prepared.facts.indexes:
            folder.write(DATA, prepared.facts.indexes)
        return Driver(prepared, folder, session, observers, interrupts).run(found)


@dataclass(frozen=True)
class Prepared:
    config: Config
    pattern: Pattern
    facts: Facts
    plan: Plan
    links: list[LinkSpec]  # the first joins all workers
    total_steps: int
    save_every: int


def prepare(config: Config, session: Session, observer: Observer, folder: RunFolder | None) -> Prepared:
    """Learn the facts in a throw-away member, choose what is `auto`, make the plan."""
    job = Job(config=config, run_dir=str(folder.path) if folder else "")
    reply = call(session, observer, "weft.member:learn_facts", msgspec.to_builtins(job))
    config = msgspec.convert(reply["config"], Config, strict=False)
    facts = msgspec.convert(reply["facts"], Facts, strict=False)
    compat.check(config)
    pattern = registry.build(config.pattern, config.pattern_options)
    cluster = pick_cluster(config.cluster)
    chosen, why = config.link, "asked for"
    if config.link == "auto":
        chosen, why = cluster.default_carrier(config.workers, facts.device)
    cluster.check(chosen)
    links = [
        LinkSpec(
            chosen,
            len(group.members),
            config.deadline_s,
            nbytes=group.nbytes + HEAP_SLACK,
            port=config.port if group.name == WORLD else 0,
            device=facts.device,
            group=group.name,
            members=group.members,
        )
        for group in pattern.groups(facts, config.workers)
    ]
    total = config.total_steps(facts.train_examples)
    save_every = save_interval(config, total, pattern.period(facts, config))
    plan = make_plan(config, facts, pattern, chosen, total, save_every, why, session.notes)
    if isinstance(observer, Observers):
        plan.choices.update(observer.choices)
    observer.on_plan(plan)
    return Prepared(config, pattern, facts, plan, links, total, save_every)


def call(session: Session, observer: Observer, entry: str, payload: dict[str, Any]) -> dict[str, Any]:
    """Run an entry in a throw-away member; its error is raised here."""
    ask = Call(session, lambda output: observer.on_output(output.member, output.text))
    ended = ask(entry, payload)
    if ended.error is not None:
        error = errors.from_wire(ended.error)
        if not hasattr(errors, ended.error["kind"]):
            raise TaskError(f"the task failed in its first step:\n{ended.error['traceback'].rstrip()}")
        raise error
    if ended.failed:
        failure = failure_of(ended, "preflight")
        raise MemberFailed(f"the preflight process was lost: {failure.cause}", cause=failure.cause)
    return ask.reply


def find_checkpoint(session: Session, folder: RunFolder, observer: Observer) -> dict[str, Any]:
    """{"path", "step"} of the newest good one; empty if none was ever saved. Damaged ones are told and skipped."""
    reply = call(session, observer, "weft.member:find_checkpoint", {"run_dir": str(folder.path)})
    for reason in reply["skipped"]:
        observer.on_event(
            Event(kind="warning", role="driver", values={"text": f"skipped a damaged checkpoint: {reason}"})
        )
    if "path" not in reply and reply["skipped"]:
        raise errors.CheckpointError(f"no checkpoint of {str(folder.path)!r} is good: {'; '.join(reply['skipped'])}")
    return reply if "path" in reply else {}


def make_plan(
    config: Config,
    facts: Facts,
    pattern: Pattern,
    carrier: str,
    total_steps: int,
    save_every: int,
    why: str,
    cluster_notes: Sequence[str] = (),
) -> Plan:
    shares = [
        config.batch * (r + 1) // config.workers - config.batch * r // config.workers for r in range(config.workers)
    ]
    if facts.owned:
        shares = [round(config.batch * owned / sum(facts.owned)) for owned in facts.owned]
    memory = pattern.memory(facts, config.workers)
    if training := facts.indexes.get("training"):
        memory = memory | {"data": min(training.buffer_bytes, sum(file.size for file in training.files))}
    return Plan(
        task=config.task.name,
        pattern=config.pattern,
        tier=pattern.tier,
        answers=pattern.answers,
        cluster=config.cluster,
        steps=total_steps,
        epochs=total_steps / config.steps_per_epoch(facts.train_examples) if facts.train_examples else None,
        batch=config.batch,
        num_parameters=sum(math.prod(p.shape) for p in facts.params),
        num_trainable=sum(math.prod(p.shape) for p in facts.params if p.trainable),
        train_examples=facts.train_examples,
        test_examples=facts.test_examples,
        dtype=config.dtype,
        members=[
            MemberPlan(
                role=role.name,
                member=m,
                device=facts.device,
                does=role.does,
                examples_per_step=shares[m],
                memory=memory,
            )
            for role in pattern.roles(config.workers)
            for m in range(role.count)
        ],
        links=pattern.links(facts, config, lambda n, world: cost.all_reduce_bytes(carrier, n, world), carrier),
        checkpoints=checkpoint_policy(config, save_every),
        choices={
            "link": f"{carrier} ({why})",
            "device": f"{facts.device} ({'asked for' if config.device != 'auto' else 'auto'})",
        }
        | ({"balance": BALANCE_AUTO} if config.balance == "auto" else {}),
        notes=[
            *pattern.notes(facts, config),
            *facts.about_data,
            *([f"data: partition {config.partition}"] if config.partition != "shuffle" else []),
            *cluster_notes,
        ],
        config={k: v for k, v in msgspec.to_builtins(config).items() if k != "task"},
    )


def save_interval(config: Config, total_steps: int, period: int) -> int:
    """Steps between checkpoints; 0: only at the end. By default whole periods of the pattern: they cost no exchange."""
    if config.save_every is not None:
        return config.save_every
    every = max(MIN_SAVE_EVERY, total_steps // 10)
    return math.ceil(every / period) * period


def checkpoint_policy(config: Config, every: int) -> str:
    when = f"every {every} steps and at the end" if every else "at the end"
    return f"{when}, the last {config.keep} are kept"


def new_name(config: Config, launch: str) -> str:
    """``launch`` is found again after a restart; where nobody restarts us, the time and chance name the run."""
    launch = launch or f"{datetime.datetime.now():%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"
    return f"{config.task.name}-{config.pattern}-{launch}"


def failure_of(event: Exited, role: str) -> Failure:
    error = event.error or {}
    name = signal.Signals(event.signal).name if event.signal else ""
    return Failure(
        event.member,
        role,
        event.code,
        event.signal,
        name,
        error.get("kind", ""),
        error.get("message", ""),
        error.get("traceback", ""),
        tuple(error.get("ranks", ())),
    )


def fold(failures: Sequence[Failure]) -> list[str]:
    """["worker 0, 2, 3: PeerLost"]: those who failed alike in one phrase."""
    alike: dict[tuple[str, str], list[int]] = {}
    for f in failures:
        alike.setdefault((f.role, f.kind or f.cause), []).append(f.member)
    return [f"{role} {', '.join(map(str, sorted(members)))}: {what}" for (role, what), members in alike.items()]


class Interrupts:
    """Counts Ctrl-C and SIGTERM while it is entered (in the main thread; elsewhere Python gives no signals).

    ``lasting``: and goes on to do so, for a program that has nothing else to do but to say how it ended. ``once``: a second
    signal counts for nothing: torchrun passes on what the terminal has sent us already, and ends us itself in time.
    """

    def __init__(self, lasting: bool = False) -> None:
        self.lasting = lasting
        self.once = False
        self.count = 0
        self.training = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *exc: object) -> None:
        if not self.lasting:
            for number, handler in self._before.items():
                signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.count = 1 if self.once else self.count + 1
        if not self.training:
            raise Interrupted("stopped before training began: nothing was lost.")


class Totals:
    """What the result says, added up from ticks."""

    def __init__(self) -> None:
        self.losses: deque[tuple[int, float]] = deque(maxlen=4 * TRAIN_LOSS_STEPS)
        self.bytes_sent = 0
        self.metrics: dict[str, float] = {}
        self.step = 0
        self.spent: dict[int, Spent] = {}  # by member, without step 1, which warms up
        self.saving_s = 0.0
        self._marks: list[tuple[float, float]] = []  # (time, joined examples since the mark before) by rank 0

    def add(self, event: Event) -> None:
        if event.kind == "eval":
            self.metrics = dict(event.values)
        if event.kind == "started" and event.member == 0:
            self._marks = [(event.time, 0.0)]
        values = event.values
        if event.kind == "loss" or event.member == 0:
            self.losses += losses_of(event)
        if event.kind == "saved":
            self.saving_s += values["seconds"]
        if event.kind != "ticks":
            return
        self._add_spent(event)
        self.bytes_sent += int(values["bytes_sent"])
        if event.member == 0:
            self.step = values["last"]
            self._marks.append((event.time, values["examples"]))

    def _add_spent(self, event: Event) -> None:
        values = event.values
        if values["last"] == 1:
            return
        spent = self.spent.setdefault(event.member, Spent())
        spent.steps += values["last"] - values["first"] + 1
        for name in ("compute_s", "data_s", "exchange_s", "wait_s", "skew_s", "bytes_sent", "messages"):
            setattr(spent, name, getattr(spent, name) + values.get(name, 0))

    def go_back(self, step: int) -> None:
        kept = [(s, v) for s, v in self.losses if s <= step]
        self.losses.clear()
        self.losses += kept
        self._marks.clear()
        self.step = step

    @property
    def train_loss(self) -> float:
        late = [v for _, v in self.losses][-TRAIN_LOSS_STEPS:]
        return sum(late) / len(late) if late else math.nan

    @property
    def examples_per_s(self) -> float:
        """From the end of the first step (it warms up; in a short run: from the start) to the last tick."""
        marks = self._marks[1:] if len(self._marks) > 4 else self._marks
        if len(marks) < 2:
            return 0.0
        seconds = marks[-1][0] - marks[0][0]
        return sum(n for _, n in marks[1:]) / seconds if seconds > 0 else 0.0


class Driver:
    """Starts the members, watches over them, brings the run back after a failure if it may."""

    def __init__(
        self, prepared: Prepared, folder: RunFolder, session: Session, observer: Observer, interrupts: Interrupts
    ) -> None:
        self.prepared, self.folder, self.session = prepared, folder, session
        self.observer, self.interrupts = observer, interrupts
        self.totals = Totals()
        self.losses = LossJoiner(0)
        self.heard_s = 0.0
        self.log = EventLog(folder.events)
        self.outputs: dict[int, Any] = {}

    def run(self, found: Mapping[str, Any] | None = None) -> RunResult:
        config = self.prepared.config
        restarts_left, attempt = config.restarts, 0
        started = time.monotonic()
        self.tell("plan", text=f"{self.prepared.plan.task} x {self.prepared.plan.pattern}")
        self.interrupts.training = True
        try:
            if found:
                for event in read_events(self.folder.events):  # the training loss of what was done before
                    if event.kind in ("ticks", "loss"):
                        self.totals.add(event)
                self.totals.bytes_sent, self.totals.saving_s = 0, 0.0
                self.totals.spent.clear()
                self.tell("resumed", path=found["path"], step=found["step"])
                self.totals.go_back(found["step"])
            while True:
                failures = self.attempt(found or {}, attempt)
                if not failures:
                    break
                failure = culprit(failures)
                decision = decide(failure, restarts_left)
                self.tell_failure(failure)
                if not decision.restart:
                    raise self.failed(failure, failures, decision.reason if config.restarts else "")
                restarts_left, attempt = restarts_left - 1, attempt + 1
                found = find_checkpoint(self.session, self.folder, self)
                self.totals.go_back(found.get("step", 0))
                self.tell("restarted", attempt=attempt, from_step=found.get("step", 0), reason=decision.reason)
            if self.totals.step < self.prepared.total_steps:
                raise Interrupted(
                    f"stopped at step {self.totals.step} of {self.prepared.total_steps}, and saved. Go on with: weft resume {self.folder.path}"
                )
            result = self.result(time.monotonic() - started)
            self.folder.write(RESULT, result.as_json())
            self.tell("finished", seconds=result.seconds, metrics=result.metrics)
            return result
        finally:
            self.log.close()
            for file in self.outputs.values():
                file.close()

    def attempt(self, found: Mapping[str, Any], number: int) -> list[Failure]:
        """Start all members and wait until none is left. Returns who failed, in order; empty if all ended well."""
        p = self.prepared
        config = p.config if number == 0 else msgspec.structs.replace(p.config, faults=[])
        job = Job(
            config=config,
            run_dir=str(self.folder.path),
            facts=p.facts,
            total_steps=p.total_steps,
            save_every=p.save_every,
            resume_from=found.get("path", ""),
        )
        payload = msgspec.to_builtins(job)
        members = [
            MemberSpec(m, role.name, "weft.member:work", payload)
            for role in p.pattern.roles(config.workers)
            for m in range(role.count)
        ]
        self.losses = LossJoiner(len(members))
        self.session.start(members, p.links)
        alive = {m.member: m.role for m in members}
        failures: list[Failure] = []
        first_failure_s = stop_asked_s = math.inf
        self.heard_s = time.monotonic()
        killed = False
        while alive:
            for event in self.session.poll(0.1):
                if isinstance(event, Message):
                    self.on_message(event)
                elif isinstance(event, Output):
                    self.on_output(event.member, event.text)
                elif isinstance(event, StopAsked):
                    self.interrupts.count = max(1, self.interrupts.count)
                else:
                    role = alive.pop(event.member)
                    if event.failed and not killed:
                        failures.append(failure_of(event, role))
                        first_failure_s = min(first_failure_s, time.monotonic())
            self.observer.on_idle()
            now = time.monotonic()
            if self.interrupts.count and stop_asked_s == math.inf:
                stop_asked_s = now
                again = "" if self.interrupts.once else "; Ctrl-C again stops at once"
                self.tell("warning", text=f"stopping after this step and saving{again}")
                self.session.request_stop()
            too_late = now - max(stop_asked_s, self.heard_s) > config.deadline_s + STOP_S
            if alive and not killed and (self.interrupts.count > 1 or too_late):
                self.session.kill()
                killed = True
            if failures and alive and not killed and (not culprit(failures).is_echo or now - first_failure_s > GRACE_S):
                self.session.kill()
                killed = True
        if self.interrupts.count > 1 or (killed and not failures):
            raise Interrupted(
                f"stopped at once; what came after the newest checkpoint is lost. Go on with: weft resume {self.folder.path}"
            )
        return failures

    # -- telling

    def tell(self, kind: str, **values: Any) -> None:
        self.on_event(Event(kind=kind, role="driver", step=self.totals.step, values=values))

    def on_message(self, message: Message) -> None:
        self.heard_s = time.monotonic()
        if "event" in message.data:
            self.on_event(msgspec.convert(message.data["event"], Event))

    def on_event(self, event: Event) -> None:
        self.log.write(event)
        self.totals.add(event)
        self.observer.on_event(event)
        if "own_loss" in event.values and (joined := self.losses.add(event)):
            self.on_event(joined)

    def on_output(self, member: int, text: str) -> None:
        if member not in self.outputs:
            self.outputs[member] = (self.folder.logs / f"worker-{member}.log").open("a")
        self.outputs[member].write(text)
        self.outputs[member].flush()
        self.observer.on_output(member, text)

    def on_idle(self) -> None:
        self.observer.on_idle()

    def on_plan(self, plan: Plan) -> None:
        self.observer.on_plan(plan)

    def tell_failure(self, failure: Failure) -> None:
        self.on_event(
            Event(
                kind="failed",
                role=failure.role,
                member=failure.member,
                step=self.totals.step,
                values={"cause": failure.cause, "traceback": failure.traceback},
            )
        )

    def failed(self, failure: Failure, failures: list[Failure], reason: str) -> MemberFailed:
        echoes = fold([f for f in failures if f.member != failure.member])
        lines = [
            f"{failure.role} {failure.member} failed, last heard of after step {self.totals.step}: {failure.cause}"
        ]
        if echoes:
            lines.append(f"(then, because of it: {'; '.join(echoes)})")
        if reason and reason != "no restarts are left":
            lines.append(f"Not restarted: {reason}.")
        if any(self.folder.checkpoints.glob("step-*")):
            lines.append(f"Go on from the newest checkpoint with: weft resume {self.folder.path}")
        return MemberFailed("\n".join(lines), member=failure.member, cause=failure.cause, traceback=failure.traceback)

    def bottleneck(self) -> str:
        config, totals = self.prepared.config, self.totals
        setting = Setting(
            carrier=self.prepared.links[0].carrier,
            cores=len(os.sched_getaffinity(0)),
            threads=config.threads,
            batch=config.batch,
            pattern=config.pattern,
            patterns=registry.PATTERNS,
            balance=config.balance,
            can_balance=self.prepared.pattern.balances and not parse_partitioner(config.partition).fixed,
            saving_s=totals.saving_s,
        )
        return diagnose([spent for _, spent in sorted(totals.spent.items())], setting).text

    def result(self, seconds: float) -> RunResult:
        metrics = dict(self.totals.metrics)
        loss = metrics.pop("loss", math.nan)
        totals = self.totals
        return RunResult(
            loss=loss,
            train_loss=totals.train_loss,
            metrics=metrics,
            steps=totals.step,
            seconds=seconds,
            examples_per_s=totals.examples_per_s,
            bytes_sent=totals.bytes_sent,
            world=self.prepared.config.workers,
            run_dir=str(self.folder.path),
            bottleneck=self.bottleneck(),
            notes=self.prepared.facts.notes,
        )
