"""Tensor parallelism on a model as it stands: which modules to cut and how, found and rehearsed before a run; and the cutting.

Linears that feed one another are cut in pairs, the first by columns, the second by rows, so that what lies between (activations of an MLP, heads
of an attention) is each worker's own and one all-reduce follows (Shoeybi et al. 2019, 1909.08053). Between them a tensor is a DTensor: the model's
own code sees the whole shape, and torch refuses, or exchanges, where that code needs more than a worker has. The rehearsal counts these exchanges:
a pair that needs more than its own is not cut, or refused.

The one place that knows torch's styles. tests/patterns/test_tensors.py holds it to that.
"""

from __future__ import annotations

import copy
import fnmatch
import math
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

import torch
from msgspec.structs import replace
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.experimental import implicit_replication
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    loss_parallel,
    parallelize_module,
)
from torch.utils._pytree import tree_flatten

from weft.comm.torch_backend import process_groups
from weft.errors import CommError, Incompatible, TaskError, WeftError
from weft.patterns.base import TensorFacts
from weft.patterns.blocks import find_blocks
from weft.patterns.by_sequence import BetweenPairs, keep_in_parts
from weft.patterns.dtensor_ops import as_another_rank
from weft.patterns.metrics import evaluating
from weft.patterns.rehearsal import Rehearsal, one_line
from weft.patterns.saved import SavedBytes
from weft.task import Task

COLUMN: Final = "column"
ROW: Final = "row"
EMBEDDING: Final = "embedding"
HEAD: Final = "head"
KINDS: dict[str, type[nn.Module]] = {COLUMN: nn.Linear, ROW: nn.Linear, EMBEDDING: nn.Embedding, HEAD: nn.Linear}
REPEATS = 2
FUSED = (1, 2, 3)  # projections that one Linear may hold: up and gate, query and key and value


# -- cutting


def cut(
    model: nn.Module, facts: TensorFacts, mesh: DeviceMesh, before: Callable[[nn.Module], None] | None = None
) -> None:
    """Parameters of modules that have a style become DTensors, each worker's a part of what it has. Tied ones stay tied. ``before``: hears of
    each module that is about to be cut."""
    sites: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for name, p in module.named_parameters(recurse=False):
            sites.setdefault(id(p), []).append((module, name))
    # found before any is replaced
    tied = [each for each in sites.values() if len(each) > 1]
    modules = dict(model.named_modules())
    for name, style in facts.styles.items():
        if before is not None:
            before(modules[name])
        parallelize_module(modules[name], mesh, style_of(style, name in facts.spread), src_data_rank=None)
    if facts.spread:
        keep_in_parts(model, columns_of(facts), facts.entered, facts.joined, mesh)
    for (first, first_name), *others in tied:
        for module, name in others:
            setattr(module, name, getattr(first, first_name))


def make_whole(
    model: nn.Module, part: nn.Module, names: Collection[str], first: Mapping[str, str], mesh: DeviceMesh
) -> None:
    """Parameters of ``part`` of these ``names`` become DTensors that each worker has whole, so that torch knows what to make of their
    gradients. ``first``: by each name in ``model``, the first of its names."""
    made: dict[int, nn.Parameter] = {}
    inside = set(part.modules())
    for prefix, module in model.named_modules():
        for name, p in list(module.named_parameters(recurse=False)) if module in inside else ():
            known = first[f"{prefix}.{name}" if prefix else name]
            if known in names and not isinstance(p, DTensor):
                whole = DTensor.from_local(p.detach(), mesh, [Replicate()], run_check=False)
                module._parameters[name] = made.setdefault(id(p), nn.Parameter(whole, requires_grad=p.requires_grad))


def columns_of(facts: TensorFacts) -> list[str]:
    """What begins a pair, and what stands alone."""
    return [name for name, style in facts.styles.items() if style != ROW]


