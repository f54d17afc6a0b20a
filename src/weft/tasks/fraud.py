"""Card fraud, *generated*: a stream of transactions by card and merchant, 1 in 100 fraudulent, judged by average precision.

No real card data may be shipped, so the stream is drawn from the model below. It has what makes fraud hard to train on,
alone or distributed: rare positives, many ids of which most are rare, and positives that come in bursts, so that workers
who each hold a stretch of time see very different ones.

**The stream.** Cards have a home region (their bank's), an activity, a usual amount and a usual hour; merchants a region,
a category, a popularity and a usual amount. Most transactions are single purchases near home; some are sprees: several in
a few hours, half of them far from home, half of them at unusual amounts. Most sprees are holidays, not thieves.

**What makes a transaction fraudulent.** Its log-odds are a sum: the merchant's category and how badly it guards its
terminals, how careless the card's holder is, how far the amount is above and the hour off what the card is used to, how
many transactions the card had in the last day, more so when far from home; and, by far the largest term, whether the
merchant is *compromised at that time*. Campaigns compromise merchants of a few categories for some days, badly guarded
ones first. The label is one draw with that probability: even who knew all of this could rank the transactions no better,
on average, than by the probability itself. Its average precision on the held-out part is the ``ceiling`` among the notes;
that of a scorer who knows nothing is the base rate.

**What the model sees**: the two ids and eight figures (``figures``), each known at the time of the transaction: seven from
this card's past, and how many frauds at this merchant were reported by then, which takes a day (the delay is an idea of
Le Borgne et al. 2022, "Reproducible Machine Learning for Credit Card Fraud Detection"). Not seen: categories, regions,
habits, campaigns. The held-out part is the last fifth *in time*, with campaigns of its own; figures are standardised by the
training part. Among held-out transactions too, earlier labels reach later ones by that count alone, as they would in use.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from weft.data.keys import keyed
from weft.errors import ConfigError
from weft.options import check_positive
from weft.task import Defaults, Task
from weft.tasks.sparse import decline_checks

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

BASE_RATE = 0.01
HELD_OUT = 0.2  # of the transactions, the last ones
DAYS, REGIONS, CATEGORIES = 90, 8, 12
PER_CARD, PER_MERCHANT = 60, 400  # transactions, on average
REPORTED_AFTER, REPORTS = 24, 7 * 24  # hours until a fraud is known, and for how long it then counts
SPREE = 5  # transactions in one
SPREES = 0.1  # of all transactions are part of one
FAR = 0.05  # of single purchases are made in another region than the card's
CAMPAIGNS = 8  # one in each eighth of the stream, at a random time in it

# -- the stream


class Stream(NamedTuple):
    """Transactions in order of time, each column (N,)."""

    hour: Floats  # since the beginning
    card: Ints
    merchant: Ints
    region: Ints  # the card's: its bank
    figures: Floats  # (N, 8), not standardised
    campaign: npt.NDArray[np.bool_]  # the merchant is compromised at this time
    probability: Floats  # of fraud, all things known
    fraud: Ints  # 0 or 1: the label


@functools.lru_cache(maxsize=1)
def generate(num: int, seed: int) -> Stream:
    """``num`` transactions; equal arguments give equal streams. 120,000 take about 0.2 s."""
    rng = keyed(seed, "fraud", num)
    num_cards, num_merchants = max(1, num // PER_CARD), max(REGIONS * CATEGORIES, num // PER_MERCHANT)

    card_region = rng.integers(REGIONS, size=num_cards)
    activity = rng.lognormal(0, 0.7, num_cards)
    usual_amount = rng.normal(3.3, 0.5, num_cards)  # log
    usual_hour = rng.normal(14, 3, num_cards)
    careless = rng.normal(0, 1, num_cards)

    shop_region, category = np.divmod(rng.permutation(num_merchants) % (REGIONS * CATEGORIES), CATEGORIES)
    popularity = rng.lognormal(0, 1, num_merchants)
    price = rng.normal(0, 0.6, CATEGORIES)[category] + rng.normal(0, 0.3, num_merchants)  # log, beside the card's
    unguarded = rng.normal(0, 1, num_merchants)

    # who buys when: single purchases, then sprees that start like one
    num_sprees = round(SPREES * num / SPREE)
    num_begun = num - num_sprees * (SPREE - 1)
    card = rng.choice(num_cards, num_begun, p=activity / activity.sum())
    of_day = (usual_hour[card] + rng.normal(0, 3.5, num_begun)) % 24
    hour = 24 * rng.integers(DAYS, size=num_begun) + of_day
    far = rng.random(num_begun) < FAR
    excess = rng.normal(0, 0.5, num_begun)  # of the log amount

    again = np.repeat(np.arange(num_sprees), SPREE - 1)
    later = rng.exponential(1.5, (num_sprees, SPREE - 1)).cumsum(1).ravel()
    abroad, splurge = rng.random((2, num_sprees)) < 0.5
    far[:num_sprees] |= abroad
    excess[:num_sprees] += 1.2 * splurge
    card, far = np.append(card, card[again]), np.append(far, far[again])
    hour = np.append(hour, hour[again] + later)
    excess = np.append(excess, 1.2 * splurge[again] + rng.normal(0, 0.5, len(again)))

    order = np.argsort(hour, kind="stable")
    card, hour, far, excess = card[order], hour[order], far[order], excess[order]
    region = card_region[card]
    where = (region + far * rng.integers(1, REGIONS, num)) % REGIONS
    merchant = np.empty(num, np.int64)
    for r in range(REGIONS):
        shops, here = np.flatnonzero(shop_region == r), np.flatnonzero(where == r)
        merchant[here] = rng.choice(shops, len(here), p=popularity[shops] / popularity[shops].sum())
    amount = usual_amount[card] + price[merchant] + excess

    # who is compromised when
    compromised = np.zeros(num, np.bool_)
    length = 24 * DAYS / CAMPAIGNS
    for k in range(CAMPAIGNS):
        begin = (k + rng.random()) * length
        end = begin + 24 * rng.uniform(1, 10)
        aim = rng.permutation(CATEGORIES)[:3]
        hit = np.isin(category, aim) & (rng.random(num_merchants) < 1 / (1 + np.exp(-2 * unguarded)))
        compromised |= hit[merchant] & (begin <= hour) & (hour < end)

    recent = count_before(card, hour, 24, 0, np.ones(num))
    log_odds = (
        rng.normal(0, 1, CATEGORIES)[category][merchant]
        + 0.7 * unguarded[merchant]
        + 0.7 * careless[card]
        + 1.0 * np.maximum(0, excess)
        + 0.8 * (1 - np.cos((hour - usual_hour[card]) * math.pi / 12))
        + 0.6 * np.minimum(recent, SPREE) * np.where(far, 1.0, 0.4)
        + 3.5 * compromised
    )
    probability = 1 / (1 + np.exp(-(log_odds + offset_for(log_odds, BASE_RATE))))
    fraud = (rng.random(num) < probability).astype(np.int64)
    reports = count_before(merchant, hour, REPORTS + REPORTED_AFTER, REPORTED_AFTER, fraud)
    return Stream(
        hour, card, merchant, region, figures(hour, card, amount, far, recent, reports), compromised, probability, fraud
    )


def figures(
    hour: Floats, card: Ints, amount: Floats, far: npt.NDArray[np.bool_], recent: Floats, reports: Floats
) -> Floats:
    """What is known at the time of each transaction, (N, 8)."""
    angle = hour * math.pi / 12
    east, north = np.cos(angle), np.sin(angle)
    columns = [
        amount,  # log
        amount - earlier_mean(amount, card),  # the jump in amount
        east,  # the time of day as a point on a circle
        north,
        east * earlier_mean(east, card) + north * earlier_mean(north, card),  # how usual the hour is for the card
        far,  # in another region than the card's
        np.log1p(recent),  # velocity: transactions of the card in the 24 hours before
        np.log1p(reports),  # frauds at this merchant in a week, known by now
    ]
    return np.column_stack(columns).astype(np.float64)


def earlier_mean(values: Floats, card: Ints) -> Floats:
    """The mean over the card's earlier transactions, drawn towards that of all earlier ones as if it stood for one, (N,)."""
    overall = (values.cumsum() - values) / np.maximum(1, np.arange(len(values)))
    order, start = by_group(card)
    before = values[order].cumsum() - values[order]  # over all cards up to here: take off those before this card
    total = np.empty_like(values)
    total[order] = before - before[start]
    count = np.empty_like(values)
    count[order] = np.arange(len(order)) - start
    return (total + overall) / (count + 1)


