"""Compressed runs: the same as uncompressed where nothing is left out, resumed bit for bit, bytes as planned."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.laws.reference import Odd, Regression, distance, train_apart, train_plainly
from tests.laws.test_allreduce import EQUAL, train
from tests.variants import rest_slow
from torch import Tensor, nn

import weft
from weft import AllReduce, LocalSGD
from weft.codecs import spec
from weft.compare import final_parameters
from weft.config import Config, TaskRef
from weft.errors import ConfigError, Incompatible, MemberFailed, UnknownName
from weft.events import read_events
from weft.patterns import compression
from weft.patterns.preflight import preflight
from weft.resilience import checkpoint
from weft.tasks.digits import DigitsMLP
from weft.testing import kill

STEPS = 12
#: these leave nothing out, at full rate or full rank
LOSSLESS = ["topk:1:full", "randomk:1", "blocks:1", "powersgd:64"]
BIASED = ["int8", "sign", "topk:0.05", "dgc:0.05", "randomk:0.25", "blocks:0.5", "powersgd:2"]


@pytest.fixture
def everything_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spec, "MIN_NUMEL", 2)


def parameters(result_dir: Path) -> dict[str, Tensor]:
    return final_parameters(result_dir)


# -- where nothing is left out


@pytest.mark.usefixtures("everything_is_large")
@pytest.mark.parametrize("workers", [1, 2, 3, 4])
@pytest.mark.parametrize("compress", LOSSLESS)
@pytest.mark.parametrize("make", [lambda: Regression("adamw"), Odd], ids=["adamw", "odd"])
def test_at_full_rate_it_is_the_joined_batch(tmp_path: Path, make: Any, compress: str, workers: int) -> None:
    truth = train_plainly(make(), steps=STEPS, batch=24, run_seed=3)
    got = train(tmp_path, make(), workers, pattern=AllReduce(compress=compress), batch=24, steps=STEPS)
    assert distance(got, truth) <= EQUAL


@pytest.mark.usefixtures("everything_is_large")
@pytest.mark.parametrize("compress", LOSSLESS)
@pytest.mark.parametrize(("workers", "island"), [(3, 1), (4, 2)])
def test_at_full_rate_meetings_are_their_definition(tmp_path: Path, compress: str, workers: int, island: int) -> None:
    truth = train_apart(Odd(), workers=workers, every=4, steps=STEPS, batch=17, island=island, run_seed=3)
    pattern = LocalSGD(every=4, island=island, compress=compress)
    assert distance(train(tmp_path, Odd(), workers, pattern=pattern, batch=17, steps=STEPS), truth) <= EQUAL


# -- where something is


@pytest.mark.usefixtures("everything_is_large")
@pytest.mark.parametrize("compress", [*BIASED, "bf16", "qsgd:7"])
def test_every_codec_changes_the_result_and_still_learns(tmp_path: Path, compress: str) -> None:
    plain = weft.run(Regression(), cluster="inprocess", workers=3, steps=60, run_dir=tmp_path / "plain")
    got = weft.run(
        Regression(), AllReduce(compress=compress), "inprocess", workers=3, steps=60, run_dir=tmp_path / "run"
    )
    a, b = final_parameters(plain.run_dir), final_parameters(got.run_dir)
    assert any(not torch.equal(a[n], b[n]) for n in a)
    assert got.loss < 1.0, "the variance of the targets is about 1"


class Unused(Regression):
    """Its second branch is used in every fourth step only, by nobody in the others."""

    def model(self) -> nn.Module:
        model = super().model()
        model.other = nn.Linear(6, 16)
        model.calls = 0
        return model

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        model.calls += 1
        loss = super().loss(model[:3], batch)
        return loss + model.other(batch[0]).pow(2).mean() if model.calls % 4 == 0 else loss


@pytest.mark.usefixtures("everything_is_large")
def test_what_comes_for_a_parameter_that_nobody_used_is_not_lost(tmp_path: Path) -> None:
    """Its gradient waits in the residual; in a step without it, what is sent of it must come back."""
    held: list[Any] = []

    class Watched(compression.CompressedArena):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.given = self.came = 0.0
            held.append(self)

        def all_reduce(self, *args: Any) -> None:
            self.given += float(self.views["other.weight"].sum())
            super().all_reduce(*args)
            self.joined = float(self.views["other.weight"].sum())
            self.came += self.joined

        def take_back(self, names: Any) -> None:
            names = list(names)
            super().take_back(names)
            if "other.weight" in names:
                self.came -= self.joined

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compression, "CompressedArena", Watched)
        train(tmp_path, Unused("plain"), 2, pattern=AllReduce(compress="topk:0.1:full"), batch=24, steps=STEPS)
    waits = sum(float(a.own_state()["0"]["residual"]["other.weight"].sum()) for a in held)
    assert held[0].came == pytest.approx(held[1].came)
    assert held[0].came + waits == pytest.approx(sum(a.given for a in held), abs=1e-12)
    assert abs(waits) > 1e-6


# -- state


@pytest.mark.multiprocess
@pytest.mark.parametrize(
    ("pattern", "workers"),
    [
        pytest.param(AllReduce(compress="topk:0.01"), 2, id="topk"),
        pytest.param(AllReduce(compress="powersgd:2"), 3, id="powersgd", marks=pytest.mark.slow),
        pytest.param(LocalSGD(every=4, compress="sign"), 2, id="localsgd", marks=pytest.mark.slow),
    ],
)
def test_a_killed_run_comes_back_bit_for_bit(tmp_path: Path, pattern: weft.Pattern, workers: int) -> None:
    settings: dict[str, Any] = {"workers": workers, "steps": 24, "batch": 60, "save_every": 8}
    calm = weft.run("digits-mlp", pattern, run_dir=tmp_path / "calm", **settings)
    faults = [kill(rank=1, step=19)]
    shaken = weft.run("digits-mlp", pattern, run_dir=tmp_path / "shaken", restarts=1, faults=faults, **settings)
    assert "restarted" in [e.kind for e in read_events(tmp_path / "shaken" / "events.jsonl")]
    a, b = parameters(calm.run_dir), parameters(shaken.run_dir)
    assert all(torch.equal(a[n], b[n]) for n in a)


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize(("before", "after"), [(3, 2), (3, 1), (1, 3)])
def test_another_world_goes_on_with_what_was_left(tmp_path: Path, before: int, after: int) -> None:
    """The momentum is the codec's where there is somebody to send to, and else the optimizer's."""
    pattern = AllReduce(compress="topk:0.01")
    settings: dict[str, Any] = {
        "workers": before,
        "steps": 24,
        "batch": 60,
        "save_every": 8,
        "run_dir": tmp_path / "run",
    }
    with pytest.raises(MemberFailed):
        weft.run("digits-mlp", pattern, faults=[kill(rank=before - 1, step=19)], **settings)
    result = weft.resume(tmp_path / "run", workers=after)
    assert (result.steps, result.world) == (24, after)
    found, _ = checkpoint.newest_good(tmp_path / "run" / "checkpoints")
    assert found is not None
    (group,) = found.parts["worker-0"]["optimizer"]["param_groups"]
    assert group["momentum"] == (0.9 if after == 1 else 0.0)


def test_what_was_left_is_shared_out_whole() -> None:
    states = [{"0": {"residual": {"w": torch.full((2,), float(r))}}} for r in range(3)]
    shared = compression.shared_out(states, 2)
    assert torch.equal(2 * shared["0"]["residual"]["w"], torch.full((2,), 3.0))


# -- bytes


@pytest.mark.multiprocess
@pytest.mark.parametrize(
    ("compress", "link"),
    rest_slow(
        [
            ("topk:0.01", "shm"),
            ("powersgd:2", "tcp"),
            ("int8", "gloo"),
            ("sign", "tcp"),
            ("blocks:0.1", "shm"),
            ("bf16", "gloo"),
        ],
        2,
    ),
)
def test_counted_bytes_are_the_planned_ones(tmp_path: Path, compress: str, link: str) -> None:
    run_dir = tmp_path / "run"
    pattern = AllReduce(compress=compress)
    result = weft.run("digits-mlp", pattern, workers=3, steps=6, link=link, run_dir=run_dir)
    plan = json.loads((run_dir / "plan.json").read_text())
    assert result.bytes_sent == pytest.approx(18 * plan["links"][0]["bytes_per_step"], rel=0.03)
    assert compress in plan["links"][0]["what"]


def test_counted_bytes_of_meetings_are_the_planned_ones(tmp_path: Path) -> None:
    pattern = LocalSGD(every=3, compress="topk:0.01")
    result = weft.run("digits-mlp", pattern, "inprocess", workers=3, steps=9, batch=30, run_dir=tmp_path / "run")
    plan = json.loads((tmp_path / "run" / "plan.json").read_text())
    assert result.bytes_sent == pytest.approx(27 * plan["links"][0]["bytes_per_step"], rel=0.05)


@pytest.mark.parametrize(("compress", "copies"), [("topk:0.1", 2), ("int8", 1), ("bf16", 0)])
def test_the_plan_counts_what_is_kept(tmp_path: Path, compress: str, copies: int) -> None:
    """The residual and the momentum of the large tensors: the arena's own, by its buffers."""
    held: list[Any] = []

    class Watched(compression.CompressedArena):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            held.append(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compression, "CompressedArena", Watched)
        pattern = AllReduce(compress=compress)
        weft.run("digits-mlp", pattern, "inprocess", workers=2, steps=2, run_dir=tmp_path / "run")
    state = held[0].own_state()["0"]
    kept = sum(t.nbytes for tensors in state.values() for t in tensors.values())
    plan = json.loads((tmp_path / "run" / "plan.json").read_text())
    assert plan["members"][0]["memory"]["error feedback"] == kept == copies * held[0].buffers[0].nbytes


