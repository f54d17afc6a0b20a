"""Word vectors from the source text of Python's own standard library, or from a text file of one's own, by skip-gram with
negative sampling (Mikolov et al. 2013, 1310.4546).

A word's vector learns to tell the words that stand near it from words drawn at random. Both tables are embeddings with
sparse gradients that are read by lookups alone: of a million rows, a step touches those of its words.

**Words** are names and words as they are written ([A-Za-z_]\\w*, and letters of any script): ``os.path`` is two, ``Error``
is not ``error``. Of the standard library whole packages are held out, as in ``codelm``; of a file, its last tenth.

Where this departs from word2vec: which words are passed over and how far each looks is drawn once, and not anew for each
epoch; the rate does not fall, for Adagrad's steps do by themselves.
"""

from __future__ import annotations

import collections
import functools
import math
import re
import sysconfig
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from weft.data.keys import keyed
from weft.errors import ConfigError, DataError, UnknownName
from weft.options import check_positive
from weft.task import Defaults, Task
from weft.tasks.codelm import is_held_out, read_packages
from weft.tasks.sparse import Rule, check_rule, make_optimizer

Ints = npt.NDArray[np.int64]

WORD = re.compile(r"\b[^\W\d]\w*")
LEAST = 5  # a word that is rarer in the training part gets no vector and is passed over
HELD_OUT = 10  # of a file the last one part in so many
FLATTENED = 0.75  # negatives come by the words' counts to this power: between as often as they occur and all alike
OWN = "none"
LEARNING_RATES: dict[Rule, float] = {"adagrad": 0.1, "adam": 0.01, "sgd": 60.0}

# -- words


class Corpus(NamedTuple):
    words: list[str]  # (V,) the most frequent first
    counts: Ints  # (V,) in the training part
    train: list[Ints]  # each document's words by number, those without one left out
    test: list[Ints]


@functools.lru_cache(maxsize=1)
def read_corpus(path: Path | None, changed: int, vocabulary: int) -> Corpus:
    """The standard library's where there is no ``path``: 1.1 million words in half a second. ``changed``: when the file was, for the cache."""
    train, test = _documents(path)
    counts: collections.Counter[str] = collections.Counter()
    for document in train:
        counts.update(document)
    order = sorted((word for word, count in counts.items() if count >= LEAST), key=lambda word: (-counts[word], word))
    words = order[:vocabulary]
    number = {word: k for k, word in enumerate(words)}

    def numbers(documents: list[list[str]]) -> list[Ints]:
        return [np.array([number[w] for w in words if w in number], np.int64) for words in documents]

    return Corpus(words, np.array([counts[w] for w in words], np.int64), numbers(train), numbers(test))


def _documents(path: Path | None) -> tuple[list[list[str]], list[list[str]]]:
    """(train, held-out): packages of the standard library, or two stretches of the file."""
    if path is not None:
        words = _words(_read(path))
        cut = len(words) - len(words) // HELD_OUT
        return [words[:cut]], [words[cut:]]
    packages = read_packages(Path(sysconfig.get_path("stdlib")))
    documents = {name: _words(text) for name, text in packages.items()}
    return (
        [words for name, words in documents.items() if not is_held_out(name)],
        [words for name, words in documents.items() if is_held_out(name)],
    )


def _words(text: bytes) -> list[str]:
    return WORD.findall(text.decode("utf-8", errors="replace"))


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise _unreadable(path, error) from error


def last_change(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except OSError as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: OSError) -> DataError:
    return DataError(
        f"cannot read text={path}: {error.strerror}. Give a text file in UTF-8, or leave it out: the standard library's text is taken."
    )


def pairs(documents: Sequence[Ints], chance: npt.NDArray[np.float64], window: int, rng: np.random.Generator) -> Ints:
    """(N, 2): each word that is not passed over, with each one near it. ``chance``: by word, of not being passed over.

    Words passed over leave no gap. Each looks 1 to ``window`` words far to both sides, as far as is drawn for it, so that near words count for more.
    """
    found = [np.empty((0, 2), np.int64)]
    for words in documents:
        words = words[rng.random(len(words)) < chance[words]]
        reach = rng.integers(1, window + 1, len(words))
        for distance in range(1, min(window, len(words) - 1) + 1):
            both = np.column_stack([words[:-distance], words[distance:]])
            found += [both[reach[:-distance] >= distance], both[reach[distance:] >= distance, ::-1]]
    return np.concatenate(found)


def kept(counts: Ints, subsample: float) -> npt.NDArray[np.float64]:
    """The chance of each word not to be passed over: sqrt(subsample / its share of the text), at most 1 (equation 5 there)."""
    return np.minimum(1, np.sqrt(subsample * counts.sum() / counts)) if subsample else np.ones(len(counts))


