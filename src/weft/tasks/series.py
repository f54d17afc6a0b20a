"""Forecasting: a GRU (Cho et al. 2014), or several, one upon the other, reads a window of a series and says what comes next.

By default the series is that of Mackey & Glass (1977, a model of blood cell production; chaotic at a delay of 17), which
is computed here and labelled as generated; with ``data=FILE.csv`` it is a column of the user's own. The held-out part is
the last fifth in time; its windows share no value with the training part, and what is standardised, is by the latter.
"""

from __future__ import annotations

import csv
import functools
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from weft.errors import ConfigError, DataError, UnknownName
from weft.options import check_positive
from weft.task import Defaults, Task
from weft.tasks.regression import mean_squares, squares

HELD_OUT = 0.2  # of the series, its end
LENGTH = 5000  # of the generated series, in units of time, one value each
DELAY = 17
SETTLE = 500  # values dropped at the start: from the constant past onto the attractor

# -- the generated series


def rate(x: float, delayed: float) -> float:
    """Mackey & Glass's equation: dx/dt from x(t) and x(t - tau)."""
    return 0.2 * delayed / (1 + delayed**10) - 0.1 * x


def mackey_glass(length: int, *, delay: int = DELAY, substeps: int = 10, past: float = 1.2) -> list[float]:
    """x(0), x(1), ... x(length - 1), where x(t) = ``past`` for t <= 0; by RK4 with ``substeps`` steps per unit of time.

    The step divides the delay, so that x(t - tau) is a value kept, but for half steps: these take the cubic through two
    kept values and their slopes (Hermite), whose error is of RK4's order.
    """
    h, lag = 1 / substeps, delay * substeps
    x = [past] * (lag + 1)  # x[lag + n] is x(n h)
    slope = [0.0] * (lag + 1)
    slope[-1] = rate(past, past)
    for n in range((length - 1) * substeps):
        x0, d0, d1 = x[-1], x[n], x[n + 1]
        # at time 0 the slope jumps: of the stretch that ends there, it is the past's
        end_slope = slope[n + 1] if n != lag - 1 else 0.0
        half = (d0 + d1) / 2 + h / 8 * (slope[n] - end_slope)
        k1 = slope[-1]
        k2 = rate(x0 + h / 2 * k1, half)
        k3 = rate(x0 + h / 2 * k2, half)
        k4 = rate(x0 + h * k3, d1)
        x.append(x0 + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4))
        slope.append(rate(x[-1], d1))
    return x[lag::substeps]


@functools.lru_cache(maxsize=1)
def generated() -> Tensor:
    return torch.tensor(mackey_glass(SETTLE + LENGTH)[SETTLE:], dtype=torch.float64)


# -- the user's series


def read_column(path: Path, column: str) -> Tensor:
    """One column of a comma-separated file, (T,) float64; DataError or UnknownName with file, line and column.

    ``column`` is a name in the first line, or else a number from 0; it may be empty if there is only one. The first line
    is a header if the column's cell there is not a number.
    """
    rows = _rows(path)
    first_line, first = next(rows, (0, []))
    if not first:
        raise DataError(f"{path} is empty: give a file with a column of numbers.")
    at = _position(path, first, column)
    name = repr(first[at].strip()) if not _is_number(first[at]) else str(at)
    values = [_value(path, first_line, name, first[at])] if _is_number(first[at]) else []
    for line, row in rows:
        if len(row) != len(first):
            raise DataError(
                f"{path}, line {line} has {len(row)} cells, and line {first_line} has {len(first)}: give every line one for each "
                "column, separated by commas (numbers with a point, as in 1.5)."
            )
        values.append(_value(path, line, name, row[at]))
    return torch.tensor(values, dtype=torch.float64)


def _rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    """(line, cells); empty lines at the end are passed over, and any between are an error: time would jump there."""
    empty = 0
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file)
            for row in reader:
                if not row:
                    empty = empty or reader.line_num
                    continue
                if empty:
                    raise DataError(
                        f"{path}, line {empty} is empty: the series must have no gap; fill it or cut there."
                    )
                yield reader.line_num, row
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}. Give data=FILE.csv, a comma-separated file.") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} is no comma-separated text in UTF-8: {error}. Export the table as CSV.") from error


def _position(path: Path, first: list[str], column: str) -> int:
    names = [cell.strip() for cell in first]
    if column in names and not _is_number(column):  # a number in the first line is data, not a name
        if names.count(column) > 1:
            raise DataError(
                f"{path}, line 1: {names.count(column)} columns are named {column!r}: give its number, from 0."
            )
        return names.index(column)
    if not column and len(names) == 1:
        return 0
    if not column:
        raise ConfigError(
            f"{path} has {len(names)} columns: choose one with column=NAME or its number from 0. Its first line is: "
            f"{', '.join(names)}."
        )
    if column.isdecimal() and int(column) < len(names):
        return int(column)
    numbers = f"Or give its number, from 0 to {len(names) - 1}."
    raise UnknownName.of(f"column of {path}:", column, [n for n in names if n and not _is_number(n)], numbers)


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return "_" not in cell  # Python reads 1_000, no spreadsheet writes it


