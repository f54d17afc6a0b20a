"""Pipeline parallelism: a model cut between its blocks into stages, one or some on each worker, through which micro-batches flow.

Activations go on, gradients come back, between neighbours only: of all ways to split a model the one that sends least (Huang et al. 2019, 1811.06965;
Narayanan et al. 2021, 2104.04473). All workers of a pipeline draw the same examples. Equal to one process on the joined batch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from weft.errors import ConfigError
from weft.patterns.base import Trials
from weft.patterns.layout import Layout
from weft.patterns.pipelined import (
    CHUNKS,
    MICROBATCHES,
    PER_WORKER,
    SCHEDULE,
    TRIAL,
    Pipelined,
    check_pipelined,
)
from weft.patterns.split import SplitPattern


@dataclass(frozen=True)
class Pipeline(SplitPattern):
    name: ClassVar[str] = "pipeline"
    summary: ClassVar[str] = (
        "pipeline parallelism: same result as one process; for models too large for one worker, over links that are slow"
    )
    answers: ClassVar[dict[str, str]] = {
        "where do parameters live": "each on the worker whose stage uses it",
        "who talks to whom": "neighbours in the row of stages",
        "when": "inside the step: after each stage of each micro-batch, forward and backward",
        "what travels": "activations and their gradients",
        "how combined": "nothing to combine: gradients of micro-batches add up where the parameter lives",
    }

    stages: int | None = field(default=None, metadata={"doc": "workers in the row; all of them"})
    schedule: str = field(default="auto", metadata=SCHEDULE)
    microbatches: int = field(default=0, metadata=MICROBATCHES)
    stages_per_worker: int = field(default=0, metadata=PER_WORKER)
    chunks: int = field(default=1, metadata=CHUNKS)
    trial: Trials = field(default="auto", metadata=TRIAL)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.stages is not None:
            self._at_least_one("stages", "nothing is cut")
        check_pipelined(self.pipelined, self.accumulate)

    @property
    def tries(self) -> Trials:
        return self.trial

    @property
    def pipelined(self) -> Pipelined:
        return Pipelined(self.schedule, self.microbatches, self.stages_per_worker, self.chunks)

    def layout(self, workers: int) -> Layout:
        if self.stages not in (None, workers):
            raise ConfigError(
                f"stages={self.stages} takes as many workers, and there are {workers}: use --workers {self.stages}, -o stages_per_worker= for "
                f"several stages on each, or --pattern mesh -o pipeline={self.stages} with copies of the model (-o data=)."
            )
        return Layout(pipeline=workers)
