"""A model cut into stages, of which a worker computes some, while the task's own code stays as it stands.

A stage runs the task's whole ``loss``: what comes before its first block is computed without numbers (on torch's meta device, where a tensor is
only its shape), in the place of the last block before it stands what was received, and after its last block the code is left. What the code makes
of the batch alone (masks, positions, targets) is real in every stage. So a model needs only blocks that run one after the other; what else passes
from before a cut to after it (a skip connection) is seen, and refused.

Items are what can be cut between: the code up to the end of the first block, then each block with the code before it, then what follows the last
block, with the loss.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.pipelining._backward import stage_backward_input, stage_backward_weight
from torch.distributed.tensor import DTensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map

from weft.company import company
from weft.errors import Incompatible, TaskError
from weft.patterns.base import ItemFact, PipelineFacts
from weft.patterns.blocks import find_blocks
from weft.patterns.buffers import Place, aside
from weft.patterns.metrics import evaluating
from weft.patterns.saved import own
from weft.task import Task

T = TypeVar("T")

REST = "the rest"  # the item after the last block
MIN_PASSES, MAX_PASSES, PASSES_S = 2, 10, 5.0  # that are timed, and until when another is begun


CALLED = "_call_impl"  # of a module: forward with all its hooks, which may exchange what forward has made


class Left(BaseException):
    """The last block of a stage has run: ``made`` is what it returned. Not an Exception: the task's own code must let it through."""

    def __init__(self, made: Any) -> None:
        super().__init__()
        self.made = made


