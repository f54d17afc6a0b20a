"""Servers hold the parameters, each a range of them, and step them; workers borrow them, compute gradients and push these (Li et al. 2014).

How far a worker may be ahead is one number, ``staleness``: 0 is synchronous and gives one process's numbers; s lets a share of batch b be
computed on parameters that lack the last s batches (stale synchronous parallel, Ho et al. 2013); none sets no bound. ``backup_workers``: a
batch is closed without so many of its shares, the slowest (Chen et al. 2016). Late gradients can be corrected: divided by how late they are
(``rate``), or moved to where the parameters are now (``dc``, Zheng et al. 2017).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal

from weft.comm.link import WORLD
from weft.cost import AUTO
from weft.errors import ConfigError, Incompatible
from weft.patterns.base import Facts, Group, Pattern, Role, check_autocast, check_clip_norm
from weft.plan import LinkPlan
from weft.sections import Chart, Line, Section, Table
from weft.servers import ranges
from weft.servers.ranges import Piece, Size

if TYPE_CHECKING:
    from weft.config import Config
    from weft.events import Event

SERVER = "server"
CARRIERS = ("shm", "tcp", "inproc")
MOST_AHEAD = 8  # pushes of one worker that lie in shared memory; more go through sockets
ROWWISE = ("SparseAdam",)  # beside ELEMENTWISE: each number by itself, of sparse gradients


@dataclass(frozen=True)
class ParameterServer(Pattern):
    name: ClassVar[str] = "ps"
    tier: ClassVar[Literal["beta"]] = "beta"
    summary: ClassVar[str] = (
        "parameter server: servers hold and step the parameters, workers come and go; uneven workers, many workers"
    )
    answers: ClassVar[dict[str, str]] = {
        "where do parameters live": "on servers, each a range of them",
        "who talks to whom": "workers with servers",
        "when": "each share of a batch; how far ahead of the others, `staleness` says",
        "what travels": "gradients up, parameters down",
        "how combined": "mean weighted by examples, stepped by the task's optimizer on the servers",
    }

    servers: int = field(default=1, metadata={"doc": "processes that hold the parameters, a range of equal bytes each"})
    staleness: int | Literal["none"] = field(
        default=0, metadata={"doc": "batches that a worker may be ahead: 0 synchronous, none without bound"}
    )
    start: int = field(default=0, metadata={"doc": "batches that are synchronous before `staleness` is allowed"})
    replicas: int = field(
        default=1,
        metadata={
            "doc": "copies of each parameter, on different servers: from 2 on a server may be lost and nothing of the run is"
        },
    )
    detect_s: float = field(
        default=2.0,
        metadata={"doc": "with replicas: seconds without a sign of life after which another server follows"},
    )
    backup_workers: int = field(default=0, metadata={"doc": "shares, the slowest, without which a batch is closed"})
    correction: Literal["none", "rate", "dc"] = field(
        default="none",
        metadata={"doc": "of late gradients: rate divides by lateness + 1, dc compensates for the delay (DC-ASGD)"},
    )
    dc_lambda: float = field(default=32.0, metadata={"doc": "how strongly correction=dc moves a late gradient"})
    clip_norm: float | None = field(default=None, metadata={"doc": "largest global L2 norm of a batch's gradient"})
    accumulate: int = field(default=1, metadata={"doc": "micro-batches per share: less memory, same result"})
    autocast: Literal["none", "bf16"] = field(
        default="none", metadata={"doc": "compute in bfloat16 where torch holds it safe"}
    )

    def __post_init__(self) -> None:
        counts = (
            ("servers", self.servers, 1),
            ("replicas", self.replicas, 1),
            ("start", self.start, 0),
            ("backup_workers", self.backup_workers, 0),
        )
        for name, value, least in counts:
            if value < least:
                raise ConfigError(f"{name}={value} is not possible: give a whole number of {least} or more.")
        if self.replicas > self.servers:
            raise ConfigError(
                f"replicas={self.replicas}: {self.servers} servers cannot hold so many copies, each on another: use servers={self.replicas} or more."
            )
        if not (self.detect_s >= 0.1 and math.isfinite(self.detect_s)):
            raise ConfigError(f"detect_s={self.detect_s} is not possible: give 0.1 seconds or more.")
        if self.detect_s != type(self).detect_s and self.replicas == 1:
            raise Incompatible(f"detect_s={self.detect_s} is of replicas=2 or more: add them, or leave detect_s out.")
        if self.staleness != "none" and self.staleness < 0:
            raise ConfigError(
                f"staleness={self.staleness} is not possible: 0 (synchronous), a number of batches, or none (no bound)."
            )
        if self.accumulate < 1:
            raise ConfigError(f"accumulate={self.accumulate} is not possible: 1 (no accumulation) or more.")
        if not (self.dc_lambda > 0 and math.isfinite(self.dc_lambda)):
            raise ConfigError(f"dc_lambda={self.dc_lambda} is not possible: give a positive number, such as 32.")
        if self.dc_lambda != type(self).dc_lambda and self.correction != "dc":
            raise Incompatible(f"dc_lambda={self.dc_lambda} is of correction=dc: add it, or leave dc_lambda out.")
        if self.correction != "none" and self.staleness == 0:
            raise Incompatible(
                f"correction={self.correction} corrects late gradients, and with staleness=0 none is late: leave it out, or allow a staleness."
            )
        if self.start and self.staleness == 0:
            raise Incompatible(
                f"start={self.start} says when gradients may be late, and with staleness=0 none is: leave it out, or allow a staleness."
            )
        check_clip_norm(self.clip_norm)

    @property
    def clips(self) -> bool:
        return self.clip_norm is not None

    @property
    def waits(self) -> bool:
        """Nothing of an update is applied before all servers have it joined."""
        return self.replicas > 1 or self.clips

    @property
    def bound(self) -> int | None:
        return None if self.staleness == "none" else self.staleness

    def roles(self, workers: int) -> tuple[Role, ...]:
        return (
            Role(
                "worker",
                workers,
                "weft.patterns.working:work",
                "borrows the parameters, computes gradients of a share of each batch",
                spared=True,
            ),
            Role(
                SERVER,
                self.servers,
                "weft.patterns.serving:serve",
                "holds a range of the parameters and steps it; one of them hands out shares and closes batches",
                spared=self.replicas > 1,
            ),
        )

    def lead(self, workers: int) -> int:
        return workers

    def check(self, facts: Facts, config: Config) -> None:
        check_autocast(self.autocast, config.dtype)
        self.pieces(facts)
        if self.backup_workers >= config.workers:
            raise ConfigError(
                f"backup_workers={self.backup_workers} leaves no gradient of {config.workers} workers: give {config.workers - 1} at most."
            )
        if self.accumulate > (share := config.batch // config.workers):
            raise ConfigError(
                f"accumulate={self.accumulate} cannot cut a worker's share of {share} examples (batch {config.batch} over "
                f"{config.workers} workers): use a larger --batch or accumulate of at most {share}."
            )
        if self.correction == "dc" and (sparse := [p.name for p in facts.params if p.sparse]):
            raise Incompatible(
                f"correction=dc needs every parameter as it was read, and of sparse ones ({', '.join(sparse)}) only rows are: use correction=rate."
            )
        for asked, what, cure in (
            (facts.device != "cpu", f"device {facts.device!r}", "--device cpu"),
            (config.cluster == "torchrun", "cluster 'torchrun'", "--cluster local"),
            (config.link not in (AUTO, *CARRIERS), f"link {config.link!r}", "--link tcp"),
            (config.collective != AUTO, f"collective {config.collective!r}", "no --collective: nothing is all-reduced"),
            (config.trace, "--trace", "no --trace"),
            (bool(config.check_equivalence), "--check-equivalence", "weft diff of two runs"),
        ):
            if asked:
                raise Incompatible(f"pattern 'ps' does not go with {what}: use {cure}.")
        wrong = [f["kind"] for f in config.faults if f["kind"] in ("corrupt", "skip")]
        if wrong:
            raise Incompatible(
                f"fault {wrong[0]!r} is of collectives, and pattern 'ps' has none: use kill, freeze, delay or drop."
            )

    def sizes(self, facts: Facts) -> dict[str, Size]:
        """Of a sparse parameter rows are what is not cut."""
        return {
            p.name: Size(num := p.shape[0] if p.sparse else math.prod(p.shape), p.nbytes // num if num else 1)
            for p in facts.params
            if p.trainable
        }

    def cuts(self, facts: Facts) -> bool:
        """Whether a parameter may lie on several servers."""
        return facts.elementwise or facts.optimizer in ROWWISE

    def pieces(self, facts: Facts) -> list[list[Piece]]:
        """Each server's. ConfigError if there are more servers than can hold something."""
        sizes = self.sizes(facts)
        return ranges.cut(sizes, self.servers) if self.cuts(facts) else ranges.whole(sizes, self.servers)

    def groups(self, facts: Facts, workers: int) -> list[Group]:
        return [Group(WORLD, tuple(range(workers + self.servers)), self.heap_bytes(facts, workers), frames=True)]

    def heap_bytes(self, facts: Facts, workers: int) -> int:
        """What a member sends from at once: a worker, pushes that wait for their batch; a server, what workers are still reading."""
        dense = sum(p.nbytes for p in facts.params if p.trainable and not p.sparse) + facts.running_bytes
        ahead = MOST_AHEAD if self.bound is None else min(self.bound, MOST_AHEAD)
        return max((2 + ahead) * dense, (2 + workers) * -(-dense // self.servers))

    def differs(self, facts: Facts, steps: int) -> str:
        return (
            ""
            if self.staleness == 0 and not self.backup_workers
            else f"staleness={self.staleness} steps by late gradients"
        )

    def links(self, facts: Facts, config: Config, bytes_for: Callable[[int, int], int], carrier: str) -> list[LinkPlan]:
        up = sum(facts.gradient_bytes.values())
        running = facts.running_bytes
        kinds = [f"gradients ({dtype})" for dtype in facts.gradient_bytes]
        kinds += ["running buffers"] * bool(running) + [
            "touched rows of sparse parameters, which are not counted here"
        ] * any(p.sparse for p in facts.params)
        what = ", ".join(kinds)
        who = f"each of {config.workers} workers with {self.servers} server{'s' * (self.servers != 1)}"
        return [
            LinkPlan(
                members=who,
                carrier=carrier,
                bytes_per_step=up + running,
                what=f"{what}; as much comes back as parameters",
            )
        ]

    def memory(self, facts: Facts, workers: int, carrier: str) -> dict[str, int]:
        trained = sum(p.nbytes for p in facts.params if p.trainable)
        return {
            "parameters": sum(p.nbytes for p in facts.params) + trained,  # the model's, and as they come
            "gradients": 2 * trained,  # autograd's, and as they go
            "activations": facts.activation_bytes // self.accumulate,
            "buffers": sum(b.nbytes for b in facts.buffers),
        }

    def memory_of(self, role: str, facts: Facts, workers: int, carrier: str) -> dict[str, int]:
        if role != SERVER:
            return self.memory(facts, workers, carrier)
        trained = sum(p.nbytes for p in facts.params if p.trainable) // self.servers
        late = (
            0 if self.staleness == 0 else workers
        )  # versions that somebody is still at work on, shares that wait for their batch
        return {
            "parameters": (2 + self.replicas + late) * trained,  # held, as they were last read, and joined gradients
            "pushed": (workers + late) * trained,
            "optimizer": self.replicas * facts.optimizer_bytes // self.servers,
        }

    def notes(self, facts: Facts, config: Config) -> list[str]:
        result = []
        if facts.running:
            result.append(
                "running buffers (BatchNorm): each worker normalises by its own share; the first server averages statistics, weighted by examples"
            )
        if sparse := [p.name for p in facts.params if p.sparse]:
            result.append(f"sparse gradients ({', '.join(sparse)}): workers read and push touched rows only")
        if not self.cuts(facts) and self.servers > 1:
            result.append(
                f"{facts.optimizer} is not known to treat each number by itself: no parameter is cut between servers (if it looks at several together, use servers=1)"
            )
        return result

    def sections(self, events: Iterable[Event]) -> Sequence[Section]:
        late = Counter[int]()
        for event in events:
            for tau, count in event.values.get("staleness", {}).items() if event.kind == "ticks" else ():
                late[int(tau)] += count
        if not late:
            return ()
        total = sum(late.values())
        rows = [(tau, count, f"{100 * count / total:.1f} %") for tau, count in sorted(late.items())]
        chart = Chart(
            "Shares by lateness",
            "updates since the parameters were read",
            [Line("shares", list(late), list(late.values()), dots=True)],
        )
        text = f"How many updates were made between a share's reading the parameters and its own update (staleness={self.staleness})."
        return [Section("Lateness of gradients", text, [chart], [Table(("updates", "shares", "of all"), rows)])]
