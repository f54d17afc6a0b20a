"""Throw-away members: one that answers a question, or one in each worker's place, joined as the workers will be."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Sequence
from typing import Any

from weft import errors
from weft.clusters.base import Call, Exited, LinkSpec, MemberSpec, Message, Output, Session, StopAsked
from weft.errors import DeadlineExceeded, Interrupted, MemberFailed, TaskError
from weft.report.observers import Observer
from weft.resilience.policy import Failure, culprit

GRACE_S = 1.0  # for the culprit of a failure to speak after its echoes
SILENCE_S = 30.0  # beyond the deadline: every wait of a member has one of its own


def call(
    session: Session,
    observer: Observer,
    entry: str,
    payload: dict[str, Any],
    doing: str = "in its first step",
    who: str = "preflight",
) -> dict[str, Any]:
    """Run an entry in a throw-away member; its error is raised here."""
    ask = Call(session, lambda output: observer.on_output(output.member, output.text))
    ended = ask(entry, payload)
    if ended.error is not None:
        error = errors.from_wire(ended.error)
        if not hasattr(errors, ended.error["kind"]):
            raise TaskError(f"the task failed {doing}:\n{ended.error['traceback'].rstrip()}")
        raise error
    if ended.failed:
        failure = failure_of(ended, who)
        raise MemberFailed(f"the {who} process was lost: {failure.cause}", cause=failure.cause)
    return ask.reply


def call_all(
    session: Session,
    observer: Observer,
    entry: str,
    payload: dict[str, Any],
    links: Sequence[LinkSpec],
    on_message: Callable[[dict[str, Any]], None],
    doing: str = "while the link was measured",
    silence_s: float = SILENCE_S,
) -> None:
    """Run an entry in a throw-away member for each of the first link's, and hear what they say until all have ended.

    Raises MemberFailed, naming the culprit; DeadlineExceeded where nobody says anything for ``silence_s`` beyond the deadline.
    """
    world, deadline_s = links[0].world, links[0].deadline_s
    session.start([MemberSpec(m, "worker", entry, payload) for m in range(world)], links)
    alive, failures, killed = set(range(world)), list[Failure](), False
    heard = first_failure = time.monotonic()
    while alive:
        for event in session.poll(0.1):
            if isinstance(event, Message):
                heard = time.monotonic()
                on_message(event.data)
            elif isinstance(event, Output):
                observer.on_output(event.member, event.text)
            elif isinstance(event, StopAsked):
                raise Interrupted(
                    f"stopped before training began (by a signal to rank {event.rank}): nothing was lost."
                )
            elif isinstance(event, Exited):
                alive.discard(event.member)
                if event.failed and not killed:
                    first_failure = first_failure if failures else time.monotonic()
                    failures.append(failure_of(event, "worker"))
        now = time.monotonic()
        known = failures and (not culprit(failures).is_echo or now - first_failure > GRACE_S)
        if alive and not killed and (known or now - heard > deadline_s + silence_s):
            session.kill()
            killed = True
    if failures:
        failure = culprit(failures)
        raise MemberFailed(
            f"worker {failure.member} failed {doing}: {failure.cause}",
            member=failure.member,
            cause=failure.cause,
            traceback=failure.traceback,
        )
    if killed:
        raise DeadlineExceeded(f"nothing was heard of the workers for {deadline_s + silence_s:g} s {doing}")


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
