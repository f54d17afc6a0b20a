"""kill -9 in the middle of a collective: every survivor gets the typed error at once, and nothing is left behind."""

from __future__ import annotations

import pytest
from tests.comm.kills import Trial, commit, standing
from tests.variants import rest_slow

from weft.comm.shm import supported

#: The promise is 0.1 s. A test catches hangs; on a busy machine it allows ten times that.
TOLD_S = 1.0


@pytest.mark.multiprocess
@pytest.mark.timeout(400)
@pytest.mark.skipif(supported() is not None, reason=f"{supported()}")
@pytest.mark.parametrize(("first", "kills"), rest_slow([(0, 10), (1000, 200)]))
def test_every_survivor_is_told_who_is_gone(first: int, kills: int) -> None:
    before = standing()
    late = []
    for key in range(first, first + kills):
        trial = Trial.draw(key)
        for survivor in commit(trial):
            assert survivor.error.startswith("PeerLost: "), (key, trial, survivor)
            assert survivor.ranks == (trial.victim,), (key, trial, survivor)
            late += [(key, trial, survivor)] if survivor.seconds > TOLD_S else []
    assert late == []
    assert {what: names - before[what] for what, names in standing().items()} == {what: set() for what in before}
