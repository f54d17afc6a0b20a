"""While the members run: watch over them, tell what happens, bring the run back after a failure if it may."""

from __future__ import annotations

import math
import os
import signal
import threading
import time
from collections.abc import Mapping, Sequence
from types import FrameType
from typing import TYPE_CHECKING, Any

import msgspec

from weft.clusters.base import Asked, Exited, MemberSpec, Message, Output, Session, StopAsked
from weft.config import HANG, RESULT, RunFolder
from weft.data.partition import parse as parse_partitioner
from weft.diagnose import Setting, diagnose
from weft.driver.calls import failure_of
from weft.driver.hang import Hang
from weft.driver.prepare import Job, Prepared, find_checkpoint, how_messages_travel
from weft.driver.results import RunResult, Totals
from weft.errors import Interrupted, MemberFailed
from weft.events import Event, EventLog, LossJoiner, read_events
from weft.patterns import registry
from weft.patterns.base import numbered
from weft.plan import Plan
from weft.report.observers import Observer
from weft.resilience.policy import Failure, culprit, decide

if TYPE_CHECKING:
    pass


GRACE_S = 1.0  # for the culprit of a failure to speak after its echoes
STOP_S = 30.0  # of silence beyond the deadline, while members are on their way to where they stop and save


class Interrupts:
    """Counts Ctrl-C and SIGTERM while it is entered (in the main thread; elsewhere Python gives no signals).

    ``lasting``: and goes on to do so, for a program that has nothing else to do but to say how it ended. ``once``: a second
    signal counts for nothing: torchrun passes on what the terminal has sent us already, and ends us itself in time.
    ``over``: the run has ended, and what is left is to say how: no signal cuts that short.
    """

    def __init__(self, lasting: bool = False) -> None:
        self.lasting = lasting
        self.once = False
        self.count = 0
        self.training = False
        self.over = False
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
        if not self.training and not self.over:
            raise Interrupted("stopped before training began: nothing was lost.")