def style_of(style: str, spread: bool = False) -> ParallelStyle:
    """``spread``: what a row makes is each worker's own by the last dimension but one."""
    if style == ROW and spread:
        return RowwiseParallel(output_layouts=Shard(-2), use_local_output=False)
    if style == ROW:
        return RowwiseParallel()
    if style == EMBEDDING:
        return RowwiseParallel(input_layouts=Replicate())
    return ColwiseParallel(output_layouts=Shard(-1), use_local_output=False)  # a column's or the head's


@contextmanager
def computing(facts: TensorFacts | None) -> Iterator[None]:
    """Around forward and backward of a model that is cut: its plain tensors count as whole on every worker."""
    with ExitStack() as inside:
        inside.enter_context(implicit_replication())
        if facts is not None and HEAD in facts.styles.values():
            inside.enter_context(loss_parallel())
        yield


# -- what to cut


@dataclass
class Call:
    """One of a Linear or an Embedding, in the order of the forward pass."""

    name: str
    module: nn.Module
    given: Tensor
    made: Tensor


@dataclass
class Pair:
    columns: list[str]
    row: str
    styles: dict[str, str] = field(init=False)

    def __post_init__(self) -> None:
        self.styles = dict.fromkeys(self.columns, COLUMN) | {self.row: ROW}

    def __str__(self) -> str:
        return f"{', '.join(self.columns)} and {self.row}"


class BySequence(NamedTuple):
    """Activations between pairs are to be in parts, too, until the end of the blocks that are ``joined``. ``held_out``: a batch to evaluate."""

    blocks: list[str]
    joined: list[str]
    held_out: Any


def learn(task: Task, model: nn.Module, batch: Any, degree: int, by_sequence: BySequence | None = None) -> TensorFacts:
    """How to cut this model over ``degree`` workers, and what a step then exchanges. Incompatible where nothing can be cut."""
    before = {n: b.clone() for n, b in model.named_buffers()}
    calls = observe(task, model, batch)
    running = [n for n, b in model.named_buffers() if not torch.equal(b, before[n])]
    if asked := task.tensor_plan(model):
        facts = as_planned(task, model, batch, asked, degree, running)
    else:
        facts = as_found(task, model, batch, calls, degree, running)
    return facts if by_sequence is None else go_on_in_parts(task, model, batch, facts, by_sequence, running)


def as_planned(
    task: Task, model: nn.Module, batch: Any, asked: Mapping[str, str], degree: int, running: Sequence[str]
) -> TensorFacts:
    styles = check_plan(task, model, asked, degree)
    try:
        return rehearse(task, model, batch, styles, degree, {}, timed=True, running=running)
    except BufferLost as lost:
        raise Incompatible(
            f"{type(task).__name__}.tensor_plan cuts what writes to buffer {lost}, which would stay as it is: leave out the Linears round it."
        ) from None


def as_found(
    task: Task, model: nn.Module, batch: Any, calls: Sequence[Call], degree: int, running: Sequence[str]
) -> TensorFacts:
    left: dict[str, str] = {}
    pairs = find_pairs(calls)
    styles: dict[str, str] = {}
    exchanges: dict[tuple[str, ...], int] = {}
    why_not: dict[tuple[str, ...], str] = {}
    for pair in pairs:
        kind = tuple(without_numbers(name) for name in pair.styles)  # of blocks that repeat, one is tried
        if kind not in exchanges:
            try:
                exchanges[kind] = try_out(task, model, batch, pair, degree, running)
            except BufferLost as lost:
                exchanges[kind], why_not[kind] = 0, f"buffer {lost} between them would not be written to"
        if kind in why_not:
            left |= dict.fromkeys(pair.styles, why_not[kind])
        elif exchanges[kind] > (
            needed := 1 + len(pair.columns)
        ):  # of what the row makes; backward, of what each column was given
            why = f"what lies between them needs all of it: {exchanges[kind]} exchanges instead of {needed}"
            left |= dict.fromkeys(pair.styles, why)
        else:
            styles |= pair.styles
    ends, whole_ends = find_ends(calls, degree)
    left |= whole_ends
    if not styles and not ends:
        why = "; ".join(f"{name} stays whole, for {why}" for name, why in left.items())
        raise Incompatible(
            f"tensor={degree}: {type(task).__name__}'s model has no Linears that feed one another and can be cut, so there is nothing to do"
            f"{f' ({why})' if why else ''}: use --pattern sharded, or say what to cut by the task's tensor_plan(model)."
        )
    if ends:
        try:
            return rehearse(task, model, batch, styles | ends, degree, left, timed=True)
        except WeftError:
            raise
        except Exception as error:  # whatever DTensor makes of a user's loss
            left |= {name: f"the loss does not compute with its part: {one_line(error)}" for name in ends}
    return rehearse(task, model, batch, styles, degree, left, timed=True)


