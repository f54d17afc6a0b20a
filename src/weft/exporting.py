"""The model of a run as one ordinary file, for programs that do not know Weft: its state_dict, by the names of the plain torch model.

safetensors holds each tensor once: of a parameter with several names (a head tied to an embedding) the first, the others stand in the
metadata, as safetensors.torch.save_model writes it. safetensors.torch.load_model reads any such file; where no parameter is tied,
model.load_state_dict(safetensors.torch.load_file(path)) does too. torch keeps all names: model.load_state_dict(torch.load(path)).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from weft import __version__
from weft.config import FIRST_PART, RunFolder, partial_of
from weft.errors import CheckpointError, ConfigError, UnknownName
from weft.resilience import checkpoint
from weft.resilience.checkpoint import Checkpoint, writing

#: Format -> the end of the file's name.
FORMATS = {"safetensors": ".safetensors", "torch": ".pt"}


@dataclass(frozen=True)
class Exported:
    """``skipped``: why newer checkpoints than that of ``step`` were passed over."""

    path: Path
    step: int
    num_tensors: int
    bytes: int
    skipped: tuple[str, ...] = ()


def export(
    run_dir: str | Path,
    to: str = "safetensors",
    output: str | Path | None = None,
    *,
    step: int | None = None,
    force: bool = False,
) -> Exported:
    """Write the model of a run, of any pattern, to one file: from its newest good checkpoint, or from that of ``step``.

    ``to``: "safetensors" or "torch" (a state_dict saved by torch.save). ``output``: model.safetensors or model.pt in the run's
    folder by default; a file that stands there is overwritten with ``force`` only. The safetensors file's metadata hold task, step
    and Weft's version.
    Raises CheckpointError where there is no good checkpoint, none of that step, or the disk refuses; ConfigError for what cannot
    be asked.

        weft.export("runs/digits-sharded-...", output="digits.safetensors")
        safetensors.torch.load_model(model, "digits.safetensors")
    """
    if to not in FORMATS:
        raise UnknownName.of("format", to, FORMATS)
    folder = RunFolder.open(run_dir)
    path = Path(output) if output is not None else folder.path / f"model{FORMATS[to]}"
    if path.is_dir():
        raise ConfigError(f"output={str(path)!r} is a folder: give the name of a file in it.")
    if path.exists() and not force:
        raise ConfigError(f"{str(path)!r} exists already: give force (--force) to overwrite it, or another output.")
    found, skipped = pick(folder, step)
    model = model_of(found)
    metadata = {"format": "pt", "task": folder.config().task.name, "step": str(found.step), "weft": __version__}
    partial = partial_of(path)
    try:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            if to == "torch":
                torch.save(model, partial)
            else:
                tensors, further = once_each(model)
                save_file(tensors, partial, further | metadata)
            partial.replace(path)
    except (SafetensorError, RuntimeError) as error:  # as the two libraries tell of a disk that refuses
        raise CheckpointError(f"cannot write {path}: {error}. Free space, or choose another output.") from error
    finally:
        partial.unlink(missing_ok=True)
    return Exported(path, found.step, len(model), path.stat().st_size, tuple(skipped))


def pick(folder: RunFolder, step: int | None) -> tuple[Checkpoint, list[str]]:
    """The newest good checkpoint, or the newest of ``step``, with what all workers hold alike; why newer ones were passed over."""
    paths = checkpoint.list_checkpoints(folder.checkpoints)
    if not paths:
        raise CheckpointError(
            f"the run {str(folder.path)!r} has no checkpoint yet: it saves one every --save-every steps, when it is stopped, and at the "
            "end."
        )
    if step is not None:
        steps = {checkpoint.step_of(path): path for path in paths}  # the later of two of a step
        if step not in steps:
            have = ", ".join(map(str, steps))
            raise CheckpointError(f"the run {str(folder.path)!r} has no checkpoint of step {step}: it has {have}.")
        return checkpoint.load(steps[step], only=(FIRST_PART,)), []
    found, skipped = checkpoint.newest_good(folder.checkpoints, only=(FIRST_PART,))
    if found is None:
        raise CheckpointError(f"no checkpoint of {str(folder.path)!r} is good: {'; '.join(skipped)}")
    return found, skipped


def model_of(found: Checkpoint) -> dict[str, Any]:
    state: Any = found.parts[FIRST_PART]
    return dict(state["model"])


def once_each(model: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors, each under its first name, and {further name: first}."""
    kept: dict[int, str] = {}
    tensors: dict[str, Tensor] = {}
    further: dict[str, str] = {}
    for name, value in model.items():
        if not isinstance(value, Tensor) or value.layout is not torch.strided:
            raise ConfigError(
                f"safetensors holds dense tensors only, and {name} of this model is none: use --to torch."
            )
        if (first := kept.setdefault(id(value), name)) == name:
            tensors[name] = value.contiguous()
        else:
            further[name] = first
    return tensors, further
