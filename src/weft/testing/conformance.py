"""What any Link must do, as functions: ``for law in LAWS: law(make, world)`` raises AssertionError where it does not.

``make(world)`` gives a function that runs ``fn(link)`` on every rank and returns what became of each. ``in_threads``
and ``in_processes`` build it from a function that makes one rank's link. In pytest:

    make = in_processes(connect=lambda rank, world, shared, deadline_s: MyLink(...), prepare=lambda world: ...)

    @pytest.mark.parametrize("law", LAWS)
    def test_law(law): law(make, 3)
"""

from __future__ import annotations

import faulthandler
import gc
import os
import pickle
import select
import signal
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from weft.comm.link import Link, Op
from weft.errors import CommError, DeadlineExceeded, Mismatch, PeerLost

DEADLINE_S = 20.0
SHORT_DEADLINE_S = 2.5  # on a starved machine a sign of life may be late by a part of it
PATIENCE_S = 30.0  # beyond the deadline, until a test run is given up


@dataclass
class Outcome:
    """What became of one rank: it returned ``value``, raised ``error``, was killed (``died``), or hung."""

    value: Any = None
    error: BaseException | None = None
    died: bool = False

    def get(self) -> Any:
        if self.error is not None:
            raise self.error
        assert not self.died, "the rank died"
        return self.value


class Run(Protocol):
    #: Whether a rank is a process, which can be killed and stopped.
    processes: bool

    def __call__(self, fn: Callable[[Link], Any], deadline_s: float = DEADLINE_S) -> list[Outcome]: ...


Make = Callable[[int], Run]
#: (rank, world, what prepare returned, deadline_s) -> that rank's link
Connect = Callable[[int, int, Any, float], Link]
Prepare = Callable[[int], Any]


def in_threads(connect: Connect, prepare: Prepare = lambda world: None) -> Make:
    def make(world: int) -> Run:
        return _Threads(connect, prepare, world)

    return make


def in_processes(
    connect: Connect, prepare: Prepare = lambda world: None, clean_up: Callable[[Any], None] = lambda shared: None
) -> Make:
    """Ranks are forked. ``clean_up`` runs in the parent when all have ended."""

    def make(world: int) -> Run:
        return _Processes(connect, prepare, clean_up, world)

    return make


def _outcome(fn: Callable[[Link], Any], connect: Callable[[], Link]) -> Outcome:
    try:
        link = connect()
        try:
            return Outcome(fn(link))
        finally:
            link.close()
    except BaseException as error:
        return Outcome(error=error)


class _Threads:
    processes = False

    def __init__(self, connect: Connect, prepare: Prepare, world: int) -> None:
        self._connect, self._prepare, self._world = connect, prepare, world

    def __call__(self, fn: Callable[[Link], Any], deadline_s: float = DEADLINE_S) -> list[Outcome]:
        shared = self._prepare(self._world)
        outcomes = [Outcome(error=TimeoutError("the rank hangs")) for _ in range(self._world)]

        def go(rank: int) -> None:
            outcomes[rank] = _outcome(fn, lambda: self._connect(rank, self._world, shared, deadline_s))

        threads = [threading.Thread(target=go, args=(rank,), daemon=True) for rank in range(self._world)]
        until = time.monotonic() + deadline_s + PATIENCE_S
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(max(0.0, until - time.monotonic()))
        return outcomes


