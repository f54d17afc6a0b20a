"""Task x Pattern x Cluster: check, learn the facts, show the plan, start the members, watch over them, bring the result.

This is the launcher's side. It does not import torch: models live in the members.
"""

from __future__ import annotations

import dataclasses
import datetime
import secrets
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec

from weft import compat, cost
from weft.clusters import pick_cluster, under_torchrun
from weft.clusters.base import Cluster, Session
from weft.config import CHECKED_STEPS, DATA, PLAN, Config, RunFolder
from weft.driver import equivalence
from weft.driver.prepare import find_checkpoint, prepare
from weft.driver.probe import survey
from weft.driver.requests import make_config, open_cluster, refer, with_pattern
from weft.driver.results import RunResult
from weft.driver.supervise import Driver, Interrupts
from weft.errors import RunFolderError, to_wire
from weft.fingerprint import fingerprint
from weft.patterns import registry
from weft.patterns.base import Pattern
from weft.payoff import Probe
from weft.plan import Plan
from weft.report.observers import Observer, Silent, exported

if TYPE_CHECKING:
    from weft.comm.wrappers import Fault
    from weft.task import Task


__all__ = ["Interrupts", "RunResult", "explain", "make_config", "probe", "resume", "run", "start"]

T = TypeVar("T")
RUNS = Path("runs")


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
    collective: str = "auto",
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
    check_equivalence: int | bool = 0,
    tolerance: float | None = None,
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
    speed, with the same update. ``collective``: how an exchange by messages travels (direct, tree, ring, halving; auto chooses by
    size, world and speed). ``trace``: record what each member does when, into trace.json; ``tensorboard``: write its
    events; ``metrics_port``: serve Prometheus (0: any free port, -1: no). ``check_equivalence``: compare the gradients of so many steps
    (True: 3) with those of one process first, to ``tolerance`` (None: by dtype). ``faults``: from weft.testing, for trials of recovery.

    Raises ConfigError, TaskError or DataError before any worker starts; NotEquivalent before the first step; MemberFailed when a member fails and no restart
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
        collective=collective,
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
        check_equivalence=CHECKED_STEPS if check_equivalence is True else check_equivalence or 0,
        tolerance=tolerance,
        faults=[f.to_dict() for f in faults],
    )
    with open_cluster(config, cluster) as session:
        return start(config, session, observer or Silent(), run_dir)


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
        with folder.locked():
            try:
                with interrupts:
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
    pattern: Pattern | str | None = None,
    pattern_options: Mapping[str, Any] | None = None,
    cluster: str | None = None,
    workers: int | None = None,
    balance: str | None = None,
    link: str | None = None,
    port: int | None = None,
    collective: str | None = None,
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
    """Go on with a run from its newest good checkpoint: bit for bit, or with another number of workers, or under another pattern.

    What is None stays as it was, but under torchrun there are as many workers as it started. ``pattern_options`` are those of
    ``pattern``; without it, or with the run's own, they change what they name, and its other options stay. The plan says what of
    the old pattern's state the new one has no place for. ``task`` is needed where the run was started with a live object: only
    names are saved.
    Raises RunFolderError if there is no such run or it has ended; CheckpointError if no checkpoint of it is good, or it is of
    another model.

        weft.resume("runs/digits-allreduce-...", pattern=weft.Sharded(replicas=2), workers=4)
    """
    folder = RunFolder.open(run_dir)
    observer = observer or Silent()
    config = folder.config()
    here = "auto" if under_torchrun() or config.cluster == "torchrun" else config.cluster  # now, not where it began
    place = pick_cluster(cluster or here)
    if (result := folder.result()) is not None:
        if place.restart:  # by torchrun, after all was done
            return RunResult.from_json(result)
        raise RunFolderError(
            f"the run in {str(run_dir)!r} has finished (step {result['steps']}): there is nothing to resume. Start a new run."
        )
    if cluster is not None and place.name != config.cluster:
        link = link or "auto"  # as it is there
    config, notes = with_pattern(config, pattern, pattern_options or {}), []
    if balance is None and config.balance == "auto" and not registry.PATTERNS[config.pattern].balances:
        balance = "none"
        notes.append(f"balance: equal shares from now on, for {config.pattern} does not go by each worker's time")
    if place.name == "torchrun" or workers is not None:
        workers = place.world(workers)
    if workers == 1:
        collective = collective or cost.AUTO
        link, balance = link or "auto", balance or "none"  # the old ones have nobody to join, nobody to share with
    asked = {
        "task": None if task is None else refer(task, {}),
        "cluster": place.name,
        "workers": workers,
        "balance": balance,
        "link": link,
        "port": 0 if port is None and link not in (None, "tcp") else port,
        "collective": cost.AUTO if collective is None and link not in (None, *cost.MESSAGE_CARRIERS) else collective,
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
            return train(config, folder, session, observer, interrupts, resumes=True, notes=notes)

    with open_cluster(config) as session:
        request = fingerprint("resume", config, str(run_dir))
        return together(config, session, request, lead, RunResult, interrupts)


def explain(config: Config, session: Session, observer: Observer) -> Plan:
    """The plan, and nothing else."""
    request = fingerprint("explain", config)
    return together(config, session, request, lambda _: prepare(config, session, observer, None).plan, Plan)


def probe(config: Config, session: Session, observer: Observer, say: Callable[[str], None]) -> Probe:
    """Every link and codec measured, and what pays. ``say``: hears what is being measured."""
    request = fingerprint("probe", config)
    return together(config, session, request, lambda _: survey(config, session, observer, say), Probe)


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
        interrupts.over = True  # the others end as soon as they hear of it, and then torchrun ends us
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
    notes: Sequence[str] = (),
) -> RunResult:
    """In a folder that is ours: prepare, and run to the end, from the newest checkpoint if it ``resumes``. ``notes``: for the
    plan."""
    with exported(config, folder, observer) as observers:
        found = find_checkpoint(session, folder, observers) if resumes else None
        prepared = prepare(config, session, observers, folder, found, notes)
        if prepared.config.check_equivalence and not resumes:
            prepared = dataclasses.replace(prepared, equal=equivalence.check(prepared, folder, session, observers))
        folder.write_config(prepared.config)
        folder.write(PLAN, prepared.plan)
        if prepared.facts.indexes:
            folder.write(DATA, prepared.facts.indexes)
        return Driver(prepared, folder, session, observers, interrupts).run(found)


def new_name(config: Config, launch: str) -> str:
    """``launch`` is found again after a restart; where nobody restarts us, the time and chance name the run."""
    launch = launch or f"{datetime.datetime.now():%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"
    return f"{config.task.name}-{config.pattern}-{launch}"
