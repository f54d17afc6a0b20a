"""PowerSGD (Vogels et al. 2019, 1905.13727): each gradient matrix M (n, m) as a product of two thin ones.

One step of subspace iteration from the last step's Q: P = M Q, summed over ranks; orthonormalise P; Q = M' P, summed. Linear
in M, so 2 all-reduces of r (n + m) values. The P of all matrices travel in the first, all Q in the second: torch's own hook
starts them from callbacks in an order that differs between ranks, and hangs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from weft.codecs.base import Codec, Exchanging, Keys, Scratch, Segments, Sum
from weft.codecs.spec import warmed


class Matrix(NamedTuple):
    name: str
    start: int  # in the flat tensor
    rows: int
    columns: int
    rank: int

    @property
    def numel(self) -> int:
        return self.rows * self.columns


class PowerSgd(Codec):
    """``segments`` say which matrices the flat tensor holds: dim 0 against the others. What would not shrink goes whole.

    Both factors are kept with the short side first, P (r, n) and Q (r, m): BLAS is twice as quick on them. When the warm-up begins,
    all are whole.
    """

    name = "powersgd"
    linear = True

    def __init__(self, rank: int, segments: Segments, seed: int = 0) -> None:
        self.rank, self.segments, self.seed = rank, segments, seed
        self.numel = sum(shape.numel() for _, shape in segments)
        self._q: Tensor | None = None
        self._scratch = Scratch()
        self._lay_out(dict.fromkeys((name for name, _ in segments), rank))

    def _lay_out(self, ranks: Mapping[str, int]) -> None:
        self.matrices: list[Matrix] = []
        self.whole: list[slice] = []
        start = 0
        for name, shape in self.segments:
            numel = shape.numel()
            rows = shape[0] if len(shape) > 1 else 1
            columns = numel // max(rows, 1)
            if len(shape) > 1 and 0 < ranks.get(name, 0) * (rows + columns) < numel:
                self.matrices.append(Matrix(name, start, rows, columns, ranks[name]))
            elif numel:
                self.whole.append(slice(start, start + numel))
            start += numel

    def warm_up(self, done: float) -> None:
        """Where a rank falls, the rows of Q that stay are those of the largest norm: singular values, nearly."""
        rank = round(warmed(max(self.numel, self.rank), self.rank, done))
        before = list(self.matrices)
        self._lay_out(dict.fromkeys((name for name, _ in self.segments), rank))
        if self._q is None or self.matrices == before:
            return
        old = dict(zip((m.name for m in before), self._each_q(self._q, before), strict=True))
        self._q = self._first_q(self._q)
        for m, q in zip(self.matrices, self._each_q(self._q, self.matrices), strict=True):
            if (held := old.get(m.name)) is not None:
                norms = torch.linalg.vector_norm(held, dim=1)
                keep = norms.topk(min(m.rank, len(held))).indices.sort().values
                q[: len(keep)] = held[keep]

    def nbytes(self, numel: int, itemsize: int = 4) -> int:
        if numel != self.numel:
            raise ValueError(f"powersgd was made for {self.numel} values, not {numel}")
        return itemsize * (self._p_numel + self._q_numel + self._whole_numel)

    def sums(self, numel: int, itemsize: int = 4) -> list[int]:
        return [itemsize * (self._p_numel + self._whole_numel), itemsize * self._q_numel]

    @property
    def _p_numel(self) -> int:
        return sum(m.rank * m.rows for m in self.matrices)

    @property
    def _q_numel(self) -> int:
        return sum(m.rank * m.columns for m in self.matrices)

    @property
    def _whole_numel(self) -> int:
        return sum(part.stop - part.start for part in self.whole)

    def _whole_places(self) -> Iterator[tuple[slice, slice]]:
        """(in the flat tensor, among what goes whole)."""
        at = 0
        for part in self.whole:
            numel = part.stop - part.start
            yield part, slice(at, at + numel)
            at += numel

    def _first_q(self, like: Tensor) -> Tensor:
        """The same on all ranks."""
        drawn = np.random.Generator(np.random.Philox(self.seed)).standard_normal(self._q_numel)
        return torch.from_numpy(drawn).to(like.device, like.dtype)

    def _each(self, x: Tensor, p: Tensor, q: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """(M (n, m), P (r, n), Q (r, m)) of each matrix, as views."""
        at_p = at_q = 0
        for m in self.matrices:
            end_p, end_q = at_p + m.rank * m.rows, at_q + m.rank * m.columns
            yield (
                x[m.start : m.start + m.numel].view(m.rows, m.columns),
                p[at_p:end_p].view(m.rank, m.rows),
                q[at_q:end_q].view(m.rank, m.columns),
            )
            at_p, at_q = end_p, end_q

    @staticmethod
    def _each_q(q: Tensor, matrices: Sequence[Matrix]) -> list[Tensor]:
        parts = torch.split(q, [m.rank * m.columns for m in matrices])
        return [part.view(m.rank, m.columns) for m, part in zip(matrices, parts, strict=True)]

    def _buffers(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(first: P and what goes whole, P, what goes whole, Q), Q as the last exchange left it."""
        if len(x) != self.numel:
            raise ValueError(f"powersgd was made for {self.numel} values, not {len(x)}")
        if self._q is None:
            self._q = self._first_q(x)
        first = self._scratch("first", self._p_numel + self._whole_numel, x.dtype, x.device)
        return first, first[: self._p_numel], first[self._p_numel :], self._q

    def exchange(self, x: Tensor, keys: Keys, world: int, residual: Tensor | None = None) -> Exchanging:
        """Algorithms 1 and 2 of the paper. The joined approximation is no sum of the ranks' own, so each keeps the difference
        between its own gradient and the mean approximation."""
        given = x if residual is None else residual.add_(x)
        first, p, whole, q = self._buffers(given)
        for m, left, right in self._each(given, p, q):
            torch.mm(right, m.T, out=left)
        if self.whole:
            torch.cat([given[part] for part in self.whole], out=whole)
        yield Sum([first])
        for m, left, right in self._each(given, p, q):
            orthonormalise_(left)
            torch.mm(left, m, out=right)
        yield Sum([q])
        for m, left, right in self._each(x, p, q):
            torch.mm(left.T, right, out=m)
        for part, place in self._whole_places():
            x[part] = whole[place]
            if residual is not None:
                residual[part] = 0.0
        if residual is not None:
            for matrix in self.matrices:
                part = slice(matrix.start, matrix.start + matrix.numel)
                residual[part].sub_(x[part], alpha=1 / world)

    def encode(self, x: Tensor, keys: Keys) -> Tensor:
        """Of this tensor alone: P, what goes whole, Q. Leaves the warm start as it was."""
        first, p, whole, q = self._buffers(x)
        payload = self._scratch("payload", len(first) + len(q), x.dtype, x.device)
        own_q = payload[len(first) :]
        for (m, left, right), (_, _, own) in zip(self._each(x, p, q), self._each(x, p, own_q), strict=True):
            torch.mm(right, m.T, out=left)
            orthonormalise_(left)
            torch.mm(left, m, out=own)
        if self.whole:
            torch.cat([x[part] for part in self.whole], out=whole)
        payload[: len(first)] = first
        return payload

    def add_to(self, out: Tensor, payload: Tensor, keys: Keys, alpha: float = 1.0) -> None:
        p, whole = payload[: self._p_numel], payload[self._p_numel : self._p_numel + self._whole_numel]
        for m, left, right in self._each(out, p, payload[self._p_numel + self._whole_numel :]):
            m.addmm_(left.T, right, alpha=alpha)
        for part, place in self._whole_places():
            out[part].add_(whole[place], alpha=alpha)

    def state_dict(self) -> dict[str, Any]:
        """Q by parameter name, the same on every rank; nothing before the first exchange."""
        if self._q is None:
            return {}
        return {m.name: q for m, q in zip(self.matrices, self._each_q(self._q, self.matrices), strict=True)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if not state:
            self._q = None
            return
        self._lay_out({name: len(q) for name, q in state.items()})  # as in the exchange after which it was saved
        if {m.name for m in self.matrices} != set(state):
            names = [name for name, shape in self.segments if len(shape) > 1]
            raise ValueError(f"powersgd keeps Q of {names}, and the checkpoint holds {sorted(state)}")
        for m in self.matrices:
            if tuple(state[m.name].shape) != (m.rank, m.columns):
                raise ValueError(
                    f"powersgd keeps Q of {m.name} as {(m.rank, m.columns)}, and the checkpoint's is {tuple(state[m.name].shape)}"
                )
        self._q = torch.cat([state[m.name].reshape(-1) for m in self.matrices])


def orthonormalise_(rows: Tensor) -> None:
    """In place, rows (r, n) with r <= n, by Householder's QR.

    Gram-Schmidt, the paper's way, loses orthogonality where rows nearly depend on each other, as those of a gradient of low
    rank do: what comes out is then longer than the gradient. And a row that it makes 0 stays 0, here and in the Q that follows;
    this gives it a direction of its own.
    """
    columns = rows.T.float() if rows.dtype in (torch.float16, torch.bfloat16) else rows.T
    rows.copy_(torch.linalg.qr(columns).Q.T)