class Cuts:
    """Blocks of a model, each of which is told at each pass whether it computes."""

    def __init__(self, task: Task, model: nn.Module, names: Sequence[str]) -> None:
        self.task, self.model, self.names = task, model, list(names)
        modules = dict(model.named_modules())
        self.blocks = [modules[name] for name in names]
        self.begin, self.end = 0, len(self.blocks) + 1  # items of the stage that runs
        self.given: Any = None  # what the block before them returned
        self.reached = 0  # items done
        #: Computes a block: (which, its forward, args, kwargs) -> what goes on.
        self.compute: Callable[[int, Callable[..., Any], Any, Any], Any] = plainly
        #: Hears which item begins, also of those that another stage computes.
        self.on_item: Callable[[int], None] = unheard
        #: Buffers that a training step writes to, and the last item that does.
        self.running: list[tuple[Place, int]] = []
        self._shapes: dict[Any, Any] = {}  # what blocks make of what shapes
        self.without_numbers: dict[Any, Any] = {}  # the same of single operations
        self.calls: list[Callable[..., Any]] = [block._call_impl for block in self.blocks]
        for k, block in enumerate(self.blocks):
            vars(block)[CALLED] = self._instead_of(self.calls[k], k)

    def undo(self) -> None:
        for block in self.blocks:
            del vars(block)[CALLED]

    def _instead_of(self, call: Callable[..., Any], k: int) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            if torch._C._current_graph_task_id() >= 0:
                raise TaskError(
                    f"backward runs block {self.names[k]!r} once more (activation checkpointing round it), and a stage of a pipeline has not all that it is "
                    "given there: put the checkpoint inside the block, in its forward."
                )
            if k != self.reached:
                raise TaskError(out_of_order(self.task, self.names, k, self.reached))
            if k == self.begin - 1:
                made = self.given
            elif k < self.begin - 1:
                made = self._shape(k, call, args, kwargs)
            else:
                made = self.compute(k, call, args, kwargs)
            self.reached = k + 1
            if self.reached == self.end:
                raise Left(made)
            self.on_item(self.reached)
            return made

        return run

    def _shape(self, k: int, call: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """What the block would make, without numbers."""
        leaves, spec = tree_flatten((args, kwargs))
        key = (
            k,
            self.model.training,
            spec,
            *((t.shape, t.dtype) if isinstance(t, Tensor) else repr(t) for t in leaves),
        )
        if key not in self._shapes:
            with torch.no_grad():
                self._shapes[key] = tree_map(lambda t: own(t) if isinstance(t, Tensor) else t, call(*args, **kwargs))
        return tree_map(lambda t: torch.empty_like(t) if isinstance(t, Tensor) else t, self._shapes[key])

    def run(self, code: Callable[[], Any], begin: int, end: int, given: Any) -> Any:
        """Of items ``begin`` to ``end``: what the last of them makes; of the rest, what ``code`` returns."""
        self.begin, self.end, self.given, self.reached = begin, end, given, 0
        self.on_item(0)
        try:
            if begin == 0:
                made = code()
            else:
                # another stage of this worker may have written these already
                with aside([place for place, last in self.running if last < begin]), Before(self):
                    made = code()
        except Left as left:
            made = tree_map(lambda t: t.full_tensor() if isinstance(t, DTensor) else t, left.made)
        finally:
            self.given = None
            self.begin, self.end = 0, len(self.blocks) + 1
        return made


def unheard(item: int) -> None: ...


def plainly(k: int, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    return forward(*args, **kwargs)


class Before(TorchFunctionMode):
    """Until the stage begins, what meets a tensor without numbers has none itself; after that nothing may meet one."""

    def __init__(self, cuts: Cuts) -> None:
        super().__init__()
        self.cuts = cuts

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if any_meta(args) or (kwargs and any_meta(kwargs.values())):
            if self.cuts.reached >= self.cuts.begin and func not in ASKS:
                raise TaskError(skips(self.cuts, self.cuts.begin, func))
            return self._shape(func, args, kwargs)
        return func(*args, **kwargs)

    def _shape(self, func: Any, args: Any, kwargs: Any) -> Any:
        """torch takes up to 0.4 ms for an operation without numbers, much of it in Python: once for each shape is enough."""
        leaves, spec = tree_flatten((args, kwargs))
        name, known = getattr(func, "__name__", ""), self.cuts.without_numbers
        lasts = all_plain(leaves) and not (name.endswith("_") or "out" in kwargs)  # it writes to nothing
        key = (func, spec, *(laid_out(t) if isinstance(t, Tensor) else repr(t) for t in leaves)) if lasts else None
        if key in known:
            return tree_map(lambda t: t() if isinstance(t, Shape) else t, known[key])
        args, kwargs = tree_map(lambda t: without_numbers(t) if isinstance(t, Tensor) else t, (args, kwargs))
        try:
            made = func(*args, **kwargs)
        except RuntimeError as error:
            if "meta" not in str(error):
                raise
            raise TaskError(looks(self.cuts, self.cuts.begin, func)) from error
        if (
            lasts
            and len(known) < MOST_SHAPES
            and type(made) in (Tensor, tuple, list)
            and all_plain(tree_flatten(made)[0])
        ):
            known[key] = tree_map(lambda t: Shape(*laid_out(t)) if isinstance(t, Tensor) else t, made)
        return made


def without_numbers(tensor: Tensor) -> Tensor:
    """As ``to("meta")``, which torch does not know of parts in inference mode."""
    if tensor.is_meta:
        return tensor
    made: Tensor = torch.ops.aten._to_copy.default(tensor, device=torch.device("meta"))
    return made


@dataclass(frozen=True)
class Shape:
    """A tensor without numbers, to be."""

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype

    def __call__(self) -> Tensor:
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device="meta")


def laid_out(tensor: Tensor) -> tuple[torch.Size, tuple[int, ...], torch.dtype]:
    return tensor.shape, tensor.stride(), tensor.dtype


MOST_SHAPES = 10_000


def all_plain(leaves: Iterable[Any]) -> bool:
    """None is in parts (a DTensor) or sparse: shape and strides say all of them."""
    return all(type(t) in (Tensor, nn.Parameter) and t.layout == torch.strided for t in leaves if isinstance(t, Tensor))


def any_meta(arguments: Iterable[Any]) -> bool:
    """Asked of each operation of a stage: torch's own way to look into arguments takes ten times as long."""
    for t in arguments:
        if isinstance(t, Tensor):
            if t.is_meta:
                return True
        elif isinstance(t, list | tuple) and any_meta(t):
            return True
    return False


#: What may be asked of a tensor without numbers at any time.
ASKS = {getattr(Tensor, name).__get__ for name in ("is_meta", "shape", "device", "dtype", "requires_grad")}


#: What Python makes of a tensor's numbers.
LOOKS = {
    *(Tensor.item, Tensor.tolist, Tensor.numpy),
    *(Tensor.__bool__, Tensor.__float__, Tensor.__int__, Tensor.__index__),
}


def looks(cuts: Cuts, end: int, func: Any) -> str:
    """``end``: the first item that may be another stage's."""
    return (
        f"before the end of block {cuts.names[end - 1]!r}, {type(cuts.task).__name__}'s code looks at numbers that its model has computed "
        f"({getattr(func, '__name__', func)}): a later stage of a pipeline runs that code, too, and has no numbers there. Look at them after the last "
        "block, or at the batch's alone."
    )


def out_of_order(task: Task, names: Sequence[str], now: int, reached: int) -> str:
    who = type(task).__name__
    if now < reached:
        return (
            f"{who}'s model runs block {names[now]!r} twice in one loss or evaluate: a pipeline needs each block once. Compute all from one run of the "
            "model, or make one block of what runs between."
        )
    return f"{who}'s model runs block {names[now]!r} before {names[reached]!r}: a pipeline needs them in the order of blocks(model), one after the other."


def least_examples(model: nn.Module) -> int:
    """That a micro-batch needs: BatchNorm cannot normalise by one."""
    return 2 if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules()) else 1


