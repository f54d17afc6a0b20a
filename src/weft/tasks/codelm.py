"""A byte-level language model on the source text of Python's own standard library, judged on packages it never saw.

The transformer is GPT-2's (Radford et al. 2019): pre-norm blocks, the output head tied to the embedding, positions learned or
rotary. ``small`` takes about 0.3 s of one core for a step of 8 x 128 bytes.
"""

from __future__ import annotations

import functools
import math
import os
import sysconfig
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Final, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from weft.data.keys import key_int
from weft.errors import ConfigError, TaskError, UnknownName
from weft.options import check_positive
from weft.task import Defaults, Task

VOCABULARY = 256

#: Folders that hold no source a person wrote to be used: tests; `encodings`, a tenth of all bytes, is tables generated
#: from Unicode's; `pydoc_data` is the language reference as one string. Both are so unlike the rest that the held-out
#: loss would say mostly on which side of the split they fell.
LEFT_OUT = {"test", "tests", "idle_test", "encodings", "pydoc_data", "__pycache__"}
#: A dump of the build's settings, different on every machine.
BUILD_SETTINGS = "_sysconfigdata"

ADAM_BETAS = (0.9, 0.95)
WARMUP = 20  # one step in so many


class Shape(NamedTuple):
    width: int
    layers: int
    heads: int
    seq_len: int


SHAPES = {
    "tiny": Shape(96, 2, 3, 128),  # 0.26M parameters
    "small": Shape(256, 4, 4, 128),  # 3.3M
    "medium": Shape(512, 8, 8, 128),  # 25M
    "large": Shape(896, 12, 16, 128),  # 116M
    "wire": Shape(504, 2, 7, 16),  # 6.3M: 25 MB of float32 gradients, and few bytes of text to compute them from
}


# -- data


def read_packages(root: Path) -> dict[str, bytes]:
    """Source text by top-level module or package, in order of name; within a package, files in order of path."""
    files: list[tuple[str, ...]] = []
    for folder, inside, names in os.walk(root):
        # site-packages, lib-dynload and config-3.11-x86_64 hold what cannot be imported by that name
        inside[:] = [name for name in inside if name.isidentifier() and name not in LEFT_OUT]
        place = Path(folder).relative_to(root).parts
        files += [(*place, name) for name in names if name.endswith(".py") and not name.startswith(BUILD_SETTINGS)]
    texts: dict[str, bytearray] = {}
    for parts in sorted(files):
        texts.setdefault(parts[0].removesuffix(".py"), bytearray()).extend(root.joinpath(*parts).read_bytes())
    return {name: bytes(text) for name, text in sorted(texts.items())}


def is_held_out(package: str) -> bool:
    """One package in ten by a hash of its name alone: the same on every machine and version of Python."""
    return key_int(0, "codelm", "held-out", package) % 10 == 0


class Corpus(NamedTuple):
    """One side of the split. Windows (N, seq_len + 1) uint8 of one package each; neighbours share a byte, so that every
    byte but a package's first is predicted once."""

    windows: Tensor
    owners: list[str]  # (N,) each window's package
    counts: np.ndarray[Any, np.dtype[np.int64]]  # (256,) how often each byte occurs


@functools.lru_cache(maxsize=1)
def read_corpus(root: Path, seq_len: int) -> tuple[Corpus, Corpus]:
    """(train, held-out); about 10 MB in 0.1 s, kept in memory."""
    texts = read_packages(root)
    train = {name: text for name, text in texts.items() if not is_held_out(name)}
    test = {name: text for name, text in texts.items() if is_held_out(name)}
    return cut(train, seq_len, root), cut(test, seq_len, root)


