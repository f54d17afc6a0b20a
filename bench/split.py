"""The patterns that split a model: what memory they leave to a worker, their steps against plain torch's, and whether what is predicted comes.

    python bench/split.py [--quick] [--only PART ...] [--rounds N] [--save]

memory: `codelm -t size=large` (116M parameters, AdamW) on 4 workers against one process, the same joined batch of 4 x 16 bytes: at most 2 %
of what one process takes are activations, and they count on both sides. Measured is the peak of a step beyond what the process had before it
made its model, by the kernel; of workers the worst.
step: `codelm -t size=medium`, 2 workers of one thread each, 8 x 128 bytes a step, in 8 micro-batches where there is a pipeline. The peer is plain
torch over Gloo (peers/torch_split.py) with the same layout and schedule; with several settings of one way, its best.
schedules: every schedule on 2 workers, each run's own plan, simulated from the preflight's profile, against what it then took.
slowlink: the same between two hosts (network namespaces: Linux, root) at 100 Mbit/s; the schedule that `auto` takes there, which measures the
link first, and (`-o trial=always`: these runs are short) tries the best, against the quickest.
layouts: the same model and batch, one worker, two copies of it, and two workers that hold it together in each way: memory, bytes, and steps on
one host and between two at 1 Gbit/s and 100 Mbit/s, with what each plan said; with --save docs/split.svg shows it.

Both sides run in turns, ratios are taken within a round; medians, and least and greatest. Last line: one JSON object. mem_*: worst worker's /
one process's. mem_prediction_error: |predicted / measured - 1|, the worst. step_vs_torch_max: our step / torch's, the worst of the ways.
schedule_error_max: |predicted / measured - 1|, the worst of the schedules. schedule_regret: step of the schedule taken / the quickest's - 1.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from harness import PEERS, Sample, machine, peer_python, ratio, run, save

import weft
from weft.events import Event, read_events
from weft.patterns.pipelined import AUTO
from weft.pipelines.schedules import names
from weft.testing.hosts import hosts, why_not

PARTS = ("memory", "step", "schedules", "slowlink", "layouts")
WANTED = {
    "mem_sharded": 0.35,
    "mem_pipeline": 0.40,
    "mem_tensor": 0.40,
    "mem_prediction_error": 0.10,
    "step_vs_torch_max": 1.03,
    "schedule_error_max": 0.10,
    "schedule_regret": 0.03,
}
WAYS = {  # the peer's, and ours
    "fsdp": ("sharded",),
    "tensor": ("tensor",),
    "gpipe": ("pipeline", "-o", "schedule=gpipe"),
    "1f1b": ("pipeline", "-o", "schedule=1f1b"),
    "zbv": ("pipeline", "-o", "schedule=zbv"),
}
WEFT = (sys.executable, "-m", "weft")
SOURCE = str(Path(weft.__file__).parents[1])
ENV = {"OMP_NUM_THREADS": "1", "PYTHONPATH": SOURCE}
RATE = "100mbit"
LAYOUTS = {  # name -> workers, pattern
    "one worker": (1, "allreduce"),
    "2 copies": (2, "allreduce"),
    "sharded": (2, "sharded"),
    "tensor": (2, "tensor"),
    "pipeline": (2, "pipeline"),
}
RATES = {"one host": None, "1 Gbit/s": "1gbit", "100 Mbit/s": "100mbit"}
PICTURE = Path(__file__).parent.parent / "docs" / "split.svg"
PORT = 29500
Say = Callable[[str], None]


@dataclass(frozen=True)
class Setup:
    """What is trained. ``batch``: joined."""

    size: str
    batch: int
    warmup: int
    steps: int
    seq_len: int = 0

    @property
    def task(self) -> dict[str, Any]:
        return {"size": self.size, "test_windows": 2, "seq_len": self.seq_len}

    def command(self, *pattern: str) -> list[str]:
        options = [word for key, value in self.task.items() for word in ("-t", f"{key}={value}")]
        sizes = ["--batch", str(self.batch), "--steps", str(self.warmup + self.steps), "--save-every", "0"]
        return ["run", "codelm", *options, "--pattern", *pattern, *sizes, "--json"]


LARGE = Setup("large", 4, 0, 3, seq_len=16)
MEDIUM = Setup("medium", 8, 2, 8)
SLOW = Setup("medium", 8, 1, 5)
#: With --quick.
SMALL = Setup("small", 8, 1, 3)
SMALL_MEMORY = Setup("small", 4, 0, 2, seq_len=16)


class Ours(NamedTuple):
    """A run of Weft's, measured and as its plan said. ``predicted``: bytes of a worker, by purpose."""

    step_s: float
    peak_bytes: int
    predicted: dict[str, int]
    predicted_s: float
    schedule: str
    tried_s: float
    bytes_a_step: float = 0.0  # of the worker that sends most


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one short round of a little of it: shows that it works")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="these parts alone")
    parser.add_argument("--rounds", type=int, help="repeats of everything (default 5, of memory and slowlink 3)")
    parser.add_argument("--save", action="store_true", help="write bench/results/DATE-split-MACHINE.json and .md")
    args = parser.parse_args()
    rounds, few = (1, 1) if args.quick else (args.rounds or 5, args.rounds or 3)
    where = machine()
    lines: list[str] = []
    figures: dict[str, float] = {}
    samples: dict[str, Any] = {}

    def say(line: str) -> None:
        print(line, flush=True)
        lines.append(line)

    say(f"{where['cpu']}, {where['cores']} cores, torch {where['torch']}; median [least..greatest]")
    if "memory" in args.only:
        figures |= memory(SMALL_MEMORY if args.quick else LARGE, few, ["sharded"] if args.quick else None, samples, say)
    if "step" in args.only:
        figures |= steps(SMALL if args.quick else MEDIUM, rounds, ["1f1b"] if args.quick else list(WAYS), samples, say)
    if "schedules" in args.only:
        among = ["zbv"] if args.quick else names()
        figures |= schedules(SMALL if args.quick else MEDIUM, rounds, among, samples, say)
    if "slowlink" in args.only and not args.quick:
        if reason := why_not():
            say(f"slowlink cannot run here: {reason}")
        else:
            figures |= slowlink(SLOW, few, names(), samples, say)
    if "layouts" in args.only and not args.quick:
        layouts(SLOW, few, samples, say)
    for name, wanted in WANTED.items():
        if name in figures and figures[name] > wanted:
            say(f"falls short: {name} {figures[name]:g}, wanted at most {wanted:g}")
    if args.quick:
        say("quick: a smaller model, one round; no figures to go by")
    if args.save:
        for path in save(
            "split", where, lines, {"ratios": figures, "samples": samples}, " ".join(["python", *sys.argv])
        ):
            print(f"wrote {path}")
        if {"memory", "layouts"} <= samples.keys():
            draw(samples)
    print(json.dumps(figures))


