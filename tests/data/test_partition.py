"""Each partitioner against the definition it is named for, counted by hand."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from weft.data.partition import (
    ALL,
    ByKey,
    Contiguous,
    Dirichlet,
    Partitioner,
    Pathological,
    PowerLaw,
    Quantity,
    Random,
    Shuffle,
    Stratified,
    parse,
    partitioners,
    position_in_group,
)
from weft.errors import ConfigError, DataError, UnknownName, WeftError

SEEDS = st.integers(0, 2**32)


@st.composite
def problems(draw: st.DrawFn) -> tuple[np.ndarray, int, int]:
    """(labels (n,), shards, seed), also with few examples, one label, or a label for each example."""
    n = draw(st.integers(1, 80))
    labels = np.array(draw(st.lists(st.integers(-3, 8), min_size=n, max_size=n)))
    return labels, draw(st.integers(1, min(n, 12))), draw(SEEDS)


FIXED: list[Callable[[int, int], Partitioner]] = [  # (number of labels, shards) -> a partitioner that can cut them
    lambda _l, _s: Random(),
    lambda _l, _s: Stratified(),
    lambda _l, _s: Contiguous(),
    lambda _l, _s: Dirichlet(0.1),
    lambda _l, _s: Dirichlet(1e-300),
    lambda _l, _s: Dirichlet(1e9),
    lambda num_labels, shards: Pathological(-(-num_labels // shards)),
    lambda _l, _s: Pathological(20),
    lambda _l, _s: Quantity(0.1),
    lambda _l, _s: PowerLaw(1.5),
    lambda _l, _s: PowerLaw(1e300),
]


@given(problems(), st.sampled_from(FIXED))
def test_shards_are_disjoint_and_cover_everything(problem: tuple[np.ndarray, int, int], make: Callable) -> None:
    labels, shards, seed = problem
    partitioner = make(len(set(labels.tolist())), shards)
    parts = partitioner.split(len(labels), shards, seed, labels)
    assert len(parts) == shards
    assert all(part.dtype == np.int64 and len(part) >= 1 for part in parts)
    assert sorted(i for part in parts for i in part.tolist()) == list(range(len(labels)))


@given(problems())
def test_by_key_covers_and_keeps_keys_whole(problem: tuple[np.ndarray, int, int]) -> None:
    keys, shards, seed = problem
    shards = min(shards, len(set(keys.tolist())))
    parts = ByKey().split(len(keys), shards, seed, keys=keys)
    assert sorted(i for part in parts for i in part.tolist()) == list(range(len(keys)))
    shards_of_key = Counter(key for part in parts for key in set(keys[part].tolist()))
    assert set(shards_of_key.values()) == {1}
    assert max(map(len, parts)) - min(map(len, parts)) <= max(Counter(keys.tolist()).values())


@given(st.lists(st.integers(1, 9), min_size=3, max_size=6), SEEDS)
def test_by_key_is_within_four_thirds_of_the_best_balance(sizes: list[int], seed: int) -> None:
    keys = np.repeat(np.arange(len(sizes)), sizes)
    largest = max(map(len, ByKey().split(len(keys), 3, seed, keys=keys)))
    deals = itertools.product(range(3), repeat=len(sizes))
    best = min(max(sum(s for s, d in zip(sizes, deal) if d == shard) for shard in range(3)) for deal in deals)
    assert largest <= best * (4 / 3 - 1 / 9) + 1e-9  # Graham 1969: 4/3 - 1/(3 shards)


@given(problems())
def test_stratified_is_within_one_per_label_and_in_size(problem: tuple[np.ndarray, int, int]) -> None:
    labels, shards, seed = problem
    parts = Stratified().split(len(labels), shards, seed, labels)
    for label, count in Counter(labels.tolist()).items():
        assert {int((labels[p] == label).sum()) for p in parts} <= {count // shards, -(-count // shards)}
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@given(problems(), st.sampled_from([Random(), Contiguous(), PowerLaw(0)]))
def test_equal_shards_differ_by_one_at_most(problem: tuple[np.ndarray, int, int], partitioner: Partitioner) -> None:
    labels, shards, seed = problem
    parts = partitioner.split(len(labels), shards, seed)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@given(problems())
def test_contiguous_keeps_the_order_of_the_data(problem: tuple[np.ndarray, int, int]) -> None:
    labels, shards, seed = problem
    assert np.concatenate(Contiguous().split(len(labels), shards, seed)).tolist() == list(range(len(labels)))


@given(problems(), st.integers(1, 4))
def test_pathological_shards_hold_at_most_k_labels(problem: tuple[np.ndarray, int, int], k: int) -> None:
    labels, shards, seed = problem
    if shards * k < len(set(labels.tolist())):
        with pytest.raises(DataError, match="do not fit"):
            Pathological(k).split(len(labels), shards, seed, labels)
        return
    for part in Pathological(k).split(len(labels), shards, seed, labels):
        assert 1 <= len(set(labels[part].tolist())) <= k


def test_pathological_is_mcmahans_when_the_labels_are_even() -> None:
    """100 clients, 2 labels each, 10 even labels: pieces of equal size, so clients of equal size."""
    labels = np.arange(6000) % 10
    parts = Pathological(2).split(6000, 100, 0, labels)
    assert {len(part) for part in parts} == {60}
    assert sum(len(set(labels[part].tolist())) == 2 for part in parts) > 80


def test_pathological_cuts_the_largest_pieces_finest() -> None:
    labels = np.repeat([0, 1], [900, 100])
    sizes = [len(part) for part in Pathological(1).split(1000, 10, 0, labels)]
    assert set(sizes) == {100}


def skew(parts: list[np.ndarray], labels: np.ndarray) -> float:
    """Mean total variation distance between a shard's labels and all labels: 0 is none."""
    kinds = np.unique(labels)
    overall = np.array([(labels == k).mean() for k in kinds])
    return float(np.mean([np.abs([(labels[p] == k).mean() for k in kinds] - overall).sum() / 2 for p in parts]))


