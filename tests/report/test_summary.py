"""Summary against sums done by hand."""

import math
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from weft.events import Event
from weft.report.summary import Curve, Summary


def ticks(member: int, first: int, losses: list[float | None], *, time: float = 0.0, **values: Any) -> Event:
    last = first + len(losses) - 1
    times = {"compute_s": 0.0, "exchange_s": 0.0, "wait_s": 0.0, "data_s": 0.0}
    values = {"first": first, "last": last, "loss": losses, "examples": 0, "bytes_sent": 0} | times | values
    return Event(kind="ticks", member=member, step=last, time=time, values=values)


def summed(*events: Event) -> Summary:
    summary = Summary()
    for event in events:
        summary.add(event)
    return summary


def test_shares_bytes_and_steps_of_each_member() -> None:
    s = summed(
        ticks(0, 1, [1.0, 1.0], compute_s=3.0, exchange_s=0.5, wait_s=0.25, data_s=0.25, bytes_sent=100),
        ticks(1, 1, [1.0], compute_s=1.0, wait_s=1.0, bytes_sent=40),
        ticks(0, 3, [1.0, 1.0], compute_s=3.0, exchange_s=0.5, wait_s=0.25, data_s=0.25, bytes_sent=300),
    )
    zero, one = s.members["worker", 0], s.members["worker", 1]
    assert zero.shares == {"compute": 0.75, "communication": 0.125, "waiting": 0.0625, "data": 0.0625}
    assert one.shares == {"compute": 0.5, "communication": 0.0, "waiting": 0.5, "data": 0.0}
    assert s.shares == {"compute": 0.7, "communication": 0.1, "waiting": 0.15, "data": 0.05}
    assert (zero.steps, zero.bytes_sent, zero.bytes_per_step) == (4, 400, 100.0)
    assert (one.steps, one.bytes_sent, one.bytes_per_step) == (1, 40, 40.0)
    assert s.bytes_sent == 440
    assert s.step == 4


def test_members_are_told_apart_by_role() -> None:
    server = Event(kind="ticks", role="server", member=0, step=1, values={"first": 1, "last": 1, "bytes_sent": 7})
    s = summed(ticks(0, 1, [1.0], bytes_sent=5), server)
    assert {key: m.bytes_sent for key, m in s.members.items()} == {("worker", 0): 5, ("server", 0): 7}


def test_each_step_counts_once_in_the_curve_however_many_ranks_tell_it() -> None:
    s = summed(
        ticks(0, 1, [5.0, 4.0]),
        ticks(1, 1, [5.0, 4.0, 3.0]),
        ticks(0, 3, [3.0, 2.0]),
        ticks(1, 4, [2.0]),
    )
    assert s.curve.points == [5.0, 4.0, 3.0, 2.0]


def test_a_rank_that_runs_ahead_without_losses_hides_none() -> None:
    s = summed(ticks(1, 1, [0.0, 0.0, 0.0], loss=[]), ticks(0, 1, [5.0, 4.0]), ticks(0, 3, [3.0]))
    assert s.step == 3
    assert s.curve.points == [5.0, 4.0, 3.0]


def test_smoothed_loss_is_the_bias_corrected_exponential_mean() -> None:
    s = summed(ticks(0, 1, [4.0, 2.0]))
    weights = [0.98 * 0.02, 0.02]
    assert s.loss == pytest.approx((4.0 * weights[0] + 2.0 * weights[1]) / sum(weights), rel=1e-12)


@pytest.mark.parametrize("bad", [None, math.nan, math.inf])
def test_a_loss_that_is_not_finite_shows_at_once_and_is_left_out_of_the_mean(bad: float | None) -> None:
    s = summed(ticks(0, 1, [4.0, bad]))
    assert not math.isfinite(s.loss)
    s.add(ticks(0, 3, [4.0]))
    assert s.loss == pytest.approx(4.0, rel=1e-12)


def test_examples_per_s_is_the_median_of_the_ticks() -> None:
    s = summed(
        ticks(0, 1, [1.0], examples=10, compute_s=1.0),  # 10 a second
        ticks(0, 2, [1.0], examples=30, compute_s=0.5, wait_s=0.5),  # 30
        ticks(0, 3, [1.0], examples=10, compute_s=50.0, exchange_s=50.0),  # 0.1: an outlier
    )
    assert s.examples_per_s == 10.0


