"""What limits a run, in one sentence, and what would help. Pure: seconds and bytes in, a sentence out.

A step that ends in an exchange takes all workers equally long, and this time is split without remainder: own compute and
loading; waiting for workers that compute longer (each tells its seconds in the exchange); messages under way (the rest of
the wait for a message's head, and what a message costs whatever its size); and moving what the messages hold. So the
exchanges themselves tell latency from bandwidth, all along the run, and no probe disturbs it.
"""

from __future__ import annotations

import statistics
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import NamedTuple

LOSS = 0.2  # a loss below this part of the time is not worth a cure
COMPUTE = 0.6  # of the time: less, and no one thing limits the run
APART = 1.2  # times the others' median: a worker that stands out
PER_MESSAGE_S = 200e-6  # of a message whatever its size: system calls, headers, Python


@dataclass
class Spent:
    """Sums of one worker over its steps. ``wait_s``: in exchanges, until the others' messages came; ``skew_s``: of this,
    until the slowest worker had computed; ``exchange_s``: the rest of the exchanges."""

    steps: int = 0
    compute_s: float = 0.0
    data_s: float = 0.0
    exchange_s: float = 0.0
    wait_s: float = 0.0
    skew_s: float = 0.0
    bytes_sent: int = 0
    messages: int = 0


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What is known of the run, so that the cure is one that exists for it."""

    carrier: str
    cores: int  # of the machine that all workers share
    threads: int = 1
    batch: int = 0
    pattern: str = "allreduce"
    patterns: Collection[str] = ()  # that could be used instead
    balance: str = "none"
    can_balance: bool = False  # the pattern does, and the partition leaves the choice
    saving_s: float = 0.0  # worker 0 wrote checkpoints while the others waited


class Diagnosis(NamedTuple):
    kind: str  # compute, loading, waiting, latency, bandwidth, saving, nothing
    text: str


class _Worker(NamedTuple):
    """Mean seconds of a step."""

    compute: float
    loading: float
    waiting: float  # for slower workers
    saving: float
    latency: float
    bandwidth: float

    @property
    def own(self) -> float:
        return self.compute + self.loading


def diagnose(workers: Sequence[Spent], setting: Setting) -> Diagnosis:
    """``workers``: by rank. The kind is that of the largest loss if it is worth a cure; else compute, if that is the most."""
    if not workers or any(w.steps == 0 for w in workers):
        return Diagnosis("nothing", "nothing to say: too few steps were measured")
    split = _split(workers, setting)
    whole = sum(map(sum, split))
    if whole <= 0:
        return Diagnosis("nothing", "nothing to say: no time was measured")
    shares = {name: sum(getattr(w, name) for w in split) / whole for name in _Worker._fields}
    lost = max((name for name in shares if name != "compute"), key=lambda name: shares[name])
    if shares[lost] >= LOSS:
        if setting.carrier == "inproc" and lost != "loading":
            return _threads(shares)
        return _SAY[lost](split, workers, setting, shares[lost])
    if shares["compute"] >= COMPUTE:
        return _compute(len(workers), setting, shares["compute"])
    parts = sorted(shares.items(), key=lambda item: -item[1])
    named = ", ".join(f"{name} {_percent(share)}" for name, share in parts if share >= 0.05)
    return Diagnosis("nothing", f"nothing dominates: {named} of the time; no single change would help much")


def _split(workers: Sequence[Spent], setting: Setting) -> list[_Worker]:
    own = [(w.compute_s + w.data_s) / w.steps for w in workers]
    result = []
    for rank, (w, own_s) in enumerate(zip(workers, own, strict=True)):
        wait_s = w.wait_s / w.steps
        # Patterns that do not exchange at each step do not tell the skew of each: then it is that of the sums.
        skew_s = min(max(w.skew_s / w.steps, max(own) - own_s), wait_s) if len(workers) > 1 else 0.0
        saving_s = min(setting.saving_s / w.steps, wait_s - skew_s) if rank else setting.saving_s / w.steps
        under_way_s = wait_s - skew_s - (saving_s if rank else 0.0)
        busy_s = w.exchange_s / w.steps
        per_message_s = min(busy_s, PER_MESSAGE_S * w.messages / w.steps)
        result.append(
            _Worker(
                w.compute_s / w.steps,
                w.data_s / w.steps,
                skew_s,
                saving_s,
                under_way_s + per_message_s,
                busy_s - per_message_s,
            )
        )
    return result


# -- one sentence for each


def _waiting(split: Sequence[_Worker], workers: Sequence[Spent], setting: Setting, share: float) -> Diagnosis:
    who = max(range(len(split)), key=lambda r: split[r].own)
    others = [w for r, w in enumerate(split) if r != who]
    slow, usual = split[who], statistics.median(w.own for w in others)
    if slow.own < APART * usual:
        return Diagnosis(
            "waiting",
            f"waiting: workers wait {_percent(share)} of the time for whoever is slowest, now this one, now that; "
            + (_fewer_exchanges(setting) or "give each worker a core of its own"),
        )
    if slow.loading - statistics.median(w.loading for w in others) > 0.5 * (slow.own - usual):
        return _slow_loader(split, who, setting)
    cure = _smaller_share(setting, who, "") or f"free worker {who}'s machine of other work, or leave it out"
    return Diagnosis(
        "waiting",
        f"waiting for worker {who}: it computes {_ms(slow.own)} a step, the others {_ms(usual)} and wait for it, "
        f"{_percent(share)} of all time; {cure}",
    )


def _slow_loader(split: Sequence[_Worker], who: int, setting: Setting) -> Diagnosis:
    usual = statistics.median(w.loading for r, w in enumerate(split) if r != who)
    return Diagnosis(
        "loading",
        f"loading: worker {who} takes {_ms(split[who].loading)} a step to load its examples, the others {_ms(usual)} and wait for "
        f"it; look at where it reads from{_smaller_share(setting, who, ', or ')}",
    )


def _loading(split: Sequence[_Worker], workers: Sequence[Spent], setting: Setting, share: float) -> Diagnosis:
    who = max(range(len(split)), key=lambda r: split[r].loading)
    others = [w.loading for r, w in enumerate(split) if r != who]
    if others and split[who].loading >= 2 * statistics.median(others):
        return _slow_loader(split, who, setting)
    each = statistics.mean(w.loading for w in split)
    return Diagnosis(
        "loading",
        f"loading: fetching examples takes {_percent(share)} of the time, {_ms(each)} a step; make them cheaper to fetch: "
        "decode once in data() and keep tensors (a TensorDataset is quickest)",
    )


def _latency(split: Sequence[_Worker], workers: Sequence[Spent], setting: Setting, share: float) -> Diagnosis:
    if setting.carrier == "shm":
        return _cores(len(workers), setting, share)
    each = statistics.mean(w.latency for w in split)
    return Diagnosis(
        "latency",
        f"latency: messages are on their way {_percent(share)} of the time, {_ms(each)} a step over {setting.carrier} whatever "
        f"their size; make fewer exchanges: a larger --batch{_or(_fewer_exchanges(setting))}",
    )


def _cores(num_workers: int, setting: Setting, share: float) -> Diagnosis:
    """A line of shared memory is seen within a microsecond by whoever has a core: what looks like latency is the want of one."""
    waited = f"in exchanges workers wait {_percent(share)} of the time for one whose turn it is not"
    if num_workers * setting.threads > setting.cores:
        threads = f"{setting.threads} thread{'s' * (setting.threads > 1)}"
        return Diagnosis(
            "waiting",
            f"waiting for a core: {num_workers} workers of {threads} share {setting.cores} cores, and {waited}; at most --workers "
            f"{max(1, setting.cores // setting.threads)} here",
        )
    return Diagnosis(
        "waiting",
        f"waiting for a core: other programs use the {setting.cores} cores, too, and {waited}; stop those, or use fewer --workers",
    )


def _bandwidth(split: Sequence[_Worker], workers: Sequence[Spent], setting: Setting, share: float) -> Diagnosis:
    seconds = sum(w.bandwidth for w in split)
    num_bytes = sum(w.bytes_sent / w.steps for w in workers)
    return Diagnosis(
        "bandwidth",
        f"bandwidth: moving {_megabytes(num_bytes / len(workers))} a step takes {_percent(share)} of the time, at "
        f"{_megabytes(num_bytes / seconds)}/s over {setting.carrier}; move less for each example: a larger --batch"
        f"{' (and -o accumulate=2 if memory is short)' if setting.pattern == 'allreduce' else ''}{_or(_fewer_exchanges(setting))}",
    )


def _saving(split: Sequence[_Worker], workers: Sequence[Spent], setting: Setting, share: float) -> Diagnosis:
    return Diagnosis(
        "saving",
        f"saving: all wait {_percent(share)} of the time while worker 0 writes checkpoints; a larger --save-every",
    )


_SAY = {"waiting": _waiting, "loading": _loading, "latency": _latency, "bandwidth": _bandwidth, "saving": _saving}


def _threads(shares: dict[str, float]) -> Diagnosis:
    return Diagnosis(
        "waiting",
        f"waiting: threads of one process compute one at a time, {_percent(1 - shares['compute'])} of their time is spent "
        "beside computing; --cluster local lets workers compute side by side",
    )


def _compute(num_workers: int, setting: Setting, share: float) -> Diagnosis:
    idle = setting.cores - num_workers * setting.threads
    if idle >= setting.threads:
        cure = f"{idle} of {setting.cores} cores are idle: more --workers, or more --threads for each"
    else:
        cure = (
            f"more workers won't help here: all {setting.cores} cores are taken by {num_workers} worker"
            f"{'s' if num_workers > 1 else ''}; a quicker machine would, or a GPU"
        )
    return Diagnosis("compute", f"compute: {_percent(share)} of the time is the task's own work; {cure}")


def _smaller_share(setting: Setting, who: int, before: str) -> str:
    if setting.balance == "auto":
        return (
            f"{before}--balance auto has already done what it can: worker {who} may be too slow to be worth waiting for"
        )
    return f"{before}--balance auto gives it a smaller share of each batch" if setting.can_balance else ""


def _fewer_exchanges(setting: Setting) -> str:
    if setting.pattern == "localsgd":
        return "a larger -o every"
    return "--pattern localsgd -o every=20" if "localsgd" in setting.patterns else ""


def _or(cure: str) -> str:
    return f", or {cure}" if cure else ""


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.3g} ms"


def _megabytes(num_bytes: float) -> str:
    return f"{num_bytes / 1e6:.3g} MB"
