"""A task's sums and counts make the same metrics however the held-out set is cut, and what cannot be a metric is named."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.laws.reference import Regression

import weft
from weft.comm.link import SoloLink
from weft.errors import TaskError
from weft.patterns.metrics import Totals, evaluate_batch

CPU = torch.device("cpu")


class Others(SoloLink):
    """A link of which the other ranks' totals are known beforehand."""

    def __init__(self, others: list[Totals]) -> None:
        super().__init__()
        self.others = others

    def all_gather(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        return [tensor.clone(), *(totals.flat for totals in self.others)]


class Spread(Regression):
    """Largest and smallest of a histogram: a metric that is no mean."""

    def evaluate(self, model: Any, batch: Any) -> dict[str, Any]:
        x, _ = batch
        return {
            "histogram": (torch.bincount(x[:, 0].long().clamp(0, 9), minlength=10), len(x)),
            "mean": (x.sum(), len(x)),
        }

    def summarise(self, totals: dict[str, Any]) -> dict[str, Any]:
        histogram, count = totals.pop("histogram")
        assert (histogram.dtype, histogram.device, float(histogram.sum())) == (torch.float64, CPU, count)
        seen = histogram.nonzero()[:, 0].tolist()
        return super().summarise(totals) | {"spread": seen[-1] - seen[0] if seen else math.nan}


def batch_of(values: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.tensor(values, dtype=torch.float64)[:, None].repeat(1, 6)
    return x, torch.zeros(len(values), 1, dtype=torch.float64)


@given(st.lists(st.lists(st.lists(st.integers(0, 9), min_size=1), max_size=4), min_size=1, max_size=4))
def test_metrics_are_those_of_all_examples_however_they_are_cut(ranks: list[list[list[int]]]) -> None:
    task = Spread()
    model = task.model().double()
    shapes = {"loss": (), "histogram": (10,), "mean": ()}
    totals = []
    for batches in ranks:
        totals.append(Totals(task, shapes))
        for values in batches:
            totals[-1].add(evaluate_batch(task, model, batch_of(values)))
    totals[0].join(Others(totals[1:]), CPU)
    got = totals[0].summary()
    every = [value for batches in ranks for values in batches for value in values]
    if not every:
        assert all(math.isnan(value) for value in got.values())
        return
    assert list(got) == ["loss", "mean", "spread"]
    assert got["spread"] == max(every) - min(every)
    assert got["mean"] == pytest.approx(6 * np.mean(every))
    assert got["loss"] == pytest.approx(task.loss(model, batch_of(every)).item())


def test_a_run_s_metrics_do_not_depend_on_the_number_of_workers(tmp_path: Path) -> None:
    results = [
        weft.run(
            Spread(), workers=n, steps=2, dtype="float64", cluster="inprocess", run_dir=tmp_path / f"{n}", eval_every=1
        )
        for n in (1, 2, 3)
    ]
    for result in results:
        assert result.metrics == pytest.approx(results[0].metrics, rel=1e-12)
        assert result.loss == pytest.approx(results[0].loss, rel=1e-9)


class Wrong(Regression):
    def __init__(self, sums: Any, metrics: Any = None) -> None:
        super().__init__()
        self.sums, self.metrics = sums, metrics

    def evaluate(self, model: Any, batch: Any) -> Any:
        return self.sums

    def summarise(self, totals: Any) -> Any:
        return super().summarise(totals) if self.metrics is None else self.metrics


@pytest.mark.parametrize(
    ("sums", "metrics", "words"),
    [
        ({"hits": (torch.ones(3), 3)}, None, ["'hits'", "(3,)", "def summarise(self, totals)"]),
        ({"hits": torch.tensor([1.0, 2.0])}, None, ["'hits'", "pair"]),  # two losses are not a sum and a count
        ({"hits": ("many", 3)}, None, ["'hits'", "'many'", "a number or a tensor"]),
        ({"hits": (1, None)}, None, ["'hits'", "None", "the count a number"]),
        ({"hits": (1, 2, 3)}, None, ["'hits'", "(1, 2, 3)", "pair"]),
        ({"hits": (1, 2)}, [0.5], ["summarise", "list", "dict of numbers"]),
        ({"hits": (1, 2)}, {"hits": "half"}, ["'hits'", "'half'", "number"]),
        ({"hits": (1, 2)}, {"hits": torch.ones(2)}, ["'hits'", "(2,)", "one number"]),
    ],
)
def test_what_cannot_be_a_metric_is_refused_before_a_step_is_made(
    sums: Any, metrics: Any, words: list[str], tmp_path: Path
) -> None:
    with pytest.raises(TaskError) as caught:
        weft.run(Wrong(sums, metrics), steps=2, cluster="inprocess", run_dir=tmp_path / "run")
    for word in words:
        assert word in str(caught.value), str(caught.value)


def test_a_sum_that_changes_its_shape_is_named() -> None:
    totals = Totals(Spread(), {"histogram": (10,)})
    with pytest.raises(TaskError, match=r"'histogram'\] has a sum of shape \(9,\), and at first it was \(10,\)"):
        totals.add({"histogram": (torch.ones(9), 9.0)})
    with pytest.raises(TaskError, match=r"'histogram'\] has a sum of shape \(\)"):  # would broadcast
        totals.add({"histogram": (torch.ones(()), 9.0)})