# -- tensors that pass a cut


def tensors_of(made: Any) -> list[Tensor]:
    return [t for t in tree_flatten(made)[0] if isinstance(t, Tensor)]


def rebuilt(made_of: Any, tensors: Sequence[Tensor]) -> Any:
    """``made_of``: as of the function of that name."""
    left = iter(tensors)

    def build(of: Any) -> Any:
        if isinstance(of, list):
            return tuple(build(each) for each in of)
        return next(left) if of == TENSOR else None

    return build(made_of)


TENSOR, NOTHING = 0, -1


def made_of(made: Any) -> Any:
    """TENSOR, or a list of what a plain tuple is made of, NOTHING for a None in it. None: anything else, as which it would not come out of a cut."""
    if isinstance(made, Tensor):
        return TENSOR
    if type(made) is not tuple or not tensors_of(made):
        return None
    parts = [NOTHING if each is None else made_of(each) for each in made]
    return None if None in parts else parts


def kind_of(made: Any) -> str:
    """In words: "tensor", "tuple of 2 (Tensor, tuple)"."""
    if isinstance(made, tuple | list):
        return f"{type(made).__name__} of {len(made)} ({', '.join(type(each).__name__ for each in made)})"
    return "tensor" if isinstance(made, Tensor) else type(made).__name__


# -- looking at a model


MADE_AT = "_weft_made_at"  # the item at which a tensor was computed from parameters


class Uses(TorchFunctionMode):
    """At which items parameters and buffers are used; refuses what passes from one item to another beside the blocks' results: tensors, and
    what is written into tensors that another item has made."""

    def __init__(self, cuts: Cuts) -> None:
        super().__init__()
        self.cuts = cuts
        model = cuts.model
        self.names = {id(t): n for n, t in (*model.named_parameters(), *model.named_buffers())}
        self.found: dict[str, set[int]] = {n: set() for n in self.names.values()}
        #: By memory, the item at which it was filled: of the batch BEFORE; of the model's own state none.
        self._born: dict[Memory, int | None] = {}
        self._passed: dict[Memory, int] = {}  # by memory, the block that returned it

    def begin(self, batch: Any) -> None:
        """A pass."""
        model = self.cuts.model
        self._born = {memory_of(t): BEFORE for t in tensors_of(batch)}
        self._born |= {memory_of(t): None for t in (*model.parameters(), *model.buffers())}
        self._passed = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        now, learned = self.cuts.reached, False
        given = tensors_of((args, kwargs or {}))
        for t in given:
            if id(t) in self.names:
                self.found[self.names[id(t)]].add(now)
                learned |= isinstance(t, nn.Parameter)
            elif (made_at := getattr(t, MADE_AT, None)) is not None and func not in ASKS:
                if made_at < now:
                    raise TaskError(skips(self.cuts, now, func))
                learned = True
        if learned and func in LOOKS and now < len(self.cuts.names):
            raise TaskError(looks(self.cuts, now + 1, func))
        versions = [version_of(t) for t in given]
        result = func(*args, **(kwargs or {}))
        for t, version in zip(given, versions, strict=True):
            if version_of(t) != version:
                self._written(memory_of(t), now, func)
        for t in tensors_of(result):
            self._born.setdefault(memory_of(t), now)
        if learned:
            mark(result, now)
        return result

    def passes(self, k: int, made: Any) -> None:
        """Block ``k`` has returned it."""
        mark(made, k + 1)
        for t in tensors_of(made):
            self._passed[memory_of(t)] = k

    def _written(self, memory: Memory, now: int, func: Any) -> None:
        names, how = self.cuts.names, getattr(func, "__name__", func)
        who, born = f"{type(self.cuts.task).__name__}'s model", self._born.get(memory, now)
        if memory in self._passed:
            raise TaskError(
                f"after block {names[self._passed[memory]]!r}, {who} changes in place what that block returned ({how}): a pipeline may send it to another "
                f"worker there, and needs it as it was. {OUT_OF_PLACE}"
            )
        if born == BEFORE:
            raise TaskError(
                f"{who} changes its batch in place ({how}), and each stage of a pipeline takes the batch up anew. {OUT_OF_PLACE}"
            )
        if born is not None and born < now:
            raise TaskError(
                f"after block {names[now - 1]!r}, {who} changes in place what it made before that block ended ({how}): another worker's stage would not "
                f"see the change. {OUT_OF_PLACE}"
            )


