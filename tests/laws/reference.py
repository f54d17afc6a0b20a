"""The independent truth of the laws: a plain single-process torch loop on the joined batches, and tasks to run it on."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

import weft
from weft.data.keys import key_int
from weft.data.sampler import Sampler


def seed(value: int) -> None:
    torch.manual_seed(value)
    np.random.seed(value % 2**32)


def train_plainly(
    task: weft.Task,
    *,
    steps: int,
    batch: int,
    run_seed: int = 0,
    dtype: torch.dtype = torch.float64,
    clip: float | None = None,
    joined: Callable[[], Iterable[np.ndarray]] | None = None,
) -> dict[str, Tensor]:
    """Final parameters of one process that takes each joined batch at once."""
    seed(key_int(run_seed, "data"))
    train, _ = task.data()
    seed(key_int(run_seed, "init"))
    model = task.model().to(dtype)
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = task.optimizer(params)
    schedule = task.schedule(optimizer, steps)
    sampler = Sampler(len(train), batch, 0, 1, run_seed)
    batches = iter(joined()) if joined else (sampler.next().indices for _ in iter(int, 1))
    collate = task.collate or torch.utils.data.default_collate
    for _ in range(steps):
        examples = [train[int(i)] for i in next(batches)]
        optimizer.zero_grad(set_to_none=True)
        task.loss(model, cast(collate(examples), dtype)).backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(params, clip)
        optimizer.step()
        if schedule is not None:
            schedule.step()
    return {n: t.detach() for n, t in model.state_dict().items() if t.is_floating_point()}


def cast(batch: Any, dtype: torch.dtype) -> Any:
    if isinstance(batch, Tensor):
        return batch.to(dtype) if batch.is_floating_point() else batch
    if isinstance(batch, dict):
        return {k: cast(v, dtype) for k, v in batch.items()}
    return [cast(v, dtype) for v in batch]


def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """Largest absolute difference, relative to the global norm of ``b``."""
    assert a.keys() == b.keys()
    norm = sum(float(t.double().pow(2).sum()) for t in b.values()) ** 0.5
    return max(float((a[n].double() - b[n].double()).abs().max()) for n in b if b[n].numel()) / norm


class Regression(weft.Task):
    """A small MLP with momentum SGD and a schedule; 211 examples, so epochs end in odd batches."""

    defaults = weft.Defaults(batch=24, steps=20, epochs=None)

    def __init__(self, optimizer: str = "sgd") -> None:
        self.kind = optimizer

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 1))

    def data(self) -> tuple[Dataset, Dataset]:
        x = torch.randn(240, 6)
        y = x[:, :1] * x[:, 1:2] + 0.1 * torch.randn(240, 1)
        return TensorDataset(x[:211], y[:211]), TensorDataset(x[211:], y[211:])

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        x, y = batch
        return F.mse_loss(model(x), y)

    def optimizer(self, params: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        if self.kind == "adamw":
            return torch.optim.AdamW(params, lr=0.01)
        if self.kind == "plain":
            return torch.optim.SGD(params, lr=0.05)
        return torch.optim.SGD(params, lr=0.05, momentum=0.9)

    def schedule(self, optimizer: torch.optim.Optimizer, total_steps: int) -> Any:
        return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total_steps)


class Augmented(Regression):
    """Noise from Python's and numpy's generators, as datasets like to take it, and from torch's."""

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        x, y = batch
        return F.mse_loss(model(x + float(np.random.randn()) * 0.1 + random.random() * 0.1 + torch.randn_like(x)), y)


