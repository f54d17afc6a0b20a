"""A parameter server with staleness 0 is one process on the joined batch, whatever the servers and workers; and what is late stays within its bound."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, cast

import msgspec
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.data.streaming import write_shards
from tests.laws.reference import Augmented, Odd, Ragged, Regression, distance, train_plainly
from tests.streaming_task import Watched
from torch import Tensor, nn

import weft
import weft.testing as weft_testing
from weft import AllReduce, ParameterServer
from weft.compare import final_parameters
from weft.config import RunFolder
from weft.errors import CommError, ConfigError, MemberFailed
from weft.events import losses_of, read_events
from weft.patterns import working
from weft.patterns.holding import Flat, Holding, Pushed, moved
from weft.report.html import write_report
from weft.servers import messages
from weft.servers.ranges import Piece
from weft.tasks.digits import Digits
from weft.tasks.recommend import Recommend
from weft.testing import delay, freeze, kill, slow

STEPS = 12
EQUAL = 1e-9


def train(
    tmp_path: Path, task: weft.Task, workers: int, pattern: ParameterServer, **settings: Any
) -> dict[str, Tensor]:
    settings = {
        "cluster": "inprocess",
        "dtype": "float64",
        "steps": STEPS,
        "seed": 3,
        "run_dir": tmp_path / "run",
    } | settings
    return final_parameters(weft.run(task, pattern, workers=workers, **settings).run_dir)


def lateness(run_dir: Path) -> dict[int, int]:
    """By updates since its parameters were read, how many shares."""
    found: dict[int, int] = {}
    for event in read_events(RunFolder(run_dir).events):
        for late, count in event.values.get("staleness", {}).items() if event.kind == "ticks" else ():
            found[int(late)] = found.get(int(late), 0) + count
    return found


TASKS = {
    "regression": (lambda: Regression(), 24),
    "adamw": (lambda: Regression("adamw"), 24),
    "digits": (lambda: Digits(width=4), 30),
    "odd": (lambda: Odd(), 17),
    "ragged": (lambda: Ragged(), 10),
}


@pytest.mark.parametrize("workers", [1, 2, 3, 4])
@pytest.mark.parametrize("servers", [1, 2, 3])
@pytest.mark.parametrize("name", TASKS)
def test_synchronous_equals_one_process(tmp_path: Path, name: str, servers: int, workers: int) -> None:
    make, batch = TASKS[name]
    truth = train_plainly(make(), steps=STEPS, batch=batch, run_seed=3)
    assert distance(train(tmp_path, make(), workers, ParameterServer(servers=servers), batch=batch), truth) <= EQUAL


@pytest.mark.parametrize("servers", [1, 3])
def test_clipping_goes_by_the_norm_over_all_servers(tmp_path: Path, servers: int) -> None:
    truth = train_plainly(Regression(), steps=STEPS, batch=24, run_seed=3, clip=0.05)
    pattern = ParameterServer(servers=servers, clip_norm=0.05)
    assert distance(train(tmp_path, Regression(), 2, pattern, batch=24), truth) <= EQUAL


class Whole(torch.optim.SGD):
    """Not known to treat each number by itself: steps along the sign of each tensor's mean."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for p in (p for group in self.param_groups for p in group["params"] if p.grad is not None):
            p.sub_(0.01 * (p.grad + p.grad.mean().sign()))


class WithAdafactor(Regression):
    """Whose state is not of the parameters' shapes."""

    def optimizer(self, params: Any) -> torch.optim.Optimizer:
        return torch.optim.Adafactor(params, lr=0.01)


@pytest.mark.multiprocess
def test_state_of_another_shape_is_saved_and_taken_up(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"cluster": "local", "batch": 24, "restarts": 1, "save_every": 4}
    truth = train_plainly(WithAdafactor(), steps=STEPS, batch=24, run_seed=3)
    pattern, faults = ParameterServer(servers=2), [kill(rank=3, step=6)]
    assert distance(train(tmp_path, WithAdafactor(), 2, pattern, faults=faults, **settings), truth) <= EQUAL


class WithWhole(Regression):
    def optimizer(self, params: Any) -> torch.optim.Optimizer:
        return Whole(params, lr=0.01)