class _Processes:
    processes = True

    def __init__(self, connect: Connect, prepare: Prepare, clean_up: Callable[[Any], None], world: int) -> None:
        self._connect, self._prepare, self._clean_up, self._world = connect, prepare, clean_up, world

    def __call__(self, fn: Callable[[Link], Any], deadline_s: float = DEADLINE_S) -> list[Outcome]:
        shared = self._prepare(self._world)
        children: dict[int, tuple[int, int]] = {}  # rank -> (pid, where its outcome can be read)
        try:
            for rank in range(self._world):
                children[rank] = self._fork(fn, rank, shared, deadline_s)
            return self._collect(children, time.monotonic() + deadline_s + PATIENCE_S)
        finally:
            for pid, pipe in children.values():
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                os.close(pipe)
            self._clean_up(shared)

    def _fork(self, fn: Callable[[Link], Any], rank: int, shared: Any, deadline_s: float) -> tuple[int, int]:
        read_end, write_end = os.pipe()
        if pid := os.fork():
            os.close(write_end)
            return pid, read_end
        try:
            gc.freeze()  # what the parent left to collect may wait for threads of the parent (torch's process groups do)
            torch.set_num_threads(1)  # the parent's pool of threads is not here
            faulthandler.register(signal.SIGUSR1, file=2)  # one that hangs is asked where
            outcome = _outcome(fn, lambda: self._connect(rank, self._world, shared, deadline_s))
            with os.fdopen(write_end, "wb") as pipe:
                pipe.write(pickle.dumps(outcome))
        finally:
            os._exit(0)

    def _collect(self, children: dict[int, tuple[int, int]], until: float) -> list[Outcome]:
        """Read what the ranks write. One that is stopped counts as dead once all others have ended."""
        pipes = {pipe: rank for rank, (_, pipe) in children.items()}
        data = dict.fromkeys(children, b"")
        while pipes and time.monotonic() < until:
            for pipe in select.select(list(pipes), [], [], 0.05)[0]:
                if part := os.read(pipe, 1 << 20):
                    data[pipes[pipe]] += part
                else:
                    del pipes[pipe]
            if all(_is_stopped(children[rank][0]) for rank in pipes.values()):
                break
        else:
            for rank in pipes.values():
                os.kill(children[rank][0], signal.SIGUSR1)
            time.sleep(1.0 if pipes else 0.0)
        return [
            pickle.loads(data[rank])
            if data[rank]
            else Outcome(error=TimeoutError("the rank hangs"))
            if pipe in pipes and not _is_stopped(pid)
            else Outcome(died=True)
            for rank, (pid, pipe) in children.items()
        ]


def _is_stopped(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] in "Tt"
    except OSError:
        return False


def _values(outcomes: Sequence[Outcome]) -> list[Any]:
    return [outcome.get() for outcome in outcomes]


# What is exchanged, and the truth about it

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.uint8)
#: (shape, dtype) of each buffer of a call: none, empty, scalar, fewer elements than ranks, mixed, small, large
CALLS: tuple[tuple[tuple[tuple[int, ...], torch.dtype], ...], ...] = (
    (),
    (((0,), torch.float32),),
    (((), torch.float32),),
    (((1,), torch.float64),),
    *((((3,), dtype),) for dtype in DTYPES),
    *((((40_001,), dtype),) for dtype in DTYPES),
    (
        ((5, 7), torch.float32),
        ((0, 3), torch.int64),
        ((1,), torch.bfloat16),
        ((9,), torch.float64),
        ((2,), torch.uint8),
    ),
    (((60_001,), torch.bfloat16), ((30_001,), torch.float32), ((50_003,), torch.uint8), ((999,), torch.float32)),
    (((300_007,), torch.float32),),
)
_EPS = {torch.float16: 2e-3, torch.bfloat16: 2e-2, torch.float32: 1e-6, torch.float64: 1e-14}


def contribution(shape: tuple[int, ...], dtype: torch.dtype, rank: int, key: int = 0) -> torch.Tensor:
    """What ``rank`` gives: any rank can compute any other's."""
    generator = torch.Generator().manual_seed(1000 * key + rank)
    if dtype.is_floating_point:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    return torch.randint(0, 20, shape, generator=generator).to(dtype)


def expected(shape: tuple[int, ...], dtype: torch.dtype, world: int, op: Op, key: int = 0) -> torch.Tensor:
    """In one process, in float64."""
    stack = torch.stack([contribution(shape, dtype, rank, key).double() for rank in range(world)])
    return stack.sum(0) if op == "sum" else stack.amax(0)


