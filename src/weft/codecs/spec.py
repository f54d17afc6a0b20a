"""From what a user writes (``topk:0.01``) to a codec's name and arguments. Without torch: the launcher reads it, too."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from weft.errors import ConfigError, UnknownName

NONE = "none"
AUTO = "auto"  # what pays on the link of the run: resolved before anything else reads it


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
    wants_momentum: bool = False  # it does better on momentum than on gradients (feedback.MomentumCorrection)
    needs_momentum: bool = False  # and is refused where none can be taken
    biased: bool = True  # as the codec's own: it needs error feedback
    narrow: bool = False  # gradients may be beyond what it can hold

    def usage(self, name: str) -> str:
        return name + "".join(
            f":{a.name.upper()}" if a.default is None else f"[:{a.name.upper()}]" for a in self.arguments
        )


def whole_number(text: str) -> int:
    """In ASCII digits, with nothing around or between them: int() takes more than one would write."""
    if not re.fullmatch(r"-?[0-9]+", text):
        raise ValueError(text)
    return int(text)


def number(text: str) -> float:
    if not re.fullmatch(r"-?([0-9]+\.?[0-9]*|\.[0-9]+)(e[+-]?[0-9]+)?", text, re.IGNORECASE):
        raise ValueError(text)
    return float(text)


RATIO = Argument("ratio", "more than 0 and at most 1", number, lambda r: 0 < r <= 1)
CODECS: dict[str, Choice] = {
    "bf16": Choice("bfloat16 on the wire: half the bytes", biased=False),
    "fp16": Choice(
        "float16 on the wire: half the bytes; overflows beyond 65504, loses values under 6e-8",
        biased=False,
        narrow=True,
    ),
    "int8": Choice("8 bits a value, scaled in blocks of 1024"),
    "qsgd": Choice(
        "rounded at random to LEVELS (127), without bias; 4 bits a value for 7 levels and fewer",
        (Argument("levels", "a whole number from 1 to 127", whole_number, lambda n: 1 <= n <= 127, 127),),
        biased=False,
    ),
    "sign": Choice("1 bit a value, times the mean magnitudes of its row and column"),
    "topk": Choice(
        "the RATIO of values that are largest, as scaled fp16 (or full) and an offset of 2 bytes",
        (RATIO, Argument("values", "fp16 or full", str, lambda v: v in ("fp16", "full"), "fp16")),
        wants_momentum=True,
    ),
    "dgc": Choice(
        "topk, but refused where no momentum can be taken before it (Deep Gradient Compression)",
        (RATIO,),
        wants_momentum=True,
        needs_momentum=True,
    ),
    "randomk": Choice("a RATIO of values at random, the same on all workers", (RATIO,), wants_momentum=True),
    "blocks": Choice("a RATIO of blocks of 256 values at random", (RATIO,), wants_momentum=True),
    "powersgd": Choice(
        "each matrix as a product of two of rank RANK, to which it falls in the first WARMUP (0.8) of a run",
        (
            Argument("rank", "a whole number of 1 or more", whole_number, lambda n: n >= 1),
            Argument("warmup", "0 to 1", number, lambda share: 0 <= share <= 1, 0.8),
        ),
    ),
}


@dataclass(frozen=True)
class Spec:
    """``name`` of CODECS and its arguments by name."""

    name: str
    arguments: dict[str, Any]

    @property
    def choice(self) -> Choice:
        return CODECS[self.name]

    def dropped(self, of: str) -> str:
        """What becomes of what it held back, where it cannot be gone on with; empty if that is nothing."""
        return f"what {self.name} held back of {of} is dropped" if self.choice.biased else ""

    @property
    def takes_momentum(self) -> bool:
        """It is better taken before this codec than after it; not where all values are sent, and none waits."""
        return self.choice.wants_momentum and self.arguments.get("ratio", 0) != 1

    def warmup(self, steps: int) -> int:
        """Exchanges until it leaves out as much as it was asked to, in a run of so many."""
        return int(steps * self.arguments.get("warmup", WARMUP))

    @property
    def asks_for_warmup(self) -> bool:
        """Of another length than the codec's own, and not of none."""
        own = {a.name: a.default for a in self.choice.arguments}
        return self.arguments.get("warmup", 0) not in (0, own.get("warmup"))

    def __str__(self) -> str:
        return ":".join([self.name, *(v if isinstance(v, str) else f"{v:g}" for v in self.arguments.values())])


#: Norms, biases and other small tensors are a thousandth of the bytes and much of the training: they travel whole.
MIN_NUMEL = 1024


def is_compressed(shape: Sequence[int]) -> bool:
    return len(shape) >= 2 and math.prod(shape) >= MIN_NUMEL


#: The share of a run's exchanges in which a codec leaves out less (Codec.warm_up), if it has no argument for it.
WARMUP = 0.2


def warmed(whole: float, final: float, done: float) -> float:
    """``final / done`` as ``done`` goes from 0 to 1, and ``whole`` at most: all at first, half too much at two thirds.

    What waits costs most in the first steps, when the gradient still turns from one to the next and few of them count for much;
    the whole of a warm-up costs 1 + log(whole / final) of its exchanges at ``final``.
    """
    return max(final, min(whole, final / done)) if 0 < done < 1 else (whole if done <= 0 else final)


def usages(of_gradients: bool = True) -> list[str]:
    """Of all codecs; of deltas, only those that go without a momentum."""
    return [choice.usage(name) for name, choice in CODECS.items() if of_gradients or not choice.needs_momentum]


def parse(text: str) -> Spec:
    """Raises UnknownName, or ConfigError for wrong arguments."""
    name, *given = text.split(":")
    if name in (NONE, AUTO) and given:
        raise ConfigError(f"compress={text!r} has too many arguments: write {name}.")
    if name not in CODECS:
        raise UnknownName.of("codec", name, (NONE, AUTO, *CODECS), shown=(NONE, AUTO, *usages()))
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
