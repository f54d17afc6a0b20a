"""Supervised processes on this machine, forked from one zygote. The default cluster."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

from weft.clusters.base import Cluster, Exited, LinkSpec, MemberSpec, Message, Output, Session, SessionEvent
from weft.clusters.pipe import Closed, Pipe
from weft.clusters.zygote import STOP, encode_start
from weft.errors import Incompatible, MemberFailed, from_wire

CLOSE_S = 1.0


class LocalSession(Session):
    def __init__(self, preload: Sequence[str]) -> None:
        ours, theirs = socket.socketpair()
        # BLAS and OpenMP make their threads when first loaded; the zygote must have none
        env = os.environ | dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        env["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # asking for GPUs must not start CUDA before a fork
        command = [sys.executable, "-m", "weft.clusters.zygote", str(theirs.fileno()), str(os.getpid())]
        self._process = subprocess.Popen(
            command,
            pass_fds=[theirs.fileno()],
            env=env,
            start_new_session=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,  # what members print comes as messages
            stderr=None if sys.stderr else subprocess.DEVNULL,
        )
        theirs.close()
        self._pipe = Pipe(ours)
        # a task given as an object is imported from where it was here
        self._send({"do": "path", "path": sys.path, "preload": list(preload)})

    @property
    def pid(self) -> int:
        return self._process.pid

    def start(self, members: Sequence[MemberSpec], links: Sequence[LinkSpec]) -> None:
        self._send(encode_start(members, links))

    def request_stop(self) -> None:
        self._send({"do": "signal", "signal": int(STOP)})

    def kill(self) -> None:
        self._send({"do": "signal", "signal": int(signal.SIGKILL)})

    def poll(self, timeout_s: float) -> list[SessionEvent]:
        if not self._pipe.ready(timeout_s):
            return []
        try:
            return [self._translate(m) for m in self._pipe.read()]
        except Closed:
            raise self._gone() from None

    def close(self) -> None:
        """Kill the zygote's whole session: members, and what they may have started themselves."""
        self._pipe.close()  # the zygote sees it, kills its members, tidies up and ends
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(CLOSE_S)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def _send(self, command: dict[str, Any]) -> None:
        try:
            self._pipe.send(command)
        except Closed:
            raise self._gone() from None

    def _gone(self) -> MemberFailed:
        deadline = time.monotonic() + 2
        while self._process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        code = self._process.returncode
        cause = f"killed by {signal.Signals(-code).name}" if code is not None and code < 0 else f"exit status {code}"
        return MemberFailed(f"the supervisor of the workers (pid {self._process.pid}) died: {cause}", cause=cause)

    @staticmethod
    def _translate(message: dict[str, Any]) -> SessionEvent:
        kind = message["event"]
        if kind == "message":
            return Message(message["member"], message["data"])
        if kind == "output":
            return Output(message["member"], message["text"])
        if kind == "refused":
            raise from_wire(message["error"])
        return Exited(message["member"], message["code"], message["signal"], message["error"])


class Local(Cluster):
    name = "local"

    def open(self, preload: Sequence[str]) -> LocalSession:
        return LocalSession(preload)

    def check(self, carrier: str) -> None:
        if carrier == "inproc":
            raise Incompatible("link 'inproc' joins threads, not processes: use --cluster inprocess, or --link shm.")
        if carrier == "shm":
            from weft.comm.shm import supported

            if why := supported():
                raise Incompatible(f"link 'shm' does not work here ({why}): use --link tcp.")

    def default_carrier(self, world: int, device: str) -> tuple[str, str]:
        from weft.comm.shm import supported

        if world == 1:
            return "none", "one worker has nobody to talk to"
        if device == "cuda":
            return "nccl", "gradients on GPUs"
        if why := supported():
            return "tcp", f"no shared memory: {why}"
        return "shm", "all workers on one host: gradients live in shared memory"
