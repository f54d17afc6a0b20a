"""Few of the values: the largest (top-k), random ones, random blocks.

Random choices are made with the key that all ranks share, so all choose alike and the values alone travel, by all-reduce.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from weft.codecs.base import Codec, Keys, Scratch
from weft.codecs.spec import warmed

BLOCK = 1 << 16  # offsets within it take 16 bits
PIECE = 1 << 17  # values that are compared together: they and the answers stay in the cache
SAMPLE = 100_000  # of the magnitudes, to guess the threshold
SLACK = 1.15  # guess it low enough for this many times k candidates

Array = np.ndarray[Any, Any]
Indices = np.ndarray[Any, np.dtype[np.int64]]


def num_kept(ratio: float, numel: int) -> int:
    return min(numel, math.ceil(ratio * numel))


class Sparsifier(Codec):
    """It leaves values out, which then wait. Its ``ratio`` is 1 when the warm-up begins, and ``final_ratio`` after it."""

    def __init__(self, ratio: float) -> None:
        self.ratio = self.final_ratio = ratio
        self._scratch = Scratch()

    def warm_up(self, done: float) -> None:
        self.ratio = warmed(1.0, self.final_ratio, done)


class TopK(Sparsifier):
    """The ceil(ratio * numel) values of largest magnitude, exactly (Aji & Heafield 2017; Lin et al. 2018).

    On the wire: values (fp16 of x / scale, or as given with ``full``), how many lie in each block of 65,536, the scale (float32), and
    their offsets in the blocks: 4 bytes an entry. NaN counts as the largest, so that it is seen.
    """

    name = "topk"

    def __init__(self, ratio: float, full: bool = False) -> None:
        super().__init__(ratio)
        self.full = full

    def nbytes(self, numel: int, itemsize: int = 4) -> int:
        return sum(self._lengths(numel, itemsize))

    def _lengths(self, numel: int, itemsize: int) -> list[int]:
        """Bytes of values (padded to whole words), of counts, of the scale, of offsets."""
        k = num_kept(self.ratio, numel)
        return [
            -(-k * (itemsize if self.full else 2) // 4) * 4,
            4 * -(-numel // BLOCK),
            4 * (k > 0 and not self.full),
            2 * k,
        ]

    def _parts(self, payload: Tensor, out: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(values (k,), counts (blocks,) int32, scale (1,) float32 or nothing, offsets (k,) int16) as views."""
        lengths = self._lengths(len(out), out.element_size())
        if len(payload) != sum(lengths):
            raise ValueError(f"topk: {len(payload)} bytes for {len(out)} values, not {sum(lengths)}")
        values, counts, scale, offsets = payload.split(lengths)
        k = num_kept(self.ratio, len(out))
        dtype = out.dtype if self.full else torch.float16
        return values.view(dtype)[:k], counts.view(torch.int32), scale.view(torch.float32), offsets.view(torch.int16)

    def encode(self, x: Tensor, keys: Keys) -> Tensor:
        return self._encode(x, None)

    def encode_with_feedback(self, x: Tensor, residual: Tensor, keys: Keys) -> Tensor:
        return self._encode(residual, x)

    def _encode(self, x: Tensor, plus: Tensor | None) -> Tensor:
        """Of x + plus, if ``plus`` is given: and then what is left goes to ``x``."""
        payload = self._scratch("payload", self.nbytes(len(x), x.element_size()), torch.uint8, x.device)
        values, counts, scale, offsets = self._parts(payload, x)
        if not len(values):
            return payload
        if x.is_cpu:
            where, found = largest(x.numpy(), len(values), None if plus is None else plus.numpy())
            chosen, large = torch.from_numpy(where), torch.from_numpy(found)
        else:
            chosen = _largest_on_device(x if plus is None else x.add_(plus), len(values))
            large = x[chosen]
        if self.full:
            values.copy_(large)
        else:
            large = large.to(wide(x.dtype))
            values.copy_(large.div_(scale.copy_(fitting_scale(large))))
        ends = torch.searchsorted(chosen, torch.arange(1, len(counts) + 1, device=x.device) * BLOCK)
        counts.copy_(torch.diff(ends, prepend=ends.new_zeros(1)))
        offsets.copy_(chosen & (BLOCK - 1))  # 40,000 becomes -25,536: 16 bits either way
        if plus is not None:
            x[chosen] -= scaled(values, scale, x.dtype)
        return payload

    def add_to(self, out: Tensor, payload: Tensor, keys: Keys, alpha: float = 1.0) -> None:
        values, counts, scale, offsets = self._parts(payload, out)
        if int(counts.sum()) != len(offsets):
            raise ValueError(f"topk: {int(counts.sum())} entries are announced, and {len(offsets)} are here")
        starts = torch.arange(len(counts), device=out.device) * BLOCK
        chosen = torch.repeat_interleave(starts, counts.long(), output_size=len(offsets)) + (
            offsets.long() & (BLOCK - 1)
        )
        if len(chosen) and int(chosen[-1]) >= len(out):
            raise ValueError(f"topk: an entry at {int(chosen[-1])} of {len(out)} values")
        out.index_add_(0, chosen, scaled(values, scale, out.dtype), alpha=alpha)


