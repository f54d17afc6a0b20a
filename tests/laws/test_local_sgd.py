"""Local SGD is what its definition says, and AllReduce in its limits."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.laws.reference import Odd, Ragged, Regression, distance, train_apart, train_plainly
from tests.laws.test_allreduce import EQUAL, OneTwoFive, train
from tests.variants import rest_slow
from torch import Tensor, nn

import weft
from weft import LocalSGD, Outer
from weft.compare import final_parameters
from weft.data import partition
from weft.data.sampler import Sampler
from weft.errors import ConfigError, Incompatible
from weft.events import read_events
from weft.patterns.periodic import PeriodicMean
from weft.report.observers import Silent
from weft.testing import kill

STEPS = 14  # no multiple of the periods below: the last one is partial
DILOCO = (0.7, 0.9, True)


def apart(tmp_path: Path, task: weft.Task, workers: int, pattern: LocalSGD, **settings: Any) -> dict[str, Tensor]:
    return train(tmp_path, task, workers, pattern=pattern, steps=STEPS, **settings)


TASKS = {"regression": (lambda: Regression("plain"), 24), "ragged": (lambda: Ragged("plain"), 10)}


# -- limits


@pytest.mark.parametrize("workers", [1, 2, 3, 4])
@pytest.mark.parametrize("name", TASKS)
def test_meeting_at_each_step_is_allreduce_for_sgd(tmp_path: Path, name: str, workers: int) -> None:
    make, batch = TASKS[name]
    truth = train_plainly(make(), steps=STEPS, batch=batch, run_seed=3)
    assert distance(apart(tmp_path, make(), workers, LocalSGD(every=1), batch=batch), truth) <= EQUAL


@pytest.mark.parametrize("workers", [2, 3, 4])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_one_island_of_all_is_allreduce(tmp_path: Path, workers: int, optimizer: str) -> None:
    truth = train_plainly(Regression(optimizer), steps=STEPS, batch=24, run_seed=3)
    got = apart(tmp_path, Regression(optimizer), workers, LocalSGD(every=5, island=workers), batch=24)
    assert distance(got, truth) <= EQUAL


def test_a_run_that_is_together_but_for_its_last_step_differs_by_that_step_alone(tmp_path: Path) -> None:
    truth = train_apart(Odd(), workers=3, every=1, steps=STEPS, batch=17, start=STEPS - 1, run_seed=3)
    got = apart(tmp_path, Odd(), 3, LocalSGD(every=1, start=STEPS - 1), batch=17)
    assert distance(got, truth) <= EQUAL


# -- the definition


@pytest.mark.parametrize("workers", [1, 2, 3, 4])
@pytest.mark.parametrize("outer", [(1.0, 0.0, False), DILOCO], ids=["average", "diloco"])
@pytest.mark.parametrize("name", ["adamw", "odd", "ragged"])
def test_is_its_definition(tmp_path: Path, name: str, workers: int, outer: tuple[float, float, bool]) -> None:
    make, batch = {
        "adamw": (lambda: Regression("adamw"), 24),
        "odd": (lambda: Odd(), 17),
        "ragged": (lambda: Ragged(), 10),
    }[name]
    truth = train_apart(make(), workers=workers, every=4, steps=STEPS, batch=batch, outer=outer, run_seed=3)
    got = apart(tmp_path, make(), workers, LocalSGD(every=4, outer=Outer(*outer)), batch=batch)
    assert distance(got, truth) <= EQUAL


@pytest.mark.parametrize(("workers", "island"), [(4, 2), (3, 3), (4, 1)])
@pytest.mark.parametrize("make", [lambda: Regression("adamw"), Ragged, Odd])
def test_islands_train_as_one(tmp_path: Path, workers: int, island: int, make: Any) -> None:
    truth = train_apart(make(), workers=workers, every=3, steps=STEPS, batch=16, island=island, run_seed=3)
    got = apart(tmp_path, make(), workers, LocalSGD(every=3, island=island), batch=16)
    assert distance(got, truth) <= EQUAL


@pytest.mark.multiprocess
@pytest.mark.parametrize("link", rest_slow(["shm", "tcp", "gloo"]))
def test_islands_on_every_carrier(tmp_path: Path, link: str) -> None:
    truth = train_apart(Odd(), workers=4, every=3, steps=STEPS, batch=16, island=2, run_seed=3)
    got = apart(tmp_path, Odd(), 4, LocalSGD(every=3, island=2), batch=16, cluster="local", link=link)
    assert distance(got, truth) <= EQUAL


@pytest.mark.parametrize("name", TASKS)
def test_unequal_shards_weigh_by_their_examples(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(partition.ALL, "one-two-five", OneTwoFive)
    make, batch = TASKS[name]

    def shares(rank: int) -> Iterable[np.ndarray]:
        torch.manual_seed(0)
        sampler = Sampler(len(make().data()[0]), batch, rank, 3, 3, partition.parse("one-two-five"))
        while True:
            yield sampler.next().indices

    truth = train_apart(make(), workers=3, every=4, steps=STEPS, batch=batch, shares=shares, run_seed=3)
    got = apart(tmp_path, make(), 3, LocalSGD(every=4), batch=batch, partition="one-two-five")
    assert distance(got, truth) <= EQUAL


# -- when


@pytest.mark.parametrize("every", [15, 1000, "epoch"])
def test_a_period_longer_than_the_run_is_one_meeting_at_the_end_and_the_plan_says_so(
    tmp_path: Path, every: Any
) -> None:
    """One-shot averaging, also by default in a short run."""
    steps = STEPS if every != "epoch" else 5
    truth = train_apart(Odd(), workers=3, every=steps, steps=steps, batch=17, run_seed=3)
    got = train(tmp_path, Odd(), 3, pattern=LocalSGD(every=every), steps=steps, batch=17)
    assert distance(got, truth) <= EQUAL
    assert "the last meeting is the end" in (tmp_path / "run" / "plan.json").read_text()


@pytest.mark.parametrize("every", [1, 2, 5, 7, 14])
def test_the_first_meeting_comes_after_exactly_every_updates(
    tmp_path: Path, every: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted by what was sent: between meetings nothing is."""
    monkeypatch.setattr("weft.member.TICK_S", 0.0)
    result = weft.run(
        Regression(),
        LocalSGD(every=every),
        "inprocess",
        workers=2,
        steps=STEPS,
        batch=24,
        save_every=0,
        run_dir=tmp_path / "run",
    )
    ticks = [e for e in read_events(Path(result.run_dir) / "events.jsonl") if e.kind == "ticks" and e.member == 0]
    sent = {e.values["last"]: e.values["bytes_sent"] for e in ticks}
    assert list(sent) == list(range(1, STEPS + 1))
    meetings = {*range(every, STEPS + 1, every), STEPS}
    assert {step for step, nbytes in sent.items() if nbytes} == meetings


