"""From a Spec to the codec, and the feedback around it."""

from __future__ import annotations

from torch import Tensor

from weft.codecs.base import Codec, Segments
from weft.codecs.cast import Cast
from weft.codecs.feedback import ErrorFeedback, Momentum, MomentumCorrection, Plain
from weft.codecs.lowrank import PowerSgd
from weft.codecs.quantize import Int8, Qsgd, Sign
from weft.codecs.sparsify import RandomBlocks, RandomK, TopK
from weft.codecs.spec import CODECS, Spec
from weft.errors import UnknownName


def build_codec(spec: Spec, segments: Segments, seed: int = 0) -> Codec:
    a = spec.arguments
    match spec.name:
        case "bf16" | "fp16":
            return Cast(spec.name)
        case "int8":
            return Int8()
        case "qsgd":
            return Qsgd(a["levels"])
        case "sign":
            return Sign(segments)
        case "topk":
            return TopK(a["ratio"], full=a["values"] == "full")
        case "dgc":
            return TopK(a["ratio"])
        case "randomk":
            return RandomK(a["ratio"])
        case "blocks":
            return RandomBlocks(a["ratio"])
        case "powersgd":
            return PowerSgd(a["rank"], segments, seed)
    raise UnknownName.of("codec", spec.name, list(CODECS))


def build(
    spec: Spec, segments: Segments, like: Tensor, *, seed: int = 0, momentum: Momentum | None = None, warmup: int = 0
) -> Plain:
    """For the flat tensor ``like``, which holds ``segments``. ``momentum``: what is taken over from the task's optimizer, if it
    keeps one and the codec wants it; ``warmup``: exchanges until the codec leaves out as much as it was asked to."""
    codec = build_codec(spec, segments, seed)
    if not codec.biased:
        return Plain(codec)
    if momentum is not None and spec.takes_momentum:
        return MomentumCorrection(codec, momentum, warmup, segments, like)
    return ErrorFeedback(codec, segments, like, warmup)
