"""What workers and servers tell each other: msgpack of a known schema in a frame's metadata, tensors as raw bytes in its payload.

    worker -> first server   Join, Ask(done)              first server -> worker   Welcome, Train, Evaluate, Finish
    worker -> servers        Pull, Look, Push             servers -> worker        Values, Rows, Ack, Refused
    first server -> others   Close, Apply, Collect, Leave others -> first          Square, State

A push is held until the first server, which hears from the worker that all servers have it, closes its batch: so all servers apply the same
shares in the same order, each share once, and nothing of a batch that is refused. With one server a push says that, too, and asks: what it is
answered by is the next Train, with the values as they are now, so that a share takes one question and one answer.
"""

from __future__ import annotations

import msgspec

from weft.errors import CommError


class Message(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag_field="op", tag=str.lower):
    pass


class Join(Message, frozen=True):
    """``model``: (name, shape, dtype) of each parameter and buffer, to be compared with the servers'."""

    model: list[tuple[str, list[int], str]]


class Welcome(Message, frozen=True):
    """Payload: what no server trains (frozen parameters, buffers), end to end, as the first server has it."""


class Done(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A share that all servers have. ``loss``: its sum over examples, ``weight``: how many the task counts; ``drawn``: examples of its joined batch."""

    batch: int
    share: int
    loss: float
    weight: float
    drawn: int


class Ask(Message, frozen=True):
    """For work. ``part``: the one of an evaluation that is done, its sums in the payload (float64)."""

    done: Done | None = None
    part: int | None = None
    number: int = 0  # of that evaluation


class Train(Message, frozen=True):
    """Share ``share`` of batch ``batch``, at ``version`` or a later one. ``given``: the first server's version, if it is there: its values come
    along, unless the worker has them. It is as if they had been pulled."""

    batch: int
    share: int
    version: int
    given: int = -1


class Evaluate(Message, frozen=True):
    number: int
    part: int
    parts: int
    version: int


class Finish(Message, frozen=True):
    pass


class Pull(Message, frozen=True):
    """Values of ``version`` or later; none are sent if the worker ``has`` the newest."""

    version: int
    has: int = -1


class Values(Message, frozen=True):
    version: int


class Look(Message, frozen=True):
    """Rows of the server's table number ``table``, at ``version`` or later. Payload: their places in it, ``count`` numbers of int64."""

    version: int
    table: int
    count: int


class Rows(Message, frozen=True):
    table: int


class Push(Message, frozen=True):
    """Gradients of a share, computed at ``version``. ``absent``: places of pieces that no example touched. ``rows``: how many of each table,
    whose places (int64) and values follow in the payload, table by table. ``done``, to the only server: no Ack is sent, but what is to be done next."""

    batch: int
    share: int
    version: int
    weight: float
    absent: list[int] = []
    rows: list[int] = []
    done: Done | None = None


class Refused(Message, frozen=True):
    why: str


class Ack(Message, frozen=True):
    batch: int
    share: int


class Close(Message, frozen=True):
    """Batch ``batch`` of these shares is update ``version``: their sum times ``factor``. ``norm``: its square is wanted before it is applied."""

    version: int
    batch: int
    shares: list[int]
    factor: float
    norm: bool = False


class Square(Message, frozen=True):
    version: int
    value: float


class Apply(Message, frozen=True):
    """``norm``: of the whole joined gradient."""

    version: int
    norm: float


class Collect(Message, frozen=True):
    """What you hold, after ``version`` updates."""

    version: int


class State(Message, frozen=True):
    """Payload: the tensors of ``tree`` (JSON), end to end, in the order of ``tensors``: (name, shape, dtype)."""

    version: int
    tree: bytes
    tensors: list[tuple[str, list[int], str]]


class Leave(Message, frozen=True):
    """The run has ended."""


Any = (
    Join
    | Welcome
    | Ask
    | Train
    | Evaluate
    | Finish
    | Pull
    | Values
    | Look
    | Rows
    | Push
    | Refused
    | Ack
    | Close
    | Square
    | Apply
    | Collect
    | State
    | Leave
)
_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder(Any)


def encode(message: Any) -> bytes:
    return _encoder.encode(message)


def decode(data: bytes) -> Any:
    """CommError if it is none of these."""
    try:
        return _decoder.decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise CommError(f"a message that does not fit the schema: {error}") from error
