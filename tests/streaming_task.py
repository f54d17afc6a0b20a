"""A task whose workers keep a notebook: which examples each update used, and which files were opened."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from tests.data.streaming import ids_of
from torch import Tensor, nn
from torch.utils.data import IterableDataset, TensorDataset

import weft
from weft.data import Shards


class Counting(IterableDataset):
    """0..n-1; ``length``: what it says that it has."""

    def __init__(self, n: int, length: int | None = None) -> None:
        self.n = n
        if length is not None:
            self.__class__ = type("Counting", (Counting,), {"__len__": lambda self: length})

    def __iter__(self) -> Iterator[Tensor]:
        return iter(torch.arange(self.n))


class Shuffled(Counting):
    """In an order drawn from torch's global generator, with noise from it at every example."""

    def __iter__(self) -> Iterator[Tensor]:
        for i in torch.randperm(self.n):
            yield i + 0 * torch.rand(())


class Stateful(Counting):
    """By torchdata's convention; it would raise if a resume made it begin anew instead."""

    at = epoch = 0
    restored = False

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[Tensor]:
        begin, self.at = (self.at if self.restored else 0), 0
        self.restored = False
        for i in range(begin, self.n):
            self.at = i + 1
            yield torch.tensor((i + 5 * self.epoch) % self.n)

    def state_dict(self) -> dict[str, Any]:
        return {"at": self.at, "tensor": torch.tensor([self.at])}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.at, self.restored = int(state["tensor"][0]), True
        assert self.at == state["at"] > 0


STREAMS = {"counting": Counting, "shuffled": Shuffled, "stateful": Stateful}


class Watched(weft.Task):
    """``data``: a glob of shards whose records carry ids; or the name of a stream of ``n``."""

    defaults = weft.Defaults(batch=10, steps=50, epochs=None)

    def __init__(self, data: str, notebook: str, n: int = 203, buffer_mb: float = 64.0) -> None:
        self.source, self.notebook, self.n, self.buffer_mb = data, Path(notebook), n, buffer_mb
        self.clock: Any = None

    def data(self) -> tuple[Any, Any]:
        held_out = TensorDataset(torch.arange(20))
        if self.source in STREAMS:
            return STREAMS[self.source](self.n), held_out
        folder = os.path.dirname(self.source)

        def note(event: str, args: tuple[Any, ...]) -> None:
            if event == "open" and str(args[0]).startswith(folder) and self.clock is not None:
                self.note("opened", os.path.basename(args[0]))

        sys.addaudithook(note)

        def batch(records: Any) -> Tensor:
            return torch.tensor(ids_of(records))

        return Shards(self.source, batch_transform=batch, buffer_mb=self.buffer_mb), held_out

    def note(self, *what: Any) -> None:
        with (self.notebook / f"{os.getpid()}.jsonl").open("a") as file:
            file.write(json.dumps(what) + "\n")

    def model(self) -> nn.Module:
        return nn.Linear(1, 1)

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        ids = batch[0] if isinstance(batch, list) else batch
        if model.training and self.clock is not None:
            self.note("step", self.clock.last_epoch, ids.tolist())
        x = ids[:, None].to(model.weight.dtype) / self.n
        return (model(x) - x.sin()).pow(2).mean()

    def optimizer(self, params: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.SGD(params, lr=0.1, momentum=0.9)

    def schedule(self, optimizer: torch.optim.Optimizer, total_steps: int) -> Any:
        self.clock = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: 1.0
        )  # its state is saved: it tells the step
        return self.clock
