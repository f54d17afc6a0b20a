"""What does compression cost in loss? Held-out loss by step under each codec, and the digits that are read rightly.

    python bench/compression.py [--quick] [--save] [--runs FOLDER]

codelm small, 300 steps of the task's own AdamW and schedule, 2 workers, 3 seeds; each codec's loss at the end is compared with
that of the uncompressed run of the same seed. digits: the default 15 epochs, 2 workers, 3 seeds. Nothing is timed, so a busy
machine does no harm. --runs keeps the runs in FOLDER, and takes from it what is there: an hour's work can be stopped and gone on
with. --quick shows that it works: codelm tiny, one seed, 60 steps, three codecs each; its gaps mean nothing.

Last line: one JSON object. *_gap: mean over seeds of held-out loss / uncompressed - 1; digits_min: the least mean over seeds of
all codecs' accuracies.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness import machine, peer_python, run, save

import weft
from weft.events import read_events

NONE = "none"
CODELM = [NONE, "int8", "topk:0.01", "sign", "powersgd:4"]
#: of random-k and random blocks the least ratio that is held to the goal (docs/compression.md)
DIGITS = [
    NONE, "bf16", "fp16", "int8", "qsgd", "qsgd:7", "sign", "topk:0.01", "dgc:0.01", "randomk:0.5", "blocks:0.5", "powersgd:4", "powersgd:1",
]  # fmt: skip
SEEDS = [0, 1, 2]
WORKERS = 2
PICTURE = Path(__file__).parent.parent / "docs" / "compression.svg"


@dataclass(frozen=True)
class Trained:
    curve: list[tuple[int, float]]  # (step, held-out loss)
    accuracy: float
    bytes_sent: int  # of both workers

    @property
    def loss(self) -> float:
        return self.curve[-1][1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a short run of some of them, under a minute")
    parser.add_argument("--save", action="store_true", help="write bench/results and docs/compression.svg")
    parser.add_argument("--runs", type=Path, help="keep the runs here, and take from here those that are done")
    args = parser.parse_args()
    where = machine()
    lines: list[str] = []

    def say(line: str) -> None:
        print(line, flush=True)
        lines.append(line)

    say(f"{where['cpu']}, {where['cores']} cores, torch {where['torch']}; {WORKERS} workers")
    if args.quick:
        say("quick: codelm tiny for 60 steps with one seed, and three codecs: no gap here means anything")
    with tempfile.TemporaryDirectory(prefix="weft-bench-") as folder:
        runs = args.runs or Path(folder)
        seeds, codelm, digits = (SEEDS[:1], CODELM[:3], DIGITS[:4]) if args.quick else (SEEDS, CODELM, DIGITS)
        options, steps = ({"size": "tiny"}, 60) if args.quick else ({"size": "small"}, 300)
        found: dict[str, list[Trained]] = {compress: [] for compress in codelm}
        for seed in seeds:  # all codecs with one seed, then the next: what is there can be compared
            for compress in codelm:
                found[compress].append(
                    trained(runs, "codelm", compress, seed, task_options=options, steps=steps, eval_every=steps // 6)
                )
                say(f"codelm {compress:10} seed {seed}: {found[compress][-1].loss:.4f}")
        figures = compared(found, say)
        accuracies: dict[str, float] = {}
        for compress in digits:
            each = [trained(runs, "digits", compress, seed).accuracy for seed in seeds]
            accuracies[compress] = statistics.mean(each)
            say(f"digits {compress:12} {accuracies[compress]:.4f} [{min(each):.4f}..{max(each):.4f}]")
    figures["digits_min"] = round(min(accuracies.values()), 4)
    if args.save:
        curves = {compress: [t.curve for t in each] for compress, each in found.items()}
        data = {"ratios": figures, "curves": curves, "digits": accuracies, "seeds": seeds}
        save("compression", where, lines, data, "python bench/compression.py --save")
        draw(curves)
        print(f"wrote {PICTURE}")
    print(json.dumps(figures))


def compared(found: dict[str, list[Trained]], say: Any) -> dict[str, float]:
    """Seed by seed: runs of one seed begin with the same model and see the same examples."""
    figures: dict[str, float] = {}
    base = found[NONE]
    for compress, each in found.items():
        losses = [t.loss for t in each]
        gaps = [t.loss / b.loss - 1 for t, b in zip(each, base, strict=True)]
        fewer = statistics.mean(b.bytes_sent for b in base) / statistics.mean(t.bytes_sent for t in each)
        say(
            f"codelm {compress:10} {statistics.mean(losses):.4f} [{min(losses):.4f}..{max(losses):.4f}]  "
            f"gap {statistics.mean(gaps):+.2%} [{min(gaps):+.2%}..{max(gaps):+.2%}]  bytes 1/{fewer:.1f}"
        )
        if compress != NONE:
            name = compress.partition(":")[0]
            figures |= {f"{name}_gap": round(statistics.mean(gaps), 4), f"{name}_bytes": round(1 / fewer, 4)}
    return figures


def trained(runs: Path, task: str, compress: str, seed: int, **settings: Any) -> Trained:
    run_dir = runs / f"{task}-{compress.replace(':', '_')}-{seed}"
    if not (run_dir / "result.json").exists():
        shutil.rmtree(run_dir, ignore_errors=True)  # of a bench that was stopped
        pattern = weft.AllReduce(compress=compress)
        weft.run(task, pattern, workers=WORKERS, seed=seed, save_every=0, run_dir=run_dir, **settings)
    result = json.loads((run_dir / "result.json").read_text())
    evaluated = [e for e in read_events(run_dir / "events.jsonl") if e.kind == "eval"]
    return Trained(
        [(e.step, e.values["loss"]) for e in evaluated], evaluated[-1].values["accuracy"], result["bytes_sent"]
    )


def draw(curves: dict[str, list[list[tuple[int, float]]]]) -> None:
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(curves, file)
        file.flush()
        run([peer_python(), str(Path(__file__).parent / "peers" / "draw_compression.py"), file.name, str(PICTURE)])


if __name__ == "__main__":
    sys.exit(main())
