"""When does training apart pay? Held-out loss by step for several periods, and the time to one loss on links of any speed.

    python bench/local_sgd.py [--quick] [--save]

Loss and step time are measured (codelm tiny, 2 workers on this machine, a thread each); the time on a link of b bit/s is then
steps * step_s + exchanges * (bytes * 8 / b + latency), by the bytes that were counted. --save writes the figures to
bench/results and the picture docs/local_sgd.svg.

Last line: one JSON object. loss_ratio_*: held-out loss at the end / AllReduce's; bytes_ratio_*: bytes sent / AllReduce's.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path

from harness import machine, peer_python, run, save

import weft
from weft.events import read_events
from weft.patterns.base import Pattern

DILOCO = weft.Outer.presets["diloco"]
PATTERNS: dict[str, Pattern] = {
    "allreduce": weft.AllReduce(),
    "every=5": weft.LocalSGD(every=5),
    "every=20": weft.LocalSGD(every=20),
    "every=100": weft.LocalSGD(every=100),
    "diloco every=20": weft.LocalSGD(every=20, outer=DILOCO),
    "diloco every=100": weft.LocalSGD(every=100, outer=DILOCO),
}
LATENCY_S = 1e-3  # of an exchange, on every link
LINKS_BIT_S = [10 ** (k / 8) for k in range(5 * 8, 10 * 8 + 1)]
PICTURE = Path(__file__).parent.parent / "docs" / "local_sgd.svg"


@dataclass
class Measured:
    curve: list[tuple[int, float]]  # (step, held-out loss)
    step_s: float  # of compute and loading
    bytes_per_step: float  # of one worker, exchanges spread evenly
    exchanges_per_step: float

    def seconds(self, steps: float, bits_per_s: float) -> float:
        return steps * (self.step_s + self.bytes_per_step * 8 / bits_per_s + self.exchanges_per_step * LATENCY_S)

    def steps_to(self, loss: float) -> float | None:
        """By straight lines between evaluations; None if it never gets there."""
        before: tuple[int, float] | None = None
        for step, value in self.curve:
            if value <= loss:
                if before is None:
                    return step
                return before[0] + (step - before[0]) * (before[1] - loss) / (before[1] - value)
            before = step, value
        return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a short run of three of them, under a minute")
    parser.add_argument("--save", action="store_true", help="write bench/results and docs/local_sgd.svg")
    args = parser.parse_args()
    steps, names = (100, ["allreduce", "every=20", "diloco every=20"]) if args.quick else (1000, list(PATTERNS))
    where = machine()
    lines = [f"{where['cpu']}, {where['cores']} cores, torch {where['torch']}; codelm tiny, 2 workers, {steps} steps"]
    found: dict[str, Measured] = {}
    for name in names:
        found[name] = measure(PATTERNS[name], steps)
        m = found[name]
        lines.append(
            f"{name:18} held-out {m.curve[-1][1]:.4f}  {m.bytes_per_step / 1e3:8.1f} kB a step from each  {1e3 * m.step_s:.1f} ms"
        )
        print(lines[-1], flush=True)
    base = found["allreduce"]
    step_s = statistics.median(m.step_s for m in found.values())  # all do the same work between exchanges
    for m in found.values():
        m.step_s = step_s
    target = base.curve[len(base.curve) * 2 // 3][1]
    figures: dict[str, float] = {}
    for name, m in found.items():
        key = name.replace(" every=", "_").replace("every=", "every_")
        if name != "allreduce":
            figures[f"loss_ratio_{key}"] = round(m.curve[-1][1] / base.curve[-1][1], 4)
            figures[f"bytes_ratio_{key}"] = round(m.bytes_per_step / base.bytes_per_step, 4)
    times = {
        name: [m.seconds(n, b) for b in LINKS_BIT_S]
        for name, m in found.items()
        if (n := m.steps_to(target)) is not None
    }
    for bits in (1e6, 1e7, 1e8, 1e9):
        k = min(range(len(LINKS_BIT_S)), key=lambda i: abs(LINKS_BIT_S[i] - bits))
        ranked = sorted(times, key=lambda name: times[name][k])
        lines.append(
            f"to {target:.3f} at {bits / 1e6:g} Mbit/s: " + ", ".join(f"{n} {times[n][k]:.0f} s" for n in ranked)
        )
        print(lines[-1], flush=True)
    if args.save:
        data = {
            "curves": {name: m.curve for name, m in found.items()},
            "links": LINKS_BIT_S,
            "times": times,
            "target": target,
            "unit": "nats per byte",
        }
        save("local_sgd", where, lines, {"ratios": figures, **data}, "python bench/local_sgd.py --save")
        with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
            json.dump(data, file)
            file.flush()
            run([peer_python(), str(Path(__file__).parent / "peers" / "draw_local_sgd.py"), file.name, str(PICTURE)])
        print(f"wrote {PICTURE}")
    print(json.dumps(figures))


def measure(pattern: Pattern, steps: int) -> Measured:
    with tempfile.TemporaryDirectory(prefix="weft-bench-") as folder:
        run_dir = Path(folder) / "run"
        weft.run(
            "codelm",
            pattern,
            task_options={"size": "tiny"},
            workers=2,
            steps=steps,
            eval_every=100 if steps > 100 else 20,  # a whole number of periods
            save_every=0,
            run_dir=run_dir,
        )
        events = list(read_events(run_dir / "events.jsonl"))
    ticks = [e.values for e in events if e.kind == "ticks" and e.member == 0]
    own = [(t["compute_s"] + t["data_s"]) / (t["last"] - t["first"] + 1) for t in ticks[1:]]
    every = getattr(pattern, "every", 1)
    return Measured(
        [(e.step, e.values["loss"]) for e in events if e.kind == "eval"],
        statistics.median(own),
        sum(t["bytes_sent"] for t in ticks) / steps,
        1 / every,
    )


if __name__ == "__main__":
    main()
