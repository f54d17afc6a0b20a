"""The table of shipped tasks: cheap to import, and every line of it leads to a task."""

from __future__ import annotations

import subprocess
import sys

import pytest

from weft.loading import check_task, load_class
from weft.options import construct, describe
from weft.tasks import TASKS


def test_importing_the_table_imports_no_torch() -> None:
    code = "import sys, weft.tasks; print([m for m in ('torch', 'numpy', 'weft.tasks.digits') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("name", TASKS)
def test_every_entry_is_a_task_whose_options_are_explained(name: str) -> None:
    cls = load_class(TASKS[name].target)
    needed = {option.name: "any" for option in describe(cls) if option.default == "required"}
    check_task(construct(cls, needed, name))
    assert "\n" not in TASKS[name].summary
    assert describe(cls)
    assert all(option.doc for option in describe(cls))


def test_options_come_as_text_from_the_command_line() -> None:
    task = construct(load_class(TASKS["codelm"].target), {"size": "tiny", "seq_len": "16", "lr": "0.01"}, "codelm")
    typed = {"size": "tiny", "layers": 2, "positions": "learned", "seq_len": 16, "lr": 0.01, "test_windows": 256}
    assert vars(task) == typed
