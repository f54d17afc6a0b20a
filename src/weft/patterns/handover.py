"""From a checkpoint of one pattern to what another can go on from: the state that one process would have, as far as there is such.

Model, place in the data and optimizer are saved so by every pattern. What only some keep (``Pattern.keeps``) stays if the new one
keeps it alike; else what can be told of it in the optimizer's state goes there, and the rest is left behind.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from weft.config import FIRST_PART
from weft.patterns.base import HELD_BACK, INNER, OUTER
from weft.patterns.compression import STATE, with_momentum
from weft.patterns.optimizer_state import mean_state
from weft.patterns.periodic import MOMENTUM

Parts = Mapping[str, Mapping[str, Any]]


def without(parts: Parts, kinds: Collection[str]) -> Parts:
    """All parts of a checkpoint, without what of these ``kinds`` cannot be gone on with."""
    result = {name: dict(part) for name, part in parts.items()}
    first = result[FIRST_PART]
    exchange = first["exchange"] = dict(first["exchange"])
    if INNER in kinds:
        first["optimizer"] = mean_state([part["optimizer"] for part in result.values()])
        for name, part in result.items():
            if name != FIRST_PART:
                del part["optimizer"]
    if OUTER in kinds:
        del exchange[MOMENTUM]
    if HELD_BACK in kinds:
        saved, own = exchange.pop(STATE), [part.pop(STATE) for part in result.values()]
        first["optimizer"] = with_momentum(first["optimizer"], saved, own)
    return result