@pytest.mark.parametrize("asked", ["eval_every", "save_every"])
def test_a_partial_period_is_flushed_before_looking(tmp_path: Path, asked: str) -> None:
    truth = train_apart(Regression(), workers=3, every=5, steps=STEPS, batch=24, meet_at=(3, 6, 9, 12), run_seed=3)
    got = apart(tmp_path, Regression(), 3, LocalSGD(every=5), batch=24, **{asked: 3})
    assert distance(got, truth) <= EQUAL


def test_automatic_saves_fall_on_meetings(tmp_path: Path) -> None:
    result = weft.run(
        Regression(), LocalSGD(every=20), "inprocess", workers=2, steps=90, batch=24, run_dir=tmp_path / "run"
    )
    saved = [e.step for e in read_events(Path(result.run_dir) / "events.jsonl") if e.kind == "saved"]
    assert saved == [40, 80, 90]


@pytest.mark.parametrize("start", [1, 5, 13])
def test_post_local_begins_when_it_is_told(tmp_path: Path, start: int) -> None:
    truth = train_apart(Regression("adamw"), workers=3, every=4, steps=STEPS, batch=24, start=start, run_seed=3)
    got = apart(tmp_path, Regression("adamw"), 3, LocalSGD(every=4, start=start), batch=24)
    assert distance(got, truth) <= EQUAL