def test_the_plan_says_where_there_is_nothing_to_compress(tmp_path: Path) -> None:
    weft.run(Regression(), AllReduce(compress="int8"), "inprocess", workers=2, steps=2, run_dir=tmp_path / "small")
    assert "no tensor of this model is large enough" in (tmp_path / "small" / "plan.json").read_text()
    weft.run("digits-mlp", AllReduce(compress="int8"), "inprocess", workers=1, steps=2, run_dir=tmp_path / "alone")
    assert "nothing is compressed" in (tmp_path / "alone" / "plan.json").read_text()


@pytest.mark.parametrize("pattern", [AllReduce, LocalSGD])
@pytest.mark.parametrize(
    ("compress", "saves"),
    [(c, False) for c in (*LOSSLESS, "topk:1", "powersgd:1000000000")] + [(c, True) for c in (*BIASED[:2], "topk:0.5")],
)
def test_the_plan_says_where_nothing_is_saved(compress: str, saves: bool, pattern: Any) -> None:
    task, made = DigitsMLP(), pattern(compress=compress)
    config = Config(task=TaskRef("none"), pattern=made.name, workers=2, batch=24, steps=40)
    notes = made.notes(preflight(task, made, config), config)
    assert any("leave it out, or ask for less" in note for note in notes) != saves


