"""The shipped tasks by name, on data that every machine has (real, or generated and said to be so), or on the user's own.
This table imports none of them, and not torch."""

from __future__ import annotations

from typing import NamedTuple


class Shipped(NamedTuple):
    """``target``: "module:Class"; ``summary``: one line for people."""

    target: str
    summary: str


TASKS: dict[str, Shipped] = {
    "digits": Shipped(
        "weft.tasks.digits:Digits", "a small CNN reads 1,797 scanned handwritten digits (scikit-learn's)"
    ),
    "digits-mlp": Shipped("weft.tasks.digits:DigitsMLP", "a multi-layer perceptron on the same digits"),
    "codelm": Shipped(
        "weft.tasks.codelm:CodeLM", "a byte-level transformer on the source text of Python's standard library"
    ),
    "fraud": Shipped(
        "weft.tasks.fraud:Fraud",
        "1 fraudulent card transaction in 100, by embeddings of card and merchant (generated data, not real)",
    ),
    "diabetes": Shipped(
        "weft.tasks.diabetes:Diabetes", "regression: how far diabetes went in 442 patients (scikit-learn's)"
    ),
    "series": Shipped(
        "weft.tasks.series:Series",
        "a GRU forecasts the Mackey-Glass series (generated), or a column of your own CSV file",
    ),
    "wordvec": Shipped(
        "weft.tasks.wordvec:WordVec", "word vectors (skip-gram) of Python's standard library, or of your own text"
    ),
    "recommend": Shipped(
        "weft.tasks.recommend:Recommend",
        "which functions will a file of the standard library call? Matrix factorisation",
    ),
    "text": Shipped("weft.tasks.text:Text", "the same transformer on your own text files, streamed: --data FILE"),
}