class Driver:
    """Starts the members, watches over them, brings the run back after a failure if it may."""

    def __init__(
        self, prepared: Prepared, folder: RunFolder, session: Session, observer: Observer, interrupts: Interrupts
    ) -> None:
        self.prepared, self.folder, self.session = prepared, folder, session
        self.observer, self.interrupts = observer, interrupts
        self.totals = Totals(prepared.total_steps, prepared.pattern.lead(prepared.config.workers))
        self.losses = LossJoiner(0)
        self.heard_s = 0.0
        self.heard_of: dict[int, tuple[float, int]] = {}  # by member: when it last spoke, and after which step
        self.answers: dict[int, Asked] = {}
        self.log = EventLog(folder.events)
        self.outputs: dict[int, Any] = {}

    def run(self, found: Mapping[str, Any] | None = None) -> RunResult:
        config = self.prepared.config
        restarts_left, attempt = config.restarts, 0
        started = time.monotonic()
        self.tell("plan", text=f"{self.prepared.plan.task} x {self.prepared.plan.pattern}")
        if chosen := how_messages_travel(self.prepared.links):
            self.tell("collective", **chosen)
        if self.prepared.news:
            self.tell("measured", **self.prepared.news)
        if self.prepared.equal:
            self.tell("equivalence", **self.prepared.equal.values)
        self.interrupts.training = True
        try:
            if found:
                for event in read_events(self.folder.events):  # the training loss of what was done before
                    if event.kind in ("ticks", "loss"):
                        self.totals.add(event)
                self.totals.bytes_sent, self.totals.saving_s = 0, 0.0
                self.totals.spent.clear()
                self.tell("resumed", **{name: found[name] for name in ("path", "step", "pattern", "world")})
                self.totals.go_back(found["step"])
            while True:
                failures = self.attempt(found or {}, attempt)
                if not failures:
                    break
                failure = self.culprit(failures)
                decision = decide(failure, restarts_left)
                self.tell_failure(failure)
                hang = self.report_hang(failure, failures)
                if not decision.restart:
                    raise self.failed(failure, failures, decision.reason if config.restarts else "", hang)
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
            for m, role in numbered(p.pattern.roles(config.workers))
        ]
        spared = {role.name for role in p.pattern.roles(config.workers) if role.spared}
        self.losses = LossJoiner(len(members))
        self.session.start(members, p.links)
        alive = {m.member: m.role for m in members}
        failures: list[Failure] = []
        gone: list[Failure] = []  # without them the others go on
        first_failure_s = stop_asked_s = ended_s = math.inf
        self.heard_s = time.monotonic()
        self.heard_of, self.answers = {}, {}
        killed = asked = puzzled = over = False
        while alive or (puzzled and not killed):
            for event in self.session.poll(0.1):
                self.folder.began = True  # else the cluster refuses here what it could not set up
                if isinstance(event, Message):
                    self.on_message(event)
                elif isinstance(event, Output):
                    self.on_output(event.member, event.text)
                elif isinstance(event, StopAsked):
                    self.interrupts.count = max(1, self.interrupts.count)
                elif isinstance(event, Asked):
                    self.answers[event.member] = event
                elif isinstance(event, Exited):
                    role = alive.pop(event.member)
                    if not event.failed and event.member == self.totals.lead:
                        ended_s = min(ended_s, time.monotonic())
                    if event.failed and not killed:
                        failure = failure_of(event, role)
                        others = role in alive.values() or ended_s < math.inf
                        if role in spared and failure.may_be_spared and others:
                            gone.append(failure)
                            self.tell("left", member=event.member, cause=failure.cause)
                            continue
                        failures += [*(each for each in gone if each.member in failure.blames), failure]
                        first_failure_s = min(first_failure_s, time.monotonic())
            self.observer.on_idle()
            now = time.monotonic()
            if self.interrupts.count and stop_asked_s == math.inf:
                stop_asked_s = now
                again = "" if self.interrupts.once else "; Ctrl-C again stops at once"
                self.tell("warning", text=f"stopping at the next step where all can, and saving{again}")
                self.session.request_stop()
            too_late = now - max(stop_asked_s, self.heard_s) > config.deadline_s + STOP_S
            if alive and not failures and set(alive.values()) <= spared:  # nobody is left who waits for them
                over = now - ended_s > GRACE_S
            if alive and not killed and (self.interrupts.count > 1 or too_late or over):
                self.session.kill()
                killed = True
            if failures and not killed:
                enough = now - first_failure_s > GRACE_S
                missing = self.culprit(failures)
                if is_puzzling(missing) and not asked:
                    asked = True
                    self.session.ask()
                puzzled = asked and not enough and len(self.answers) < len(members) and is_puzzling(missing)
                if alive and (enough or not (puzzled or missing.is_echo)):
                    self.session.kill()
                    killed = True
        if self.interrupts.count > 1 or (killed and not failures and not over):
            raise Interrupted(
                f"stopped at once; what came after the newest checkpoint is lost. Go on with: weft resume {self.folder.path}"
            )
        return failures

    def culprit(self, failures: Sequence[Failure]) -> Failure:
        return culprit(failures, [m for m, answer in self.answers.items() if answer.is_stopped])

    # -- telling

    def tell(self, kind: str, **values: Any) -> None:
        self.on_event(Event(kind=kind, role="driver", step=self.totals.step, values=values))

    def on_message(self, message: Message) -> None:
        self.heard_s = time.monotonic()
        if "event" in message.data:
            event = msgspec.convert(message.data["event"], Event)
            self.heard_of[message.member] = (self.heard_s, event.step)
            self.on_event(event)

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

    def report_hang(self, failure: Failure, failures: list[Failure]) -> Hang | None:
        """The page, in the run's folder, where it is not clear already why the run cannot go on."""
        if not is_puzzling(failure) or not self.answers:
            return None
        now = time.monotonic()
        hang = Hang(
            failure,
            failures,
            self.answers,
            self.prepared.config.deadline_s,
            {member: step for member, (_, step) in self.heard_of.items()},
            {member: now - when for member, (when, _) in self.heard_of.items()},
        )
        try:
            (self.folder.path / HANG).write_text(hang.page())
        except OSError as error:
            self.tell("warning", text=f"cannot write {HANG} in {str(self.folder.path)!r}: {error.strerror}")
        self.tell("warning", text=f"{hang.line()}; what all did last: {self.folder.path / HANG}")
        return hang

    def failed(self, failure: Failure, failures: list[Failure], reason: str, hang: Hang | None = None) -> MemberFailed:
        echoes = fold([f for f in failures if f.member != failure.member])
        lines = [
            f"{failure.role} {failure.member} failed, last heard of after step {self.totals.step}: {failure.cause}"
        ]
        if hang is not None:
            lines.append(f"{hang.line()}.")
        if echoes:
            lines.append(f"(then, because of it: {'; '.join(echoes)})")
        if reason and reason != "no restarts are left":
            lines.append(f"Not restarted: {reason}.")
        if any(self.folder.checkpoints.glob("step-*")):
            lines.append(f"Go on from the newest checkpoint with: weft resume {self.folder.path}")
        page = ""
        if hang is not None:
            lines.append(f"What each rank did last: {self.folder.path / HANG}")
            page = hang.page()
        return MemberFailed(
            "\n".join(lines),
            member=failure.member,
            cause=failure.cause,
            traceback="" if failure.is_echo else failure.traceback,  # an echo has that of one who waited
            page=page,
        )

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
            equivalence=self.totals.equivalence,
        )


def is_puzzling(failure: Failure) -> bool:
    """Somebody is missing, or ranks disagree, and what was raised does not say why: all are asked where they are."""
    return failure.is_echo or failure.kind == "Mismatch"


def fold(failures: Sequence[Failure]) -> list[str]:
    """["worker 0, 2, 3: PeerLost"]: those who failed alike in one phrase."""
    alike: dict[tuple[str, str], list[int]] = {}
    for f in failures:
        alike.setdefault((f.role, f.kind or f.cause), []).append(f.member)
    return [f"{role} {', '.join(map(str, sorted(members)))}: {what}" for (role, what), members in alike.items()]