@given(SEEDS)
def test_dirichlet_skew_grows_as_alpha_shrinks(seed: int) -> None:
    labels = np.arange(4000) % 10
    skews = [skew(Dirichlet(alpha).split(4000, 8, seed, labels), labels) for alpha in (1e6, 10, 0.5, 0.01)]
    assert skews == sorted(skews)
    assert skews[0] < 0.02
    assert skews[-1] > 0.6


def test_dirichlet_shares_have_the_moments_of_the_distribution() -> None:
    """A label's share on one of S shards has mean 1/S and variance (S-1) / (S^2 (S alpha + 1))."""
    num_labels, each, shards, alpha = 400, 200, 4, 0.7
    labels = np.repeat(np.arange(num_labels), each)
    owner = Dirichlet(alpha).owners(len(labels), shards, 1, labels).reshape(num_labels, each)
    shares = (owner == 0).mean(axis=1)
    variance = (shards - 1) / (shards**2 * (shards * alpha + 1))
    assert abs(shares.mean() - 1 / shards) < 4 * np.sqrt(variance / num_labels)
    assert abs(shares.var() / variance - 1) < 0.3


def test_quantity_sizes_have_the_moments_of_the_distribution() -> None:
    shards, alpha, n = 5, 2.0, 1000
    sizes = np.array([len(Quantity(alpha).split(n, shards, seed)[2]) for seed in range(400)]) / n
    variance = (shards - 1) / (shards**2 * (shards * alpha + 1))
    assert abs(sizes.mean() - 1 / shards) < 4 * np.sqrt(variance / 400)
    assert abs(sizes.var() / variance - 1) < 0.3


@given(st.integers(1, 20), st.floats(0, 2), SEEDS)
def test_power_law_sizes_follow_the_formula(shards: int, exponent: float, seed: int) -> None:
    weights = np.array([k**-exponent for k in range(1, shards + 1)])
    want = 10_000 * weights / weights.sum()
    sizes = [len(part) for part in PowerLaw(exponent).split(10_000, shards, seed)]
    assert np.abs(np.array(sizes) - want).max() <= 1


