"""The byte-level language model of ``codelm`` on the user's own files, which need not fit into memory.

The end of every file is held out, so that the model is judged on text that it never saw.
"""

from __future__ import annotations

import os
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from weft.data import Shards
from weft.data.formats import CHUNK, Windows
from weft.data.shards import open_shard
from weft.errors import DataError
from weft.task import Defaults
from weft.tasks.codelm import LEARNED, VOCABULARY, ByteLM, entropy

HELD_OUT = 10  # of each file the last one part in so many
HELD_OUT_MAX = 16 << 20  # bytes of all files together: reading more would tell nothing new
SPLIT = 64  # workers that one file can serve


class Text(ByteLM):
    """Files of any size are read as bytes, whatever their encoding. Windows overlap by one byte, so that every byte but
    the first is predicted; what at the end of a file does not fill a window is left out."""

    defaults: ClassVar[Defaults] = Defaults(batch=32, epochs=None, steps=1000)

    def __init__(
        self,
        data: Annotated[str, "your text: a file, or a glob in quotes ('books/*.txt')"],
        size: Literal["tiny", "small", "medium", "large", "wire"] = "tiny",
        layers: int = 0,
        positions: Literal["learned", "rotary"] = LEARNED,
        seq_len: int = 0,
        lr: float = 3e-3,
        test_windows: int = 256,
    ) -> None:
        super().__init__(size, layers, positions, seq_len, lr, test_windows)
        self.paths = data

    def data(self) -> tuple[Any, TensorDataset]:
        files = Shards(self.paths).files()
        share = HELD_OUT_MAX // len(files)
        train = Windows(self.seq_len + 1, self.seq_len, end=lambda nbytes: nbytes - held_out(nbytes, share))
        return Shards(files, format=train, split=SPLIT), TensorDataset(self._test_windows(files, share))

    def notes(self) -> dict[str, float]:
        files = Shards(self.paths).files()
        counts = np.zeros(VOCABULARY, np.int64)
        for path in files:
            with open_shard(path) as file:
                nbytes = os.fstat(file.fileno()).st_size
                file.seek(nbytes - held_out(nbytes, HELD_OUT_MAX // len(files)))
                while chunk := file.read(CHUNK):
                    counts += np.bincount(np.frombuffer(chunk, np.uint8), minlength=VOCABULARY)
        return {"unigram entropy of the held-out text (nats/byte)": entropy(counts)}

    def _test_windows(self, files: list[str], share: int) -> Tensor:
        """At most ``test_windows`` of them, (N, seq_len + 1), spread evenly over the held-out text."""
        places: list[tuple[str, int]] = []
        for path in files:
            nbytes = os.stat(path).st_size
            begin = nbytes - held_out(nbytes, share)
            places += [(path, at) for at in range(begin, nbytes - self.seq_len, self.seq_len)]
        if not places:
            raise DataError(
                f"{self.paths!r} is too little text for seq_len={self.seq_len}: the last tenth of each file is held out, and none of "
                f"these is longer than {self.seq_len} bytes. Give more text, or a smaller -t seq_len."
            )
        num = min(self.test_windows, len(places))
        windows = np.empty((num, self.seq_len + 1), np.uint8)
        for k in range(num):
            path, at = places[k * len(places) // num]
            with open_shard(path) as file:
                file.seek(at)
                windows[k] = np.frombuffer(file.read(self.seq_len + 1), np.uint8)
        return torch.from_numpy(windows)

    @staticmethod
    def _predict(model: Any, batch: Any) -> tuple[Tensor, Tensor]:
        # training batches come as one array, held-out ones as TensorDataset gives them
        return ByteLM._predict(model, [batch] if isinstance(batch, Tensor) else batch)


def held_out(nbytes: int, share: int) -> int:
    """Bytes at the end of a file that are not trained on."""
    return min(nbytes // HELD_OUT, share)
