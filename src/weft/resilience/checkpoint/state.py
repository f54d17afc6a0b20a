"""A nested state_dict <-> a JSON tree and a flat dict of tensors. What these two cannot say is refused, not pickled.

A dict with plain text keys is a JSON object; whatever JSON lacks is an object whose first key starts with "$":
{"$tensor": name}, {"$tuple": [...]}, {"$dict": [[key, value], ...]}, {"$float": "inf"}.
"""

from __future__ import annotations

import math
from collections import Counter, OrderedDict
from collections.abc import Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor

from weft.errors import CheckpointError

#: Tensors, str, int, float, bool and None in dicts (keys str or int), lists and tuples: what the state_dict() of a
#: model, an optimizer or a schedule gives.
State: TypeAlias = Any
Json: TypeAlias = Any
Path: TypeAlias = tuple[object, ...]

#: safetensors' names; what is not here is refused.
NAME_OF = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.complex64: "C64",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}
DTYPE_OF = {name: dtype for dtype, name in NAME_OF.items()}

_MAPPINGS: dict[str, type] = {"$dict": dict, "$OrderedDict": OrderedDict, "$Counter": Counter}
_TAG_OF = {kind: tag for tag, kind in _MAPPINGS.items()}


def encode(part: str, state: State) -> tuple[Json, dict[str, Tensor]]:
    """The tree of ``state`` and its tensors by name, not copied. Raises CheckpointError naming the path of a value
    that cannot be saved; ``part`` is for that message."""
    encoder = _Encoder(part)
    try:
        return encoder.encode(state, ()), encoder.tensors
    except RecursionError:
        raise CheckpointError(f"cannot save {part}: its state contains itself, or is nested too deeply") from None


def encode_meta(meta: Mapping[str, Json]) -> Json:
    tree, tensors = encode("meta", dict(meta))
    if tensors:
        raise CheckpointError(f"cannot save meta: {next(iter(tensors))} is a tensor; put it into the state of a part")
    return tree


def decode(node: Json, tensors: dict[str, Tensor]) -> State:
    """What ``encode`` was given. ``tensors`` come contiguous and are replaced by those of the strides they had."""
    if isinstance(node, list):
        return [decode(child, tensors) for child in node]
    if not isinstance(node, dict):
        return node
    tag = next(iter(node), "")
    if not tag.startswith("$"):
        return {key: decode(child, tensors) for key, child in node.items()}
    body = node[tag]
    if tag == "$tensor":
        if "stride" in node and list(tensors[body].stride()) != node["stride"]:
            tensors[body] = _strided(tensors[body], node["stride"])
        return tensors[body]
    if tag == "$tuple":
        return tuple(decode(child, tensors) for child in body)
    if tag == "$float":
        return float(body)
    if tag == "$sparse_coo":
        indices, values = (decode(child, tensors) for child in body)
        return torch.sparse_coo_tensor(
            indices, values, node["shape"], is_coalesced=node["coalesced"], check_invariants=False
        )
    mapping = _MAPPINGS[tag]()
    for key, child in body:
        mapping[decode(key, tensors)] = decode(child, tensors)
    if "metadata" in node:
        mapping._metadata = decode(node["metadata"], tensors)
    return mapping


def _strided(tensor: Tensor, stride: list[int]) -> Tensor:
    return torch.empty_strided(tensor.shape, stride, dtype=tensor.dtype).copy_(tensor)


class _Encoder:
    def __init__(self, part: str) -> None:
        self.tensors: dict[str, Tensor] = {}
        self._part = part
        self._name_of_view: dict[object, str] = {}

    def encode(self, value: State, path: Path) -> Json:
        if value is None or isinstance(value, bool):
            return value
        if isinstance(value, str):
            return self._text(value, path)
        if isinstance(value, int):
            return int(value)
        if isinstance(value, float):
            return float(value) if math.isfinite(value) else {"$float": repr(float(value))}
        # Containers and tensors by exact type: a subclass would come back as something else.
        kind = type(value)
        if kind is list:
            return [self.encode(child, (*path, i)) for i, child in enumerate(value)]
        if kind is tuple:
            return {"$tuple": [self.encode(child, (*path, i)) for i, child in enumerate(value)]}
        if kind is dict and all(isinstance(key, str) and not key.startswith("$") for key in value):
            return {self._text(key, path): self.encode(child, (*path, key)) for key, child in value.items()}
        if kind in _TAG_OF:
            return self._mapping(value, path)
        if kind in (Tensor, torch.nn.Parameter):
            return self._sparse(value, path) if value.layout is torch.sparse_coo else self._dense(value, path)
        raise self._refusal(f"a {kind.__qualname__}", path)

    def _text(self, value: str, path: Path) -> str:
        try:
            value.encode()
        except UnicodeEncodeError:
            raise self._refusal(f"text that is not Unicode, {value!r}", path) from None
        return str(value)

    def _mapping(self, value: Mapping[Any, State], path: Path) -> Json:
        pairs = []
        for key, child in value.items():
            if isinstance(key, bool) or not isinstance(key, str | int):
                raise self._refusal(f"under a key of type {type(key).__qualname__}, not str or int", (*path, key))
            pairs.append([self.encode(key, path), self.encode(child, (*path, key))])
        tree = {_TAG_OF[type(value)]: pairs}
        if hasattr(value, "_metadata"):  # Module.state_dict() keeps versions there; without them modules convert anew
            tree["metadata"] = self.encode(value._metadata, (*path, "_metadata"))
        return tree

    def _dense(self, value: Tensor, path: Path) -> Json:
        if value.layout is not torch.strided or value.is_meta or value.dtype not in NAME_OF:
            raise self._refusal(f"a {value.dtype} tensor ({value.layout}, device {value.device})", path)
        view = (
            value.device,
            value.data_ptr(),
            value.dtype,
            value.shape,
            value.stride(),
            value.is_conj(),
            value.is_neg(),
        )
        # The same view of the same memory (tied weights) is stored once and comes back as one tensor.
        name = self._name_of_view.get(view) if value.numel() else None
        if name is None:
            name = self._name_of_view[view] = self._new_name(path)
            self.tensors[name] = value
        node: Json = {"$tensor": name}
        # Dense in another order, as channels_last: kept, since kernels (and their rounding) depend on it.
        if not value.is_contiguous() and torch.empty_like(value, device="meta").stride() == value.stride():
            node["stride"] = list(value.stride())
        return node

    def _sparse(self, value: Tensor, path: Path) -> Json:
        # .indices() and .values() would refuse an uncoalesced tensor
        body = [self._dense(value._indices(), (*path, "indices")), self._dense(value._values(), (*path, "values"))]
        return {"$sparse_coo": body, "shape": list(value.shape), "coalesced": value.is_coalesced()}

    def _new_name(self, path: Path) -> str:
        name, n = _dotted(path), 1
        while name in self.tensors or name == "__metadata__":  # {"a.b": x, "a": {"b": y}}; safetensors' own key
            n += 1
            name = f"{_dotted(path)}~{n}"
        return name

    def _refusal(self, what: str, path: Path) -> CheckpointError:
        return CheckpointError(
            f"cannot save {self._part}: {_dotted(path)} is {what}. A checkpoint holds tensors, numbers, text, None, "
            "and dicts, lists and tuples of them: leave it out of the state, or put plain data in its place "
            "(a NumPy array: torch.from_numpy(x); a NumPy number: x.item(); a set: sorted(x))"
        )


def _dotted(path: Path) -> str:
    return ".".join(str(key) for key in path) or "state"
