"""What workers and servers tell each other: msgpack of a known schema in a frame's metadata, tensors as raw bytes in its payload.

    worker -> lead       Join, Ask(done)                lead -> worker      Welcome, Train, Evaluate, Finish, Moved
    worker -> servers    Pull, Look, Push               servers -> worker   Values, Rows, Ack, Refused
    lead -> servers      Close, Apply, Collect, Leave   servers -> lead     Joined, State
    along a chain        Copy
    candidate -> all     Propose                        all -> candidate    Grant, Deny
    candidate -> servers Install                        servers -> candidate Ready; who has a shard -> who shall   State

A push is held until the lead, which hears from the worker that all servers have it, closes its batch: so all servers apply the same
shares in the same order, each share once, and nothing of a batch that is refused. Every message is of an ``epoch`` (views.py); one of
another epoch is not taken. With one server a push says that it has all, too, and asks: what it is answered by is the next Train, with the values
as they are now, so that a share takes one question and one answer.
"""

from __future__ import annotations

import msgspec

from weft.errors import CommError
from weft.servers.views import Told, View


class Message(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag_field="op", tag=str.lower):
    pass


class Join(Message, frozen=True):
    """``model``: (name, shape, dtype) of each parameter and buffer, to be compared with the servers'."""

    model: list[tuple[str, list[int], str]]


class Welcome(Message, frozen=True):
    """Payload: what no server trains (frozen parameters, buffers), end to end, as the lead has it."""

    view: View


class Done(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A share that all servers have. ``loss``: its sum over examples, ``weight``: how many the task counts; ``drawn``: examples of its joined batch;
    ``version``: the oldest at which a part of the parameters was read."""

    batch: int
    share: int
    version: int
    loss: float
    weight: float
    drawn: int


class Ask(Message, frozen=True):
    """For work. ``part``: the one of an evaluation that is done, its sums in the payload (float64)."""

    epoch: int
    done: Done | None = None
    part: int | None = None
    number: int = 0  # of that evaluation


class Train(Message, frozen=True):
    """Share ``share`` of batch ``batch``, at ``version`` or a later one. ``given``: the version of shard 0, if the lead serves it and is there: its values
    come along, unless the worker has them. It is as if they had been pulled."""

    epoch: int
    batch: int
    share: int
    version: int
    given: int = -1


class Evaluate(Message, frozen=True):
    epoch: int
    number: int
    part: int
    parts: int
    version: int


class Finish(Message, frozen=True):
    pass


class Pull(Message, frozen=True):
    """Values of ``version`` or later; none are sent if the worker ``has`` the newest."""

    epoch: int
    shard: int
    version: int
    has: int = -1


class Values(Message, frozen=True):
    epoch: int
    shard: int
    version: int


class Look(Message, frozen=True):
    """Rows of the shard's table number ``table``, at ``version`` or later. Payload: their places in it, ``count`` numbers of int64."""

    epoch: int
    shard: int
    version: int
    table: int
    count: int


class Rows(Message, frozen=True):
    epoch: int
    shard: int
    table: int


class Push(Message, frozen=True):
    """Gradients of a share, computed at ``version``. ``absent``: places of pieces that no example touched. ``rows``: how many of each table,
    whose places (int64) and values follow in the payload, table by table. ``done``, to the only server: no Ack is sent, but what is to be done next."""

    epoch: int
    shard: int
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
    epoch: int
    shard: int
    batch: int
    share: int


class Close(Message, frozen=True):
    """Batch ``batch`` of these shares is update ``version``: their sum times ``factor``. ``wait``: to be told (Joined) and not applied before Apply."""

    epoch: int
    version: int
    batch: int
    shares: list[int]
    factor: float
    wait: bool = False


class Copy(Message, frozen=True):
    """A joined update of a shard, from each in its chain to the next. Payload as of a Push. ``square``: of its norm."""

    epoch: int
    shard: int
    version: int
    batch: int
    square: float
    absent: list[int] = []
    rows: list[int] = []


class Joined(Message, frozen=True):
    """All copies of the shard have the update."""

    epoch: int
    shard: int
    version: int
    square: float


class Apply(Message, frozen=True):
    """``norm``: of the whole joined gradient."""

    epoch: int
    version: int
    norm: float


class Collect(Message, frozen=True):
    """A shard as it is after ``version`` updates is wanted."""

    epoch: int
    shard: int
    version: int


class State(Message, frozen=True):
    """Payload: the tensors of ``tree`` (JSON), end to end, in the order of ``tensors``: (name, shape, dtype)."""

    epoch: int
    shard: int
    version: int
    tree: bytes
    tensors: list[tuple[str, list[int], str]]


class Leave(Message, frozen=True):
    """The run has ended."""


class Busy(Message, frozen=True):
    """The lead saves or evaluates, and gives no sign of life meanwhile; or has done so."""

    epoch: int
    busy: bool


class Misses(Message, frozen=True):
    """To the lead: a server that the sender cannot reach."""

    epoch: int
    member: int


class Propose(Message, frozen=True):
    """The sender, whose view this is, wants to lead ``epoch``."""

    epoch: int
    view: View


class Grant(Message, frozen=True):
    """Nothing of an earlier epoch is taken any more. ``view``: the newest that the member has; ``told``: what a server has."""

    epoch: int
    view: View
    told: Told | None = None


class Deny(Message, frozen=True):
    """The sender has promised ``promised``, and its view is of epoch ``of``."""

    promised: int
    of: int


class Install(Message, frozen=True):
    """A view that a majority has granted. All copies go to ``version``, by the update of this ``norm`` that they hold,
    and give up what they hold beyond; ``fresh``: (shard, member) that are given a copy. ``lowest``, ``closed``: batches before the one, and
    these, are done."""

    view: View
    version: int
    norm: float
    fresh: list[tuple[int, int]]
    lowest: int
    closed: list[int]


class Ready(Message, frozen=True):
    epoch: int


class Moved(Message, frozen=True):
    """To workers: what they were at is to be done anew, by this view."""

    view: View


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
    | Copy
    | Joined
    | Apply
    | Collect
    | State
    | Leave
    | Busy
    | Misses
    | Propose
    | Grant
    | Deny
    | Install
    | Ready
    | Moved
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
