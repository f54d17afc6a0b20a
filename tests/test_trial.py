"""Before a long run what may be quickest is tried: which few, when, what follows of it, and that a run goes by it, once."""

from __future__ import annotations

import importlib
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest
from tests.laws.reference import Regression
from tests.patterns.predicted import facts_of
from torch import Tensor, nn

import weft
from weft import Mesh, Pipeline
from weft.clusters.base import LinkSpec
from weft.compare import final_parameters
from weft.config import Config, Measured, RunFolder, Settled, TaskRef
from weft.driver import trial
from weft.driver.probe import Resolved
from weft.errors import ConfigError, Incompatible, MemberFailed
from weft.events import Event
from weft.patterns.base import Facts
from weft.patterns.pipelined import MOST, WITHIN, Known, _rank, contenders
from weft.pipelines.choose import TIE
from weft.report.observers import Silent
from weft.testing import kill


class Watching(Silent):
    def __init__(self) -> None:
        self.tried: list[str] = []

    def on_event(self, event: Event) -> None:
        if event.kind == "trying":
            self.tried.append(event.values["text"].removeprefix("trying ").partition(":")[0])


def resolved_of(pattern: Pipeline, facts: Facts | None = None) -> Resolved:
    facts = pattern.settle(facts or facts_of(microbatches=8), 2, None)
    assert facts.pipeline is not None
    measured = Measured(world=2, carrier="shm", pipeline=facts.pipeline.settled)
    config = Config(task=TaskRef("none"), pattern="pipeline", workers=2, batch=24, measured=measured)
    return Resolved(config, facts, pattern, None)


def links_of(pattern: Any, facts: Facts) -> list[LinkSpec]:
    return [LinkSpec("shm", 2, 60.0)]


class Takes:
    """Stands for a trial: seconds of a step, by schedule; each has them ``odd`` times as long in the first round."""

    def __init__(self, seconds: dict[str, float], odd: dict[str, float] | None = None) -> None:
        self.seconds, self.odd, self.seen = seconds, odd or {}, list[str]()

    def __call__(self, resolved: Resolved, settled: Settled, *_: Any) -> list[float]:
        first = settled.schedule not in self.seen
        self.seen.append(settled.schedule)
        value = self.seconds.get(settled.schedule, 1.0)
        return [value * self.odd.get(settled.schedule, 1.0) if first else value] * 3


def decided(monkeypatch: pytest.MonkeyPatch, takes: Takes, resolved: Resolved, steps: int = 1000) -> Resolved:
    monkeypatch.setattr(trial, "try_out", takes)
    return trial.decide(resolved, links_of, steps, None, Watching())  # type: ignore[arg-type]


def settled_in(resolved: Resolved) -> Settled:
    assert resolved.facts.pipeline is not None
    assert resolved.facts.pipeline.settled is not None
    return resolved.facts.pipeline.settled


# -- which, and when


def test_contenders_are_the_quickest_by_prediction_and_the_simplest_of_them() -> None:
    pattern, facts = Pipeline(), facts_of(microbatches=8)
    ranked = _rank(Known(facts, pattern.pipelined), pattern.pipelined, 2)
    found = pattern.contenders(facts, 2)
    assert 1 < len(found) <= MOST
    settled = pattern.settle(facts, 2, None).pipeline
    assert settled is not None
    assert settled.settled is not None
    assert (found[0].schedule, found[0].items) == (settled.settled.schedule, settled.settled.items)
    step_s = {(one.schedule.name, one.stages_per_rank): one.step_s for one in ranked}
    near = [step_s[one.schedule, one.stages_per_worker] for one in found]
    assert max(near) <= (1 + TIE) * (1 + WITHIN) * min(near)
    simplest = min((one for one in ranked if one.step_s <= (1 + WITHIN) * near[0]), key=lambda one: one.simplicity)
    assert simplest.schedule.name in [one.schedule for one in found]
    assert {one.of for one in found} == {pattern.settles(facts, 2)}


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


def test_nothing_is_tried_before_a_short_run(monkeypatch: pytest.MonkeyPatch) -> None:
    resolved, takes = resolved_of(Pipeline()), Takes({})
    assert decided(monkeypatch, takes, resolved, steps=100) is resolved
    assert takes.seen == []
    decided(monkeypatch, takes, resolved, steps=100_000)
    assert takes.seen