def count_before(group: Ints, hour: Floats, oldest: float, newest: float, counted: npt.NDArray[Any]) -> Floats:
    """How much of ``counted`` the same card or merchant had ``oldest`` to ``newest`` hours before each transaction, (N,).

    From ``oldest``, itself counted, to ``newest``, not counted.
    """
    order, _ = by_group(group)
    # each group on a stretch of its own, so that one search serves all
    place = group[order] * (hour.max() + 2 * oldest) + hour[order]
    total = np.append(0, counted[order].cumsum())
    result = np.empty_like(hour)
    result[order] = total[np.searchsorted(place, place - newest)] - total[np.searchsorted(place, place - oldest)]
    return result


def by_group(group: Ints) -> tuple[Ints, Ints]:
    """(order, start): positions by card or merchant, then time; for each place of that order, the first of its group."""
    order = np.argsort(group, kind="stable")
    return order, np.searchsorted(group[order], group[order])


def offset_for(log_odds: Floats, rate: float) -> float:
    """The number to add so that the probabilities have this mean; by bisection."""
    low, high = -50.0, 50.0
    for _ in range(60):
        middle = (low + high) / 2
        if (1 / (1 + np.exp(-(log_odds + middle)))).mean() < rate:
            low = middle
        else:
            high = middle
    return low


