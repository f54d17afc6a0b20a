"""All-reduce of float32 on one host, 1 KB to 100 MB, 2 and 4 ranks: Weft's shared memory against Gloo, Open MPI and DeepSpeed.

    python bench/allreduce.py [--quick] [--worlds 2 4] [--rounds N] [--save]

All contenders' ranks stay alive through the run, asleep but when it is their turn; a round measures each once, in an order that
turns from round to round. Every call reduces in place a buffer that is kept; every batch of calls begins with a barrier, its time is
that of the slowest rank, its sums are compared with the exact ones on every rank. First each peer is tuned: at each size it is
measured in all its settings, and goes into the rounds with the best. Gloo: torch.distributed.all_reduce, and process groups
of 1, 2 and 4 threads called directly. Open MPI through mpi4py: its algorithms by name, segments of 256 KB, coll/sm, with and without CMA; ranks bound to
cores where there are enough, else yielding when idle. DeepSpeed: the inference_all_reduce op that it builds for CPUs (2 ranks: it
spins without yielding). A peer that is not there is said so, and its figures are null.

Weft's buffers live in the link's heap, as a training run's do; "ordinary" are other tensors, "tcp" is the ring over loopback. "copy" is
the copy limit: two processes that each copy as many bytes at once, numpy to numpy, with no exchange at all.

Last line: one JSON object. vs_*: the peer's time / Weft's (more than 1: Weft is quicker), medians over rounds of the ratio within a
round; *_min: the least over all sizes. of_copy_limit_100MB: the time of the copy / Weft's.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from harness import PEERS, Sample, machine, peer_extra, peer_python, ratio, save

import weft

MEMBER = str(PEERS / "allreduce_member.py")
WEFT_SOURCE = str(Path(weft.__file__).parents[1])
KB, MB = 1 << 10, 1 << 20
SIZES = {
    "1KB": KB,
    "4KB": 4 * KB,
    "16KB": 16 * KB,
    "64KB": 64 * KB,
    "256KB": 256 * KB,
    "1MB": MB,
    "4MB": 4 * MB,
    "25MB": 25 * MB,
    "100MB": 100 * MB,
}
QUICK = ("1KB", "25MB", "100MB")
DEADLINE_S = 120
WANTED = {
    "vs_gloo_1KB": 25,
    "vs_gloo_25MB": 8,
    "vs_gloo_100MB": 5,
    "vs_mpi_min": 1,
    "of_copy_limit_100MB": 0.75,
    "p4_vs_gloo_min": 4,
}

DYNAMIC = ("--mca", "coll_tuned_use_dynamic_rules", "1", "--mca", "coll_tuned_allreduce_algorithm")
MPI_SETTINGS: dict[str, tuple[str, ...]] = {
    "default": (),
    "sm": ("--mca", "coll_sm_priority", "100"),
    "ring 256K": (*DYNAMIC, "5", "--mca", "coll_tuned_allreduce_algorithm_segmentsize", str(256 * KB)),
    "no CMA": ("--mca", "btl_vader_single_copy_mechanism", "none"),
    "recursive doubling": (*DYNAMIC, "3"),
    "ring": (*DYNAMIC, "4"),
    "rabenseifner": (*DYNAMIC, "6"),
}
QUICK_MPI = ("sm", "ring 256K")


class Group:
    """The ranks of one contender, each at the other end of a socket."""

    def __init__(self, command: Sequence[str], world: int, env: dict[str, str] | None = None) -> None:
        self.folder = tempfile.TemporaryDirectory(prefix="weft-bench-")
        place = f"{self.folder.name}/socket"
        self.process: subprocess.Popen[bytes] | None = None
        self.ends: list[Any] = []
        with socket.socket(socket.AF_UNIX) as listener, open(f"{self.folder.name}/said", "wb") as said:
            listener.bind(place)
            listener.listen(world)
            listener.settimeout(1)
            self.process = subprocess.Popen(
                [*command, "--socket", place, "--world", str(world), "--nbytes", str(max(SIZES.values()))],
                env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": WEFT_SOURCE} | (env or {}),
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=said,
                start_new_session=True,
            )
            for _ in range(DEADLINE_S):
                try:
                    end = listener.accept()[0]
                except TimeoutError:
                    if self.process.poll() is None:
                        continue
                    break
                end.settimeout(DEADLINE_S)
                self.ends.append(end.makefile("rw"))
                end.close()
                if len(self.ends) == world:
                    break
        if len(self.ends) < world:
            raise self.failed(f"{len(self.ends)} of {world} ranks came")
        self.ways = self.read()[0]["ways"]

    def failed(self, why: str) -> GroupFailed:
        said = Path(self.folder.name, "said").read_text(errors="replace")[-1500:]
        self.close()
        return GroupFailed(f"{why}\n{said}")

    def read(self) -> list[dict[str, Any]]:
        answers = []
        for end in self.ends:
            line = end.readline()
            answers.append(json.loads(line) if line else {"error": "a rank is gone"})
        if errors := [answer["error"] for answer in answers if "error" in answer]:
            raise self.failed(errors[0])
        return answers

    def measure(self, way: str, nbytes: int, calls: int, batches: int) -> float:
        """Seconds of a call: in each batch those of the slowest rank, and of these the median."""
        for end in self.ends:
            end.write(json.dumps({"way": way, "nbytes": nbytes, "calls": calls, "batches": batches}) + "\n")
            end.flush()
        by_rank = [answer["seconds"] for answer in self.read()]
        return statistics.median(max(batch) for batch in zip(*by_rank, strict=True))

    def close(self) -> None:
        """The ranks leave when their sockets end."""
        for end in self.ends:
            end.close()
        if self.process is not None:
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                os.killpg(self.process.pid, signal.SIGKILL)
                self.process.wait()
        self.folder.cleanup()


class GroupFailed(Exception):
    pass


class Contender:
    """One column: at each size a group and the way in which it does best."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.best: dict[str, tuple[float, Group, str, str]] = {}  # by size: seconds, group, way, the setting in words

    def offer(self, group: Group, way: str, setting: str, sizes: Sequence[str]) -> None:
        """Measure this setting, and keep it where it is the best so far."""
        for size in sizes:
            seconds = group.measure(way, SIZES[size], *effort(SIZES[size], tuning=True))
            if size not in self.best or seconds < self.best[size][0]:
                self.best[size] = (seconds, group, way, setting)

    def measure(self, size: str) -> float:
        _, group, way, _ = self.best[size]
        return group.measure(way, SIZES[size], *effort(SIZES[size]))

    @property
    def groups(self) -> list[Group]:
        return list({id(each[1]): each[1] for each in self.best.values()}.values())


