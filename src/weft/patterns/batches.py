"""From a task's datasets to batches: fetching, placing, grouping; what a task returns is checked here."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import TensorDataset, default_collate

from weft.data.partition import Partitioner
from weft.data.shards import Reader
from weft.errors import TaskError
from weft.task import Task


class Batches:
    """Examples by index -> a batch on the device, floats in the run's dtype."""

    def __init__(self, dataset: Any, task: Task, device: torch.device, dtype: torch.dtype) -> None:
        self.dataset, self.device, self.dtype = dataset, device, dtype
        self.collate = task.collate or default_collate
        self.tensors: list[Tensor] | None = None
        if type(dataset) is TensorDataset and task.collate is None:
            # default_collate of its examples is plain indexing, some 100 us dearer. On a CPU all is placed beforehand
            self.tensors = [self._place(t) if device.type == "cpu" else t for t in dataset.tensors]
        #: a batch at once, without an object per record
        self.whole = isinstance(dataset, Reader) and dataset.shards.transform is None and task.collate is None
        if isinstance(dataset, Reader) and dataset.shards.batch_transform is not None and task.collate is not None:
            raise TaskError(
                f"{type(task).__name__} has a collate and its Shards a batch_transform, and both make the batch: leave one out."
            )

    def __call__(self, indices: np.ndarray[Any, np.dtype[np.int64]]) -> Any:
        if self.tensors is not None:
            index = torch.from_numpy(indices)
            batch = [torch.index_select(t, 0, index) for t in self.tensors]
            return batch if self.device.type == "cpu" else self._place(batch)
        if self.whole:
            transform, records = self.dataset.shards.batch_transform, self.dataset.records(indices)
            return self._place(as_tensors(records if transform is None else transform(records)))
        if hasattr(self.dataset, "__getitems__"):
            examples = self.dataset.__getitems__(indices.tolist())
        else:
            examples = [self.dataset[i] for i in indices.tolist()]
        return self.of(examples)

    def of(self, examples: list[Any]) -> Any:
        return self._place(self.collate(examples))

    def _place(self, batch: Any) -> Any:
        if isinstance(batch, Tensor):
            dtype = self.dtype if batch.is_floating_point() else batch.dtype
            return batch.to(self.device, dtype)
        if isinstance(batch, dict):
            return type(batch)((k, self._place(v)) for k, v in batch.items())
        if isinstance(batch, tuple) and hasattr(batch, "_fields"):
            return type(batch)(*(self._place(v) for v in batch))
        if isinstance(batch, list | tuple):
            return type(batch)(self._place(v) for v in batch)
        return batch


def as_tensors(batch: Any) -> Any:
    """numpy arrays, wherever they stand in it, as tensors that share their memory; arrays of objects as lists."""
    if isinstance(batch, np.ndarray):
        return batch.tolist() if batch.dtype == object else torch.from_numpy(batch)
    if isinstance(batch, dict):
        return {name: as_tensors(value) for name, value in batch.items()}
    if type(batch) in (list, tuple):
        return type(batch)(as_tensors(value) for value in batch)
    return batch


def check_loss(loss: Any, task: Task) -> None:
    if isinstance(loss, Tensor) and loss.requires_grad and loss.dim() == 0:
        return
    who = f"{type(task).__name__}.loss"
    if not isinstance(loss, Tensor):
        raise TaskError(
            f"{who} returned {type(loss).__name__}, not a tensor: return the scalar mean loss of the batch."
        )
    if loss.dim() != 0:
        raise TaskError(f"{who} returned a tensor of shape {tuple(loss.shape)}, not a scalar: return its .mean().")
    if not loss.is_floating_point():
        raise TaskError(f"{who} returned {loss.dtype}: a loss is a floating-point scalar.")
    raise TaskError(
        f"{who} returned a tensor that needs no gradient: compute it from model(batch) without detach(), "
        "no_grad() or .item(), and leave some parameter unfrozen."
    )


Groups = np.ndarray[Any, Any] | None


def groups_of(dataset: Any, task: Task, partitioner: Partitioner) -> tuple[Groups, Groups]:
    """(labels, keys) of the examples, each None unless the partitioner goes by it."""
    return (
        labels_of(dataset) if partitioner.needs_labels else None,
        keys_of(dataset, task) if partitioner.needs_keys else None,
    )


def keys_of(dataset: Any, task: Task) -> np.ndarray[Any, Any]:
    client_of = getattr(task, "client_of", None)
    if client_of is None:
        raise TaskError(
            f"this partition keeps the examples of one key together, and {type(task).__name__} tells no keys. Write:\n"
            "    def client_of(self, index):\n        return self.owners[index]  # whose example it is, a string or number\n"
            "or choose --partition random."
        )
    return np.asarray([client_of(i) for i in range(len(dataset))])


def labels_of(dataset: Any) -> np.ndarray[Any, Any]:
    """``dataset.targets``, or the last tensor of a TensorDataset."""
    targets = getattr(dataset, "targets", None)
    if targets is None and isinstance(dataset, TensorDataset) and len(dataset.tensors) > 1:
        targets = dataset.tensors[-1]
    if targets is None:
        raise TaskError(
            "this partition goes by label, but the training set shows none: give it an attribute `targets` "
            "(one integer per example), or choose --partition random."
        )
    return np.asarray(targets)


def check_map_style(dataset: Any, which: str, task: Task) -> int:
    """Length of a map-style dataset, or a TaskError."""
    who = f"{type(task).__name__}.data"
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        streams = " or an IterableDataset" if which == "training" else ""
        raise TaskError(
            f"{who}: the {which} set is {type(dataset).__name__}; give a map-style dataset (with len() and [i]), "
            f"weft.data.Shards{streams}."
        )
    n = len(dataset)
    if n == 0:
        raise TaskError(f"{who}: the {which} set has no examples.")
    return n
