"""An arena whose exchange is compressed: large tensors through a codec with feedback, small ones whole."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from weft.codecs.base import Codec, Exchanging, Gather, Keys, Sum
from weft.codecs.build import build, build_codec
from weft.codecs.feedback import Momentum, MomentumCorrection, Plain, RunningMomentum, by_name
from weft.codecs.spec import NONE, Spec, is_compressed, parse
from weft.comm.link import Link
from weft.config import FIRST_PART, part_of
from weft.data.keys import key_int
from weft.errors import TaskError
from weft.patterns.training import Arena, Replica

if TYPE_CHECKING:
    from weft.patterns.base import Facts, Resume

STATE = "compress"


def make_arena(
    params: Mapping[str, nn.Parameter],
    link: Link,
    compress: str,
    *,
    seed: int,
    momentum: Momentum | None = None,
    steps: int = 0,
    whole: Collection[str] = (),
) -> Arena:
    """As ``compress`` says: "none", or what weft.codecs.spec.parse reads. ``steps``: of the run, if the codec warms up in them; ``whole``:
    parameters that are left as they are."""
    if compress == NONE or link.world == 1:
        return Arena(params, link)
    return CompressedArena(params, link, parse(compress), seed=seed, momentum=momentum, steps=steps, whole=whole)


def take_momentum(replica: Replica, compress: str) -> Momentum | None:
    """From the task's optimizer, which then keeps none, if the codec wants it and the optimizer has one that can be taken."""
    found = replica.ctx.facts.momentum
    if found is None or not parse(compress).takes_momentum:
        return None
    set_momentum(replica.optimizer.param_groups, 0.0)
    return Momentum(*found)


def set_momentum(groups: Iterable[dict[str, Any]], factor: float) -> None:
    for group in groups:
        if "betas" in group:
            group["betas"] = (factor, group["betas"][1])
        else:
            group["momentum"] = factor


def momentum_of(group: Mapping[str, Any]) -> float:
    return float(group["betas"][0] if "betas" in group else group["momentum"])


def check_momentum(optimizer: torch.optim.Optimizer) -> None:
    """What was taken must not come back: both would act. The preflight has stepped the task's schedule, but not all else."""
    for group in optimizer.param_groups:
        if factor := momentum_of(group):
            raise TaskError(
                f"the momentum of {type(optimizer).__name__} is taken before the codec, and the task set it to {factor:g} again: both "
                "would act. Leave it alone during the run (cycle_momentum=False in OneCycleLR and CyclicLR), or use compress=int8."
            )


def taken_velocity(replica: Replica, momentum: Momentum) -> tuple[dict[str, Tensor], int]:
    """What an optimizer had of it when it was taken, by parameter name, and after how many steps."""
    result: dict[str, Tensor] = {}
    steps = 0
    for name, p in replica.params.items():
        state = replica.optimizer.state.get(p, {})
        velocity = state.get("exp_avg") if momentum.is_mean else state.pop("momentum_buffer", None)
        if velocity is not None:
            result[name] = velocity
            steps = max(steps, int(state.get("step", 1)))
    return result, steps


def with_momentum(optimizer: Mapping[str, Any], saved: Mapping[str, Any], own: Sequence[Mapping[str, Any]]) -> Any:
    """The state of a task's optimizer, had its momentum not been taken: what a CompressedArena ``saved``, and each rank of its own,
    put back. What the codec held back is not in it."""
    if saved["momentum"] is None:
        return optimizer
    factor, is_mean = saved["momentum"]
    velocity: dict[str, Tensor] = dict(saved["velocity"])
    for kept in (each for part in own for each in part.values()):
        for name, share in kept.get("velocity", {}).items():
            velocity[name] = velocity[name] + share if name in velocity else share
    key = "exp_avg" if is_mean else "momentum_buffer"
    states = {name: dict(state) for name, state in optimizer["state"].items()}
    for name, whole in velocity.items():
        if not is_mean or name in states:  # Adam knows of others only that they never had a gradient
            states.setdefault(name, {})[key] = whole
    groups = [dict(group) for group in optimizer["param_groups"]]
    set_momentum(groups, factor)
    return {"state": states, "param_groups": groups}


