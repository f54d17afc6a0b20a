from __future__ import annotations

import importlib.util
import subprocess
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.datasets import load_diabetes
from sklearn.linear_model import LinearRegression
from sklearn.metrics import mean_squared_error, r2_score

import weft
from weft.compare import final_parameters
from weft.errors import ConfigError, TaskError, UnknownName
from weft.tasks.diabetes import Diabetes, read_diabetes
from weft.tasks.regression import squares

# -- data


def test_reads_what_scikit_learn_reads() -> None:
    x, y = read_diabetes()
    truth = load_diabetes(scaled=False)
    assert (x.dtype, y.dtype, x.shape) == (torch.float64, torch.float64, (442, 10))
    assert np.array_equal(x.numpy(), truth.data)
    assert np.array_equal(y.numpy(), truth.target)


def test_reads_it_without_importing_scikit_learn() -> None:
    code = "import sys; from weft.tasks.diabetes import Diabetes; Diabetes().data(); print('sklearn' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "False"


def test_asks_scikit_learn_where_its_files_have_moved(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    x, y = read_diabetes()
    moved = ModuleSpec("sklearn", None, origin=str(tmp_path / "sklearn" / "__init__.py"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: moved)
    again = read_diabetes()
    assert torch.equal(again[0], x)
    assert torch.equal(again[1], y)


def test_without_scikit_learn_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(TaskError, match=r'pip install "weft\[tasks\]"'):
        Diabetes().data()


def raw_split() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    x, y = load_diabetes(return_X_y=True, scaled=False)
    held_out = np.isin(np.arange(442), range(4, 442, 5))
    return x[~held_out], y[~held_out], x[held_out], y[held_out]


def test_every_fifth_patient_is_held_out_and_the_others_set_the_scale() -> None:
    x, y, x_test, y_test = raw_split()
    train, test = Diabetes().data()
    assert (len(train), len(test)) == (354, 88)
    for dataset, raw_x, raw_y in ((train, x, y), (test, x_test, y_test)):
        assert np.allclose(dataset.tensors[0].numpy(), (raw_x - x.mean(0)) / x.std(0))
        assert np.allclose(dataset.tensors[1].numpy(), (raw_y - y.mean()) / y.std())


# -- training


def test_the_note_is_scikit_learn_s() -> None:
    x, y, x_test, y_test = raw_split()
    truth = r2_score(y_test, LinearRegression().fit(x, y).predict(x_test))
    assert Diabetes().notes() == {"r2 of least squares": pytest.approx(truth, rel=1e-9)}


@given(st.lists(st.tuples(st.floats(-9, 9), st.floats(-9, 9)), min_size=3, max_size=40), st.integers(1, 4))
def test_metrics_are_scikit_learn_s_however_the_examples_are_cut(pairs: list, shards: int) -> None:
    predicted, target = torch.tensor(pairs, dtype=torch.float64).T
    if target.std() < 0.1:
        return
    parts = [squares(p, y) for p, y in zip(predicted.tensor_split(shards), target.tensor_split(shards), strict=True)]
    totals = {name: (sum(part[name][0] for part in parts), sum(part[name][1] for part in parts)) for name in parts[0]}
    metrics = Diabetes().summarise(totals)
    assert float(metrics["mse"]) == pytest.approx(mean_squared_error(target.numpy(), predicted.numpy()), abs=1e-9)
    assert float(metrics["r2"]) == pytest.approx(r2_score(target.numpy(), predicted.numpy()), rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("workers", [1, 3])
def test_linear_ends_at_least_squares(workers: int, tmp_path: Path) -> None:
    """Descent on the whole training set goes to the closed form, and the run's metrics are those of that model."""
    run_dir = tmp_path / "run"
    result = weft.run(
        Diabetes(model="linear", lr=0.3),
        workers=workers,
        batch=354,
        steps=800,
        dtype="float64",
        cluster="inprocess",
        run_dir=run_dir,
    )
    x, y, _, _ = raw_split()
    truth = LinearRegression().fit((x - x.mean(0)) / x.std(0), (y - y.mean()) / y.std())
    got = final_parameters(run_dir)
    assert np.allclose(got["weight"][0].numpy(), truth.coef_, atol=1e-6)
    assert float(got["bias"]) == pytest.approx(float(truth.intercept_), abs=1e-6)
    (note,) = Diabetes().notes().values()
    assert result.metrics["r2"] == pytest.approx(note, abs=1e-6)
    assert result.metrics["mse"] == pytest.approx(result.loss, rel=1e-12)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("model", ["linear", "mlp"])
def test_explains_two_fifths_of_the_variance_after_its_default_epochs(model: str) -> None:
    task = Diabetes(model=model)  # type: ignore[arg-type]
    train, test = task.data()
    x, y = train.tensors
    torch.manual_seed(0)
    net = task.model().double()
    optimizer = task.optimizer(net.parameters())
    for _ in range(int(task.defaults.epochs or 0)):
        for index in torch.randperm(len(x)).split(task.defaults.batch):
            optimizer.zero_grad()
            task.loss(net, (x[index], y[index])).backward()
            optimizer.step()
    with torch.no_grad():
        predicted = net(test.tensors[0])[:, 0]
    assert r2_score(test.tensors[1].numpy(), predicted.numpy()) > 0.4


def test_the_models_are_what_they_say() -> None:
    assert sum(p.numel() for p in Diabetes(model="linear").model().parameters()) == 11
    assert sum(p.numel() for p in Diabetes(model="mlp", hidden=7).model().parameters()) == 7 * 11 + 8


def test_impossible_options_are_refused() -> None:
    with pytest.raises(UnknownName, match=r"'linar'.*Did you mean 'linear'"):
        Diabetes(model="linar")  # type: ignore[arg-type]
    for options in ({"hidden": 0}, {"lr": -1}):
        with pytest.raises(ConfigError, match="give a positive number"):
            Diabetes(**options)