def go_on_in_parts(
    task: Task, model: nn.Module, batch: Any, facts: TensorFacts, by: BySequence, running: Sequence[str]
) -> TensorFacts:
    """``facts``: of what is cut without. Incompatible for what cannot go on in parts."""
    who, inside = f"{type(task).__name__}'s model", tuple(f"{block}." for block in by.blocks)
    rows = [name for name, style in facts.styles.items() if style == ROW and name.startswith(inside)]
    if not rows:
        why = "".join(f"; {name} stays whole, for {why}" for name, why in facts.left.items())
        raise Incompatible(
            f"sequence=true: no pair of Linears within the blocks of {who} is cut, so nothing goes on in parts{why}. Leave sequence=true out."
        )
    asked = replace(facts, spread=rows, entered=by.blocks, joined=by.joined)
    try:
        with as_another_rank():  # the last has the smallest part
            rehearse_as(task, model, batch, asked, running=running, rank=facts.degree - 1, held_out=by.held_out)
        return rehearse_as(task, model, batch, asked, running=running, timed=True)
    except WeftError:
        raise
    except BufferLost as lost:
        raise Incompatible(
            f"sequence=true: {who} writes to buffer {lost} between its pairs, which would stay as it is. Leave sequence=true out."
        ) from None
    except Exception as error:  # whatever DTensor makes of the code between pairs
        raise Incompatible(
            f"sequence=true: torch does not compute what lies between the pairs of {who} in parts of the sequence ({one_line(error)}). Leave sequence=true out."
        ) from error


def watched(task: Task, model: nn.Module, facts: TensorFacts) -> BetweenPairs:
    return BetweenPairs(type(task).__name__, model, facts.spread, columns_of(facts), facts.joined)


def without_numbers(name: str) -> str:
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def check_plan(task: Task, model: nn.Module, asked: Mapping[str, str], degree: int) -> dict[str, str]:
    """The task's own plan, with its stars resolved."""
    modules, who = dict(model.named_modules()), f"{type(task).__name__}.tensor_plan"
    styles: dict[str, str] = {}
    for pattern, style in asked.items():
        if style not in KINDS:
            raise TaskError(f"{who} gives {pattern!r} the style {style!r}: possible are {', '.join(KINDS)}.")
        found = [name for name in modules if name and fnmatch.fnmatchcase(name, pattern)]
        if not found:
            raise TaskError(f"{who} names {pattern!r}, which is no module of the model: see model.named_modules().")
        for name in found:
            if not isinstance(modules[name], KINDS[style]):
                raise TaskError(
                    f"{who} cuts {name!r} as {style}, and it is a {type(modules[name]).__name__}, not a {KINDS[style].__name__}."
                )
            styles[name] = style
    for name, style in styles.items():
        if why := indivisible(modules[name], style, degree):
            raise Incompatible(
                f"tensor={degree} cannot cut {name}: {why}. Use another degree, or leave it out of {who}."
            )
    return styles


