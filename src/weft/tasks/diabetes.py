"""Regression on 442 patients (Efron et al. 2004, "Least Angle Regression"): how far diabetes went within a year, from
ten figures at its beginning, as scikit-learn ships them in its wheel.

A table so small is soon seen through: least squares explains about half of the variance, and a network no more. The
linear model has a closed form, so that what is trained can be checked.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from weft.errors import TaskError, UnknownName
from weft.options import check_positive
from weft.task import Defaults, Task
from weft.tasks.regression import mean_squares, squares

TEST_EVERY = 5  # patients, in file order, which says nothing about them
Model = Literal["linear", "mlp"]


def read_diabetes() -> tuple[Tensor, Tensor]:
    """Figures (442, 10) and targets (442,) float64, as measured; TaskError without scikit-learn.

    Reads the files in scikit-learn's folder: importing scikit-learn would cost most of a second.
    """
    spec = importlib.util.find_spec("sklearn")
    if spec is None or spec.origin is None:
        raise TaskError('the diabetes table is in scikit-learn, which is not installed: pip install "weft[tasks]".')
    folder = Path(spec.origin).parent / "datasets" / "data"
    paths = [folder / f"diabetes_{part}.csv.gz" for part in ("data_raw", "target")]
    if all(path.is_file() for path in paths):
        x, y = (np.loadtxt(path) for path in paths)
    else:  # another layout of scikit-learn
        from sklearn.datasets import load_diabetes

        x, y = load_diabetes(return_X_y=True, scaled=False)
    return torch.tensor(x, dtype=torch.float64), torch.tensor(y, dtype=torch.float64)


def split(x: Tensor, y: Tensor) -> tuple[TensorDataset, TensorDataset]:
    """(train, test), always the same: every fifth patient is held out; all columns standardised by the others."""
    held_out = torch.arange(len(x)) % TEST_EVERY == TEST_EVERY - 1
    x, y = ((t - t[~held_out].mean(0)) / t[~held_out].std(0, correction=0) for t in (x, y))
    return TensorDataset(x[~held_out], y[~held_out]), TensorDataset(x[held_out], y[held_out])


def least_squares(x: Tensor, y: Tensor) -> Tensor:
    """The linear model with the smallest squared error: (D + 1,), the bias last."""
    with_bias = torch.column_stack([x, torch.ones(len(x), dtype=x.dtype)])
    solution: Tensor = torch.linalg.lstsq(with_bias, y[:, None]).solution[:, 0]
    return solution


class Diabetes(Task):
    """Targets are standardised: a mean squared error of 1 is that of predicting the mean."""

    defaults: ClassVar[Defaults] = Defaults(batch=32, epochs=60)

    def __init__(
        self,
        model: Annotated[Model, "linear, with a closed form to compare with; or one hidden layer"] = "linear",
        hidden: Annotated[int, "width of the mlp's hidden layer"] = 16,
        lr: Annotated[float, "learning rate of SGD with momentum 0.9"] = 0.005,
    ) -> None:
        if model not in get_args(Model):
            raise UnknownName.of("model of diabetes", model, get_args(Model))
        check_positive("hidden", hidden)
        check_positive("lr", lr)
        self.kind, self.hidden, self.lr = model, hidden, lr

    def model(self) -> nn.Module:
        num_features = self.data()[0].tensors[0].shape[1]
        if self.kind == "linear":
            return nn.Linear(num_features, 1)
        return nn.Sequential(nn.Linear(num_features, self.hidden), nn.Tanh(), nn.Linear(self.hidden, 1))

    def data(self) -> tuple[TensorDataset, TensorDataset]:
        return split(*read_diabetes())

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        x, y = batch
        return F.mse_loss(model(x).squeeze(1), y)

    def optimizer(self, params: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.SGD(params, lr=self.lr, momentum=0.9, fused=True)

    def evaluate(self, model: nn.Module, batch: Any) -> dict[str, tuple[Tensor, float]]:
        x, y = batch
        return squares(model(x).squeeze(1), y)

    def summarise(self, totals: dict[str, tuple[Tensor, float]]) -> dict[str, float | Tensor]:
        error, variance = mean_squares(totals)
        return {"loss": error, "mse": error, "r2": 1 - error / variance}

    def notes(self) -> dict[str, float]:
        train, test = self.data()
        *w, b = least_squares(*train.tensors)
        x, y = test.tensors
        error, variance = mean_squares(squares(x @ torch.stack(w) + b, y))
        return {"r2 of least squares": float(1 - error / variance)}
