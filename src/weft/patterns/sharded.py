"""Fully sharded data parallelism: a model too large for one worker, each of which holds a part of every parameter.

Equal to one process on the joined batch, as AllReduce is; a worker's memory for parameters, gradients and optimizer falls with the
number of workers, and what travels grows by half (Rajbhandari et al. 2020, ZeRO stage 3). With ``replicas`` the parts lie on groups
of workers, each of which holds the whole model, so that gathering stays inside a group (HSDP; Zhao et al. 2023, 2304.11277).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal

from weft.comm.link import WORLD
from weft.cost import all_gather_bytes, reduce_scatter_bytes
from weft.errors import ConfigError, Incompatible
from weft.patterns.base import Context, Facts, Group, Pattern, Role, tail_numel
from weft.plan import LinkPlan
from weft.update import ClipNorm

if TYPE_CHECKING:
    from weft.config import Config
    from weft.patterns.training import Exchange, Replica

SHARD, ACROSS = "shard", "replica"  # the groups that hold a model together, and those that hold the same part of it


@dataclass(frozen=True)
class Sharded(Pattern):
    name: ClassVar[str] = "sharded"
    splits: ClassVar[bool] = True
    tier: ClassVar[Literal["beta"]] = "beta"
    summary: ClassVar[str] = (
        "fully sharded data parallelism (FSDP): same result as one process; for models whose parameters, gradients and optimizer do not "
        "fit into one worker"
    )
    answers: ClassVar[dict[str, str]] = {
        "where do parameters live": "in parts, one on each worker; a block's are gathered as its turn comes",
        "who talks to whom": "all workers of a copy of the model with all; with replicas, holders of the same part with each other",
        "when": "inside the step: before each block, forward and backward, and after each block's backward",
        "what travels": "parameters, gradients",
        "how combined": "mean weighted by examples, added up where the part lives",
    }

    replicas: int = field(default=1, metadata={"doc": "copies of the model, each held by workers / replicas (HSDP)"})
    reshard: bool = field(
        default=True, metadata={"doc": "let a block go between forward and backward: less memory, more travels"}
    )
    accumulate: int = field(default=1, metadata={"doc": "micro-batches per step: less memory, same result"})
    clip_norm: float | None = field(default=None, metadata={"doc": "largest global L2 norm of the averaged gradient"})
    autocast: Literal["none", "bf16"] = field(
        default="none", metadata={"doc": "compute in bfloat16 where torch holds it safe"}
    )

    def __post_init__(self) -> None:
        if self.replicas < 1:
            raise ConfigError(f"replicas={self.replicas} is not possible: 1 (one copy of the model) or more.")
        if self.accumulate < 1:
            raise ConfigError(f"accumulate={self.accumulate} is not possible: 1 (no accumulation) or more.")
        if self.clip_norm is not None and not (self.clip_norm > 0 and math.isfinite(self.clip_norm)):
            raise ConfigError(f"clip_norm={self.clip_norm} is not possible: give a positive number, or none.")

    def roles(self, workers: int) -> tuple[Role, ...]:
        return (
            Role(
                "worker",
                workers,
                "weft.patterns.training:train",
                "holds its part of the model, trains on its share of each batch",
            ),
        )

    def check(self, facts: Facts, config: Config) -> None:
        if config.workers % self.replicas:
            fit = [n for n in range(1, config.workers + 1) if config.workers % n == 0]
            raise ConfigError(
                f"replicas={self.replicas} does not divide {config.workers} workers: give one of {', '.join(map(str, fit))}."
            )
        if self.autocast == "bf16" and config.dtype == "float64":
            raise Incompatible("autocast=bf16 would undo --dtype float64: leave one of them out.")
        if config.cluster == "inprocess" and config.workers > 1:
            raise Incompatible(
                "sharded needs a process for each worker (torch keeps process groups in globals): use --cluster local."
            )
        if facts.device != "cpu":
            raise Incompatible(
                "sharded runs on CPUs so far, and the device is a GPU: use --device cpu, or --pattern allreduce."
            )
        if sparse := [p.name for p in facts.params if p.sparse]:
            raise Incompatible(
                f"sharded cannot take the sparse gradients of {', '.join(sparse)}: make them dense (sparse=False), or use --pattern allreduce."
            )
        share = config.batch // config.workers
        if self.accumulate > share:
            raise ConfigError(
                f"accumulate={self.accumulate} cannot cut a worker's share of {share} examples (batch {config.batch} over "
                f"{config.workers} workers): use a larger --batch or accumulate of at most {share}."
            )

    @property
    def clips(self) -> bool:
        return self.clip_norm is not None

    # -- who talks to whom

    def meshes(self, workers: int) -> dict[str, list[tuple[int, ...]]]:
        """Members of each group, by kind; empty where all workers are one."""
        if self.replicas == 1:
            return {}
        size = workers // self.replicas
        return {
            SHARD: [tuple(range(first, first + size)) for first in range(0, workers, size)],
            ACROSS: [tuple(range(place, workers, size)) for place in range(size)],
        }

    def own_groups(self, rank: int, workers: int) -> list[tuple[str, tuple[int, ...]]]:
        return [(name, ranks) for name, each in self.meshes(workers).items() for ranks in each if rank in ranks]

    def groups(self, facts: Facts, workers: int) -> list[Group]:
        tail = 8 * tail_numel(workers, len(facts.params))
        inner = [Group(name, ranks, tail) for name, each in self.meshes(workers).items() for ranks in each]
        return [Group(WORLD, tuple(range(workers)), tail), *inner]

    # -- what it takes

    def links(self, facts: Facts, config: Config, bytes_for: Callable[[int, int], int], carrier: str) -> list[LinkPlan]:
        if config.workers == 1:
            return []
        size, across = config.workers // self.replicas, self.replicas
        whole = sum(p.nbytes for p in facts.params)
        inside = sum(facts.blocks.values())
        rest = whole - inside  # belongs to no block: gathered once, and kept until after backward
        gathered = (2 if self.reshard else 1) * inside + rest
        trained = sum(p.nbytes for p in facts.params if p.trainable)
        running = sum(b.nbytes for b in facts.buffers if b.running)
        tail = 8 * tail_numel(config.workers, sum(p.trainable for p in facts.params)) + running
        dtypes = ", ".join(facts.gradient_bytes)
        plans = [
            LinkPlan(
                members=f"{config.workers} workers",
                carrier=carrier,
                bytes_per_step=bytes_for(tail, config.workers),
                what="weights, losses, stop flags" + (", running buffers" if running else ""),
            )
        ]
        if size > 1:
            plans.append(
                LinkPlan(
                    members=f"{size} workers that hold a model together",
                    carrier=carrier,
                    bytes_per_step=all_gather_bytes(carrier, gathered // size, size)
                    + reduce_scatter_bytes(carrier, trained, size, bytes_for),
                    what=f"parameters ({dtypes}), gathered {'before forward and again before backward' if self.reshard else 'once'}; gradients",
                    group=SHARD if across > 1 else WORLD,
                )
            )
        if across > 1:
            plans.append(
                LinkPlan(
                    members=f"{across} workers that hold the same part",
                    carrier=carrier,
                    bytes_per_step=bytes_for(trained // size, across),
                    what=f"gradients ({dtypes}) of that part",
                    group=ACROSS,
                )
            )
        return plans

    def memory(self, facts: Facts, workers: int, carrier: str) -> dict[str, int]:
        parts = workers // self.replicas
        trained = sum(p.nbytes for p in facts.params if p.trainable)
        return {
            "parameters": sum(p.nbytes for p in facts.params) // parts,
            "gathered": self._gathered_bytes(facts) if parts > 1 else 0,
            "gradients": trained // parts,
            "optimizer": facts.optimizer_bytes // parts,
            "activations": facts.activation_bytes // self.accumulate,
            "buffers": sum(b.nbytes for b in facts.buffers),
        }

    def _gathered_bytes(self, facts: Facts) -> int:
        """At the worst moment, in backward: parameters and gradients of what belongs to no block and of the largest block, and the room
        in which parameters come together and gradients stand ready."""
        inside, largest = sum(facts.blocks.values()), max(facts.blocks.values(), default=0)
        rest = sum(p.nbytes for p in facts.params) - inside
        return 2 * rest + (largest if self.reshard else inside) + largest + max(rest, largest)

    def notes(self, facts: Facts, config: Config) -> list[str]:
        result = []
        if facts.blocks:
            names = list(facts.blocks)
            shown = ", ".join(names[:3]) + (f", ... {names[-1]}" if len(names) > 3 else "")
            result.append(f"gathered block by block: {len(names)} blocks ({shown}), and once what belongs to none")
        else:
            result.append(
                "the model has no blocks: it is gathered as a whole at each step. Give the task blocks(model)"
            )
        if config.workers > 1:
            result.append(
                f"each worker makes the model whole before it keeps its part: {facts.made_whole}"
                if facts.made_whole
                else "the model is made block by block: no worker ever holds the whole"
            )
        if any(b.running for b in facts.buffers):
            result.append(
                "running buffers (BatchNorm): each worker normalises by its own share; statistics are averaged over "
                "workers, weighted by examples, at each step (integer ones: the largest)"
            )
        return result

    def replica(self, ctx: Context) -> Replica:
        from weft.patterns.sharding import ShardedReplica

        chain: Sequence[ClipNorm] = [ClipNorm(self.clip_norm)] if self.clip_norm is not None else []
        return ShardedReplica(ctx, self, accumulate=self.accumulate, autocast=self.autocast, chain=chain)

    def exchange(self, replica: Replica) -> Exchange:
        from weft.patterns.sharding import ShardedReplica, SplitMean

        assert isinstance(replica, ShardedReplica)
        return SplitMean(replica, replica.link)
