"""Synchronous data parallelism: every worker holds the model, gradients are averaged at each step, weighted by examples.

Equal to one process on the joined batch. One exchange a step, of 2(p-1)/p times the gradients' bytes per worker
(Patarasuk & Yuan 2009); beside them travel each rank's loss, weight and stop flag, so that all ranks agree on all three.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, ClassVar, Literal

from weft.codecs.spec import AUTO, NONE, parse, usages
from weft.cost import GIGABIT, LinkSpeed, bucket_bytes, cut_buckets
from weft.errors import ConfigError, Incompatible
from weft.patterns.base import (
    HELD_BACK,
    Context,
    Facts,
    Group,
    Kept,
    Pattern,
    Role,
    check_autocast,
    check_clip_norm,
    differs_by,
    tail_numel,
)
from weft.patterns.compression_plan import CompressionPlan
from weft.plan import LinkPlan
from weft.update import ClipNorm

LINE = 64  # bytes of a line of the processor's cache, where parameters begin in shared memory

if TYPE_CHECKING:
    from weft.config import Config
    from weft.patterns.training import Exchange, Replica


SHARING = ("shm",)  # carriers that give workers memory that all see
OVERLAPPING = ("gloo", "tcp")  # carriers that a thread may use beside backward
#: Option -> cluster -> what to ask for where the carrier does not allow it. With GPUs nothing helps.
ALLOWING: dict[str, dict[str, str]] = {
    "shared_step": {"local": "--link shm", "inprocess": "--cluster local"},
    "overlap": {"local": "--link tcp", "inprocess": "--cluster local --link tcp", "torchrun": "--link gloo"},
}


def refusal(option: str, why: str, config: Config, carrier: str, carriers: Sequence[str]) -> Incompatible:
    """Of ``option``, which goes with these ``carriers``."""
    helps = ALLOWING[option].get(config.cluster, "") if carrier not in (*carriers, "nccl") else ""
    return Incompatible(
        f"{option}=on is not possible: {why}. {f'Use {helps}, or leave' if helps else 'Leave'} it out (auto)."
    )


@dataclass(frozen=True)
class AllReduce(Pattern):
    name: ClassVar[str] = "allreduce"
    tier: ClassVar[Literal["stable"]] = "stable"
    summary: ClassVar[str] = (
        "synchronous data parallelism: same result as one process on the joined batch; fast links, equal workers"
    )
    answers: ClassVar[dict[str, str]] = {
        "where do parameters live": "on every worker; where those of a host share the step, once in its memory",
        "who talks to whom": "all workers with all",
        "when": "each step, after backward, or already during it (overlap)",
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

    shared_step: Literal["auto", "on", "off"] = field(
        default="auto",
        metadata={
            "doc": "one optimizer step for the workers of a host: each steps its part of parameters that live in the memory of all"
        },
    )
    overlap: Literal["auto", "on", "off"] = field(
        default="auto",
        metadata={
            "doc": "gradients leave in buckets while backward goes on: auto where workers stand on several hosts"
        },
    )

    def __post_init__(self) -> None:
        if self.compress not in (NONE, AUTO):
            parse(self.compress)
        if self.accumulate < 1:
            raise ConfigError(f"accumulate={self.accumulate} is not possible: 1 (no accumulation) or more.")
        check_clip_norm(self.clip_norm)

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
        check_autocast(self.autocast, config.dtype)
        chosen = self.compress not in (NONE, AUTO)  # what auto becomes goes with the optimizer: candidates_of
        if chosen and facts.momentum is None and parse(self.compress).choice.needs_momentum:
            raise Incompatible(
                f"compress={self.compress} takes the momentum before the choice, and the task's {facts.optimizer} has none that could be: "
                f"{facts.momentum_stays}. Use topk:RATIO, which goes with every optimizer."
            )
        share = config.batch // config.workers
        if self.accumulate > share:
            raise ConfigError(
                f"accumulate={self.accumulate} cannot cut a worker's share of {share} examples (batch {config.batch} over "
                f"{config.workers} workers): use a larger --batch or accumulate of at most {share}."
            )

    @property
    def wants_momentum(self) -> bool:
        return self.compress == AUTO or (self.compress != NONE and parse(self.compress).takes_momentum)

    @property
    def clips(self) -> bool:
        return self.clip_norm is not None

    def differs(self, facts: Facts, steps: int) -> str:
        return differs_by(self.compress)

    def unshared(self, facts: Facts, workers: int, carrier: str) -> str:
        """Why each worker steps all parameters; empty: they share the step."""
        if self.shared_step == "off":
            return "asked for"
        if workers == 1:
            return "there is one worker"
        if carrier not in SHARING:
            return f"link {carrier!r} gives workers no memory that all see"
        if self.compress != NONE:
            return f"compress={self.compress} joins the gradients its own way"
        return facts.step_alone

    def unoverlapped(self, facts: Facts, config: Config, carrier: str) -> str:
        """Why the exchange comes after backward; empty: it begins during backward."""
        if self.overlap == "off":
            return "asked for"
        if config.workers == 1:
            return "there is one worker"
        if carrier == "shm":
            return "inside a host it gains nothing: those who compute have no cores to spare"
        if carrier not in OVERLAPPING:
            return f"link {carrier!r} cannot be used beside backward"
        if self.compress != NONE:
            return f"compress={self.compress} leaves little to hide"
        if self.overlap == "on":
            return ""
        if not facts.between_hosts:
            return "the workers stand on one host, where it gains nothing"
        return "" if len(self.buckets(facts, config)) > 1 else "all gradients fit into one bucket"

    def alone(self) -> AllReduce:
        """The same, with nothing that a whole world of its own allows: no shared step, no overlap."""
        return replace(self, shared_step="off", overlap="off")

    def bucket_bytes(self, config: Config) -> int:
        found = config.measured  # kept with the run: buckets stay what they were
        known = found is not None and found.bytes_per_s > 0
        speed = LinkSpeed(found.latency_s, found.bytes_per_s) if found is not None and known else GIGABIT
        return bucket_bytes(config.workers, speed)

    def buckets(self, facts: Facts, config: Config) -> list[int]:
        """Bytes of each, in the order in which they leave."""
        sizes = [p.nbytes for p in facts.params if p.trainable and not p.sparse]
        return [sum(sizes[k] for k in part) for part in cut_buckets(sizes, self.bucket_bytes(config))]

    def choices(self, facts: Facts, config: Config, carrier: str) -> dict[str, str]:
        if config.workers == 1:
            return {}
        alone, after = self.unshared(facts, config.workers, carrier), self.unoverlapped(facts, config, carrier)
        if alone and self.shared_step == "on":
            raise refusal("shared_step", alone, config, carrier, SHARING)
        if after and self.overlap == "on":
            raise refusal("overlap", after, config, carrier, OVERLAPPING)
        shared = f"on ({'asked for; ' * (self.shared_step == 'on')}parameters live once for all workers, each of which steps its part)"
        overlapped = f"on ({'asked for; ' * (self.overlap == 'on')}{len(self.buckets(facts, config))} buckets, the last parameters' first)"
        return {
            "shared_step": f"off ({alone})" if alone else shared,
            "overlap": f"off ({after})" if after else overlapped,
        }

    def links(self, facts: Facts, config: Config, bytes_for: Callable[[int, int], int], carrier: str) -> list[LinkPlan]:
        if not self.unshared(facts, config.workers, carrier):
            return [self.shared_link(facts, config.workers, bytes_for, carrier)]
        buckets = self.buckets(facts, config) if not self.unoverlapped(facts, config, carrier) else []
        steps = config.total_steps(facts.train_examples)
        plan = self.among(facts, config.workers, bytes_for, carrier, steps, buckets[:-1])
        return [plan] if plan else []

    def among(
        self,
        facts: Facts,
        workers: int,
        bytes_for: Callable[[int, int], int],
        carrier: str,
        steps: int = 0,
        early: Sequence[int] = (),
    ) -> LinkPlan | None:
        """Of a group of this size; None if there is nobody to talk to. ``early``: bytes of buckets that leave by themselves."""
        if workers == 1:
            return None
        gradients = facts.gradient_bytes
        running = facts.running_bytes
        tail = 8 * tail_numel(workers, sum(p.trainable for p in facts.params))
        what = ", ".join(f"gradients ({dtype})" for dtype in gradients) + (", running buffers" if running else "")
        integers = sum(b.nbytes for b in facts.running if not b.dtype.startswith(("float", "bfloat")))
        if self.compress == NONE:
            nbytes = sum(bytes_for(n, workers) for n in early)
            nbytes += bytes_for(sum(gradients.values()) - sum(early) + running - integers + tail, workers)
        else:
            beside = running - integers + tail
            nbytes = CompressionPlan(self.compress, facts).bytes_sent(beside, workers, bytes_for, carrier, steps)
            what += f", compressed by {self.compress} but for small tensors"
        if integers:
            nbytes += bytes_for(integers, workers)
        if any(p.sparse for p in facts.params):
            what += "; beside these the touched rows of sparse parameters, which are not counted here"
        return LinkPlan(members=f"{workers} workers", carrier=carrier, bytes_per_step=nbytes, what=what)

    def shared_link(self, facts: Facts, workers: int, bytes_for: Callable[[int, int], int], carrier: str) -> LinkPlan:
        """Of a shared step: a worker reads the others' gradients of its part, and writes that part of the parameters."""
        (dtype, gradients), *_ = facts.gradient_bytes.items()
        running = facts.running
        integers = sum(b.nbytes for b in running if not b.dtype.startswith(("float", "bfloat")))
        beside = (
            sum(b.nbytes for b in running) - integers + 8 * tail_numel(workers, sum(p.trainable for p in facts.params))
        )
        nbytes = gradients + bytes_for(beside, workers)
        nbytes += bytes_for(integers, workers) if integers else 0
        nbytes += bytes_for(8, workers) if self.clip_norm is not None else 0
        what = f"gradients ({dtype}) of the part that it steps, read; that part of the parameters, written"
        what += ", running buffers" if running else ""
        return LinkPlan(members=f"{workers} workers with one memory", carrier=carrier, bytes_per_step=nbytes, what=what)

    def groups(self, facts: Facts, workers: int) -> list[Group]:
        (group,) = super().groups(facts, workers)
        if self.shared_step == "off" or self.compress != NONE or facts.step_alone:
            return [group]
        trained = [p for p in facts.params if p.trainable]
        return [replace(group, nbytes=group.nbytes + sum(p.nbytes for p in trained) + 2 * LINE * len(trained))]

    def writer_for(self, rank: int) -> int:
        return rank if self.compress != NONE else 0

    def keeps(self, workers: int) -> list[Kept]:
        if self.compress == NONE or workers == 1:
            return []
        of = "clipped gradients" if self.clips else "gradients"  # of the former the momentum stays with the optimizer
        return [Kept(HELD_BACK, f"{self.compress} of {of}", parse(self.compress).dropped("gradients"))]

    def memory(self, facts: Facts, workers: int, carrier: str) -> dict[str, int]:
        parts = 1 if self.unshared(facts, workers, carrier) else workers
        trained = sum(p.nbytes for p in facts.params if p.trainable)
        copies = 1 if workers == 1 else 2  # autograd's and the arena's
        compressed = self.compress != NONE and workers > 1
        kept = {"error feedback": CompressionPlan(self.compress, facts).kept_bytes()} if compressed else {}
        return kept | {
            "parameters": sum(p.nbytes for p in facts.params) - trained + trained // parts,
            "gradients": copies * trained,
            "optimizer": facts.optimizer_bytes // parts,
            "activations": facts.activation_bytes // self.accumulate,
            "buffers": sum(b.nbytes for b in facts.buffers),
        }

    def notes(self, facts: Facts, config: Config) -> list[str]:
        result = []
        if facts.running:
            result.append(
                "running buffers (BatchNorm): each worker normalises by its own share; statistics are averaged over "
                "workers, weighted by examples, at each step (integer ones: the largest)"
            )
        if sparse := [p.name for p in facts.params if p.sparse]:
            result.append(
                f"sparse gradients ({', '.join(sparse)}): only touched rows travel, gathered from all workers"
            )
        if self.compress != NONE:
            result += CompressionPlan(self.compress, facts).notes(config.workers)
        if self.shared_step == "on" and config.workers == 1:
            result.append("shared_step=on: one worker has nobody to share it with")
        if self.overlap == "on" and config.workers == 1:
            result.append("overlap=on: one worker sends nothing")
        if frozen := sum(not p.trainable for p in facts.params):
            result.append(f"{frozen} frozen parameter(s): not exchanged, not optimised")
        return result

    def replica(self, ctx: Context) -> Replica:
        from weft.patterns.training import Replica

        chain = [ClipNorm(self.clip_norm)] if self.clip_norm is not None else []
        return Replica(ctx, accumulate=self.accumulate, autocast=self.autocast, chain=chain)

    def exchange(self, replica: Replica) -> Exchange:
        from weft.patterns.mean import JoinedMean
        from weft.patterns.overlap import OverlappedMean
        from weft.patterns.shared_step import SharedMean

        facts, config, link = replica.ctx.facts, replica.ctx.config, replica.link
        if not self.unshared(facts, link.world, link.carrier):
            return SharedMean(replica, link)
        if not self.unoverlapped(facts, config, link.carrier):
            return OverlappedMean(replica, link, self.bucket_bytes(config))
        return JoinedMean(replica, replica.link, compress=self.compress)
