"""One member's file, in the safetensors format: length of the header, JSON header, the tensors end to end.

Written and read here, not by the safetensors package, so that each tensor goes between its own memory and the file
without a copy and its crc32 is at hand.
"""

from __future__ import annotations

import os
import re
import zlib
from collections.abc import Mapping
from pathlib import Path

import msgspec
import numpy as np
import torch
from torch import Tensor

from weft.errors import CheckpointError
from weft.resilience.checkpoint.disk import writing
from weft.resilience.checkpoint.state import DTYPE_OF, NAME_OF, Json


class Part(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the manifest says of one file. Plain data: a member can send it to the coordinator."""

    name: str
    bytes: int  # of the whole file
    header_bytes: int
    header_crc32: int
    crc32: dict[str, int]  # by tensor, in the order of the file
    state: Json  # the tree, {"$tensor": name} where a tensor stands

    @property
    def file(self) -> str:
        return _file(self.name)


def check_name(name: str) -> None:
    if not re.fullmatch(r"\w[\w.-]*", name, re.ASCII):
        raise CheckpointError(f"{name!r} cannot name a part: use letters, digits, and - _ . as in worker-0")


def write_tensors(directory: Path, name: str, tree: Json, tensors: Mapping[str, Tensor]) -> Part:
    """Write and fsync. Raises CheckpointError if the disk refuses."""
    # Wide types first: every tensor then starts at a multiple of its item size.
    tensors = dict(sorted(tensors.items(), key=lambda item: -item[1].element_size()))
    header, crc32 = _header(tensors), {}
    nbytes = len(header) + sum(tensor.nbytes for tensor in tensors.values())
    path = directory / _file(name)
    with writing(path, nbytes), path.open("wb") as file:
        file.write(header)
        for key, tensor in tensors.items():
            data = _bytes_of(tensor)
            crc32[key] = zlib.crc32(data)
            file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return Part(
        name=name, bytes=nbytes, header_bytes=len(header), header_crc32=zlib.crc32(header), crc32=crc32, state=tree
    )


def read_tensors(path: Path, part: Part) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors, each in new memory, and what is wrong with the file."""
    tensors: dict[str, Tensor] = {}
    problems = []
    try:
        with path.open("rb") as file:
            header = file.read(part.header_bytes)
            if zlib.crc32(header) != part.header_crc32:
                return {}, [f"the header of {part.file} is not as it was saved"]
            table = msgspec.json.decode(header[8:])
            for name, crc32 in part.crc32.items():
                tensors[name] = torch.empty(table[name]["shape"], dtype=DTYPE_OF[table[name]["dtype"]])
                data = _bytes_of(tensors[name])
                if file.readinto(data) != len(data) or zlib.crc32(data) != crc32:
                    problems.append(f"tensor {name!r} of {part.file} is not as it was saved")
    except OSError as error:
        problems.append(f"{part.file} cannot be read ({error.strerror})")
    return tensors, problems


def _file(name: str) -> str:
    return f"{name}.safetensors"


def _header(tensors: Mapping[str, Tensor]) -> bytes:
    """Length (8 bytes, little-endian), JSON, spaces up to a multiple of 8."""
    table: dict[str, Json] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.nbytes
        table[name] = {"dtype": NAME_OF[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = msgspec.json.encode(table)
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _bytes_of(tensor: Tensor) -> memoryview:
    """The tensor's memory itself; only what is on a GPU, strided or lazily conjugated is copied."""
    plain = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()
    flat = plain.as_strided((plain.numel(),), (1,))  # a lone element may keep a stride of 2, which view() refuses
    # Not .numpy(): it makes the storage fixed in size for good, and with it the user's own parameter.
    return np.from_dlpack(flat.view(torch.uint8)).data
