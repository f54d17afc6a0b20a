import pytest
from hypothesis import given
from hypothesis import strategies as st

from weft.report.human import format_bytes, format_count, format_members, format_metric, format_seconds, format_share


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (999.6, "1 kB"),
        (1000, "1 kB"),
        (84_700, "84.7 kB"),
        (25_400_000, "25.4 MB"),
        (999_700, "1 MB"),
        (1.5e9, "1.5 GB"),
    ],
)
def test_bytes(num_bytes: float, text: str) -> None:
    assert format_bytes(num_bytes) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (21e-6, "21 us"),
        (0.104, "104 ms"),
        (0.9996, "1 s"),
        (12.34, "12.3 s"),
        (59.97, "1 min 00 s"),
        (125.2, "2 min 05 s"),
        (3599.7, "1 h 00 min"),
        (3900, "1 h 05 min"),
        (183_600, "2 d 03 h"),
        (float("nan"), "?"),
        (float("inf"), "?"),
    ],
)
def test_seconds(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0"),
        (0.4321, "0.432"),
        (12, "12"),
        (5234.4, "5,234"),
        (99_999, "99,999"),
        (150_000, "150k"),
        (3_260_000, "3.26M"),
        (1.2e9, "1.2B"),
    ],
)
def test_counts(count: float, text: str) -> None:
    assert format_count(count) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(2.5, "2.500"), (0.97216, "0.9722"), (1234.4, "1234"), (float("nan"), "nan"), (float("inf"), "inf")],
)
def test_metrics(value: float, text: str) -> None:
    assert format_metric(value) == text


def test_share() -> None:
    assert format_share(0.724) == "72 %"


@pytest.mark.parametrize(
    ("members", "text"),
    [
        ([0], "worker 0"),
        ([0, 1], "workers 0-1"),
        ([7, 3, 1, 2, 5, 6], "workers 1-3, 5-7"),
        ([0, 2], "workers 0, 2"),
        ([-1], "worker"),
    ],
)
def test_members(members: list[int], text: str) -> None:
    assert format_members("worker", members) == text


@given(st.floats(1, 1e15))
def test_bytes_round_trip(num_bytes: float) -> None:
    number, unit = format_bytes(num_bytes).split()
    exponent = ["B", "kB", "MB", "GB", "TB", "PB"].index(unit)
    assert float(number) < 1000
    assert float(number) * 1000**exponent == pytest.approx(num_bytes, rel=0.006)
