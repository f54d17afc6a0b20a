"""The trace of real runs, read back as Perfetto would."""

from __future__ import annotations

import gzip
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import weft
from weft.errors import MemberFailed, RunFolderError
from weft.report import trace
from weft.report.trace import merge
from weft.spans import Clock, Spans, clock
from weft.testing import delay, kill

SLACK_US = 5.0  # rounding of two times to nanoseconds


def load(path: Path) -> list[dict[str, Any]]:
    data = json.loads(gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes())
    return list(data["traceEvents"])


def spans_of(events: list[dict[str, Any]], member: int) -> list[dict[str, Any]]:
    return [e for e in events if e["ph"] == "X" and e["pid"] == member + 1]


@pytest.mark.multiprocess
def test_a_run_is_traced_on_one_clock(tmp_path: Path) -> None:
    begun = clock()
    slow = [delay(rank=1, seconds=0.05, step=5)]
    result = weft.run("digits-mlp", workers=2, steps=6, save_every=3, trace=True, run_dir=tmp_path / "run", faults=slow)
    ended = clock()
    events = load(Path(result.run_dir) / "trace.json")
    names = {e["args"]["name"].split(" (")[0] for e in events if e["ph"] == "M" and e["name"] == "process_name"}
    assert names == {"run", "worker 0", "worker 1"}
    for member in range(2):
        spans = spans_of(events, member)
        by_name: dict[str, list[dict[str, Any]]] = {}
        for span in spans:
            by_name.setdefault(span["name"], []).append(span)
            assert 0 <= span["dur"] <= (ended - begun) * 1e6
        for each_step in ("data", "forward", "backward", "optimizer"):
            assert [s["args"]["step"] for s in by_name[each_step]] == [1, 2, 3, 4, 5, 6]
        assert len(by_name["all_reduce"]) == 6
        assert len(by_name["save"]) == 2
        assert len(by_name["evaluate"]) == 1
        nested(spans)
        assert spans[-1]["ts"] - min(s["ts"] for s in spans) <= (ended - begun) * 1e6
    # the culprit of step 5 is late, and the other is seen to wait for it at that very time
    (late,) = [s for s in spans_of(events, 1) if s["name"] == "all_reduce" and s["args"]["step"] == 5]
    waits = [s for s in spans_of(events, 0) if s["name"] == "wait" and s["args"]["step"] == 5]
    longest = max(waits, key=lambda s: s["dur"])
    assert longest["dur"] >= 40_000
    assert longest["ts"] < late["ts"] <= longest["ts"] + longest["dur"] + SLACK_US
    assert {e["name"] for e in events if e["ph"] == "i"} >= {"saved", "finished"}
    assert {e["name"] for e in events if e["ph"] == "C"} >= {"cpu_percent", "rss_bytes"}


def nested(spans: list[dict[str, Any]]) -> None:
    """On one track spans lie beside or inside each other, or a viewer draws nonsense."""
    open_until: list[float] = []
    for span in sorted(spans, key=lambda s: (s["ts"], -s["dur"])):
        while open_until and open_until[-1] <= span["ts"] + SLACK_US:
            open_until.pop()
        if open_until:
            assert span["ts"] + span["dur"] <= open_until[-1] + SLACK_US, span
        open_until.append(span["ts"] + span["dur"])


@pytest.mark.slow
@pytest.mark.multiprocess
def test_a_failed_run_and_its_resume_are_one_trace(tmp_path: Path) -> None:
    job = {"workers": 2, "steps": 20, "save_every": 5, "trace": True}
    slow = delay(rank=0, seconds=0.05)  # spans are flushed some times a second, and a kill comes without warning
    with pytest.raises(MemberFailed):
        weft.run("digits-mlp", **job, run_dir=tmp_path / "run", faults=[kill(rank=1, step=12), slow])
    first = load(tmp_path / "run" / "trace.json")
    seen = [s["args"]["step"] for s in spans_of(first, 0) if s["name"] == "optimizer"]
    assert 1 <= len(seen) <= 11
    assert seen == list(range(1, len(seen) + 1))
    assert "failed" in {e["name"] for e in first if e["ph"] == "i"}
    weft.resume(tmp_path / "run")
    both = load(tmp_path / "run" / "trace.json")
    steps = [s["args"]["step"] for s in spans_of(both, 0) if s["name"] == "optimizer"]
    assert steps == [*seen, *range(11, 21)], "it died in step 12, and went on after step 10"
    weft_trace = merge(tmp_path / "run" / "spans", tmp_path / "again.json")
    assert spans_of(load(weft_trace), 0) == spans_of(both, 0)


