"""Before a long run what may be quickest is tried: which few, when, what follows of it, and that a run goes by it, once."""

from __future__ import annotations

import importlib
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest
from tests.laws.reference import Regression
from tests.patterns.predicted import MB, facts_of
from torch import Tensor, nn

import weft
from weft import Mesh, Pipeline
from weft.clusters.base import LinkSpec
from weft.config import Config, Measured, RunFolder, Settled, TaskRef
from weft.driver import explain, trial
from weft.driver.probe import Resolved
from weft.driver.requests import make_config, open_cluster
from weft.errors import ConfigError, Incompatible, MemberFailed
from weft.events import Event
from weft.patterns.base import Facts
from weft.patterns.pipelined import MOST, WITHIN, Known, _rank, contenders
from weft.report.observers import Silent
from weft.testing import kill


class Watching(Silent):
    def __init__(self) -> None:
        self.tried: list[str] = []
        self.warnings: list[str] = []

    def on_event(self, event: Event) -> None:
        if event.kind == "warning":
            self.warnings.append(event.values["text"])
        if event.kind == "trying":
            self.tried.append(event.values["text"].removeprefix("trying ").partition(":")[0])


def resolved_of(pattern: Pipeline, facts: Facts | None = None) -> Resolved:
    facts = pattern.settle(facts or facts_of(microbatches=8), 2, None)
    assert facts.pipeline is not None
    measured = Measured(world=2, carrier="shm", pipeline=facts.pipeline.settled)
    config = Config(task=TaskRef("none"), pattern="pipeline", workers=2, batch=24, measured=measured)
    return Resolved(config, facts, pattern, None)


def links_of(pattern: Any, facts: Facts, speed: Any = None) -> list[LinkSpec]:
    return [LinkSpec("shm", 2, 60.0)]


class Takes:
    """Stands for a trial: seconds of a step, by schedule; each has them ``odd`` times as long in the first round. ``fails``: who does."""

    def __init__(
        self, seconds: dict[str, float], odd: dict[str, float] | None = None, fails: tuple[str, ...] = ()
    ) -> None:
        self.seconds, self.odd, self.fails, self.seen = seconds, odd or {}, fails, list[str]()

    def __call__(self, resolved: Resolved, settled: Settled, *_: Any) -> list[float]:
        first = settled.schedule not in self.seen
        self.seen.append(settled.schedule)
        if settled.schedule in self.fails:
            raise MemberFailed("worker 1 failed: no memory")
        value = self.seconds.get(settled.schedule, 1.0)
        return [value * self.odd.get(settled.schedule, 1.0) if first else value] * 3


def decided(
    monkeypatch: pytest.MonkeyPatch,
    takes: Takes,
    resolved: Resolved,
    steps: int = 1000,
    watching: Watching | None = None,
) -> Resolved:
    monkeypatch.setattr(trial, "try_out", takes)
    return trial.decide(resolved, links_of, 100_000, steps, None, watching or Watching())  # type: ignore[arg-type]


def settled_in(resolved: Resolved) -> Settled:
    assert resolved.facts.pipeline is not None
    assert resolved.facts.pipeline.settled is not None
    return resolved.facts.pipeline.settled


# -- which, and when