class Odd(weft.Task):
    """Everything that data parallelism can get wrong without randomness: tied, frozen and sometimes unused weights, an
    embedding with sparse gradients, batches that are dicts, a weighted loss whose weights are not example counts, and
    weight decay, by which zeros in place of no gradient would move unused weights."""

    defaults = weft.Defaults(batch=16, steps=12, epochs=None)

    def model(self) -> nn.Module:
        return OddNet()

    def data(self) -> tuple[Dataset, Dataset]:
        generator = torch.Generator().manual_seed(5)
        rows = [
            {"token": torch.randint(0, 12, (), generator=generator), "x": torch.randn(4, generator=generator)}
            for _ in range(130)
        ]
        return Rows(rows[:100]), Rows(rows[100:])

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        weight = 1 + batch["token"] % 3
        return (weight * (model(batch) - batch["x"].sum(1)).pow(2)).sum() / weight.sum()

    def num_examples(self, batch: Any) -> int:
        return int((1 + batch["token"] % 3).sum())

    def optimizer(self, params: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        params = list(params)
        table = [p for p in params if p.shape == (12, 4)]  # SGD takes sparse gradients without weight decay only
        rest = [p for p in params if p.shape != (12, 4)]
        return torch.optim.SGD([{"params": table}, {"params": rest, "weight_decay": 0.1}], lr=0.02)


class Rows(Dataset):
    def __init__(self, rows: list[dict[str, Tensor]]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return self.rows[i]


class OddNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(12, 4, sparse=True)
        self.mix = nn.Linear(4, 4)
        self.tied = nn.Linear(4, 4)
        self.tied.weight = self.mix.weight
        self.rare = nn.Linear(4, 1)
        self.out = nn.Linear(4, 1)
        self.frozen = nn.Linear(4, 4)
        self.frozen.requires_grad_(False)
        self.never = nn.Parameter(torch.ones(3))

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        h = self.table(batch["token"]) + batch["x"]
        y = self.out(self.frozen(self.tied(torch.tanh(self.mix(h))))).squeeze(1)
        is_rare = batch["token"] == 11  # few examples: on most steps some ranks, or all, leave `rare` unused
        if bool(is_rare.any()):
            y = y + torch.where(is_rare, self.rare(h).squeeze(1), 0.0)
        return y


class Ragged(Regression):
    """Examples of different length; the loss is the mean over all their numbers, so weights are not example counts."""

    def data(self) -> tuple[Dataset, Dataset]:
        generator = torch.Generator().manual_seed(3)
        lengths = torch.randint(1, 9, (150,), generator=generator).tolist()
        rows = [{"x": torch.randn(n, 6, generator=generator)} for n in lengths]
        return Rows(rows[:120]), Rows(rows[120:])

    @staticmethod
    def collate(examples: list[dict[str, Tensor]]) -> Tensor:
        return torch.cat([e["x"] for e in examples])

    def num_examples(self, batch: Tensor) -> int:
        return len(batch)

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        return (model(batch) - batch.prod(1, keepdim=True)).pow(2).mean()


def train_apart(
    task: weft.Task,
    *,
    workers: int,
    every: int,
    steps: int,
    batch: int,
    outer: tuple[float, float, bool] = (1.0, 0.0, False),
    island: int = 1,
    start: int = 0,
    meet_at: Iterable[int] = (),
    run_seed: int = 0,
    shares: Callable[[int], Iterable[np.ndarray]] | None = None,
) -> dict[str, Tensor]:
    """Local SGD by its definition, in one process: a model and an optimizer per island, a list of tensors for the rest.

    ``meet_at``: steps after which all meet besides (evaluations, saves). ``shares(rank)``: what the rank draws, in turn.
    """
    seed(key_int(run_seed, "data"))
    train, _ = task.data()
    collate = task.collate or torch.utils.data.default_collate
    models, optimizers, schedules = [], [], []
    for _ in range(workers // island):
        seed(key_int(run_seed, "init"))
        models.append(task.model().double())
        optimizers.append(task.optimizer([p for p in models[-1].parameters() if p.requires_grad]))
        schedules.append(task.schedule(optimizers[-1], steps))

    def drawn_by(rank: int) -> Iterable[np.ndarray]:
        sampler = Sampler(len(train), batch, rank, workers, run_seed)
        while True:
            yield sampler.next().indices

    draws = [iter((shares or drawn_by)(rank)) for rank in range(workers)]
    anchor = [p.detach().clone().requires_grad_() for p in models[0].parameters() if p.requires_grad]
    outer_optimizer = torch.optim.SGD(anchor, lr=outer[0], momentum=outer[1], nesterov=outer[2])
    weights, since = [0.0] * len(models), 0
    for step in range(1, steps + 1):
        drawn = [next(d) for d in draws]
        together = step <= start
        for i, model in enumerate(models):
            own = drawn if together else drawn[i * island : (i + 1) * island]
            indices = np.concatenate(own)
            optimizers[i].zero_grad(set_to_none=True)
            if len(indices):
                data = cast(collate([train[int(k)] for k in indices]), torch.float64)
                task.loss(model, data).backward()
                weights[i] += task.num_examples(data)
            optimizers[i].step()
            if schedules[i] is not None:
                schedules[i].step()
        since += 1
        if together:
            weights, since = [0.0] * len(models), 0
            for a, p in zip(anchor, (p for p in models[0].parameters() if p.requires_grad), strict=True):
                a.data.copy_(p.data)
        elif since == every or step == steps or step in set(meet_at):
            for k, a in enumerate(anchor):
                params = [[p for p in m.parameters() if p.requires_grad][k] for m in models]
                total = sum(w * (a.data - p.data) for w, p in zip(weights, params, strict=True))
                a.grad = total / sum(weights)
            outer_optimizer.step()
            for model in models:
                for a, p in zip(anchor, (p for p in model.parameters() if p.requires_grad), strict=True):
                    p.data.copy_(a.data)
            weights, since = [0.0] * len(models), 0
    return {n: t.detach() for n, t in models[0].state_dict().items() if t.is_floating_point()}
