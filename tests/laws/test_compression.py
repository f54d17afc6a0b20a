"""Compressed runs: the same as uncompressed where nothing is left out, resumed bit for bit, bytes as planned."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.laws.reference import Odd, Regression, distance, train_apart, train_plainly
from tests.laws.test_allreduce import EQUAL, train
from tests.variants import rest_slow
from torch import Tensor, nn, optim
from torch.optim import lr_scheduler

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


class Cycled(Regression):
    """Under a schedule, by name, of the rate and, but for the first, of the momentum too."""

    def __init__(self, schedule: str, optimizer: str = "sgd") -> None:
        super().__init__(optimizer)
        self.name = schedule

    def schedule(self, optimizer: torch.optim.Optimizer, total_steps: int) -> Any:
        match self.name:
            case "cosine":
                return lr_scheduler.CosineAnnealingLR(optimizer, total_steps)
            case "one cycle":
                return lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=total_steps)
            case "one cycle of the rate":
                return lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=total_steps, cycle_momentum=False)
            case "cyclic":
                return lr_scheduler.CyclicLR(optimizer, 0.01, 0.1, step_size_up=4)
            case "written as it was":
                return lr_scheduler.CyclicLR(optimizer, 0.01, 0.1, step_size_up=4, base_momentum=0.9, max_momentum=0.9)
            case "late":
                return Late(optimizer, lambda step: 1.0)
        raise AssertionError(self.name)


class Late(lr_scheduler.LambdaLR):
    """It sets the momentum once the optimizer has stepped: no schedule that is stepped alone shows it."""

    def step(self, epoch: int | None = None) -> None:
        super().step(epoch)
        if self.optimizer.state:
            self.optimizer.param_groups[0]["betas"] = (0.9, 0.999)


ALL_SENT = "topk:0.999999:full"  # of so few values all; the momentum is taken before it, as before a smaller ratio


@pytest.mark.usefixtures("everything_is_large")
@pytest.mark.parametrize(
    ("schedule", "taken"),
    [
        ("cosine", True),
        ("one cycle of the rate", True),
        ("one cycle", False),
        ("cyclic", False),
        ("written as it was", False),
    ],
)
@pytest.mark.parametrize("compress", [ALL_SENT, "randomk:0.999999"])
def test_momentum_is_applied_once_whatever_the_schedule(
    tmp_path: Path, schedule: str, taken: bool, compress: str
) -> None:
    truth = train_plainly(Cycled(schedule), steps=STEPS, batch=24, run_seed=3)
    pattern = AllReduce(compress=compress)
    got = train(tmp_path, Cycled(schedule), 2, pattern=pattern, batch=24, steps=STEPS)
    assert distance(got, truth) <= EQUAL
    plan = (tmp_path / "run" / "plan.json").read_text()
    assert ("momentum of 0.9 is taken before" in plan) == taken
    assert ("sets it during the run" in plan) != taken


@pytest.mark.usefixtures("everything_is_large")
def test_a_momentum_that_comes_back_all_the_same_ends_the_run(tmp_path: Path) -> None:
    with pytest.raises(MemberFailed, match="AdamW is taken before the codec, and the task set it to 0.9 again"):
        train(tmp_path, Cycled("late", "adamw"), 2, pattern=AllReduce(compress=ALL_SENT), batch=24, steps=STEPS)


@pytest.mark.usefixtures("everything_is_large")
@pytest.mark.parametrize("compress", [ALL_SENT, "topk:1:full", "blocks:0.999999"])
def test_clipping_bounds_the_gradient_and_not_the_momentum(tmp_path: Path, compress: str) -> None:
    truth = train_plainly(Regression(), steps=STEPS, batch=24, run_seed=3, clip=0.05)
    pattern = AllReduce(compress=compress, clip_norm=0.05)
    got = train(tmp_path, Regression(), 2, pattern=pattern, batch=24, steps=STEPS)
    assert distance(got, truth) <= EQUAL
    noted = "clip_norm bounds gradients" in (tmp_path / "run" / "plan.json").read_text()
    assert noted == (compress != "topk:1:full")


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


class Scaled(Regression):
    """Its loss times a number, in which Adam's steps do not change."""

    def __init__(self, scale: float, strange: bool = False) -> None:
        self.scale, self.strange = scale, strange

    def optimizer(self, params: Any) -> optim.Optimizer:
        return optim.AdamW(params, lr=0.01, eps=1e-30)

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        loss = super().loss(model, batch) * self.scale
        if self.strange and threading.current_thread().name.endswith("1"):
            loss = loss + (model[0].weight * 0).sqrt().sum() * 0
        return loss