@pytest.mark.parametrize("workers", [2, 4])
@pytest.mark.parametrize("output_mb", [0, 1, 8])
def test_contenders_are_the_quickest_by_prediction_and_the_simplest_of_them(workers: int, output_mb: int) -> None:
    pattern, facts = Pipeline(), facts_of(microbatches=8, output_bytes=output_mb * MB)
    ranked = _rank(Known(facts, pattern.pipelined), pattern.pipelined, workers)
    found = pattern.contenders(facts, workers)
    chosen = pattern.settle(facts, workers, None).pipeline
    assert chosen is not None
    assert chosen.settled is not None
    assert (found[0].schedule, found[0].items) == (chosen.settled.schedule, chosen.settled.items)
    step_s = {(one.schedule.name, one.stages_per_rank): one.step_s for one in ranked}
    near = [one for one in ranked if one.step_s <= (1 + WITHIN) * step_s[found[0].schedule, found[0].stages_per_worker]]
    programs = {one.predicted.program.actions for one in near}
    assert len(found) == min(MOST, len(programs)), "as many as there are, and no more than that"
    simplest = min(near, key=lambda one: one.simplicity)
    assert simplest.schedule.name in [one.schedule for one in found]
    left_out = [s for s in step_s.values() if s not in [step_s[one.schedule, one.stages_per_worker] for one in found]]
    others = [step_s[one.schedule, one.stages_per_worker] for one in found[1:-1]]
    assert all(
        out >= max(others, default=0.0) or out <= step_s[found[0].schedule, found[0].stages_per_worker]
        for out in left_out
    )
    assert {one.of for one in found} == {pattern.settles(facts, workers)}


def test_what_does_not_fit_is_not_tried() -> None:
    facts = facts_of(microbatches=8, memory_left=4 * 100 * MB)
    assert _rank(Known(facts, Pipeline().pipelined), Pipeline().pipelined, 2)[0].fits is False
    assert Pipeline(trial="always").contenders(facts, 2) == []


def test_what_does_the_same_is_tried_once() -> None:
    """Of one micro-batch, one stage a worker and a backward that is whole, gpipe is 1f1b."""
    facts = facts_of(microbatches=1)
    facts = msgspec.structs.replace(facts, pipeline=msgspec.structs.replace(facts.pipeline, unsplit="as it is"))  # type: ignore[type-var]
    found = contenders(facts, Pipeline(stages_per_worker=1).pipelined, 2, "")
    assert [one.schedule for one in found] == ["1f1b"]


def test_what_was_asked_for_is_all_that_is_tried() -> None:
    assert {one.schedule for one in Pipeline(schedule="zbv").contenders(facts_of(microbatches=8), 2)} == {"zbv"}
    assert Pipeline(trial="never").contenders(facts_of(microbatches=8), 2) == []
    assert Mesh(data=2).contenders(facts_of(), 2) == []


def test_it_pays_before_a_long_run_where_there_is_a_choice() -> None:
    assert not trial.pays(resolved_of(Pipeline()), links_of, 100)
    assert trial.pays(resolved_of(Pipeline()), links_of, 100_000)
    assert not trial.pays(resolved_of(Pipeline(schedule="1f1b")), links_of, 100_000), "there is nothing to choose"
    assert not trial.pays(resolved_of(Pipeline(trial="never")), links_of, 100_000)
    assert trial.pays(resolved_of(Pipeline(trial="always")), links_of, 2)
    assert trial.pays(resolved_of(Pipeline(trial="always", schedule="1f1b")), links_of, 2)
    assert not trial.pays(resolved_of(Pipeline(trial="always")), links_of, 1), "one step is none to time"


def test_trials_end_when_they_have_taken_what_they_may(monkeypatch: pytest.MonkeyPatch) -> None:
    """A trial that takes longer than was thought leaves less for others; one is always tried."""
    clock = [0.0]
    monkeypatch.setattr(trial.time, "monotonic", lambda: clock[0])
    resolved = resolved_of(Pipeline())
    budget = trial.budget_of(resolved, links_of, 10_000)

    class Slow(Takes):
        def __call__(self, *args: Any) -> list[float]:
            clock[0] += 0.4 * budget.seconds
            return super().__call__(*args)

    takes = Slow({})
    decided(monkeypatch, takes, resolved, steps=10_000)
    assert len(takes.seen) == 2
    takes = Slow({})
    decided(monkeypatch, takes, resolved_of(Pipeline(trial="always")), steps=10_000)
    assert len(takes.seen) > 2


# -- what follows


