"""A pattern says how a task is distributed: five answers, its roles, and what it asks of the model. No torch here."""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import msgspec

from weft.codecs.spec import NONE
from weft.comm.link import WORLD
from weft.config import Settled
from weft.cost import LinkSpeed
from weft.data.shards import Index
from weft.errors import ConfigError, Incompatible
from weft.plan import LinkPlan, StepPlan

if TYPE_CHECKING:
    import torch

    from weft.comm.endpoint import Endpoint
    from weft.comm.link import Link
    from weft.config import Config
    from weft.data.balance import Decision
    from weft.events import Event
    from weft.patterns.training import Exchange, Replica
    from weft.sections import Section
    from weft.spans import Spans
    from weft.task import Task
    from weft.update import Update

Tier = Literal["stable", "beta", "contrib"]
Trials = Literal["auto", "always", "never"]

NUM_COLUMNS = (
    4  # weight, loss, stop flag, seconds, in this order: what every rank tells the others beside its gradients
)


def tail_numel(world: int, num_params: int) -> int:
    """Numbers (float64) beside the gradients in an exchange: a row per rank, a presence count per parameter."""
    return world * NUM_COLUMNS + num_params


def own_rows_numel(world: int) -> int:
    """Numbers (float64) beside the deltas in a meeting: a weight and a stop flag per rank."""
    return 2 * world


class ParamFact(msgspec.Struct, frozen=True):
    name: str
    shape: tuple[int, ...]
    dtype: str
    nbytes: int
    trainable: bool
    sparse: bool


class BufferFact(msgspec.Struct, frozen=True):
    """``running``: changed by a training step (BatchNorm's statistics)."""

    name: str
    dtype: str
    nbytes: int
    running: bool


class TensorFacts(msgspec.Struct, frozen=True, kw_only=True):
    """How a model's tensors can be cut over workers, as a rehearsal has shown (patterns/tensors.py)."""

    styles: dict[str, str]  # by module: column, row, embedding, head
    parameters: list[str]  # those that are cut
    within: list[str] = []  # whole ones whose gradients come in parts, or as sums that are still to be made
    exchanged: int  # bytes that a step all-reduces, forward and backward, for one share
    gathered: int = 0  # of one worker's parts, bytes that it gathers
    scattered: int = 0  # bytes of whose sums each worker keeps its part
    exchanges: int
    degree: int = 1  # workers over which they were cut
    compute_s: float = 0.0  # of forward and backward on one of these, alone, for one share; 0: nobody asked
    activation_bytes: int  # on one worker, for one share
    left: dict[str, str] = {}  # large modules that stay whole, and why
    parted: list[str] = []  # blocks whose result is in parts: no pipeline can be cut after them
    spread: list[
        str
    ] = []  # rows whose result each worker has a part of, by the last dimension but one (the sequence's)
    entered: list[str] = []  # blocks that may be given what is whole, and go on with parts
    joined: list[str] = []  # blocks after which it is whole again

    def in_words(self) -> list[str]:
        """For the plan."""
        by_style: dict[str, list[str]] = {}
        for name, style in self.styles.items():
            by_style.setdefault(style, []).append(name)
        words = {
            "column": "cut by columns",
            "row": "cut by rows",
            "embedding": "embeddings cut by rows",
            "head": "head cut by classes",
        }
        result = [f"{words[style]}: {summed_up(names)}" for style, names in by_style.items()]
        if self.spread:
            result.append(
                f"cut by the sequence, from row to column: what {summed_up(self.spread)} make; whole again after {summed_up(self.joined)}"
            )
        reasons: dict[str, list[str]] = {}
        for name, why in self.left.items():
            reasons.setdefault(why, []).append(name)
        return result + [f"whole on every worker: {summed_up(names)} ({why})" for why, names in reasons.items()]


class ItemFact(msgspec.Struct, frozen=True, kw_only=True):
    """What a part of a model between two possible cuts takes for one micro-batch."""

    name: str
    forward_s: float
    input_gradient_s: float
    weight_gradient_s: float  # of a whole backward, with the one above
    split_s: float = 0.0  # what it takes more in two
    output_bytes: int
    activation_bytes: int