def test_steps_per_s_goes_by_the_clock() -> None:
    s = summed(ticks(0, 1, [1.0], time=100.0), ticks(1, 1, [1.0], time=100.1), ticks(0, 2, [1.0] * 6, time=102.0))
    assert s.steps_per_s == 3.0


def test_nothing_seen_is_zero_and_not_an_error() -> None:
    s = Summary()
    assert (s.step, s.examples_per_s, s.steps_per_s, s.bytes_sent) == (0, 0.0, 0.0, 0)
    assert set(s.shares.values()) == {0.0}
    assert math.isnan(s.loss)
    assert s.curve.points == []


def test_a_restart_forgets_what_came_after_its_step_but_not_the_work() -> None:
    s = summed(
        ticks(0, 1, [5.0, 4.0, 3.0, 2.0], bytes_sent=40),
        Event(kind="eval", step=2, values={"loss": 4.5, "accuracy": 0.5}),
        Event(kind="eval", step=4, values={"loss": 2.5, "accuracy": None}),
        Event(kind="failed", member=1, values={"cause": "killed by SIGKILL", "traceback": ""}),
        Event(kind="restarted", values={"attempt": 1, "from_step": 2}),
    )
    assert (s.step, s.curve.points, s.restarts, s.failures) == (2, [5.0, 4.0], [2], [])
    assert s.evals == [(2, {"loss": 4.5, "accuracy": 0.5})]
    s.add(ticks(0, 3, [3.0, 2.0], bytes_sent=20))
    assert s.curve.points == [5.0, 4.0, 3.0, 2.0]
    assert (s.members["worker", 0].steps, s.bytes_sent) == (6, 60)


def test_a_resumed_run_begins_at_its_step() -> None:
    s = summed(Event(kind="resumed", values={"path": "x", "step": 100}), ticks(0, 101, [2.0, 1.0]))
    assert (s.first_step, s.step, s.curve.points) == (100, 102, [2.0, 1.0])
    s.add(Event(kind="restarted", values={"attempt": 1, "from_step": 101}))
    assert (s.first_step, s.step, s.curve.points) == (100, 101, [2.0])


def test_saves_starts_failures_and_warnings_are_kept() -> None:
    s = summed(
        Event(kind="started", member=0, values={"pid": 1}),
        Event(kind="started", member=1, values={"pid": 2}),
        Event(kind="saved", step=5, values={"path": "a", "seconds": 0.1, "bytes": 10}),
        Event(kind="warning", values={"text": "hot"}),
        Event(kind="warning", values={"text": "hot"}),
        Event(kind="failed", member=1, values={"cause": "boom", "traceback": ""}),
        Event(kind="failed", member=0, values={"cause": "connection reset", "traceback": ""}),
        Event(kind="a kind of the future", values={"x": 1}),
    )
    assert s.started == {("worker", 0), ("worker", 1)}
    assert [e.step for e in s.saves] == [5]
    assert s.warnings == {"hot": 2}
    assert [e.member for e in s.failures] == [1, 0]


@given(st.lists(st.floats(-100, 100), max_size=200))
def test_curve_points_are_the_means_of_equal_stretches(values: list[float]) -> None:
    curve = Curve(max_points=8)
    for value in values:
        curve.add(value)
    n = curve.stretch
    truth = [sum(values[i : i + n]) / len(values[i : i + n]) for i in range(0, len(values), n)]
    assert curve.points == pytest.approx(truth, abs=1e-9)
    assert len(curve.points) <= 8


@given(st.integers(0, 100), st.integers(0, 100))
def test_a_truncated_curve_goes_on_as_if_the_rest_had_never_been(length: int, kept: int) -> None:
    curve = Curve(max_points=8)
    for _ in range(length):
        curve.add(3.0)
    curve.truncate(kept)
    left = min(kept, length)
    assert len(curve.points) == math.ceil(left / curve.stretch)
    for _ in range(curve.stretch * (len(curve.points)) - left):
        curve.add(3.0)
    assert curve.points == pytest.approx([3.0] * len(curve.points))


def test_an_odd_curve_is_refused() -> None:
    with pytest.raises(ValueError, match="max_points is 7"):
        Curve(max_points=7)


def test_reports_do_not_import_torch() -> None:
    code = "import sys, weft.report.terminal; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0
