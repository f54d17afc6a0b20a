"""One step of a task in a throw-away process: what it costs, and what is wrong with it, before any worker starts."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any, NamedTuple, cast

import msgspec
import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import IterableDataset

from weft.codecs.spec import AUTO
from weft.comm.torchdist import has_nccl
from weft.config import Config
from weft.data.keys import key_int
from weft.data.partition import parse as parse_partitioner
from weft.data.shard_sampler import ShardSampler
from weft.data.shards import MB, Index, Shards
from weft.errors import ConfigError, DataError, Incompatible, TaskError
from weft.patterns import shared_step
from weft.patterns.base import BufferFact, Facts, ParamFact, Pattern
from weft.patterns.batches import Batches, check_loss, check_map_style, groups_of
from weft.patterns.compression import momentum_of, set_momentum
from weft.patterns.elementwise import ELEMENTWISE
from weft.patterns.feeds import is_stateful, length_of, name_of, readable
from weft.patterns.late import why_not
from weft.patterns.metrics import Totals, evaluate_batch, evaluating
from weft.patterns.optimizer_state import check_state
from weft.patterns.randomness import host_state_kept, seed_everything
from weft.patterns.saved import SavedBytes
from weft.task import Task
from weft.usage import memory_left


def preflight(
    task: Task, pattern: Pattern, config: Config, known: Mapping[str, Index] | None = None, per_host: int = 1
) -> Facts:
    """``known``: the indexes of a run that is resumed; its shards must be as they were. ``per_host``: workers that will share this host."""
    name = type(task).__name__
    left = memory_left()
    device = choose_device(config.device, config.link)
    dtype = cast(torch.dtype, getattr(torch, config.dtype))
    seed_everything(key_int(config.seed, "data"))
    data = load_data(task, config, known or {})
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
    made_whole = whole_or_late(task, model, dtype, config.seed) if pattern.splits else ""
    params = {n: p for n, p in model.named_parameters() if p.requires_grad}
    if not params:
        raise TaskError(f"{name}.model has only frozen parameters: leave requires_grad=True on those to train.")
    optimizer = task.optimizer(list(params.values()))
    check_optimizer(optimizer, params, name)
    check_schedule(task.schedule(optimizer, 100), name)
    drop = rate_drop(task, list(params.values()), config.total_steps(data.num_train)) if pattern.goes_by_rate else None

    share = -(-config.batch // pattern.shares(config.workers))
    batches = Batches(data.train, task, device, dtype)

    def batch_of(examples: int) -> Any:
        if data.first is None:
            return batches(np.arange(min(data.num_train or examples, examples)))
        return batches.of(data.first[:examples])

    batch = batch_of(share)
    buffers_before, params_before = snapshot(dict(model.named_buffers())), snapshot(params)
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
    running = written(dict(model.named_buffers()), buffers_before)
    loss.backward()
    writes = [f"{name}.loss writes to parameter {n}" for n in written(params, params_before)]
    del params_before
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
    if pattern.splits:
        check_state(optimizer)
    params_before = snapshot(params)
    held_out = Batches(data.test, task, device, dtype)(np.arange(min(data.num_test, 2)))
    with evaluating(model):
        sums = evaluate_batch(task, model, held_out)
    writes += [f"{name}.evaluate writes to parameter {n}" for n in written(params, params_before)]
    del params_before
    shapes = {name: tuple(total.shape) for name, (total, _) in sums.items()}
    totals = Totals(task, shapes)
    totals.add(sums)
    totals.summary()
    cores = max(1.0, len(os.sched_getaffinity(0)) / config.threads)
    beside = min(per_host, int(cores)) - 1 if device.type == "cpu" else 0
    momentum = momentum_before(task, pattern, optimizer, config.total_steps(data.num_train), bool(sparse))
    facts = Facts(
        params=[
            ParamFact(n, tuple(p.shape), str(p.dtype).removeprefix("torch."), nbytes(p), p.requires_grad, n in sparse)
            for n, p in model.named_parameters()
        ],
        buffers=[
            BufferFact(n, str(b.dtype).removeprefix("torch."), nbytes(b), n in running)
            for n, b in model.named_buffers()
        ],
        train_examples=data.num_train,
        test_examples=data.num_test,
        optimizer_bytes=sum(nbytes(t) for s in optimizer.state.values() for t in s.values() if isinstance(t, Tensor)),
        activation_bytes=saved.total,
        sums=shapes,
        notes=task.notes(),
        device=device.type,
        indexes=data.indexes,
        about_data=data.notes,
        owned=data.owned,
        rate_drops_at=drop,
        cores=cores,
        memory_left=left,
        optimizer=type(optimizer).__name__,
        elementwise=type(optimizer) in ELEMENTWISE,
        momentum=None if isinstance(momentum, str) else momentum,
        momentum_stays=momentum if isinstance(momentum, str) else "",
        **pattern.learn(task, model, batch_of, held_out, config, beside),
        made_whole=made_whole,
        step_alone=writes[0] if writes else shared_step.why_not(model, optimizer, bool(sparse)),
    )
    pattern.check(facts, config)
    if pattern.splits or getattr(pattern, "compress", None) == AUTO:
        seconds = step_seconds(task, model, batch, optimizer)
        facts = msgspec.structs.replace(facts, step_s=seconds.step_s, optimizer_s=seconds.optimizer_s)
    return facts


def whole_or_late(task: Task, model: nn.Module, dtype: torch.dtype, seed: int) -> str:
    """late.why_not of the task's own ``model``; what randomness follows is as if it had not been asked."""
    torch_state = torch.get_rng_state()
    with host_state_kept():
        seed_everything(key_int(seed, "init"))
        reason = why_not(lambda: task.model().to(dtype), model)
    torch.set_rng_state(torch_state)
    return reason