def cut(texts: dict[str, bytes], seq_len: int, root: Path) -> Corpus:
    pieces: list[np.ndarray[Any, np.dtype[np.uint8]]] = []
    owners: list[str] = []
    counts = np.zeros(VOCABULARY, np.int64)
    for name, text in texts.items():
        data = np.frombuffer(text, np.uint8)
        counts += np.bincount(data, minlength=VOCABULARY)
        if len(data) > seq_len:
            pieces.append(np.lib.stride_tricks.sliding_window_view(data, seq_len + 1)[::seq_len])
            owners += [name] * len(pieces[-1])
    if not pieces:
        raise TaskError(
            f"codelm needs packages of more than seq_len={seq_len} bytes on both sides of its split of {root}: give a "
            "smaller seq_len, or use a Python whose standard library is there as .py files."
        )
    return Corpus(torch.from_numpy(np.concatenate(pieces)), owners, counts)


def entropy(counts: np.ndarray[Any, np.dtype[np.int64]]) -> float:
    """Nats per byte of the best model that knows only how often each byte occurs in this very text."""
    p = counts[counts > 0] / counts.sum()
    return float(-(p * np.log(p)).sum())


# -- model

LEARNED: Final = "learned"
ROTARY: Final = "rotary"
ROTARY_BASE = 10_000.0  # the longest wave is 2 pi times as many bytes


@functools.lru_cache(maxsize=8)
def angles(length: int, dim: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """(cos, sin) of how far each pair of a head's numbers is turned at each position; (length, dim / 2) each."""
    rates = ROTARY_BASE ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    turns = torch.arange(length, dtype=torch.float64)[:, None] * rates
    return turns.cos().to(device, dtype), turns.sin().to(device, dtype)


def rotated(x: Tensor) -> Tensor:
    """Number k of a head and number k + dim / 2 are turned as a pair, by an angle that grows with the position, so that a query and a key
    meet at an angle that says how far apart they stand (Su et al. 2021, 2104.09864). (..., T, dim) -> the same."""
    cos, sin = angles(x.shape[-2], x.shape[-1], x.dtype, x.device)
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


class Block(nn.Module):
    def __init__(self, width: int, heads: int, rotary: bool) -> None:
        super().__init__()
        self.heads, self.rotary = heads, rotary
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:  # (B, T, D) -> (B, T, D)
        b, t, d = x.shape
        # a head's query, key and value lie together, so that heads can be parted
        q, k, v = self.qkv(self.norm1(x)).view(b, t, self.heads, 3, d // self.heads).permute(3, 0, 2, 1, 4)
        if self.rotary:
            q, k = rotated(q), rotated(k)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # (B, heads, T, D / heads)
        x = x + self.out(y.transpose(1, 2).reshape(b, t, d))
        x = x + self.down(F.gelu(self.up(self.norm2(x))))
        return x


class ByteTransformer(nn.Module):
    def __init__(self, width: int, layers: int, heads: int, seq_len: int, positions: str = LEARNED) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, width)
        self.position = nn.Embedding(seq_len, width) if positions == LEARNED else None
        self.blocks = nn.ModuleList(Block(width, heads, positions == ROTARY) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, VOCABULARY, bias=False)
        self.head.weight = self.embed.weight
        self._initialise(layers)

    def _initialise(self, layers: int) -> None:
        """As GPT-2: the 2L matrices that add to the residual stream start smaller, so that its variance stays."""
        for name, p in self.named_parameters():
            if name.endswith(("out.weight", "down.weight")):
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * layers))
            elif p.dim() == 2:
                nn.init.normal_(p, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def forward(
        self, tokens: Tensor
    ) -> Tensor:  # (B, T) int64 -> logits (B, T, 256), T at most seq_len if positions are learned
        x = self.embed(tokens)
        if self.position is not None:
            x = x + self.position.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x))
        return logits


# -- task


