"""A worker's part of a pipeline: its list of actions, one after the other; what it makes for others leaves at once, what it waits for arrives meanwhile."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from weft.comm.channel import Channel, close_all, fail_together
from weft.comm.link import Link
from weft.errors import CommError, PeerLost
from weft.patterns.base import PipelineFacts
from weft.patterns.batches import check_loss
from weft.patterns.buffers import aside, places
from weft.patterns.pipelined import Chosen, channel_name
from weft.patterns.randomness import seed_torch
from weft.patterns.saved import own
from weft.patterns.stages import Cuts, input_gradient, passed, rebuilt, tensors_of, unheard, whole_backward
from weft.patterns.training import first_names
from weft.patterns.wavefront import Wave
from weft.pipelines.channels import channel_order
from weft.pipelines.schedules import Action, Input
from weft.task import Task


class Ran(NamedTuple):
    """A stage's forward of a micro-batch: what it was given and has made that may have a gradient."""

    given: list[Tensor]
    made: list[Tensor]


def move_away(model: nn.Module, uses: Mapping[str, Sequence[int]], chosen: Chosen, place: int) -> None:
    """What no stage of this worker uses keeps its shape alone."""
    first = first_names(model)
    away: dict[str, nn.Parameter] = {}
    for prefix, module in model.named_modules():
        for name, p in list(module.named_parameters(recurse=False)):
            known = first[f"{prefix}.{name}" if prefix else name]
            if place not in {chosen.worker_of(item) for item in uses[known]}:
                if known not in away:
                    away[known] = nn.Parameter(p.detach().to("meta"), requires_grad=p.requires_grad)
                module._parameters[name] = away[known]


class PipelineWork:
    """``place``: of this worker in the pipeline. ``groups``: links of its channels, by name. ``row``: the workers of its places. ``running``: names of buffers that a step writes to."""

    def __init__(
        self,
        task: Task,
        model: nn.Module,
        chosen: Chosen,
        place: int,
        facts: PipelineFacts,
        groups: Mapping[str, Link],
        row: Sequence[int],
        running: Collection[str],
        deadline_s: float,
    ) -> None:
        self.task, self.model, self.place, self.made_of = task, model, place, facts.made_of
        self.through_time, self.num_items = facts.through_time, len(facts.items)
        trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        #: by stage
        self.weights = [[p for n, p in trained.items() if set(facts.uses[n]) & set(items)] for items in chosen.stages]
        self.program, self.stages = chosen.program, chosen.stages
        self.cuts = Cuts(task, model, [item.name for item in facts.items[:-1]])
        self.cuts.running = [(at, max(facts.uses[n])) for n, each in places(model, running).items() for at in each]
        orders = channel_order(self.program)
        self.rank = row[place]
        self.out: dict[int, Channel] = {}  # by the place at the other end
        self.into: dict[int, Channel] = {}
        for at, to in orders:
            if at == place:
                self.out[to] = Channel(groups[channel_name(at, to)], True, row[to], deadline_s)
            elif to == place:
                self.into[at] = Channel(groups[channel_name(at, to)], False, row[at], deadline_s)
        fail_together(self.channels)
        self.coming = {at: len(orders[at, place]) for at in self.into}
        self.own_stages = [k for k, worker in enumerate(self.program.placement) if worker == place]
        self.last = len(self.stages) - 1

    @property
    def waited_s(self) -> float:
        return sum(channel.waited_s for channel in self.channels)

    @property
    def channels(self) -> list[Channel]:
        return [*self.out.values(), *self.into.values()]

    def step(
        self,
        batches: Sequence[Any],
        shares: Sequence[float],
        seed: int,
        precision: Callable[[], AbstractContextManager[Any]],
    ) -> list[float]:
        """Forward and backward of all micro-batches. ``shares``: what each one's loss counts in the joined mean. Returns the losses, if the
        last stage is here."""
        run = Step(self, batches, shares, seed, precision)
        for at, channel in self.into.items():
            channel.expect(self.coming[at])
        self.cuts.on_item = run.seed_item
        try:
            for action in self.program.actions[self.place]:
                run.do(action)
        finally:
            self.cuts.on_item = unheard
        for channel in self.out.values():
            channel.flush()
        return run.losses

    @torch.no_grad()
    def evaluate(self, code: Callable[[], Any]) -> Any:
        """What ``code``, which runs the model, returns, if the last stage is here; else None."""
        kept: dict[int, list[Tensor]] = {}
        result = None
        for stage in self.own_stages:
            items = self.stages[stage]
            given = None
            if stage > 0:
                before = self.program.placement[stage - 1]
                if before != self.place:
                    self.into[before].expect(1)
                tensors = kept.pop(stage) if before == self.place else self.into[before].take(("evaluate", stage))
                given = rebuilt(self.made_of[items.start - 1], tensors)
            made = self.cuts.run(code, items.start, items.stop, given)
            if stage == self.last:
                result = made
            elif (after := self.program.placement[stage + 1]) == self.place:
                kept[stage + 1] = tensors_of(made)
            else:
                self.out[after].send(("evaluate", stage + 1), [own(t) for t in tensors_of(made)])
        for channel in self.out.values():
            channel.flush()
        return result

    def close(self) -> None:
        error = sys.exc_info()[1]  # if that is why: the others shall know whom it blames
        left = PeerLost(f"rank {self.rank} ended within a step", (self.rank,))
        close_all(self.channels, error if isinstance(error, CommError) else left)