class PipelineFacts(msgspec.Struct, frozen=True, kw_only=True):
    """Where a model can be cut into stages (patterns/stages.py)."""

    items: list[ItemFact]
    uses: dict[str, list[int]]  # at which items each parameter and buffer is used
    made_of: list[Any]  # by block: what it returns, as stages.made_of tells it
    loss_aside: bool = False  # the task's evaluate does not give the loss: it takes a pass of its own
    examples: int  # of a micro-batch as it was measured
    microbatches: int = 0  # of a share
    unsplit: str = ""  # why its backward cannot be split; empty: it can
    recurrent: list[int] = []  # blocks that carry state through time, if there are any
    chunks: list[int] = []  # time steps in each chunk, as measured; none: a sequence is taken whole
    speeds: dict[str, LinkSpeed] = {}  # measured, by the name of a channel
    settled: Settled | None = None  # what was chosen; None: nothing yet

    @property
    def through_time(self) -> range:
        """The blocks that take one time chunk after the other."""
        return range(self.recurrent[0], self.recurrent[-1] + 1) if self.chunks else range(0)

    @property
    def shares(self) -> list[list[float]]:
        """By item, the part of its micro-batch that it computes at each time chunk: what comes before those blocks all at the first, what comes
        after them all at the last. None: there are no chunks."""
        if not self.chunks:
            return []
        inside, num = self.through_time, len(self.chunks)
        first, last = [1.0] + [0.0] * (num - 1), [0.0] * (num - 1) + [1.0]
        even = [steps / sum(self.chunks) for steps in self.chunks]
        return [even if k in inside else first if k < inside.start else last for k in range(len(self.items))]


def summed_up(names: Iterable[str]) -> str:
    """ "blocks.*.up, blocks.*.down": names that differ in their numbers alone, once."""
    return ", ".join(dict.fromkeys(re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name) for name in names))


# -- of options that several patterns have


def check_clip_norm(value: float | None) -> None:
    if value is not None and not (value > 0 and math.isfinite(value)):
        raise ConfigError(f"clip_norm={value} is not possible: give a positive number, or none.")


def check_autocast(autocast: str, dtype: str) -> None:
    if autocast == "bf16" and dtype == "float64":
        raise Incompatible("autocast=bf16 would undo --dtype float64: leave one of them out.")


def differs_by(compress: str) -> str:
    """Why the gradients are not those of one process; empty if they are."""
    if compress == NONE:
        return ""
    return f"compress={compress} changes what a step is given: check without it, all else is the same"


