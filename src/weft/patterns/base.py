"""A pattern says how a task is distributed: five answers, its roles, and what it asks of the model. No torch here."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import msgspec

from weft.plan import LinkPlan

if TYPE_CHECKING:
    import torch

    from weft.comm.link import Link
    from weft.config import Config
    from weft.events import Event
    from weft.patterns.training import Exchange, Replica
    from weft.sections import Section
    from weft.spans import Spans
    from weft.task import Task

Tier = Literal["stable", "beta", "contrib"]

NUM_COLUMNS = 3  # weight, loss, stop flag: what every rank tells the others beside its gradients


def tail_numel(world: int, num_params: int) -> int:
    """Numbers (float64) beside the gradients in an exchange: a row per rank, a presence count per parameter."""
    return world * NUM_COLUMNS + num_params


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


class Facts(msgspec.Struct, frozen=True, kw_only=True):
    """What one throw-away step taught about the task, before any worker starts."""

    params: list[ParamFact]
    buffers: list[BufferFact]
    train_examples: int
    test_examples: int
    optimizer_bytes: int
    activation_bytes: int
    metrics: list[str]
    notes: dict[str, float]
    device: str

    @property
    def gradient_bytes(self) -> dict[str, int]:
        """Dense gradients by dtype: what a step exchanges."""
        result: dict[str, int] = {}
        for p in self.params:
            if p.trainable and not p.sparse:
                result[p.dtype] = result.get(p.dtype, 0) + p.nbytes
        return result


@dataclass(frozen=True)
class Role:
    """``entry``: "module:function" of a generator function Context -> Iterator[SafePoint]. When a member dies, the run ends,
    or is brought back as a whole."""

    name: str
    count: int
    entry: str
    does: str


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
    link: Link
    stop_requested: Callable[[], bool]
    resume: Resume | None = None
    spans: Spans | None = None  # of a traced run


@dataclass(frozen=True)
class Resume:
    """What a checkpoint gives back to a role."""

    step: int
    world: int
    state: Mapping[str, Any]
    meta: Mapping[str, Any]


@dataclass(slots=True)
class StepReport:
    """One update as this member saw it. Times are this member's seconds, ``losses`` and ``examples`` are all ranks'."""

    losses: list[float] = field(default_factory=list)  # by rank, sum over its examples
    examples: list[float] = field(default_factory=list)  # by rank
    data_s: float = 0.0
    compute_s: float = 0.0
    exchange_s: float = 0.0
    wait_s: float = 0.0
    bytes_sent: int = 0  # since the last report


@dataclass(slots=True)
class SafePoint:
    """The role's state is consistent: the driver may save, evaluate, stop here. ``stop``: all members agreed to stop."""

    version: int
    stop: bool
    ended: bool
    report: StepReport
    state: Callable[[], dict[str, Any]]
    meta: Callable[[], dict[str, Any]]
    evaluate: Callable[[], dict[str, float]]


@dataclass(frozen=True)
class Pattern(ABC):
    """A frozen dataclass that checks itself when built; its fields are the options (``-o key=value``)."""

    name: ClassVar[str]
    tier: ClassVar[Tier]
    summary: ClassVar[str]
    answers: ClassVar[dict[str, str]]

    @abstractmethod
    def roles(self, workers: int) -> tuple[Role, ...]: ...

    def check(self, facts: Facts, config: Config) -> None:
        """Refuse what this pattern cannot do with this task, before any worker starts."""

    @abstractmethod
    def links(self, facts: Facts, workers: int, carrier: str, bytes_for: Callable[[int], int]) -> list[LinkPlan]:
        """What travels in a step; ``bytes_for(n)`` is what one member sends to all-reduce n bytes on this carrier."""

    @abstractmethod
    def memory(self, facts: Facts, workers: int) -> dict[str, int]:
        """Predicted bytes on one worker by purpose."""

    def notes(self, facts: Facts) -> list[str]:
        """Policies that touch this model, in words, for the plan."""
        return []

    def sections(self, events: Iterable[Event]) -> Sequence[Section]:
        """This pattern's own part of the report of a run that it distributed, from the run's events."""
        return ()

    def replica(self, ctx: Context) -> Replica:
        """The worker's model, for patterns whose workers each hold a whole replica."""
        raise NotImplementedError

    def exchange(self, replica: Replica, link: Link) -> Exchange:
        """When and what those replicas exchange."""
        raise NotImplementedError
