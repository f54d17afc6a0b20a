"""What watching a run costs its steps: --trace, and the exporters, against the same run without them.

    python bench/reporting.py [--quick] [--rounds N] [--save]

Two measurements, because one alone misleads. What recording costs is measured by itself: the spans of a step, flushing
included, and a sample of use (one a second, in every run), over the step of the plain runs: precise, but blind to what it
does to caches and to the launcher's share of the cores. Whole runs, plain, traced and exported in turns, another one first in
each round, see that too; a run's step time is the lower quartile over worker 0's ticks (0.2 s each) after the warm-up. Their
ratio is given only where the plain runs agree among themselves to within AGREE; else it is null: on a busy machine it would
say anything.

Last line: one JSON object. trace_overhead: the worst case of the first measurement. traced_* and exported_*: the second.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

from harness import Sample, machine, run, save

from weft.events import read_events
from weft.spans import Spans, local_clock
from weft.usage import Usage

WEFT = (sys.executable, "-c", "from weft.cli import main; main()")  # as the console script does
ARMS = {"plain": [], "traced": ["--trace"], "exported": ["--tensorboard", "--metrics-port", "0"]}
AGREE = 0.05
SPANS_PER_STEP = 6  # data, forward, backward, wait, all_reduce, optimizer
#: name: (task and its options, joined batch, warm-up and timed steps of a full and of a quick bench)
CASES = {
    "digits": (["digits"], 64, (200, 50), (2500, 400)),
    "codelm_tiny": (["codelm", "-t", "size=tiny", "-t", "test_windows=2"], 16, (20, 5), (120, 20)),
}
WORKERS = 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one short round: shows that it works")
    parser.add_argument("--rounds", type=int, help="repeats of everything (default 7; 1 with --quick)")
    parser.add_argument("--save", action="store_true", help="write bench/results/DATE-reporting-MACHINE.json and .md")
    args = parser.parse_args()
    rounds = args.rounds or (1 if args.quick else 7)
    where = machine()
    lines: list[str] = []
    figures: dict[str, Any] = {}
    samples: dict[str, dict[str, list[float]]] = {}

    def say(line: str) -> None:
        print(line, flush=True)
        lines.append(line)

    say(f"{where['cpu']}, {where['cores']} cores, torch {where['torch']}, {rounds} rounds; median [least..greatest]")
    for name, (task, batch, warmup, steps) in CASES.items():
        found = samples[name] = measure(task, batch, warmup[args.quick], steps[args.quick], rounds)
        plain = Sample(found["plain"])
        say(f"{name}: plain {plain.text(1e3, ' ms')} a step")
        for arm in ("traced", "exported"):
            theirs = Sample(found[arm])
            overhead = Sample([a / b - 1 for a, b in zip(theirs.values, plain.values)])
            quiet = max(plain.values) <= (1 + AGREE) * min(plain.values)
            verdict = overhead.text(100, " %") if quiet else "the plain runs disagree: nothing can be said"
            say(f"    {arm} {theirs.text(1e3, ' ms')}: {verdict}")
            figures[f"{arm}_{name}"] = round(overhead.median, 4) if quiet else None
    figures["span_us"] = spans_us()
    say(f"spans: those of a step take {figures['span_us']:.2f} us, flushing included")
    figures["usage_sample"] = usage_share()
    say(f"usage: a sample takes {figures['usage_sample'] * 1e6:.0f} us of each second")
    costs = []
    for name in CASES:
        plain_s = min(samples[name]["plain"])
        costs.append(figures["span_us"] / 1e6 / plain_s + figures["usage_sample"])
        say(f"{name}: recording takes {100 * costs[-1]:.2f} % of a step of {plain_s * 1e3:.2f} ms")
    figures["trace_overhead"] = round(max(costs), 5)
    if args.save:
        command = " ".join(["python", *sys.argv])
        for path in save("reporting", where, lines, {"ratios": figures, "samples": samples}, command):
            print(f"wrote {path}")
    print(json.dumps(figures))


def measure(task: list[str], batch: int, warmup: int, steps: int, rounds: int) -> dict[str, list[float]]:
    """Seconds a step, by arm and round."""
    found: dict[str, list[float]] = {arm: [] for arm in ARMS}
    names = list(ARMS)
    for number in range(rounds):
        first = number % len(names)
        for arm in names[first:] + names[:first]:
            found[arm].append(step_s(task, batch, warmup, steps, arm))
    return found


def step_s(task: list[str], batch: int, warmup: int, steps: int, arm: str) -> float:
    size = ["--workers", str(WORKERS), "--batch", str(batch), "--steps", str(warmup + steps), "--save-every", "0"]
    with tempfile.TemporaryDirectory(prefix="weft-bench-") as folder:
        run_dir = Path(folder) / "run"
        run([*WEFT, "run", *task, *size, *ARMS[arm], "--run-dir", str(run_dir), "--json"])
        assert bool(list(run_dir.glob("trace.json*"))) == (arm == "traced")
        assert bool(list(run_dir.glob("tensorboard/*"))) == (arm == "exported")
        ticks = [e for e in read_events(run_dir / "events.jsonl") if e.kind == "ticks" and e.member == 0]
    pairs = [(a, b) for a, b in pairwise(ticks) if a.values["last"] >= warmup]
    each = sorted((b.time - a.time) / (b.values["last"] - a.values["last"]) for a, b in pairs)
    return each[len(each) // 4]


def spans_us(steps: int = 20_000) -> float:
    """Microseconds of recording a step's spans, to the disk."""
    with tempfile.TemporaryDirectory(prefix="weft-bench-") as folder:
        spans = Spans(Path(folder) / "spans", "worker", 0, local_clock())
        begun = time.perf_counter()
        for _ in range(steps * SPANS_PER_STEP):
            spans.add("forward", time.perf_counter(), time.perf_counter())
        spent = time.perf_counter() - begun
        spans.close()
    return round(spent / steps * 1e6, 3)


def usage_share(repeats: int = 2000) -> float:
    """Seconds of one sample, which is taken once a second."""
    usage = Usage()
    begun = time.perf_counter()
    for _ in range(repeats):
        usage.sample()
    return round((time.perf_counter() - begun) / repeats, 7)


if __name__ == "__main__":
    main()