def effort(nbytes: int, tuning: bool = False) -> tuple[int, int]:
    """(calls of a batch, batches). At most 50 calls: 4 ** 50 times the sum is a float32."""
    calls, batches = next(e for most, e in EFFORT.items() if nbytes <= most)
    return (max(1, calls // 2), max(1, batches // 2)) if tuning else (calls, batches)


EFFORT = {64 * KB: (50, 5), MB: (20, 3), 4 * MB: (10, 3), 25 * MB: (4, 2), 100 * MB: (2, 2)}


# -- who takes part


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def weft_group(world: int) -> Group:
    return Group([sys.executable, MEMBER, "weft"], world)


def peer_group(name: str, world: int) -> Group:
    """Each rank is a process; a shell starts them, so that one group is one process group."""
    port = free_port()
    ranks = f'for r in $(seq 0 {world - 1}); do "$0" "$@" --rank $r & done; wait'
    env = {
        "PATH": f"{Path(peer_python()).parent}:{os.environ['PATH']}"
    }  # DeepSpeed builds with the ninja that is there
    try:
        return Group(["bash", "-c", ranks, peer_python(), MEMBER, name, "--port", str(port)], world, env)
    finally:
        if name == "deepspeed":  # it leaves its memory behind
            for left in Path("/dev/shm").glob(f"*weft-bench_{port}_*"):
                left.unlink()


def mpi_group(world: int, setting: Sequence[str]) -> Group:
    enough = world <= len(os.sched_getaffinity(0))
    command = ["mpirun", "-n", str(world), "--oversubscribe", "--bind-to", "core" if enough else "none"]
    command += ["--mca", "btl", "self,vader", *([] if enough else ["--mca", "mpi_yield_when_idle", "1"]), *setting]
    allowed = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    return Group([*command, peer_python(), MEMBER, "mpi"], world, allowed)


def gather(world: int, sizes: Sequence[str], quick: bool, say: Callable[[str], None]) -> dict[str, Contender]:
    """All that take part, tuned, by name."""
    contenders = {name: Contender(name) for name in ("weft", "ordinary", "tcp", "copy", "gloo", "mpi", "deepspeed")}
    ours = weft_group(world)
    for name, way in (("weft", "heap"), ("ordinary", "ordinary"), ("tcp", "tcp"), ("copy", "copy")):
        contenders[name].offer(ours, way, way, sizes)
    gloo = peer_group("gloo", world)
    for way in gloo.ways[:2] if quick else gloo.ways:
        contenders["gloo"].offer(gloo, way, way, sizes)
    if absent := "there is no mpirun" if shutil.which("mpirun") is None else peer_extra("mpi"):
        say(f"Open MPI does not take part, its figures are null: {absent}")
    else:
        for setting in QUICK_MPI if quick else MPI_SETTINGS:
            group = mpi_group(world, MPI_SETTINGS[setting])
            contenders["mpi"].offer(group, "mpi", setting, sizes)
            if group not in contenders["mpi"].groups:
                group.close()
    if world == 2:
        absent = "there is no g++" if shutil.which("g++") is None else peer_extra("deepspeed")
        try:
            if absent:
                raise GroupFailed(absent)
            contenders["deepspeed"].offer(peer_group("deepspeed", world), "deepspeed", "", sizes)
        except GroupFailed as error:
            say(f"DeepSpeed does not take part, its figures are null: {error}")
    for name in ("gloo", "mpi"):
        if contenders[name].best:
            chosen = ", ".join(f"{size} {contenders[name].best[size][3]}" for size in sizes)
            say(f"    best settings of {name}: {chosen}")
    return {name: contender for name, contender in contenders.items() if contender.best}


# -- the bench


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a round of three sizes, fewer settings, under a minute")
    parser.add_argument("--worlds", nargs="+", type=int, choices=[2, 4], default=[2, 4], help="numbers of ranks")
    parser.add_argument("--rounds", type=int, help="repeats of everything (default 7; 1 with --quick)")
    parser.add_argument("--save", action="store_true", help="write bench/results")
    args = parser.parse_args()
    rounds = args.rounds or (1 if args.quick else 7)
    sizes = QUICK if args.quick else tuple(SIZES)
    where = machine()
    lines: list[str] = []

    def say(line: str) -> None:
        print(line, flush=True)
        lines.append(line)

    say(
        f"{where['cpu']}, {where['cores']} cores, torch {where['torch']}, {rounds} rounds; us, median [least..greatest]"
    )
    figures: dict[str, Any] = dict.fromkeys(WANTED)
    samples: dict[int, Any] = {}
    for world in args.worlds:
        say(f"{world} ranks")
        contenders = gather(world, sizes, args.quick, say)
        try:
            times = measure(list(contenders.values()), sizes, rounds)
        finally:
            for contender in contenders.values():
                for group in contender.groups:
                    group.close()
        samples[world] = {name: {size: each.values for size, each in of.items()} for name, of in times.items()}
        figures |= report(world, times, sizes, say)
    for name, wanted in WANTED.items():
        if figures[name] is not None and figures[name] < wanted:
            say(f"{name} falls short: {figures[name]}, wanted {wanted}")
    if args.save:
        found = {"ratios": figures, "seconds": samples}
        for path in save("allreduce", where, lines, found, " ".join(["python", *sys.argv])):
            print(f"wrote {path}")
    print(json.dumps(figures))


def measure(contenders: Sequence[Contender], sizes: Sequence[str], rounds: int) -> dict[str, dict[str, Sample]]:
    """Seconds of a call, by contender and size; a value for each round."""
    seconds: dict[str, dict[str, list[float]]] = {each.name: {size: [] for size in sizes} for each in contenders}
    for number in range(rounds):
        first = number % len(contenders)
        for size in sizes:
            for contender in (*contenders[first:], *contenders[:first]):
                seconds[contender.name][size].append(contender.measure(size))
    return {name: {size: Sample(values) for size, values in of.items()} for name, of in seconds.items()}


def report(
    world: int, times: dict[str, dict[str, Sample]], sizes: Sequence[str], say: Callable[[str], None]
) -> dict[str, Any]:
    ours = times["weft"]
    for size in sizes:
        gained = []
        for name, of in times.items():
            if name == "weft":
                continue
            gained.append(f"{name} {of[size].text(1e6, digits=1)}: {ratio(of[size], ours[size]).median:.2f}x")
        say(f"{size:>6}: weft {ours[size].text(1e6, digits=1)}; " + "; ".join(gained))

    def over(name: str, size: str, mine: dict[str, Sample] = ours) -> float | None:
        return round(ratio(times[name][size], mine[size]).median, 2) if name in times else None

    def least(name: str) -> float | None:
        return min(over(name, size) or 0 for size in sizes) if name in times else None

    prefix = "" if world == 2 else f"p{world}_"
    found: dict[str, Any] = {f"{prefix}vs_gloo_{size}": over("gloo", size) for size in ("1KB", "25MB", "100MB")}
    found |= {f"{prefix}vs_gloo_min": least("gloo"), f"{prefix}vs_mpi_min": least("mpi")}
    found[f"{prefix}of_copy_limit_100MB"] = over("copy", "100MB")
    if world == 2:
        found["vs_deepspeed_min"] = least("deepspeed")
    found[f"{prefix}tcp_vs_gloo"] = {size: over("gloo", size, times["tcp"]) for size in sizes}
    return found


if __name__ == "__main__":
    main()
