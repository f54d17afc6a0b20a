"""Parameters of which the default suite takes the first ones, and ``-m slow`` the rest."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def rest_slow(values: Iterable[Any], keep: int = 1) -> list[Any]:
    """A tuple gives several parameters."""
    slow = pytest.mark.slow
    return [
        v if k < keep else pytest.param(*(v if isinstance(v, tuple) else (v,)), marks=slow)
        for k, v in enumerate(values)
    ]