class Noise:
    """Words drawn by their counts to the power 3/4."""

    def __init__(self, counts: Ints) -> None:
        weights = torch.from_numpy(counts).double() ** FLATTENED
        self.upto = weights.cumsum(0) / weights.sum()  # (V,)

    def draw(self, num: int, each: int, generator: torch.Generator | None = None) -> Tensor:
        """(num, each) words by number."""
        at = torch.rand(num, each, dtype=torch.float64, generator=generator)
        return torch.searchsorted(self.upto, at).clamp_(max=len(self.upto) - 1)


class Prepared(NamedTuple):
    """Rows of the tables by which the words are known, and not words."""

    row: Tensor  # (V,) int64, each word's
    train: Tensor  # (N, 2) int32: a word and one near it
    test: Tensor  # (M, 2) int32
    negatives: Tensor  # (M, K) int32: drawn once, so that the held-out figures depend on nothing else
    noise: Noise
    auc_of_frequency: float


@functools.lru_cache(maxsize=1)
def prepare(
    path: Path | None,
    changed: int,
    vocabulary: int,
    rows: int,
    window: int,
    negatives: int,
    subsample: float,
    test_pairs: int,
) -> Prepared:
    """4 million pairs of the standard library take about a second."""
    corpus = read_corpus(path, changed, vocabulary)
    num = len(corpus.words)
    if rows and rows < num:
        raise ConfigError(
            f"rows={rows} is not possible: {num} words need at least as many. Give more rows, a vocabulary of at most {rows}, or "
            "rows=0 for as many as there are words."
        )
    # as a table filled by hashing has them: otherwise whoever held the first stretch of it would hold all that is in use
    row = keyed(0, "wordvec", "rows").permutation(rows)[:num] if rows else np.arange(num)
    chance = kept(corpus.counts, subsample)
    train, test = (
        pairs(documents, chance, window, keyed(0, "wordvec", side))
        for side, documents in (("train", corpus.train), ("held-out", corpus.test))
    )
    if not len(train) or not len(test):
        raise DataError(
            f"{path or 'the standard library'} is too little text: no two words that occur {LEAST} times in its training part stand near "
            "each other in both parts. Give more text"
            + ("." if path else ", or a Python whose library is there as .py files.")
        )
    some = min(test_pairs, len(test))
    test = test[np.arange(some) * len(test) // some]
    noise = Noise(corpus.counts)
    drawn = noise.draw(some, negatives, torch.Generator().manual_seed(0))
    frequency = torch.from_numpy(corpus.counts)
    wins = won(frequency[torch.from_numpy(test[:, 1:])], frequency[drawn])

    def as_rows(words: Ints) -> Tensor:
        return torch.from_numpy(row[words].astype(np.int32))

    return Prepared(
        torch.from_numpy(row),
        as_rows(train),
        as_rows(test),
        as_rows(drawn.numpy()),
        noise,
        float(wins.mean()),
    )


def won(true: Tensor, false: Tensor) -> Tensor:
    """(B,): over how many of its negatives each example's true word wins, as a share; ties are half won. (B, 1), (B, K)."""
    return ((true > false).double() + 0.5 * (true == false)).mean(1)


# -- model


class SkipGram(nn.Module):
    """``vector`` is what is wanted in the end; ``nearby`` is each word's as a neighbour of others."""

    def __init__(self, rows: int, dim: int) -> None:
        super().__init__()
        start = (torch.rand(rows, dim) - 0.5) / dim  # as word2vec: no word begins as any other's neighbour
        self.vector = nn.Embedding.from_pretrained(start, freeze=False, sparse=True)
        self.nearby = nn.Embedding.from_pretrained(torch.zeros(rows, dim), freeze=False, sparse=True)

    def forward(self, words: Tensor, others: Tensor) -> Tensor:  # (B,), (B, C) -> scores (B, C)
        # so and not by bmm equal words score alike to the last bit, which makes ties; it is quicker, too
        scores: Tensor = (self.nearby(others) * self.vector(words)[:, None]).sum(2)
        return scores


# -- task


@dataclass
class WordVec(Task):
    """An example is a pair of words that stand near each other; the loss is its nats and those of its negatives, summed.

    ``auc``: how often a held-out pair's second word scores higher for the first than a negative does.
    """

    defaults: ClassVar[Defaults] = Defaults(batch=2048, epochs=1)

    text: str = field(default=OWN, metadata={"doc": "a text file of yours; none: Python's standard library"})
    dim: int = field(default=64, metadata={"doc": "width of a word's vector"})
    vocabulary: int = field(
        default=50_000, metadata={"doc": f"words at most, the most frequent; all occur at least {LEAST} times"}
    )
    rows: int = field(
        default=0,
        metadata={
            "doc": "of each table; 0: one a word. With more, words lie spread over it and other rows stay untouched"
        },
    )
    window: int = field(default=5, metadata={"doc": "how many words to each side count as near, at most"})
    negatives: int = field(default=5, metadata={"doc": "random words that each pair is told from"})
    subsample: float = field(
        default=1e-3,
        metadata={"doc": "words that are more frequent than this are passed over now and then; 0: none is"},
    )
    rule: Rule = field(default="adagrad", metadata={"doc": "the optimizer; adam is torch's SparseAdam"})
    lr: float = field(
        default=0,
        metadata={
            "doc": f"learning rate; 0: the rule's own ({', '.join(f'{k} {v:g}' for k, v in LEARNING_RATES.items())})"
        },
    )
    test_pairs: int = field(
        default=20_000, metadata={"doc": "held-out pairs at most, spread evenly over the held-out text"}
    )

    def __post_init__(self) -> None:
        check_rule(self.rule)
        for name in ("dim", "vocabulary", "window", "negatives", "test_pairs"):
            check_positive(name, getattr(self, name))
        for name, meaning in (("rows", "one a word"), ("subsample", "none is passed over"), ("lr", "the rule's own")):
            if not 0 <= (value := getattr(self, name)) < math.inf:
                raise ConfigError(f"{name}={value} is not possible: give a positive number, or 0: {meaning}.")
        self.lr = self.lr or LEARNING_RATES[self.rule]
        self._path = None if self.text == OWN else Path(self.text)
        self._changed = 0 if self._path is None else last_change(self._path)

    def model(self) -> nn.Module:
        return SkipGram(self.rows or len(self._prepared().row), self.dim)

    def data(self) -> tuple[TensorDataset, TensorDataset]:
        """Examples: (word, one near it), both as rows; held-out ones bring their negatives."""
        prepared = self._prepared()
        return TensorDataset(prepared.train), TensorDataset(prepared.test, prepared.negatives)

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        return nats(*self._scores(model, batch)).mean()

    def optimizer(self, params: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        return make_optimizer(self.rule, params, self.lr)

    def evaluate(self, model: nn.Module, batch: Any) -> dict[str, tuple[float | Tensor, float]]:
        true, false = self._scores(model, batch)
        return {"loss": (nats(true, false).sum(), len(true)), "auc": (won(true, false).sum(), len(true))}

    def notes(self) -> dict[str, float]:
        return {
            "loss of knowing nothing": (1 + self.negatives) * math.log(2),
            "auc of frequency alone": self._prepared().auc_of_frequency,
        }

    def neighbours(self, model: nn.Module, word: str, k: int = 10) -> list[tuple[str, float]]:
        """The ``k`` words whose vectors point most nearly the same way, with the cosine; UnknownName if it has no vector."""
        words = self.corpus().words
        if word not in words:
            raise UnknownName.of("word", word, words, shown=[*words[:10], f"... ({len(words)} in all)"])
        at, row = words.index(word), self._prepared().row.to(next(model.parameters()).device)
        with torch.no_grad():
            vectors = F.normalize(model.get_submodule("vector")(row), dim=1)  # (V, D)
            cosines = vectors @ vectors[at]
            cosines[at] = -math.inf
            best = cosines.topk(min(k, len(words) - 1))
        return [(words[i], c) for i, c in zip(best.indices.tolist(), best.values.tolist())]

    def corpus(self) -> Corpus:
        return read_corpus(self._path, self._changed, self.vocabulary)

    def _scores(self, model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
        """Of the true words (B, 1), of negatives (B, K): those that the batch brings, else newly drawn by torch's generator."""
        pair, *brought = batch
        words, near = pair.long().unbind(1)
        if brought:
            false = brought[0].long()
        else:
            prepared = self._prepared()
            false = prepared.row[prepared.noise.draw(len(pair), self.negatives)].to(words.device)
        scores = model(words, torch.column_stack([near, false]))
        return scores[:, :1], scores[:, 1:]

    def _prepared(self) -> Prepared:
        return prepare(
            self._path,
            self._changed,
            self.vocabulary,
            self.rows,
            self.window,
            self.negatives,
            self.subsample,
            self.test_pairs,
        )


def nats(true: Tensor, false: Tensor) -> Tensor:
    """Equation 4 there, negated: -log sigmoid of the true word's score, and of the negatives' with the sign turned. (B,)."""
    return F.softplus(-true).sum(1) + F.softplus(false).sum(1)
