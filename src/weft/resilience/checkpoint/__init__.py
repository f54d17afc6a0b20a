"""Checkpoints: per member one safetensors file, over all a JSON manifest with a crc32 of every byte that was written.

    RUN/checkpoints/step-00000300/manifest.json            step, world, meta, the state's tree, all checksums
                                  worker-0.safetensors     the tensors; any safetensors reader opens it

Written under a temporary name, fsynced and renamed (Pillai et al. 2014), so a kill at any moment leaves the previous
checkpoint whole. torch.load and safetensors return a flipped byte as a number; here it is found and named. Costs one
pass of crc32 (about 4 GB/s) on top of writing; no contiguous CPU tensor is copied, and nothing is ever unpickled.
"""

from weft.resilience.checkpoint.difference import Difference, largest_difference, unlike
from weft.resilience.checkpoint.disk import check_writable, writing
from weft.resilience.checkpoint.parts import Part
from weft.resilience.checkpoint.state import Json, State
from weft.resilience.checkpoint.store import (
    Checkpoint,
    Manifest,
    Saved,
    begin,
    commit,
    list_checkpoints,
    load,
    newest_good,
    read_manifest,
    save,
    step_of,
    verify,
    write_part,
)

__all__ = [
    "Checkpoint",
    "Difference",
    "Json",
    "Manifest",
    "Part",
    "Saved",
    "State",
    "begin",
    "check_writable",
    "commit",
    "largest_difference",
    "list_checkpoints",
    "load",
    "newest_good",
    "read_manifest",
    "save",
    "step_of",
    "unlike",
    "verify",
    "write_part",
    "writing",
]
