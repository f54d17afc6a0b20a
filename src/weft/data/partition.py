"""Who owns which example: pure functions (n, shards, seed, labels or keys) -> one owner per example.

Shards are read off that array of owners, so they are disjoint and cover 0..n-1 by construction. Every shard holds at
least one example. O(n log n) at most, but for a Python loop over the distinct labels or keys. Which skews are worth
having: Li et al. 2022, "Federated Learning on Non-IID Data Silos".
"""

from __future__ import annotations

import dataclasses
import heapq
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, ClassVar, NamedTuple

import numpy as np
import numpy.typing as npt

from weft.data.keys import keyed
from weft.errors import ConfigError, DataError, UnknownName
from weft.options import Option, construct, describe

Indices = npt.NDArray[np.int64]

MAX_ALPHA = 1e9  # far past "even"; near the largest float the draw itself overflows


@dataclass(frozen=True)
class Partitioner(ABC):
    """A rule that gives each example one owner. Its fields are its options, checked when it is built."""

    name: ClassVar[str]
    needs_labels: ClassVar[bool] = False
    needs_keys: ClassVar[bool] = False
    #: False: no example has an owner for longer than an epoch, and ``split`` is refused.
    fixed: ClassVar[bool] = True

    def split(
        self, n: int, shards: int, seed: int, labels: npt.ArrayLike | None = None, keys: npt.ArrayLike | None = None
    ) -> list[Indices]:
        """The examples of each shard, ascending; arguments and errors as for ``owners``."""
        owner = self.owners(n, shards, seed, labels, keys)
        return _members(np.arange(n), owner)

    def owners(
        self, n: int, shards: int, seed: int, labels: npt.ArrayLike | None = None, keys: npt.ArrayLike | None = None
    ) -> Indices:
        """The shard of each example, (n,). ``labels`` and ``keys``: one per example, numbers or strings.

        Raises DataError when the data cannot be cut so, ConfigError when the rule knows no owners (``fixed``).
        """
        check_shards(n, shards)
        groups = np.zeros(n, np.int64)
        if self.needs_labels:
            groups = self._codes(n, labels, "labels")
        if self.needs_keys:
            groups = self._codes(n, keys, "keys")
        return self._owners(groups, shards, keyed(seed, "partition"))

    @abstractmethod
    def _owners(self, groups: Indices, shards: int, rng: np.random.Generator) -> Indices:
        """``groups`` (n,): each example's label or key as a code 0..K-1, all 0 if neither is needed."""

    def _codes(self, n: int, values: npt.ArrayLike | None, what: str) -> Indices:
        if values is None:
            raise DataError(f"partition {self.name!r} needs {what}, one per example: give {what}=..., or use 'random'.")
        array = np.asarray(values)
        if array.shape != (n,):
            raise DataError(
                f"partition {self.name!r}: {what} have shape {array.shape}, but there are {n} examples: "
                f"give one of the {what} per example, shape ({n},)."
            )
        return np.unique(array, return_inverse=True)[1].astype(np.int64, copy=False)

    def _require(self, field: str, holds: bool, need: str) -> None:
        if not holds:
            value, default = getattr(self, field), type(self).__dataclass_fields__[field].default
            raise ConfigError(
                f"partition {self.name!r}: {field}={value!r} is not {need}. "
                f"Give one, for example {self.name}:{field}={default}."
            )

    def __str__(self) -> str:
        """The form that ``parse`` reads: "dirichlet:alpha=0.3,min_size=1"."""
        options = ",".join(f"{field.name}={getattr(self, field.name)}" for field in dataclasses.fields(self))
        return f"{self.name}:{options}" if options else self.name


@dataclass(frozen=True)
class Shuffle(Partitioner):
    """No fixed owners: all examples are dealt anew every epoch, equally to all."""

    name = "shuffle"
    fixed = False

    def _owners(self, groups: Indices, shards: int, rng: np.random.Generator) -> Indices:
        raise ConfigError(
            "partition 'shuffle' deals the examples anew every epoch and has no shards: use 'random' where each "
            "worker or client must keep its own examples."
        )