def assert_reduced(
    result: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype, world: int, op: Op, key: int = 0
) -> None:
    assert (tuple(result.shape), result.dtype) == (shape, dtype)
    truth = expected(shape, dtype, world, op, key)
    # The rounding of a sum grows with its terms, not with itself: they may cancel.
    tolerance = _EPS.get(dtype, 0.0) * world * 5 if op == "sum" else 0.0
    torch.testing.assert_close(result.double(), truth, rtol=0, atol=tolerance)


def _bits(tensors: Sequence[torch.Tensor]) -> list[bytes]:
    return [bytes(t.contiguous().view(-1).view(torch.uint8).numpy()) for t in tensors]


# The laws


def all_reduce_equals_one_process(make: Make, world: int) -> None:
    """Any dtypes and sizes, in one call; to the rounding of the dtype; the same bits on every rank."""

    def fn(link: Link) -> list[list[bytes]]:
        bits = []
        for op in ("sum", "max"):
            for key, call in enumerate(CALLS):
                buffers = [contribution(shape, dtype, link.rank, key) for shape, dtype in call]
                link.all_reduce(buffers, op)
                for result, (shape, dtype) in zip(buffers, call, strict=True):
                    assert_reduced(result, shape, dtype, link.world, op, key)
                bits.append(_bits(buffers))
        return bits

    first, *others = _values(make(world)(fn))
    assert all(bits == first for bits in others)


def all_reduce_in_place(make: Make, world: int) -> None:
    """Buffers that are views, transposed, or want a gradient; what lies around them is untouched."""

    def fn(link: Link) -> None:
        for rows in (5, 300):
            around = torch.full((rows + 2, 90), 7.0)
            inside = around[1:-1, 1:-1]
            inside.copy_(contribution((rows, 88), torch.float32, link.rank))
            turned = contribution((7, rows), torch.float32, link.rank, 1).t()
            leaf = contribution((rows,), torch.float32, link.rank, 2).requires_grad_()
            link.all_reduce([inside, turned, leaf])
            assert_reduced(inside.clone(), (rows, 88), torch.float32, link.world, "sum")
            assert_reduced(turned.t(), (7, rows), torch.float32, link.world, "sum", 1)
            assert_reduced(leaf.detach(), (rows,), torch.float32, link.world, "sum", 2)
            edge = torch.cat([around[0], around[-1], around[:, 0], around[:, -1]])
            assert (edge == 7.0).all()

    _values(make(world)(fn))


def allocated_buffers_are_reduced(make: Make, world: int) -> None:
    def fn(link: Link) -> None:
        for numel, dtype in ((1000, torch.float32), (70_001, torch.float64)):
            flat = link.allocate(numel, dtype)
            assert (flat.shape, flat.dtype, flat.count_nonzero().item()) == ((numel,), dtype, 0)
            for key in range(3):
                flat.copy_(contribution((numel,), dtype, link.rank, key))
                link.all_reduce([flat])
                assert_reduced(flat, (numel,), dtype, link.world, "sum", key)

    _values(make(world)(fn))


def all_gather_keeps_rank_order(make: Make, world: int) -> None:
    """Lengths in dim 0 may differ and be 0; the caller's tensor is neither changed nor returned."""
    cases: list[tuple[Callable[[int], tuple[int, ...]], torch.dtype]] = [
        (lambda rank: (rank, 3), torch.float32),
        (lambda rank: (world - rank,), torch.int64),
        (lambda rank: (0, 2), torch.float64),
        (lambda rank: (rank + 1, 0), torch.float32),
        (lambda rank: (), torch.float32),
        (lambda rank: (20_000 * rank,), torch.bfloat16),
        (lambda rank: (30_000,), torch.bool),
    ]

    def fn(link: Link) -> None:
        for key, (shape_of, dtype) in enumerate(cases):
            mine = contribution(shape_of(link.rank), dtype, link.rank, key)
            parts = link.all_gather(mine)
            assert len(parts) == link.world
            for rank, part in enumerate(parts):
                torch.testing.assert_close(part, contribution(shape_of(rank), dtype, rank, key), rtol=0, atol=0)
                assert mine.numel() == 0 or part.data_ptr() != mine.data_ptr()

    _values(make(world)(fn))


