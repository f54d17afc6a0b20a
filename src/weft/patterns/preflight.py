"""One step of a task in a throw-away process: what it costs, and what is wrong with it, before any worker starts."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from weft.config import Config
from weft.data.keys import key_int
from weft.data.partition import parse as parse_partitioner
from weft.errors import ConfigError, DataError, TaskError
from weft.patterns.base import BufferFact, Facts, ParamFact, Pattern
from weft.patterns.batches import Batches, check_loss, check_map_style, groups_of
from weft.patterns.metrics import Totals, evaluate_batch
from weft.patterns.randomness import seed_everything
from weft.task import Task


def preflight(task: Task, pattern: Pattern, config: Config) -> Facts:
    name = type(task).__name__
    device = choose_device(config.device)
    dtype = cast(torch.dtype, getattr(torch, config.dtype))
    seed_everything(key_int(config.seed, "data"))
    train, test, sizes = load_data(task, config)
    seed_everything(key_int(config.seed, "init"))
    model = task.model()
    if not isinstance(model, nn.Module):
        raise TaskError(f"{name}.model returned {type(model).__name__}: return a torch.nn.Module.")
    if not list(model.parameters()):
        raise TaskError(f"{name}.model has no parameters: there is nothing to train.")
    if strange := [n for n, t in (*model.named_parameters(), *model.named_buffers()) if t.is_complex()]:
        raise TaskError(
            f"{name}.model holds complex numbers ({strange[0]}): keep real and imaginary parts as two real tensors."
        )
    model = model.to(device, dtype)
    params = {n: p for n, p in model.named_parameters() if p.requires_grad}
    if not params:
        raise TaskError(f"{name}.model has only frozen parameters: leave requires_grad=True on those to train.")
    optimizer = task.optimizer(list(params.values()))
    check_optimizer(optimizer, params, name)
    check_schedule(task.schedule(optimizer, 100), name)

    share = np.arange(min(sizes[0], -(-config.batch // config.workers)))
    batches = Batches(train, task, device, dtype)
    batch = batches(share)
    before = {n: (b.clone(), b._version) for n, b in model.named_buffers()}
    saved = SavedBytes(model)
    with saved:
        loss = task.loss(model, batch)
    check_loss(loss, task)
    if not torch.isfinite(loss):
        raise TaskError(
            f"{name}.loss is {loss.item()} on the first batch, before any update: look at the data and the initial weights."
        )
    counts = task.num_examples(batch)
    if not counts > 0:
        raise TaskError(f"{name}.num_examples returned {counts} for the first batch: it must be positive.")
    running = {
        n
        for n, b in model.named_buffers()
        if n in before and (b._version != before[n][1] or not torch.equal(b, before[n][0]))
    }
    loss.backward()
    if all(p.grad is None for p in params.values()):
        raise TaskError(f"{name}.loss reaches no parameter of the model that it was given: compute it with that model.")
    sparse = {n for n, p in params.items() if p.grad is not None and p.grad.is_sparse}
    try:
        optimizer.step()
    except TypeError as error:
        if "closure" not in str(error):
            raise
        raise TaskError(
            f"{name}.optimizer returned {type(optimizer).__name__}, whose step needs a closure to evaluate the loss again: use "
            "an optimizer that takes one gradient per step, such as SGD or AdamW."
        ) from error
    with torch.no_grad():
        model.eval()
        sums = evaluate_batch(task, model, Batches(test, task, device, dtype)(np.arange(min(sizes[1], 2))))
    shapes = {name: tuple(total.shape) for name, (total, _) in sums.items()}
    totals = Totals(task, shapes)
    totals.add(sums)
    totals.summary()
    facts = Facts(
        params=[
            ParamFact(n, tuple(p.shape), str(p.dtype).removeprefix("torch."), nbytes(p), p.requires_grad, n in sparse)
            for n, p in model.named_parameters()
        ],
        buffers=[
            BufferFact(n, str(b.dtype).removeprefix("torch."), nbytes(b), n in running)
            for n, b in model.named_buffers()
        ],
        train_examples=sizes[0],
        test_examples=sizes[1],
        optimizer_bytes=sum(nbytes(t) for s in optimizer.state.values() for t in s.values() if isinstance(t, Tensor)),
        activation_bytes=saved.total,
        sums=shapes,
        notes=task.notes(),
        device=device.type,
    )
    pattern.check(facts, config)
    return facts


def choose_device(asked: str) -> torch.device:
    if asked == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device=cuda, but torch sees no GPU here: use --device cpu, or auto.")
    return torch.device("cuda" if asked == "cuda" or (asked == "auto" and torch.cuda.is_available()) else "cpu")


def load_data(task: Task, config: Config) -> tuple[Any, Any, tuple[int, int]]:
    name = type(task).__name__
    pair = task.data()
    if not (isinstance(pair, tuple | list) and len(pair) == 2):
        raise TaskError(f"{name}.data returned {type(pair).__name__}: return two datasets, (train, held-out).")
    train, test = pair
    sizes = check_map_style(train, "training", task), check_map_style(test, "held-out", task)
    if sizes[0] < config.workers:
        raise DataError(
            f"{config.workers} workers cannot share {sizes[0]} training examples: use at most {sizes[0]} workers."
        )
    if sizes[0] < config.batch:
        raise ConfigError(
            f"batch {config.batch} is larger than the training set of {sizes[0]} examples: give at most --batch {sizes[0]}."
        )
    partitioner = parse_partitioner(config.partition)
    if partitioner.fixed:
        partitioner.owners(sizes[0], config.workers, config.seed, *groups_of(train, task, partitioner))
    return train, test, sizes


def check_optimizer(optimizer: Any, params: dict[str, nn.Parameter], name: str) -> None:
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TaskError(
            f"{name}.optimizer returned {type(optimizer).__name__}: return a torch optimizer over the given params."
        )
    given = {id(p) for p in params.values()}
    held = [p for g in optimizer.param_groups for p in g["params"]]
    if strange := [p for p in held if id(p) not in given]:
        raise TaskError(
            f"{name}.optimizer holds {len(strange)} tensor(s) that are not among the given params: use only those."
        )


def check_schedule(schedule: Any, name: str) -> None:
    if isinstance(schedule, torch.optim.lr_scheduler.ReduceLROnPlateau):
        raise TaskError(
            f"{name}.schedule returned ReduceLROnPlateau, which needs a metric at each step: use one that goes by steps."
        )
    if schedule is not None and not isinstance(schedule, torch.optim.lr_scheduler.LRScheduler):
        raise TaskError(f"{name}.schedule returned {type(schedule).__name__}: return a torch LRScheduler, or None.")


def nbytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


class SavedBytes(torch.autograd.graph.saved_tensors_hooks):
    """Counts what autograd keeps for backward: the activations, each storage once, parameters left out."""

    def __init__(self, model: nn.Module) -> None:
        self.total = 0
        self._seen = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
        super().__init__(self._count, lambda t: t)

    def _count(self, tensor: Tensor) -> Tensor:
        if tensor.layout == torch.strided and (key := tensor.untyped_storage().data_ptr()) not in self._seen:
            self._seen.add(key)
            self.total += tensor.untyped_storage().nbytes()
        return tensor
