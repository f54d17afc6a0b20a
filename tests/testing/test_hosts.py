"""Hosts talk to each other and to nobody else, as fast as they may, and nothing of them stays."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from weft.errors import ConfigError
from weft.testing.hosts import END_S, Host, hosts, sweep

pytestmark = [
    pytest.mark.multiprocess,
    pytest.mark.hosts,
]

SEND = """
import socket, sys
with socket.create_connection((sys.argv[1], 5000), timeout=20) as sock:
    sock.sendall(bytes(int(sys.argv[2])))
    sock.shutdown(socket.SHUT_WR)
    sock.recv(1)
"""
RECEIVE = """
import socket, sys, time
with socket.create_server((sys.argv[1], 5000)) as server:
    server.settimeout(20)
    print("ready", flush=True)
    peer = server.accept()[0]
    begin, total = time.monotonic(), 0
    while part := peer.recv(1 << 16):
        total += len(part)
    peer.send(b"x")
    print(total, 8 * total / (time.monotonic() - begin))
"""


def transfer(a: Host, b: Host, num_bytes: int) -> tuple[int, float]:
    """Bytes that came, and bits per second."""
    with b.popen([sys.executable, "-c", RECEIVE, b.address], stdout=subprocess.PIPE, text=True) as receiver:
        assert receiver.stdout.readline() == "ready\n"
        a.run([sys.executable, "-c", SEND, b.address, str(num_bytes)])
        total, speed = receiver.stdout.read().split()
    return int(total), float(speed)


def networks() -> set[str]:
    return {os.readlink(p) for p in Path("/proc").glob("[0-9]*/ns/net") if p.exists()}


def test_hosts_reach_each_other_and_nobody_else() -> None:
    before = networks()
    interfaces = set(psutil.net_if_addrs())
    with hosts(3) as (a, b, c):
        assert len({a.address, b.address, c.address}) == 3
        for one, other in ((a, b), (b, c), (c, a)):
            assert transfer(one, other, 100_000)[0] == 100_000
        routes = a.run(["ip", "route"]).stdout.splitlines()
        assert len(routes) == 1, "no default route: no packet leaves"
        assert set(psutil.net_if_addrs()) == interfaces
    assert networks() == before


@pytest.mark.slow
def test_a_rate_caps_both_what_a_host_sends_and_what_it_receives() -> None:
    """Not a measure of speed: a cap is a bound from above (a burst of 64 kB comes on top)."""
    with hosts(3, rate="20mbit") as (a, b, c):
        for one, other in ((a, b), (b, a)):
            num_bytes, speed = transfer(one, other, 5_000_000)
            assert num_bytes == 5_000_000
            assert speed < 21e6
        with c.popen([sys.executable, "-c", RECEIVE, c.address], stdout=subprocess.PIPE, text=True) as receiver:
            assert receiver.stdout.readline() == "ready\n"
            flood = [sys.executable, "-c", SEND.replace("5000", "5001"), c.address, "1000000"]
            assert a.run(flood, check=False).returncode != 0, "nobody listens there"
            b.run([sys.executable, "-c", SEND, c.address, "1000000"])


def test_all_that_runs_there_ends_with_it() -> None:
    with hosts(1) as (host,):
        shell = host.popen(["sh", "-c", "sleep 1000 & setsid sleep 1000 & echo; wait"], stdout=subprocess.PIPE)
        shell.stdout.readline()
        everyone = [psutil.Process(shell.pid), *psutil.Process(shell.pid).children(recursive=True)]
        assert len(everyone) == 3
    shell.communicate(timeout=END_S)
    _, alive = psutil.wait_procs(everyone, timeout=END_S)
    assert alive == []


def test_an_error_of_the_user_leaves_nothing() -> None:
    before = networks()

    def fail() -> None:
        with hosts(2) as (a, _):
            a.popen(["sleep", "1000"])
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert networks() == before


def test_a_user_that_is_killed_leaves_nothing(tmp_path: Path) -> None:
    """The kernel removes the namespaces; what has forked itself away from its parents is swept by the next user."""
    code = """
import sys, time
from weft.testing.hosts import hosts
with hosts(2) as (a, b):
    shell = a.popen(["sh", "-c", "setsid sleep 1000 & echo $!; wait"])
    b.popen(["sleep", "1000"])
    time.sleep(1000)
"""
    before = networks()
    user = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    strayed = psutil.Process(int(user.stdout.readline()))
    children = psutil.Process(user.pid).children(recursive=True)
    user.kill()
    user.wait()
    user.stdout.close()
    _, alive = psutil.wait_procs([c for c in children if c.pid != strayed.pid], timeout=END_S)
    assert alive == []
    assert strayed.is_running()
    sweep()
    psutil.wait_procs([strayed], timeout=END_S)
    assert networks() == before


def test_sweeping_spares_the_living() -> None:
    with hosts(1) as (host,):
        process = host.popen(["sleep", "1000"])
        sweep()
        assert process.poll() is None


@pytest.mark.parametrize(("number", "rate", "words"), [(0, None, "0 hosts"), (2, "fast", "'fast'"), (251, None, "251")])
def test_what_is_not_possible_is_refused(number: int, rate: str | None, words: str) -> None:
    with pytest.raises(ConfigError, match=words), hosts(number, rate=rate):
        pass


def test_without_root_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(ConfigError, match="need root"), hosts(1):
        pass


def test_without_its_tools_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(ConfigError, match=r"ip, tc.*iproute2"), hosts(1):
        pass
