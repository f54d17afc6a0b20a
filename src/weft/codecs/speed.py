"""How long a codec takes, with the feedback round it: its exchange, without a link."""

from __future__ import annotations

import functools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from weft.codecs.base import Gather, Keys, Segments
from weft.codecs.build import build
from weft.codecs.feedback import Momentum, Plain
from weft.codecs.spec import parse

MAX_ARRIVALS = 4  # more cost as much each
MAX_RUNS = 9


class CodecSpeed(NamedTuple):
    """Seconds. ``gathers``: a payload arrives from each rank, and takes ``decode_s``; else one sum comes."""

    encode_s: float
    decode_s: float
    gathers: bool


def sample_segments(shapes: Sequence[tuple[str, Sequence[int]]], max_numel: int) -> Segments:
    """The same matrices with fewer rows, if they hold more than ``max_numel`` values."""
    share = min(1.0, max_numel / max(1, sum(math.prod(shape) for _, shape in shapes)))
    return [
        (name, torch.Size((max(1, round(share * shape[0])), *shape[1:])) if shape else torch.Size(()))
        for name, shape in shapes
    ]


def measure(
    compress: str,
    segments: Segments,
    world: int,
    *,
    dtype: torch.dtype,
    device: torch.device,
    momentum: Momentum | None = None,
    budget_s: float = 0.05,
    agree: Callable[[float], float] = lambda seconds: seconds,
) -> CodecSpeed:
    """Medians of some runs on values whose few large ones are much larger than the rest, as gradients are.

    ``agree``: the longest of what all workers bring, called by each before a run: they encode at the same time, as often.
    """
    spec = parse(compress)
    given = _values(sum(shape.numel() for _, shape in segments), dtype, device)
    feedback = build(spec, segments, given, momentum=momentum if spec.takes_momentum else None)
    x, runs, begun = given.clone(), list[CodecSpeed](), time.perf_counter()
    while len(runs) < MAX_RUNS:
        x.copy_(given)
        if agree(time.perf_counter() - begun) > budget_s and len(runs) >= 2:
            break
        runs.append(_run(feedback, x, Keys(0, len(runs), 0), world))
    warm = runs[1:]  # the first meets fresh memory
    return CodecSpeed(
        statistics.median(run.encode_s for run in warm),
        statistics.median(run.decode_s for run in warm),
        warm[0].gathers,
    )


@functools.lru_cache(maxsize=1)
def _values(numel: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    x = torch.randn(numel, dtype=dtype, generator=torch.Generator().manual_seed(0))
    return (x * x * x).to(device)


def _run(feedback: Plain, x: torch.Tensor, keys: Keys, world: int) -> CodecSpeed:
    """Up to the last thing that leaves it encodes, then it decodes."""
    arrivals, gathers = 1, False
    exchanging = feedback.exchange(x, keys, world)
    begin = _now(x)
    asked = next(exchanging)
    while True:
        left = _now(x)
        answer = None
        if isinstance(asked, Gather):
            arrivals, gathers = min(world, MAX_ARRIVALS), True
            answer = [asked.payload] * arrivals
        try:
            asked = exchanging.send(answer)
        except StopIteration:
            return CodecSpeed(left - begin, (_now(x) - left) / arrivals, gathers)


def _now(x: torch.Tensor) -> float:
    if x.is_cuda:
        torch.cuda.synchronize(x.device)
    return time.perf_counter()
