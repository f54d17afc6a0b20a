"""Optimizers for embeddings with sparse gradients: a step reads and moves the rows that a batch touched, and no others.

None of these has momentum or weight decay, which would move all rows.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, get_args

import torch
from torch import nn

from weft.errors import UnknownName

#: Adagrad (Duchi et al. 2011) keeps one number beside each parameter, Adam (torch's SparseAdam) two, SGD none.
Rule = Literal["adagrad", "adam", "sgd"]


def check_rule(rule: str) -> None:
    if rule not in get_args(Rule):
        raise UnknownName.of("optimizer for sparse gradients:", rule, get_args(Rule))


def make_optimizer(rule: Rule, params: Iterable[nn.Parameter], lr: float) -> torch.optim.Optimizer:
    if rule == "sgd":
        return torch.optim.SGD(params, lr=lr)
    if rule == "adam":
        return torch.optim.SparseAdam(params, lr=lr)
    decline_checks()
    return torch.optim.Adagrad(params, lr=lr)


def decline_checks() -> None:
    """Of sparse tensors' indices. They are off: said explicitly, torch does not warn of it in Adagrad's sparse step."""
    checks = torch.sparse.check_sparse_tensor_invariants
    if not checks.is_enabled():
        checks.disable()
