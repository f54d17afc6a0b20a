"""The example files run unchanged from the command line, and learn."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
pytestmark = pytest.mark.multiprocess


def weft_json(*arguments: str) -> dict:
    done = subprocess.run(
        [sys.executable, "-m", "weft.cli", *arguments, "--json"], capture_output=True, text=True, timeout=110
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(("name", "loss"), [("unusual.py:Denoise", 1.5), ("own_task.py:Sine", 0.2)])
def test_example_learns_on_two_workers(tmp_path: Path, name: str, loss: float) -> None:
    result = weft_json("run", str(EXAMPLES / name), "--workers", "2", "--run-dir", str(tmp_path / "run"))
    assert result["loss"] < loss
    assert result["world"] == 2


def test_the_unusual_task_resumes_bit_equal(tmp_path: Path) -> None:
    """Dropout, BatchNorm and all: a kill in the middle changes no bit."""
    import torch

    import weft
    from weft.compare import final_parameters
    from weft.testing import kill

    job = {"task": str(EXAMPLES / "unusual.py:Denoise"), "workers": 2, "steps": 40, "save_every": 15}
    truth = final_parameters(weft.run(**job, run_dir=tmp_path / "truth").run_dir)
    result = weft.run(**job, run_dir=tmp_path / "run", restarts=1, faults=[kill(rank=0, step=33)])
    got = final_parameters(result.run_dir)
    assert all(torch.equal(got[n], truth[n]) for n in truth)
