"""A task says what to train, in plain PyTorch, and knows nothing of how it is distributed."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    import torch
    from torch.utils.data import Dataset

    from weft.data.shards import Shards


@dataclass(frozen=True)
class Defaults:
    """How long and how wide to train when the user does not say. ``batch`` is the joined batch of all workers."""

    batch: int = 64
    epochs: float | None = 1
    steps: int | None = None


class Task(ABC):
    """What to train. Four methods are required, the rest have defaults.

    Options (``-t key=value``) are the arguments of ``__init__``, checked against its annotations; make the class a
    dataclass and its fields are the options.

        class Mine(weft.Task):
            def model(self): return torch.nn.Linear(4, 1)
            def data(self): return train, test
            def loss(self, model, batch): x, y = batch; return F.mse_loss(model(x), y)
            def optimizer(self, params): return torch.optim.SGD(params, lr=0.1)
    """

    defaults: ClassVar[Defaults] = Defaults()

    @abstractmethod
    def model(self) -> torch.nn.Module:
        """A new model. Called once on every worker, with the same random state on each."""

    @abstractmethod
    def data(self) -> tuple[Dataset[Any] | Shards, Dataset[Any] | Shards]:
        """(train, held-out): map-style (they have a length and answer ``dataset[i]``) or ``weft.data.Shards``; train may
        also be a torch IterableDataset (docs/data.md says what it must keep to)."""

    @abstractmethod
    def loss(self, model: torch.nn.Module, batch: Any) -> torch.Tensor:
        """The *mean* over the batch's examples, a scalar that depends on the model's parameters."""

    @abstractmethod
    def optimizer(self, params: Iterable[torch.nn.Parameter]) -> torch.optim.Optimizer:
        """Any torch optimizer over ``params`` (those that need a gradient)."""

    def schedule(
        self, optimizer: torch.optim.Optimizer, total_steps: int
    ) -> torch.optim.lr_scheduler.LRScheduler | None:
        """A learning-rate schedule, stepped once after every update; None keeps the rate."""
        return None

    def blocks(self, model: torch.nn.Module) -> Sequence[torch.nn.Module]:
        """The parts that a pattern that splits the model may take apart, in the order in which they compute: modules of ``model``, none
        inside another. Without this method they are found: the children of the outermost ModuleLists and Sequentials."""
        return ()

    def tensor_plan(self, model: torch.nn.Module) -> Mapping[str, str]:
        """How tensor parallelism shall cut the model, by module (``*`` stands for any part of a name): "column" and "row" for Linears,
        "embedding" for Embeddings, "head" for the Linear whose outputs the cross entropy takes. Without this method it is found.

            def tensor_plan(self, model): return {"layers.*.up": "column", "layers.*.down": "row"}
        """
        return {}

    #: Turns a list of examples into a batch; None is torch's default_collate.
    collate: Callable[[list[Any]], Any] | None = None

    def num_examples(self, batch: Any) -> int:
        """How many examples (or tokens, or pixels) ``loss`` is the mean of: the batch's weight in the joined mean.

        Default: the length of the batch's first tensor.
        """
        return first_length(batch)

    def evaluate(self, model: torch.nn.Module, batch: Any) -> Mapping[str, tuple[float | torch.Tensor, float]]:
        """Sums and counts by name, so that shards add up: {"accuracy": (num_correct, num_examples)}.

        A sum may be a tensor of any shape, the same for every batch, for ``summarise`` to make a metric of. The model is
        in eval mode and gradients are off. Default: the loss. If "loss" is missing, it is added.
        """
        n = self.num_examples(batch)
        return {"loss": (self.loss(model, batch) * n, n)}

    def summarise(self, totals: dict[str, tuple[torch.Tensor, float]]) -> dict[str, float | torch.Tensor]:
        """Metrics by name, from what ``evaluate`` returned, added up over the whole held-out set.

        Sums come as float64 tensors on the CPU, the same on every worker. Default: each sum over its count. Define it
        for metrics that are no mean over examples, such as a ranking's:

            def summarise(self, totals):
                histogram, _ = totals.pop("scores")
                return super().summarise(totals) | {"average_precision": average_precision(histogram)}

        It is called once before training too, with the sums of one or two examples: where a metric says nothing, return
        NaN. If "loss" is missing, its mean is added.
        """
        return {name: total / count if count else math.nan for name, (total, count) in totals.items()}

    def notes(self) -> dict[str, float]:
        """Figures of the data that make a result readable, shown beside it: {"unigram entropy": 3.31}."""
        return {}


def first_length(batch: Any) -> int:
    """Length of the first tensor (or sized leaf) found in a batch of nested tuples, lists and dicts."""
    if hasattr(batch, "dim"):  # a tensor; asked at every step, so without importing torch
        return batch.shape[0] if batch.dim() else 1
    children = batch.values() if isinstance(batch, dict) else batch if isinstance(batch, (tuple, list)) else ()
    for child in children:
        if hasattr(child, "dim") or isinstance(child, (tuple, list, dict)):
            return first_length(child)
    if isinstance(batch, Sized):
        return len(batch)
    raise TypeError(
        f"cannot see how many examples a batch of type {type(batch).__name__} holds: "
        "define num_examples(self, batch) on the task, e.g. return len(batch.x)"
    )
