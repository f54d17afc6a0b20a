"""Seconds of a step of a split model before anybody takes it, and of the same batch with fewer workers. Pure.

One worker's compute is measured alone (preflight), and ranks that share cores share them evenly. What travels takes its exchanges' latency and its bytes by
the link's speed; since a worker computes nothing meanwhile, both add up. A pipeline is simulated. Good to about a quarter: what others do to a
machine, and caches and memory that workers share, are left out.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import NamedTuple

from msgspec.structs import replace

from weft.cost import GIGABIT, UNMEASURED, LinkSpeed
from weft.patterns.base import Facts
from weft.patterns.layout import AXES, Layout
from weft.payoff import format_rate, format_size, format_time
from weft.pipelines.simulate import Simulation


class Traffic(NamedTuple):
    """What one worker sends in a step, and in how many exchanges."""

    nbytes: int
    exchanges: int


class Other(NamedTuple):
    """Another way to train on the same batch. ``use``: the options that ask for it; ``bytes_on_host``: what its workers take on one."""

    who: str
    use: str
    step_s: float
    bytes_on_host: float


def on_host(facts: Facts, workers: int) -> int:
    """Of so many workers, those on the host with the most."""
    return min(workers, facts.per_host or workers)


def scaled(facts: Facts, examples: float) -> Facts:
    """Of shares of so many times as many examples."""
    compute_s = facts.step_s - facts.optimizer_s
    tensor, pipeline = facts.tensor, facts.pipeline
    if tensor is not None:
        tensor = replace(
            tensor,
            exchanged=round(examples * tensor.exchanged),
            gathered=round(examples * tensor.gathered),
            scattered=round(examples * tensor.scattered),
            compute_s=examples * tensor.compute_s,
            activation_bytes=round(examples * tensor.activation_bytes),
        )
    if pipeline is not None:
        items = [
            replace(
                item,
                forward_s=examples * item.forward_s,
                input_gradient_s=examples * item.input_gradient_s,
                weight_gradient_s=examples * item.weight_gradient_s,
                split_s=examples * item.split_s,
                output_bytes=round(examples * item.output_bytes),
                activation_bytes=round(examples * item.activation_bytes),
            )
            for item in pipeline.items
        ]
        pipeline = replace(pipeline, items=items, settled=None)
    return replace(
        facts,
        step_s=examples * compute_s + facts.optimizer_s,
        activation_bytes=round(examples * facts.activation_bytes),
        tensor=tensor,
        pipeline=pipeline,
    )


def of_one(whole: float, measured: float, degree: int, tensor: int) -> float:
    """What one of ``tensor`` workers has of ``whole``, where one of ``degree`` has ``measured``: what is cut goes by its part, the rest stays."""
    cut = max(0.0, whole - measured) / (1 - 1 / degree)
    return whole if tensor == 1 else measured + cut * (1 / tensor - 1 / degree)


def compute_s(facts: Facts, tensor: int) -> float:
    """Forward and backward of a share by one of ``tensor`` workers that cut it, alone."""
    whole, cut = facts.step_s - facts.optimizer_s, facts.tensor
    return of_one(whole, cut.compute_s, cut.degree, tensor) if cut is not None and cut.compute_s else whole


def activation_bytes(facts: Facts, tensor: int) -> float:
    """On one of ``tensor`` workers that cut a share."""
    whole, cut = facts.activation_bytes, facts.tensor
    return of_one(whole, cut.activation_bytes, cut.degree, tensor) if cut is not None else whole


def assumed(facts: Facts) -> LinkSpeed:
    """Of a link that nobody has measured."""
    return GIGABIT if facts.between_hosts else UNMEASURED


def speed_on(facts: Facts, layout: Layout, axis: str) -> LinkSpeed:
    """Of the links along ``axis``, or of all workers: as measured; else as is assumed within hosts, or between them."""
    if not facts.between_hosts:
        return facts.speed or UNMEASURED
    crosses = axis not in AXES or layout.crossing(axis, facts.hosts)
    return facts.speed or GIGABIT if crosses else UNMEASURED


def step_parts(
    facts: Facts, layout: Layout, sent: Mapping[str, Traffic], flow: Simulation | None, stepped: float
) -> dict[str, float]:
    """Seconds of a step by what they go into. ``sent``: by axis; ``flow``: of the pipeline, if there is one; ``stepped``: the part of what is
    trained that the busiest worker steps."""
    slower = max(1.0, on_host(facts, layout.world) / facts.cores)
    if flow is None:
        parts = {"computing": compute_s(facts, layout.tensor) * slower}
    else:
        parts = {"computing": max(flow.busy_s), "waiting for stages": flow.step_s - max(flow.busy_s)}
    parts["optimizer"] = facts.optimizer_s * stepped * slower
    if sent:
        speeds = {axis: speed_on(facts, layout, axis) for axis in sent}
        parts["exchanging"] = sum(
            on.exchanges * speeds[axis].latency_s + on.nbytes / speeds[axis].bytes_per_s for axis, on in sent.items()
        )
    return parts


def link_in_words(facts: Facts) -> str:
    speeds = facts.pipeline.speeds.values() if facts.pipeline else ()
    return slowest_in_words([facts.speed] if facts.speed else speeds, assumed(facts))


def slowest_in_words(measured: Collection[LinkSpeed], otherwise: LinkSpeed) -> str:
    rate = min((speed.bytes_per_s for speed in measured), default=otherwise.bytes_per_s)
    return f"link {format_rate(rate)} {'measured' if measured else 'assumed'}"


def advice(facts: Facts, step_s: float, fewer: list[Other], replicas: Other) -> str:
    """A note, where fewer workers are predicted to be quicker and memory does not forbid it; else empty. ``replicas``: as many workers, each with
    the whole model."""

    def fits(other: Other) -> bool:
        return not facts.memory_left or other.bytes_on_host <= facts.memory_left

    quicker = [other for other in fewer if other.step_s < step_s and fits(other)]
    if not quicker:
        return ""
    least = min(quicker, key=lambda other: other.step_s)
    room = (
        f" and fits into the memory of a host ({format_size(least.bytes_on_host)} of {format_size(facts.memory_left)})"
    )
    text = f"predicted {format_time(step_s)} a step; {least.who} takes {format_time(least.step_s)}{room * bool(facts.memory_left)}"
    text += f": for speed use {least.use}"
    if replicas.step_s < least.step_s and fits(replicas):
        text += f", or {replicas.use} ({format_time(replicas.step_s)})"
    return text
