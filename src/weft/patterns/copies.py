"""What copies of a part of a model send each other in fewer bytes: which codecs, of which tensors. No torch.

Each worker compresses its own part, beside those that it holds by itself. What several workers of a copy hold alike travels whole: beside other
neighbours a codec would choose, or draw, other numbers of it, and what should be one parameter would part.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import msgspec

from weft.codecs.spec import AUTO, NONE, parse, usages
from weft.errors import Incompatible
from weft.patterns.base import Facts, ParamFact
from weft.patterns.compression_plan import CompressionPlan
from weft.patterns.layout import Layout
from weft.patterns.pipelined import Chosen

COMPRESS: dict[str, Any] = {
    "doc": "fewer bytes for the gradients that copies exchange: none, " + ", ".join(usages(of_gradients=False))
}


def check_codec(compress: str, copies: str, number: int) -> None:
    """``copies``: the option that says how many there are."""
    if compress == NONE:
        return
    if compress == AUTO:
        raise Incompatible(
            "compress=auto asks what pays on the link of all workers, and here copies of each part exchange on links of their own: choose a "
            f"codec ({', '.join(usages(of_gradients=False))}), or leave it out."
        )
    if parse(compress).choice.needs_momentum:
        raise Incompatible(
            f"compress={compress} takes the momentum over from the optimizer, and here each worker's optimizer keeps that of its part: use "
            "topk:RATIO, which leaves it there."
        )
    if number == 1:
        raise Incompatible(
            f"compress={compress} is for what copies of the model exchange, and there is one: use {copies}=2 or more, or compress=none."
        )


def held_by_several(facts: Facts, layout: Layout, chosen: Chosen | None) -> set[str]:
    """Parameters that more than one worker of a copy of the model holds alike: tied over stages, or not cut by ``tensor``."""
    cut, tied = facts.tensor.parameters if facts.tensor else (), set[str]()
    if chosen is not None:
        assert facts.pipeline is not None
        tied = {p.name for p in facts.params if len(chosen.workers_of(facts.pipeline.uses[p.name])) > 1}
    return tied | {p.name for p in facts.params if layout.tensor > 1 and p.name not in cut}


def held_part(facts: Facts, layout: Layout, p: ParamFact) -> ParamFact:
    """What one worker holds of it; where parts are uneven, the largest."""
    shape = list(p.shape)
    if facts.tensor and layout.tensor > 1 and p.name in facts.tensor.parameters:
        by_row = facts.tensor.styles.get(p.name.rpartition(".")[0]) == "row"
        dim = 1 if by_row and len(shape) > 1 else 0
        shape[dim] = -(-shape[dim] // layout.tensor)
    if layout.sharded > 1 and shape:
        shape[0] = -(-shape[0] // layout.sharded)
    nbytes = p.nbytes * math.prod(shape) // max(1, math.prod(p.shape))
    return msgspec.structs.replace(p, shape=tuple(shape), nbytes=nbytes)


def compression(
    compress: str, facts: Facts, layout: Layout, chosen: Chosen | None, here: Sequence[ParamFact]
) -> CompressionPlan:
    """Of the parameters ``here`` that a worker compresses, of each its part."""
    several = held_by_several(facts, layout, chosen)
    parts = [held_part(facts, layout, p) for p in here if p.trainable and p.name not in several]
    stays = "each worker's keeps that of its part"
    return CompressionPlan(compress, msgspec.structs.replace(facts, params=parts, momentum=None, momentum_stays=stays))