# -- memory


def memory(
    setup: Setup, rounds: int, among: Sequence[str] | None, samples: dict[str, Any], say: Say
) -> dict[str, float]:
    """``among``: these patterns; None: all."""
    patterns = list(among or ["sharded", "pipeline", "tensor"])
    found: dict[str, list[Ours]] = {name: [] for name in ["allreduce", *patterns]}
    for _ in range(rounds):
        for name, runs in found.items():
            runs.append(weft_run(setup.command(name), 1 if name == "allreduce" else 4, setup.warmup))
    samples["memory"] = {name: [r._asdict() for r in runs] for name, runs in found.items()}
    peaks = {name: Sample([r.peak_bytes for r in runs]) for name, runs in found.items()}
    figures, errors = {}, []
    for name, runs in found.items():
        off = Sample([sum(r.predicted.values()) / r.peak_bytes - 1 for r in runs])
        say(
            f"memory, {name}: {peaks[name].text(1e-6, ' MB', 0)} at most, predicted "
            f"{sum(runs[0].predicted.values()) / 1e6:.0f} MB ({off.median:+.1%}); activations {runs[0].predicted['activations'] / 1e6:.0f} MB of it"
        )
        errors.append(max(abs(value) for value in off.values))
        if name != "allreduce":
            part = ratio(peaks[name], peaks["allreduce"])
            say(f"    / one process {part.text(digits=3)}")
            figures[f"mem_{name}"] = round(part.median, 3)
    return figures | {"mem_prediction_error": round(max(errors), 3)}


# -- steps


