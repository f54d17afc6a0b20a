"""What README promises, from the command line, as a user would check it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.multiprocess


def weft(*arguments: str, timeout_s: float = 110) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "weft.cli", *arguments], capture_output=True, text=True, timeout=timeout_s
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_three_workers_end_where_one_does(tmp_path: Path) -> None:
    for workers in ("3", "1"):
        settings = ("--dtype", "float64", "--epochs", "3", "--json", "--run-dir", str(tmp_path / workers))
        out = weft("run", "digits", "--pattern", "allreduce", "--workers", workers, *settings)
        assert json.loads(out.splitlines()[-1])["world"] == int(workers)
    found = json.loads(weft("diff", str(tmp_path / "3"), str(tmp_path / "1"), "--json"))
    assert 0 <= found["relative_to_norm"] <= 1e-9
    other = weft(
        "run", "digits", "--dtype", "float64", "--epochs", "3", "--seed", "1", "--run-dir", str(tmp_path / "other")
    )
    assert "run folder" in other
    found = json.loads(weft("diff", str(tmp_path / "3"), str(tmp_path / "other"), "--json"))
    assert found["relative_to_norm"] > 1e-3, "a difference that is there is found"


def test_explain_prints_the_plan_and_stops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    out = weft("explain", "digits", "--workers", "2")
    for words in (
        "one memory",
        "gradients",
        "optimizer",
        "who talks to whom",
        "workers 0-1",
        "6,090 parameters",
    ):
        assert words in out
    assert list(tmp_path.iterdir()) == []
    plan = json.loads(weft("explain", "digits", "--workers", "3", "--json").splitlines()[-1])
    assert [m["examples_per_step"] for m in plan["members"]] == [21, 21, 22]


def test_patterns_and_tasks_tell_options_and_defaults() -> None:
    patterns, tasks = weft("patterns"), weft("tasks")
    for word in ("allreduce", "stable", "accumulate=1", "clip_norm"):
        assert word in patterns
    for word in ("digits-mlp", "codelm", "size=small", "tiny|small|medium|large|wire", "fraud", "linear|mlp", "series"):
        assert word in tasks


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_language_model_learns_the_standard_library(tmp_path: Path) -> None:
    out = weft(
        "run", "codelm", "-t", "size=small", "--pattern", "allreduce", "--workers", "2", "--steps", "300",
        "--run-dir", str(tmp_path / "run"), timeout_s=890,
    )  # fmt: skip
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["loss"] < 2.6
    assert "below unigram entropy of the held-out text (nats/byte)" in out
