"""Fully sharded data parallelism: a model too large for one worker, each of which holds a part of every parameter.

Equal to one process on the joined batch, as AllReduce is; a worker's memory for parameters, gradients and optimizer falls with the
number of workers, and what travels grows by half (Rajbhandari et al. 2020, ZeRO stage 3). With ``replicas`` the parts lie on groups
of workers, each of which holds the whole model, so that gathering stays inside a group (HSDP; Zhao et al. 2023, 2304.11277).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from weft.codecs.spec import NONE
from weft.errors import ConfigError
from weft.patterns.copies import COMPRESS, check_codec
from weft.patterns.layout import Layout
from weft.patterns.split import SplitPattern


@dataclass(frozen=True)
class Sharded(SplitPattern):
    name: ClassVar[str] = "sharded"
    summary: ClassVar[str] = (
        "fully sharded data parallelism (FSDP): same result as one process; for models whose parameters, gradients and optimizer do not "
        "fit into one worker"
    )
    answers: ClassVar[dict[str, str]] = {
        "where do parameters live": "in parts, one on each worker; a block's are gathered as its turn comes",
        "who talks to whom": "all workers of a copy of the model with all; with replicas, holders of the same part with each other",
        "when": "inside the step: before each block, forward and backward, and after each block's backward",
        "what travels": "parameters, gradients",
        "how combined": "mean weighted by examples, added up where the part lives",
    }

    replicas: int = field(default=1, metadata={"doc": "copies of the model, each held by workers / replicas (HSDP)"})
    reshard: bool = field(
        default=True, metadata={"doc": "let a block go between forward and backward: less memory, more travels"}
    )

    compress: str = field(default=NONE, metadata=COMPRESS)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._at_least_one("replicas", "one copy of the model")
        check_codec(self.compress, "replicas", self.replicas)

    def layout(self, workers: int) -> Layout:
        if workers % self.replicas:
            fit = [n for n in range(1, workers + 1) if workers % n == 0]
            raise ConfigError(
                f"replicas={self.replicas} does not divide {workers} workers: give one of {', '.join(map(str, fit))}."
            )
        return Layout(data=self.replicas, sharded=workers // self.replicas)

    @property
    def codec(self) -> str:
        return self.compress

    @property
    def gathers_twice(self) -> bool:
        return self.reshard
