"""What cannot be split is refused in the preflight, or by the choice that follows it, with the cure: no worker has started by then."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from tests.laws.reference import Regression
from tests.laws.test_pipeline import MaskedNet
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import weft
from weft import Mesh, Pipeline, Sharded
from weft.driver.requests import make_config
from weft.errors import ConfigError, Incompatible, TaskError, WeftError
from weft.patterns.base import Pattern
from weft.patterns.preflight import preflight
from weft.tasks.codelm import CodeLM


class Of(Regression):
    def __init__(self, net: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.net = net

    def model(self) -> nn.Module:
        return self.net()


def prepare(task: weft.Task, pattern: Pattern, workers: int, batch: int = 24) -> None:
    """All that is done before workers start, in this process."""
    config = make_config(task, pattern, "local", {}, {}, batch, workers, partition="shuffle")
    pattern.groups(preflight(task, pattern, config), workers)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Any:
        return torch.tanh(self.linear(x))


class Row(nn.Module):
    """Blocks in a row; what stands round them is for others to say."""

    def __init__(self, block: Callable[[], nn.Module] = Block, num: int = 4) -> None:
        super().__init__()
        self.first, self.blocks = nn.Linear(6, 6), nn.ModuleList(block() for _ in range(num))
        self.end = nn.Linear(6, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return self.end(x)


# -- beside the blocks' results


class Looks(Row):
    """At numbers, between blocks: a later stage runs this code without them."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks[:3]:
            x = block(x)
        assert x.isfinite().all()
        for block in self.blocks[3:]:
            x = block(x)
        return self.end(x)


class Checkpointed(Row):
    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False)
        return self.end(x)


class Skips(Row):
    def forward(self, x: Tensor) -> Tensor:
        x = early = self.first(x)
        for block in self.blocks:
            x = block(x)
        return self.end(x + early)


class Twice(Row):
    def forward(self, x: Tensor) -> Tensor:
        for block in [*self.blocks, self.blocks[0]]:
            x = block(x)
        return self.end(x)


class RunsTwice(Of):
    def evaluate(self, model: nn.Module, batch: Any) -> dict[str, Any]:
        return {"loss": (self.loss(model, batch), 1), "size": (model(batch[0]).abs().sum(), len(batch[0]))}


# -- in place


class AddsInPlace(Row):
    def forward(self, x: Tensor) -> Tensor:
        early = x
        for block in self.blocks:
            x = block(x)
            x += early
        return self.end(x)


class InPlace(Block):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(nn.functional.relu(x, inplace=True))