class Facts(msgspec.Struct, frozen=True, kw_only=True):
    """What one throw-away step taught about the task, before any worker starts."""

    params: list[ParamFact]
    buffers: list[BufferFact]
    train_examples: int | None  # None: a stream that does not tell its length
    test_examples: int
    optimizer_bytes: int
    activation_bytes: int
    sums: dict[str, tuple[int, ...]]  # shapes of what the task's evaluation adds up, by name
    notes: dict[str, float]
    device: str
    indexes: dict[str, Index] = {}  # of what is sharded: "training", "held-out"
    about_data: list[str] = []  # how it streams, in words, for the plan
    owned: list[int] = []  # training examples of each worker, where shards make them unequal
    rate_drops_at: int | None = (
        None  # updates after which the learning rate is at most half of its highest; None: never
    )

    optimizer: str = ""  # the class of the task's
    elementwise: bool = False  # it is known to treat each number by itself
    between_hosts: bool = False  # the workers stand on several
    hosts: list[list[int]] = []  # the workers on each; empty: nobody looked
    cores: float = 1.0  # of a host, in such as a worker's threads take
    memory_left: int = 0  # bytes of this machine or container, before any worker starts; 0: nobody looked
    step_s: float = 0.0  # of one worker's share, computing alone; 0: nobody asked
    optimizer_s: float = 0.0  # of that, in the optimizer
    speed: LinkSpeed | None = None  # of the slowest way between two workers, if it was measured
    momentum: tuple[float, bool] | None = (
        None  # its first moment, if it could as well be taken beforehand (preflight.momentum_before)
    )
    momentum_stays: str = ""  # why it could not, where there is none
    blocks: dict[str, int] = {}  # bytes of each, for a pattern that takes the model apart (patterns/blocks.py)
    tensor: TensorFacts | None = None  # of a pattern that cuts tensors
    pipeline: PipelineFacts | None = None  # of a pattern that cuts the model into stages
    made_whole: str = (
        ""  # why a worker has to make its model whole before it keeps a part (late.why_not); empty: it has not
    )
    step_alone: str = (
        "not looked at"  # why workers of a host cannot share its step (shared_step.why_not); empty: they can
    )

    @property
    def running(self) -> list[BufferFact]:
        """Buffers that a training step writes to (BatchNorm's statistics)."""
        return [b for b in self.buffers if b.running]

    @property
    def running_bytes(self) -> int:
        return sum(b.nbytes for b in self.running)

    @property
    def per_host(self) -> int:
        """Workers on the host that has the most; 0: nobody looked."""
        return max(map(len, self.hosts), default=0)

    @property
    def gradient_bytes(self) -> dict[str, int]:
        """Dense gradients by dtype: what a step exchanges."""
        result: dict[str, int] = {}
        for p in self.params:
            if p.trainable and not p.sparse:
                result[p.dtype] = result.get(p.dtype, 0) + p.nbytes
        return result


@dataclass(frozen=True)
class Group:
    """Members who talk to each other, in rank order; ``nbytes``: what each exchanges, to be held where the carrier likes it; ``aside``: while
    they compute; ``frames``: by an Endpoint, for some may go while others stay."""

    name: str
    members: tuple[int, ...]
    nbytes: int
    aside: bool = False
    frames: bool = False


#: What kinds of state only some patterns have, and leave in their checkpoints.
HELD_BACK, INNER, OUTER = "held back", "inner", "outer"


@dataclass(frozen=True)
class Kept:
    """What a checkpoint holds beside what one process would have. A run whose ``kind`` has the same ``layout`` goes on with it;
    ``otherwise`` says, for the plan, what becomes of it in any other; empty if that loses nothing."""

    kind: str
    layout: str
    otherwise: str


@dataclass(frozen=True)
class Role:
    """``entry``: "module:function" of a generator function Context -> Iterator[SafePoint]. When a member dies, the run ends,
    or is brought back as a whole; of a role that can be ``spared`` the others go on, as long as one is left."""

    name: str
    count: int
    entry: str
    does: str
    spared: bool = False


def numbered(roles: Iterable[Role]) -> list[tuple[int, Role]]:
    """Every member's number and role: those of the first role are 0, 1, ..., the others follow."""
    return list(enumerate(role for role in roles for _ in range(role.count)))


@dataclass
class Context:
    """Everything a role gets. Rank, world, clock and seed arrive here, never from the environment."""

    task: Task
    pattern: Pattern
    config: Config
    facts: Facts
    rank: int
    world: int
    total_steps: int
    device: torch.device
    link: Link  # of all workers
    stop_requested: Callable[[], bool]
    groups: Mapping[str, Link] = field(default_factory=dict)  # the smaller groups it stands in, by name
    endpoint: Endpoint | None = None  # of a pattern whose members exchange frames; ``link`` then joins nobody
    save_every: int = 0  # as the run was told: 0 is only at the end
    tell: Callable[..., None] = lambda kind, **values: None  # an event
    resume: Resume | None = None
    spans: Spans | None = None  # of a traced run
    watch: Callable[[Replica, Exchange, Update], None] | None = (
        None  # sees each step's joined update before it is applied
    )


@dataclass(frozen=True)
class Resume:
    """What a checkpoint gives back to a role."""

    step: int
    world: int
    parts: Mapping[str, Mapping[str, Any]]  # by name; FIRST_PART is what all workers held alike
    meta: Mapping[str, Any]