def wide(dtype: torch.dtype) -> torch.dtype:
    """It holds any scale."""
    return torch.promote_types(dtype, torch.float32)


def fitting_scale(values: Tensor) -> Tensor:
    """The power of two by which the largest becomes 16,384 to 32,767: then fp16 keeps 11 bits of values down to 4e-9 times that one,
    and division by it rounds nothing. It is a normal float32; any, if there are values that are not finite."""
    low, high = values.aminmax()
    exponent = torch.frexp(torch.maximum(-low, high).nan_to_num_(posinf=1.0)).exponent - 15
    return torch.ldexp(torch.ones_like(low), exponent.clamp_(-126, 127))


def scaled(values: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """What was sent, in ``dtype``; as it is, without a scale."""
    return values.to(wide(dtype)).mul_(scale).to(dtype) if len(scale) else values.to(dtype)


def largest(x: Array, k: int, plus: Array | None = None) -> tuple[Indices, Array]:
    """(indices, values) of the k largest magnitudes, ascending by index. With ``plus`` it is added to ``x`` first.

    A threshold is guessed from a sample, and what exceeds it compared. As ``np.argsort(-abs(x))[:k]``, sorted, but for ties.
    """
    n = len(x)
    every = slice(None, None, max(1, n // SAMPLE))
    sample = np.abs(x[every] if plus is None else x[every] + plus[every])
    wanted = min(len(sample) - 1, int(SLACK * k / n * len(sample)) + 3)
    threshold = np.partition(sample, len(sample) - 1 - wanted)[len(sample) - 1 - wanted]
    chosen, values = above(x, threshold, plus)
    while len(chosen) < k:
        if not threshold > 0 or k == n:  # more than n - k of them are 0
            chosen, values = np.arange(n), x.copy()
            break
        threshold *= 0.5
        chosen, values = above(x, threshold)
    if len(chosen) > k:
        sizes = np.abs(values)
        sizes[np.isnan(sizes)] = np.inf
        least = np.partition(sizes, len(sizes) - k)[len(sizes) - k]
        keep = sizes >= least
        ties = np.flatnonzero(sizes == least)
        keep[ties[len(ties) - (np.count_nonzero(keep) - k) :]] = False
        kept = np.flatnonzero(keep)
        chosen, values = chosen[kept], values[kept]
    return chosen, values


def above(x: Array, threshold: float, plus: Array | None = None) -> tuple[Indices, Array]:
    """Where |x| > threshold or is NaN, and x there. With ``plus`` it is added to ``x`` first."""
    at_most, below = np.empty(PIECE, np.bool_), np.empty(PIECE, np.bool_)
    chosen, values = [], []
    for start in range(0, len(x), PIECE):
        piece = x[start : start + PIECE]
        if plus is not None:
            np.add(piece, plus[start : start + PIECE], out=piece)
        size = len(piece)
        np.less_equal(piece, threshold, out=at_most[:size])  # neither is true of NaN
        np.less(piece, -threshold, out=below[:size])
        found = where_true(np.equal(at_most[:size], below[:size], out=below[:size]))
        values.append(piece[found])
        found += start
        chosen.append(found)
    return np.concatenate(chosen), np.concatenate(values)


def where_true(mask: np.ndarray[Any, np.dtype[np.bool_]]) -> Indices:
    """``np.flatnonzero(mask)``. That one mispredicts a branch at each hit, unless more than a tenth are hits: so first find the
    words of eight that hold one, among as many more that count as found, then look into these, an eighth of which are hits."""
    num_words = len(mask) // 8
    if num_words * 8 != len(mask) or not num_words:
        return np.flatnonzero(mask)
    words, found = mask.view(np.uint64), np.ones(num_words + num_words // 9 + 1, np.bool_)
    np.not_equal(words, 0, out=found[:num_words])
    hot = np.flatnonzero(found)[: num_words - len(found)]
    inside = np.flatnonzero(words[hot].view(np.bool_))
    chosen: Indices = hot[inside >> 3]
    chosen <<= 3
    chosen |= inside & 7
    return chosen


def _largest_on_device(x: Tensor, k: int) -> Tensor:
    return x.abs().nan_to_num_(nan=math.inf).topk(k, sorted=False).indices.sort().values


class RandomK(Sparsifier):
    """Of each of ceil(ratio * numel) equal stretches one value (Stich et al. 2018), beginning anywhere in it and going round: so
    that all are sent in turn, and what waits does not wait long."""

    name = "randomk"
    linear = True

    def nbytes(self, numel: int, itemsize: int = 4) -> int:
        return num_kept(self.ratio, numel) * itemsize

    def _chosen(self, numel: int, keys: Keys, device: torch.device) -> Tensor:
        k = num_kept(self.ratio, numel)
        if not k:
            return torch.empty(0, dtype=torch.int64, device=device)
        bounds = np.arange(k + 1) * numel // k
        sizes = np.diff(bounds)
        turn = int(sizes.max())
        begin = keys.shared(turn).random(k) * sizes
        return torch.from_numpy(bounds[:-1] + (begin.astype(np.int64) + keys.number % turn) % sizes).to(device)

    def encode(self, x: Tensor, keys: Keys) -> Tensor:
        payload = self._scratch("payload", num_kept(self.ratio, len(x)), x.dtype, x.device)
        return torch.index_select(x, 0, self._chosen(len(x), keys, x.device), out=payload)

    def add_to(self, out: Tensor, payload: Tensor, keys: Keys, alpha: float = 1.0) -> None:
        out.index_add_(0, self._chosen(len(out), keys, out.device), payload, alpha=alpha)


class RandomBlocks(Sparsifier):
    """Whole blocks of neighbours, ceil(ratio * blocks) of them: nothing else is read, so it is far the quickest.

    All are sent in turn, in an order that is drawn anew when all were.
    """

    name = "blocks"
    linear = True

    def __init__(self, ratio: float, block: int = 256) -> None:
        super().__init__(ratio)
        self.block = block
        #: what it was drawn for, and the order: it takes longer to draw than to send, and holds for a whole turn
        self._order: tuple[tuple[int, ...], Indices] | None = None

    def nbytes(self, numel: int, itemsize: int = 4) -> int:
        return self._num_chosen(numel) * self.block * itemsize

    def _num_chosen(self, numel: int) -> int:
        return num_kept(self.ratio, -(-numel // self.block))

    def _chosen(self, numel: int, keys: Keys) -> Indices:
        total, m = -(-numel // self.block), self._num_chosen(numel)
        if not m:
            return np.empty(0, np.int64)
        turn = -(-total // m)
        drawn_for = (total, keys.seed, keys.number // turn, turn)
        if self._order is None or self._order[0] != drawn_for:
            self._order = drawn_for, keys.shared(turn).permutation(total)
        first = keys.number % turn * m
        return np.sort(np.take(self._order[1], range(first, first + m), mode="wrap"))

    def encode(self, x: Tensor, keys: Keys) -> Tensor:
        chosen = self._chosen(len(x), keys)
        payload = self._scratch("payload", len(chosen) * self.block, x.dtype, x.device)
        whole = len(x) // self.block
        inside = torch.from_numpy(chosen[chosen < whole]).to(x.device)
        rows = payload.view(-1, self.block)
        torch.index_select(x[: whole * self.block].view(-1, self.block), 0, inside, out=rows[: len(inside)])
        if len(inside) < len(chosen):  # the last block, which is shorter
            rows[-1].zero_()[: len(x) - whole * self.block] = x[whole * self.block :]
        return payload

    def add_to(self, out: Tensor, payload: Tensor, keys: Keys, alpha: float = 1.0) -> None:
        chosen = self._chosen(len(out), keys)
        whole = len(out) // self.block
        inside = torch.from_numpy(chosen[chosen < whole]).to(out.device)
        rows = payload.view(-1, self.block)
        out[: whole * self.block].view(-1, self.block).index_add_(0, inside, rows[: len(inside)], alpha=alpha)
        if len(inside) < len(chosen):
            out[whole * self.block :].add_(rows[-1, : len(out) - whole * self.block], alpha=alpha)
