from __future__ import annotations

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.integrate import solve_ivp

import weft
from weft.errors import ConfigError, DataError, UnknownName, WeftError
from weft.tasks.series import DELAY, HELD_OUT, LENGTH, Series, generated, mackey_glass, rate, read_column

# -- the generated series


def test_solves_the_equation() -> None:
    """The method of steps, by another solver: on each stretch of one delay the delayed term is a known function."""
    past = 1.2
    stretches = [lambda t: np.full_like(np.asarray(t, float), past)]
    for k in range(3):
        delayed, start = stretches[-1], float(np.asarray(stretches[-1](k * DELAY)))
        solution = solve_ivp(
            lambda t, x, delayed=delayed: rate(x, delayed(t - DELAY)),
            (k * DELAY, (k + 1) * DELAY),
            [start],
            method="DOP853",
            rtol=1e-12,
            atol=1e-12,
            dense_output=True,
        ).sol
        stretches.append(lambda t, solution=solution: solution(t)[0])
    got = mackey_glass(3 * DELAY + 1)
    for t, value in enumerate(got):
        assert value == pytest.approx(float(stretches[min(t // DELAY, 2) + 1](t)), abs=1e-6), t


def test_on_the_first_stretch_it_is_known_in_closed_form() -> None:
    """There x(t - tau) is constant: x relaxes to ten times the growth."""
    level = 10 * 0.2 * 1.2 / (1 + 1.2**10)
    for t, value in enumerate(mackey_glass(DELAY + 1)):
        assert value == pytest.approx(level + (1.2 - level) * math.exp(-0.1 * t), abs=1e-9)


def test_its_error_falls_with_the_fourth_power_of_the_step() -> None:
    truth = mackey_glass(81, substeps=80)[-1]
    errors = [abs(mackey_glass(81, substeps=n)[-1] - truth) for n in (5, 10, 20)]
    for coarse, fine in itertools.pairwise(errors):
        assert 8 < coarse / fine < 32


def test_is_on_the_attractor_and_always_the_same() -> None:
    series = generated()
    assert len(series) == LENGTH
    assert 0.2 < series.min() < 0.6
    assert 1.2 < series.max() < 1.5
    generated.cache_clear()
    assert torch.equal(generated(), series)


# -- the user's series


def write(folder: Path, text: str | bytes) -> Path:
    path = folder / "mine.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


@pytest.mark.parametrize(
    ("text", "column"),
    [
        ("1.5\n2\n-3e2\n", ""),
        ("1.5\n2\n-3e2", ""),
        ("load\n1.5\n2\n-3e2\n\n\n", ""),  # a header; empty lines at the end
        ("day,load\n1,1.5\n2,2\n3,-3e2\n", "load"),
        ("day, load\r\n1, 1.5\r\n2, 2\r\n3, -3e2\r\n", "load"),
        ("day,load\n1,1.5\n2,2\n3,-3e2\n", "1"),
        ("2020-01-01,1.5\n2020-01-02,2\n2020-01-03,-3e2\n", "1"),  # the first line is data, whatever else is in it
        ("0,1\n1.5,7\n2,7\n-3e2,7\n", "0"),
        ('"a, b",load\n"1,5",1.5\n"",2\n"x\ny",-3e2\n', "load"),
        ("\ufeffload\n1.5\n2\n-3e2\n", "load"),  # as spreadsheets write it
    ],
)
def test_reads_a_column(tmp_path: Path, text: str, column: str) -> None:
    got = read_column(write(tmp_path, text), column)
    want = [0.0, 1.5, 2, -300] if text.startswith("0,1\n") else [1.5, 2, -300]
    assert (got.dtype, got.tolist()) == (torch.float64, want)


@pytest.mark.parametrize(
    ("text", "column", "kind", "words"),
    [
        ("", "", DataError, ["mine.csv is empty"]),
        ("\n\n", "", DataError, ["mine.csv is empty"]),
        ("a\n1\nx\n", "", DataError, ["mine.csv, line 3, column 'a'", "'x'", "finite number"]),
        ("a\n1\n1,5\n", "", DataError, ["line 3 has 2 cells", "line 1 has 1"]),
        ("1\n2\nnan\n", "", DataError, ["line 3, column 0", "'nan'"]),
        ("1\n1_000\n", "", DataError, ["line 2, column 0", "'1_000'"]),
        ("1\ninf\n", "", DataError, ["line 2, column 0", "'inf'"]),
        ("nan\n1\n", "", DataError, ["line 1, column 0", "'nan'"]),
        ("a,b\n1,\n", "b", DataError, ["line 2, column 'b' is empty"]),
        ("a,b\n1,2\n3\n", "b", DataError, ["line 3 has 1 cells", "line 1 has 2"]),
        ("1\n\n2\n", "", DataError, ["line 2 is empty", "gap"]),
        ('a,b\n"x\ny",1\n3,z\n', "b", DataError, ["line 4, column 'b'", "'z'"]),
        ("a,b\n1,2\n", "", ConfigError, ["2 columns", "column=NAME", "a, b"]),
        ("day,load\n1,2\n", "laod", UnknownName, ["'laod'", "Did you mean 'load'", "from 0 to 1"]),
        ("1,2\n3,4\n", "2", UnknownName, ["'2'", "from 0 to 1"]),
        ("a,a\n1,2\n", "a", DataError, ["2 columns are named 'a'", "number"]),
        ("a;b\n1;2\n", "", DataError, ["line 2", "'1;2'"]),
        (b"\xff\xfe\x00", "", DataError, ["mine.csv", "UTF-8"]),
    ],
)
def test_what_is_wrong_with_a_file_is_named(
    tmp_path: Path, text: str | bytes, column: str, kind: type[WeftError], words: list[str]
) -> None:
    with pytest.raises(kind) as caught:
        read_column(write(tmp_path, text), column)
    for word in words:
        assert word in str(caught.value), str(caught.value)


def test_a_file_that_is_not_there_or_is_a_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot read .*none\.csv: No such file"):
        read_column(tmp_path / "none.csv", "")
    with pytest.raises(DataError, match=r"cannot read .*: Is a directory"):
        read_column(tmp_path, "")


@given(st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=1, max_size=30))
def test_numbers_come_back_as_they_were_written(tmp_path_factory: pytest.TempPathFactory, values: list[float]) -> None:
    path = write(tmp_path_factory.mktemp("csv"), "x\n" + "".join(f"{value!r}\n" for value in values))
    assert read_column(path, "x").tolist() == values


# -- windows


def ramp(folder: Path, num: int) -> str:
    return str(write(folder, "".join(f"{k}\n" for k in range(num))))


def test_windows_share_nothing_over_the_split_and_are_standardised_by_the_past(tmp_path: Path) -> None:
    train, test = Series(data=ramp(tmp_path, 100), window=5, ahead=2).data()
    past = np.arange(80)
    for dataset, first, last in ((train, 0, 79), (test, 80, 99)):
        (windows,) = dataset.tensors
        assert len(windows) == last - first + 1 - 7 + 1
        values = windows.double().numpy() * past.std() + past.mean()
        truth = np.arange(first, last - 7 + 2)[:, None] + np.arange(7)
        assert np.allclose(values, truth, atol=1e-4)


@given(st.integers(1, 20), st.integers(1, 6))
def test_what_is_too_short_says_how_much_is_enough(
    tmp_path_factory: pytest.TempPathFactory, window: int, ahead: int
) -> None:
    folder = tmp_path_factory.mktemp("short")
    with pytest.raises(DataError, match=f"has 4 values.*window={window} with ahead={ahead}.*at least") as caught:
        Series(data=ramp(folder, 4), window=window, ahead=ahead).data()
    enough = int(str(caught.value).split("at least ")[1].split()[0])
    assert enough <= (window + ahead + 1) / HELD_OUT
    _, test = Series(data=ramp(folder, enough), window=window, ahead=ahead).data()
    assert len(test) >= 1


def test_a_constant_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, "3\n" * 200)
    with pytest.raises(DataError, match=r"mine\.csv is constant in its first 160 values"):
        Series(data=str(path)).data()


# -- training


def test_persistence_and_nrmse_by_hand() -> None:
    task = Series(window=8, ahead=3)
    series = generated().numpy()
    train, test = series[: LENGTH * 4 // 5], series[LENGTH * 4 // 5 :]
    test = (test - train.mean()) / train.std()
    target = np.stack([test[i + 8 : i + 11] for i in range(len(test) - 10)])
    last = np.stack([test[i + 7] for i in range(len(test) - 10)])[:, None]
    truth = math.sqrt(((last - target) ** 2).mean()) / target.std()
    assert list(task.notes().values()) == [pytest.approx(truth, rel=1e-5)]

    # a model whose head is 0 says that nothing changes: it is persistence, however the examples are cut
    model = task.model()
    torch.nn.init.zeros_(model.head.weight)
    torch.nn.init.zeros_(model.head.bias)
    (windows,) = task.data()[1].tensors
    with torch.no_grad():
        parts = [task.evaluate(model, [piece]) for piece in windows.split([1, 300, len(windows) - 301])]
    totals = {name: (sum(part[name][0] for part in parts), sum(part[name][1] for part in parts)) for name in parts[0]}
    assert float(task.summarise(totals)["nrmse"]) == pytest.approx(truth, rel=1e-5)


def test_shards_weighted_by_their_examples_give_the_joined_gradient() -> None:
    task = Series(window=8, ahead=3)
    torch.manual_seed(0)
    model = task.model().double()
    windows = task.data()[0].tensors[0][:24].double()

    def gradient(part: torch.Tensor) -> torch.Tensor:
        return torch.cat([g.flatten() for g in torch.autograd.grad(task.loss(model, [part]), list(model.parameters()))])

    joined = sum(gradient(part) * len(part) / 24 for part in windows.split([3, 6, 15]))
    truth = gradient(windows)
    assert torch.linalg.vector_norm(joined - truth) <= 1e-12 * torch.linalg.vector_norm(truth)


def test_forecasts_mackey_glass_much_better_than_persistence(tmp_path: Path) -> None:
    result = weft.run("series", workers=2, epochs=3, cluster="inprocess", run_dir=tmp_path / "run")
    (persistence,) = result.notes.values()
    assert result.metrics["nrmse"] < persistence / 3


def test_forecasts_a_column_of_the_users_own(tmp_path: Path) -> None:
    wave = [math.sin(k / 5) for k in range(600)]
    path = write(tmp_path, "day,load\n" + "".join(f"{k},{value}\n" for k, value in enumerate(wave)))
    options = {"data": str(path), "column": "load", "window": "10", "ahead": "2"}
    result = weft.run(
        "series", task_options=options, workers=2, epochs=10, cluster="inprocess", run_dir=tmp_path / "run"
    )
    (persistence,) = result.notes.values()
    assert result.metrics["nrmse"] < persistence / 3


def test_a_bad_cell_stops_a_run_before_it_starts(tmp_path: Path) -> None:
    path = write(tmp_path, "load\n1\n2\nthree\n")
    with pytest.raises(DataError, match=r"mine\.csv, line 4, column 'load' holds 'three'"):
        weft.run("series", task_options={"data": str(path)}, cluster="inprocess", run_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_impossible_options_are_refused() -> None:
    for options in ({"window": 0}, {"ahead": -1}, {"hidden": 0}, {"lr": float("nan")}):
        with pytest.raises(ConfigError, match="give a positive number"):
            Series(**options)
    with pytest.raises(ConfigError, match=r"column='load' is of a file.*data=FILE\.csv"):
        Series(column="load")
