"""Scanned handwritten digits (8 x 8 grey values; Alpaydin & Kaynak 1998), as scikit-learn ships them in its wheel.

The models have neither BatchNorm nor dropout: n workers train them exactly as one does. About 0.98 of the held-out
digits are read rightly after the default 15 epochs, a second of one core.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from weft.errors import TaskError
from weft.options import check_positive
from weft.task import Defaults, Task

TEST_EVERY = 5  # of the examples of a label, in file order, one in five is held out
BRIGHTEST = 16


def read_digits() -> tuple[Tensor, Tensor]:
    """Images (1797, 1, 8, 8) float32 in [0, 1] and labels (1797,) int64; TaskError without scikit-learn.

    Reads the file in scikit-learn's folder: importing scikit-learn would cost most of a second.
    """
    spec = importlib.util.find_spec("sklearn")
    if spec is None or spec.origin is None:
        raise TaskError('the digits are in scikit-learn, which is not installed: pip install "weft[tasks]".')
    path = Path(spec.origin).parent / "datasets" / "data" / "digits.csv.gz"
    if path.is_file():
        table = np.loadtxt(path, delimiter=",", dtype=np.float32)
        images, labels = table[:, :-1], table[:, -1]
    else:  # another layout of scikit-learn
        from sklearn.datasets import load_digits

        images, labels = load_digits(return_X_y=True)
    x = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / BRIGHTEST
    return x, torch.tensor(labels, dtype=torch.int64)


def split(x: Tensor, y: Tensor) -> tuple[TensorDataset, TensorDataset]:
    """(train, test), stratified and always the same: every fifth example of each label is held out."""
    one_hot = F.one_hot(y)
    place = (one_hot.cumsum(0) * one_hot).sum(1)  # (N,) how many of this label so far, itself counted
    held_out = place % TEST_EVERY == 0
    return TensorDataset(x[~held_out], y[~held_out]), TensorDataset(x[held_out], y[held_out])


class _Classifier(Task):
    """All but the model, which turns images (B, 1, 8, 8) into logits (B, 10)."""

    defaults: ClassVar[Defaults] = Defaults(batch=64, epochs=15)

    lr: float

    def data(self) -> tuple[TensorDataset, TensorDataset]:
        return split(*read_digits())

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        x, y = batch
        return F.cross_entropy(model(x), y)

    def optimizer(self, params: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.SGD(params, lr=self.lr, momentum=0.9, fused=True)

    def evaluate(self, model: nn.Module, batch: Any) -> dict[str, tuple[float | Tensor, float]]:
        x, y = batch
        logits = model(x)
        loss = F.cross_entropy(logits, y, reduction="sum")
        return {"loss": (loss, len(y)), "accuracy": ((logits.argmax(1) == y).sum(), len(y))}


@dataclass
class Digits(_Classifier):
    """Two convolutions, each pooled, and a linear head."""

    width: int = field(default=16, metadata={"doc": "channels of the first convolution; the second has twice as many"})
    lr: float = field(default=0.1, metadata={"doc": "learning rate of SGD with momentum 0.9"})

    def __post_init__(self) -> None:
        check_positive("width", self.width)
        check_positive("lr", self.lr)

    def model(self) -> nn.Module:
        w = self.width
        return nn.Sequential(
            nn.Conv2d(1, w, 3, padding=1),  # (B, w, 8, 8)
            nn.ReLU(),
            nn.MaxPool2d(2),  # (B, w, 4, 4)
            nn.Conv2d(w, 2 * w, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),  # (B, 2w, 2, 2)
            nn.Flatten(),
            nn.Linear(8 * w, 10),
        )


@dataclass
class DigitsMLP(_Classifier):
    """Two hidden layers."""

    hidden: int = field(default=64, metadata={"doc": "width of the two hidden layers"})
    lr: float = field(default=0.1, metadata={"doc": "learning rate of SGD with momentum 0.9"})

    def __post_init__(self) -> None:
        check_positive("hidden", self.hidden)
        check_positive("lr", self.lr)

    def model(self) -> nn.Module:
        h = self.hidden
        return nn.Sequential(nn.Flatten(), nn.Linear(64, h), nn.ReLU(), nn.Linear(h, h), nn.ReLU(), nn.Linear(h, 10))