def snapshot(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, Tensor]]:
    return {n: (t._version, t.detach().clone()) for n, t in tensors.items()}


def written(tensors: Mapping[str, Tensor], before: Mapping[str, tuple[int, Tensor]]) -> list[str]:
    """Those written to in place since: to the same values, too, but for writes through ``.data``, which no version counts."""
    return [
        n
        for n, t in tensors.items()
        if n in before and not (t._version == before[n][0] and torch.equal(t, before[n][1]))
    ]


def momentum_before(
    task: Task, pattern: Pattern, optimizer: torch.optim.Optimizer, total_steps: int, sparse: bool
) -> tuple[float, bool] | str:
    """plain_momentum, if the pattern may take it of the gradients beforehand; or, in words, why not."""
    if sparse:
        return "some gradients are sparse"
    if pattern.clips:
        return "clip_norm bounds gradients, and would bound their momentum, which is longer"
    found = plain_momentum(optimizer)
    if not isinstance(found, str) and pattern.wants_momentum:
        params = [p for group in optimizer.param_groups for p in group["params"]]
        if (schedule := who_sets_momentum(task, params, found[0] / 2, total_steps)) is not None:
            return f"{schedule} sets it during the run"
    return found


def plain_momentum(optimizer: torch.optim.Optimizer) -> tuple[float, bool] | str:
    """(factor, whether it is a running mean) of the first moment, if it is the same for all parameters and could as well be taken
    of the gradients beforehand: SGD's, Adam's, AdamW's without more to it. Of any other optimizer, why it could not."""
    groups = optimizer.param_groups
    if type(optimizer) is torch.optim.SGD:
        factors = {group["momentum"] for group in groups}
        if any(g["nesterov"] or g["dampening"] or (g["weight_decay"] and g["momentum"]) for g in groups):
            return "its nesterov, dampening or weight_decay needs the momentum after the mean"
    elif type(optimizer) in (torch.optim.Adam, torch.optim.AdamW):
        factors = {group["betas"][0] for group in groups}
        if any(g["weight_decay"] and not g.get("decoupled_weight_decay", True) for g in groups):
            return "its weight_decay goes into the momentum (that of AdamW does not)"
    else:
        return "it is none of torch's SGD, Adam and AdamW"
    if len(factors) > 1:
        return "its groups have different ones"
    if not 0 < (factor := float(factors.pop())) < 1:
        return f"it is {factor:g}"
    return factor, type(optimizer) is not torch.optim.SGD