# -- average precision, of sums that add up

BINS, SPAN = 16_384, 16.0  # a bin is 1/512 of a logit wide


def score_histogram(logits: Tensor, labels: Tensor) -> Tensor:
    """(2, BINS) counts of negatives and positives by score, to be added up over batches and workers.

    Logits in (-SPAN, SPAN) go into equal bins, others into the outermost; those of one bin will count as tied. A NaN
    ranks last.
    """
    scaled = (logits.double().nan_to_num(nan=-SPAN) + SPAN) * (BINS / (2 * SPAN))
    place = scaled.clamp(0, BINS - 1).long() + BINS * labels.long()
    return torch.bincount(place, minlength=2 * BINS).view(2, BINS)


def average_precision(histogram: Tensor) -> float:
    """Sum over thresholds of precision times the recall gained there, as scikit-learn's average_precision_score; NaN
    without positives. ``histogram`` (2, bins): negatives and positives, scores ascending."""
    negatives, positives = histogram.double().flip(1)
    found, flagged = positives.cumsum(0), (negatives + positives).cumsum(0)
    precision = found / flagged.clamp(min=1)
    return float((precision * positives).sum() / positives.sum())


# -- task

#: Adagrad's first step is as long as its rate, however small the gradient, and rare ids soon know their few examples by
#: heart: held-out average precision then falls in the third epoch. With squared gradients counted from here it still rises.
HELD_BACK = 1e-4


class FraudNet(nn.Module):
    """Embeddings of card and merchant beside the figures, then one hidden layer."""

    def __init__(self, num_cards: int, num_merchants: int, num_features: int, dim: int, hidden: int, sparse: bool):
        super().__init__()
        self.card = nn.Embedding(num_cards, dim, sparse=sparse)
        self.merchant = nn.Embedding(num_merchants, dim, sparse=sparse)
        self.hidden = nn.Linear(2 * dim + num_features, hidden)
        self.out = nn.Linear(hidden, 1)
        for table in (self.card, self.merchant):  # an id that is rare in training should say little
            nn.init.normal_(table.weight, std=0.01)
        # Lin et al. 2017 (focal loss): start from the base rate, or the first steps only learn that positives are rare
        nn.init.constant_(self.out.bias, math.log(BASE_RATE / (1 - BASE_RATE)))

    def forward(self, card: Tensor, merchant: Tensor, features: Tensor) -> Tensor:  # (B,), (B,), (B, 8) -> logits (B,)
        x = torch.cat([self.card(card), self.merchant(merchant), features], 1)
        logits: Tensor = self.out(F.relu(self.hidden(x))).squeeze(1)
        return logits


