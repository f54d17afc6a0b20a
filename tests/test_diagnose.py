"""The sentence that names the bottleneck: a table of runs whose limit is plain, and cures that exist."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
import typer.main
from hypothesis import given
from hypothesis import strategies as st

from weft.cli import app
from weft.clusters import pick_cluster
from weft.diagnose import Setting, Spent, diagnose
from weft.options import describe
from weft.patterns.registry import PATTERNS

STEPS = 100
HERE = Setting(carrier="tcp", cores=4, batch=96, patterns=("allreduce", "localsgd"), can_balance=True)


def worker(compute: float = 0, data: float = 0, wait: float = 0, skew: float = 0, **more: Any) -> Spent:
    """In ms a step."""
    per_step: dict[str, Any] = {"exchange": 0.0, "messages": 0, "num_bytes": 0} | more
    return Spent(
        steps=STEPS,
        compute_s=compute * STEPS / 1e3,
        data_s=data * STEPS / 1e3,
        wait_s=wait * STEPS / 1e3,
        skew_s=skew * STEPS / 1e3,
        exchange_s=per_step["exchange"] * STEPS / 1e3,
        messages=per_step["messages"] * STEPS,
        bytes_sent=per_step["num_bytes"] * STEPS,
    )


EVEN = [worker(compute=20, exchange=1, messages=4)] * 4
SLOW = [worker(compute=10, wait=20, skew=20), worker(compute=10, wait=20, skew=20), worker(compute=30)]
LOADER = [worker(compute=10, data=0.1, wait=30, skew=30), worker(compute=10, data=30.1)]
FAR = [worker(compute=5, wait=21, exchange=0.5, messages=4)] * 3
THIN = [worker(compute=5, wait=1, exchange=40, messages=4, num_bytes=4_000_000)] * 2

CASES: dict[str, tuple[list[Spent], Setting, str, str]] = {
    "one worker": ([worker(compute=20)], HERE, "compute", r"100 % of the time.*3 of 4 cores are idle: more --workers"),
    "all cores taken": (EVEN, HERE, "compute", r"more workers won't help here: all 4 cores are taken by 4 workers"),
    "threads take cores": (EVEN[:2], replace(HERE, threads=2), "compute", "all 4 cores are taken by 2 workers"),
    "loading": ([worker(compute=10, data=30)] * 2, HERE, "loading", r"75 % of the time, 30 ms a step.*keep tensors"),
    "slow worker": (
        SLOW,
        HERE,
        "waiting",
        r"for worker 2: it computes 30 ms a step, the others 10 ms.*44 %.*--balance auto",
    ),
    "slow worker, balanced": (
        SLOW,
        replace(HERE, balance="auto"),
        "waiting",
        r"has already done what it can: worker 2 may",
    ),
    "slow worker, own shards": (SLOW, replace(HERE, can_balance=False), "waiting", r"free worker 2's machine"),
    "slow worker, by its sums alone": (
        [worker(compute=10, wait=20), worker(compute=10, wait=20), worker(compute=30)],
        HERE,
        "waiting",
        r"for worker 2",
    ),
    "slow loader": (
        LOADER,
        HERE,
        "loading",
        r"worker 1 takes 30.1 ms a step to load.*others 0.1 ms.*or --balance auto",
    ),
    "each a little late in turn": (
        [worker(compute=10, wait=6, skew=6)] * 3,
        HERE,
        "waiting",
        r"now this one, now that; --pattern",
    ),
    "latency": (
        FAR,
        HERE,
        "latency",
        r"8\d % of the time, 21.5 ms a step over tcp.*larger --batch, or --pattern localsgd -o every=20",
    ),
    "more workers than cores": (
        FAR,
        replace(HERE, carrier="shm", cores=len(FAR) - 1),
        "waiting",
        rf"for a core: {len(FAR)} workers of 1 thread share {len(FAR) - 1} cores.*at most --workers {len(FAR) - 1} here",
    ),
    "cores used by others": (FAR, replace(HERE, carrier="shm", cores=9), "waiting", r"other programs use the 9 cores"),
    "small messages": (
        [worker(compute=2, exchange=1.6, wait=0.1, messages=8)] * 2,
        HERE,
        "latency",
        r"1.7 ms a step",
    ),
    "latency, no other pattern": (FAR, replace(HERE, patterns=("allreduce",)), "latency", r"larger --batch$"),
    "bandwidth": (
        THIN,
        HERE,
        "bandwidth",
        r"moving 4 MB a step takes 8\d % of the time, at 102 MB/s over tcp.*larger --batch",
    ),
    "bandwidth in localsgd": (
        THIN,
        replace(HERE, pattern="localsgd"),
        "bandwidth",
        r"a larger --batch, or a larger -o every$",
    ),
    "latency and a slow worker": (
        [worker(compute=10, wait=50, skew=5), worker(compute=15, wait=45)],
        HERE,
        "latency",
        r"45 ms a step",
    ),
    "saving": (
        [worker(compute=10), worker(compute=10, wait=20)],
        replace(HERE, saving_s=0.02 * STEPS),
        "saving",
        r"67 % of the time while worker 0 writes.*--save-every",
    ),
    "threads": (
        [worker(compute=10, wait=20, skew=1)] * 3,
        replace(HERE, carrier="inproc"),
        "waiting",
        r"one at a time, 67 %.*--cluster local",
    ),
    "nothing dominates": (
        [worker(compute=10, data=3, wait=3.5, exchange=4, num_bytes=1, messages=1)] * 2,
        HERE,
        "nothing",
        r"compute 49 %, bandwidth 19 %, latency 18 %, loading 15 %",
    ),
    "too short": ([Spent()], HERE, "nothing", "too few steps"),
    "nobody": ([], HERE, "nothing", "too few steps"),
    "no time": ([worker()], HERE, "nothing", "no time was measured"),
}


@pytest.mark.parametrize("name", CASES)
def test_the_limit_is_named(name: str) -> None:
    workers, setting, kind, text = CASES[name]
    found = diagnose(workers, setting)
    assert found.kind == kind
    assert found.text.startswith(kind)
    assert re.search(text, found.text), found.text
    assert "\n" not in found.text


TIMES = st.floats(0, 1e3)


@given(
    st.lists(
        st.builds(
            Spent,
            steps=st.integers(0, 1000),
            compute_s=TIMES,
            data_s=TIMES,
            exchange_s=TIMES,
            wait_s=TIMES,
            skew_s=TIMES,
            bytes_sent=st.integers(0, 10**12),
            messages=st.integers(0, 10**6),
        ),
        max_size=5,
    ),
    st.sampled_from(["shm", "tcp", "gloo", "inproc", "none"]),
    st.booleans(),
    TIMES,
)
def test_any_numbers_give_a_sentence(workers: list[Spent], carrier: str, balanced: bool, saving_s: float) -> None:
    setting = replace(HERE, carrier=carrier, balance="auto" if balanced else "none", saving_s=saving_s)
    found = diagnose(workers, setting)
    assert found.text.startswith(found.kind)
    assert "nan" not in found.text


@pytest.mark.parametrize("name", CASES)
def test_the_cure_is_an_option_that_exists(name: str) -> None:
    workers, setting, _, _ = CASES[name]
    text = diagnose(workers, setting).text
    known = {o for p in typer.main.get_command(app).commands["run"].params for o in p.opts}  # type: ignore[attr-defined]
    assert set(re.findall(r"--[a-z-]+", text)) <= known
    for value in re.findall(r"--balance (\w+)", text):
        assert value == "auto"
    for value in re.findall(r"--cluster (\w+)", text):
        pick_cluster(value)
    before, *others = text.split("--pattern ")  # an option belongs to the pattern that was named last
    for pattern, clause in [(setting.pattern, before), *((c.split()[0], c) for c in others)]:
        if pattern in PATTERNS:  # a cure names only patterns of ``setting.patterns``, which are those that exist
            options = {option.name for option in describe(PATTERNS[pattern])}
            assert set(re.findall(r"-o (\w+)=", clause)) <= options
