"""A single-threaded process that has imported torch and forks members from its main thread: a worker starts in milliseconds.

Why one, and why it never computes: a parent that has used torch's threads hangs its forked children; a death signal
follows the forking *thread*, so the thread must live as long as the members. Whoever dies, nobody stays: the zygote dies
with the launcher (its death signal; on other systems, when the socket ends), members with the zygote.

Run as ``python -m weft.clusters.zygote FD``. From the launcher: path, start, signal, ask, rest. To it: message, output, asked,
exited.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import importlib
import os
import select
import selectors
import signal
import socket
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NoReturn

import msgspec

from weft.clusters.base import LinkSpec, MemberSpec, Seat, resolve
from weft.clusters.pipe import Closed, Pipe
from weft.comm.last_call import Board, LastCall
from weft.comm.link import WORLD
from weft.company import die_with_parent
from weft.errors import to_wire
from weft.usage import memory_left

if TYPE_CHECKING:
    from weft.comm.endpoint import Endpoint
    from weft.comm.link import Link

STOP = signal.SIGUSR1
ASK = signal.SIGUSR2  # a member answers with its stack, also from within a call that never returns
ASK_S = 0.5  # until those that have not answered count as silent
QUIET_S = 0.05  # of silence: what was written is whole


class Transport:
    """What must exist before the members of a group are forked: shared memory, listening sockets, a store."""

    def __init__(self, spec: LinkSpec) -> None:
        self.spec = spec
        self.region: Any = None
        self.listeners: list[socket.socket] = []
        self.store = -1
        if spec.carrier == "shm":
            from weft.comm.shm import Region

            most = memory_left() // (2 * spec.world)  # what has no room in a heap of frames travels through sockets
            self.region = Region.create(spec.world, min(spec.nbytes, most) if spec.frames else spec.nbytes)
        if (spec.carrier == "tcp" and spec.store is None) or (self.region is not None and spec.frames):
            from weft.comm.tcp import listen

            try:
                for rank in range(spec.world):
                    self.listeners.append(listen(port=spec.port + rank if spec.port else 0))
            except BaseException:
                self.close()
                raise
        elif spec.carrier in ("gloo", "nccl") and spec.store is None:
            self.store = os.memfd_create("weft-store")  # a file without a name: gone with the last who has it

    def link(self, rank: int) -> Link:
        link = self._join(rank)
        link.deadline_s = self.spec.call_s
        return link

    def _join(self, rank: int) -> Link:
        spec = self.spec
        if spec.carrier == "shm":
            from weft.comm.shm import ShmLink

            return ShmLink(self.region, rank, spec.deadline_s, members=spec.members)
        if spec.carrier == "tcp" and spec.store is None:
            from weft.comm.collectives import RingLink

            members = spec.members or tuple(range(spec.world))
            chosen: dict[str, Any] = {"collective": spec.collective, "speed": spec.speed}
            return RingLink(self.endpoint(rank), rank, spec.world, "tcp", spec.deadline_s, members=members, **chosen)
        if spec.carrier in ("tcp", "hierarchical"):
            from weft.comm.hierarchical import join_by_store, join_hosts
            from weft.comm.torchdist import connect_store

            assert spec.store is not None
            at = spec.store
            store = connect_store(at.host, at.port, prefix=at.prefix, deadline_s=spec.deadline_s)
            told: dict[str, Any] = {"address": spec.host, "deadline_s": spec.deadline_s, "members": spec.members}
            told |= {"collective": spec.collective, "speed": spec.speed}
            if spec.carrier == "tcp":
                return join_by_store(rank, range(spec.world), store, **told)
            return join_hosts(rank, spec.hosts, store, nbytes=spec.nbytes, **told)
        if spec.carrier == "none":
            from weft.comm.link import SoloLink

            return SoloLink()
        from weft.comm.torchdist import TorchDistLink, connect_store

        backend: Literal["gloo", "nccl"] = "nccl" if spec.carrier == "nccl" else "gloo"
        meet: Any = f"/proc/self/fd/{self.store}"
        if s := spec.store:
            meet = connect_store(s.host, s.port, prefix=s.prefix, deadline_s=spec.deadline_s)
        limits = {"deadline_s": spec.deadline_s, "call_s": spec.call_s}
        return TorchDistLink(rank, spec.world, backend=backend, store=meet, host=spec.host, **limits)

    def endpoint(self, rank: int) -> Endpoint:
        """``members`` names everybody."""
        from weft.comm.shm import ShmEndpoint
        from weft.comm.tcp import TcpEndpoint

        spec = self.spec
        members = spec.members or tuple(range(spec.world))
        addresses = {m: listener.getsockname()[:2] for m, listener in zip(members, self.listeners, strict=True)}
        for other, listener in enumerate(self.listeners):
            if other != rank:
                listener.close()
        if self.region is not None:
            ranks = {member: rank for rank, member in enumerate(members)}
            return ShmEndpoint(members[rank], self.listeners[rank], addresses, self.region, ranks, spec.deadline_s)
        return TcpEndpoint(members[rank], self.listeners[rank], addresses, spec.deadline_s)

    def mark_dead(self, member: int) -> None:
        if self.region is not None and (rank := self.spec.rank_of(member)) is not None:
            self.region.mark_dead(rank)

    def close(self) -> None:
        for listener in self.listeners:
            listener.close()
        if self.region is not None:
            self.region.close()
        if self.store >= 0:
            os.close(self.store)
            self.store = -1


class ForkedSeat(Seat):
    def __init__(
        self, spec: MemberSpec, pipe: Pipe, transports: Sequence[Transport], board: Board, answers: int
    ) -> None:
        self.spec, self._pipe, self._transports, self._board = spec, pipe, transports, board
        self._stop = False
        signal.signal(STOP, self._on_stop)
        faulthandler.register(ASK, answers, all_threads=True)

    def _on_stop(self, *_: object) -> None:
        self._stop = True

    def send(self, message: dict[str, Any]) -> None:
        self._pipe.send(message)

    def stop_requested(self) -> bool:
        return self._stop

    def note(self, call: LastCall) -> None:
        self._board.write(self.spec.member, call)

    def link(self, group: str = WORLD) -> Link:
        transport, rank = self._place(group)
        return transport.link(rank)

    def endpoint(self, group: str = WORLD) -> Endpoint:
        transport, rank = self._place(group)
        return transport.endpoint(rank)

    def _place(self, group: str) -> tuple[Transport, int]:
        for transport in self._transports:
            rank = transport.spec.rank_of(self.spec.member)
            if transport.spec.group == group and rank is not None:
                return transport, rank
        raise LookupError(f"member {self.spec.member} stands in no group {group!r}")


@dataclass
class Child:
    member: int
    pid: int
    pipe: Pipe
    output: int  # read end of its stdout and stderr
    answers: int  # read end of what it says when it is asked where it is
    error: dict[str, Any] | None = None


class Zygote:
    def __init__(self, launcher: Pipe) -> None:
        self.launcher = launcher
        self.children: dict[int, Child] = {}
        self.transports: list[Transport] = []
        self.board = Board([])
        self.pids: dict[int, int] = {}  # of those on the board, also when they have ended
        self.preload: list[str] = []
        self.selector = selectors.DefaultSelector()
        self.wake_read, wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.signal(ASK, signal.SIG_IGN)  # inherited: a member may be asked before it can answer
        signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
        self.selector.register(launcher, selectors.EVENT_READ, self._on_launcher)
        self.selector.register(self.wake_read, selectors.EVENT_READ, self._on_child_ended)

    def serve(self) -> None:
        while True:
            self.serve_once(None)

    def serve_once(self, timeout_s: float | None) -> None:
        """What children said first, then who ended: to bury one closes what the same look may have found it to say."""
        ready = [key for key, _ in self.selector.select(timeout_s)]
        for key in sorted(ready, key=lambda key: key.fileobj == self.wake_read):
            key.data()

    def warm_up(self) -> None:
        """Import what every member needs, while a preflight that was asked for meanwhile is at work on the other core.

        The first optimizer imports torch._dynamo (a second). What is imported is frozen out of the members' garbage
        collections (and stays shared memory).
        """
        self.serve_once(0)
        for module in ("torch._dynamo", *self.preload):
            importlib.import_module(module)
        gc.freeze()

    def _on_launcher(self) -> None:
        for command in self.launcher.read():
            if command["do"] == "start":
                self._start(command)
            elif command["do"] == "path":
                sys.path[:] = command["path"]
                importlib.invalidate_caches()
                self.preload = command["preload"]
            elif command["do"] == "signal":
                for child in self.children.values():
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(child.pid, command["signal"])
            elif command["do"] == "ask":
                self._ask()
            elif command["do"] == "rest":
                self._close_transports()
                self.launcher.send({"event": "rests", "members": len(self.children)})

    def _start(self, command: dict[str, Any]) -> None:
        if not self.children:
            self._close_transports()
        try:
            for link in command["links"]:
                self.transports.append(Transport(msgspec.convert(link, LinkSpec)))
        except Exception as error:
            self.launcher.send({"event": "refused", "error": to_wire(error, traceback.format_exc())})
            return
        self.board, self.pids = Board([member["member"] for member in command["members"]]), {}
        for member in command["members"]:
            self._fork(MemberSpec(**member))

    def _fork(self, spec: MemberSpec) -> None:
        ours, theirs = socket.socketpair()
        out_read, out_write = os.pipe2(os.O_CLOEXEC)
        answers_read, answers_write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        sys.stdout.flush()
        sys.stderr.flush()
        parent = os.getpid()
        pid = os.fork()
        if pid == 0:
            die_with_parent(parent)
            os.dup2(out_write, 1)
            os.dup2(out_write, 2)
            for fd in (out_write, out_read, answers_read, self.wake_read):
                os.close(fd)
            ours.close()
            for child in self.children.values():
                child.pipe.close()
                os.close(child.output)
                os.close(child.answers)
            self.launcher.close()
            self.selector.close()
            run_child(spec, Pipe(theirs), self.transports, self.board, answers_write)
        theirs.close()
        os.close(out_write)
        os.close(answers_write)
        os.set_blocking(out_read, False)
        child = Child(spec.member, pid, Pipe(ours), out_read, answers_read)
        self.children[pid] = child
        self.pids[spec.member] = pid
        self.selector.register(child.pipe, selectors.EVENT_READ, lambda: self._on_message(child))
        self.selector.register(out_read, selectors.EVENT_READ, lambda: self._on_output(child))

    def _ask(self) -> None:
        """Nobody is waited for longer than ASK_S: one that is stopped, or waits in the kernel, cannot answer."""
        asked = {child.answers: child for child in self.children.values() if child.member in self.pids}
        for child in asked.values():
            with contextlib.suppress(ProcessLookupError):
                os.kill(child.pid, ASK)
        stacks = {child.member: b"" for child in asked.values()}
        until = time.monotonic() + ASK_S
        while (left := until - time.monotonic()) > 0 and asked:
            whole = all(stacks[child.member] for child in asked.values())
            ready = select.select(list(asked), [], [], min(left, QUIET_S) if whole else left)[0]
            if whole and not ready:
                break
            for answers in ready:
                if part := os.read(answers, 1 << 16):
                    stacks[asked[answers].member] += part
                else:  # it has ended
                    del asked[answers]
        for member, pid in self.pids.items():
            alive = pid in self.children
            call, now = self.board.read(member), time.monotonic()
            data = {
                "pid": pid,
                "state": process_state(pid) if alive else "X",
                "stack": stacks.get(member, b"").decode(errors="replace"),
                "call": None if call is None else msgspec.to_builtins(call),
                "began_s": now - call.began if call is not None else 0.0,
                "ended_s": now - call.ended if call is not None and call.ended else None,
            }
            self.launcher.send({"event": "asked", "member": member, "data": data})

    def _close_transports(self) -> None:
        for transport in self.transports:
            transport.close()
        self.transports = []

    def _on_message(self, child: Child) -> None:
        try:
            self._forward(child, child.pipe.read())
        except Closed:
            self.selector.unregister(child.pipe)

    def _forward(self, child: Child, messages: list[dict[str, Any]]) -> None:
        for message in messages:
            if "raised" in message:
                child.error = message["raised"]
            else:
                self.launcher.send({"event": "message", "member": child.member, "data": message})

    def _on_output(self, child: Child) -> bool:
        """Forward what was printed; True while there may be more."""
        try:
            text = os.read(child.output, 1 << 16)
        except BlockingIOError:
            return False
        if not text:
            self.selector.unregister(child.output)
            return False
        self.launcher.send({"event": "output", "member": child.member, "text": text.decode(errors="replace")})
        return True

    def _on_child_ended(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.read(self.wake_read, 4096)
        while self.children:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            if pid in self.children:
                self._bury(self.children.pop(pid), status)

    def _bury(self, child: Child, status: int) -> None:
        for transport in self.transports:
            transport.mark_dead(child.member)
        self._forward(child, child.pipe.drain())
        registered = self.selector.get_map()
        if child.output in registered:
            while self._on_output(child):
                pass
        for source in (child.pipe, child.output):
            if source in self.selector.get_map():
                self.selector.unregister(source)
        child.pipe.close()
        os.close(child.output)
        os.close(child.answers)
        number = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
        code = os.WEXITSTATUS(status) if os.WIFEXITED(status) else 1
        self.launcher.send(
            {"event": "exited", "member": child.member, "code": code, "signal": number, "error": child.error}
        )


def process_state(pid: int) -> str:
    """The kernel's letter; "?" where it does not tell."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0]
    except OSError:
        return "?"