@dataclass(frozen=True)
class Random(Partitioner):
    """Equal shards of examples drawn at random (IID)."""

    name = "random"

    def _owners(self, groups: Indices, shards: int, rng: np.random.Generator) -> Indices:
        return rng.permutation(_equal_cut(len(groups), shards))


@dataclass(frozen=True)
class Stratified(Partitioner):
    """Equal shards, each with its part of every label; sizes and counts per label differ by at most one."""

    name = "stratified"
    needs_labels = True

    def _owners(self, groups: Indices, shards: int, rng: np.random.Generator) -> Indices:
        owner = np.empty_like(groups)
        owner[np.concatenate(_shuffled_members(groups, rng))] = np.arange(len(groups)) % shards  # dealt like cards
        return owner


@dataclass(frozen=True)
class Contiguous(Partitioner):
    """Equal shards of neighbouring examples, in the order of the data set."""

    name = "contiguous"

    def _owners(self, groups: Indices, shards: int, rng: np.random.Generator) -> Indices:
        return _equal_cut(len(groups), shards)


@dataclass(frozen=True)
class ByKey(Partitioner):
    """All examples with one key (a user, a hospital) on one shard, sizes balanced greedily.

    Keys go to the lightest shard, largest key first: the largest shard is at most 4/3 of the best possible
    (Graham 1969).
    """

    name = "by-key"
    needs_keys = True

    def _owners(self, groups: Indices, shards: int, rng: np.random.Generator) -> Indices:
        sizes = np.bincount(groups)
        if len(sizes) < shards:
            raise DataError(
                f"{len(sizes)} distinct keys cannot be dealt to {shards} shards, for a key stays on one shard: "
                f"use at most {len(sizes)} shards, or finer keys."
            )
        loads = [(0, shard) for shard in range(shards)]  # a heap
        shard_of_key = np.empty(len(sizes), np.int64)
        keys = rng.permutation(len(sizes))  # keys of one size in random order
        for key in keys[np.argsort(-sizes[keys], kind="stable")].tolist():
            load, shard = loads[0]
            shard_of_key[key] = shard
            heapq.heapreplace(loads, (load + int(sizes[key]), shard))
        return shard_of_key[groups]


@dataclass(frozen=True)
class Dirichlet(Partitioner):
    """Label skew: each label is cut over the shards in proportions drawn from Dirichlet(alpha).

    Small alpha: a label sits on few shards; large alpha: as stratified. (Yurochkin et al. 2019. Hsu et al. 2019 draw
    the labels of each client instead, with replacement, which does not use every example exactly once.) Where others
    draw again until no shard is too small, which need not end, shards under ``min_size`` here take random examples
    from the largest.
    """

    name = "dirichlet"
    needs_labels = True
    alpha: float = dataclasses.field(default=0.5, metadata={"doc": "concentration: smaller is more skewed"})
    min_size: int = dataclasses.field(default=1, metadata={"doc": "fewest examples on a shard"})

    def __post_init__(self) -> None:
        self._require("alpha", _is_number(self.alpha) and 0 < self.alpha <= MAX_ALPHA, f"in (0, {MAX_ALPHA:g}]")
        self._require("min_size", _is_count(self.min_size), "a whole number >= 1")

    def _owners(self, groups: Indices, shards: int, rng: np.random.Generator) -> Indices:
        check_shards(len(groups), shards, self.min_size)
        owner = np.empty_like(groups)
        for members in _shuffled_members(groups, rng):
            owner[members] = _proportional_cut(len(members), rng.dirichlet(np.full(shards, float(self.alpha))))
        return _top_up(owner, shards, self.min_size, rng)


