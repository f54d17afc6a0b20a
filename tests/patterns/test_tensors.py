"""What is cut and what it then exchanges, and the pieces of torch that cutting stands on: of two workers the first, whose fellow is thought."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard

import weft
from weft.comm.torch_backend import process_groups
from weft.patterns import tensors
from weft.patterns.base import TensorFacts
from weft.patterns.batches import Batches
from weft.patterns.blocks import find_blocks
from weft.patterns.rehearsal import Rehearsal
from weft.tasks.codelm import CodeLM

DEGREE = 2


@pytest.fixture
def mesh() -> Iterator[DeviceMesh]:
    with process_groups(Rehearsal(DEGREE)):
        yield init_device_mesh("cpu", (DEGREE,))


def part(whole: Tensor, mesh: DeviceMesh, dim: int) -> DTensor:
    return DTensor.from_local(whole.chunk(DEGREE, dim)[0].clone(), mesh, [Shard(dim)], run_check=False)


MASKS = {
    "none": None,
    "of positions": (5, 5),
    "the same for all": (1, 1, 5, 5),
    "by example": (2, 1, 5, 5),
    "by head": (1, 4, 5, 5),
    "by both": (2, 4, 5, 5),
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("dim", [0, 1], ids=["examples", "heads"])
def test_attention_goes_by_examples_and_heads(mesh: DeviceMesh, mask: str, dim: int) -> None:
    torch.manual_seed(0)
    whole = [torch.randn(2, 4, 5, 3, dtype=torch.float64) for _ in range(3)]
    shape = MASKS[mask]
    told = torch.randn(shape, dtype=torch.float64) if shape else None
    truth = F.scaled_dot_product_attention(*whole, attn_mask=told, is_causal=told is None)
    with tensors.computing(None):
        made = F.scaled_dot_product_attention(
            *(part(t, mesh, dim) for t in whole), attn_mask=told, is_causal=told is None
        )
    assert made.placements == (Shard(dim),)
    assert torch.equal(made.to_local(), truth.chunk(DEGREE, dim)[0])


@pytest.mark.parametrize("mask", MASKS)
def test_and_so_does_its_gradient(mesh: DeviceMesh, mask: str) -> None:
    torch.manual_seed(1)
    whole = [torch.randn(2, 4, 5, 3, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    local = [t.detach().chunk(DEGREE, 1)[0].clone().requires_grad_() for t in whole]
    shape = MASKS[mask]
    told = torch.randn(shape, dtype=torch.float64) if shape else None
    F.scaled_dot_product_attention(*whole, attn_mask=told).sin().sum().backward()
    with tensors.computing(None):
        cut = [DTensor.from_local(t, mesh, [Shard(1)], run_check=False) for t in local]
        F.scaled_dot_product_attention(*cut, attn_mask=told).to_local().sin().sum().backward()
    for mine, all_of_it in zip(local, whole, strict=True):
        assert mine.grad is not None
        assert all_of_it.grad is not None
        torch.testing.assert_close(mine.grad, all_of_it.grad.chunk(DEGREE, 1)[0], rtol=1e-12, atol=1e-12)


def test_random_numbers_are_a_part_of_what_one_process_draws(mesh: DeviceMesh) -> None:
    whole = torch.ones(3, 8)
    torch.manual_seed(5)
    truth, after = F.dropout(whole, 0.5), torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(F.dropout(part(whole, mesh, 1), 0.5).to_local(), truth[:, :4])
    assert torch.equal(torch.rand(1), after)
    torch.manual_seed(5)
    everywhere = DTensor.from_local(whole, mesh, [Replicate()], run_check=False)
    assert torch.equal(F.dropout(everywhere, 0.5).to_local(), truth)


DRAWN = {
    "rand_like": torch.rand_like,
    "randn_like": torch.randn_like,
    "randint_like": lambda t: torch.randint_like(t, 100),
    "exponential_": lambda t: torch.empty_like(t).exponential_(),
    "uniform_": lambda t: torch.empty_like(t).uniform_(),
    "log_normal_": lambda t: torch.empty_like(t).log_normal_(),
    "geometric_": lambda t: torch.empty_like(t).geometric_(0.3),
    "random_": lambda t: torch.empty_like(t).random_(100),
    "bernoulli of a number": lambda t: torch.bernoulli(t, 0.5),
    "bernoulli": lambda t: torch.bernoulli(0.5 * t),
    "poisson": lambda t: torch.poisson(3 * t),
}


@pytest.mark.parametrize("kind", DRAWN)
def test_so_are_those_that_are_drawn_by_shape(mesh: DeviceMesh, kind: str) -> None:
    torch.manual_seed(5)
    truth, after = DRAWN[kind](torch.ones(3, 9)), torch.rand(1)
    torch.manual_seed(5)
    uneven = DTensor.from_local(torch.ones(3, 5), mesh, [Shard(1)], run_check=False, shape=truth.shape, stride=(9, 1))
    assert torch.equal(DRAWN[kind](uneven).to_local(), truth[:, :5])
    assert torch.equal(torch.rand(1), after)


def test_what_torch_draws_by_the_part_is_refused(mesh: DeviceMesh) -> None:
    for draw in (lambda t: torch.native_dropout(t, 0.5, True), lambda t: F.rrelu(t, training=True)):
        with pytest.raises(RuntimeError, match="draws random numbers"):
            draw(part(torch.ones(3, 8), mesh, 1))


# -- what is found


def learned(task: weft.Task, examples: int = 4, by_sequence: bool = False) -> TensorFacts:
    model, (train, _) = task.model(), task.data()
    batch = Batches(train, task, torch.device("cpu"), torch.float32)(np.arange(examples))
    blocks = list(find_blocks(task, model))
    asked = tensors.BySequence(blocks, blocks[-1:], batch) if by_sequence else None
    return tensors.learn(task, model, batch, DEGREE, asked)


def test_of_a_transformer_attention_and_mlp_are_cut() -> None:
    facts = learned(CodeLM(size="small", layers=2, seq_len=16, test_windows=8))
    cut = {name: style for name, style in facts.styles.items() if name.startswith("blocks")}
    kinds = {"qkv": "column", "out": "row", "up": "column", "down": "row"}
    assert cut == {f"blocks.{k}.{name}": style for k in range(2) for name, style in kinds.items()}
    assert facts.degree == DEGREE


def test_by_the_sequence_hardly_more_travels_and_less_is_kept() -> None:
    task = CodeLM(size="small", layers=2, seq_len=32, test_windows=8)
    whole, parts = learned(task), learned(task, by_sequence=True)
    assert parts.styles == whole.styles
    assert parts.spread == [f"blocks.{k}.{name}" for k in range(2) for name in ("out", "down")]
    assert parts.joined == ["blocks.1"]
    norms = {f"blocks.{k}.norm{j}.{name}" for k in range(2) for j in (1, 2) for name in ("weight", "bias")}
    assert norms <= set(parts.within)
    once = 4 * 32 * 256 * 4  # bytes of: examples, bytes of text, numbers each, in float32
    # an all-reduce of n bytes is a reduce-scatter of n and a gather of two halves; where parts begin, gradients are made whole
    travels = parts.exchanged + parts.scattered / 2 + parts.gathered
    assert travels == pytest.approx(whole.exchanged + once, rel=0.02)
    # of what four norms are given, all but the first's
    assert whole.activation_bytes - parts.activation_bytes == pytest.approx(1.5 * once, rel=0.02)


class Masked(CodeLM):
    """Attention as most models write it: a projection each, and a mask that is made by hand."""

    def model(self) -> nn.Module:
        return MaskedNet()


class MaskedNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(256, 32), nn.Linear(32, 256)
        self.q, self.k, self.v, self.o = (nn.Linear(32, 32) for _ in range(4))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        b, t, _ = x.shape
        mask = torch.full((t, t), float("-inf")).triu(1)[None, None]
        q, k, v = (f(x).view(b, t, 4, 8).transpose(1, 2) for f in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.head(self.o(y.transpose(1, 2).reshape(b, t, 32)))


def test_attention_with_a_mask_is_cut() -> None:
    facts = learned(Masked(size="small", seq_len=16, test_windows=8))
    assert {n: s for n, s in facts.styles.items() if n in "qkvo"} == {
        "q": "column",
        "k": "column",
        "v": "column",
        "o": "row",
    }


class NormedHeads(Masked):
    """A norm of each head's queries and keys, whose weights all workers have whole (Dehghani et al. 2023)."""

    def model(self) -> nn.Module:
        return NormedHeadsNet()


class NormedHeadsNet(MaskedNet):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        b, t, _ = x.shape
        q, k, v = (f(x).view(b, t, 4, 8).transpose(1, 2) for f in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(self.norm(q), self.norm(k), v, is_causal=True)
        return self.head(self.o(y.transpose(1, 2).reshape(b, t, 32)))


def test_a_sum_that_is_made_once_a_step_keeps_no_pair_whole() -> None:
    facts = learned(NormedHeads(size="small", seq_len=16, test_windows=8))
    assert facts.styles["q"] == "column"
    assert facts.within == ["norm.weight", "norm.bias"]
