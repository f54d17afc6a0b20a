"""A shared step is the step of one worker: the same bits, a part of the work and of the state."""

from __future__ import annotations

import contextlib
import copy
import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.laws.reference import Odd, OddNet, Ragged, Regression, distance, train_plainly
from tests.variants import rest_slow
from torch import Tensor, nn

import weft
from weft.comm.link import Link
from weft.comm.shm import Region, ShmLink, supported
from weft.compare import final_parameters
from weft.config import FIRST_PART, Config, RunFolder, TaskRef
from weft.cost import all_reduce_bytes
from weft.errors import ConfigError, Incompatible, TaskError
from weft.events import read_events
from weft.patterns.allreduce import AllReduce
from weft.patterns.base import Context, Resume
from weft.patterns.elementwise import ELEMENTWISE, PER_PARAMETER, is_large
from weft.patterns.preflight import preflight
from weft.patterns.shared_step import SharedMean, cut
from weft.patterns.training import train
from weft.testing.conformance import in_processes

multiprocess = pytest.mark.multiprocess
here = pytest.mark.skipif(supported() is not None, reason=f"{supported()}")
STEPS = 12

# -- which optimizers treat each number by itself

FLAGS: dict[str, list[dict[str, Any]]] = {
    "SGD": [{}, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}, {"momentum": 0.9, "dampening": 0.1}],
    "Adam": [{"weight_decay": 0.1}, {"amsgrad": True}],
    "AdamW": [{"weight_decay": 0.1}, {"amsgrad": True}],
    "NAdam": [{"weight_decay": 0.1, "decoupled_weight_decay": True}],
    "RAdam": [{"weight_decay": 0.1, "decoupled_weight_decay": True}],
    "Adamax": [{"weight_decay": 0.1}],
    "RMSprop": [{"centered": True, "momentum": 0.9}],
    "Adagrad": [{"lr_decay": 0.1, "weight_decay": 0.1}],
    "Adadelta": [{"weight_decay": 0.1}],
    "ASGD": [{"t0": 3}],
    "Rprop": [{}],
}
FUSED = {"SGD", "Adam", "AdamW", "Adagrad"}


def variants() -> Iterator[Any]:
    for kind in ELEMENTWISE:
        ways = [{"foreach": False}, {"foreach": True}, *([{"fused": True}] if kind.__name__ in FUSED else [])]
        for flags in FLAGS[kind.__name__]:
            for way in ways:
                for up in (False, True):
                    options = flags | way | {"maximize": up}
                    yield pytest.param(kind, options, id=f"{kind.__name__}-{options}")


@pytest.mark.parametrize("dtype", rest_slow([torch.float32, torch.float64]))
@pytest.mark.parametrize(("kind", "options"), list(variants()))
def test_elementwise_optimizers_step_a_cut_tensor_as_the_whole(kind: Any, options: Any, dtype: torch.dtype) -> None:
    """Bit for bit over 30 steps, with the state cut after the 10th; sizes that leave every kernel a rest."""
    generator = torch.Generator().manual_seed(1)
    shapes = [(37, 11), (5,), (), (128, 64)]
    whole = [nn.Parameter(torch.randn(s, generator=generator, dtype=dtype)) for s in shapes]
    optimizer = kind(whole, lr=0.01, **options)

    def step(k: int, pieces: list[tuple[torch.optim.Optimizer, list[tuple[nn.Parameter, int, slice]]]]) -> None:
        grads = [torch.randn(s, generator=torch.Generator().manual_seed(k), dtype=dtype) for s in shapes]
        for one, params in pieces:
            for p, number, part in params:
                p.grad = grads[number].reshape(-1)[part].view(p.shape)
            one.step()

    everything = [(optimizer, [(p, number, slice(None)) for number, p in enumerate(whole)])]
    for k in range(10):
        step(k, everything)
    pieces = []
    for first, last in ((0, 192), (192, 1 << 20), (0, 0)):  # the third has nothing to do
        mine = [(number, slice(first, min(last, p.numel()))) for number, p in enumerate(whole)]
        params = [(nn.Parameter(whole[n].detach().reshape(-1)[part].clone()), n, part) for n, part in mine]
        params = [one for one in params if one[0].numel()]
        own = kind([{"params": [p for p, _, _ in params]}, {"params": []}], lr=0.01, **options)
        own.state.clear()
        for p, number, part in params:
            own.state[p] = copy.deepcopy(cut(optimizer.state[whole[number]], part))
        pieces.append((own, params))
    for k in range(10, 30):
        step(k, [*everything, *pieces])
    for own, params in pieces:
        for p, number, part in params:
            assert torch.equal(p, whole[number].detach().reshape(-1)[part])
            state = optimizer.state[whole[number]]
            for key, value in own.state[p].items():
                want = state[key].reshape(-1)[part] if is_large(key, value) else state[key]
                assert torch.equal(torch.as_tensor(value), torch.as_tensor(want)), key
                assert key in PER_PARAMETER or value is None or state[key].shape == whole[number].shape


