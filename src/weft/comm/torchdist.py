"""A Link on torch.distributed: Gloo moves CPU tensors, NCCL those of GPUs. The user's own default group is left alone.

torch returns a silently wrong sum when ranks call with different shapes. So every call begins with an all-gather of a
slot of fixed size on Gloo, which holds a digest of the call; a call whose data fit into the slot ends there. This
finds *every* difference in operation, root, number of tensors, shapes and dtypes before data are touched, at the cost
of one small all-gather (about 0.1-0.2 ms) for each large call. torch names a dead rank by its port, and a stalled one
not at all: we look at the processes on this host, and at what each rank wrote into the store as it failed.
"""

from __future__ import annotations

import hashlib
import math
import os
import struct
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import msgspec

from weft.comm.endpoint import ranks_are
from weft.comm.link import DEADLINE_S, Link, Op, Traffic, late_error
from weft.comm.sites import call_site
from weft.comm.wire import Meta
from weft.cost import SLOT_BYTES, all_reduce_bytes, ring_all_reduce_bytes
from weft.errors import CommError, ConfigError, DeadlineExceeded, Mismatch, PeerLost, from_wire, to_wire

if TYPE_CHECKING:
    import torch
    from torch._C._distributed_c10d import Store

LOOK_S = 0.03  # between two looks at those we wait for
#: Groups with a call that never ended: to destroy one would wait for the call. They go with the process.
_ABANDONED: list[Any] = []
GRACE_S = 1.0  # how long a failing rank asks who else fails, and why
_SLOT_HEAD = struct.Struct("=16sq")  # digest of the call, bytes of this rank's data
INLINE_BYTES = SLOT_BYTES - _SLOT_HEAD.size


