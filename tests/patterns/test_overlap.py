"""Buckets that leave during backward: the same numbers as one process, the same bytes as planned, errors as without."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.laws.reference import Odd, Ragged, Regression, distance, train_plainly
from tests.laws.test_allreduce import EQUAL, STEPS, train
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import weft
from weft import AllReduce, LocalSGD, cost
from weft.comm.background import Background
from weft.comm.link import DEADLINE_S, SoloLink
from weft.config import Config, TaskRef
from weft.errors import Incompatible, MemberFailed, PeerLost
from weft.events import read_events
from weft.patterns.base import Facts, ParamFact
from weft.spans import SECOND_THREAD
from weft.testing import kill

OVERLAPPED: dict[str, Any] = {"cluster": "local", "link": "tcp", "pattern": AllReduce(overlap="on")}


# -- where to cut


def test_buckets_are_cut_from_the_last_parameter_on() -> None:
    assert cost.cut_buckets([5, 3, 1, 4, 2], 6) == [range(3, 5), range(0, 3)]
    assert cost.cut_buckets([5, 3, 1, 4, 2], 1) == [range(k, k + 1) for k in (4, 3, 2, 1, 0)]
    assert cost.cut_buckets([1, 9, 9], 9) == [range(2, 3), range(1, 2), range(0, 1)], "what is left is the last"
    assert cost.cut_buckets([], 9) == []


def test_a_bucket_is_as_small_as_latency_lets_it() -> None:
    slow, far = cost.LinkSpeed(1e-4, 12.5e6), cost.LinkSpeed(20e-3, 12.5e6)
    assert cost.bucket_bytes(2, slow) == cost.MIN_BUCKET_BYTES
    nbytes = cost.bucket_bytes(4, far)
    assert pytest.approx(cost.LATENCY_SHARE * 2 * 3 / 4 * nbytes / 12.5e6) == 2 * 3 * 20e-3


# -- the thread


class Slow(SoloLink):
    """Each call waits for leave, and is recorded."""

    def __init__(self) -> None:
        super().__init__()
        self.world, self.calls = 2, []
        self.leave, self.begun = threading.Semaphore(0), threading.Semaphore(0)

    def all_reduce(self, buffers: Any, op: str = "sum") -> None:
        self.begun.release()
        assert self.leave.acquire(timeout=DEADLINE_S)
        self.calls.append(buffers[0])
        if buffers[0] == "bad":
            raise PeerLost("gone", (1,))


def exchange_threads() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name == SECOND_THREAD]


def test_exchanges_go_on_in_order_while_the_caller_does_something_else() -> None:
    link = Slow()
    background = Background(link)
    for name in "abc":
        background.all_reduce([name])
    assert link.begun.acquire(timeout=DEADLINE_S), "it has begun before anyone joins"
    link.leave.release(3)
    background.join()
    assert link.calls == ["a", "b", "c"]
    assert exchange_threads() == []


def test_an_error_is_the_callers_and_nothing_is_begun_after_it() -> None:
    link = Slow()
    background = Background(link)
    for name in ("a", "bad", "c"):
        background.all_reduce([name])
    link.leave.release(9)
    with pytest.raises(PeerLost, match="gone"):
        background.join()
    assert link.calls == ["a", "bad"]
    assert exchange_threads() == []


def test_after_an_error_of_the_caller_only_what_has_begun_ends() -> None:
    link = Slow()
    background = Background(link)
    for name in "abc":
        background.all_reduce([name])
    assert link.begun.acquire(timeout=DEADLINE_S)
    threading.Timer(0.1, link.leave.release).start()
    background.close()
    assert link.calls == ["a"]
    assert exchange_threads() == []
    background.close()


# -- laws


class Wide(Regression):
    """Five buckets in float64: three layers of 1.3 MB, what is before them, and a branch that only some examples use."""

    def model(self) -> nn.Module:
        return WideNet()

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        x, y = batch
        return (model(x) - y).pow(2).mean()

    def optimizer(self, params: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        return slow_sgd(params)


def slow_sgd(params: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """Weight decay moves what zeros in place of no gradient would move."""
    return torch.optim.SGD(params, lr=1e-3, momentum=0.9, weight_decay=0.1)


class WideNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 400)
        self.never = nn.Parameter(torch.ones(3))
        self.middle = nn.ModuleList(nn.Linear(400, 400) for _ in range(3))
        self.rare = nn.Linear(400, 400)
        self.out = nn.Linear(400, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        for layer in self.middle:
            h = h + torch.tanh(layer(h))
        y = self.out(h)
        is_rare = x[:, :1] > 1.4  # in most steps some ranks leave it unused
        return y + torch.where(is_rare, self.out(self.rare(h)), 0.0) if bool(is_rare.any()) else y


class WideRagged(Ragged):
    def model(self) -> nn.Module:
        return WideNet()

    def optimizer(self, params: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        return slow_sgd(params)


class Reentrant(Wide):
    """One layer is computed in two checkpointed pieces, each of which goes backward by itself."""

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        x, y = batch
        h = torch.tanh(model.first(x))
        for layer in (model.rare, model.rare):
            h = checkpoint(layer, h, use_reentrant=True)
        return (model.out(h) - y).pow(2).mean()


@pytest.mark.multiprocess
@pytest.mark.parametrize(
    ("make", "batch", "workers", "options"),
    [
        pytest.param(Wide, 24, 3, {}, id="unused"),
        pytest.param(WideRagged, 10, 2, {"accumulate": 3, "clip_norm": 0.5}, id="accumulate"),
        pytest.param(Wide, 26, 4, {}, id="nothing drawn", marks=pytest.mark.slow),
        pytest.param(Odd, 17, 3, {}, id="one bucket", marks=pytest.mark.slow),
    ],
)
def test_equals_one_process_on_the_joined_batch(
    tmp_path: Path, make: type[weft.Task], batch: int, workers: int, options: dict[str, Any]
) -> None:
    steps = 18 if batch == 26 else STEPS  # the epoch's last batch of 3 leaves one of four ranks with nothing
    truth = train_plainly(make(), steps=steps, batch=batch, run_seed=3, clip=options.get("clip_norm"))
    settings = OVERLAPPED | {"pattern": AllReduce(overlap="on", **options), "batch": batch, "steps": steps}
    assert distance(train(tmp_path, make(), workers, **settings), truth) <= EQUAL


@pytest.mark.multiprocess
def test_it_leaves_as_many_bytes_as_planned_and_some_of_them_early(tmp_path: Path) -> None:
    """Two workers add up in one order whatever is cut: so all is bit-equal, and also after a kill and a resume."""
    settings = {"batch": 24, "trace": True, "save_every": 4, "steps": STEPS, "workers": 2}
    plain = train(tmp_path / "off", Wide(), **(OVERLAPPED | settings | {"pattern": AllReduce(overlap="off")}))
    disturbed = settings | {"restarts": 1, "faults": [kill(rank=1, step=7)]}
    got = train(tmp_path / "on", Wide(), **(OVERLAPPED | disturbed))
    assert all(torch.equal(got[n], plain[n]) for n in plain)
    run_dir = tmp_path / "on" / "run"
    plan = json.loads((run_dir / "plan.json").read_text())
    ticks = [e.values for e in read_events(run_dir / "events.jsonl") if e.kind == "ticks" and e.member == 0]
    assert plan["choices"]["overlap"] == "on (asked for; 5 buckets, the last parameters' first)"
    assert (ticks[0]["first"], ticks[0]["last"]) == (1, 1)
    assert ticks[0]["bytes_sent"] == pytest.approx(plan["links"][0]["bytes_per_step"], abs=64), (
        "a chunk may be a line longer"
    )
    assert sum(t["hidden_s"] for t in ticks) > 0
    spans = json.loads((run_dir / "trace.json").read_text())["traceEvents"]
    reduced = [s for s in spans if s["name"] == "all_reduce" and s["args"]["step"] == STEPS]
    assert sorted(s["tid"] for s in reduced) == [1, 1, 2, 2, 2, 2, 2, 2, 2, 2], (
        "two workers, the last bucket of each on its own"
    )


# -- what goes wrong


class Breaks(Wide):
    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        loss = super().loss(model, batch)
        if torch.initial_seed() % 2 == 0:  # seeded by step and rank
            model.first.weight.register_hook(_raise)
        return loss


def _raise(grad: Tensor) -> None:
    raise RuntimeError("broken in mid-backward")


@pytest.mark.multiprocess
@pytest.mark.parametrize(
    ("make", "words"),
    [(Reentrant, "rare.* came a second time in one backward"), (Breaks, "broken in mid-backward")],
)
def test_an_error_in_backward_ends_the_run_with_its_cause(tmp_path: Path, make: type[weft.Task], words: str) -> None:
    with pytest.raises(MemberFailed, match=words):
        train(tmp_path, make(), 2, **OVERLAPPED, batch=24)


# -- where it may be


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"cluster": "local", "link": "shm"}, "overlap=on is not possible: inside a host.* Use --link tcp, or"),
        ({"cluster": "inprocess", "link": "auto"}, "link 'inproc' .* backward. Use --cluster local --link tcp, or"),
        ({"pattern": AllReduce(overlap="on", compress="int8")}, "compress=int8 leaves little to hide. Leave it out"),
    ],
)
def test_where_it_cannot_be_it_is_refused(tmp_path: Path, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(Incompatible, match=words):
        weft.run(Regression(), workers=2, steps=1, run_dir=tmp_path / "run", **(OVERLAPPED | settings))
    with pytest.raises(Incompatible, match="within.overlap=on"):
        LocalSGD(within=AllReduce(overlap="on"))


@pytest.mark.parametrize(
    ("between_hosts", "size", "why"),
    [
        (True, 1 << 20, "on (2 buckets, the last parameters' first)"),
        (True, 1 << 19, "off (all gradients fit into one bucket)"),
        (False, 1 << 20, "off (the workers stand on one host, where it gains nothing)"),
    ],
)
def test_auto_is_on_between_hosts(between_hosts: bool, size: int, why: str) -> None:
    params = [ParamFact(name, (size // 4,), "float32", size, True, False) for name in ("a", "b")]
    facts = Facts(
        params=params,
        buffers=[],
        train_examples=1,
        test_examples=1,
        optimizer_bytes=0,
        activation_bytes=0,
        sums={},
        notes={},
        device="cpu",
        between_hosts=between_hosts,
    )
    config = Config(task=TaskRef(name="t"), pattern="allreduce", workers=2)
    assert AllReduce().choices(facts, config, "gloo")["overlap"] == why
