from __future__ import annotations

import importlib.util
import subprocess
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits

from weft.errors import ConfigError, TaskError
from weft.tasks.digits import Digits, DigitsMLP, read_digits, split

BOTH = pytest.mark.parametrize("make", [Digits, DigitsMLP])


# -- data


def test_reads_what_scikit_learn_reads() -> None:
    x, y = read_digits()
    truth = load_digits()
    assert (x.dtype, y.dtype, x.shape) == (torch.float32, torch.int64, (1797, 1, 8, 8))
    assert torch.equal(x[:, 0], torch.tensor(truth.images / 16, dtype=torch.float32))
    assert y.tolist() == truth.target.tolist()
    assert (float(x.min()), float(x.max())) == (0, 1)


def test_reads_them_without_importing_scikit_learn() -> None:
    code = "import sys; from weft.tasks.digits import Digits; Digits().data(); print('sklearn' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "False"


def test_asks_scikit_learn_where_its_file_has_moved(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    x, y = read_digits()
    moved = ModuleSpec("sklearn", None, origin=str(tmp_path / "sklearn" / "__init__.py"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: moved)
    again = read_digits()
    assert torch.equal(again[0], x)
    assert torch.equal(again[1], y)


def test_without_scikit_learn_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(TaskError, match=r'pip install "weft\[tasks\]"'):
        Digits().data()


def test_every_fifth_of_each_label_is_held_out() -> None:
    x, y = read_digits()
    train, test = split(x, y)
    sides: tuple[list[int], list[int]] = ([], [])
    seen = dict.fromkeys(range(10), 0)
    for index, label in enumerate(y.tolist()):
        seen[label] += 1
        sides[seen[label] % 5 == 0].append(index)
    for dataset, indices in zip((train, test), sides, strict=True):
        assert torch.equal(dataset.tensors[0], x[indices])
        assert torch.equal(dataset.tensors[1], y[indices])
    assert (len(train), len(test)) == (1442, 355)


# -- models


@pytest.mark.parametrize(
    ("task", "num_parameters"),
    [
        (Digits(), 16 * 10 + 32 * 145 + 10 * 129),
        (Digits(width=3), 3 * 10 + 6 * 28 + 10 * 25),
        (DigitsMLP(), 64 * 65 + 64 * 65 + 10 * 65),
        (DigitsMLP(hidden=5), 5 * 65 + 5 * 6 + 10 * 6),
    ],
    ids=str,
)
def test_number_of_parameters(task: Digits, num_parameters: int) -> None:
    assert sum(p.numel() for p in task.model().parameters()) == num_parameters


@BOTH
def test_shards_weighted_by_their_examples_give_the_joined_gradient(make: type[Digits]) -> None:
    task = make()
    torch.manual_seed(0)
    model = task.model().double()
    x, y = (t[:24] for t in task.data()[0].tensors)

    def gradient(at: slice) -> torch.Tensor:
        loss = task.loss(model, (x[at].double(), y[at]))
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])

    parts = (slice(0, 3), slice(3, 9), slice(9, 24))
    joined = sum(gradient(at) * (at.stop - at.start) / 24 for at in parts)
    truth = gradient(slice(0, 24))
    assert torch.linalg.vector_norm(joined - truth) <= 1e-12 * torch.linalg.vector_norm(truth)


@BOTH
def test_evaluation_adds_up_over_shards(make: type[Digits]) -> None:
    task = make()
    torch.manual_seed(0)
    model = task.model()
    x, y = task.data()[1].tensors
    with torch.no_grad():
        logits = model(x)
        parts = [task.evaluate(model, (x[at], y[at])) for at in (slice(0, 50), slice(50, 353), slice(353, None))]
    for name, truth in {
        "loss": float(-F.log_softmax(logits, 1)[torch.arange(len(y)), y].mean()),
        "accuracy": sum(int(row.argmax()) == label for row, label in zip(logits, y.tolist(), strict=True)) / len(y),
    }.items():
        total, count = (sum(float(part[name][k]) for part in parts) for k in (0, 1))
        assert count == len(y)
        assert total / count == pytest.approx(truth, rel=1e-5)


@BOTH
@pytest.mark.usefixtures("one_thread")
def test_reads_97_of_100_after_its_default_epochs(make: type[Digits]) -> None:
    task = make()
    train, test = task.data()
    x, y = train.tensors
    torch.manual_seed(0)
    model = task.model()
    optimizer = task.optimizer(model.parameters())
    assert task.defaults.epochs is not None
    for _ in range(int(task.defaults.epochs)):
        for index in torch.randperm(len(x)).split(task.defaults.batch):
            optimizer.zero_grad()
            task.loss(model, (x[index], y[index])).backward()
            optimizer.step()
    with torch.no_grad():
        right, count = task.evaluate(model, test.tensors)["accuracy"]
    assert right / count >= 0.97


@pytest.mark.parametrize(
    "make",
    [
        lambda: Digits(width=0),
        lambda: Digits(lr=-0.1),
        lambda: DigitsMLP(hidden=-1),
        lambda: DigitsMLP(lr=float("nan")),
    ],
)
def test_impossible_options_are_refused(make: type[Digits]) -> None:
    with pytest.raises(ConfigError, match="give a positive number"):
        make()