class TorchDistLink(Link):
    """Rank ``rank`` of ``world``. ``store`` is a torch store that all ranks reach, or the path of a file on this host.

    ``host`` is the address that Gloo binds to (None: the one of this machine's name, or GLOO_SOCKET_IFNAME). The
    deadline (of calls ``call_s``, if it is given) holds for each of the two exchanges of a call. After an error the link is closed, and every later call
    raises the same. On other hosts than ours a dead rank is named if it said why, or if all others are heard within
    a second; else ``ranks`` of the error is empty.
    """

    def __init__(
        self,
        rank: int,
        world: int,
        backend: Literal["gloo", "nccl"] = "gloo",
        *,
        store: Store | str | Path,
        deadline_s: float = DEADLINE_S,
        host: str | None = "127.0.0.1",
        call_s: float | None = None,
    ) -> None:
        dist = _torch_distributed()
        if backend not in ("gloo", "nccl"):
            raise ConfigError(f"unknown backend {backend!r}, possible: gloo, nccl")
        if backend == "nccl" and not has_nccl():
            raise ConfigError("this torch has no NCCL: use backend='gloo', or a CUDA build of torch")
        self.rank, self.world, self.carrier, self.deadline_s = rank, world, backend, deadline_s
        self.traffic = Traffic()
        self._error: CommError | None = None
        self._interruption: CommError | None = None
        self._closed = False
        self._seq = 0
        self._doing = Meta()
        shared = store if isinstance(store, dist.Store) else dist.FileStore(str(store), world)
        self._store = dist.PrefixStore("weft", shared)
        self._store.set_timeout(timedelta(seconds=deadline_s))
        self._gloo, self._nccl = self._connect(backend, host, timedelta(seconds=call_s or deadline_s))
        self.deadline_s = call_s or deadline_s

    def _connect(self, backend: str, host: str | None, timeout: timedelta) -> tuple[Any, Any]:
        dist = _torch_distributed()
        self._store.set(f"process/{self.rank}", f"{_host_id()} {os.getpid()}")
        try:
            names = [self._store.get(f"process/{k}").decode() for k in range(self.world)]
            if host is None:
                gloo = dist.ProcessGroupGloo(self._store, self.rank, self.world, timeout)
            else:
                options = dist.ProcessGroupGloo._Options()
                options._devices = [dist.ProcessGroupGloo.create_device(hostname=host)]
                options._timeout = timeout
                gloo = dist.ProcessGroupGloo(self._store, self.rank, self.world, options)
        except RuntimeError as error:
            missing = tuple(k for k in range(self.world) if not self._store.check([f"process/{k}"]))
            who = f"{ranks_are(missing)} not there" if missing else str(error)
            raise DeadlineExceeded(
                f"rank {self.rank} cannot join: {who} within {self.deadline_s:g} s", missing
            ) from error
        here = _host_id()
        self._pids = {k: int(n.split()[1]) for k, n in enumerate(names) if n.split()[0] == here and k != self.rank}
        nccl = None
        if backend == "nccl":
            options = dist.ProcessGroupNCCL.Options()
            options._timeout = timeout
            nccl = dist.ProcessGroupNCCL(dist.PrefixStore("nccl", self._store), self.rank, self.world, options)
        return gloo, nccl

    # The collectives

    def all_reduce(self, buffers: Sequence[torch.Tensor], op: Op = "sum") -> None:
        import torch

        if op not in ("sum", "max"):
            raise ValueError(f"op {op!r} is not known, possible: sum, max")
        if self.world == 1:
            return
        with self._call(f"all_reduce {op}", buffers) as call, _flattened(buffers) as flats:
            if sum(flat.nbytes for flat in flats) <= INLINE_BYTES:
                slots = self._meet(call, _joined(flats))
                start = 0
                for flat in flats:
                    parts = [slot.data[start : start + flat.nbytes].clone().view(flat.dtype) for slot in slots]
                    flat.copy_(_combined(parts, op))
                    start += flat.nbytes
                return
            self._meet(call)
            works = [self._start_all_reduce(flat, op) for flat in flats if _torch_reduces(flat)]
            for flat in flats:
                if not _torch_reduces(flat):
                    parts = self._gather_bytes(flat.view(torch.uint8), flat.nbytes)
                    flat.copy_(_combined([part.view(flat.dtype) for part in parts], op))
            self._wait(works)

    def _start_all_reduce(self, flat: torch.Tensor, op: Op) -> Any:
        dist = _torch_distributed()
        options = dist.AllreduceOptions()
        options.reduceOp = dist.ReduceOp.SUM if op == "sum" else dist.ReduceOp.MAX
        self._count(self._ring_bytes(flat.nbytes))
        return self._group_of(flat).allreduce([flat], options)

    def all_gather(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        import torch

        if self.world == 1:
            return [tensor.detach().clone()]
        row_shape = tensor.shape[1:]  # a tensor without dims counts as one row
        row_bytes = math.prod(row_shape) * tensor.element_size()
        num_rows = len(tensor) if tensor.dim() else 1
        mine = tensor.detach().contiguous().view(-1).view(torch.uint8)
        with self._call("all_gather", [tensor], ragged=True) as call:
            slots = self._meet(call, mine if mine.numel() <= INLINE_BYTES else mine[:0], num_rows)
            lengths = [slot.num_rows * row_bytes for slot in slots]
            if max(lengths) <= INLINE_BYTES:
                padded = [slot.data for slot in slots]
            elif len(set(lengths)) == 1:
                padded = self._gather_bytes(mine, lengths[0])
            else:
                padded = self._gather_uneven(mine, lengths)
        parts = [data[: slot.num_rows * row_bytes].clone() for slot, data in zip(slots, padded, strict=True)]
        shapes = [(slot.num_rows, *row_shape) if tensor.dim() else () for slot in slots]
        return [
            part.view(tensor.dtype).view(shape).to(tensor.device) for part, shape in zip(parts, shapes, strict=True)
        ]

    def _gather_bytes(self, mine: torch.Tensor, num_bytes: int) -> list[torch.Tensor]:
        """Every rank's bytes, of which each has ``num_bytes``."""
        import torch

        gathered = mine.new_empty(self.world * num_bytes)
        self._count((self.world - 1) * num_bytes)
        self._wait([self._group_of(mine)._allgather_base(gathered, mine)])
        return list(torch.split(gathered, num_bytes))

    def _gather_uneven(self, mine: torch.Tensor, lengths: Sequence[int]) -> list[torch.Tensor]:
        """The same where each has as many as ``lengths`` says. torch's gather would pad all to the longest, and who sends nothing would send as much as
        it gets: so each sends what it has to all."""
        dist = _torch_distributed()
        parts, works = [], []
        for root, length in enumerate(lengths):
            part = mine if root == self.rank else mine.new_empty(length)
            parts.append(part)
            if length:
                options = dist.BroadcastOptions()
                options.rootRank, options.rootTensor = root, 0
                works.append(self._group_of(part).broadcast([part], options))
        self._count((self.world - 1) * mine.numel())
        self._wait(works)
        return parts

    def broadcast(self, buffers: Sequence[torch.Tensor], root: int = 0) -> None:
        import torch

        dist = _torch_distributed()
        if not 0 <= root < self.world:
            raise ValueError(f"root {root} is not a rank, possible: 0 to {self.world - 1}")
        if self.world == 1:
            return
        with self._call(f"broadcast from {root}", buffers) as call, _flattened(buffers) as flats:
            data = [flat.view(torch.uint8) for flat in flats]
            num_bytes = sum(d.numel() for d in data)
            if num_bytes <= INLINE_BYTES:
                given = self._meet(call, _joined(flats))[root].data
                for part, got in zip(data, torch.split(given[:num_bytes], [d.numel() for d in data]), strict=True):
                    part.copy_(got)
                return
            self._meet(call)
            options = dist.BroadcastOptions()
            options.rootRank, options.rootTensor = root, 0
            works = [self._group_of(part).broadcast([part], options) for part in data]
            if self.rank == root:  # the tree's root is charged with what all of its branches send
                self._count((self.world - 1) * num_bytes)
            self._wait(works)

    def all_reduce_bytes(self, nbytes: int) -> int:
        return all_reduce_bytes(self.carrier, nbytes, self.world)

    def _ring_bytes(self, num_bytes: int) -> int:
        """Gloo and NCCL go round a ring; torch does not count, so this is the formula."""
        return ring_all_reduce_bytes(num_bytes, self.world)

    def _count(self, num_bytes: int) -> None:
        self.traffic.bytes_sent += num_bytes
        self.traffic.messages += 1

    def _group_of(self, tensor: torch.Tensor) -> Any:
        return self._nccl if tensor.is_cuda and self._nccl is not None else self._gloo

    def _wait(self, works: list[Any]) -> None:
        """With a time limit NCCL's wait ends when the work has; without one, when it has been queued.

        Works are let go one by one, and all if one fails: a work holds its group, which would keep its sockets open for as
        long as somebody holds the error with its frames, and ranks that have no socket to the lost one hear of it only as
        ours close.
        """
        try:
            while works:
                if self._nccl is not None:
                    works[0].wait(timedelta(seconds=self.deadline_s))
                else:
                    self._wait_for_gloo(works)
                del works[0]
        except RuntimeError as error:
            works.clear()
            raise self._diagnose(error) from error

    def _wait_for_gloo(self, works: list[Any]) -> None:
        """Gloo keeps the limit of its group. Of about a hundred deaths it misses one, and waits on for its limit: so we
        look ourselves, and believe what we see if the work has not ended by the next look.
        """
        lost: CommError | None = None
        while True:
            has_ended = works[0].is_completed()
            try:
                works[0].wait(timedelta(seconds=LOOK_S))
                return
            except RuntimeError:
                if has_ended:  # else it may be the time limit of this look, even if the work has ended meanwhile
                    raise
            if lost is not None:
                works.clear()
                _ABANDONED.append(self._gloo)
                raise lost
            lost = self._interruption or self._told_or_seen_dead()

    def _told_or_seen_dead(self) -> CommError | None:
        doing = f"{self._doing}, call {self._seq} of rank {self.rank}"
        dead = tuple(
            k for k, pid in self._pids.items() if _process_state(pid) in "XZ"
        )  # first: it says why before it ends
        for k in range(self.world):
            if k != self.rank and (text := self._noted("error", k)):
                return _error_in(text)
        return PeerLost(f"{doing}: {ranks_are(dead)} gone (the process has ended)", dead) if dead else None

    # The slot that begins every call

    def _meet(self, call: Meta, data: torch.Tensor | None = None, num_rows: int = 0) -> list[_Slot]:
        """Wait for all, compare what they call, and exchange up to INLINE_BYTES. Same size whatever is called."""
        import torch

        begin = time.monotonic()
        mine = torch.zeros(SLOT_BYTES, dtype=torch.uint8)
        digest = hashlib.blake2b(call.encode(), digest_size=16).digest()
        mine[: _SLOT_HEAD.size] = _from_bytes(_SLOT_HEAD.pack(digest, num_rows))
        if data is not None:
            mine[_SLOT_HEAD.size : _SLOT_HEAD.size + data.numel()] = data
        slots = []
        for slot in self._exchange_slots(mine):
            their_digest, their_rows = _SLOT_HEAD.unpack(_to_bytes(slot[: _SLOT_HEAD.size]))
            slots.append(_Slot(their_digest, their_rows, slot[_SLOT_HEAD.size :]))
        self.traffic.waited(begin, time.monotonic())
        if any(slot.digest != digest for slot in slots):
            raise self._mismatch(call, [slot.digest for slot in slots])
        return slots

    def _exchange_slots(self, mine: torch.Tensor) -> tuple[torch.Tensor, ...]:
        import torch

        gathered = torch.empty(self.world * SLOT_BYTES, dtype=torch.uint8)
        self._count((self.world - 1) * SLOT_BYTES)
        self._wait([self._gloo._allgather_base(gathered, mine)])
        return torch.split(gathered, SLOT_BYTES)

    def _mismatch(self, call: Meta, digests: list[bytes]) -> Mismatch:
        """All ranks see that digests differ, and all come here: one more slot tells what each has called."""
        site = f" at {call_site()} (its call {self._seq})".encode()
        text = f"{call}".encode()[: SLOT_BYTES - len(site)] + site
        slots = self._exchange_slots(_from_bytes(text.ljust(SLOT_BYTES, b"\0")))
        texts = [_to_bytes(slot).rstrip(b"\0").decode(errors="replace") for slot in slots]
        usual = max(digests, key=digests.count)
        odd = [k for k, digest in enumerate(digests) if digest != usual]
        ranks = tuple(range(self.world)) if 2 * len(odd) >= self.world else tuple(odd)
        return Mismatch("ranks disagree: " + "; ".join(f"rank {k} called {t}" for k, t in enumerate(texts)), ranks)

    @contextmanager
    def _call(self, op: str, tensors: Sequence[torch.Tensor], ragged: bool = False) -> Iterator[Meta]:
        """Name the call, keep the time; find out who is to blame if it fails."""
        if self._error is not None:
            raise self._error
        if self._closed:
            raise CommError("this link is closed")
        self._seq += 1
        begin, waited = time.monotonic(), self.traffic.wait_s
        shapes = [(-1, *t.shape[1:]) if ragged and t.dim() else tuple(t.shape) for t in tensors]
        call = Meta(op, tuple(shapes), tuple(str(t.dtype)[6:] for t in tensors))
        self._doing = call
        self.traffic.call(self._seq, call)
        try:
            yield call
            self.traffic.call(self._seq, None)
        except CommError as error:
            self._fail(error)
            raise
        except BaseException as error:
            self._fail(CommError(f"{call} was broken off: {error!r}", (self.rank,)))
            raise
        finally:
            self.traffic.busy_s += time.monotonic() - begin - (self.traffic.wait_s - waited)

    # Who is to blame

    def _fail(self, error: CommError) -> None:
        self._error = error
        self.close()

    def _diagnose(self, error: RuntimeError) -> CommError:
        """torch says what happened to a socket; this finds the rank. Takes at most GRACE_S."""
        doing = f"{self._doing}, call {self._seq} of rank {self.rank}"
        late = "timed out" in str(error).lower()
        others = [k for k in range(self.world) if k != self.rank]
        self._note("failing", "")
        until = time.monotonic() + GRACE_S
        while True:
            states = {k: _process_state(pid) for k, pid in self._pids.items()}  # first: a rank says why before it ends
            if told := [text for k in others if (text := self._noted("error", k))]:
                return _error_in(told[0])
            if left := tuple(k for k in others if self._noted("left", k) is not None):
                return PeerLost(f"{doing}: {ranks_are(left)} gone (it closed its link while it was needed)", left)
            if dead := tuple(k for k, state in states.items() if state in "XZ"):
                return PeerLost(f"{doing}: {ranks_are(dead)} gone (the process has ended)", dead)
            if stopped := tuple(k for k, state in states.items() if state == "T"):
                return late_error(stopped, self.deadline_s, doing, "the process is stopped")
            missing = tuple(k for k in others if self._noted("failing", k) is None)
            if time.monotonic() >= until or not missing:
                break
            time.sleep(0.01)
        if late and missing:
            return late_error(missing, self.deadline_s, doing)
        if late:
            return DeadlineExceeded(
                f"{doing}: no rank is missing, and it did not end within {self.deadline_s:g} s ({error}). Allow a longer deadline"
            )
        return PeerLost(
            f"{doing}: {f'{ranks_are(missing)} missing' if missing else 'no rank is missing'} ({error})", missing
        )

    def _note(self, what: str, text: str) -> None:
        with suppress(RuntimeError):  # the store may have died with its host
            self._store.set(f"{what}/{self.rank}", text)

    def _noted(self, what: str, rank: int) -> bytes | None:
        key = f"{what}/{rank}"
        try:
            return self._store.get(key) if self._store.check([key]) else None
        except RuntimeError:
            return None

    def interrupt(self, error: CommError) -> None:
        self._interruption = error

    def fail(self, error: CommError) -> None:
        if self._error is None:
            self._fail(error)

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        if self._error is not None:
            self._note("error", msgspec.json.encode(to_wire(self._error)).decode())
        else:
            self._note("left", "")
        if self._nccl is not None:
            self._nccl.abort() if self._error is not None else self._nccl.shutdown()
        self._gloo = self._nccl = None  # their threads and sockets end with them


def has_nccl() -> bool:
    return bool(_torch_distributed().is_nccl_available())


def connect_store(host: str, port: int, *, prefix: str, deadline_s: float, serve: bool = False) -> Store:
    """The TCPStore at host:port, or one that this process keeps there (``serve``). DeadlineExceeded if nobody answers.

    It is neither encrypted nor authenticated: whoever reaches the port can read and write.
    """
    dist = _torch_distributed()
    try:
        store = dist.TCPStore(
            host,
            port,
            is_master=serve,
            wait_for_workers=False,
            multi_tenant=serve,
            timeout=timedelta(seconds=deadline_s),
        )
    except RuntimeError as error:
        first = str(error).splitlines()[0]
        doing = "cannot keep a store" if serve else "no store answers"
        raise DeadlineExceeded(f"{doing} at {host}:{port} within {deadline_s:g} s ({first})") from error
    prefixed: Store = dist.PrefixStore(prefix, store)
    return prefixed


def _torch_distributed() -> Any:
    """Untyped: torch's stubs name only part of what this module holds."""
    import torch.distributed

    return torch.distributed


class _Slot(NamedTuple):
    digest: bytes
    num_rows: int  # of this rank's tensor (all_gather)
    data: torch.Tensor  # (INLINE_BYTES,) uint8


@contextmanager
def _flattened(buffers: Sequence[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """The buffers as one flat tensor for each dtype; the only one of its dtype is used where it lies."""
    import torch

    tensors = sorted((b.detach() for b in buffers if b.numel()), key=lambda t: (str(t.dtype), str(t.device)))
    flats: list[torch.Tensor] = []
    copied: list[tuple[list[torch.Tensor], torch.Tensor]] = []
    for _, of_same_kind in groupby(tensors, key=lambda t: (t.dtype, t.device)):
        group = list(of_same_kind)
        if len(group) == 1 and group[0].is_contiguous():
            flats.append(group[0].view(-1))
        else:
            flats.append(torch.cat([t.reshape(-1) for t in group]))
            copied.append((group, flats[-1]))
    yield flats
    for group, flat in copied:
        for tensor, part in zip(group, torch.split(flat, [t.numel() for t in group]), strict=True):
            tensor.copy_(part.view(tensor.shape))


def _joined(flats: Sequence[torch.Tensor]) -> torch.Tensor:
    """The bytes of all, one after the other, on the CPU."""
    import torch

    if not flats:
        return torch.empty(0, dtype=torch.uint8)
    return torch.cat([flat.view(torch.uint8).cpu() for flat in flats])


def _combined(parts: Sequence[torch.Tensor], op: Op) -> torch.Tensor:
    """In rank order, into the first."""
    import torch

    total, *rest = parts
    for part in rest:
        if op == "sum":
            total.add_(part)
        else:
            torch.maximum(total, part, out=total)
    return total


def _torch_reduces(flat: torch.Tensor) -> bool:
    """Whether Gloo and NCCL know this dtype; the bytes of others are gathered and combined here."""
    import torch

    known = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
    return flat.dtype in (*known, torch.int64, torch.int32, torch.int8, torch.uint8)


def _from_bytes(data: bytes) -> torch.Tensor:
    import torch

    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def _to_bytes(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.numpy())


def _error_in(note: bytes) -> CommError:
    error = from_wire(msgspec.json.decode(note))
    return error if isinstance(error, CommError) else CommError(str(error))


def _host_id() -> str:
    """Equal for two processes that see each other's process ids."""
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{os.readlink('/proc/self/ns/pid')}"
    return f"unknown/{os.uname().nodename}/{os.getpid()}"


def _process_state(pid: int) -> str:
    """The kernel's letter: R, S, D run or wait; T is stopped; Z and X have ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "X"
