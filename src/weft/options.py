"""Options of a task or pattern: the arguments of its class, checked against the annotations (pydantic at the edge).

One mechanism for the command line ("4", "none", "combine.f=2"), TOML and Python.
"""

from __future__ import annotations

import dataclasses
import inspect
import typing
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, TypeVar

from weft.errors import ConfigError, UnknownName, WeftError

T = TypeVar("T")


class Option(NamedTuple):
    name: str
    type: str
    default: str
    doc: str


def parse_assignments(texts: Iterable[str], what: str) -> dict[str, Any]:
    """["every=20", "combine.f=2"] -> {"every": "20", "combine": {"f": "2"}}. Values stay text; ``construct`` types them."""
    result: dict[str, Any] = {}
    for text in texts:
        key, eq, value = text.partition("=")
        if not eq or not key.strip():
            raise ConfigError(
                f"{what} option {text!r} is not of the form key=value: write for example {what} size=small"
            )
        *path, last = key.strip().split(".")
        place = result
        for part in path:
            inner = place.setdefault(part, {})
            if not isinstance(inner, dict):
                inner = place[part] = {"kind": inner}
            place = inner
        if last in place:
            raise ConfigError(f"{what} option {key!r} is given twice: {place[last]!r} and {value!r}")
        place[last] = value
    return result


def construct(cls: type[T], raw: Mapping[str, Any], what: str) -> T:
    """``cls(**raw)`` with every value checked and converted, or a ConfigError that names value, choices and cure."""
    import pydantic

    fields = _fields(cls)
    for key in raw:
        if key not in fields:
            hint = "" if fields else "It takes no options."
            raise UnknownName.of(f"option of {what}:", key, fields, hint)
    raw = {key: _nested(fields[key][0], value, f"{key} of {what}") for key, value in raw.items()}
    definitions: dict[str, Any] = {
        name: (annotation, ... if default is inspect.Parameter.empty else default)
        for name, (annotation, default) in fields.items()
    }
    config = pydantic.ConfigDict(extra="forbid", arbitrary_types_allowed=True, coerce_numbers_to_str=True)
    try:
        model = pydantic.create_model(cls.__name__, __config__=config, **definitions)
        checked = model.model_validate({k: _none(v, fields[k][0]) for k, v in raw.items()})
    except pydantic.ValidationError as error:
        raise ConfigError("; ".join(_explain(e, what) for e in error.errors())) from None
    values = {name: getattr(checked, name) for name in fields if name in raw}
    try:
        return cls(**values)
    except WeftError:
        raise
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{what}({', '.join(f'{k}={v!r}' for k, v in values.items())}): {error}") from error


def _nested(annotation: Any, value: Any, what: str) -> Any:
    """An option that is a dataclass: the name of one of its presets, or {"kind": name, what differs}."""
    if not (dataclasses.is_dataclass(annotation) and isinstance(annotation, type)):
        return value
    if not isinstance(value, str | Mapping):
        return value
    given = dict(value) if isinstance(value, Mapping) else {"kind": value}
    base: dict[str, Any] = {}
    if "kind" in given:
        presets: Mapping[str, Any] = getattr(annotation, "presets", {})
        kind = given.pop("kind")
        if kind not in presets:
            raise UnknownName.of(what, str(kind), presets)
        base = dataclasses.asdict(presets[kind])
    return construct(annotation, base | given, what)


def check_positive(name: str, value: float) -> None:
    if not value > 0:
        raise ConfigError(f"{name}={value} is not possible: give a positive number.")


def describe(cls: type) -> list[Option]:
    """The options of a class, with defaults. Docs come from a dataclass's ``field(metadata={"doc": ...})``, or, where
    ``__init__`` is written out, from ``Annotated[int, "..."]``."""
    docs = _docs(cls)
    return [
        Option(
            name,
            _type_name(annotation),
            "required" if default is inspect.Parameter.empty else str(default),
            docs.get(name, ""),
        )
        for name, (annotation, default) in _fields(cls).items()
    ]


def _docs(cls: type) -> dict[str, str]:
    docs = {f.name: f.metadata.get("doc", "") for f in dataclasses.fields(cls)} if dataclasses.is_dataclass(cls) else {}
    if not _generated(cls):
        hints = typing.get_type_hints(cls.__init__, include_extras=True)  # type: ignore[misc]
        for name, hint in hints.items():
            if own := [extra for extra in getattr(hint, "__metadata__", ()) if isinstance(extra, str)]:
                docs[name] = " ".join(own)
    return docs


def _fields(cls: type) -> dict[str, tuple[Any, Any]]:
    if cls.__init__ is object.__init__:  # type: ignore[misc]
        return {}
    hints = typing.get_type_hints(cls) if _generated(cls) else typing.get_type_hints(cls.__init__)  # type: ignore[misc]
    result: dict[str, tuple[Any, Any]] = {}
    for name, parameter in inspect.signature(cls).parameters.items():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue  # what cannot be named cannot be set
        default = parameter.default
        if default is not inspect.Parameter.empty and dataclasses.is_dataclass(cls):
            default = _dataclass_default(cls, name, default)
        annotation = hints.get(name, Any if default in (inspect.Parameter.empty, None) else type(default))
        result[name] = (annotation, default)
    return result


def _generated(cls: type) -> bool:
    """Its ``__init__`` is that of a dataclass: its own, or the nearest base's."""
    home = next(base for base in cls.__mro__ if "__init__" in vars(base))
    return "__dataclass_fields__" in vars(home)


def _dataclass_default(cls: type, name: str, default: Any) -> Any:
    for field in dataclasses.fields(cls):
        if field.name == name and field.default_factory is not dataclasses.MISSING:
            return field.default_factory()
    return default


def _none(value: Any, annotation: Any) -> Any:
    """On the command line None is written "none"."""
    if isinstance(value, str) and value.lower() == "none" and type(None) in typing.get_args(annotation):
        return None
    return value


def _type_name(annotation: Any) -> str:
    if typing.get_origin(annotation) is typing.Literal:
        return "|".join(str(a) for a in typing.get_args(annotation))
    if presets := getattr(annotation, "presets", None):
        return "|".join(presets)
    if isinstance(annotation, type):
        return annotation.__name__.lower() if dataclasses.is_dataclass(annotation) else annotation.__name__
    parts = typing.get_args(annotation)
    return "|".join("none" if p is type(None) else _type_name(p) for p in parts) if parts else str(annotation)


def _explain(error: Any, what: str) -> str:
    where = ".".join(str(p) for p in error["loc"])
    if error["type"] == "missing":
        return f"{what} needs the option {where!r}: give {where}=..."
    return f"option {where}={error['input']!r} of {what}: {error['msg'][0].lower()}{error['msg'][1:]}"
