"""The patterns that exist, by name. A pattern stands here once its laws pass."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from weft.errors import UnknownName
from weft.options import construct
from weft.patterns.allreduce import AllReduce
from weft.patterns.base import Pattern

PATTERNS: dict[str, type[Pattern]] = {p.name: p for p in (AllReduce,)}


def build(name: str, options: Mapping[str, Any]) -> Pattern:
    if name not in PATTERNS:
        raise UnknownName.of("pattern", name, PATTERNS)
    return construct(PATTERNS[name], options, f"pattern {name!r}")
