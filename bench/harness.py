"""What every bench shares: medians with their spread, the machine in words, dated result files."""

from __future__ import annotations

import datetime
import json
import os
import platform
import re
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
PEERS = Path(__file__).parent / "peers"


@dataclass(frozen=True)
class Sample:
    """Repeats of one figure."""

    values: Sequence[float]

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    def text(self, scale: float = 1, unit: str = "", digits: int = 2) -> str:
        """Median, and the least and greatest in brackets."""
        low, high = min(self.values) * scale, max(self.values) * scale
        return f"{self.median * scale:.{digits}f}{unit} [{low:.{digits}f}..{high:.{digits}f}]"


def ratio(of: Sample, over: Sample) -> Sample:
    """Round by round: the two figures of a round saw the same state of a shared machine."""
    return Sample([a / b for a, b in zip(of.values, over.values, strict=True)])


def run(command: Sequence[str], env: dict[str, str] | None = None, timeout_s: float = 600) -> str:
    """Standard output of a command that ended well; else an error with the end of what it said."""
    done = subprocess.run(
        command,
        env=os.environ | (env or {}),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    if done.returncode:
        said = (done.stderr or done.stdout)[-3000:]
        raise SystemExit(f"exit status {done.returncode} of: {' '.join(command)}\n{said}")
    return done.stdout


def peer_python() -> str:
    """The interpreter of the peers' own environment, made the first time from bench/peers/requirements.txt."""
    place, wanted = PEERS / ".venv", (PEERS / "requirements.txt").read_text()
    ready = place / ".ready"
    if not ready.exists() or ready.read_text() != wanted:
        run([sys.executable, "-m", "venv", "--clear", str(place)])
        python = str(place / "bin" / "python")
        run([python, "-m", "pip", "install", "--quiet", "-r", str(PEERS / "requirements.txt")], timeout_s=1800)
        ready.write_text(wanted)
    return str(place / "bin" / "python")


def peer_extra(name: str) -> str | None:
    """Install bench/peers/requirements-NAME.txt beside the other peers; if that fails, the end of what pip said."""
    wanted, ready = PEERS / f"requirements-{name}.txt", PEERS / ".venv" / f".ready-{name}"
    python = peer_python()
    if ready.exists() and ready.read_text() == wanted.read_text():
        return None
    command = [python, "-m", "pip", "install", "--quiet", "-r", str(wanted)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800, check=False)
    if done.returncode:
        return done.stderr.strip()[-500:]
    ready.write_text(wanted.read_text())
    return None


def machine() -> dict[str, Any]:
    import torch

    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", info.read_text()) if info.exists() else None
    return {
        "cpu": found.group(1).strip() if found else platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        "load_before": round(os.getloadavg()[0], 2),
        "os": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def save(bench: str, where: dict[str, Any], lines: Sequence[str], figures: dict[str, Any], command: str) -> list[Path]:
    """bench/results/DATE-BENCH-MACHINE.json and .md: the figures, and what was printed."""
    date = datetime.datetime.now(datetime.UTC).date().isoformat()
    name = re.sub(r"[^a-z0-9]+", "-", where["cpu"].lower()).strip("-")
    stem = RESULTS / f"{date}-{bench}-{name}-{where['cores']}c"
    RESULTS.mkdir(exist_ok=True)
    as_json, as_text = stem.with_name(stem.name + ".json"), stem.with_name(stem.name + ".md")
    as_json.write_text(json.dumps({"date": date, "command": command, "machine": where, **figures}, indent=2) + "\n")
    facts = "\n".join(f"- {key}: {value}" for key, value in where.items())
    body = "\n".join(lines)
    as_text.write_text(f"# {bench}, {date}\n\n`{command}`\n\n{facts}\n\n```\n{body}\n```\n")
    return [as_json, as_text]
