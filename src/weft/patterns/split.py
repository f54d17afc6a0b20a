"""What patterns that split the model have in common: workers stand on the axes of a mesh, and hold one model, or some, together.

All of them are a Layout; what each axis does to a model is in modules of torch's (``sharding``, ``tensors``), and the worker that joins them
in ``split_replica``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import msgspec

from weft.comm.link import WORLD
from weft.config import Settled
from weft.cost import all_gather_bytes, reduce_scatter_bytes
from weft.errors import ConfigError, Incompatible
from weft.patterns.base import Facts, Group, ParamFact, Pattern, Role, tail_numel
from weft.patterns.layout import AXES, DATA, PIPELINE, SHARDED, TENSOR, Layout
from weft.patterns.pipelined import (
    AUTO,
    Chosen,
    Pipelined,
    at_least_s,
    channel_name,
    choose,
    goes_by_link,
    num_microbatches,
    pair_name,
    pairs_of,
    predicted,
    sent_bytes,
)
from weft.patterns.prediction import (
    Other,
    Traffic,
    advice,
    compute_s,
    link_in_words,
    on_host,
    scaled,
    step_parts,
)
from weft.payoff import format_time
from weft.pipelines.channels import channel_order
from weft.plan import LinkPlan, StepPlan
from weft.update import ClipNorm

if TYPE_CHECKING:
    import torch

    from weft.config import Config
    from weft.patterns.base import Context
    from weft.patterns.training import Exchange, Replica
    from weft.task import Task


DEGREES = ("degree", "stages", "replicas", *AXES)  # options that count workers


def summed_up_range(first: str, last: str) -> str:
    return first if first == last else f"{first} to {last}"


def in_chunks(steps: list[int]) -> str:
    if not steps:
        return ""
    each = str(steps[0]) if steps[0] == steps[-1] else f"{steps[0]} or {steps[-1]}"
    return f", each in {len(steps)} time chunks of {each} steps, a wavefront"


def as_quick(alone_s: float, limit_s: float) -> str:
    if alone_s <= 0:
        return ""
    return f": at most {alone_s / limit_s:.2g}x as quick as one worker with as many examples, which computes for {format_time(alone_s)}"


@dataclass(frozen=True)
class SplitPattern(Pattern):
    splits: ClassVar[bool] = True
    tier: ClassVar[Literal["beta"]] = "beta"

    accumulate: int = field(
        default=1, kw_only=True, metadata={"doc": "micro-batches per step: less memory, same result"}
    )
    clip_norm: float | None = field(
        default=None, kw_only=True, metadata={"doc": "largest global L2 norm of the averaged gradient"}
    )
    autocast: Literal["none", "bf16"] = field(
        default="none", kw_only=True, metadata={"doc": "compute in bfloat16 where torch holds it safe"}
    )

    def __post_init__(self) -> None:
        self._at_least_one("accumulate", "no accumulation")
        if self.clip_norm is not None and not (self.clip_norm > 0 and math.isfinite(self.clip_norm)):
            raise ConfigError(f"clip_norm={self.clip_norm} is not possible: give a positive number, or none.")

    def _at_least_one(self, option: str, one_is: str) -> None:
        if (value := getattr(self, option)) < 1:
            raise ConfigError(f"{option}={value} is not possible: 1 ({one_is}) or more.")

    @abstractmethod
    def layout(self, workers: int) -> Layout:
        """ConfigError if this many workers cannot stand so."""

    @property
    def gathers_twice(self) -> bool:
        """A block's parts are let go between forward and backward."""
        return True

    @property
    def pipelined(self) -> Pipelined:
        return Pipelined()

    def chosen(self, facts: Facts, workers: int) -> Chosen | None:
        """Its pipeline, if it has one."""
        size = self.layout(workers).pipeline
        return choose(facts, self.pipelined, size) if size > 1 else None

    def neighbours(self, facts: Facts, config: Config) -> dict[str, list[tuple[int, int]]]:
        layout, asked = self.layout(config.workers), self.pipelined
        far = facts.between_hosts or any(fault.get("step") is None for fault in config.faults)
        if layout.pipeline == 1 or not goes_by_link(facts, asked, layout.pipeline, far):
            return {}
        rows = layout.groups(PIPELINE)
        return {pair_name(a, b): [(row[a], row[b]) for row in rows] for a, b in pairs_of(layout.pipeline)}

    def settle(self, facts: Facts, workers: int, kept: Settled | None) -> Facts:
        if facts.pipeline is None:
            return facts
        asked, open_facts = self.pipelined, facts.pipeline
        of = (
            f"{self.layout(workers)}, {len(open_facts.items)} parts, {open_facts.microbatches} micro-batches, schedule={asked.schedule}, "
            f"stages_per_worker={asked.per_worker}, chunks={asked.chunks}"
        )
        if kept is None or kept.of != of:
            chosen = choose(facts, asked, self.layout(workers).pipeline)
            kept = Settled(
                of=of,
                schedule=chosen.program.schedule,
                stages_per_worker=chosen.program.stages_per_rank,
                items=[len(items) for items in chosen.stages],
                why=chosen.why,
            )
        return msgspec.structs.replace(facts, pipeline=msgspec.structs.replace(open_facts, settled=kept))

    def choices(self, facts: Facts, config: Config, carrier: str) -> dict[str, str]:
        if (chosen := self.chosen(facts, config.workers)) is None:
            return {}
        how = "auto" if self.pipelined.schedule == AUTO else "asked for"
        return {"schedule": f"{chosen.words} ({how}: {chosen.why})"}

    @property
    def clips(self) -> bool:
        return self.clip_norm is not None

    def differs(self, facts: Facts, steps: int) -> str:
        return ""

    def roles(self, workers: int) -> tuple[Role, ...]:
        does = "holds its part of the model, trains on its share of each batch"
        return (Role("worker", workers, "weft.patterns.training:train", does),)

    # -- who talks to whom

    def shares(self, workers: int) -> int:
        return self.layout(workers).shares

    def share_of(self, rank: int, workers: int) -> int:
        return self.layout(workers).share_of(rank)

    def groups(self, facts: Facts, workers: int) -> list[Group]:
        layout = self.layout(workers)
        tail = 8 * tail_numel(workers, len(facts.params))
        held = self._held(facts, layout, [p for p in facts.params if p.trainable])
        nbytes = {DATA: held, TENSOR: tail, SHARDED: tail}
        inner = [
            Group(axis, ranks, nbytes.get(axis, tail))
            for axis in AXES
            if 1 < getattr(layout, axis) < workers
            for ranks in layout.groups(axis)
        ]
        whole = held if layout.data == workers else 0
        return [Group(WORLD, tuple(range(workers)), tail + whole), *inner, *self._channels(facts, workers)]

    def _channels(self, facts: Facts, workers: int) -> Iterator[Group]:
        """Groups of two, for each direction in which stages talk."""
        if (chosen := self.chosen(facts, workers)) is None:
            return
        assert facts.pipeline is not None
        nbytes = max(item.output_bytes for item in facts.pipeline.items)
        for sender, receiver in channel_order(chosen.program):
            for row in self.layout(workers).groups(PIPELINE):
                # a link's members stand in order of their ranks
                pair = tuple(sorted((row[sender], row[receiver])))
                yield Group(channel_name(sender, receiver), pair, nbytes)

    # -- what it can do

    def learn(self, task: Task, model: torch.nn.Module, batch: Callable[[int], Any], config: Config) -> dict[str, Any]:
        from weft.patterns.blocks import find_blocks

        layout = self.layout(config.workers)
        share = -(-config.batch // layout.shares)
        blocks = find_blocks(task, model)
        learned: dict[str, Any] = {"blocks": {n: sum(p.nbytes for p in b.parameters()) for n, b in blocks.items()}}
        if layout.tensor > 1:
            from weft.patterns.tensors import learn

            learned["tensor"] = learn(task, model, batch(share), layout.tensor)
        if layout.pipeline > 1:
            from weft.patterns.stages import learn as learn_stages
            from weft.patterns.wavefront import learn as learn_chunks

            microbatches = num_microbatches(self.pipelined, layout.pipeline, share)
            examples, chunks = -(-share // microbatches), self.pipelined.chunks
            # no schedule of time chunks splits the backward, and of a recurrent block torch's split is dear
            known = learn_stages(task, model, batch, examples, microbatches, split=chunks == 1)
            learned["pipeline"] = learn_chunks(task, model, batch(examples), known, chunks)
        return learned

    def check(self, facts: Facts, config: Config) -> None:
        layout = self.layout(config.workers)
        if self.autocast == "bf16" and config.dtype == "float64":
            raise Incompatible("autocast=bf16 would undo --dtype float64: leave one of them out.")
        if config.cluster == "inprocess" and config.workers > 1:
            raise Incompatible(
                f"{self.name} needs a process for each worker (torch keeps process groups in globals): use --cluster local."
            )
        if facts.device != "cpu":
            raise Incompatible(
                f"{self.name} runs on CPUs so far, and the device is a GPU: use --device cpu, or --pattern allreduce."
            )
        if sparse := [p.name for p in facts.params if p.sparse]:
            raise Incompatible(
                f"{self.name} cannot take the sparse gradients of {', '.join(sparse)}: make them dense (sparse=False), or use --pattern allreduce."
            )
        share = config.batch // layout.shares
        if self.accumulate > share:
            raise ConfigError(
                f"accumulate={self.accumulate} cannot cut a worker's share of {share} examples (batch {config.batch} over "
                f"{layout.shares} shares): use at most {share}."
            )

    # -- what it takes

    def links(self, facts: Facts, config: Config, bytes_for: Callable[[int, int], int], carrier: str) -> list[LinkPlan]:
        if config.workers == 1:
            return []
        layout = self.layout(config.workers)
        sent = self._traffic(facts, layout, bytes_for, carrier)
        running = any(b.running for b in facts.buffers)
        dtypes = ", ".join(facts.gradient_bytes)

        def plan(axis: str, members: str, what: str) -> LinkPlan:
            group = WORLD if getattr(layout, axis) == config.workers else axis
            return LinkPlan(members=members, carrier=carrier, bytes_per_step=sent[axis].nbytes, what=what, group=group)

        plans = [
            LinkPlan(
                members=f"{config.workers} workers",
                carrier=carrier,
                bytes_per_step=sent[WORLD].nbytes,
                what="weights, losses, stop flags" + (", running buffers" if running else ""),
            )
        ]
        if layout.tensor > 1:
            assert facts.tensor is not None
            plans.append(
                plan(
                    TENSOR,
                    f"{layout.tensor} workers that hold each tensor together",
                    f"activations, forward and backward, in {facts.tensor.exchanges} exchanges",
                )
            )
        if layout.sharded > 1:
            plans.append(
                plan(
                    SHARDED,
                    f"{layout.sharded} workers that hold a model together",
                    f"parameters ({dtypes}), gathered {'before forward and again before backward' if self.gathers_twice else 'once'}; gradients",
                )
            )
        if (chosen := self.chosen(facts, config.workers)) is not None:
            assert facts.pipeline is not None
            plans += [
                LinkPlan(
                    members=f"stage worker {k} of {layout.pipeline}",
                    carrier=carrier,
                    bytes_per_step=nbytes,
                    what="activations to the next stage, gradients to the one before",
                    group=PIPELINE,
                )
                for k, nbytes in enumerate(sent_bytes(chosen, facts.pipeline))
            ]
        if layout.data > 1:
            plans.append(
                plan(
                    DATA,
                    f"{layout.data} workers that hold the same part",
                    f"gradients ({dtypes}) of that part",
                )
            )
        return plans

    def _traffic(
        self, facts: Facts, layout: Layout, bytes_for: Callable[[int, int], int], carrier: str
    ) -> dict[str, Traffic]:
        """What one worker sends in a step, by axis, but for what stages send each other; of all workers: what they must agree on."""
        trained = [p for p in facts.params if p.trainable]
        running = sum(b.nbytes for b in facts.buffers if b.running)
        sent = {WORLD: Traffic(bytes_for(8 * tail_numel(layout.world, len(trained)) + running, layout.world), 1)}
        if layout.tensor > 1:
            assert facts.tensor is not None
            sent[TENSOR] = Traffic(bytes_for(facts.tensor.exchanged, layout.tensor), facts.tensor.exchanges)
        if (size := layout.sharded) > 1:
            times = 2 if self.gathers_twice else 1
            inside = self._held(facts, layout, facts.params, blocks=True) * size
            # of no block: gathered once, kept until after backward
            rest = self._held(facts, layout, facts.params) * size - inside
            gathered, reduced = times * inside + rest, self._held(facts, layout, trained) * size
            nbytes = all_gather_bytes(carrier, gathered // size, size) + reduce_scatter_bytes(
                carrier, reduced, size, bytes_for
            )
            sent[SHARDED] = Traffic(nbytes, (times + 1) * len(facts.blocks) + 2)
        if layout.data > 1:
            sent[DATA] = Traffic(bytes_for(self._held(facts, layout, trained), layout.data), 1)
        return sent

    # -- how long it takes

    def predict(
        self, facts: Facts, config: Config, bytes_for: Callable[[int, int], int], carrier: str
    ) -> StepPlan | None:
        if not facts.step_s:
            return None
        layout = self.layout(config.workers)

        def seconds(facts: Facts, pattern: SplitPattern, layout: Layout) -> dict[str, float]:
            sent = pattern._traffic(facts, layout, bytes_for, carrier) if layout.world > 1 else {}
            if layout.pipeline == 1:
                return step_parts(facts, layout, sent, None, pattern._stepped(facts, layout, None))
            chosen = choose(facts, pattern.pipelined, layout.pipeline)
            flow = predicted(facts, chosen, slower=compute_s(facts, layout.tensor) / compute_s(facts, 1))
            return step_parts(facts, layout, sent, flow, pattern._stepped(facts, layout, chosen))

        def other(pattern: SplitPattern, workers: int, who: str, use: str) -> Other:
            there = pattern.layout(workers)
            known = scaled(facts, layout.shares / there.shares)
            takes_s = sum(seconds(known, pattern, there).values())
            memory = sum(pattern.memory(known, workers, carrier).values())
            left, activations = facts.memory_left, pattern.memory(known, workers, carrier)["activations"]
            if workers == 1 and left and memory > left > memory - activations:
                pieces = math.ceil(activations / (left - memory + activations))
                use, memory = f"{use} -o accumulate={pieces}", memory - activations + activations // pieces
            return Other(who, use, takes_s, memory * on_host(facts, workers))

        own = seconds(facts, self, layout)
        copies = Copies(accumulate=self.accumulate)
        fewer = [other(copies, 1, "one worker alone", "--pattern allreduce --workers 1")]
        for pattern, workers, use in self._halves(config.workers):
            fewer.append(other(pattern, workers, f"a half of them ({pattern.layout(workers)})", use))
        whole = f"--pattern allreduce --workers {config.workers}"
        replicas = other(copies, config.workers, "as many copies", whole)
        words = advice(facts, sum(own.values()), fewer, replicas) if config.workers > 1 else ""
        return StepPlan(seconds=own, link=link_in_words(facts), advice=words)

    def _halves(self, workers: int) -> Iterator[tuple[SplitPattern, int, str]]:
        """The same with half of the workers on one of its axes, more than one of them, and how to ask for it."""
        if workers % 2 or workers < 4:
            return
        changes = [{}, *({name: n // 2} for name, n in vars(self).items() if name in DEGREES and n and n % 2 == 0)]
        for change in changes:
            with contextlib.suppress(ConfigError):
                pattern = dataclasses.replace(self, **change)
                pattern.layout(workers // 2)
                options = "".join(f" -o {name}={n}" for name, n in change.items())
                yield pattern, workers // 2, f"--workers {workers // 2}{options}"

    def _stepped(self, facts: Facts, layout: Layout, chosen: Chosen | None) -> float:
        """The part of what is trained that the busiest worker steps."""
        trained = [p for p in facts.params if p.trainable]
        rows = [trained]
        if chosen is not None:
            assert facts.pipeline is not None
            uses = facts.pipeline.uses
            rows = [
                [p for p in trained if place in {chosen.worker_of(item) for item in uses[p.name]}]
                for place in range(layout.pipeline)
            ]
        return max(self._held(facts, layout, row) for row in rows) / sum(p.nbytes for p in trained)

    def _held(self, facts: Facts, layout: Layout, params: Sequence[ParamFact], blocks: bool = False) -> int:
        """Bytes of ``params`` that lie on one worker: on average, where parts are uneven. ``blocks``: of those within blocks alone."""
        cut = facts.tensor.parameters if facts.tensor else ()
        total = 0.0
        for p in params:
            if blocks and not any(p.name.startswith(f"{block}.") for block in facts.blocks):
                continue
            total += p.nbytes / layout.sharded / (layout.tensor if p.name in cut else 1)
        return int(total)

    def memory(self, facts: Facts, workers: int, carrier: str) -> dict[str, int]:
        """Of the worker that takes most."""
        layout, chosen = self.layout(workers), self.chosen(facts, workers)
        whole = sum(p.nbytes for p in facts.params if p.trainable)

        def at(place: int) -> dict[str, int]:
            here = [p for p in facts.params if chosen is None or place in chosen.workers_of(self._items(facts, p.name))]
            held = self._held(facts, layout, here)
            trained = self._held(facts, layout, [p for p in here if p.trainable])
            activations = facts.tensor.activation_bytes if facts.tensor else facts.activation_bytes
            if chosen is not None:
                activations = int(chosen.activation_bytes[place])
            return {
                "parameters": held,
                "gathered": self._gathered_bytes(facts, layout) if layout.sharded > 1 else 0,
                "gradients": trained * (2 if layout.data > 1 else 1),
                "optimizer": facts.optimizer_bytes * trained // whole,
                "activations": activations // self.accumulate,
                "buffers": sum(b.nbytes for b in facts.buffers),
            }

        return max((at(place) for place in range(layout.pipeline)), key=lambda parts: sum(parts.values()))

    @staticmethod
    def _items(facts: Facts, name: str) -> list[int]:
        assert facts.pipeline is not None
        return facts.pipeline.uses[name]

    def _gathered_bytes(self, facts: Facts, layout: Layout) -> int:
        """At the worst moment, in backward: parameters and gradients of what belongs to no block and of the largest block, and the room
        in which parameters come together and gradients stand ready."""
        inside, largest = sum(facts.blocks.values()), max(facts.blocks.values(), default=0)
        rest = sum(p.nbytes for p in facts.params) - inside
        return (2 * rest + (largest if self.gathers_twice else inside) + largest + max(rest, largest)) // layout.tensor

    def notes(self, facts: Facts, config: Config) -> list[str]:
        layout = self.layout(config.workers)
        result: list[str] = []
        if (chosen := self.chosen(facts, config.workers)) is not None:
            assert facts.pipeline is not None
            items = facts.pipeline.items
            for stage, of in enumerate(chosen.stages):
                between = summed_up_range(items[of.start].name, items[of.stop - 1].name)
                result.append(f"stage {stage}, on worker {chosen.program.placement[stage]} of the pipeline: {between}")
            result.append(
                f"{facts.pipeline.microbatches} micro-batch{'es' * (facts.pipeline.microbatches > 1)} of {facts.pipeline.examples} examples "
                f"flow{'s' * (facts.pipeline.microbatches == 1)} through the stages" + in_chunks(facts.pipeline.chunks)
            )
            if limit_s := at_least_s(facts.pipeline):
                result.append(
                    f"each time step waits for the one before: with chunks={len(facts.pipeline.chunks) or 1} a step computes for at least "
                    f"{format_time(limit_s)}, however many workers" + as_quick(compute_s(facts, 1), limit_s)
                )
        if facts.tensor:
            result += facts.tensor.in_words()
        if layout.sharded > 1 and facts.blocks:
            names = list(facts.blocks)
            shown = ", ".join(names[:3]) + (f", ... {names[-1]}" if len(names) > 3 else "")
            result.append(f"gathered block by block: {len(names)} blocks ({shown}), and once what belongs to none")
        elif layout.sharded > 1:
            result.append(
                "the model has no blocks: it is gathered as a whole at each step. Give the task blocks(model)"
            )
        if config.workers > 1:
            result.append(
                f"each worker makes the model whole before it keeps its part: {self.made_whole(facts, layout)}"
                if self.made_whole(facts, layout)
                else "the model is made block by block: no worker ever holds the whole"
            )
        if layout.shares > 1 and any(b.running for b in facts.buffers):
            result.append(
                "running buffers (BatchNorm): each worker normalises by its own share; statistics are averaged over "
                "workers, weighted by examples, at each step (integer ones: the largest)"
            )
        return result

    @staticmethod
    def made_whole(facts: Facts, layout: Layout) -> str:
        """Why a worker cannot make its part alone; empty if it can."""
        return "stages are told apart once all of it is there" if layout.pipeline > 1 else facts.made_whole

    def replica(self, ctx: Context) -> Replica:
        from weft.patterns.split_replica import SplitReplica

        chain: Sequence[ClipNorm] = [ClipNorm(self.clip_norm)] if self.clip_norm is not None else []
        return SplitReplica(ctx, self, accumulate=self.accumulate, autocast=self.autocast, chain=chain)

    def exchange(self, replica: Replica) -> Exchange:
        from weft.patterns.split_replica import SplitMean, SplitReplica

        assert isinstance(replica, SplitReplica)
        return SplitMean(replica)


@dataclass(frozen=True)
class Copies(SplitPattern):
    """A whole model on each worker, to compare with."""

    name: ClassVar[str] = "copies"
    summary: ClassVar[str] = ""
    answers: ClassVar[dict[str, str]] = {}

    def layout(self, workers: int) -> Layout:
        return Layout(data=workers)
