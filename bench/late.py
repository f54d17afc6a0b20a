"""What do late gradients cost? Held-out metric by step under a parameter server with uneven workers, over AllReduce's.

    python bench/late.py [--quick] [--tasks digits codelm] [--seeds 5 2] [--kept FILE] [--save]

`digits` and `codelm -t size=small`, their own steps, batch, rate and optimizer, four workers; a quarter of all shares, drawn by key, takes
SLOW times as long: of four workers one a step. A gap is the part of AllReduce's held-out metric, of the same seed, by which a run ends worse
(accuracy of digits, loss of codelm; below 0: better); the median over seeds. How late gradients came is counted and told.
Who comes when is up to the machine: two runs of one seed differ. --kept: finished runs are kept in this file, and taken from there.

Last line: one JSON object: TASK_staleness4_gap and TASK_async_gap of the best correction, and TASK_BOUND_CORRECTION_gap of each.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from harness import PEERS, Sample, machine, peer_python, run, save
from torch import Tensor, nn

import weft
from weft.config import RunFolder
from weft.events import read_events
from weft.patterns.base import Pattern
from weft.tasks.codelm import CodeLM
from weft.tasks.digits import Digits

WORKERS = 4
SLOW = 8
PICTURE = Path(__file__).parent.parent / "docs" / "late.svg"

BOUNDS: dict[str, int | Literal["none"]] = {"staleness4": 4, "async": "none"}
CORRECTIONS: tuple[Literal["none", "rate", "dc"], ...] = ("none", "rate", "dc")
PATTERNS: dict[str, Pattern] = {"allreduce": weft.AllReduce()} | {
    f"{bound}_{correction}": weft.ParameterServer(staleness=staleness, correction=correction)
    for bound, staleness in BOUNDS.items()
    for correction in CORRECTIONS
}


class Uneven:
    """Comes before a task's class."""

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        begun = time.thread_time()
        loss: Tensor = super().loss(model, batch)  # type: ignore[misc]
        if torch.is_grad_enabled() and random.Random(f"{float(batch[0].double().sum())}").random() < 1 / WORKERS:
            time.sleep(3 * (SLOW - 1) * (time.thread_time() - begun))  # backward takes twice as long as forward
        return loss


class UnevenDigits(Uneven, Digits):
    pass


class UnevenCodeLM(Uneven, CodeLM):
    pass


@dataclass(frozen=True)
class Case:
    task: weft.Task
    uneven: weft.Task
    metric: str
    eval_every: int
    quick_steps: int
    seeds: int

    def gap(self, value: float, truth: float) -> float:
        """Of the truth, by which it is worse."""
        return (truth - value if self.metric == "accuracy" else value - truth) / truth


CASES = {
    "digits": Case(Digits(), UnevenDigits(), "accuracy", 15, 60, 5),
    "codelm": Case(CodeLM(size="small"), UnevenCodeLM(size="small"), "loss", 50, 6, 2),
}


def measure(case: Case, pattern: Pattern, seed: int, quick: bool) -> dict[str, Any]:
    """``curve``: (step, held-out metric); ``late``: shares by how many updates late they were."""
    settings: dict[str, Any] = {"steps": case.quick_steps} if quick else {}
    settings |= {"workers": WORKERS, "seed": seed, "eval_every": case.eval_every, "save_every": 0}
    task = case.task if pattern.name == "allreduce" else case.uneven  # its numbers are the same whoever is slow
    with tempfile.TemporaryDirectory(prefix="weft-bench-") as folder:
        run_dir = Path(folder) / "run"
        weft.run(task, pattern, run_dir=run_dir, **settings)
        events = list(read_events(RunFolder(run_dir).events))
    late = Counter[int]()
    for event in events:
        for tau, count in event.values.get("staleness", {}).items() if event.kind == "ticks" else ():
            late[int(tau)] += count
    return {
        "curve": [(e.step, e.values[case.metric]) for e in events if e.kind == "eval"],
        "late": {str(tau): late[tau] for tau in sorted(late)},
    }


def mean_late(late: dict[str, int]) -> float:
    return sum(int(tau) * count for tau, count in late.items()) / sum(late.values())


def median_curve(runs: Sequence[dict[str, Any]]) -> list[tuple[int, float]]:
    return [(at[0][0], statistics.median(v for _, v in at)) for at in zip(*(run["curve"] for run in runs), strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few steps of one seed: shows that it works")
    parser.add_argument("--tasks", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--seeds", nargs="+", type=int, help="how many, of each of the tasks")
    parser.add_argument("--kept", type=Path, help="a JSON file of finished runs: kept here, and taken from here")
    parser.add_argument("--save", action="store_true", help="write bench/results and docs/late.svg")
    args = parser.parse_args()
    seeds = args.seeds or [1 if args.quick else CASES[name].seeds for name in args.tasks]
    where = machine()
    kept = json.loads(args.kept.read_text()) if args.kept and args.kept.exists() else {}
    lines: list[str] = []
    figures: dict[str, float] = {}
    curves: dict[str, dict[str, list[tuple[int, float]]]] = {}

    def say(line: str) -> None:
        print(line, flush=True)
        lines.append(line)

    say(f"{where['cpu']}, {where['cores']} cores, torch {where['torch']}; {WORKERS} workers")
    for name, count in zip(args.tasks, seeds, strict=True):
        case = CASES[name]
        found: dict[str, list[dict[str, Any]]] = {arm: [] for arm in PATTERNS}
        with weft.warm():
            for seed in range(count):
                for arm, pattern in PATTERNS.items():
                    key = f"{name} {arm} {seed}"
                    if key not in kept:
                        kept[key] = measure(case, pattern, seed, args.quick)
                        if args.kept:
                            args.kept.write_text(json.dumps(kept))
                    found[arm].append(kept[key])
        say(f"{name}, {count} seed(s): held-out {case.metric}, median [least..greatest]")
        curves[name] = {arm: median_curve(runs) for arm, runs in found.items()}
        ends = {arm: Sample([run["curve"][-1][1] for run in runs]) for arm, runs in found.items()}
        say(f"    {'allreduce':16} {ends['allreduce'].text(digits=4)}")
        for arm, runs in found.items():
            if arm != "allreduce":
                gaps = [case.gap(*pair) for pair in zip(ends[arm].values, ends["allreduce"].values, strict=True)]
                figures[f"{name}_{arm}_gap"] = round(statistics.median(gaps), 4)
                mean = statistics.median(mean_late(run["late"]) for run in runs)
                most = max(int(tau) for run in runs for tau in run["late"])
                say(
                    f"    {arm:16} {ends[arm].text(digits=4)}, gap {Sample(gaps).text(100, ' %', 1)}; {mean:.1f} updates late, {most} at most"
                )
        for bound in BOUNDS:
            figures[f"{name}_{bound}_gap"] = min(figures[f"{name}_{bound}_{c}_gap"] for c in CORRECTIONS)
    if args.save:
        command = " ".join(["python", *sys.argv])
        data = {"curves": curves, "metrics": {name: CASES[name].metric for name in args.tasks}}
        for path in save("late", where, lines, {"ratios": figures, **data, "runs": kept}, command):
            print(f"wrote {path}")
        with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
            json.dump(data, file)
            file.flush()
            run([peer_python(), str(PEERS / "draw_late.py"), file.name, str(PICTURE)])
        print(f"wrote {PICTURE}")
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
