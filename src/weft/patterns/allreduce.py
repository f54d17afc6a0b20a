"""Synchronous data parallelism: every worker holds the model, gradients are averaged at each step, weighted by examples.

Equal to one process on the joined batch. One exchange a step, of 2(p-1)/p times the gradients' bytes per worker
(Patarasuk & Yuan 2009); beside them travel each rank's loss, weight and stop flag, so that all ranks agree on all three.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal

from weft.codecs.spec import AUTO, NONE, parse, usages
from weft.errors import ConfigError, Incompatible
from weft.patterns.base import (
    Context,
    Facts,
    Pattern,
    Role,
    compressed_bytes,
    compression_notes,
    feedback_bytes,
    tail_numel,
)
from weft.plan import LinkPlan
from weft.update import ClipNorm

if TYPE_CHECKING:
    from weft.config import Config
    from weft.patterns.training import Exchange, Replica


@dataclass(frozen=True)
class AllReduce(Pattern):
    name: ClassVar[str] = "allreduce"
    tier: ClassVar[Literal["stable"]] = "stable"
    summary: ClassVar[str] = (
        "synchronous data parallelism: same result as one process on the joined batch; fast links, equal workers"
    )
    answers: ClassVar[dict[str, str]] = {
        "where do parameters live": "on every worker",
        "who talks to whom": "a ring of all workers (any collective)",
        "when": "each step, after backward",
        "what travels": "gradients",
        "how combined": "mean weighted by examples, summed in rank order",
    }
    balances: ClassVar[bool] = True
    auto_compress: ClassVar[tuple[str, ...]] = ("bf16", "int8", "powersgd:4", "topk:0.01")

    accumulate: int = field(default=1, metadata={"doc": "micro-batches per step: less memory, same result"})
    clip_norm: float | None = field(default=None, metadata={"doc": "largest global L2 norm of the averaged gradient"})
    autocast: Literal["none", "bf16"] = field(
        default="none", metadata={"doc": "compute in bfloat16 where torch holds it safe"}
    )

    compress: str = field(
        default=NONE, metadata={"doc": "fewer bytes for the gradients: none, auto, " + ", ".join(usages())}
    )

    def __post_init__(self) -> None:
        if self.compress not in (NONE, AUTO):
            parse(self.compress)
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
                "holds the whole model, trains on its share of each batch",
            ),
        )

    def check(self, facts: Facts, config: Config) -> None:
        if self.autocast == "bf16" and config.dtype == "float64":
            raise Incompatible("autocast=bf16 would undo --dtype float64: leave one of them out.")
        if self.compress.startswith("dgc") and facts.momentum is None:
            raise Incompatible(
                f"compress={self.compress} takes the momentum before the choice, and the task's {facts.optimizer} has none that could be: "
                "it wants SGD with momentum (no nesterov, dampening or weight decay), Adam or AdamW, one momentum for all "
                "parameters, none of them sparse. Use topk:RATIO, which goes with every optimizer."
            )
        share = config.batch // config.workers
        if self.accumulate > share:
            raise ConfigError(
                f"accumulate={self.accumulate} cannot cut a worker's share of {share} examples (batch {config.batch} over "
                f"{config.workers} workers): use a larger --batch or accumulate of at most {share}."
            )

    def links(self, facts: Facts, config: Config, bytes_for: Callable[[int, int], int], carrier: str) -> list[LinkPlan]:
        plan = self.among(facts, config.workers, bytes_for, carrier, config.total_steps(facts.train_examples))
        return [plan] if plan else []

    def among(
        self, facts: Facts, workers: int, bytes_for: Callable[[int, int], int], carrier: str, steps: int = 0
    ) -> LinkPlan | None:
        """Of a group of this size; None if there is nobody to talk to."""
        if workers == 1:
            return None
        gradients = facts.gradient_bytes
        running = sum(b.nbytes for b in facts.buffers if b.running)
        tail = 8 * tail_numel(workers, sum(p.trainable for p in facts.params))
        what = ", ".join(f"gradients ({dtype})" for dtype in gradients) + (", running buffers" if running else "")
        integers = sum(b.nbytes for b in facts.buffers if b.running and not b.dtype.startswith(("float", "bfloat")))
        if self.compress == NONE:
            nbytes = bytes_for(sum(gradients.values()) + running - integers + tail, workers)
        else:
            beside = running - integers + tail
            nbytes = compressed_bytes(facts, self.compress, beside, workers, bytes_for, carrier, steps)
            what += f", compressed by {self.compress} but for small tensors"
        if integers:
            nbytes += bytes_for(integers, workers)
        if any(p.sparse for p in facts.params):
            what += "; beside these the touched rows of sparse parameters, which are not counted here"
        return LinkPlan(members=f"ring of {workers} workers", carrier=carrier, bytes_per_step=nbytes, what=what)

    def writer_for(self, rank: int) -> int:
        return rank if self.compress != NONE else 0

    def memory(self, facts: Facts, workers: int) -> dict[str, int]:
        copies = 1 if workers == 1 else 2  # autograd's and the arena's
        compressed = self.compress != NONE and workers > 1
        kept = {"error feedback": feedback_bytes(facts, self.compress)} if compressed else {}
        return kept | {
            "parameters": sum(p.nbytes for p in facts.params),
            "gradients": copies * sum(p.nbytes for p in facts.params if p.trainable),
            "optimizer": facts.optimizer_bytes,
            "activations": facts.activation_bytes // self.accumulate,
            "buffers": sum(b.nbytes for b in facts.buffers),
        }

    def notes(self, facts: Facts, config: Config) -> list[str]:
        result = []
        if any(b.running for b in facts.buffers):
            result.append(
                "running buffers (BatchNorm): each worker normalises by its own share; statistics are averaged over "
                "workers, weighted by examples, at each step (integer ones: the largest)"
            )
        if sparse := [p.name for p in facts.params if p.sparse]:
            result.append(
                f"sparse gradients ({', '.join(sparse)}): only touched rows travel, gathered from all workers"
            )
        if self.compress != NONE:
            result += compression_notes(self.compress, config.workers, facts)
        if frozen := sum(not p.trainable for p in facts.params):
            result.append(f"{frozen} frozen parameter(s): not exchanged, not optimised")
        return result

    def replica(self, ctx: Context) -> Replica:
        from weft.patterns.training import Replica

        chain = [ClipNorm(self.clip_norm)] if self.clip_norm is not None else []
        return Replica(ctx, accumulate=self.accumulate, autocast=self.autocast, chain=chain)

    def exchange(self, replica: Replica) -> Exchange:
        from weft.patterns.mean import JoinedMean

        return JoinedMean(replica, replica.link, compress=self.compress)
