from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from sklearn.metrics import average_precision_score

import weft
from weft.compare import final_parameters
from weft.data.partition import parse
from weft.errors import ConfigError
from weft.patterns.batches import keys_of, labels_of
from weft.tasks.fraud import (
    BASE_RATE,
    BINS,
    REGIONS,
    REPORTED_AFTER,
    REPORTS,
    SPAN,
    Fraud,
    average_precision,
    count_before,
    earlier_mean,
    figures,
    generate,
    score_histogram,
)

SMALL = 6000


@pytest.fixture(autouse=True)
def forget_the_stream() -> Iterator[None]:
    yield
    generate.cache_clear()


# -- the stream


def test_equal_keys_give_equal_streams_and_others_do_not() -> None:
    first = generate(SMALL, 3)
    generate.cache_clear()
    again = generate(SMALL, 3)
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    other = generate(SMALL, 4)
    assert not any(np.array_equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("seed", range(4))
def test_one_in_a_hundred_and_nobody_can_tell_which(seed: int) -> None:
    task = Fraud(data_seed=seed)
    stream = task.stream()
    assert stream.probability.mean() == pytest.approx(BASE_RATE, rel=1e-6)
    rate, ceiling = task.notes().values()
    assert 0.5 * BASE_RATE < rate < 2 * BASE_RATE
    assert 10 * rate < ceiling < 0.5


def test_labels_are_drawn_with_their_probabilities() -> None:
    """In each tenth of the transactions by probability, the frauds are as many as the probabilities add up to."""
    stream = generate(120_000, 0)
    order = np.argsort(stream.probability)
    for tenth in np.array_split(order, 10):
        p = stream.probability[tenth]
        assert abs(stream.fraud[tenth].sum() - p.sum()) < 4 * np.sqrt((p * (1 - p)).sum()) + 1


def test_fraud_comes_in_bursts() -> None:
    stream = generate(120_000, 0)
    assert stream.campaign.mean() < 0.1
    assert stream.fraud[stream.campaign].mean() > 10 * stream.fraud[~stream.campaign].mean()


GROUPS = arrays(np.int64, st.integers(1, 40), elements=st.integers(0, 4))


@given(GROUPS, st.randoms(use_true_random=False))
def test_what_is_counted_before_a_transaction(card: np.ndarray, random) -> None:
    hour = np.sort(np.array([random.choice([0.0, 1.0, 2.5, 7.0, 24.0, 25.0, 31.0]) for _ in card]))
    counted = np.array([random.randrange(3) for _ in card])
    for oldest, newest in ((24.0, 0.0), (7.0, 1.0)):
        truth = [
            sum(
                counted[j]
                for j in range(len(card))
                if card[j] == card[i] and hour[i] - oldest <= hour[j] < hour[i] - newest
            )
            for i in range(len(card))
        ]
        assert count_before(card, hour, oldest, newest, counted).tolist() == truth


@given(GROUPS, st.randoms(use_true_random=False))
def test_means_are_of_earlier_transactions_alone(card: np.ndarray, random) -> None:
    values = np.array([random.uniform(-5, 5) for _ in card])
    for i, got in enumerate(earlier_mean(values, card)):
        own, every = values[:i][card[:i] == card[i]], values[:i]
        overall = every.mean() if i else 0.0
        assert got == pytest.approx((own.sum() + overall) / (len(own) + 1), abs=1e-9)


def test_only_frauds_known_by_then_are_seen() -> None:
    stream = generate(SMALL, 0)
    for i in range(0, SMALL, 37):
        known = (
            (stream.merchant == stream.merchant[i])
            & (stream.hour < stream.hour[i] - REPORTED_AFTER)
            & (stream.hour >= stream.hour[i] - REPORTED_AFTER - REPORTS)
        )
        assert stream.figures[i, -1] == pytest.approx(np.log1p(stream.fraud[known].sum()))
    assert stream.figures[:, -1].max() > 0


def test_nothing_later_changes_what_was_seen() -> None:
    """All eight figures, also where they are computed over the whole stream at once."""
    rng = np.random.default_rng(0)
    hour, card = np.sort(rng.uniform(0, 200, 400)), rng.integers(20, size=400)
    amount, far, fraud = rng.normal(size=400), rng.random(400) < 0.3, rng.integers(2, size=400)

    def seen(num: int) -> np.ndarray:
        h, c = hour[:num], card[:num]
        recent = count_before(c, h, 24, 0, np.ones(num))
        reports = count_before(c, h, REPORTS, REPORTED_AFTER, fraud[:num])
        return figures(h, c, amount[:num], far[:num], recent, reports)

    everything = seen(400)
    for num in (1, 7, 100, 399):
        assert np.allclose(seen(num), everything[:num], atol=1e-9)


# -- the split and the shards


def test_the_held_out_part_is_later_and_standardised_by_the_earlier() -> None:
    task = Fraud(transactions=SMALL)
    train, test = task.data()
    assert (len(train), len(test)) == (4800, 1200)
    stream = task.stream()
    assert stream.hour[: len(train)].max() <= stream.hour[len(train) :].min()
    assert np.array_equal(torch.cat([train.tensors[0], test.tensors[0]]).numpy(), stream.card)
    x = stream.figures[: len(train)]
    assert torch.allclose(train.tensors[2], torch.tensor((x - x.mean(0)) / x.std(0)).float())
    truth = (stream.figures[len(train) :] - x.mean(0)) / x.std(0)
    assert torch.allclose(test.tensors[2], torch.tensor(truth).float(), atol=1e-5)


def test_a_stream_so_short_that_no_fraud_was_reported_is_finite_too() -> None:
    task = Fraud(transactions=1000, data_seed=64)
    assert not task.stream().figures[:800, -1].any()  # else this test says nothing
    for dataset in task.data():
        assert dataset.tensors[2].isfinite().all()


@pytest.mark.parametrize("seed", range(3))
def test_contiguous_shards_see_other_frauds_and_stratified_ones_the_same(seed: int) -> None:
    task = Fraud(data_seed=seed)
    train, _ = task.data()
    labels = labels_of(train)

    def positives(partition: str) -> list[int]:
        return [int(labels[part].sum()) for part in parse(partition).split(len(train), 4, 0, labels)]

    contiguous, stratified = positives("contiguous"), positives("stratified")
    assert max(contiguous) > 1.5 * min(contiguous)
    assert max(stratified) - min(stratified) <= 1


def test_a_bank_is_a_client() -> None:
    task = Fraud(transactions=SMALL)
    train, _ = task.data()
    keys = keys_of(train, task)
    assert set(keys.tolist()) == set(range(REGIONS))
    cards = train.tensors[0].numpy()
    bank_of = dict(zip(cards.tolist(), keys.tolist(), strict=True))
    assert [bank_of[card] for card in cards.tolist()] == keys.tolist()  # a card has one bank


# -- average precision

SCORED = st.lists(st.tuples(st.floats(-20, 20), st.booleans()), min_size=1, max_size=300).filter(
    lambda scored: any(label for _, label in scored)
)


@given(SCORED, st.integers(1, 5))
def test_average_precision_is_scikit_learn_s_of_binned_scores_however_cut(scored: list, shards: int) -> None:
    logits = torch.tensor([score for score, _ in scored], dtype=torch.float64)
    labels = torch.tensor([int(label) for _, label in scored])
    parts = zip(logits.tensor_split(shards), labels.tensor_split(shards), strict=True)
    got = average_precision(sum(score_histogram(*part) for part in parts))
    binned = np.clip(np.floor((logits.numpy() + SPAN) * BINS / (2 * SPAN)), 0, BINS - 1)
    assert got == pytest.approx(average_precision_score(labels.numpy(), binned), abs=1e-12)


@pytest.mark.parametrize("seed", range(10))
def test_bins_are_narrow_enough_to_change_little(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    labels = (torch.rand(24_000, generator=generator) < 0.01).long()
    logits = torch.randn(24_000, generator=generator) + 1.5 * labels - 5
    truth = average_precision_score(labels.numpy(), logits.numpy())
    assert average_precision(score_histogram(logits, labels)) == pytest.approx(truth, rel=0.02)


def test_who_knows_nothing_gets_the_base_rate() -> None:
    labels = (torch.arange(1000) % 50 == 0).long()
    assert average_precision(score_histogram(torch.zeros(1000), labels)) == pytest.approx(0.02)
    assert np.isnan(average_precision(score_histogram(torch.zeros(3), torch.zeros(3))))


def test_scores_without_bounds_are_counted() -> None:
    scores = torch.tensor([float("nan"), float("-inf"), -100, 100, float("inf")])
    histogram = score_histogram(scores, torch.tensor([1, 0, 0, 1, 1]))
    assert histogram[:, 0].tolist() == [2, 1]
    assert histogram[:, -1].tolist() == [0, 2]
    assert histogram.sum() == 5


# -- training


def test_a_run_s_average_precision_is_scikit_learn_s_whatever_the_number_of_workers(tmp_path: Path) -> None:
    task = Fraud(transactions=SMALL)
    *inputs, labels = task.data()[1].tensors
    for workers in (1, 2, 3):
        run_dir = tmp_path / str(workers)
        result = weft.run(task, workers=workers, steps=30, dtype="float64", cluster="inprocess", run_dir=run_dir)
        model = task.model().double()
        model.load_state_dict(final_parameters(run_dir))
        with torch.no_grad():
            logits = model(*inputs[:2], inputs[2].double())
        truth = average_precision_score(labels.numpy(), torch.floor(logits * BINS / (2 * SPAN)).numpy())
        assert result.metrics["average_precision"] == pytest.approx(truth, rel=1e-9)
        if workers == 1:
            first = result
        assert result.metrics == pytest.approx(first.metrics, rel=1e-9)


def test_sparse_gradients_give_the_same_model(tmp_path: Path) -> None:
    models = []
    for sparse in (False, True):
        task = Fraud(transactions=SMALL, sparse=sparse)
        run_dir = tmp_path / str(sparse)
        weft.run(task, workers=2, steps=20, dtype="float64", cluster="inprocess", run_dir=run_dir)
        models.append(final_parameters(run_dir))
    dense, sparse_ = models
    assert dense.keys() == sparse_.keys() == dict(Fraud(transactions=SMALL).model().named_parameters()).keys()
    for name, truth in dense.items():
        assert torch.allclose(sparse_[name], truth, rtol=1e-9, atol=1e-12), name


@pytest.mark.multiprocess
def test_sparse_rows_and_histograms_travel_between_processes_as_within_one(tmp_path: Path) -> None:
    results = [
        weft.run(
            Fraud(transactions=SMALL, sparse=True),
            workers=2,
            steps=20,
            dtype="float64",
            partition="contiguous",
            cluster=cluster,
            run_dir=tmp_path / cluster,
        )
        for cluster in ("inprocess", "local")
    ]
    assert results[1].metrics == pytest.approx(results[0].metrics, rel=1e-12)
    assert results[1].loss == pytest.approx(results[0].loss, rel=1e-12)


def test_only_touched_rows_get_a_gradient() -> None:
    task = Fraud(transactions=SMALL, sparse=True)
    model = task.model()
    batch = [c[:50] for c in task.data()[0].tensors]
    task.loss(model, batch).backward()
    for column, table in zip(batch, (model.card, model.merchant), strict=False):
        grad = table.weight.grad
        assert grad.is_sparse
        assert grad.coalesce().indices()[0].tolist() == sorted(set(column.tolist()))


def test_shards_weighted_by_their_examples_give_the_joined_gradient() -> None:
    task = Fraud(transactions=SMALL)
    torch.manual_seed(0)
    model = task.model().double()
    card, merchant, x, fraud = (c[:240] for c in task.data()[0].tensors)

    def gradient(at: slice) -> torch.Tensor:
        loss = task.loss(model, (card[at], merchant[at], x[at].double(), fraud[at]))
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])

    parts = (slice(0, 30), slice(30, 90), slice(90, 240))
    joined = sum(gradient(at) * (at.stop - at.start) / 240 for at in parts)
    truth = gradient(slice(0, 240))
    assert torch.linalg.vector_norm(joined - truth) <= 1e-12 * torch.linalg.vector_norm(truth)


@pytest.mark.usefixtures("one_thread")
def test_ranks_frauds_six_times_as_well_as_chance_after_its_default_epochs() -> None:
    task = Fraud()
    train, test = task.data()
    torch.manual_seed(0)
    model = task.model()
    optimizer = task.optimizer(model.parameters())
    for _ in range(int(task.defaults.epochs or 0)):
        for index in torch.randperm(len(train)).split(task.defaults.batch):
            optimizer.zero_grad()
            task.loss(model, [c[index] for c in train.tensors]).backward()
            optimizer.step()
    with torch.no_grad():
        logits = model(*test.tensors[:-1])
    rate, ceiling = task.notes().values()
    assert 6 * rate < average_precision_score(test.tensors[-1].numpy(), logits.numpy()) < ceiling


def test_impossible_options_are_refused() -> None:
    for options in ({"dim": 0}, {"hidden": -1}, {"lr": float("nan")}):
        with pytest.raises(ConfigError, match="give a positive number"):
            Fraud(**options)
    with pytest.raises(ConfigError, match="transactions=999 is not possible: at least 1000"):
        Fraud(transactions=999)
