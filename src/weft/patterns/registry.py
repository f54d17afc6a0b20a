"""The patterns that exist, by name. A pattern stands here once its laws pass."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from weft.errors import UnknownName
from weft.options import construct
from weft.patterns.allreduce import AllReduce
from weft.patterns.base import Pattern
from weft.patterns.local_sgd import LocalSGD
from weft.patterns.mesh import Mesh
from weft.patterns.parameter_server import ParameterServer
from weft.patterns.pipeline import Pipeline
from weft.patterns.sharded import Sharded
from weft.patterns.tensor import Tensor

PATTERNS: dict[str, type[Pattern]] = {
    p.name: p for p in (AllReduce, LocalSGD, Sharded, Tensor, Pipeline, Mesh, ParameterServer)
}


def build(name: str, options: Mapping[str, Any]) -> Pattern:
    """``options`` as ``-o`` gives them: an option that is a pattern itself is its name, or {"kind": name, its options}."""
    if name not in PATTERNS:
        raise UnknownName.of("pattern", name, PATTERNS)
    cls = PATTERNS[name]
    inner = {o: _nested(cls, o, options[o]) for o in cls.nests if o in options}
    return construct(cls, {**options, **inner}, f"pattern {name!r}")


def _nested(cls: type[Pattern], option: str, value: Any) -> Pattern:
    if isinstance(value, Pattern):
        return value
    default = next(f.default for f in dataclasses.fields(cls) if f.name == option)
    rest = dict(value) if isinstance(value, Mapping) else {"kind": value}
    return build(rest.pop("kind", default.name), rest)


def options_of(pattern: Pattern) -> dict[str, Any]:
    """Plain data, from which ``build`` makes the same pattern."""
    return {f.name: _plain(getattr(pattern, f.name)) for f in dataclasses.fields(pattern)}


def _plain(value: Any) -> Any:
    if isinstance(value, Pattern):
        return {"kind": value.name} | options_of(value)
    return dataclasses.asdict(value) if dataclasses.is_dataclass(value) and not isinstance(value, type) else value