class CompressedArena(Arena):
    """``state`` is the same on all ranks after an exchange; ``own_state`` is what each rank holds back for itself."""

    def __init__(
        self,
        params: Mapping[str, nn.Parameter],
        link: Link,
        spec: Spec,
        *,
        seed: int,
        momentum: Momentum | None,
        steps: int,
        whole: Collection[str] = (),
    ) -> None:
        large = {n: p for n, p in params.items() if is_compressed(p.shape) and n not in whole}
        super().__init__(params, link, first=large)
        self.link, self.seed = link, seed
        self.feedbacks: list[Plain] = []
        for flat in self.buffers[: len({p.dtype for p in large.values()})]:
            segments = [(n, p.shape) for n, p in large.items() if p.dtype == flat.dtype]
            self.feedbacks.append(
                build(
                    spec,
                    segments,
                    flat,
                    seed=key_int(seed, "codec"),
                    momentum=momentum,
                    warmup=spec.warmup(steps),
                )
            )
        #: what is not compressed; its momentum is taken after the exchange, where the optimizer would have
        self.whole = self.buffers[len(self.feedbacks) :]
        self.moments = [RunningMomentum(momentum, flat) for flat in self.whole] if momentum is not None else []
        self.momentum = momentum

    def all_reduce(self, link: Link, beside: Sequence[Tensor], number: int) -> None:
        waiting = [*self.whole, *beside]
        for k, (feedback, flat) in enumerate(zip(self.feedbacks, self.buffers, strict=False)):
            keys = Keys(key_int(self.seed, "codec", k), number, link.rank)
            waiting = carry_out(feedback.exchange(flat, keys, link.world), link, waiting)
        if waiting:
            link.all_reduce(waiting)
        for moment, flat in zip(self.moments, self.whole, strict=False):
            moment(flat)

    def take_back(self, names: Iterable[str]) -> None:
        for name in set(names) & self.first:
            for feedback, flat in zip(self.feedbacks, self.buffers, strict=False):
                if flat.dtype == self.views[name].dtype:
                    feedback.take_back(name, self.views[name] / self.link.world)

    def state(self) -> dict[str, Any]:
        state: dict[str, Any] = {f"{k}": feedback.state_dict() for k, feedback in enumerate(self.feedbacks)}
        taken = [self.momentum.factor, self.momentum.is_mean] if self.momentum is not None else None
        steps = self.moments[0].steps if self.moments else 0
        return state | {"momentum": taken, "velocity": self._velocity(), "steps": steps}

    def _velocity(self) -> dict[str, Tensor]:
        """Of what is not compressed."""
        if not self.moments:
            return {}
        flats = [*self.buffers[: len(self.feedbacks)], *(moment.velocity for moment in self.moments)]
        return {name: view for name, view in self.by_name(flats).items() if name not in self.first}

    def begin_with(self, velocity: Mapping[str, Tensor], steps: int) -> None:
        """Go on with the momentum that the optimizer had; each rank takes an equal share of what is compressed."""
        own = self._velocity()
        for feedback in self.feedbacks:
            if isinstance(feedback, MomentumCorrection):
                feedback.momentum.steps = steps
                own |= by_name(feedback.momentum.velocity, feedback.segments)
        for moment in self.moments:
            moment.steps = steps
        for name, value in velocity.items():
            own[name].copy_(value / self.link.world if name in self.first else value)

    def own_state(self) -> dict[str, Any]:
        return {f"{k}": feedback.own_state_dict() for k, feedback in enumerate(self.feedbacks)}

    def load(self, resume: Resume) -> None:
        """In another world every rank takes an equal share of what all had held back, so that nothing of it is lost."""
        if not (state := resume.parts[FIRST_PART]["exchange"].get(STATE)):
            return  # nothing was compressed, or by another codec: nothing waits
        if resume.world == self.link.world:
            own = resume.parts[part_of(self.link.rank)][STATE]
        else:
            own = shared_out([part[STATE] for part in resume.parts.values()], self.link.world)
        self.restore(state, own)

    def restore(self, state: Mapping[str, Any], own: Mapping[str, Any]) -> None:
        """As ``state`` and ``own_state`` told."""
        for k, feedback in enumerate(self.feedbacks):
            feedback.load_state_dict(state[f"{k}"], own[f"{k}"])
        for name, view in self._velocity().items():
            view.copy_(state["velocity"][name])
        for moment in self.moments:
            moment.steps = int(state["steps"])


def carry_out(exchanging: Exchanging, link: Link, beside: list[Tensor]) -> list[Tensor]:
    """What a codec asks for, done by ``link``. ``beside`` travels with the first sum; returns what had no chance to."""
    asked = next(exchanging)
    while True:
        answer = None
        if isinstance(asked, Sum):
            link.all_reduce([*asked.buffers, *beside])
            beside = []
        else:
            assert isinstance(asked, Gather)
            answer = link.all_gather(asked.payload)
        try:
            asked = exchanging.send(answer)
        except StopIteration:
            return beside


def shared_out(states: Sequence[Any], world: int) -> Any:
    """The states' sum / world, leaf by leaf."""
    first = states[0]
    if isinstance(first, Mapping):
        return {key: shared_out([state[key] for state in states], world) for key in first}
    return torch.stack(list(states)).sum(0) / world


def mean_bytes(codec: Codec, numel: int, itemsize: int, steps: int, warmup: int) -> list[int]:
    """Of each exchange that the codec asks for, over ``steps`` of which the first ``warmup`` warm up."""
    final = codec.sums(numel, itemsize)
    if not warmup:
        return final

    def at(k: int) -> list[int]:
        codec.warm_up(k / warmup)
        return codec.sums(numel, itemsize)

    # the later, the longer are the pieces: each counts with the mean of its first and its last exchange
    bounds = sorted({*range(min(warmup, 20)), *(round(warmup ** (j / 100)) for j in range(100)), warmup})
    total = [f * (steps - warmup) for f in final]
    for begin, end in pairwise(bounds):
        total = [t + (a + b) * (end - begin) / 2 for t, a, b in zip(total, at(begin), at(end - 1), strict=True)]
    codec.warm_up(1.0)
    return [round(t / steps) for t in total]


def bytes_per_exchange(facts: Facts, spec: Spec, steps: int) -> tuple[list[int], list[int]]:
    """(bytes of each sum, bytes of each gather) of one exchange; with the first sum travels what is not compressed.

    ``steps``: of the run, if the codec warms up in them; else 0.
    """
    trained = [p for p in facts.params if p.trainable and not p.sparse]
    large = [p for p in trained if is_compressed(p.shape)]
    sums: list[int] = [0]
    gathered: list[int] = []
    for dtype in dict.fromkeys(p.dtype for p in large):
        segments = [(p.name, torch.Size(p.shape)) for p in large if p.dtype == dtype]
        codec = build_codec(spec, segments)
        numel = sum(shape.numel() for _, shape in segments)
        itemsize: int = getattr(torch, dtype).itemsize
        (sums if codec.linear else gathered).extend(mean_bytes(codec, numel, itemsize, steps, spec.warmup(steps)))
    sums[:2] = [sum(sums[:2])]
    sums[0] += sum(p.nbytes for p in trained) - sum(p.nbytes for p in large)
    return sums, gathered