def who_sets_momentum(task: Task, params: list[nn.Parameter], other: float, total_steps: int) -> str | None:
    """The task's schedule, if in these steps it touches the momentum: if ``other``, put in its place, does not stay."""
    for step, optimizer, schedule in scheduled(task, params, total_steps):
        if step == 0:
            set_momentum(optimizer.param_groups, other)
        elif any(momentum_of(group) != other for group in optimizer.param_groups):
            return type(schedule).__name__
    return None


class Seconds(NamedTuple):
    step_s: float
    optimizer_s: float  # of these


MAX_REPEATS, REPEAT_S = 3, 1.0


def step_seconds(task: Task, model: nn.Module, batch: Any, optimizer: torch.optim.Optimizer) -> Seconds:
    """Of a step that is not the first, which has made what is made once; the quickest of some, for whatever disturbs makes it longer."""
    found: list[Seconds] = []
    begin = time.perf_counter()
    while len(found) < MAX_REPEATS and time.perf_counter() - begin < REPEAT_S:
        optimizer.zero_grad()
        marks = [time.perf_counter()]
        for work in (task.loss(model, batch).backward, optimizer.step):
            work()
            if torch.cuda.is_initialized():
                torch.cuda.synchronize()
            marks.append(time.perf_counter())
        found.append(Seconds(marks[2] - marks[0], marks[2] - marks[1]))
    return min(found)