class Step:
    def __init__(
        self,
        work: PipelineWork,
        batches: Sequence[Any],
        shares: Sequence[float],
        seed: int,
        precision: Callable[[], AbstractContextManager[Any]],
    ) -> None:
        self.work, self.batches, self.shares, self.seed, self.precision = work, batches, shares, seed, precision
        self.losses = [0.0] * len(batches)
        self.piece = 0  # that is computed now: micro-batch x chunks + chunk
        self.ran: dict[tuple[int, int], Ran] = {}
        self.waves: dict[tuple[int, int], Wave] = {}  # by stage and micro-batch, where these go in time chunks
        self.later: dict[tuple[int, int], Callable[[], None]] = {}
        self.kept: dict[Input, Sequence[Tensor]] = {}  # for another stage of this worker

    def do(self, action: Action) -> None:
        needs = self.work.program.needs(action)
        given = self._take(needs) if needs is not None else None
        key = (action.stage, action.microbatch)
        made: Sequence[Tensor] = ()
        if action.kind == "F":
            made = self._forward(*key, given)
        elif self.work.program.chunks > 1:
            made = self._wave_back(*key, given)
        elif action.kind == "W":
            self.later.pop(key)()
        else:
            ran = self.ran.pop(key)
            if given is None:
                given = [torch.full_like(ran.made[0], self.shares[action.microbatch])]
            pairs = [(t, grad) for t, grad in zip(ran.made, given, strict=True) if t.requires_grad]
            outputs, grads = [t for t, _ in pairs], [grad for _, grad in pairs]
            if action.kind == "B":
                made = whole_backward(outputs, grads, ran.given)
            else:
                made, self.later[key] = input_gradient(outputs, grads, ran.given, self.work.weights[action.stage])
        gives = self.work.program.gives(action)
        if gives is not None:
            channel = self.work.program.sends(action)
            if channel is None:
                self.kept[gives] = made
            else:
                self.work.out[channel[1]].send(tuple(gives), made)

    def _take(self, needs: Input) -> Sequence[Tensor]:
        if needs in self.kept:
            return self.kept.pop(needs)
        stages = self.work.program.placement
        maker = stages[needs.stage - 1] if needs.forward else stages[needs.stage + 1]
        return self.work.into[maker].take(tuple(needs))

    def _forward(self, stage: int, piece: int, received: Sequence[Tensor] | None) -> list[Tensor]:
        work, items = self.work, self.work.stages[stage]
        microbatch, chunk = divmod(piece, work.program.chunks)
        given = passed(rebuilt(work.made_of[items.start - 1], received)) if received else None
        self.piece = piece

        def loss() -> Tensor:
            return work.task.loss(work.model, self.batches[microbatch])

        # of what counts for nothing nothing may be kept
        written = [] if self.shares[microbatch] else [place for place, _ in work.cuts.running]
        if work.program.chunks > 1:
            with aside(written), self.precision():
                tensors = self._wave(stage, microbatch).forward(chunk, given, loss)
            if stage == work.last and tensors:
                self._note_loss(tensors[0], microbatch)
            return [own(t).detach() for t in tensors]
        with aside(written), self.precision():
            made = work.cuts.run(loss, items.start, items.stop, given)
        if stage == work.last:
            self._note_loss(made, microbatch)
        tensors = tensors_of(made)
        leaves = [t for t in tensors_of(given) if t.requires_grad]
        self.ran[stage, microbatch] = Ran(leaves, [t for t in tensors if t.is_floating_point()])
        return [own(t).detach() for t in tensors]

    def seed_item(self, item: int) -> None:
        """By micro-batch (and chunk, where the item goes in chunks) and item: random numbers do not depend on cuts and schedule, and what the code
        draws for several stages is the same in each."""
        chunks, items = self.work.program.chunks, self.work.num_items
        piece = self.piece if item in self.work.through_time else self.piece - self.piece % chunks
        seed_torch(self.seed + piece * items + item)

    def _note_loss(self, made: Any, microbatch: int) -> None:
        check_loss(made, self.work.task)
        self.losses[microbatch] = made.item()

    def _wave(self, stage: int, microbatch: int) -> Wave:
        work, key = self.work, (stage, microbatch)
        if key not in self.waves:
            self.waves[key] = Wave(work.cuts, work.stages[stage], work.through_time, work.program.chunks)
        return self.waves[key]

    def _wave_back(self, stage: int, piece: int, grads: Sequence[Tensor] | None) -> list[Tensor]:
        microbatch, chunk = divmod(piece, self.work.program.chunks)
        wave = self._wave(stage, microbatch)
        if grads is None:  # of the last stage, whose last chunk has made the loss
            grads = [torch.full_like(loss, self.shares[microbatch]) for loss in wave.made[chunk]]
        back = wave.backward(chunk, grads)
        if chunk == 0:
            del self.waves[stage, microbatch]
        return back
