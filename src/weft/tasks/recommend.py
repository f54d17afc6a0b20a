"""Which functions will this file call? Implicit feedback that every machine has: a file of Python's own standard library is
a user, a name that it calls is an item.

``open(path)``, ``os.open(path)`` and ``self.open()`` all call ``open`` (found by ``ast``); how often does not count. Of each
file's names a fifth is held out, to be found among all that it is not yet known to call. Most called anywhere (``len``,
``isinstance``) is the guess to beat: it finds about a fifth of them.

**The model** is a matrix factorisation with a bias for each item (Koren et al. 2009), its tables embeddings with sparse
gradients that are read by lookups alone. The bias starts at the log of how often the name is called, so that the vectors have
only to learn what differs from that. **The loss** is the softmax over all names of each one called, its denominator estimated
from names drawn uniformly, once for all of a batch (Jean et al. 2015, 1412.2007). A name that is called is pulled towards
its file and the file towards it; both pay for their length, each time. Without that they know the training names by heart.
"""

from __future__ import annotations

import ast
import functools
import math
import os
import sysconfig
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from weft.data.keys import keyed
from weft.errors import ConfigError, TaskError
from weft.options import check_positive
from weft.task import Defaults, Task
from weft.tasks.sparse import Rule, check_rule, make_optimizer

#: Folders that are passed over: `test` and `pydoc_data` are not on every machine; the hundred files of `encodings` are
#: generated and call the same few names: whoever knows one knows all, and recall would be some 0.07 higher for it.
LEFT_OUT = {"test", "encodings", "pydoc_data", "__pycache__"}
LEAST_FILES = 5  # that call a name
LEAST_NAMES = 5  # that a file calls, each called by as many files
HELD_OUT = 0.2  # of a file's names
TOP = 10

LEARNING_RATES: dict[Rule, float] = {"adagrad": 0.1, "adam": 0.02, "sgd": 40.0}

# -- who calls what


@functools.cache
def standard_library() -> Path:
    """Asking takes 0.1 ms and more, and every step asks."""
    return Path(sysconfig.get_path("stdlib"))


def read_calls(root: Path) -> dict[str, set[str]]:
    """Names called, by file, in order of path; files that this Python cannot parse are passed over."""
    calls: dict[str, set[str]] = {}
    for folder, inside, names in os.walk(root):
        inside[:] = [name for name in inside if name.isidentifier() and name not in LEFT_OUT]
        for path in (Path(folder, name) for name in names if name.endswith(".py")):
            try:
                calls[path.relative_to(root).as_posix()] = called(path.read_bytes())
            except (SyntaxError, ValueError):
                continue  # lib2to3's tests are in Python 2 and in no encoding
    return dict(sorted(calls.items()))


def called(source: bytes) -> set[str]:
    """``a.b.c(d())`` calls c and d."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes and the like
        tree = ast.parse(source)
    functions = [node.func for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return {f.id for f in functions if isinstance(f, ast.Name)} | {
        f.attr for f in functions if isinstance(f, ast.Attribute)
    }


class Table(NamedTuple):
    """U files, I names; what a file calls is either ``known`` or ``held`` out."""

    files: list[str]
    names: list[str]
    known: Tensor  # (U, I) bool
    held: Tensor  # (U, I) bool
    pairs: Tensor  # (N, 2) int64: file and name, of all that is known


def split(calls: Mapping[str, set[str]]) -> Table:
    """Names called in enough files, files that call enough of these. Which are held out a file's own names decide, and its path."""
    files_of = Counter(name for names in calls.values() for name in names)
    names = sorted(name for name, num in files_of.items() if num >= LEAST_FILES)
    column = {name: k for k, name in enumerate(names)}
    columns = {file: sorted(column[name] for name in own if name in column) for file, own in calls.items()}
    files = [file for file, own in columns.items() if len(own) >= LEAST_NAMES]
    known = np.zeros((len(files), len(names)), np.bool_)
    held = known.copy()
    for row, file in enumerate(files):
        shuffled = keyed(0, "recommend", "held-out", file).permutation(columns[file])
        cut = round(HELD_OUT * len(shuffled))
        held[row, shuffled[:cut]], known[row, shuffled[cut:]] = True, True
    return Table(files, names, torch.from_numpy(known), torch.from_numpy(held), torch.from_numpy(np.argwhere(known)))


@functools.lru_cache(maxsize=1)
def read_table(root: Path) -> Table:
    """About 600 files and 760 names in 2 to 3 s, nearly all of it parsing."""
    table = split(read_calls(root))
    if not table.files:
        raise TaskError(
            f"recommend found no {LEAST_FILES} files in {root} that call the same {LEAST_NAMES} names: use a Python whose "
            "standard library is there as .py files."
        )
    return table


# -- model

START = 0.1  # standard deviation of the vectors' numbers