@dataclass(slots=True)
class StepReport:
    """One update as this member saw it. Times are this member's seconds.

    ``losses`` (sums over examples) and ``weights`` (their counts, as the task counts) are those of the ranks whose
    gradients were joined: of all, of an island, or this member's alone. ``examples``: drawn by all ranks in this step.
    """

    losses: list[float] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    examples: int = 0
    data_s: float = 0.0
    compute_s: float = 0.0
    exchange_s: float = 0.0
    wait_s: float = 0.0
    skew_s: float = 0.0  # of wait_s: until the slowest rank had computed
    hidden_s: float = 0.0  # of exchanges beside these, while backward went on
    bytes_sent: int = 0  # since the last report
    sent: dict[str, int] = field(default_factory=dict)  # the same by group, for a member of several
    messages: int = 0
    balance: Decision | None = None  # the shares change
    memory: tuple[int, int] | None = None  # bytes taken at the peak of the first steps, and between steps
    staleness: list[int] = field(default_factory=list)  # of each share that was joined: updates since it read


class Deposed(Exception):
    """Raised where a member evaluates or saves for all, and finds that another leads meanwhile: there it is done."""


@dataclass(slots=True)
class SafePoint:
    """The role's state is consistent: the driver may save, evaluate, stop here. ``stop``: all members agreed to stop.

    ``parts`` (by all members together): what this member writes to a checkpoint, by name; ``joint``: others than rank 0
    write, too. ``follows``: where another member leads, who alone evaluates, saves and stops; here is only what was done. ``leads``: it is this
    one, where who leads may change.
    """

    version: int
    stop: bool
    ended: bool
    report: StepReport
    parts: Callable[[], dict[str, Any]]
    joint: bool
    meta: Callable[[], dict[str, Any]]
    evaluate: Callable[[], dict[str, float]]
    follows: bool = False
    leads: bool = False


