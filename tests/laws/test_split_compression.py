"""What copies of a part of a model exchange can be compressed: as AllReduce's, of each worker's own part."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from tests.laws.reference import Regression, distance, train_plainly
from tests.laws.test_split import train
from tests.patterns.predicted import facts_of
from tests.variants import rest_slow
from torch import nn

import weft
from weft import AllReduce
from weft.compare import final_parameters
from weft.config import RunFolder
from weft.errors import ConfigError, Incompatible, MemberFailed, WeftError
from weft.events import read_events
from weft.patterns.base import Pattern
from weft.patterns.copies import held_by_several
from weft.patterns.mesh import Mesh
from weft.patterns.pipelined import choose
from weft.patterns.sharded import Sharded
from weft.patterns.split import SplitPattern
from weft.patterns.tensor import Tensor
from weft.resilience import checkpoint
from weft.testing import kill

STEPS = 5
EQUAL = 1e-9

LAYOUTS: dict[str, SplitPattern] = {
    "data x tensor": Mesh(data=2, tensor=2),
    "data x pipeline": Mesh(data=2, pipeline=2, schedule="1f1b"),
    "replicas": Sharded(replicas=2),
}


def compressed(layout: str, compress: str, **options: Any) -> SplitPattern:
    return dataclasses.replace(LAYOUTS[layout], compress=compress, **options)


class Broad(Regression):
    """Matrices of 4096 numbers, so that also a half of one is large enough to be compressed."""

    def model(self) -> nn.Module:
        return BroadNet()

    def tensor_plan(self, model: nn.Module) -> dict[str, str]:
        return {"blocks.*.up": "column", "blocks.*.down": "row"}


class BroadNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.start, self.end = nn.Linear(6, 32), nn.Linear(32, 1)
        self.blocks = nn.ModuleList([Pair() for _ in range(4)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.start(x)
        for block in self.blocks:
            x = block(x)
        return self.end(x)


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(32, 128), nn.Linear(128, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.tanh(self.up(x)))


# -- laws


@pytest.mark.multiprocess
@pytest.mark.parametrize("layout", rest_slow(list(LAYOUTS)))
@pytest.mark.parametrize("compress", rest_slow(["topk:1:full", "powersgd:64", "blocks:1"]))
def test_what_leaves_nothing_out_is_one_process(tmp_path: Path, layout: str, compress: str) -> None:
    truth = train_plainly(Broad("adamw"), steps=STEPS, batch=24, run_seed=3)
    assert distance(train(tmp_path / "run", Broad("adamw"), compressed(layout, compress), 4), truth) <= EQUAL


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize("compress", ["int8", "sign"])
@pytest.mark.parametrize("clip_norm", [0.05, None])
def test_of_whole_parameters_it_is_allreduce_by_the_same_codec(
    tmp_path: Path, compress: str, clip_norm: float | None
) -> None:
    """Stages hold whole parameters, and each of these codecs looks at one, or at 1024 numbers of it, by itself. What is clipped is what came out. Not PowerSGD:
    it begins with random columns, and draws them for all that a worker compresses."""
    plain = train(tmp_path / "plain", Broad("plain"), AllReduce(compress=compress, clip_norm=clip_norm), 2)
    got = train(tmp_path / "run", Broad("plain"), compressed("data x pipeline", compress, clip_norm=clip_norm), 4)
    assert distance(got, plain) <= EQUAL
    whole = train_plainly(Broad("plain"), steps=STEPS, batch=24, run_seed=3, clip=clip_norm)
    assert distance(got, whole) > 10 * EQUAL


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_killed_run_comes_back_bit_for_bit(tmp_path: Path, layout: str) -> None:
    pattern = compressed(layout, "powersgd:2" if layout == "data x tensor" else "topk:0.05")
    job: dict[str, Any] = {"save_every": 4, "steps": 10}
    undisturbed = train(tmp_path / "undisturbed", Broad("adamw"), pattern, 4, **job)
    with pytest.raises(MemberFailed):
        train(tmp_path / "run", Broad("adamw"), pattern, 4, **job, faults=[kill(rank=1, step=7)])
    assert weft.resume(tmp_path / "run", task=Broad("adamw")).steps == 10
    got = final_parameters(tmp_path / "run")
    assert all(torch.equal(got[n], undisturbed[n]) for n in undisturbed)
    assert "dropped" not in (tmp_path / "run" / "plan.json").read_text()


@pytest.mark.multiprocess
@pytest.mark.slow
@pytest.mark.parametrize(
    ("pattern", "workers"),
    [
        (AllReduce(compress="topk:0.05"), 2),
        (Mesh(data=2, tensor=2), 4),
        (Mesh(data=2, tensor=2, compress="int8"), 4),
        (Sharded(replicas=2, compress="topk:0.05"), 4),
        (Tensor(), 2),
    ],
    ids=str,
)
def test_another_layout_goes_on_without_what_waited_and_says_so(tmp_path: Path, pattern: Pattern, workers: int) -> None:
    job: dict[str, Any] = {"save_every": 4, "steps": 10, "faults": [kill(rank=1, step=7)]}
    with pytest.raises(MemberFailed):
        train(tmp_path / "run", Broad(), compressed("data x tensor", "topk:0.05"), 4, **job)
    assert weft.resume(tmp_path / "run", task=Broad(), pattern=pattern, workers=workers).steps == 10
    notes = json.loads((tmp_path / "run" / "plan.json").read_text())["notes"]
    assert any("what topk held back of gradients is dropped" in note for note in notes)


@pytest.mark.multiprocess
@pytest.mark.slow
def test_over_another_carrier_a_pipeline_keeps_the_cuts_of_what_waits(tmp_path: Path) -> None:
    pattern = dataclasses.replace(compressed("data x pipeline", "topk:0.05"), schedule="auto")
    with pytest.raises(MemberFailed):
        train(tmp_path / "run", Broad(), pattern, 4, save_every=4, steps=10, faults=[kill(rank=1, step=7)])
    before = RunFolder(tmp_path / "run").config().measured
    assert weft.resume(tmp_path / "run", task=Broad(), link="tcp").steps == 10
    after = RunFolder(tmp_path / "run").config().measured
    assert before is not None
    assert after is not None
    assert (before.carrier, after.carrier) == ("shm", "tcp")
    assert before.pipeline == after.pipeline


# -- what it takes


@pytest.mark.multiprocess
@pytest.mark.parametrize("layout", rest_slow(list(LAYOUTS)[::-1]))
@pytest.mark.parametrize("compress", rest_slow(["int8", "topk:0.05", "powersgd:2", "none"]))
def test_counted_bytes_and_memory_are_the_planned_ones(tmp_path: Path, layout: str, compress: str) -> None:
    """On the axis data, by its own link; of memory, what was saved."""
    run_dir, job = tmp_path / "run", {"dtype": "float32", "steps": 40, "link": "tcp", "save_every": 0}
    train(run_dir, Broad(), compressed(layout, compress), 4, **job)
    plan = json.loads((run_dir / "plan.json").read_text())
    planned = [link["bytes_per_step"] for link in plan["links"] if link["group"] == "data"]
    told = [event.values for event in read_events(run_dir / "events.jsonl") if "sent" in event.values]
    counted = sum(values["sent"]["data"] for values in told) / 40
    assert counted / 4 == pytest.approx(sum(planned) / len(planned), rel=0.03)
    found, _ = checkpoint.newest_good(run_dir / "checkpoints")
    assert found is not None
    if compress == "none":
        assert "error feedback" not in plan["members"][0]["memory"]
        return
    assert f"compressed by {compress}" in "".join(link["what"] for link in plan["links"])
    kept = [part["compress"]["own"] for part in found.parts.values()]
    held = [sum(t.nbytes for f in each.values() for t in f["residual"].values()) for each in kept]
    assert max(held) == plan["members"][0]["memory"]["error feedback"]


class Telling(Broad):
    """Of a matrix that is not cut, and large enough to be compressed."""

    def model(self) -> nn.Module:
        model = BroadNet()
        model.start = nn.Sequential(nn.Linear(6, 32), nn.Linear(32, 32))
        return model

    def loss(self, model: nn.Module, batch: Any) -> torch.Tensor:
        print("whole:", float(model.start[1].weight.detach().sum()))
        return super().loss(model, batch)


@pytest.mark.slow
@pytest.mark.multiprocess
def test_what_is_not_cut_stays_the_same_on_all_workers(tmp_path: Path) -> None:
    train(tmp_path / "run", Telling(), compressed("data x tensor", "topk:0.05"), 4, steps=12)
    logs = [(tmp_path / "run" / "logs" / f"worker-{k}.log").read_text().splitlines() for k in range(4)]
    told = [[line for line in log if line.startswith("whole:")] for log in logs]
    assert len(set(told[0])) >= 12
    assert all(lines[-12:] == told[0][-12:] for lines in told)


def test_what_several_workers_hold_alike_travels_whole() -> None:
    """Beside different neighbours each would choose other numbers of it, and copies of one parameter would part."""
    facts = facts_of(tensor=2, microbatches=8)
    assert facts.tensor is not None
    assert facts.pipeline is not None
    tensor = msgspec.structs.replace(facts.tensor, parameters=[p.name for p in facts.params[1:]])
    pipeline = msgspec.structs.replace(facts.pipeline, uses=facts.pipeline.uses | {"blocks.7.weight": [0, 7]})
    facts = msgspec.structs.replace(facts, tensor=tensor, pipeline=pipeline)
    for pattern, several in (
        (Mesh(data=2, tensor=2), {"blocks.0.weight"}),
        (Mesh(data=2, pipeline=2), {"blocks.7.weight"}),
        (Mesh(data=2, pipeline=2, tensor=2), {"blocks.0.weight", "blocks.7.weight"}),
        (Sharded(replicas=2), set()),
    ):
        layout = pattern.layout(8 if len(several) == 2 else 4)
        chosen = choose(facts, pattern.pipelined, 2) if layout.pipeline > 1 else None
        assert held_by_several(facts, layout, chosen) == several


# -- refusals


@pytest.mark.parametrize(
    ("pattern", "options", "kind", "says"),
    [
        (
            "mesh",
            {"data": 2, "compress": "auto"},
            Incompatible,
            "compress=auto asks what pays on the link of all workers",
        ),
        ("mesh", {"data": 2, "compress": "dgc:0.1"}, Incompatible, "use topk:RATIO, which leaves it there"),
        ("mesh", {"tensor": 2, "compress": "int8"}, Incompatible, "there is one: use data=2 or more, or compress=none"),
        ("sharded", {"compress": "int8"}, Incompatible, "there is one: use replicas=2 or more"),
        ("sharded", {"replicas": 2, "compress": "topk"}, ConfigError, "write topk:RATIO"),
        ("tensor", {"compress": "int8"}, ConfigError, "compress"),
        ("pipeline", {"compress": "int8"}, ConfigError, "compress"),
    ],
)
def test_what_would_be_swallowed_is_refused(
    tmp_path: Path, pattern: str, options: dict[str, Any], kind: type[WeftError], says: str
) -> None:
    with pytest.raises(kind, match=says):
        weft.run(Broad(), pattern, "local", pattern_options=options, workers=2, run_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()
