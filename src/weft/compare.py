"""How far apart two runs ended."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from weft.config import FIRST_PART, RunFolder
from weft.errors import CheckpointError
from weft.resilience import checkpoint
from weft.resilience.checkpoint import Difference, largest_difference


def final_parameters(run_dir: str | Path) -> dict[str, Tensor]:
    """Model state by name from the newest good checkpoint of a run."""
    folder = RunFolder.open(run_dir)
    found, skipped = checkpoint.newest_good(folder.checkpoints, only=(FIRST_PART,))
    if found is None:
        why = "; ".join(skipped) or "none was saved"
        raise CheckpointError(f"the run {str(run_dir)!r} has no good checkpoint: {why}.")
    state = found.parts[FIRST_PART]
    assert isinstance(state, dict)
    model = state["model"]
    assert isinstance(model, dict)
    return {str(name): t for name, t in model.items() if isinstance(t, Tensor) and t.is_floating_point()}


def diff_runs(run_a: str | Path, run_b: str | Path) -> Difference:
    """Largest absolute difference of the final parameters, and relative to the first run's global norm."""
    return largest_difference(final_parameters(run_a), final_parameters(run_b))
