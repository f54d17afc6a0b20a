"""What each member called last, in memory that others can read when the member can no longer speak.

A frozen or killed process answers no question, and what it did last is what one wants to know. So each member writes the
call it begins, and that it ended, to a page that it shares with its supervisor. Costs 3 us a call.
"""

from __future__ import annotations

import mmap
import time
from collections.abc import Callable, Sequence

import msgspec

PAGE = 1024
MAX_WHAT = 600


class LastCall(msgspec.Struct, frozen=True, array_like=True):
    """The newest call of a member, over all its groups. Times by time.monotonic of its host; ``ended``: 0 while it lasts.

    ``step``: the update that the member was at work on. ``number``: of its calls in ``group``.
    """

    step: int
    group: str
    number: int
    what: str
    began: float
    ended: float = 0.0


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(LastCall).decode


class Board:
    """A page for each member, made before the members are forked (or shared by threads)."""

    def __init__(self, members: Sequence[int]) -> None:
        self.members = tuple(members)
        self._memory = mmap.mmap(-1, PAGE * max(1, len(members)))

    def write(self, member: int, call: LastCall) -> None:
        data = _encode(call)
        assert len(data) <= PAGE - 2
        start = PAGE * self.members.index(member)
        self._memory[start : start + 2 + len(data)] = len(data).to_bytes(2, "little") + data

    def read(self, member: int) -> LastCall | None:
        """None if it has not called anything, or was stopped in the middle of these few bytes."""
        start = PAGE * self.members.index(member)
        length = int.from_bytes(self._memory[start : start + 2], "little")
        try:
            return _decode(self._memory[start + 2 : start + 2 + length])
        except msgspec.MsgspecError:
            return None


def recorder(
    group: str, write: Callable[[LastCall], None], step: Callable[[], int]
) -> Callable[[int, object | None], None]:
    """For ``Traffic.on_call`` of the link of this group."""
    now = LastCall(0, group, 0, "", 0.0)
    texts: dict[object, str] = {}  # to name a call takes longer than to write it down, and there are few

    def on_call(number: int, what: object | None) -> None:
        nonlocal now
        if what is None:
            write(msgspec.structs.replace(now, ended=time.monotonic()))
            return
        if (text := texts.get(what)) is None:
            if len(texts) >= 256:
                texts.clear()
            text = texts[what] = str(what)[:MAX_WHAT].encode("ascii", "replace").decode()
        now = LastCall(step(), group, number, text, time.monotonic())
        write(now)

    return on_call
