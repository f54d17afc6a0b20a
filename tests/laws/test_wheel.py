"""The wheel law: built, installed clean, it runs a step of every pattern it lists."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from weft.patterns.registry import PATTERNS

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.multiprocess
def test_the_built_wheel_runs_every_pattern(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path / "dist"), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True, timeout=110)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    site = tmp_path / "site"
    install = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
        "--target",
        str(site),
        str(wheel),
    ]
    subprocess.run(install, check=True, capture_output=True, timeout=110)
    env = os.environ | {"PYTHONPATH": str(site)}

    def python(*arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, *arguments], env=env, cwd=tmp_path, capture_output=True, text=True, timeout=110
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    where = python("-c", "import weft; print(weft.__file__)").strip()
    assert where.startswith(str(site)), "not the wheel's"
    assert (site / "weft" / "py.typed").exists()
    for name in PATTERNS:
        options = ["-o", "tensor=2"] if name == "mesh" else []  # which is one worker unless it is told
        run = ["run", "digits-mlp", "--pattern", name, *options, "--workers", "2", "--steps", "1", "--json"]
        out = python("-m", "weft.cli", *run)
        assert json.loads(out.splitlines()[-1])["steps"] == 1
