"""The launcher's side of one zygote: start, signal and end the processes that it forks, and hear what they say."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import psutil

from weft.clusters.base import Asked, Exited, LinkSpec, MemberSpec, Message, Output, Session, SessionEvent
from weft.clusters.pipe import Closed, Pipe
from weft.clusters.zygote import STOP, encode_start
from weft.errors import MemberFailed, from_wire

CLOSE_S = 1.0
REST_S = 2.0


class ProcessSession(Session):
    """``env``: what the processes find in their environment beside ours."""

    def __init__(self, preload: Sequence[str], env: Mapping[str, str] | None = None) -> None:
        ours, theirs = socket.socketpair()
        # BLAS and OpenMP make their threads when first loaded; the zygote must have none
        own = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        own["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # asking for GPUs must not start CUDA before a fork
        command = [sys.executable, "-m", "weft.clusters.zygote", str(theirs.fileno()), str(os.getpid())]
        self._process = subprocess.Popen(
            command,
            pass_fds=[theirs.fileno()],
            env={**os.environ, **(env or {}), **own},
            start_new_session=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,  # what members print comes as messages
            stderr=None if sys.stderr else subprocess.DEVNULL,
        )
        theirs.close()
        self._pipe = Pipe(ours)
        # a task given as an object is imported from where it was here
        self._send(path_now(preload))

    @property
    def pid(self) -> int:
        return self._process.pid

    def start(self, members: Sequence[MemberSpec], links: Sequence[LinkSpec]) -> None:
        self._send(encode_start(members, links))

    def request_stop(self) -> None:
        self._send({"do": "signal", "signal": int(STOP)})

    def ask(self) -> None:
        self._send({"do": "ask"})

    def kill(self) -> None:
        self._send({"do": "signal", "signal": int(signal.SIGKILL)})

    def poll(self, timeout_s: float) -> list[SessionEvent]:
        if not self._pipe.ready(timeout_s):
            return []
        try:
            return [translate(m) for m in self._pipe.read()]
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

    def rest(self) -> bool:
        """Be as if nothing had been started yet, for another run. False: it cannot, and is to be closed."""
        try:
            self._send({"do": "rest"})
            until = time.monotonic() + REST_S
            while (left := until - time.monotonic()) > 0 and self._pipe.ready(left):
                for message in self._pipe.read():  # what else comes is still of the run before
                    if message["event"] == "rests":
                        return not message["members"] and not self._started_by_members()
        except (Closed, MemberFailed):
            pass
        return False

    def wake(self, preload: Sequence[str]) -> bool:
        """After ``rest``. False: it has ended meanwhile."""
        try:
            self._pipe.send(path_now(preload))
        except Closed:
            return False
        return self._process.poll() is None

    def _started_by_members(self) -> list[int]:
        """Processes of this session; the members are gone."""
        return [pid for pid in psutil.pids() if pid != self.pid and session_of(pid) == self.pid]

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


def path_now(preload: Sequence[str]) -> dict[str, Any]:
    return {"do": "path", "path": sys.path, "preload": list(preload)}


def session_of(pid: int) -> int:
    try:
        return os.getsid(pid)
    except (ProcessLookupError, PermissionError):
        return 0


def translate(message: dict[str, Any]) -> SessionEvent:
    """What a zygote says, as an event. Raises what it refused to do."""
    kind = message["event"]
    if kind == "message":
        return Message(message["member"], message["data"])
    if kind == "output":
        return Output(message["member"], message["text"])
    if kind == "asked":
        return msgspec.convert({"member": message["member"]} | message["data"], Asked)
    if kind == "refused":
        raise from_wire(message["error"])
    return Exited(message["member"], message["code"], message["signal"], message["error"])
