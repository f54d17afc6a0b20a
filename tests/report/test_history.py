"""What the report shows, against sums done by hand; downsampling and spreading by law."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.report.runs import event, tick, usage, whole_run

from weft.report.history import History, downsample, means, spread

VALUES = st.lists(st.one_of(st.floats(-1e6, 1e6), st.just(math.nan), st.just(math.inf)), min_size=1, max_size=2000)


@given(VALUES, st.integers(1, 50))
def test_downsampling_loses_no_spike_and_no_gap(ys: list[float], buckets: int) -> None:
    xs = [float(k) for k in range(len(ys))]
    out_x, out_y = downsample(xs, ys, buckets)
    assert len(out_x) == len(out_y) <= 3 * buckets + 2
    assert out_x == sorted(set(out_x)), "in order, none twice"
    assert (out_x[0], out_x[-1]) == (xs[0], xs[-1])
    for x, y in zip(out_x, out_y):
        assert y is ys[int(x)] or y == ys[int(x)], "only what was there"
    finite = [y for y in ys if math.isfinite(y)]
    kept = [y for y in out_y if math.isfinite(y)]
    if finite:
        assert (min(kept), max(kept)) == (min(finite), max(finite))
    if len(finite) < len(ys):
        assert len(kept) < len(out_y), "what is not finite stays to be seen"


def test_downsampling_keeps_a_single_spike_among_many() -> None:
    ys = [1.0] * 100_000
    ys[77_777] = 1e9
    xs, out = downsample(list(map(float, range(100_000))), ys, 100)
    assert (77_777.0, 1e9) in list(zip(xs, out))
    assert len(xs) <= 302


AMOUNTS = st.lists(
    st.tuples(st.floats(0, 10), st.floats(0, 10), st.floats(0, 100)).map(lambda t: (min(t[:2]), max(t[:2]), t[2])),
    max_size=30,
)


@given(AMOUNTS, st.integers(1, 40))
def test_spreading_keeps_the_sum(amounts: list[tuple[float, float, float]], buckets: int) -> None:
    out = spread(amounts, 10.0, buckets)
    assert len(out) == buckets
    assert sum(out) == pytest.approx(sum(a for *_, a in amounts))
    assert min(out) >= -1e-9


def test_spreading_goes_by_overlap() -> None:
    assert spread([(0.5, 2.5, 4.0)], 4.0, 4) == pytest.approx([1.0, 2.0, 1.0, 0.0])


def test_means_leave_out_what_is_not_finite() -> None:
    xs, ys = means([0.0, 1.0, 2.0, 3.0], [1.0, math.nan, math.inf, math.nan], 2)
    assert xs == [0.5, 2.5]
    assert ys[0] == 1.0
    assert math.isnan(ys[1])


def test_a_whole_run() -> None:
    h = History(whole_run())
    assert h.step == 40
    assert h.loss.values == [2.0 / (k + 1) for k in range(40)]
    assert [m.steps for m in h.members.values()] == [40, 40]
    assert h.members["worker", 1].num_bytes == 2000.0
    assert h.members["worker", 0].total("compute") == pytest.approx(0.4)
    assert h.evals["accuracy"].values == [0.875]
    assert h.outcome(None) == "finished"
    assert h.seconds == pytest.approx(2.4)


def test_a_restart_takes_back_what_came_after_its_checkpoint() -> None:
    events = whole_run(steps=40)[:-3]
    events += [event("eval", 2.2, 0, 40, loss=9.0), event("failed", 2.3, 1, cause="killed by SIGKILL", traceback="")]
    events += [event("restarted", 2.4, attempt=1, from_step=25, reason="killed")]
    h = History(events)
    assert h.loss.steps == list(range(1, 26))
    assert h.undone[0].steps == list(range(26, 41))
    assert h.evals["loss"].steps == []
    assert h.outcome(None) == "lost", "it went on, and then there was silence"
    h.add(tick(3.0, 0, 26, [7.0, 7.0]))
    assert h.loss.values[-2:] == [7.0, 7.0]
    assert h.step == 27


def test_the_pause_before_a_resume_is_no_time_of_the_run() -> None:
    first = [e for e in whole_run() if e.kind != "finished"]
    later = [event("plan", 10_000.0, text=""), event("resumed", 10_000.1, path="c", step=40), usage(10_000.2, 0, 7)]
    h = History([*first, *later])
    assert h.launches == 2
    assert h.seconds == pytest.approx(2.3 + 0.2)


@pytest.mark.parametrize(
    ("end", "writer", "outcome"),
    [
        ([], None, "lost"),
        ([], 123, "going"),
        ([event("stopped", 3, 0, reason="asked to")], None, "stopped"),
        ([event("failed", 3, 0, cause="x", traceback="")], None, "failed"),
        ([event("failed", 3, 0, cause="x", traceback=""), event("plan", 9, text="")], None, "lost"),
        ([event("failed", 3, 0, cause="x", traceback=""), event("plan", 9, text="")], 123, "going"),
    ],
)
def test_outcomes(end: list, writer: int | None, outcome: str) -> None:
    assert History([*whole_run()[:-1], *end]).outcome(writer) == outcome


def test_work_is_placed_at_the_end_of_its_stretch() -> None:
    """A tick tells of 0.16 s of work; the 2 s before it were an evaluation."""
    h = History([event("plan", 0, text=""), event("started", 0, 0, pid=1), tick(2.16, 0, 1, [1.0])])
    (only,) = h.members["worker", 0].ticks
    assert (only.begin, only.end) == (pytest.approx(2.0), pytest.approx(2.16))


def test_a_kind_of_the_future_is_passed_over() -> None:
    assert History([event("a kind of the future", 0.0, color="red")]).marks == []
