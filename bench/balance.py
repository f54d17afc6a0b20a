"""What --balance auto gains where one of three workers is slow: examples per second over those of equal shares.

    python bench/balance.py [--quick] [--factor F] [--rounds N] [--save]

Runs of equal shares and balanced ones in turns, the first of a round alternating; the gain is taken within a round, and
the median and the spread over rounds are printed. The slow worker sleeps: F - 1 times what its compute took, so that it
does not compete for cores. Throughput is of the last half of the steps, by worker 0's events: the balancer has settled
(how soon, and at which shares, is printed), and start-up, evaluation and saving stand outside the clock.

What could be gained: three workers of speeds 1, 1 and 1/F on as many free cores would be (2F + 1) / 3 times as quick
together. `possible_here` is that of fewer cores, which three workers share: see `possible`.

Last line: one JSON object; balance_gain is to be at least 1.5 for F = 3.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from harness import Sample, machine, ratio, save

import weft
from weft.events import read_events
from weft.testing import slow

WORKERS = 3
BATCH = 48


class Run(NamedTuple):
    examples_per_s: float
    shares: list[int]  # at the end
    settled_at: int  # the step of the last change
    bottleneck: str


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one short round, about a minute: shows that it works")
    parser.add_argument("--factor", type=float, default=3.0, help="how much slower the last worker is (default 3)")
    parser.add_argument("--rounds", type=int, help="repeats of everything (default 5; 1 with --quick)")
    parser.add_argument("--save", action="store_true", help="write bench/results/DATE-balance-MACHINE.json and .md")
    args = parser.parse_args()
    rounds, steps = args.rounds or (1 if args.quick else 5), 120 if args.quick else 200
    where = machine()
    lines: list[str] = []

    def say(line: str) -> None:
        print(line, flush=True)
        lines.append(line)

    say(f"{where['cpu']}, {where['cores']} cores, torch {where['torch']}, {rounds} rounds; median [least..greatest]")
    say(
        f"codelm tiny, batch {BATCH}, {WORKERS} workers, worker {WORKERS - 1} {args.factor:g} times slower, {steps} steps"
    )
    runs = measure(args.factor, steps, rounds)
    equal, auto = (Sample([r.examples_per_s for r in runs[balance]]) for balance in ("none", "auto"))
    gain = ratio(auto, equal)
    report(runs, equal, auto, gain, say)
    figures = {
        "balance_gain": round(gain.median, 3),
        "possible_on_free_cores": round((2 * args.factor + 1) / 3, 3),
        "possible_here": round(possible(args.factor, where["cores"]), 3),
    }
    say(
        f"    possible: {figures['possible_on_free_cores']} on {WORKERS} free cores, {figures['possible_here']} on "
        f"{where['cores']} (if nothing but compute took time)"
    )
    if args.save:
        samples = {balance: [r._asdict() for r in found] for balance, found in runs.items()}
        command = " ".join(["python", *sys.argv])
        for path in save("balance", where, lines, {"ratios": figures, "samples": samples}, command):
            print(f"wrote {path}")
    print(json.dumps(figures))


def measure(factor: float, steps: int, rounds: int) -> dict[str, list[Run]]:
    runs: dict[str, list[Run]] = {"none": [], "auto": []}
    for number in range(rounds):
        for balance in ("none", "auto") if number % 2 == 0 else ("auto", "none"):
            runs[balance].append(train(balance, factor, steps))
    return runs


def train(balance: str, factor: float, steps: int) -> Run:
    with tempfile.TemporaryDirectory(prefix="weft-bench-") as folder:
        run_dir = Path(folder) / "run"
        result = weft.run(
            "codelm",
            task_options={"size": "tiny", "test_windows": 2},
            workers=WORKERS,
            batch=BATCH,
            steps=steps,
            save_every=0,
            balance=balance,
            faults=[slow(rank=WORKERS - 1, factor=factor)],
            run_dir=run_dir,
        )
        events = list(read_events(run_dir / "events.jsonl"))
    ticks = [e for e in events if e.kind == "ticks" and e.member == 0]
    begin, end = next(t for t in ticks if t.values["last"] >= steps // 2), ticks[-1]
    examples = BATCH * int(end.values["last"] - begin.values["last"])
    changes = [e for e in events if e.kind == "balance"]
    return Run(
        examples / (end.time - begin.time),
        changes[-1].values["shares"] if changes else [BATCH // WORKERS] * WORKERS,
        changes[-1].step if changes else 0,
        result.bottleneck,
    )


def report(runs: dict[str, list[Run]], equal: Sample, auto: Sample, gain: Sample, say: Callable[[str], None]) -> None:
    say(f"equal shares {equal.text(digits=1)} examples/s; {runs['none'][-1].bottleneck}")
    last = runs["auto"][-1]
    settled = statistics.median(r.settled_at for r in runs["auto"])
    say(f"--balance auto {auto.text(digits=1)} examples/s; {last.bottleneck}")
    say(f"    last shares {' + '.join(map(str, last.shares))}, settled at step {settled:g} (median)")
    say(f"balance_gain {gain.text(digits=3)}")


def possible(factor: float, cores: int) -> float:
    """A step's time at equal shares over that at the best ones, where a share of a third is a second of a core's work.

    At equal shares all work at first, on cores that they share fairly, and then the slow one sleeps. At the best ones a
    step takes as long as the workers' speeds ask, or as the work does on all cores.
    """
    equal_s = max(1.0, WORKERS / cores) + (factor - 1)
    balanced_s = max(WORKERS / (WORKERS - 1 + 1 / factor), WORKERS / cores)
    return equal_s / balanced_s


if __name__ == "__main__":
    main()