@given(
    st.integers(1, 8), st.integers(1, 6), st.integers(0, 30), SEEDS, st.sampled_from([Dirichlet, Quantity, PowerLaw])
)
def test_min_size_is_kept(shards: int, min_size: int, spare: int, seed: int, kind: type) -> None:
    n = shards * min_size + spare
    parts = kind(0.05 if kind is not PowerLaw else 5.0, min_size=min_size).split(n, shards, seed, np.arange(n) % 3)
    assert min(map(len, parts)) >= min_size
    with pytest.raises(DataError, match=f"{n} examples .* {n // min_size + 1} shards"):
        kind(0.5, min_size=min_size).split(n, n // min_size + 1, seed, np.arange(n) % 3)


def test_topping_up_takes_from_the_largest_and_leaves_the_others() -> None:
    plain = [len(p) for p in PowerLaw(3.0).split(400, 8, 0)]
    topped = [len(p) for p in PowerLaw(3.0, min_size=12).split(400, 8, 0)]
    missing = sum(max(12 - size, 0) for size in plain)
    assert topped == [plain[0] - missing, plain[1], *(max(size, 12) for size in plain[2:])]


@pytest.mark.parametrize("name", sorted(set(ALL) - {"shuffle"}))
def test_the_seed_decides_and_nothing_else(name: str) -> None:
    labels = np.arange(200) % 10
    keys = np.arange(200) // 4
    np.random.seed(0)
    owners = [parse(name).owners(200, 5, seed, labels, keys).tolist() for seed in (3, 3, 4)]
    assert owners[0] == owners[1]
    assert (owners[0] == owners[2]) == (name == "contiguous")


@pytest.mark.parametrize("name", ["random", "stratified", "dirichlet", "pathological", "quantity", "power-law"])
def test_examples_are_drawn_from_all_over_the_data(name: str) -> None:
    """A shard must not hold neighbours only because the file held them together."""
    labels = np.repeat(np.arange(2), 500)
    part = max(parse(name).split(1000, 4, 0, labels), key=len)
    inner = np.diff(part)
    assert (inner > 1).sum() > len(part) / 20


def test_labels_may_be_words_and_lists() -> None:
    words = ["cat", "dog", "cat", "dog"]
    codes = np.array([0, 1, 0, 1])
    assert Stratified().owners(4, 2, 0, words).tolist() == Stratified().owners(4, 2, 0, codes).tolist()


@given(st.lists(st.integers(0, 5), min_size=1, max_size=40))
def test_position_in_group_counts_earlier_equals(group: list[int]) -> None:
    want = [group[:i].count(g) for i, g in enumerate(group)]
    assert position_in_group(np.array(group)).tolist() == want


# ------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("name", sorted(ALL))
def test_more_shards_than_examples_names_both(name: str) -> None:
    with pytest.raises(DataError, match=r"3 examples.* 5 shards.*at most 3"):
        parse(name).split(3, 5, 0, [0, 1, 2], [0, 1, 2])


def test_no_examples_and_no_shards() -> None:
    with pytest.raises(DataError, match="0 examples"):
        Random().split(0, 1, 0)
    with pytest.raises(ConfigError, match="0 shards"):
        Random().split(3, 0, 0)


def test_shuffle_has_no_shards() -> None:
    with pytest.raises(ConfigError, match="use 'random'"):
        Shuffle().split(10, 2, 0)


def test_fewer_keys_than_shards_names_both() -> None:
    with pytest.raises(DataError, match=r"2 distinct keys .* 3 shards"):
        ByKey().split(9, 3, 0, keys=[0, 0, 0, 0, 1, 1, 1, 1, 1])


@pytest.mark.parametrize("partitioner", [Stratified(), Dirichlet(), Pathological(), ByKey()])
def test_labels_or_keys_that_are_missing_or_misshapen(partitioner: Partitioner) -> None:
    what = "keys" if partitioner.needs_keys else "labels"
    with pytest.raises(DataError, match=f"needs {what}"):
        partitioner.split(4, 2, 0)
    with pytest.raises(DataError, match=r"shape \(3,\), but there are 4"):
        partitioner.split(4, 2, 0, **{what: [0, 1, 2]})
    with pytest.raises(DataError, match=r"shape \(4, 1\)"):
        partitioner.split(4, 2, 0, **{what: [[0], [1], [2], [3]]})


def test_pathological_that_cannot_fit_says_what_would() -> None:
    labels = np.arange(100) % 10
    with pytest.raises(DataError, match=r"10 labels do not fit on 3 shards .*labels=2.*: use labels=4 or 5 shards"):
        Pathological(2).split(100, 3, 0, labels)
    Pathological(4).split(100, 3, 0, labels)
    Pathological(2).split(100, 5, 0, labels)


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        (Dirichlet, {"alpha": 0}),
        (Dirichlet, {"alpha": -1.0}),
        (Dirichlet, {"alpha": float("nan")}),
        (Dirichlet, {"alpha": float("inf")}),
        (Dirichlet, {"alpha": 1e300}),
        (Dirichlet, {"alpha": "0.5"}),
        (Dirichlet, {"min_size": 0}),
        (Quantity, {"alpha": 0}),
        (Quantity, {"min_size": 1.5}),
        (PowerLaw, {"exponent": -0.1}),
        (PowerLaw, {"exponent": float("nan")}),
        (PowerLaw, {"exponent": float("inf")}),
        (PowerLaw, {"min_size": -1}),
        (Pathological, {"labels": 0}),
        (Pathological, {"labels": 1.5}),
    ],
)
def test_fields_are_checked_when_built(kind: type[Partitioner], fields: dict[str, object]) -> None:
    ((field, value),) = fields.items()
    with pytest.raises(ConfigError) as caught:
        kind(**fields)
    assert f"{field}={value!r}" in str(caught.value)
    assert f"{kind.name}:{field}=" in str(caught.value)  # an example of a good one


