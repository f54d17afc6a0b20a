"""A cable that is pulled in the middle of a transfer: nobody is told, and everybody's call ends by its deadline."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from weft.testing.hosts import hosts

DEADLINE_S = 3.0
PORT = 7300

RANK = """
import json, sys, time, torch
from weft.comm.collectives import RingLink
from weft.comm.tcp import TcpEndpoint, listen
from weft.errors import CommError

rank, deadline_s, addresses = int(sys.argv[1]), float(sys.argv[2]), {int(k): tuple(v) for k, v in json.loads(sys.argv[3]).items()}
listener = listen(*addresses[rank], insecure=True)
link = RingLink(TcpEndpoint(rank, listener, addresses, 20.0), rank, len(addresses), "tcp", deadline_s)
link.barrier()
print("joined", flush=True)
begin = time.monotonic()
try:
    link.all_reduce([torch.ones(12_500_000)])  # 50 MB: 4 s at 100 Mbit/s
    print("whole")
except CommError as error:
    took = time.monotonic() - begin
    link.close()
    print(json.dumps([type(error).__name__, error.ranks, took, time.monotonic() - begin - took]))
"""


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.hosts
def test_a_link_cut_in_mid_transfer_ends_by_the_deadline(tmp_path: Path) -> None:
    script = tmp_path / "rank.py"
    script.write_text(RANK)
    with hosts(2, rate="100mbit") as both:
        addresses = json.dumps({rank: (host.address, PORT) for rank, host in enumerate(both)})
        ranks = [
            host.popen(
                [sys.executable, str(script), str(rank), str(DEADLINE_S), addresses],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank, host in enumerate(both)
        ]
        for process in ranks:
            assert process.stdout is not None
            assert process.stdout.readline() == "joined\n"
        time.sleep(0.5)
        both[1].run(["ip", "link", "set", "eth0", "down"])
        for rank, process in enumerate(ranks):
            out, err = process.communicate(timeout=60)
            assert process.returncode == 0, err
            kind, blamed, took, closing = json.loads(out)
            assert (kind, blamed) == ("DeadlineExceeded", [1 - rank])
            assert DEADLINE_S <= took < 10 * DEADLINE_S
            assert closing < DEADLINE_S, "closing waits for the one that is gone"
