"""Every error that Weft raises on purpose.

WeftError                     .code = exit status of the command line
├── ConfigError               the request is impossible; found before any worker starts (also a ValueError)
│   ├── UnknownName           a task, pattern, option or value that does not exist; names the nearest that does
│   └── Incompatible          two settings that must not go together (compat.py says why)
├── TaskError                 the user's task returned or did the wrong thing
├── DataError                 the data cannot be cut or read as asked
├── RunFolderError            a folder that is not a run, or a run that cannot be used so
├── CheckpointError           a checkpoint cannot be written or found
│   └── DamagedCheckpoint     its bytes are not those that were saved (names the file and the tensor)
├── NotEquivalent             the layout's gradients are not those of one process (`--check-equivalence`)
├── CommError                 between members
│   ├── PeerLost              the other side is gone
│   ├── DeadlineExceeded      the other side did not come in time
│   ├── Mismatch              ranks called with different operations, shapes or dtypes
│   └── AddressInUse          the port is taken
├── MemberFailed              a member of the run raised or died; leads with the culprit
└── Interrupted               the user stopped the run; says how to resume
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any


class WeftError(Exception):
    code = 1
    told = False  # another process of the run has told the user

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class ConfigError(WeftError, ValueError):
    code = 2


class UnknownName(ConfigError):
    """``UnknownName("pattern", "alreduce", ["allreduce"])``: value, what was possible, what to do."""

    @classmethod
    def of(
        cls, what: str, value: str, choices: Iterable[str], hint: str = "", shown: Iterable[str] = ()
    ) -> UnknownName:
        """``shown``: the choices as they are written, where that takes more than the name."""
        names = sorted(choices)
        near = difflib.get_close_matches(value, names, n=1) or difflib.get_close_matches(value.lower(), names, n=1)
        ask = f" Did you mean {near[0]!r}?" if near else ""
        have = f" Possible: {', '.join(shown or names)}." if names else ""
        return cls(f"unknown {what} {value!r}.{ask}{have}{' ' + hint if hint else ''}")


class Incompatible(ConfigError):
    pass


class TaskError(WeftError):
    code = 2


class DataError(WeftError):
    code = 2


class RunFolderError(WeftError):
    code = 2


class CheckpointError(WeftError):
    code = 2


class DamagedCheckpoint(CheckpointError):
    pass


class NotEquivalent(WeftError):
    """``parameter``: the one whose gradient differs most."""

    code = 3

    def __init__(self, message: str, *, parameter: str = "") -> None:
        super().__init__(message)
        self.parameter = parameter


class CommError(WeftError):
    """``ranks`` are the members to blame, where they are known."""

    def __init__(self, message: str, ranks: tuple[int, ...] = ()) -> None:
        super().__init__(message)
        self.ranks = ranks


class PeerLost(CommError):
    pass


class DeadlineExceeded(CommError):
    pass


class Mismatch(CommError):
    pass


class AddressInUse(CommError, ConfigError):
    code = 2


class MemberFailed(WeftError):
    """``member`` is the first that failed; ``cause`` one line; ``traceback`` its own, if it could still speak; ``page``: of a
    hang, where each rank stood and what it did last."""

    def __init__(self, message: str, *, member: int = -1, cause: str = "", traceback: str = "", page: str = "") -> None:
        super().__init__(message)
        self.member, self.cause, self.traceback, self.page = member, cause, traceback, page


class Interrupted(WeftError):
    code = 130


def to_wire(error: BaseException, traceback: str = "") -> dict[str, Any]:
    """An error as plain data, so that another process can raise it again."""
    kind = type(error).__name__
    ranks = list(getattr(error, "ranks", ()))
    return {"kind": kind, "message": str(error), "traceback": traceback, "ranks": ranks}


def from_wire(data: dict[str, Any]) -> WeftError:
    """The same error, if it is one of ours; else a WeftError that carries the foreign traceback."""
    kind = globals().get(data["kind"])
    if isinstance(kind, type) and issubclass(kind, WeftError):
        if issubclass(kind, CommError):
            return kind(data["message"], tuple(data.get("ranks", ())))
        return kind(data["message"])
    return WeftError(f"{data['kind']}: {data['message']}")
