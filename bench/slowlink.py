"""Training between hosts on slow links: Weft with compression against torch DDP and its hooks, to the same held-out loss.

    python bench/slowlink.py [--quick | --steps-only] [--hosts 2 4] [--only PART ...] [--fresh] [--save]

Hosts are network namespaces of this machine at 100 Mbit/s (weft.testing.hosts: Linux, root), one worker and one torch thread on
each, under torchrun. The task is `codelm -t size=wire`: 25 MB of gradients, one sequence of 16 bytes per worker. All sides have
the same model, first weights, order of data, optimizer, schedule (300 steps) and held-out windows.

end to end: seconds from starting torchrun until the held-out loss is what DDP fp32 has after step 150 (earlier the model sits
on the plateau of byte frequencies). Every side evaluates every 10 steps, on the clock. --quick (2 hosts, about a minute) and
--steps-only time some steps instead and say so: without start-up and evaluation, and after a sparsifier's warm-up.
losses: after all 300 steps, three seeds, at full speed on one host (the network does not touch them).
overlap: uncompressed, gradients that leave during backward against after it, also at 1 Gbit/s and with larger models.
ring: our uncompressed ring over TCP against 2(p-1)a + 2(p-1)/p n b, with a and b measured between two of the hosts.

A whole bench takes most of an hour. Each measurement is kept in runs/slowlink as soon as it is done, and not made again;
--fresh forgets them. Last line: one JSON object. vs_*: the peer's seconds / Weft's, compressed by OURS. bytes_ratio: bytes that
left a host on the way to that loss, DDP's / Weft's, as the kernel counted, the least over numbers of hosts. loss_gap: held-out
loss at the end / DDP's - 1, mean over seeds. formula_error: the greatest over numbers of hosts.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from harness import PEERS, machine, peer_python, run, save

import weft
from weft.events import read_events
from weft.testing.hosts import Host, hosts, why_not

RATE = "100mbit"
TASK, TARGET = "weft.tasks.codelm:CodeLM", "codelm"
STEPS, TARGET_STEP, EVAL_EVERY = 300, 150, 10
WORLDS = (2, 4)
SEEDS = (0, 1, 2)
OURS = "weft powersgd:4:0"  # no warm-up: its bytes would be most of all
DDP, FP16 = "ddp", "ddp fp16"
SIDES = (DDP, FP16, "ddp powersgd:4", OURS, "weft topk:0.01")
MAY_FAIL = ("ddp powersgd:4",)  # torch's hook does not survive everywhere
PARTS = ("ring", "time", "losses", "overlap")
PARTIAL = Path(__file__).parent.parent / "runs" / "slowlink"
SOURCE = str(Path(weft.__file__).parents[1])
ENV = {"OMP_NUM_THREADS": "1", "PYTHONPATH": SOURCE, "GLOO_SOCKET_IFNAME": "eth0"}
PORT = 29400
SILENCE_S = 90.0  # without a step: a side has hung
OVERLAP = (("100mbit", "small", 8, 9), ("1gbit", "small", 8, 18), ("1gbit", "medium", 4, 9))
RING_NUMEL = 6_250_000  # 25 MB
Say = Callable[[str], None]


class Setup(NamedTuple):
    """Hosts, their network, and what is trained on them. ``share``: sequences of a worker and step."""

    world: int
    rate: str = RATE
    size: str = "wire"
    share: int = 1
    options: tuple[str, ...] = ()  # more of them, for Weft


@dataclass
class Timed:
    """``marks``: (step, seconds since the command was started, held-out loss if it was evaluated)."""

    side: str
    world: int
    marks: list[tuple[int, float, float | None]] = field(default_factory=list)
    sent: float = 0.0  # bytes that a host sent, on average, from the end of step 1 to the end
    failed: str = ""

    def seconds_to(self, loss: float) -> float | None:
        return next((s for _, s, held_out in self.marks if held_out is not None and held_out <= loss), None)

    def bytes_to(self, loss: float) -> float:
        steps = next(step for step, _, held_out in self.marks if held_out is not None and held_out <= loss)
        return self.bytes_per_step * (steps - 1)

    def step_s(self, after: int) -> float:
        """Median over steps later than ``after``; where several steps were told together, their mean."""
        told = [(step, s) for step, s, held_out in self.marks if held_out is None and step >= after]
        return statistics.median((b[1] - a[1]) / (b[0] - a[0]) for a, b in pairwise(told))

    @property
    def bytes_per_step(self) -> float:
        return self.sent / max(1, self.marks[-1][0] - 1)


class Failed(Exception):
    pass


# -- one side on hosts


def on_hosts(
    side: str, setup: Setup, steps: int, until_step: int, until_loss: float = float("-inf"), eval_every: int = 0
) -> Timed:
    """Run one side until it has come to ``until_loss`` or ``until_step``; ``steps``: what its schedule is made for."""
    world, eval_every = setup.world, eval_every or until_step
    timed = Timed(side, world)
    with ExitStack() as at_end:
        folder = Path(at_end.enter_context(tempfile.TemporaryDirectory(prefix="weft-bench-")))
        members = at_end.enter_context(hosts(world, rate=setup.rate))
        begun = time.time()
        processes = list(start(side, setup, members, folder, steps, until_step, until_loss, eval_every))
        read = read_weft if side.startswith("weft") else read_peer
        told, heard, sent_before = begun, begun, [0] * world
        while True:
            new = read(folder)[len(timed.marks) :]
            for step, at, loss in new:
                if not timed.marks:
                    sent_before = [bytes_sent(p.pid) for p in processes]
                timed.marks.append((step, at - begun, loss))
            if new:
                heard = time.time()
                timed.sent = statistics.mean(bytes_sent(p.pid) - b for p, b in zip(processes, sent_before, strict=True))
            if timed.marks and is_over(timed.marks[-1], until_step, until_loss):
                break
            if timed.marks and time.time() - told > 15:
                told = time.time()
                step, seconds, _ = timed.marks[-1]
                print(f"    {side}, {world} hosts: step {step} after {seconds:.0f} s", flush=True)
            ended = [p.poll() for p in processes]
            if any(code is not None for code in ended) or time.time() - heard > SILENCE_S:
                why = f"exit {ended}" if any(code is not None for code in ended) else f"no step for {SILENCE_S:g} s"
                timed.failed = f"{why}: {(folder / 'err-0').read_text()[-2000:]}"
                break
            time.sleep(0.05)
    if timed.failed and side not in MAY_FAIL:
        raise SystemExit(f"{side} on {world} hosts failed: {timed.failed}")
    return timed


def is_over(mark: tuple[int, float, float | None], until_step: int, until_loss: float) -> bool:
    step, _, loss = mark
    return loss is not None and (step >= until_step or loss <= until_loss)


def start(
    side: str,
    setup: Setup,
    members: Sequence[Host],
    folder: Path,
    steps: int,
    until_step: int,
    until_loss: float,
    eval_every: int,
) -> Iterator[subprocess.Popen[bytes]]:
    ours, compress = side.startswith("weft"), side.partition(" ")[2] or "none"
    for rank, host in enumerate(members):
        launcher = ["-m", "torch.distributed.run", "--nnodes", str(len(members)), "--nproc-per-node", "1"]
        launcher += ["--node-rank", str(rank), "--master-addr", members[0].address, "--master-port", str(PORT)]
        if ours:
            command = [
                sys.executable,
                *launcher,
                "-m",
                "weft",
                *weft_command(compress, setup, steps, eval_every),
            ]
            command += ["--insecure", "--run-dir", str(folder / "run")]
        else:
            command = [peer_python(), *launcher, *peer_command(compress, setup, steps, until_step, eval_every)]
            command.append(f"--until-loss={until_loss}")  # may be -inf
        with (folder / f"out-{rank}").open("wb") as out, (folder / f"err-{rank}").open("wb") as err:
            yield host.popen(command, env=environment(), stdin=subprocess.DEVNULL, stdout=out, stderr=err)


def weft_command(compress: str, setup: Setup, steps: int, eval_every: int, seed: int = 0) -> list[str]:
    options = ["-t", f"size={setup.size}", *setup.options]
    sizes = [
        "--batch",
        str(setup.share * setup.world),
        "--steps",
        str(steps),
        "--eval-every",
        str(eval_every),
        "--seed",
        str(seed),
    ]
    return ["run", TARGET, *options, *sizes, "--compress", compress, "--save-every", "0"]


def peer_command(hook: str, setup: Setup, steps: int, until_step: int, eval_every: int, seed: int = 0) -> list[str]:
    sizes = [
        "--batch",
        str(setup.share * setup.world),
        "--steps",
        str(steps),
        "--until-step",
        str(until_step),
        "--seed",
        str(seed),
    ]
    what = [str(PEERS / "slow_link.py"), TASK, "--options", json.dumps({"size": setup.size}), "--hook", hook]
    return [*what, *sizes, "--eval-every", str(eval_every)]


def environment() -> dict[str, str]:
    import os

    return dict(os.environ) | ENV


def read_weft(folder: Path) -> list[tuple[int, float, float | None]]:
    path = folder / "run" / "events.jsonl"
    if not path.exists():
        return []
    marks: list[tuple[int, float, float | None]] = []
    for event in read_events(path):
        if event.kind == "ticks" and event.member == 0:
            marks.append((event.values["last"], event.time, None))
        elif event.kind == "eval":
            marks.append((event.step, event.time, event.values["loss"]))
    return marks


def read_peer(folder: Path) -> list[tuple[int, float, float | None]]:
    lines = (folder / "out-0").read_bytes().split(b"\n")[:-1]
    told = [json.loads(line) for line in lines if line.startswith(b"{")]
    return [(t["step"], t["time"], t.get("loss")) for t in told]


def bytes_sent(pid: int) -> int:
    """By the interface of the host that the process is on."""
    for line in Path(f"/proc/{pid}/net/dev").read_text().splitlines():
        name, _, counters = line.partition(":")
        if name.strip() == "eth0":
            return int(counters.split()[8])
    raise Failed(f"process {pid} sees no eth0")


# -- losses at equal steps


def final_loss(side: str, world: int, seed: int) -> float:
    """After all steps, on this host."""
    compress = side.partition(" ")[2] or "none"
    if side.startswith("weft"):
        with tempfile.TemporaryDirectory(prefix="weft-bench-") as folder:
            place = Path(folder) / "run"
            command = [sys.executable, "-m", "weft", *weft_command(compress, Setup(world), STEPS, STEPS, seed)]
            run([*command, "--workers", str(world), "--run-dir", str(place), "--json"], env={"PYTHONPATH": SOURCE})
            return float(next(e.values["loss"] for e in read_events(place / "events.jsonl") if e.kind == "eval"))
    launcher = [peer_python(), "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world)]
    env = {key: value for key, value in ENV.items() if key != "GLOO_SOCKET_IFNAME"}
    said = run([*launcher, *peer_command(compress, Setup(world), STEPS, STEPS, STEPS, seed)], env=env)
    return float(json.loads(said.splitlines()[-1])["loss"])


# -- the ring


def ring_member(rank: int, addresses: Sequence[str]) -> None:
    """One rank: what a small frame and a large one take between ranks 0 and 1, then the ring. Rank 0 prints the figures."""
    import torch

    from weft.comm.collectives import RingLink
    from weft.comm.tcp import TcpEndpoint, listen
    from weft.comm.wire import Meta

    world = len(addresses)
    payload = torch.zeros(RING_NUMEL)
    data, meta = memoryview(payload.numpy()).cast("B"), Meta("measure")

    def join(members: Sequence[str], port: int) -> TcpEndpoint:
        listener = listen(addresses[rank], port, insecure=True)
        return TcpEndpoint(rank, listener, {k: (a, port) for k, a in enumerate(members)}, deadline_s=60.0)

    def one_way(endpoint: TcpEndpoint, num_bytes: int, repeats: int) -> float:
        """Seconds of a frame of so many bytes, answered by an empty one."""
        took = []
        for number in range(repeats):
            begin = time.perf_counter()
            if rank == 0:
                endpoint.send(1, number, meta, [data[:num_bytes]])
            endpoint.recv_any(place=lambda head: [data[: head.payload_bytes]])
            if rank == 1:
                endpoint.send(0, number, meta)
            took.append(time.perf_counter() - begin)
        return statistics.median(took)

    alpha = beta = 0.0
    if rank < 2:
        pair = join(addresses[:2], PORT + 1)
        both_ways, large = one_way(pair, 0, 50), one_way(pair, payload.nbytes, 3)
        alpha, beta = both_ways / 2, (large - both_ways) / payload.nbytes
        pair.close()
    endpoint = join(addresses, PORT)
    link = RingLink(endpoint, rank, world)
    took = []
    for _ in range(4):
        link.barrier()
        begin = time.perf_counter()
        link.all_reduce([payload])
        took.append(time.perf_counter() - begin)
    if rank == 0:
        formula = 2 * (world - 1) * alpha + 2 * (world - 1) / world * payload.nbytes * beta
        print(
            json.dumps({"alpha_s": alpha, "bytes_per_s": 1 / beta, "formula_s": formula, "took_s": min(took[1:])}),
            flush=True,
        )
    link.barrier()
    link.close()


def ring(world: int) -> dict[str, float]:
    with hosts(world, rate=RATE) as members:
        addresses = ",".join(host.address for host in members)
        processes = [
            host.popen(
                [sys.executable, __file__, "--ring-member", str(rank), addresses],
                env=environment(),
                stdout=subprocess.PIPE,
            )
            for rank, host in enumerate(members)
        ]
        out = [p.communicate(timeout=240)[0] for p in processes]
        if any(p.returncode for p in processes):
            raise SystemExit(f"the ring of {world} hosts failed")
    found: dict[str, float] = json.loads(out[0])
    return found


# -- all of it


class Kept:
    """Measurements by name, each in a file of its own as soon as it is made."""

    def __init__(self, say: Say) -> None:
        self.say = say
        self.commit = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=PEERS
        ).stdout.strip()

    def __call__(self, name: str, measure: Callable[[], Any]) -> Any:
        path = PARTIAL / f"{name.replace(' ', '_').replace(':', '')}.json"
        if not path.exists():
            print(f"  measuring {name}", flush=True)
            PARTIAL.mkdir(parents=True, exist_ok=True)
            text = json.dumps({"commit": self.commit, "value": measure()})
            path.with_suffix(".part").write_text(text)
            path.with_suffix(".part").rename(path)
            return json.loads(text)["value"]
        kept = json.loads(path.read_text())
        age = (time.time() - path.stat().st_mtime) / 60
        self.say(f"  kept {name}: {age:.0f} min old, commit {kept['commit'] or 'unknown'}")
        return kept["value"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="2 hosts, a minute: steps only, nothing is kept")
    parser.add_argument("--steps-only", action="store_true", help="times steps instead of whole runs, and says so")
    parser.add_argument("--hosts", type=int, nargs="+", choices=WORLDS, default=WORLDS)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=SIDES, help="time these, to go on later")
    parser.add_argument("--fresh", action="store_true", help="forget what runs/slowlink holds")
    parser.add_argument("--save", action="store_true", help="write bench/results")
    parser.add_argument("--ring-member", nargs=2, metavar=("RANK", "ADDRESSES"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.ring_member:
        ring_member(int(args.ring_member[0]), args.ring_member[1].split(","))
        return
    if reason := why_not():
        raise SystemExit(f"slowlink cannot run here: {reason}.")
    if args.fresh:
        shutil.rmtree(PARTIAL, ignore_errors=True)
    where = machine()
    lines: list[str] = []

    def say(line: str) -> None:
        print(line, flush=True)
        lines.append(line)

    say(f"{where['cpu']}, {where['cores']} cores for all hosts, torch {where['torch']}, {RATE} both ways")
    figures: dict[str, float] = {}
    if args.quick:
        figures = steps_only([2], (DDP, FP16, OURS), (4, 20), lambda name, measure: measure(), say)
    else:
        kept = Kept(say)
        if "ring" in args.only:
            figures |= report_ring(args.hosts, kept, say)
        if "time" in args.only and args.steps_only:
            figures |= steps_only(args.hosts, args.sides, (8, 40), kept, say)
        elif "time" in args.only:
            figures |= end_to_end(args.hosts, args.sides, kept, say)
        if "overlap" in args.only:
            figures |= report_overlap(kept, say)
        if "losses" in args.only:
            figures |= report_losses(args.hosts, args.sides, kept, say)
    if args.save:
        for path in save("slowlink", where, lines, {"ratios": figures}, " ".join(["python", *sys.argv])):
            print(f"wrote {path}")
    print(json.dumps(figures))


def report_ring(worlds: Sequence[int], kept: Callable[..., Any], say: Say) -> dict[str, float]:
    errors = []
    for world in worlds:
        r = kept(f"ring {world}", lambda world=world: ring(world))
        errors.append(abs(r["took_s"] / r["formula_s"] - 1))
        say(
            f"ring of {world}, {4 * RING_NUMEL / 1e6:.0f} MB: {r['took_s']:.3f} s, by formula {r['formula_s']:.3f} s "
            f"(a {1e6 * r['alpha_s']:.0f} us, {8e-6 * r['bytes_per_s']:.1f} Mbit/s measured): off by {errors[-1]:.1%}"
        )
    return {"formula_error": round(max(errors), 4)}


def end_to_end(worlds: Sequence[int], sides: Sequence[str], kept: Callable[..., Any], say: Say) -> dict[str, float]:
    figures: dict[str, float] = {}
    ratios = []
    for world in worlds:
        found: dict[str, Timed] = {}
        target = float("-inf")
        for side in [DDP, *(s for s in sides if s != DDP)]:
            until = TARGET_STEP if side == DDP else STEPS
            timed = Timed(
                **kept(
                    f"time {world} {side}",
                    lambda side=side, until=until, target=target, world=world: asdict(
                        on_hosts(side, Setup(world), STEPS, until, target, EVAL_EVERY)
                    ),
                )
            )
            found[side] = timed
            if side == DDP:
                target = next(loss for step, _, loss in timed.marks if step == TARGET_STEP and loss is not None)
            say(describe(timed, target))
        base = found[DDP].seconds_to(target)  # held-out losses rise and fall: it may have been there before that step
        assert base is not None
        for side, timed in found.items():
            seconds = timed.seconds_to(target)
            if not side.startswith("weft") or timed.failed or seconds is None:
                continue
            name = "" if side == OURS else f"_{side.split(' ', 1)[1].partition(':')[0]}"
            figures[f"vs_ddp_{world}hosts{name}"] = round(base / seconds, 2)
            if FP16 in found and (fp16 := found[FP16].seconds_to(target)) is not None:
                figures[f"vs_fp16_{world}hosts{name}"] = round(fp16 / seconds, 2)
            if side == OURS:
                ratios.append(found[DDP].bytes_to(target) / timed.bytes_to(target))
    if ratios:
        figures["bytes_ratio"] = round(min(ratios), 1)
    return figures


def describe(timed: Timed, target: float) -> str:
    head = f"{timed.world} hosts, {timed.side}: "
    if timed.failed:
        return head + "failed, " + timed.failed.strip().splitlines()[-1][:200]
    seconds = timed.seconds_to(target)
    step, _, loss = timed.marks[-1]
    reached = (
        f"{seconds:.1f} s to {target:.4f}, step {step}" if seconds is not None else f"not at {target:.4f} ({loss})"
    )
    return (
        f"{head}{reached}; first step after {timed.marks[0][1]:.1f} s, {timed.step_s(1):.3f} s a step (median), "
        f"{timed.bytes_per_step / 1e6:.2f} MB a step from each host"
    )


def steps_only(
    worlds: Sequence[int], sides: Sequence[str], steps: tuple[int, int], kept: Callable[..., Any], say: Say
) -> dict[str, float]:
    """``steps``: of the peers, and of Weft, whose steps are shorter. The later half counts."""
    say("steps only: no start-up, no evaluation, no warm-up; not the time to a loss")
    figures: dict[str, float] = {}
    for world in worlds:
        found: dict[str, float] = {}
        for side in sides:
            num = steps[side.startswith("weft")]
            timed = Timed(
                **kept(
                    f"steps {world} {side}",
                    lambda side=side, num=num, world=world: asdict(on_hosts(side, Setup(world), num, num)),
                )
            )
            if timed.failed:
                say(describe(timed, 0.0))
                continue
            found[side] = timed.step_s(num // 2)
            say(
                f"{world} hosts, {side}: {found[side]:.3f} s a step, {timed.bytes_per_step / 1e6:.2f} MB from each host"
            )
        for side in (s for s in found if s.startswith("weft")):
            name = "" if side == OURS else f"_{side.split(' ', 1)[1].partition(':')[0]}"
            for peer, short in ((DDP, "ddp"), (FP16, "fp16")):
                if peer in found:
                    figures[f"steps_vs_{short}_{world}hosts{name}"] = round(found[peer] / found[side], 2)
    return figures


def report_overlap(kept: Callable[..., Any], say: Say) -> dict[str, float]:
    """Weft uncompressed, whose gradients leave during backward, against itself, whose gradients leave after it."""
    figures: dict[str, float] = {}
    for rate, size, share, num in OVERLAP:
        step_s = {}
        for overlap in ("off", "on"):
            setup = Setup(2, rate, size, share, ("-o", f"overlap={overlap}", "-t", "test_windows=2"))
            timed = Timed(
                **kept(
                    f"overlap {rate} {size} {overlap}",
                    lambda setup=setup, num=num: asdict(on_hosts("weft none", setup, num, num)),
                )
            )
            step_s[overlap] = timed.step_s(num // 3)
        gain = step_s["off"] / step_s["on"]
        figures[f"overlap_{size}_{rate}"] = round(gain, 3)
        say(
            f"2 hosts at {rate}, {size}, {share} sequences each, uncompressed: {step_s['off']:.3f} s a step, with overlap "
            f"{step_s['on']:.3f} s: {gain:.2f} times as fast"
        )
    return figures


def report_losses(worlds: Sequence[int], sides: Sequence[str], kept: Callable[..., Any], say: Say) -> dict[str, float]:
    figures: dict[str, float] = {}
    for side in (s for s in sides if s.startswith("weft")):
        gaps = []
        for world in worlds:
            ends = {
                who: [
                    kept(f"loss {world} {who} {seed}", lambda w=who, n=world, s=seed: final_loss(w, n, s))
                    for seed in SEEDS
                ]
                for who in (DDP, side)
            }
            means = {who: statistics.mean(losses) for who, losses in ends.items()}
            gaps.append(means[side] / means[DDP] - 1)
            say(
                f"after {STEPS} steps, {world} workers, {len(SEEDS)} seeds: {side} {means[side]:.4f}, DDP {means[DDP]:.4f}: "
                f"{gaps[-1]:+.2%}"
            )
        name = "" if side == OURS else f"_{side.split(' ', 1)[1].partition(':')[0]}"
        figures[f"loss_gap{name}"] = round(max(gaps), 4)
    return figures


if __name__ == "__main__":
    main()
