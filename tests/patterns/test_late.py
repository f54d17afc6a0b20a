"""A model that is made late, block by block, is bit for bit the one that is made at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from weft.patterns.late import Later, all_tensors, why_not
from weft.tasks.codelm import CodeLM


def then_changed() -> nn.Module:
    """Drawn, overwritten, scaled, seen through views, copied from each other; buffers that are computed."""
    model = nn.Sequential(nn.Linear(300, 300), nn.Embedding(300, 300, padding_idx=2), nn.Linear(300, 300))
    first, second, third = (module.weight for module in model)  # type: ignore[union-attr]
    nn.init.normal_(first, std=0.3)
    with torch.no_grad():
        first[:100].mul_(0.5)
        third.copy_(second.t() + first)
        second.view(-1)[::7] = 4.0
    model.register_buffer("noise", torch.randn(300, 300) + first.detach().mean())
    model.register_buffer("order", torch.randperm(50_000))
    return model


def with_its_own_generator() -> nn.Module:
    model = nn.Linear(300, 300)
    nn.init.normal_(model.weight, generator=torch.Generator().manual_seed(4))
    return model


def looks() -> nn.Module:
    model = nn.Linear(300, 300)
    model.scale = float(model.weight.detach().std())  # type: ignore[assignment]
    return model


def from_numpy() -> nn.Module:
    model = nn.Linear(300, 300)
    model.weight.data.copy_(torch.from_numpy(np.random.default_rng(0).normal(size=(300, 300))))
    return model


def orthogonal() -> nn.Module:
    model = nn.Linear(300, 300)
    nn.init.orthogonal_(model.weight)
    return model


def shares_memory() -> nn.Module:
    model = nn.Linear(300, 300)
    model.register_buffer("same", model.weight.data)
    return model


def made(make: Callable[[], nn.Module]) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(1)
    return make(), torch.get_rng_state()


@pytest.mark.parametrize(
    "make",
    [
        lambda: CodeLM(size="small").model(),
        lambda: CodeLM(size="small").model().to(torch.float64),
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(256, 4, 512, batch_first=True), 2),
        lambda: nn.utils.parametrizations.weight_norm(nn.Linear(300, 300)),
        then_changed,
        with_its_own_generator,
    ],
)
def test_late_is_the_same_as_at_once_whatever_comes_first(make: Callable[[], nn.Module]) -> None:
    truth, drawn = made(make)
    with Later() as later:
        model, drawn_late = made(make)
    assert torch.equal(drawn, drawn_late), "who draws next draws the same"
    late = list(all_tensors(model))
    assert any(tensor.is_meta for _, tensor in late)
    for name, tensor in reversed(late):
        later.give([tensor])
        assert torch.equal(tensor, dict(all_tensors(truth))[name])
    assert torch.equal(drawn, torch.get_rng_state())
    torch.manual_seed(1)
    assert why_not(make, truth) == ""


def test_tied_parameters_stay_one() -> None:
    def tied() -> Any:
        model: Any = nn.ModuleDict({"a": nn.Embedding(300, 300), "b": nn.Linear(300, 300)})
        model["b"].weight = model["a"].weight
        model.also = [model["a"].weight]
        return model

    with Later() as later:
        model = tied()
    later.give(model.parameters())
    assert model["a"].weight is model["b"].weight is model.also[0]
    assert isinstance(model["a"].weight, nn.Parameter)
    assert not model["a"].weight.is_meta
    assert model["a"].weight.requires_grad


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (looks, "_local_scalar_dense"),
        (from_numpy, "outside torch"),
        (orthogonal, "orthogonal_"),
        (lambda: nn.LSTM(256, 256), "weakref"),
        (shares_memory, "share their memory"),
    ],
)
def test_what_cannot_be_late_is_found_out(make: Callable[[], nn.Module], says: str) -> None:
    truth, _ = made(make)
    torch.manual_seed(1)
    assert says in why_not(make, truth)