@dataclass(frozen=True)
class Pattern(ABC):
    """A frozen dataclass that checks itself when built; its fields are the options (``-o key=value``)."""

    name: ClassVar[str]
    tier: ClassVar[Tier]
    summary: ClassVar[str]
    answers: ClassVar[dict[str, str]]
    nests: ClassVar[tuple[str, ...]] = ()  # options that are patterns themselves
    #: What `compress=auto` may become, the gentlest first: codecs whose learning is known to stay near that of whole gradients.
    auto_compress: ClassVar[tuple[str, ...]] = ()
    #: Its workers hold parts of one model, and need a process each.
    splits: ClassVar[bool] = False
    #: Its exchange tells all ranks each one's seconds, so that shares may follow them (--balance auto).
    balances: ClassVar[bool] = False

    def __str__(self) -> str:
        return self.name

    @abstractmethod
    def roles(self, workers: int) -> tuple[Role, ...]: ...

    def lead(self, workers: int) -> int:
        """The member that tells what all have done together."""
        return 0

    def shares(self, workers: int) -> int:
        """Into how many a joined batch is cut. Workers that hold parts of one model draw the same share."""
        return workers

    def share_of(self, rank: int, workers: int) -> int:
        """Which share this worker draws."""
        return rank

    def learn(
        self,
        task: Task,
        model: torch.nn.Module,
        batch: Callable[[int], Any],
        held_out: Any,
        config: Config,
        beside: int = 0,
    ) -> dict[str, Any]:
        """What it has to know about a model before it takes it apart: fields of Facts. ``batch``: one of so many examples. ``beside``: other workers that will
        compute on this host at the same time, each on a core. Called in a throw-away process."""
        return {}

    def check(self, facts: Facts, config: Config) -> None:
        """Refuse what this pattern cannot do with this task, before any worker starts."""

    @abstractmethod
    def links(self, facts: Facts, config: Config, bytes_for: Callable[[int, int], int], carrier: str) -> list[LinkPlan]:
        """What travels in a step; ``bytes_for(n, world)``: what one of ``world`` members sends to all-reduce n bytes."""

    @abstractmethod
    def memory(self, facts: Facts, workers: int, carrier: str) -> dict[str, int]:
        """Predicted bytes on one worker by purpose."""

    def memory_of(self, role: str, facts: Facts, workers: int, carrier: str) -> dict[str, int]:
        """The same of a member of this role."""
        return self.memory(facts, workers, carrier)

    def choices(self, facts: Facts, config: Config, carrier: str) -> dict[str, str]:
        """What it chose where it had a choice, and why, for the plan. Refuses what was asked for and cannot be over this carrier."""
        return {}

    def differs(self, facts: Facts, steps: int) -> str:
        """Why its first ``steps`` updates are not those of one process on the joined batches; empty: but for rounding they are."""
        return f"{self.name} promises no step of one process"

    def notes(self, facts: Facts, config: Config) -> list[str]:
        """Policies that touch this model, in words, for the plan."""
        return []

    def groups(self, facts: Facts, workers: int) -> list[Group]:
        """Who is joined by a link of their own; the first is all workers."""
        running = facts.running_bytes
        return [Group(WORLD, tuple(range(workers)), sum(facts.gradient_bytes.values()) + running)]

    def neighbours(self, facts: Facts, config: Config) -> dict[str, list[tuple[int, int]]]:
        """Pairs of workers, by the name of their channel, whose links it has to know the speed of before it can choose; none, where it would
        choose the same whatever that is."""
        return {}

    def settles(self, facts: Facts, workers: int) -> str:
        """What it chooses once for all workers, for as long as this stays the same; empty: nothing."""
        return ""

    def settle(self, facts: Facts, workers: int, kept: Settled | None) -> Facts:
        """With what it chose: ``kept``, or, of None, what is best by these facts."""
        return facts

    @property
    def tries(self) -> Trials:
        """Whether its ``contenders`` are tried before a run."""
        return "never"

    def contenders(self, facts: Facts, workers: int) -> list[Settled]:
        """What else it might choose, for a trial to decide, the best by these facts first; none: a trial is not asked for."""
        return []

    def predict(
        self, facts: Facts, config: Config, bytes_for: Callable[[int, int], int], carrier: str, tried_s: float = 0.0
    ) -> StepPlan | None:
        """How long a step takes; None: it does not say. ``tried_s``: what one has taken in a trial; 0: nobody tried."""
        return None

    def exchanges_per_step(self, facts: Facts, config: Config) -> float:
        """How often all workers exchange what they train."""
        return 1.0

    def writer_for(self, rank: int) -> int:
        """Whose part of a checkpoint holds what this rank keeps for itself."""
        return 0

    def keeps(self, workers: int) -> list[Kept]:
        """What it saves that another pattern, or another number of workers, has no place for."""
        return []

    @property
    def goes_by_rate(self) -> bool:
        """It needs to know when the learning rate drops (Facts.rate_drops_at)."""
        return False

    @property
    def wants_momentum(self) -> bool:
        """It would take the momentum of the task's optimizer before its codec (Facts.momentum)."""
        return False

    @property
    def clips(self) -> bool:
        """It bounds the norm of gradients."""
        return False

    def period(self, facts: Facts, config: Config) -> int:
        """Steps from one moment at which all replicas are equal to the next: saving there costs no exchange."""
        return 1

    def sections(self, events: Iterable[Event]) -> Sequence[Section]:
        """This pattern's own part of the report of a run that it distributed, from the run's events."""
        return ()

    def replica(self, ctx: Context) -> Replica:
        """The worker's model, for patterns whose workers each hold a whole replica."""
        raise NotImplementedError

    def exchange(self, replica: Replica) -> Exchange:
        """When and what those replicas exchange."""
        raise NotImplementedError


def left_behind(saved: Pattern, saved_workers: int, now: Pattern, workers: int) -> list[Kept]:
    """What ``now`` cannot go on with, of what ``saved`` kept."""
    places = {(kept.kind, kept.layout) for kept in now.keeps(workers)}
    return [kept for kept in saved.keeps(saved_workers) if (kept.kind, kept.layout) not in places]
