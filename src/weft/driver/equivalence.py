"""`--check-equivalence`: before a run begins, are the first steps of its layout those of one process?

Throw-away members, joined as the run's will be, take them, and rank 0 leaves the joined gradient of each, whole, in the run's folder.
Then one process takes the same joined batches in a plain loop and compares (``weft.equivalence``). Nothing of this is left afterwards.
"""

from __future__ import annotations

import dataclasses
import math
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from weft.clusters.base import Session
from weft.config import EQUIVALENCE, Config, RunFolder
from weft.driver.calls import call, call_all
from weft.errors import ConfigError, Incompatible, MemberFailed, NotEquivalent, RunFolderError
from weft.patterns.base import Facts, Pattern
from weft.report.human import format_bytes
from weft.report.observers import Observer

if TYPE_CHECKING:
    from weft.driver.prepare import Prepared

TOLERANCES = {"float64": 1e-9, "float32": 1e-5}
BF16 = 2.0**-8  # the largest relative error of rounding to bfloat16


class Loop(msgspec.Struct, frozen=True):
    """What the options of a pattern change in the arithmetic of a step."""

    accumulate: int
    autocast: bool
    clip_norm: float | None


class Order(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the members of both sides are told."""

    config: Config
    facts: Facts
    total_steps: int
    steps: int  # to be compared
    loop: Loop
    tolerance: float
    folder: str


class StepFound(msgspec.Struct, frozen=True, kw_only=True):
    """One step: ``difference`` and ``worst`` are relative to the norm of one process's whole gradient, ``own`` to that of its gradient of
    the parameter that differs most."""

    step: int
    difference: float
    loss: float
    loss_difference: float
    name: str
    shape: tuple[int, ...]
    worst: float
    own: float


class Equivalence(msgspec.Struct, frozen=True, kw_only=True):
    """Up to the first step that differs by more than ``tolerance``.

    ``by_shares``: the task draws random numbers, so one process computed each worker's share with that worker's numbers.
    ``agrees_by_shares``: of a difference, whether it goes away if one process computes so.
    """

    tolerance: float
    by_shares: bool
    steps: list[StepFound]
    agrees_by_shares: bool = False

    @property
    def worst(self) -> StepFound:
        return max(self.steps, key=lambda s: s.difference if math.isfinite(s.difference) else math.inf)

    @property
    def holds(self) -> bool:
        return self.worst.difference <= self.tolerance

    @property
    def text(self) -> str:
        count = f"{len(self.steps)} step{'s' * (len(self.steps) > 1)}"
        how = ", each worker's share with its own random numbers" if self.by_shares else ""
        return f"equal to one process within {at_most(self.worst.difference)} over {count}{how}"

    @property
    def values(self) -> dict[str, Any]:
        """Of the event."""
        return {"text": self.text, "detail": in_detail(self), **msgspec.to_builtins(self)}


def loop_of(pattern: Pattern, microbatches: int = 1) -> Loop:
    """``microbatches``: of a pipeline, into which it cuts a share."""
    inner = getattr(pattern, "within", pattern)
    return Loop(
        max(getattr(inner, "accumulate", 1), microbatches),
        getattr(inner, "autocast", "none") == "bf16",
        getattr(inner, "clip_norm", None),
    )


def microbatches_of(facts: Facts) -> int:
    return facts.pipeline.microbatches if facts.pipeline else 1


def tolerance_of(config: Config, loop: Loop) -> float:
    """Of the difference of two gradients, relative to the norm of one process's.

    Sums in another order: some ulps, far below the tolerances of float64 and float32. Under autocast the gradient g_i of each of n pieces
    of the joined batch is rounded to bfloat16, by u |g_i| at most, where one process rounds their sum g, by u |g|: together
    u (sum |g_i| + |g|). Pieces of a batch agree or are independent, so sum |g_i| <= sqrt(n) |g|, and the bound is u (1 + sqrt(n)).
    """
    if config.tolerance is not None:
        return config.tolerance
    if loop.autocast:
        return BF16 * (1 + math.sqrt(config.workers * loop.accumulate))
    return TOLERANCES[config.dtype]


def announce(config: Config, facts: Facts, pattern: Pattern, total_steps: int) -> dict[str, str]:
    """A line for the plan; refuses what cannot be compared."""
    steps = config.check_equivalence
    if not steps:
        return {}
    if steps > total_steps:
        raise ConfigError(
            f"check_equivalence={steps} is more than the {total_steps} steps of the run: give at most {total_steps}."
        )
    if why := pattern.differs(facts, steps):
        raise Incompatible(f"check_equivalence={steps} is not possible: {why}.")
    tolerance = tolerance_of(config, loop_of(pattern, microbatches_of(facts)))
    return {
        "equivalence": f"first {steps} steps are compared with one process's, to {tolerance:.2g} of the gradient's norm"
    }


def check(prepared: Prepared, folder: RunFolder, session: Session, observer: Observer) -> Equivalence:
    """Raises NotEquivalent, MemberFailed, TaskError. Where a member fails, what it did before is compared: a gradient that is wrong may
    be why."""
    facts = prepared.facts
    config = msgspec.structs.replace(prepared.config, faults=[], balance="none", trace=False)
    loop = loop_of(prepared.pattern, microbatches_of(facts))
    place = folder.path / EQUIVALENCE
    order = Order(
        config=config,
        facts=facts,
        total_steps=prepared.total_steps,
        steps=config.check_equivalence,
        loop=loop,
        tolerance=tolerance_of(config, loop),
        folder=str(place),
    )
    lost: MemberFailed | None = None
    try:
        make_room(place, order.steps * sum(p.nbytes for p in facts.params if p.trainable))
        links = [dataclasses.replace(link, port=0) for link in prepared.links]
        try:
            call_all(
                session,
                observer,
                "weft.equivalence:take_steps",
                msgspec.to_builtins(order),
                links,
                on_message=lambda _: None,
                doing="in the steps that are compared with one process's",
                silence_s=math.inf,  # a model may be slow; the user sees it, and can interrupt
            )
        except MemberFailed as error:
            lost, kept = error, len(list(place.glob("*.json")))
            if not kept:
                raise
            order = msgspec.structs.replace(order, steps=kept)
        reply = call(
            session,
            observer,
            "weft.equivalence:compare",
            msgspec.to_builtins(order),
            doing="in one process, on the joined batch of all workers",
            who="comparing",
        )
    except BaseException:
        session.kill()  # nobody writes there any more
        raise
    finally:
        shutil.rmtree(place, ignore_errors=True)
    found = msgspec.convert(reply["found"], Equivalence, strict=False)
    if not found.holds:
        raise NotEquivalent(refusal(found, facts, loop), parameter=found.worst.name) from lost
    if lost is not None:
        raise lost
    return found


def make_room(place: Path, nbytes: int) -> None:
    """For the gradients of all steps, until each is compared."""
    try:
        shutil.rmtree(place, ignore_errors=True)  # of a check that was killed
        place.mkdir()
        free = shutil.disk_usage(place).free
    except OSError as error:
        raise RunFolderError(f"cannot write {str(place)!r}: {error.strerror}. Choose a writable --run-dir.") from error
    if free < nbytes:
        raise RunFolderError(
            f"{str(place)!r} must hold {format_bytes(nbytes)} of gradients until they are compared, and {format_bytes(free)} are free: "
            "compare fewer steps (--check-equivalence=1), or choose another --run-dir."
        )


# -- in words


def at_most(value: float) -> str:
    """Two digits, rounded up: a bound stays one."""
    if not value or not math.isfinite(value):
        return f"{value:g}"
    unit = 10.0 ** (math.floor(math.log10(value)) - 1)
    return f"{math.ceil(value / unit - 1e-9) * unit:.2g}"


def in_detail(found: Equivalence) -> str:
    """Of the worst step."""
    step = found.worst
    shape = "x".join(map(str, step.shape)) or "scalar"
    own = f"{at_most(step.own)} of its own" if math.isfinite(step.own) else "where one process has none"
    return (
        f"step {step.step}: {at_most(step.difference)} of the gradient's norm; most in {step.name} ({shape}), {at_most(step.worst)} ({own}); "
        f"loss {step.loss:.6g}, off by {at_most(step.loss_difference)}"
    )


def refusal(found: Equivalence, facts: Facts, loop: Loop) -> str:
    return (
        f"not equal to one process: more than {found.tolerance:.2g} apart at {in_detail(found)}. {cause(found, facts, loop)} "
        "Nothing was trained. To train all the same, leave --check-equivalence out; to allow more, give --tolerance."
    )


def cause(found: Equivalence, facts: Facts, loop: Loop) -> str:
    """As far as it can be known: the difference that goes away when one process takes the batch share by share is the task's."""
    worst = found.worst
    if not math.isfinite(worst.difference):
        return "A gradient is no number: lower the learning rate, or look at the loss."
    running = [b.name for b in facts.running]
    rounding = " Under autocast=bf16 rounding alone makes some thousandths." if loop.autocast else ""
    if found.agrees_by_shares and running:
        piece = "micro-batch" if facts.pipeline else "worker's share"
        return (
            f"One process that takes the batch share by share gets what the workers get, and the model has running buffers ({running[0]}): "
            f"BatchNorm normalises each {piece} by itself. Use a norm of single examples (GroupNorm, LayerNorm)."
        )
    if found.by_shares and facts.pipeline:
        return (
            "The task draws random numbers (dropout), and each stage of a pipeline draws its own for each micro-batch, which no single process can "
            "take up: compare it without them."
        )
    if found.agrees_by_shares:
        return (
            "One process that takes the batch share by share gets what the workers get, so the loss of a batch is not the mean over its "
            "examples, weighted as num_examples counts them: return a mean, not a sum; what looks at the batch as a whole (a contrastive "
            f"loss, a norm over the batch) depends on the shares.{rounding}"
        )
    if len(found.steps) > 1 and not facts.elementwise and not facts.pipeline and (facts.tensor or facts.blocks):
        return (
            f"Step 1 was equal, so the gradients are: what differs is how {facts.optimizer} steps parts of parameters (it looks at each as a whole: a norm, a "
            f"matrix in low precision). Use an optimizer that treats each number by itself, or --pattern allreduce.{rounding}"
        )
    shares = "also if one process takes each worker's share with that worker's random numbers"
    return (
        f"So it is {shares}: the task may use random numbers or data that torch's, numpy's and Python's seeds do not govern; "
        f"if not, the layout adds up something else, and that is a fault of Weft's: please report it.{rounding}"
    )
