"""Optimizer state by parameter name, so that another layout, or a model with its parameters in another order, can read it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from weft.errors import CheckpointError, Incompatible
from weft.patterns.elementwise import PER_PARAMETER, is_large


def optimizer_state_by_name(optimizer: torch.optim.Optimizer, params: Mapping[str, nn.Parameter]) -> dict[str, Any]:
    names = {id(p): n for n, p in params.items()}
    state = optimizer.state_dict()
    order = [names[id(p)] for g in optimizer.param_groups for p in g["params"]]
    groups = [
        {k: v for k, v in g.items() if k != "params"} | {"params": [order[i] for i in g["params"]]}
        for g in state["param_groups"]
    ]
    return {"state": {order[i]: s for i, s in state["state"].items()}, "param_groups": groups}


def mean_state(states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The mean of several workers' states, tensor by tensor; what is no floating-point tensor is the first one's."""
    joined = dict(states[0])
    joined["state"] = {
        name: {key: _mean([s["state"][name][key] for s in states if name in s["state"]]) for key in first}
        for name, first in {n: s for state in reversed(states) for n, s in state["state"].items()}.items()
    }
    return joined


def _mean(values: Sequence[Any]) -> Any:
    first = values[0]
    if not (isinstance(first, torch.Tensor) and first.is_floating_point()):
        return first
    return torch.stack([v.double() for v in values]).mean(0).to(first.dtype)


def load_optimizer_state_by_name(
    optimizer: torch.optim.Optimizer, params: Mapping[str, nn.Parameter], state: Mapping[str, Any]
) -> None:
    """Parameters may stand in another order than they were saved in, but not in other groups."""
    names = {id(p): n for n, p in params.items()}
    own = [[names[id(p)] for p in group["params"]] for group in optimizer.param_groups]
    saved = [list(group["params"]) for group in state["param_groups"]]
    if differ := sorted({n for members in saved for n in members} ^ {n for members in own for n in members}):
        raise CheckpointError(
            f"the checkpoint's optimizer holds parameters {differ[:5]} that the task's does not, or the reverse: resume with the "
            "task it was made by."
        )
    if [set(members) for members in saved] != [set(members) for members in own]:
        raise CheckpointError(
            f"the checkpoint's optimizer has its parameters in {len(saved)} group(s), the task's in {len(own)}, and not in the same: "
            "resume with the task it was made by."
        )
    position = {n: k for k, n in enumerate(n for members in own for n in members)}
    groups = [  # torch goes by the order
        dict(group) | {"params": [position[n] for n in members]}
        for group, members in zip(state["param_groups"], own, strict=True)
    ]
    optimizer.load_state_dict({"state": {position[n]: s for n, s in state["state"].items()}, "param_groups": groups})


# -- state of a parameter, told to other ranks

LARGE = "as large as the parameter"


def described(state: Mapping[str, Any]) -> dict[str, Any]:
    """In plain data: what is kept once, and which keys hold something large."""
    return {key: LARGE if is_large(key, value) else plain(value) for key, value in state.items()}


def shapes(state: Mapping[str, Any]) -> dict[str, Any]:
    """In plain data: what is kept once, and of each tensor its shape and dtype."""
    return {
        key: {"shape": list(value.shape), "dtype": dtype_name(value)}
        if isinstance(value, torch.Tensor) and (value.dim() or key not in PER_PARAMETER)
        else plain(value)
        for key, value in state.items()
    }


def dtype_name(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


#: Of what an optimizer keeps, other workers can be told this.
TOLD = torch.Tensor | int | float | str | None


def check_state(optimizer: torch.optim.Optimizer) -> None:
    """Incompatible where it keeps more than tensors and plain values."""
    for state in optimizer.state.values():
        for key, value in state.items():
            if not isinstance(value, TOLD):
                raise Incompatible(
                    f"{type(optimizer).__name__} keeps a {type(value).__name__} as {key!r} for each parameter: a layout that takes the model apart saves only "
                    "tensors and plain values (numbers, words, None). Keep each tensor under a key of its own, or use --pattern allreduce."
                )


def plain(value: Any) -> Any:
    if not isinstance(value, TOLD):  # it was not there after the first step, which check_state saw
        raise Incompatible(
            f"an optimizer keeps a {type(value).__name__} for a parameter: a layout that takes the model apart saves only tensors and plain values."
        )
    return [value.item(), dtype_name(value)] if isinstance(value, torch.Tensor) else value


def scalar(kind: Any) -> Any:
    """Undoes ``plain``."""
    return torch.tensor(kind[0], dtype=getattr(torch, kind[1])) if isinstance(kind, list) else kind
