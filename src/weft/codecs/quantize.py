"""Fewer bits a value: int8 and QSGD, each block of values with a scale of its own; sign, each row and column.

A block is small, so that a large value spoils the resolution of few others, and layers of very different scale may lie in
one tensor. The work goes through the cache in pieces: abs, max, multiply, round, store (10 GB/s against 0.5 for whole tensors).
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from weft.codecs.base import Codec, Keys, Scratch, Segments

PIECE = 1 << 18  # values that are worked on together: they stay in the cache
WORTH = 32  # values that share a factor of 16 bits: half a bit for each


class Blocks(Codec):
    """A float32 scale for each ``block`` values, then the values in ``bits`` bits each; blocks and pieces end together."""

    def __init__(self, block: int, bits: int) -> None:
        self.block, self.bits = block, bits
        self.scratch = Scratch()

    def nbytes(self, numel: int, itemsize: int = 4) -> int:
        return 4 * self.num_blocks(numel) + -(-numel * self.bits // 8)

    def num_blocks(self, numel: int) -> int:
        return -(-numel // self.block)

    def payload(self, numel: int, device: torch.device) -> Tensor:
        return self.scratch("payload", self.nbytes(numel), torch.uint8, device)

    def parts(self, payload: Tensor, numel: int) -> tuple[Tensor, Tensor]:
        """(scales (num_blocks,) float32, codes uint8) as views."""
        at = 4 * self.num_blocks(numel)
        if len(payload) != self.nbytes(numel):
            raise ValueError(f"{self.name}: {len(payload)} bytes for {numel} values, not {self.nbytes(numel)}")
        return payload[:at].view(torch.float32), payload[at:]

    def pieces(self, numel: int) -> Iterator[tuple[slice, slice, int]]:
        """(values, their blocks, width): whole blocks, of width ``block``, and the rest as a block of its own."""
        whole, step = numel - numel % self.block, PIECE - PIECE % self.block or self.block
        for start in range(0, whole, step):
            stop = min(start + step, whole)
            yield slice(start, stop), slice(start // self.block, stop // self.block), self.block
        if whole < numel:
            yield slice(whole, numel), slice(whole // self.block, whole // self.block + 1), numel - whole

    def work(self, x: Tensor) -> Tensor:
        return self.scratch("work", min(len(x), max(PIECE, self.block)), x.dtype, x.device)


class Int8(Blocks):
    """Round to -127..127 times the block's largest magnitude / 127 (Dettmers 2016). Off by half of that at most."""

    name = "int8"

    def __init__(self, block: int = 1024) -> None:
        super().__init__(block, 8)

    def encode(self, x: Tensor, keys: Keys) -> Tensor:
        payload, work = self.payload(len(x), x.device), self.work(x)
        scales, codes = self.parts(payload, len(x))
        codes = codes.view(torch.int8)
        for values, blocks, width in self.pieces(len(x)):
            given, now = x[values].view(-1, width), work[: values.stop - values.start].view(-1, width)
            largest = torch.abs(given, out=now).amax(1)
            scales[blocks] = largest / 127
            torch.mul(given, (127 / largest).nan_to_num_(posinf=0.0)[:, None], out=now)
            codes[values].view(-1, width).copy_(now.round_())
        return payload

    def add_to(self, out: Tensor, payload: Tensor, keys: Keys, alpha: float = 1.0) -> None:
        scales, codes = self.parts(payload, len(out))
        codes, work = codes.view(torch.int8), self.work(out)
        for values, blocks, width in self.pieces(len(out)):
            now = work[: values.stop - values.start].view(-1, width)
            now.copy_(codes[values].view(-1, width)).mul_(scales[blocks, None])
            out[values].view(-1, width).add_(now, alpha=alpha)