class Rectified(Block):
    """In place, but only what it has made itself."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.relu(self.linear(x), inplace=True)


class Fades(Block):
    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        scale[:, 0] *= 0.5
        return self.linear(x + scale)


class FadesShared(Row):
    """Nothing that is needed for gradients: torch would not mind."""

    def __init__(self) -> None:
        super().__init__(Fades)

    def forward(self, x: Tensor) -> Tensor:
        scale = torch.ones_like(x)
        for block in self.blocks:
            x = block(x, scale)
        return self.end(x)


class ScalesBatch(Row):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.clamp_(-1, 1))


class KeepsMean(Row):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(6))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
            self.seen += x.detach().mean(0)
        return self.end(x)


# -- what blocks return


class Pair(NamedTuple):
    a: Tensor
    b: Tensor


class Returns(Row):
    """``make``: of a tensor what a block returns; ``take``: back."""

    def __init__(self, make: Callable[[Tensor, bool], Any], take: Callable[[Any], Tensor]) -> None:
        class Made(Block):
            def forward(self, x: Any) -> Any:
                return make(super().forward(x if isinstance(x, Tensor) else take(x)), self.training)

        super().__init__(Made)
        self.take = take

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.end(x if isinstance(x, Tensor) else self.take(x))


# -- tensor


class Mlp(nn.Module):
    def __init__(self, hidden: int, *between: nn.Module) -> None:
        super().__init__()
        self.up, self.between, self.down = nn.Linear(6, hidden), nn.Sequential(*between), nn.Linear(hidden, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.between(torch.tanh(self.up(x))))


class Centred(nn.Module):
    """Between its pairs it needs all of the sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks, self.end = nn.ModuleList(Pairwise() for _ in range(2)), nn.Linear(3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = x.view(len(x), 2, 3)
        for block in self.blocks:
            x = block(x)
        return self.end(x.mean(1))


class PairOutside(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.end = nn.Linear(6, 16), nn.Linear(16, 6), nn.Linear(6, 1)
        self.blocks = nn.ModuleList(nn.LayerNorm(6) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.down(torch.tanh(self.up(x)))
        for block in self.blocks:
            x = block(x)
        return self.end(x)


class Pairwise(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(3, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.down(torch.tanh(self.up(x)))
        return x - x.mean(1, keepdim=True)


class Planned(Of):
    def __init__(self, net: Callable[[], nn.Module], **styles: str) -> None:
        super().__init__(net)
        self.styles = styles

    def tensor_plan(self, model: nn.Module) -> dict[str, str]:
        return self.styles


T2, P2 = weft.Tensor(), Pipeline()


class WithScale(Row):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.scale * x)


class TiedToBlock(Row):
    def __init__(self) -> None:
        super().__init__()
        self.blocks[1].linear.weight = self.first.weight


class Penalised(Of):
    def __init__(self, net: Callable[[], nn.Module], first: bool = False) -> None:
        super().__init__(net)
        self.first = first

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        def penalty() -> Any:
            return 1e-2 * sum(p.pow(2).sum() for p in model.parameters())

        return penalty() + super().loss(model, batch) if self.first else super().loss(model, batch) + penalty()


class Stepped(Of):
    def __init__(self, net: Callable[[], nn.Module], kind: Callable[[Any], torch.optim.Optimizer]) -> None:
        super().__init__(net)
        self.kind_of_step = kind

    def optimizer(self, params: Any) -> torch.optim.Optimizer:
        return self.kind_of_step(params)


class KeepsList(torch.optim.SGD):
    def step(self, closure: Any = None) -> Any:
        for p in (p for group in self.param_groups for p in group["params"]):
            self.state[p].setdefault("seen", []).append(p.grad)
        return super().step(closure)


BAD: dict[str, tuple[weft.Task, Pattern, int, type[WeftError], str]] = {
    # degrees
    "degree": (Of(Row), weft.Tensor(degree=3), 2, ConfigError, "degree=3 needs as many workers, and there are 2: use --workers 3"),
    "smaller degree": (Of(Row), weft.Tensor(degree=2), 4, ConfigError, "leaves 2 of 4 workers without a part: use --workers 2, or --pattern mesh -o tensor=2"),
    "stages": (Of(Row), Pipeline(stages=3), 2, ConfigError, "stages=3 takes as many workers, and there are 2: use --workers 3"),
    "replicas": (Of(Row), Sharded(replicas=3), 4, ConfigError, "replicas=3 does not divide 4 workers: give one of 1, 2, 4"),
    "mesh": (Of(Row), Mesh(data=3, pipeline=2), 4, ConfigError, "4 workers cannot hold data=3 x pipeline=2, which takes 6: use --workers 6"),
    "blocks": (Of(MaskedNet), P2, 8, ConfigError, "5 parts .* cannot fill 8 stages: at most 5 ranks, or let the task give more, smaller blocks"),
    "blocks of zbv": (Of(lambda: Row(num=2)), Pipeline(schedule="zbv"), 2, ConfigError, "3 parts .* cannot fill 4 stages .* at most 1 ranks"),
    "micro-batches": (Of(Row), Pipeline(microbatches=25), 2, ConfigError, "microbatches=25 is more than the 24 examples of a share: use at most 24"),
    "micro-batches of a share": (Of(Row), Mesh(data=2, pipeline=2, microbatches=13), 4, ConfigError, "more than the 12 examples of a share"),
    "pieces": (Of(Row), Sharded(accumulate=13), 2, ConfigError, "accumulate=13 cannot cut a worker's share of 12 examples"),
    # sizes
    "heads": (CodeLM(size="tiny", layers=1, seq_len=16, test_windows=8), T2, 2, Incompatible, "heads must be divisible by 2.* Use another degree"),
    "hidden": (Of(lambda: Mlp(15)), T2, 2, Incompatible, "of up, its 15 outputs cannot be divided by 2. Use another degree"),
    "planned": (Planned(lambda: Mlp(15), up="column", down="row"), T2, 2, Incompatible, "tensor=2 cannot cut up: its 15 outputs cannot be divided by 2. Use another"),
    "no pair": (Of(lambda: nn.Linear(6, 1)), T2, 2, Incompatible, "no Linears that feed one another .*: use --pattern sharded"),
    "norm in a pair": (Of(lambda: Mlp(8, nn.BatchNorm1d(8))), T2, 2, Incompatible, "up stays whole, for buffer between.0.running_mean between them would not be"),
    "norm in a plan": (Planned(lambda: Mlp(8, nn.BatchNorm1d(8)), up="column", down="row"), T2, 2, Incompatible, "leave out the Linears round it"),
    # the sequence
    "no pair in a block": (Of(PairOutside), weft.Tensor(sequence=True), 2, Incompatible, "sequence=true: no pair of Linears within the blocks"),
    "no parts between": (Of(Centred), weft.Tensor(sequence=True), 2, Incompatible, "between its pairs of Linears, Of's model calls aten.mean.dim.*Leave sequence=true out"),
    "one worker": (Of(Centred), weft.Tensor(sequence=True), 1, Incompatible, "sequence=true with one worker: nothing is in parts. Use --workers 2"),
    # blocks
    "no blocks": (Of(lambda: nn.Linear(6, 1)), P2, 2, Incompatible, "has no blocks that run one after the other.* give the task blocks"),
    "looks at numbers": (Of(Looks), P2, 2, TaskError, "before the end of block 'blocks.3', .* looks at numbers .*__bool__.*after the last block"),
    "checkpoint": (Of(Checkpointed), P2, 2, TaskError, "backward runs block 'blocks.[0-9]' once more .*put the checkpoint inside the block"),
    "skip": (Of(Skips), P2, 2, TaskError, "after block 'blocks.3', .* uses what it computed before that block ended.*let the blocks return that"),
    "twice": (Of(Twice), P2, 2, TaskError, "runs block 'blocks.0' twice in one loss or evaluate.*or make one block"),
    "twice in evaluate": (RunsTwice(Row), P2, 2, TaskError, "runs block 'blocks.0' twice .*Compute all from one run"),
    # in place
    "a result": (Of(AddsInPlace), P2, 2, TaskError, r"after block 'blocks.0', .* changes in place what that block returned \(.*add.*\).*x = x \+ y"),
    "what a block is given": (Of(lambda: Row(InPlace)), P2, 2, TaskError, "after block 'blocks.0', .* changes in place what that block returned .relu"),
    "something shared": (Of(FadesShared), P2, 2, TaskError, "after block 'blocks.0', .* changes in place what it made before that block ended"),
    "the batch": (Of(ScalesBatch), P2, 2, TaskError, r"changes its batch in place \(clamp_\)"),
    "a buffer": (Of(KeepsMean), P2, 2, TaskError, "writes to buffer 'seen' .* after the end of block 'blocks.1'.*Give each block a buffer of its own"),
    # what cannot be in parts
    "a single number": (Of(WithScale), Sharded(), 2, Incompatible, r"parameter 'scale' of Of's model is a single number .*give it one"),
    "a penalty": (Penalised(Row), Sharded(), 2, TaskError, "uses parameter 'blocks.0.linear.weight' outside the forward of block 'blocks.0' .pow.*weight_decay"),
    "a penalty of the rest": (Penalised(lambda: nn.Linear(6, 1), first=True), Sharded(), 2, TaskError, "outside the model's forward"),
    "a penalty, in tensors": (Penalised(lambda: Mlp(16)), T2, 2, Incompatible, "the loss must not use parameters by themselves"),
    "a tie": (Of(TiedToBlock), Sharded(), 2, TaskError, "uses one parameter in two parts .*'first.weight' and 'blocks.1.linear.weight'.*Make one block"),
    "an optimizer": (Stepped(Row, torch.optim.Adafactor), Sharded(), 2, Incompatible, "Adafactor looks at each parameter as a whole.*an optimizer that treats"),
    "an optimizer, in tensors": (Stepped(lambda: Mlp(16), torch.optim.Adafactor), T2, 2, Incompatible, "Adafactor looks at each parameter as a whole"),
    "an optimizer's notes": (Stepped(Row, KeepsList), P2, 2, Incompatible, "KeepsList keeps a list as 'seen' for each parameter.*under a key of its own"),
    # results
    "dictionary": (Of(lambda: Returns(lambda x, _: {"x": x}, lambda d: d["x"])), P2, 2, Incompatible, "block 'blocks.0' of Of's model returns a dict: .* Return that"),
    "named tuple": (Of(lambda: Returns(lambda x, _: Pair(x, x), lambda d: d.a)), P2, 2, Incompatible, r"returns a Pair of 2 \(Tensor, Tensor\): .*plain tuple"),
    "list": (Of(lambda: Returns(lambda x, _: [x], lambda d: d[0])), P2, 2, Incompatible, r"returns a list of 1 \(Tensor\)"),
    "other in eval": (Of(lambda: Returns(lambda x, trains: (x, x) if trains else x, lambda d: d[0])), P2, 2, Incompatible, "one thing in training and another"),
}  # fmt: skip


@pytest.mark.parametrize("bad", BAD)
def test_is_refused_with_the_cure(bad: str) -> None:
    task, pattern, workers, kind, says = BAD[bad]
    with pytest.raises(kind, match=says):
        prepare(task, pattern, workers)


@pytest.mark.parametrize(
    ("task", "pattern", "batch"),
    [
        (Of(Row), Mesh(data=2, pipeline=2, microbatches=2), 4),
        (Of(Row), Mesh(data=2, pipeline=2, microbatches=5), 23),
        (Of(Row), Pipeline(microbatches=1), 24),
        (Of(lambda: Row(Rectified)), P2, 24),
        (Of(lambda: Returns(lambda x, _: (x, x), lambda d: d[0])), P2, 24),
        (Of(lambda: Returns(lambda x, _: (x, None), lambda d: d[0])), P2, 24),
    ],
    ids=["batch of one each", "uneven", "one micro-batch", "in place within a block", "tuple", "tuple with None"],
)
def test_what_can_be_is_not(task: weft.Task, pattern: Pattern, batch: int) -> None:
    prepare(task, pattern, 4 if isinstance(pattern, Mesh) else 2, batch)


@pytest.mark.multiprocess
def test_nothing_starts_and_nothing_is_left(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match="let the blocks return that, too"):
        weft.run(Of(Skips), P2, workers=2, cluster="local", steps=2, run_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()
