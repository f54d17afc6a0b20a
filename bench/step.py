"""Step time and start-up of Weft against torch DDP over Gloo, HF Accelerate and Lightning Fabric; of one worker against a
plain torch loop.

    python bench/step.py [--quick] [--only vs_ddp_digits ...] [--rounds N] [--save]

Both sides run in the same call, in turns, the first of a round alternating; every ratio is taken within a round, and
the median and the spread over rounds are printed. DDP's figure is that of its best bucket setting (with --quick it has
one). Step times are steady state, the median over stretches of 0.2 s (or a step): warm-up, start-up, evaluation and saving
stand outside the clock. One torch thread per worker. The peers run in an environment of their own (bench/peers), made the first time, with the same torch.

Last line: one JSON object. vs_*: the peer's step time / Weft's (more than 1: Weft is quicker). overhead_one_worker*:
Weft's step time / the plain loop's - 1. startup_vs_torchrun: seconds from starting the command to the end of the first
training step, torchrun's / Weft's, in the runs of vs_ddp_digits.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from harness import Sample, machine, peer_python, ratio, run, save

import weft
from weft.events import read_events

PEER = str(Path(__file__).parent / "peers" / "torch_loop.py")
SETTINGS = ("copy", "view", "view+static")
FRAMEWORKS = ("accelerate", "fabric")
WEFT = (sys.executable, "-c", "from weft.cli import main; main()")  # as the console script does
WEFT_SOURCE = str(Path(weft.__file__).parents[1])  # the peers train on Weft's tasks
STARTUP_OF = "vs_ddp_digits"


@dataclass(frozen=True)
class Case:
    """One comparison. ``warmup`` and ``steps`` are those of a full and of a quick bench."""

    name: str
    task: str
    target: str
    batch: int  # per worker
    workers: int
    warmup: tuple[int, int]
    steps: tuple[int, int]
    options: dict[str, Any] = field(default_factory=dict)
    frameworks: bool = False  # Accelerate and Fabric, too; not with --quick
    in_quick: bool = True


def digits(name: str, workers: int, warmup: tuple[int, int], steps: tuple[int, int]) -> Case:
    return Case(name, "digits", "weft.tasks.digits:Digits", 32, workers, warmup, steps)


def codelm(name: str, size: str, batch: int, workers: int, warmup: tuple[int, int], steps: tuple[int, int]) -> Case:
    options = {"size": size, "test_windows": 2}  # the evaluation at the end is not under the clock
    return Case(name, "codelm", "weft.tasks.codelm:CodeLM", batch, workers, warmup, steps, options)


CASES = [
    digits("vs_ddp_digits", 2, (100, 50), (1500, 300)),
    replace(codelm("vs_ddp_codelm_small", "small", 8, 2, (5, 1), (25, 3)), frameworks=True),
    replace(codelm("vs_ddp_codelm_medium", "medium", 4, 2, (3, 1), (10, 2)), in_quick=False),
    codelm("vs_ddp_codelm_medium_batch1", "medium", 1, 2, (3, 1), (20, 3)),
    replace(codelm("overhead_one_worker", "small", 8, 1, (5, 1), (30, 3)), in_quick=False),
    digits("overhead_one_worker_digits", 1, (100, 50), (1500, 300)),
]


class Run(NamedTuple):
    step_s: dict[str, float]  # by setting
    startup_s: float  # from starting the command to the end of the first step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--quick", action="store_true", help="one short round of most of it, under a minute: shows that it works"
    )
    parser.add_argument("--only", nargs="+", choices=[case.name for case in CASES], help="these figures alone")
    parser.add_argument("--rounds", type=int, help="repeats of everything (default 7; 1 with --quick)")
    parser.add_argument("--save", action="store_true", help="write bench/results/DATE-step-MACHINE.json and .md")
    args = parser.parse_args()
    rounds = args.rounds or (1 if args.quick else 7)
    where = machine()
    lines: list[str] = []
    ratios: dict[str, float] = {}
    samples: dict[str, Any] = {}

    def say(line: str) -> None:
        print(line, flush=True)
        lines.append(line)

    say(f"{where['cpu']}, {where['cores']} cores, torch {where['torch']}, {rounds} rounds; median [least..greatest]")
    for case in CASES:
        if case.name not in (args.only or [c.name for c in CASES if c.in_quick or not args.quick]):
            continue
        settings = SETTINGS[-1:] if args.quick else SETTINGS + (FRAMEWORKS if case.frameworks else ())
        ours, theirs = measure(case, settings, case.warmup[args.quick], case.steps[args.quick], rounds)
        samples[case.name] = {"weft": [r._asdict() for r in ours], "peer": [r._asdict() for r in theirs]}
        ratios |= report_steps(case, ours, theirs, say)
        if case.name == STARTUP_OF:
            ratios["startup_vs_torchrun"] = report_startup(ours, theirs, say)
    if args.save:
        for path in save("step", where, lines, {"ratios": ratios, "samples": samples}, " ".join(["python", *sys.argv])):
            print(f"wrote {path}")
    print(json.dumps(ratios))


def measure(case: Case, settings: Sequence[str], warmup: int, steps: int, rounds: int) -> tuple[list[Run], list[Run]]:
    """Weft's runs and the peer's, in turns; in odd rounds the peer goes first."""
    ours: list[Run] = []
    theirs: list[Run] = []
    for number in range(rounds):
        if number % 2:
            theirs.append(torch_run(case, settings, warmup, steps, number))
        ours.append(weft_run(case, warmup, steps))
        if number % 2 == 0:
            theirs.append(torch_run(case, settings, warmup, steps, number))
    return ours, theirs


def report_steps(case: Case, ours: list[Run], theirs: list[Run], say: Callable[[str], None]) -> dict[str, float]:
    """The figure that the case is named for, and those against the frameworks."""
    weft = Sample([r.step_s["weft"] for r in ours])
    timed = {setting: Sample([r.step_s[setting] for r in theirs]) for setting in theirs[0].step_s}
    peers = {setting: sample for setting, sample in timed.items() if setting not in FRAMEWORKS}
    best = min(peers, key=lambda setting: peers[setting].median)
    who = "plain loop" if case.workers == 1 else f"DDP ({best})"
    say(f"{case.name}: Weft {weft.text(1e3, ' ms')}, {who} {peers[best].text(1e3, ' ms')} a step")
    for setting in sorted(peers.keys() - {best}):
        say(f"    DDP ({setting}) {peers[setting].text(1e3, ' ms')}")
    if case.workers > 1:
        speedup = ratio(peers[best], weft)
        say(f"    DDP / Weft {speedup.text(digits=3)}")
        found = {case.name: round(speedup.median, 3)}
        for framework in FRAMEWORKS:
            if framework in timed:
                speedup = ratio(timed[framework], weft)
                say(
                    f"vs_{framework}: {framework} {timed[framework].text(1e3, ' ms')} a step, / Weft {speedup.text(digits=3)}"
                )
                found[f"vs_{framework}"] = round(speedup.median, 3)
        return found
    overhead = Sample([r - 1 for r in ratio(weft, peers[best]).values])
    say(f"    Weft / plain - 1 = {overhead.text(100, ' %')}")
    return {case.name: round(overhead.median, 4)}


def report_startup(ours: list[Run], theirs: list[Run], say: Callable[[str], None]) -> float:
    weft, torchrun = Sample([r.startup_s for r in ours]), Sample([r.startup_s for r in theirs])
    speedup = ratio(torchrun, weft)
    say(f"startup_vs_torchrun: Weft {weft.text(1, ' s')}, torchrun {torchrun.text(1, ' s')} to the end of step 1")
    say(f"    torchrun / Weft {speedup.text(digits=3)}")
    return round(speedup.median, 3)


def weft_run(case: Case, warmup: int, steps: int) -> Run:
    """By worker 0's events: the end of step 1 is told by itself, those of later steps some at a time."""
    options = [word for key, value in case.options.items() for word in ("-t", f"{key}={value}")]
    size = ["--workers", str(case.workers), "--batch", str(case.batch * case.workers), "--steps", str(warmup + steps)]
    with tempfile.TemporaryDirectory(prefix="weft-bench-") as folder:
        run_dir = Path(folder) / "run"
        begun = time.time()
        run([*WEFT, "run", case.task, *options, *size, "--save-every", "0", "--run-dir", str(run_dir), "--json"])
        ticks = [e for e in read_events(run_dir / "events.jsonl") if e.kind == "ticks" and e.member == 0]
    assert ticks[0].values["last"] == 1, "the first step is to be told by itself"
    timed = [tick for tick in ticks if tick.values["last"] >= warmup]
    steps_s = [(b.time - a.time) / (b.values["last"] - a.values["last"]) for a, b in pairwise(timed)]
    return Run({"weft": statistics.median(steps_s)}, ticks[0].time - begun)


def torch_run(case: Case, settings: Sequence[str], warmup: int, steps: int, number: int) -> Run:
    """Under torchrun in each setting, another one first in each round; for one worker the plain loop."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(case.workers)]
    command = [peer_python(), *(launcher if case.workers > 1 else []), PEER, case.target]
    command += ["--options", json.dumps(case.options), "--batch", str(case.batch)]
    first = number % len(settings)
    command += ["--warmup", str(warmup), "--steps", str(steps), "--settings", *settings[first:], *settings[:first]]
    begun = time.time()
    said = json.loads(run(command, env={"OMP_NUM_THREADS": "1", "PYTHONPATH": WEFT_SOURCE}).splitlines()[-1])
    return Run(said["step_s"], said["first_step_at"] - begun)


if __name__ == "__main__":
    main()