def test_an_optimizer_of_whole_tensors_gets_them_whole(tmp_path: Path) -> None:
    truth = train_plainly(WithWhole(), steps=STEPS, batch=24, run_seed=3)
    assert distance(train(tmp_path, WithWhole(), 2, ParameterServer(servers=3), batch=24), truth) <= EQUAL
    with pytest.raises(ConfigError, match="servers=5.*whole.*servers=4"):
        train(tmp_path / "5", WithWhole(), 2, ParameterServer(servers=5), batch=24)


def test_running_buffers_and_micro_batches_are_as_under_allreduce(tmp_path: Path) -> None:
    truth = train_under(tmp_path / "all", AllReduce(accumulate=2))
    mine = train_under(tmp_path / "ps", ParameterServer(servers=2, accumulate=2))
    assert any("running_mean" in name for name in truth)
    assert distance(mine, truth) <= EQUAL


def train_under(run_dir: Path, pattern: Any) -> dict[str, Tensor]:
    settings: dict[str, Any] = {"cluster": "inprocess", "dtype": "float64", "steps": 6, "batch": 24, "seed": 3}
    return final_parameters(weft.run(Normed(), pattern, workers=3, run_dir=run_dir, **settings).run_dir)


class Normed(Regression):
    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Linear(16, 1))


class Strided(Digits):
    """Weights that are dense in another order, and of a shape with nothing in it."""

    def model(self) -> nn.Module:
        model = super().model().to(memory_format=torch.channels_last)
        model.register_parameter("empty", nn.Parameter(torch.empty(0, 3)))
        return model


def test_weights_in_another_order_of_memory(tmp_path: Path) -> None:
    truth = train_plainly(Strided(width=4), steps=4, batch=30, run_seed=3)
    found = train(tmp_path, Strided(width=4), 2, ParameterServer(servers=3), batch=30, steps=4)
    assert distance(found, truth) <= EQUAL
    weft.resume(lengthened(tmp_path / "run"), task=Strided(width=4), pattern=AllReduce())


def lengthened(run_dir: Path) -> Path:
    """As if it had been stopped half-way."""
    (run_dir / "result.json").unlink()
    config = run_dir / "config.json"
    config.write_text(config.read_text().replace('"steps": 4', '"steps": 6'))
    return run_dir


# -- who is ahead, and who is late