@dataclass(frozen=True)
class Quantity(Partitioner):
    """Quantity skew: random examples, shard sizes in proportions drawn from Dirichlet(alpha) (Li et al. 2022).

    Shards under ``min_size`` take random examples from the largest.
    """

    name = "quantity"
    alpha: float = dataclasses.field(default=0.5, metadata={"doc": "concentration: smaller is more skewed"})
    min_size: int = dataclasses.field(default=1, metadata={"doc": "fewest examples on a shard"})

    def __post_init__(self) -> None:
        self._require("alpha", _is_number(self.alpha) and 0 < self.alpha <= MAX_ALPHA, f"in (0, {MAX_ALPHA:g}]")
        self._require("min_size", _is_count(self.min_size), "a whole number >= 1")

    def _owners(self, groups: Indices, shards: int, rng: np.random.Generator) -> Indices:
        # Label skew where all examples have one label.
        return Dirichlet(self.alpha, self.min_size)._owners(groups, shards, rng)


@dataclass(frozen=True)
class PowerLaw(Partitioner):
    """Quantity skew: random examples, shard k (from 1) in proportion to k ** -exponent; the first is the largest.

    Shards under ``min_size`` take random examples from the largest.
    """

    name = "power-law"
    exponent: float = dataclasses.field(default=1.0, metadata={"doc": "0 is equal sizes, 1 is Zipf's law"})
    min_size: int = dataclasses.field(default=1, metadata={"doc": "fewest examples on a shard"})

    def __post_init__(self) -> None:
        self._require("exponent", _is_number(self.exponent) and self.exponent >= 0, "a number >= 0")
        self._require("min_size", _is_count(self.min_size), "a whole number >= 1")

    def _owners(self, groups: Indices, shards: int, rng: np.random.Generator) -> Indices:
        check_shards(len(groups), shards, self.min_size)
        weights = np.arange(1.0, shards + 1) ** -float(self.exponent)
        owner = rng.permutation(_proportional_cut(len(groups), weights / weights.sum()))
        return _top_up(owner, shards, self.min_size, rng)


@dataclass(frozen=True)
class Pathological(Partitioner):
    """Label skew: at most ``labels`` distinct labels on any shard (McMahan et al. 2017, "pathological non-IID").

    The examples, sorted by label, are cut into shards x labels pieces, and each shard gets ``labels`` of them at random
    (two may be of one label). McMahan's pieces are equal and may straddle two labels; ours never do, so the bound is
    exact and sizes differ: labels are cut finest where pieces would be largest.
    """

    name = "pathological"
    needs_labels = True
    labels: int = dataclasses.field(default=2, metadata={"doc": "most distinct labels on a shard"})

    def __post_init__(self) -> None:
        self._require("labels", _is_count(self.labels), "a whole number >= 1")

    def _owners(self, groups: Indices, shards: int, rng: np.random.Generator) -> Indices:
        sizes = np.bincount(groups)
        if shards * self.labels < len(sizes):
            raise DataError(
                f"{len(sizes)} labels do not fit on {shards} shards with at most labels={self.labels} each: "
                f"use labels={-(-len(sizes) // shards)} or {-(-len(sizes) // self.labels)} shards."
            )
        num_pieces = np.ones_like(sizes)  # of each label
        for _ in range(min(shards * self.labels, len(groups)) - len(sizes)):
            num_pieces[np.argmax(sizes / num_pieces)] += 1
        shard_of_piece = rng.permutation(num_pieces.sum()) % shards
        first = np.cumsum(num_pieces) - num_pieces
        owner = np.empty_like(groups)
        for label, members in enumerate(_shuffled_members(groups, rng)):
            owner[members] = shard_of_piece[first[label] + _equal_cut(len(members), num_pieces[label])]
        return owner


ALL: dict[str, type[Partitioner]] = {
    kind.name: kind
    for kind in (Shuffle, Random, Stratified, Contiguous, ByKey, Dirichlet, Pathological, Quantity, PowerLaw)
}


class Listed(NamedTuple):
    name: str
    doc: str
    options: list[Option]