#: Numbers of a rank's part: none, few, more than one piece of a carrier's memory
PARTS = ((0, torch.float32), (1, torch.int64), (5, torch.bfloat16), (700_001, torch.float32), (150_001, torch.bfloat16))


def parts_are_gathered_in_place(make: Make, world: int) -> None:
    """Into rows, of which the caller's own part may be one."""

    def fn(link: Link) -> None:
        for key, (numel, dtype) in enumerate(PARTS):
            for own_row in (False, True):
                whole = torch.full((link.world, numel), 3).to(dtype)
                mine = contribution((numel,), dtype, link.rank, key)
                mine = whole[link.rank].copy_(mine) if own_row else mine
                link.all_gather_into(whole, mine)
                for rank, row in enumerate(whole):
                    assert torch.equal(row, contribution((numel,), dtype, rank, key)), (numel, dtype, rank)

    _values(make(world)(fn))


def reduce_scatter_equals_one_process(make: Make, world: int) -> None:
    """Each rank gets the sum of its row, to the rounding of the dtype; what was given stays; twice the same bits."""

    def fn(link: Link) -> None:
        for key, (numel, dtype) in enumerate(PARTS):
            given = contribution((link.world, numel), dtype, link.rank, key)
            kept, mine, again = given.clone(), torch.empty(numel, dtype=dtype), torch.empty(numel, dtype=dtype)
            link.reduce_scatter(mine, given)
            link.reduce_scatter(again, given)
            assert torch.equal(given, kept)
            assert _bits([mine]) == _bits([again])
            truth = expected((link.world, numel), dtype, link.world, "sum", key)[link.rank]
            tolerance = _EPS.get(dtype, 0.0) * link.world * 5
            torch.testing.assert_close(mine.double(), truth, rtol=0, atol=tolerance)

    _values(make(world)(fn))


def broadcast_comes_from_the_root(make: Make, world: int) -> None:
    shapes = (((3, 4), torch.float32), ((), torch.int64), ((40_000,), torch.bfloat16), ((0,), torch.float32))

    def fn(link: Link) -> None:
        for root in range(link.world):
            for chosen in (shapes, shapes[:1], shapes[2:3]):
                buffers = [contribution(shape, dtype, link.rank, root) for shape, dtype in chosen]
                link.broadcast(buffers, root)
                for buffer, (shape, dtype) in zip(buffers, chosen, strict=True):
                    assert torch.equal(buffer, contribution(shape, dtype, root, root))

    _values(make(world)(fn))


def barrier_waits_for_all(make: Make, world: int) -> None:
    """Nobody leaves before the last has come."""

    def fn(link: Link) -> tuple[float, float]:
        link.barrier()
        time.sleep(0.05 * link.rank)
        came = time.monotonic()
        link.barrier()
        return came, time.monotonic()

    times = _values(make(world)(fn))
    assert max(came for came, _ in times) <= min(left for _, left in times)


def many_calls_in_sequence(make: Make, world: int) -> None:
    """Random calls, one after the other, at random moments: none takes another's data."""

    def fn(link: Link) -> None:
        dice = torch.Generator().manual_seed(17)  # the same on all ranks
        own = torch.Generator().manual_seed(link.rank)
        for key in range(150):
            kind, size = (int(torch.randint(0, n, (), generator=dice)) for n in (4, 3000))
            if int(torch.randint(0, 20, (), generator=own)) == 0:
                time.sleep(0.002)
            if kind == 0:
                parts = link.all_gather(contribution((size + link.rank,), torch.float32, link.rank, key))
                for rank, part in enumerate(parts):
                    assert torch.equal(part, contribution((size + rank,), torch.float32, rank, key))
            elif kind == 1:
                root = size % link.world
                buffer = contribution((size,), torch.int64, link.rank, key)
                link.broadcast([buffer], root)
                assert torch.equal(buffer, contribution((size,), torch.int64, root, key))
            else:
                dtype = DTYPES[size % len(DTYPES)]
                size *= 30 if size % 10 == 0 else 1
                buffer = contribution((size,), dtype, link.rank, key)
                link.all_reduce([buffer])
                assert_reduced(buffer, (size,), dtype, link.world, "sum", key)

    _values(make(world)(fn))


