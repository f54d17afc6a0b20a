"""Equal keys, equal numbers, everywhere and for good: a change here would break every saved cursor."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from weft.data.keys import key_int, keyed

PARTS = st.one_of(st.integers(), st.text(max_size=5))
KEYS = st.tuples(st.integers(), st.lists(PARTS, max_size=4).map(tuple))


@given(KEYS, KEYS)
def test_different_keys_are_different_streams(a: tuple[int, tuple], b: tuple[int, tuple]) -> None:
    same = a == b
    assert (key_int(a[0], *a[1]) == key_int(b[0], *b[1])) == same
    first, second = keyed(a[0], *a[1]).random(4), keyed(b[0], *b[1]).random(4)
    assert (first.tolist() == second.tolist()) == same


@pytest.mark.parametrize(
    ("a", "b"), [((0, "1"), (0, 1)), ((0, "a", "b"), (0, "ab")), ((0, 1, 2), (0, 12)), ((1,), (0, 1))]
)
def test_keys_that_look_alike_differ(a: tuple, b: tuple) -> None:
    assert key_int(*a) != key_int(*b)


@given(KEYS)
def test_key_int_has_63_bits(key: tuple[int, tuple]) -> None:
    assert 0 <= key_int(key[0], *key[1]) < 2**63


def test_numpy_integers_are_integers() -> None:
    assert key_int(np.int64(3), "step", np.uint8(7)) == key_int(3, "step", 7)


def test_a_float_is_no_key() -> None:
    with pytest.raises(TypeError):
        key_int(0, 0.5)


def test_pinned_across_versions() -> None:
    """Taken once; the cursor of an old checkpoint relies on them."""
    assert key_int(0, "step", 5, 1) == 525202346408777279
    assert keyed(7, "epoch", 2).permutation(8).tolist() == [0, 2, 7, 4, 3, 6, 5, 1]


def said_by_another_process(script: str) -> list[str]:
    env = {**os.environ, "PYTHONHASHSEED": "123", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", script]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, check=True).stdout.split()


def test_the_same_in_another_process_with_another_hash_seed() -> None:
    said = said_by_another_process("from weft.data.keys import key_int; print(key_int(0, 'step', 5, 1))")
    assert said == [str(key_int(0, "step", 5, 1))]


def test_data_needs_neither_torch_nor_pydantic() -> None:
    said = said_by_another_process(
        "import sys, weft.data.sampler; from weft.data.partition import parse; parse('shuffle'); "
        "print('torch' in sys.modules, 'pydantic' in sys.modules)"
    )
    assert said == ["False", "False"]
