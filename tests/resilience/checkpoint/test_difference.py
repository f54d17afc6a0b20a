"""``largest_difference`` against NumPy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from weft.errors import ConfigError
from weft.resilience.checkpoint import Difference, largest_difference

vectors = st.lists(st.floats(-1e6, 1e6), min_size=3, max_size=3)


@given(vectors, vectors, vectors, vectors)
def test_agrees_with_numpy(a: list[float], b: list[float], c: list[float], d: list[float]) -> None:
    x, y = np.array([a, b]), np.array([c, d])
    found = largest_difference(
        {"a": torch.tensor(a, dtype=torch.float64), "b": torch.tensor(b, dtype=torch.float64)},
        {"b": torch.tensor(d, dtype=torch.float64), "a": torch.tensor(c, dtype=torch.float64)},
    )
    gaps = np.abs(x - y)
    assert found.max_abs == gaps.max()
    if found.max_abs:
        assert found.name == "ab"[int(gaps.max(1).argmax())]
        if norm := np.linalg.norm(x):
            assert found.relative_to_norm == pytest.approx(gaps.max() / norm)


def test_float32_is_compared_in_float64() -> None:
    a, b = torch.tensor([16777216.0]), torch.tensor([16777217.0], dtype=torch.float64)
    assert largest_difference({"w": a}, {"w": b}).max_abs == 1.0


def test_equal_runs() -> None:
    same = {"w": torch.tensor([1.0, math.nan, math.inf]), "empty": torch.empty(0), "flag": torch.tensor(True)}
    assert largest_difference(same, {k: v.clone() for k, v in same.items()}) == Difference(0.0, "", 0.0)
    assert largest_difference({}, {}) == Difference(0.0, "", 0.0)


@pytest.mark.parametrize(("x", "y"), [(1.0, math.nan), (math.inf, 1.0), (math.inf, -math.inf), (math.nan, math.inf)])
def test_a_lone_nan_or_infinity_is_an_infinite_difference(x: float, y: float) -> None:
    a = {"fine": torch.ones(2), "bad": torch.tensor([0.0, x])}
    b = {"fine": torch.zeros(2), "bad": torch.tensor([0.0, y])}
    for pair in ((a, b), (b, a)):
        assert largest_difference(*pair) == Difference(math.inf, "bad", math.inf)


def test_a_first_run_of_zeros_differs_infinitely_relative_to_its_norm() -> None:
    zeros, ones = {"w": torch.zeros(2)}, {"w": torch.ones(2)}
    assert largest_difference(zeros, ones) == Difference(1.0, "w", math.inf)
    assert largest_difference(ones, zeros) == Difference(1.0, "w", 1 / math.sqrt(2))


def test_different_names_and_shapes_are_refused_by_name() -> None:
    a = {"w": torch.zeros(2, 3)}
    with pytest.raises(ConfigError, match=r"bias \(only in the second\)"):
        largest_difference(a, {**a, "bias": torch.zeros(1)})
    with pytest.raises(ConfigError, match=r"w has shape \(2, 3\) in the first run and \(3, 2\) in the second"):
        largest_difference(a, {"w": torch.zeros(3, 2)})
