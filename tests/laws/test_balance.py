"""Shares that follow speed change who computes what, never the update. Speeds are scripted, so that shares really change."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.laws.reference import Augmented, Odd, Ragged, Regression, distance, train_plainly

import weft
from weft.compare import final_parameters
from weft.data import balance
from weft.data.balance import Balancer, Decision
from weft.events import read_events
from weft.tasks.digits import Digits
from weft.testing import raise_error

STEPS = 40
EQUAL = 1e-9
TASKS: dict[str, tuple[Callable[[], weft.Task], int]] = {
    "regression": (lambda: Regression(), 24),
    "adamw": (lambda: Regression("adamw"), 24),
    "digits": (lambda: Digits(width=4), 30),
    "odd": (lambda: Odd(), 17),
    "ragged": (lambda: Ragged(), 10),
}


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank r needs 2 + (r + 1) n seconds for n examples, whatever the clock says; decisions come often."""
    monkeypatch.setattr(balance, "HALF", 2)
    observe = Balancer.observe

    def scripted(self: Balancer, seconds: Any) -> Decision | None:
        assert len(seconds) == len(self.shares)
        return observe(self, [2 + (r + 1) * n for r, n in enumerate(self.shares)])

    monkeypatch.setattr(Balancer, "observe", scripted)


def settings(tmp_path: Path, batch: int, **more: Any) -> dict[str, Any]:
    base = {"cluster": "inprocess", "dtype": "float64", "steps": STEPS, "seed": 3, "balance": "auto", "batch": batch}
    return base | {"run_dir": tmp_path / "run"} | more


def changes(run_dir: str | Path) -> list[tuple[int, list[int]]]:
    events = read_events(Path(run_dir) / "events.jsonl")
    return [(e.step, e.values["shares"]) for e in events if e.kind == "balance"]


@pytest.mark.usefixtures("scripted")
@pytest.mark.parametrize("workers", [2, 3, 4])
@pytest.mark.parametrize("name", TASKS)
def test_balanced_equals_one_process_on_the_joined_batch(tmp_path: Path, name: str, workers: int) -> None:
    make, batch = TASKS[name]
    truth = train_plainly(make(), steps=STEPS, batch=batch, run_seed=3)
    result = weft.run(make(), workers=workers, **settings(tmp_path, batch))
    assert distance(final_parameters(result.run_dir), truth) <= EQUAL
    found = changes(result.run_dir)
    assert found
    last = found[-1][1]
    assert sum(last) == batch
    assert last == sorted(last, reverse=True)
    assert last[0] > last[-1]


@pytest.fixture
def prescribed(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[tuple[int, list[int]]]], None]:
    """Shares as a record says, by step."""

    def prescribe(record: list[tuple[int, list[int]]]) -> None:
        at = dict(record)
        steps = {}

        def observe(self: Balancer, seconds: Any) -> Decision | None:
            steps[self] = step = steps.get(self, 0) + 1
            if step not in at:
                return None
            self.shares = tuple(at[step])
            return Decision(self.shares, "as recorded")

        monkeypatch.setattr(Balancer, "observe", observe)

    return prescribe


def test_shards_of_1_2_5(tmp_path: Path, prescribed: Callable[..., None]) -> None:
    """The weight law, where examples are of different length; shares change at every step, and one is 0 now and then."""
    cuts = itertools.cycle([[1, 2, 5], [5, 1, 2], [0, 3, 5], [8, 0, 0]])
    record = [(step, shares) for step, shares in zip(range(1, 15), cuts, strict=False)]
    prescribed(record)
    truth = train_plainly(Ragged(), steps=15, batch=8, run_seed=3)
    result = weft.run(Ragged(), workers=3, **settings(tmp_path, 8, steps=15))
    assert distance(final_parameters(result.run_dir), truth) <= EQUAL
    assert changes(result.run_dir) == record


