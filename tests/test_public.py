"""The public names are those listed, each can be had, and importing weft is quick and quiet: no torch, no output."""

from __future__ import annotations

import subprocess
import sys

import weft


def test_every_public_name_can_be_had() -> None:
    assert len(weft.__all__) == len(set(weft.__all__))
    for name in weft.__all__:
        assert getattr(weft, name) is not None
    assert set(weft.__all__) <= set(dir(weft))


def test_run_stays_a_function() -> None:
    """A module weft.run would take the name's place as soon as something imports it."""
    import weft.driver

    assert callable(weft.run)
    assert weft.run is weft.driver.run


def test_importing_and_help_do_not_import_torch() -> None:
    code = (
        "import sys, weft, weft.cli, weft.driver, weft.compat, weft.patterns.registry, weft.clusters.local, weft.clusters.torchrun, weft.report.terminal\n"
        "assert 'torch' not in sys.modules, 'torch'\n"
        "assert 'sklearn' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout == done.stderr == ""