@dataclass
class ByteLM(Task):
    """All but the text. An example is a window of seq_len + 1 bytes; a batch is (windows,)."""

    defaults: ClassVar[Defaults] = Defaults(batch=16, epochs=None, steps=300)

    size: Literal["tiny", "small", "medium", "large", "wire"] = field(
        default="small",
        metadata={"doc": "0.26M, 3.3M, 25M, 116M parameters; wire: 6.3M, gradients of 25 MB for little compute"},
    )
    layers: int = field(default=0, metadata={"doc": "blocks of the transformer; 0: the size's own"})
    positions: Literal["learned", "rotary"] = field(
        default=LEARNED, metadata={"doc": "how the model knows where a byte stands"}
    )
    seq_len: int = field(default=0, metadata={"doc": "bytes that the model sees at once; 0: 128, for wire 16"})
    lr: float = field(
        default=1e-3, metadata={"doc": "AdamW's highest learning rate: short warm-up, then a cosine to 0"}
    )
    test_windows: int = field(
        default=256, metadata={"doc": "held-out windows at most, spread evenly over the held-out text"}
    )

    def __post_init__(self) -> None:
        if self.size not in SHAPES:
            raise UnknownName.of("size of the model", self.size, SHAPES)
        if self.positions not in (LEARNED, ROTARY):
            raise UnknownName.of("kind of positions", self.positions, (LEARNED, ROTARY))
        for name in ("seq_len", "layers"):
            if (value := getattr(self, name)) < 0:
                raise ConfigError(f"{name}={value} is not possible: give a positive number, or 0 for the size's own.")
        for name in ("lr", "test_windows"):
            check_positive(name, getattr(self, name))
        self.seq_len = self.seq_len or SHAPES[self.size].seq_len
        self.layers = self.layers or SHAPES[self.size].layers

    def model(self) -> nn.Module:
        return ByteTransformer(
            *SHAPES[self.size]._replace(layers=self.layers, seq_len=self.seq_len), positions=self.positions
        )

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """Nats per byte. Windows are equally long: the mean over bytes is the mean over examples."""
        logits, targets = self._predict(model, batch)
        return F.cross_entropy(logits, targets)

    def optimizer(self, params: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        # fused: 3 ms for `small` and 16 for `medium` on one core, against 8 and 60 to 100 of the loop and foreach
        return torch.optim.AdamW(params, lr=self.lr, betas=ADAM_BETAS, fused=True)

    def schedule(self, optimizer: torch.optim.Optimizer, total_steps: int) -> torch.optim.lr_scheduler.LRScheduler:
        warmup = total_steps // WARMUP

        def scale(step: int) -> float:
            if step < warmup:
                return (step + 1) / warmup
            done = (step - warmup) / max(1, total_steps - warmup)
            return 0.5 * (1 + math.cos(math.pi * min(1.0, done)))

        return torch.optim.lr_scheduler.LambdaLR(optimizer, scale)

    def evaluate(self, model: nn.Module, batch: Any) -> dict[str, tuple[float | Tensor, float]]:
        """``loss``: nats per byte; ``accuracy``: of the next byte."""
        logits, targets = self._predict(model, batch)
        loss = F.cross_entropy(logits, targets, reduction="sum")
        return {"loss": (loss, len(targets)), "accuracy": ((logits.argmax(1) == targets).sum(), len(targets))}

    @staticmethod
    def _predict(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
        """Logits (B * T, 256) and the bytes they are to predict (B * T,)."""
        (windows,) = batch
        tokens = windows.long()
        logits = model(tokens[:, :-1])
        return logits.view(-1, VOCABULARY), tokens[:, 1:].reshape(-1)


@dataclass
class CodeLM(ByteLM):
    """The text is that of the running Python: runs to be compared, and all members of one run, need the same version of it."""

    def data(self) -> tuple[TensorDataset, TensorDataset]:
        train, test = self._corpus()
        total = len(test.windows)
        num = min(self.test_windows, total)
        return TensorDataset(train.windows), TensorDataset(test.windows[torch.arange(num) * total // num])

    def notes(self) -> dict[str, float]:
        return {"unigram entropy of the held-out text (nats/byte)": entropy(self._corpus()[1].counts)}

    def client_of(self, index: int) -> str:
        """The package that a training example is from."""
        return self._corpus()[0].owners[index]

    def _corpus(self) -> tuple[Corpus, Corpus]:
        return read_corpus(Path(sysconfig.get_path("stdlib")), self.seq_len)