def _value(path: Path, line: int, column: str, cell: str) -> float:
    if not _is_number(cell) or not math.isfinite(float(cell)):
        what = "is empty" if not cell.strip() else f"holds {cell!r}"
        raise DataError(
            f"{path}, line {line}, column {column} {what}: give a finite number there (with a point, as in 1.5)."
        )
    return float(cell)


# -- task


class Forecaster(nn.Module):
    """The top GRU's last state, mapped to how far the next values are from the last one seen."""

    def __init__(self, hidden: int, ahead: int, layers: int = 1) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.GRU(hidden if k else 1, hidden, batch_first=True) for k in range(layers)])
        self.head = nn.Linear(hidden, ahead)

    def forward(self, seen: Tensor) -> Tensor:  # (B, W) -> (B, ahead)
        x = seen[:, :, None]
        for gru in self.layers:
            x, state = gru(x)  # (B, W, hidden), (1, B, hidden)
        change: Tensor = self.head(state[0])
        return seen[:, -1:] + change


class Series(Task):
    """An example is a window of ``window`` values and the ``ahead`` that follow. ``nrmse`` is the root mean squared error
    over the standard deviation of what was to be predicted: 1 is predicting the mean."""

    defaults: ClassVar[Defaults] = Defaults(batch=64, epochs=10)

    def __init__(
        self,
        data: Annotated[str, "a comma-separated file with a series of yours; none: Mackey-Glass, generated"] = "none",
        column: Annotated[str, "of that file: its name or its number from 0; needed where there are several"] = "",
        window: Annotated[int, "values that the model sees"] = 32,
        ahead: Annotated[int, "values that it predicts, the next ones"] = 1,
        hidden: Annotated[int, "width of a GRU's state"] = 32,
        layers: Annotated[int, "GRUs, one upon the other"] = 1,
        lr: Annotated[float, "highest learning rate of Adam; a cosine brings it to 0"] = 1e-2,
    ) -> None:
        for name, value in (("window", window), ("ahead", ahead), ("hidden", hidden), ("layers", layers), ("lr", lr)):
            check_positive(name, value)
        if column and data == "none":
            raise ConfigError(f"column={column!r} is of a file, and none is given: add data=FILE.csv, or leave it out.")
        self.path = None if data == "none" else Path(data)
        self.column, self.window, self.ahead, self.lr = column, window, ahead, lr
        self.hidden, self.layers = hidden, layers

    def model(self) -> nn.Module:
        return Forecaster(self.hidden, self.ahead, self.layers)

    def data(self) -> tuple[TensorDataset, TensorDataset]:
        train, test = self._split()
        width = self.window + self.ahead
        return TensorDataset(train.unfold(0, width, 1).float()), TensorDataset(test.unfold(0, width, 1).float())

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """Mean over the values predicted, of which all examples have as many: the mean over examples."""
        return F.mse_loss(*self._predict(model, batch))

    def optimizer(self, params: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.Adam(params, lr=self.lr, fused=True)

    def schedule(self, optimizer: torch.optim.Optimizer, total_steps: int) -> torch.optim.lr_scheduler.LRScheduler:
        return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total_steps)

    def evaluate(self, model: nn.Module, batch: Any) -> dict[str, tuple[Tensor, float]]:
        return squares(*self._predict(model, batch))

    def summarise(self, totals: dict[str, tuple[Tensor, float]]) -> dict[str, float | Tensor]:
        error, variance = mean_squares(totals)
        return {"loss": error, "nrmse": (error / variance).sqrt()}

    def notes(self) -> dict[str, float]:
        (windows,) = self.data()[1].tensors
        seen, following = windows.split([self.window, self.ahead], 1)
        error, variance = mean_squares(squares(seen[:, -1:].expand_as(following), following))
        return {"nrmse of persistence (the last value seen, again)": float((error / variance).sqrt())}

    def _predict(self, model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
        """(predicted, target), each (B, ahead)."""
        seen, following = batch[0].split([self.window, self.ahead], 1)
        return model(seen), following

    def _split(self) -> tuple[Tensor, Tensor]:
        """(train, test), each a stretch of the series, standardised by the former."""
        name = self.path or "the generated series"
        series = generated() if self.path is None else read_column(self.path, self.column)
        cut = len(series) - round(HELD_OUT * len(series))
        train, test = series[:cut], series[cut:]
        need = self.window + self.ahead
        if len(test) < need or len(train) < need:
            raise DataError(
                f"{name} has {len(series)} values, of which the last {len(test)} are held out, and window={self.window} with "
                f"ahead={self.ahead} takes {need} on each side: give a smaller window, or at least {math.ceil(need / HELD_OUT)} values."
            )
        deviation = train.std(correction=0)
        if not deviation > 0:
            raise DataError(f"{name} is constant in its first {cut} values: there is nothing to learn; choose another.")
        return (train - train.mean()) / deviation, (test - train.mean()) / deviation