class Constant(Regression):
    """Gradients that do not depend on the parameters: whatever was read, each share counts once or the result is another."""

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        x, _ = batch
        return sum(((p * x.mean()).sum() for p in model.parameters()), torch.zeros((), dtype=x.dtype))

    def optimizer(self, params: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(params, lr=0.05, momentum=0.5)

    def schedule(self, optimizer: torch.optim.Optimizer, total_steps: int) -> None:
        return None


@pytest.mark.parametrize("staleness", [1, 4])
@pytest.mark.parametrize("servers", [1, 2])
def test_each_share_counts_once_and_none_is_later_than_the_bound(tmp_path: Path, staleness: int, servers: int) -> None:
    """In batches' order: momentum tells another order from it."""
    truth = train_plainly(Constant(), steps=20, batch=24, run_seed=3)
    pattern = ParameterServer(servers=servers, staleness=staleness)
    found = train(tmp_path, Constant(), 3, pattern, batch=24, steps=20, faults=[slow(rank=1, factor=4)])
    assert distance(found, truth) <= EQUAL
    late = lateness(tmp_path / "run")
    assert sum(late.values()) == 20 * 3
    assert max(late) <= staleness


@pytest.mark.parametrize("staleness", [2, "none"])
def test_before_start_nobody_is_late(tmp_path: Path, staleness: Any) -> None:
    truth = train_plainly(Regression(), steps=12, batch=24, run_seed=3, clip=0.5)
    pattern = ParameterServer(servers=2, staleness=staleness, start=12, clip_norm=0.5)
    settings: dict[str, Any] = {"batch": 24, "faults": [slow(rank=1, factor=4)]}
    found = train(tmp_path / "a", Regression(), 3, pattern, steps=12, **settings)
    assert distance(found, truth) <= EQUAL
    train(tmp_path / "b", Regression(), 3, pattern, steps=30, **settings)
    late = lateness(tmp_path / "b" / "run")
    assert late[0] >= 12 * 3
    assert max(late) > 0


@pytest.mark.multiprocess
@pytest.mark.parametrize("staleness", [2, "none"])
def test_a_slow_worker_makes_others_late_and_loses_nothing(tmp_path: Path, staleness: Any) -> None:
    class Plain(Constant):
        def optimizer(self, params: Any) -> torch.optim.Optimizer:
            return torch.optim.SGD(params, lr=0.05)

    truth = train_plainly(Plain(), steps=30, batch=24, run_seed=3)
    pattern = ParameterServer(servers=2, staleness=staleness)
    settings: dict[str, Any] = {"cluster": "local", "batch": 24, "steps": 30, "save_every": 7}
    found = train(tmp_path, Plain(), 3, pattern, faults=[delay(rank=1, seconds=0.02)], **settings)
    assert distance(found, truth) <= EQUAL
    late = lateness(tmp_path / "run")
    assert sum(late.values()) == 30 * 3
    assert max(late) > 0
    assert staleness == "none" or max(late) <= staleness


def test_rate_divides_by_lateness_and_dc_moves_to_where_the_parameters_are() -> None:
    """By the papers' formulas, on one late share and one that is not."""
    flat = Flat([Piece("w", 0, 3)], {"w": torch.float64}, [])
    read, now, late, fresh = torch.tensor(
        [[1.0, 2.0, 3.0], [1.5, -9.0, 2.0], [0.1, 0.2, -0.3], [1.0, -1.0, 0.5]], dtype=torch.float64
    )
    expected = {
        "none": late + fresh,
        "rate": late / 3 + fresh,
        "dc": late + 0.5 * late.abs() * (now - read).clamp(-1 / 0.5, 1 / 0.5) + fresh,
    }
    for correction, truth in expected.items():
        holding = object.__new__(Holding)
        holding.flat, holding.version = flat, 7
        holding.pattern = ParameterServer(
            staleness=4, correction=correction, **({"dc_lambda": 0.5} if correction == "dc" else {})
        )
        holding.memory, holding.tables = memory_of(flat, now), []
        holding.versions = {5: memory_of(flat, read), 7: holding.memory}
        holding.take(flat.memory(), frozenset(), [])
        holding.join([Pushed(memory_of(flat, late), 5, 1.0, 0), Pushed(memory_of(flat, fresh), 7, 1.0, 1)], 2.0)
        assert torch.allclose(holding.grads[0], 2 * truth, rtol=1e-12), correction


def test_dc_is_the_same_however_a_batch_is_cut_and_turns_nothing_round() -> None:
    grad, way = torch.randn(100, dtype=torch.float64), 10 * torch.randn(100, dtype=torch.float64)
    whole = moved(grad, way, 32.0)
    assert torch.allclose(moved(grad / 4, way, 32.0) * 4, whole, rtol=1e-12), (
        "a quarter of a batch is corrected as much as all of it"
    )
    assert bool((whole * grad >= 0).all())
    assert bool((whole.abs() <= 2 * grad.abs()).all())


def memory_of(flat: Flat, values: Tensor) -> Any:
    memory = flat.memory()
    flat.views(memory)[0][0].copy_(values)
    return memory


@pytest.mark.parametrize("correction", ["rate", "dc"])
def test_corrections_learn(tmp_path: Path, correction: Any) -> None:
    settings: dict[str, Any] = {"cluster": "inprocess", "workers": 3, "steps": 60, "batch": 24, "seed": 3}
    pattern = ParameterServer(staleness=2, correction=correction)
    result = weft.run(Regression("plain"), pattern, run_dir=tmp_path / "run", **settings)
    first = next(losses_of(e) for e in read_events(RunFolder(tmp_path / "run").events) if "loss" in e.values)
    assert result.train_loss < 0.8 * next(first)[1]


@pytest.mark.multiprocess
def test_backup_workers_close_without_the_slowest(tmp_path: Path) -> None:
    """Worker 2's share is late in each step and none of it is waited for."""
    pattern = ParameterServer(servers=2, backup_workers=1)
    settings: dict[str, Any] = {"cluster": "local", "batch": 24, "faults": [delay(rank=2, seconds=0.05)]}
    weft.run(Regression(), pattern, workers=3, steps=20, run_dir=tmp_path / "run", **settings)
    assert sum(lateness(tmp_path / "run").values()) == 20 * 2


def test_a_batch_is_not_closed_with_shares_of_nothing(tmp_path: Path) -> None:
    """211 examples in batches of 30: the last of an epoch has one, which is one worker's."""
    train(tmp_path, Regression(), 3, ParameterServer(backup_workers=2), batch=30, steps=16)
    assert sum(lateness(tmp_path / "run").values()) in range(16, 16 + 2 * 2 + 1)


@pytest.mark.parametrize("servers", [1, 2])
def test_backup_shares_are_left_out_of_the_mean(tmp_path: Path, servers: int) -> None:
    """All shares have the same gradient: the mean of some is the mean of all, unless a share is missed or counted twice."""

    class Alike(Constant):
        def loss(self, model: nn.Module, batch: Any) -> Tensor:
            return sum((p.sum() for p in model.parameters()), torch.zeros((), dtype=batch[0].dtype))

    truth = train_plainly(Alike(), steps=9, batch=24, run_seed=3)
    pattern = ParameterServer(servers=servers, backup_workers=2)
    assert distance(train(tmp_path, Alike(), 4, pattern, batch=24, steps=9), truth) <= EQUAL


# -- who goes


@pytest.mark.multiprocess
@pytest.mark.parametrize("servers", [1, 2])
def test_a_killed_worker_is_done_without(tmp_path: Path, servers: int) -> None:
    truth = train_plainly(Regression(), steps=STEPS, batch=24, run_seed=3)
    pattern = ParameterServer(servers=servers)
    settings: dict[str, Any] = {"cluster": "local", "batch": 24, "faults": [kill(rank=1, step=4)]}
    assert distance(train(tmp_path, Regression(), 3, pattern, **settings), truth) <= EQUAL
    (left,) = [e for e in read_events(RunFolder(tmp_path / "run").events) if e.kind == "left"]
    assert (left.values["member"], "SIGKILL" in left.values["cause"]) == (1, True)


@pytest.mark.multiprocess
def test_a_frozen_worker_is_done_without(tmp_path: Path) -> None:
    truth = train_plainly(Regression(), steps=STEPS, batch=24, run_seed=3)
    settings: dict[str, Any] = {"cluster": "local", "batch": 24, "deadline_s": 2.0}
    faults = [freeze(rank=0, step=4)]
    assert distance(train(tmp_path, Regression(), 2, ParameterServer(), faults=faults, **settings), truth) <= EQUAL


@pytest.mark.multiprocess
def test_what_a_dead_worker_was_at_begins_from_the_servers_statistics(tmp_path: Path) -> None:
    """Who does two shares of a batch begins both from the same BatchNorm statistics."""
    truth = train_under(tmp_path / "all", AllReduce())
    settings: dict[str, Any] = {"dtype": "float64", "steps": 6, "batch": 24, "seed": 3, "run_dir": tmp_path / "run"}
    weft.run(Normed(), ParameterServer(servers=2), workers=3, faults=[kill(rank=1, step=2)], **settings)
    assert distance(final_parameters(tmp_path / "run"), truth) <= EQUAL


@pytest.mark.multiprocess
def test_who_was_done_without_is_not_blamed_for_what_comes_later(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"cluster": "local", "batch": 24, "faults": [kill(rank=1, step=2), kill(rank=3, step=8)]}
    with pytest.raises(MemberFailed, match="server 3 failed.*SIGKILL"):
        train(tmp_path, Regression(), 3, ParameterServer(), **settings)


@pytest.mark.multiprocess
def test_without_any_worker_the_run_ends_and_names_one(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"cluster": "local", "batch": 24, "faults": [kill(rank=0, step=3), kill(rank=1, step=3)]}
    with pytest.raises(MemberFailed, match="worker [01] failed.*SIGKILL"):
        train(tmp_path, Regression(), 2, ParameterServer(), **settings)


@pytest.mark.multiprocess
@pytest.mark.parametrize("server", [0, 1])
def test_a_killed_server_ends_the_run_which_goes_on_from_its_checkpoint(tmp_path: Path, server: int) -> None:
    truth = train_plainly(Regression(), steps=STEPS, batch=24, run_seed=3)
    settings: dict[str, Any] = {"cluster": "local", "batch": 24, "faults": [kill(rank=2 + server, step=6)]}
    with pytest.raises(MemberFailed, match=f"server {2 + server} failed.*SIGKILL"):
        train(tmp_path, Regression(), 2, ParameterServer(servers=2), save_every=4, **settings)
    weft.resume(tmp_path / "run", pattern=ParameterServer(servers=3), task=Regression(), workers=1)
    assert distance(final_parameters(tmp_path / "run"), truth) <= EQUAL


@pytest.mark.multiprocess
def test_a_killed_server_is_restarted(tmp_path: Path) -> None:
    truth = train_plainly(Regression(), steps=STEPS, batch=24, run_seed=3)
    settings: dict[str, Any] = {"cluster": "local", "batch": 24, "restarts": 1, "save_every": 4}
    faults = [kill(rank=3, step=6)]
    found = train(tmp_path, Regression(), 2, ParameterServer(servers=2), faults=faults, **settings)
    assert distance(found, truth) <= EQUAL


# -- payloads that are read where they lie


class Roomy(Regression):
    """Half a megabyte of numbers. ``lent``: its workers must be lent them, or not; None: nobody looks."""

    def __init__(self, lent: bool | None = None) -> None:
        super().__init__()
        self.lent = lent

    def model(self) -> nn.Module:
        take, lent = working.Carrier.take, self.lent

        def watched(carrier: working.Carrier, servers: Any) -> None:
            assert all(values.flags.owndata is not lent for values in carrier.desk.values.values())
            take(carrier, servers)

        if lent is not None and take.__name__ != "watched":  # in a worker's process
            working.Carrier.take = watched  # type: ignore[method-assign]
        return nn.Sequential(nn.Linear(6, 8000), nn.Tanh(), nn.Linear(8000, 1))

    def optimizer(self, params: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(params, lr=1e-3, momentum=0.9)


@pytest.mark.multiprocess
@pytest.mark.parametrize(
    ("workers", "pattern"),
    [
        (1, ParameterServer()),
        (3, ParameterServer(servers=2)),
        (2, ParameterServer(clip_norm=0.05)),
        (1, ParameterServer(servers=2, clip_norm=0.05)),
    ],
)
def test_by_shared_memory_numbers_are_those_over_tcp(tmp_path: Path, workers: int, pattern: ParameterServer) -> None:
    settings: dict[str, Any] = {"cluster": "local", "batch": 24, "steps": 6}
    found = train(tmp_path / "shm", Roomy(lent=True), workers, pattern, **settings)
    over_tcp = train(tmp_path / "tcp", Roomy(lent=False), workers, pattern, link="tcp", **settings)
    assert all(torch.equal(found[name], over_tcp[name]) for name in found)
    truth = train_plainly(Roomy(), steps=6, batch=24, run_seed=3, clip=pattern.clip_norm)
    assert distance(found, truth) <= EQUAL


@pytest.mark.multiprocess
@pytest.mark.parametrize(
    ("fault", "servers", "staleness"), [(kill, 1, 0), (kill, 2, 2), (freeze, 1, 2), (freeze, 2, 0)]
)
def test_who_goes_takes_no_lent_memory_along(tmp_path: Path, fault: Any, servers: int, staleness: int) -> None:
    """Gradients do not depend on the parameters: what is torn, or lent twice, gives another result. What is frozen is never written to again."""

    class Steady(Roomy, Constant):
        loss = Constant.loss

    truth = train_plainly(Steady(), steps=12, batch=24, run_seed=3)
    settings: dict[str, Any] = {"cluster": "local", "batch": 24, "steps": 12, "link": "shm", "deadline_s": 2.0}
    pattern, faults = ParameterServer(servers=servers, staleness=staleness), [fault(rank=1, step=4)]
    assert distance(train(tmp_path, Steady(), 3, pattern, faults=faults, **settings), truth) <= EQUAL


@pytest.mark.multiprocess
def test_a_server_that_is_killed_while_its_values_are_read_is_restarted(tmp_path: Path) -> None:
    truth = train_plainly(Roomy(), steps=STEPS, batch=24, run_seed=3)
    settings: dict[str, Any] = {"cluster": "local", "batch": 24, "restarts": 1, "save_every": 4}
    faults = [kill(rank=3, step=6)]
    found = train(tmp_path, Roomy(), 2, ParameterServer(servers=2), faults=faults, **settings)
    assert distance(found, truth) <= EQUAL


# -- bad members


class Rogue(Regression):
    """The first worker to compute its third share pushes what it must not."""

    def __init__(self, mark: str, how: str) -> None:
        super().__init__()
        self.mark, self.how, self.calls = mark, how, 0

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        self.calls += 1
        if self.calls == 3:
            with contextlib.suppress(FileExistsError):
                Path(self.mark).touch(exist_ok=False)
                MISDEEDS[self.how]()
        return super().loss(model, batch)


def misdeed(change: Callable[[messages.Push, list[Any]], tuple[Any, list[Any]]]) -> Callable[[], None]:
    def commit() -> None:
        send = working.Desk.send

        def rogue(self: Any, server: int, message: Any, payload: Any = ()) -> Any:
            if isinstance(message, messages.Push):
                message, payload = change(message, list(payload))
            if isinstance(message, bytes):
                return self.endpoint.isend(server, 0, message, payload)
            return send(self, server, message, payload)

        working.Desk.send = rogue  # type: ignore[method-assign]

    return commit


def push_with(**changes: Any) -> Callable[[], None]:
    return misdeed(lambda push, payload: (msgspec.structs.replace(push, **changes), payload))


MISDEEDS = {
    "short": misdeed(lambda push, payload: (push, [payload[0][:-8]])),
    "garbage": misdeed(lambda push, payload: (b"\x93garbage", payload)),
    "stale": push_with(version=-1),
    "unread": push_with(version=10**6),
    "no such share": push_with(share=99),
    "no such batch": push_with(batch=10**9),
    "weight": push_with(weight=math.nan),
    "absent": push_with(absent=[77]),
    "close": misdeed(lambda push, payload: (messages.Close(0, 1, 2, [0], 1.0), [])),
    "leave": misdeed(lambda push, payload: (messages.Leave(), [])),
}


@pytest.mark.multiprocess
@pytest.mark.parametrize("how", MISDEEDS)
def test_a_worker_that_says_what_it_must_not_is_refused(tmp_path: Path, how: str) -> None:
    truth = train_plainly(Regression(), steps=STEPS, batch=24, run_seed=3)
    task, settings = Rogue(str(tmp_path / "mark"), how), {"cluster": "local", "batch": 24}
    assert distance(train(tmp_path, task, 3, ParameterServer(servers=2), **settings), truth) <= EQUAL
    refused = [
        e.values["text"]
        for e in read_events(RunFolder(tmp_path / "run").events)
        if e.kind == "warning" and "refused" in e.values["text"]
    ]
    assert refused, "the servers took it"


class NotFinite(Regression):
    """From the third share on a finite loss whose gradient is not: the root of what is nothing, times nothing."""

    calls = 0

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        self.calls += 1
        loss = super().loss(model, batch)
        return loss if self.calls < 3 else loss + (next(iter(model.parameters())) * 0).sum().sqrt() * 0


class NanLoss(Regression):
    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        loss = super().loss(model, batch)
        return loss * (math.nan if Path("/").exists() and torch.is_grad_enabled() and self.late() else 1.0)

    calls = 0

    def late(self) -> bool:
        self.calls += 1
        return self.calls > 3


def test_what_is_no_number_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(weft.WeftError, match=r"parameter '0.weight' that worker [01] pushed at step \d+ is not finite"):
        train(tmp_path / "a", NotFinite(), 2, ParameterServer(), batch=24)
    with pytest.raises(weft.WeftError, match="the loss is nan on rank"):
        train(tmp_path / "b", NanLoss(), 2, ParameterServer(), batch=24, cluster="local")


@given(data=st.binary(max_size=200))
def test_any_bytes_are_a_message_or_an_error(data: bytes) -> None:
    try:
        again = messages.encode(messages.decode(data))
    except CommError:
        return
    assert messages.encode(messages.decode(again)) == again


# -- refusals


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"servers": 0}, "servers=0"),
        ({"staleness": -1}, "staleness=-1.*none"),
        ({"backup_workers": -1}, "backup_workers=-1"),
        ({"correction": "rate"}, "none is late"),
        ({"start": 5}, "start=5"),
        ({"start": -1, "staleness": 1}, "start=-1"),
        ({"dc_lambda": 0.1}, "correction=dc"),
        ({"dc_lambda": -1.0, "correction": "dc", "staleness": 1}, "dc_lambda=-1"),
        ({"clip_norm": 0.0}, "clip_norm"),
        ({"accumulate": 0}, "accumulate=0"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        ParameterServer(**options)


@pytest.mark.parametrize(
    ("pattern", "settings", "said"),
    [
        (ParameterServer(servers=40), {}, "servers=40 cannot share.*servers="),
        (ParameterServer(backup_workers=2), {}, "backup_workers=2.*1 at most"),
        (ParameterServer(accumulate=20), {}, "accumulate=20"),
        (ParameterServer(), {"link": "gloo", "cluster": "local"}, "link 'gloo'.*--link tcp"),
        (ParameterServer(), {"trace": True}, "--trace"),
        (ParameterServer(), {"check_equivalence": 1}, "--check-equivalence"),
        (ParameterServer(), {"faults": [weft_testing.skip(rank=0, step=1)]}, "fault 'skip'"),
    ],
)
def test_what_cannot_be_is_refused_before_the_first_step(
    tmp_path: Path, pattern: ParameterServer, settings: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        train(tmp_path, Regression(), 2, pattern, batch=24, **settings)
    assert not (tmp_path / "run" / "checkpoints").exists()


# -- tables, of which rows travel


@pytest.mark.parametrize("servers", [1, 3])
@pytest.mark.parametrize("rule", ["sgd", "adagrad", "adam"])
def test_rows_equal_one_process(tmp_path: Path, rule: Any, servers: int) -> None:
    make = partial(Recommend, rule=rule, negatives=0, dim=8)
    truth = train_plainly(make(), steps=6, batch=64, run_seed=3)
    found = train(tmp_path, make(), 3, ParameterServer(servers=servers, clip_norm=1e6), batch=64, steps=6)
    assert distance(found, truth) <= EQUAL


def test_what_travels_of_a_table_are_its_touched_rows(tmp_path: Path) -> None:
    """A table of 3 MB; 24 examples touch at most 24 rows of 12 numbers."""
    train(tmp_path, Wide(), 2, ParameterServer(servers=2), batch=24, steps=5)
    ticks = [e for e in read_events(RunFolder(tmp_path / "run").events) if e.kind == "ticks"]
    sent = sum(e.values["bytes_sent"] for e in ticks if e.role == "worker")
    assert 0 < sent <= 5 * (24 * (2 * 8 + 12 * 8) + 2 * 600)


class Wide(Regression):
    def model(self) -> nn.Module:
        return WideNet()

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        x, y = batch
        return (model((x.sum(1) * 1e4).long() % 30_000) - y).pow(2).mean()

    def optimizer(self, params: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(params, lr=0.05)


class WideNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(30_000, 12, sparse=True)

    def forward(self, rows: Tensor) -> Tensor:
        return self.table(rows).sum(1, keepdim=True)


class Aside(Wide):
    """Reads its table past the module."""

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        x, y = batch
        rows = (x.sum(1) * 1e4).long() % 30_000
        table = cast(WideNet, model).table.weight
        return (torch.nn.functional.embedding(rows, table, sparse=True).sum(1, keepdim=True) - y).pow(2).mean()


class Bounded(Wide):
    def model(self) -> nn.Module:
        net = WideNet()
        net.table.max_norm = 1.0
        return net


def test_a_table_that_is_used_in_another_way_is_refused(tmp_path: Path) -> None:
    with pytest.raises(weft.WeftError, match=r"table.weight.*nn.Embedding.*sparse=False"):
        train(tmp_path / "a", Aside(), 2, ParameterServer(), batch=24)
    with pytest.raises(weft.WeftError, match=r"table.weight.*max_norm"):
        train(tmp_path / "b", Bounded(), 2, ParameterServer(), batch=24)
    with pytest.raises(ConfigError, match=r"correction=dc.*table.weight.*correction=rate"):
        train(tmp_path / "c", Wide(), 2, ParameterServer(staleness=1, correction="dc"), batch=24)


# -- data, stops, what is told


@pytest.mark.multiprocess
@pytest.mark.parametrize("data", ["npy", "counting", "shuffled", "stateful"])
def test_any_share_of_data_that_streams(tmp_path: Path, data: str) -> None:
    """Over the end of an epoch; what a killed worker was at is drawn by another, who is elsewhere in the data."""
    source = write_shards(tmp_path / "data", [60, 47, 96], "npy") if data == "npy" else data
    (tmp_path / "notes").mkdir()
    task, settings = Watched(source, str(tmp_path / "notes")), {"batch": 10, "steps": 26, "save_every": 5}
    world = 3 if data == "npy" else 1  # joined batches of shards depend on how many deal them out
    truth = train(tmp_path / "all", task, world, cast(Any, AllReduce()), **settings)
    pattern, faults = ParameterServer(servers=1, staleness=0), [kill(rank=1, step=9)]
    found = train(tmp_path / "ps", task, 3, pattern, cluster="local", faults=faults, **settings)
    assert distance(found, truth) <= EQUAL
    if data == "npy":
        return
    with pytest.raises(MemberFailed):
        train(tmp_path / "cut", task, 2, pattern, cluster="local", faults=[kill(rank=2, step=13)], **settings)
    weft.resume(tmp_path / "cut" / "run", task=task, workers=3)
    assert distance(final_parameters(tmp_path / "cut" / "run"), truth) <= EQUAL


class Unhurried(Augmented):
    """Noise from all generators, and time for a signal."""

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        time.sleep(0.005)
        return super().loss(model, batch)


class StopAfterTheFirstSave:
    def on_plan(self, plan: Any) -> None: ...
    def on_output(self, member: int, text: str) -> None: ...
    def on_idle(self) -> None: ...
    def on_event(self, event: Any) -> None:
        if event.kind == "saved" and event.step == 10:
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.multiprocess
def test_a_stop_and_a_resume_are_bit_equal(tmp_path: Path) -> None:
    """Whoever computes a share: its random numbers are its own."""
    settings: dict[str, Any] = {"workers": 3, "steps": 60, "batch": 24, "save_every": 10, "eval_every": 20}
    pattern = ParameterServer(servers=2)
    calm = weft.run(Unhurried(), pattern, run_dir=tmp_path / "calm", **settings)
    with pytest.raises(weft.Interrupted, match="weft resume"):
        weft.run(Unhurried(), pattern, run_dir=tmp_path / "run", observer=StopAfterTheFirstSave(), **settings)
    (stopped,) = [e.step for e in read_events(tmp_path / "run" / "events.jsonl") if e.kind == "stopped"]
    assert 10 <= stopped < 60
    result = weft.resume(tmp_path / "run", task=Unhurried())
    assert (result.steps, result.loss) == (60, calm.loss)
    a, b = final_parameters(calm.run_dir), final_parameters(tmp_path / "run")
    assert all(torch.equal(a[n], b[n]) for n in a)


def test_events_and_report_tell_each_step_and_how_late_it_was(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"cluster": "inprocess", "workers": 3, "steps": 20, "batch": 24, "eval_every": 5}
    weft.run(Regression(), ParameterServer(servers=2, staleness=2), run_dir=tmp_path / "run", **settings)
    events = list(read_events(tmp_path / "run" / "events.jsonl"))
    assert [step for e in events for step, _ in losses_of(e)] == list(range(1, 21))
    assert [e.step for e in events if e.kind == "eval"] == [5, 10, 15, 20]
    assert "Lateness of gradients" in write_report(tmp_path / "run").read_text()
