"""Whatever the workers do, and whoever is lost: each share counts once, nobody is further ahead than the bound, and all batches close."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from weft.servers.ledger import Ledger, Share


@given(
    shares=st.integers(1, 4),
    staleness=st.one_of(st.none(), st.integers(0, 3)),
    backups=st.integers(0, 2),
    begin=st.integers(0, 5),
    start=st.integers(0, 8),
    data=st.data(),
)
def test_any_course_of_events(
    shares: int, staleness: int | None, backups: int, begin: int, start: int, data: st.DataObject
) -> None:
    backups = min(backups, shares - 1)
    ledger = Ledger(shares, begin, staleness, backups, start)
    end = begin + 6
    ledger.pause(end)
    at_work: dict[int, Share] = {}  # by worker, as it thinks
    lost: set[int] = set()  # given up by the ledger, though it may come back with its share
    closed: dict[int, list[int]] = {}
    for _ in range(400):
        worker = data.draw(st.integers(0, shares), "worker")
        what = data.draw(st.sampled_from(["work", "work", "work", "lost"]), "what")
        if what == "lost" and worker in at_work and len(lost) < 3:
            ledger.lost(worker)
            lost.add(worker)
            continue
        if worker in at_work:
            share = at_work.pop(worker)
            was_open = ledger.is_open(share.batch)
            joined = ledger.done(share)
            assert ledger.done(share) == []  # said again
            if joined:
                assert was_open
                assert share.batch not in closed
                closed[share.batch] = joined
        taken = ledger.take(worker)
        if taken is None:
            continue
        assert begin <= taken.batch < end
        assert taken.batch not in closed
        lowest = min(set(range(begin, end + 1)) - closed.keys())
        assert staleness is None or taken.batch <= lowest + staleness
        assert lowest >= start or taken.batch == lowest
        holders = [w for w, share in at_work.items() if share == taken and w not in lost]
        assert not holders
        at_work[worker] = taken
        lost.discard(worker)
        if len(closed) == end - begin:
            break
    for worker in list(range(shares + 1)) * 200:  # nobody is lost any more
        if worker in at_work and (joined := ledger.done(share := at_work.pop(worker))):
            closed[share.batch] = joined
        if (taken := ledger.take(worker)) is not None:
            at_work[worker] = taken
    assert sorted(closed) == list(range(begin, end))
    assert all(shares - backups <= len(joined) <= shares for joined in closed.values())
    assert (ledger.closed, ledger.lowest) == (end, end)


def test_own_share_first_then_what_is_free() -> None:
    ledger = Ledger(2, 0, staleness=1)
    ledger.pause(10)
    assert [ledger.take(1), ledger.take(1), ledger.take(1), ledger.take(0)] == [
        Share(0, 1),
        Share(0, 0),
        Share(1, 1),
        Share(1, 0),
    ]
    assert ledger.take(0) is None  # batch 2 waits for batch 0


def test_a_pause_takes_nothing_back() -> None:
    ledger = Ledger(1, 0, staleness=None)
    ledger.pause(10)
    assert [ledger.take(0), ledger.take(0), ledger.take(0)] == [Share(0, 0), Share(1, 0), Share(2, 0)]
    ledger.pause(2)
    assert ledger.limit == 3
    assert ledger.take(0) is None