OUT_OF_PLACE = "Make a new tensor: x = x + y in place of x += y, ReLU() in place of ReLU(inplace=True)."


BEFORE = -1  # any item
Memory = StorageWeakRef | None


def version_of(tensor: Tensor) -> int:
    """How often it was written to in place. torch does not count that of a tensor made in inference mode: an evaluation that is without fault in training,
    which is watched too, may use it."""
    return 0 if tensor.is_inference() else tensor._version


def memory_of(tensor: Tensor) -> Memory:
    """Views of the same numbers share it. None: it has none of its own."""
    return StorageWeakRef(tensor.untyped_storage()) if tensor.layout == torch.strided else None


def mark(made: Any, item: int) -> None:
    for t in tensors_of(made):
        if not isinstance(t, nn.Parameter):
            setattr(t, MADE_AT, item)


def skips(cuts: Cuts, item: int, func: Any) -> str:
    return (
        f"after block {cuts.names[item - 1]!r}, {type(cuts.task).__name__}'s model uses what it computed before that block ended, beside the "
        f"block's own result ({getattr(func, '__name__', func)}). A pipeline passes on only what a block returns: let the blocks return that, too, or "
        "make one block of those it skips (the task's blocks(model))."
    )


def learn(
    task: Task,
    model: nn.Module,
    batch_of: Callable[[int], Any],
    held_out: Any,
    examples: int,
    microbatches: int,
    *,
    parted: Collection[str] = (),
    split: bool = True,
    beside: int = 0,
) -> PipelineFacts:
    """``examples``: of each of the ``microbatches``. ``held_out``: a batch to evaluate. ``parted``: blocks after which there is no cut. ``split``:
    backward is to be measured in two, ``beside`` so many others that compute. Leaves the model's gradients as they were."""
    batch = batch_of(examples)
    who = type(task).__name__
    blocks = [name for name in find_blocks(task, model) if name not in parted]
    if not blocks:
        raise Incompatible(
            f"{who}'s model has no blocks that run one after the other, so there is nothing to cut: give the task blocks(model), or use --pattern sharded."
        )
    cuts = Cuts(task, model, blocks)
    uses = Uses(cuts)
    kinds: list[Any] = []

    def note(k: int, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        made = forward(*args, **kwargs)
        kinds.append(made_of(made))
        if kinds[-1] is None:
            raise Incompatible(
                f"block {cuts.names[k]!r} of {who}'s model returns a {kind_of(made)}: a pipeline passes on a tensor, or a plain tuple of tensors. "
                "Return that (a tuple may hold a None), or choose other blocks by the task's blocks(model)."
            )
        uses.passes(k, made)
        return made

    def look(code: Callable[[], Any], batch: Any) -> tuple[list[Any], Any]:
        """What the blocks make, and what the code returns."""
        kinds.clear()
        uses.begin(batch)
        with uses, torch.no_grad():
            returned = cuts.run(code, 0, len(blocks) + 1, None)
        if len(kinds) < len(blocks):
            raise Incompatible(
                f"{who} does not run block {cuts.names[len(kinds)]!r} in each loss and evaluate: leave it out of the task's blocks(model)."
            )
        return list(kinds), returned

    before = {n: p.grad for n, p in model.named_parameters()}
    buffers = {n: b.clone() for n, b in model.named_buffers()}
    try:
        cuts.compute = note
        made, _ = look(lambda: task.loss(model, batch), batch)
        written = [n for n, b in model.named_buffers() if not torch.equal(b, buffers[n])]
        with evaluating(model):
            made_then, parts = look(lambda: task.evaluate(model, held_out), held_out)
            if loss_aside := "loss" not in parts:
                look(lambda: task.loss(model, held_out), held_out)
        if differ := [k for k, (a, b) in enumerate(zip(made, made_then, strict=True)) if a != b]:
            raise Incompatible(
                f"block {cuts.names[differ[0]]!r} of {who}'s model returns one thing in training and another in evaluation (so many tensors, or one by "
                "itself): a pipeline passes on the same at all times. Return the same in both."
            )
        found = {n: sorted(at) or [0] for n, at in uses.found.items()}
        for n in written:
            if len(found[n]) > 1:
                raise TaskError(
                    f"{who}'s model writes to buffer {n!r} in a training step, and uses it before and after the end of block "
                    f"{cuts.names[found[n][0]]!r}: a pipeline may cut there, and each side would have its own. Give each block a buffer of its own, or make "
                    "one block of those that share it (the task's blocks(model))."
                )
        params = {n: p for n, p in model.named_parameters() if p.requires_grad}
        weights = [[p for n, p in params.items() if k in found[n]] for k in range(len(blocks) + 1)]
        with company(beside, lambda: pass_on(task, model, cuts, batch)):
            items, unsplit = profile(task, model, cuts, batch, weights, split)
    finally:
        cuts.undo()
        for n, p in model.named_parameters():
            p.grad = before[n]
    return PipelineFacts(
        items=items,
        uses=found,
        made_of=made,
        loss_aside=loss_aside,
        examples=examples,
        microbatches=microbatches,
        unsplit=unsplit,
    )


@torch.no_grad()
def pass_on(task: Task, model: nn.Module, cuts: Cuts, batch: Any) -> None:
    """What another worker does meanwhile, in a copy of this process."""
    torch.set_num_threads(1)  # of the others that the copied process had none is here
    cuts.compute = plainly
    cuts.run(lambda: task.loss(model, batch), 0, len(cuts.blocks) + 1, None)


def profile(
    task: Task, model: nn.Module, cuts: Cuts, batch: Any, weights: Sequence[Sequence[nn.Parameter]], split: bool
) -> tuple[list[ItemFact], str]:
    """Seconds and bytes of each item for one micro-batch, the medians of some passes; and why no backward can be split (a weight that a
    block uses several times), if so. Then, and if nobody asks, each half of a backward is given half of its seconds."""
    whole: list[Pass] = []
    halves: list[Pass] = []
    unsplit, begin = "", time.monotonic()
    while len(whole) < MAX_PASSES and (len(whole) < MIN_PASSES or time.monotonic() - begin < PASSES_S):
        if split and not unsplit:
            try:
                halves.append(Pass(task, model, cuts, batch, weights, split=True))
            except Unsplit as error:
                unsplit, halves = str(error), []
        whole.append(Pass(task, model, cuts, batch, weights, split=False))
    num, last = len(cuts.blocks) + 1, whole[-1]

    def median(passes: Sequence[Pass], what: str, k: int) -> float:
        value: float = statistics.median(getattr(of, what)[k] for of in passes)
        return value

    items = []
    for k in range(num):
        backward_s = median(whole, "backward_s", k)
        input_s = min(median(halves, "input_gradient_s", k), backward_s) if halves else backward_s / 2
        weight_s = median(halves, "weight_gradient_s", k) if halves else backward_s / 2
        items.append(
            ItemFact(
                name=cuts.names[k] if k < num - 1 else REST,
                forward_s=median([*whole, *halves], "forward_s", k),
                input_gradient_s=input_s,
                weight_gradient_s=backward_s - input_s,
                split_s=max(0.0, weight_s - (backward_s - input_s)),
                output_bytes=last.output_bytes[k],
                activation_bytes=last.saved[k],
            )
        )
    return items, unsplit


class Unsplit(Exception):
    """torch cannot compute the gradient of a block's input first, and those of its weights later."""


class Pass:
    """One forward and backward, item by item: each gets what the one before made as a leaf, so that its gradients end there."""

    def __init__(
        self,
        task: Task,
        model: nn.Module,
        cuts: Cuts,
        batch: Any,
        weights: Sequence[Sequence[nn.Parameter]],
        split: bool = True,
    ) -> None:
        num = len(cuts.blocks) + 1
        self.cuts, self.split = cuts, split
        self.given: list[list[Tensor]] = [[]]
        self.made: list[list[Tensor]] = []
        self.forward_s, self.saved = [0.0] * num, [0] * num
        self.input_gradient_s, self.weight_gradient_s, self.backward_s = [0.0] * num, [0.0] * num, [0.0] * num
        self._seen = {own(t).untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
        cuts.compute = self._compute
        self._begun = time.perf_counter()
        with torch.autograd.graph.saved_tensors_hooks(self._save, lambda t: t):
            loss = cuts.run(lambda: task.loss(model, batch), 0, num, None)
        self.forward_s[-1] = time.perf_counter() - self._begun
        self.made.append([loss])
        grads = [torch.ones_like(loss)]
        self._later: list[tuple[int, Callable[[], None]]] = []
        for k in reversed(range(num)):
            grads = self._backward(k, grads, weights[k])
        for k, later in self._later:  # as schedules do it that split: when what it needs has left the caches
            begin = time.perf_counter()
            self._try(k, later)
            self.weight_gradient_s[k] = time.perf_counter() - begin
        self._later.clear()
        self.output_bytes = [sum(t.numel() * t.element_size() for t in made) for made in self.made[:-1]] + [0]
        self.made.clear()
        self.given.clear()

    def _compute(self, k: int, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        made = forward(*args, **kwargs)
        self.forward_s[k] = time.perf_counter() - self._begun
        given = passed(made)
        self.made.append(tensors_of(made))
        self.given.append([t for t in tensors_of(given) if t.requires_grad])
        self._begun = time.perf_counter()
        return given

    def _save(self, tensor: Tensor) -> Tensor:
        mine = own(tensor)
        if mine.layout == torch.strided and (key := mine.untyped_storage().data_ptr()) not in self._seen:
            self._seen.add(key)
            self.saved[self.cuts.reached] += mine.untyped_storage().nbytes()
        return tensor

    def _backward(self, k: int, grads: Sequence[Tensor], weights: Sequence[nn.Parameter]) -> list[Tensor]:
        given, floats = self.given[k], [t for t in self.made[k] if t.is_floating_point()]
        pairs = [(t, grad) for t, grad in zip(floats, grads, strict=True) if t.requires_grad]
        made, grads = [t for t, _ in pairs], [grad for _, grad in pairs]
        begin = time.perf_counter()
        if not made or not self.split:
            back = whole_backward(made, grads, given)
            self.backward_s[k] = self.input_gradient_s[k] = time.perf_counter() - begin
            return back
        back, later = self._try(k, lambda: input_gradient(made, grads, given, weights))
        self.input_gradient_s[k] = time.perf_counter() - begin
        self._later.append((k, later))
        return back

    def _try(self, k: int, half: Callable[[], T]) -> T:
        try:
            return half()
        except RuntimeError as error:
            name = self.cuts.names[k] if k < len(self.cuts.names) else REST
            raise Unsplit(f"in {name}: {str(error).strip().splitlines()[0]}") from error


# -- backward, whole and in two


def whole_backward(made: Sequence[Tensor], grads: Sequence[Tensor], given: Sequence[Tensor]) -> list[Tensor]:
    """Gradients of the weights are added up where they belong; those of what was ``given`` are returned."""
    if made:
        torch.autograd.backward(list(made), list(grads))
    return [take_grad(t) for t in given]


def input_gradient(
    made: Sequence[Tensor], grads: Sequence[Tensor], given: Sequence[Tensor], weights: Sequence[nn.Parameter]
) -> tuple[list[Tensor], Callable[[], None]]:
    """(gradients of what was given, what computes those of the weights later). Of the first stage, which was given nothing, all is later."""
    if not given:
        return [], lambda: torch.autograd.backward(list(made), list(grads))
    outputs = [t.clone() if t._is_view() else t for t in made]  # torch detaches them in place, which no view allows
    _, groups = stage_backward_input(outputs, list(grads), list(given), iter(weights))

    def later() -> None:
        stage_backward_weight(iter(weights), groups)

    return [take_grad(t) for t in given], later


def take_grad(tensor: Tensor) -> Tensor:
    grad, tensor.grad = tensor.grad, None
    return torch.zeros_like(tensor) if grad is None else grad


def passed(made: Any) -> Any:
    """As it comes out of a cut: a leaf, whose gradient goes back."""
    return tree_map(lambda t: t.detach().requires_grad_(t.is_floating_point()) if isinstance(t, Tensor) else t, made)
