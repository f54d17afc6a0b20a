"""Fewer bits a value: int8 and QSGD, each block of values with a scale of its own; sign, each row and column.

A block is small, so that a large value spoils the resolution of few others, and layers of very different scale may lie in
one tensor. The work goes through the cache in pieces: abs, max, multiply, round, store; whole tensors take six times as long.
"""

from __future__ import annotations

import functools
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from weft.codecs.base import Codec, Keys, Scratch, Segments

PIECE = 1 << 17  # values that are worked on together: these and what is made of them stay in the cache
WORTH = 32  # values that share a factor of 16 bits: half a bit for each
BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


class Blocks(Codec):
    """A float32 scale for each ``block`` values, then the values in ``bits`` bits each; blocks and pieces end together.

    What differs is said by ``_quantize`` and ``_levels``, of one piece.
    """

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

    def codes_of(self, codes: Tensor, values: slice) -> Tensor:
        return codes[values.start * self.bits // 8 : -(-values.stop * self.bits // 8)]

    def encode(self, x: Tensor, keys: Keys) -> Tensor:
        return self._encode(x, None, keys)

    def encode_with_feedback(self, x: Tensor, residual: Tensor, keys: Keys) -> Tensor:
        return self._encode(residual, x, keys)

    def _encode(self, x: Tensor, plus: Tensor | None, keys: Keys) -> Tensor:
        """Of x + plus, if ``plus`` is given: and then what is left goes to ``x``."""
        payload, work = self.payload(len(x), x.device), self.work(x)
        scales, codes = self.parts(payload, len(x))
        noise = self._noise(keys, x.device)
        for values, blocks, width in self.pieces(len(x)):
            given, now = x[values].view(-1, width), work[: values.stop - values.start].view(-1, width)
            if plus is not None:
                given.add_(plus[values].view(-1, width))
            self._quantize(given, now, scales[blocks], self.codes_of(codes, values), noise)
            if plus is not None:
                self._levels(self.codes_of(codes, values), now)
                given.sub_(now.mul_(scales[blocks, None]))
        return payload

    def add_to(self, out: Tensor, payload: Tensor, keys: Keys, alpha: float = 1.0) -> None:
        self._decode(out, [payload], alpha)

    def decode_sum(self, payloads: Sequence[Tensor], out: Tensor, keys: Keys) -> None:
        self._decode(out, payloads, None)

    def decode(self, payload: Tensor, out: Tensor, keys: Keys) -> None:
        self._decode(out, [payload], None)

    def _decode(self, out: Tensor, payloads: Sequence[Tensor], alpha: float | None) -> None:
        """Add all, ``alpha`` times each; None: to 0 instead of what ``out`` holds."""
        work, parts = self.work(out), [self.parts(payload, len(out)) for payload in payloads]
        for values, blocks, width in self.pieces(len(out)):
            total, now = out[values].view(-1, width), work[: values.stop - values.start].view(-1, width)
            for k, (scales, codes) in enumerate(parts):
                into = total if alpha is None and k == 0 else now
                self._levels(self.codes_of(codes, values), into)
                into.mul_(scales[blocks, None])
                if into is now:
                    total.add_(now, alpha=1.0 if alpha is None else alpha)

    def _noise(self, keys: Keys, device: torch.device) -> Noise | None:
        return None

    @abstractmethod
    def _quantize(self, given: Tensor, now: Tensor, scales: Tensor, codes: Tensor, noise: Noise | None) -> None:
        """``given`` (blocks, width) to ``scales`` (blocks,) and ``codes``. ``now``: to work in, of the same shape."""

    @abstractmethod
    def _levels(self, codes: Tensor, now: Tensor) -> None:
        """``now`` (blocks, width) becomes what ``codes`` stand for, over the scale."""


class Int8(Blocks):
    """Round to -127..127 times the block's largest magnitude / 127 (Dettmers 2016). Off by half of that at most."""

    name = "int8"

    def __init__(self, block: int = 1024) -> None:
        super().__init__(block, 8)

    def _quantize(self, given: Tensor, now: Tensor, scales: Tensor, codes: Tensor, noise: Noise | None) -> None:
        largest = largest_magnitudes(given, now)
        torch.div(largest, 127, out=scales)
        torch.mul(given, (127 / largest).nan_to_num_(posinf=0.0)[:, None], out=now)
        codes.view(torch.int8).view(now.shape).copy_(now.round_())

    def _levels(self, codes: Tensor, now: Tensor) -> None:
        now.copy_(codes.view(torch.int8).view(now.shape))


def largest_magnitudes(rows: Tensor, work: Tensor) -> Tensor:
    """Of each row, as ``rows.abs().amax(1)``: magnitudes of floats compare as their bits do, NaN above all, and integers faster."""
    return torch.abs(rows, out=work).view(BITS[rows.element_size()]).amax(1).view(rows.dtype)


class Noise:
    """Evenly in [-1/2, 1/2), a piece at a time. On the CPU in steps of 2^-16: five times as quick as 24 bits a value, and a sum of
    float32 up to 127 keeps no more of it."""

    def __init__(self, seed: int, device: torch.device) -> None:
        self.bits = np.random.SFC64(seed)
        self.generator = torch.Generator(device).manual_seed(seed >> 1)

    def add_to(self, now: Tensor, work: Tensor) -> None:
        if now.is_cpu:
            drawn = self.bits.random_raw(-(-now.numel() // 4)).view(np.int16)[: now.numel()]
            now.add_(work.copy_(torch.from_numpy(drawn).view(now.shape)), alpha=2.0**-16)
        else:
            now.add_(work.uniform_(-0.5, 0.5, generator=self.generator))


class Qsgd(Blocks):
    """Round at random to a multiple of the block's L2 norm / levels, so that the mean is right (Alistarh et al. 2017, eq. 3).

    Unbiased, and for few levels no contraction: error feedback would make it diverge, and is not used.
    """

    name = "qsgd"
    biased = False

    def __init__(self, levels: int = 127, block: int = 1024) -> None:
        super().__init__(block, 8 if levels > 7 else 4)
        self.levels = levels

    def _noise(self, keys: Keys, device: torch.device) -> Noise:
        return Noise(keys.own(), device)

    def _quantize(self, given: Tensor, now: Tensor, scales: Tensor, codes: Tensor, noise: Noise | None) -> None:
        assert noise is not None
        norm = torch.linalg.vector_norm(given, dim=1)
        torch.div(norm, self.levels, out=scales)
        torch.mul(given, (self.levels / norm).nan_to_num_(posinf=0.0)[:, None], out=now)
        noise.add_to(now, self.scratch("noise", now.numel(), now.dtype, now.device).view(now.shape))
        now.round_().clamp_(-self.levels, self.levels)
        if self.bits == 8:
            codes.view(torch.int8).view(now.shape).copy_(now)
        else:
            pairs = torch.nn.functional.pad((now.view(-1) + self.levels).to(torch.uint8), (0, now.numel() % 2)).view(
                -1, 2
            )
            torch.bitwise_or(pairs[:, 0], pairs[:, 1] << 4, out=codes)

    def _levels(self, codes: Tensor, now: Tensor) -> None:
        if self.bits == 8:
            now.copy_(codes.view(torch.int8).view(now.shape))
        else:
            now.view(-1).copy_(torch.stack([codes & 15, codes >> 4], 1).view(-1)[: now.numel()]).sub_(self.levels)


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
                pack_signs(values.reshape(-1), codes)
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
                signs = self._work(values)
                unpack_signs(codes, signs.view(-1))
                if len(columns):
                    signs.mul_(columns)
                values.addcmul_(signs, rows[place] if len(rows) > 1 else rows, value=alpha)


@functools.cache
def _signs_of_bytes(dtype: torch.dtype) -> tuple[Tensor, np.ndarray[Any, Any]]:
    bits = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1)
    table = torch.from_numpy(1.0 - 2.0 * bits).to(dtype)
    return table, table.numpy()


def pack_signs(x: Tensor, out: Tensor) -> None:
    """To (ceil(numel / 8),) uint8, first value in the highest bit; 1 is negative."""
    if x.is_cpu:
        out.copy_(torch.from_numpy(np.packbits(np.signbit(x.numpy()))))
        return
    weights = torch.tensor([128, 64, 32, 16, 8, 4, 2, 1], dtype=torch.uint8, device=x.device)
    bits = torch.nn.functional.pad(torch.signbit(x), (0, -len(x) % 8)).view(-1, 8)
    torch.sum(bits * weights, 1, dtype=torch.uint8, out=out)


def unpack_signs(codes: Tensor, out: Tensor) -> None:
    """``out`` becomes 1 and -1; as many as it holds, of the 8 in each code."""
    table, as_numpy = _signs_of_bytes(out.dtype)
    whole = len(out) // 8
    head, tail = out[: 8 * whole], out[8 * whole :]
    if out.is_cpu:  # a mode, else numpy works in a copy of ``out``; 8 bits are never beyond the table
        np.take(as_numpy, codes[:whole].numpy(), axis=0, out=head.view(-1, 8).numpy(), mode="clip")
    else:
        torch.index_select(table.to(out.device), 0, codes[:whole].int(), out=head.view(-1, 8))
    if len(tail):
        tail.copy_(table[int(codes[whole])][: len(tail)])
