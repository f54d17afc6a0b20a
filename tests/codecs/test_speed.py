"""The stopwatch of a codec: what it runs is the exchange of a run, as often on every worker."""

from __future__ import annotations

import math

import pytest
import torch

from weft.codecs import speed
from weft.codecs.build import build_codec
from weft.codecs.feedback import Momentum
from weft.codecs.spec import parse

SEGMENTS = [("a", torch.Size((64, 32))), ("b", torch.Size((100, 30)))]
CPU = torch.device("cpu")


@pytest.mark.parametrize(
    "compress", ["bf16", "int8", "sign", "qsgd", "topk:0.01", "randomk:0.1", "blocks:0.1", "powersgd:2"]
)
@pytest.mark.parametrize("world", [2, 5])
def test_every_codec_is_timed(compress: str, world: int) -> None:
    agreed: list[float] = []

    def agree(seconds: float) -> float:
        agreed.append(seconds)
        return seconds + 1.0  # another worker is slower: it is all over as soon as it may be

    found = speed.measure(
        compress, SEGMENTS, world, dtype=torch.float32, device=CPU, momentum=Momentum(0.9), budget_s=0.01, agree=agree
    )
    assert found.encode_s > 0
    assert found.decode_s > 0
    assert found.gathers == (not build_codec(parse(compress), SEGMENTS).linear)
    assert len(agreed) == 3, "once before each of two runs, and once to find that the time is over"


def test_a_sample_keeps_the_layers() -> None:
    shapes = [("embedding", (50_000, 64)), ("w", (512, 512)), ("b", (512,))]
    assert speed.sample_segments(shapes, 10**9) == [(n, torch.Size(s)) for n, s in shapes]
    sample = speed.sample_segments(shapes, 100_000)
    assert [name for name, _ in sample] == ["embedding", "w", "b"]
    assert [shape[1:] for _, shape in sample] == [(64,), (512,), ()]
    assert sum(math.prod(shape) for _, shape in sample) == pytest.approx(100_000, rel=0.02)
