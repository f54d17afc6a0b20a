"""What patterns that split the model have in common: workers stand on the axes of a mesh, and hold one model, or some, together.

All of them are a Layout; what each axis does to a model is in modules of torch's (``tensors``, ``stages``), and the worker that joins them
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

from weft.codecs.spec import NONE, is_compressed, parse
from weft.comm.link import WORLD
from weft.config import Settled
from weft.cost import all_gather_bytes, carrier_aside, reduce_scatter_bytes
from weft.errors import ConfigError, Incompatible
from weft.patterns.base import (
    HELD_BACK,
    Facts,
    Group,
    Kept,
    ParamFact,
    Pattern,
    Role,
    check_autocast,
    check_clip_norm,
    differs_by,
    summed_up,
    tail_numel,
)
from weft.patterns.copies import compression, held_by_several, held_part
from weft.patterns.layout import AXES, DATA, PIPELINE, SHARDED, TENSOR, Layout
from weft.patterns.pipelined import (
    AUTO,
    Chosen,
    Pipelined,
    at_least_s,
    channel_name,
    choose,
    contenders,
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
    activation_bytes,
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
        check_clip_norm(self.clip_norm)

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
    def spreads(self) -> bool:
        """Activations between tensors that are cut are in parts, too."""
        return False

    @property
    def pipelined(self) -> Pipelined:
        return Pipelined()

    @property
    def codec(self) -> str:
        """By which copies of a part exchange its gradients."""
        return NONE

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

    def settles(self, facts: Facts, workers: int) -> str:
        if facts.pipeline is None:
            return ""
        asked, pipeline = self.pipelined, facts.pipeline
        return (
            f"{self.layout(workers)}, {len(pipeline.items)} parts, {pipeline.microbatches} micro-batches, schedule={asked.schedule}, "
            f"stages_per_worker={asked.per_worker}, chunks={asked.chunks}"
        )

    def settle(self, facts: Facts, workers: int, kept: Settled | None) -> Facts:
        if facts.pipeline is None:
            return facts
        if kept is None:
            chosen = choose(facts, self.pipelined, self.layout(workers).pipeline)
            kept = Settled(
                of=self.settles(facts, workers),
                schedule=chosen.program.schedule,
                stages_per_worker=chosen.program.stages_per_rank,
                items=[len(items) for items in chosen.stages],
                why=chosen.why,
            )
        return msgspec.structs.replace(facts, pipeline=msgspec.structs.replace(facts.pipeline, settled=kept))

    def contenders(self, facts: Facts, workers: int) -> list[Settled]:
        if facts.pipeline is None or self.tries == "never":
            return []
        return contenders(facts, self.pipelined, self.layout(workers).pipeline, self.settles(facts, workers))

    def choices(self, facts: Facts, config: Config, carrier: str) -> dict[str, str]:
        if (chosen := self.chosen(facts, config.workers)) is None:
            return {}
        how = "auto" if self.pipelined.schedule == AUTO else "asked for"
        return {"schedule": f"{chosen.words} ({how}: {chosen.why})"}

    @property
    def clips(self) -> bool:
        return self.clip_norm is not None

    def differs(self, facts: Facts, steps: int) -> str:
        return differs_by(self.codec)

    # -- what copies of a part send each other in fewer bytes

    def writer_for(self, rank: int) -> int:
        return rank if self.codec != NONE else 0

    def keeps(self, workers: int) -> list[Kept]:
        if self.codec == NONE:
            return []
        of = f"{self.codec} of gradients over {self.layout(workers)}, {self.pipelined}"
        return [Kept(HELD_BACK, of, parse(self.codec).dropped("gradients"))]

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
        places = self._places(facts, layout, self.chosen(facts, workers))
        held = max(self._held(facts, layout, [p for p in here if p.trainable]) for here in places)
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
                yield Group(channel_name(sender, receiver), pair, nbytes, aside=True)

    # -- what it can do

    def learn(
        self,
        task: Task,
        model: torch.nn.Module,
        batch: Callable[[int], Any],
        held_out: Any,
        config: Config,
        beside: int = 0,
    ) -> dict[str, Any]:
        from weft.patterns.blocks import find_blocks

        layout = self.layout(config.workers)
        share = -(-config.batch // layout.shares)
        blocks = find_blocks(task, model)
        learned: dict[str, Any] = {"blocks": {n: sum(p.nbytes for p in b.parameters()) for n, b in blocks.items()}}
        if (degree := max(layout.tensor, layout.sharded)) > 1:
            from weft.patterns.rehearsal import check_optimizer_of_parts

            check_optimizer_of_parts(task, model, degree)
        if layout.sharded > 1:
            from weft.patterns.rehearsal import check_uses

            check_uses(task, model, lambda: task.loss(model, batch(share)), stays=not self.gathers_twice)
        if layout.tensor > 1:
            from weft.patterns.tensors import BySequence, learn

            if self.spreads and not blocks:
                raise Incompatible(
                    f"sequence=true: {type(task).__name__}'s model has no blocks after which activations become whole again: give the task blocks(model), or "
                    "leave sequence=true out."
                )
            ends = list(blocks) if layout.pipeline > 1 else list(blocks)[-1:]  # a stage passes on what is whole
            by_sequence = BySequence(list(blocks), ends, held_out) if self.spreads else None
            learned["tensor"] = learn(task, model, batch(share), layout.tensor, by_sequence)
        if layout.pipeline > 1:
            from weft.patterns.stages import learn as learn_stages
            from weft.patterns.stages import least_examples
            from weft.patterns.wavefront import learn as learn_chunks

            parted = learned["tensor"].parted if layout.tensor > 1 else ()
            microbatches = num_microbatches(self.pipelined, layout.pipeline, share, least_examples(model))
            examples, chunks = -(-share // microbatches), self.pipelined.chunks
            # no schedule of time chunks splits the backward, and of a recurrent block torch's split is dear
            known = learn_stages(
                task, model, batch, held_out, examples, microbatches, parted=parted, split=chunks == 1, beside=beside
            )
            learned["pipeline"] = learn_chunks(task, model, batch(examples), known, chunks)
        return learned

    def check(self, facts: Facts, config: Config) -> None:
        layout = self.layout(config.workers)
        check_autocast(self.autocast, config.dtype)
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
        layout, chosen = self.layout(config.workers), self.chosen(facts, config.workers)
        sent = self._traffic(facts, layout, chosen, bytes_for, carrier)
        running = facts.running
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
        if chosen is not None:
            assert facts.pipeline is not None
            plans += [
                LinkPlan(
                    members=f"stage worker {k} of {layout.pipeline}",
                    carrier=carrier_aside(carrier, config.link),
                    bytes_per_step=nbytes,
                    what="activations to the next stage, gradients to the one before",
                    group=PIPELINE,
                )
                for k, nbytes in enumerate(sent_bytes(chosen, facts.pipeline))
            ]
        if layout.data > 1:
            compressed = f", compressed by {self.codec} but for small tensors" if self.codec != NONE else ""
            what = f"gradients ({dtypes}) of that part{compressed}"
            each = plan(DATA, f"{layout.data} workers that hold the same part", what)
            steps = config.total_steps(facts.train_examples)
            for here in self._places(facts, layout, chosen):
                joined = self._joined(facts, layout, chosen, here, bytes_for, carrier, steps)
                plans.append(msgspec.structs.replace(each, bytes_per_step=joined.nbytes))
        return plans

    def _joined(
        self,
        facts: Facts,
        layout: Layout,
        chosen: Chosen | None,
        here: Sequence[ParamFact],
        bytes_for: Callable[[int, int], int],
        carrier: str,
        steps: int = 0,
    ) -> Traffic:
        """What a worker sends in a step to those that hold the same part, of the parameters that are ``here``; of ``steps``, if a codec warms
        up in them, the mean."""
        trained = [p for p in here if p.trainable]
        if self.codec == NONE:
            return Traffic(bytes_for(self._held(facts, layout, trained), layout.data), 1)
        several = held_by_several(facts, layout, chosen)
        beside = self._held(facts, layout, [p for p in trained if p.name in several])
        compressed = compression(self.codec, facts, layout, chosen, here)
        return Traffic(compressed.bytes_sent(beside, layout.data, bytes_for, carrier, steps), 1)

    def _traffic(
        self,
        facts: Facts,
        layout: Layout,
        chosen: Chosen | None,
        bytes_for: Callable[[int, int], int],
        carrier: str,
    ) -> dict[str, Traffic]:
        """What the worker that sends most sends in a step, by axis, but for what stages send each other; of all workers: what they must
        agree on."""
        trained = [p for p in facts.params if p.trainable]
        running = facts.running_bytes
        sent = {WORLD: Traffic(bytes_for(8 * tail_numel(layout.world, len(trained)) + running, layout.world), 1)}
        if layout.tensor > 1:
            assert facts.tensor is not None
            cut = facts.tensor
            nbytes = bytes_for(cut.exchanged, layout.tensor) if cut.exchanged else 0
            part = cut.gathered * cut.degree // layout.tensor  # of one worker
            nbytes += all_gather_bytes(carrier, part, layout.tensor) if part else 0
            nbytes += reduce_scatter_bytes(carrier, cut.scattered, layout.tensor, bytes_for) if cut.scattered else 0
            sent[TENSOR] = Traffic(nbytes, cut.exchanges)
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
            sent[DATA] = max(
                self._joined(facts, layout, chosen, here, bytes_for, carrier)
                for here in self._places(facts, layout, chosen)
            )
        return sent

    # -- how long it takes

    def predict(
        self, facts: Facts, config: Config, bytes_for: Callable[[int, int], int], carrier: str, tried_s: float = 0.0
    ) -> StepPlan | None:
        if not facts.step_s:
            return None
        layout = self.layout(config.workers)

        def seconds(facts: Facts, pattern: SplitPattern, layout: Layout) -> dict[str, float]:
            chosen = choose(facts, pattern.pipelined, layout.pipeline) if layout.pipeline > 1 else None
            sent = pattern._traffic(facts, layout, chosen, bytes_for, carrier) if layout.world > 1 else {}
            flow = predicted(facts, pattern.pipelined, chosen) if chosen is not None else None
            return step_parts(facts, layout, sent, flow, pattern._stepped(facts, layout, chosen))

        def other(pattern: SplitPattern, workers: int, who: str, use: str) -> Other:
            there = pattern.layout(workers)
            known = scaled(facts, layout.shares / there.shares)
            takes_s = sum(seconds(known, pattern, there).values())
            purposes = pattern.memory(known, workers, carrier)
            left, activations, memory = facts.memory_left, purposes["activations"], sum(purposes.values())
            if workers == 1 and left and memory > left > memory - activations:
                pieces = math.ceil(activations / (left - memory + activations))
                use, memory = f"{use} -o accumulate={pieces}", memory - activations + activations // pieces
            return Other(who, use, takes_s, memory * on_host(facts, workers))

        own = seconds(facts, self, layout)
        takes_s = tried_s or sum(own.values())
        copies = Copies()
        fewer = [other(copies, 1, "one worker alone", "--pattern allreduce --workers 1")]
        for pattern, workers, use in self._halves(config.workers):
            fewer.append(other(pattern, workers, f"a half of them ({pattern.layout(workers)})", use))
        whole = f"--pattern allreduce --workers {config.workers}"
        replicas = other(copies, config.workers, "as many copies", whole)
        words = advice(facts, takes_s, fewer, replicas) if config.workers > 1 else ""
        return StepPlan(seconds=own, link=link_in_words(facts), advice=words, tried_s=tried_s)

    def _halves(self, workers: int) -> Iterator[tuple[SplitPattern, int, str]]:
        """The same with half of the workers on one of its axes, more than one of them, and how to ask for it."""
        if workers % 2 or workers < 4:
            return
        changes = [{}, *({name: n // 2} for name, n in vars(self).items() if name in DEGREES and n and n % 2 == 0)]
        for change in changes:
            if change.get(TENSOR) == 1 and self.spreads:
                change = {**change, "sequence": False}
            if change.get(PIPELINE) == 1:
                change = {**change, "trial": "auto"}
            with contextlib.suppress(ConfigError):
                pattern = dataclasses.replace(self, **change)
                pattern.layout(workers // 2)
                options = "".join(f" -o {name}={str(value).lower()}" for name, value in change.items())
                yield pattern, workers // 2, f"--workers {workers // 2}{options}"

    def _stepped(self, facts: Facts, layout: Layout, chosen: Chosen | None) -> float:
        """The part of what is trained that the busiest worker steps."""
        trained = [[p for p in here if p.trainable] for here in self._places(facts, layout, chosen)]
        whole = sum(p.nbytes for p in facts.params if p.trainable)
        return max(self._held(facts, layout, here) for here in trained) / whole

    @staticmethod
    def _places(facts: Facts, layout: Layout, chosen: Chosen | None) -> list[list[ParamFact]]:
        """The parameters at each place in the pipeline."""
        if chosen is None:
            return [facts.params]
        assert facts.pipeline is not None
        workers = {p.name: chosen.workers_of(facts.pipeline.uses[p.name]) for p in facts.params}
        return [[p for p in facts.params if place in workers[p.name]] for place in range(layout.pipeline)]

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

        def at(place: int, here: Sequence[ParamFact]) -> dict[str, int]:
            held = self._held(facts, layout, here)
            # of a micro-batch after the first each gradient is made beside the one that it is added to
            again = chosen is not None and facts.pipeline is not None and facts.pipeline.microbatches > 1
            made = max((self._held(facts, layout, [p]) for p in here if p.trainable), default=0) if again else 0
            trained = self._held(facts, layout, [p for p in here if p.trainable])
            activations = activation_bytes(facts, layout.tensor) if chosen is None else chosen.activation_bytes[place]
            compresses = self.codec != NONE and layout.data > 1
            kept = compression(self.codec, facts, layout, chosen, here).kept_bytes() if compresses else 0
            return ({"error feedback": kept} if compresses else {}) | {
                "parameters": held,
                "gathered": self._gathered_bytes(facts, layout) if layout.sharded > 1 else 0,
                "gradients": trained * (2 if layout.data > 1 else 1) + made,
                "optimizer": facts.optimizer_bytes * trained // whole,
                "activations": int(activations) // self.accumulate,
                "buffers": sum(b.nbytes for b in facts.buffers),
            }

        places = self._places(facts, layout, chosen)
        return max((at(place, here) for place, here in enumerate(places)), key=lambda parts: sum(parts.values()))

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
        if across := layout.crossing(TENSOR, facts.hosts):
            workers = " and ".join(str(rank) for rank in across[0])
            result.append(
                f"tensor={layout.tensor} goes across hosts (workers {workers} stand on several): each block waits for the network; take a degree "
                "that divides the workers of every host"
            )
        if layout.sharded > 1 and facts.blocks:
            names = list(facts.blocks)
            shown = ", ".join(names[:3]) + (f", ... {names[-1]}" if len(names) > 3 else "")
            result.append(f"gathered block by block: {len(names)} blocks ({shown}), and once what belongs to none")
        elif layout.sharded > 1:
            result.append(
                "the model has no blocks: it is gathered as a whole at each step. Give the task blocks(model)"
            )
        if config.workers > 1:
            why = self.made_whole(facts, layout)
            result.append(
                f"each worker makes the model whole before it keeps its part: {why}"
                if why
                else "the model is made block by block: no worker ever holds the whole"
            )
        if self.codec != NONE:
            result += compression(self.codec, facts, layout, chosen, facts.params).notes(layout.data)
            large = {p.name for p in facts.params if is_compressed(held_part(facts, layout, p).shape)}
            if several := sorted(large & held_by_several(facts, layout, chosen)):
                result.append(
                    f"compress={self.codec} leaves whole what several workers hold alike: {summed_up(several)}"
                )
        if facts.running and (layout.shares > 1 or layout.pipeline > 1):
            piece = "micro-batch by itself" if layout.pipeline > 1 else "worker's share by itself"
            joined = (
                "; statistics are averaged over shares, weighted by examples, at each step (integer ones: the largest)"
            )
            result.append(
                f"running buffers (BatchNorm): each {piece} is normalised, so this is not the model that one process trains"
                + (joined if layout.shares > 1 else "")
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