def steps(setup: Setup, rounds: int, ways: Sequence[str], samples: dict[str, Any], say: Say) -> dict[str, float]:
    ours: dict[str, list[float]] = {way: [] for way in ways}
    theirs: dict[str, list[dict[str, Any]]] = {way: [] for way in ways}
    for number in range(rounds):
        for way in ways:
            for peer in (True, False) if number % 2 else (False, True):
                if peer:
                    theirs[way].append(torch_run(setup, way))
                else:
                    ours[way].append(weft_run(setup.command(*WAYS[way]), 2, setup.warmup).step_s)
    samples["step"] = {"weft": ours, "torch": theirs}
    check_alike(theirs)
    worst = 0.0
    figures = {}
    for way in ways:
        mine, peer = Sample(ours[way]), Sample([each["step_s"] for each in theirs[way]])
        over = ratio(mine, peer)
        say(
            f"step, {way}: Weft {mine.text(1e3, ' ms', 0)}, torch {peer.text(1e3, ' ms', 0)}; Weft / torch {over.text(digits=3)}"
        )
        worst = max(worst, over.median)
        figures[f"step_vs_torch_{way}"] = round(over.median, 3)
    return {"step_vs_torch_max": round(worst, 3), **figures}


def check_alike(theirs: dict[str, list[dict[str, Any]]]) -> None:
    """All ways of the peer's train on the same batches: one that does not come to the same losses is no peer."""
    losses = {way: each[0]["losses"] for way, each in theirs.items()}
    first = next(iter(losses.values()))
    for way, each in losses.items():
        if any(abs(a / b - 1) > 1e-4 for a, b in zip(each, first, strict=True)):
            raise SystemExit(f"the peer {way} does not train as the others do: losses {losses}")


def torch_run(setup: Setup, way: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(PEERS / "torch_split.py"), way, "--options", json.dumps(setup.task), "--batch", str(setup.batch)]
    command += ["--warmup", str(setup.warmup), "--steps", str(setup.steps)]
    said: dict[str, Any] = json.loads(run(command, env=ENV).splitlines()[-1])
    return said


def weft_run(command: Sequence[str], workers: int, warmup: int) -> Ours:
    with tempfile.TemporaryDirectory(prefix="weft-bench-") as folder:
        place = Path(folder) / "run"
        run([*WEFT, *command, "--workers", str(workers), "--run-dir", str(place)], env={"PYTHONPATH": SOURCE})
        return told(place, warmup)


def told(place: Path, warmup: int) -> Ours:
    events = list(read_events(place / "events.jsonl"))
    plan = json.loads((place / "plan.json").read_text())
    config = json.loads((place / "config.json").read_text())
    step = plan.get("step") or {"seconds": {}, "tried_s": 0.0}
    return Ours(
        step_s=step_seconds(events, warmup),
        peak_bytes=max((e.values["peak_bytes"] for e in events if e.kind == "memory"), default=0),
        predicted=plan["members"][0]["memory"],
        predicted_s=sum(step["seconds"].values()),
        tried_s=step["tried_s"],
        schedule=(((config.get("measured") or {}).get("pipeline")) or {}).get("schedule", ""),
        bytes_a_step=most_sent(events),
    )


def most_sent(events: Sequence[Event]) -> float:
    of: dict[int, list[tuple[float, int]]] = {}
    for e in events:
        if e.kind == "ticks":
            of.setdefault(e.member, []).append((e.values["bytes_sent"], e.values["last"] - e.values["first"] + 1))
    return max(sum(nbytes for nbytes, _ in each) / sum(steps for _, steps in each) for each in of.values())


def step_seconds(events: Sequence[Event], warmup: int) -> float:
    """By worker 0's events: steady state, the median over stretches of steps that were told together."""
    timed = [e for e in events if e.kind == "ticks" and e.member == 0 and e.values["last"] >= max(1, warmup)]
    return statistics.median((b.time - a.time) / (b.values["last"] - a.values["last"]) for a, b in pairwise(timed))


# -- schedules


def schedules(setup: Setup, rounds: int, among: Sequence[str], samples: dict[str, Any], say: Say) -> dict[str, float]:
    found: dict[str, list[Ours]] = {name: [] for name in among}
    for _ in range(rounds):
        for name, runs in found.items():
            runs.append(weft_run(setup.command("pipeline", "-o", f"schedule={name}"), 2, setup.warmup))
    samples["schedules"] = {name: [r._asdict() for r in runs] for name, runs in found.items()}
    worst = 0.0
    for name, runs in found.items():
        predicted, measured = Sample([r.predicted_s for r in runs]), Sample([r.step_s for r in runs])
        off = Sample([value - 1 for value in ratio(predicted, measured).values])
        say(
            f"schedule {name}: predicted {predicted.text(1e3, ' ms', 0)}, measured {measured.text(1e3, ' ms', 0)}; "
            f"predicted / measured - 1 = {off.text(100, ' %', 1)}"
        )
        worst = max(worst, abs(off.median))
    return {"schedule_error_max": round(worst, 3)}


# -- a slow link


