"""Local SGD and its family: workers train on their own for a while, then meet and average; or an outer optimizer steps.

One rule (inner optimizer, H, outer optimizer): after H updates D = mean of (theta_before - theta_i), weighted by examples,
and theta = outer.step(gradient = D). By its arguments it is
  local SGD / periodic averaging   every=H                                     (Stich 2019, arXiv 1805.09767)
  post-local SGD                   start=N or lr_drop: gradients until then    (Lin et al. 2020, arXiv 1808.07217)
  SlowMo, for a constant rate      outer=slowmo                                (Wang et al. 2020, arXiv 1910.00643)
  DiLoCo                           outer=diloco, an inner AdamW, every=100-500 (Douillard et al. 2023, arXiv 2311.08105)
Bytes fall by H. The inner optimizer's state stays with its worker, and is checkpointed there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal

import msgspec

from weft.codecs.spec import AUTO, NONE, parse, usages
from weft.comm.link import WORLD
from weft.errors import ConfigError, Incompatible
from weft.patterns.allreduce import AllReduce
from weft.patterns.base import HELD_BACK, INNER, OUTER, Context, Facts, Group, Kept, Pattern, Role, own_rows_numel
from weft.patterns.compression_plan import CompressionPlan
from weft.plan import LinkPlan

if TYPE_CHECKING:
    from weft.config import Config
    from weft.patterns.training import Exchange, Replica

ISLAND = "island"


@dataclass(frozen=True)
class Outer:
    """SGD on the mean delta of a period. A name, or a name and what differs: ``-o outer=diloco -o outer.lr=0.5``."""

    presets: ClassVar[Mapping[str, Outer]]

    lr: float = field(default=1.0, metadata={"doc": "1: the plain average"})
    momentum: float = field(default=0.0, metadata={"doc": "of the mean deltas"})
    nesterov: bool = field(default=False, metadata={"doc": "look ahead along the momentum"})

    def __post_init__(self) -> None:
        if not (self.lr > 0 and math.isfinite(self.lr)):
            raise ConfigError(f"outer.lr={self.lr} is not possible: give a positive number; 1 is the plain average.")
        if not 0 <= self.momentum < 1:
            raise ConfigError(f"outer.momentum={self.momentum} is not possible: from 0 (none) to below 1.")
        if self.nesterov and not self.momentum:
            raise ConfigError("outer.nesterov looks ahead along the momentum, and outer.momentum is 0: set it, as 0.9.")

    def __str__(self) -> str:
        names = [name for name, preset in self.presets.items() if preset == self]
        return names[0] if names else f"lr={self.lr:g} momentum={self.momentum:g} nesterov={self.nesterov}"


Outer.presets = {
    "average": Outer(),
    "slowmo": Outer(momentum=0.6),
    "diloco": Outer(lr=0.7, momentum=0.9, nesterov=True),
}


@dataclass(frozen=True)
class LocalSGD(Pattern):
    name: ClassVar[str] = "localsgd"
    tier: ClassVar[Literal["stable"]] = "stable"
    summary: ClassVar[str] = (
        "workers train alone for some steps, then average (local SGD, SlowMo, DiLoCo): slow links, or uneven workers"
    )
    answers: ClassVar[dict[str, str]] = {
        "where do parameters live": "on every worker",
        "who talks to whom": "all workers with all; inside an island, its workers at each step",
        "when": "after some steps of its own (`every`)",
        "what travels": "how far each worker's parameters moved",
        "how combined": "mean weighted by examples, then a step of the outer optimizer",
    }
    nests: ClassVar[tuple[str, ...]] = ("within",)
    auto_compress: ClassVar[tuple[str, ...]] = ("bf16", "int8")

    every: int | Literal["epoch"] = field(default=20, metadata={"doc": "steps between exchanges"})
    outer: Outer = field(default=Outer(), metadata={"doc": "what is done with the mean; or outer.lr= and so on"})
    start: int | Literal["lr_drop"] = field(
        default=0,
        metadata={
            "doc": "until then gradients are averaged at each step (post-local SGD); lr_drop: until the rate is half its highest"
        },
    )
    island: int = field(default=1, metadata={"doc": "workers next to each other that train as one"})
    compress: str = field(
        default=NONE,
        metadata={"doc": "fewer bytes for a meeting: none, auto, " + ", ".join(usages(of_gradients=False))},
    )
    within: Pattern = field(default=AllReduce(), metadata={"doc": "how an island trains; within.clip_norm= and so on"})

    def __post_init__(self) -> None:
        if self.compress not in (NONE, AUTO):
            spec = parse(self.compress)
            if spec.choice.needs_momentum:
                raise Incompatible(
                    f"{spec.name} corrects the momentum of gradients, and a meeting exchanges parameters: use topk:RATIO."
                )
            if spec.asks_for_warmup:
                raise Incompatible(
                    f"compress={self.compress}: nothing warms up for meetings, which are few; leave the warm-up out, or write 0."
                )
        if isinstance(self.within, AllReduce) and self.within.compress != NONE:
            raise Incompatible(
                f"within.compress={self.within.compress} would compress the quick links inside an island: compress the meetings, "
                f"compress={self.within.compress}."
            )
        if isinstance(self.within, AllReduce) and self.within.shared_step == "on":
            raise Incompatible(
                "within.shared_step=on: workers who train apart cannot have one memory for their parameters; leave it out."
            )
        if isinstance(self.within, AllReduce) and self.within.overlap == "on":
            raise Incompatible(
                "within.overlap=on would send the gradients of an island during backward, and inside a host that gains nothing: "
                "leave it out."
            )
        for name, value, least in (("every", self.every, 1), ("start", self.start, 0), ("island", self.island, 1)):
            if isinstance(value, int) and value < least:
                raise ConfigError(f"{name}={value} is not possible: give a whole number of {least} or more.")

    def roles(self, workers: int) -> tuple[Role, ...]:
        does = "holds the whole model, trains on its share of each batch, meets the others now and then"
        return (Role("worker", workers, "weft.patterns.training:train", does),)

    @property
    def goes_by_rate(self) -> bool:
        return self.start == "lr_drop"

    def begins(self, facts: Facts) -> int:
        """Updates made together before the workers part."""
        return self.start if self.start != "lr_drop" else facts.rate_drops_at or 0

    def differs(self, facts: Facts, steps: int) -> str:
        if self.begins(facts) >= steps:
            return ""
        return (
            f"from step {self.begins(facts) + 1} on localsgd's workers step by their own gradients (every={self.every}), "
            "which is another algorithm than one process's: check --pattern allreduce"
        )

    def period(self, facts: Facts, config: Config) -> int:
        return config.steps_per_epoch(facts.train_examples or 1) if self.every == "epoch" else self.every

    def check(self, facts: Facts, config: Config) -> None:
        self.within.check(facts, config)
        if config.workers % self.island:
            raise ConfigError(
                f"island={self.island} does not divide the {config.workers} workers: all islands have the same number."
            )
        total = config.total_steps(facts.train_examples)
        if self.every == "epoch" and facts.train_examples is None:
            raise ConfigError(
                "every=epoch needs a training set of known length, and this stream tells none: give a number."
            )
        if self.goes_by_rate and facts.rate_drops_at is None:
            raise ConfigError(
                f"start=lr_drop: in the {total} steps of this run the task's schedule never brings the learning rate to half of its "
                "highest, so the workers would never part. Give a number of steps, start=N."
            )
        if isinstance(self.start, int) and self.start >= total:
            raise ConfigError(
                f"start={self.start} is not before the end of the run of {total} steps: it would be plain allreduce. "
                "Give a smaller start, or --pattern allreduce."
            )

    def groups(self, facts: Facts, workers: int) -> list[Group]:
        running = facts.running_bytes
        trained = sum(p.nbytes for p in facts.params if p.trainable)
        gradients = sum(facts.gradient_bytes.values()) + running
        result = [Group(WORLD, tuple(range(workers)), trained + running + (gradients if self.start else 0))]
        if self.island > 1:
            result += [
                Group(ISLAND, tuple(range(first, first + self.island)), gradients)
                for first in range(0, workers, self.island)
            ]
        return result

    def exchanges_per_step(self, facts: Facts, config: Config) -> float:
        return self.meetings(facts, config) / config.total_steps(facts.train_examples)

    def writer_for(self, rank: int) -> int:
        return rank if self.compress != NONE else rank - rank % self.island

    def keeps(self, workers: int) -> list[Kept]:
        apart, kept = workers // self.island, []
        if apart > 1:
            who = "workers" if self.island == 1 else "islands"
            joined = f"the optimizers of the {apart} {who} are joined: all begin with the mean of their states"
            kept.append(Kept(INNER, f"{apart} of {self.island}", joined))
        if self.outer.momentum:
            kept.append(Kept(OUTER, "by name", "the momentum of the outer optimizer is dropped"))
        if self.compress != NONE and workers > 1:
            kept.append(Kept(HELD_BACK, f"{self.compress} of meetings", parse(self.compress).dropped("meetings")))
        return kept

    def links(self, facts: Facts, config: Config, bytes_for: Callable[[int, int], int], carrier: str) -> list[LinkPlan]:
        result: list[LinkPlan] = []
        workers, total = config.workers, config.total_steps(facts.train_examples)
        if self.island > 1 and (inside := self.inner.among(facts, self.island, bytes_for, carrier)):
            islands = [f"{first}-{first + self.island - 1}" for first in range(0, workers, self.island)]
            who = f"within each of {len(islands)} islands (workers {', '.join(islands)})"
            apart = round(inside.bytes_per_step * (total - self.begins(facts)) / total)
            result.append(msgspec.structs.replace(inside, members=who, group=ISLAND, bytes_per_step=apart))
        if workers == 1:
            return result
        running = facts.running_bytes
        nbytes = sum(p.nbytes for p in facts.params if p.trainable) + running + 8 * own_rows_numel(workers)
        once, meetings = bytes_for(nbytes, workers), self.meetings(facts, config)
        if self.compress != NONE:
            beside = running + 8 * own_rows_numel(workers)
            once = CompressionPlan(self.compress, facts, of_gradients=False).bytes_sent(
                beside, workers, bytes_for, carrier
            )
        dtypes = ", ".join(dict.fromkeys(p.dtype for p in facts.params if p.trainable))
        how = f", compressed by {self.compress} but for small tensors" if self.compress != NONE else ""
        what = f"parameter deltas ({dtypes}){how}, {once:,} bytes in each of {meetings} meetings"
        sent = once * meetings
        if (begins := self.begins(facts)) and (together := self.inner.among(facts, workers, bytes_for, carrier)):
            what += f"; in the first {begins} steps {together.what} instead, {together.bytes_per_step:,} bytes a step"
            sent += together.bytes_per_step * begins
        return [
            *result,
            LinkPlan(
                members=f"all {workers} workers",
                carrier=carrier,
                bytes_per_step=round(sent / total),
                what=what,
            ),
        ]

    def meetings(self, facts: Facts, config: Config) -> int:
        """How often the workers meet: a period after they part or last met; before an evaluation or a save; at the end."""
        total, period = config.total_steps(facts.train_examples), self.period(facts, config)
        asked = [every for every in (config.eval_every, config.save_every or 0) if every]
        count, step = 0, self.begins(facts)
        while step < total:
            due = step + period if self.every != "epoch" else (step // period + 1) * period
            step = min(due, total, *((step // every + 1) * every for every in asked))
            count += 1
        return count

    def memory(self, facts: Facts, workers: int, carrier: str) -> dict[str, int]:
        result = self.inner.alone().memory(facts, self.island, carrier)
        trained = sum(p.nbytes for p in facts.params if p.trainable)
        if self.compress != NONE and workers > 1:
            result["error feedback"] = CompressionPlan(self.compress, facts, of_gradients=False).kept_bytes()
        if self.start and workers > 1:
            result["gradients"] += trained  # an arena of all workers, beside that of the island
        return result | {"last meeting": trained * (3 if self.outer.momentum else 2)}  # where from, delta, momentum

    def notes(self, facts: Facts, config: Config) -> list[str]:
        result = []
        if begins := self.begins(facts):
            why = " (then the learning rate is half of its highest, or less)" if self.goes_by_rate else ""
            result.append(f"together, as allreduce, until step {begins}{why}; then apart")
        if facts.running:
            result.append("running buffers (BatchNorm): averaged over workers, weighted by examples, at each meeting")
        if any(p.sparse for p in facts.params):
            result.append("sparse parameters travel whole at each meeting, as the others do")
        if frozen := sum(not p.trainable for p in facts.params):
            result.append(f"{frozen} frozen parameter(s): not exchanged, not optimised")
        if self.compress != NONE:
            result += CompressionPlan(self.compress, facts, of_gradients=False).notes(config.workers)
        if self.island == config.workers and self.outer == Outer.presets["average"]:
            result.append(
                "all workers train as one: meetings change nothing, --pattern allreduce does the same and sends less"
            )
        period = self.period(facts, config)
        if self.begins(facts) + period > (total := config.total_steps(facts.train_examples)):
            long = f" ({period} steps)" if self.every == "epoch" else ""
            result.append(
                f"every={self.every}{long} does not end before the {total} steps of this run do: the last meeting is the end"
            )
        asked = {"evaluations": config.eval_every, "checkpoints": config.save_every or 0}
        for what, steps in asked.items():
            if steps and steps % period:
                result.append(
                    f"{what} every {steps} steps fall between the meetings: there the workers meet, too, and count anew, so "
                    "that the result depends on them"
                )
        result.append("Ctrl-C takes effect at the next meeting (twice: at once)")
        return result

    @property
    def inner(self) -> AllReduce:
        """``within``, which compat lets be nothing else."""
        assert isinstance(self.within, AllReduce)
        return self.within

    def replica(self, ctx: Context) -> Replica:
        return self.within.replica(ctx)

    def exchange(self, replica: Replica) -> Exchange:
        from weft.patterns.periodic import PeriodicMean

        ctx = replica.ctx
        return PeriodicMean(
            replica, self.every, self.outer, self.begins(ctx.facts), ctx.groups.get(ISLAND), self.island, self.compress
        )
