"""The patterns that split a model: what memory they leave to a worker, their steps against plain torch's, and whether what is predicted comes.

    python bench/split.py [--quick] [--only PART ...] [--rounds N] [--save]

memory: `codelm -t size=large` (116M parameters, AdamW) on 4 workers against one process, the same joined batch of 4 x 16 bytes: at most 2 %
of what one process takes are activations, and they count on both sides. Measured is the peak of a step beyond what the process had before it
made its model, by the kernel; of workers the worst.
step: `codelm -t size=medium`, 2 workers of one thread each, 8 x 128 bytes a step, in 8 micro-batches where there is a pipeline. The peer is plain
torch over Gloo (peers/torch_split.py) with the same layout and schedule; with several settings of one way, its best.
schedules: every schedule on 2 workers, predicted from a preflight's profile of this very round, against measured.
slowlink: the same between two hosts (network namespaces: Linux, root) at 100 Mbit/s; the schedule that is predicted to be quickest for a
link of the speed that we measure there, against the quickest.

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
from unittest import mock

import msgspec
from harness import PEERS, Sample, machine, ratio, run, save

import weft
from weft.config import Config
from weft.cost import LinkSpeed
from weft.events import Event, read_events
from weft.patterns import pipelined
from weft.patterns.base import Facts
from weft.patterns.pipeline import Pipeline
from weft.patterns.pipelined import Pipelined, choose
from weft.pipelines.choose import Ranked, best
from weft.pipelines.schedules import names
from weft.testing.hosts import hosts, why_not

PARTS = ("memory", "step", "schedules", "slowlink")
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
SMALL_MEMORY = Setup("medium", 4, 0, 3, seq_len=16)


class Ours(NamedTuple):
    """A run of Weft's. ``predicted``: bytes of a worker, by purpose."""

    step_s: float
    peak_bytes: int
    predicted: dict[str, int]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one short round of a little of it: shows that it works")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="these parts alone")
    parser.add_argument("--rounds", type=int, help="repeats of everything (default 5, of memory and slowlink 3)")
    parser.add_argument("--save", action="store_true", help="write bench/results/DATE-split-MACHINE.json and .md")
    parser.add_argument("--facts", help=argparse.SUPPRESS)
    parser.add_argument("--link-member", nargs=2, metavar=("RANK", "ADDRESSES"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.facts:
        tell_facts(json.loads(args.facts))
        return
    if args.link_member:
        measure_link(int(args.link_member[0]), args.link_member[1].split(","))
        return
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
        among = ["1f1b", "zbv"] if args.quick else names()
        figures |= schedules(SMALL if args.quick else MEDIUM, rounds, among, samples, say)
    if "slowlink" in args.only and not args.quick:
        if reason := why_not():
            say(f"slowlink cannot run here: {reason}")
        else:
            figures |= slowlink(SLOW, few, names(), samples, say)
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
    told: dict[str, Any] = json.loads(run(command, env=ENV).splitlines()[-1])
    return told


def weft_run(command: Sequence[str], workers: int, warmup: int) -> Ours:
    with tempfile.TemporaryDirectory(prefix="weft-bench-") as folder:
        place = Path(folder) / "run"
        run([*WEFT, *command, "--workers", str(workers), "--run-dir", str(place)], env={"PYTHONPATH": SOURCE})
        events = list(read_events(place / "events.jsonl"))
        plan = json.loads((place / "plan.json").read_text())
    peak = max((e.values["peak_bytes"] for e in events if e.kind == "memory"), default=0)
    return Ours(step_seconds(events, warmup), peak, plan["members"][0]["memory"])


def step_seconds(events: Sequence[Event], warmup: int) -> float:
    """By worker 0's events: steady state, the median over stretches of steps that were told together."""
    timed = [e for e in events if e.kind == "ticks" and e.member == 0 and e.values["last"] >= max(1, warmup)]
    return statistics.median((b.time - a.time) / (b.values["last"] - a.values["last"]) for a, b in pairwise(timed))


# -- schedules


def schedules(setup: Setup, rounds: int, among: Sequence[str], samples: dict[str, Any], say: Say) -> dict[str, float]:
    predicted: dict[str, list[float]] = {name: [] for name in among}
    measured: dict[str, list[float]] = {name: [] for name in among}
    for _ in range(rounds):
        facts = facts_of(setup)
        for name in among:
            predicted[name].append(first_of(facts, name).step_s)
            command = setup.command("pipeline", "-o", f"schedule={name}")
            measured[name].append(weft_run(command, 2, setup.warmup).step_s)
    samples["schedules"] = {"predicted": predicted, "measured": measured}
    worst = 0.0
    for name in among:
        off = Sample([value - 1 for value in ratio(Sample(predicted[name]), Sample(measured[name])).values])
        say(
            f"schedule {name}: predicted {Sample(predicted[name]).text(1e3, ' ms', 0)}, measured "
            f"{Sample(measured[name]).text(1e3, ' ms', 0)}; predicted / measured - 1 = {off.text(100, ' %', 1)}"
        )
        worst = max(worst, abs(off.median))
    return {"schedule_error_max": round(worst, 3)}


def tell_facts(asked: dict[str, Any]) -> None:
    """As a run's preflight finds them."""
    import torch

    from weft.member import complete
    from weft.patterns.preflight import preflight
    from weft.tasks.codelm import CodeLM

    torch.set_num_threads(1)
    task = CodeLM(**asked["task"])
    config = complete(
        msgspec.convert(
            {"task": {"name": "codelm"}, "workers": 2, "batch": asked["batch"], "steps": 10, "pattern": "pipeline"},
            Config,
        ),
        task.defaults,
    )
    print(msgspec.json.encode(preflight(task, Pipeline(), config)).decode())


def facts_of(setup: Setup) -> Facts:
    asked = json.dumps({"task": setup.task, "batch": setup.batch})
    return msgspec.json.decode(run([sys.executable, __file__, "--facts", asked], env=ENV).splitlines()[-1], type=Facts)


def first_of(facts: Facts, schedule: str) -> Ranked:
    return choose(facts, Pipelined(schedule), 2).ranked[0]


# -- a slow link


def slowlink(setup: Setup, rounds: int, among: Sequence[str], samples: dict[str, Any], say: Say) -> dict[str, float]:
    measured: dict[str, list[float]] = {name: [] for name in among}
    taken: list[str] = []
    predicted: list[dict[str, float]] = []
    links: list[LinkSpeed] = []
    for _ in range(rounds):
        facts, speed = facts_of(setup), link_speed()
        ranked = ranked_for(facts, speed)
        taken.append(best(ranked).schedule.name)
        links.append(speed)
        predicted.append({name: next(r.step_s for r in ranked if r.schedule.name == name) for name in among})
        for name in among:
            measured[name].append(hosts_run(setup, name))
    samples["slowlink"] = {"measured": measured, "predicted": predicted, "taken": taken, "links": links}
    say(
        f"slowlink: 2 hosts at {RATE}, measured {Sample([8e-6 * link.bytes_per_s for link in links]).text(1, ' Mbit/s', 1)}, latency "
        f"{Sample([link.latency_s for link in links]).text(1e6, ' us', 0)}"
    )
    times = {name: Sample(values) for name, values in measured.items()}
    for name in among:
        guess = Sample([each[name] for each in predicted])
        say(f"    {name}: predicted {guess.text(1e3, ' ms', 0)}, measured {times[name].text(1e3, ' ms', 0)}")
    quickest = min(among, key=lambda name: times[name].median)
    choice = statistics.mode(taken)
    regret = times[choice].median / times[quickest].median - 1
    say(f"    taken: {', '.join(taken)}; quickest: {quickest}; {choice} / {quickest} - 1 = {regret:.1%}")
    return {"schedule_regret": round(regret, 3)}


def ranked_for(facts: Facts, speed: LinkSpeed) -> Sequence[Ranked]:
    """What `auto` would see if it knew this link."""
    with mock.patch.object(pipelined, "GIGABIT", speed):
        pipelined._choose.cache_clear()
        ranked = choose(msgspec.structs.replace(facts, between_hosts=True), Pipelined(), 2).ranked
    pipelined._choose.cache_clear()
    return ranked


def hosts_run(setup: Setup, schedule: str) -> float:
    with tempfile.TemporaryDirectory(prefix="weft-bench-") as folder, hosts(2, rate=RATE) as members:
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
            command = [*setup.command("pipeline", "-o", f"schedule={schedule}"), "--insecure", "--run-dir", str(place)]
            with (Path(folder) / f"said-{rank}").open("wb") as said:
                words = [sys.executable, *launcher, "-m", "weft", *command]
                env = dict(os.environ) | ENV | {"GLOO_SOCKET_IFNAME": "eth0"}
                processes.append(host.popen(words, env=env, stdin=subprocess.DEVNULL, stdout=said, stderr=said))
        codes = [process.wait(timeout=600) for process in processes]
        if any(codes):
            raise SystemExit(f"{schedule} on two hosts: exit {codes}: {(Path(folder) / 'said-0').read_text()[-3000:]}")
        return step_seconds(list(read_events(place / "events.jsonl")), setup.warmup)


def link_speed() -> LinkSpeed:
    """Between two such hosts, by the functions of `weft probe`."""
    with hosts(2, rate=RATE) as members:
        addresses = ",".join(host.address for host in members)
        processes = [
            host.popen(
                [sys.executable, __file__, "--link-member", str(rank), addresses],
                env=dict(os.environ) | ENV,
                stdout=subprocess.PIPE,
            )
            for rank, host in enumerate(members)
        ]
        said = [process.communicate(timeout=120)[0] for process in processes]
        if any(process.returncode for process in processes):
            raise SystemExit("the link between two hosts could not be measured")
    return LinkSpeed(*json.loads(said[0]))


def measure_link(rank: int, addresses: Sequence[str]) -> None:
    """One of the two ends; rank 0 prints."""
    import torch

    from weft.comm.collectives import RingLink
    from weft.comm.probe import THOROUGH, measure
    from weft.comm.tcp import TcpEndpoint, listen

    listener = listen(addresses[rank], PORT, insecure=True)
    endpoint = TcpEndpoint(rank, listener, {k: (a, PORT) for k, a in enumerate(addresses)}, deadline_s=60.0)
    link = RingLink(endpoint, rank, len(addresses))
    speed = measure(link, THOROUGH, torch.device("cpu"))
    if rank == 0:
        print(json.dumps(speed), flush=True)
    link.barrier()
    link.close()


if __name__ == "__main__":
    main()
