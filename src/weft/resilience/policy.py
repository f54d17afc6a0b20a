"""What to do when members fail: facts in, a decision with its reason out. Nothing here acts."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from weft import errors
from weft.errors import CommError, WeftError


@dataclass(frozen=True)
class Failure:
    """How one member ended. ``signal``: 0 if it was not killed; ``kind``, ``message``: of the error it raised, if any."""

    member: int
    role: str = "worker"
    code: int = 1
    signal: int = 0
    signal_name: str = ""
    kind: str = ""
    message: str = ""
    traceback: str = ""
    blames: tuple[int, ...] = ()

    @property
    def is_echo(self) -> bool:
        """It failed because another did: its own words are about the connection."""
        kind = getattr(errors, self.kind, None)
        return isinstance(kind, type) and issubclass(kind, CommError) and not issubclass(kind, errors.Mismatch)

    @property
    def may_be_spared(self) -> bool:
        """It was ended from outside, or lost the others: no mistake in the task, which the others would come to as well."""
        return self.is_echo or not self.kind

    @property
    def cause(self) -> str:
        if self.kind:
            return f"{self.kind}: {self.message}"
        if self.signal:
            hint = " (often: out of memory)" if self.signal_name == "SIGKILL" else ""
            return f"killed by {self.signal_name}{hint}"
        return f"ended with exit status {self.code}"


def culprit(failures: Sequence[Failure], stopped: Collection[int] = ()) -> Failure:
    """The first that failed for its own reason; else who is seen to be ``stopped``; else, of those who only lost somebody, the one that the others
    name: first of all one that has said nothing itself, for who gave up waited for somebody else."""
    for failure in failures:
        if not failure.is_echo:
            return failure
    spoke = {f.member for f in failures}
    everybody = [rank for f in failures for rank in f.blames]
    quiet = [rank for rank in everybody if rank not in spoke]
    if blamed := sorted(stopped) or quiet or everybody:
        most = max(dict.fromkeys(blamed), key=everybody.count)  # of equals who was blamed first
        words = next((f for f in failures if most in f.blames), None)
        if words is None:
            return Failure(most, failures[0].role, kind="DeadlineExceeded", message="its process is stopped")
        return Failure(most, words.role, kind=words.kind, message=words.message, traceback=words.traceback)
    return failures[0]


@dataclass(frozen=True)
class Decision:
    restart: bool
    reason: str


def decide(failure: Failure, restarts_left: int) -> Decision:
    """Restart what may go better next time; end what would fail again."""
    kind = getattr(errors, failure.kind, None)
    deterministic = isinstance(kind, type) and issubclass(kind, WeftError) and not issubclass(kind, CommError)
    if deterministic:
        return Decision(False, f"{failure.kind} would come again")
    if restarts_left == 0:
        return Decision(False, "no restarts are left")
    return Decision(True, f"{failure.role} {failure.member}: {failure.cause}")
