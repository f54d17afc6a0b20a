from __future__ import annotations

import argparse
import math
import re
import sysconfig
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from tests.laws.reference import distance, train_plainly
from torch.utils.data import TensorDataset

import weft
from weft.compare import final_parameters
from weft.errors import ConfigError, DataError, UnknownName
from weft.tasks.codelm import is_held_out, read_packages
from weft.tasks.wordvec import LEAST, WORD, Noise, WordVec, kept, pairs, prepare, read_corpus, won

TEXT = str(argparse.__file__)  # 10,000 words
SMALL: dict[str, Any] = {"text": TEXT, "dim": 8}


class Told(WordVec):
    """Trains on pairs that bring their negatives: what is drawn anew at each step, each worker draws for itself."""

    def data(self) -> tuple[TensorDataset, TensorDataset]:
        _, test = super().data()
        return test, test


# -- words and pairs


def test_a_word_is_a_name_as_it_is_written() -> None:
    text = "os.path.join(Error, error) 3d 0xFF x2 __init__ naïve don't"
    truth = ["os", "path", "join", "Error", "error", "x2", "__init__", "naïve", "don", "t"]
    assert WORD.findall(text) == truth


def test_the_end_of_a_file_is_held_out_and_tells_nothing_of_itself() -> None:
    words = re.findall(r"\b[A-Za-z_]\w*", Path(TEXT).read_text(encoding="utf-8"))
    cut = len(words) - len(words) // 10
    counts = Counter(words[:cut])
    corpus = WordVec(**SMALL).corpus()
    assert dict(zip(corpus.words, corpus.counts.tolist(), strict=True)) == {
        word: count for word, count in counts.items() if count >= LEAST
    }
    assert sorted(corpus.counts, reverse=True) == corpus.counts.tolist()
    (train,), (test,) = corpus.train, corpus.test
    assert [corpus.words[k] for k in train] == [w for w in words[:cut] if w in corpus.words]
    assert [corpus.words[k] for k in test] == [w for w in words[cut:] if w in corpus.words]
    assert WordVec(**SMALL, vocabulary=7).corpus().words == corpus.words[:7]


def test_whole_packages_of_the_standard_library_are_held_out() -> None:
    corpus = WordVec().corpus()
    assert len(corpus.words) > 5000
    assert {"self", "None", "import"} <= set(corpus.words[:50])
    packages = read_packages(Path(sysconfig.get_path("stdlib")))
    held_out = [name for name in packages if is_held_out(name)]
    assert (len(corpus.train), len(corpus.test)) == (len(packages) - len(held_out), len(held_out))
    assert len(held_out) > 3


@given(st.lists(st.integers(0, 9), max_size=30), st.integers(1, 6), st.integers(0, 100))
def test_pairs_are_those_of_the_paper_s_loop(words: list[int], window: int, seed: int) -> None:
    document, chance = np.array(words, np.int64), np.linspace(0.2, 1, 10)
    got = pairs([document], chance, window, np.random.default_rng(seed))
    rng = np.random.default_rng(seed)
    left = [w for w, at in zip(words, rng.random(len(words)), strict=True) if at < chance[w]]
    reach = rng.integers(1, window + 1, len(left))
    truth = [
        (left[i], left[j])
        for i in range(len(left))
        for j in range(i - reach[i], i + reach[i] + 1)
        if j != i and 0 <= j < len(left)
    ]
    assert sorted(map(tuple, got.tolist())) == sorted(truth)


def test_frequent_words_are_passed_over() -> None:
    counts = np.array([900, 90, 10])
    assert kept(counts, 0.09) == pytest.approx([math.sqrt(0.09 / 0.9), 1, 1])
    assert kept(counts, 0).tolist() == [1, 1, 1]


def test_negatives_come_by_counts_to_the_power_three_quarters() -> None:
    counts = np.array([5000, 400, 300, 16, 5])
    drawn = Noise(counts).draw(40_000, 5, torch.Generator().manual_seed(0)).flatten().numpy()
    p = counts**0.75 / (counts**0.75).sum()
    expected = p * len(drawn)
    assert np.all(np.abs(np.bincount(drawn, minlength=5) - expected) < 5 * np.sqrt(expected))


def test_equal_options_give_equal_examples() -> None:
    first = WordVec(**SMALL).data()
    prepare.cache_clear()
    read_corpus.cache_clear()
    again = WordVec(**SMALL).data()
    for a, b in zip(first, again, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a.tensors, b.tensors, strict=True))
    assert len(first[1].tensors) == 2
    assert first[1].tensors[1].shape == (len(first[1]), 5)


def test_a_file_that_changed_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "mine.txt"
    for word in ("one", "other"):
        path.write_text(f"{word} two " * 500)
        assert word in WordVec(text=str(path)).corpus().words


# -- rows