def run_child(spec: MemberSpec, pipe: Pipe, transports: Sequence[Transport], board: Board, answers: int) -> NoReturn:
    """The life of a member, from fork to _exit: exit handlers of the zygote are not ours to run."""
    code = 1
    try:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
        resolve(spec.entry)(ForkedSeat(spec, pipe, transports, board, answers))
        code = 0
    except Closed:
        pass  # nobody is left to tell
    except BaseException as error:
        with contextlib.suppress(Closed):
            pipe.send({"raised": to_wire(error, traceback.format_exc())})
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def main() -> None:
    fd, parent = int(sys.argv[1]), int(sys.argv[2])
    die_with_parent(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the launcher decides what Ctrl-C means
    launcher = Pipe(socket.socket(fileno=fd))
    import torch

    torch.set_num_threads(1)
    zygote = Zygote(launcher)
    try:
        zygote.warm_up()
        zygote.serve()
    except Closed:
        for child in zygote.children.values():
            with contextlib.suppress(ProcessLookupError):
                os.kill(child.pid, signal.SIGKILL)
        zygote._close_transports()


def encode_start(members: Sequence[MemberSpec], links: Sequence[LinkSpec]) -> dict[str, Any]:
    return {"do": "start", "members": msgspec.to_builtins(members), "links": msgspec.to_builtins(links)}


if __name__ == "__main__":
    main()
