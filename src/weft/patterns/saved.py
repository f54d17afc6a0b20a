"""What a forward pass leaves for backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class SavedBytes(torch.autograd.graph.saved_tensors_hooks):
    """Counts what autograd keeps on this worker: the activations, each storage once, parameters left out."""

    def __init__(self, model: nn.Module) -> None:
        self.total = 0
        self._seen = {own(t).untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
        super().__init__(self._count, lambda t: t)

    def _count(self, tensor: Tensor) -> Tensor:
        mine = own(tensor)
        if mine.layout == torch.strided and (key := mine.untyped_storage().data_ptr()) not in self._seen:
            self._seen.add(key)
            self.total += mine.untyped_storage().nbytes()
        return tensor


def own(tensor: Any) -> Tensor:
    """Of a DTensor, this worker's part; of what torch has exchanged and wrapped, what came."""
    if hasattr(tensor, "to_local"):
        tensor = tensor.to_local()
    part: Tensor = tensor.trigger_wait() if hasattr(tensor, "trigger_wait") else tensor
    return part