def test_with_more_rows_than_words_each_word_has_its_own_and_the_others_stay() -> None:
    task = WordVec(**SMALL, rows=20_000)
    row = task._prepared().row
    num = len(task.corpus().words)
    assert len(set(row.tolist())) == len(row) == num
    quarters = torch.bincount(row // 5000, minlength=4)
    assert len(quarters) == 4
    assert quarters.min() > num / 8  # spread over the table
    torch.manual_seed(0)
    model = task.model()
    before = {name: table.clone() for name, table in model.state_dict().items()}
    optimizer = task.optimizer(model.parameters())
    examples = task.data()[0].tensors[0]
    assert set(examples.unique().tolist()) <= set(row.tolist())
    for batch in examples[:3000].split(1000):
        optimizer.zero_grad()
        task.loss(model, [batch]).backward()
        optimizer.step()
    in_use = torch.zeros(20_000, dtype=torch.bool).index_fill(0, row, True)
    for name, table in model.state_dict().items():
        moved = (table != before[name]).any(1)
        assert not moved[~in_use].any(), name
        assert moved[in_use].float().mean() > 0.5, name


def test_only_touched_rows_get_a_gradient() -> None:
    task = Told(**SMALL, rows=5000)
    model = task.model()
    pair, negatives = (c[:50] for c in task.data()[0].tensors)
    task.loss(model, [pair, negatives]).backward()
    touched = {"vector": pair[:, 0], "nearby": torch.cat([pair[:, 1], negatives.flatten()])}
    for name, rows in touched.items():
        grad = model.get_submodule(name).weight.grad
        assert grad.is_sparse
        assert grad.coalesce().indices()[0].tolist() == sorted(set(rows.tolist()))


# -- loss and figures


def test_the_loss_is_the_paper_s() -> None:
    task = WordVec(**SMALL)
    torch.manual_seed(0)
    model = task.model().double()
    torch.nn.init.normal_(model.nearby.weight)
    pair, negatives = (c[:20] for c in task.data()[1].tensors)
    truth = 0.0
    for (word, near), false in zip(pair.tolist(), negatives.tolist(), strict=True):
        v = model.vector.weight[word]
        truth -= torch.sigmoid(v @ model.nearby.weight[near]).log().item()
        truth -= sum(torch.sigmoid(-v @ model.nearby.weight[k]).log().item() for k in false)
    assert task.loss(model, [pair, negatives]).item() == pytest.approx(truth / 20, rel=1e-12)
    total, count = task.evaluate(model, [pair, negatives])["loss"]
    assert (total.item(), count) == (pytest.approx(truth, rel=1e-12), 20)


def test_a_model_that_knows_nothing_has_the_loss_in_the_notes() -> None:
    task = WordVec(**SMALL, negatives=3)
    nothing, _ = task.notes().values()
    assert task.loss(task.model(), [task.data()[0].tensors[0][:100]]).item() == pytest.approx(nothing)


def test_who_wins_over_how_many() -> None:
    true, false = torch.tensor([[2.0], [0.0]]), torch.tensor([[1.0, 2.0, 3.0, -1.0], [1, 1, 1, 1]])
    assert won(true, false).tolist() == [0.625, 0]


def test_the_note_is_the_auc_of_scoring_by_frequency() -> None:
    task = WordVec(**SMALL)
    corpus = task.corpus()
    (_, near), false = task.data()[1].tensors[0].T.tolist(), task.data()[1].tensors[1].tolist()
    score = corpus.counts.tolist()  # without more rows a word's number is its row
    wins = [
        (score[a] > score[b]) + 0.5 * (score[a] == score[b])
        for a, others in zip(near, false, strict=True)
        for b in others
    ]
    assert task.notes()["auc of frequency alone"] == pytest.approx(sum(wins) / len(wins), rel=1e-9)


# -- training


@pytest.mark.parametrize("rule", ["sgd", "adagrad", "adam"])
def test_two_workers_train_as_one_process_does(tmp_path: Path, rule: Any) -> None:
    task = Told(**SMALL, rule=rule)
    truth = train_plainly(task, steps=12, batch=50, run_seed=3)
    run_dir = tmp_path / "run"
    weft.run(task, workers=2, steps=12, batch=50, seed=3, dtype="float64", cluster="inprocess", run_dir=run_dir)
    got = final_parameters(run_dir)
    assert distance(got, truth) <= 1e-9
    assert got["nearby.weight"].abs().max() > 1e-3  # else this test says nothing


def test_a_run_s_metrics_are_those_of_its_model_whatever_the_number_of_workers(tmp_path: Path) -> None:
    task = WordVec(**SMALL, test_pairs=500)
    for workers in (1, 2, 3):
        run_dir = tmp_path / str(workers)
        result = weft.run(task, workers=workers, steps=20, dtype="float64", cluster="inprocess", run_dir=run_dir)
        model = task.model().double()
        model.load_state_dict(final_parameters(run_dir))
        pair, negatives = (c.long() for c in task.data()[1].tensors)
        with torch.no_grad():
            v = model.vector.weight[pair[:, :1]]
            true = (v * model.nearby.weight[pair[:, 1:]]).sum(2)
            false = (v * model.nearby.weight[negatives]).sum(2)
        wins = (true > false).double() + 0.5 * (pair[:, 1:] == negatives)
        assert result.metrics["auc"] == pytest.approx(wins.mean().item(), rel=1e-9)
        loss = F.softplus(-true).sum(1) + F.softplus(false).sum(1)
        assert result.loss == pytest.approx(loss.mean().item(), rel=1e-9)


@pytest.mark.multiprocess
def test_sparse_rows_travel_between_processes_as_within_one(tmp_path: Path) -> None:
    task = WordVec(**SMALL, rows=3000)
    results = [
        weft.run(task, workers=2, steps=15, dtype="float64", cluster=cluster, run_dir=tmp_path / cluster)
        for cluster in ("inprocess", "local")
    ]
    assert results[1].loss == pytest.approx(results[0].loss, rel=1e-12)
    assert results[1].metrics == pytest.approx(results[0].metrics, rel=1e-12)


@pytest.mark.usefixtures("one_thread")
def test_soon_tells_words_that_stand_near_from_others(tmp_path: Path) -> None:
    """On packages that it never saw; an epoch is ten times as long."""
    task = WordVec()
    result = weft.run(task, steps=200, cluster="inprocess", workers=1, run_dir=tmp_path / "run")
    nothing, frequency = task.notes().values()
    assert result.loss < 0.7 * nothing
    assert result.metrics["auc"] > frequency + 0.03


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.usefixtures("one_thread")
def test_an_epoch_of_the_standard_library_finds_words_that_are_used_alike(tmp_path: Path) -> None:
    task = WordVec()
    result = weft.run(task, cluster="inprocess", workers=1, run_dir=tmp_path / "run")
    assert result.metrics["auc"] > task.notes()["auc of frequency alone"] + 0.08
    model = task.model()
    model.load_state_dict(final_parameters(tmp_path / "run"))
    near = {word: [w for w, _ in task.neighbours(model, word)] for word in ("True", "socket", "the")}
    assert "False" in near["True"]
    assert {"AF_INET", "SOCK_STREAM", "AF_UNIX", "setsockopt", "sock"} & set(near["socket"])
    assert {"The", "of", "which", "its"} & set(near["the"])


def test_neighbours_are_those_of_the_largest_cosine() -> None:
    task = WordVec(**SMALL, rows=4000)
    torch.manual_seed(0)
    model = task.model()
    words, row = task.corpus().words, task._prepared().row
    vectors = model.vector.weight.detach()[row].numpy()
    at = words.index("parser")
    cosines = vectors @ vectors[at] / np.linalg.norm(vectors, axis=1) / np.linalg.norm(vectors[at])
    best = [i for i in np.argsort(-cosines) if i != at][:4]
    got = task.neighbours(model, "parser", 4)
    assert [word for word, _ in got] == [words[i] for i in best]
    assert [c for _, c in got] == pytest.approx(cosines[best].tolist(), abs=1e-6)
    with pytest.raises(UnknownName, match=r"unknown word 'parsr'. Did you mean 'parser'\? Possible: .* in all\)"):
        task.neighbours(model, "parsr")


# -- what is refused


def test_impossible_options_are_refused(tmp_path: Path) -> None:
    for options in ({"dim": 0}, {"window": -1}, {"negatives": 0}, {"vocabulary": 0}, {"test_pairs": 0}):
        with pytest.raises(ConfigError, match="give a positive number"):
            WordVec(**options)
    for options in ({"rows": -1}, {"subsample": math.nan}, {"lr": -0.1}, {"lr": math.inf}):
        with pytest.raises(ConfigError, match="is not possible: give a positive number, or 0"):
            WordVec(**options)
    with pytest.raises(UnknownName, match=r"'adagard'.*Did you mean 'adagrad'"):
        WordVec(rule="adagard")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"rows=10 is not possible: \d+ words need.*vocabulary of at most 10"):
        WordVec(**SMALL, rows=10).data()
    with pytest.raises(DataError, match=r"cannot read text=.*none.txt: No such file.*Give a text file"):
        WordVec(text=str(tmp_path / "none.txt"))


@pytest.mark.parametrize("text", ["", "1 2 3", "each word once", "same " * 4])
def test_too_little_text_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "mine.txt"
    path.write_text(text)
    with pytest.raises(DataError, match=r"mine.txt is too little text: .*Give more text"):
        WordVec(text=str(path)).data()