def test_the_quickest_is_taken_and_the_plan_says_what_was_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    pattern = Pipeline(trial="always")
    before = resolved_of(pattern)
    names = [one.schedule for one in pattern.contenders(before.facts, 2)]
    slow = dict.fromkeys(names, 3.0) | {names[-1]: 2.0}
    after = decided(monkeypatch, Takes(slow), before)
    assert settled_in(after).schedule == names[-1]
    assert after.tried_s == 2.0
    assert after.config.measured is not None
    assert after.config.measured.pipeline == settled_in(after)
    assert after.news is not None
    assert after.news["pipeline"] == msgspec.to_builtins(settled_in(after))
    why = pattern.choices(after.facts, after.config, "shm")["schedule"]
    assert why.startswith(f"{names[-1]}")
    assert "tried before the run, a step took 2 s" in why
    step = pattern.predict(after.facts, after.config, lambda n, w: n, "shm", after.tried_s)
    simulated = pattern.predict(after.facts, after.config, lambda n, w: n, "shm")
    assert step is not None
    assert simulated is not None
    assert (step.tried_s, simulated.tried_s) == (2.0, 0.0)
    assert step.seconds == simulated.seconds, "a trial does not say where the time goes"
    assert "takes" not in simulated.advice
    assert step.advice.startswith("predicted 2 s a step; one worker alone takes 1.7 s")


def test_one_that_fails_is_left_out_and_told(monkeypatch: pytest.MonkeyPatch) -> None:
    pattern, watching = Pipeline(trial="always"), Watching()
    names = [one.schedule for one in pattern.contenders(resolved_of(pattern).facts, 2)]
    takes = Takes({names[0]: 3.0, names[1]: 1.0, names[2]: 2.0}, fails=(names[1],))
    assert settled_in(decided(monkeypatch, takes, resolved_of(pattern), watching=watching)).schedule != names[1]
    assert len(watching.warnings) == 1
    assert "left out, since its trial failed: worker 1 failed: no memory" in watching.warnings[0]
    with pytest.raises(MemberFailed, match="no memory"):
        decided(monkeypatch, Takes({}, fails=(names[0],)), resolved_of(pattern))


def test_who_is_far_from_the_best_has_no_second_round(monkeypatch: pytest.MonkeyPatch) -> None:
    pattern = Pipeline(trial="always")
    names = [one.schedule for one in pattern.contenders(resolved_of(pattern).facts, 2)]
    takes = Takes({names[0]: 1.0, names[1]: 1.05} | dict.fromkeys(names[2:], 1.5))
    decided(monkeypatch, takes, resolved_of(pattern))
    assert takes.seen == [*names, names[1], names[0]]
    takes = Takes({names[0]: 1.0} | dict.fromkeys(names[1:], 1.5))
    decided(monkeypatch, takes, resolved_of(pattern))
    assert takes.seen == names, "nobody else is left to be quicker"


def test_one_slow_round_does_not_decide(monkeypatch: pytest.MonkeyPatch) -> None:
    pattern = Pipeline(trial="always")
    names = [one.schedule for one in pattern.contenders(resolved_of(pattern).facts, 2)]
    takes = Takes(dict.fromkeys(names, 1.2) | {names[0]: 1.0, names[1]: 1.03}, odd={names[0]: 1.04})
    assert settled_in(decided(monkeypatch, takes, resolved_of(pattern))).schedule == names[0]


def test_it_is_of_pipelines() -> None:
    with pytest.raises(Incompatible, match="trial are of a pipeline"):
        Mesh(data=2, trial="always")
    with pytest.raises(ConfigError, match="always"):
        weft.run("regression", "pipeline", pattern_options={"trial": "sometimes"}, workers=2, steps=2)


# -- real members


class Blocks(Regression):
    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(6, 8), *(nn.Linear(8, 8) for _ in range(4)), nn.Linear(8, 1))


class Lazy(Blocks):
    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        time.sleep(0.01)
        return super().loss(model, batch)