def _refuses(call: Callable[[], Any]) -> bool:
    try:
        call()
    except CommError as error:
        return "a link of two" in error.message
    return False


def messages_go_one_way(make: Make, world: int) -> None:
    """Of any length, in the order in which they were sent, also to one who comes late; calls of all go on round them."""

    def fn(link: Link) -> None:
        if link.world != 2:
            assert _refuses(link.receive)
            assert _refuses(lambda: link.send(torch.zeros(3, dtype=torch.uint8)))
            link.barrier()
            return
        for sender in (0, 1, 0):
            for key, size in enumerate((5, 0, 100_000, 1)):
                message = contribution((size,), torch.uint8, sender, key)
                if link.rank == sender:
                    link.send(message)
                else:
                    time.sleep(0.02)
                    assert torch.equal(link.receive(), message)
            total = torch.ones(3)
            link.all_reduce([total])
            assert total.tolist() == [2.0] * 3

    _values(make(world)(fn))


def bytes_sent_are_as_predicted(make: Make, world: int) -> None:
    def fn(link: Link) -> list[int]:
        for numel in (0, 1, 7, 1000, 30_001, 200_003):
            for dtype in (torch.float32, torch.bfloat16, torch.float64):
                buffer = torch.ones(numel, dtype=dtype)
                before = link.traffic.bytes_sent
                link.all_reduce([buffer])
                sent = link.traffic.bytes_sent - before
                assert sent == link.all_reduce_bytes(buffer.nbytes), (numel, dtype)
        assert link.traffic.busy_s >= 0
        assert link.traffic.wait_s >= 0
        return [link.traffic.messages]

    for (messages,) in _values(make(world)(fn)):
        assert (messages > 0) == (world > 1)


def a_mismatch_names_the_ranks(make: Make, world: int) -> None:
    """Every rank raises, and raises again at the next call; also after calls that went well."""
    if world == 1:
        return
    odd = world - 1
    calls: dict[str, tuple[Callable[[Link], Any], Callable[[Link], Any]]] = {
        "op": (lambda link: link.all_reduce([torch.ones(3)]), lambda link: link.all_reduce([torch.ones(3)], "max")),
        "kind": (lambda link: link.all_reduce([torch.ones(3)]), lambda link: link.all_gather(torch.ones(3))),
        "shape": (lambda link: link.all_reduce([torch.ones(3)]), lambda link: link.all_reduce([torch.ones(4)])),
        "large": (
            lambda link: link.all_reduce([torch.ones(99_999)]),
            lambda link: link.all_reduce([torch.ones(99_998)]),
        ),
        "sizes": (lambda link: link.all_reduce([torch.ones(3)]), lambda link: link.all_reduce([torch.ones(99_999)])),
        "dtype": (lambda link: link.all_reduce([torch.ones(4)]), lambda link: link.all_reduce([torch.ones(4).int()])),
        "count": (
            lambda link: link.all_reduce([torch.ones(4)]),
            lambda link: link.all_reduce([torch.ones(2), torch.ones(2)]),
        ),
        "row": (lambda link: link.all_gather(torch.ones(4, 2)), lambda link: link.all_gather(torch.ones(4, 3))),
        "part": (
            lambda link: link.all_gather_into(torch.ones(link.world, 4), torch.ones(4)),
            lambda link: link.all_gather_into(torch.ones(link.world, 5), torch.ones(5)),
        ),
        "scatter": (
            lambda link: link.reduce_scatter(torch.ones(4), torch.ones(link.world, 4)),
            lambda link: link.reduce_scatter(torch.ones(5), torch.ones(link.world, 5)),
        ),
        "root": (lambda link: link.broadcast([torch.ones(4)], 0), lambda link: link.broadcast([torch.ones(4)], 1)),
        "known": (lambda link: link.all_reduce([torch.ones(5)]), lambda link: link.all_reduce([torch.ones(6)])),
    }
    for name, (usual, other) in calls.items():

        def fn(link: Link, usual: Any = usual, other: Any = other) -> tuple[str, tuple[int, ...]]:
            try:
                for size in (5, 6):  # who is still in the second when others have gone on hears of it there
                    link.all_reduce([torch.ones(size)])
                (other if link.rank == odd else usual)(link)
            except Mismatch as error:
                try:
                    link.barrier()
                except CommError:
                    return str(error), error.ranks
                raise AssertionError("a broken link went on") from error
            raise AssertionError("no mismatch was seen")

        for message, ranks in _values(make(world)(fn)):
            assert odd in ranks, name
            assert f"rank {odd}" in message, (name, message)
            assert message.count("conformance.py:") >= 2, f"where each called: {message}"


