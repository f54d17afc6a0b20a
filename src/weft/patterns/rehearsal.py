"""A worker whose fellows are only thought: what torch makes of parts, tried out before any worker starts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten

from weft.comm.link import Op, SoloLink
from weft.comm.torch_backend import process_groups
from weft.errors import Incompatible, TaskError, WeftError
from weft.patterns.blocks import find_blocks
from weft.patterns.elementwise import ELEMENTWISE
from weft.patterns.stages import ASKS
from weft.task import Task

STEPS = 2  # some make their state in the first, and use it in the second


class Rehearsal(SoloLink):
    """One of ``world`` ranks, of which the others are thought: it counts what would travel."""

    def __init__(self, world: int, rank: int = 0) -> None:
        super().__init__()
        self.rank, self.world = rank, world
        self.forget()

    def forget(self) -> None:
        self.calls = 0
        self.reduced = self.gathered = self.scattered = (
            0  # bytes: of a sum, of this rank's part, of what each keeps a part of
        )

    def all_reduce(self, buffers: Sequence[Tensor], op: Op = "sum") -> None:
        self.calls += 1
        self.reduced += sum(t.nbytes for t in buffers)

    def all_gather(self, tensor: Tensor) -> list[Tensor]:
        self.calls += 1
        self.gathered += tensor.nbytes
        return [tensor.detach().clone() for _ in range(self.world)]

    def all_gather_into(self, whole: Tensor, mine: Tensor) -> None:
        for row, part in zip(whole, self.all_gather(mine), strict=True):
            row.copy_(part)

    def reduce_scatter(self, mine: Tensor, given: Tensor) -> None:
        self.calls += 1
        self.scattered += given.nbytes
        mine.copy_(given[self.rank])


def one_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0][:200] or type(error).__name__


def check_optimizer_of_parts(task: Task, model: nn.Module, degree: int) -> None:
    """Incompatible for an optimizer that looks at a parameter as a whole in a way that torch does not know for one in ``degree`` parts."""
    params = [p for p in model.parameters() if p.requires_grad]
    if type(task.optimizer(params)) in ELEMENTWISE:
        return
    name = ""
    with process_groups(Rehearsal(degree)):
        mesh = init_device_mesh("cpu", (degree,))
        parts = [part_of_many(p.detach(), mesh, degree) for p in params]
        try:
            optimizer = task.optimizer(parts)
            name = type(optimizer).__name__
            for _ in range(STEPS):
                for part in parts:
                    part.grad = drawn_like(part)
                optimizer.step()
        except WeftError:
            raise
        except Exception as error:  # whatever DTensor makes of its code
            raise Incompatible(
                f"{name or f'the optimizer of {type(task).__name__}'} looks at each parameter as a whole, and here every worker has a part of it. torch says of its "
                f"step: {one_line(error)}. Take an optimizer that treats each number by itself (SGD, Adam, AdamW, RMSprop, ...), or a layout that "
                "leaves parameters whole: --pattern pipeline, or allreduce."
            ) from error


def part_of_many(tensor: Tensor, mesh: Any, degree: int) -> nn.Parameter:
    """A number by itself stays whole."""
    if tensor.dim() == 0:
        return nn.Parameter(tensor.clone())
    part = tensor.chunk(degree)[0].clone()
    return nn.Parameter(
        DTensor.from_local(part, mesh, [Shard(0)], run_check=False, shape=tensor.shape, stride=tensor.stride())
    )


def drawn_like(part: Tensor) -> Tensor:
    if not isinstance(part, DTensor):
        return torch.randn(part.shape, dtype=part.dtype)
    numbers = torch.randn(part.to_local().shape, dtype=part.dtype)
    return DTensor.from_local(
        numbers, part.device_mesh, part.placements, run_check=False, shape=part.shape, stride=part.stride()
    )


#: What is asked about a parameter is the same of its parts.
ABOUT = ASKS | {
    *(Tensor.numel, Tensor.nelement, Tensor.size, Tensor.stride, Tensor.dim, Tensor.ndimension, Tensor.element_size),
    *(Tensor.is_floating_point, Tensor.is_complex, Tensor.is_contiguous, Tensor.__len__),
    *(
        getattr(Tensor, name).__get__
        for name in ("is_cuda", "ndim", "layout", "is_leaf", "is_sparse", "itemsize", "nbytes", "grad")
    ),
}


def check_uses(task: Task, model: nn.Module, loss: Callable[[], Tensor], stays: bool) -> None:
    """TaskError for a ``loss`` that uses a parameter outside the forward of its block, or of the model, where a worker has a part of it alone (unless,
    once gathered, a block ``stays`` so until backward); Incompatible for a parameter that cannot be in parts."""
    who = type(task).__name__
    for name, p in model.named_parameters():
        if p.dim() == 0:
            raise Incompatible(
                f"parameter {name!r} of {who}'s model is a single number without dimensions, which torch's fully_shard does not take: give it "
                "one (torch.tensor([x]) in place of torch.tensor(x)), or use --pattern allreduce, tensor or pipeline."
            )
    blocks = find_blocks(task, model)
    inner = {id(m): name for name, block in reversed(blocks.items()) for m in block.modules()}
    found: dict[int, tuple[str, str]] = {}  # of each parameter, its name and the block that gathers it
    for prefix, module in model.named_modules():
        unit = inner.get(id(module), "")
        for last, p in module.named_parameters(prefix, recurse=False):
            name, home = found.setdefault(id(p), (last, unit))
            if home != unit:
                raise TaskError(
                    f"{who}'s model uses one parameter in two parts that are gathered at different times: {name!r} and {last!r}. Make one block of them (the "
                    "task's blocks(model)), or use --pattern allreduce, tensor or pipeline."
                )
    inside: set[str] = set()
    handles = []
    for unit, module in {**blocks, "": model}.items():
        handles.append(module.register_forward_pre_hook(lambda *_, unit=unit: inside.add(unit), prepend=True))
        if unit and not stays:  # what belongs to no block stays gathered after the model's forward
            handles.append(module.register_forward_hook(lambda *_, unit=unit: inside.discard(unit), always_call=True))

    class Uses(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func not in ABOUT:
                for t in tree_flatten((args, kwargs))[0]:
                    if (at := found.get(id(t))) is not None and at[1] not in inside:
                        raise TaskError(outside(who, *at, func))
            return func(*args, **(kwargs or {}))

    try:
        with Uses():
            loss()
    finally:
        for handle in handles:
            handle.remove()


def outside(who: str, name: str, unit: str, func: Any) -> str:
    where = f"the forward of block {unit!r}" if unit else "the model's forward"
    return (
        f"{who} uses parameter {name!r} outside {where} ({getattr(func, '__name__', func)}), where each worker has only a part of it. Use it inside (a penalty "
        "can be made there and returned), let the optimizer do it (weight_decay for an L2 penalty), or use --pattern pipeline or allreduce."
    )