@dataclass
class Fraud(Task):
    """Generated data: see the module. With ``sparse`` only the rows of the embeddings that a batch touches get a gradient
    and travel. Adagrad (Duchi et al. 2011) moves only those rows in either case, so that both give the same model."""

    defaults: ClassVar[Defaults] = Defaults(batch=256, epochs=3)

    transactions: int = field(default=120_000, metadata={"doc": "length of the stream; a fifth of it is held out"})
    data_seed: int = field(default=0, metadata={"doc": "another number, another stream"})
    dim: int = field(default=8, metadata={"doc": "width of the embeddings of card and merchant"})
    hidden: int = field(default=32, metadata={"doc": "width of the hidden layer"})
    sparse: bool = field(
        default=False, metadata={"doc": "sparse gradients for the embeddings: only touched rows travel"}
    )
    lr: float = field(default=0.1, metadata={"doc": "learning rate of Adagrad"})

    def __post_init__(self) -> None:
        for name in ("dim", "hidden", "lr"):
            check_positive(name, getattr(self, name))
        if self.transactions < 1000:
            raise ConfigError(
                f"transactions={self.transactions} is not possible: at least 1000, of which 2 of the 200 held out are "
                "fraudulent on average."
            )

    def model(self) -> nn.Module:
        s = self.stream()
        sizes = int(s.card.max()) + 1, int(s.merchant.max()) + 1, s.figures.shape[1]
        return FraudNet(*sizes, self.dim, self.hidden, self.sparse)

    def data(self) -> tuple[TensorDataset, TensorDataset]:
        """Examples: (card, merchant, figures (8,), fraud), in order of time."""
        s, cut = self.stream(), self._cut
        mean, deviation = s.figures[:cut].mean(0), s.figures[:cut].std(0)
        deviation[deviation == 0] = 1  # in a short stream nothing may have been reported
        x = torch.from_numpy((s.figures - mean) / deviation).float()
        columns = torch.from_numpy(s.card), torch.from_numpy(s.merchant), x, torch.from_numpy(s.fraud)
        return TensorDataset(*(c[:cut] for c in columns)), TensorDataset(*(c[cut:] for c in columns))

    def client_of(self, index: int) -> int:
        """The bank that issued the card: one for each region."""
        return int(self.stream().region[index])

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        *inputs, fraud = batch
        logits = model(*inputs)
        return F.binary_cross_entropy_with_logits(logits, fraud.to(logits.dtype))

    def optimizer(self, params: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        if self.sparse:
            decline_checks()
        return torch.optim.Adagrad(params, lr=self.lr, initial_accumulator_value=HELD_BACK)

    def evaluate(self, model: nn.Module, batch: Any) -> dict[str, tuple[float | Tensor, float]]:
        *inputs, fraud = batch
        logits = model(*inputs)
        loss = F.binary_cross_entropy_with_logits(logits, fraud.to(logits.dtype), reduction="sum")
        return {"loss": (loss, len(fraud)), "scores": (score_histogram(logits, fraud), len(fraud))}

    def summarise(self, totals: dict[str, tuple[Tensor, float]]) -> dict[str, float | Tensor]:
        histogram, _ = totals.pop("scores")
        return super().summarise(totals) | {"average_precision": average_precision(histogram)}

    def notes(self) -> dict[str, float]:
        s, cut = self.stream(), self._cut
        p, fraud = torch.from_numpy(s.probability[cut:]), torch.from_numpy(s.fraud[cut:])
        return {
            "base rate (generated data; average precision of guessing)": float(s.fraud[cut:].mean()),
            "ceiling (that of the generator's own probabilities)": average_precision(score_histogram(p.logit(), fraud)),
        }

    def stream(self) -> Stream:
        return generate(self.transactions, self.data_seed)

    @property
    def _cut(self) -> int:
        return self.transactions - round(HELD_OUT * self.transactions)