# -------------------------------------------------------------------------------------------------------------- by name


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("shuffle", Shuffle()),
        ("by-key", ByKey()),
        ("dirichlet", Dirichlet()),
        ("dirichlet:0.3", Dirichlet(alpha=0.3)),
        ("dirichlet:0.3,5", Dirichlet(alpha=0.3, min_size=5)),
        ("dirichlet:min_size=5", Dirichlet(min_size=5)),
        ("quantity:0.3,min_size=5", Quantity(alpha=0.3, min_size=5)),
        ("pathological:3", Pathological(labels=3)),
        ("power-law:exponent=2", PowerLaw(exponent=2.0)),
    ],
)
def test_parse(text: str, want: Partitioner) -> None:
    assert parse(text) == want
    assert parse(str(want)) == want


@pytest.mark.parametrize(
    ("text", "error", "says"),
    [
        ("dirichlt", UnknownName, "Did you mean 'dirichlet'"),
        ("", UnknownName, "Possible: by-key"),
        ("dirichlet:beta=1", UnknownName, "alpha, min_size"),
        ("dirichlet:x", ConfigError, "alpha='x'"),
        ("dirichlet:", ConfigError, "alpha=''"),
        ("dirichlet:-1", ConfigError, "alpha=-1.0"),
        ("dirichlet:1,2,3", ConfigError, "'3' is one value too many: 'dirichlet' takes only alpha, min_size"),
        ("random:3", ConfigError, "takes no options"),
        ("dirichlet:1,alpha=2", ConfigError, "'alpha' twice, '1' and '2'"),
        ("pathological:2.5", ConfigError, "labels='2.5'"),
    ],
)
def test_parse_refuses(text: str, error: type[WeftError], says: str) -> None:
    with pytest.raises(error) as caught:
        parse(text)
    assert says in str(caught.value)


def test_every_partitioner_is_listed_with_its_doc_and_options() -> None:
    kinds = {kind.name for kind in Partitioner.__subclasses__() if kind.__module__ == "weft.data.partition"}
    listed = partitioners()
    assert listed[0].name == "shuffle"
    assert {entry.name for entry in listed} == kinds
    assert all(entry.doc.endswith(".") or "(" in entry.doc for entry in listed)
    dirichlet = next(entry for entry in listed if entry.name == "dirichlet")
    assert [(o.name, o.default) for o in dirichlet.options] == [("alpha", "0.5"), ("min_size", "1")]
    assert all(option.doc for entry in listed for option in entry.options)