@pytest.mark.multiprocess
def test_a_run_goes_by_its_trial_and_a_resume_keeps_to_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was tried is real; what it is said to take makes it the one that simulations like least."""
    run_dir, watching, real = tmp_path / "run", Watching(), trial.try_out
    tried: list[tuple[Settled, list[float]]] = []

    def try_out(resolved: Resolved, settled: Settled, *rest: Any) -> list[float]:
        tried.append((settled, real(resolved, settled, *rest)))
        return [1.0 / len(tried)]

    monkeypatch.setattr(trial, "try_out", try_out)
    task = Lazy()
    with pytest.raises(MemberFailed):
        weft.run(
            task,
            Pipeline(trial="always", microbatches=4),
            steps=6,
            save_every=2,
            faults=[kill(rank=1, step=5)],
            observer=watching,
            workers=2,
            batch=24,
            dtype="float64",
            run_dir=run_dir,
        )
    config = RunFolder(run_dir).config()
    assert config.measured is not None
    settled = config.measured.pipeline
    assert settled is not None
    assert len(tried) == len(watching.tried) >= 2
    assert all(min(seconds) > 4 * 0.01 and len(seconds) == trial.STEPS - 1 for _, seconds in tried), "as the task is"
    last = tried[-1][0]
    assert (settled.schedule, settled.items) == (last.schedule, last.items)
    assert "tried before the run" in settled.why
    called = list[Any]()
    monkeypatch.setattr(trial, "try_out", lambda *a: called.append(a))
    assert weft.resume(run_dir, task=task).steps == 6
    assert called == []
    assert RunFolder(run_dir).config().measured == config.measured


class Looks(Silent):
    plan: Any = None

    def on_plan(self, plan: Any) -> None:
        self.plan = plan


@pytest.mark.multiprocess
def test_a_plan_alone_tries_nothing_unless_asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    called = list[Any]()
    monkeypatch.setattr(trial, "try_out", lambda *a: called.append(a) or [1.0])
    monkeypatch.setattr(importlib.import_module("weft.driver.prepare"), "pays", lambda *_: True)
    cases: list[tuple[Any, int]] = [("auto", 0), ("always", 1)]
    for tries, times in cases:
        pattern = Pipeline(schedule="1f1b", trial=tries)
        config = make_config(
            Blocks(), pattern, "local", {}, {}, workers=2, steps=10_000_000, batch=24, partition="shuffle"
        )
        looks = Looks()
        with open_cluster(config, "local") as session:
            plan = explain(config, session, looks)
        assert len(called) == times
        assert any("steps of what may be quickest are tried" in note for note in plan.notes) == (tries == "auto")


@pytest.mark.multiprocess
@pytest.mark.parametrize("left", [2, 10_000_000])
def test_a_resume_goes_by_what_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, left: int) -> None:
    seen = list[int]()
    monkeypatch.setattr(
        importlib.import_module("weft.driver.prepare"), "pays", lambda resolved, links_of, steps: seen.append(steps)
    )
    task, total = Blocks(), 4 + left
    with pytest.raises(MemberFailed):
        weft.run(
            task,
            Pipeline(),
            steps=total,
            save_every=2,
            faults=[kill(rank=1, step=5)],
            workers=2,
            batch=24,
            run_dir=tmp_path / "run",
        )
    with pytest.raises(MemberFailed):
        weft.resume(tmp_path / "run", task=task, workers=3, faults=[kill(rank=1, step=6)])
    assert seen[0] == total
    assert seen[1] in (left, left + 2), "from one of its checkpoints"


class Raises(Blocks):
    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        self.calls = getattr(self, "calls", 0) + 1
        if self.calls > 40:  # not in the preflight, and before a trial ends
            raise RuntimeError("enough of this")
        return super().loss(model, batch)


@pytest.mark.multiprocess
def test_what_fails_in_a_trial_is_told_before_the_run(tmp_path: Path) -> None:
    pattern = Pipeline(trial="always", schedule="1f1b", microbatches=12)
    with pytest.raises(MemberFailed, match="in a trial of") as caught:
        weft.run(Raises(), pattern, workers=2, steps=9, batch=24, run_dir=tmp_path / "run")
    assert "enough of this" in str(caught.value)
    assert "trial=never" in str(caught.value)
    assert not (tmp_path / "run").exists()