def a_killed_peer_is_named(make: Make, world: int) -> None:
    """By every survivor, at once (long before the deadline), whether it dies before or between calls."""
    run = make(world)
    if world == 1 or not run.processes:
        return
    for size in (10, 500_000):

        def fn(link: Link, size: int = size) -> tuple[int, ...]:
            for k in range(1000):
                if link.rank == world - 1 and k == 7:
                    os.kill(os.getpid(), signal.SIGKILL)
                try:
                    link.all_reduce([torch.ones(size)])
                except PeerLost as error:
                    return error.ranks
            return ()

        begin = time.monotonic()
        *survivors, dead = run(fn, DEADLINE_S)
        assert time.monotonic() - begin < DEADLINE_S
        assert dead.died
        assert _values(survivors) == [(world - 1,)] * (world - 1)


def a_frozen_peer_is_named(make: Make, world: int) -> None:
    """By every other, at the deadline."""
    run = make(world)
    if world == 1 or not run.processes:
        return
    size = 10 if world % 2 else 500_000

    def fn(link: Link) -> tuple[int, ...]:
        for k in range(5):
            if link.rank == world - 1 and k == 3:
                os.kill(os.getpid(), signal.SIGSTOP)
            try:
                link.all_reduce([torch.ones(size)])
            except DeadlineExceeded as error:
                return error.ranks
        return ()

    *others, frozen = run(fn, SHORT_DEADLINE_S)
    assert frozen.died
    assert _values(others) == [(world - 1,)] * (world - 1)


def a_peer_that_leaves_is_named(make: Make, world: int) -> None:
    """A rank whose own code fails closes its link: the others hear of it."""
    if world == 1:
        return

    def fn(link: Link) -> tuple[int, ...]:
        try:
            link.barrier()  # who is still in it when others have gone on may hear of it there
            if link.rank == 0:
                return ()
            link.all_reduce([torch.ones(10)])
        except PeerLost as error:
            return error.ranks
        return (-1,)

    assert _values(make(world)(fn))[1:] == [(0,)] * (world - 1)


LAWS: tuple[Callable[[Make, int], None], ...] = (
    all_reduce_equals_one_process,
    all_reduce_in_place,
    allocated_buffers_are_reduced,
    all_gather_keeps_rank_order,
    parts_are_gathered_in_place,
    reduce_scatter_equals_one_process,
    broadcast_comes_from_the_root,
    barrier_waits_for_all,
    many_calls_in_sequence,
    messages_go_one_way,
    bytes_sent_are_as_predicted,
    a_mismatch_names_the_ranks,
    a_killed_peer_is_named,
    a_frozen_peer_is_named,
    a_peer_that_leaves_is_named,
)
