"""The parameter server against others, in one run: what a push and pull takes, what stragglers cost, what a table's rows cost.

    python bench/ps.py [--quick] [--rounds N] [--only pushpull stragglers sparse] [--save]

pushpull: one worker (and four) pushes a gradient of 4 KB, 1, 25 and 100 MB, and has the new parameters; over the quickest of the peers, a server
of torch.distributed.rpc and an actor of Ray.
Ours is a run of `ps` on a task that computes nothing: the seconds of its steps outside of computing. GB/s are of both ways together, beside
what one process copies (the best of ten), which bounds them: a gradient is written once, read by the step, and the parameters are copied out.
stragglers: in each step one of four workers, drawn by key, sleeps until it is four times as slow; time to one training loss, synchronous over staleness=4.
sparse: `wordvec` on a table of a million rows; bytes that workers push and read, over the touched rows' own; examples/s over a dense push.

Last line: one JSON object with pushpull_25MB_GBps, pushpull_100MB_over_copy, vs_best_peer_1MB, vs_best_peer_25MB, rtt_vs_best_peer, straggler_gain, sparse_bytes_ratio, sparse_vs_dense.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness import PEERS, Sample, machine, peer_extra, peer_python, ratio, run, save
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import weft
from weft.config import RunFolder
from weft.events import losses_of, read_events
from weft.tasks.wordvec import WordVec

SIZES = {"4KB": 1 << 10, "1MB": 1 << 18, "25MB": 25 << 18, "100MB": 100 << 18}  # float32 numbers
REPEATS = {"4KB": 300, "1MB": 100, "25MB": 30, "100MB": 10}
WARM_UP = 5


class Nothing(weft.Task):
    """One parameter whose gradient takes no computing to speak of."""

    defaults = weft.Defaults(batch=8, steps=20, epochs=None)

    def __init__(self, numel: int) -> None:
        self.numel = numel

    def model(self) -> nn.Module:
        module = nn.Module()
        module.weight = nn.Parameter(torch.zeros(self.numel))
        return module

    def data(self) -> tuple[Any, Any]:
        return TensorDataset(torch.zeros(64)), TensorDataset(torch.zeros(8))

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        return model.weight.sum()

    def optimizer(self, params: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.SGD(params, lr=0.01)


def ours_s(numel: int, workers: int, repeats: int) -> float:
    """Median over ticks of a step's seconds outside of computing."""
    with tempfile.TemporaryDirectory(prefix="weft-bench-") as folder:
        steps = WARM_UP + repeats
        weft.run(
            Nothing(numel), "ps", workers=workers, steps=steps, save_every=0, run_dir=Path(folder) / "run", batch=8
        )
        ticks = [e for e in read_events(Path(folder) / "run" / "events.jsonl") if e.kind == "ticks" and e.member == 0]
    each = [
        (e.values["exchange_s"] + e.values["wait_s"]) / (e.values["last"] - e.values["first"] + 1)
        for e in ticks
        if e.values["first"] > 1
    ]
    return statistics.median(each)


def copy_gbps(numel: int) -> float:
    source, target = np.ones(numel, np.float32), np.ones(numel, np.float32)
    seconds = []
    for _ in range(10):
        begun = time.perf_counter()
        np.copyto(target, source)
        seconds.append(time.perf_counter() - begun)
    return source.nbytes / min(seconds) / 1e9


def peer_s(program: str, numel: int, workers: int, repeats: int) -> float:
    said = run([peer_python(), str(PEERS / program), str(numel), str(workers), str(repeats)])
    return statistics.median(json.loads(said.strip().splitlines()[-1]))


def peers(say: Any) -> dict[str, Callable[[int, int, int], float]]:
    """Those that can be installed here."""
    found = {"rpc": partial(peer_s, "ps_rpc.py")}
    if why := peer_extra("ray"):
        say(f"ray does not take part: {why}")
    else:
        found["ray"] = partial(peer_s, "ps_ray.py")
    return found