def own_device(kind: str, rank: int) -> torch.device:
    """Of a worker of this rank, made its default."""
    if kind != "cuda":
        return torch.device(kind)
    device = torch.device("cuda", rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


def choose_device(asked: str, link: str) -> torch.device:
    """``link``: as asked for. Where it needs a GPU, workers could only find out when they have started."""
    if asked == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device=cuda, but torch sees no GPU here: use --device cpu, or auto.")
    if link == "nccl":
        if not torch.cuda.is_available():
            raise ConfigError("link=nccl, but torch sees no GPU here: use --link gloo or shm.")
        if not has_nccl():
            raise ConfigError("link=nccl, but this torch was built without NCCL: use --link gloo or shm.")
    return torch.device("cuda" if asked == "cuda" or (asked == "auto" and torch.cuda.is_available()) else "cpu")


class Data(NamedTuple):
    train: Any
    test: Any
    num_train: int | None
    num_test: int
    first: list[Any] | None  # of a stream: examples of the first joined batch
    indexes: dict[str, Index]
    notes: list[str]
    owned: list[int]


def load_data(task: Task, config: Config, known: Mapping[str, Index]) -> Data:
    name = type(task).__name__
    pair = task.data()
    if not (isinstance(pair, tuple | list) and len(pair) == 2):
        raise TaskError(f"{name}.data returned {type(pair).__name__}: return two datasets, (train, held-out).")
    train, test = pair
    shards = {which: dataset for which, dataset in zip(("training", "held-out"), pair) if isinstance(dataset, Shards)}
    indexes = {which: one.same(known[which]) if which in known else one.scan() for which, one in shards.items()}
    train, test = readable(train, indexes.get("training")), readable(test, indexes.get("held-out"))
    first: list[Any] | None = None
    if isinstance(train, IterableDataset):
        num_train, first = check_stream(train, task, config)
    else:
        num_train = check_map_style(train, "training", task)
    num_test = check_map_style(test, "held-out", task)
    at_least = num_train if num_train is not None else len(first or ())
    if at_least < config.workers:
        raise DataError(
            f"{config.workers} workers cannot share {at_least} training examples: use at most {at_least} workers."
        )
    if at_least < config.batch:
        raise ConfigError(
            f"batch {config.batch} is larger than the training set of {at_least} examples: give at most --batch {at_least}."
        )
    partitioner = parse_partitioner(config.partition)
    streams = "shards" if "training" in indexes else "a stream" if first is not None else ""
    if streams and str(partitioner) != "shuffle":
        raise Incompatible(
            f"partition {config.partition!r} gives single examples to workers, and the training set of {name} is {streams}: "
            "leave --partition out (write one file per group to keep examples together)."
        )
    if config.balance == "auto" and "training" in indexes:
        raise Incompatible(
            f"balance 'auto' gives quick workers more of each batch, and of the shards of {name} a worker draws its own only: "
            "leave --balance out."
        )
    owned: list[int] = []
    if "training" in indexes:
        owned = ShardSampler(indexes["training"], config.batch, 0, config.workers, config.seed).owned()
    elif partitioner.fixed:
        partitioner.owners(num_train or 0, config.workers, config.seed, *groups_of(train, task, partitioner))
    notes = [about_shards(which, shards[which], index) for which, index in indexes.items()]
    if first is not None:
        notes.append(about_stream(train))
    return Data(train, test, num_train, num_test, first, indexes, notes, owned)


def check_stream(dataset: Any, task: Task, config: Config) -> tuple[int | None, list[Any]]:
    """Its length, if it tells one, and the examples of a joined batch."""
    who, length = f"{type(task).__name__}.data: the training stream {name_of(dataset)}", length_of(dataset)
    if length is None and config.steps is None:
        raise ConfigError(
            f"{who} has no length, so that epochs={config.epochs} cannot be counted: say how long with --steps, or give it a "
            "__len__ (the number of examples of one pass)."
        )
    if hasattr(dataset, "set_epoch"):
        dataset.set_epoch(0)
    first = list(islice(iter(dataset), config.batch))
    if not first:
        raise DataError(f"{who} yields no examples: look at what its __iter__ reads.")
    if length is not None and len(first) < min(length, config.batch):
        raise DataError(
            f"{who} ended after {len(first)} examples, and its __len__ says {length}: let them agree (a stream that "
            "gives each worker its own part does this: Weft deals the examples, each worker must see them all)."
        )
    return length, first


def about_shards(which: str, shards: Shards, index: Index) -> str:
    return (
        f"{which} set: {len(index.files)} file(s), {len(index.shards())} shard(s); a worker opens those it reads, and holds and "
        f"shuffles up to {shards.buffer_bytes / MB:.3g} MB of them at a time"
    )


def about_stream(dataset: Any) -> str:
    how = "its state_dict is saved" if is_stateful(dataset) else "a resume goes through it again up to its place"
    return f"training set: a stream that every worker reads whole, keeping its part of each batch; {how}"


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


def rate_drop(task: Task, params: list[nn.Parameter], total_steps: int) -> int | None:
    """After how many updates the rate is at most half of the highest so far; None if in no update but the last."""
    highest = 0.0
    for step, optimizer, _ in scheduled(task, params, total_steps):
        rate = float(optimizer.param_groups[0]["lr"])
        if rate <= highest / 2:
            return step
        highest = max(highest, rate)
    return None


def scheduled(
    task: Task, params: list[nn.Parameter], total_steps: int
) -> Iterator[tuple[int, torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]]:
    """(step, a fresh optimizer as the schedule sets it for that update, the schedule); nothing for a task without one."""
    optimizer = task.optimizer(params)
    schedule = task.schedule(optimizer, total_steps)
    if schedule is None:
        return
    for step in range(total_steps):
        yield step, optimizer, schedule
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch misses the updates between the schedule's steps
            schedule.step()


def nbytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
