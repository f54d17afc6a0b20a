"""Several hosts on one machine: ``with hosts(2, rate="100mbit") as (a, b): a.run(["ip", "address"])``.

Each is a Linux network namespace with one interface, ``eth0``, an address of its own and its own loopback; a bridge in one
more namespace joins them. Nothing of this shows in the machine's own network, and no packet can leave. A namespace has no
name here but the process that holds it, so that the kernel removes it when its user dies, however it dies. Needs root and
iproute2. Files and processes are shared: these are hosts only to whom they talk over the network.
"""

from __future__ import annotations

import contextlib
import ctypes
import ipaddress
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from weft.errors import ConfigError

NETWORK = ipaddress.ip_network("10.213.0.0/24")  # seen by nobody outside
MARK = "WEFT_TESTING_HOSTS"  # in the environment of all that runs on such a host: who made the host
END_S = 5.0
PR_SET_PDEATHSIG = 1
_prctl = ctypes.CDLL(None, use_errno=True).prctl  # loaded before a fork, not within one


def why_not() -> str:
    """Why this machine cannot have such hosts; empty if it can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if missing := [tool for tool in ("ip", "tc", "unshare", "nsenter") if shutil.which(tool) is None]:
        return f"{', '.join(missing)} not found: install Debian's packages iproute2 and util-linux"
    tried = subprocess.run(["unshare", "--net", "true"], capture_output=True, text=True, timeout=10)
    return "" if tried.returncode == 0 else f"no network namespaces here: {tried.stderr.strip()}"


class Host:
    """``address``: the others reach it there. What runs here dies with whoever made the host."""

    def __init__(self, address: str, keeper: subprocess.Popen[bytes]) -> None:
        self.address = address
        self._keeper = keeper
        self._started: list[subprocess.Popen[Any]] = []

    def popen(
        self, command: Sequence[str], *, env: Mapping[str, str] | None = None, **options: Any
    ) -> subprocess.Popen[Any]:
        """subprocess.Popen on this host. ``env`` is as there; signals reach the command itself."""
        inside = ["nsenter", f"--net=/proc/{self._keeper.pid}/ns/net", "--", *command]
        process = subprocess.Popen(inside, env=_marked(env), preexec_fn=_die_with(os.getpid()), **options)
        self._started = [p for p in self._started if p.poll() is None] + [process]
        return process

    def _end(self) -> None:
        for process in self._started:  # one that has just been started may not have come here yet
            process.kill()
        _end(_in_namespace_of(self._keeper.pid))
        for process in self._started:
            process.wait()

    def run(
        self, command: Sequence[str], *, timeout: float = 60.0, check: bool = True, **options: Any
    ) -> subprocess.CompletedProcess[str]:
        """subprocess.run on this host, with its output as text; it is killed after ``timeout`` seconds."""
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True} | options
        with self.popen(command, **options) as process:
            try:
                out, err = process.communicate(timeout=timeout)
            except BaseException:
                process.kill()
                raise
        if check and process.returncode:
            raise subprocess.CalledProcessError(process.returncode, list(command), out, err)
        return subprocess.CompletedProcess(list(command), process.returncode, out, err)


@contextmanager
def hosts(number: int, rate: str | None = None) -> Iterator[list[Host]]:
    """``number`` hosts that reach each other. ``rate``: what each can send, and what it can receive, as ``tc`` writes it
    ("100mbit"); None: as fast as memory. At the end all that runs on them is killed, and they are gone.

    Raises ConfigError where ``why_not()`` has a reason.
    """
    if not 1 <= number <= 250:
        raise ConfigError(f"{number} hosts are not possible: 1 to 250.")
    if rate is not None and not re.fullmatch(r"[0-9]+(\.[0-9]+)?[kmg]?bit", rate):
        raise ConfigError(f"rate {rate!r} is not one: write it as tc does, 100mbit or 1gbit.")
    if reason := why_not():
        raise ConfigError(f"cannot make hosts: {reason}.")
    sweep()
    keepers: list[subprocess.Popen[bytes]] = []
    made: list[Host] = []
    try:
        keepers.extend(_keep_namespace() for _ in range(number + 1))  # those made before one fails are kept in mind
        switch, *others = keepers
        _in(switch, "ip link add bridge type bridge", "ip link set bridge up")
        for k, (keeper, address) in enumerate(zip(others, NETWORK.hosts())):
            _in(switch, f"ip link add eth0 netns {keeper.pid} type veth peer name port{k}")
            _in(switch, f"ip link set port{k} master bridge", f"ip link set port{k} up")
            _in(
                keeper,
                "ip link set lo up",
                f"ip address add {address}/{NETWORK.prefixlen} dev eth0",
                "ip link set eth0 up",
            )
            if rate is not None:
                cap = f"root tbf rate {rate} burst 64kb latency 200ms"
                _in(keeper, f"tc qdisc add dev eth0 {cap}")
                _in(switch, f"tc qdisc add dev port{k} {cap}")
            made.append(Host(str(address), keeper))
        yield made
    finally:
        for host in made:
            host._end()
        for keeper in keepers:
            keeper.kill()
            keeper.wait()


def sweep() -> None:
    """End what still runs on hosts whose maker was killed before it could."""
    left = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            maker = process.environ().get(MARK)
            if maker and not _is_alive(maker):
                left.append(process)
    _end(left)


def _keep_namespace() -> subprocess.Popen[bytes]:
    """A process that does nothing but to be in a network namespace of its own."""
    command = ["unshare", "--net", "sh", "-c", "echo; exec sleep infinity"]
    keeper = subprocess.Popen(
        command, env=_marked(None), stdout=subprocess.PIPE, stdin=subprocess.DEVNULL, preexec_fn=_die_with(os.getpid())
    )
    assert keeper.stdout is not None
    with keeper.stdout as said:
        if not said.readline():  # the namespace is there before it says so
            raise ConfigError(f"cannot make hosts: unshare ended with exit status {keeper.wait()}.")
    return keeper


def _in(keeper: subprocess.Popen[bytes], *commands: str) -> None:
    for command in commands:
        inside = ["nsenter", f"--net=/proc/{keeper.pid}/ns/net", "--", *command.split()]
        done = subprocess.run(inside, capture_output=True, text=True, timeout=10)
        if done.returncode:
            raise ConfigError(f"cannot make hosts: `{command}` says: {done.stderr.strip()}")


def _in_namespace_of(pid: int) -> list[psutil.Process]:
    """All in it but ``pid`` itself."""
    try:
        wanted = os.readlink(f"/proc/{pid}/ns/net")
    except OSError:
        return []
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(OSError):
            if process.pid != pid and os.readlink(f"/proc/{process.pid}/ns/net") == wanted:
                found.append(process)
    return found


def _end(processes: list[psutil.Process]) -> None:
    for process in processes:
        with contextlib.suppress(psutil.Error):
            process.kill()
    until = time.monotonic() + END_S
    while any(_runs(p) for p in processes) and time.monotonic() < until:
        time.sleep(0.01)


def _runs(process: psutil.Process) -> bool:
    """A zombie does not, and is its parent's to bury."""
    with contextlib.suppress(psutil.Error):
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    return False


def _marked(env: Mapping[str, str] | None) -> dict[str, str]:
    return {**(os.environ if env is None else env), MARK: f"{os.getpid()} {_started(os.getpid())}"}


def _is_alive(maker: str) -> bool:
    pid, _, started = maker.partition(" ")
    return pid.isdecimal() and _started(int(pid)) == started


def _started(pid: int) -> str:
    """When, in the kernel's ticks: with the id it names a process for good."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return ""


def _die_with(parent: int) -> Any:
    def before_exec() -> None:
        _prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:
            os._exit(1)

    return before_exec