class Dropping(Regression):
    def schedule(self, optimizer: torch.optim.Optimizer, total_steps: int) -> Any:
        return torch.optim.lr_scheduler.MultiStepLR(optimizer, [6])


def test_post_local_begins_when_the_rate_drops(tmp_path: Path) -> None:
    truth = train_apart(Dropping(), workers=2, every=4, steps=STEPS, batch=24, start=6, run_seed=3)
    got = apart(tmp_path, Dropping(), 2, LocalSGD(every=4, start="lr_drop"), batch=24)
    assert distance(got, truth) <= EQUAL


class Smooth(Regression):
    def schedule(self, optimizer: torch.optim.Optimizer, total_steps: int) -> Any:
        """Warm-up over 3 steps to 1, then a line down to 0 at step 13."""
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: (s + 1) / 3 if s < 3 else max(0.0, (13 - s) / 10))


def test_a_smooth_schedule_drops_where_it_is_half_of_its_highest(tmp_path: Path) -> None:
    """1 at steps 2 and 3, 0.5 at step 8."""
    truth = train_apart(Smooth(), workers=2, every=4, steps=STEPS, batch=24, start=8, run_seed=3)
    got = apart(tmp_path, Smooth(), 2, LocalSGD(every=4, start="lr_drop"), batch=24)
    assert distance(got, truth) <= EQUAL


class Constant(Regression):
    def schedule(self, optimizer: torch.optim.Optimizer, total_steps: int) -> Any:
        return None


def test_a_rate_that_never_drops_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="never brings the learning rate to half"):
        apart(tmp_path, Constant(), 2, LocalSGD(every=4, start="lr_drop"), batch=24)


