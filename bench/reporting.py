"""What watching a run costs its steps: --trace, --tensorboard and --metrics-port against the same run without them.

    python bench/reporting.py [--quick] [--rounds N] [--save]

Runs with and without in turns, the first of a round alternating; ratios are taken within a round, and their median and
spread over rounds are printed. A step's time is that of the steady state, from the middle of worker 0's ticks: warm-up,
evaluation and saving stand outside the clock. Sampling what members use is part of every run, on both sides; what one
sample costs is measured by itself, and told as a share of the second that passes between two.

Last line: one JSON object. trace_overhead: the worst case's step time with everything on / without - 1.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

from harness import Sample, machine, ratio, run, save

from weft.events import read_events
from weft.usage import Usage

WEFT = (sys.executable, "-c", "from weft.cli import main; main()")  # as the console script does
WATCHED = ("--trace", "--tensorboard", "--metrics-port", "0")
#: name: (task and its options, joined batch, warm-up and timed steps of a full and of a quick bench)
CASES = {
    "digits": (["digits"], 64, (200, 50), (4000, 400)),
    "codelm_tiny": (["codelm", "-t", "size=tiny", "-t", "test_windows=2"], 16, (20, 5), (200, 20)),
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
    figures: dict[str, float] = {}
    samples: dict[str, dict[str, list[float]]] = {}

    def say(line: str) -> None:
        print(line, flush=True)
        lines.append(line)

    say(f"{where['cpu']}, {where['cores']} cores, torch {where['torch']}, {rounds} rounds; median [least..greatest]")
    for name, (task, batch, warmup, steps) in CASES.items():
        plain, watched = measure(task, batch, warmup[args.quick], steps[args.quick], rounds)
        overhead = Sample([r - 1 for r in ratio(watched, plain).values])
        say(f"{name}: {plain.text(1e3, ' ms')} a step, watched {watched.text(1e3, ' ms')}: {overhead.text(100, ' %')}")
        samples[name] = {"plain": list(plain.values), "watched": list(watched.values)}
        figures[f"overhead_{name}"] = round(overhead.median, 4)
    figures["usage_sample"] = usage_share()
    say(f"usage: a sample takes {figures['usage_sample'] * 1e6:.0f} us of each second")
    figures["trace_overhead"] = max(figures[f"overhead_{name}"] for name in CASES)
    if args.save:
        command = " ".join(["python", *sys.argv])
        for path in save("reporting", where, lines, {"ratios": figures, "samples": samples}, command):
            print(f"wrote {path}")
    print(json.dumps(figures))


def measure(task: list[str], batch: int, warmup: int, steps: int, rounds: int) -> tuple[Sample, Sample]:
    """(without, with), seconds a step."""
    found: dict[bool, list[float]] = {False: [], True: []}
    for number in range(rounds):
        for watched in (False, True) if number % 2 == 0 else (True, False):
            found[watched].append(step_s(task, batch, warmup, steps, watched))
    return Sample(found[False]), Sample(found[True])


def step_s(task: list[str], batch: int, warmup: int, steps: int, watched: bool) -> float:
    size = ["--workers", str(WORKERS), "--batch", str(batch), "--steps", str(warmup + steps), "--save-every", "0"]
    with tempfile.TemporaryDirectory(prefix="weft-bench-") as folder:
        run_dir = Path(folder) / "run"
        run([*WEFT, "run", *task, *size, *(WATCHED if watched else ()), "--run-dir", str(run_dir), "--json"])
        if watched:
            assert list(run_dir.glob("trace.json*")), "nothing was traced"
            assert list(run_dir.glob("tensorboard/*")), "nothing was written"
        ticks = [e for e in read_events(run_dir / "events.jsonl") if e.kind == "ticks" and e.member == 0]
    warm, last = next(tick for tick in ticks if tick.values["last"] >= warmup), ticks[-1]
    return (last.time - warm.time) / int(last.values["last"] - warm.values["last"])


def usage_share(repeats: int = 2000) -> float:
    """Seconds of one sample, which is taken once a second."""
    usage = Usage()
    begun = time.perf_counter()
    for _ in range(repeats):
        usage.sample()
    return round((time.perf_counter() - begun) / repeats, 7)


if __name__ == "__main__":
    main()