@pytest.mark.usefixtures("scripted")
def test_shares_replayed_from_the_record_are_bit_equal(tmp_path: Path, prescribed: Callable[..., None]) -> None:
    """With noise keyed by rank: what a rank draws depends on its share, so other shares would give other bits."""
    first = weft.run(Augmented(), workers=3, **settings(tmp_path, 20, run_dir=tmp_path / "first", dtype="float32"))
    record = changes(first.run_dir)
    assert record
    truth = final_parameters(first.run_dir)
    for name, shares, same in [("again", record, True), ("other", [], False)]:
        prescribed(shares)
        result = weft.run(Augmented(), workers=3, **settings(tmp_path, 20, run_dir=tmp_path / name, dtype="float32"))
        got = final_parameters(result.run_dir)
        assert all(torch.equal(got[n], truth[n]) for n in truth) == same


@pytest.mark.usefixtures("scripted")
@pytest.mark.parametrize("failed_at", [9, 17, 26])
def test_a_resumed_run_goes_on_with_the_recorded_shares(tmp_path: Path, failed_at: int) -> None:
    job = settings(tmp_path, 21, save_every=3)
    truth = final_parameters(weft.run(Augmented(), workers=3, **job | {"run_dir": tmp_path / "truth"}).run_dir)
    weft.run(Augmented(), workers=3, **job, restarts=1, faults=[raise_error(rank=1, step=failed_at)])
    got = final_parameters(tmp_path / "run")
    assert all(torch.equal(got[n], truth[n]) for n in truth)
    manifest = json.loads(next((tmp_path / "run" / "checkpoints").glob("*40/manifest.json")).read_text())
    assert json.dumps(changes(tmp_path / "run")[-1][1]) in json.dumps(manifest)


@pytest.mark.usefixtures("scripted")
@pytest.mark.parametrize("change", [{"workers": 2}, {"balance": "none"}, {"workers": 1}, {"workers": 4}])
def test_resume_may_change_world_and_balance(tmp_path: Path, change: dict[str, Any]) -> None:
    job = settings(tmp_path, 24, save_every=10, faults=[raise_error(rank=0, step=26)])
    with pytest.raises(weft.MemberFailed):
        weft.run(Regression(), workers=3, **job)
    before = len(changes(tmp_path / "run"))
    assert before
    weft.resume(tmp_path / "run", task=Regression(), **change)
    truth = train_plainly(Regression(), steps=STEPS, batch=24, run_seed=3)
    assert distance(final_parameters(tmp_path / "run"), truth) <= EQUAL
    rebalanced = len(changes(tmp_path / "run")) > before
    assert rebalanced == (change.get("workers", 0) > 1)  # equal shares again, and these are then balanced anew


@pytest.mark.usefixtures("scripted")
def test_resume_may_turn_it_on(tmp_path: Path) -> None:
    job = settings(tmp_path, 24, balance="none", save_every=10, faults=[raise_error(rank=0, step=16)])
    with pytest.raises(weft.MemberFailed):
        weft.run(Regression(), workers=3, **job)
    weft.resume(tmp_path / "run", task=Regression(), balance="auto")
    assert changes(tmp_path / "run")


class Normed(Regression):
    def model(self) -> torch.nn.Module:
        return torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 1))


def test_batchnorm_keeps_a_quarter_of_an_equal_share(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One example cannot be normalised: torch raises. The last batch of an epoch is left out, as its shares are smaller."""
    observe = Balancer.observe
    monkeypatch.setattr(balance, "HALF", 1)
    monkeypatch.setattr(Balancer, "observe", lambda self, seconds: observe(self, [9.0 * self.shares[0], 0.1, 0.1]))
    result = weft.run(Normed(), workers=3, **settings(tmp_path, 36, steps=5))
    assert [shares[0] for _, shares in changes(result.run_dir)] == [3]


def test_the_smaller_last_batch_of_an_epoch_tells_nothing_of_speed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(Balancer, "observe", lambda self, seconds: seen.append(seconds))
    weft.run(
        Regression(), workers=2, **settings(tmp_path, 24, steps=18)
    )  # 211 examples are 8 batches of 24 and one of 19
    assert len(seen) == 2 * 2 * 8
    assert all(seconds > 0 for row in seen for seconds in row)