@pytest.mark.parametrize(
    ("pattern", "settings"),
    [
        (LocalSGD(every=4), {}),
        (LocalSGD(every=4), {"eval_every": 3}),
        (LocalSGD(every=5), {"eval_every": 7, "save_every": 2}),
        (LocalSGD(every=3, start=5), {"save_every": 4}),
        (LocalSGD(every="epoch"), {"eval_every": 5}),
        (LocalSGD(every=1), {"eval_every": 5, "save_every": 3}),
    ],
)
def test_the_plan_counts_the_meetings(
    tmp_path: Path, pattern: LocalSGD, settings: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    met: list[int] = []
    meet = PeriodicMean.meet

    def counted(self: PeriodicMean) -> None:
        met.append(self.link.rank)
        meet(self)

    monkeypatch.setattr(PeriodicMean, "meet", counted)
    plans: list[Any] = []

    class Plans(Silent):
        def on_plan(self, plan: Any) -> None:
            plans.append(plan)

    settings = {"save_every": 0} | settings
    weft.run(
        Regression(),
        pattern,
        "inprocess",
        workers=2,
        steps=STEPS,
        batch=36,
        observer=Plans(),
        run_dir=tmp_path / "run",
        **settings,
    )
    assert f"in each of {met.count(0)} meetings" in plans[0].links[-1].what


def test_a_period_of_an_epoch(tmp_path: Path) -> None:
    """211 examples in batches of 36: six steps, the last of 31."""
    truth = train_apart(Regression(), workers=2, every=6, steps=STEPS, batch=36, run_seed=3)
    got = apart(tmp_path, Regression(), 2, LocalSGD(every="epoch"), batch=36)
    assert distance(got, truth) <= EQUAL


# -- state


@pytest.mark.multiprocess
@pytest.mark.parametrize(
    ("pattern", "workers"),
    [
        pytest.param(LocalSGD(every=4, outer=Outer.presets["diloco"]), 3, id="diloco"),
        pytest.param(LocalSGD(every=3, island=2), 4, id="islands", marks=pytest.mark.slow),
        pytest.param(LocalSGD(every=3, start=7), 2, id="post-local", marks=pytest.mark.slow),
    ],
)
def test_a_killed_run_comes_back_bit_for_bit(tmp_path: Path, pattern: LocalSGD, workers: int) -> None:
    settings: dict[str, Any] = {"workers": workers, "steps": STEPS, "batch": 24, "save_every": 5, "dtype": "float32"}
    calm = weft.run(Regression("adamw"), pattern, run_dir=tmp_path / "calm", **settings)
    shaken = weft.run(
        Regression("adamw"),
        pattern,
        run_dir=tmp_path / "shaken",
        restarts=1,
        faults=[kill(rank=1, step=11)],
        **settings,
    )
    kinds = [e.kind for e in read_events(tmp_path / "shaken" / "events.jsonl")]
    assert "restarted" in kinds
    a, b = final_parameters(calm.run_dir), final_parameters(shaken.run_dir)
    assert all(torch.equal(a[n], b[n]) for n in a)


class Unhurried(Regression):
    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        time.sleep(0.005)
        return super().loss(model, batch)


class StopAfterTheFirstSave:
    def on_plan(self, plan: Any) -> None: ...
    def on_output(self, member: int, text: str) -> None: ...
    def on_idle(self) -> None: ...
    def on_event(self, event: Any) -> None:
        if event.kind == "saved" and event.step == 14:
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.slow
@pytest.mark.multiprocess
def test_a_stop_waits_for_the_next_meeting_and_costs_nothing(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"workers": 2, "steps": 70, "batch": 24, "save_every": 14}
    calm = weft.run(Unhurried(), LocalSGD(every=7), run_dir=tmp_path / "calm", **settings)
    with pytest.raises(weft.Interrupted, match="weft resume"):
        weft.run(Unhurried(), LocalSGD(every=7), run_dir=tmp_path / "run", observer=StopAfterTheFirstSave(), **settings)
    stopped = [e.step for e in read_events(tmp_path / "run" / "events.jsonl") if e.kind == "stopped"]
    assert len(stopped) == 1
    assert stopped[0] < 70
    assert stopped[0] % 7 == 0
    assert weft.resume(tmp_path / "run", task=Unhurried()).steps == 70
    a, b = final_parameters(calm.run_dir), final_parameters(tmp_path / "run")
    assert all(torch.equal(a[n], b[n]) for n in a)


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize("world", [1, 2, 3])
def test_another_world_goes_on_from_the_mean_of_the_inner_states(tmp_path: Path, world: int) -> None:
    """SGD with momentum is linear in its state: meeting at each step, with equal shares, is AllReduce across the change."""
    task, settings = (
        Regression(),
        {"steps": 8, "batch": 24, "dtype": "float64", "seed": 3, "run_dir": tmp_path / "run"},
    )
    truth = train_plainly(Regression(), steps=8, batch=24, run_seed=3)
    with pytest.raises(weft.MemberFailed):
        weft.run(task, LocalSGD(every=1), workers=4, save_every=3, faults=[kill(rank=1, step=5)], **settings)
    weft.resume(tmp_path / "run", workers=world, task=task)
    assert distance(final_parameters(tmp_path / "run"), truth) <= EQUAL


class Normed(Regression):
    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 1))


def test_running_statistics_are_averaged_at_meetings(tmp_path: Path) -> None:
    """Of two workers that each saw one batch: the mean of what each alone would have, by its examples."""
    got = train(tmp_path, Normed(), 2, pattern=LocalSGD(every=1), steps=1, batch=25)
    alone = []
    for rank, share in ((0, slice(0, 12)), (1, slice(12, 25))):
        from tests.laws.reference import seed

        from weft.data.keys import key_int

        seed(key_int(3, "data"))
        data, _ = Normed().data()
        seed(key_int(3, "init"))
        model = Normed().model().double()
        indices = Sampler(211, 25, 0, 1, 3).next().indices[share]
        model(torch.stack([data[int(i)][0] for i in indices]).double())
        alone.append((len(indices), model.state_dict()))
        del rank
    for name in ("1.running_mean", "1.running_var"):
        expected = sum(n * state[name] for n, state in alone) / 25
        assert torch.allclose(got[name], expected, rtol=0, atol=1e-12)