@pytest.mark.usefixtures("everything_is_large")
@pytest.mark.parametrize("compress", ["topk:0.1", "dgc:0.1", "int8", "bf16"])
def test_the_size_of_gradients_does_not_matter(tmp_path: Path, compress: str) -> None:
    pattern = AllReduce(compress=compress)
    runs = [
        train(tmp_path, Scaled(scale), 2, pattern=pattern, run_dir=tmp_path / f"{scale}", dtype="float32")
        for scale in (1.0, 2.0**-33, 2.0**33)
    ]
    assert all(distance(run, runs[0]) <= 1e-5 for run in runs)


@pytest.mark.usefixtures("everything_is_large")
@pytest.mark.parametrize(
    ("strange", "says"), [(False, "compress=fp16 overflows beyond 65504: use bf16 or int8"), (True, "Look for sqrt")]
)
def test_an_overflow_on_the_wire_is_told_from_one_in_the_task(tmp_path: Path, strange: bool, says: str) -> None:
    with pytest.raises(MemberFailed, match=says):
        train(tmp_path, Scaled(1.0 if strange else 1e7, strange), 2, pattern=AllReduce(compress="fp16"))


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


@pytest.mark.parametrize(
    ("compress", "clip_norm", "copies"),
    [("topk:0.1", None, 2), ("topk:0.1", 1.0, 1), ("int8", None, 1), ("bf16", None, 0)],
)
def test_the_plan_counts_what_is_kept(tmp_path: Path, compress: str, clip_norm: float | None, copies: int) -> None:
    """The residual and the momentum of the large tensors: the arena's own, by its buffers."""
    held: list[Any] = []

    class Watched(compression.CompressedArena):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            held.append(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compression, "CompressedArena", Watched)
        pattern = AllReduce(compress=compress, clip_norm=clip_norm)
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


class By(Regression):
    def __init__(self, optimizer: Any, **options: Any) -> None:
        self.make, self.options = optimizer, options

    def optimizer(self, params: Any) -> torch.optim.Optimizer:
        return self.make(params, lr=0.01, **self.options)


DGC = {"compress": "dgc:0.1"}


@pytest.mark.parametrize(
    ("task", "pattern", "options", "kind", "says"),
    [
        (By(optim.SGD), "allreduce", DGC, Incompatible, "SGD has none that could be: it is 0"),
        (By(optim.SGD, momentum=0.9, nesterov=True), "allreduce", DGC, Incompatible, "its nesterov, dampening or"),
        (By(optim.Adam, weight_decay=0.1), "allreduce", DGC, Incompatible, "its weight_decay goes into the momentum"),
        (By(optim.RMSprop), "allreduce", DGC, Incompatible, "RMSprop has none that could be: it is none of"),
        (Odd(), "allreduce", DGC, Incompatible, "some gradients are sparse"),
        (Cycled("one cycle", "adamw"), "allreduce", DGC, Incompatible, "OneCycleLR sets it during the run"),
        (Regression(), "allreduce", DGC | {"clip_norm": 1.0}, Incompatible, "clip_norm bounds gradients"),
        (Regression(), "localsgd", {"compress": "dgc:0.1"}, Incompatible, "a meeting exchanges parameters"),
        (Regression(), "localsgd", {"compress": "powersgd:4:0.1"}, Incompatible, "nothing warms up for meetings"),
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