# -- ranks that share a memory

HEAP = 4 << 20


class Uneven(Odd):
    """As Odd without the sparse table: tied, frozen, at times unused and never used weights, two groups, a schedule."""

    def __init__(self, optimizer: str = "adamw") -> None:
        self.kind = optimizer

    def model(self) -> nn.Module:
        model = OddNet()
        model.table = nn.Embedding(12, 4)
        model.scale = nn.Parameter(torch.ones(()))
        return model

    def optimizer(self, params: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        params = list(params)
        groups = [{"params": params[::2]}, {"params": params[1::2], "weight_decay": 0.1, "lr": 0.005}]
        if self.kind == "sgd":
            return torch.optim.SGD(groups, lr=0.02, momentum=0.9, fused=True)
        return torch.optim.AdamW(groups, lr=0.01, weight_decay=0.0, amsgrad=True)

    def schedule(self, optimizer: torch.optim.Optimizer, total_steps: int) -> Any:
        return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total_steps)


class Normed(Regression):
    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 1))


TASKS: dict[str, tuple[Callable[[], weft.Task], int]] = {
    "uneven-adamw": (lambda: Uneven(), 17),
    "uneven-sgd": (lambda: Uneven("sgd"), 17),
    "ragged": (lambda: Ragged("adamw"), 10),
    "normed": (lambda: Normed(), 24),
}


def in_ranks(
    task: weft.Task,
    world: int,
    batch: int,
    pattern: AllReduce,
    *,
    steps: int = STEPS,
    until: int = STEPS,
    resume: Resume | None = None,
    dtype: str = "float64",
    dawdler: int | None = None,
) -> list[Any]:
    """Of each rank that trained: (what rank 0 saves after ``until`` steps, meta, bytes sent, bytes planned)."""
    config = Config(
        task=TaskRef("none"), pattern="allreduce", workers=world, batch=batch, steps=steps, dtype=dtype, seed=3
    )
    facts = preflight(task, pattern, config)
    planned = pattern.links(facts, config, lambda n, w: all_reduce_bytes("shm", n, w), "shm")
    group = pattern.groups(facts, world)[0]

    def fn(link: Link) -> Any:
        if link.rank == dawdler:
            step = torch.optim.AdamW.step
            torch.optim.AdamW.step = lambda self: (time.sleep(0.02), step(self))[1]  # in this process alone
        ctx = Context(
            task=task,
            pattern=pattern,
            config=config,
            facts=facts,
            rank=link.rank,
            world=world,
            total_steps=steps,
            device=torch.device("cpu"),
            link=link,
            stop_requested=lambda: False,
            resume=resume,
        )
        sent = 0
        for point in train(ctx):
            sent += point.report.bytes_sent
            if dawdler is None:  # an evaluation waits for all, too
                point.evaluate()  # at any safe point, and it changes nothing
            if point.version == until:
                return copy.deepcopy(point.parts()), point.meta() | {"step": until}, sent
        raise AssertionError

    run = in_processes(
        connect=lambda rank, w, region, deadline_s: ShmLink(region, rank, deadline_s),
        prepare=lambda w: Region.create(w, group.nbytes + HEAP),
        clean_up=lambda region: region.close(),
    )
    got = [outcome.get() for outcome in run(world)(fn)]
    return [(*one, planned[0].bytes_per_step if planned else 0) for one in got]