def test_always_is_always(monkeypatch: pytest.MonkeyPatch) -> None:
    takes = Takes({})
    decided(monkeypatch, takes, resolved_of(Pipeline(trial="always")), steps=2)
    assert takes.seen
    before = resolved_of(Pipeline(trial="always"))
    assert decided(monkeypatch, Takes({}), before, steps=1) is before, "one step is none to time"


# -- what follows


def test_the_quickest_is_taken_and_the_plan_says_what_was_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    pattern = Pipeline(trial="always")
    before = resolved_of(pattern)
    names = [one.schedule for one in pattern.contenders(before.facts, 2)]
    slow = dict.fromkeys(names, 3.0) | {names[-1]: 2.0}
    after = decided(monkeypatch, Takes(slow), before)
    assert settled_in(after).schedule == names[-1]
    assert settled_in(after).tried_s == 2.0
    assert after.config.measured is not None
    assert after.config.measured.pipeline == settled_in(after)
    assert after.news is not None
    assert after.news["pipeline"] == msgspec.to_builtins(settled_in(after))
    why = pattern.choices(after.facts, after.config, "shm")["schedule"]
    assert why.startswith(f"{names[-1]}")
    assert "tried before the run, a step takes 2 s" in why
    step, simulated = (pattern.predict(one.facts, one.config, lambda n, w: n, "shm") for one in (after, before))
    assert step is not None
    assert simulated is not None
    assert step.whole_s == pytest.approx(2.0)
    assert 0 < step.simulated_s != step.whole_s
    assert simulated.simulated_s == 0.0


def test_who_is_far_from_the_best_has_no_second_round(monkeypatch: pytest.MonkeyPatch) -> None:
    pattern = Pipeline(trial="always")
    names = [one.schedule for one in pattern.contenders(resolved_of(pattern).facts, 2)]
    takes = Takes({names[0]: 1.0, names[1]: 1.05} | dict.fromkeys(names[2:], 1.5))
    decided(monkeypatch, takes, resolved_of(pattern))
    assert takes.seen == [*names, names[1], names[0]]


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
    run_dir, watching = tmp_path / "run", Watching()
    settings: dict[str, Any] = {"workers": 2, "batch": 24, "dtype": "float64", "run_dir": run_dir}
    task = Lazy()
    with pytest.raises(MemberFailed):
        weft.run(
            task,
            Pipeline(trial="always"),
            steps=6,
            save_every=2,
            faults=[kill(rank=1, step=5)],
            observer=watching,
            **settings,
        )
    config = RunFolder(run_dir).config()
    assert config.measured is not None
    settled = config.measured.pipeline
    assert settled is not None
    assert settled.tried_s > 8 * 0.01, "each micro-batch runs the task's code"
    assert len(watching.tried) >= 2
    assert settled.schedule in " ".join(watching.tried)
    called = list[Any]()
    monkeypatch.setattr(importlib.import_module("weft.driver.trial"), "try_out", lambda *a: called.append(a))
    assert weft.resume(run_dir, task=task).steps == 6
    assert called == []
    assert RunFolder(run_dir).config().measured == config.measured


@pytest.mark.multiprocess
def test_a_trial_trains_nothing(tmp_path: Path) -> None:
    """The same parameters as without."""
    found = []
    for name, options in (("with", {"trial": "always"}), ("without", {"trial": "never"})):
        pattern = Pipeline(schedule="1f1b", **options)
        weft.run(
            Blocks(), pattern, workers=2, steps=3, batch=24, dtype="float64", save_every=0, run_dir=tmp_path / name
        )
        found.append(final_parameters(tmp_path / name))
    assert all((found[0][name] == found[1][name]).all() for name in found[1])


class Raises(Blocks):
    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        if (getattr(self, "calls", 0)) > 40:
            raise RuntimeError("enough of this")
        self.calls = getattr(self, "calls", 0) + 1
        return super().loss(model, batch)


@pytest.mark.multiprocess
def test_what_fails_in_a_trial_is_told_before_the_run(tmp_path: Path) -> None:
    with pytest.raises(MemberFailed, match="in a trial of") as caught:
        weft.run(
            Raises(),
            Pipeline(trial="always", schedule="1f1b", microbatches=12),
            workers=2,
            steps=9,
            batch=24,
            run_dir=tmp_path / "run",
        )
    assert "enough of this" in str(caught.value)
    assert not (tmp_path / "run").exists()
