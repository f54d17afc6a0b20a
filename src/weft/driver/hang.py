"""One page about a run that hangs: who is missing from which call, at which line it stands, what all others did last.

Pure: what members answered and raised in, text out.
"""

from __future__ import annotations

import itertools
import linecache
import re
import sysconfig
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import weft
from weft.clusters.base import Asked
from weft.comm.last_call import LastCall
from weft.resilience.policy import Failure

MAX_FRAMES = 12
STATES = {
    "R": "at work on a core",
    "S": "asleep or waiting",
    "D": "waiting in the kernel, for a disk or a network file system",
    "T": "stopped",
    "t": "stopped by a debugger",
    "X": "ended",
    "Z": "ended",
}
_FRAME = re.compile(r'^\s*File "(?P<file>[^"]+)", line (?P<line>\d+),? in (?P<name>.+)$')
_WEFT = Path(weft.__file__).parent
_LIBRARIES = ("<frozen", "site-packages/", "dist-packages/", sysconfig.get_path("stdlib") + "/")


@dataclass(frozen=True)
class Frame:
    file: str
    line: int
    name: str

    @property
    def is_users(self) -> bool:
        """Neither Python's, nor a library's, nor ours; the tasks that we ship stand for a user's."""
        if Path(self.file).is_relative_to(_WEFT):
            return Path(self.file).is_relative_to(_WEFT / "tasks")
        return not any(part in self.file for part in _LIBRARIES)

    @property
    def source(self) -> str:
        """The line's text, where this machine has the file."""
        return linecache.getline(self.file, self.line).strip()

    def __str__(self) -> str:
        return f"{self.file}:{self.line} in {self.name}"


def frames_in(text: str, innermost_first: bool = True) -> list[Frame]:
    """Of the thread that does a member's work, innermost first, from what faulthandler or traceback wrote."""
    threads: list[list[Frame]] = [[]]
    for line in text.splitlines():
        if found := _FRAME.match(line):
            threads[-1].append(Frame(found["file"], int(found["line"]), found["name"]))
        elif line.startswith(("Thread ", "Current thread ", "Stack ")):
            threads.append([])
    own = str(_WEFT / "member.py")
    frames = next((t for t in threads if any(f.file == own for f in t)), threads[-1])
    if not innermost_first:
        frames = frames[::-1]
    ends = [k for k, f in enumerate(frames) if f.file == own]  # what called the member's work tells nothing
    return frames[: ends[-1] + 1] if ends else frames


