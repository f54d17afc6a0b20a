"""The plan: who runs what, what travels, what it takes. Printed before step 1, saved with the run, plain data."""

from __future__ import annotations

from typing import Any

import msgspec


class MemberPlan(msgspec.Struct, frozen=True, kw_only=True):
    role: str
    member: int
    device: str
    does: str  # one sentence
    examples_per_step: int
    memory: dict[str, int]  # predicted bytes by purpose: parameters, gradients, optimizer, activations, buffers


class LinkPlan(msgspec.Struct, frozen=True, kw_only=True):
    members: str  # "worker 0 -> worker 1", or "4 workers"
    carrier: str
    bytes_per_step: int  # sent by one member
    what: str  # "gradients (float32)"
    group: str = "world"  # whose link it is


class StepPlan(msgspec.Struct, frozen=True, kw_only=True):
    seconds: dict[str, float]  # predicted, by what they go into
    link: str  # "link 16 Gbit/s assumed"
    advice: str = ""  # where fewer workers would be quicker
    tried_s: float = 0.0  # what a step has taken in a trial before the run; 0: nobody tried

    @property
    def whole_s(self) -> float:
        """As predicted."""
        return sum(self.seconds.values())


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    task: str
    pattern: str
    tier: str
    #: the five questions: where do parameters live, who talks to whom, when, what travels, how combined
    answers: dict[str, str]
    cluster: str
    steps: int
    epochs: float | None  # None: a stream that does not tell its length
    batch: int
    num_parameters: int
    num_trainable: int
    train_examples: int | None
    test_examples: int
    dtype: str
    members: list[MemberPlan]
    links: list[LinkPlan]
    step: StepPlan | None = None  # of a pattern that predicts it
    checkpoints: str  # "every 100 steps, the last 3 are kept"
    choices: dict[str, str] = msgspec.field(default_factory=dict)  # what `auto` became, and why
    notes: list[str] = msgspec.field(default_factory=list)  # policies that apply to this model
    config: dict[str, Any] = msgspec.field(default_factory=dict)