class Qsgd(Blocks):
    """Round at random to a multiple of the block's L2 norm / levels, so that the mean is right (Alistarh et al. 2017, eq. 3).

    Unbiased, and for few levels no contraction: error feedback would make it diverge, and is not used.
    """

    name = "qsgd"
    biased = False

    def __init__(self, levels: int = 127, block: int = 1024) -> None:
        super().__init__(block, 8 if levels > 7 else 4)
        self.levels = levels

    def encode(self, x: Tensor, keys: Keys) -> Tensor:
        payload, work = self.payload(len(x), x.device), self.work(x)
        scales, codes = self.parts(payload, len(x))
        generator = torch.Generator(x.device).manual_seed(keys.own() >> 1)
        noise = self.scratch("noise", len(work), x.dtype, x.device)
        for values, blocks, width in self.pieces(len(x)):
            size = values.stop - values.start
            now, drawn = work[:size].view(-1, width), noise[:size].view(-1, width)
            norm = torch.linalg.vector_norm(x[values].view(-1, width), dim=1)
            scales[blocks] = norm / self.levels
            torch.mul(x[values].view(-1, width), (self.levels / norm).nan_to_num_(posinf=0.0)[:, None], out=now)
            now.add_(drawn.uniform_(generator=generator)).floor_()  # floor(v + u): down or up, by how near
            now.clamp_(-self.levels, self.levels)
            self._store(codes, values, now.view(-1))
        return payload

    def _store(self, codes: Tensor, values: slice, now: Tensor) -> None:
        if self.bits == 8:
            codes.view(torch.int8)[values] = now.to(torch.int8)
            return
        pairs = torch.nn.functional.pad((now + self.levels).to(torch.uint8), (0, len(now) % 2)).view(-1, 2)
        codes[values.start // 2 : -(-values.stop // 2)] = pairs[:, 0] | (pairs[:, 1] << 4)

    def add_to(self, out: Tensor, payload: Tensor, keys: Keys, alpha: float = 1.0) -> None:
        scales, codes = self.parts(payload, len(out))
        work = self.work(out)
        for values, blocks, width in self.pieces(len(out)):
            now = work[: values.stop - values.start]
            if self.bits == 8:
                now.copy_(codes.view(torch.int8)[values])
            else:
                pairs = codes[values.start // 2 : -(-values.stop // 2)]
                now.copy_(torch.stack([pairs & 15, pairs >> 4], 1).view(-1)[: len(now)]).sub_(self.levels)
            now.view(-1, width).mul_(scales[blocks, None])
            out[values].add_(now, alpha=alpha)


class Table(NamedTuple):
    """A tensor as rows and columns, and which of them have a factor of their own: where it covers enough values to be cheap."""

    start: int  # in the flat tensor
    rows: int
    columns: int
    row_factors: int
    column_factors: int

    @classmethod
    def of(cls, shape: torch.Size, start: int) -> Table:
        rows = shape[0] if len(shape) > 1 else 1
        columns = shape.numel() // rows
        return cls(start, rows, columns, rows if columns >= WORTH else 1, columns if rows >= WORTH else 0)

    @property
    def numel(self) -> int:
        return self.rows * self.columns


class Part(NamedTuple):
    """A table's place in the values and in a payload, as views."""

    values: Tensor  # (rows, columns)
    rows: Tensor  # (row_factors,) bfloat16
    columns: Tensor  # (column_factors,) bfloat16
    codes: Tensor  # uint8

    def pieces(self) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """(rows, their values, their codes), so many that they stay in the cache and end with a byte."""
        rows, columns = self.values.shape
        step = max(8, PIECE // columns // 8 * 8)
        for start in range(0, rows, step):
            stop = min(start + step, rows)
            yield (
                slice(start, stop),
                self.values[start:stop],
                self.codes[start * columns // 8 : -(-stop * columns // 8)],
            )


class Sign(Codec):
    """One bit a value (Seide et al. 2014), times what its row and its column say of its magnitude.

    The magnitudes of a gradient are nearly of rank one (Adafactor, Shazeer & Stern 2018): r_i c_j / total, with r and c the sums
    of magnitudes of rows and columns, times the factor that is best in least squares, so that an encoding is never further off
    than none. One scale for 1024 neighbours makes loud what is quiet beside loud values, and an optimizer that divides by a
    value's own variance (Adam) then steps as far along that noise as along a gradient.
    """

    name = "sign"

    def __init__(self, segments: Segments) -> None:
        self.tables: list[Table] = []
        self.numel = 0
        for _, shape in segments:
            if shape.numel():
                self.tables.append(Table.of(shape, self.numel))
            self.numel += shape.numel()
        self.scratch = Scratch()

    def nbytes(self, numel: int, itemsize: int = 4) -> int:
        if numel != self.numel:
            raise ValueError(f"sign was made for {self.numel} values, not {numel}")
        return sum(2 * (t.row_factors + t.column_factors) + -(-t.numel // 8) for t in self.tables)

    def _parts(self, x: Tensor, payload: Tensor) -> Iterator[Part]:
        if len(payload) != self.nbytes(len(x)):
            raise ValueError(f"sign: {len(payload)} bytes for {len(x)} values, not {self.nbytes(len(x))}")
        at, end = 0, 2 * sum(t.row_factors + t.column_factors for t in self.tables)
        factors, codes = payload[:end].view(torch.bfloat16), payload[end:]
        at = begin = 0
        for t in self.tables:
            middle, stop, end = at + t.row_factors, at + t.row_factors + t.column_factors, begin - (-t.numel // 8)
            values = x[t.start : t.start + t.numel].view(t.rows, t.columns)
            yield Part(values, factors[at:middle], factors[middle:stop], codes[begin:end])
            at, begin = stop, end

    def encode(self, x: Tensor, keys: Keys) -> Tensor:
        payload = self.scratch("payload", self.nbytes(len(x)), torch.uint8, x.device)
        for part in self._parts(x, payload):
            rows, columns = part.values.new_zeros(len(part.values)), part.values.new_zeros(part.values.shape[1])
            for place, values, codes in part.pieces():
                size = torch.abs(values, out=self._work(values))
                rows[place] = size.sum(1)
                if len(part.columns):
                    columns += size.sum(0)
                codes.copy_(pack_signs(values.reshape(-1)))
            total = rows.sum()
            total = torch.where(total == 0, 1.0, total)
            if len(part.columns):
                part.columns.copy_(columns.mul_(len(columns) / total))
            if len(part.rows) < len(rows):
                rows = total[None] / len(rows)
            elif len(part.columns):
                rows.mul_(self._best(part, rows, columns))
            part.rows.copy_(rows.div_(len(columns)))
        return payload

    def _best(self, part: Part, rows: Tensor, columns: Tensor) -> Tensor:
        """The factor of least squares: <a, |x|> / <a, a> for a = rows (x) columns / len(columns)."""
        found = torch.zeros_like(rows)
        for place, values, _ in part.pieces():
            torch.mv(torch.abs(values, out=self._work(values)), columns, out=found[place])
        norm = rows.dot(rows) * columns.dot(columns) / len(columns)
        return rows.dot(found) / torch.where(norm == 0, 1.0, norm)

    def _work(self, values: Tensor) -> Tensor:
        return self.scratch("work", values.numel(), values.dtype, values.device).view(values.shape)

    def add_to(self, out: Tensor, payload: Tensor, keys: Keys, alpha: float = 1.0) -> None:
        for part in self._parts(out, payload):
            rows, columns = part.rows.to(out.dtype)[:, None], part.columns.to(out.dtype)
            for place, values, codes in part.pieces():
                signs = unpack_signs(codes, out.dtype)[: values.numel()].view(values.shape)
                if len(columns):
                    signs.mul_(columns)
                values.addcmul_(signs, rows[place] if len(rows) > 1 else rows, value=alpha)


@functools.cache
def _signs_of_bytes(dtype: torch.dtype) -> tuple[Tensor, np.ndarray[Any, Any]]:
    bits = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1)
    table = torch.from_numpy(1.0 - 2.0 * bits).to(dtype)
    return table, table.numpy()


def pack_signs(x: Tensor) -> Tensor:
    """(ceil(numel / 8),) uint8, first value in the highest bit; 1 is negative."""
    if x.is_cpu:
        return torch.from_numpy(np.packbits(np.signbit(x.numpy())))
    weights = torch.tensor([128, 64, 32, 16, 8, 4, 2, 1], dtype=torch.uint8, device=x.device)
    bits = torch.nn.functional.pad(torch.signbit(x), (0, -len(x) % 8)).view(-1, 8)
    return (bits * weights).sum(1, dtype=torch.uint8)


def unpack_signs(codes: Tensor, dtype: torch.dtype) -> Tensor:
    """(8 * len(codes),): 1 and -1."""
    table, as_numpy = _signs_of_bytes(dtype)
    if codes.is_cpu:
        return torch.from_numpy(np.take(as_numpy, codes.numpy(), axis=0).reshape(-1))
    return table.to(codes.device)[codes.long()].view(-1)
