"""What travels between members: an Update (entries by parameter name, weight, version, sender) and the Transforms on it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


@dataclass(slots=True)
class Dense:
    """A whole tensor of the parameter's shape; usually a view into an arena."""

    tensor: torch.Tensor


@dataclass(slots=True)
class Rows:
    """Some rows of a parameter (sparse): ``values[k]`` belongs to row ``indices[k]``; rows may repeat and then add up."""

    indices: torch.Tensor  # (K,) int64
    values: torch.Tensor  # (K, ...)
    shape: tuple[int, ...]


Entry = Dense | Rows


@dataclass(slots=True)
class Update:
    """``weight``: number of examples behind it (a plain mean over unequal shards is wrong); ``version``: the step it
    belongs to; ``sender``: member id, -1 once combined. A parameter that no example touched has no entry."""

    entries: dict[str, Entry] = field(default_factory=dict)
    weight: float = 0.0
    version: int = 0
    sender: int = -1

    def tensors(self) -> list[torch.Tensor]:
        """The numbers of every entry, in name order of insertion."""
        return [e.tensor if isinstance(e, Dense) else e.values for e in self.entries.values()]


class Transform(ABC):
    """One link of the chain clip -> noise -> compress -> mask. Its state is visible and saved in checkpoints."""

    @abstractmethod
    def __call__(self, update: Update) -> Update:
        """May work in place and return the same update."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state:
            raise ValueError(f"{type(self).__name__} keeps no state, but the checkpoint holds {sorted(state)}")


EPSILON = 1e-6


class ClipNorm(Transform):
    """Scale the update so that its global L2 norm is at most ``max_norm`` (Pascanu et al. 2013): by max_norm / (norm + EPSILON), as
    torch.nn.utils.clip_grad_norm_ does."""

    def __init__(self, max_norm: float) -> None:
        self.max_norm = max_norm
        self.norm: float | None = None  # set before each call where the update is a part of the whole

    def __call__(self, update: Update) -> Update:
        tensors = update.tensors()
        total = norm(tensors) if self.norm is None else self.norm
        multiply(tensors, min(1.0, self.max_norm / (total + EPSILON)))
        return update


def multiply(tensors: Sequence[torch.Tensor], factor: float) -> None:
    """In place; there may be none."""
    import torch

    if tensors and factor != 1.0:
        torch._foreach_mul_(list(tensors), factor)


def norm(tensors: Sequence[torch.Tensor]) -> float:
    """Of all of them together, in float64."""
    import torch

    if not tensors:
        return 0.0
    norms = torch._foreach_norm(list(tensors))
    return float(torch.linalg.vector_norm(torch.stack([n.to(tensors[0].device, torch.float64) for n in norms])))


def apply_all(chain: Sequence[Transform], update: Update) -> Update:
    for transform in chain:
        update = transform(update)
    return update