def slowlink(setup: Setup, rounds: int, among: Sequence[str], samples: dict[str, Any], say: Say) -> dict[str, float]:
    found: dict[str, list[Ours]] = {name: [] for name in [AUTO, *among]}
    for _ in range(rounds):
        for name, runs in found.items():
            options = ["-o", f"schedule={name}", *(["-o", "trial=always"] if name == AUTO else [])]
            runs.append(hosts_run(setup, "pipeline", *options))
    samples["slowlink"] = {name: [r._asdict() for r in runs] for name, runs in found.items()}
    say(f"slowlink: 2 hosts at {RATE}, {setup.size}, batch {setup.batch}, sequences of {setup.seq_len or 128}")
    times = {name: Sample([r.step_s for r in runs]) for name, runs in found.items()}
    for name, runs in found.items():
        guess = Sample([r.predicted_s for r in runs])
        tried = Sample([r.tried_s for r in runs])
        words = f", in trials {tried.text(1e3, ' ms', 0)}" if name == AUTO else ""
        say(f"    {name}: predicted {guess.text(1e3, ' ms', 0)}{words}, measured {times[name].text(1e3, ' ms', 0)}")
    taken = [r.schedule for r in found[AUTO]]
    quickest = min(among, key=lambda name: times[name].median)
    choice = statistics.mode(taken)
    regret = times[choice].median / times[quickest].median - 1
    say(f"    taken: {', '.join(taken)}; quickest: {quickest}; {choice} / {quickest} - 1 = {regret:.1%}")
    return {"schedule_regret": round(regret, 3)}


def layouts(setup: Setup, rounds: int, samples: dict[str, Any], say: Say) -> None:
    """For people to look at: nothing of it is a figure that was promised."""
    found: dict[str, dict[str, list[Ours]]] = {}
    rates = {where: rate for where, rate in RATES.items() if rate is None or not why_not()}
    for _ in range(rounds):
        for where, rate in rates.items():
            for name, (workers, pattern) in LAYOUTS.items():
                if rate is None:
                    one = weft_run(setup.command(pattern), workers, setup.warmup)
                elif workers > 1:
                    one = hosts_run(setup, pattern, rate=rate)
                else:
                    continue
                found.setdefault(where, {}).setdefault(name, []).append(one)
    samples["layouts"] = {
        where: {name: [r._asdict() for r in runs] for name, runs in each.items()} for where, each in found.items()
    }
    say(f"layouts: codelm {setup.size}, {setup.batch} sequences a step of {setup.seq_len or 128} bytes")
    for where, each in found.items():
        for name, runs in each.items():
            guess = statistics.median(r.predicted_s for r in runs)
            say(
                f"    {where}, {name}: {Sample([r.step_s for r in runs]).text(1e3, ' ms', 0)} a step"
                + f" (predicted {1e3 * guess:.0f} ms)" * bool(guess)
                + f", {runs[0].peak_bytes / 1e6:.0f} MB and {runs[0].bytes_a_step / 1e6:.1f} MB sent a step by the worst worker"
            )


def draw(samples: dict[str, Any]) -> None:
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(samples, file)
        file.flush()
        run([peer_python(), str(PEERS / "draw_split.py"), file.name, str(PICTURE)])
    print(f"wrote {PICTURE}")


def hosts_run(setup: Setup, *pattern: str, rate: str = RATE) -> Ours:
    with tempfile.TemporaryDirectory(prefix="weft-bench-") as folder, hosts(2, rate=rate) as members:
        place = Path(folder) / "run"
        processes = []
        for rank, host in enumerate(members):
            launcher = [
                "-m",
                "torch.distributed.run",
                "--nnodes",
                "2",
                "--nproc-per-node",
                "1",
                "--node-rank",
                str(rank),
            ]
            launcher += ["--master-addr", members[0].address, "--master-port", str(PORT)]
            command = [*setup.command(*pattern), "--insecure", "--run-dir", str(place)]
            with (Path(folder) / f"said-{rank}").open("wb") as said:
                words = [sys.executable, *launcher, "-m", "weft", *command]
                env = dict(os.environ) | ENV | {"GLOO_SOCKET_IFNAME": "eth0"}
                processes.append(host.popen(words, env=env, stdin=subprocess.DEVNULL, stdout=said, stderr=said))
        codes = [process.wait(timeout=600) for process in processes]
        if any(codes):
            raise SystemExit(
                f"{' '.join(pattern)} on two hosts: exit {codes}: {(Path(folder) / 'said-0').read_text()[-3000:]}"
            )
        return told(place, setup.warmup)


if __name__ == "__main__":
    main()
