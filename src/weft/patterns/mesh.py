"""Splits composed: workers stand on the axes of a mesh, copies of the model on ``data``, parts of it on the others.

Each axis does what the pattern of its name does to what the axes outside it leave: ``data`` averages gradients once a step, ``sharded`` keeps
parts of every parameter (Zhao et al. 2023), ``tensor`` cuts matrices (Shoeybi et al. 2019). Equal to one process on the joined batch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from weft.codecs.spec import NONE
from weft.errors import Incompatible
from weft.patterns.base import Trials
from weft.patterns.copies import COMPRESS, check_codec
from weft.patterns.layout import AXES, SEQUENCE, Layout
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
class Mesh(SplitPattern):
    name: ClassVar[str] = "mesh"
    summary: ClassVar[str] = (
        "sharded and tensor parallelism and copies of the model, composed: same result as one process; for models too large for one of them"
    )
    answers: ClassVar[dict[str, str]] = {
        "where do parameters live": "in parts, over the axes tensor and sharded; on data, copies of them",
        "who talks to whom": "those that differ in their place on one axis",
        "when": "tensor: within blocks; sharded: at each block; data: once a step",
        "what travels": "activations (tensor), parameters and gradients (sharded), gradients (data)",
        "how combined": "mean weighted by examples",
    }

    data: int = field(default=1, metadata={"doc": "copies of the model"})
    tensor: int = field(default=1, metadata={"doc": "workers that hold each tensor together, side by side in a host"})
    pipeline: int = field(default=1, metadata={"doc": "workers in a row of stages"})
    sharded: int = field(default=1, metadata={"doc": "workers over which every parameter is spread"})
    reshard: bool = field(
        default=True,
        metadata={"doc": "with sharded: let a block go between forward and backward: less memory, more travels"},
    )
    sequence: bool = field(default=False, metadata=SEQUENCE)

    schedule: str = field(default="auto", metadata=SCHEDULE)
    microbatches: int = field(default=0, metadata=MICROBATCHES)
    stages_per_worker: int = field(default=0, metadata=PER_WORKER)
    chunks: int = field(default=1, metadata=CHUNKS)
    trial: Trials = field(default="auto", metadata=TRIAL)

    compress: str = field(default=NONE, metadata=COMPRESS)

    def __post_init__(self) -> None:
        super().__post_init__()
        for axis in AXES:
            self._at_least_one(axis, "nothing on this axis")
        check_codec(self.compress, "data", self.data)
        if self.sequence and self.tensor == 1:
            raise Incompatible(
                "sequence=true is of tensors that are cut, and tensor=1 cuts none: add -o tensor=2, or leave it out."
            )
        if self.pipeline > 1:
            check_pipelined(self.pipelined, self.accumulate)
        elif self.pipelined._replace(tensor=1) != Pipelined() or self.trial != "auto":
            raise Incompatible(
                "schedule, microbatches, stages_per_worker, chunks and trial are of a pipeline: add -o pipeline=2, or leave them out."
            )
        if self.pipeline > 1 and self.sharded > 1:
            raise Incompatible(
                f"pipeline={self.pipeline} with sharded={self.sharded}: a stage's blocks would be gathered anew for each micro-batch. Use data= beside "
                "pipeline=, or sharded= with tensor=."
            )

    @property
    def codec(self) -> str:
        return self.compress

    @property
    def tries(self) -> Trials:
        return self.trial

    @property
    def pipelined(self) -> Pipelined:
        return Pipelined(self.schedule, self.microbatches, self.stages_per_worker, self.chunks, self.tensor)

    def layout(self, workers: int) -> Layout:
        layout = Layout(self.data, self.pipeline, self.sharded, self.tensor)
        layout.check(workers)
        return layout

    @property
    def gathers_twice(self) -> bool:
        return self.reshard

    @property
    def spreads(self) -> bool:
        return self.sequence