def pushpull(rounds: int, quick: bool, say: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    figures: dict[str, Any] = {}
    samples: dict[str, Any] = {}
    names = ["4KB", "1MB", "25MB"] + ["100MB"] * (not quick)
    others = peers(say)
    for workers in (1,) if quick else (1, 4):
        for name in names:
            arms = [("ours", ours_s), *others.items()]
            found: dict[str, list[float]] = {arm: [] for arm, _ in [*arms, ("copy", None)]}
            for number in range(rounds):
                for arm, measure in arms if number % 2 == 0 else arms[::-1]:
                    found[arm].append(measure(SIZES[name], workers, REPEATS[name] // (4 if quick else 1)))
                found["copy"].append(copy_gbps(SIZES[name]))
            ours = Sample(found["ours"])
            best = min(others, key=lambda arm: Sample(found[arm]).median)
            speed = Sample([2 * 4 * SIZES[name] / s / 1e9 for s in ours.values])
            times, of_copy = ratio(Sample(found[best]), ours), ratio(speed, Sample(found["copy"]))
            theirs = ", ".join(f"{arm} {Sample(found[arm]).text(1e3, ' ms')}" for arm in others)
            say(
                f"push and pull {name}, {workers} worker(s): {ours.text(1e3, ' ms')}, {speed.text(1, ' GB/s')} ({of_copy.text()} of a copy); {theirs}: {times.text()} x of {best}"
            )
            samples[f"{name}-{workers}"] = found
            if workers == 1:
                key = "rtt_vs_best_peer" if name == "4KB" else f"vs_best_peer_{name}"
                figures[key] = round(times.median, 2)
                if name == "25MB":
                    figures["pushpull_25MB_GBps"] = round(speed.median, 2)
                if name == "100MB":
                    figures["pushpull_100MB_over_copy"] = round(of_copy.median, 2)
    return figures, samples


class Uneven(weft.Task):
    """A small regression in which at each step one of four shares, drawn by key, takes four times as long."""

    defaults = weft.Defaults(batch=64, steps=200, epochs=None)
    base_s = 0.004

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 1))

    def data(self) -> tuple[Any, Any]:
        x = torch.randn(4096, 16)
        y = (x[:, :4].prod(1, keepdim=True) + x[:, 4:8].sum(1, keepdim=True)).tanh()
        return TensorDataset(x[:3840], y[:3840]), TensorDataset(x[3840:], y[3840:])

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        x, y = batch
        if torch.is_grad_enabled():
            slow = (
                random.Random(f"{float(x[0, 0])}").random() < 0.25
            )  # a quarter of all shares: of four workers one a step
            time.sleep(self.base_s * (4 if slow else 1))
        return (model(x) - y).pow(2).mean()

    def optimizer(self, params: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.SGD(params, lr=0.05)


def seconds_to(run_dir: Path, target: float) -> float:
    """From the first step to the first at which the mean of the last 20 training losses is at most ``target``."""
    recent: list[float] = []
    begun = 0.0
    for event in read_events(RunFolder(run_dir).events):
        begun = event.time if event.kind == "started" else begun
        for _, loss in losses_of(event):
            recent = [*recent[-19:], loss]
            if len(recent) == 20 and sum(recent) / 20 <= target:
                return event.time - begun
    return float("nan")


def stragglers(rounds: int, quick: bool, say: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    target, steps = (0.35, 250) if quick else (0.25, 1200)
    found: dict[str, list[float]] = {"0": [], "4": [], "none": []}
    for number in range(rounds):
        for staleness in sorted(found, reverse=bool(number % 2)):
            with tempfile.TemporaryDirectory(prefix="weft-bench-") as folder:
                options = {"staleness": staleness if staleness == "none" else int(staleness)}
                settings: dict[str, Any] = {
                    "workers": 4,
                    "steps": steps,
                    "save_every": 0,
                    "run_dir": Path(folder) / "run",
                }
                weft.run(Uneven(), "ps", pattern_options=options, **settings)
                found[staleness].append(seconds_to(Path(folder) / "run", target))
    sync = Sample(found["0"])
    for staleness, values in found.items():
        gain = ratio(sync, Sample(values))
        say(f"stragglers, staleness={staleness}: loss {target} after {Sample(values).text(1, ' s')}: {gain.text()} x")
    return {"straggler_gain": round(ratio(sync, Sample(found["4"])).median, 2)}, found


class Counted(WordVec):
    """Tells how many rows each look-up touches."""

    def model(self) -> nn.Module:
        model = super().model()
        for module in model.modules():
            if isinstance(module, nn.Embedding):
                module.register_forward_pre_hook(tell_rows)
        return model


def tell_rows(module: nn.Module, args: tuple[Any, ...]) -> None:
    if torch.is_grad_enabled():
        print("rows", args[0].unique().numel(), flush=True)


class Dense(WordVec):
    """The same tables, pushed whole."""

    def model(self) -> nn.Module:
        model = super().model()
        for module in model.modules():
            if isinstance(module, nn.Embedding):
                module.sparse = False
        return model


def sparse(rounds: int, quick: bool, say: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Bytes: all that workers and server sent in training, over what the touched rows' values take, read and pushed."""
    rows, dim = (50_000 if quick else 1_000_000), 64
    found: dict[str, list[float]] = {"rows": [], "dense": [], "bytes": []}
    made = []
    for _ in range(rounds):
        with tempfile.TemporaryDirectory(prefix="weft-bench-") as folder:
            made.append(bytes_over_rows(Path(folder) / "run", rows, dim))
        for arm, task in (
            ("rows", WordVec(rows=rows, dim=dim, rule="sgd")),
            ("dense", Dense(rows=rows, dim=dim, rule="sgd")),
        ):
            with tempfile.TemporaryDirectory(prefix="weft-bench-") as folder:
                steps = (40 if quick else 100) if arm == "rows" else 6
                settings: dict[str, Any] = {
                    "workers": 2,
                    "steps": steps,
                    "save_every": 0,
                    "run_dir": Path(folder) / "run",
                }
                result = weft.run(task, "ps", pattern_options={"servers": 1}, batch=256, **settings)
                found[arm].append(result.examples_per_s)
    gain = ratio(Sample(found["rows"]), Sample(found["dense"]))
    say(
        f"sparse, a table of {rows:,} x {dim}: {Sample(found['rows']).text(1, ' examples/s', 0)}, dense {Sample(found['dense']).text(1, '', 0)}: {gain.text()} x"
    )
    say(f"    bytes over those of the touched rows: {Sample(made).text(digits=3)}")
    found["bytes"] = made
    return {"sparse_bytes_ratio": round(Sample(made).median, 3), "sparse_vs_dense": round(gain.median, 2)}, found


def bytes_over_rows(run_dir: Path, rows: int, dim: int, steps: int = 20) -> float:
    settings: dict[str, Any] = {"workers": 2, "steps": steps, "save_every": 0, "run_dir": run_dir, "batch": 256}
    weft.run(Counted(rows=rows, dim=dim, rule="sgd"), "ps", pattern_options={"servers": 1}, **settings)
    touched = sum(
        int(line.split()[1])
        for log in (run_dir / "logs").glob("worker-[01].log")
        for line in log.read_text().splitlines()
        if line.startswith("rows ")
    )
    # what the first evaluation reads comes after the last tick of training
    sent = sum(e.values["bytes_sent"] for e in read_events(run_dir / "events.jsonl") if e.kind == "ticks")
    return float(sent / (2 * touched * dim * 4))


PARTS = {"pushpull": pushpull, "stragglers": stragglers, "sparse": sparse}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one short round: shows that it works")
    parser.add_argument("--rounds", type=int, help="repeats of everything (default 5; 1 with --quick)")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--save", action="store_true", help="write bench/results/DATE-ps-MACHINE.json and .md")
    args = parser.parse_args()
    rounds = args.rounds or (1 if args.quick else 5)
    where = machine()
    lines: list[str] = []
    figures: dict[str, Any] = {}
    samples: dict[str, Any] = {}

    def say(line: str) -> None:
        print(line, flush=True)
        lines.append(line)

    say(f"{where['cpu']}, {where['cores']} cores, torch {where['torch']}, {rounds} rounds; median [least..greatest]")
    with weft.warm():
        for name in args.only:
            own, samples[name] = PARTS[name](rounds, args.quick, say)
            figures |= own
    if args.save:
        command = " ".join(["python", *sys.argv])
        for path in save("ps", where, lines, {"ratios": figures, "samples": samples}, command):
            print(f"wrote {path}")
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
