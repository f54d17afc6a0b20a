"""Tensor parallelism: the large matrices of a model cut over workers, each of which computes its part of every activation.

Pairs of matrices, the first cut by columns and the second by rows, need one all-reduce of activations forward and one backward (Shoeybi et al.
2019, 1909.08053): often and small, so it wants the fastest link there is. All workers see the same examples.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from weft.errors import ConfigError, Incompatible
from weft.patterns.layout import SEQUENCE, Layout
from weft.patterns.split import SplitPattern


@dataclass(frozen=True)
class Tensor(SplitPattern):
    name: ClassVar[str] = "tensor"
    summary: ClassVar[str] = (
        "tensor parallelism: same result as one process; for models whose layers are too large or too slow for one worker, on one host"
    )
    answers: ClassVar[dict[str, str]] = {
        "where do parameters live": "large matrices in parts, one on each worker; small ones on all",
        "who talks to whom": "all workers with all",
        "when": "inside the step: after each pair of matrices, forward and backward",
        "what travels": "activations and their gradients",
        "how combined": "sum",
    }

    degree: int | None = field(default=None, metadata={"doc": "workers that hold each tensor together; all of them"})
    sequence: bool = field(default=False, metadata=SEQUENCE)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.degree is not None:
            self._at_least_one("degree", "nothing is cut")

    @property
    def spreads(self) -> bool:
        return self.sequence

    def layout(self, workers: int) -> Layout:
        if self.degree not in (None, workers):
            raise ConfigError(
                f"degree={self.degree} leaves {workers - self.degree} of {workers} workers without a part: use --workers {self.degree}, or "
                f"--pattern mesh -o tensor={self.degree} with copies of the model (-o data=)."
                if self.degree < workers
                else f"degree={self.degree} needs as many workers, and there are {workers}: use --workers {self.degree}."
            )
        if self.sequence and workers == 1:
            raise Incompatible("sequence=true with one worker: nothing is in parts. Use --workers 2, or leave it out.")
        return Layout(tensor=workers)