@pytest.mark.slow
@pytest.mark.multiprocess
def test_a_killed_launcher_leaves_what_was_recorded(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "weft.cli", "run", "digits-mlp", "--workers", "2", "--steps", "1000000", "--trace"]
    run_dir = tmp_path / "run"
    launcher = subprocess.Popen(
        [*command, "--run-dir", str(run_dir)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        until = time.monotonic() + 60
        while sum(p.stat().st_size for p in run_dir.glob("spans/*")) < 100_000:
            assert time.monotonic() < until
            assert launcher.poll() is None
            time.sleep(0.05)
    finally:
        os.kill(launcher.pid, signal.SIGKILL)
        launcher.wait(30)
    assert not (run_dir / "trace.json").exists()
    done = subprocess.run(
        [sys.executable, "-m", "weft.cli", "trace", str(run_dir)],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    events = load(Path(done.stdout.strip()))
    assert spans_of(events, 0)
    assert spans_of(events, 1)


def test_threads_are_traced_too(tmp_path: Path) -> None:
    weft.run("digits-mlp", cluster="inprocess", workers=2, steps=3, trace=True, run_dir=tmp_path / "run")
    events = load(tmp_path / "run" / "trace.json")
    for member in range(2):
        assert [s["args"]["step"] for s in spans_of(events, member) if s["name"] == "forward"] == [1, 2, 3]


def test_without_the_flag_nothing_is_recorded(tmp_path: Path) -> None:
    weft.run("digits-mlp", cluster="inprocess", workers=2, steps=2, run_dir=tmp_path / "run")
    assert not list((tmp_path / "run").glob("*trace*"))
    assert not (tmp_path / "run" / "spans").exists()
    with pytest.raises(RunFolderError, match="--trace"):
        merge(tmp_path / "run" / "spans", tmp_path / "t.json")


def test_a_large_trace_is_zipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spans = Spans(tmp_path / "spans", "worker", 0, Clock(boot="a", wall_minus_clock_s=0.0))
    for k in range(100):
        spans.add("x", k, k + 0.5)
    spans.close()
    (tmp_path / "trace.json.gz").write_bytes(b"of before")
    plain = merge(tmp_path / "spans", tmp_path / "trace.json")
    assert plain.name == "trace.json"
    assert not (tmp_path / "trace.json.gz").exists(), "one trace, not an old one beside it"
    monkeypatch.setattr(trace, "LARGE_BYTES", 100)
    packed = merge(tmp_path / "spans", tmp_path / "trace.json")
    events = load(packed)
    assert packed.name == "trace.json.gz"
    assert not plain.exists()
    assert [e["ts"] for e in spans_of(events, 0)] == [k * 1e6 for k in range(100)]
    assert not list(tmp_path.glob(".*part"))


def test_hosts_with_other_clocks_fall_on_one_line(tmp_path: Path) -> None:
    """The same instants, recorded by two hosts whose clocks differ by 1000 s and whose wall clocks lie."""
    here = Clock(boot="a", wall_minus_clock_s=0.0, over="a", offset_s=0.0)
    there = Clock(boot="b", wall_minus_clock_s=55.0, over="a", offset_s=1000.0, error_s=0.001)
    for member, own, off in ((0, here, 0.0), (1, there, 1000.0)):
        spans = Spans(tmp_path / "spans", "worker", member, own)
        spans.add("x", 10.0 + off, 11.0 + off)
        spans.close()
    events = load(merge(tmp_path / "spans", tmp_path / "trace.json"))
    assert [e["ts"] for e in events if e["ph"] == "X"] == [0.0, 0.0]