# -- what is seen


def test_the_loss_told_is_that_of_all_workers(tmp_path: Path) -> None:
    """At step 1 all hold the same model: the joined loss is AllReduce's, and the curve has every step once."""
    for name, pattern in (("together", weft.AllReduce()), ("apart", LocalSGD(every=5))):
        weft.run(Ragged(), pattern, "inprocess", workers=3, steps=11, batch=10, seed=3, run_dir=tmp_path / name)
    together, apart_ = (losses(tmp_path / name) for name in ("together", "apart"))
    assert list(apart_) == list(range(1, 12))
    assert apart_[1] == pytest.approx(together[1], rel=1e-6)
    assert apart_[5] != pytest.approx(together[5], rel=1e-6)


def losses(run_dir: Path) -> dict[int, float]:
    found: dict[int, float] = {}
    for event in read_events(run_dir / "events.jsonl"):
        if event.kind == "loss" or (event.kind == "ticks" and event.member == 0 and "loss" in event.values):
            found.update(zip(range(event.values["first"], event.values["last"] + 1), event.values["loss"], strict=True))
    return found


def test_bytes_fall_by_the_period(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"workers": 2, "steps": 200, "batch": 24, "save_every": 0}
    sent = [
        weft.run(Regression(), p, "inprocess", run_dir=tmp_path / p.name, **settings).bytes_sent
        for p in (weft.AllReduce(), LocalSGD(every=20))
    ]
    assert sent[1] * 19 < sent[0]


# -- bad input


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"every": "0"}, "every=0 is not possible: give a whole number of 1 or more"),
        ({"every": "never"}, "every='never' of pattern 'localsgd' is not possible: give int|epoch"),
        ({"every": "2.5"}, "every='2.5' of pattern 'localsgd' is not possible: give int|epoch"),
        ({"every": "2", "start": "14"}, "start=14 is not before the end of the run of 14 steps"),
        ({"every": "2", "start": "-1"}, "start=-1 is not possible"),
        ({"every": "2", "island": "2"}, "island=2 does not divide the 3 workers"),
        ({"every": "2", "island": "0"}, "island=0 is not possible"),
        ({"every": "2", "outer": "dilco"}, "Did you mean 'diloco'"),
        ({"every": "2", "outer": {"lr": "0"}}, "outer.lr=0.0 is not possible"),
        ({"every": "2", "outer": {"momentum": "1"}}, "outer.momentum=1.0 is not possible"),
        ({"every": "2", "outer": {"nesterov": "true"}}, "outer.momentum is 0"),
        ({"every": "2", "outer": {"kind": "diloco", "rate": "1"}}, "rate"),
        ({"every": "2", "within": "gossip"}, "unknown pattern 'gossip'"),
        ({"every": "2", "within": {"clip_norm": "-1"}}, "clip_norm=-1.0 is not possible"),
        ({"every": "2", "within": {"accumulate": "99"}}, "accumulate=99 cannot cut"),
    ],
)
def test_bad_options_are_refused_before_any_worker_starts(tmp_path: Path, options: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        weft.run(
            Regression(),
            "localsgd",
            "inprocess",
            pattern_options=options,
            workers=3,
            steps=STEPS,
            batch=24,
            run_dir=tmp_path / "run",
        )
    assert says in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_local_sgd_in_local_sgd_is_refused() -> None:
    with pytest.raises(Incompatible, match="within=localsgd cannot stand in pattern 'localsgd'"):
        weft.run(Regression(), LocalSGD(within=LocalSGD()), "inprocess", workers=2)