@dataclass(frozen=True)
class Hang:
    """``missing``: whom the others blame. ``steps``, ``heard_s``: by member, its last step told and how long ago it spoke."""

    missing: Failure
    failures: Sequence[Failure]
    answers: Mapping[int, Asked]
    deadline_s: float
    steps: Mapping[int, int]
    heard_s: Mapping[int, float]

    @property
    def call(self) -> LastCall | None:
        """The call that others were in when they gave up."""
        waiting = [a.call for m, a in sorted(self.answers.items()) if a.call and not a.call.ended and self._failed(m)]
        return next((call for call in waiting if call is not None), None)

    def _failed(self, member: int) -> Failure | None:
        return next((f for f in self.failures if f.member == member), None)

    def _frames(self, member: int) -> list[Frame]:
        if failure := self._failed(member):
            return frames_in(failure.traceback, innermost_first=False)
        answer = self.answers.get(member)
        return frames_in(answer.stack) if answer is not None else []

    def line(self) -> str:
        """The one line to read first: where the missing member stands."""
        m, answer = self.missing.member, self.answers.get(self.missing.member)
        who = f"{self.missing.role} {m}"
        if self._failed(m) is not None:
            return f"{who} said so first, in {_call(answer)}"
        if answer is None:
            return f"{who} gave no answer: its host, or the process that watches over it, cannot be reached"
        if answer.is_stopped:
            return f"{who} (process {answer.pid}) is {STATES[answer.state]}; its last call was {_call(answer)}"
        if answer.state in ("X", "Z"):
            return f"{who} had ended; its last call was {_call(answer)}"
        frames = self._frames(m)
        users = next((f for f in frames if f.is_users), None)
        if answer.ended_s is None and answer.call is not None and users is None:
            return f"{who} is in {_call(answer)}, and has been for {answer.began_s:.1f} s"
        if (at := users or next(iter(frames), None)) is None:
            doing = STATES.get(answer.state, "there")
            return f"{who} (process {answer.pid}) did not answer; it is {doing}; its last call was {_call(answer)}"
        source = f": {at.source}" if at.source else ""
        return f"{who} is at {at}{source}"

    def page(self) -> str:
        call, m = self.call, self.missing.member
        title = f"{self.missing.role} {m}: {self.missing.cause}" if self.missing.cause else ""
        if self.missing.kind == "DeadlineExceeded" and call is not None and self._failed(m) is None:
            title = (
                f"{self.missing.role} {m} did not come to call {call.number} of group {call.group!r}, {call.what} "
                f"(step {call.step}), within {self.deadline_s:g} s"
            )
        order = [m, *(k for k in sorted({*self.answers, *self.steps}) if k != m)]
        parts = [title, self.line() + ".", *(self._member(k) for k in order), "What to do: " + self.advice()]
        return "\n\n".join(parts) + "\n"

    def _member(self, member: int) -> str:
        answer, failure = self.answers.get(member), self._failed(member)
        heard = f"last heard of {self.heard_s[member]:.1f} s ago" if member in self.heard_s else "never heard of"
        if answer is None or answer.call is None:
            heard += f", after step {self.steps.get(member, 0)}"
        state = "did not answer"
        if failure is not None:
            state = f"gave up: {failure.kind}" if failure.kind else failure.cause
        elif answer is not None:
            state = STATES.get(answer.state, "there")
        pid = f" (process {answer.pid})" if answer is not None else ""
        lines = [f"{self.missing.role} {member}{pid}: {state}; {heard}"]
        if answer is not None:
            lines.append(f"  last call: {_call(answer)}{_since(answer)}")
        frames = self._frames(member)
        if failure is not None and failure.blames:  # it waited: how, is the link's affair
            frames = [f for f in frames if not Path(f.file).is_relative_to(_WEFT / "comm")]
        if users := _users(frames):
            lines.append("  lines of the task, innermost first:")
            for frame in users[:MAX_FRAMES]:
                lines += [f"    {frame}", *([f"        {frame.source}"] if frame.source else [])]
        if rest := [f for f in frames if f not in users]:
            lines.append("  the whole stack, innermost first:" if users else "  at, innermost first:")
            shown = frames if users else rest
            lines += [f"    {f}" for f in shown[:MAX_FRAMES]]
            if len(shown) > MAX_FRAMES:
                lines.append(f"    ... {len(shown) - MAX_FRAMES} more")
        return "\n".join(lines)

    def _out_of_step(self) -> tuple[tuple[int, LastCall], tuple[int, LastCall]] | None:
        """Two that are not at the same call in the same step: in a run, all ranks make their k-th call of a group at work on
        the same step, and later calls in no earlier one."""
        newest = [(k, a.call) for k, a in sorted(self.answers.items()) if a.call is not None]
        for (k, one), (other_k, other) in itertools.combinations(newest, 2):
            calls, steps = one.number - other.number, one.step - other.step
            if one.group == other.group and ((calls == 0 and steps != 0) or calls * steps < 0):
                return (k, one), (other_k, other)
        return None

    def advice(self) -> str:
        m, answer, call = self.missing.member, self.answers.get(self.missing.member), self.call
        if pair := self._out_of_step():
            one, other = (f"{self.missing.role} {k} made its call {c.number} in step {c.step}" for k, c in pair)
            return f"{one}, {other}: some rank left out a call or made one too many. Look for code that only some ranks run."
        if self.missing.kind == "Mismatch":
            return (
                "all ranks must make the same calls, in the same order, with the same shapes and dtypes. Look for what depends "
                "on the rank: a model or batch of another shape, code that only some ranks run."
            )
        if answer is None:
            return "see whether that host is up and reachable, and what its own log says."
        if answer.is_stopped:
            return (
                f"find out who stopped process {answer.pid}: Ctrl-Z, a debugger, a paused container, a suspended machine. "
                "If such pauses are to be survived, allow a longer --deadline."
            )
        if answer.state in ("X", "Z"):
            return f"see why {self.missing.role} {m} ended before the others: did it have less to do?"
        if answer.call is not None and answer.ended_s is None and call is not None:
            if not _users(self._frames(m)) and _same(answer.call, call):
                return (
                    "all ranks are in the same call, so it is the way between them that is slow or cut: see the network, or "
                    "allow a longer --deadline."
                )
        return (
            "see what that line waits for: a lock, a file, a queue, another process, or a collective of its own that other "
            "ranks do not call. If it is at work and merely slow (a large evaluation, a download), allow a longer --deadline."
        )


def _users(frames: Sequence[Frame]) -> list[Frame]:
    return [f for f in frames if f.is_users]


def _call(answer: Asked | None) -> str:
    if answer is None or answer.call is None:
        return "none"
    c = answer.call
    return f"call {c.number} of group {c.group!r}, {c.what} (step {c.step})"


def _since(answer: Asked) -> str:
    if answer.call is None:
        return ""
    if answer.ended_s is None:
        return f", begun {answer.began_s:.1f} s ago and not ended"
    return f", ended {answer.ended_s:.1f} s ago"


def _same(one: LastCall, other: LastCall) -> bool:
    return (one.group, one.number, one.what) == (other.group, other.number, other.what)
