"""From what a user writes (``topk:0.01``) to a codec's name and arguments. Without torch: the launcher reads it, too."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from weft.errors import ConfigError, UnknownName

NONE = "none"


@dataclass(frozen=True)
class Argument:
    name: str
    wanted: str
    read: Callable[[str], Any]
    fits: Callable[[Any], bool]
    default: Any = None  # None: must be given


@dataclass(frozen=True)
class Choice:
    doc: str
    arguments: tuple[Argument, ...] = ()

    def usage(self, name: str) -> str:
        return name + "".join(
            f":{a.name.upper()}" if a.default is None else f"[:{a.name.upper()}]" for a in self.arguments
        )


RATIO = Argument("ratio", "more than 0 and at most 1", float, lambda r: 0 < r <= 1)
CODECS: dict[str, Choice] = {
    "bf16": Choice("bfloat16 on the wire: half the bytes"),
    "fp16": Choice("float16 on the wire: half the bytes; overflows beyond 65504"),
    "int8": Choice("8 bits a value, scaled in blocks of 1024 [error feedback]"),
    "qsgd": Choice(
        "rounded at random to LEVELS (127), without bias; 4 bits a value for 7 levels and fewer",
        (Argument("levels", "1 to 127", int, lambda n: 1 <= n <= 127, 127),),
    ),
    "sign": Choice("1 bit a value, times the block's mean magnitude [error feedback]"),
    "topk": Choice(
        "the RATIO of values that are largest, as fp16 (or full) and an offset of 2 bytes [error feedback]",
        (RATIO, Argument("values", "fp16 or full", str, lambda v: v in ("fp16", "full"), "fp16")),
    ),
    "randomk": Choice("a RATIO of values at random, the same on all workers [error feedback]", (RATIO,)),
    "blocks": Choice("a RATIO of blocks of 1024 values at random [error feedback]", (RATIO,)),
    "powersgd": Choice(
        "each matrix as a product of two of rank RANK [error feedback]",
        (Argument("rank", "1 or more", int, lambda n: n >= 1),),
    ),
    "dgc": Choice(
        "Deep Gradient Compression: topk with the momentum of the task's SGD taken before the choice, and a ratio that falls "
        "to RATIO over WARMUP (100) steps",
        (RATIO, Argument("warmup", "0 or more", int, lambda n: n >= 0, 100)),
    ),
}


@dataclass(frozen=True)
class Spec:
    """``name`` of CODECS and its arguments by name."""

    name: str
    arguments: dict[str, Any]

    def __str__(self) -> str:
        return ":".join([self.name, *(v if isinstance(v, str) else f"{v:g}" for v in self.arguments.values())])


def usages(but: tuple[str, ...] = ()) -> list[str]:
    return [choice.usage(name) for name, choice in CODECS.items() if name not in but]


def parse(text: str) -> Spec:
    """Raises UnknownName, or ConfigError for wrong arguments."""
    name, *given = text.split(":")
    if name not in CODECS:
        raise UnknownName.of("codec", name, list(CODECS))
    choice = CODECS[name]
    if len(given) > len(choice.arguments):
        raise ConfigError(f"compress={text!r} has too many arguments: write {choice.usage(name)}.")
    arguments = {}
    for k, argument in enumerate(choice.arguments):
        if k >= len(given):
            if argument.default is None:
                raise ConfigError(f"compress={text!r} needs its {argument.name}: write {choice.usage(name)}.")
            arguments[argument.name] = argument.default
            continue
        try:
            value = argument.read(given[k])
        except ValueError:
            value = math.nan
        if not argument.fits(value):
            raise ConfigError(
                f"compress={text!r}: {argument.name} {given[k]!r} is not possible, give {argument.wanted}."
            )
        arguments[argument.name] = value
    return Spec(name, arguments)
