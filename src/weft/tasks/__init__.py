"""The shipped tasks by name, on real data that every machine has, or on the user's own. This table imports none of them, and not torch."""

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
    "text": Shipped("weft.tasks.text:Text", "the same transformer on your own text files, streamed: --data FILE"),
}