def partitioners() -> list[Listed]:
    """Every partitioner that ``parse`` knows, the default first: its name, one line of what it does, its options."""
    return [Listed(name, (kind.__doc__ or "").partition("\n")[0], describe(kind)) for name, kind in ALL.items()]


def parse(text: str) -> Partitioner:
    """ "random", "dirichlet:0.3" or "dirichlet:alpha=0.3,min_size=5" -> Partitioner; ``str`` is the inverse.

    Raises UnknownName for a name or option that does not exist, ConfigError for a value that cannot be.
    """
    name, colon, rest = text.partition(":")
    if name not in ALL:
        raise UnknownName.of("partition", name, ALL)
    kind = ALL[name]
    if not colon:
        return kind()  # without construct, which imports pydantic
    fields = [field.name for field in dataclasses.fields(kind)]
    given: dict[str, Any] = {}
    for place, item in enumerate(rest.split(",")):
        key, equals, value = item.partition("=")
        if not equals:
            if place >= len(fields):
                takes = f"takes only {', '.join(fields)}" if fields else "takes no options"
                raise ConfigError(f"partition {text!r}: {item!r} is one value too many: {name!r} {takes}.")
            key, value = fields[place], item
        if key in given:
            raise ConfigError(
                f"partition {text!r} gives {key!r} twice, {given[key]!r} and {value!r}: keep one of them."
            )
        given[key] = value
    return construct(kind, given, f"partition {name!r}")


def check_shards(n: int, shards: int, min_size: int = 1) -> None:
    """Every shard must be able to hold ``min_size`` examples."""
    if shards < 1:
        raise ConfigError(f"{shards} shards: there must be at least 1.")
    if n < shards * min_size:
        each = f" of at least {min_size}" if min_size > 1 else ""
        most = n // min_size
        cure = f"use at most {most} shards, or more data" if most else "give more data"
        raise DataError(f"{n} examples cannot be cut into {shards} shards{each}: {cure}.")


def position_in_group(group: Indices) -> Indices:
    """How many of the earlier entries are of the same group, (n,): [5, 5, 2, 5] -> [0, 1, 0, 2]."""
    order = np.argsort(group, kind="stable")
    counts = np.bincount(group)
    position = np.empty_like(group)
    position[order] = np.arange(len(group)) - np.repeat(np.cumsum(counts) - counts, counts)
    return position


def _members(items: Indices, group: Indices) -> list[Indices]:
    """``items`` by their group 0, 1, ..., order kept; none of the groups is empty."""
    return np.split(items[np.argsort(group, kind="stable")], np.cumsum(np.bincount(group))[:-1])


def _shuffled_members(groups: Indices, rng: np.random.Generator) -> list[Indices]:
    order = rng.permutation(len(groups))
    return _members(order, groups[order])


def _equal_cut(n: int, parts: int) -> Indices:
    """0..parts-1, ascending, (n,), each n/parts times rounded up or down."""
    return np.arange(n) * parts // n


def _proportional_cut(n: int, shares: npt.NDArray[np.float64]) -> Indices:
    """0..len(shares)-1, ascending, (n,): each n * share times, rounded so that they add up to n."""
    cuts = np.rint(np.cumsum(shares[:-1]) * n)
    return np.searchsorted(cuts, np.arange(n), side="right")


def _top_up(owner: Indices, shards: int, min_size: int, rng: np.random.Generator) -> Indices:
    """Move random examples, one at a time from what is then the largest shard, until none has under ``min_size``."""
    missing = np.maximum(min_size - np.bincount(owner, minlength=shards), 0)
    # All at once: number each shard's examples at random from 0; the highest numbers are those that would be taken.
    order = rng.permutation(len(owner))
    height = position_in_group(owner[order])
    taken = order[np.argsort(-height, kind="stable")[: missing.sum()]]
    owner[taken] = np.repeat(np.arange(shards), missing)
    return owner


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and math.isfinite(value)


def _is_count(value: object) -> bool:
    return isinstance(value, Integral) and int(value) >= 1
