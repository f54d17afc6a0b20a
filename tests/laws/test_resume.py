"""A run saved under one layout goes on under any other as if it had never stopped, and its model leaves for plain torch."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, load_model
from tests.laws.reference import Regression, distance, seed, train_apart, train_plainly
from torch import Tensor, nn

import weft
from weft import AllReduce, LocalSGD, Mesh, Outer, ParameterServer, Pipeline, Sharded
from weft.codecs import spec
from weft.compare import diff_runs, final_parameters
from weft.config import RunFolder
from weft.data.keys import key_int
from weft.data.sampler import Sampler
from weft.driver.prepare import memory_shortage
from weft.errors import ConfigError, Incompatible, MemberFailed, UnknownName
from weft.events import read_events
from weft.patterns import registry
from weft.patterns.base import Pattern
from weft.report.html import write_report
from weft.testing import raise_error

EQUAL = 1e-9
SLOWMO = Outer.presets["slowmo"]
STEPS, SAVED = 8, 4  # within an epoch's whole batches, of which each worker has the same share
JOB: dict[str, Any] = {
    "dtype": "float64",
    "batch": 24,
    "steps": STEPS,
    "seed": 3,
    "save_every": SAVED,
    "eval_every": SAVED,
    "cluster": "local",
}

#: Name -> pattern, workers. A new pattern that equals one process on the joined batch: one line.
LAYOUTS: dict[str, tuple[Pattern, int]] = {
    "one": (AllReduce(), 1),
    "allreduce-3": (AllReduce(shared_step="off"), 3),
    "sharded-2": (Sharded(), 2),
    "sharded-4": (Sharded(replicas=2), 4),
    "tensor-2": (weft.Tensor(), 2),
    "pipeline-2": (Pipeline(), 2),
    "data x tensor": (Mesh(data=2, tensor=2), 4),
    "data x pipeline": (Mesh(data=2, pipeline=2), 4),
    "sharded x tensor": (Mesh(sharded=2, tensor=2), 4),
    "ps-3": (ParameterServer(servers=2), 3),
}
#: Some more, each of which hands over to the next. The last two equal one process if its optimizer is linear in the gradients, as SGD is.
MORE: dict[str, tuple[Pattern, int]] = {
    "allreduce-2": (AllReduce(), 2),
    "clipped-2": (AllReduce(clip_norm=1e6), 2),
    "localsgd-2": (LocalSGD(every=1), 2),
    "islands-4": (LocalSGD(every=1, island=2), 4),
}
ALL = LAYOUTS | MORE
CORE = [
    ("allreduce-2", "sharded-4"),
    ("sharded-4", "localsgd-2"),
    ("islands-4", "allreduce-3"),
    ("pipeline-2", "data x tensor"),
    ("ps-3", "allreduce-2"),
    ("sharded-2", "ps-3"),
]


def ring(names: Iterable[str]) -> list[tuple[str, str]]:
    each = list(names)
    return list(zip(each, [*each[1:], each[0]], strict=True))


def pairs(every: Iterable[tuple[str, str]], core: list[tuple[str, str]]) -> list[Any]:
    of = dict.fromkeys([*core, *every])
    return [p if p in core else pytest.param(*p, marks=pytest.mark.slow) for p in of]


EVERY = [*((a, b) for a in LAYOUTS for b in LAYOUTS if a != b), *ring([*MORE, "one"])]


def firsts(names: Iterable[str], core: Collection[str]) -> list[Any]:
    return [name if name in core else pytest.param(name, marks=pytest.mark.slow) for name in names]


class Split(Regression):
    """Blocks, some of odd sizes, one frozen; outside them a parameter and a weight that has two names."""

    def model(self) -> nn.Module:
        return SplitNet()

    def tensor_plan(self, model: nn.Module) -> dict[str, str]:
        return {"layers.0": "column", "layers.1": "row"}


class SplitNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(6))
        self.first, self.last = nn.Linear(6, 6), nn.Linear(6, 6)
        self.last.weight = self.first.weight
        self.layers = nn.ModuleList([nn.Linear(6, 8), nn.Linear(8, 5), nn.Linear(5, 5), nn.Linear(5, 6)])
        self.layers[2].requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x * self.scale))
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return self.last(x).sum(1, keepdim=True)


Stopped = Callable[[str, str], Path]


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Stopped:
    """(layout, optimizer) -> a copy of the folder of a run that was saved at SAVED, and failed after it."""
    made: dict[tuple[str, str], Path] = {}

    def make(layout: str, optimizer: str) -> Path:
        root = tmp_path_factory.mktemp("stopped")
        if (layout, optimizer) not in made:
            made[layout, optimizer] = root / "made"
            stop(root / "made", *ALL[layout], Split(optimizer))
        shutil.copytree(made[layout, optimizer], root / "run")
        return root / "run"

    return make


def stop(run_dir: Path, pattern: Pattern, workers: int, task: weft.Task, at: int = SAVED + 2, **settings: Any) -> None:
    fault = raise_error(rank=0, step=at)
    with pytest.raises(MemberFailed, match="raised as"):
        weft.run(task, pattern, workers=workers, run_dir=run_dir, faults=[fault], **JOB | settings)
    assert len(list((run_dir / "checkpoints").iterdir())) == 1


def notes_of(run_dir: Path) -> str:
    return "".join(f"{note}\n" for note in json.loads((run_dir / "plan.json").read_text())["notes"])


# -- any to any


@pytest.mark.multiprocess
@pytest.mark.parametrize(("before", "after"), pairs(EVERY, CORE))
def test_another_layout_goes_on_as_if_undisturbed(stopped: Stopped, before: str, after: str) -> None:
    run_dir = stopped(before, "sgd")
    pattern, workers = ALL[after]
    result = weft.resume(run_dir, task=Split(), pattern=pattern, workers=workers)
    assert (result.steps, result.world) == (STEPS, workers)
    truth = train_plainly(Split(), steps=STEPS, batch=24, run_seed=3)
    assert distance(final_parameters(run_dir), truth) <= EQUAL
    assert RunFolder(run_dir).config().pattern == pattern.name


@pytest.mark.multiprocess
@pytest.mark.parametrize(("before", "after"), pairs(ring(LAYOUTS), [("sharded-4", "allreduce-2")]))
def test_another_layout_goes_on_as_if_undisturbed_with_adamw(stopped: Stopped, before: str, after: str) -> None:
    run_dir = stopped(before, "adamw")
    pattern, workers = ALL[after]
    weft.resume(run_dir, task=Split("adamw"), pattern=pattern, workers=workers)
    truth = train_plainly(Split("adamw"), steps=STEPS, batch=24, run_seed=3)
    assert distance(final_parameters(run_dir), truth) <= EQUAL


# -- what only one pattern has: on threads, which no split model can use


@pytest.fixture
def everything_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spec, "MIN_NUMEL", 2)


#: Of so few values all are sent, and nothing waits; the momentum is taken before it all the same.
ALL_SENT = AllReduce(compress="topk:0.999999:full")
INPROCESS: dict[str, Any] = {"cluster": "inprocess"}


def train_with_momentum_before(taken: Collection[int]) -> dict[str, Tensor]:
    """AdamW in one process, whose running mean of the gradients is taken before it in these steps: their squares are then of that."""
    task = Regression("adamw")
    seed(key_int(JOB["seed"], "data"))
    train, _ = task.data()
    seed(key_int(JOB["seed"], "init"))
    model = task.model().double()
    params = list(model.parameters())
    optimizer = task.optimizer(params)
    schedule = task.schedule(optimizer, STEPS)
    sampler = Sampler(len(train), JOB["batch"], 0, 1, JOB["seed"])
    means = [torch.zeros_like(p) for p in params]
    for step in range(1, STEPS + 1):
        batch = [
            torch.stack(each).double() for each in zip(*(train[int(i)] for i in sampler.next().indices), strict=True)
        ]
        optimizer.zero_grad()
        task.loss(model, batch).backward()
        for p, mean in zip(params, means, strict=True):
            mean.lerp_(p.grad, 0.1)
            if step in taken:
                p.grad.copy_(mean / (1 - 0.9**step))
            elif step - 1 in taken:
                optimizer.state[p]["exp_avg"].copy_((mean - 0.1 * p.grad) / 0.9)
        optimizer.param_groups[0]["betas"] = (0.0 if step in taken else 0.9, 0.999)
        optimizer.step()
        schedule.step()
    return {n: t.detach() for n, t in model.state_dict().items()}


def truth_of(optimizer: str, taken: Collection[int]) -> dict[str, Tensor]:
    """SGD does not care where its momentum is taken."""
    if optimizer == "adamw":
        return train_with_momentum_before(taken)
    return train_plainly(Regression(optimizer), steps=STEPS, batch=24, run_seed=3)


@pytest.mark.usefixtures("everything_is_large")
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize(
    ("before", "after"),
    [
        ((ALL_SENT, 2), (AllReduce(), 2)),
        ((ALL_SENT, 3), (AllReduce(clip_norm=1e6, compress="topk:1:full"), 2)),
        ((ALL_SENT, 3), (ALL_SENT, 1)),
        ((ALL_SENT, 2), (AllReduce(compress="randomk:0.999999"), 3)),
        ((AllReduce(), 2), (ALL_SENT, 2)),
        ((ALL_SENT, 1), (ALL_SENT, 3)),
        ((ALL_SENT, 2), (ALL_SENT, 3)),
    ],
)
def test_momentum_goes_back_to_the_optimizer_and_comes_from_it(
    tmp_path: Path, optimizer: str, before: tuple[Pattern, int], after: tuple[Pattern, int]
) -> None:
    stop(tmp_path / "run", *before, Regression(optimizer), **INPROCESS)
    weft.resume(tmp_path / "run", task=Regression(optimizer), pattern=after[0], workers=after[1])
    halves = [range(1, SAVED + 1), range(SAVED + 1, STEPS + 1)]
    taken = [step for (pattern, workers), half in zip((before, after), halves, strict=True) for step in half
             if workers > 1 and "0.999999" in pattern.compress]  # fmt: skip
    assert distance(final_parameters(tmp_path / "run"), truth_of(optimizer, taken)) <= EQUAL


@pytest.mark.usefixtures("everything_is_large")
def test_momentum_survives_two_changes_and_another_resume(tmp_path: Path) -> None:
    """Adam divides by how many steps its mean has seen: those before the codec took it count."""
    run_dir, task = tmp_path / "run", Regression("adamw")
    stop(run_dir, AllReduce(), 2, task, **INPROCESS | {"save_every": 2}, at=4)
    for pattern, at in [(ALL_SENT, 6), (None, 7), (AllReduce(), 8)]:
        with pytest.raises(MemberFailed, match="raised as"):
            weft.resume(run_dir, task=task, pattern=pattern, save_every=1, faults=[raise_error(rank=0, step=at)])
    weft.resume(run_dir, task=task)
    assert [e.values["step"] for e in read_events(run_dir / "events.jsonl") if e.kind == "resumed"] == [2, 4, 5, 6]
    assert distance(final_parameters(run_dir), truth_of("adamw", [3, 4, 5])) <= EQUAL


@pytest.mark.parametrize("workers", [2, 3])
def test_training_apart_begins_where_training_together_was_left(tmp_path: Path, workers: int) -> None:
    """As with start=: each worker goes on with the optimizer that all had."""
    stop(tmp_path / "run", AllReduce(), 3, Regression("adamw"), **INPROCESS)
    pattern = LocalSGD(every=2, outer=Outer.presets["diloco"])
    weft.resume(tmp_path / "run", task=Regression("adamw"), pattern=pattern, workers=workers)
    truth = train_apart(
        Regression("adamw"),
        workers=workers,
        every=2,
        steps=STEPS,
        batch=24,
        start=SAVED,
        outer=(0.7, 0.9, True),
        run_seed=3,
    )
    assert distance(final_parameters(tmp_path / "run"), truth) <= EQUAL


@pytest.mark.usefixtures("everything_is_large")
@pytest.mark.parametrize(
    ("before", "after"),
    [
        ((LocalSGD(every=2, island=2, outer=SLOWMO, compress="topk:1:full"), 4), {"pattern_options": {"compress": "none"}}),
        ((LocalSGD(every=2, island=2, outer=SLOWMO), 4), {"pattern_options": {"compress": "topk:1:full"}}),
        ((LocalSGD(every=2, island=1, outer=SLOWMO, compress="topk:1:full"), 2), {"pattern_options": {"island": "2"}, "workers": 4}),
        ((LocalSGD(every=2, outer=SLOWMO, compress="topk:1:full"), 2), {}),
    ],
)  # fmt: skip
def test_the_outer_momentum_goes_on_however_meetings_are_sent(
    tmp_path: Path, before: tuple[Pattern, int], after: dict[str, Any]
) -> None:
    """With equal shares an island of n is one worker with n times the batch: so is their number and layout no matter."""
    task = Regression("plain")  # has no state that islands would keep for themselves
    truth = train_apart(task, workers=2, every=2, steps=STEPS, batch=24, outer=(1.0, 0.6, False), run_seed=3)
    stop(tmp_path / "run", *before, task, **INPROCESS)
    weft.resume(tmp_path / "run", task=task, **after)
    assert distance(final_parameters(tmp_path / "run"), truth) <= EQUAL


@pytest.mark.parametrize(
    ("before", "after", "says"),
    [
        (
            (AllReduce(compress="topk:0.05"), 2),
            (AllReduce(compress="int8"), 2),
            ["goes on from step 4 of allreduce with 2 workers; what topk held back of gradients is dropped"],
        ),
        ((AllReduce(compress="topk:0.05"), 2), (AllReduce(compress="topk:0.05"), 1), ["held back of gradients is dropped"]),
        ((AllReduce(compress="topk:0.05"), 2), (LocalSGD(every=2, compress="topk:0.05"), 2), ["is dropped"]),
        (
            (LocalSGD(every=2, outer=SLOWMO, compress="int8"), 3),
            (AllReduce(), 3),
            [
                "the optimizers of the 3 workers are joined: all begin with the mean of their states",
                "the momentum of the outer optimizer is dropped",
                "what int8 held back of meetings is dropped",
            ],
        ),
        ((AllReduce(), 1), (LocalSGD(every=2), 2), ["goes on from step 4 of allreduce with 1 worker\n"]),
    ],
)  # fmt: skip
def test_what_is_left_behind_is_said_in_the_plan(
    tmp_path: Path, before: tuple[Pattern, int], after: tuple[Pattern, int], says: list[str]
) -> None:
    stop(tmp_path / "run", *before, Regression(), **INPROCESS)
    assert weft.resume(tmp_path / "run", task=Regression(), pattern=after[0], workers=after[1]).steps == STEPS
    notes = notes_of(tmp_path / "run")
    assert all(text in notes for text in says), notes


@pytest.mark.usefixtures("everything_is_large")
@pytest.mark.parametrize(("compress", "options"), [("topk:0.05", {"accumulate": "2"}), ("bf16", {"compress": "int8"})])
def test_what_stays_is_not_talked_about(tmp_path: Path, compress: str, options: dict[str, str]) -> None:
    stop(tmp_path / "run", AllReduce(compress=compress), 2, Regression(), **INPROCESS)
    weft.resume(tmp_path / "run", task=Regression(), pattern_options=options)
    notes = notes_of(tmp_path / "run")
    assert "goes on" not in notes
    assert "dropped" not in notes


# -- settings


def test_options_that_are_not_given_stay_and_the_newest_pattern_is_kept(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    pattern = LocalSGD(every=2, outer=SLOWMO, within=AllReduce(accumulate=2))
    stop(run_dir, pattern, 2, Regression(), **INPROCESS | {"save_every": 2}, at=4)
    options = {"outer": {"lr": "0.5"}, "within": {"clip_norm": "3"}}
    with pytest.raises(MemberFailed, match="raised as"):
        weft.resume(run_dir, task=Regression(), pattern_options=options, faults=[raise_error(rank=0, step=6)])
    config = RunFolder(run_dir).config()
    assert registry.build(config.pattern, config.pattern_options) == LocalSGD(
        every=2, outer=Outer(lr=0.5, momentum=0.6), within=AllReduce(accumulate=2, clip_norm=3.0)
    )
    with pytest.raises(MemberFailed, match="raised as"):
        weft.resume(run_dir, task=Regression(), pattern="allreduce", faults=[raise_error(rank=0, step=5)])
    weft.resume(run_dir, task=Regression())
    config, plan = RunFolder(run_dir).config(), json.loads((run_dir / "plan.json").read_text())
    assert registry.build(config.pattern, config.pattern_options) == AllReduce()
    assert plan["pattern"] == "allreduce"
    assert "goes on from step 4 of localsgd" in notes_of(run_dir)  # nothing was saved in between


def test_a_changed_run_is_reported_compared_and_summed(tmp_path: Path) -> None:
    stop(tmp_path / "run", LocalSGD(every=2), 2, Regression(), **INPROCESS)
    weft.resume(tmp_path / "run", task=Regression(), pattern="allreduce", workers=3)
    page = write_report(tmp_path / "run").read_text()
    assert "by allreduce" in page
    assert "saved by localsgd with 2 workers" in page
    assert diff_runs(tmp_path / "run", tmp_path / "run").max_abs == 0.0
    (resumed,) = [e for e in read_events(tmp_path / "run" / "events.jsonl") if e.kind == "resumed"]
    assert (resumed.values["pattern"], resumed.values["world"], resumed.values["step"]) == ("localsgd", 2, SAVED)


def test_what_was_chosen_for_one_pattern_is_not_forced_on_another(tmp_path: Path) -> None:
    stop(tmp_path / "run", AllReduce(compress="auto"), 2, Regression(), **INPROCESS | {"balance": "auto"})
    assert weft.resume(tmp_path / "run", task=Regression(), pattern="localsgd").steps == STEPS
    config = RunFolder(tmp_path / "run").config()
    assert (config.balance, config.measured) == ("none", None)
    assert "balance: equal shares from now on" in notes_of(tmp_path / "run")


@pytest.mark.parametrize(
    ("settings", "kind", "says"),
    [
        ({"pattern": "sharted"}, UnknownName, "Did you mean 'sharded'"),
        ({"pattern_options": {"evry": "2"}}, UnknownName, "evry"),
        ({"pattern": AllReduce(), "pattern_options": {"accumulate": 2}}, ConfigError, "set them on the pattern itself"),
        ({"pattern": "localsgd", "pattern_options": {"start": "99"}}, ConfigError, "start=99 is not before the end"),
        ({"pattern": "sharded"}, Incompatible, "use --cluster local"),
        ({"pattern": "localsgd", "balance": "auto"}, Incompatible, "leave --balance out"),
    ],
)
def test_what_cannot_be_is_refused_and_changes_nothing(
    tmp_path: Path, settings: dict[str, Any], kind: type[Exception], says: str
) -> None:
    stop(tmp_path / "run", AllReduce(), 2, Regression(), **INPROCESS)
    before = (tmp_path / "run" / "config.json").read_bytes()
    with pytest.raises(kind, match=says):
        weft.resume(tmp_path / "run", task=Regression(), **settings)
    assert (tmp_path / "run" / "config.json").read_bytes() == before


# -- another model


class Wider(Split):
    def model(self) -> nn.Module:
        model = super().model()
        model.layers = nn.ModuleList([model.layers[0], nn.Linear(8, 10), nn.Linear(10, 9), nn.Linear(9, 6)])
        model.more = nn.Linear(2, 2)
        return model


ANOTHER = (
    r"of another model: more\.bias \(only in the task's model\), more\.weight \(only in the task's model\), layers\.1\.weight has "
    r"shape \(5, 8\) in the checkpoint and \(10, 8\) in the task's model, layers\.1\.bias .*, layers\.2\.weight .* and 2 more\. Resume"
)


@pytest.mark.multiprocess
@pytest.mark.parametrize(
    "after",
    firsts(["allreduce-2", "sharded-2", "localsgd-2", "tensor-2", "data x pipeline"], ["allreduce-2", "sharded-2"]),
)
def test_another_model_is_refused_by_what_differs(stopped: Stopped, after: str) -> None:
    run_dir = stopped("allreduce-2", "sgd")
    pattern, workers = ALL[after]
    with pytest.raises(MemberFailed, match=ANOTHER):
        weft.resume(run_dir, task=Wider(), pattern=pattern, workers=workers)


def test_too_little_memory_is_refused_and_the_run_can_still_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = tmp_path / "run"
    stop(run_dir, AllReduce(), 2, Regression(), **INPROCESS)
    before = (run_dir / "config.json").read_bytes()
    with monkeypatch.context() as patch:
        module = sys.modules[memory_shortage.__module__]  # weft.driver has a function of this name
        patch.setattr(module, "memory_shortage", lambda each, n, left, split: memory_shortage(each, n, 99, split))
        with pytest.raises(ConfigError, match="99 B of memory are left: use --pattern sharded .* or a smaller model"):
            weft.resume(run_dir, task=Regression(), workers=3)
    assert (run_dir / "config.json").read_bytes() == before
    assert weft.resume(run_dir, task=Regression()).steps == STEPS


# -- into plain torch


@pytest.mark.multiprocess
@pytest.mark.parametrize("layout", firsts(ALL, {before for before, _ in CORE}))
def test_the_model_of_every_layout_leaves_for_plain_torch(stopped: Stopped, layout: str) -> None:
    run_dir = stopped(layout, "sgd")
    (told,) = [e.values["loss"] for e in read_events(run_dir / "events.jsonl") if e.kind == "eval"]
    done = weft.export(run_dir)
    assert (done.path, done.step) == (run_dir / "model.safetensors", SAVED)
    assert "last.weight" not in load_file(done.path), "stored once"
    task, model, same = Split(), SplitNet().double(), SplitNet().double()
    load_model(model, done.path)
    same.load_state_dict(torch.load(weft.export(run_dir, "torch").path))
    seed(key_int(JOB["seed"], "data"))
    _, held_out = task.data()
    batch = [torch.stack(each).double() for each in zip(*held_out, strict=True)]
    for each in (model, same):
        assert each.last.weight is each.first.weight
        assert task.loss(each, batch).item() == pytest.approx(told, rel=1e-12)