class Factors(nn.Module):
    def __init__(self, num_files: int, popularity: Tensor, dim: int) -> None:
        """``popularity`` (I,): what each name's bias is at first."""
        super().__init__()
        num_names = len(popularity)
        self.file = nn.Embedding.from_pretrained(START * torch.randn(num_files, dim), freeze=False, sparse=True)
        self.name = nn.Embedding.from_pretrained(START * torch.randn(num_names, dim), freeze=False, sparse=True)
        self.bias = nn.Embedding.from_pretrained(popularity[:, None], freeze=False, sparse=True)

    def forward(self, files: Tensor, names: Tensor, others: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Each file's (B,) own name (B,), and ``others`` (C,) for all: scores (B, 1) and (B, C), squared lengths (B,)."""
        file, name = self.file(files), self.name(names)
        own: Tensor = (file * name).sum(1, keepdim=True) + self.bias(names)
        lengths: Tensor = file.square().sum(1) + name.square().sum(1)
        return own, self.score(file, others), lengths

    def score(self, file: Tensor, names: Tensor) -> Tensor:  # (B, D), (C,) -> (B, C)
        scores: Tensor = file @ self.name(names).T + self.bias(names).T
        return scores


# -- task


@dataclass
class Recommend(Task):
    """An example is a file and a name that it calls; the training loss holds the price of lengths too.

    Held-out examples are whole files, the loss the mean nats of a file's held-out names among all that it is not known to
    call; ``recall@10`` is the share of them among the ten that score highest, as a mean over files.
    """

    defaults: ClassVar[Defaults] = Defaults(batch=256, epochs=15)

    dim: int = field(default=64, metadata={"doc": "width of the vectors"})
    negatives: int = field(default=256, metadata={"doc": "names drawn for each batch; 0: all of them, and none drawn"})
    decay: float = field(
        default=0.1,
        metadata={"doc": "price of the squared length of a file's and a name's vector, where they meet; 0: none"},
    )
    rule: Rule = field(default="adagrad", metadata={"doc": "the optimizer; adam is torch's SparseAdam"})
    lr: float = field(
        default=0,
        metadata={
            "doc": f"highest learning rate, from where it falls to 0 in a line; 0: the rule's own ({', '.join(f'{k} {v:g}' for k, v in LEARNING_RATES.items())})"
        },
    )

    def __post_init__(self) -> None:
        check_rule(self.rule)
        check_positive("dim", self.dim)
        for name, meaning in (("negatives", "all names"), ("decay", "none"), ("lr", "the rule's own")):
            if not 0 <= (value := getattr(self, name)) < math.inf:
                raise ConfigError(f"{name}={value} is not possible: give a positive number, or 0: {meaning}.")
        self.lr = self.lr or LEARNING_RATES[self.rule]

    def model(self) -> nn.Module:
        known = self.table().known
        return Factors(len(known), known.sum(0).add(1).log(), self.dim)

    def data(self) -> tuple[TensorDataset, TensorDataset]:
        """Training examples: (file, name); held-out ones: (file, known (I,) bool, held (I,) bool)."""
        table = self.table()
        held_out = TensorDataset(torch.arange(len(table.files)), table.known, table.held)
        return TensorDataset(*table.pairs.unbind(1)), held_out

    def client_of(self, index: int) -> int:
        """The file that a training example is from."""
        return int(self.table().pairs[index, 0])

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        files, names = batch
        total = len(self.table().names)
        drawn = self.negatives or total
        others = torch.randint(total, (drawn,)) if self.negatives else torch.arange(total)
        others = others.to(names.device)
        own, false, lengths = model(files, names, others)
        # each that was drawn stands for total / drawn of all; the name itself stands in the denominator already
        false = (false + math.log(total / drawn)).masked_fill(others == names[:, None], -math.inf)
        nats = torch.cat([own, false], 1).logsumexp(1) - own.squeeze(1)
        loss: Tensor = (nats + self.decay * lengths).mean()
        return loss

    def optimizer(self, params: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        return make_optimizer(self.rule, params, self.lr)

    def schedule(self, optimizer: torch.optim.Optimizer, total_steps: int) -> torch.optim.lr_scheduler.LRScheduler:
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: max(0.0, 1 - step / total_steps))

    def evaluate(self, model: nn.Module, batch: Any) -> dict[str, tuple[float | Tensor, float]]:
        factors = cast(Factors, model)
        files, known, held = batch
        scores = factors.score(factors.file(files), torch.arange(known.shape[1], device=files.device))
        scores = scores.masked_fill(known, -math.inf)
        nats = scores.logsumexp(1, keepdim=True) - scores  # (B, I)
        loss = nats.where(held, 0.0).sum(1) / held.sum(1)
        return {"loss": (loss.sum(), len(files)), f"recall@{TOP}": (recall(scores, held).sum(), len(files))}

    def notes(self) -> dict[str, float]:
        table = self.table()
        popularity = table.known.sum(0).double().expand(table.known.shape).masked_fill(table.known, -math.inf)
        num = table.held.sum(1)
        return {
            f"recall@{TOP} of the most called names": float(recall(popularity, table.held).mean()),
            f"the highest possible (of some files more than {TOP} are held out)": float(
                (num.clamp(max=TOP) / num).mean()
            ),
        }

    def table(self) -> Table:
        return read_table(standard_library())


def recall(scores: Tensor, held: Tensor) -> Tensor:
    """(B,): the share of each row's ``held`` (B, I) among the TOP that score highest."""
    best = scores.topk(min(TOP, scores.shape[1]), dim=1).indices
    found: Tensor = held.gather(1, best).sum(1).double() / held.sum(1)
    return found