def indivisible(module: nn.Module, style: str, degree: int) -> str:
    """Why its size does not allow it, if it does not."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    size, what = (
        (weight.shape[1], "inputs") if style == ROW else (weight.shape[0], "rows" if style == EMBEDDING else "outputs")
    )
    return f"its {size} {what} cannot be divided by {degree}" if size % degree else ""


def observe(task: Task, model: nn.Module, batch: Any) -> list[Call]:
    calls: list[Call] = []
    names = {module: name for name, module in model.named_modules()}

    def note(module: nn.Module, args: tuple[Any, ...], made: Any) -> None:
        if args and isinstance(args[0], Tensor) and isinstance(made, Tensor):
            calls.append(Call(names[module], module, args[0], made))

    hooks = [m.register_forward_hook(note) for m in names if isinstance(m, nn.Linear | nn.Embedding)]
    try:
        with torch.no_grad():
            task.loss(model, batch)
    finally:
        for hook in hooks:
            hook.remove()
    return calls


def find_pairs(calls: Sequence[Call]) -> list[Pair]:
    """Linears with one input, and the one that comes next, if its width is theirs."""
    times: dict[str, int] = {}
    for call in calls:
        times[call.name] = times.get(call.name, 0) + 1
    linears = [call for call in calls if isinstance(call.module, nn.Linear)]
    together: list[list[Call]] = []
    for call in linears:
        if together and together[-1][0].given is call.given:
            together[-1].append(call)
        else:
            together.append([call])
    pairs, k = [], 0
    while k + 1 < len(together):
        first, second = together[k], together[k + 1]
        names = {call.name for call in first}
        if (
            len(second) == 1
            and second[0].name not in names
            and all(times[c.name] == 1 for c in (*first, *second))
            and fits([c.made.shape[-1] for c in first], second[0].given.shape[-1])
        ):
            pairs.append(Pair([c.name for c in first], second[0].name))
            k += 2
        else:
            k += 1
    return pairs


def fits(made: Sequence[int], taken: int) -> bool:
    """One of several makes as many numbers as the next takes (others fewer: keys that queries share); or one makes them in one piece."""
    return taken == max(made) if len(made) > 1 else made[0] in [k * taken for k in FUSED]


class BufferLost(Exception):
    """A step leaves it as it was, for it wrote to a copy: torch's BatchNorm on channels in parts."""


def try_out(task: Task, model: nn.Module, batch: Any, pair: Pair, degree: int, running: Sequence[str]) -> int:
    """Exchanges of a step in which this pair alone is cut. Incompatible where it cannot be."""
    modules = dict(model.named_modules())
    cure = "Use another degree, change the model, or say what to cut by the task's tensor_plan(model)."
    for name, style in pair.styles.items():
        if why := indivisible(modules[name], style, degree):
            raise Incompatible(f"tensor={degree} cannot cut {pair}: of {name}, {why}. {cure}")
    try:
        return rehearse(task, model, batch, pair.styles, degree, {}, running=running).exchanges
    except (WeftError, BufferLost):
        raise
    except Exception as error:  # whatever DTensor makes of the code between them
        raise Incompatible(
            f"tensor={degree} cannot cut {pair}: torch does not compute with them in parts ({one_line(error)}). Of an attention, heads must be divisible by "
            f"{degree}, and what belongs to a head lie together, as by .view(..., heads, 3, width) and not (..., 3, heads, width); the loss must not use "
            f"parameters by themselves (a penalty). {cure}"
        ) from error


def find_ends(calls: Sequence[Call], degree: int) -> tuple[dict[str, str], dict[str, str]]:
    """Embeddings and the head (the last Linear), where a part saves more than its exchange costs; and why not, of large ones."""
    names: dict[str, str] = {}
    left: dict[str, str] = {}
    linears = [call for call in calls if isinstance(call.module, nn.Linear)]
    ends = [call for call in calls if isinstance(call.module, nn.Embedding)] + linears[-1:]
    weights = [weight_of(call.module) for call in ends]
    for call, weight in zip(ends, weights, strict=True):
        style = EMBEDDING if isinstance(call.module, nn.Embedding) else HEAD
        sharing = [c for c, w in zip(ends, weights, strict=True) if w is weight]
        if any(weight.numel() < 2 * each.made.numel() for each in sharing):
            continue  # what would travel is more than what it holds
        if why := indivisible(call.module, style, degree):
            left[call.name] = why
        else:
            names[call.name] = style  # of a weight that several use, all are cut alike: by rows of the table
    return names, left


def weight_of(module: nn.Module) -> Tensor:
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight


# -- rehearsal


def rehearse(
    task: Task,
    model: nn.Module,
    batch: Any,
    styles: Mapping[str, str],
    degree: int,
    left: Mapping[str, str],
    timed: bool = False,
    running: Sequence[str] = (),
) -> TensorFacts:
    asked = TensorFacts(
        styles=dict(styles), parameters=[], exchanged=0, exchanges=0, degree=degree, activation_bytes=0, left=dict(left)
    )
    return rehearse_as(task, model, batch, asked, timed=timed, running=running)


def rehearse_as(
    task: Task,
    model: nn.Module,
    batch: Any,
    facts: TensorFacts,
    *,
    timed: bool = False,
    running: Sequence[str] = (),
    rank: int = 0,
    held_out: Any = None,
) -> TensorFacts:
    """A step of one of the workers that ``facts`` are for, alone; then an evaluation, if ``held_out`` is given. Raises what torch raises where the
    model's code does not go with a cut, and BufferLost for one of ``running``, which a step writes to. ``timed``: all is measured, else only
    exchanges within the step."""
    model = copy.deepcopy(model)
    buffers = {n: b.clone() for n, b in model.named_buffers()}
    link = Rehearsal(facts.degree, rank)
    with process_groups(link):
        cut(model, facts, init_device_mesh("cpu", (facts.degree,), mesh_dim_names=("tensor",)))
        parameters = [
            n
            for n, p in model.named_parameters()
            if isinstance(p, DTensor) and any(at.is_shard() for at in p.placements)
        ]
        parted = note_parted(find_blocks(task, model))
        watch = watched(task, model, facts) if facts.spread else nullcontext()
        saved = SavedBytes(model)
        link.forget()

        def step(*watch: AbstractContextManager[Any]) -> None:
            model.zero_grad(set_to_none=True)
            with computing(facts):
                with ExitStack() as inside:
                    for each in watch:
                        inside.enter_context(each)
                    loss = task.loss(model, batch)
                loss = loss.full_tensor() if isinstance(loss, DTensor) else loss
                if loss.dim():
                    raise CommError(f"the loss has shape {tuple(loss.shape)}")
                loss.backward()

        step(watch, saved)
        within = [n for n, p in model.named_parameters() if isinstance(p.grad, DTensor) and not isinstance(p, DTensor)]
        for name, buffer in model.named_buffers():
            if name in running and torch.equal(buffer, buffers[name]):
                raise BufferLost(name)
        for p in model.parameters() if timed else ():  # what is left to be joined of gradients, once a step
            if isinstance(p.grad, DTensor) and any(at.is_partial() for at in p.grad.placements):
                link.all_reduce([p.grad.to_local()])
            elif isinstance(p.grad, DTensor) and not isinstance(p, DTensor):
                p.grad.full_tensor()
        reduced, gathered, scattered, exchanges = link.reduced, link.gathered, link.scattered, link.calls
        compute_s = math.inf
        for _ in range(REPEATS if timed else 0):
            begin = time.perf_counter()
            step()
            compute_s = min(compute_s, time.perf_counter() - begin)
        if held_out is not None:
            with evaluating(model), computing(facts), watch:
                task.evaluate(model, held_out)
    return replace(
        facts,
        parameters=parameters,
        within=within,
        exchanged=reduced,
        gathered=gathered,
        scattered=scattered,
        exchanges=exchanges,
        compute_s=compute_s if timed else 0.0,
        activation_bytes=saved.total,
        parted=list(parted),
    )


def note_parted(blocks: Mapping[str, nn.Module]) -> dict[str, None]:
    """Fills with the names of those that return a tensor in parts."""
    found: dict[str, None] = {}

    def hook(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def note(module: nn.Module, args: Any, made: Any) -> None:
            leaves = tree_flatten(made)[0]
            if any(isinstance(t, DTensor) and not all(at.is_replicate() for at in t.placements) for t in leaves):
                found[name] = None

        return note

    for name, block in blocks.items():
        block.register_forward_hook(hook(name))
    return found