# -- refusals


class MomentumFree(Regression):
    def optimizer(self, params: Any) -> torch.optim.Optimizer:
        return torch.optim.RMSprop(params)


@pytest.mark.parametrize(
    ("task", "pattern", "options", "kind", "says"),
    [
        (Regression("plain"), "allreduce", {"compress": "dgc:0.1"}, Incompatible, "SGD has none that could be"),
        (MomentumFree(), "allreduce", {"compress": "dgc:0.1"}, Incompatible, "RMSprop has none that could be"),
        (Regression(), "localsgd", {"compress": "dgc:0.1"}, Incompatible, "a meeting exchanges parameters"),
        (Regression(), "localsgd", {"within": {"compress": "int8"}}, Incompatible, "compress=int8"),
        (Regression(), "allreduce", {"compress": "topkk:1"}, UnknownName, "Did you mean 'topk'"),
        (Regression(), "allreduce", {"compress": "topk"}, ConfigError, "write topk:RATIO"),
    ],
)
def test_what_would_lose_the_guarantee_is_refused(
    tmp_path: Path, task: weft.Task, pattern: str, options: dict[str, Any], kind: type, says: str
) -> None:
    with pytest.raises(kind, match=says):
        weft.run(task, pattern, "inprocess", pattern_options=options, workers=2, run_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()