def saved(outcomes: list[Any]) -> Mapping[str, Any]:
    return outcomes[0][0][FIRST_PART]


def parameters(outcomes: list[Any]) -> dict[str, Tensor]:
    return {n: t for n, t in saved(outcomes)["model"].items() if t.is_floating_point()}


def assert_equal(a: Any, b: Any, path: str = "") -> None:
    """Bit for bit, names and order of groups included."""
    assert type(a) is type(b), path
    if isinstance(a, Mapping):
        assert set(a) == set(b), (path, set(a) ^ set(b))
        for key in a:
            assert_equal(a[key], b[key], f"{path}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), path
        for k, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_equal(x, y, f"{path}[{k}]")
    elif isinstance(a, Tensor):
        assert (a.dtype, a.shape) == (b.dtype, b.shape), path
        assert torch.equal(a, b), (path, (a - b).abs().max())
    else:
        assert a == b, path


@here
@multiprocess
@pytest.mark.parametrize("world", rest_slow([3, 2, 4]))
@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("dtype", rest_slow(["float32", "float64"]))
def test_same_bits_as_steps_of_their_own(name: str, world: int, dtype: str) -> None:
    """Parameters, buffers, optimizer state and schedule, as rank 0 saves them."""
    make, batch = TASKS[name]
    shared = in_ranks(make(), world, batch, AllReduce(), dtype=dtype)
    alone = in_ranks(make(), world, batch, AllReduce(shared_step="off"), dtype=dtype)
    for part in ("model", "optimizer", "schedule"):
        assert_equal(saved(shared)[part], saved(alone)[part], part)


@here
@multiprocess
@pytest.mark.parametrize("world", [2, 3, 4])
@pytest.mark.parametrize("name", rest_slow(["uneven-adamw", "uneven-sgd", "ragged"]))
def test_equals_one_process_on_the_joined_batch(name: str, world: int) -> None:
    make, batch = TASKS[name]
    truth = train_plainly(make(), steps=STEPS, batch=batch, run_seed=3)
    assert distance(parameters(in_ranks(make(), world, batch, AllReduce())), truth) <= 1e-9


@here
@multiprocess
@pytest.mark.parametrize("dawdler", [0, 2])
def test_nobody_goes_on_before_all_have_stepped(dawdler: int) -> None:
    truth = in_ranks(Ragged("adamw"), 3, 10, AllReduce(shared_step="off"))
    slowed = in_ranks(Ragged("adamw"), 3, 10, AllReduce(), dawdler=dawdler)
    assert_equal(saved(slowed)["model"], saved(truth)["model"])


@here
@multiprocess
@pytest.mark.parametrize("options", [{"clip_norm": 0.05}, {"accumulate": 2}, {"clip_norm": 0.05, "accumulate": 3}])
def test_options_hold(options: dict[str, Any]) -> None:
    """The norm is that of all parts, so that it is the same but for rounding."""
    shared = in_ranks(Ragged("adamw"), 3, 10, AllReduce(**options))
    alone = in_ranks(Ragged("adamw"), 3, 10, AllReduce(shared_step="off", **options))
    plain = in_ranks(Ragged("adamw"), 3, 10, AllReduce(shared_step="off"))
    assert distance(parameters(shared), parameters(alone)) <= 1e-9
    if "clip_norm" in options:
        assert distance(parameters(shared), parameters(plain)) > 1e-6


@here
@multiprocess
@pytest.mark.parametrize("clip_norm", [None, 0.05])
def test_counted_bytes_are_the_planned_ones(clip_norm: float | None) -> None:
    """Over all ranks, evaluations left out: what these send is in the step after them."""
    outcomes = in_ranks(Regression(), 3, 24, AllReduce(clip_norm=clip_norm), until=1)
    assert sum(o[2] for o in outcomes) == pytest.approx(
        3 * outcomes[0][3], rel=0.1
    )  # parts begin at lines of the cache


@here
@multiprocess
@pytest.mark.parametrize(("first", "then"), [(2, 2), (2, 3), (3, 2)])
@pytest.mark.parametrize("ways", [("auto", "auto"), ("auto", "off"), ("off", "auto")], ids=str)
def test_a_checkpoint_goes_on_in_any_world_and_either_way(first: int, then: int, ways: tuple[Any, Any]) -> None:
    task, batch = Uneven(), 17
    outcomes = in_ranks(task, first, batch, AllReduce(shared_step=ways[0]), until=5)
    resume = Resume(5, first, outcomes[0][0], outcomes[0][1])
    got = in_ranks(task, then, batch, AllReduce(shared_step=ways[1]), resume=resume)
    if first == then:
        whole = in_ranks(task, first, batch, AllReduce(shared_step="off"))
        for part in ("model", "optimizer", "schedule"):
            assert_equal(saved(got)[part], saved(whole)[part], part)
    else:
        truth = train_plainly(task, steps=STEPS, batch=batch, run_seed=3)
        assert distance(parameters(got), truth) <= 1e-9


@here
@multiprocess
def test_each_rank_keeps_its_part_of_the_state_and_no_parameters() -> None:
    def fn(link: Link) -> Any:
        params = sum(p.numel() for p in exchange_of(link).replica.params.values())
        state = exchange_of(link).replica.optimizer.state
        return params, sum(t.numel() for s in state.values() for k, t in s.items() if is_large(k, t))

    def exchange_of(link: Link) -> SharedMean:
        if not made:
            ctx = Context(
                task, pattern, config, facts, link.rank, 2, 5, torch.device("cpu"), link, stop_requested=lambda: False
            )
            exchange = pattern.exchange(pattern.replica(ctx))
            assert isinstance(exchange, SharedMean)
            exchange.replica.apply(exchange.gradients(exchange.replica.gradients()))
            exchange.parameters(1)
            starts = {p.data_ptr() for p in exchange.replica.params.values()}
            assert all(
                exchange.arena.shared.data_ptr() <= at < exchange.arena.shared.data_ptr() + 10_000 for at in starts
            )
            made.append(exchange)
        return made[0]

    made: list[SharedMean] = []
    task, pattern = Regression("adamw"), AllReduce()
    config = Config(task=TaskRef("none"), pattern="allreduce", workers=2, batch=24, steps=5)
    facts = preflight(task, pattern, config)
    run = in_processes(
        connect=lambda rank, w, region, deadline_s: ShmLink(region, rank, deadline_s),
        prepare=lambda w: Region.create(w, HEAP),
        clean_up=lambda region: region.close(),
    )
    got = [outcome.get() for outcome in run(2)(fn)]
    assert sum(state for _, state in got) == 2 * got[0][0]  # two moments of each number
    assert all(abs(state - got[0][0]) <= 32 for _, state in got)
    assert pattern.memory(facts, 2, "shm")["optimizer"] == facts.optimizer_bytes // 2


class Diverges(Regression):
    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        self.calls = getattr(self, "calls", 0) + 1
        return super().loss(model, batch) * (float("nan") if self.calls > 4 else 1.0)


@here
@multiprocess
def test_a_loss_that_is_not_a_number_updates_nothing() -> None:
    with pytest.raises(TaskError, match="no update was made"):
        in_ranks(Diverges(), 2, 24, AllReduce())


# -- where it cannot be


class Clamps(Regression):
    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        next(iter(model.parameters())).data.clamp_(-0.1, 0.1)
        return super().loss(model, batch)


class MaxNorm(Regression):
    """Its lookups write: rows that are too long are cut. No row of the first is, so that at first no value changes."""

    def model(self) -> nn.Module:
        model = nn.Sequential(nn.Embedding(4, 8, max_norm=0.5), nn.Linear(8, 1))
        nn.init.normal_(model[0].weight, std=0.01)
        return model

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        rows = (batch[0][:, 0] > 0).long() + 2 * (batch[0][:, 1] > 0).long()
        return nn.functional.mse_loss(model(rows), batch[1])


class WritesLate(Regression):
    """Its ``method`` scales a parameter, from the third time in a process on, for as long as it runs."""

    def __init__(self, method: str, way: str = "in place") -> None:
        super().__init__()
        self.method, self.way, self.calls = method, way, 0

    def scaled(self, method: str, model: nn.Module) -> None:
        self.calls += method == self.method
        if method != self.method or self.calls < 3:
            return
        p = next(iter(model.parameters()))
        with torch.no_grad():
            if self.way == "in place":
                p.mul_(2).div_(2)
            else:
                p.data = p.data.clone()

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        if model.training:
            self.scaled("loss", model)
        return super().loss(model, batch)

    def evaluate(self, model: nn.Module, batch: Any) -> dict[str, Any]:
        self.scaled("evaluate", model)
        return super().evaluate(model, batch)


class Swaps(Regression):
    """Evaluates with other parameters, as who averages them does, and puts the trained ones back."""

    def evaluate(self, model: nn.Module, batch: Any) -> dict[str, Any]:
        kept = copy.deepcopy(model.state_dict())
        model.load_state_dict({n: t / 2 for n, t in kept.items()})
        result = super().evaluate(model, batch)
        model.load_state_dict(kept)
        return result


class Hooked(Regression):
    def optimizer(self, params: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        optimizer = super().optimizer(params)
        optimizer.register_step_post_hook(lambda *_: None)
        return optimizer


class MySGD(torch.optim.SGD):
    pass


class Subclassed(Regression):
    def optimizer(self, params: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        return MySGD(params, lr=0.1)


class Overlapping(Regression):
    def model(self) -> nn.Module:
        model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 1))
        model[2].bias.data = model[0].weight.data.view(-1)[:1]
        return model


@pytest.mark.parametrize(
    ("task", "why"),
    [
        (Clamps(), "Clamps.loss writes to parameter 0.weight"),
        (MaxNorm(), "MaxNorm.loss writes to parameter 0.weight"),
        (Swaps(), "Swaps.evaluate writes to parameter 0.weight"),
        (Hooked(), "SGD has hooks"),
        (Subclassed(), "MySGD is not known to treat each number by itself, as torch's SGD, Adam, "),
        (Odd(), "some gradients are sparse"),
        (Overlapping(), "parameter 2.bias is a part of other memory"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, weft.Task) else "",
)
def test_where_it_would_be_another_step_each_steps_for_itself(task: weft.Task, why: str) -> None:
    config = Config(task=TaskRef("none"), pattern="allreduce", workers=2, batch=16, steps=5)
    facts = preflight(task, AllReduce(), config)
    assert facts.step_alone.startswith(why)
    assert why in AllReduce().choices(facts, config, "shm")["shared_step"]
    with pytest.raises(Incompatible, match=f"shared_step=on is not possible: {why}"):
        AllReduce(shared_step="on").choices(facts, config, "shm")


@pytest.mark.parametrize(
    ("carrier", "cluster", "compress", "end"),
    [
        ("tcp", "local", "none", "no memory that all see. Use --link shm, or leave it out"),
        ("inproc", "inprocess", "none", "no memory that all see. Use --cluster local, or leave it out"),
        ("gloo", "torchrun", "none", "no memory that all see. Leave it out"),
        ("nccl", "local", "none", "no memory that all see. Leave it out"),
        ("shm", "local", "int8", "joins the gradients its own way. Leave it out"),
    ],
)
def test_what_cannot_be_is_refused_or_left(carrier: str, cluster: str, compress: str, end: str) -> None:
    """With advice that helps."""
    config = Config(task=TaskRef("none"), pattern="allreduce", workers=2, batch=16, steps=5, cluster=cluster)
    facts = preflight(Regression(), AllReduce(), config)
    assert AllReduce(compress=compress).unshared(facts, 2, carrier)
    with pytest.raises(Incompatible, match=f"shared_step=on is not possible: .*{end}"):
        AllReduce(compress=compress, shared_step="on").choices(facts, config, carrier)


def test_one_worker_is_told_that_it_has_nobody_to_share_with() -> None:
    config = Config(task=TaskRef("none"), pattern="allreduce", workers=1, batch=16, steps=5)
    pattern = AllReduce(shared_step="on")
    facts = preflight(Regression(), pattern, config)
    assert pattern.choices(facts, config, "none") == {}
    assert pattern.notes(facts, config) == ["shared_step=on: one worker has nobody to share it with"]


@here
@multiprocess
@pytest.mark.parametrize("world", rest_slow([2, 3]))
def test_lookups_that_write_equal_one_process(world: int) -> None:
    truth = train_plainly(MaxNorm(), steps=STEPS, batch=64, run_seed=3)
    assert truth["0.weight"].norm(dim=1).max() > 0.3, "some are cut"
    assert distance(parameters(in_ranks(MaxNorm(), world, 64, AllReduce())), truth) <= 1e-9


@here
@multiprocess
@pytest.mark.parametrize(
    ("method", "way"), [("loss", "in place"), ("evaluate", "in place"), ("loss", "moved"), ("evaluate", "moved")]
)
def test_who_writes_later_to_what_all_read_is_told(method: str, way: str) -> None:
    task = WritesLate(method, way)
    told = "WritesLate.(loss|evaluate) wrote to parameter '0.weight' .*use -o shared_step=off"
    with pytest.raises(TaskError, match=told if way == "moved" else told.replace("(loss|evaluate)", method)):
        in_ranks(task, 2, 24, AllReduce())
    task.calls = 0
    in_ranks(task, 2, 24, AllReduce(shared_step="off"))


def test_workers_apart_cannot_share() -> None:
    with pytest.raises(Incompatible, match="leave it out"):
        weft.LocalSGD(within=AllReduce(shared_step="on"))
    with pytest.raises(ConfigError, match="shared_step"):
        weft.run(Regression(), pattern="allreduce", pattern_options={"shared_step": "perhaps"}, cluster="inprocess")


# -- whole runs


class KilledInTheStep(Uneven):
    """One of the workers ends between its part of the eighth step and the moment when all have stepped; only once."""

    def __init__(self, mark: Path) -> None:
        super().__init__()
        self.mark = mark

    def schedule(self, optimizer: torch.optim.Optimizer, total_steps: int) -> Any:
        def scale(step: int) -> float:
            if step == 8:
                with contextlib.suppress(FileExistsError):
                    self.mark.touch(exist_ok=False)
                    os.kill(os.getpid(), signal.SIGKILL)
            return 1 - step / total_steps

        return torch.optim.lr_scheduler.LambdaLR(optimizer, scale)


class Undisturbed(KilledInTheStep):
    def __init__(self) -> None:
        super().__init__(Path("/"))  # where no file can be made


@here
@multiprocess
def test_a_worker_killed_within_the_step_is_brought_back(tmp_path: Path) -> None:
    """Nobody goes on with parameters that are half stepped: all begin again at the checkpoint, and it is as if nothing was."""
    settings = {
        "workers": 2,
        "steps": STEPS,
        "batch": 17,
        "dtype": "float64",
        "seed": 3,
        "save_every": 5,
        "restarts": 1,
    }
    weft.run(KilledInTheStep(tmp_path / "mark"), run_dir=tmp_path / "run", **settings)
    assert (tmp_path / "mark").exists()
    assert "parameters live once for all workers" in (tmp_path / "run" / "plan.json").read_text()
    assert [e.kind for e in read_events(RunFolder(tmp_path / "run").events) if e.kind == "restarted"]
    truth = in_ranks(Undisturbed(), 2, 17, AllReduce(shared_step="off"))
    assert_equal(final_parameters(tmp_path / "run"), parameters(truth))
